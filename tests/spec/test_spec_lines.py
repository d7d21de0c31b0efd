"""The line contracts of `vmmigrate spec … --jsonl`: what other programs rely upon."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from tests.spec.schema_fit import misfits
from tests.spec.spec_corpus import VERSIONS, rows
from vmmigrate.cli import spec as commands
from vmmigrate.errors import UsageError

CONTRACTS = Path(__file__).parents[2] / "docs" / "contracts"
BOARD = {"cpus": 1, "memory_mb": 1, "chipset": {"type": "i440_fx", "value": {"enable_pcie": False}}}
SPEC = {"board": BOARD, "components": {}}
SOCKET = {"type": "virtio_socket", "component": {"guest_cid": 3, "pci_path": {"bus": 0, "device": 4, "function": 0}}}
NIC = {"type": "virtio_network_backend", "component": {"vnic_name": "x"}}
SMBIOS = {"manufacturer": "m", "product_name": "p", "serial_number": "s", "version": 2**64 - 1}

Command = Callable[[BinaryIO, BinaryIO], None]
COMMANDS: dict[str, Command] = {
    "spec-check": commands.spec_check,
    "spec-convert": partial(commands.spec_convert, to="v1"),
    "spec-build": partial(commands.spec_build, features=frozenset()),
    "spec-negotiate": partial(commands.spec_negotiate, accept=("v1", "v2")),
    "spec-amend": partial(commands.spec_amend, features=frozenset()),
}
RON_COMMANDS: dict[str, Command] = {
    "spec-from-ron": partial(commands.spec_from_ron, kind="spec"),
    "spec-to-ron": partial(commands.spec_to_ron, kind="spec"),
}


def ask(name: str, *lines: Any) -> list[Any]:
    """The answers to lines, each given as a value or as raw bytes."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines]
    out = io.BytesIO()
    (COMMANDS | RON_COMMANDS)[name](io.BytesIO(b"".join(raw)), out)
    return [json.loads(answer) for answer in out.getvalue().splitlines()]


def question(name: str, spec: Any, version: str = "v3", **more: Any) -> dict[str, Any]:
    """A line of that command about a spec."""
    field = {"spec-check": json.dumps(spec), "spec-amend": None}.get(name, spec)
    if name == "spec-amend":
        return {"id": 1, "spec_version": version, "source_spec": spec, "replacements": "{}", **more}
    return {"id": 1, "spec_version": version, "input": field, **more}


def fits(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    return not list(misfits(schema, value, root))


QUESTIONS = [
    (SPEC, "v1"),
    ({**SPEC, "smbios": SMBIOS}, "v2"),
    ({**SPEC, "components": {"v": SOCKET}}, "v3"),
    ({**SPEC, "components": {"nic-be": NIC}}, "v1"),
    ({**SPEC, "board": 1}, "v1"),
    (SPEC, "v9"),
]


@pytest.mark.parametrize("name", COMMANDS)
def test_lines_and_answers_fit_their_schema(name: str) -> None:
    schema = json.loads((CONTRACTS / f"{name}.json").read_text(encoding="utf-8"))
    lines = [question(name, spec, version) for spec, version in QUESTIONS]

    answers = ask(name, *lines, b"not json\n")

    assert all(fits(schema["$defs"]["line"], line, schema) for line in lines)
    for answer in answers:
        assert fits(schema["$defs"]["answer"], answer, schema), answer
    assert len(answers) == len(lines) + 1
    assert not fits(schema["$defs"]["answer"], {**answers[0], "extra": 1}, schema)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_bad_line_is_answered_and_the_next_one_too(name: str) -> None:
    bad = [b"\n", b"[]\n", b"{\n", b"\xff\n", b'{"id":1,"id":2}\n', b"{}\n", b'{"id":1e999}\n', b'"\xe2\x80\xa8"\n']

    *refused, last = ask(name, *bad, question(name, SPEC))

    assert [answer["error"]["code"] for answer in refused] == ["bad_line"] * len(bad)
    assert all(answer["id"] is None and answer["ok"] is False for answer in refused)
    assert last["id"] == 1
    assert last.get("ok", last.get("accepted")) is True


@pytest.mark.parametrize("name", COMMANDS)
def test_a_line_with_a_missing_or_wrong_field_is_a_bad_line_with_its_id(name: str) -> None:
    good = question(name, SPEC)
    broken = [{key: value for key, value in good.items() if key != name_} for name_ in good if name_ != "id"]
    broken.append({**good, "spec_version": 1})
    if name == "spec-amend":
        broken += [{**good, "keep": "nic"}, {**good, "keep": [1]}, {**good, "allow_volume_change": 1}]

    for answer in ask(name, *broken):
        assert (answer["id"], answer["error"]["code"]) == (1, "bad_line")


def test_a_spec_that_is_no_value_is_a_bad_line() -> None:
    (answer,) = ask("spec-build", rb'{"id":1,"spec_version":"v1","input":"\ud800"}')

    assert (answer["id"], answer["error"]["code"]) == (1, "bad_line")


@pytest.mark.parametrize("spelling", ["18446744073709551616", '"é"', "1.50", '{"a":[null]}', "true"])
def test_an_id_comes_back_as_it_was_spelled(spelling: str) -> None:
    out = io.BytesIO()

    commands.spec_check(io.BytesIO(f'{{"id": {spelling}, "spec_version": "v1", "input": ""}}\n'.encode()), out)

    assert out.getvalue().startswith(f'{{"id":{spelling},'.encode())


def test_lines_are_split_on_the_line_feed_only_and_the_last_needs_none() -> None:
    line = json.dumps(question("spec-check", {**SPEC, "x": "\u2028\x85"}), ensure_ascii=False).encode()

    assert len(ask("spec-check", line + b"\r\n", line)) == 2


def test_check_answers_with_the_document_as_it_is_written() -> None:
    spec = {**SPEC, "smbios": SMBIOS, "ignored": 1}

    (answer,) = ask("spec-check", question("spec-check", spec))

    assert answer == {"id": 1, "accepted": True, "normalized": {**SPEC, "smbios": SMBIOS}}


@pytest.mark.parametrize(
    ("member", "code"),
    [('"cpus":1,"cpus":1', "duplicate_field"), ('"cpus":1.0', "invalid_type"), ('"cpus":256', "invalid_value")],
)
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "spec-check"])
def test_specs_inside_of_lines_are_held_to_the_same_strictness(name: str, member: str, code: str) -> None:
    line = json.dumps(question(name, SPEC), separators=(",", ":")).replace('"cpus":1', member)

    (answer,) = ask(name, line.encode() + b"\n")

    error = answer["errors"][0] if name == "spec-amend" else answer["error"]
    assert error["code"] == code


def test_convert_names_what_is_lost() -> None:
    spec = {**SPEC, "components": {"v": SOCKET}, "smbios": SMBIOS}

    (answer,) = ask("spec-convert", question("spec-convert", spec))

    assert answer["error"]["code"] == "lossy_downgrade"
    assert answer["error"]["lost"] == [
        {"component": "v", "what": "virtio_socket"}, {"component": None, "what": "smbios"},
    ]  # fmt: skip


def test_build_names_code_and_component() -> None:
    (answer,) = ask("spec-build", question("spec-build", {**SPEC, "components": {"b": NIC}}, "v1"))

    assert answer["error"] == {
        "code": "backend_not_used", "component": "b", "message": "backend b not used by any device",
    }  # fmt: skip


def test_negotiate_answers_with_version_and_document_or_every_reason() -> None:
    chosen, refused = ask(
        "spec-negotiate",
        question("spec-negotiate", {**SPEC, "smbios": SMBIOS}),
        question("spec-negotiate", {**SPEC, "components": {"v": SOCKET}}),
    )

    assert (chosen["version"], chosen["document"]["smbios"]) == ("v2", SMBIOS)
    assert list(refused["error"]["reasons"]) == list(reversed(VERSIONS))


def test_amend_reports_all_errors_and_keeps_in_any_spelling() -> None:
    key = "6f5e0c1a-9b7d-4e2f-8a3c-000000000001"
    nic = {"type": "virtio_nic", "component": {
        "backend_id": key, "interface_id": key, "pci_path": {"bus": 0, "device": 4, "function": 0},
    }}  # fmt: skip
    spec = {**SPEC, "components": {key: NIC, "nic": nic}}

    kept, refused = ask(
        "spec-amend",
        question("spec-amend", spec, "v1", keep=[key.upper()]),
        question("spec-amend", spec, "v1", keep=["ghost"]),
    )

    assert kept["document"]["components"][key] == NIC
    assert [error["code"] for error in refused["errors"]] == ["unknown_component", "backend_not_replaced"]


def test_unknown_arguments_are_refused_before_any_line_is_read() -> None:
    for call in (
        partial(commands.spec_convert, to="v9"),
        partial(commands.spec_build, features=frozenset({"x"})),
        partial(commands.spec_amend, features=frozenset({"x"})),
    ):
        with pytest.raises(UsageError, match="allowed: "):
            call(io.BytesIO(b"{}\n"), io.BytesIO())


def test_lines_and_answers_about_ron_fit_their_schema() -> None:
    (written, refused) = ask("spec-to-ron", {"id": 1, "input": SPEC}, {"id": 2, "input": {**SPEC, "smbios": SMBIOS}})
    answers = ask("spec-from-ron", {"id": 1, "input": written["ron"]}, {"id": 2, "input": "(\n"}, b"not json\n")

    for name, found in (("spec-to-ron", [written, refused]), ("spec-from-ron", answers)):
        schema = json.loads((CONTRACTS / f"{name}.json").read_text(encoding="utf-8"))
        assert all(fits(schema["$defs"]["answer"], answer, schema) for answer in found)
        assert fits(schema["$defs"]["line"], {"id": 1, "input": ""}, schema)
    assert answers[0]["value"] == SPEC
    assert (answers[1]["error"]["line"], answers[1]["error"]["reported"]) == (2, "Unexpected end of RON")
    assert refused["error"]["path"] == "/smbios"


def test_ten_thousand_lines_are_answered_in_order() -> None:
    """How long that takes is measured by bench/spec_lines.py."""
    corpus = list(rows("cases"))
    lines = [{**corpus[number % len(corpus)], "id": number} for number in range(10_000)]

    answers = ask("spec-check", *lines)

    assert [answer["id"] for answer in answers] == list(range(10_000))
    assert [answer["accepted"] for answer in answers[: len(corpus)]].count(True) > 400
