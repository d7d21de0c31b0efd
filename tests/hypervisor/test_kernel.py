"""Calls of the kernel and the C library that no other test sees the effect of."""

from __future__ import annotations

import subprocess
import sys

# A process whose large blocks have come and gone once; then a block below one that stays goes, too.
_PROGRAM = """
import sys
import numpy as np
from vmmigrate.hypervisor.kernel import give_large_blocks_back

def anonymous_kib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

if sys.argv[1] == "given back":
    give_large_blocks_back()
first = np.ones(16 << 20, dtype=np.uint8)
del first
before = anonymous_kib()
second = np.ones(15 << 20, dtype=np.uint8)
stays = [np.ones(100_000, dtype=np.uint8) for _ in range(2)]
del second
print(anonymous_kib() - before)
"""


def _kept_kib(how: str) -> int:
    command = [sys.executable, "-c", _PROGRAM, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


def test_large_blocks_are_the_kernels_again_when_they_are_freed() -> None:
    """The other process shows that they would not be by themselves."""
    assert _kept_kib("given back") < 2 << 10
    assert _kept_kib("as it is") > 10 << 10
