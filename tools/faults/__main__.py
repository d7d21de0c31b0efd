"""Strike at every message boundary of real migrations with every fault, and judge by witnesses.

Two daemons and a guest, each a process of its own. After every fault both daemons are started again, and
when all is settled there is exactly one owner, its guest is whole, and nothing is left of the other. Prints the matrix:
a row for each boundary, a column for each fault; exit code 1 when a promise was broken.

examples:
  python -m tools.faults                          everything: about 400 trials
  python -m tools.faults --short                  kills and cuts only, as in `make check`
  python -m tools.faults --fault stall --fault cut --every 3
  python -m tools.faults --hypervisor qemu --short --every 3
  python -m tools.faults --short --json > faults.json
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import trio

from tools.faults.matrix import line_of, matrix, to_plain
from tools.faults.runner import Campaign
from tools.faults.trial import SHORT, Fault, Result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="kills and cuts only")
    parser.add_argument(
        "--hypervisor",
        choices=["embedded", "qemu", "qemu-stream"],
        default="embedded",
        help="what runs the guests; with -stream QEMU has to tell what they write",
    )
    parser.add_argument("--fault", action="append", choices=[fault.value for fault in Fault], help="only these")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="strike at every N-th boundary only")
    parser.add_argument("--jobs", type=int, default=6, metavar="N", help="pairs of hosts at work at once (6)")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop after so long, and say what was left out")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout; progress goes to stderr")
    chosen = parser.parse_args(argv)
    faults = [Fault(name) for name in chosen.fault or []] or list(SHORT if chosen.short else Fault)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # daemons and guests are ended on every way out
    campaign = Campaign(faults, chosen.every, chosen.jobs, chosen.seconds, _tell, chosen.hypervisor)
    with tempfile.TemporaryDirectory(prefix="vmmigrate-faults-") as root:
        trio.run(campaign.run, Path(root))
    print(json.dumps(to_plain(campaign)) if chosen.json else matrix(campaign))
    return 1 if campaign.broken or campaign.left_out else 0


def _tell(result: Result, left: int) -> None:
    print(f"{left:4} left  {line_of(result)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
