"""Which pages a guest wrote: kernel tracking where the kernel has it, otherwise the guest's own bookkeeping.

**Kernel.** The guest process registers its RAM with a userfaultfd in asynchronous write-protect mode and hands the
daemon that descriptor and its own `/proc/self/pagemap`. The daemon protects all of RAM once (`start`) and then asks
PAGEMAP_SCAN, which reports the pages written since and protects them again in the same step. The guest takes no part:
a first write to a protected page costs it about 1 µs in the kernel and no message. Both descriptors work on the guest's
address space whoever calls them, so that a restarted daemon that adopts the guest finds the marks as they are.

Only writes through the guest's own mapping leave marks. Writes through the daemon's mapping, populating and hole
punching do not, which is why the daemon of a source maps RAM read-only.

**Software.** The guest process notes its own writes and hands the bitmap over. It can do so because it interprets its
programs; a guest on real CPUs could not.

Both forget nothing by themselves, but *taking* clears: marks that were taken and not delivered must be put back
(`mark_dirty`). Those put back live in this daemon; a restarted daemon does not know them. That is safe because a
migration always begins with sending every populated page.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import numpy as np
import trio

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor import kernel
from vmmigrate.memory import PAGE_SIZE, PageBitmap

Request = Callable[..., Awaitable[Any]]


class DirtyTracker(Protocol):
    """Where marks come from."""

    kind: str

    async def start(self) -> None:
        """Clear all marks; from now on every write of the guest leaves one."""

    async def take(self) -> PageBitmap:
        """The marks set since the last call, cleared in the same step."""

    async def stop(self) -> None: ...

    def close(self) -> None:
        """Let go of descriptors; what the guest keeps of tracking stays as it is. Idempotent."""


class KernelTracker:
    """Tracks by userfaultfd and PAGEMAP_SCAN; owns both descriptors until `close`."""

    kind = "kernel"

    def __init__(self, uffd: int, pagemap: int, address: int, pages: int) -> None:
        self._uffd, self._pagemap = uffd, pagemap
        self._address, self._pages = address, pages
        self._limiter = trio.CapacityLimiter(1)  # one scan of a guest at a time, whatever else uses threads

    async def start(self) -> None:
        await self._in_thread(self._protect, True)

    async def take(self) -> PageBitmap:
        taken: PageBitmap = await self._in_thread(self._scan)
        return taken

    async def stop(self) -> None:
        await self._in_thread(self._protect, False)

    def forget(self, first_page: int, pages: int) -> None:
        """Clear marks behind everybody's back: a fault to inject, never part of a migration."""
        kernel.write_protect(self._uffd, self._address + first_page * PAGE_SIZE, pages * PAGE_SIZE, on=True)

    def close(self) -> None:
        for fd in (self._uffd, self._pagemap):
            if fd >= 0:
                os.close(fd)
        self._uffd = self._pagemap = -1

    def _protect(self, on: bool) -> None:
        kernel.write_protect(self._uffd, self._address, self._pages * PAGE_SIZE, on=on)

    def _scan(self) -> PageBitmap:
        runs = kernel.take_written(self._pagemap, self._address, self._pages * PAGE_SIZE)
        return PageBitmap.from_runs(self._pages, runs)

    async def _in_thread(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            # Not abandoned on cancel: a scan that nobody waits for would swallow marks.
            return await trio.to_thread.run_sync(call, *args, limiter=self._limiter)
        except OSError as exc:
            raise HypervisorError(f"dirty tracking: {exc}", code="dirty_tracking") from exc


class SoftwareTracker:
    """Asks the guest process for the writes that it noted."""

    kind = "software"

    def __init__(self, request: Request, pages: int) -> None:
        self._request, self._pages = request, pages

    async def start(self) -> None:
        await self._request("track_start")

    async def take(self) -> PageBitmap:
        return PageBitmap.from_bytes(self._pages, (await self._request("track_take"))["bits"])

    async def stop(self) -> None:
        await self._request("track_stop")

    def close(self) -> None:
        """There is nothing to let go of."""


def probe_kernel_tracking() -> str:
    """Try kernel tracking for real on a few pages of this process; empty when it works, else the reason why not."""
    pages = 8
    try:
        memory = os.memfd_create("vmmigrate-probe", os.MFD_CLOEXEC)
        try:
            os.ftruncate(memory, pages * PAGE_SIZE)
            return _probe(mmap.mmap(memory, pages * PAGE_SIZE), pages)
        finally:
            os.close(memory)
    except OSError as exc:
        return str(exc.strerror or exc)


def _probe(mapping: mmap.mmap, pages: int) -> str:
    words = np.frombuffer(mapping, dtype=np.uint64).reshape(pages, -1)
    address, size_bytes = words.ctypes.data, pages * PAGE_SIZE
    words[1, 0] = 1
    uffd = kernel.open_write_tracker(address, size_bytes)
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        kernel.write_protect(uffd, address, size_bytes, on=True)
        clean = kernel.take_written(pagemap, address, size_bytes)
        words[1, 0] = 2  # populated before
        words[5, 0] = 2  # never touched before
        written = kernel.take_written(pagemap, address, size_bytes)
        again = kernel.take_written(pagemap, address, size_bytes)
    finally:
        os.close(pagemap)
        os.close(uffd)
    if len(clean) or len(again) or written.tolist() != [[1, 1], [5, 1]]:
        return "a write to a probe page was not reported exactly once"
    return ""
