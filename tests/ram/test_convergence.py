"""When to pause: by forecast, never by hope, and not for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmigrate.memory import PAGE_SIZE
from vmmigrate.ram.convergence import FIXED_COST_S, Convergence, Round, Verdict

PAGES_PER_S = 100_000  # about 400 MB/s


def full_round(pages: int, dirty_pages: int) -> Round:
    return Round(pages, pages * PAGE_SIZE, pages / PAGES_PER_S, dirty_pages)


def test_it_pauses_when_the_forecast_fits_the_downtime() -> None:
    judge = Convergence(downtime_s=FIXED_COST_S + 0.011)

    assert judge.after_round(full_round(100_000, dirty_pages=1_000)) is Verdict.PAUSE
    assert judge.forecast_pause_s(1_000) == pytest.approx(FIXED_COST_S + 0.01)


def test_it_goes_on_when_the_forecast_does_not_fit() -> None:
    judge = Convergence(downtime_s=FIXED_COST_S + 0.009)

    assert judge.after_round(full_round(100_000, dirty_pages=1_000)) is Verdict.ANOTHER_ROUND


def test_a_guest_that_wrote_nothing_is_paused_whatever_the_limit() -> None:
    judge = Convergence(downtime_s=0.0)

    assert judge.after_round(full_round(1, dirty_pages=0)) is Verdict.PAUSE


def test_a_guest_that_writes_faster_than_we_send_will_not_converge() -> None:
    judge = Convergence(downtime_s=0.1, max_rounds=3)

    verdicts = [judge.after_round(full_round(50_000, dirty_pages=50_000)) for _ in range(3)]

    assert verdicts == [Verdict.ANOTHER_ROUND, Verdict.ANOTHER_ROUND, Verdict.WILL_NOT_CONVERGE]
    assert len(judge.rounds) == 3


def test_the_last_round_may_still_pause() -> None:
    judge = Convergence(downtime_s=0.1, max_rounds=2)
    judge.after_round(full_round(50_000, dirty_pages=50_000))

    assert judge.after_round(full_round(50_000, dirty_pages=10)) is Verdict.PAUSE


def test_at_least_the_wanted_number_of_rounds_is_run() -> None:
    judge = Convergence(downtime_s=10.0, min_rounds=3)

    verdicts = [judge.after_round(full_round(100, dirty_pages=0)) for _ in range(3)]

    assert verdicts == [Verdict.ANOTHER_ROUND, Verdict.ANOTHER_ROUND, Verdict.PAUSE]


def test_a_limit_changed_between_rounds_counts_from_the_next_one() -> None:
    judge = Convergence(downtime_s=0.0)
    assert judge.after_round(full_round(10_000, dirty_pages=1_000)) is Verdict.ANOTHER_ROUND

    judge.downtime_s = 1.0

    assert judge.after_round(full_round(1_000, dirty_pages=1_000)) is Verdict.PAUSE


def test_rates_are_smoothed_so_that_one_odd_round_does_not_decide() -> None:
    judge = Convergence(downtime_s=0.0)
    judge.after_round(Round(1000, 1000 * PAGE_SIZE, 1.0, 1000))
    judge.after_round(Round(3000, 3000 * PAGE_SIZE, 1.0, 3000))

    assert judge.rate == pytest.approx(2000 * PAGE_SIZE)
    assert judge.dirty_rate == pytest.approx(2000 * PAGE_SIZE)


def test_a_round_that_sent_nothing_teaches_no_rate() -> None:
    """All holes: no rate is known, so any dirty page calls for another round, and nothing divides by zero."""
    judge = Convergence(downtime_s=0.5)

    assert judge.after_round(Round(0, 0, 0.0, dirty_pages=1_000)) is Verdict.ANOTHER_ROUND
    assert judge.rate == 0.0


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
)
def test_whatever_the_rounds_were_the_verdict_is_one_of_its_reasons(
    rounds: list[Round], downtime_s: float, max_rounds: int
) -> None:
    judge = Convergence(downtime_s=downtime_s, max_rounds=max_rounds)
    for number, finished in enumerate(rounds, start=1):
        verdict = judge.after_round(finished)
        fits = finished.dirty_pages == 0 or judge.forecast_pause_s(finished.dirty_pages) <= downtime_s

        assert judge.rate >= 0.0
        assert (verdict is Verdict.PAUSE) == fits
        assert (verdict is Verdict.WILL_NOT_CONVERGE) == (not fits and number >= max_rounds)
