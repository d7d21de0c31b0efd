"""QEMU's migration stream as it is with `x-ignore-shared`: what is in it, and which bytes are whose. Pure.

The stream is kept as it came and given to the other QEMU as it was; here it is only cut into pieces, so that each
device's state is a payload with a name. All integers are big-endian:

    u32 "QEVM"  u32 3
    u8 0x07 configuration: u32 length, machine type; then subsections
    u8 0x08 command: u16 command, u16 length, bytes
    u8 0x01 section start (0x04 full): u32 id, u8 n, name, u32 instance, u32 version; body; u8 0x7e, u32 id
    u8 0x02 section part (0x03 end): u32 id; body; u8 0x7e, u32 id
    u8 0x00 end; u8 0x06, u32 length, description in JSON

The length of a device's body is nowhere: the description at the end lists the devices in the order of the stream, and a
body ends where its footer is followed by the header of the next one. RAM sections are walked record by record.

Source: QEMU, migration/savevm.c, migration/ram.c (7.2; the same in all later ones for these capabilities).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vmmigrate.errors import PayloadError

MAX_STREAM_BYTES: Final = 256 << 20
MAX_DEVICES: Final = 4000
_PAGE_BYTES: Final = 4096

_HEADER: Final = struct.pack(">II", 0x5145564D, 3)
_START, _PART, _END, _FULL, _SUBSECTION, _DESCRIPTION, _CONFIGURATION, _COMMAND = range(1, 9)
_FOOTER: Final = 0x7E
_EOF: Final = 0x00

_ZERO, _MEM_SIZE, _PAGE, _EOS, _CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
_FLUSH: Final = 0x200
_KNOWN_FLAGS: Final = _ZERO | _MEM_SIZE | _PAGE | _EOS | _CONTINUE | _FLUSH


@dataclass(frozen=True, slots=True)
class RamBlock:
    """A block of the RAM section's list. `gpa` is None without `x-ignore-shared`."""

    name: str
    size_bytes: int
    gpa: int | None


@dataclass(frozen=True, slots=True)
class DeviceSection:
    """The state of one device as it stands in the stream, header and footer included."""

    name: str
    instance: int
    version: int
    raw: bytes

    @property
    def label(self) -> str:
        """Unique within a machine: devices of one name are counted."""
        return f"{self.name}#{self.instance}" if self.instance else self.name


@dataclass(frozen=True, slots=True)
class DeviceStream:
    """A whole stream: `head` and `devices` and `tail`, one after the other, are its bytes.

    Attributes:
        head: Everything before the first device: header, configuration, commands, RAM sections of what is not shared.
        tail: The end mark and the description.
    """

    machine_type: str
    blocks: Sequence[RamBlock]
    head: bytes
    devices: Sequence[DeviceSection]
    tail: bytes

    def joined(self) -> bytes:
        return b"".join([self.head, *(device.raw for device in self.devices), self.tail])


def end_of_stream(stream: bytes | bytearray) -> bool:
    """Whether *stream*, of which more may come, ends with a whole description.

    Cheap: it looks at the last byte and for the last end mark.
    """
    if not stream.endswith(b"}"):
        return False
    at = stream.rfind(b"\x00\x06", max(len(stream) - MAX_STREAM_BYTES, 0))
    while at >= 0:
        if len(stream) >= at + 7 and at + 6 + int.from_bytes(stream[at + 2 : at + 6], "big") == len(stream):
            return stream[at + 6 : at + 7] == b"{"
        at = stream.rfind(b"\x00\x06", 0, at + 1)
    return False


def parse_stream(stream: bytes) -> DeviceStream:
    """Cut a whole stream into its pieces.

    Raises: PayloadError `qemu_stream`: not such a stream, or one with what we do not know (it is named).
    """
    cursor = _Cursor(stream)
    if cursor.take(8) != _HEADER:
        raise _error("not a migration stream of version 3")
    machine_type, blocks, ram_id = "", list[RamBlock](), None
    while True:
        kind = cursor.peek()
        if kind == _CONFIGURATION:
            machine_type = _configuration(cursor)
        elif kind == _COMMAND:
            cursor.take(3)
            cursor.take(cursor.number(2))
        elif kind == _START:
            ram_id = _ram_start(cursor)
            blocks = _ram_body(cursor)
            _footer(cursor, ram_id)
        elif kind in {_PART, _END}:
            cursor.take(1)
            if cursor.number(4) != ram_id:
                raise _error("a part of a section that is not RAM")
            _ram_body(cursor)
            _footer(cursor, ram_id)
        else:
            break
    head = stream[: cursor.at]
    description, tail_at = _description(stream)
    devices = tuple(_devices(stream, cursor.at, tail_at, description))
    return DeviceStream(machine_type, tuple(blocks), head, devices, stream[tail_at:])


class _Cursor:
    def __init__(self, stream: bytes) -> None:
        self._stream = stream
        self.at = 0

    def take(self, size: int) -> bytes:
        taken = self._stream[self.at : self.at + size]
        if len(taken) < size:
            raise _error("it ends in the middle")
        self.at += size
        return taken

    def peek(self) -> int:
        """The next byte, not taken; that of the end mark when there is none."""
        return self._stream[self.at] if self.at < len(self._stream) else _EOF

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def text(self, length_bytes: int) -> str:
        try:
            return self.take(self.number(length_bytes)).decode("ascii")
        except UnicodeDecodeError:
            raise _error("a name that is not ASCII") from None


def _configuration(cursor: _Cursor) -> str:
    """The machine type. Subsections are stepped over: QEMU compares them itself."""
    cursor.take(1)
    machine_type = cursor.text(4)
    while cursor.peek() == _SUBSECTION:
        cursor.take(1)
        name = cursor.text(1)
        cursor.take(4)
        body = _SUBSECTIONS.get(name)
        if body is None:
            raise _error(f"unknown subsection {name[:80]} of the configuration")
        body(cursor)
    return machine_type


def _capabilities(cursor: _Cursor) -> None:
    for _ in range(min(cursor.number(4), 256)):
        cursor.take(cursor.number(1))


_SUBSECTIONS: Final[Mapping[str, Callable[[_Cursor], object]]] = {
    "configuration/capabilities": _capabilities,
    "configuration/uuid": lambda cursor: cursor.take(16),
    "configuration/target-page-bits": lambda cursor: cursor.take(4),
}


def _ram_start(cursor: _Cursor) -> int:
    cursor.take(1)
    section_id = cursor.number(4)
    name = cursor.text(1)
    cursor.take(8)
    if name != "ram":
        raise _error(f"section {name[:80]} is sent in rounds, known is only that of RAM")
    return section_id


def _ram_body(cursor: _Cursor) -> list[RamBlock]:
    """Step over the records of a RAM section; the list of blocks, if it is there."""
    blocks: list[RamBlock] = []
    while True:
        word = cursor.number(8)
        flags, offset = word & (_PAGE_BYTES - 1), word & -_PAGE_BYTES
        if flags & ~_KNOWN_FLAGS:
            raise _error(f"RAM record with unknown flags {flags:#x}")
        if flags & _MEM_SIZE:
            blocks += _block_list(cursor, offset)
        elif flags & (_ZERO | _PAGE):
            if not flags & _CONTINUE:
                cursor.text(1)
            cursor.take(1 if flags & _ZERO else _PAGE_BYTES)
        if flags & _EOS:
            return blocks


def _block_list(cursor: _Cursor, total_bytes: int) -> Iterator[RamBlock]:
    while total_bytes > 0:
        name, size_bytes = cursor.text(1), cursor.number(8)
        if not size_bytes:
            raise _error(f"RAM block {name[:80]} of no bytes")
        # Only `x-ignore-shared` writes the address, and these streams are all made with it.
        yield RamBlock(name, size_bytes, cursor.number(8))
        total_bytes -= size_bytes


def _footer(cursor: _Cursor, section_id: int) -> None:
    if cursor.take(5) != bytes([_FOOTER]) + section_id.to_bytes(4, "big"):
        raise _error("a section without its end")


def _description(stream: bytes) -> tuple[dict[str, Any], int]:
    """What the stream says of itself, and where its end mark stands."""
    at = stream.rfind(b"\x00\x06")
    while at >= 0:
        if at + 6 + int.from_bytes(stream[at + 2 : at + 6], "big") == len(stream):
            try:
                described = json.loads(stream[at + 6 :])
            except ValueError:
                break
            if isinstance(described, dict) and isinstance(described.get("devices"), list):
                return described, at
            break
        at = stream.rfind(b"\x00\x06", 0, at + 1)
    raise _error("no description at its end")


def _devices(stream: bytes, at: int, end: int, description: dict[str, Any]) -> Iterator[DeviceSection]:
    listed = description["devices"]
    if len(listed) > MAX_DEVICES:
        raise _error(f"{len(listed)} devices, allowed are {MAX_DEVICES}")
    starts = [_header_of(entry) for entry in listed]
    for n, (name, instance, header) in enumerate(starts):
        if stream[at : at + 1] != bytes([_FULL]) or stream[at + 5 : at + 5 + len(header)] != header:
            raise _error(f"device {name[:80]} is not where the description says")
        footer = bytes([_FOOTER]) + stream[at + 1 : at + 5]
        after = starts[n + 1][2] if n + 1 < len(starts) else None
        version_at = at + 6 + len(name) + 4
        version = int.from_bytes(stream[version_at : version_at + 4], "big")
        finish = _end_of_device(stream, at + 5 + len(header), end, footer, after)
        if finish is None:
            raise _error(f"the state of device {name[:80]} does not end")
        yield DeviceSection(name, instance, version, stream[at:finish])
        at = finish
    if at != end:
        raise _error("there is more than the description says")


def _header_of(entry: Any) -> tuple[str, int, bytes]:
    """Name, instance, and what of the section's header is known; devices of the old style do not tell their version."""
    try:
        name, instance = entry["name"], entry["instance_id"]
        packed = bytes([len(name)]) + name.encode("ascii") + struct.pack(">I", instance & 0xFFFFFFFF)
        if "version" in entry:
            packed += struct.pack(">I", entry["version"])
    except (KeyError, TypeError, ValueError, AttributeError, struct.error):
        raise _error("an entry of the description is malformed") from None
    return name, instance, packed


def _end_of_device(stream: bytes, at: int, end: int, footer: bytes, after: bytes | None) -> int | None:
    """Behind the first footer that the next device, or the end, follows."""
    while (found := stream.find(footer, at, end)) >= 0:
        behind = found + len(footer)
        if after is None:
            if behind == end:
                return behind
        elif stream[behind : behind + 1] == bytes([_FULL]) and stream[behind + 5 : behind + 5 + len(after)] == after:
            return behind
        at = found + 1
    return None


def _error(text: str) -> PayloadError:
    return PayloadError(f"QEMU's device state: {text}", code="qemu_stream")
