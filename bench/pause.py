"""How long a guest stands still when it moves, and whether that keeps the limit that was asked for.

    python bench/pause.py [--full] [--json] [--mib N] [--moves N] [--cases light,busy]

Two daemons in processes of their own; in each case one guest moves to and fro between them. It writes pages at a set
rate and beats once a millisecond by the machine's monotonic clock, in RAM and in processor state: the pause is the gap
between two beats across the move, as the guest sees it, and nothing is subtracted. Beside it stands what the same
guest's gaps are when it does not move (99 of 100 are shorter). Its memory is checked before each case is over, or the
bench fails; a move that did not happen is counted and shown, for a limit is also kept by not pausing.

kept        share of moves with a gap of at most 1.2 times `downtime_ms`
off         median of |forecast - pause| / pause, both as the source tells them

`--full` moves a guest of 1 GiB, all of it touched, 250 times; otherwise one of 256 MiB, 15 times, in half a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import trio

from tools.bench_site import Pair, open_pair
from vmmigrate.memory import MIB, PAGE_SIZE

SLACK = 1.2
WANTED_P50_MS, WANTED_P99_MS = 10.0, 50.0  # of the light case, with 1 GiB
BETWEEN_BEATS = 300  # so that the steady state has something to say


@dataclass(frozen=True)
class Case:
    """A guest that rewrites its RAM, all of it in turn, at *dirty_mib_s*; and the limit of its pause."""

    name: str
    dirty_mib_s: int
    downtime_ms: int


CASES = (
    Case("light", 2, 300),
    Case("steady", 32, 300),
    Case("busy", 128, 300),
    Case("tight", 32, 60),
    Case("busy and tight", 128, 100),
)


def program_of(case: Case, mib: int) -> dict[str, Any]:
    """It fills RAM, but for the page of the heartbeat, and then rewrites it."""
    pages_per_mib = MIB // PAGE_SIZE
    return {
        "name": "stress",
        "working_set_pages": mib * pages_per_mib - 1,
        "rate_pages_per_s": case.dirty_mib_s * pages_per_mib,
    }


async def runs_of(pair: Pair, case: Case, mib: int, moves: int) -> AsyncIterator[dict[str, Any]]:
    """Move so often. Raises: SystemExit: the guest is not as it was."""
    await pair.boot(mib, program_of(case, mib))
    for number in range(moves):
        await pair.wait_beats(BETWEEN_BEATS)
        record = await pair.move(downtime_ms=case.downtime_ms)
        found = await gaps_after(pair)
        if not found["consistent"]:
            raise SystemExit(f"{case.name}, move {number}: memory is not as it was: {found['reason']}")
        yield {**asdict(case), "number": number, **described(record, found)}


async def gaps_after(pair: Pair) -> dict[str, Any]:
    """What the guest says once it beats again."""
    await pair.wait_beats(5)
    found = await pair.checked()
    return {**found, **found["heartbeat"]}


def described(record: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    moved = record["outcome"] == "moved"
    forecast = record["forecast"]
    return {
        "outcome": record["outcome"],
        "code": None if record["error"] is None else record["error"]["code"],
        "gap_ms": round(found["move_gaps_ms"][-1], 3) if moved else None,
        "steady_p50_ms": round(found["steady_p50_ms"], 3),
        "steady_p99_ms": round(found["steady_p99_ms"], 3),
        "told_ms": round((forecast["pause_s"] + forecast["error_s"]) * 1e3, 3) if moved else None,
        "forecast_ms": round(forecast["pause_s"] * 1e3, 3) if moved else None,
        "total_s": round(record["total_s"], 3),
        "rounds": len(record["ram"]["rounds"]),
        "parts_ms": {name: round(s * 1e3, 2) for name, s in record["downtime_parts_s"].items()},
    }


# --------------------------------------------------------------------------- what is reported


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so many are not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def moved(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run for run in runs if run["outcome"] == "moved"]


def kept(runs: Sequence[dict[str, Any]]) -> float:
    """Share of moves within the limit and its slack."""
    return statistics.mean(run["gap_ms"] <= SLACK * run["downtime_ms"] for run in runs)


def off(runs: Sequence[dict[str, Any]]) -> float:
    return statistics.median(abs(run["forecast_ms"] - run["told_ms"]) / run["told_ms"] for run in runs)


def ratios_of(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    ratios: dict[str, float] = {}
    for name in dict.fromkeys(run["name"] for run in runs):
        mine = moved([run for run in runs if run["name"] == name])
        if not mine:
            continue
        gaps = [run["gap_ms"] for run in mine]
        ratios[f"kept, {name}"] = kept(mine)
        ratios[f"gap p50 / steady p99, {name}"] = statistics.median(gaps) / mine[-1]["steady_p99_ms"]
        ratios[f"forecast off, {name}"] = off(mine)
        if name == "light":
            ratios["gap p50 / wanted, light"] = statistics.median(gaps) / WANTED_P50_MS
            ratios["gap p99 / wanted, light"] = quantile(gaps, 0.99) / WANTED_P99_MS
    if moved(runs):
        ratios["kept, all"] = kept(moved(runs))
        ratios["moved, all"] = len(moved(runs)) / len(runs)
    return {name: round(ratio, 3) for name, ratio in ratios.items()}


def print_table(runs: Sequence[dict[str, Any]], ratios: dict[str, float]) -> None:
    print(f"{'':16}{'writes':>8}{'limit':>8}{'moved':>9}{'gap p50':>9}{'p95':>8}{'p99':>8}{'most':>8}", end="")
    print(f"{'steady p99':>12}{'kept':>7}{'off':>7}{'rounds':>8}   (ms, MiB/s)")
    for name in dict.fromkeys(run["name"] for run in runs):
        all_of_it = [run for run in runs if run["name"] == name]
        mine, first = moved(all_of_it), all_of_it[0]
        print(f"{name:16}{first['dirty_mib_s']:>8}{first['downtime_ms']:>8}{len(mine):>5}/{len(all_of_it):<3}", end="")
        if not mine:
            print("  ".join(sorted({str(run["code"]) for run in all_of_it})))
            continue
        gaps = [run["gap_ms"] for run in mine]
        print(f"{statistics.median(gaps):9.1f}{quantile(gaps, 0.95):8.1f}{quantile(gaps, 0.99):8.1f}", end="")
        print(f"{max(gaps):8.1f}{mine[-1]['steady_p99_ms']:12.2f}{ratios[f'kept, {name}']:7.2f}", end="")
        print(f"{ratios[f'forecast off, {name}']:7.2f}{statistics.median(run['rounds'] for run in mine):8.0f}")
        parts = {
            part: statistics.median(run["parts_ms"].get(part, 0.0) for run in mine) for part in mine[0]["parts_ms"]
        }
        print(f"{'':16}{', '.join(f'{part} {ms:.1f}' for part, ms in parts.items())}")
    print(f"kept of all: {ratios.get('kept, all', 0.0):.3f} of {len(moved(runs))} moves")


async def measure(cases: Sequence[Case], mib: int, moves: int) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = []
    for case in cases:
        async with open_pair() as pair:
            async for run in runs_of(pair, case, mib, moves):
                runs.append(run)
                print(f"{case.name}: {len(runs)}, {run['outcome']}, {run['gap_ms']} ms", file=sys.stderr)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--full", action="store_true", help="1 GiB, 50 moves of every case")
    parser.add_argument("--mib", type=int, default=None, help="RAM of the guest (256; full: 1024)")
    parser.add_argument("--moves", type=int, default=None, help="moves of every case (5; full: 50)")
    parser.add_argument("--cases", default=None, help=f"of {', '.join(case.name for case in CASES)}")
    arguments = parser.parse_args()
    mib = arguments.mib or (1024 if arguments.full else 256)
    count = arguments.moves or (50 if arguments.full else 5)
    chosen = (
        arguments.cases.split(",")
        if arguments.cases
        else [case.name for case in CASES][: None if arguments.full else 3]
    )
    runs = trio.run(measure, [case for case in CASES if case.name in chosen], mib, count)
    ratios = ratios_of(runs)
    if arguments.json:
        print(json.dumps({"name": "pause", "ratios": ratios, "runs": runs}))
    else:
        print(f"{mib} MiB, {count} moves of every case, {os.cpu_count()} CPUs")
        print_table(runs, ratios)


if __name__ == "__main__":
    main()
