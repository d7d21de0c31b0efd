"""How much memory a daemon takes during a migration, beside the guest's RAM, and whether that is what is promised.

    python bench/memory.py [--full] [--json] [--cases "256 MiB,8 GiB sparse"] [--caches 32,0] [--moves N]
    python bench/memory.py --cases "8 GiB sparse" --caches 32 --moves 8
    python bench/memory.py --cases "8 GiB" --caches 32 --moves 3
    python bench/memory.py --json | jq .ratios

Two daemons in processes of their own, new ones for each case, and one guest that moves to and fro between them. Of both
daemons is taken, while the guest moves and until both are quiet again: Private_Dirty of all mappings but those of guest
RAM (/proc/PID/smaps), and page tables (VmPTE), those for guest RAM, too. What it is more than just before the move,
when the daemon was quiet, is `growth`, here its peak; allowed are 64 MiB and 0.2 % of the guest's RAM. After each move
the guest checks its memory, or the bench fails; so it does when the guest did not move. That more is taken than is
allowed, is shown.

first       the first time that a daemon was source, or destination: it also loads what it needs for that
later       the other times; shown is the largest
over new    the peak, and what the daemon had before its first move: what malloc did not give back counts again
kept        what the daemon, quiet again after the last move, has more than before the first one

256 MiB, 1 GiB
            all of RAM touched, and little written
8 GiB sparse
            64 MiB of it touched
8 GiB       all of it touched; only when it is asked for, since it takes 17 GiB of memory
256 MiB busy
            all of RAM touched, 64 bytes of each page written again and again, so that there are many rounds; the link
            is held to 192 MiB/s (`--bandwidth-mib-s`), so that zstd and deltas may pay

How it could mislead: to read smaps takes 5 to 20 ms for a daemon, and a processor with it (it walks all page tables;
what it took is in `runs`), so that is done 20 times a second only. Between, every 2 ms, RssAnon and
VmPTE of /proc/PID/status are read, in 30 µs; in these daemons RssAnon is the same number, because what they map besides
is guest RAM or clean. A peak shorter than that is not seen. What malloc keeps after one move, the next one need not ask
for: only `first` and `over new` show it. How much a larger guest needs, no case here tells: both the allowance and what
is needed grow with it, the second by page tables and digests of what is touched.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import trio

from tools.bench_site import Pair, open_pair
from vmmigrate.engine.limits import MigrationOptions
from vmmigrate.memory import MIB, PAGE_SIZE

ALLOWED_MIB, ALLOWED_SHARE = 64.0, 0.002
KIB_PER_MIB = 1024
PAGES_PER_MIB = MIB // PAGE_SIZE
DEFAULT_CACHE_MIB = MigrationOptions().delta_cache_mib

GLANCE_S = 0.002
LOOK_S = 0.05
QUIET_S = 0.3
QUIET_KIB = 128
QUIET_DEADLINE_S = 30.0
SOURCE, DESTINATION = "source", "destination"


@dataclass(frozen=True)
class Case:
    """A guest, and the link that it moves over (0: as fast as it is)."""

    name: str
    mib: int
    touched_mib: int
    rate_pages_per_s: int = 500
    pattern: str = "full"
    bandwidth_mib_s: int = 0

    @property
    def program(self) -> dict[str, Any]:
        return {
            "name": "stress",
            "working_set_pages": min(self.touched_mib, self.mib) * PAGES_PER_MIB - 1,
            "rate_pages_per_s": self.rate_pages_per_s,
            "pattern": self.pattern,
        }

    @property
    def allowed_mib(self) -> float:
        return ALLOWED_MIB + ALLOWED_SHARE * self.mib


CASES = (
    Case("256 MiB busy", 256, 256, 16_000, "sparse", 192),
    Case("8 GiB sparse", 8192, 64),
    Case("256 MiB", 256, 256),
    Case("1 GiB", 1024, 1024),
)
LARGE = Case("8 GiB", 8192, 8192)  # only when it is asked for: it takes 17 GiB of this machine's memory
SHORT_PLAN = 3  # the first two cases; the second with its first cache only: over a fast link no cache is used

# --------------------------------------------------------------------------- looking at a daemon

_MAPPING = re.compile(
    rb"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+ *(?P<name>.*)\n(?:[A-Z].*\n)*?Private_Dirty: +(?P<kib>\d+) kB", re.MULTILINE
)
_STATUS = re.compile(rb"^(RssAnon|VmPTE):\s+(\d+) kB", re.MULTILINE)


@dataclass
class Looks:
    """What was seen of one daemon, in KiB; page tables included.

    Attributes:
        glances: From its status. fullest: Mappings, when smaps told of the most; by name.
        look_s: What it took to read smaps.
    """

    pid: int
    glances: list[int] = field(default_factory=list)
    looks: list[int] = field(default_factory=list)
    page_tables: list[int] = field(default_factory=list)
    fullest: Counter[str] = field(default_factory=Counter)
    look_s: list[float] = field(default_factory=list)

    def glance(self) -> None:
        status = status_of(self.pid)
        self.glances.append(status["RssAnon"] + status["VmPTE"])
        self.page_tables.append(status["VmPTE"])

    def look(self) -> None:
        begun = time.perf_counter()
        mappings = private_dirty_of(self.pid)
        self.look_s.append(time.perf_counter() - begun)
        self.looks.append(mappings.total() + status_of(self.pid)["VmPTE"])
        if self.looks[-1] == max(self.looks):
            self.fullest = mappings


def status_of(pid: int) -> dict[str, int]:
    """Anonymous memory and page tables, in KiB."""
    return {name.decode(): int(kib) for name, kib in _STATUS.findall(Path(f"/proc/{pid}/status").read_bytes())}


def private_dirty_of(pid: int) -> Counter[str]:
    """Private_Dirty in KiB, by name of the mapping, but for guest RAM."""
    found: Counter[str] = Counter()
    for mapping in _MAPPING.finditer(Path(f"/proc/{pid}/smaps").read_bytes()):
        name = mapping["name"].decode() or "anonymous"
        if "memfd:" not in name:
            found[name.rpartition("/")[2]] += int(mapping["kib"])
    return found


@contextmanager
def watching(pids: dict[str, int]) -> Iterator[dict[str, Looks]]:
    """All daemons, looked at by a thread until the block ends."""
    seen = {host: Looks(pid) for host, pid in pids.items()}
    is_over = threading.Event()
    thread = threading.Thread(target=_watch, args=(list(seen.values()), is_over))
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()
        for looks in seen.values():
            looks.look()


def _watch(seen: Sequence[Looks], is_over: threading.Event) -> None:
    next_look_s = 0.0
    while not is_over.wait(GLANCE_S):
        for looks in seen:
            looks.glance()
        if time.monotonic() >= next_look_s:
            for looks in seen:
                looks.look()
            next_look_s = time.monotonic() + LOOK_S


async def wait_quiet(pids: dict[str, int]) -> dict[str, Looks]:
    """What daemons take when nothing happens: how they were for a while."""
    with trio.fail_after(QUIET_DEADLINE_S):
        while True:
            seen = {host: Looks(pid) for host, pid in pids.items()}
            begun = trio.current_time()
            while trio.current_time() < begun + QUIET_S:
                for looks in seen.values():
                    looks.glance()
                await trio.sleep(GLANCE_S * 5)
            if all(max(looks.glances) - min(looks.glances) < QUIET_KIB for looks in seen.values()):
                for looks in seen.values():
                    looks.look()
                return seen


# --------------------------------------------------------------------------- moves


async def runs_of(case: Case, cache_mib: int, moves: int) -> AsyncIterator[dict[str, Any]]:
    """Move so often, between new daemons; a run for each daemon and move.

    Raises: SystemExit: the guest did not move, or is not as it was.
    """
    async with open_pair() as pair:
        await pair.boot(case.mib, case.program)
        before = fresh = await wait_quiet(pair.pids)
        for number in range(moves):
            roles = {SOURCE: pair.here, DESTINATION: pair.there}
            with watching(pair.pids) as seen:
                record = await pair.move(delta_cache_mib=cache_mib, bandwidth_mib_s=case.bandwidth_mib_s)
                if record["outcome"] != "moved":
                    raise SystemExit(f"{case.name}, move {number}: {record['outcome']}, {record['error']}")
                after = await wait_quiet(pair.pids)
            await check(pair, f"{case.name}, move {number}")
            for role, host in roles.items():
                yield {
                    **described(case, cache_mib, number, record),
                    "role": role,
                    "time": "first" if number < len(roles) else "later",
                    **grown(before[host], seen[host], after[host], fresh[host], case),
                }
            before = after


async def check(pair: Pair, what: str) -> None:
    """Raises: SystemExit: the guest's memory is not as it was."""
    found = await pair.checked()
    if not found["consistent"]:
        raise SystemExit(f"{what}: memory is not as it was: {found['reason']}")


def described(case: Case, cache_mib: int, number: int, record: dict[str, Any]) -> dict[str, Any]:
    return {
        "case": case.name,
        "guest_mib": case.mib,
        "cache_mib": cache_mib,
        "number": number,
        "total_s": round(record["total_s"], 3),
        "rounds": len(record["ram"]["rounds"]),
        "encodings": record["ram"]["encodings"],
    }


def grown(before: Looks, seen: Looks, after: Looks, fresh: Looks, case: Case) -> dict[str, Any]:
    """By how much one daemon grew, in MiB. What smaps and status say is each compared with its own beginning."""
    glanced = max(seen.glances) - median(before.glances)
    looked = max(seen.looks) - before.looks[0]
    more = seen.fullest - before.fullest
    return {
        "before_mib": in_mib(median(before.glances)),
        "growth_mib": in_mib(max(glanced, looked)),
        "growth_by_smaps_mib": in_mib(looked),
        "page_tables_mib": in_mib(max(seen.page_tables) - median(before.page_tables)),
        "over_new_mib": in_mib(max(seen.glances) - median(fresh.glances)),
        "kept_mib": in_mib(median(after.glances) - median(fresh.glances)),
        "allowed_mib": round(case.allowed_mib, 2),
        "largest_mib": {name: in_mib(kib) for name, kib in more.most_common(3)},
        "looks": len(seen.looks),
        "glances": len(seen.glances),
        "look_ms": round(statistics.median(seen.look_s) * 1e3, 2),
    }


def median(values: Sequence[int]) -> int:
    return round(statistics.median(values))


def in_mib(kib: float) -> float:
    return round(kib / KIB_PER_MIB, 2)


# --------------------------------------------------------------------------- what is reported


def name_of(run: dict[str, Any]) -> str:
    return f"{run['case']}, cache {run['cache_mib']} MiB"


def chosen(runs: Sequence[dict[str, Any]], name: str, role: str, when: str) -> list[dict[str, Any]]:
    return [run for run in runs if (name_of(run), run["role"], run["time"]) == (name, role, when)]


def ratios_of(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The largest growth, as a part of what is allowed."""
    ratios: dict[str, float] = {}
    for name in dict.fromkeys(map(name_of, runs)):
        for role in (SOURCE, DESTINATION):
            for when in ("first", "later"):
                if mine := chosen(runs, name, role, when):
                    for title, what in (("growth", "growth_mib"), ("over new", "over_new_mib")):
                        most = max(run[what] / run["allowed_mib"] for run in mine)
                        ratios[f"{title} / allowed, {role}, {when}, {name}"] = round(most, 3)
    return ratios


def print_table(runs: Sequence[dict[str, Any]], ratios: dict[str, float]) -> None:
    print(
        f"{'':24}{'growth':>8}{'tables':>8}{'allowed':>9}{'ratio':>7}{'':9}{'over new':>8}{'ratio':>7}{'kept':>7}",
        end="",
    )
    print("   seconds, rounds; where it grew (MiB)")
    for name in dict.fromkeys(map(name_of, runs)):
        print(name)
        for role in (SOURCE, DESTINATION):
            for when in ("first", "later"):
                if mine := chosen(runs, name, role, when):
                    of_it = [ratios[f"{title} / allowed, {role}, {when}, {name}"] for title in ("growth", "over new")]
                    print_line(f"  {role}, {when}", mine, *of_it)
    looks = statistics.median(run["look_ms"] for run in runs)
    print(f"to read smaps of a daemon took {looks:.1f} ms; {sum(run['looks'] for run in runs)} times")


def print_line(name: str, mine: Sequence[dict[str, Any]], ratio: float, ratio_over_new: float) -> None:
    most = max(mine, key=lambda run: run["growth_mib"])
    over_new_mib = max(run["over_new_mib"] for run in mine)
    print(f"{name:24}{most['growth_mib']:8.1f}{most['page_tables_mib']:8.1f}{most['allowed_mib']:9.1f}", end="")
    print(f"{ratio:7.2f}  {'kept' if ratio <= 1 else 'missed':7}{over_new_mib:8.1f}{ratio_over_new:7.2f}", end="")
    where = ", ".join(f"{mapping} {mib:.1f}" for mapping, mib in most["largest_mib"].items())
    print(f"{mine[-1]['kept_mib']:7.1f}   {most['total_s']:.2f}, {most['rounds']}; {where}")


async def measure(plan: Sequence[tuple[Case, int]], moves: int) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = []
    for case, cache_mib in plan:
        async for run in runs_of(case, cache_mib, moves):
            runs.append(run)
            print(f"{name_of(run)}, move {run['number']}, {run['role']}: {run['growth_mib']} MiB", file=sys.stderr)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--full", action="store_true", help="every case, 8 moves of each")
    parser.add_argument("--cases", default=None, help=f"of {', '.join(case.name for case in (*CASES, LARGE))}")
    parser.add_argument("--caches", default=None, help=f"MiB, for `delta_cache_mib` ({DEFAULT_CACHE_MIB},0)")
    parser.add_argument("--moves", type=int, default=None, help="moves of every case (3; full: 8)")
    arguments = parser.parse_args()
    names = arguments.cases.split(",") if arguments.cases else [case.name for case in CASES]
    known = {case.name: case for case in (*CASES, LARGE)}
    if unknown := set(names) - known.keys():
        parser.error(f"--cases: {', '.join(sorted(unknown))}: allowed are {', '.join(known)}")
    caches = [int(mib) for mib in (arguments.caches or f"{DEFAULT_CACHE_MIB},0").split(",")]
    plan = [(case, cache_mib) for name, case in known.items() if name in names for cache_mib in caches]
    moves = arguments.moves or (8 if arguments.full else 3)
    runs = trio.run(measure, plan if arguments.full or arguments.cases else plan[:SHORT_PLAN], moves)
    ratios = ratios_of(runs)
    if arguments.json:
        print(json.dumps({"name": "memory", "ratios": ratios, "runs": runs}))
    else:
        print(f"{moves} moves of every case, {os.cpu_count()} CPUs")
        print_table(runs, ratios)


if __name__ == "__main__":
    main()
