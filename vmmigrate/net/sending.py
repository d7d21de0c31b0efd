"""Bulk streams at the source: guest RAM out of mapped memory, beside the control channel.

k blocking links in k worker threads (`StreamSender`), a limiter of their own per migration, and a trio face
(`BulkSource`). This module knows memoryviews, page arrays and page runs, nothing of hypervisors.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import chain
from operator import add

import numpy as np
import numpy.typing as npt
import trio

from vmmigrate.memory import MIB, PAGE_SIZE, PageBitmap, RamLayout, Runs, pages_in, runs_of_pages, split_runs
from vmmigrate.net.links import SendLink
from vmmigrate.net.threads import run_all_joined, run_delay_s
from vmmigrate.ram.delta import DeltaCache
from vmmigrate.ram.digest import Digests, PageHash
from vmmigrate.ram.encoding import RAW, WORD_OF, ZERO, Encoded, Packer, Tally
from vmmigrate.ram.offer import cut_at, groups, runs_per_stream
from vmmigrate.ram.records import (
    MAX_RECORD_PAGES,
    MAX_ZERO_RUNS,
    RUN_DTYPE,
    STRIPE_PAGES,
    RecordHeader,
    RecordKind,
    index_of,
    pack_runs,
)
from vmmigrate.ram.worth import Worth

Pages = npt.NDArray[np.uint64]  # guest RAM, shape (pages, 512)
Numbers = npt.NDArray[np.int64]
Fetch = Callable[[PageBitmap], Awaitable[None]]

FETCHED_AT_ONCE_PAGES = 64 * MIB // PAGE_SIZE
_MOST_ZEROS_KEPT = 1 << 16
_DEALT_OUT_AT_ONCE_PAGES = 1 << 12
_SENT_IN_TURN_PAGES = 256  # fit a socket, and take less than another thread takes to begin


@dataclass(frozen=True, slots=True)
class RoundSent:
    """What one round put on the wire. `bytes_sent` counts records whole.

    Attributes:
        records: Per stream, since the streams opened.
        unsent: Pages of the round that were not sent, because it was broken off; None when all were.
    """

    pages: int
    zero_pages: int
    bytes_sent: int
    records: tuple[int, ...]
    unsent: PageBitmap | None = None

    def and_then(self, later: RoundSent) -> RoundSent:
        """Two rounds as one."""
        return RoundSent(
            self.pages + later.pages,
            self.zero_pages + later.zero_pages,
            self.bytes_sent + later.bytes_sent,
            later.records,
            later.unsent,
        )


class _Pending:
    """Page numbers that are to be sent together, ascending within a round."""

    def __init__(self) -> None:
        self.pages = 0
        self._numbers: list[Numbers] = []

    def add(self, numbers: Numbers) -> None:
        if len(numbers):
            self._numbers.append(numbers)
            self.pages += len(numbers)

    def take(self, most: int) -> Numbers:
        """The first *most* of them, or all; they are not pending any more."""
        numbers = np.concatenate(self._numbers) if self._numbers else np.empty(0, dtype=np.int64)
        self.pages, self._numbers = 0, []
        self.add(numbers[most:])
        return numbers[:most]


class StreamSender:
    """Sends the pages of one stream, in its thread.

    Attributes:
        tally: Pages and bytes by encoding. bytes_sent: Records whole. Running totals; other threads may look at them.
        records_at_barrier: Records up to and with the barrier of the last round.
    """

    def __init__(
        self,
        link: SendLink,
        layout: RamLayout,
        ram: Pages,
        page_hash: PageHash,
        table: Digests,
        packer: Packer,
        *,
        names_zeros: bool = True,
    ) -> None:
        """*names_zeros*: the destination knows pages of zeros by name."""
        self.link = link
        self.records = 0
        self.records_at_barrier = 0
        self.tally = Tally.empty()
        self.bytes_sent = 0
        self._layout = layout
        self._ram = ram
        self._hash = page_hash
        self._table = table
        self._packer = packer
        self._names_zeros = names_zeros
        self._cuts = region_boundaries(layout)
        self._round = 0
        self._zeros = _Pending()
        self._scattered = _Pending()

    def send_round(
        self,
        runs: Runs,
        round_number: int,
        *,
        last: bool,
        goes_on: bool = False,
        break_off: threading.Event | None = None,
    ) -> Runs:
        """Send *runs* (each at most one record long), then the barrier of the round; after the last one, END.

        Args:
            goes_on: It is only a part of the round: nothing follows it yet, and its pages need not be there any more.
            break_off: Once it is set, no more pages are sent.

        Returns: The runs that were not sent.
        """
        self._round = round_number
        self._packer.worth.note_round()
        sent_runs = 0
        for group in groups(runs):
            if break_off is not None and break_off.is_set():
                break
            self._send_group(group)
            sent_runs += len(group)
        self._send_scattered()
        if goes_on:
            return runs[sent_runs:]
        self._flush_zeros()
        self._send_record(RecordKind.BARRIER)
        self.records_at_barrier = self.records
        if last:
            self._send_record(RecordKind.END)
        return runs[sent_runs:]

    def pace(self, bytes_per_s: int) -> None:
        """Send no faster than this from now on; 0 lifts the limit. Any thread may say so at any time."""
        self.link.pace(bytes_per_s)
        self._packer.worth.paced_s_per_byte = 1 / bytes_per_s if bytes_per_s else 0.0

    def _send_group(self, group: Runs) -> None:
        """One record's worth of pages, or of several records when they are encoded in different ways."""
        if self._packer.wants_copy(self._round):
            self._send_copied(group)
        else:
            self._send_live(group)

    def _send_live(self, group: Runs) -> None:
        """Straight from guest RAM where it lies in one piece.

        The guest may write while we read. A page that changes between digest and send is dirty again and is sent
        again; the entry that counts is the last one.
        """
        begun = time.thread_time()
        numbers, index = pages_in(group), index_of(group)
        if isinstance(index, slice):
            digests, kept = self._hash.look(self._ram[index])
        else:
            digests, kept = self._hash.look(self._ram, index)
        self._packer.worth.note_look(len(digests) * PAGE_SIZE, time.thread_time() - begun)
        kept |= not self._names_zeros
        self._table[index] = digests
        self._packer.forget(index)
        if isinstance(index, slice) and kept.all():
            self._send_pages(numbers, group, self._ram[index], begun)
            return
        self._note_zeros(numbers[~kept])
        self._scattered.add(numbers[kept])
        self._send_scattered(at_least=MAX_RECORD_PAGES)

    def _send_scattered(self, *, at_least: int = 1) -> None:
        """Pages that do not lie in one piece travel from a copy, as many together as fit a record."""
        while self._scattered.pages >= at_least:
            begun = time.thread_time()
            numbers = self._scattered.take(MAX_RECORD_PAGES)
            begun -= self._packer.worth.look_s_per_byte * len(numbers) * PAGE_SIZE  # they were looked at before
            self._send_pages(numbers, self._runs_of(numbers), self._packer.copy_of(self._ram, numbers), begun)

    def _send_pages(self, numbers: Numbers, runs: Runs, pages: Pages, begun_cpu_s: float) -> None:
        self._send_record(RecordKind.PAGES, runs, (pages.data.cast("B"),))
        self.tally.add(RAW, len(pages), pages.nbytes)
        self._packer.worth.note_work(pages.nbytes, time.thread_time() - begun_cpu_s)
        self._packer.maybe_sample(numbers, pages, self._round)

    def _send_copied(self, group: Runs) -> None:
        """From a private copy, in whatever encodings the packer finds best."""
        numbers = pages_in(group)
        copy = self._packer.copy_of(self._ram, index_of(group))
        begun = time.thread_time()
        digests, kept = self._hash.look(copy)
        self._packer.worth.note_look(copy.nbytes, time.thread_time() - begun)
        kept |= not self._names_zeros
        bases = self._table[numbers]
        self._table[numbers] = digests
        if not kept.all():
            self._packer.forget(numbers[~kept])
            self._note_zeros(numbers[~kept])
            numbers, copy, bases = numbers[kept], copy[kept], bases[kept]
        for encoded in self._packer.encode(numbers, copy, bases, self._round):
            self._send_encoded(encoded)

    def _send_encoded(self, encoded: Encoded) -> None:
        begun = time.thread_time()
        self._send_record(encoded.kind, self._runs_of(encoded.numbers), encoded.parts)
        self.tally.add(WORD_OF[encoded.kind], len(encoded.numbers), sum(map(len, encoded.parts)))
        if encoded.kind is RecordKind.PAGES:
            size, worth = len(encoded.parts[0]), self._packer.worth
            worth.note_work(size, time.thread_time() - begun + size * worth.look_s_per_byte)

    def _runs_of(self, numbers: Numbers) -> Runs:
        """*numbers* as runs that are lawful on the wire: neighbours may lie in two stripes, or in two regions."""
        runs = runs_of_pages(numbers)
        first, last = int(numbers[0]), int(numbers[-1])
        if first // STRIPE_PAGES != last // STRIPE_PAGES:
            runs = split_runs(runs, STRIPE_PAGES)
        return cut_at(runs, tuple(cut for cut in self._cuts if first < cut <= last))

    def _note_zeros(self, numbers: Numbers) -> None:
        """Zero pages of many groups travel together; never more of them are kept than a bitmap of RAM would take."""
        self._zeros.add(numbers)
        if self._zeros.pages >= _MOST_ZEROS_KEPT:
            self._flush_zeros()

    def _flush_zeros(self) -> None:
        numbers = self._zeros.take(self._zeros.pages)
        if not len(numbers):
            return
        runs = self._runs_of(numbers)
        for start in range(0, len(runs), MAX_ZERO_RUNS):
            self._send_record(RecordKind.ZERO, runs[start : start + MAX_ZERO_RUNS])
        self.tally.add(ZERO, len(numbers), 0)

    def _send_record(
        self, kind: RecordKind, runs: Runs | None = None, parts: tuple[memoryview | bytes, ...] = ()
    ) -> None:
        table = b"" if runs is None else pack_runs(self._layout, runs)
        size = len(parts[-1]) if parts else 0
        header = RecordHeader(kind, len(table) // RUN_DTYPE.itemsize, self._round, size, self.records)
        whole = (header.pack(), *([table] if table else []), *parts)
        begun_s, begun_cpu_s = time.monotonic(), time.thread_time()
        self.link.send(*whole)
        waited_s = time.monotonic() - begun_s - (time.thread_time() - begun_cpu_s)
        self.records += 1
        sent = sum(map(len, whole))
        self.bytes_sent += sent
        if self._packer.worth.note_sent(sent, waited_s):
            self._packer.worth.note_queue(time.monotonic(), self.link.unsent_bytes(), run_delay_s())


class BulkSource:
    """All streams of a source, for trio."""

    def __init__(
        self,
        links: Sequence[SendLink],
        layout: RamLayout,
        ram: Pages,
        page_hash: PageHash,
        table: Digests | None = None,
        *,
        encodings: Collection[str] = (RAW, ZERO),
        delta_cache_bytes: int = 0,
        judge: Callable[[], Worth] = Worth,
    ) -> None:
        """*table* is that of an earlier session of the same migration, whose link was cut.

        Args:
            encodings: What both sides agreed upon.
            delta_cache_bytes: For copies of sent pages, over all streams; 0 for no deltas.
            judge: Makes for each stream who says what pays.
        """
        self.table: Digests = np.zeros(layout.pages, dtype=np.uint64) if table is None else table
        self._pages = layout.pages
        share = delta_cache_bytes // len(links)
        self._senders = [
            StreamSender(
                link,
                layout,
                ram,
                page_hash,
                self.table,
                Packer(encodings, DeltaCache(share, len(links)) if share else None, judge()),
                names_zeros=ZERO in encodings,
            )
            for link in links
        ]
        self._limiter = trio.CapacityLimiter(len(links))
        self._cuts = region_boundaries(layout)
        self._break_off = threading.Event()
        self._is_paced = False

    @property
    def bytes_sent(self) -> int:
        return sum(sender.bytes_sent for sender in self._senders)

    @property
    def tally(self) -> Tally:
        return reduce(add, (sender.tally for sender in self._senders), Tally.empty())

    @property
    def pages_done(self) -> int:
        return sum(self.tally.pages.values())

    @property
    def zero_pages(self) -> int:
        return self.tally.pages[ZERO]

    def pace(self, bytes_per_s: int) -> None:
        """All streams together send no faster than this from now on; 0 lifts the limit."""
        self._is_paced = bytes_per_s > 0
        for sender in self._senders:
            sender.pace(-(-bytes_per_s // len(self._senders)))

    def break_off(self) -> None:
        """Let the round that runs end early; its result tells what it has not sent. The next one is not affected."""
        self._break_off.set()

    async def send_round(
        self, pages: PageBitmap, round_number: int, *, last: bool = False, fetch: Fetch | None = None
    ) -> RoundSent:
        """Send *pages* and the barrier on every stream; with *last*, also that no record follows.

        Args:
            fetch: Has pages be there before they are sent, and those of the time before no longer. It is asked for at
                most `FETCHED_AT_ONCE_PAGES` at once.

        Raises: TransportError, or what *fetch* raises; the round counts as not sent. On cancellation the streams are
            shut down.
        """
        before = (self.pages_done, self.zero_pages, self.bytes_sent)
        self._break_off.clear()
        left = list[Runs]()
        if fetch is not None and pages.count() > FETCHED_AT_ONCE_PAGES:
            left = await self._send_in_parts(pages, round_number, last, fetch)
            pages = PageBitmap(self._pages)
        elif fetch is not None:
            await fetch(pages)
        left += await self._send_part(pages, round_number, last=last)
        records = tuple(sender.records_at_barrier for sender in self._senders)
        after = (self.pages_done, self.zero_pages, self.bytes_sent)
        done, zeros, sent = (new - old for new, old in zip(after, before, strict=True))
        return RoundSent(done, zeros, sent, records, self._unsent(left))

    async def _send_in_parts(self, pages: PageBitmap, round_number: int, last: bool, fetch: Fetch) -> list[Runs]:
        """Send *pages* without the barrier, and fetch them as they are sent. What was not sent."""
        left, begun = list[Runs](), PageBitmap(self._pages)
        for part in pages.parts(FETCHED_AT_ONCE_PAGES):
            if self._break_off.is_set() and not last:
                break
            begun |= part
            await fetch(part)
            left += await self._send_part(part, round_number, last=last, goes_on=True)
        return [*left, (pages - begun).runs()]

    async def _send_part(
        self, pages: PageBitmap, round_number: int, *, last: bool, goes_on: bool = False
    ) -> list[Runs]:
        """As `StreamSender.send_round`, on every stream."""
        count = pages.count()
        if count > _DEALT_OUT_AT_ONCE_PAGES:
            shares = await trio.to_thread.run_sync(self._deal_out, pages)
        else:
            shares = self._deal_out(pages)
        stop = None if last else self._break_off
        calls = [
            partial(sender.send_round, runs, round_number, last=last, goes_on=goes_on, break_off=stop)
            for sender, runs in zip(self._senders, shares, strict=True)
        ]
        # Paced streams have a part of the speed each: one after the other would be as slow as one.
        threads = [calls] if count <= _SENT_IN_TURN_PAGES and not self._is_paced else [[call] for call in calls]
        left = await run_all_joined(
            [partial(_in_turn, calls_of_one) for calls_of_one in threads], end=self._shut_down, limiter=self._limiter
        )
        return list(chain.from_iterable(left))

    def _deal_out(self, pages: PageBitmap) -> list[Runs]:
        """What each stream sends. Over a large guest this takes a while: not for the event loop."""
        return [cut_at(runs, self._cuts) for runs in runs_per_stream(pages, len(self._senders))]

    def _shut_down(self) -> None:
        for sender in self._senders:
            sender.link.shutdown()

    def _unsent(self, left: list[Runs]) -> PageBitmap | None:
        if not any(map(len, left)):
            return None
        return PageBitmap.from_runs(self._pages, np.concatenate(left))

    def close(self) -> None:
        """Close all links. No thread uses them any more: every send joins its thread before it returns."""
        self._shut_down()
        for sender in self._senders:
            sender.link.close()


def _in_turn(calls: Sequence[Callable[[], Runs]]) -> list[Runs]:
    return [call() for call in calls]


def region_boundaries(layout: RamLayout) -> tuple[int, ...]:
    """Page numbers where one region ends and the next begins."""
    return tuple(layout.first_page(region) for region in layout.regions[1:])
