"""When to pause: by forecast, at a minimum, never by hope, and not for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmigrate.memory import PAGE_SIZE
from vmmigrate.ram.convergence import Convergence, Estimate, Limits, Round, Verdict

PAGES_PER_S = 100_000  # about 400 MB/s
FIXED_S = 0.02


def full_round(pages: int, dirty_pages: int, zero_pages: int = 0) -> Round:
    return Round(pages, pages * PAGE_SIZE, (pages - zero_pages) / PAGES_PER_S, dirty_pages, zero_pages)


def judge_of(fixed_s: float = FIXED_S) -> Convergence:
    return Convergence(fixed_s)


def verdicts(judge: Convergence, limits: Limits, *rounds: tuple[int, int]) -> list[Verdict]:
    return [judge.after_round(full_round(*each), limits) for each in rounds]


# --------------------------------------------------------------------------- by forecast


def test_a_forecast_counts_what_is_fixed_an_empty_round_and_the_pages() -> None:
    judge = judge_of()
    verdicts(judge, Limits(0.0), (100_000, 50_000), (50_000, 10))
    judge.after_round(Round(10, 10 * PAGE_SIZE, 0.003, 1000), Limits(0.0))

    forecast = judge.forecast(1_000)

    assert forecast.fixed_s == FIXED_S
    assert forecast.overhead_s == pytest.approx(0.0029)
    assert forecast.pages_s == pytest.approx(0.01)
    assert forecast.total_s == pytest.approx(FIXED_S + 0.0129)


def test_it_does_not_pause_while_the_forecast_does_not_fit() -> None:
    limits = Limits(FIXED_S + 0.009)

    assert verdicts(judge_of(), limits, (100_000, 1_000), (1_000, 1_000)) == [Verdict.ANOTHER_ROUND] * 2


def test_it_pauses_when_the_forecast_fits_and_rounds_get_no_shorter() -> None:
    limits = Limits(FIXED_S + 0.011)

    assert verdicts(judge_of(), limits, (100_000, 1_000), (1_000, 1_000)) == [Verdict.ANOTHER_ROUND, Verdict.PAUSE]


def test_a_guest_that_wrote_nothing_is_paused_whatever_the_limit() -> None:
    assert verdicts(judge_of(), Limits(0.0), (1, 0)) == [Verdict.PAUSE]


def test_a_limit_changed_between_rounds_counts_from_the_next_one() -> None:
    judge = judge_of()
    assert verdicts(judge, Limits(0.0), (10_000, 1_000)) == [Verdict.ANOTHER_ROUND]

    assert verdicts(judge, Limits(1.0), (1_000, 1_000)) == [Verdict.PAUSE]


def test_measurements_that_differ_make_the_forecast_careful() -> None:
    steady, shaky = judge_of(), judge_of()
    for seconds in (1.0, 1.0, 1.0):
        steady.after_round(Round(100_000, 0, seconds, 50_000), Limits(0.0))
    for seconds in (0.7, 1.6, 0.9):
        shaky.after_round(Round(100_000, 0, seconds, 50_000), Limits(0.0))

    assert steady.forecast(10_000).pages_s == pytest.approx(0.1)
    assert shaky.forecast(10_000).pages_s > 0.12


def test_pages_of_zeros_do_not_make_the_link_fast() -> None:
    """The first round of a guest that is mostly empty flies; the last one will not."""
    judge = judge_of()

    judge.after_round(full_round(100_000, 1_000, zero_pages=90_000), Limits(0.0))

    assert judge.rate.mean == pytest.approx(PAGES_PER_S * PAGE_SIZE)


def test_a_round_that_sent_nothing_teaches_no_rate() -> None:
    """All holes: no rate is known, so any dirty page calls for another round, and nothing divides by zero."""
    judge = judge_of()

    assert judge.after_round(Round(0, 0, 0.0, dirty_pages=1_000), Limits(0.5)) is Verdict.ANOTHER_ROUND
    assert judge.rate.count == 0


# --------------------------------------------------------------------------- at a minimum


def test_it_waits_for_the_minimum_although_the_pause_would_fit() -> None:
    """Each round that is clearly shorter makes the pause shorter, and costs less than the pause may last."""
    found = verdicts(judge_of(), Limits(0.3), (100_000, 10_000), (10_000, 1_000), (1_000, 200), (200, 190))

    assert found == [Verdict.ANOTHER_ROUND] * 3 + [Verdict.PAUSE]


def test_next_to_nothing_is_minimum_enough() -> None:
    found = verdicts(judge_of(), Limits(0.3), (100_000, 10_000), (10_000, 90))

    assert found == [Verdict.ANOTHER_ROUND, Verdict.PAUSE]


def test_a_guest_that_comes_and_goes_is_paused_when_it_has_gone() -> None:
    """The dirty set swings; the high of it would not fit."""
    limits = Limits(FIXED_S + 0.06)
    swing = [(100_000, 20_000), (20_000, 9_000), (9_000, 18_000), (18_000, 5_000), (5_000, 4_500)]

    assert verdicts(judge_of(), limits, *swing) == [Verdict.ANOTHER_ROUND] * 4 + [Verdict.PAUSE]


# --------------------------------------------------------------------------- not for ever


def test_a_guest_that_writes_faster_than_we_send_will_not_converge() -> None:
    judge = judge_of()

    found = verdicts(judge, Limits(0.1, max_rounds=3), *[(50_000, 50_000)] * 3)

    assert found == [Verdict.ANOTHER_ROUND, Verdict.ANOTHER_ROUND, Verdict.WILL_NOT_CONVERGE]
    assert len(judge.rounds) == 3
    assert judge.throttle_percent == 0


def test_the_last_round_may_still_pause_and_need_not_be_a_minimum() -> None:
    found = verdicts(judge_of(), Limits(0.1, max_rounds=2), (50_000, 50_000), (50_000, 3_000))

    assert found == [Verdict.ANOTHER_ROUND, Verdict.PAUSE]


# --------------------------------------------------------------------------- throttling


AUTO = Limits(0.05, auto_converge=True)


def test_a_guest_that_will_not_converge_is_throttled_in_steps_each_after_its_effect_was_seen() -> None:
    """All that was sent is dirty again whatever is done: half of its time is left to the guest, and half of that."""
    judge = judge_of()
    seen = []
    for _ in range(12):
        verdict = judge.after_round(full_round(50_000, 50_000), AUTO)
        seen.append((verdict, judge.throttle_percent))

    throttled = [percent for verdict, percent in seen if verdict is Verdict.THROTTLE]
    assert throttled == [50, 75, 88, 94, 97, 99]
    assert [verdict for verdict, _ in seen[:3]] == [Verdict.ANOTHER_ROUND, Verdict.THROTTLE, Verdict.THROTTLE]
    assert [verdict for verdict, _ in seen[-3:]] == [Verdict.ANOTHER_ROUND] * 3


@pytest.mark.parametrize(("dirty", "percent"), [(40_500, 39), (45_000, 45), (50_000, 50), (200_000, 50)])
def test_a_step_is_as_large_as_a_round_says_is_needed_up_to_half(dirty: int, percent: int) -> None:
    judge = judge_of()
    for _ in range(2):
        judge.after_round(full_round(50_000, dirty), AUTO)

    assert judge.throttle_percent == percent


def test_it_is_throttled_no_further_than_it_helps() -> None:
    """At 75 % rounds get shorter by themselves."""
    judge, pages = judge_of(), 50_000
    verdict = Verdict.ANOTHER_ROUND
    while verdict is not Verdict.PAUSE:
        dirty = pages if judge.throttle_percent < 75 else pages * 4 // 10
        verdict = judge.after_round(full_round(pages, dirty), AUTO)
        pages = dirty

    assert judge.throttle_percent == 75


@given(st.floats(0.1, 20.0))
def test_a_guest_whose_writes_follow_its_processors_converges_within_few_rounds(ratio: float) -> None:
    """However fast it writes, in times of what the link carries; within the rounds that are allowed by default."""
    judge, pages, rounds = judge_of(), 200_000, 0
    verdict = Verdict.ANOTHER_ROUND
    while verdict is not Verdict.PAUSE:
        dirty = min(int(pages * ratio * (1 - judge.throttle_percent / 100)), 200_000)
        verdict = judge.after_round(full_round(pages, dirty), AUTO)
        pages, rounds = dirty, rounds + 1

    assert rounds <= 40
    assert ratio > 0.8 or not judge.throttle_percent


def test_nothing_is_throttled_that_converges_or_was_not_to_be() -> None:
    for limits in (AUTO, Limits(0.05, max_rounds=40)):
        judge = judge_of()
        found = verdicts(judge, limits, (100_000, 40_000), (40_000, 16_000), (16_000, 6_400), (6_400, 2_500))
        assert Verdict.THROTTLE not in found
        assert judge.throttle_percent == 0


# --------------------------------------------------------------------------- whatever comes


@given(
    st.lists(
        st.builds(
            Round,
            pages=st.integers(0, 1 << 30),
            bytes_sent=st.integers(0, 1 << 42),
            seconds=st.floats(0, 1e6),
            dirty_pages=st.integers(0, 1 << 30),
        ),
        min_size=1,
        max_size=8,
    ),
    st.floats(0, 10),
    st.integers(1, 6),
    st.booleans(),
)
def test_whatever_the_rounds_were_the_verdict_is_one_of_its_reasons(
    rounds: list[Round], downtime_s: float, max_rounds: int, auto_converge: bool
) -> None:
    judge, limits, number = judge_of(), Limits(downtime_s, max_rounds, auto_converge), 0
    for finished in rounds:
        verdict = judge.after_round(finished, limits)
        number += 1
        fits = finished.dirty_pages == 0 or judge.forecast(finished.dirty_pages).total_s <= downtime_s

        assert judge.rate.mean >= 0.0
        assert fits or verdict is not Verdict.PAUSE
        assert (verdict is Verdict.WILL_NOT_CONVERGE) == (not fits and number >= max_rounds)
        if verdict is Verdict.THROTTLE:
            assert auto_converge
            number = 0
        assert 0 <= judge.throttle_percent <= 99


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=20))
def test_an_estimate_lies_within_what_was_measured_and_its_bounds_around_it(values: list[float]) -> None:
    estimate = Estimate()
    for value in values:
        estimate.note(value)

    assert min(values) * 0.999 <= estimate.mean <= max(values) * 1.001
    assert 0 < estimate.low <= estimate.mean <= estimate.high


def test_an_estimate_of_equal_measurements_has_no_doubts() -> None:
    estimate = Estimate()
    for _ in range(5):
        estimate.note(0.25)

    assert (estimate.low, estimate.mean, estimate.high) == (0.25, 0.25, 0.25)
