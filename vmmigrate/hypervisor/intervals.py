"""Exactly one process at a time ran a guest: judged from the intervals that guest processes themselves tell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Interval:
    """A time in which one guest process ran the guest without a break."""

    host_id: str
    instance_id: str
    epoch: tuple[int, int]
    first_counter: int
    first_ns: int
    last_counter: int
    last_ns: int
    jumps: int

    @property
    def beats(self) -> int:
        return self.last_counter - self.first_counter + 1


@dataclass(frozen=True, slots=True)
class Verdict:
    """`single` means: at no time did two processes run the guest, and no beat is missing or was counted twice."""

    single: bool
    problems: tuple[str, ...]
    intervals: tuple[Interval, ...]

    @property
    def beats(self) -> int:
        return sum(interval.beats for interval in self.intervals)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Hosts in the order in which they ran the guest."""
        order: list[str] = []
        for interval in self.intervals:
            if not order or order[-1] != interval.host_id:
                order.append(interval.host_id)
        return tuple(order)


def check_single_owner(intervals: Iterable[Interval]) -> Verdict:
    """Whether exactly one process at a time ran the guest, from the witnesses of all its processes.

    Problems are all listed, not only the first: overlapping intervals, a counter with a hole or a repeat (between
    intervals or within one), an epoch that goes back, witnesses of more than one instance.
    """
    ordered = sorted(intervals, key=lambda interval: (interval.first_ns, interval.first_counter))
    problems = []
    if len({interval.instance_id for interval in ordered}) > 1:
        problems.append("the witnesses are of more than one instance")
    for interval in ordered:
        if interval.jumps:
            problems.append(f"{_named(interval)}: the counter jumped {interval.jumps} times")
    problems += _seams(ordered)
    return Verdict(not problems, tuple(problems), tuple(ordered))


def _seams(ordered: Sequence[Interval]) -> list[str]:
    problems = []
    for before, after in pairwise(ordered):
        between = f"{_named(before)} and {_named(after)}"
        if after.first_ns <= before.last_ns:
            problems.append(f"{between} ran at the same time")
        if after.first_counter > before.last_counter + 1:
            problems.append(f"between {between} {after.first_counter - before.last_counter - 1} beats are missing")
        elif after.first_counter <= before.last_counter:
            problems.append(f"{between} both counted {after.first_counter}")
        if after.epoch < before.epoch:
            problems.append(f"{between}: the epoch went back")
    return problems


def _named(interval: Interval) -> str:
    counters = f"{interval.first_counter}..{interval.last_counter}"
    return f"host {interval.host_id} epoch {interval.epoch[0]}.{interval.epoch[1]} beats {counters}"
