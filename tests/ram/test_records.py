"""Bulk records: written, read back, and every lie in them refused."""

from __future__ import annotations

import itertools
import re
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmigrate.errors import RemoteProtocolError
from vmmigrate.memory import GIB, PAGE_SIZE, PageBitmap, RamLayout, Region, Runs, pages_in, runs_of_pages
from vmmigrate.ram.records import (
    HEADER,
    MAX_PAGES_RUNS,
    MAX_RECORD_PAGES,
    MAX_ZERO_RUNS,
    RUN_DTYPE,
    STRIPE_PAGES,
    RecordHeader,
    RecordKind,
    _unpack_table,
    index_of,
    pack_runs,
    unpack_header,
    unpack_runs,
)

# Two regions with a hole, and room for several stripes.
LOW_PAGES = 4 * STRIPE_PAGES
LAYOUT = RamLayout([Region(0, LOW_PAGES * PAGE_SIZE), Region(4 * GIB, 2 * STRIPE_PAGES * PAGE_SIZE)])
PAGES = LAYOUT.pages
HEADERS = st.builds(
    RecordHeader,
    kind=st.sampled_from([RecordKind.PAGES, RecordKind.ZSTD, RecordKind.DELTA]),
    runs=st.integers(1, MAX_PAGES_RUNS),
    round_number=st.integers(0, (1 << 32) - 1),
    payload_bytes=st.integers(1, MAX_RECORD_PAGES * PAGE_SIZE),
    number=st.integers(0, (1 << 64) - 1),
) | st.builds(
    RecordHeader,
    kind=st.sampled_from([RecordKind.BARRIER, RecordKind.END]),
    runs=st.just(0),
    round_number=st.integers(0, (1 << 32) - 1),
    payload_bytes=st.just(0),
    number=st.integers(0, (1 << 64) - 1),
)


def as_runs(*runs: tuple[int, int]) -> Runs:
    return np.array(runs, dtype=np.int64).reshape(-1, 2)


def table_of(*runs: tuple[int, int]) -> bytes:
    """A run table by address, unchecked: what a hostile peer could send."""
    return np.array(list(runs), dtype=RUN_DTYPE).tobytes()


def zeros(runs: int) -> RecordHeader:
    return RecordHeader(RecordKind.ZERO, runs, 1, 0, 0)


def read(table: bytes, header: RecordHeader | None = None, stream: int = 0, streams: int = 1) -> Runs:
    header = header or zeros(len(table) // RUN_DTYPE.itemsize)
    return unpack_runs(table, header, LAYOUT, stream, streams)


def refused(text: str) -> pytest.RaisesExc[RemoteProtocolError]:
    return pytest.raises(RemoteProtocolError, match=re.escape(text), check=lambda exc: exc.code == "bad_record")


# --------------------------------------------------------------------------- one run and many


@given(
    gpa=st.integers(0, (1 << 64) - 1)
    | st.integers(0, 6 * STRIPE_PAGES).map(lambda page: page * PAGE_SIZE)
    | st.integers(0, 3 * STRIPE_PAGES).map(lambda page: 4 * GIB + page * PAGE_SIZE),
    pages=st.integers(0, (1 << 32) - 1) | st.integers(0, 300),
    payload_pages=st.integers(0, MAX_RECORD_PAGES) | st.none(),
    streams=st.integers(1, 4),
    stream=st.integers(0, 3),
)
def test_a_single_run_is_judged_as_one_among_many(
    gpa: int, pages: int, payload_pages: int | None, streams: int, stream: int
) -> None:
    """It has a way of its own, for speed; what that says must be what the general way says, word by word."""
    payload = (pages if payload_pages is None else payload_pages) * PAGE_SIZE
    header = RecordHeader(RecordKind.PAGES, 1, 1, payload, 0)
    answers: list[object] = []
    for way in (unpack_runs, _unpack_table):
        try:
            answers.append(way(table_of((gpa, pages)), header, LAYOUT, stream, streams).tolist())
        except RemoteProtocolError as refusal:
            answers.append((refusal.code, refusal.text))

    assert answers[0] == answers[1]


@given(st.integers(0, PAGES - 1), st.integers(1, 256))
def test_a_single_run_is_written_as_one_among_many(first: int, count: int) -> None:
    run, other = (first, count), (PAGES - 1, 1)

    assert pack_runs(LAYOUT, as_runs(run)) == pack_runs(LAYOUT, as_runs(run, other))[: RUN_DTYPE.itemsize]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), min_size=1, max_size=5))
def test_an_index_selects_the_pages_of_its_runs(gaps: list[tuple[int, int]]) -> None:
    at, runs = 0, []
    for gap, count in gaps:
        runs.append((at + gap, count))
        at += gap + count
    numbers = np.arange(at + 1)

    assert numbers[index_of(as_runs(*runs))].tolist() == pages_in(as_runs(*runs)).tolist()


# --------------------------------------------------------------------------- headers


@given(HEADERS)
def test_a_header_is_read_back_as_it_was_written(header: RecordHeader) -> None:
    raw = header.pack()

    assert len(raw) == HEADER.size == 20
    assert unpack_header(raw, header.number) == header
    assert unpack_header(memoryview(bytearray(raw)), header.number) == header


def test_tags_are_never_renumbered_and_zero_is_none() -> None:
    assert {kind.name: kind.value for kind in RecordKind} == {
        "PAGES": 1,
        "ZERO": 2,
        "BARRIER": 3,
        "END": 4,
        "ZSTD": 5,
        "DELTA": 6,
    }


@pytest.mark.parametrize("tag", [0, 7, 255])
def test_an_unknown_record_is_refused(tag: int) -> None:
    with refused(f"unknown bulk record {tag}"):
        unpack_header(HEADER.pack(tag, 0, 0, 0, 0, 0), 0)


@pytest.mark.parametrize("number", [0, 6, 8, (1 << 64) - 1])
def test_a_record_out_of_sequence_is_refused(number: int) -> None:
    """A repeated or a missing record would let an old copy of a page stand."""
    with refused(f"bulk record {number} came, 7 was due"):
        unpack_header(HEADER.pack(RecordKind.BARRIER, 0, 0, 0, 0, number), 7)


@pytest.mark.parametrize(
    ("kind", "reserved", "runs", "payload_bytes"),
    [
        (RecordKind.PAGES, 1, 1, PAGE_SIZE),
        (RecordKind.PAGES, 0, 0, 0),
        (RecordKind.PAGES, 0, MAX_PAGES_RUNS + 1, PAGE_SIZE),
        (RecordKind.PAGES, 0, 1, MAX_RECORD_PAGES * PAGE_SIZE + 1),
        (RecordKind.PAGES, 0, 1, (1 << 32) - 1),
        (RecordKind.ZERO, 0, 0, 0),
        (RecordKind.ZERO, 0, 1, 1),
        (RecordKind.ZERO, 0, MAX_ZERO_RUNS + 1, 0),
        (RecordKind.BARRIER, 0, 1, 0),
        (RecordKind.BARRIER, 0, 0, 1),
        (RecordKind.END, 0, 1, 0),
        (RecordKind.END, 0, 0, 1),
        (RecordKind.END, 128, 0, 0),
        (RecordKind.ZSTD, 0, 1, 0),
        (RecordKind.ZSTD, 0, 0, 100),
        (RecordKind.ZSTD, 0, 1, MAX_RECORD_PAGES * PAGE_SIZE + 1),
        (RecordKind.ZSTD, 0, MAX_PAGES_RUNS + 1, 100),
        (RecordKind.DELTA, 0, 1, 0),
        (RecordKind.DELTA, 0, 0, 100),
        (RecordKind.DELTA, 0, 1, (1 << 32) - 1),
    ],
)
def test_a_length_above_what_the_kind_allows_is_refused_with_the_header(
    kind: RecordKind, reserved: int, runs: int, payload_bytes: int
) -> None:
    with refused(f"bulk record {kind.name}: {runs} runs, {payload_bytes} bytes"):
        unpack_header(HEADER.pack(kind, reserved, runs, 0, payload_bytes, 0), 0)


def test_the_largest_records_pass() -> None:
    for kind, runs, size in ((RecordKind.PAGES, MAX_PAGES_RUNS, 1 << 20), (RecordKind.ZERO, MAX_ZERO_RUNS, 0)):
        assert unpack_header(HEADER.pack(kind, 0, runs, 9, size, 3), 3).runs == runs


# --------------------------------------------------------------------------- run tables


@st.composite
def stream_runs(draw: st.DrawFn) -> tuple[Runs, int, int]:
    """Runs of one stream: within stripes, ascending, disjoint; some of them next to each other."""
    streams = draw(st.integers(1, 4))
    stream = draw(st.integers(0, streams - 1))
    runs: list[tuple[int, int]] = []
    for stripe in range(stream, PAGES // STRIPE_PAGES, streams):
        cuts = sorted(draw(st.sets(st.integers(0, STRIPE_PAGES), max_size=6)))
        for low, high in itertools.pairwise(cuts):
            if draw(st.booleans()):
                runs.append((stripe * STRIPE_PAGES + low, high - low))
    return as_runs(*runs), stream, streams


@given(stream_runs())
def test_a_run_table_is_read_back_as_it_was_written(case: tuple[Runs, int, int]) -> None:
    runs, stream, streams = case
    table = pack_runs(LAYOUT, runs)

    assert len(table) == 12 * len(runs)
    assert read(table, stream=stream, streams=streams).tolist() == runs.tolist()


def test_a_run_is_address_and_pages_in_network_order() -> None:
    assert pack_runs(LAYOUT, as_runs((LOW_PAGES + 1, 2))) == struct.pack(">QI", 4 * GIB + PAGE_SIZE, 2)


END = LOW_PAGES * PAGE_SIZE
HIGH_END = 4 * GIB + 2 * STRIPE_PAGES * PAGE_SIZE


@pytest.mark.parametrize(
    ("gpa", "pages"),
    [
        (1, 1),
        (PAGE_SIZE - 1, 1),
        (0, 0),
        (END, 1),
        (END - PAGE_SIZE, 2),
        (3 * GIB, 1),
        (4 * GIB - PAGE_SIZE, 1),
        (4 * GIB - PAGE_SIZE, 2),
        (HIGH_END, 1),
        (HIGH_END - PAGE_SIZE, 2),
        (0, (1 << 32) - 1),
        ((1 << 62) - PAGE_SIZE, 1),
        (1 << 62, 1),
        (1 << 63, 1),
        ((1 << 64) - PAGE_SIZE, 1),
        ((1 << 64) - PAGE_SIZE, 2),
        ((1 << 64) - PAGE_SIZE, (1 << 32) - 1),
        ((1 << 64) - 1, 1),
    ],
)
def test_a_run_outside_guest_ram_is_refused(gpa: int, pages: int) -> None:
    """Also where address plus length wraps around 2^64, and where a sign bit would make an address negative."""
    with refused("a page run outside guest RAM"):
        read(table_of((gpa, pages)))
    with refused("a page run outside guest RAM"):
        read(table_of((0, 1), (gpa, pages)))


@pytest.mark.parametrize(
    "runs", [((0, 1), (0, 1)), ((0, 2), (PAGE_SIZE, 1)), ((2 * PAGE_SIZE, 1), (0, 1)), ((4 * GIB, 1), (0, 1))]
)
def test_runs_that_overlap_or_descend_are_refused(runs: tuple[tuple[int, int], ...]) -> None:
    with refused("page runs overlap or descend"):
        read(table_of(*runs))


@pytest.mark.parametrize("streams", [2, 3])
def test_a_run_of_a_foreign_stripe_is_refused(streams: int) -> None:
    """Were it taken, a later copy of the page on its own stream could lose to an earlier one here."""
    for stripe in range(PAGES // STRIPE_PAGES):
        table = pack_runs(LAYOUT, as_runs((stripe * STRIPE_PAGES + 5, 1)))
        for stream in range(streams):
            if stripe % streams == stream:
                assert read(table, stream=stream, streams=streams).tolist() == [[stripe * STRIPE_PAGES + 5, 1]]
            else:
                with refused(f"not of stream {stream}"):
                    read(table, stream=stream, streams=streams)


@pytest.mark.parametrize("streams", [1, 2])
def test_a_run_across_two_stripes_is_refused(streams: int) -> None:
    with refused("not of stream 0"):
        read(table_of(((STRIPE_PAGES - 1) * PAGE_SIZE, 2)), streams=streams)


@pytest.mark.parametrize("payload_pages", [0, 1, 2, 4, 256])
def test_a_payload_that_is_not_that_of_its_runs_is_refused(payload_pages: int) -> None:
    header = RecordHeader(RecordKind.PAGES, 2, 1, payload_pages * PAGE_SIZE, 0)

    with refused("payload and page runs disagree"):
        read(table_of((0, 1), (8 * PAGE_SIZE, 2)), header)


def test_a_payload_of_no_whole_pages_is_refused() -> None:
    with refused("payload and page runs disagree"):
        read(table_of((0, 1)), RecordHeader(RecordKind.PAGES, 1, 1, PAGE_SIZE - 1, 0))


def test_a_payload_of_exactly_its_runs_passes() -> None:
    header = RecordHeader(RecordKind.PAGES, 2, 1, 3 * PAGE_SIZE, 0)

    assert read(table_of((0, 1), (8 * PAGE_SIZE, 2)), header).tolist() == [[0, 1], [8, 2]]


@pytest.mark.parametrize("kind", [RecordKind.ZSTD, RecordKind.DELTA])
@pytest.mark.parametrize("counts", [(MAX_RECORD_PAGES + 1,), (MAX_RECORD_PAGES, 1), (STRIPE_PAGES,)])
def test_a_compressed_record_carries_no_more_pages_than_another(kind: RecordKind, counts: tuple[int, ...]) -> None:
    """How much memory it decompresses to is known, and bounded, before a byte of it is."""
    starts = itertools.accumulate((0, *counts[:-1]))
    table = table_of(*((start * PAGE_SIZE, count) for start, count in zip(starts, counts, strict=True)))

    with refused(f"{sum(counts)} pages, at most are {MAX_RECORD_PAGES}"):
        read(table, RecordHeader(kind, len(counts), 1, 100, 0))


@given(st.binary(min_size=12, max_size=60).map(lambda raw: raw[: len(raw) // 12 * 12]), st.integers(1, 3))
def test_a_random_run_table_is_refused_or_lies_within_guest_ram(table: bytes, streams: int) -> None:
    try:
        runs = read(table, streams=streams)
    except RemoteProtocolError:
        return
    assert int(runs[:, 0].min()) >= 0
    assert int((runs[:, 0] + runs[:, 1]).max()) <= PAGES


# --------------------------------------------------------------------------- pages and runs


@given(st.sets(st.integers(0, 300)))
def test_pages_in_and_runs_of_pages_are_each_others_inverse(numbers: set[int]) -> None:
    pages = np.array(sorted(numbers), dtype=np.int64)

    runs = runs_of_pages(pages)

    assert pages_in(runs).tolist() == pages.tolist()
    assert pages_in(runs).dtype == np.int64
    assert runs.tolist() == PageBitmap.from_flags(np.isin(np.arange(301), pages)).runs().tolist(), "and maximal"


def test_pages_in_keeps_the_order_of_the_table() -> None:
    """The payload of a record stands in this order."""
    assert pages_in(as_runs((7, 2), (3, 1))).tolist() == [7, 8, 3]
