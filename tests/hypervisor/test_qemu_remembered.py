"""What a QEMU remembers is read as it was written, or refused: its guest may have taken it over."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

import pytest

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.base import GuestStamp
from vmmigrate.hypervisor.qemu.remembered import MAX_TEXT_CHARS, Remembered, from_text

STAMP = GuestStamp("vm", "alpha", (1, 2), "migration")
FULL = Remembered(
    STAMP,
    seen=(3, 4),
    ran=(1, 2),
    handoff="migration",
    is_open=True,
    is_arriving=True,
    has_loaded=True,
    is_deaf=True,
    announces=True,
    last_record=7,
    last_journal="journal",
    booted_ns=-5,
)
LEAST = Remembered(GuestStamp("vm", "alpha", (1, 1), None), seen=(1, 1))


def refused(text: Any) -> None:
    with pytest.raises(HypervisorError) as caught:
        from_text(text)
    assert caught.value.code == "qemu_protocol"


def changed(**changes: Any) -> str:
    return json.dumps({**asdict(FULL), **changes})


@pytest.mark.parametrize("memory", [FULL, LEAST], ids=["full", "least"])
def test_what_was_remembered_is_read_as_it_was(memory: Remembered) -> None:
    assert from_text(memory.to_text()) == memory


def test_what_an_earlier_release_did_not_know_has_its_default() -> None:
    """Fields are added; a guest may live longer than the release that started it."""
    few = {name: value for name, value in asdict(LEAST).items() if name in {"stamp", "seen"}}

    assert from_text(json.dumps(few)) == LEAST


ODD = [[], ["x"], {}, 1.5, float("inf"), float("nan"), 10**400, -(10**400), 1 << 63]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:12])
@pytest.mark.parametrize("name", [field.name for field in fields(Remembered)])
def test_a_field_of_another_kind_is_refused(name: str, odd: Any) -> None:
    refused(changed(**{name: odd}))


@pytest.mark.parametrize("odd", [*ODD, True], ids=lambda odd: repr(odd)[:12])
@pytest.mark.parametrize("name", [field.name for field in fields(GuestStamp)])
def test_a_field_of_the_stamp_of_another_kind_is_refused(name: str, odd: Any) -> None:
    refused(changed(stamp={**asdict(STAMP), name: odd}))


@pytest.mark.parametrize("name", ["seen", "ran"])
@pytest.mark.parametrize("odd", [[1], [1, 2, 3], [1, "2"], [1, True], [1, 10**400], "12", {"1": 1, "2": 2}], ids=repr)
def test_an_epoch_is_two_numbers(name: str, odd: Any) -> None:
    refused(changed(**{name: odd}))


@pytest.mark.parametrize("name", [field.name for field in fields(Remembered) if field.type == "bool"])
@pytest.mark.parametrize("odd", [0, 1, None, "true"])
def test_a_truth_is_no_number(name: str, odd: Any) -> None:
    refused(changed(**{name: odd}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "5",
        "{}",
        '"text"',
        "[" * 10_000,
        '{"stamp":' * 1_500,
        json.dumps({"stamp": asdict(STAMP)}),
        json.dumps({"seen": [1, 1]}),
        changed(unknown=1),
        changed(last_journal="\ud800"),
        changed(stamp={**asdict(STAMP), "unknown": 1}),
        changed(last_journal="x" * MAX_TEXT_CHARS),
        FULL.to_text() + "x",
        b"{}",
        None,
        5,
        [],
        {"stamp": 1},
    ],
    ids=lambda text: repr(text)[:24],
)
def test_what_we_did_not_write_is_refused(text: Any) -> None:
    refused(text)
