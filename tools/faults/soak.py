"""Many migrations of one guest, to and fro between two daemons, under random faults, and what they add up to.

A guest that a fault has lost (its process was killed where it ran) is followed by a new one. Daemons are executed, not
forked, and killed in the first half only: the second half shows what a daemon gathers that lives long.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import trio

from tools.faults.judge import clean, judge_living
from tools.faults.leaks import more_than
from tools.faults.pair import NAMES, Pair
from tools.faults.relay import Boundary, Side
from tools.faults.site import HostProcess, open_site
from tools.faults.trial import Fault, Trial, create_guest, migrate_under_fire, victim_of

# How often each strikes; the rest of the migrations is left in peace. Those that cost 5 or 10 s strike rarely.
_WEIGHTS: Mapping[Fault | None, int] = {
    None: 30,
    Fault.CUT: 20,
    Fault.DUPLICATE: 5,
    Fault.TRUNCATE: 10,
    Fault.CORRUPT: 10,
    Fault.KILL_ARRIVAL: 10,
    Fault.KILL_GUEST: 4,
    Fault.STOP_SOURCE: 1,
    Fault.STOP_DESTINATION: 1,
    Fault.STOP_GUEST: 1,
    Fault.HALF_CUT: 1,
    Fault.STALL: 1,
}
_KILLS: Mapping[Fault | None, int] = {Fault.KILL_SOURCE: 10, Fault.KILL_DESTINATION: 10}
_RECORDS = {Side.SOURCE: 18, Side.DESTINATION: 12}
# Idle worker threads of a daemon end after ten seconds.
_REST_S = 15.0


@dataclass(frozen=True)
class Sample:
    """What a daemon takes up. Memory is what it has to itself, in KiB: guest RAM, which it shares, is not in it."""

    host: str
    migrations: int
    private_kib: int
    threads: int
    journal_bytes: int


@dataclass
class Soak:
    """What came of it.

    Attributes:
        guests: How many there were, one after the other.
        samples: Of both daemons, after each migration of the second half.
        rested: Of both daemons, when all was deleted and idle threads had time to end.
        restarted: Of both daemons, started again after that.
    """

    seed: int
    migrations: int = 200
    on_migration: Callable[[int, str], None] = lambda _number, _line: None
    problems: list[str] = field(default_factory=list)
    guests: int = 1
    outcomes: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    rested: list[Sample] = field(default_factory=list)
    restarted: list[Sample] = field(default_factory=list)

    async def run(self, root: Path) -> None:
        """As many migrations; stops at the first broken promise."""
        chance = random.Random(self.seed)
        async with open_site(root, *NAMES) as site:
            pair = Pair(site)
            await pair.start()
            instance = await create_guest(pair)
            for number in range(self.migrations):
                has_kills = number < self.migrations // 2
                instance = await self._migrate(pair, number, _draw(chance, with_kills=has_kills), instance)
                if self.problems:
                    return
                if not has_kills:
                    self.samples += [_sample(host, number + 1) for host in pair.hosts.values()]
            self.problems += await clean(pair, instance)
            await trio.sleep(_REST_S)
            self.rested = [_sample(host, self.migrations) for host in pair.hosts.values()]
            for name, host in pair.hosts.items():
                self.problems += [f"{host.name}: {t}" for t in more_than(pair.descriptors(name), pair.at_rest[name])]
                await host.aclose()
            await pair.restart_dead()
            self.restarted = [_sample(host, self.migrations) for host in pair.hosts.values()]

    async def _migrate(self, pair: Pair, number: int, trial: Trial | None, instance: str) -> str:
        """One migration; the instance that goes on, with the host that has it as the next source."""
        migration, relay = await migrate_under_fire(pair, trial or Trial(Fault.CUT, None), instance)
        struck = trial is not None and relay.struck.is_set()
        verdict = await judge_living(pair, instance, migration, victim_of(trial) if trial and struck else None)
        line = f"{trial.fault.value} {trial.boundary}" if trial and struck else "no fault"
        self.on_migration(number, f"{line}: {verdict.outcome}, owner {verdict.owner or 'nobody'}")
        self.outcomes[verdict.outcome] += 1
        self.problems += [f"migration {number}, {line}: {problem}" for problem in verdict.problems]
        if verdict.owner == "destination":
            pair.swap()
        if verdict.owner is None and not self.problems:
            self.problems += await clean(pair, instance)
            self.guests += 1
            return await create_guest(pair)
        return instance


def _draw(chance: random.Random, *, with_kills: bool) -> Trial | None:
    weights = {**_WEIGHTS, **_KILLS} if with_kills else _WEIGHTS
    fault = chance.choices(list(weights), list(weights.values()))[0]
    side = chance.choice(list(Side))
    number = chance.randrange(_RECORDS[side])
    return None if fault is None else Trial(fault, Boundary(side, number))


def _sample(host: HostProcess, migrations: int) -> Sample:
    proc = Path(f"/proc/{host.process.pid}")
    private = sum(_kib(proc / "smaps_rollup", name) for name in ("Private_Dirty", "Private_Clean"))
    return Sample(
        host=host.name,
        migrations=migrations,
        private_kib=private,
        threads=len(list((proc / "task").iterdir())),
        journal_bytes=(host.state / "journal.vmmj").stat().st_size,
    )


def _kib(path: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
