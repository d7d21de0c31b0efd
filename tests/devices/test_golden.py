"""Golden payloads: what a release wrote is imported by every later one; shapes never change under their number."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import pytest

from tools import payload_fixtures
from vmmigrate.devices import block, fields, registry
from vmmigrate.devices.fields import U16
from vmmigrate.devices.payload import DevicePayload
from vmmigrate.devices.propolis import read_device_states, write_device_states
from vmmigrate.devices.registry import KINDS, Kind, decode, shape_changes
from vmmigrate.errors import PayloadError

FILES = sorted(payload_fixtures.PAYLOADS.glob("*/v*/*.hex"))


def golden(path: Path) -> DevicePayload:
    kind, version = path.parent.parent.name, int(path.parent.name.removeprefix("v"))
    return DevicePayload("golden", kind, version, bytes.fromhex(path.read_text()))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.parent.name}-{path.parent.name}")
def test_every_golden_payload_imports_and_is_written_again_byte_for_byte(path: Path) -> None:
    payload = golden(path)
    kind = KINDS[payload.kind]

    state = decode(payload)

    assert isinstance(state, kind.shapes[kind.newest])
    assert payload_fixtures.to_json(msgpack.unpackb(payload.body)) == path.with_suffix(".json").read_text()
    if payload.version == kind.newest:
        assert registry.encode("golden", kind.name, state) == payload


def test_every_kind_and_version_has_a_golden_payload_and_its_shape_is_as_recorded() -> None:
    """`tools.payload_fixtures --check` is what CI would run; this is the same, so that `make test` finds it too."""
    assert payload_fixtures.check() == []
    assert {(p.kind, p.version) for p in map(golden, FILES)} >= {
        (kind.name, version) for kind in KINDS.values() for version in kind.shapes
    }


@dataclass(frozen=True, slots=True)
class WiderV1:
    pci_cfg_addr: U16


def _with(name: str, shapes: Mapping[int, type[Any]], **conversions: Any) -> Mapping[str, Kind]:
    return {**KINDS, name: replace(KINDS[name], shapes=shapes, **conversions)}


def test_a_shape_that_changes_without_a_new_version_fails_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test that tries: one field of one kind gets another width, and nobody gives it a number."""
    monkeypatch.setattr(registry, "KINDS", _with("i440fx-hb", {1: WiderV1}))

    assert shape_changes(payload_fixtures.read_recorded()) == [
        "i440fx-hb version 1 has another shape than was recorded; give the new shape a new version"
    ]


def test_a_nested_shape_counts_as_part_of_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Propolis' own slips were fields of nested structs: a queue that gained one."""
    table = {**fields.fields_of(block.NvmeCompletionQueue), "shadow": fields.Integer(0, 1)}
    monkeypatch.setitem(fields._tables, block.NvmeCompletionQueue, table)

    assert [line.split(";")[0] for line in shape_changes(payload_fixtures.read_recorded())] == [
        "nvme-ctrl version 1 has another shape than was recorded"
    ]


def test_a_new_version_has_to_be_recorded_and_a_released_one_may_not_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {1: KINDS["i440fx-hb"].shapes[1], 2: WiderV1}
    conversions = {"up": {1: lambda old: old}, "down": {2: lambda new: new}}
    monkeypatch.setattr(registry, "KINDS", _with("i440fx-hb", shapes, **conversions))
    recorded = payload_fixtures.read_recorded()

    assert shape_changes(recorded) == ["i440fx-hb version 2 is not recorded yet"]
    monkeypatch.setattr(registry, "KINDS", {name: kind for name, kind in KINDS.items() if name != "i440fx-hb"})
    assert any("i440fx-hb version 1 is gone" in line for line in shape_changes(recorded))


def test_the_tool_refuses_to_change_what_was_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload_fixtures, "PAYLOADS", tmp_path)
    assert payload_fixtures.main(["--check"]) == 1
    assert payload_fixtures.main([]) == 0
    assert payload_fixtures.main(["--check"]) == 0
    schemas, body = tmp_path / "schemas.toml", payload_fixtures.payload_path("uart-16550", 1)
    schemas.write_text(schemas.read_text().replace(KINDS["uart-16550"].schema_hash(1), "0" * 64))
    body.write_text("00\n")

    assert payload_fixtures.main([]) == 1
    assert payload_fixtures.main(["--rewrite-head"]) == 1, "version 1 is not the head of this kind"
    assert body.read_text() == "00\n"
    assert payload_fixtures.main(["--force"]) == 2


def test_propolis_device_state_lists_decode_and_are_written_as_they_were() -> None:
    lines = (payload_fixtures.PAYLOADS / "propolis_device_states.jsonl").read_text().splitlines()

    trees = [json.loads(line)["json"] for line in lines]

    assert [write_device_states(read_device_states(tree)) for tree in trees] == trees
    first = read_device_states(trees[0])
    assert [(d.instance_name, [(p.kind, p.version) for p in d.payload]) for d in first] == [
        ("boot-disk", [("nvme-ctrl", 1)]),
        ("it's", []),
    ]


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({}, "devices: is dict"),
        ([{"instance_name": "d"}], "payload: missing"),
        ([{"instance_name": "d", "payload": [{"kind": "k", "version": -1, "data": ""}]}], "version: is -1"),
        ([{"instance_name": "d", "payload": [], "more": 1}], "more: unknown field"),
    ],
)
def test_a_malformed_propolis_list_is_refused_with_the_path(tree: Any, says: str) -> None:
    with pytest.raises(PayloadError, match=says):
        read_device_states(tree)
