"""The bytes of a journal: a header that names the format and a random id, then numbered records.

Every frame carries its length, its number, and checksums over these and over its body apart, so that a damaged length
is told from a torn tail: only an *incomplete* last record is dropped (a torn write was never acknowledged), a complete
one whose checksum is wrong is corruption. Records that a compaction has forgotten keep their numbers: the header says
how many they were.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Any

import msgpack

from vmmigrate.errors import JournalError
from vmmigrate.ownership.records import Record, from_plain, to_plain

MAGIC = b"VMMJ"
FORMAT = 1
_PREFIX = struct.Struct("!IQII")  # body length, number, crc32 of the body, crc32 of the three before
MAX_RECORD_BYTES = 1 << 20


@dataclass(frozen=True)
class Contents:
    """What a journal says.

    Attributes:
        id: Random, made with the file.
        forgotten: How many records were dropped before the first that stands here.
        records: The first has number `forgotten + 1`.
        torn_bytes: Length of an incomplete last record.
    """

    id: str
    forgotten: int
    records: tuple[Record, ...]
    torn_bytes: int

    @property
    def newest_record(self) -> int:
        return self.forgotten + len(self.records)


def read_contents(raw: bytes, name: str) -> Contents:
    """What the bytes of a journal say; an incomplete last record is dropped.

    Raises:
        JournalError: `journal_format`, `journal_corrupt`, `unknown_record`, `bad_record`.
    """
    contents, damage = survey(raw, name)
    if damage is not None:
        raise damage
    return contents


def survey(raw: bytes, name: str) -> tuple[Contents, JournalError | None]:
    """What can be read up to the first damage, and that: for people to look at. Nothing may be decided from it.

    Raises:
        JournalError: `journal_format` or `journal_corrupt`: not even its header can be read.
    """
    if raw[: len(MAGIC)] != MAGIC[: len(raw)]:
        raise JournalError(f"journal {name}: not a vmmigrate journal", code="journal_format")
    header = _body_at(raw, len(MAGIC), 0, name)
    if header is None:
        raise JournalError(f"journal {name}: it is empty or its header is torn", code="journal_corrupt")
    plain, position = header
    journal_id, forgotten = _checked_header(plain, name)
    records: list[Record] = []
    damage = None
    try:
        while (found := _body_at(raw, position, forgotten + len(records) + 1, name)) is not None:
            records.append(from_plain(found[0]))
            position = found[1]
    except JournalError as exc:
        damage = exc
    torn_bytes = 0 if damage else len(raw) - position
    return Contents(journal_id, forgotten, tuple(records), torn_bytes), damage


def encode(journal_id: str, forgotten: int, records: tuple[Record, ...]) -> bytes:
    """A whole journal."""
    header = MAGIC + frame({"format": FORMAT, "id": journal_id, "forgotten": forgotten}, 0)
    return header + encode_records(records, forgotten + 1)


def encode_records(records: tuple[Record, ...], first: int) -> bytes:
    """Records to append, of which *first* is the number of the first."""
    return b"".join(frame(to_plain(record), first + i) for i, record in enumerate(records))


def frame(plain: dict[str, Any], number: int) -> bytes:
    """Raises: JournalError `record_too_large`."""
    body: bytes = msgpack.packb(plain, use_bin_type=True)
    if len(body) > MAX_RECORD_BYTES:
        # The reader would take it for damage, and the whole journal with it.
        raise JournalError(
            f"journal record of {len(body)} bytes, at most {MAX_RECORD_BYTES} are allowed", code="record_too_large"
        )
    prefix = _PREFIX.pack(len(body), number, zlib.crc32(body), 0)[:-4]
    return prefix + zlib.crc32(prefix).to_bytes(4, "big") + body


def _checked_header(plain: dict[str, Any], name: str) -> tuple[str, int]:
    journal_id, forgotten = plain.get("id"), plain.get("forgotten")
    is_ours = plain.get("format") == FORMAT and isinstance(journal_id, str)
    if is_ours and type(forgotten) is int and 0 <= forgotten < 1 << 63:
        return str(journal_id), forgotten
    raise JournalError(
        f"journal {name}: format {plain.get('format')}, this release reads {FORMAT}", code="journal_format"
    )


def _body_at(raw: bytes, position: int, number: int, name: str) -> tuple[dict[str, Any], int] | None:
    """What the frame at *position* says, and where it ends; None when it is incomplete, or there is none."""
    if len(raw) - position < _PREFIX.size:
        return None
    length, written, body_crc, prefix_crc = _PREFIX.unpack_from(raw, position)
    prefix_ok = zlib.crc32(raw[position : position + _PREFIX.size - 4]) == prefix_crc
    if not prefix_ok or written != number or length > MAX_RECORD_BYTES:
        raise _corrupt(name, number, position)
    end = position + _PREFIX.size + length
    body = raw[position + _PREFIX.size : end]
    if len(body) < length:
        return None
    if zlib.crc32(body) != body_crc:
        raise _corrupt(name, number, position)
    try:
        plain = msgpack.unpackb(body, raw=False, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException):
        raise _corrupt(name, number, position) from None
    if not isinstance(plain, dict):
        raise _corrupt(name, number, position)
    return plain, end


def _corrupt(name: str, number: int, position: int) -> JournalError:
    return JournalError(
        f"journal {name}: record {number} at byte {position} is damaged; the file is kept, nothing is decided from it",
        code="journal_corrupt",
    )
