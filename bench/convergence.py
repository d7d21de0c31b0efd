"""What becomes of a guest that writes its RAM as fast as the link carries it, or faster: which policy ends how.

    python bench/convergence.py [--full] [--json] [--mib N] [--link MIB_PER_S] [--ratios 0.5,1] [--policies wait]

Two daemons in processes of their own. The link carries as much as `bandwidth_mib_s` says, so that the ratio of dirty
rate to link is what is asked for, whatever this machine can do. The guest rewrites all of its RAM in turn: no page
twice before every other; and pages travel as they are, since compressing and deltas would make another link of it: this
guest's changes are such that deltas alone let it converge, as far as their cache goes. Every migration has a fresh pair
of hosts and as much time as sending all of RAM ten times takes, and its guest's memory is checked afterwards, whatever
became of it; or the bench fails.

wait             the default: as long as rounds get shorter, pause when that is forecast to take at most `downtime_ms`
auto-converge    and throttle the guest step by step
force at the end pause when the time is over, however long that takes
force at once    pause after two rounds, however long that takes: what a guest pays who is moved in any case

Shown: how it ended; total time and bytes against sending RAM once; the gap that the guest saw against the limit; and
how far its processors were throttled.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import trio

from tools.bench_site import Pair, open_pair
from vmmigrate.memory import MIB, PAGE_SIZE

PAGES_PER_MIB = MIB // PAGE_SIZE
DOWNTIME_MS = 300
TIMES = 10  # what sending RAM once takes


@dataclass(frozen=True)
class Policy:
    name: str
    options: dict[str, Any] = field(default_factory=dict)


POLICIES = (
    Policy("wait"),
    Policy("auto-converge", {"auto_converge": True}),
    Policy("force at the end", {"on_timeout": "force", "max_rounds": 100}),
    Policy("force at once", {"max_rounds": 2, "force": True}),
)


@dataclass(frozen=True)
class Trial:
    """One migration. `ratio` is the dirty rate by what the link carries."""

    policy: Policy
    ratio: float
    mib: int
    link_mib_s: int

    @property
    def once_s(self) -> float:
        """How long the link takes for RAM as it is."""
        return self.mib / self.link_mib_s

    @property
    def program(self) -> dict[str, Any]:
        return {
            "name": "stress",
            "working_set_pages": self.mib * PAGES_PER_MIB - 1,
            "rate_pages_per_s": max(1, int(self.ratio * self.link_mib_s * PAGES_PER_MIB)),
        }

    @property
    def options(self) -> dict[str, Any]:
        return {
            "downtime_ms": DOWNTIME_MS,
            "bandwidth_mib_s": self.link_mib_s,
            "compression": "off",
            "delta_cache_mib": 0,
            "timeout_s": TIMES * self.once_s,
            **self.policy.options,
        }


async def attempt(trial: Trial) -> dict[str, Any]:
    """Migrate once. Raises: SystemExit: the guest is not as it was."""
    async with open_pair() as pair:
        await pair.boot(trial.mib, trial.program)
        record = await pair.move(**trial.options)
        found = await check(pair)
        if not found["consistent"]:
            raise SystemExit(f"{trial.policy.name}, {trial.ratio:g}: memory is not as it was: {found['reason']}")
        return {"policy": trial.policy.name, "ratio": trial.ratio, **described(trial, record, found)}


async def check(pair: Pair) -> dict[str, Any]:
    """What the guest says, wherever it is, once it beats again."""
    await pair.wait_beats(5)
    found = await pair.checked()
    return {**found, **found["heartbeat"]}


def described(trial: Trial, record: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    rounds = record["ram"]["rounds"]
    gap_ms = found["move_gaps_ms"][-1] if record["outcome"] == "moved" else None
    return {
        "ended": record["outcome"] if record["error"] is None else record["error"]["code"],
        "total_s": round(record["total_s"], 2),
        "total_times": round(record["total_s"] / trial.once_s, 2),
        "sent_times": round(record["ram"]["sent_bytes"] / (trial.mib * MIB), 2),
        "rounds": len(rounds),
        "gap_ms": None if gap_ms is None else round(gap_ms, 1),
        "gap_times": None if gap_ms is None else round(gap_ms / DOWNTIME_MS, 3),
        "throttle_percent": max((int(each.get("throttle_percent", 0)) for each in rounds), default=0),
    }


# --------------------------------------------------------------------------- what is reported


def ratios_of(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    ratios: dict[str, float] = {}
    for run in runs:
        name = f"{run['policy']}, dirty {run['ratio']:g} of the link"
        ratios[f"{name}: total / RAM once"] = run["total_times"]
        if run["gap_times"] is not None:
            ratios[f"{name}: gap / limit"] = run["gap_times"]
    return ratios


def print_table(runs: Sequence[dict[str, Any]]) -> None:
    print(f"{'policy':18}{'dirty/link':>11}  {'ended':22}{'total':>8}{'/ once':>8}{'sent':>7}{'rounds':>8}", end="")
    print(f"{'gap ms':>9}{'/ limit':>9}{'throttle':>10}")
    for run in runs:
        gap = "" if run["gap_ms"] is None else f"{run['gap_ms']:.1f}"
        times = "" if run["gap_times"] is None else f"{run['gap_times']:.2f}"
        print(f"{run['policy']:18}{run['ratio']:11.2g}  {run['ended']:22}{run['total_s']:7.1f}s", end="")
        print(f"{run['total_times']:8.2f}{run['sent_times']:7.2f}{run['rounds']:8}{gap:>9}{times:>9}", end="")
        print(f"{run['throttle_percent']:8} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--full", action="store_true", help="more RAM, ratios and policies; else about a minute")
    parser.add_argument("--mib", type=int, default=None, help="RAM of the guest (96; full: 256)")
    parser.add_argument("--link", type=int, default=None, help="MiB/s that the link carries (192)")
    parser.add_argument("--ratios", default=None, help="dirty rate by link (0.5,1.5; full: 0.1,0.25,0.5,0.8,1,1.5,2)")
    parser.add_argument("--policies", default=None, help=f"of {', '.join(policy.name for policy in POLICIES)}")
    arguments = parser.parse_args()
    mib, link = arguments.mib or (256 if arguments.full else 96), arguments.link or 192
    dirty = arguments.ratios or ("0.1,0.25,0.5,0.8,1,1.5,2" if arguments.full else "0.5,1.5")
    chosen = arguments.policies.split(",") if arguments.policies else [policy.name for policy in POLICIES]
    runs: list[dict[str, Any]] = []
    for ratio in map(float, dirty.split(",")):
        for policy in POLICIES:
            if policy.name in chosen:
                runs.append(trio.run(attempt, Trial(policy, ratio, mib, link)))
                print(f"{policy.name}, {ratio:g}: {runs[-1]['ended']}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({"name": "convergence", "ratios": ratios_of(runs), "runs": runs}))
    else:
        print(f"{mib} MiB, link of {link} MiB/s, {os.cpu_count()} CPUs, {DOWNTIME_MS} ms allowed")
        print_table(runs)


if __name__ == "__main__":
    main()
