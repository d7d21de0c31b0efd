"""Guest time across a move: Propolis' rules and every error case."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmigrate.devices.time import I64_MAX, I64_MIN, NS_PER_S, U64_MAX, TimeData, adjust
from vmmigrate.errors import PayloadError

SOURCE = TimeData(
    guest_freq=1_000_000_000,
    guest_tsc=7_000_000_000,
    hrtime=50 * NS_PER_S,
    hres_sec=1_700_000_000,
    hres_ns=250_000_000,
    boot_hrtime=43 * NS_PER_S,
)


def test_the_guest_ages_by_what_the_wall_clocks_say() -> None:
    adjustment = adjust(SOURCE, 9 * NS_PER_S, 1_700_000_002, 750_000_000)

    assert adjustment.delta_ns == 2_500_000_000
    assert not adjustment.clamped
    assert adjustment.time.boot_hrtime == 9 * NS_PER_S - 7 * NS_PER_S - 2_500_000_000
    assert adjustment.time.guest_tsc == 7_000_000_000 + 2_500_000_000
    assert adjustment.time.guest_freq == SOURCE.guest_freq
    assert (adjustment.time.hrtime, adjustment.time.hres_sec) == (9 * NS_PER_S, 1_700_000_002)


def test_a_destination_whose_clock_is_behind_does_not_turn_time_back() -> None:
    adjustment = adjust(SOURCE, 9 * NS_PER_S, 1_700_000_000, 0)

    assert adjustment.clamped
    assert adjustment.delta_ns == 0
    assert adjustment.time.guest_tsc == SOURCE.guest_tsc
    assert adjustment.time.boot_hrtime == 2 * NS_PER_S


def test_boot_time_may_lie_before_the_boot_of_the_destination() -> None:
    assert adjust(SOURCE, 0, 1_700_000_000, 250_000_000).time.boot_hrtime == -7 * NS_PER_S


def test_the_counter_wraps_at_64_bits() -> None:
    time = replace(SOURCE, guest_tsc=U64_MAX)

    assert adjust(time, 0, 1_700_000_000, 250_000_001).time.guest_tsc == 0


@pytest.mark.parametrize(
    ("source", "clocks", "code"),
    [
        ({"guest_freq": 0}, (0, 1_700_000_000, 0), "time_freq_zero"),
        ({"hres_ns": NS_PER_S}, (0, 1_700_000_000, 0), "time_wall_ns"),
        ({}, (0, 1_700_000_000, NS_PER_S), "time_wall_ns"),
        ({}, (-1, 1_700_000_000, 0), "time_hrtime_negative"),
        ({"hres_sec": 0, "hres_ns": 0}, (0, U64_MAX, 0), "time_delta_overflow"),
        ({"hres_sec": 0, "hres_ns": 0}, (0, I64_MAX // NS_PER_S + 1, 0), "time_delta_overflow"),
        ({"hrtime": I64_MAX, "boot_hrtime": -1}, (0, 1_700_000_000, 0), "time_uptime_overflow"),
        ({"hrtime": I64_MIN, "boot_hrtime": 1}, (0, 1_700_000_000, 0), "time_uptime_overflow"),
        ({"hrtime": 1, "boot_hrtime": 2}, (0, 1_700_000_000, 0), "time_uptime_negative"),
        ({"hrtime": I64_MAX, "boot_hrtime": 0}, (0, 1_700_000_001, 0), "time_uptime_delta_overflow"),
        ({"guest_freq": U64_MAX}, (0, 1_700_000_002, 0), "time_tsc_overflow"),
        ({"guest_freq": U64_MAX, "hres_sec": 0, "hres_ns": 0}, (0, 9_000_000_000, 0), "time_tsc_overflow"),
    ],
)
def test_every_impossible_adjustment_has_its_own_error(
    source: dict[str, int], clocks: tuple[int, int, int], code: str
) -> None:
    with pytest.raises(PayloadError) as caught:
        adjust(replace(SOURCE, **source), *clocks)

    assert caught.value.code == code


U64 = st.integers(0, U64_MAX)
I64 = st.integers(I64_MIN, I64_MAX)
TIMES = st.builds(TimeData, guest_freq=U64, guest_tsc=U64, hrtime=I64, hres_sec=U64, hres_ns=U64, boot_hrtime=I64)


@given(TIMES)
def test_the_wire_map_round_trips(time: TimeData) -> None:
    assert TimeData.from_map(time.to_map()) == time


@given(TIMES, I64, U64, U64)
def test_an_adjustment_is_in_range_or_a_payload_error(time: TimeData, hrtime: int, sec: int, ns: int) -> None:
    refused = None
    try:
        adjustment = adjust(time, hrtime, sec, ns)
    except PayloadError as error:
        refused = error

    if refused is not None:
        assert refused.code.startswith("time_")
    else:
        assert TimeData.from_map(adjustment.time.to_map()) == adjustment.time


@pytest.mark.parametrize(
    "tree",
    [
        None,
        [],
        {},
        {**SOURCE.to_map(), "more": 1},
        {k: v for k, v in SOURCE.to_map().items() if k != "hrtime"},
        {**SOURCE.to_map(), "guest_freq": -1},
        {**SOURCE.to_map(), "hrtime": 1 << 63},
        {**SOURCE.to_map(), "hres_sec": True},
        {**SOURCE.to_map(), "hres_sec": 1.5},
    ],
)
def test_a_map_that_is_not_time_is_refused(tree: Any) -> None:
    with pytest.raises(PayloadError) as caught:
        TimeData.from_map(tree)

    assert caught.value.code == "time_fields"
