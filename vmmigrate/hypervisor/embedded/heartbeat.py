"""The guest's heartbeat: a counter and CLOCK_MONOTONIC, once a tick, in guest RAM and in processor state.

Page 0 of RAM is a ring of 256 (counter, ns) pairs. The newest pair must equal the processor's state and the others
must lead up to it, so the page tells by itself that it is stale or lost; that is all a guest with one page of RAM can
hold. Gaps between beats are kept in processor state: a histogram (3 % wide bins) and the longest ones by name. The
clock is the machine's, so on one host the gap across a migration is what the guest would have noticed.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from vmmigrate.devices.kinds import MAX_GAP_BINS, GapBin, NotedGap
from vmmigrate.hypervisor.embedded.guestram import WORDS_PER_PAGE, GuestMemory

HEARTBEAT_PAGE: Final = 0
RING_SLOTS: Final = WORDS_PER_PAGE // 2
_STEADY_GAPS_KEPT: Final = 32
_PAUSE_GAPS_KEPT: Final = 16
_MOVE_GAPS_KEPT: Final = 16


class Heartbeat:
    """Counts ticks and remembers silences.

    Attributes:
        counter: Ticks since the guest booted.
        last_ns: CLOCK_MONOTONIC of the last one; 0 before the first.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.counter = 0
        self.last_ns = 0
        self._bins = [0] * MAX_GAP_BINS
        self._steady: list[NotedGap] = []
        self._pauses: list[NotedGap] = []
        self._moves: list[NotedGap] = []
        self._note_above_ns = -1
        self._resumed = False
        self._moved = False

    def resume(self) -> None:
        """The next gap spans a pause."""
        self._resumed = True

    def beat(self, now_ns: int) -> None:
        self.counter += 1
        if self.last_ns:
            gap_ns = max(now_ns - self.last_ns, 0)  # the clock of another machine may be ahead of ours
            self._bins[bin_of(gap_ns)] += 1
            if self._resumed or gap_ns > self._note_above_ns:
                self._note(gap_ns)
        self._resumed = self._moved = False
        self.last_ns = now_ns
        self._memory.write_words(HEARTBEAT_PAGE, self.counter % RING_SLOTS * 2, self.counter, now_ns)

    def _note(self, gap_ns: int) -> None:
        gap = NotedGap(self.counter, gap_ns, after_pause=self._resumed, after_move=self._moved)
        if self._moved:
            self._moves = [*self._moves, gap][-_MOVE_GAPS_KEPT:]
        elif self._resumed:
            self._pauses = _longest([*self._pauses, gap], _PAUSE_GAPS_KEPT)
        else:
            self._steady = _longest([*self._steady, gap], _STEADY_GAPS_KEPT)
            if len(self._steady) == _STEADY_GAPS_KEPT:
                self._note_above_ns = self._steady[-1].gap_ns

    def export(self) -> tuple[tuple[GapBin, ...], tuple[NotedGap, ...]]:
        bins = tuple(GapBin(n, count) for n, count in enumerate(self._bins) if count)
        return bins, (*self._steady, *self._pauses, *self._moves)

    def restore(self, counter: int, last_ns: int, bins: tuple[GapBin, ...], noted: tuple[NotedGap, ...]) -> None:
        """Continue another process' heartbeat; the next gap spans the move."""
        self.counter, self.last_ns = counter, last_ns
        self._bins = [0] * MAX_GAP_BINS
        for entry in bins:
            self._bins[entry.bin] += entry.count
        self._moves = [gap for gap in noted if gap.after_move][-_MOVE_GAPS_KEPT:]
        self._pauses = _longest([g for g in noted if g.after_pause and not g.after_move], _PAUSE_GAPS_KEPT)
        self._steady = _longest([g for g in noted if not g.after_pause and not g.after_move], _STEADY_GAPS_KEPT)
        self._note_above_ns = self._steady[-1].gap_ns if len(self._steady) == _STEADY_GAPS_KEPT else -1
        self._moved = True

    def gaps(self) -> dict[str, Any]:
        """Pauses as the guest saw them, in milliseconds; nothing is subtracted."""
        noted = (*self._steady, *self._pauses, *self._moves)
        return {
            "heartbeats": self.counter,
            "largest_gap_ms": max((gap.gap_ns for gap in noted), default=0) / 1e6,
            "steady_p50_ms": self._quantile_ms(0.50),
            "steady_p99_ms": self._quantile_ms(0.99),
            "steady_largest_gap_ms": max((gap.gap_ns for gap in self._steady), default=0) / 1e6,
            "pause_gaps_ms": [gap.gap_ns / 1e6 for gap in self._pauses],
            "move_gaps_ms": [gap.gap_ns / 1e6 for gap in self._moves],
        }

    def _quantile_ms(self, quantile: float) -> float:
        wanted, seen = quantile * sum(self._bins), 0
        for n, count in enumerate(self._bins):
            seen += count
            if count and seen >= wanted:
                return upper_edge_ns(n) / 1e6
        return 0.0

    def ring_problem(self) -> str | None:
        """What is wrong with the ring in RAM, judged by processor state; None when it is as it was written last."""
        if not self.counter:
            return None
        ring = self._memory.pages[HEARTBEAT_PAGE].reshape(RING_SLOTS, 2).astype(np.int64)
        counters = np.arange(max(1, self.counter - RING_SLOTS + 1), self.counter + 1)
        slots = ring[counters % RING_SLOTS]
        if slots[-1].tolist() != [self.counter, self.last_ns]:
            return "the newest heartbeat in RAM is not the processor's last one"
        if (slots[:, 0] != counters).any():
            return "the heartbeats in RAM do not lead up to the newest one"
        return None


def bin_of(gap_ns: int) -> int:
    """The histogram bin of a gap: exact to 1 µs up to 64 µs, then 32 bins for every doubling."""
    micros = gap_ns >> 10
    if micros < 64:
        return max(micros, 0)
    shift = micros.bit_length() - 6
    return min(32 * shift + (micros >> shift), MAX_GAP_BINS - 1)


def upper_edge_ns(number: int) -> int:
    shift = max(number // 32 - 1, 0)
    return (number - 32 * shift + 1 << shift) << 10


def _longest(gaps: list[NotedGap], kept: int) -> list[NotedGap]:
    return sorted(gaps, key=lambda gap: gap.gap_ns, reverse=True)[:kept]
