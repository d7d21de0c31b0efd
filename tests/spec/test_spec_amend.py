"""Amendment: the right backends in the right places, every fault at once, and the same volume or none."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest

from vmmigrate.errors import SpecAmendError, SpecParseError
from vmmigrate.jsontext import compact
from vmmigrate.spec import chain, document
from vmmigrate.spec.amend import Allowances, amend, parse_replacements
from vmmigrate.spec.build import FAILURE_INJECTION
from vmmigrate.spec.chain import AnySpec
from vmmigrate.spec.diff import diff
from vmmigrate.spec.keys import SpecKey, spec_key
from vmmigrate.spec.latest import (
    BlobStorageBackend,
    CrucibleStorageBackend,
    InstanceSpec,
    MigrationFailureInjector,
    SmbiosType1Input,
    VirtioNetworkBackend,
)
from vmmigrate.spec.volume import differences, parse_volume, regions, serialise_volume

ID = "6f5e0c1a-9b7d-4e2f-8a3c-00000000000"
KEY = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="


def region(number: int, generation: int) -> dict[str, Any]:
    opts = {"id": f"{ID}{number}", "target": ["[fd00::1]:19000"], "lossy": False, "key": KEY, "read_only": False}
    sizes = {"block_size": 512, "blocks_per_extent": 100, "extent_count": 10}
    return {"type": "region", **sizes, "opts": opts, "gen": generation}


def volume(generation: int = 5, parent_generation: int = 3) -> dict[str, Any]:
    parent = {"type": "volume", "id": f"{ID}8", "block_size": 512, "sub_volumes": [region(3, parent_generation)]}
    return {
        "type": "volume",
        "id": f"{ID}9",
        "block_size": 512,
        "sub_volumes": [region(1, generation), region(2, generation)],
        "read_only_parent": parent,
    }


def crucible(request: Any, readonly: bool = False) -> CrucibleStorageBackend:
    return CrucibleStorageBackend(request_json=compact(request), readonly=readonly)


def source(version: str = "v1") -> AnySpec:
    """One disk on Crucible, one NIC, one failure injector and one file backend."""
    path = {"bus": 0, "function": 0}
    parts = {
        "disk": ("virtio_disk", {"backend_id": "disk-be", "pci_path": {**path, "device": 4}}),
        "disk-be": ("crucible_storage_backend", {"request_json": compact(volume()), "readonly": False}),
        "nic": ("virtio_nic", {"backend_id": "nic-be", "interface_id": f"{ID}7", "pci_path": {**path, "device": 5}}),
        "nic-be": ("virtio_network_backend", {"vnic_name": "vnic-source"}),
        "iso": ("virtio_disk", {"backend_id": "iso-be", "pci_path": {**path, "device": 6}}),
        "iso-be": ("file_storage_backend", {"path": "/iso", "readonly": True, "block_size": 512}),
        "mf": ("migration_failure_injector", {"fail_exports": 0, "fail_imports": 1}),
    }
    board = {"cpus": 1, "memory_mb": 1, "chipset": {"type": "i440_fx", "value": {"enable_pcie": False}}}
    components = {key: {"type": tag, "component": fields} for key, (tag, fields) in parts.items()}
    return document.parse(version, compact({"board": board, "components": components}))


NIC = VirtioNetworkBackend(vnic_name="vnic-destination")
GOOD: dict[SpecKey, Any] = {spec_key("disk-be"): crucible(volume(6)), spec_key("nic-be"): NIC}
FEATURES = frozenset({FAILURE_INJECTION})


def faults(replacements: dict[str, Any], allowances: Allowances = Allowances(), **options: Any) -> list[Any]:  # noqa: B008
    with pytest.raises(SpecAmendError) as caught:
        amend(
            source(),
            {spec_key(key): part for key, part in replacements.items()},
            allowances,
            options.get("features", FEATURES),
        )
    return [(error["code"], error["component"]) for error in caught.value.details["errors"]]


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_replacements_take_their_places_and_the_version_stays(version: str) -> None:
    before = source(version)

    after = amend(before, GOOD, features=FEATURES)

    assert chain.version_of(after) == version
    changed = {key for key in after.components if after.components[key] != before.components[key]}
    assert changed == set(GOOD)
    assert list(after.components) == list(before.components)


def test_an_unreplaced_backend_is_a_fault_unless_it_is_kept_on_purpose() -> None:
    assert faults({}) == [("backend_not_replaced", "disk-be"), ("backend_not_replaced", "nic-be")]
    assert amend(source(), {}, Allowances.of(["disk-be", "nic-be"]), FEATURES) == source()
    assert amend(source(), {}, Allowances.of(["*"]), FEATURES) == source()


def test_all_faults_are_reported_at_once() -> None:
    injector = MigrationFailureInjector(fail_exports=0, fail_imports=0)

    found = faults(
        {"nope": NIC, "disk-be": NIC, "iso-be": crucible(volume()), "mf": injector},
        Allowances.of(["iso", "ghost"]),
        features=frozenset(),
    )  # fmt: skip

    assert found == [
        ("wrong_kind", "disk-be"),
        ("wrong_kind", "iso-be"),
        ("feature_compiled_out", "mf"),
        ("unknown_component", "nope"),
        ("unknown_component", "ghost"),
        ("wrong_kind", "iso"),
        ("backend_not_replaced", "nic-be"),
    ]


def test_keeping_and_replacing_one_backend_is_a_contradiction() -> None:
    assert faults(dict(GOOD), Allowances.of(["nic-be"])) == [("kept_and_replaced", "nic-be")]


def test_a_result_that_is_no_machine_is_a_fault() -> None:
    """The source's spec is not trusted: here the injector is in it, and this host has no such feature."""
    assert faults(dict(GOOD), features=frozenset()) == [("feature_compiled_out", "mf")]


def test_the_failure_injector_can_be_replaced_where_the_feature_exists() -> None:
    injector = MigrationFailureInjector(fail_exports=7, fail_imports=0)

    after = amend(source(), {**GOOD, spec_key("mf"): injector}, features=FEATURES)

    assert after.components[spec_key("mf")] == injector


# ---- volumes


def changed(**changes: Any) -> dict[str, Any]:
    """A sound replacement with one field of its second region changed."""
    request = volume(6)
    target = request["sub_volumes"][1]
    for name, value in changes.items():
        (target["opts"] if name in target["opts"] else target)[name] = value
    return request


def without(name: str) -> dict[str, Any]:
    request = volume(6)
    del request[name]
    return request


@pytest.mark.parametrize(
    ("request_json", "code"),
    [
        (volume(5), "generation_not_larger"),
        (volume(4), "generation_not_larger"),
        (changed(gen=5), "generation_not_larger"),
        (changed(id=f"{ID}6"), "volume_id_changed"),
        (changed(block_size=4096), "volume_size_changed"),
        (changed(extent_count=11), "volume_size_changed"),
        (changed(read_only=True), "volume_readonly_changed"),
        ({**volume(6), "id": f"{ID}6"}, "volume_id_changed"),
        ({**volume(6), "block_size": 4096}, "volume_size_changed"),
        ({**volume(6), "sub_volumes": [region(1, 6)]}, "volume_shape_changed"),
        (without("read_only_parent"), "volume_shape_changed"),
        ({**volume(6), "read_only_parent": region(3, 3)}, "volume_shape_changed"),
        (region(1, 6), "volume_shape_changed"),
        ("garbage", "volume_request_invalid"),
    ],
)
def test_another_volume_is_refused_unless_volume_changes_are_allowed(request_json: Any, code: str) -> None:
    replacements = {**GOOD, spec_key("disk-be"): crucible(request_json)}

    assert {found for found, _ in faults(dict(replacements))} == {code}
    amend(source(), replacements, Allowances.of(allow_volume_change=True), FEATURES)


def test_a_backend_that_turns_read_only_is_refused() -> None:
    found = faults({**GOOD, "disk-be": crucible(volume(6), readonly=True)})

    assert found == [("volume_readonly_changed", "disk-be")]


def test_the_same_generation_passes_only_when_it_is_allowed_and_a_smaller_one_never() -> None:
    allowed = Allowances.of(allow_same_generation=True)

    amend(source(), {**GOOD, spec_key("disk-be"): crucible(volume(5))}, allowed, FEATURES)
    found = faults({**GOOD, "disk-be": crucible(volume(4))}, allowed)

    assert found == [("generation_not_larger", "disk-be")] * 2


@pytest.mark.parametrize("generation", [0, 3, 4])
def test_regions_below_a_read_only_parent_keep_any_generation(generation: int) -> None:
    assert differences(parse_volume(compact(volume(5))), parse_volume(compact(volume(6, generation)))) == []


def test_paths_urls_and_addresses_may_differ_between_hosts() -> None:
    for kind, field in (("file", "path"), ("url", "url")):
        one = {"type": kind, "id": f"{ID}1", "block_size": 512, field: "a"}
        assert differences(parse_volume(compact(one)), parse_volume(compact({**one, field: "b"}))) == []
    other = deepcopy(volume(6))
    other["sub_volumes"][0]["opts"]["target"] = ["[fd00::2]:19000"]
    assert differences(parse_volume(compact(volume())), parse_volume(compact(other))) == []


def test_a_difference_says_where_in_the_tree_it_is() -> None:
    found = differences(parse_volume(compact(volume(5))), parse_volume(compact(changed(gen=1))))

    assert [difference.text for difference in found] == ["volume.sub_volumes[1]: generation 1, allowed is 6 or more"]


def test_a_volume_request_is_written_back_and_its_regions_are_found() -> None:
    request = parse_volume(compact(volume()))

    assert parse_volume(serialise_volume(request)) == request
    assert [found.opts.id[-1] for found in regions(request)] == ["1", "2", "3"]


def test_no_error_and_no_representation_shows_a_key() -> None:
    with pytest.raises(SpecAmendError) as caught:
        amend(source(), {**GOOD, spec_key("disk-be"): crucible({**volume(4), "id": f"{ID}6"})}, features=FEATURES)

    shown = caught.value.text + json.dumps(caught.value.details) + repr(parse_volume(compact(volume())))
    assert KEY not in shown


# ---- replacements text and diff


def test_replacements_are_read_with_their_own_names_and_in_key_order() -> None:
    text = (
        '{"b":{"spec":{"vnic_name":"x"},"component":"VirtioNetworkBackend"},'
        f'"{ID.upper()}1":{{"component":"CrucibleStorageBackend","spec":{{"request_json":"","readonly":true}}}}}}'
    )

    found = parse_replacements(text)

    assert list(found) == [f"{ID}1", "b"]
    assert found[spec_key("b")] == VirtioNetworkBackend(vnic_name="x")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"a":{"component":"FileStorageBackend","spec":{}}}', "unknown_variant"),
        ('{"a":{"component":"virtio_network_backend","spec":{"vnic_name":"x"}}}', "unknown_variant"),
        ('{"a":{"component":"VirtioNetworkBackend","spec":{"vnic_name":"x","mtu":1}}}', "unknown_field"),
        ('{"a":{"type":"VirtioNetworkBackend","component":{"vnic_name":"x"}}}', "unknown_field"),
        ("[]", "invalid_type"),
    ],
)
def test_what_is_no_replacement_is_refused(text: str, code: str) -> None:
    with pytest.raises(SpecParseError) as caught:
        parse_replacements(text)

    assert caught.value.code == code


def test_the_diff_shows_generations_and_names_and_hides_keys() -> None:
    rows = diff(source(), amend(source(), GOOD, features=FEATURES))

    assert [(row.where, row.field, row.before, row.after) for row in rows] == [
        ("disk-be", "region 0 generation", "5", "6"),
        ("disk-be", "region 1 generation", "5", "6"),
        ("nic-be", "vnic_name", "vnic-source", "vnic-destination"),
    ]


def test_a_hidden_field_that_changed_is_said_to_have_changed() -> None:
    other = crucible({**volume(5), "x": 1, "id": f"{ID}6"})
    after = amend(source(), {**GOOD, spec_key("disk-be"): other}, Allowances.of(allow_volume_change=True), FEATURES)

    assert diff(source(), after)[0].after == "hidden, changed"


def test_equal_specs_of_different_versions_have_no_difference() -> None:
    assert diff(source("v1"), source("v3")) == []


def test_the_diff_names_added_components_and_changed_boards() -> None:
    before = source()
    parts = {**before.components, spec_key("new"): NIC}
    board = before.board.model_copy(update={"cpus": 2})

    rows = diff(before, before.model_copy(update={"board": board, "components": parts}))

    assert [(row.where, row.field, row.before, row.after) for row in rows] == [
        ("board", "cpus", "1", "2"),
        ("new", "type", "-", "virtio_network_backend"),
    ]


def test_the_diff_shows_smbios_texts_and_hides_what_is_no_volume_request_or_a_blob() -> None:
    before = chain.up(source())
    smbios = SmbiosType1Input(manufacturer="m", product_name="p", serial_number="s", version=1)
    blobs = [BlobStorageBackend(base64=text, readonly=True) for text in ("s3cret", "t0p-s3cret")]
    bad = [CrucibleStorageBackend(request_json=text, readonly=True) for text in ("s3cret", "t0p-s3cret")]

    def spec(index: int, **more: Any) -> InstanceSpec:
        parts = {spec_key("a"): blobs[index], spec_key("b"): bad[index]}
        return before.model_copy(update={"components": parts, **more})

    rows = diff(spec(0), spec(1, smbios=smbios))

    assert [(row.where, row.field) for row in rows] == [
        ("a", "base64"), ("b", "request_json"), ("smbios", "manufacturer"), ("smbios", "product_name"),
        ("smbios", "serial_number"), ("smbios", "version"),
    ]  # fmt: skip
    assert "s3cret" not in repr(rows)
    assert (rows[-1].before, rows[-1].after) == ("-", "1")
