"""Two processes that copy memory to each other, for benchmarks: what is copied, how a migration does it, who measures.

A benchmark hands `TwoProcesses` what each side does for one copy. Both have a memory file each, and a line to each
other beside what is measured; after each copy the memory of both is compared, and when it differs that is the end.
"""

from __future__ import annotations

import contextlib
import copy
import math
import mmap
import multiprocessing
import os
import socket
import statistics
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final

import numpy as np
import trio

from vmmigrate.engine.populating import Populating
from vmmigrate.hypervisor.rammap import MappedRam
from vmmigrate.memory import PAGE_SIZE, PageBitmap, RamLayout, Region
from vmmigrate.net import pki
from vmmigrate.net.door import BulkDoor, open_streams
from vmmigrate.net.identity import Identity, Role
from vmmigrate.net.receiving import BulkDestination, Landing
from vmmigrate.net.secrets import SessionContext, SessionSecrets
from vmmigrate.net.sending import BulkSource
from vmmigrate.net.threads import open_group
from vmmigrate.net.tls import ServerCredentials, TlsFiles, bound_port, client_context, open_listeners
from vmmigrate.ram.digest import PageHash
from vmmigrate.ram.encoding import RAW, ZERO
from vmmigrate.ram.worth import Worth

HOST: Final = "127.0.0.1"
DOMAIN: Final = "bench.example"
HASH: Final = PageHash(b"bench")
GIB: Final = 1 << 30
MIB: Final = 1 << 20

_SO_MAX_PACING_RATE: Final = 47  # linux/socket.h; Python has no name for it
_SPACES: Final = 0x2020202020202020
_CHANGED_WORDS: Final = 8  # of a page, as the embedded guest's pattern `sparse`
_TEXT_WORDS: Final = 4200  # with so many, text compresses about 3 to 1
_TEXT_BYTES: Final = 8 * MIB


# --------------------------------------------------------------------------- memory


class Memory:
    """A guest's RAM as both sides map it."""

    def __init__(self, mib: int) -> None:
        size = mib * MIB
        self._fd = os.memfd_create("ram")
        os.ftruncate(self._fd, size)
        self.mapping = mmap.mmap(self._fd, size)
        self.pages = np.frombuffer(self.mapping, dtype=np.uint64).reshape(-1, PAGE_SIZE // 8)
        self.layout = RamLayout([Region(0, size)])
        self._content = ""

    def first(self, mib: int) -> Memory:
        """The beginning of it, as a guest with that much RAM."""
        part = copy.copy(self)
        part.layout = RamLayout([Region(0, mib * MIB)])
        part.pages = self.pages[: part.layout.pages]
        return part

    def mapped_anew(self) -> MappedRam:
        """As a daemon maps it; to be closed."""
        return MappedRam(os.dup(self._fd), self.layout, writable=True)

    def fill(self, content: str) -> None:
        """Pages of which none is zero by chance, and no two are alike but for the zero ones.

        incompressible: random words. half-zero: the same, but 64 KiB of zeros before each 64 KiB. compressible: of each
        64 bytes 24 random. structs: of each 64 bytes 20 random. text: words of a language, by Zipf's law.
        """
        if content == self._content:
            return
        random = np.random.default_rng(7)
        text = _text(random) if content == "text" else None
        for first in range(0, len(self.pages), 256):
            step = self.pages[first : first + 256]
            if text is not None:
                step[:] = text[first % len(text) : first % len(text) + len(step)]
                step[:, 0] = np.arange(first + 1, first + 1 + len(step))
                continue
            step[:] = random.integers(1, 1 << 63, step.shape, dtype=np.uint64)
            if content == "half-zero":
                step.reshape(-1, 16, step.shape[1])[::2] = 0
            if content in ("compressible", "structs"):
                step.reshape(len(step), -1, 8)[:, :, 3:] = _SPACES
            if content == "structs":
                step.reshape(len(step), -1, 8)[:, :, 2] &= np.uint64(0xFFFFFFFF)
        self._content = content

    def change_a_little(self, seed: int) -> None:
        """A part of each page is written anew."""
        shape = (len(self.pages), _CHANGED_WORDS)
        self.pages[:, :_CHANGED_WORDS] = np.random.default_rng(seed).integers(1, 1 << 63, shape, dtype=np.uint64)

    def prepare(self, cold: bool) -> None:
        """As a destination finds it: nothing there; or all of it populated, with zeros."""
        self.mapping.madvise(mmap.MADV_REMOVE)
        if not cold:
            self.pages[:] = 0

    def checksum(self) -> int:
        """Of all pages and their places."""
        digests = HASH.of(self.pages)
        return int((digests * np.arange(1, 1 + len(digests), dtype=np.uint64)).sum())


def _text(random: np.random.Generator) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Pages of made-up words; as many as a compressor never looks back over."""
    lengths = random.integers(2, 10, _TEXT_WORDS)
    words = [random.integers(97, 123, length, dtype=np.uint8).tobytes() + b" " for length in lengths]
    frequency = 1 / np.arange(1, 1 + _TEXT_WORDS)
    chosen = random.choice(_TEXT_WORDS, _TEXT_BYTES // 4, p=frequency / frequency.sum())
    text = b"".join(words[number] for number in chosen.tolist())[:_TEXT_BYTES]
    return np.frombuffer(text, dtype=np.uint64).reshape(-1, PAGE_SIZE // 8)


# --------------------------------------------------------------------------- what one side says


@dataclass(frozen=True)
class Share:
    """What one side says about a copy: when it began and ended (one clock for both), what it cost, what it holds.

    Attributes:
        sent_bytes: Of bulk streams, records whole.
        pages: How many travelled in each encoding.
    """

    begun: float
    ended: float
    cpu_s: float
    checksum: int
    sent_bytes: int = 0
    pages: dict[str, int] = field(default_factory=dict)


class Stopwatch:
    """Time and processor time from now on."""

    def __init__(self) -> None:
        self._cpu, self._begun = time.process_time(), time.monotonic()

    def stop(self, memory: Memory, sent_bytes: int = 0, pages: dict[str, int] | None = None) -> Share:
        ended, spent = time.monotonic(), time.process_time() - self._cpu
        return Share(self._begun, ended, spent, memory.checksum(), sent_bytes, pages or {})


# --------------------------------------------------------------------------- what a migration does


@dataclass(frozen=True)
class Streams:
    """How a migration copies.

    Attributes:
        link_bytes_per_s: What the kernel lets all streams send together; 0: as fast as they can.
        populates: The destination's memory is populated beside.
        changes: So often all pages change a little after a first round, and are sent again; then only that is measured.
    """

    transport: str
    count: int
    encodings: tuple[str, ...] = (RAW, ZERO)
    delta_cache_bytes: int = 0
    judge: Callable[[], Worth] = Worth
    link_bytes_per_s: int = 0
    changes: int = 0
    populates: bool = False


@dataclass(frozen=True)
class Seat:
    """Where one side sits: its memory, its certificate, its line to the other side."""

    memory: Memory
    files: TlsFiles
    line: Connection

    async def hear(self) -> Any:
        return await trio.to_thread.run_sync(self.line.recv, abandon_on_cancel=True)


def session_of() -> SessionSecrets:
    context = SessionContext(1, "3dd63c0a-1599-48bd-a84f-2e419b205049", "bench", "source", "destination", 1)
    return SessionSecrets(context, bytes(32), bytes(range(32)))


def party(name: str) -> Identity:
    return Identity(DOMAIN, Role.HOST, name)


def pace_accepted(listeners: Sequence[trio.SocketListener], bytes_per_s: int) -> None:
    """Let the kernel send no faster than this on each connection that is accepted: they inherit it from the listener.

    TCP keeps to it by itself, over loopback, too; what is not sent waits in the socket's queue, as for a slow link.
    """
    for listener in listeners:
        listener.socket.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, struct.pack("Q", bytes_per_s))


async def send_out(streams: Streams, memory: Memory, seat: Seat) -> Share:
    """The source's side of a copy as a migration does it; *memory* is that of the seat, or a part of it."""
    door = BulkDoor(ServerCredentials(seat.files).current)
    listeners = await open_listeners(HOST, 0)
    if streams.link_bytes_per_s:
        pace_accepted(listeners, streams.link_bytes_per_s // streams.count)
    async with open_group() as nursery:
        nursery.start_soon(door.serve, listeners)
        with door.expect(session_of(), party("destination"), streams.count, streams.transport) as appointment:
            seat.line.send(bound_port(listeners))
            links = await door.collect(appointment)
        bulk = BulkSource(
            links,
            memory.layout,
            memory.pages,
            HASH,
            encodings=streams.encodings,
            delta_cache_bytes=streams.delta_cache_bytes,
            judge=streams.judge,
        )
        try:
            share = await _send_rounds(streams, bulk, memory, seat)
        finally:
            bulk.close()
        nursery.cancel_scope.cancel()
    return share


async def _send_rounds(streams: Streams, bulk: BulkSource, memory: Memory, seat: Seat) -> Share:
    """As the engine does it: the next round begins when the last one has landed."""
    watch, everything = Stopwatch(), PageBitmap.full(memory.layout.pages)
    sent_before, pages_before = 0, bulk.tally.pages
    for number in range(1, streams.changes + 1):
        sent = await bulk.send_round(everything, number)
        seat.line.send(sent.records)
        await seat.hear()
        if number == 1:
            watch, sent_before, pages_before = Stopwatch(), bulk.bytes_sent, bulk.tally.pages
        memory.change_a_little(number)
    await bulk.send_round(everything, streams.changes + 1, last=True)
    pages = {word: count - pages_before[word] for word, count in bulk.tally.pages.items()}
    assert sum(pages.values()) == memory.layout.pages * max(streams.changes, 1)
    return watch.stop(memory, bulk.bytes_sent - sent_before, pages)


async def take_in(streams: Streams, memory: Memory, seat: Seat) -> Share:
    """The destination's side."""
    context, port = client_context(seat.files), await seat.hear()
    links = await open_streams(HOST, port, context, party("source"), session_of(), streams.count, streams.transport)
    landing = Landing(memory.layout.pages)
    with contextlib.ExitStack() as stack:
        pages = memory.pages
        populating: Populating | None = None
        if streams.populates:
            ram = stack.enter_context(contextlib.closing(memory.mapped_anew()))
            pages, populating = ram.pages, Populating(ram, PageBitmap.full(memory.layout.pages), landing.written)
        bulk = BulkDestination(links, memory.layout, pages, HASH, landing, encodings=streams.encodings)
        stack.callback(bulk.close)
        watch = Stopwatch()
        async with open_group() as nursery:
            nursery.start_soon(bulk.receive_forever)
            if populating is not None:
                nursery.start_soon(populating.run)
            for number in range(1, streams.changes + 1):
                await bulk.wait_round(number, await seat.hear())
                if number == 1:
                    watch = Stopwatch()
                seat.line.send(number)
        if populating is not None:
            await populating.settle()
        return watch.stop(memory)


# --------------------------------------------------------------------------- two processes

Side = Callable[[Any, Seat], Share]


@dataclass(frozen=True)
class _Failed:
    text: str


def _serve(orders: Connection, line: Connection, mib: int, files: TlsFiles, side: Side) -> None:
    """The main function of both processes: a copy for each order."""
    seat = Seat(Memory(mib), files, line)
    while (order := orders.recv()) is not None:
        try:
            orders.send(side(order, seat))
        except Exception as failure:
            orders.send(_Failed(f"{type(failure).__name__}: {failure}"))


class TwoProcesses:
    """A source and a destination, each of which does its part of every copy."""

    def __init__(self, mib: int, directory: Path, source: Side, destination: Side) -> None:
        """*directory* will hold certificates. Sides are functions of a module: they are found by name."""
        pki.init_authority(directory, DOMAIN)
        spawn = multiprocessing.get_context("spawn")
        self._orders: list[Connection] = []
        self._processes = []
        for name, side, line in zip(("source", "destination"), (source, destination), spawn.Pipe(), strict=True):
            issued = pki.issue(directory, party(name), ip_addresses=[HOST])
            ours, theirs = spawn.Pipe()
            files = TlsFiles(issued.ca, issued.certificate, issued.key)
            process = spawn.Process(target=_serve, args=(theirs, line, mib, files, side))
            process.start()
            theirs.close()
            line.close()
            self._orders.append(ours)
            self._processes.append(process)

    def run(self, order: Any) -> tuple[Share, Share]:
        """Copy once; what the source says, and the destination. Raises: SystemExit: it went wrong."""
        for orders in self._orders:
            orders.send(order)
        answers: dict[Connection, Share] = {}
        while len(answers) < len(self._orders):
            for ready in wait([orders for orders in self._orders if orders not in answers]):
                assert isinstance(ready, Connection)
                answers[ready] = _share_from(ready, order)
        source, destination = (answers[orders] for orders in self._orders)
        if source.checksum != destination.checksum:
            raise SystemExit(f"{order}: what arrived is not what was sent")
        return source, destination

    def close(self) -> None:
        for orders in self._orders:
            with contextlib.suppress(OSError):  # it is gone already
                orders.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.terminate()
                process.join()


def _share_from(orders: Connection, order: Any) -> Share:
    try:
        answer = orders.recv()
    except EOFError:
        raise SystemExit(f"{order}: a process ended before its time") from None
    if isinstance(answer, _Failed):
        raise SystemExit(f"{order}: {answer.text}")
    assert isinstance(answer, Share)
    return answer


# --------------------------------------------------------------------------- what is reported


def seconds_of(source: Share, destination: Share) -> float:
    """From when both were ready until the destination had everything."""
    return destination.ended - max(source.begun, destination.begun)


def ratios_by_round(
    runs: Sequence[dict[str, Any]], one: Callable[[Any], bool], other: Callable[[Any], bool], what: str = "gib_per_s"
) -> list[float]:
    """For each round in which there are both: how much more *what* is for *one* than for *other*."""
    ours = {run["round"]: run[what] for run in runs if one(run)}
    theirs = {run["round"]: run[what] for run in runs if other(run)}
    return [ours[number] / theirs[number] for number in sorted(ours.keys() & theirs.keys())]


def median_ratio(
    runs: Sequence[dict[str, Any]], one: Callable[[Any], bool], other: Callable[[Any], bool], what: str = "gib_per_s"
) -> float:
    """The median of `ratios_by_round`; NaN when there are none."""
    ratios = ratios_by_round(runs, one, other, what)
    return round(statistics.median(ratios), 3) if ratios else math.nan
