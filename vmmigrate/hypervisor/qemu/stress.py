"""The stress guest for QEMU, which checks itself: built from source, told what to do, and watched from outside.

    elf = build_stress_guest(directory)
    qemu-system-x86_64 -m 64M -kernel ELF -append "$(stress_append(mem_mib=48, ws_mib=16, rate=10))" -serial ...

What the guest does, and the letters that it takes as commands, is told at the head of `guests/stress.c`. Its console
carries the heartbeat alone; everything else stands in the vitals page, which `read_vitals` reads from a mapping of
guest RAM.

Whoever is connected to the console has to read it all the time. A Unix socket is full after some 280 letters, as each
is a write of its own; then the last ones wait in the UART, travel with the guest, and are sent twice: by the source as
soon as somebody reads, though its guest has stopped, and by the destination. Seen with QEMU 7.2.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.base import SelfCheck

VITALS_GPA: Final = 0x3FF000
FIRST_FILLED_GPA: Final = 4 << 20

_SOURCE = Path(__file__).with_name("guests") / "stress.c"
_LINK_SCRIPT = _SOURCE.with_suffix(".ld")
_COMPILERS = ("gcc", "cc")
_FLAGS = (
    *("-m32", "-march=i686", "-std=gnu11", "-O2", "-Wall", "-Wextra"),
    *("-ffreestanding", "-nostdlib", "-static", "-fno-pic", "-fno-pie", "-no-pie"),
    "-mgeneral-regs-only",  # what interrupt handlers need, which save no other registers
    "-fno-tree-loop-distribute-patterns",  # it would make calls of memset out of loops, and there is none
    *("-fno-stack-protector", "-fcf-protection=none", "-fno-asynchronous-unwind-tables"),
    "-Wl,--build-id=none",
)
_BUILD_TIMEOUT_S = 60

_MAGIC = int.from_bytes(b"VMMSTRS1", "little")
_FIELDS = struct.Struct("<13Q")
_NO_PAGE = (1 << 64) - 1


class State(IntEnum):
    FILLING = 1
    READY = 2
    FAULTED = 3  # the processor raised an exception; nothing moves any more


@dataclass(frozen=True, slots=True)
class Vitals:
    """What the guest tells of itself; counters start at zero when it boots.

    Attributes:
        heartbeats: Letters sent on COM1.
        checks_done: The n-th `v` is answered when this is n.
        bad_pages: How many the last check found that were not as they should be.
        first_bad_page: The first of them, as a page number of guest physical memory.
        mismatches: Pages whose counter was not as predicted when they were to be written.
        state: A `State`.
        disk_read_backs: Blocks read that held what was last written there.
        disk_failures: Requests refused, or blocks that held something else; 1 also where there is no disk.
    """

    heartbeats: int
    checks_started: int
    checks_done: int
    bad_pages: int
    first_bad_page: int | None
    mismatches: int
    filled_pages: int
    passes: int
    state: int
    disk_writes: int
    disk_read_backs: int
    disk_failures: int


def read_vitals(page: memoryview | bytes) -> Vitals | None:
    """Read the page at VITALS_GPA; None as long as no stress guest has written it.

    In a mapping of a running guest, the counters are not of one moment. The result of a check is never older than
    `checks_done` says: fields are read one after the other from the front, and the guest writes the result first.
    """
    if len(page) < _FIELDS.size:
        return None
    magic, beats, started, done, bad, first_bad, *others = _FIELDS.unpack_from(page)
    if magic != _MAGIC:
        return None
    return Vitals(beats, started, done, bad, None if first_bad == _NO_PAGE else first_bad, *others)


def verdict(vitals: Vitals) -> SelfCheck:
    """What the guest says of itself."""
    reasons = []
    if vitals.bad_pages:
        reasons.append(f"{vitals.bad_pages} pages are not as they were written")
    if vitals.mismatches:
        reasons.append(f"{vitals.mismatches} pages were stale when they were written again")
    if vitals.disk_failures:
        reasons.append(f"{vitals.disk_failures} disk requests failed, or read something else than was written")
    return SelfCheck(not reasons, vitals.filled_pages, vitals.first_bad_page, "; ".join(reasons))


def stress_append(*, mem_mib: int, ws_mib: int, rate: int, zero_percent: int = 0, disk: bool = False) -> str:
    """The kernel command line: fill up to *mem_mib*, then write *rate* pages of *ws_mib* each millisecond."""
    if not (4 < mem_mib < 4096 and 0 <= ws_mib <= mem_mib and 0 <= rate < 1 << 20 and 0 <= zero_percent <= 100):
        text = f"no stress guest has mem={mem_mib} ws={ws_mib} rate={rate} zero={zero_percent}"
        raise HypervisorError(text, code="guest_arguments")
    return f"mem={mem_mib} ws={ws_mib} rate={rate} zero={zero_percent} disk={disk:d}"


def build_stress_guest(directory: Path, compiler: str | None = None) -> Path:
    """Compile the guest into *directory*, which exists, and return the path for `-kernel`. Blocks for a second.

    Args:
        compiler: A name or path; without it, the system's `gcc` or `cc`, which has to know x86.

    Raises: HypervisorError: There is no compiler (code `no_compiler`), or it fails (`guest_build`).
    """
    wanted = (compiler,) if compiler else _COMPILERS
    found = next(filter(None, map(shutil.which, wanted)), None)
    if found is None:
        text = f"no compiler for the stress guest: {' or '.join(wanted)}; on Debian: apt-get install gcc"
        raise HypervisorError(text, code="no_compiler")
    elf = directory / "stress.elf"
    _compile([found, *_FLAGS, f"-Wl,-T,{_LINK_SCRIPT}", "-o", str(elf), str(_SOURCE)])
    return elf


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_BUILD_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise HypervisorError(f"cannot run {command[0]}: {exc}", code="guest_build") from exc
    if done.returncode:
        last = (done.stdout.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise HypervisorError(f"cannot build the stress guest: {last}", code="guest_build")
