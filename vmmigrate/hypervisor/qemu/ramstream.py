"""QEMU's own migration stream, guest RAM included, parsed as it comes: one channel, no `x-ignore-shared`. Pure.

    parser = RamStreamParser()
    while True:
        parser.received(sock.recv_into(parser.buffer()))
        while (event := parser.next_event()) is not None:
            ...

Problem: a guest's RAM comes as records of one page each, and a loop that touches each of them would be the slowest part
of a migration. But what follows a page of the same block is a word and a page again, 4104 bytes further on, whichever
page that is; so all words that are at hand are compared at once, and what is handed out is a view of all their pages. A
page of zeros is nine bytes, and the same holds. An event ends where the kind of record, the block, or the ascending
order of page numbers does: within one event no page is there twice, so nobody has to ask which of two is the newer one.

    header, configuration     as in `stream`
    section start, of RAM     records; among them the list of blocks
    section part              records; several a round, and a round's end is not in the stream
    section end               records: the last round
    devices, end, description as in `stream`, which cuts them

    record = u64 offset | flags; then, unless it goes on in the same block, u8 n, name; then 4096 bytes, or one of zero

The guest's memory becomes events; other blocks (firmware, tables, video memory) are small, and the last contents of
their pages are kept here. `crafting` puts them, and the devices, into a stream for a QEMU whose guest memory is there
already: of a block that is guest memory it says nothing but the size.

Source: QEMU, migration/ram.c, migration/savevm.c (7.2); docs/devel/migration.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from vmmigrate.errors import PayloadError, UsageError
from vmmigrate.hypervisor.qemu import words
from vmmigrate.hypervisor.qemu.ramevents import (
    Ended,
    Event,
    Numbers,
    PageBytes,
    PageRuns,
    SectionEnded,
    SectionKind,
    SmallBlock,
    Started,
    ZeroPages,
)
from vmmigrate.hypervisor.qemu.stream import (
    MAX_BLOCKS,
    MAX_STREAM_BYTES,
    DeviceStream,
    RamBlock,
    parse_stream,
)
from vmmigrate.memory import MIB, PAGE_SIZE

GUEST_RAM: Final = ("pc.ram",)
CAPACITY_BYTES: Final = 8 * MIB
MAX_SMALL_BYTES: Final = 64 * MIB  # of all blocks that are not guest RAM; a graphics card has 16 MiB
MAX_DEVICE_BYTES: Final = MAX_STREAM_BYTES
_MIN_CAPACITY_BYTES: Final = 4 * PAGE_SIZE  # nothing that has to be there whole is longer than a page and two names
_MAX_MACHINE_TYPE_BYTES: Final = 255
_MAX_FALSE_ENDS: Final = 64

# Their arguments' sizes; the others belong to post-copy and COLO. The last of these came with QEMU 10.0.
_COMMANDS: Final = {1: 0, 2: 4, 11: 0}  # open return path, ping, switchover starts

_PAGE_RECORDS: Final = frozenset({words.PAGE, words.PAGE | words.CONTINUE, words.ZERO, words.ZERO | words.CONTINUE})
_OF_CAPABILITIES: Final = {0x40: "xbzrle", 0x80: "rdma", 0x100: "compress"}
_WORD_BYTES: Final = words.WORD.size
_OFFSET: Final = -PAGE_SIZE
_FLAGS: Final = PAGE_SIZE - 1

# Where records change after a few pages, none are looked at in vain; where they do not, few looks are taken.
_FEW: Final = 16  # one by one: to compare these at once would take as long
_FIRST_LOOK: Final = 64
_LOOK_FARTHER: Final = 8
_LONGEST_LOOK: Final = 8192


_Step = Callable[[], Event | None]


class RamStreamParser:
    """One stream, from its first byte to its last.

    Whoever gives bytes asks for events until there is none, before giving more.

    Attributes:
        doubt: Why what looked like the end was none. What a guest has put into its devices can look like one; but where
            nothing more comes, this is why the stream was not taken.
    """

    def __init__(self, guest_ram: Collection[str] = GUEST_RAM, *, capacity_bytes: int = CAPACITY_BYTES) -> None:
        """*guest_ram*: the blocks whose pages become events; each has to be there."""
        if capacity_bytes < _MIN_CAPACITY_BYTES:
            raise UsageError(f"a buffer of {capacity_bytes} bytes, it takes {_MIN_CAPACITY_BYTES}")
        self.doubt: PayloadError | None = None
        self._guest_ram = tuple(guest_ram)
        self._buffer = bytearray(capacity_bytes)
        self._begin = self._end = 0  # what of the buffer was received, and is not parsed
        self._step: _Step = self._read_header
        self._configuration = bytearray()
        self._machine_type = ""
        self._section_id: int | None = None
        self._kind = SectionKind.START
        self._listed: list[RamBlock] = []
        self._unlisted_bytes = 0
        self._blocks: dict[bytes, _Block] = {}
        self._block: _Block | None = None  # of the last page
        self._devices = bytearray()
        self._last_nul = -1
        self._false_ends = 0

    # ---- bytes in

    def buffer(self) -> memoryview:
        """Room to receive into. Pages that were handed out are void from now on.

        Raises: UsageError: there is none, as events were not asked for.
        """
        unread = self._end - self._begin
        if self._begin:
            whole = memoryview(self._buffer)
            whole[:unread] = whole[self._begin : self._end]
            self._begin, self._end = 0, unread
        if unread == len(self._buffer):
            raise UsageError("the buffer is full: ask for events before receiving more")
        return memoryview(self._buffer)[unread:]

    def received(self, size: int) -> None:
        """So many bytes were put at the beginning of `buffer()`."""
        if not 0 <= size <= len(self._buffer) - self._end:
            raise UsageError(f"{size} bytes received into a buffer with room for {len(self._buffer) - self._end}")
        self._end += size

    def receive(self, chunk: bytes | bytearray | memoryview) -> None:
        """Take a copy of *chunk*, however long it is. Pages that were handed out are void."""
        size, unread = len(chunk), self._end - self._begin
        if unread + size > len(self._buffer):
            self._buffer = self._buffer[self._begin : self._end].ljust(unread + size, b"\0")
            self._begin, self._end = 0, unread
        if size:
            self.buffer()[:size] = chunk
            self.received(size)

    # ---- events out

    def next_event(self) -> Event | None:
        """What comes next; None: more, please.

        Raises: PayloadError `qemu_stream`: not such a stream, or one with what we do not know (it is named). So will
            every later call.
        """
        try:
            while True:
                event = self._step()
                if event is not None:
                    return event
        except _Short:
            return None
        except PayloadError as exc:
            self._step = _Refused(exc)
            raise

    def _at_hand(self) -> _Cursor:
        return _Cursor(self._buffer, self._begin, self._end)

    # ---- what comes before RAM

    def _read_header(self) -> None:
        cursor = self._at_hand()
        if cursor.take(len(words.HEADER)) != words.HEADER:
            raise _refusal("not a migration stream of version 3")
        self._keep(cursor)
        self._step = self._read_machine_type

    def _read_machine_type(self) -> None:
        cursor = self._at_hand()
        if cursor.number(1) != words.CONFIGURATION:
            raise _refusal("it does not begin with a configuration")
        size = cursor.number(4)
        if not 0 < size <= _MAX_MACHINE_TYPE_BYTES:
            raise _refusal(f"a machine type of {size} bytes")
        self._machine_type = cursor.ascii(size)
        self._keep(cursor)
        self._step = self._read_subsection

    def _read_subsection(self) -> None:
        cursor = self._at_hand()
        if cursor.number(1) != words.SUBSECTION:
            self._step = self._read_section
            return
        name = cursor.text()
        check = _SUBSECTIONS.get(name)
        if check is None:
            raise _refusal(f"unknown subsection {name[:80]} of the configuration")
        cursor.take(4)
        check(cursor)
        self._keep(cursor)

    def _keep(self, cursor: _Cursor) -> None:
        self._configuration += self._buffer[self._begin : cursor.at]
        self._begin = cursor.at

    # ---- sections

    def _read_section(self) -> None:
        cursor = self._at_hand()
        kind = cursor.number(1)
        if kind == words.COMMAND:
            _check_command(cursor)
        elif kind == words.START:
            self._begin_ram(cursor)
        elif kind in (words.PART, words.END):
            self._go_on_with_ram(cursor, SectionKind(kind))
        elif kind in (words.FULL, words.EOF):
            self._check_ram_has_ended(cursor, kind)
            self._step = self._read_devices
            return
        else:
            raise _refusal(
                "a second configuration" if kind == words.CONFIGURATION else f"a section of unknown kind {kind}"
            )
        self._begin = cursor.at

    def _begin_ram(self, cursor: _Cursor) -> None:
        section_id, name = cursor.number(4), cursor.text()
        if name != "ram":
            raise _refusal(f"section {name[:80]} is sent in rounds, known is only that of RAM")
        instance, version = cursor.number(4), cursor.number(4)
        if (instance, version) != (0, words.RAM_VERSION):
            raise _refusal(f"RAM {instance} of version {version}, known is only 0 of version {words.RAM_VERSION}")
        if self._section_id is not None:
            raise _refusal("RAM begins twice")
        self._section_id = section_id
        self._step = self._read_record

    def _go_on_with_ram(self, cursor: _Cursor, kind: SectionKind) -> None:
        section_id = cursor.number(4)
        if self._section_id is None or section_id != self._section_id or self._kind is SectionKind.END:
            raise _refusal("a part of a section that is not RAM, or has ended")
        self._kind = kind
        self._step = self._read_record

    def _check_ram_has_ended(self, cursor: _Cursor, kind: int) -> None:
        if self._section_id is not None and self._kind is SectionKind.END:
            return
        if kind == words.EOF:
            raise _refusal("it ends before RAM has")
        cursor.take(4)
        raise _refusal(f"device {cursor.text()[:80]} comes before RAM has ended")

    def _read_footer(self) -> Event:
        cursor = self._at_hand()
        if (cursor.number(1), cursor.number(4)) != (words.FOOTER, self._section_id):
            raise _refusal("a section without its end")
        self._begin = cursor.at
        self._step = self._read_section
        return SectionEnded(self._kind)

    # ---- RAM

    def _read_record(self) -> Event | None:
        begin = self._begin + _WORD_BYTES
        if begin > self._end:
            raise _Short
        (word,) = words.WORD.unpack_from(self._buffer, self._begin)
        flags, offset = word & _FLAGS, word & _OFFSET
        if flags in _PAGE_RECORDS:
            return self._read_pages(flags, offset >> words.PAGE_BITS, begin)
        if flags == words.MEM_SIZE:
            self._begin_list(offset)
        elif flags == words.EOS:
            if not self._blocks:
                raise _refusal("RAM without a list of its blocks")
            self._step = self._read_footer
        elif flags != words.FLUSH:
            names = [f" ({name})" for flag, name in _OF_CAPABILITIES.items() if flags & flag]
            raise _refusal(f"RAM record with unknown flags {flags:#x}{''.join(names)}")
        self._begin = begin
        return None

    def _begin_list(self, total_bytes: int) -> None:
        if self._listed:
            raise _refusal("a second list of RAM blocks")
        if not total_bytes:
            raise _refusal("a list of no RAM blocks")
        self._unlisted_bytes = total_bytes
        self._step = self._read_block

    def _read_block(self) -> Event | None:
        cursor = self._at_hand()
        name, size_bytes = cursor.text(), cursor.number(8)
        if not 0 < size_bytes <= self._unlisted_bytes:
            raise _refusal(f"RAM block {name[:80]} of {size_bytes} bytes, there are {self._unlisted_bytes} for it")
        if size_bytes % PAGE_SIZE:
            raise _refusal(f"RAM block {name[:80]} of {size_bytes} bytes, which are no pages")
        if len(self._listed) == MAX_BLOCKS:
            raise _refusal(f"more than {MAX_BLOCKS} RAM blocks")
        self._listed.append(RamBlock(name, size_bytes, None))
        self._unlisted_bytes -= size_bytes
        self._begin = cursor.at
        return None if self._unlisted_bytes else self._start()

    def _start(self) -> Event:
        names = [block.name for block in self._listed]
        if len(set(names)) < len(names):
            raise _refusal("two RAM blocks of one name")
        if missing := [name for name in self._guest_ram if name not in names]:
            raise _refusal(f"no RAM block {missing[0][:80]}")
        small = [block for block in self._listed if block.name not in self._guest_ram]
        small_bytes = sum(block.size_bytes for block in small)
        if small_bytes > MAX_SMALL_BYTES:
            largest = max(small, key=lambda block: block.size_bytes)
            text = f"RAM blocks like {largest.name[:80]} have {small_bytes} bytes, allowed are {MAX_SMALL_BYTES}"
            raise _refusal(f"{text} beside guest RAM")
        for block in self._listed:
            pages = block.size_bytes // PAGE_SIZE
            kept = None if block.name in self._guest_ram else _Kept(pages)
            self._blocks[block.name.encode("ascii")] = _Block(block.name, pages, kept)
        self._step = self._read_record
        assert self._section_id is not None
        return Started(self._machine_type, tuple(self._listed), bytes(self._configuration), self._section_id)

    def _read_pages(self, flags: int, page: int, begin: int) -> Event | None:
        """The page whose record goes on at *begin*, and all that follow it in the same manner and are at hand."""
        block = self._block
        if not flags & words.CONTINUE:
            block, begin = self._named_block(begin)
        if block is None:
            raise _refusal("a page of no RAM block")
        if page >= block.pages:
            raise _refusal(f"page {page} of RAM block {block.name[:80]}, which has {block.pages}")
        size = 1 if flags & words.ZERO else PAGE_SIZE
        if begin + size > self._end:
            raise _Short
        if size == 1 and self._buffer[begin]:
            raise _refusal(f"a page filled with {self._buffer[begin]:#x}, known are only zeros")
        numbers = self._numbers_from(page, block.pages, begin + size, size)
        self._block = block
        self._begin = begin + size + (len(numbers) - 1) * (_WORD_BYTES + size)
        if size == 1:
            return _zeros_of(block, numbers)
        pages: PageBytes = np.ndarray(
            (len(numbers), PAGE_SIZE), np.uint8, self._buffer, begin, (_WORD_BYTES + PAGE_SIZE, 1)
        )
        pages.flags.writeable = False
        return _pages_of(block, numbers, pages)

    def _named_block(self, at: int) -> tuple[_Block, int]:
        """The block whose name stands at *at*, and what is behind it."""
        cursor = _Cursor(self._buffer, at, self._end)
        name = cursor.take(cursor.number(1))
        block = self._blocks.get(name)
        if block is None:
            raise _refusal(f"a page of unknown RAM block {name.decode('ascii', 'backslashreplace')[:80]}")
        return block, cursor.at

    def _numbers_from(self, page: int, end_page: int, begin: int, size: int) -> Numbers:
        """*page*, and the pages of the records from *begin* on, as long as these are like it, and ascend."""
        flags, stride = (words.ZERO if size == 1 else words.PAGE) | words.CONTINUE, _WORD_BYTES + size
        few = [page]
        while len(few) < _FEW:
            if begin + stride > self._end:
                return np.array(few, np.int64)
            (word,) = words.WORD.unpack_from(self._buffer, begin)
            is_like = word & _FLAGS == flags and few[-1] < word >> words.PAGE_BITS < end_page
            if not is_like or (size == 1 and self._buffer[begin + _WORD_BYTES]):
                return np.array(few, np.int64)
            few.append(word >> words.PAGE_BITS)
            begin += stride
        many = self._many_from(few[-1], end_page, begin, size)
        return np.concatenate([np.array(few, np.int64), *many])

    def _many_from(self, last: int, end_page: int, begin: int, size: int) -> Iterator[Numbers]:
        """As many at once as looked at together; first some, then more, as the next may be the last."""
        flags, stride = (words.ZERO if size == 1 else words.PAGE) | words.CONTINUE, _WORD_BYTES + size
        whole = (self._end - begin) // stride
        said = np.ndarray((whole,), ">u8", self._buffer, begin, (stride,))
        fills = np.ndarray((whole,), np.uint8, self._buffer, begin + _WORD_BYTES, (stride,)) if size == 1 else None
        at, look = 0, _FIRST_LOOK
        while at < whole:
            seen = said[at : at + look].astype(np.uint64)
            numbers = (seen >> np.uint64(words.PAGE_BITS)).astype(np.int64)
            fits = (seen & np.uint64(_FLAGS)) == flags
            fits &= numbers < end_page
            fits[1:] &= numbers[1:] > numbers[:-1]
            fits[0] &= numbers[0] > last
            if fills is not None:
                fits &= fills[at : at + look] == 0
            if not fits.all():
                yield numbers[: int(fits.argmin())]
                return
            yield numbers
            last = int(numbers[-1])
            at, look = at + len(fits), min(look * _LOOK_FARTHER, _LONGEST_LOOK)

    # ---- devices

    def _read_devices(self) -> Event:
        """All that is left; whether it is whole is asked each time more of it has come."""
        if self._begin == self._end:
            raise _Short
        nul = self._buffer.rfind(b"\0", self._begin, self._end)
        if nul >= 0:
            self._last_nul = len(self._devices) + nul - self._begin
        self._devices += memoryview(self._buffer)[self._begin : self._end]
        self._begin = self._end
        if len(self._devices) > MAX_DEVICE_BYTES:
            raise _refusal(f"devices of more than {MAX_DEVICE_BYTES} bytes")
        stream = self._cut() if self._is_like_an_end() else None
        if stream is None:
            raise _Short
        self._devices = bytearray()
        self._step = self._read_behind_end
        small = [block.small() for block in self._blocks.values()]
        return Ended(tuple(block for block in small if block), tuple(stream.devices), stream.tail)

    def _is_like_an_end(self) -> bool:
        """Whether an end mark's description reaches to where we are.

        There is no NUL in a description: so the last one stands in the mark itself, or in the length behind it. To ask
        costs nothing then, however much has come.
        """
        if not self._devices.endswith(b"}"):
            return False
        for at in range(max(self._last_nul - 5, 0), self._last_nul + 1):
            size = int.from_bytes(self._devices[at + 2 : at + 6], "big")
            if self._devices.startswith(b"\x00\x06", at) and at + 6 + size == len(self._devices):
                return True
        return False

    def _cut(self) -> DeviceStream | None:
        """To cut is the work of `stream`, which wants a whole stream: it is given the shortest head there is."""
        try:
            return parse_stream(_SHORTEST_HEAD + self._devices)
        except PayloadError as exc:
            self.doubt = exc
            self._false_ends += 1
            if self._false_ends > _MAX_FALSE_ENDS:
                raise
            return None

    def _read_behind_end(self) -> None:
        if self._begin == self._end:
            raise _Short
        raise _refusal("there is more behind its end")


class _Short(Exception):  # noqa: N818  (nothing is wrong)
    """What is at hand ends before what is to be read does."""


class _Refused:
    """The step after a refusal: that refusal."""

    def __init__(self, refusal: PayloadError) -> None:
        self._refusal = refusal

    def __call__(self) -> Event | None:
        raise self._refusal.with_traceback(None)


class _Cursor:
    def __init__(self, buffer: bytearray, at: int, end: int) -> None:
        self._buffer, self.at, self._end = buffer, at, end

    def take(self, size: int) -> bytes:
        if self.at + size > self._end:
            raise _Short
        self.at += size
        return bytes(self._buffer[self.at - size : self.at])

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def ascii(self, size: int) -> str:
        try:
            return self.take(size).decode("ascii")
        except UnicodeDecodeError:
            raise _refusal("a name that is not ASCII") from None

    def text(self) -> str:
        return self.ascii(self.number(1))


def _check_command(cursor: _Cursor) -> None:
    command, size = cursor.number(2), cursor.number(2)
    if _COMMANDS.get(command) != size:
        raise _refusal(f"unknown command {command} with {size} bytes")
    cursor.take(size)


def _check_no_capabilities(cursor: _Cursor) -> None:
    """QEMU lists only those that change the stream."""
    if cursor.number(4):
        raise _refusal(f"capability {cursor.text()[:80]} is switched on")


def _check_page_bits(cursor: _Cursor) -> None:
    if (bits := cursor.number(4)) != words.PAGE_BITS:
        raise _refusal(f"pages of 2^{bits} bytes")


_SUBSECTIONS: Final[Mapping[str, Callable[[_Cursor], object]]] = {
    words.CAPABILITIES: _check_no_capabilities,
    "configuration/uuid": lambda cursor: cursor.take(16),
    "configuration/target-page-bits": _check_page_bits,
}


def _refusal(text: str) -> PayloadError:
    return PayloadError(f"QEMU's migration stream: {text}", code="qemu_stream")


# ---- blocks


class _Kept:
    """The last contents of each page of a small block."""

    _UNSAID, _DATA, _ZEROS = range(3)

    def __init__(self, pages: int) -> None:
        self._said = np.zeros(pages, np.uint8)
        self._pages: PageBytes | None = None

    def note_pages(self, numbers: Numbers, pages: PageBytes) -> None:
        if self._pages is None:
            self._pages = np.zeros((len(self._said), PAGE_SIZE), np.uint8)
        self._pages[numbers] = pages
        self._said[numbers] = self._DATA

    def note_zeros(self, numbers: Numbers) -> None:
        self._said[numbers] = self._ZEROS

    def as_block(self, name: str) -> SmallBlock:
        numbers, zeros = (np.flatnonzero(self._said == said).astype(np.int64) for said in (self._DATA, self._ZEROS))
        pages = np.empty((0, PAGE_SIZE), np.uint8) if self._pages is None else self._pages[numbers]
        return SmallBlock(name, numbers, pages, zeros)


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """`kept` is None for guest RAM."""

    name: str
    pages: int
    kept: _Kept | None

    def small(self) -> SmallBlock | None:
        return self.kept.as_block(self.name) if self.kept else None


def _pages_of(block: _Block, numbers: Numbers, pages: PageBytes) -> PageRuns | None:
    if block.kept is None:
        return PageRuns(block.name, numbers, pages)
    block.kept.note_pages(numbers, pages)
    return None


def _zeros_of(block: _Block, numbers: Numbers) -> ZeroPages | None:
    if block.kept is None:
        return ZeroPages(block.name, numbers)
    block.kept.note_zeros(numbers)
    return None


_SHORTEST_HEAD: Final = b"".join(
    [
        words.HEADER + bytes([words.CONFIGURATION]) + bytes(4),
        bytes([words.START])
        + bytes(4)
        + words.text("ram")
        + struct.pack(">II", 0, words.RAM_VERSION)
        + words.end_of_section(0),
    ]
)
