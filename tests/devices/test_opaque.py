"""Opaque payloads: facts decide whether they fit, and every fact that differs is told."""

from __future__ import annotations

import pytest

from vmmigrate.devices.opaque import Difference, guest_differences, host_differences, is_within, owner_of

GUEST = {
    "hypervisor": "qemu",
    "hypervisor_version": "9.2.1",
    "machine_type": "pc-q35-9.2",
    "cpu_model": "qemu64",
    "device_tree": "6c1f",
}
HOST = {
    "hypervisor": "qemu",
    "hypervisor_version": "9.2.4",
    "loads_versions": "8.0..9.2",
    "machine_types": "pc-q35-8.2 pc-q35-9.2",
    "cpu_models": "qemu64 EPYC",
}


def test_the_owner_stands_in_the_kind() -> None:
    assert owner_of("qemu/vmstate") == "qemu"
    assert owner_of("uart-16550") is None


def test_a_host_that_has_all_of_it_loads_the_state() -> None:
    assert host_differences(GUEST, HOST) == []
    assert guest_differences(GUEST, GUEST) == []


def test_every_fact_that_differs_is_told_at_once() -> None:
    host = {"hypervisor": "xen", "loads_versions": "8.0..9.1", "machine_types": "pvh", "cpu_models": "host"}

    assert host_differences(GUEST, host) == [
        Difference("hypervisor", "qemu", "xen"),
        Difference("hypervisor_version", "9.2.1", "8.0..9.1"),
        Difference("machine_type", "pc-q35-9.2", "pvh"),
        Difference("cpu_model", "qemu64", "host"),
    ]


def test_what_is_not_told_never_matches() -> None:
    assert [difference.fact for difference in host_differences({}, {})] == [
        "hypervisor",
        "hypervisor_version",
        "machine_type",
        "cpu_model",
    ]
    assert [d.destination for d in host_differences(GUEST, {})] == ["not told"] * 4
    assert [d.fact for d in guest_differences({}, {})] == ["hypervisor", "machine_type", "cpu_model", "device_tree"]


def test_the_built_guest_must_be_the_same_down_to_its_device_tree() -> None:
    assert guest_differences(GUEST, {**GUEST, "device_tree": "77aa", "cpu_model": "EPYC"}) == [
        Difference("cpu_model", "qemu64", "EPYC"),
        Difference("device_tree", "6c1f", "77aa"),
    ]
    assert str(Difference("cpu_model", "a", "b")) == "cpu_model: source a, destination b"


@pytest.mark.parametrize(
    ("version", "bounds", "within"),
    [
        ("9.2", "8.0..9.2", True),
        ("9.2.7", "8.0..9.2", True),
        ("8.0", "8.0..9.2", True),
        ("10.0", "8.0..9.2", False),
        ("7.2.9", "8.0..9.2", False),
        ("9.10", "9.2..9.11", True),
        ("10.0.2", "7.2..", True),
        ("7.2.22", "7.2..", True),
        ("7.1", "7.2..", False),
        ("new", "7.2..", False),
        ("9.2", "..9.2", False),
        ("9.2", "..", False),
        ("1.2", "1.2", True),
        ("1.3", "1.2", False),
        ("new", "1..2", False),
        ("1", "old..new", False),
        ("", "1..2", False),
    ],
)
def test_versions_are_compared_as_numbers_and_a_bound_names_all_below_it(
    version: str, bounds: str, within: bool
) -> None:
    assert is_within(version, bounds) is within


def test_facts_that_only_some_hypervisors_tell_are_compared_when_one_side_tells_them() -> None:
    guest = {"hypervisor": "q", "machine_type": "m", "cpu_model": "c", "device_tree": "d"}

    assert guest_differences(guest, guest) == []
    differing = guest_differences({**guest, "ram_blocks": "a:1"}, guest)
    assert [(x.fact, x.source, x.destination) for x in differing] == [("ram_blocks", "a:1", "not told")]
