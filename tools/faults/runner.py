"""Many trials, several at a time, each pair of hosts on its own."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from tools.faults.forks import Forks, open_forks
from tools.faults.pair import NAMES, Pair
from tools.faults.relay import Boundary, Side
from tools.faults.site import open_site
from tools.faults.trial import Fault, Result, Trial, run_trial

# A migration does not always have as many messages: a boundary that was not reached is tried again.
TRIES = 3


@dataclass
class Campaign:
    """What was tried, and what is still to be tried.

    Attributes:
        calm: The trial without a fault, which says how many boundaries there are.
        hypervisor: What runs the guests.
        left_out: Trials for which there was no time.
    """

    faults: Sequence[Fault]
    every: int = 1
    jobs: int = 4
    seconds: float = 3600.0
    on_result: Callable[[Result, int], None] = lambda _result, _left: None
    hypervisor: str = "embedded"
    calm: list[Result] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    waiting: list[Trial] = field(default_factory=list)

    @property
    def left_out(self) -> int:
        return len(self.waiting)

    @property
    def broken(self) -> list[Result]:
        return [result for result in [*self.calm, *self.results] if result.verdict.problems]

    async def run(self, root: Path) -> None:
        """Everything, or what can be done in time."""
        deadline = time.monotonic() + self.seconds
        async with open_forks() as forks, trio.open_nursery() as nursery:
            for number in range(self.jobs):
                nursery.start_soon(self._work, forks, root, number, deadline)

    async def _work(self, forks: Forks, root: Path, worker: int, deadline: float) -> None:
        """Trials on one pair of hosts; on a new one after a broken promise, which may still be seen on the old."""
        for number in itertools.count():
            async with open_site(root / f"{worker}-{number}", *NAMES, forks=forks, hypervisor=self.hypervisor) as site:
                pair = Pair(site)
                await pair.start()
                is_well = number > 0 or await self._begin(pair)
                while is_well and self.waiting and time.monotonic() < deadline:
                    result = await self._try(pair, self.waiting.pop(0))
                    self.results.append(result)
                    self.on_result(result, len(self.waiting))
                    is_well = not result.verdict.problems
            if is_well:
                return

    async def _begin(self, pair: Pair) -> bool:
        """The trial without a fault; the first of all tells what there is to try."""
        calm = await run_trial(pair, Trial(Fault.CUT, None))
        if not self.calm:
            self.waiting += self._trials(calm)
        self.calm.append(calm)
        self.on_result(calm, len(self.waiting))
        return not calm.verdict.problems

    def _trials(self, calm: Result) -> list[Trial]:
        """Those that wait long (a stall is noticed after ten seconds) come first, so that none is waited for alone."""
        boundaries = [Boundary(side, number) for side in Side for number in range(0, calm.records[side], self.every)]
        slow = [fault for fault in self.faults if fault in _SLOW]
        return [Trial(fault, boundary) for fault in slow for boundary in boundaries] + [
            Trial(fault, boundary) for fault in self.faults if fault not in _SLOW for boundary in boundaries
        ]

    async def _try(self, pair: Pair, trial: Trial) -> Result:
        for _ in range(TRIES):
            result = await run_trial(pair, trial)
            if result.reached or result.verdict.problems:
                break
        return result


_SLOW = frozenset({Fault.STALL, Fault.HALF_CUT, Fault.STOP_SOURCE, Fault.STOP_DESTINATION, Fault.STOP_GUEST})
