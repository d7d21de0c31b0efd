"""Dirty pages of a QEMU guest: the tracker library that is loaded into QEMU, and the scan of what it registered.

Blocking, but for `QemuTracker`. The library is built with the package where there is a C compiler; without it guests
run and cannot be moved, and `Capabilities` says so.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor import kernel
from vmmigrate.hypervisor.dirty import KernelTracker
from vmmigrate.memory import PAGE_SIZE, PageBitmap

ENVIRONMENT: Final = "VMMIGRATE_RAM"


def library() -> Path | None:
    """The tracker as it was built for this machine; None where there was no compiler."""
    built = sorted(Path(__file__).parent.glob("_tracker.*.so"))
    return built[0] if built else None


@dataclass(frozen=True, slots=True)
class RamIdentity:
    """Which file holds a guest's RAM."""

    device: int
    inode: int

    @classmethod
    def of(cls, ram_fd: int) -> RamIdentity:
        status = os.fstat(ram_fd)
        return cls(status.st_dev, status.st_ino)

    def environment(self, library: Path) -> dict[str, str]:
        """What a QEMU is started with so that the tracker knows its guest's RAM."""
        return {"LD_PRELOAD": str(library), ENVIRONMENT: f"{self.device}:{self.inode}"}

    @property
    def in_maps(self) -> tuple[str, str]:
        """As it stands in `/proc/PID/maps`."""
        return f"{os.major(self.device):02x}:{os.minor(self.device):02x}", str(self.inode)


@dataclass(frozen=True, slots=True)
class Mapping:
    """A mapping of guest RAM in a process. `is_writable`: that process could write to it."""

    pid: int
    start: int
    end: int
    is_writable: bool


def mappings(pid: int, ram: RamIdentity) -> Iterator[Mapping]:
    """Where process *pid* maps guest RAM. Raises: OSError: it is gone, or not ours to look at."""
    text = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
    if " {} {} ".format(*ram.in_maps) not in text:
        return
    for line in text.splitlines():
        addresses, rights, _, device, inode = line.split(maxsplit=5)[:5]
        if (device, inode) == ram.in_maps:
            start, end = (int(address, 16) for address in addresses.split("-"))
            yield Mapping(pid, start, end, rights[1] == "w" and rights[3] == "s")


def foreign_writers(own: int, ram: RamIdentity) -> list[int]:
    """Processes that could write guest RAM unseen: all but QEMU (*own*) and this daemon that map it for writing.

    Those of other users cannot be looked at; they cannot have been given the file either. Takes some µs per process.

    Raises: HypervisorError `guest_unresponsive`: one cannot be looked at just now.
    """
    try:
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        return [pid for pid in pids if pid not in {own, os.getpid()} and _may_write(pid, ram)]
    except OSError as exc:
        text = f"whether another process may write guest RAM cannot be told: {exc.strerror or exc}"
        raise HypervisorError(text, code="guest_unresponsive") from exc


def _may_write(pid: int, ram: RamIdentity) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        return any(mapping.is_writable for mapping in mappings(pid, ram))
    return False


class QemuTracker(KernelTracker):
    """Asks for the pages that QEMU's own threads wrote, device emulation included.

    There is no descriptor of the registration on this side: marks are cleared by taking them, and what stays protected
    when tracking ends costs one fault for each page, once.
    """

    def __init__(self, pid: int, ram: RamIdentity, pages: int) -> None:
        """Raises: OSError: the process is gone; HypervisorError `dirty_tracking`: its RAM is not registered."""
        places = [mapping for mapping in mappings(pid, ram) if mapping.is_writable]
        if len(places) != 1 or places[0].end - places[0].start < pages * PAGE_SIZE:
            raise HypervisorError(f"process {pid} maps guest RAM {len(places)} times", code="dirty_tracking")
        pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        super().__init__(-1, pagemap, places[0].start, pages)
        try:
            kernel.check_tracked(pagemap, self._address, PAGE_SIZE)
        except OSError as exc:
            self.close()
            why = "the tracker library did not register it" if exc.errno == errno.EPERM else str(exc)
            raise HypervisorError(f"guest RAM of process {pid} is not tracked: {why}", code="dirty_tracking") from exc

    def _protect(self, on: bool) -> None:
        if on:
            self._scan()


class NoTracker:
    """Stands where a tracker would: nothing can be asked of it."""

    kind = "none"

    def __init__(self, reason: str) -> None:
        self.reason = reason

    async def start(self) -> None:
        raise HypervisorError(f"no dirty tracking: {self.reason}", code="dirty_tracking")

    async def take(self) -> PageBitmap:
        raise HypervisorError(f"no dirty tracking: {self.reason}", code="dirty_tracking")

    async def stop(self) -> None:
        """There is nothing to stop."""

    def close(self) -> None:
        """There is nothing to let go of."""
