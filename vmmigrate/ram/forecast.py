"""What a pause costs beside its last pages, learnt from earlier pauses; and what a whole migration would be like.

**Fixed costs.** Each pause that ended well teaches what it took beyond what its last round was forecast to take. That
is remembered for each destination host, since its journal, its processors and the way there are its own. What the
guest's devices take is the guest's own, so it is measured on the guest (exporting them is rehearsed while it runs) and
left out of what is learnt. A host that little is known of is assumed to be like this one.

**A whole migration** is simulated round by round from how many *different* pages the guest writes within some time,
which is less than its writes: a working set is written over and over. That curve is measured at a few times and
interpolated; beyond the last one it goes on as steeply as it ended, but never beyond what the guest has touched.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from vmmigrate.memory import PAGE_SIZE
from vmmigrate.ram.convergence import Convergence, Limits, PauseForecast, Round, Verdict

_ROUND_TRIPS: Final = 4  # pause, last round, ready, handoff
_JOURNAL_WRITES: Final = 5  # released; prepared, acquired, started; and one in reserve
_GUEST_REQUESTS: Final = 12  # of the two guest processes: pause, export, import, open, run
_UNEXPLAINED_S: Final = 0.005
_TRUSTED_PAUSES: Final = 3  # with fewer, what is assumed has a say
_KEPT: Final = 9
_MOST_ROUNDS: Final = 200


class Typical:
    """What something mostly takes: medians of its newest measurements, so that one which was disturbed says nothing. A
    forecast that one bad moment could spoil would keep guests from moving, and never learn that it was wrong.
    """

    def __init__(self, values: Iterable[float] = ()) -> None:
        self._values = deque(values, maxlen=_KEPT)

    def note(self, value: float) -> None:
        self._values.append(value)

    def forget(self) -> None:
        self._values.clear()

    def with_at_least(self, count: int, assumed: float) -> Typical:
        """The same, with as many measurements of *assumed* as are missing."""
        return Typical([*self._values, *[assumed] * (count - len(self._values))])

    @property
    def value(self) -> float:
        """0 before the first measurement."""
        return statistics.median(self._values) if self._values else 0.0

    @property
    def high(self) -> float:
        """On the careful side by twice of what measurements mostly differ by."""
        middle = self.value
        return middle + 2 * (statistics.median(abs(value - middle) for value in self._values) if self._values else 0.0)


@dataclass
class PauseHistory:
    """What pauses took beside last round and devices, towards one destination host."""

    beside_s: Typical = field(default_factory=Typical)

    def note(self, downtime_s: float, last_round_s: float, devices_s: float) -> None:
        """A pause of *downtime_s* ended well; the other two were forecast for it."""
        self.beside_s.note(max(downtime_s - last_round_s - devices_s, 0.0))


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """What was measured on this guest and this host while the guest runs, in seconds.

    Attributes:
        devices_s: Exporting all devices.
        journal_s: One record on the disk.
        round_trip_s: One message to the destination and its answer.
        guest_request_s: One request to the guest process.
        verify_s: Hashing all of RAM, if that is part of the pause.
    """

    devices_s: float = 0.0
    journal_s: float = 0.0
    round_trip_s: float = 0.0
    guest_request_s: float = 0.0
    verify_s: float = 0.0

    def fixed_s(self, history: PauseHistory) -> float:
        """What a pause will cost beside its last round."""
        assumed = (
            _ROUND_TRIPS * self.round_trip_s
            + _JOURNAL_WRITES * self.journal_s
            + _GUEST_REQUESTS * self.guest_request_s
            + _UNEXPLAINED_S
            + self.devices_s  # importing takes about as long as exporting
        )
        beside_s = history.beside_s.with_at_least(_TRUSTED_PAUSES, assumed).high
        return beside_s + self.devices_s + self.verify_s


class DirtyCurve:
    """How many different pages a guest writes within some time.

    Args:
        samples: (seconds, pages), at least one with seconds above zero; any order.
        most_pages: What there is to write.
    """

    def __init__(self, samples: Sequence[tuple[float, int]], most_pages: int) -> None:
        times = sorted({0.0, *(seconds for seconds, _ in samples)})
        by_time: dict[float, list[int]] = {}
        for seconds, pages in samples:
            by_time.setdefault(seconds, []).append(pages)
        means = [0.0 if time == 0.0 else float(np.mean(by_time[time])) for time in times]
        self._times = np.asarray(times)
        self._pages = np.maximum.accumulate(np.asarray(means))  # more time never means fewer pages
        self._most = float(most_pages)

    def pages(self, seconds: float) -> int:
        """Written within *seconds*."""
        last = float(self._times[-1])
        if seconds <= last or len(self._times) < 2:
            return int(min(np.interp(seconds, self._times, self._pages), self._most))
        rise = float(self._pages[-1] - self._pages[-2]) / (last - float(self._times[-2]))
        return int(min(float(self._pages[-1]) + rise * (seconds - last), self._most))


@dataclass(frozen=True)
class MigrationForecast:
    """What a migration would be like.

    Attributes:
        converges: Whether it would end with a pause within the limit.
        rounds: Each as it would be; the last one is that of the pause.
        ram_bytes: RAM sent in all rounds, before compression.
        total_s: From the first page to the running guest.
        pause: How long the guest would be paused; if it does not converge, as it would be at its best.
    """

    converges: bool
    rounds: tuple[Round, ...]
    ram_bytes: int
    total_s: float
    pause: PauseForecast


def simulate(
    first_pages: int, curve: DirtyCurve, judge: Convergence, limits: Limits, *, zero_pages: int = 0
) -> MigrationForecast:
    """Play the rounds of a migration whose first one sends *first_pages*, of which *zero_pages* are zero.

    Args:
        judge: With what is known of rates and fixed costs; it is used up.
    """
    pages, zeros, total_s, sent = first_pages, zero_pages, 0.0, 0
    best: tuple[float, int] | None = None
    judge.start_over()
    for _ in range(_MOST_ROUNDS):
        content = pages - zeros
        seconds = judge.overhead_s.mean + content * PAGE_SIZE / max(judge.rate.mean, 1.0)
        dirty = curve.pages(seconds * (1 - judge.throttle_percent / 100))
        total_s, sent, zeros = total_s + seconds, sent + content * PAGE_SIZE, 0
        verdict = judge.after_round(Round(pages, content * PAGE_SIZE, seconds, dirty, pages - content), limits)
        pause = judge.forecast(dirty)
        best = min(best or (pause.total_s, dirty), (pause.total_s, dirty))
        if verdict in {Verdict.PAUSE, Verdict.WILL_NOT_CONVERGE}:
            break
        pages = dirty
    assert best is not None
    left = dirty if verdict is Verdict.PAUSE else best[1]
    pause = judge.forecast(left)
    return MigrationForecast(
        converges=verdict is Verdict.PAUSE,
        rounds=tuple(judge.rounds),
        ram_bytes=sent + left * PAGE_SIZE,
        total_s=total_s + pause.total_s,
        pause=pause,
    )
