"""Explore a scenario, print how many states it has, and the way to the first broken promise.

python -m tools.model                        A to B, two failures
python -m tools.model --chain abc --failures 1
python -m tools.model --failures 3 --seconds 3600
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tools.model.explore import Explorer
from tools.model.world import COVERED, SCENARIOS, Failure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.model", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--failures", type=int, default=2, help="how many failures deep")
    parser.add_argument("--chain", choices=sorted(SCENARIOS), default="ab", help="who migrates where")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long; that is a failure")
    parser.add_argument("--copied-journals", action="store_true", help="also put journals back with their old id")
    chosen = parser.parse_args(argv)
    scenario = SCENARIOS[chosen.chain]
    allowed = frozenset(Failure) if chosen.copied_journals else COVERED
    report = Explorer(scenario, chosen.failures, seconds=chosen.seconds, allowed=allowed).run(
        # What is outside of the promise need not end.
        liveness=not chosen.copied_journals
    )
    print(report, flush=True)
    return 0 if report.complete and report.violation is None else 1


if __name__ == "__main__":
    sys.exit(main())
