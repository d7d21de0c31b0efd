"""Bulk streams at the destination: guest RAM into mapped memory, beside the control channel.

k blocking links in k worker threads (`StreamReceiver`), a limiter of their own per migration, and a trio face
(`BulkDestination`). This module knows memoryviews, page arrays and page runs, nothing of hypervisors.

Who trusts what: a receiver acts on a record only after its runs were checked against the regions and the stream's
stripes, and its header and runs are authenticated before they are looked at, on both transports. Pages of a sealed
record land while they are authenticated: should that fail, `Landing.breach` is the end of the migration.

What a page of new memory costs at its first write, a trap and zeros that are overwritten at once, is more than all
else together. So where pages can be filled in one go, those that were not here before are received into a scratch of a
record, which stays in the cache, and filled from there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import trio

from vmmigrate.errors import RemoteProtocolError
from vmmigrate.memory import PAGE_SIZE, RamLayout, Runs, pages_in, runs_of_pages
from vmmigrate.net.links import ReceiveLink
from vmmigrate.net.threads import open_group, run_joined
from vmmigrate.ram.digest import Digests, PageHash
from vmmigrate.ram.encoding import RAW, WORD_OF, ZERO, Unpacker
from vmmigrate.ram.records import (
    HEADER,
    MAX_RECORD_PAGES,
    MAX_ZERO_RUNS,
    RUN_DTYPE,
    RecordHeader,
    RecordKind,
    index_of,
    unpack_header,
    unpack_runs,
)

Pages = npt.NDArray[np.uint64]  # guest RAM, shape (pages, 512)
Index = slice | npt.NDArray[np.int64]
Fill = Callable[[int, Pages], int]  # `base.GuestRam.fill`

_BASE_DTYPE = np.dtype(">u8")
_WORTH_A_CALL_PAGES: Final = 4


class Landing:
    """What has landed at a destination; it outlives a cut link.

    Attributes:
        table: Digest of every page as it landed.
        written: Which pages were ever written here, if only in part.
        fresh: Which pages have landed whole since the source was last told.
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
        records: Records received so far. bytes_received: Running total, records whole.
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
        encodings: Collection[str] = (RAW, ZERO),
        fill: Fill | None = None,
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
        self._encodings = frozenset(encodings)
        self._fill = fill
        self._unpacker = Unpacker()
        self._header = memoryview(bytearray(HEADER.size))
        self._runs = memoryview(bytearray(MAX_ZERO_RUNS * RUN_DTYPE.itemsize))
        self._scratch: Pages = np.empty((MAX_RECORD_PAGES, PAGE_SIZE // 8), dtype=np.uint64)
        self._frame = memoryview(bytearray(MAX_RECORD_PAGES * PAGE_SIZE))

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
        if header.kind is RecordKind.ZERO:
            self._apply_zeros(pages_in(runs))
            return
        index, pages = index_of(runs), int(runs[:, 1].sum())
        if header.kind is RecordKind.PAGES:
            self._receive_pages(index, pages)
        elif header.kind is RecordKind.ZSTD:
            self._store(index, self._receive_frame(header, pages))
        else:
            self._receive_delta(index, header, pages)
        self._landing.table[index] = self._digests_at(index)
        self._landing.fresh[index] = True

    def _receive_header(self) -> RecordHeader:
        self.link.await_into(self._header)
        header = unpack_header(self._header, self.records)
        word = WORD_OF.get(header.kind, RAW)
        if word not in self._encodings:
            raise RemoteProtocolError(f"bulk record {header.kind.name}: {word} was not agreed upon", code="bad_record")
        self.records += 1
        self.bytes_received += HEADER.size + header.runs * RUN_DTYPE.itemsize + header.payload_bytes
        return header

    def _receive_runs(self, header: RecordHeader) -> Runs:
        raw = self._runs[: header.runs * RUN_DTYPE.itemsize]
        self.link.receive_into(raw)
        return unpack_runs(raw, header, self._layout, self._stream, self._streams)

    def _receive_pages(self, index: Index, pages: int) -> None:
        if isinstance(index, slice) and not self._is_filled(index):
            # Written from the first byte on: should the rest never come, and the page be zero when it is sent again,
            # it must not be taken for a hole.
            self._landing.written[index] = True
            self.link.receive_into(self._bytes[index.start * PAGE_SIZE : index.stop * PAGE_SIZE])
        else:
            scratch = self._scratch[:pages]
            self.link.receive_into(scratch.data.cast("B"))
            self._store(index, scratch)

    def _receive_frame(self, header: RecordHeader, pages: int) -> Pages:
        """*pages* pages out of the frame that comes next; good until the next record."""
        frame, scratch = self._frame[: header.payload_bytes], self._scratch[:pages]
        self.link.receive_into(frame)
        self._unpacker.unpack_into(frame, scratch.data.cast("B"))
        return scratch

    def _receive_delta(self, index: Index, header: RecordHeader, pages: int) -> None:
        """A difference is applied only to the very page that it was made from."""
        raw = memoryview(bytearray(pages * _BASE_DTYPE.itemsize))
        self.link.receive_into(raw)
        self.bytes_received += len(raw)
        change = self._receive_frame(header, pages)
        if (np.frombuffer(raw, dtype=_BASE_DTYPE) != self._landing.table[index]).any():
            raise RemoteProtocolError("bulk record: a delta to a page that is not here", code="bad_record")
        change ^= self._ram[index]
        self._store(index, change)

    def _is_filled(self, index: Index) -> bool:
        """Whether these pages come to be by being filled."""
        return self._fill is not None and not self._landing.written[index].any()

    def _store(self, index: Index, pages: Pages) -> None:
        is_filled = self._is_filled(index)
        self._landing.written[index] = True
        if not is_filled:
            self._ram[index] = pages
        elif isinstance(index, slice):
            self._fill_run(index.start, pages)
        else:
            self._fill_runs(index, pages)

    def _fill_run(self, first: int, pages: Pages) -> None:
        assert self._fill is not None
        done = self._fill(first, pages)
        if done < len(pages):  # one was there, if only because the guest's process has touched it
            self._ram[first + done : first + len(pages)] = pages[done:]

    def _fill_runs(self, numbers: npt.NDArray[np.int64], pages: Pages) -> None:
        runs = runs_of_pages(numbers)
        if len(runs) * _WORTH_A_CALL_PAGES > len(pages):
            self._ram[numbers] = pages
            return
        start = 0
        for first, count in runs.tolist():
            self._fill_run(first, pages[start : start + count])
            start += count

    def _digests_at(self, index: Index) -> Digests:
        """Of what landed, not of what came."""
        if isinstance(index, slice):
            return self._hash.of(self._ram[index])
        return self._hash.of(self._ram, index)

    def _apply_zeros(self, numbers: npt.NDArray[np.int64]) -> None:
        """Zero what was written before; what never was is a hole and reads as zero: it stays one."""
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
        encodings: Collection[str] = (RAW, ZERO),
        fill: Fill | None = None,
    ) -> None:
        """*fill* puts pages where none are, and says how many it did; without it they are written."""
        self.landing = landing or Landing(layout.pages)
        self._receivers = [
            StreamReceiver(link, i, len(links), layout, ram, page_hash, self.landing, encodings, fill)
            for i, link in enumerate(links)
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
