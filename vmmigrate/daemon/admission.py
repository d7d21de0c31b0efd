"""What this host lets in: rules that need the host itself to answer. All problems are reported at once.

A peer's spec is not trusted. Everything that it would make this host open must stand in the host's allow-lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from vmmigrate.daemon.config import Allow
from vmmigrate.errors import SpecCreatableError
from vmmigrate.hypervisor.base import GuestPlan

# What a guest needs beside its RAM, and what the host keeps for itself.
_RESERVE_BYTES = 128 << 20


def check_admissible(plan: GuestPlan, allow: Allow, needed_bytes: int) -> None:
    """Whether this host may build the guest of *plan*.

    Args:
        needed_bytes: RAM that the guest is known to touch.

    Raises:
        SpecCreatableError: `host_refuses`, with every problem in `details["problems"]`.
    """
    problems = [*_disk_problems(plan, allow), *_nic_problems(plan, allow), *_memory_problems(needed_bytes)]
    if problems:
        raise SpecCreatableError(
            "this host refuses: " + "; ".join(problems), code="host_refuses", details={"problems": problems}
        )


def _disk_problems(plan: GuestPlan, allow: Allow) -> Iterator[str]:
    roots = [root.resolve() for root in allow.paths]
    for disk in plan.disks:
        if disk.backend_kind != "file":
            continue
        path = Path(disk.backend["path"])
        resolved = path.resolve()
        if not path.is_absolute() or not any(resolved.is_relative_to(root) for root in roots):
            listed = ", ".join(map(str, roots)) or "nothing"
            yield f"{disk.backend_name}: path {path} is not under the allowed directories ({listed})"


def _nic_problems(plan: GuestPlan, allow: Allow) -> Iterator[str]:
    for nic in plan.nics:
        if not any(fnmatchcase(nic.vnic_name, pattern) for pattern in allow.interfaces):
            listed = ", ".join(allow.interfaces) or "none"
            yield f"{nic.backend_name}: interface {nic.vnic_name!r} is not allowed ({listed})"


def _memory_problems(needed_bytes: int) -> Iterator[str]:
    available = available_bytes()
    if needed_bytes + _RESERVE_BYTES > available:
        yield f"the guest uses {needed_bytes >> 20} MiB of RAM, {available >> 20} MiB are available"


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Memory that the kernel says can be had without swapping."""
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return 0
