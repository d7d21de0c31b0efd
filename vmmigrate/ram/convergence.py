"""When to stop sending rounds and pause the guest.

The pause lasts as long as the last dirty pages take, plus a fixed cost that was learnt or assumed. Rate and dirty rate
are exponentially weighted means over rounds; a decision is taken after each round, never inside one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from vmmigrate.memory import PAGE_SIZE

EWMA_WEIGHT = 0.5  # of the newest round
FIXED_COST_S = 0.02  # device state, journal, round trips, resume: assumed until measured
MIN_SECONDS = 1e-4  # a round of nothing still took this long


class Verdict(StrEnum):
    ANOTHER_ROUND = "another_round"
    PAUSE = "pause"
    WILL_NOT_CONVERGE = "will_not_converge"


@dataclass(frozen=True, slots=True)
class Round:
    """One finished round: what was sent, how long it took, and what was written meanwhile."""

    pages: int
    bytes_sent: int
    seconds: float
    dirty_pages: int


@dataclass
class Convergence:
    """The judge of one migration.

    Attributes:
        downtime_s: The pause that was asked for; may be changed while the migration runs.
        max_rounds: After so many rounds without a prospect, the guest will not converge.
        rate: Bytes per second on the wire, smoothed.
        dirty_rate: Bytes per second written by the guest, smoothed.
    """

    downtime_s: float
    min_rounds: int = 1
    max_rounds: int = 30
    rate: float = 0.0
    dirty_rate: float = 0.0
    rounds: list[Round] = field(default_factory=list)

    def forecast_pause_s(self, dirty_pages: int) -> float:
        """How long the guest would be paused if it were paused now."""
        return dirty_pages * PAGE_SIZE / max(self.rate, 1.0) + FIXED_COST_S

    def after_round(self, finished: Round) -> Verdict:
        """Take note of a round and decide what comes next."""
        self.rounds.append(finished)
        seconds = max(finished.seconds, MIN_SECONDS)
        if finished.bytes_sent:
            self.rate = _smoothed(self.rate, max(finished.bytes_sent, finished.pages * PAGE_SIZE // 64) / seconds)
        self.dirty_rate = _smoothed(self.dirty_rate, finished.dirty_pages * PAGE_SIZE / seconds)
        if len(self.rounds) < self.min_rounds:
            return Verdict.ANOTHER_ROUND
        if finished.dirty_pages == 0 or self.forecast_pause_s(finished.dirty_pages) <= self.downtime_s:
            return Verdict.PAUSE
        return Verdict.ANOTHER_ROUND if len(self.rounds) < self.max_rounds else Verdict.WILL_NOT_CONVERGE


def _smoothed(mean: float, newest: float) -> float:
    return newest if mean == 0.0 else EWMA_WEIGHT * newest + (1 - EWMA_WEIGHT) * mean
