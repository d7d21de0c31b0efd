"""Forecasts: of a pause, from what earlier ones took; of a migration, by playing it through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmigrate.memory import PAGE_SIZE
from vmmigrate.ram.convergence import Convergence, Limits, Round
from vmmigrate.ram.forecast import DirtyCurve, PauseHistory, Rehearsed, Typical, simulate

PAGES_PER_S = 100_000
MEASURED = Rehearsed(devices_s=0.004, journal_s=0.001, round_trip_s=0.002, guest_request_s=0.0005, verify_s=0.0)


def judge_of(fixed_s: float = 0.01) -> Convergence:
    """One who knows the link: 100,000 pages per second and nothing for an empty round."""
    judge = Convergence(fixed_s)
    judge.rate.note(PAGES_PER_S * PAGE_SIZE)
    judge.overhead_s.note(0.0)
    return judge


# --------------------------------------------------------------------------- pauses


def test_an_unknown_host_is_assumed_to_be_like_this_one() -> None:
    fixed_s = MEASURED.fixed_s(PauseHistory())

    assert 0.02 < fixed_s < 0.05


def test_what_is_assumed_grows_with_everything_that_was_measured() -> None:
    base = MEASURED.fixed_s(PauseHistory())
    for name in ("devices_s", "journal_s", "round_trip_s", "guest_request_s", "verify_s"):
        slower = Rehearsed(**{field: getattr(MEASURED, field) for field in MEASURED.__slots__} | {name: 1.0})
        assert slower.fixed_s(PauseHistory()) >= base + 0.9, name


def test_a_pause_that_ended_well_teaches_what_the_next_one_will_take() -> None:
    history = PauseHistory()
    for _ in range(3):
        history.note(downtime_s=0.05, last_round_s=0.02, devices_s=0.01)

    assert Rehearsed().fixed_s(history) == pytest.approx(0.02)


def test_devices_and_verification_are_the_guests_own_and_not_learnt() -> None:
    history = PauseHistory()
    for _ in range(3):
        history.note(downtime_s=0.05, last_round_s=0.02, devices_s=0.01)

    assert Rehearsed(devices_s=0.5, verify_s=0.25).fixed_s(history) == pytest.approx(0.77)


def test_pauses_that_differ_make_the_next_forecast_careful() -> None:
    history = PauseHistory()
    for downtime_s in (0.02, 0.04, 0.02, 0.04):
        history.note(downtime_s, 0.0, 0.0)

    assert Rehearsed().fixed_s(history) > 0.04


def test_a_pause_that_was_shorter_than_its_last_round_teaches_nothing_below_zero() -> None:
    history = PauseHistory()
    for _ in range(3):
        history.note(downtime_s=0.01, last_round_s=0.02, devices_s=0.0)

    assert Rehearsed().fixed_s(history) == 0.0


@pytest.mark.parametrize("good", [0, 2, 5])
def test_one_pause_in_a_bad_moment_does_not_forbid_the_next(good: int) -> None:
    """Nothing would ever be learnt again: a guest that is not paused tells nothing."""
    history = PauseHistory()
    for downtime_s in (*[0.03] * good, 3.0):
        history.note(downtime_s, 0.0, 0.0)

    assert MEASURED.fixed_s(history) < 0.06


def test_what_is_forgotten_is_as_if_it_had_never_been() -> None:
    history = PauseHistory()
    for _ in range(9):
        history.note(3.0, 0.0, 0.0)
    assert MEASURED.fixed_s(history) > 3.0

    history.beside_s.forget()

    assert MEASURED.fixed_s(history) == MEASURED.fixed_s(PauseHistory())


@given(st.lists(st.floats(0.001, 10.0), min_size=5, max_size=9), st.floats(1e3, 1e6))
def test_a_measurement_that_was_disturbed_does_not_leave_the_range_of_the_others(
    values: list[float], disturbed: float
) -> None:
    typical = Typical([*values[:-1], disturbed])

    assert min(values) <= typical.value <= max(values)
    assert typical.high <= 3 * max(values)


def test_without_measurements_nothing_is_typical() -> None:
    assert (Typical().value, Typical().high) == (0.0, 0.0)


# --------------------------------------------------------------------------- how much a guest writes


def test_a_curve_goes_through_what_was_measured_and_between_it() -> None:
    curve = DirtyCurve([(1.0, 1000), (3.0, 2000)], most_pages=10_000)

    assert [curve.pages(t) for t in (0.0, 0.5, 1.0, 2.0, 3.0)] == [0, 500, 1000, 1500, 2000]


def test_it_goes_on_as_steeply_as_it_ended_and_never_beyond_what_there_is() -> None:
    curve = DirtyCurve([(1.0, 1000), (2.0, 1500)], most_pages=2500)

    assert [curve.pages(t) for t in (3.0, 4.0, 100.0)] == [2000, 2500, 2500]


def test_measurements_of_one_time_are_averaged() -> None:
    assert DirtyCurve([(1.0, 1000), (1.0, 2000)], most_pages=10_000).pages(1.0) == 1500


@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.integers(0, 10**6)), min_size=1, max_size=8),
    st.lists(st.floats(0, 1000), min_size=2, max_size=8),
    st.integers(0, 10**6),
)
def test_more_time_never_means_fewer_pages(
    samples: list[tuple[float, int]], times: list[float], most_pages: int
) -> None:
    curve = DirtyCurve(samples, most_pages)

    pages = [curve.pages(time) for time in sorted(times)]

    assert pages == sorted(pages)
    assert all(0 <= each <= most_pages for each in pages)


# --------------------------------------------------------------------------- whole migrations


def test_a_quiet_guest_takes_one_pass_and_a_short_pause() -> None:
    curve = DirtyCurve([(1.0, 1000)], most_pages=100_000)

    forecast = simulate(100_000, curve, judge_of(), Limits(0.3))

    assert forecast.converges
    assert [each.pages for each in forecast.rounds[:2]] == [100_000, 1000]
    assert forecast.total_s == pytest.approx(1.0 + 0.01 + 0.01, abs=0.01)
    assert forecast.pause.total_s == pytest.approx(0.01, abs=0.002)
    assert forecast.ram_bytes >= 101_000 * PAGE_SIZE


def test_a_guest_that_writes_half_as_fast_as_the_link_halves_each_round() -> None:
    curve = DirtyCurve([(1.0, PAGES_PER_S // 2), (2.0, PAGES_PER_S)], most_pages=10**9)

    forecast = simulate(100_000, curve, judge_of(), Limits(0.05))

    assert forecast.converges
    pages = [each.pages for each in forecast.rounds]
    assert pages[:5] == [100_000, 50_000, 25_000, 12_500, 6_250]


def test_a_guest_that_writes_faster_than_the_link_does_not_converge() -> None:
    curve = DirtyCurve([(1.0, 2 * PAGES_PER_S), (2.0, 4 * PAGES_PER_S)], most_pages=100_000)

    forecast = simulate(100_000, curve, judge_of(), Limits(0.3, max_rounds=10))

    assert not forecast.converges
    assert len(forecast.rounds) == 10
    assert forecast.pause.total_s > 0.3


def test_a_small_working_set_converges_however_fast_it_is_written() -> None:
    curve = DirtyCurve([(0.01, 2000), (1.0, 2000)], most_pages=100_000)

    forecast = simulate(100_000, curve, judge_of(), Limits(0.05))

    assert forecast.converges
    assert forecast.pause.total_s == pytest.approx(0.03, abs=0.002)


def test_throttling_makes_it_converge_where_nothing_else_does() -> None:
    curve = DirtyCurve([(1.0, 2 * PAGES_PER_S), (2.0, 4 * PAGES_PER_S)], most_pages=100_000)

    forecast = simulate(100_000, curve, judge_of(), Limits(0.3, max_rounds=40, auto_converge=True))

    assert forecast.converges


def test_pages_of_zeros_cost_no_time() -> None:
    curve = DirtyCurve([(1.0, 0)], most_pages=100_000)

    forecast = simulate(100_000, curve, judge_of(), Limits(0.3), zero_pages=90_000)

    assert forecast.total_s == pytest.approx(0.1 + 0.01)
    assert forecast.ram_bytes == 10_000 * PAGE_SIZE


@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.floats(0.01, 10), st.integers(0, 10**6)), min_size=1, max_size=4),
    st.floats(0.001, 2),
    st.integers(1, 40),
    st.booleans(),
)
def test_a_forecast_ends_and_says_what_it_is_about(
    pages: int, samples: list[tuple[float, int]], downtime_s: float, max_rounds: int, auto_converge: bool
) -> None:
    limits = Limits(downtime_s, max_rounds, auto_converge)

    forecast = simulate(pages, DirtyCurve(samples, 10**6), judge_of(), limits)

    assert 1 <= len(forecast.rounds) <= (200 if auto_converge else max_rounds)
    left_nothing = forecast.rounds[-1].dirty_pages == 0
    assert not forecast.converges or left_nothing or forecast.pause.total_s <= downtime_s
    assert forecast.total_s >= forecast.pause.total_s >= 0
    assert isinstance(forecast.rounds[0], Round)
