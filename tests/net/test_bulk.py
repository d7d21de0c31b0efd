"""What bulk streams promise: RAM sent is RAM received, nothing else is written, and every thread comes home."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import trio
import trio.lowlevel
import trio.testing
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from vmmigrate.errors import RemoteProtocolError, TransportError
from vmmigrate.memory import PAGE_SIZE, PageBitmap, RamLayout
from vmmigrate.net.door import SEALED, TLS
from vmmigrate.net.links import ReceiveLink, SendLink
from vmmigrate.net.receiving import BulkDestination
from vmmigrate.net.sealed import MAX_PART_BYTES
from vmmigrate.net.sending import BulkSource, RoundSent
from vmmigrate.net.threads import open_group
from vmmigrate.net.tls import TlsFiles, client_context, server_context
from vmmigrate.ram.digest import condense
from vmmigrate.ram.encoding import DELTA, RAW, WORDS, ZERO, ZSTD
from vmmigrate.ram.records import HEADER, MAX_RECORD_PAGES, MAX_ZERO_RUNS, RUN_DTYPE, STRIPE_PAGES, RecordKind
from vmmigrate.ram.worth import Worth

from .bulk_pair import (
    PAGE_HASH,
    WAIT_S,
    Contexts,
    Eager,
    Pages,
    Ram,
    bitmap_of,
    content,
    layout_of,
    link_pair,
    open_pair,
    threads_in,
)

BULK = ("vmmigrate.net.sending", "vmmigrate.net.receiving")
SIZES = [
    pytest.param((1,), id="1 page"),
    pytest.param((STRIPE_PAGES - 1,), id="one page less than a stripe"),
    pytest.param((STRIPE_PAGES,), id="a stripe"),
    pytest.param((STRIPE_PAGES + 1,), id="a stripe and a page"),
    pytest.param((2 * STRIPE_PAGES + 1,), id="two stripes and a page"),
    pytest.param((STRIPE_PAGES - 13, STRIPE_PAGES + 7), id="two regions with a hole between"),
    pytest.param((1, 1, 1), id="regions of one page"),
]
SHAPES: dict[str, Callable[[int], range]] = {
    "contiguous": range,
    "alternating": lambda pages: range(0, pages, 2),
    "one of five": lambda pages: range(pages % 5, pages, 5),
}


@pytest.fixture(scope="session", params=[SEALED, TLS])
def contexts(request: pytest.FixtureRequest, source_files: TlsFiles, destination_files: TlsFiles) -> Contexts:
    return Contexts(server_context(source_files), client_context(destination_files), request.param)


# --------------------------------------------------------------------------- what is sent arrives


@pytest.mark.parametrize("streams", [1, 2, 3])
@pytest.mark.parametrize("region_pages", SIZES)
async def test_ram_sent_is_ram_received(contexts: Contexts, region_pages: tuple[int, ...], streams: int) -> None:
    layout = layout_of(*region_pages)
    async with open_pair(contexts, layout, streams) as pair:
        pair.source_ram.pages[:] = content(layout.pages, 1)

        sent = await pair.run_round(PageBitmap.full(layout.pages), 1)

        assert pair.is_equal()
        assert condense(pair.source.table) == condense(pair.destination.table)
        assert (sent.pages, sent.zero_pages) == (layout.pages, 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zeros", ["no zero pages", "every third page zero", "only zero pages"])
@pytest.mark.parametrize("streams", [1, 2])
async def test_pages_of_every_shape_arrive_and_no_others(
    contexts: Contexts, shape: str, zeros: str, streams: int
) -> None:
    """Zero pages amid others split a record where stripes and regions meet, too."""
    layout = layout_of(STRIPE_PAGES + 70, STRIPE_PAGES + 70)
    offered = list(SHAPES[shape](layout.pages))
    async with open_pair(contexts, layout, streams) as pair:
        pages = content(layout.pages, 2)
        pages[:: {"no zero pages": layout.pages, "every third page zero": 3, "only zero pages": 1}[zeros]] = 0
        pair.source_ram.pages[offered] = pages[offered]

        sent = await pair.run_round(bitmap_of(layout, offered), 1)

        assert sent.pages == len(offered)
        written = np.flatnonzero(pair.source_ram.pages.any(axis=1))
        assert pair.destination_ram.populated() == set(written.tolist())  # first: comparing fills holes
        assert pair.is_equal()


@pytest.mark.parametrize("encodings", [(RAW, ZERO), WORDS], ids=["as they are", "compressed"])
@pytest.mark.parametrize("streams", [1, 2])
async def test_pages_that_are_not_there_are_filled_and_the_others_written(
    contexts: Contexts, encodings: tuple[str, ...], streams: int
) -> None:
    """Some are there before the first round: the guest's own process may have touched them."""
    layout = layout_of(STRIPE_PAGES + 70, STRIPE_PAGES + 70)
    there = [0, 3, STRIPE_PAGES + 70, layout.pages - 1]
    async with open_pair(contexts, layout, streams, encodings=encodings, fills=True) as pair:
        pair.destination_ram.pages[there] = 7
        pair.source_ram.pages[:] = content(layout.pages, 3)
        pair.source_ram.pages[100:140] = 0
        pair.source_ram.pages[200:260:2] = 0  # too short between them to be worth a call each

        await pair.run_round(PageBitmap.full(layout.pages), 1)

        written = np.flatnonzero(pair.source_ram.pages.any(axis=1))
        assert pair.destination_ram.populated() == set(written.tolist())  # first: comparing fills holes
        assert pair.is_equal()
        pair.source_ram.pages[:] = content(layout.pages, 4)
        await pair.run_round(PageBitmap.full(layout.pages), 2)
        assert pair.is_equal()


@st.composite
def rounds(draw: st.DrawFn) -> list[tuple[list[tuple[int, int]], int, int]]:
    """Per round: runs of pages to change, a seed, and which of the pages becomes zero (every n-th)."""
    run = st.tuples(st.integers(0, 1299), st.integers(1, 700))
    one = st.tuples(st.lists(run, max_size=6), st.integers(0, 1 << 32), st.integers(1, 9))
    return draw(st.lists(one, min_size=1, max_size=4))


@settings(max_examples=25)
@given(rounds(), st.integers(1, 3), st.booleans())
async def test_ram_and_digests_are_equal_after_any_sequence_of_rounds(
    contexts: Contexts, plan: list[tuple[list[tuple[int, int]], int, int]], streams: int, fills: bool
) -> None:
    """Pages that were zero come and go; scattered and whole; across stripes and over the hole between two regions."""
    layout = layout_of(600, 700)
    async with open_pair(contexts, layout, streams, fills=fills) as pair:
        for number, (runs, seed, every) in enumerate(plan, 1):
            dirty = PageBitmap(layout.pages)
            for first, count in runs:
                dirty.add_run(first, min(count, layout.pages - first))
            numbers = dirty.page_numbers()
            pair.source_ram.pages[numbers] = content(len(numbers), seed)
            pair.source_ram.pages[numbers[::every]] = 0

            sent = await pair.run_round(dirty, number)

            assert pair.is_equal()
            assert (sent.pages, sent.zero_pages) == (len(numbers), len(numbers[::every]))


@st.composite
def rewrites(draw: st.DrawFn) -> list[tuple[list[tuple[int, int]], int, str]]:
    """Per round: runs of pages, a seed, and how they are rewritten."""
    run = st.tuples(st.integers(0, 1299), st.integers(1, 400))
    how = st.sampled_from(["whole", "a word of each", "compressible", "zeros", "not at all"])
    one = st.tuples(st.lists(run, max_size=4), st.integers(0, 1 << 32), how)
    return draw(st.lists(one, min_size=2, max_size=6))


class Fickle(Worth):
    """A judge who keeps changing its mind, at any page: what was a base a moment ago is none any more."""

    is_dear = is_slow = True

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)

    def pays(self, way: str) -> bool:
        return self._random.random() < 0.7

    def wants_sample(self, way: str) -> bool:
        return True


JUDGES = st.just(Eager) | st.integers(0, 1 << 32).map(lambda seed: partial(Fickle, seed))


@settings(max_examples=40)
@given(rewrites(), st.integers(1, 3), st.sets(st.sampled_from([ZSTD, DELTA])), st.sampled_from([0, 64, 4096]), JUDGES)
async def test_ram_and_digests_are_equal_however_pages_are_encoded(
    contexts: Contexts,
    plan: list[tuple[list[tuple[int, int]], int, str]],
    streams: int,
    encodings: set[str],
    cache_pages: int,
    judge: Callable[[], Worth],
) -> None:
    layout = layout_of(600, 700)
    options = {"encodings": (RAW, ZERO, *encodings), "delta_cache_bytes": cache_pages * PAGE_SIZE}
    async with open_pair(contexts, layout, streams, judge=judge, **options) as pair:
        for number, (runs, seed, how) in enumerate(plan, 1):
            dirty = PageBitmap(layout.pages)
            for first, count in runs:
                dirty.add_run(first, min(count, layout.pages - first))
            rewrite(pair.source_ram.pages, dirty.page_numbers(), seed, how)

            await pair.run_round(dirty, number)

            assert pair.is_equal()


def rewrite(ram: Pages, numbers: npt.NDArray[np.int64], seed: int, how: str) -> None:
    noise = np.random.default_rng(seed).integers(1, 1 << 63, (len(numbers), ram.shape[1]), dtype=np.uint64)
    if how == "whole":
        ram[numbers] = noise
    elif how == "a word of each":
        ram[numbers, seed % ram.shape[1]] = noise[:, 0]
    elif how == "compressible":
        ram[numbers] = noise[:, :1]
    elif how == "zeros":
        ram[numbers] = 0


class Capped(Worth):
    """The judge of a link of which it is known that it carries no more than a byte per microsecond."""

    def __init__(self) -> None:
        super().__init__()
        self.paced_s_per_byte = 1e-6


async def test_what_compresses_is_compressed_on_a_slow_link_though_there_is_but_one_round(contexts: Contexts) -> None:
    """As for a guest that is paused already: nothing was learnt in a round before."""
    layout = layout_of(4 * STRIPE_PAGES)
    async with open_pair(contexts, layout, 1, encodings=(RAW, ZERO, ZSTD), judge=Capped) as pair:
        rewrite(pair.source_ram.pages, np.arange(layout.pages), 1, "compressible")

        await pair.run_round(PageBitmap.full(layout.pages), 1, last=True)

        assert pair.is_equal()
        assert pair.source.tally.pages[ZSTD] >= layout.pages - MAX_RECORD_PAGES


@pytest.mark.parametrize("streams", [1, 3])
async def test_what_changes_little_is_sent_as_little(contexts: Contexts, streams: int) -> None:
    """A word of each page, over and over: from the third time on only that travels, on every stream."""
    layout = layout_of(6 * STRIPE_PAGES)
    options = {"encodings": (RAW, ZERO, DELTA), "delta_cache_bytes": layout.size_bytes}
    async with open_pair(contexts, layout, streams, **options) as pair:
        rewrite(pair.source_ram.pages, np.arange(layout.pages), 1, "whole")
        sent = []
        for number in range(1, 5):
            pair.source_ram.pages[:, number] += np.uint64(number)
            sent.append((await pair.run_round(PageBitmap.full(layout.pages), number)).bytes_sent)

        assert pair.is_equal()
        assert min(sent[:2]) > layout.size_bytes
        assert max(sent[2:]) * 5 < layout.size_bytes
        assert pair.source.tally.pages[DELTA] == 2 * layout.pages
        assert pair.source.bytes_sent == sum(sent) == pair.destination.bytes_received


async def test_a_new_session_knows_no_copies_and_makes_no_deltas_to_them(contexts: Contexts) -> None:
    """What of the cut session has landed is told by the destination; what was kept here is gone with the session."""
    layout = layout_of(64)
    options = {"encodings": (RAW, ZERO, DELTA), "delta_cache_bytes": layout.size_bytes}
    async with open_pair(contexts, layout, 1, **options) as pair:
        rewrite(pair.source_ram.pages, np.arange(64), 1, "whole")
        for number in (1, 2):
            await pair.run_round(PageBitmap.full(64), number)
        table, landing = pair.source.table, pair.destination.landing
        link, peer = link_pair(contexts)
        options = {"encodings": (RAW, ZERO, DELTA)}
        ram = pair.source_ram.read_only()
        again = BulkSource(
            [link], layout, ram, PAGE_HASH, table, delta_cache_bytes=layout.size_bytes, judge=Eager, **options
        )
        there = BulkDestination([peer], layout, pair.destination_ram.pages, PAGE_HASH, landing, **options)
        async with open_group() as nursery:
            nursery.start_soon(there.receive_forever)
            pair.source_ram.pages[:, 5] += np.uint64(1)

            sent = await again.send_round(PageBitmap.full(64), 3)
            await there.wait_round(3, sent.records)

            assert again.tally.pages[DELTA] == 0
            assert pair.is_equal()
            nursery.cancel_scope.cancel()
        again.close()
        there.close()


async def test_a_round_that_is_broken_off_tells_what_it_has_not_sent(contexts: Contexts) -> None:
    """And nothing is lost: what it sent has landed, the rest goes with the next round."""
    layout = layout_of(16 * STRIPE_PAGES)
    async with open_pair(contexts, layout, 2) as pair:
        pair.source_ram.pages[:] = content(layout.pages, 11)
        results: list[RoundSent] = []

        async def send() -> None:
            results.append(await pair.source.send_round(PageBitmap.full(layout.pages), 1))

        async with open_group() as nursery:
            nursery.start_soon(send)
            while not pair.source.pages_done:
                await trio.lowlevel.checkpoint()
            pair.source.break_off()
        (first,) = results
        await pair.destination.wait_round(1, first.records)

        assert first.unsent is not None
        assert first.pages + first.unsent.count() == layout.pages
        landed = pair.destination.written
        assert not (landed & first.unsent.flags()).any()
        second = await pair.run_round(first.unsent, 2)
        assert second.unsent is None
        assert pair.is_equal()


async def test_the_last_round_is_never_broken_off(contexts: Contexts) -> None:
    layout = layout_of(16 * STRIPE_PAGES)
    async with open_pair(contexts, layout, 2) as pair:
        pair.source_ram.pages[:] = content(layout.pages, 12)
        results: list[RoundSent] = []

        async def send() -> None:
            results.append(await pair.run_round(PageBitmap.full(layout.pages), 1, last=True))

        async with open_group() as nursery:
            nursery.start_soon(send)
            while not pair.source.pages_done:
                await trio.lowlevel.checkpoint()
            pair.source.break_off()

        assert results[0].unsent is None
        assert pair.is_equal()


@pytest.mark.parametrize("streams", [1, 3])
async def test_a_limit_on_the_speed_is_shared_by_the_streams_and_can_be_lifted(
    contexts: Contexts, streams: int
) -> None:
    """The kernel keeps it; how well is not ours to test."""
    layout = layout_of(4)
    async with open_pair(contexts, layout, streams) as pair:
        pair.source.pace(30 << 20)
        assert [pacing_rate_of(sender.link) for sender in pair.source._senders] == [(30 << 20) // streams] * streams

        pair.source.pace(0)
        assert [pacing_rate_of(sender.link) for sender in pair.source._senders] == [(1 << 64) - 1] * streams

        await pair.run_round(PageBitmap.full(4), 1)
        assert pair.is_equal()


def pacing_rate_of(link: Any) -> int:
    (rate,) = struct.unpack("Q", link._sock.getsockopt(socket.SOL_SOCKET, 47, 8))
    return int(rate)


def test_a_link_that_is_gone_waits_for_nothing_and_takes_any_limit(contexts: Contexts) -> None:
    ours, theirs = link_pair(contexts)
    theirs.close()
    ours.close()

    assert ours.unsent_bytes() == 0
    ours.pace(1000)


@settings(max_examples=25)
@given(st.lists(st.booleans(), min_size=40, max_size=40), st.lists(st.booleans(), min_size=40, max_size=40))
async def test_any_pages_may_be_zero_where_stripes_and_regions_meet(
    contexts: Contexts, offered: list[bool], zero: list[bool]
) -> None:
    """One stream owns both neighbours, so that its runs would join across the seam."""
    layout = layout_of(STRIPE_PAGES + 10, 10)
    first = STRIPE_PAGES - 20
    async with open_pair(contexts, layout, 1) as pair:
        pair.source_ram.pages[first:] = content(40, 3)
        pair.source_ram.pages[first:][zero] = 0
        pair.source_ram.pages[first:][~np.array(offered)] = 0

        await pair.run_round(bitmap_of(layout, (first + np.flatnonzero(offered)).tolist()), 1)

        assert pair.is_equal()


async def test_zero_pages_go_whole_to_a_destination_that_does_not_know_them_by_name(contexts: Contexts) -> None:
    layout = layout_of(2 * STRIPE_PAGES)
    for judge in (Worth, Eager):
        async with open_pair(contexts, layout, 2, encodings=(RAW,), judge=judge) as pair:
            pair.source_ram.pages[:] = 0
            pair.source_ram.pages[7] = 7

            sent = await pair.run_round(PageBitmap.full(layout.pages), 1)

            assert (sent.zero_pages, sent.bytes_sent > layout.size_bytes) == (0, True)
            assert pair.is_equal()


async def test_zero_pages_do_not_travel_and_do_not_fill_the_destination(contexts: Contexts) -> None:
    layout = layout_of(2 * STRIPE_PAGES)
    async with open_pair(contexts, layout, 2) as pair:
        pair.source_ram.pages[:] = 0
        pair.source_ram.pages[7] = 7
        assert len(pair.source_ram.populated()) == layout.pages

        sent = await pair.run_round(PageBitmap.full(layout.pages), 1)

        assert sent.zero_pages == layout.pages - 1
        assert sent.bytes_sent < 2 * PAGE_SIZE
        assert pair.destination_ram.populated() == {7}


async def test_more_zero_runs_than_a_record_holds_travel_in_several(contexts: Contexts) -> None:
    layout = layout_of(4 * MAX_ZERO_RUNS + 2)
    async with open_pair(contexts, layout, 1) as pair:
        offered = range(0, layout.pages, 2)

        sent = await pair.run_round(bitmap_of(layout, offered), 1)

        assert (sent.zero_pages, sent.records) == (len(offered), (4,))  # 2 × 4096 + 1 runs, and the barrier
        assert pair.destination_ram.populated() == set()


async def test_a_page_that_becomes_zero_later_is_zeroed_at_the_destination(contexts: Contexts) -> None:
    layout = layout_of(STRIPE_PAGES)
    async with open_pair(contexts, layout, 2) as pair:
        pair.source_ram.pages[:10] = content(10, 4)
        await pair.run_round(bitmap_of(layout, range(10)), 1)
        pair.source_ram.pages[3:5] = 0

        await pair.run_round(bitmap_of(layout, [3, 4, 100]), 2)

        assert pair.destination_ram.populated() == set(range(10))  # page 100 was never written: it stays a hole
        assert not pair.destination.table[3:5].any()
        assert pair.is_equal()


async def test_a_page_that_arrived_wrong_makes_the_digests_differ(contexts: Contexts) -> None:
    """The destination hashes what landed."""
    layout = layout_of(4)
    async with open_pair(contexts, layout, 1) as pair:
        pair.source_ram.pages[:] = content(4, 5)
        await pair.run_round(PageBitmap.full(4), 1)
        pair.source_ram.pages[2, 9] ^= np.uint64(1 << 63)
        pair.source.table[2] = PAGE_HASH.of(pair.source_ram.pages[2:3])[0]  # sent, says the source; but nothing was

        await pair.run_round(PageBitmap(4), 2)

        assert condense(pair.source.table) != condense(pair.destination.table)


async def test_counts_of_a_round_add_up(contexts: Contexts) -> None:
    layout = layout_of(3 * STRIPE_PAGES)
    async with open_pair(contexts, layout, 2) as pair:
        pair.source_ram.pages[: 2 * STRIPE_PAGES] = content(2 * STRIPE_PAGES, 6)

        first = await pair.run_round(PageBitmap.full(layout.pages), 1)
        second = await pair.run_round(bitmap_of(layout, [0]), 2, last=True)
        with trio.fail_after(WAIT_S):
            await pair.destination.wait_end()

        # Stream 0 has stripes 0 and 2 (the zeros), stream 1 has stripe 1. A record holds half a stripe.
        assert first.records == (4, 3)
        assert (first.pages, first.zero_pages) == (3 * STRIPE_PAGES, STRIPE_PAGES)
        runs = 2 + 2 + 1  # of the zeros, too: they are noted by the stripe
        assert first.bytes_sent == 7 * HEADER.size + runs * RUN_DTYPE.itemsize + 2 * STRIPE_PAGES * PAGE_SIZE
        assert second.records == (6, 4)
        assert second.bytes_sent == PAGE_SIZE + RUN_DTYPE.itemsize + 5 * HEADER.size  # two of them say END
        assert pair.source.pages_done == first.pages + second.pages
        assert pair.source.zero_pages == first.zero_pages
        assert pair.source.bytes_sent == first.bytes_sent + second.bytes_sent == pair.destination.bytes_received


# --------------------------------------------------------------------------- rounds, barriers, the end


async def test_a_barrier_waits_for_all_streams(contexts: Contexts) -> None:
    layout = layout_of(2 * STRIPE_PAGES)
    with Raw(contexts, layout, 2) as raw, trio.fail_after(WAIT_S):
        async with open_group() as nursery:
            nursery.start_soon(raw.destination.receive_forever)
            reached = trio.Event()

            async def wait() -> None:
                await raw.destination.wait_round(1, (1, 1))
                reached.set()

            nursery.start_soon(wait)
            raw.send(barrier(1), stream=0)
            while raw.destination.bytes_received < HEADER.size:
                await trio.testing.wait_all_tasks_blocked(0.001)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not reached.is_set()

            raw.send(barrier(1), stream=1)
            await reached.wait()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("said", [(1, 2), (2, 1), (1,), (1, 1, 1), (0, 0)])
async def test_a_wrong_number_of_records_is_refused(contexts: Contexts, said: tuple[int, ...]) -> None:
    """The control channel is what authenticates the count."""
    layout = layout_of(2)
    async with open_pair(contexts, layout, 2) as pair:
        sent = await pair.source.send_round(PageBitmap(2), 1)
        assert sent.records == (1, 1)

        with pytest.raises(RemoteProtocolError) as caught:
            await pair.destination.wait_round(1, said)

    assert caught.value.code == "bad_record"


async def test_the_end_of_all_streams_ends_receiving(contexts: Contexts) -> None:
    layout = layout_of(STRIPE_PAGES)
    with trio.fail_after(WAIT_S):
        async with open_pair(contexts, layout, 3) as pair:
            pair.source_ram.pages[:] = content(layout.pages, 7)

            await pair.run_round(PageBitmap.full(layout.pages), 1, last=True)
            await pair.destination.wait_end()

            assert threads_in(*BULK) == []
            assert pair.is_equal()


async def test_a_round_that_a_stream_ended_before_is_refused_and_not_awaited(contexts: Contexts) -> None:
    layout = layout_of(2)
    async with open_pair(contexts, layout, 2) as pair:
        await pair.run_round(PageBitmap(2), 1, last=True)

        with pytest.raises(RemoteProtocolError, match="ended before round 2"):
            await pair.destination.wait_round(2, (2, 2))


async def test_a_barrier_before_the_last_was_answered_is_refused(contexts: Contexts) -> None:
    """Else a peer could make us remember barriers without end."""
    error = await refusal_of(contexts, [barrier(1), barrier(2, number=1)])

    assert error.code == "bad_record"


# --------------------------------------------------------------------------- hostile records


def header(
    kind: int, runs: int = 0, payload_bytes: int = 0, *, number: int = 0, round_number: int = 1, reserved: int = 0
) -> bytes:
    return HEADER.pack(kind, reserved, runs, round_number, payload_bytes, number)


def barrier(round_number: int, *, number: int = 0) -> bytes:
    return header(RecordKind.BARRIER, round_number=round_number, number=number)


def record(kind: RecordKind, *runs: tuple[int, int], payload_pages: int | None = None, number: int = 0) -> bytes:
    """A record whose pages are full of ones; runs are (gpa, pages)."""
    table = np.array(list(runs), dtype=RUN_DTYPE).tobytes()
    pages = sum(count for _, count in runs) if payload_pages is None else payload_pages
    payload = b"\x01" * (PAGE_SIZE * pages) if kind is RecordKind.PAGES else b""
    return header(kind, len(runs), len(payload), number=number) + table + payload


def parts_of(raw: bytes) -> Iterator[bytes]:
    """*raw* cut as a receiver will ask for it, as far as it goes: header, table, pages; header, ..."""
    while raw:
        sizes = [HEADER.size]
        if len(raw) >= HEADER.size:
            _, _, runs, _, payload_bytes, _ = HEADER.unpack(raw[: HEADER.size])
            sizes += [runs * RUN_DTYPE.itemsize, payload_bytes]
        for size in sizes:
            part, raw = raw[:size], raw[size:]
            yield from (part[at : at + MAX_PART_BYTES] for at in range(0, len(part), MAX_PART_BYTES))


class Raw:
    """A destination, and links of a source that says whatever it wants."""

    def __init__(
        self,
        contexts: Contexts,
        layout: RamLayout,
        streams: int,
        links: list[tuple[SendLink, ReceiveLink]] | None = None,
        encodings: Sequence[str] = (RAW, ZERO),
    ) -> None:
        self.links = links or [link_pair(contexts) for _ in range(streams)]
        self.ram = Ram(layout)
        self.destination = BulkDestination(
            [link for _, link in self.links], layout, self.ram.pages, PAGE_HASH, encodings=encodings
        )

    def send(self, *records: bytes, stream: int = 0) -> None:
        for raw in records:
            self.links[stream][0].send(*parts_of(raw))

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.destination.close()
        for source, _ in self.links:
            source.close()
        self.ram.close()


HOSTILE_LAYOUT = layout_of(2 * STRIPE_PAGES + 100, 50)
END_OF_LOW = (2 * STRIPE_PAGES + 100) * PAGE_SIZE
HIGH = HOSTILE_LAYOUT.regions[1].gpa
PAGES, ZEROS = RecordKind.PAGES, RecordKind.ZERO
HOSTILE = {
    "a foreign stripe": record(PAGES, (STRIPE_PAGES * PAGE_SIZE, 1)),
    "a foreign stripe, zeroed": record(ZEROS, (STRIPE_PAGES * PAGE_SIZE, 1)),
    "a foreign stripe beside an own one": record(PAGES, (0, 1), (STRIPE_PAGES * PAGE_SIZE, 1)),
    "a run into the next stripe": record(PAGES, ((STRIPE_PAGES - 1) * PAGE_SIZE, 2)),
    "a zero run into the next stripe": record(ZEROS, ((STRIPE_PAGES - 1) * PAGE_SIZE, 2)),
    "beyond the last region": record(PAGES, (HIGH + 50 * PAGE_SIZE, 1)),
    "in the hole": record(PAGES, (END_OF_LOW, 1)),
    "a run into the hole": record(PAGES, (END_OF_LOW - PAGE_SIZE, 2)),
    "far away": record(PAGES, (1 << 51, 1)),
    "beyond a signed address": record(ZEROS, (1 << 63, 1)),
    "an address that wraps around": record(ZEROS, ((1 << 64) - PAGE_SIZE, 2)),
    "not aligned": record(PAGES, (8, 1)),
    "an empty run": record(PAGES, (0, 0), payload_pages=1),
    "an enormous run": record(ZEROS, (0, (1 << 32) - 1)),
    "overlapping runs": record(PAGES, (0, 3), (2 * PAGE_SIZE, 1)),
    "the same page twice": record(PAGES, (0, 1), (0, 1)),
    "descending runs": record(PAGES, (4 * PAGE_SIZE, 1), (0, 1)),
    "more payload than runs": record(PAGES, (0, 1), payload_pages=2),
    "less payload than runs": record(PAGES, (0, 2), payload_pages=1),
    "more pages than a record holds": record(PAGES, (0, MAX_RECORD_PAGES + 1)),
    "more payload than a record holds": header(PAGES, 1, (1 << 32) - 1),
    "more runs than a record holds": header(PAGES, MAX_RECORD_PAGES + 1, PAGE_SIZE),
    "more zero runs than a record holds": header(ZEROS, MAX_ZERO_RUNS + 1),
    "pages without runs": header(PAGES, 0, PAGE_SIZE),
    "zeros with payload": header(ZEROS, 1, PAGE_SIZE),
    "a barrier with payload": header(RecordKind.BARRIER, 0, PAGE_SIZE),
    "an end with runs": header(RecordKind.END, 1),
    "an unknown kind": header(9),
    "kind zero": header(0),
    "reserved bits": header(RecordKind.BARRIER, reserved=1),
    "compressed pages that were not agreed upon": header(RecordKind.ZSTD, 1, 100),
    "a delta that was not agreed upon": header(RecordKind.DELTA, 1, 100),
    "out of sequence": header(RecordKind.BARRIER, number=1),
    "the same number twice": barrier(1) + header(RecordKind.END, number=0),
}


async def refusal_of(contexts: Contexts, records: list[bytes], streams: int = 2) -> RemoteProtocolError:
    """What stream 0 says to *records*; nothing may have been written."""
    with Raw(contexts, HOSTILE_LAYOUT, streams) as raw:
        raw.send(*records)
        with pytest.raises(RemoteProtocolError) as caught, trio.fail_after(WAIT_S):
            await raw.destination.receive_forever()
        assert threads_in(*BULK) == []
        assert raw.ram.populated() == set()
        assert not raw.destination.written.any()
    return caught.value


@pytest.mark.parametrize("wrong", HOSTILE)
async def test_a_hostile_record_is_refused_and_nothing_is_written(contexts: Contexts, wrong: str) -> None:
    error = await refusal_of(contexts, [HOSTILE[wrong]])

    assert error.code == "bad_record"


def packed(kind: RecordKind, frame: bytes, *parts: bytes, pages: int = 2) -> list[bytes]:
    """The parts of a compressed record of *pages* pages at address zero."""
    return [header(kind, 1, len(frame)), np.array([(0, pages)], dtype=RUN_DTYPE).tobytes(), *parts, frame]


FRAME = zstandard.ZstdCompressor().compress(b"\x01" * 2 * PAGE_SIZE)
BASES = bytes(16)  # of two pages that were never written
PACKED_WRONGLY = {
    "pages that do not decompress": packed(RecordKind.ZSTD, b"not a frame"),
    "more pages than their runs": packed(RecordKind.ZSTD, FRAME, pages=1),
    "fewer pages than their runs": packed(RecordKind.ZSTD, FRAME, pages=3),
    "a delta that does not decompress": packed(RecordKind.DELTA, b"not a frame", BASES),
    "a delta of more pages": packed(RecordKind.DELTA, FRAME, bytes(8), pages=1),
    "a delta to other pages": packed(RecordKind.DELTA, FRAME, bytes(8) + b"\0\0\0\0\0\0\0\1"),
}


@pytest.mark.parametrize("wrong", PACKED_WRONGLY)
async def test_pages_that_are_packed_wrongly_are_a_breach_and_do_not_land(contexts: Contexts, wrong: str) -> None:
    with Raw(contexts, HOSTILE_LAYOUT, 2, encodings=WORDS) as raw:
        raw.links[0][0].send(*PACKED_WRONGLY[wrong])

        with pytest.raises(RemoteProtocolError) as caught, trio.fail_after(WAIT_S):
            await raw.destination.receive_forever()

        assert caught.value.code == "bad_record"
        assert raw.destination.landing.breach is caught.value
        assert raw.ram.populated() == set()


async def test_a_delta_to_the_right_pages_lands(contexts: Contexts) -> None:
    """What the ones above are one step away from."""
    with Raw(contexts, HOSTILE_LAYOUT, 1, encodings=WORDS) as raw, trio.fail_after(WAIT_S):
        async with open_group() as nursery:
            nursery.start_soon(raw.destination.receive_forever)
            raw.links[0][0].send(*packed(RecordKind.DELTA, FRAME, BASES))
            raw.send(barrier(1, number=1))
            await raw.destination.wait_round(1, (2,))
            nursery.cancel_scope.cancel()

        assert (raw.ram.pages[:2] == 0x0101010101010101).all()
        assert raw.destination.table[:2].tolist() == PAGE_HASH.of(raw.ram.pages[:2]).tolist()


@settings(max_examples=30)
@given(st.binary(min_size=HEADER.size, max_size=400))
async def test_arbitrary_bytes_never_reach_guest_ram(contexts: Contexts, noise: bytes) -> None:
    with Raw(contexts, HOSTILE_LAYOUT, 1) as raw:
        raw.send(noise)
        raw.links[0][0].shutdown()

        with pytest.raises((RemoteProtocolError, TransportError)), trio.fail_after(WAIT_S):
            await raw.destination.receive_forever()

        assert raw.ram.populated() == set()


async def test_a_record_that_is_refused_leaves_what_came_before_it(contexts: Contexts) -> None:
    with Raw(contexts, HOSTILE_LAYOUT, 2) as raw:
        raw.send(record(PAGES, (0, 2)), record(PAGES, (STRIPE_PAGES * PAGE_SIZE, 1), number=1))

        with pytest.raises(RemoteProtocolError), trio.fail_after(WAIT_S):
            await raw.destination.receive_forever()

        assert raw.ram.populated() == {0, 1}


# --------------------------------------------------------------------------- cancel, cut, stall


class Witness:
    """A link that writes down who used it when."""

    def __init__(self, link: Any) -> None:
        self.link = link
        self.events: list[str] = []
        self.entered = threading.Event()

    def send(self, *parts: memoryview | bytes) -> None:
        self.entered.set()
        with self._noted():
            self.link.send(*parts)

    def unsent_bytes(self) -> int:
        return int(self.link.unsent_bytes())

    def pace(self, bytes_per_s: int) -> None:
        self.link.pace(bytes_per_s)

    def receive_into(self, target: memoryview) -> None:
        if len(target) >= PAGE_SIZE:
            self.entered.set()
        with self._noted():
            self.link.receive_into(target)

    def await_into(self, target: memoryview) -> None:
        with self._noted():
            self.link.await_into(target)

    @contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.events.append("left")

    def shutdown(self) -> None:
        self.events.append("shutdown")
        self.link.shutdown()

    def close(self) -> None:
        self.events.append("close")
        self.link.close()


def is_open(link: Any) -> bool:
    return bool(link._sock.fileno() != -1)


async def wait_something_sent(link: Any) -> None:
    """Until the source has sent something that nobody has received."""
    await trio.lowlevel.wait_readable(link._sock)


def assert_joined_before_closed(link: Witness) -> None:
    shut, left, closed = (link.events.index(name) for name in ("shutdown", "left", "close"))
    last_left = len(link.events) - 1 - link.events[::-1].index("left")
    assert last_left < closed, link.events
    assert shut < closed, link.events
    assert left < closed, link.events


async def test_cancel_in_the_middle_of_a_big_send_ends_at_once_with_its_threads_joined(contexts: Contexts) -> None:
    layout = layout_of(8192)  # 32 MiB: more than two sockets buffer
    pairs = [link_pair(contexts) for _ in range(2)]
    links = [Witness(source) for source, _ in pairs]
    with closing(Ram(layout)) as ram, closing(pairs[0][1]), closing(pairs[1][1]):
        ram.pages[:] = content(layout.pages, 8)
        source = BulkSource(links, layout, ram.read_only(), PAGE_HASH)
        with trio.fail_after(WAIT_S):
            async with open_group() as nursery:
                nursery.start_soon(source.send_round, PageBitmap.full(layout.pages), 1)
                for _, peer in pairs:
                    await wait_something_sent(peer)
                assert len(threads_in(*BULK)) == 2
                nursery.cancel_scope.cancel()

        assert threads_in(*BULK) == []
        source.close()
        for link in links:
            assert_joined_before_closed(link)


async def test_cancel_in_the_middle_of_a_receive_ends_at_once_with_its_threads_joined(contexts: Contexts) -> None:
    pairs = [link_pair(contexts) for _ in range(2)]
    links = [Witness(destination) for _, destination in pairs]
    sources = [source for source, _ in pairs]
    with Raw(contexts, HOSTILE_LAYOUT, 2, list(zip(sources, links, strict=True))) as raw:
        with trio.fail_after(WAIT_S):
            async with open_group() as nursery:
                nursery.start_soon(raw.destination.receive_forever)
                raw.send(record(PAGES, (0, 3))[:-PAGE_SIZE])
                await trio.to_thread.run_sync(links[0].entered.wait)
                nursery.cancel_scope.cancel()

        assert threads_in(*BULK) == []
        assert all(is_open(link) for _, link in pairs)  # still open: only the owner closes
    assert_joined_before_closed(links[0])


async def test_cancel_ends_a_destination_that_waits_for_the_next_round(contexts: Contexts) -> None:
    with Raw(contexts, HOSTILE_LAYOUT, 3) as raw, trio.fail_after(WAIT_S):
        async with open_group() as nursery:
            nursery.start_soon(raw.destination.receive_forever)
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()

        assert threads_in(*BULK) == []


async def test_a_cut_link_is_an_error_at_the_source(contexts: Contexts) -> None:
    layout = layout_of(8192)
    pairs = [link_pair(contexts) for _ in range(2)]
    with closing(Ram(layout)) as ram:
        ram.pages[:] = content(layout.pages, 9)
        source = BulkSource([link for link, _ in pairs], layout, ram.read_only(), PAGE_HASH)

        async def send_and_cut() -> None:
            async with open_group() as nursery:
                nursery.start_soon(source.send_round, PageBitmap.full(layout.pages), 1)
                await wait_something_sent(pairs[0][1])
                for _, peer in pairs:
                    peer.close()

        with pytest.raises(TransportError), trio.fail_after(WAIT_S):  # one error, though two streams fail
            await send_and_cut()

        assert threads_in(*BULK) == []
        source.close()


@pytest.mark.parametrize("said", [b"", barrier(1)[:5], record(PAGES, (0, 2))[:-100]], ids=["idle", "header", "pages"])
async def test_a_cut_link_is_one_error_at_the_destination(contexts: Contexts, said: bytes) -> None:
    """Also when both streams are cut at once, and wherever in a record."""
    with Raw(contexts, HOSTILE_LAYOUT, 2) as raw:
        if said:
            raw.send(said)
        for source, _ in raw.links:
            source.close()

        with pytest.raises(TransportError), trio.fail_after(WAIT_S):
            await raw.destination.receive_forever()

        assert threads_in(*BULK) == []


async def test_one_cut_stream_ends_the_others(contexts: Contexts) -> None:
    with Raw(contexts, HOSTILE_LAYOUT, 3) as raw:
        raw.links[1][0].close()

        with pytest.raises(TransportError), trio.fail_after(WAIT_S):
            await raw.destination.receive_forever()

        assert threads_in(*BULK) == []


async def test_many_streams_that_fail_at_once_give_one_error_and_not_a_group(contexts: Contexts) -> None:
    with Raw(contexts, HOSTILE_LAYOUT, 3) as raw:
        for stream in range(3):
            raw.send(header(9), stream=stream)

        with pytest.raises(RemoteProtocolError) as caught, trio.fail_after(WAIT_S):
            await raw.destination.receive_forever()

        assert caught.value.code == "bad_record"


@pytest.mark.parametrize(
    "said", [barrier(1)[:5], record(PAGES, (0, 2))[:30], record(PAGES, (0, 2))[:-100]], ids=["header", "runs", "pages"]
)
async def test_a_peer_that_stalls_in_a_record_is_noticed(contexts: Contexts, said: bytes) -> None:
    with Raw(contexts, HOSTILE_LAYOUT, 1, [link_pair(contexts, 0.1)]) as raw:
        raw.send(said)

        with pytest.raises(TransportError) as caught, trio.fail_after(WAIT_S):
            await raw.destination.receive_forever()

        assert caught.value.code == "stalled"


async def test_a_peer_that_is_silent_between_records_is_not_a_stalled_one(contexts: Contexts) -> None:
    """Rounds may be far apart; dead peers are for the control channel's heartbeats to notice."""
    with Raw(contexts, HOSTILE_LAYOUT, 1, [link_pair(contexts, 0.01)]) as raw, trio.fail_after(WAIT_S):
        async with open_group() as nursery:
            nursery.start_soon(raw.destination.receive_forever)
            raw.send(barrier(1))
            await raw.destination.wait_round(1, (1,))
            await trio.testing.wait_all_tasks_blocked(0.1)
            raw.send(barrier(2, number=1))
            await raw.destination.wait_round(2, (2,))
            nursery.cancel_scope.cancel()


async def test_a_peer_that_stops_reading_is_noticed(contexts: Contexts) -> None:
    layout = layout_of(8192)
    link, peer = link_pair(contexts, 0.1)
    with closing(Ram(layout)) as ram, closing(peer):
        ram.pages[:] = content(layout.pages, 10)
        source = BulkSource([link], layout, ram.read_only(), PAGE_HASH)

        with pytest.raises(TransportError) as caught, trio.fail_after(WAIT_S):
            await source.send_round(PageBitmap.full(layout.pages), 1)

        assert caught.value.code == "stalled"
        source.close()


def test_a_link_can_be_shut_down_twice_and_after_the_peer_has_gone(contexts: Contexts) -> None:
    ours, theirs = link_pair(contexts)
    theirs.close()

    ours.shutdown()
    ours.shutdown()
    ours.close()
    ours.shutdown()


def test_shutdown_does_not_free_the_file_number(contexts: Contexts) -> None:
    """Else the next connection could get it while a thread still uses it."""
    link, peer = link_pair(contexts)

    link.shutdown()

    assert is_open(link)
    link.close()
    assert not is_open(link)
    peer.close()
