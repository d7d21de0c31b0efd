"""Two guests' RAM in memory files, and bulk streams between them: real sockets over loopback, real threads."""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import trio

from vmmigrate.memory import PAGE_SIZE, PageBitmap, RamLayout, Region
from vmmigrate.net.door import SEALED
from vmmigrate.net.links import ReceiveLink, SendLink, TlsLink
from vmmigrate.net.receiving import BulkDestination
from vmmigrate.net.sealed import OpeningLink, PartKeys, SealingLink
from vmmigrate.net.secrets import SessionContext, SessionSecrets
from vmmigrate.net.sending import BulkSource, RoundSent
from vmmigrate.net.threads import open_group
from vmmigrate.net.tls import TlsContext, connect_blocking, wrap_blocking_server
from vmmigrate.ram.digest import PageHash
from vmmigrate.ram.encoding import RAW, ZERO
from vmmigrate.ram.worth import Worth

WAIT_S = 5
WORDS = PAGE_SIZE // 8
PAGE_HASH = PageHash(b"a secret of one migration")
CONTEXT = SessionContext(1, "3dd63c0a-1599-48bd-a84f-2e419b205049", "an instance", "source", "destination", 1)

Pages = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Contexts:
    source: TlsContext
    destination: TlsContext
    transport: str = SEALED


class Ram:
    """Guest RAM as an adapter maps it: a memory file of which untouched pages are holes."""

    def __init__(self, layout: RamLayout) -> None:
        self.layout = layout
        self._fd = os.memfd_create("ram")
        os.ftruncate(self._fd, layout.size_bytes)
        self.pages = self._map(mmap.PROT_READ | mmap.PROT_WRITE)

    def read_only(self) -> Pages:
        """Another mapping of the same memory, as a source daemon has it."""
        return self._map(mmap.PROT_READ)

    def fill(self, first: int, contents: Pages) -> int:
        """As an adapter fills holes: up to the first page that is there."""
        done = 0
        while done < len(contents) and first + done not in self.populated():
            os.pwrite(self._fd, contents[done].tobytes(), (first + done) * PAGE_SIZE)
            done += 1
        return done

    def _map(self, protection: int) -> Pages:
        mapping = mmap.mmap(self._fd, self.layout.size_bytes, mmap.MAP_SHARED, protection)
        return np.frombuffer(mapping, dtype=np.uint64).reshape(-1, WORDS)

    def populated(self) -> set[int]:
        """The pages that are no holes, by SEEK_DATA."""
        found: set[int] = set()
        offset = 0
        while True:
            try:
                begin = os.lseek(self._fd, offset, os.SEEK_DATA)
            except OSError:
                return found
            offset = os.lseek(self._fd, begin, os.SEEK_HOLE)
            found.update(range(begin // PAGE_SIZE, offset // PAGE_SIZE))

    def close(self) -> None:
        os.close(self._fd)


def layout_of(*region_pages: int) -> RamLayout:
    """Regions of so many pages, with a hole of 16 MiB after each."""
    regions, gpa = [], 0
    for pages in region_pages:
        regions.append(Region(gpa, pages * PAGE_SIZE))
        gpa += pages * PAGE_SIZE + (16 << 20)
    return RamLayout(regions)


def content(pages: int, seed: int) -> Pages:
    """Pages of which no two are alike and none is zero."""
    words = np.empty((pages, WORDS), dtype=np.uint64)
    words[:] = np.arange(1, WORDS + 1, dtype=np.uint64)
    words[:, :4] = np.random.default_rng(seed).integers(1, 1 << 63, (pages, 4), dtype=np.uint64)
    return words


def socket_pair(contexts: Contexts) -> tuple[socket.socket, socket.socket]:
    """TLS sockets (source, destination) over loopback, hands shaken."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener, ThreadPoolExecutor(1) as pool:
        listener.settimeout(WAIT_S)
        port = listener.getsockname()[1]
        connecting = pool.submit(connect_blocking, "127.0.0.1", port, contexts.destination, None, WAIT_S)
        accepted, _ = listener.accept()
        source, _ = wrap_blocking_server(accepted, contexts.source, WAIT_S)
        destination, _ = connecting.result()
    return source, destination


def link_pair(contexts: Contexts, stall_limit_s: float = WAIT_S) -> tuple[SendLink, ReceiveLink]:
    """The two ends of a stream of a session of its own."""
    source, destination = socket_pair(contexts)
    if contexts.transport != SEALED:
        return TlsLink(source, "destination", stall_limit_s), TlsLink(destination, "source", stall_limit_s)
    ours, theirs = session_pair()
    return (
        SealingLink(source, PartKeys(ours, 0), "destination", stall_limit_s),
        OpeningLink(destination, PartKeys(theirs, 0), "source", stall_limit_s),
    )


def session_pair(context: SessionContext = CONTEXT) -> tuple[SessionSecrets, SessionSecrets]:
    """What both ends of a new session hold."""
    randoms = secrets.token_bytes(32), secrets.token_bytes(32)
    return SessionSecrets(context, *randoms), SessionSecrets(context, *randoms)


@dataclass
class Pair:
    """Both ends of the bulk streams of one migration."""

    source: BulkSource
    destination: BulkDestination
    source_ram: Ram
    destination_ram: Ram

    async def run_round(self, pages: PageBitmap, number: int, *, last: bool = False) -> RoundSent:
        """Send *pages* and wait until they have landed."""
        sent = await self.source.send_round(pages, number, last=last)
        await self.destination.wait_round(number, sent.records)
        return sent

    def is_equal(self) -> bool:
        return bool(
            np.array_equal(self.source_ram.pages, self.destination_ram.pages)
            and np.array_equal(self.source.table, self.destination.table)
        )


class Eager(Worth):
    """A judge to whom everything pays: every way to send a page is then taken."""

    is_dear = True

    def pays(self, way: str) -> bool:
        return True


@asynccontextmanager
async def open_pair(
    contexts: Contexts,
    layout: RamLayout,
    streams: int,
    *,
    encodings: Sequence[str] = (RAW, ZERO),
    delta_cache_bytes: int = 0,
    judge: Callable[[], Worth] = Eager,
    fills: bool = False,
) -> AsyncIterator[Pair]:
    """A pair whose destination receives; on leaving everything is ended. What may be compressed, is.

    *fills*: pages that are not there are filled.
    """
    links = [link_pair(contexts) for _ in range(streams)]
    with closing(Ram(layout)) as source_ram, closing(Ram(layout)) as destination_ram:
        source = BulkSource(
            [link for link, _ in links],
            layout,
            source_ram.read_only(),
            PAGE_HASH,
            encodings=encodings,
            delta_cache_bytes=delta_cache_bytes,
            judge=judge,
        )
        destination = BulkDestination(
            [link for _, link in links],
            layout,
            destination_ram.pages,
            PAGE_HASH,
            encodings=encodings,
            fill=destination_ram.fill if fills else None,
        )
        try:
            with trio.fail_after(WAIT_S):
                async with open_group() as nursery:
                    nursery.start_soon(destination.receive_forever)
                    yield Pair(source, destination, source_ram, destination_ram)
                    nursery.cancel_scope.cancel()
        finally:
            source.close()
            destination.close()


def bitmap_of(layout: RamLayout, pages: Sequence[int] | range) -> PageBitmap:
    flags = np.zeros(layout.pages, dtype=np.bool_)
    flags[list(pages)] = True
    return PageBitmap.from_flags(flags)


def threads_in(*modules: str) -> list[str]:
    """Threads that are executing something of *modules* right now."""
    frames = sys._current_frames()
    return [thread.name for thread in threading.enumerate() if _runs_in(frames.get(thread.ident or 0), modules)]


def _runs_in(frame: object, modules: tuple[str, ...]) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__") in modules:  # type: ignore[attr-defined]
            return True
        frame = frame.f_back  # type: ignore[attr-defined]
    return False
