"""Strike at every boundary with every fault, print the matrix, and fail when a promise was broken.

python -m tools.faults                    everything
python -m tools.faults --short            kills and cuts only
python -m tools.faults --fault cut --every 3
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import trio

from tools.faults.relay import Boundary, Side
from tools.faults.site import open_site
from tools.faults.trial import SHORT, Fault, Pair, Verdict, run_trial


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.faults", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="kills and cuts only")
    parser.add_argument("--fault", action="append", choices=[fault.value for fault in Fault], help="only these")
    parser.add_argument("--every", type=int, default=1, help="strike at every N-th boundary only")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop after so long, and say what was left out")
    chosen = parser.parse_args(argv)
    faults = [Fault(name) for name in chosen.fault or []] or list(SHORT if chosen.short else Fault)
    with tempfile.TemporaryDirectory(prefix="vmmigrate-faults-") as root:
        verdicts = trio.run(run_all, Path(root), faults, chosen.every, chosen.seconds)
    return report(verdicts)


async def run_all(root: Path, faults: Sequence[Fault], every: int, seconds: float) -> list[Verdict]:
    """All trials, one after the other, on one pair of hosts that is restarted as needed."""
    verdicts: list[Verdict] = []
    deadline = time.monotonic() + seconds
    async with open_site(root, "source", "destination") as site:
        pair = Pair(site)
        await pair.start()
        calm, records = await run_trial(pair, Fault.CUT, None)
        verdicts.append(calm)
        print(f"without a fault: {calm.outcome}, records {_shown(records)}", flush=True)
        for fault in faults:
            for boundary in _boundaries(records, every):
                if time.monotonic() > deadline:
                    print("time is up: the rest was left out", flush=True)
                    return verdicts
                verdict, _ = await run_trial(pair, fault, boundary)
                verdicts.append(verdict)
                print(_line(verdict), flush=True)
                await pair.restart_dead()
    return verdicts


def _boundaries(records: Mapping[Side, int], every: int) -> Iterator[Boundary]:
    for side, count in records.items():
        for number in range(0, count, every):
            yield Boundary(side, number)


def _shown(records: Mapping[Side, int]) -> str:
    return ", ".join(f"{side.value} {count}" for side, count in records.items())


def _line(verdict: Verdict) -> str:
    reached = "" if verdict.reached else " (not reached)"
    problems = "".join(f"\n    BROKEN: {problem}" for problem in verdict.problems)
    owner = verdict.owner or "nobody"
    return f"{verdict.fault.value:17} {verdict.boundary!s:16} {verdict.outcome:11} owner {owner}{reached}{problems}"


def report(verdicts: Sequence[Verdict]) -> int:
    """The matrix: per fault, how many trials, how they ended, and what was broken. 1 when anything was."""
    print(f"\n{'fault':17} {'trials':>6} {'source':>7} {'dest':>5} {'nobody':>7} {'broken':>7}")
    for fault in Fault:
        rows = [verdict for verdict in verdicts if verdict.fault is fault and verdict.boundary is not None]
        if rows:
            owners = [row.owner for row in rows]
            count = sum(bool(row.problems) for row in rows)
            print(
                f"{fault.value:17} {len(rows):6} {owners.count('source'):7} {owners.count('destination'):5}"
                f" {owners.count(None):7} {count:7}"
            )
    broken = [verdict for verdict in verdicts if verdict.problems]
    print(f"{len(verdicts)} trials, {len(broken)} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
