"""Bulk records: what travels on the bulk streams, and which of it is believed.

A record is a header, a table of page runs (gpa, pages), and what follows it: for PAGES the bytes of those pages, in the
order of the table; for ZSTD one zstd frame of those bytes; for DELTA the digest of each page as it was sent last (u64),
then one zstd frame of new XOR old. `payload bytes` counts pages or frame, not the digests. Records are counted per
stream; the count is authenticated by the barrier on the control channel. A page always travels on the same stream
(`stream_of`), so that a later copy never loses to an earlier one.

Header, big-endian: kind u8, reserved u8 (zero), runs u16, round u32, payload bytes u32, number u64 (0, 1, 2, ...).
Run: gpa u64, pages u32.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from vmmigrate.errors import RemoteProtocolError
from vmmigrate.memory import PAGE_SIZE, RamLayout, Runs, pages_in

HEADER = struct.Struct("!BBHIIQ")
_RUN = struct.Struct("!QI")
RUN_DTYPE = np.dtype([("gpa", ">u8"), ("pages", ">u4")])

STRIPE_PAGES = 512  # 2 MiB: one huge page, and long enough that a stream works on ranges
MAX_RECORD_PAGES = 256  # 1 MiB of payload
MAX_PAGES_RUNS = MAX_RECORD_PAGES
MAX_ZERO_RUNS = 4096


class RecordKind(IntEnum):
    """Tags of bulk records; zero is never a tag."""

    PAGES = 1
    ZERO = 2
    BARRIER = 3
    END = 4
    ZSTD = 5
    DELTA = 6


@dataclass(frozen=True, slots=True)
class RecordHeader:
    kind: RecordKind
    runs: int
    round_number: int
    payload_bytes: int
    number: int

    def pack(self) -> bytes:
        return HEADER.pack(self.kind, 0, self.runs, self.round_number, self.payload_bytes, self.number)


_MAX_RUNS = {
    RecordKind.PAGES: MAX_PAGES_RUNS,
    RecordKind.ZERO: MAX_ZERO_RUNS,
    RecordKind.BARRIER: 0,
    RecordKind.END: 0,
    RecordKind.ZSTD: MAX_PAGES_RUNS,
    RecordKind.DELTA: MAX_PAGES_RUNS,
}
_WITH_PAYLOAD = frozenset({RecordKind.PAGES, RecordKind.ZSTD, RecordKind.DELTA})
_WITH_RUNS = _WITH_PAYLOAD | {RecordKind.ZERO}


def unpack_header(raw: bytes | bytearray | memoryview, expected_number: int) -> RecordHeader:
    """A checked header.

    Raises:
        RemoteProtocolError: `bad_record`: unknown kind, out of sequence, or a length above what its kind allows.
    """
    tag, reserved, runs, round_number, payload_bytes, number = HEADER.unpack(raw)
    try:
        kind = RecordKind(tag)
    except ValueError:
        raise RemoteProtocolError(f"unknown bulk record {tag}", code="bad_record") from None
    if number != expected_number:
        raise RemoteProtocolError(f"bulk record {number} came, {expected_number} was due", code="bad_record")
    limit = MAX_RECORD_PAGES * PAGE_SIZE if kind in _WITH_PAYLOAD else 0
    has_payload = (kind in _WITH_PAYLOAD) == (payload_bytes > 0)
    has_runs = (kind in _WITH_RUNS) == (runs > 0)
    if reserved or runs > _MAX_RUNS[kind] or payload_bytes > limit or not has_payload or not has_runs:
        raise RemoteProtocolError(f"bulk record {kind.name}: {runs} runs, {payload_bytes} bytes", code="bad_record")
    return RecordHeader(kind, runs, round_number, payload_bytes, number)


def pack_runs(layout: RamLayout, runs: Runs) -> bytes:
    """The table of *runs* as bytes."""
    if len(runs) == 1:
        first, count = runs[0].tolist()
        return _RUN.pack(layout.gpa_of(first), count)
    table = np.empty(len(runs), dtype=RUN_DTYPE)
    table["gpa"] = layout.gpas_of(runs[:, 0])
    table["pages"] = runs[:, 1]
    return table.tobytes()


def unpack_runs(
    raw: bytes | bytearray | memoryview, header: RecordHeader, layout: RamLayout, stream: int, streams: int
) -> Runs:
    """The checked runs of a record, by page number.

    Raises:
        RemoteProtocolError: `bad_record`: a run outside the regions or outside the stream's stripes, runs that
            overlap or descend, or a payload length that is not that of the runs.
    """
    single = len(raw) == _RUN.size
    return (_unpack_run if single else _unpack_table)(raw, header, layout, stream, streams)


def _unpack_table(
    raw: bytes | bytearray | memoryview, header: RecordHeader, layout: RamLayout, stream: int, streams: int
) -> Runs:
    table = np.frombuffer(raw, dtype=RUN_DTYPE)
    counts = table["pages"].astype(np.int64)
    too_high = bool((table["gpa"] >= np.uint64(1 << 62)).any())
    first = None if too_high else layout.pages_of(table["gpa"].astype(np.int64), counts)
    if first is None:
        raise RemoteProtocolError("bulk record: a page run outside guest RAM", code="bad_record")
    last = first + counts - 1
    if (first[1:] <= last[:-1]).any():
        raise RemoteProtocolError("bulk record: page runs overlap or descend", code="bad_record")
    stripes = first // STRIPE_PAGES
    if (stripes != last // STRIPE_PAGES).any() or (stripes % streams != stream).any():
        raise RemoteProtocolError(f"bulk record: a page run that is not of stream {stream}", code="bad_record")
    _check_payload(header, int(counts.sum()))
    return np.stack([first, counts], axis=1)


def _check_payload(header: RecordHeader, pages: int) -> None:
    """A compressed record carries no more pages than one that is not."""
    if header.kind is RecordKind.PAGES and pages * PAGE_SIZE != header.payload_bytes:
        raise RemoteProtocolError("bulk record: payload and page runs disagree", code="bad_record")
    if header.kind in _WITH_PAYLOAD and pages > MAX_RECORD_PAGES:
        raise RemoteProtocolError(f"bulk record: {pages} pages, at most are {MAX_RECORD_PAGES}", code="bad_record")


def _unpack_run(
    raw: bytes | bytearray | memoryview, header: RecordHeader, layout: RamLayout, stream: int, streams: int
) -> Runs:
    """As `unpack_runs` for the single run that most records have: there the general way costs as much as a digest."""
    gpa, count = _RUN.unpack(raw)
    run = layout.locate(gpa, count)
    if run is None:
        raise RemoteProtocolError("bulk record: a page run outside guest RAM", code="bad_record")
    stripe = run.first_page // STRIPE_PAGES
    if stripe != (run.first_page + count - 1) // STRIPE_PAGES or stripe % streams != stream:
        raise RemoteProtocolError(f"bulk record: a page run that is not of stream {stream}", code="bad_record")
    _check_payload(header, count)
    return np.array([(run.first_page, count)], dtype=np.int64)


def index_of(runs: Runs) -> slice | npt.NDArray[np.int64]:
    """What selects the pages of *runs* in an array: a slice where that is possible, and then the result is no copy."""
    if len(runs) > 1:
        return pages_in(runs)
    first, count = runs[0].tolist()
    return slice(first, first + count)
