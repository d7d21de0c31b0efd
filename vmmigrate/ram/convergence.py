"""When to stop sending rounds and pause the guest.

The pause is forecast whole: what it costs whatever is left (`fixed`: stopping, devices, journals, round trips, import,
resume; learnt from earlier pauses, `forecast`), and what the last dirty pages cost, by what rounds of this very
migration took. A round takes `overhead + bytes / rate`; large rounds tell the rate, small ones the overhead. Forecasts
lean to the careful side by what measurements differ among each other.

A forecast that fits the limit is necessary, not sufficient: as long as each round leaves clearly less to send than the
one before, the next one makes the pause shorter, and costs less time than the pause may last. So the guest is paused at
a local minimum of its dirty set. A guest that writes as fast as RAM is sent never gets there; if that is wanted, its
processors are throttled step by step, as long as it takes and no further than it helps.

Decisions are taken after each round, never inside one.

Source: Clark et al., "Live Migration of Virtual Machines" (NSDI 2005); QEMU's auto-converge (up to 99 %, but in steps
of 10 whatever is needed, two rounds each); KubeVirt VEP 248 on switching at a minimum; Jacobson (1988) for mean and
deviation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from vmmigrate.memory import MIB, PAGE_SIZE

MIN_SECONDS: Final = 1e-4  # a round of nothing still took this long
TELLS_THE_RATE_BYTES: Final = 4 * MIB
SHRINKING: Final = 0.8  # of the round before: less than that is worth another round
NEXT_TO_NOTHING_S: Final = 0.001
STUCK: Final = SHRINKING  # of what was sent is dirty again: rounds do not get shorter
THROTTLED_TO: Final = 0.5  # of what was sent may be dirty again: what throttling aims at
LEFT_BY_A_STEP: Final = 0.5  # of the time that its processors have now, at least
MOST_THROTTLE_PERCENT: Final = 99


class Verdict(StrEnum):
    ANOTHER_ROUND = "another_round"
    PAUSE = "pause"
    THROTTLE = "throttle"  # and another round
    WILL_NOT_CONVERGE = "will_not_converge"


@dataclass
class Estimate:
    """An exponentially weighted mean, and how far measurements lie from it.

    Attributes:
        weight: Of the newest measurement.
    """

    weight: float = 0.5
    mean: float = 0.0
    deviation: float = 0.0
    count: int = 0

    def note(self, value: float) -> None:
        if not self.count:
            self.mean = value
        else:
            self.deviation += self.weight * (abs(value - self.mean) - self.deviation)
            self.mean += self.weight * (value - self.mean)
        self.count += 1

    @property
    def high(self) -> float:
        return self.mean + 2 * self.deviation

    @property
    def low(self) -> float:
        return max(self.mean - self.deviation, self.mean / 4)


@dataclass(frozen=True, slots=True)
class Round:
    """One finished round: what was sent, how long it took, and what was written meanwhile."""

    pages: int
    bytes_sent: int
    seconds: float
    dirty_pages: int
    zero_pages: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What was asked for; may be other limits after each round."""

    downtime_s: float
    max_rounds: int = 30
    auto_converge: bool = False


@dataclass(frozen=True, slots=True)
class PauseForecast:
    """How long the guest would be paused if it were paused now, in seconds, by what it would be spent on."""

    fixed_s: float
    overhead_s: float
    pages_s: float

    @property
    def total_s(self) -> float:
        return self.fixed_s + self.overhead_s + self.pages_s


@dataclass
class Convergence:
    """The judge of one migration.

    Attributes:
        fixed_s: What a pause costs beside its last round.
        rate: Bytes of RAM that are sent in a second; pages of zeros do not count.
        overhead_s: What a round takes if it is empty.
        dirty_rate: Bytes per second written by the guest.
        throttle_percent: How much the guest's processors are to be held.
    """

    fixed_s: float
    rate: Estimate = field(default_factory=Estimate)
    overhead_s: Estimate = field(default_factory=Estimate)
    dirty_rate: Estimate = field(default_factory=Estimate)
    throttle_percent: int = 0
    rounds: list[Round] = field(default_factory=list)
    _since_throttled: int = 0

    def forecast(self, dirty_pages: int) -> PauseForecast:
        """The pause if so many pages were left to send."""
        seconds = dirty_pages * PAGE_SIZE / max(self.rate.low, 1.0)
        return PauseForecast(self.fixed_s, self.overhead_s.high, seconds)

    def after_round(self, finished: Round, limits: Limits) -> Verdict:
        """Take note of a round and decide what comes next."""
        self.note(finished)
        dirty = finished.dirty_pages
        if dirty == 0 or (self.forecast(dirty).total_s <= limits.downtime_s and self._is_at_a_minimum(finished)):
            return Verdict.PAUSE
        if self._since_throttled >= limits.max_rounds:
            # Another round would have been better; but none is left, and this one fits.
            fits = self.forecast(dirty).total_s <= limits.downtime_s
            return Verdict.PAUSE if fits else Verdict.WILL_NOT_CONVERGE
        if limits.auto_converge and self._is_stuck(finished, limits):
            self._throttle_more(finished)
            return Verdict.THROTTLE
        return Verdict.ANOTHER_ROUND

    def start_over(self) -> None:
        """No round was sent yet; what is known of rates stays."""
        self.rounds.clear()
        self._since_throttled = 0

    def note(self, finished: Round) -> None:
        """Take note of a round, and decide nothing."""
        self.rounds.append(finished)
        self._since_throttled += 1
        seconds = max(finished.seconds, MIN_SECONDS)
        content = (finished.pages - finished.zero_pages) * PAGE_SIZE
        if content >= TELLS_THE_RATE_BYTES or (content and not self.rate.count):
            self.rate.note(content / max(seconds - self.overhead_s.mean, seconds / 2))
        elif self.rate.count:
            self.overhead_s.note(max(seconds - content / self.rate.mean, 0.0))
        self.dirty_rate.note(finished.dirty_pages * PAGE_SIZE / seconds)

    def _is_at_a_minimum(self, finished: Round) -> bool:
        """Whether another round would not make the pause clearly shorter."""
        before = self.rounds[-2].dirty_pages if len(self.rounds) > 1 else finished.pages
        next_to_nothing = self.forecast(finished.dirty_pages).pages_s <= NEXT_TO_NOTHING_S
        return next_to_nothing or finished.dirty_pages > before * SHRINKING

    def _throttle_more(self, finished: Round) -> None:
        """By what the last round says is needed: a guest that writes slower by half leaves half as much to send. One
        that writes pages over and over leaves hardly less at first; so the next round is to tell the effect.
        """
        wanted = THROTTLED_TO * finished.pages / max(finished.dirty_pages, 1)
        left = (100 - self.throttle_percent) * max(wanted, LEFT_BY_A_STEP)
        self.throttle_percent = min(100 - int(left), MOST_THROTTLE_PERCENT)
        self._since_throttled = 0

    def _is_stuck(self, finished: Round, limits: Limits) -> bool:
        """Whether rounds do not lead to a pause that is short enough. The first two must say so, and then one after
        each change.
        """
        awaited = 1 if self.throttle_percent else 2
        if self._since_throttled < awaited or self.throttle_percent >= MOST_THROTTLE_PERCENT:
            return False
        too_long = self.forecast(finished.dirty_pages).total_s > limits.downtime_s
        return too_long and finished.dirty_pages > finished.pages * STUCK
