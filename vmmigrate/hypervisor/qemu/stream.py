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

Source: QEMU, migration/savevm.c, migration/ram.c (7.2; recorded of 10.0, too, which adds a command).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vmmigrate.errors import PayloadError

MAX_STREAM_BYTES: Final = 256 << 20
MAX_DESCRIPTION_BYTES: Final = 16 << 20  # that of a machine with 255 processors has 4 MiB
MAX_DEVICES: Final = 4000
MAX_BLOCKS: Final = 4096
_PAGE_BYTES: Final = 4096

_HEADER: Final = struct.pack(">II", 0x5145564D, 3)
_START, _PART, _END, _FULL, _SUBSECTION, _DESCRIPTION, _CONFIGURATION, _COMMAND = range(1, 9)
_FOOTER: Final = 0x7E
_EOF: Final = 0x00

_ZERO, _MEM_SIZE, _PAGE, _EOS, _CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
_FLUSH: Final = 0x200
_RECORDS: Final = {_ZERO, _ZERO | _CONTINUE, _PAGE, _PAGE | _CONTINUE, _MEM_SIZE, _EOS, _FLUSH}
# The others belong to post-copy and COLO. The last of these came with QEMU 10.0.
_COMMANDS: Final = {1: "open return path", 2: "ping", 11: "switchover starts"}


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
        """Unique within a machine."""
        return label_of(self.name, self.instance)


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


def whole_stream(stream: bytes | bytearray) -> DeviceStream | None:
    """*stream* in pieces; None as long as it is not whole. Cheap until the very end.

    What a guest has put into its devices can look like an end; so it is one only if everything before it fits.
    """
    if not stream.endswith(b"}") or _end_mark(stream) is None:
        return None
    try:
        return parse_stream(bytes(stream))
    except PayloadError:
        return None


def _end_mark(stream: bytes | bytearray) -> int | None:
    """Where the end mark stands whose description reaches exactly to the end."""
    at = stream.rfind(b"\x00\x06", max(len(stream) - MAX_DESCRIPTION_BYTES, 0))
    while at >= 0:
        if at + 6 + int.from_bytes(stream[at + 2 : at + 6], "big") == len(stream):
            return at
        at = stream.rfind(b"\x00\x06", max(len(stream) - MAX_DESCRIPTION_BYTES, 0), at + 1)
    return None


def parse_stream(stream: bytes, listed: Sequence[Described] | None = None) -> DeviceStream:
    """Cut a whole stream into its pieces.

    Args:
        listed: What its description lists, where that was read already.

    Raises: PayloadError `qemu_stream`: not such a stream, or one with what we do not know (it is named).
    """
    cursor = _Cursor(stream)
    if cursor.take(8) != _HEADER:
        raise _error("not a migration stream of version 3")
    if cursor.peek() != _CONFIGURATION:
        raise _error("it does not begin with a configuration")
    machine_type = _configuration(cursor)
    blocks = _ram_sections(cursor)
    head = stream[: cursor.at]
    tail_at = _end_mark(stream)
    if tail_at is None:
        raise _error("no description at its end")
    if listed is None:
        listed = read_description(stream[tail_at:])
    devices = tuple(_devices(stream, cursor.at, tail_at, listed))
    return DeviceStream(machine_type, tuple(blocks), head, devices, stream[tail_at:])


def _ram_sections(cursor: _Cursor) -> list[RamBlock]:
    """Commands, and the sections of RAM, up to the first device; the list of blocks."""
    blocks, ram_id = list[RamBlock](), None
    while (kind := cursor.peek()) in {_COMMAND, _START, _PART, _END, _CONFIGURATION}:
        if kind == _CONFIGURATION:
            raise _error("a second configuration")
        if kind == _COMMAND:
            _command(cursor)
            continue
        if kind == _START:
            if ram_id is not None:
                raise _error("RAM begins twice")
            ram_id = _ram_start(cursor)
        else:
            cursor.take(1)
            if cursor.number(4) != ram_id or ram_id is None:
                raise _error("a part of a section that is not RAM")
        blocks += _ram_body(cursor)
        _footer(cursor, ram_id)
    if ram_id is None:
        raise _error("no RAM")
    return blocks


def _command(cursor: _Cursor) -> None:
    cursor.take(1)
    command = cursor.number(2)
    if command not in _COMMANDS:
        raise _error(f"unknown command {command}")
    cursor.take(cursor.number(2))


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
        if flags not in _RECORDS:
            raise _error(f"RAM record with unknown flags {flags:#x}")
        if flags == _EOS:
            return blocks
        if flags == _MEM_SIZE:
            blocks += _block_list(cursor, offset)
        elif flags != _FLUSH:
            if not flags & _CONTINUE:
                cursor.text(1)
            cursor.take(1 if flags & _ZERO else _PAGE_BYTES)


def _block_list(cursor: _Cursor, total_bytes: int) -> Iterator[RamBlock]:
    for _ in range(MAX_BLOCKS):
        if not total_bytes:
            return
        name, size_bytes = cursor.text(1), cursor.number(8)
        if not 0 < size_bytes <= total_bytes:
            raise _error(f"RAM block {name[:80]} of {size_bytes} bytes, there are {total_bytes} for it")
        # Only `x-ignore-shared` writes the address, and these streams are all made with it.
        yield RamBlock(name, size_bytes, cursor.number(8))
        total_bytes -= size_bytes
    raise _error(f"more than {MAX_BLOCKS} RAM blocks")


def _footer(cursor: _Cursor, section_id: int) -> None:
    if cursor.take(5) != bytes([_FOOTER]) + section_id.to_bytes(4, "big"):
        raise _error("a section without its end")


def read_description(tail: bytes) -> list[Described]:
    """The devices, as an end mark and what follows it list them.

    Raises: PayloadError `qemu_stream`.
    """
    if len(tail) > MAX_DESCRIPTION_BYTES:
        raise _error(f"a description of {len(tail)} bytes, allowed are {MAX_DESCRIPTION_BYTES}")
    try:
        devices = json.loads(tail[6:])["devices"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _error("its description is none") from None
    if not isinstance(devices, list) or len(devices) > MAX_DEVICES:
        raise _error(f"its description lists no devices, or more than {MAX_DEVICES}")
    return [described(entry) for entry in devices]


def _devices(stream: bytes, at: int, end: int, listed: Sequence[Described]) -> Iterator[DeviceSection]:
    labels = set[str]()
    for n, device in enumerate(listed):
        if stream[at : at + 1] != bytes([_FULL]) or not stream.startswith(device.header, at + 5):
            raise _error(f"device {device.name[:80]} is not where the description says")
        footer = bytes([_FOOTER]) + stream[at + 1 : at + 5]
        after = listed[n + 1].header if n + 1 < len(listed) else None
        finish = _end_of_device(stream, at + 5 + len(device.header), end, footer, after)
        if finish is None:
            raise _error(f"the state of device {device.name[:80]} does not end")
        if device.label in labels:
            raise _error(f"device {device.label[:80]} is there twice")
        labels.add(device.label)
        version_at = at + 6 + len(device.name) + 4
        version = int.from_bytes(stream[version_at : version_at + 4], "big")
        yield DeviceSection(device.name, device.instance, version, stream[at:finish])
        at = finish
    if at != end:
        raise _error("there is more than the description says")


@dataclass(frozen=True, slots=True)
class Described:
    """A device as the description has it; `header` is what follows from that of its section's, behind the id."""

    name: str
    instance: int
    header: bytes

    @property
    def label(self) -> str:
        return label_of(self.name, self.instance)


def described(entry: Any) -> Described:
    """An entry of the description, checked. Devices of the old style do not tell their version.

    Raises: PayloadError `qemu_stream`.
    """
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name.isascii() or not 0 < len(name) < 256:
        raise _error("an entry of the description has no name")
    header = bytes([len(name)]) + name.encode("ascii")
    for word in ("instance_id", "version"):
        number = entry.get(word)
        if word in entry or word == "instance_id":
            if type(number) is not int or not 0 <= number < 1 << 32:
                raise _error(f"device {name[:80]} has an impossible {word}")
            header += struct.pack(">I", number)
    return Described(name, entry["instance_id"], header)


def label_of(name: str, instance: int) -> str:
    """Devices of one name are counted."""
    return f"{name}#{instance}" if instance else name


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
    printable = "".join(letter if letter.isprintable() else "?" for letter in text)
    return PayloadError(f"QEMU's device state: {printable}", code="qemu_stream")


def end_of_stream(stream: bytes | bytearray) -> bool:
    """Whether *stream*, of which more may come, is whole."""
    return whole_stream(stream) is not None
