"""The page source *stream*: QEMU's own migration, which runs into a socket of ours, tells what the guest writes.

Any QEMU can do that, also one that was started without our tracker. QEMU *names* pages as it sends them: first all of
RAM, then what was written meanwhile, and so on. Its contents we drop, and read each page from where the guest has it,
after it was named: that is what QEMU sent, or newer, and whatever is written later QEMU will name again.

QEMU is held by not reading: it sends, and looks anew for what was written, only as far as we take in. So who asks for
more pages once the last ones have landed makes QEMU believe in a link as fast as ours is. With a downtime limit of one
millisecond it stops the guest by itself when what is left takes no longer than that; never before, until we say go
(`finish`). A limit of 0 would stop it after the first pass, whatever is left.

`finish` takes in what is left, and makes of small blocks and devices the very stream that QEMU writes when it is to
leave out shared memory (`saving`): whoever loads it cannot tell the two apart.

Until the last word (`saving.LOADED`) everything can be called off: QEMU then lets a guest that it stopped go on. But it
has to be told: while it waits for the word to go on it does not notice that nobody is there any more.

Source: QEMU, migration/migration.c, migration/ram.c (7.2).
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import trio

from vmmigrate.errors import HypervisorError, PayloadError
from vmmigrate.hypervisor.qemu import crafting, saving
from vmmigrate.hypervisor.qemu.qmp import Qmp, text_of
from vmmigrate.hypervisor.qemu.ramevents import Ended, Event, PageRuns, Started, ZeroPages
from vmmigrate.hypervisor.qemu.ramstream import GUEST_RAM, RamStreamParser
from vmmigrate.hypervisor.qemu.saving import Ask, Note
from vmmigrate.hypervisor.qemu.stream import DeviceStream
from vmmigrate.memory import MIB, PAGE_SIZE, PageBitmap

LONGEST_BATCH_PAGES: Final = 64 * MIB // PAGE_SIZE
SHORTEST_BATCH_PAGES: Final = MIB // PAGE_SIZE
_PART: Final = 4  # of what is left is named at once: little is under way when QEMU stops the guest
_AT_ONCE_BYTES: Final = MIB
_DRY_S: Final = 0.002  # nothing comes for so long: QEMU is busy, or waits for us
_READ_S: Final = 0.5
_WORD_BYTES: Final = 8  # before each page
_ACCEPT_S: Final = 5.0
_STRICT_MS: Final = 1
_SEES_ALL_WRITES: Final = (9, 0, 0)
_WORD_OF_BITMAP_BYTES: Final = 64 * PAGE_SIZE
_WHENEVER_MS: Final = 2_000_000  # the most that QEMU takes


class PageStream:
    """Implements `dirty.DirtyTracker`, and names pages bit by bit.

    Attributes:
        stopped_s: `time.monotonic` of when QEMU stopped the guest; None while it did not.
        unnamed: How many pages QEMU still had to name when it was last asked.
    """

    kind = "stream"

    def __init__(self, ask: Ask, qmp: Qmp, path: Path, pages: int, stands: Callable[[], Awaitable[bool]]) -> None:
        """*path*: of the socket. *stands*: whether the guest has not run since QEMU saved it, and would refuse to save
        it again; nothing writes to its memory then."""
        self.stopped_s: float | None = None
        self.unnamed = 0
        self._ask, self._qmp, self._path = ask, qmp, path
        self._stands = stands
        self._pages = pages
        self._marks = np.zeros(pages, dtype=np.bool_)
        self._held = np.zeros(pages, dtype=np.bool_)  # named with contents, ever: zeros are news for these alone
        self._sock: socket.socket | None = None
        self._is_begun = False  # QEMU's next migration may be one that names RAM, or already is
        self._parser = RamStreamParser()
        self._started: Started | None = None
        self._ended: Ended | None = None
        self._syncs = self._syncs_before = 0
        self._is_ready_to_switch = False
        self._events_before = 0
        self._limiter = trio.CapacityLimiter(1)

    @property
    def is_naming(self) -> bool:
        """QEMU's migration is under way, as far as this daemon knows."""
        return self._sock is not None

    # -- as a tracker ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Let QEMU begin. Nothing is named yet.

        Raises: HypervisorError `dirty_tracking`, or what QEMU says: it is as if it had not begun.
        """
        await self.stop()
        if await self._stands():
            return
        for flags in (self._marks, self._held):
            flags[:] = False
        self.stopped_s, self._is_ready_to_switch = None, False
        self._parser, self._started, self._ended = RamStreamParser(), None, None
        self._syncs_before = 1
        self._is_begun = True
        try:
            await saving.choose(self._ask, names_ram=True)
            await self._ask("migrate-set-parameters", downtime_limit=_STRICT_MS)
            self._events_before = self._qmp.events_seen
            self._sock = await self._connect()
            await self._look()
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.stop()
            raise

    async def take(self) -> PageBitmap:
        """What was named and not given to anybody."""
        return self._take_marks()

    async def stop(self) -> None:
        """Call QEMU's migration off, if there is one. A guest that QEMU stopped goes on."""
        if not self._is_begun:
            return
        try:
            await saving.call_off(self._ask, was_running=False)
        finally:
            self._hang_up()
        await self._choose_saving()

    async def _choose_saving(self) -> None:
        """A `saving.save` would wait for ever if QEMU still paused before it switches over."""
        await saving.choose(self._ask, names_ram=False)
        self._is_begun = False

    def close(self) -> None:
        """QEMU finds nobody at the other end, and a guest that still runs goes on. One that QEMU has stopped stays so,
        until a daemon comes and calls it off (`saving.settle`): QEMU waits for a word, and looks at no connection."""
        self._hang_up()

    # -- naming ----------------------------------------------------------------------------------------------------

    async def more(self) -> PageBitmap | None:
        """The next pages of this pass; None: it is over, or QEMU has stopped the guest. Never so many that all that is
        left would be among them. After None it is the next pass that more is named of. What was named when QEMU stopped
        the guest is left for `take`: to land it first would only make the pause longer.

        Raises: HypervisorError `dirty_tracking`: QEMU gave up.
        """
        while not (self._marks.any() and not self._is_ready_to_switch):
            if self._syncs > self._syncs_before or self._is_ready_to_switch:
                self._syncs_before = self._syncs
                return None
            await self.ahead()
        return self._take_marks()

    async def ahead(self) -> None:
        """Have what `more` gives next be named, if it has not been; for while what it gave last is under way.

        Raises: HypervisorError: as `more`.
        """
        if self._marks.any() or self._is_ready_to_switch:
            return
        batch = min(max(self.unnamed // _PART, SHORTEST_BATCH_PAGES), LONGEST_BATCH_PAGES)
        await self._in_thread(self._read, batch)
        await self._look()

    async def finish(self, note: Note) -> None:
        """Let QEMU stop the guest, and take in all that is left: pages become marks, the rest goes to *note*, as in
        `saving.save`. Afterwards the run state is `postmigrate`. The caller sets the deadline, and shields.

        Raises: HypervisorError `pause_failed`, or what *note* raises: all is as if it had been called off.
        """
        assert self._sock is not None
        try:
            if not self._is_ready_to_switch:
                await self._ask("migrate-set-parameters", downtime_limit=_WHENEVER_MS)
            while not self._is_ready_to_switch:
                await self._in_thread(self._read, LONGEST_BATCH_PAGES)
                await self._look()
            seen = self._qmp.events_seen
            await note(await self._take_the_rest())
            self._sock.send(saving.LOADED)
            await saving.expect_end(self._ask, self._qmp, seen)
            await saving.wait_run_state(self._ask, "postmigrate")
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.stop()
            raise
        self._hang_up()
        await self._choose_saving()

    async def _take_the_rest(self) -> DeviceStream:
        """Let QEMU, which has stopped the guest, go on to the end of its stream."""
        try:
            async with trio.open_nursery() as nursery:
                # QEMU may answer only when all was taken in.
                nursery.start_soon(partial(self._ask, "migrate-continue", state="pre-switchover"))
                while self._ended is None:
                    await self._in_thread(self._read, LONGEST_BATCH_PAGES)
        except BaseExceptionGroup as group:
            raise _first(group) from None
        assert self._started is not None
        return crafting.crafted(self._started, self._ended, shared=dict.fromkeys(GUEST_RAM, 0))

    # -- QEMU ------------------------------------------------------------------------------------------------------

    async def _connect(self) -> socket.socket:
        try:
            accepted = await self._called_back()
        except (OSError, trio.TooSlowError) as exc:
            why = str(exc) or f"it has not connected within {_ACCEPT_S:g} s"
            raise HypervisorError(f"QEMU does not begin to name pages: {why}", code="dirty_tracking") from exc
        # Blocking, and read in a thread.
        sock = socket.socket(fileno=accepted.detach())
        sock.settimeout(_DRY_S)
        return sock

    async def _called_back(self) -> trio.socket.SocketType:
        """Let QEMU migrate to us. Raises: OSError; TooSlowError: it does not come."""
        with contextlib.closing(trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as listener:
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()  # of the last time; microseconds
            await listener.bind(str(self._path))
            listener.listen(1)
            await self._ask("migrate", uri=f"unix:{self._path}")
            with trio.fail_after(_ACCEPT_S):
                accepted, _ = await listener.accept()
        return accepted

    async def _look(self) -> None:
        """Ask QEMU how far it is."""
        told = await self._ask("query-migrate")
        status = text_of(told, "status")
        if status in {"failed", "cancelled", "cancelling"}:
            why = told.get("error-desc", f"its migration is {status}")
            raise HypervisorError(f"QEMU does not name pages any more: {why}", code="dirty_tracking")
        ram = told.get("ram")
        if isinstance(ram, Mapping):
            self._syncs = _number(ram, "dirty-sync-count")
            self.unnamed = _number(ram, "remaining") // PAGE_SIZE
        self._is_ready_to_switch = status == "pre-switchover"
        if self._is_ready_to_switch and self.stopped_s is None:
            self.stopped_s = self._when_stopped()

    def _when_stopped(self) -> float:
        stops = self._qmp.events("STOP", self._events_before)
        # A guest that was paused before does not stop again.
        return time.monotonic() - max(time.time() - stops[-1].at_s, 0.0) if stops else time.monotonic()

    # -- in a thread -----------------------------------------------------------------------------------------------

    def _read(self, most: int) -> None:
        """Take in what comes until about *most* pages were named, or nothing comes for a moment. Blocking, and nobody
        can give it up: so it also ends when ever more comes, and names nothing.
        """
        named = seen = taken = 0
        most_bytes, until_s = 2 * most * (PAGE_SIZE + _WORD_BYTES), time.monotonic() + _READ_S
        while named < most and seen < most * _PART and self._ended is None:
            received = self._receive()
            taken += received
            if not received:
                return
            while (event := self._parser.next_event()) is not None:
                pages, with_contents = self._take_in(event)
                named, seen = named + with_contents, seen + pages
            if taken >= most_bytes or time.monotonic() >= until_s:
                return

    def _receive(self) -> int:
        """Fill the parser's buffer with what is there, up to a MiB. Blocking for `_DRY_S` at most."""
        assert self._sock is not None
        room = self._parser.buffer()[:_AT_ONCE_BYTES]
        size = 0
        with contextlib.suppress(TimeoutError, BlockingIOError):
            while size < len(room):
                got = self._sock.recv_into(room[size:], 0, 0 if not size else socket.MSG_DONTWAIT)
                if not got:
                    raise HypervisorError("QEMU has broken its migration off", code="dirty_tracking")
                size += got
        self._parser.received(size)
        return size

    def _take_in(self, event: Event) -> tuple[int, int]:
        """Mark what an event names; how many pages that is, and how many with contents."""
        if isinstance(event, PageRuns):
            self._marks[event.numbers] = True
            self._held[event.numbers] = True
            return len(event.numbers), len(event.numbers)
        if isinstance(event, ZeroPages):
            # What was never anything else is zeros at the destination, too.
            self._marks[event.numbers] |= self._held[event.numbers]
            return len(event.numbers), 0
        if isinstance(event, Started):
            self._started = event
        elif isinstance(event, Ended):
            self._ended = event
        return 0, 0

    # -- seams -----------------------------------------------------------------------------------------------------

    def _take_marks(self) -> PageBitmap:
        taken = PageBitmap.from_flags(self._marks)
        self._marks[:] = False
        return taken

    def _hang_up(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    async def _in_thread(self, call: Callable[[int], None], argument: int) -> None:
        try:
            await trio.to_thread.run_sync(call, argument, limiter=self._limiter)
        except PayloadError as exc:
            raise HypervisorError(exc.text, code="dirty_tracking") from exc
        except OSError as exc:
            raise HypervisorError(f"QEMU has broken its migration off: {exc}", code="dirty_tracking") from exc


def loses_writes(version: str, ram_bytes: int) -> str:
    """Why a QEMU of that *version* (7.2.22) that interprets its guest (TCG) must not be asked; empty when it may be.
    Nothing but the version tells: there is no command, property or capability that came with the repair.

    Source: QEMU, include/exec/ram_addr.h, cpu_physical_memory_sync_dirty_bitmap: where RAM is whole words of its bitmap
    it takes a shorter way, which before 9.0 lets virtual processors go on writing unseen.
    """
    if tuple(map(int, version.split("."))) >= _SEES_ALL_WRITES or ram_bytes % _WORD_OF_BITMAP_BYTES:
        return ""
    return (
        f"QEMU {version} interprets it (TCG) and has no tracker: before QEMU 9.0 such a guest loses"
        f" writes when its RAM is a multiple of {_WORD_OF_BITMAP_BYTES >> 10} KiB, as {ram_bytes} bytes are; allowed is"
        " another size, another QEMU, KVM, or trust_tcg_stream = true in the host's [qemu]"
    )


def _number(told: Mapping[str, Any], field: str) -> int:
    value = told.get(field)
    if type(value) is not int or value < 0:
        raise HypervisorError(f"QEMU answered without {field}", code="qemu_protocol")
    return value


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
