"""Faults that only a test would cause."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.dirty import DirtyTracker
from vmmigrate.memory import PageBitmap


@contextlib.contextmanager
def out_of_descriptors() -> Iterator[None]:
    """This process can open nothing: every number below its limit is taken. What is open stays so."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open("/dev/null", os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class ForgetfulTracker:
    """A dirty tracker that never reports some pages: give `lambda t: ForgetfulTracker(t, [7])` to the adapter as
    `wrap_tracker`, and whoever migrates that guest must notice."""

    def __init__(self, tracker: DirtyTracker, forgotten_pages: Sequence[int]) -> None:
        self.kind = tracker.kind
        self._tracker = tracker
        self._forgotten_pages = forgotten_pages

    async def start(self) -> None:
        await self._tracker.start()

    async def take(self) -> PageBitmap:
        taken = await self._tracker.take()
        for page in self._forgotten_pages:
            taken.discard(page)
        return taken

    async def stop(self) -> None:
        await self._tracker.stop()

    def close(self) -> None:
        self._tracker.close()


class WatchesItsGuestDie(ForgetfulTracker):
    """A dirty tracker whose guest is killed in the middle of a scan, which fails when there is no memory any more."""

    def __init__(self, tracker: DirtyTracker, pid: Callable[[], int]) -> None:
        super().__init__(tracker, ())
        self._pid = pid

    async def take(self) -> PageBitmap:
        os.kill(self._pid(), signal.SIGKILL)
        try:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        except OSError as exc:
            raise HypervisorError(f"dirty tracking: {exc}", code="dirty_tracking") from exc
