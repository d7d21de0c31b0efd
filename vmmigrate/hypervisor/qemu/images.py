"""Disk images of a guest that stands still: made active, made inactive, and looked at from outside.

An inactive image is open, and neither locked nor written. QEMU makes images inactive when it has saved its state, and
active when the guest goes on; this host has to have them open *before* that (ownership rule 2). Two commands do it:

- to export a node makes it active, and it stays so when the export is removed;
- to save device state for Xen, of a guest that stands still, makes all of them inactive. QEMU aborts when one of them
  is inactive already: so it is asked only when all are active.

Making active does not always tell a failure. Whether QEMU holds the locks that it takes before it writes to a file is
seen in `/proc/PID/fdinfo`. Network disks have no lock: there the daemon is the only fence.

Source: QEMU, block/export/export.c, migration/savevm.c, block/file-posix.c (lock bytes) (7.2).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.qemu.files import QemuFiles
from vmmigrate.hypervisor.qemu.qmp import QmpError

_EXPORT: Final = "activation"
_WRITER_BYTES: Final = (101, 201)  # locked by whoever may write, and lets nobody else; an attempt that fails keeps one
_LOCK: Final = re.compile(r"^lock:\s.*OFDLCK.*\s(\d+) (\d+)$", re.MULTILINE)

Ask = Callable[..., Awaitable[Any]]


async def prepare(ask: Ask, files: QemuFiles) -> None:
    """Once for each QEMU: exports need a server, to which nobody ever connects."""
    await ask("nbd-server-start", addr={"type": "unix", "data": {"path": str(files.exports)}})


async def activate(ask: Ask, number: int, node: str) -> None:
    """Make the image of disk *number* active, if it is not. Whether it worked is for `not_held` to say.

    Args:
        node: What QEMU calls it.

    Raises: HypervisorError `backend_unavailable`.
    """
    try:
        await ask("block-export-add", type="nbd", id=_EXPORT, node_name=node)
        await ask("block-export-del", id=_EXPORT, mode="hard")
    except QmpError as exc:
        raise HypervisorError(f"disk {number} cannot be opened: {exc.text}", code="backend_unavailable") from exc


async def deactivate(ask: Ask) -> None:
    """Make all images inactive, of a guest that stands still. Only when all are active. Raises: `flush_failed`."""
    try:
        await ask("xen-save-devices-state", filename="/dev/null", live=True)
    except QmpError as exc:
        raise HypervisorError(f"disks cannot be closed: {exc.text}", code="flush_failed") from exc


def not_held(locked: Mapping[int, Path], pid: int) -> list[int]:
    """Which of the disks *locked*, by number, process *pid* holds no lock of for writing. Blocking."""
    held = set()
    for link in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            status = os.stat(link.path)
            for number, path in locked.items():
                if os.path.samestat(status, os.stat(path)) and _holds(pid, link.name):
                    held.add(number)
    return [number for number in locked if number not in held]


def _holds(pid: int, fd: str) -> bool:
    locks = _LOCK.findall(Path(f"/proc/{pid}/fdinfo/{fd}").read_text(encoding="ascii"))
    return all(any(int(first) <= byte <= int(last) for first, last in locks) for byte in _WRITER_BYTES)
