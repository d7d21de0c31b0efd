"""How much memory this host can still give: what the kernel says is available, and what its control groups allow.

A page of shared memory is charged to the control group of whoever touches it first, which for an arriving guest is the
daemon. Limits of all groups above it hold as well, and file pages that nobody uses do not count: they would go first.

Source: Linux, admin-guide/cgroup-v2 (memory.max, memory.current, memory.stat) and cgroup-v1/memory (the same in
memory.limit_in_bytes, memory.usage_in_bytes, memory.stat).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RESERVE_BYTES = 128 << 20  # what a guest needs beside its RAM, and what the host keeps for itself


@dataclass(frozen=True)
class _Names:
    """Files of one version of control groups."""

    limit: str
    usage: str
    unused_files: str  # a line of memory.stat


_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Names("memory.max", "memory.current", "inactive_file")


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """What can be had without swapping and without being killed for it. Reads a few small files: tens of µs."""
    return min(_available_here(proc), *_allowed(proc, cgroups), 1 << 62)


def _available_here(proc: Path) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return 0


def _allowed(proc: Path, cgroups: Path) -> Iterator[int]:
    """What each group that limits this process still allows. Where there are none, or they cannot be read, nothing."""
    for names, mount, path in _memberships(proc, cgroups):
        # In a container, the path may be that of the host; what is mounted here is then the group itself.
        group = mount / path.lstrip("/")
        for level in (group, *group.parents) if group.is_dir() else (mount,):
            if not level.is_relative_to(mount):
                break
            with contextlib.suppress(OSError, ValueError, StopIteration):
                yield _left(level, names)


def _memberships(proc: Path, cgroups: Path) -> Iterator[tuple[_Names, Path, str]]:
    with contextlib.suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                yield _V1, cgroups / "memory", path
            elif not controllers:
                yield _V2, cgroups, path


def _left(group: Path, names: _Names) -> int:
    """Raises: ValueError: there is no limit. OSError, StopIteration: this is no group with a limit."""
    limit = int((group / names.limit).read_text())
    usage = int((group / names.usage).read_text())
    stat = (group / "memory.stat").read_text().splitlines()
    unused = next(int(line.split()[1]) for line in stat if line.split()[0] == names.unused_files)
    return max(limit - usage + unused, 0)
