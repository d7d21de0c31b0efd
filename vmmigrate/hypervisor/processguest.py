"""What guests of all adapters have in common on the daemon's side: a process that is watched, mapped RAM, dirty marks.

Foreign errors are mapped here: a guest process that is gone is `guest_lost`, one that talks to another daemon now is
`guest_taken_over`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, TypeVar

import trio

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.base import GuestPlan, GuestProcess, GuestRam
from vmmigrate.hypervisor.dirty import DirtyTracker
from vmmigrate.hypervisor.processes import END_DEADLINE_S, ProcessWatch
from vmmigrate.hypervisor.rammap import MappedRam
from vmmigrate.memory import PageBitmap

T = TypeVar("T")

_DYING_S: Final = 1.0  # how long after a cut connection a process may take to be seen dead


class ProcessGuest(ABC):
    """The part of `base.Guest` that does not depend on how one talks to the guest process.

    Attributes:
        plan: What it was built from.
        process: How it is found again.
        ram: Read-only, or writable while it is under construction.
        tracker: Where dirty marks come from.
    """

    def __init__(self, plan: GuestPlan, process: GuestProcess, watch: ProcessWatch) -> None:
        self.plan = plan
        self.process = process
        self.end_deadline_s = END_DEADLINE_S
        self._watch = watch
        self._put_back: PageBitmap | None = None
        self._mapped: MappedRam | None = None
        self._tracker: DirtyTracker | None = None
        self._tracks = False
        self._gone = False
        self._threads = trio.CapacityLimiter(2)

    def attach_ram(self, ram: MappedRam, tracker: DirtyTracker, *, tracks: bool) -> None:
        """Complete the guest once its process answers. *tracks*: marks may be on already (an adopted guest)."""
        self.ram: GuestRam = ram
        self._mapped = ram
        self.tracker = self._tracker = tracker
        self._tracks = tracks

    # -- dirty pages -----------------------------------------------------------------------------------------------

    @property
    def page_source(self) -> str:
        return "tracker"

    @property
    def stopped_s(self) -> float | None:
        return None

    @property
    def unnamed_pages(self) -> int:
        return 0

    async def first_pages(self) -> PageBitmap:
        return await self.in_thread(self.ram.populated)

    async def more_pages(self) -> PageBitmap | None:
        return None

    async def name_ahead(self) -> None:
        await trio.lowlevel.checkpoint()

    async def fetch(self, pages: PageBitmap) -> None:
        if self.ram.is_copied:
            await self._tracked(partial(self.in_thread, self.ram.fetch, pages.runs()))

    async def start_tracking(self) -> None:
        """Marks start clear, also those put back: what follows is a migration, and it sends all populated pages."""
        self._put_back = None
        await self._tracked(self.tracker.start)
        self.check_alive()
        self._tracks = True

    async def take_dirty(self) -> PageBitmap:
        if not self._tracks:
            raise HypervisorError("dirty tracking is not on", code="not_tracking")
        # To the end, once begun: marks that were cleared and whose answer nobody heard would be lost writes.
        with trio.CancelScope(shield=True):
            taken = await self._tracked(self.tracker.take)
        self.check_alive()
        if self._put_back is not None:
            taken |= self._put_back
            self._put_back = None
        return taken

    async def _tracked(self, call: Callable[[], Awaitable[T]]) -> T:
        """What the tracker says. Raises: HypervisorError: `guest_lost` goes before what the tracker made of it."""
        try:
            return await call()
        except HypervisorError as exc:
            if isinstance(exc.__cause__, ProcessLookupError):
                # The memory of a dying process goes before the process does.
                with trio.move_on_after(_DYING_S):
                    await self._wait_gone()
            self.check_alive()
            raise

    async def mark_dirty(self, pages: PageBitmap) -> None:
        """Put marks back into the next `take_dirty`.

        They are kept in this daemon, not in the kernel, and die with it; `start_tracking` drops them too. Both are
        safe because a migration begins with all populated pages.
        """
        self._put_back = pages.copy() if self._put_back is None else self._put_back | pages

    async def stop_tracking(self) -> None:
        self._tracks = False
        self._put_back = None
        await self._tracked(self.tracker.stop)

    # -- ending ----------------------------------------------------------------------------------------------------

    def release_ram(self) -> GuestRam | None:
        released, self._mapped = self._mapped, None
        return released

    async def destroy(self) -> bool:
        """Kill the process, wait until it is gone, free what belonged to it. Runs to its end even when cancelled."""
        if self._gone:
            return True
        with trio.CancelScope(shield=True):
            self.hang_up()
            self._watch.kill()
            with trio.move_on_after(self.end_deadline_s):
                await self._wait_gone()
            gone_already, self._gone = self._gone, not self._is_alive()
            if self._gone and not gone_already:
                await self.in_thread(self._free, self.release_ram())
        return self._gone

    async def wait_exit(self) -> int:
        await self._wait_gone()
        return self._watch.reap()

    def detach(self) -> None:
        if not self._gone:
            self._gone = True
            self.hang_up()
            self._let_go(self.release_ram())

    def _free(self, ram: GuestRam | None) -> None:
        if not self._watch.is_alive():
            self._watch.reap()
        self._let_go(ram)
        self.remove_files()

    def _let_go(self, ram: GuestRam | None) -> None:
        if self._tracker is not None:
            self._tracker.close()
        if ram is not None:
            ram.close()
        self._watch.close()

    async def _wait_gone(self) -> None:
        if self._watch.fd < 0:
            return
        watched = os.dup(self._watch.fd)  # two tasks may wait, and trio lets only one wait on a descriptor
        try:
            await trio.lowlevel.wait_readable(watched)
        finally:
            trio.lowlevel.notify_closing(watched)
            os.close(watched)

    # -- seams -----------------------------------------------------------------------------------------------------

    async def explain_cut(self, cause: BaseException) -> HypervisorError:
        """What it means that the connection is over: mostly that the process is dead or dying."""
        with trio.move_on_after(_DYING_S):
            await self._wait_gone()
        if not self._is_alive():
            return self._lost()
        why = cause or type(cause).__name__
        text = f"guest {self.plan.instance_id}: the connection is over and the process lives ({why})"
        return HypervisorError(text, code="guest_taken_over")

    def check_alive(self) -> None:
        if not self._is_alive():
            raise self._lost()

    def _is_alive(self) -> bool:
        return self._watch.fd >= 0 and self._watch.is_alive()

    def _lost(self) -> HypervisorError:
        last_words = self.last_words()
        text = f"guest {self.plan.instance_id}: its process {self.process.pid} is gone"
        text += f" ({last_words})" if last_words else ""
        return HypervisorError(text, code="guest_lost", details={"pid": self.process.pid})

    async def in_thread(self, call: Callable[..., T], *args: Any) -> T:
        return await trio.to_thread.run_sync(call, *args, limiter=self._threads)

    @abstractmethod
    def hang_up(self) -> None:
        """Close the connection to the guest process, for good. Idempotent."""

    @abstractmethod
    def remove_files(self) -> None:
        """Remove what the process leaves behind. Blocking."""

    @abstractmethod
    def last_words(self) -> str:
        """The last line that the process said; empty when it said nothing."""
