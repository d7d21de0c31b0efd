"""Every world within a number of failures, breadth first; the way to the first one that breaks a promise."""

from __future__ import annotations

import time
from array import array
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from tools.model.machine import Engine
from tools.model.network import Key, Network
from tools.model.promises import Facts, Outcome, Promise, Promises
from tools.model.world import COVERED, Failure, Host, Scenario, World

NOBODY = (1 << 32) - 1


@dataclass(frozen=True)
class Violation:
    """A promise that was broken, and how it came to it."""

    promise: Promise
    trace: tuple[str, ...]
    world: World

    def __str__(self) -> str:
        steps = [f"{number:3}. {step}" for number, step in enumerate(self.trace, start=1)]
        return "\n".join([f"VIOLATION: {self.promise}", *steps, *describe(self.world)])


@dataclass
class Report:
    """What an exploration saw. `complete`: everything within the bound was."""

    scenario: str
    failures: int
    states: int = 0
    transitions: int = 0
    seconds: float = 0.0
    complete: bool = False
    layers: list[int] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    violation: Violation | None = None

    def __str__(self) -> str:
        head = f"{self.scenario}, {self.failures} failures: {self.states} states, {self.transitions} transitions"
        layers = " + ".join(str(layer) for layer in self.layers)
        state = "complete" if self.complete else "INCOMPLETE"
        lines = [f"{head}, {self.seconds:.1f} s, {state} ({layers} states by number of failures)"]
        lines += [f"  {count:8} ends: {name}" for name, count in sorted(self.outcomes.items())]
        return "\n".join([*lines, *([str(self.violation)] if self.violation else [])])


class Explorer:
    """One exploration."""

    def __init__(
        self,
        scenario: Scenario,
        failures: int,
        *,
        engine: Engine | None = None,
        seconds: float = float("inf"),
        allowed: frozenset[Failure] = COVERED,
        kept: frozenset[Promise] = frozenset(Promise),
    ) -> None:
        self.network = Network(scenario, engine or Engine(), allowed)
        self.promises = Promises(self.network.hosts, kept)
        self.report = Report(scenario.name, failures)
        self._seconds = seconds
        self._numbers: dict[Key, int] = {}
        self._keys: list[Key] = []
        self._facts: dict[int, Facts] = {}
        self._parents = array("I")
        self._froms = array("I")
        self._tos = array("I")

    def run(self, *, liveness: bool = True) -> Report:
        """Explore; stop at the first violation, or when the time is over."""
        begun = time.monotonic()
        report = self.report
        pending: dict[Key, int] = {self.network.first(): NOBODY}
        for spent in range(report.failures + 1):
            first = len(self._keys)
            for key, parent in pending.items():
                if key not in self._numbers and self._add(key, parent) is not None:
                    break
            pending = {}
            if report.violation or not self._layer(first, pending, spent < report.failures, begun):
                break
            report.layers.append(len(self._keys) - first)
        else:
            report.complete = True
        if liveness and report.violation is None and report.complete:
            self._check_ends()
        report.states = len(self._keys)
        report.seconds = time.monotonic() - begun
        return report

    def _add(self, key: Key, parent: int) -> Violation | None:
        number = self._numbers[key] = len(self._keys)
        self._keys.append(key)
        self._parents.append(parent)
        facts = [self._fact(at) for at in key[: len(self.network.scenario.hosts)]]
        broken = self.promises.broken(facts, key[-2], key[-1])
        if broken is not None:
            self.report.violation = self._violation(broken, number)
        return self.report.violation

    def _fact(self, number: int) -> Facts:
        fact = self._facts.get(number)
        if fact is None:
            fact = self._facts[number] = self.promises.facts(self.network.host(number))
        return fact

    def _layer(self, first: int, pending: dict[Key, int], failing: bool, begun: float) -> bool:
        """All worlds that as many failures lead to; those with one more go to *pending*. False: stopped early."""
        numbers, number = self._numbers, first
        while number < len(self._keys):
            if number & 1023 == 0 and time.monotonic() - begun > self._seconds:
                return False
            for edge in self.network.successors(self._keys[number], failures=failing):
                self.report.transitions += 1
                if edge.failure is not None:
                    if edge.key not in numbers and edge.key not in pending:
                        pending[edge.key] = number
                    continue
                to = numbers.get(edge.key)
                if to is None:
                    if self._add(edge.key, number) is not None:
                        return False
                    to = numbers[edge.key]
                self._froms.append(number)
                self._tos.append(to)
            number += 1
        return True

    # -- liveness --------------------------------------------------------------------------------------------------

    def _check_ends(self) -> None:
        """From every world, steps that nobody pays for lead to an end (with strong fairness: are bound to)."""
        good = np.zeros(len(self._keys), dtype=bool)
        for number, key in enumerate(self._keys):
            outcome = self.promises.outcome(self.network.world(key))
            if outcome is not None:
                good[number] = True
                self.report.outcomes[_name(outcome)] += 1
        bad = np.flatnonzero(~self._reaching(good))
        if len(bad):
            self.report.violation = self._violation(Promise.ENDS, self._deepest(int(bad[0])))

    def _reaching(self, good: np.ndarray) -> np.ndarray:
        froms = np.frombuffer(self._froms, dtype=np.uint32)
        tos = np.frombuffer(self._tos, dtype=np.uint32)
        order = np.argsort(tos, kind="stable")
        froms = froms[order]
        starts = np.searchsorted(tos[order], np.arange(len(self._keys) + 1))
        frontier = np.flatnonzero(good)
        while len(frontier):
            before = [froms[starts[at] : starts[at + 1]] for at in frontier]
            reached = np.unique(np.concatenate(before)) if before else np.empty(0, dtype=np.uint32)
            frontier = reached[~good[reached]]
            good[frontier] = True
        return good

    def _deepest(self, number: int) -> int:
        """Where *number* leads to without a failure, as long as it leads anywhere new: the standstill itself."""
        seen = {number}
        while True:
            edges = self.network.successors(self._keys[number], failures=False)
            onward = [self._numbers[edge.key] for edge in edges if self._numbers[edge.key] not in seen]
            if not onward:
                return number
            parent, number = number, onward[0]
            self._parents[number] = parent
            seen.add(number)

    # -- traces ----------------------------------------------------------------------------------------------------

    def _violation(self, promise: Promise, number: int) -> Violation:
        steps: list[str] = []
        at = number
        while self._parents[at] != NOBODY:
            parent = self._parents[at]
            edges = self.network.successors(self._keys[parent], failures=True)
            edge = next(edge for edge in edges if edge.key == self._keys[at])
            steps.append(edge.label + (f"   <-- failure: {edge.failure}" if edge.failure else ""))
            at = parent
        return Violation(promise, tuple(reversed(steps)), self.network.world(self._keys[number]))


def _name(outcome: tuple[Outcome, str]) -> str:
    return outcome[0].value + (f" ({outcome[1]})" if outcome[1] else "")


def describe(world: World) -> list[str]:
    """A world in a few lines."""
    lines = [f"  classes: {world.classes!r}; fenced: {', '.join(sorted(world.fenced)) or 'nobody'}"]
    for host in world.hosts:
        lines.extend(_describe_host(host))
    lines += [f"  under way: {letter.mail} {letter.migration} to {letter.to}" for letter in world.letters]
    return lines


def _describe_host(host: Host) -> list[str]:
    names = " ".join(type(record).__name__.lower() for record in host.disk.cached)
    extra = len(host.disk.cached) - len(host.disk.durable)
    lines = [f"  {host.name}: journal {host.disk.journal} ({host.disk.damage}, {extra} not durable): {names}"]
    for process in host.processes:
        what = "RUNS" if process.running else "paused"
        disks = "disks open" if process.is_open else "disks closed"
        ran = tuple(process.ran)
        lines.append(f"     guest {process.pid}: {what} under {ran}, {disks}, knows {process.last_record}")
    daemon = host.daemon
    if daemon is None:
        lines.append("     daemon down")
    else:
        lines += [f"     to do: {todo.act} {todo.migration}" for todo in daemon.todo]
        lines += [f"     task: {task.role} of {task.migration}: {task.at}" for task in daemon.tasks]
        lines += [f"     indeterminate: {mark}" for mark in daemon.marks]
    return lines
