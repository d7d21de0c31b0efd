"""Bulk streams: guest RAM between two processes, beside the control channel.

k blocking sockets in k worker threads (`StreamSender`, `StreamReceiver`), a limiter of their own per migration, and
two trio faces (`BulkSource`, `BulkDestination`). Cancel is `shutdown()`, join, then `close()`: closing first would hand
the file number to the next connection while a thread still reads from it.

This module knows memoryviews, page arrays and page runs, nothing of hypervisors. The transport is a `SendLink` at the
source and a `ReceiveLink` at the destination: sealed (`net.sealed`), or a TLS socket (`TlsLink`).

Who trusts what: a receiver acts on a record only after its runs were checked against the regions and the stream's
stripes, and its header and runs are authenticated before they are looked at, on both transports. Pages of a sealed
record land while they are authenticated: should that fail, `Landing.breach` is the end of the migration.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import trio

from vmmigrate.errors import RemoteProtocolError, TransportError
from vmmigrate.memory import PAGE_SIZE, PageBitmap, RamLayout, Runs, split_runs
from vmmigrate.net.threads import open_group, run_joined
from vmmigrate.net.tls import watch_peer
from vmmigrate.net.tls_errors import map_tls_errors
from vmmigrate.ram.digest import Digests, PageHash
from vmmigrate.ram.encoding import nonzero
from vmmigrate.ram.offer import cut_at, groups, runs_of_pages, runs_per_stream
from vmmigrate.ram.records import (
    HEADER,
    MAX_RECORD_PAGES,
    MAX_ZERO_RUNS,
    RUN_DTYPE,
    STRIPE_PAGES,
    RecordHeader,
    RecordKind,
    index_of,
    pack_runs,
    pages_in,
    unpack_header,
    unpack_runs,
)

STALL_LIMIT_S = 30.0

Pages = npt.NDArray[np.uint64]  # guest RAM, shape (pages, 512)


class Link(Protocol):
    """One bulk connection, authenticated and bound to its migration, session, stream and direction."""

    def shutdown(self) -> None:
        """Make calls of other threads fail; they must be joined before `close`."""

    def close(self) -> None: ...


class SendLink(Link, Protocol):
    """The source's end."""

    def send(self, *parts: memoryview | bytes) -> None:
        """Send all of it; the destination receives part by part, each of at most 1 MiB."""


class ReceiveLink(Link, Protocol):
    """The destination's end. Both calls raise TransportError when cut, RemoteProtocolError when it is a forgery."""

    def receive_into(self, target: memoryview) -> None:
        """Fill *target* with the next part; a peer that stalls in the middle of a record is given `STALL_LIMIT_S`."""

    def await_into(self, target: memoryview) -> None:
        """Fill *target* with the first part of the next record, whenever that comes; once begun, as `receive_into`."""


class TlsLink:
    """Either end over a blocking TLS socket; it is shut down when its peer is revoked."""

    def __init__(self, sock: ssl.SSLSocket, peer: str, stall_limit_s: float = STALL_LIMIT_S) -> None:
        """Raises: IdentityError `certificate_revoked`: the peer was, since the handshake."""
        sock.settimeout(stall_limit_s)
        self._sock = sock
        self._stall_limit_s = stall_limit_s
        self._doing = f"bulk stream with {peer}"
        self._leave = watch_peer(sock, lambda _: self.shutdown())

    def send(self, *parts: memoryview | bytes) -> None:
        with map_tls_errors(self._doing, late="stalled"):
            for part in parts:
                self._sock.sendall(part)

    def await_into(self, target: memoryview) -> None:
        # Between rounds a stream may be silent for long; the control channel's heartbeats tell a dead peer.
        self._sock.settimeout(None)
        rest = self._receive_some(target)
        self._sock.settimeout(self._stall_limit_s)
        self.receive_into(rest)

    def receive_into(self, target: memoryview) -> None:
        while target:
            target = self._receive_some(target)

    def _receive_some(self, target: memoryview) -> memoryview:
        """Fill the beginning of *target*; what is left of it."""
        with map_tls_errors(self._doing, late="stalled"):
            received = self._sock.recv_into(target)
        if received == 0:
            raise TransportError(f"{self._doing}: cut", code="link_lost")
        return target[received:]

    def shutdown(self) -> None:
        # Not SSLSocket.shutdown: that drops the TLS state under the feet of the thread that uses it.
        with contextlib.suppress(OSError):  # it may be disconnected already
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        self._leave()
        self._sock.close()


# --------------------------------------------------------------------------- source


@dataclass(frozen=True, slots=True)
class RoundSent:
    """What one round put on the wire. `bytes_sent` counts records whole."""

    pages: int
    zero_pages: int
    bytes_sent: int
    records: tuple[int, ...]  # per stream, since the streams opened


class StreamSender:
    """Sends the pages of one stream, in its thread.

    Attributes:
        pages_sent, zero_pages, bytes_sent: Running totals; other threads may look at them.
        records_at_barrier: Records up to and with the barrier of the last round.
    """

    def __init__(self, link: SendLink, layout: RamLayout, ram: Pages, page_hash: PageHash, table: Digests) -> None:
        self.link = link
        self.records = 0
        self.records_at_barrier = 0
        self.pages_sent = 0
        self.zero_pages = 0
        self.bytes_sent = 0
        self._layout = layout
        self._ram = ram
        self._hash = page_hash
        self._table = table
        self._cuts = _region_boundaries(layout)
        self._round = 0
        self._zeros: list[Runs] = []
        self._zero_runs = 0

    def send_round(self, runs: Runs, round_number: int, *, last: bool) -> None:
        """Send *runs* (each at most one record long), then the barrier of the round; after the last one, END."""
        self._round = round_number
        for group in groups(runs):
            self._send_group(group)
        self._flush_zeros()
        self._send_record(RecordKind.BARRIER)
        self.records_at_barrier = self.records
        if last:
            self._send_record(RecordKind.END)

    def _send_group(self, group: Runs) -> None:
        """One record's worth of pages. A single run is sent straight from guest RAM, scattered ones from a copy."""
        chunk = self._ram[index_of(group)]
        kept = nonzero(chunk)
        if kept.all():
            self._send_pages(group, chunk)
            return
        numbers = pages_in(group)
        self._note_zeros(self._runs_of(numbers[~kept]))
        if kept.any():
            # Zero pages amid others: what is left no longer lies in one piece, so it goes from a copy.
            self._send_pages(self._runs_of(numbers[kept]), chunk[kept])

    def _runs_of(self, pages: npt.NDArray[np.int64]) -> Runs:
        """*pages* as runs that are lawful on the wire: neighbours may lie in two stripes, or in two regions."""
        return cut_at(split_runs(runs_of_pages(pages), STRIPE_PAGES), self._cuts)

    def _send_pages(self, runs: Runs, chunk: Pages) -> None:
        # The guest may write while we read. A page that changes between digest and send is dirty again and is sent
        # again; the entry that counts is the last one.
        self._table[index_of(runs)] = self._hash.of(chunk)
        self._send_record(RecordKind.PAGES, runs, chunk.data.cast("B"))
        self.pages_sent += len(chunk)

    def _note_zeros(self, runs: Runs) -> None:
        """Zero pages of many groups travel in one record; never more of them are kept than fill one."""
        self._zeros.append(runs)
        self._zero_runs += len(runs)
        if self._zero_runs >= MAX_ZERO_RUNS:
            self._flush_zeros()

    def _flush_zeros(self) -> None:
        if not self._zeros:
            return
        runs = np.concatenate(self._zeros)
        self._zeros.clear()
        self._zero_runs = 0
        self._table[pages_in(runs)] = 0
        for start in range(0, len(runs), MAX_ZERO_RUNS):
            self._send_record(RecordKind.ZERO, runs[start : start + MAX_ZERO_RUNS])
        self.zero_pages += int(runs[:, 1].sum())

    def _send_record(self, kind: RecordKind, runs: Runs | None = None, payload: memoryview | None = None) -> None:
        table = b"" if runs is None else pack_runs(self._layout, runs)
        size = 0 if payload is None else payload.nbytes
        header = RecordHeader(kind, len(table) // RUN_DTYPE.itemsize, self._round, size, self.records)
        self.link.send(*[part for part in (header.pack(), table, payload) if part])
        self.records += 1
        self.bytes_sent += HEADER.size + len(table) + size


class BulkSource:
    """All streams of a source, for trio."""

    def __init__(
        self,
        links: Sequence[SendLink],
        layout: RamLayout,
        ram: Pages,
        page_hash: PageHash,
        table: Digests | None = None,
    ) -> None:
        """*table* is that of an earlier session of the same migration, whose link was cut."""
        self.table: Digests = np.zeros(layout.pages, dtype=np.uint64) if table is None else table
        self._senders = [StreamSender(link, layout, ram, page_hash, self.table) for link in links]
        self._limiter = trio.CapacityLimiter(len(links))
        self._cuts = _region_boundaries(layout)

    @property
    def bytes_sent(self) -> int:
        return sum(sender.bytes_sent for sender in self._senders)

    @property
    def pages_done(self) -> int:
        return sum(sender.pages_sent + sender.zero_pages for sender in self._senders)

    @property
    def zero_pages(self) -> int:
        return sum(sender.zero_pages for sender in self._senders)

    async def send_round(self, pages: PageBitmap, round_number: int, *, last: bool = False) -> RoundSent:
        """Send *pages* and the barrier on every stream; with *last*, also that no record follows.

        Raises: TransportError; the round counts as not sent. On cancellation the streams are shut down.
        """
        before = (self.pages_done, self.zero_pages, self.bytes_sent)
        shares = await trio.to_thread.run_sync(self._deal_out, pages)
        async with open_group() as nursery:
            for sender, runs in zip(self._senders, shares, strict=True):
                nursery.start_soon(self._send_stream, sender, runs, round_number, last)
        records = tuple(sender.records_at_barrier for sender in self._senders)
        after = (self.pages_done, self.zero_pages, self.bytes_sent)
        done, zeros, sent = (new - old for new, old in zip(after, before, strict=True))
        return RoundSent(done, zeros, sent, records)

    def _deal_out(self, pages: PageBitmap) -> list[Runs]:
        """What each stream sends. Over a large guest this takes a while: not for the event loop."""
        return [cut_at(runs, self._cuts) for runs in runs_per_stream(pages, len(self._senders))]

    async def _send_stream(self, sender: StreamSender, runs: Runs, round_number: int, last: bool) -> None:
        await run_joined(
            lambda: sender.send_round(runs, round_number, last=last), end=sender.link.shutdown, limiter=self._limiter
        )

    def close(self) -> None:
        """Close all links. No thread uses them any more: every send joins its thread before it returns."""
        for sender in self._senders:
            sender.link.shutdown()
            sender.link.close()


def _region_boundaries(layout: RamLayout) -> tuple[int, ...]:
    return tuple(layout.first_page(region) for region in layout.regions[1:])


# --------------------------------------------------------------------------- destination


class Landing:
    """What has landed at a destination; it outlives a cut link.

    Attributes:
        table: Digest of every page as it landed.
        written: Which pages were ever written here, if only in part.
        fresh: Which pages have landed whole since the last applied round.
        breach: What came was forged or illegal. Then nothing here is to be used, whatever else failed meanwhile.
    """

    def __init__(self, pages: int) -> None:
        self.table: Digests = np.zeros(pages, dtype=np.uint64)
        self.written: npt.NDArray[np.bool_] = np.zeros(pages, dtype=np.bool_)
        self.fresh: npt.NDArray[np.bool_] = np.zeros(pages, dtype=np.bool_)
        self.breach: RemoteProtocolError | None = None


class StreamReceiver:
    """Receives the pages of one stream, in its thread, straight into guest RAM.

    Attributes:
        records: Records received so far. bytes_received: Running total, headers included.
    """

    def __init__(
        self,
        link: ReceiveLink,
        stream: int,
        streams: int,
        layout: RamLayout,
        ram: Pages,
        page_hash: PageHash,
        landing: Landing,
    ) -> None:
        self.link = link
        self.records = 0
        self.bytes_received = 0
        self._stream = stream
        self._streams = streams
        self._layout = layout
        self._ram = ram
        self._bytes = ram.data.cast("B")
        self._hash = page_hash
        self._landing = landing
        self._header = memoryview(bytearray(HEADER.size))
        self._runs = memoryview(bytearray(MAX_ZERO_RUNS * RUN_DTYPE.itemsize))
        self._scratch = np.empty((MAX_RECORD_PAGES, PAGE_SIZE // 8), dtype=np.uint64)

    def receive_round(self) -> int | None:
        """Take records until a barrier: its round number; or None at the end of the stream.

        Raises:
            RemoteProtocolError: `bad_record`, `seal_broken`; it is noted as the breach of the landing.
            TransportError: cut or stalled.
        """
        try:
            while True:
                header = self._receive_header()
                if header.kind is RecordKind.BARRIER:
                    return header.round_number
                if header.kind is RecordKind.END:
                    return None
                self._land(header, self._receive_runs(header))
        except RemoteProtocolError as breach:
            # Noted where it happens: of several errors at once only one is raised, and this one must not be lost.
            self._landing.breach = self._landing.breach or breach
            raise

    def _land(self, header: RecordHeader, runs: Runs) -> None:
        if header.kind is RecordKind.PAGES:
            self._receive_pages(runs)
        else:
            self._apply_zeros(runs)

    def _receive_header(self) -> RecordHeader:
        self.link.await_into(self._header)
        header = unpack_header(self._header, self.records)
        self.records += 1
        self.bytes_received += HEADER.size + header.runs * RUN_DTYPE.itemsize + header.payload_bytes
        return header

    def _receive_runs(self, header: RecordHeader) -> Runs:
        raw = self._runs[: header.runs * RUN_DTYPE.itemsize]
        self.link.receive_into(raw)
        return unpack_runs(raw, header, self._layout, self._stream, self._streams)

    def _receive_pages(self, runs: Runs) -> None:
        index = index_of(runs)
        if isinstance(index, slice):
            # Written from the first byte on: should the rest never come, and the page be zero when it is sent again,
            # it must not be taken for a hole.
            self._landing.written[index] = True
            self.link.receive_into(self._bytes[index.start * PAGE_SIZE : index.stop * PAGE_SIZE])
        else:
            scratch = self._scratch[: len(index)]
            self.link.receive_into(scratch.data.cast("B"))
            self._landing.written[index] = True
            self._ram[index] = scratch
        self._landing.table[index] = self._hash.of(self._ram[index])
        self._landing.fresh[index] = True

    def _apply_zeros(self, runs: Runs) -> None:
        """Zero what was written before; what never was is a hole and reads as zero: it stays one."""
        numbers = pages_in(runs)
        stale = numbers[self._landing.written[numbers]]
        self._ram[stale] = 0
        self._landing.table[numbers] = 0
        self._landing.fresh[numbers] = True


class BulkDestination:
    """All streams of a destination, for trio.

    Attributes:
        landing: What has landed, also in earlier sessions of the same migration.
    """

    def __init__(
        self,
        links: Sequence[ReceiveLink],
        layout: RamLayout,
        ram: Pages,
        page_hash: PageHash,
        landing: Landing | None = None,
    ) -> None:
        self.landing = landing or Landing(layout.pages)
        self._receivers = [
            StreamReceiver(link, i, len(links), layout, ram, page_hash, self.landing) for i, link in enumerate(links)
        ]
        self._limiter = trio.CapacityLimiter(len(links))
        self._reached: list[dict[int, int]] = [{} for _ in links]  # per stream: round -> records at its barrier
        self._is_over = [False for _ in links]
        self._progress = trio.Event()
        self._ended = trio.Event()

    @property
    def table(self) -> Digests:
        return self.landing.table

    @property
    def written(self) -> npt.NDArray[np.bool_]:
        return self.landing.written

    @property
    def bytes_received(self) -> int:
        return sum(receiver.bytes_received for receiver in self._receivers)

    async def receive_forever(self) -> None:
        """Receive on every stream until each has said END.

        Raises: as `StreamReceiver.receive_round`. On cancellation the streams are shut down and their threads joined.
        """
        async with open_group() as nursery:
            for index in range(len(self._receivers)):
                nursery.start_soon(self._receive_stream, index)
        self._ended.set()

    async def wait_end(self) -> None:
        """Return when every stream has said END and its thread is joined: nobody writes guest RAM any more."""
        await self._ended.wait()

    async def _receive_stream(self, index: int) -> None:
        receiver = self._receivers[index]
        while True:
            round_number = await run_joined(receiver.receive_round, end=receiver.link.shutdown, limiter=self._limiter)
            if round_number is None:
                self._is_over[index] = True
                self._note_progress()
                return
            if self._reached[index]:
                # A round is answered before the next begins; else a peer could make us count its barriers for ever.
                raise self._breach(f"stream {index}: a barrier before the last was answered")
            self._reached[index][round_number] = receiver.records
            self._note_progress()

    def _note_progress(self) -> None:
        self._progress.set()
        self._progress = trio.Event()

    async def wait_round(self, round_number: int, records: tuple[int, ...]) -> None:
        """Return when every stream has reached the barrier of *round_number*.

        Raises:
            RemoteProtocolError: `bad_record`: a stream holds another number of records than the control channel,
                which is authenticated, says it sent; or it ended before that barrier.
        """
        while not all(round_number in reached for reached in self._reached):
            for index, (is_over, reached) in enumerate(zip(self._is_over, self._reached, strict=True)):
                if is_over and round_number not in reached:
                    raise self._breach(f"stream {index} ended before round {round_number}")
            await self._progress.wait()
        counted = tuple(reached.pop(round_number) for reached in self._reached)
        if counted != records:
            raise self._breach(f"round {round_number}: {counted} records arrived, {records} were sent")

    def _breach(self, text: str) -> RemoteProtocolError:
        breach = RemoteProtocolError(text, code="bad_record")
        self.landing.breach = self.landing.breach or breach
        return breach

    def close(self) -> None:
        """Close all links; `receive_forever` must have ended."""
        for receiver in self._receivers:
            receiver.link.shutdown()
            receiver.link.close()
