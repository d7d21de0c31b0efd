"""QEMU's stream with RAM: every page comes out as it went in, in whatever pieces it comes; a hostile one is refused.

`fixtures/qemu` holds what real QEMUs wrote; here is the hash of guest RAM as it was then. The rest is composed.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import shutil
import struct
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hypervisor.qemu_hosts import OTHER_QEMU, QEMU, requires_qemu, short_directory
from tests.hypervisor.test_qemu_stream import (
    BOARD,
    BOARD_10,
    EOS,
    HEADER,
    RAM_ID,
    RECORDED,
    SOON_S,
    U32,
    Device,
    capabilities,
    command,
    composed,
    configuration,
    devices_,
    footer,
    ram_end,
    ram_start,
    record,
    refused,
    sections,
    subsection,
    tail_of,
    text,
)
from vmmigrate.errors import PayloadError, UsageError
from vmmigrate.hypervisor.qemu import ramstream, saving
from vmmigrate.hypervisor.qemu.crafting import crafted, opening
from vmmigrate.hypervisor.qemu.qmp import Qmp
from vmmigrate.hypervisor.qemu.ramevents import (
    Ended,
    Event,
    PageRuns,
    SectionEnded,
    SectionKind,
    SmallBlock,
    Started,
    ZeroPages,
)
from vmmigrate.hypervisor.qemu.ramstream import MAX_SMALL_BYTES, RamStreamParser
from vmmigrate.hypervisor.qemu.stream import MAX_BLOCKS, parse_stream
from vmmigrate.memory import MIB, PAGE_SIZE

pytestmark = pytest.mark.slow

PAGE, ZERO, CONTINUE = 0x08, 0x02, 0x20
RAM_PAGES, BIOS_PAGES = 64, 8


root = pytest.fixture(short_directory)


# ---- feeding


def pieces_of(stream: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    """*stream* in pieces of *sizes*, which begin anew when they are used up."""
    at = 0
    for size in itertools.cycle(sizes):
        if at >= len(stream):
            return
        yield stream[at : at + size]
        at += size


def events_of(parser: RamStreamParser, piece: bytes) -> Iterator[Event]:
    parser.receive(piece)
    while (event := parser.next_event()) is not None:
        yield event


@dataclass(frozen=True)
class Said:
    """One page of an event; `contents` is None for zeros. What of it has to be the same however a stream is cut."""

    block: str
    page: int
    contents: bytes | None


def said_by(event: Event) -> list[Any]:
    """An event as it is equal to others; the pages of one, one by one."""
    if isinstance(event, PageRuns):
        return [Said(event.block, n, bytes(page)) for n, page in zip(event.numbers.tolist(), event.pages, strict=True)]
    if isinstance(event, ZeroPages):
        return [Said(event.block, n, None) for n in event.numbers.tolist()]
    if isinstance(event, Ended):
        return [[small_of(event), event.devices, event.tail]]
    return [event]


def small_of(ended: Ended) -> dict[str, dict[int, bytes | None]]:
    """The small blocks' pages by number; None for zeros."""
    return {block.name: pages_of(block) for block in ended.small_blocks}


def pages_of(block: SmallBlock) -> dict[int, bytes | None]:
    data = zip(block.numbers.tolist(), block.pages, strict=True)
    return {n: bytes(page) for n, page in data} | dict.fromkeys(block.zeros.tolist())


def heard(stream: bytes, sizes: Iterable[int] = (1 << 20,), parser: RamStreamParser | None = None) -> list[Any]:
    """All that *stream* says, in these pieces."""
    parser = parser or RamStreamParser()
    events = itertools.chain.from_iterable(events_of(parser, piece) for piece in pieces_of(stream, sizes))
    return [said for event in events for said in said_by(event)]


def first_and_last(stream: bytes) -> tuple[Started, Ended]:
    parser = RamStreamParser()
    events = list(events_of(parser, stream))
    started, ended = events[0], events[-1]
    assert isinstance(started, Started)
    assert isinstance(ended, Ended)
    return started, ended


def parsed(stream: bytes) -> None:
    """For streams that are refused."""
    heard(stream)


# ---- composing


def listed(*blocks: tuple[str | bytes, int], total_bytes: int | None = None) -> bytes:
    """A list of blocks as it is without `x-ignore-shared`: without addresses."""
    entries = b"".join(text(name) + struct.pack(">Q", size) for name, size in blocks)
    return record(0x04, entries, offset=sum(size for _, size in blocks) if total_bytes is None else total_bytes)


def page_record(page: int, fill: int | None, *, block: str = "") -> bytes:
    """A page of one byte, or of zeros; without *block*, of the same one as the last."""
    flags = (ZERO if fill is None else PAGE) | (0 if block else CONTINUE)
    contents = b"\0" if fill is None else bytes([fill]) * PAGE_SIZE
    return record(flags, (text(block) if block else b"") + contents, offset=page * PAGE_SIZE)


def ram_part(*records: bytes, section: int = RAM_ID) -> bytes:
    return b"\x02" + struct.pack(">I", section) + b"".join(records) + footer(section)


BEGIN = HEADER + configuration()
COMMANDS = command(1) + command(2, bytes(4))
LIST = listed(("pc.ram", RAM_PAGES * PAGE_SIZE), ("pc.bios", BIOS_PAGES * PAGE_SIZE))
HEAD = BEGIN + COMMANDS + ram_start(LIST, EOS)
END = ram_end(EOS)
DEVICES = [Device("apic"), Device("hpet")]


def whole(*ram: bytes, devices: Sequence[Device] = DEVICES, description: Any = None) -> bytes:
    return composed(devices, head=HEAD + b"".join(ram), description=description)


def with_records(*records: bytes) -> bytes:
    """A part of such records, which is all that there is so far."""
    return HEAD + ram_part(*records)


# ---- streams as QEMU wrote them


@dataclass(frozen=True)
class Recording:
    """What is known of a recorded stream: see the README beside it."""

    machine_type: str
    sizes: dict[str, int]
    devices: list[str]
    ram_sha256: str


RAM_BYTES = 16376 << 10
FIRMWARE = {
    "/rom@etc/acpi/tables": 128 << 10,
    "pc.rom": 128 << 10,
    "pc.bios": 64 << 10,
    "/rom@etc/table-loader": 4096,
    "/rom@etc/acpi/rsdp": 4096,
}
Q35 = [
    *("timer", "cpu_common", "cpu", "kvm-tpr-opt", "apic", "fw_cfg", "0000:00:00.0/mch", "PCIHost", "PCIBUS"),
    *("dma", "dma#1", "0000:00:1f.0/ICH9LPC", "i8259", "i8259#1", "ioapic", "hpet", "mc146818rtc", "i8254", "pcspk"),
    *("serial", "ps2kbd", "ps2mouse", "pckbd", "vmmouse", "port92", "0000:00:1f.2/ich9_ahci", "i2c_bus"),
    *("0000:00:1f.3/ich9_smb", "0000:00:01.0/vga", "0000:00:04.0/virtio-blk", "0000:00:08.0/virtio-net"),
    *("acpi_build", "globalstate"),
]
Q35_10 = [*Q35[: Q35.index("0000:00:1f.0/ICH9LPC")], "mc146818rtc", *Q35[Q35.index("0000:00:1f.0/ICH9LPC") :]]
del Q35_10[Q35_10.index("mc146818rtc", Q35_10.index("hpet"))]


def _with_port(board: list[str]) -> list[str]:
    return [*board[: board.index("fdc")], "serial", *board[board.index("fdc") :]]


RECORDINGS = {
    "7.2/ram-rounds": Recording(
        "pc-i440fx-7.2",
        {"pc.ram": RAM_BYTES, **FIRMWARE},
        _with_port(BOARD),
        "7f707ff7835ccbfbcbae19ab638044669f2e9b78484634785bb1d2411ed1008d",
    ),
    "7.2/ram-blocks": Recording(
        "pc-q35-7.2",
        {"0000:00:01.0/vga.vram": 16 * MIB, "pc.ram": RAM_BYTES, **FIRMWARE},
        Q35,
        "ced6f2870921c4afeb6e9dcde8486d120732da1a3dca5077d8e31bd80578dba7",
    ),
    "10.0/ram-rounds": Recording(
        "pc-i440fx-10.0",
        {"pc.ram": RAM_BYTES, **FIRMWARE},
        _with_port(BOARD_10),
        "906418ba4a80117fed47bdff85df44c1b70668e1624b23853264c430e6ddbecb",
    ),
    "10.0/ram-blocks": Recording(
        "pc-q35-10.0",
        {"0000:00:01.0/vga.vram": 16 * MIB, "pc.ram": RAM_BYTES, **FIRMWARE},
        Q35_10,
        "af8a0f2495b304e422bc2e561e4db9c6c7f566401c99d29d94a42d702fce2e27",
    ),
}
NAMES = list(RECORDINGS)


@cache
def recorded(name: str) -> bytes:
    return gzip.decompress((RECORDED / f"{name}.gz").read_bytes())


def loaded(stream: bytes, sizes: Iterable[int]) -> bytes:
    """Guest RAM as the events make it."""
    image = np.zeros((RAM_BYTES // PAGE_SIZE, PAGE_SIZE), np.uint8)
    parser = RamStreamParser()
    for piece in pieces_of(stream, sizes):
        for event in events_of(parser, piece):
            if isinstance(event, PageRuns):
                image[event.numbers] = event.pages
            elif isinstance(event, ZeroPages):
                image[event.numbers] = 0
    return image.tobytes()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1 << 30, 4 * MIB, 1 << 16, 5000])
def test_a_recorded_stream_makes_the_ram_that_the_guest_had(name: str, size: int) -> None:
    image = loaded(recorded(name), [size])

    assert hashlib.sha256(image).hexdigest() == RECORDINGS[name].ram_sha256


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_stream_tells_its_machine_its_blocks_and_its_devices(name: str) -> None:
    started, ended = first_and_last(recorded(name))

    recording = RECORDINGS[name]
    assert started.machine_type == recording.machine_type
    assert {block.name: block.size_bytes for block in started.blocks} == recording.sizes
    assert {block.gpa for block in started.blocks} == {None}
    assert [device.label for device in ended.devices] == recording.devices
    assert recorded(name).endswith(b"".join(device.raw for device in ended.devices) + ended.tail)


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_stream_sends_pages_anew(name: str) -> None:
    """Or it would not show that the last of them counts."""
    said = [item for item in heard(recorded(name)) if isinstance(item, Said)]

    assert len(said) > len({item.page for item in said}) + 50
    assert {item.block for item in said} == {"pc.ram"}


@given(sizes=st.lists(st.integers(200, 1 << 18), min_size=1, max_size=5))
@settings(max_examples=10)
def test_a_recorded_stream_says_the_same_in_any_pieces(sizes: list[int]) -> None:
    stream = recorded("7.2/ram-blocks")

    assert _hash_of(heard(stream, sizes)) == _hash_of(heard(stream))


def _hash_of(items: list[Any]) -> str:
    """Two lists of pages that differ are nothing for eyes."""
    return hashlib.sha256(repr(items).encode()).hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_stream_ends_at_its_end_and_never_before(name: str) -> None:
    """Byte by byte behind the last page: where it is cut, the end is not there, and nothing is wrong."""
    stream = recorded(name)
    _, ended = first_and_last(stream)
    devices_at = len(stream) - len(ended.tail) - sum(len(device.raw) for device in ended.devices)
    parser = RamStreamParser()

    begin = list(events_of(parser, stream[: devices_at - 13]))
    rest = [
        (at, event) for at in range(devices_at - 13, len(stream)) for event in events_of(parser, stream[at : at + 1])
    ]

    assert not any(isinstance(event, Ended) for event in begin)
    assert [(at, type(event)) for at, event in rest] == [(devices_at - 1, SectionEnded), (len(stream) - 1, Ended)]


# ---- streams that are composed


@dataclass(frozen=True)
class Written:
    """Records for consecutive pages of one kind."""

    block: str
    first: int
    fills: tuple[int | None, ...]
    is_named: bool


@st.composite
def written(draw: st.DrawFn) -> Written:
    block, pages = draw(st.sampled_from([("pc.ram", RAM_PAGES), ("pc.ram", RAM_PAGES), ("pc.bios", BIOS_PAGES)]))
    first = draw(st.integers(0, pages - 1))
    count = draw(st.integers(1, min(pages - first, 30)))
    fill = draw(st.one_of(st.none(), st.integers(0, 255)))
    step = 0 if fill is None else draw(st.integers(0, 1))
    fills = tuple(None if fill is None else (fill + n * step) % 256 for n in range(count))
    return Written(block, first, fills, draw(st.booleans()))


parts_ = st.lists(st.lists(written(), max_size=4), max_size=4)


def part_of(many: list[Written], before: str = "") -> tuple[bytes, str]:
    """The records of a section, and the block of its last page."""
    records = []
    for run in many:
        for n, fill in enumerate(run.fills):
            is_named = run.block != before or (run.is_named and not n)
            records.append(page_record(run.first + n, fill, block=run.block if is_named else ""))
            before = run.block
    return b"".join(records), before


def stream_of(parts: list[list[Written]], devices: Sequence[Device] = DEVICES) -> bytes:
    """The last of *parts* is the end section; blocks go on from one section to the next."""
    ram, before = [], ""
    for many in parts:
        records, before = part_of(many, before)
        ram.append(records)
    *middle, last = ram or [b""]
    return whole(*(ram_part(records, EOS) for records in middle), ram_end(last, EOS), devices=devices)


def wanted(parts: list[list[Written]]) -> tuple[list[Said], dict[int, bytes | None]]:
    """What the pages of guest RAM say, and what is kept of the other block."""
    said = [
        Said(run.block, run.first + n, None if fill is None else bytes([fill]) * PAGE_SIZE)
        for run in itertools.chain(*parts)
        for n, fill in enumerate(run.fills)
    ]
    return [item for item in said if item.block == "pc.ram"], {
        item.page: item.contents for item in said if item.block == "pc.bios"
    }


@given(parts=parts_, devices=devices_, sizes=st.lists(st.integers(40, 20_000), min_size=1, max_size=6))
def test_every_page_comes_out_as_it_went_in_whatever_the_pieces(
    parts: list[list[Written]], devices: list[Device], sizes: list[int]
) -> None:
    items = heard(stream_of(parts, devices), sizes)

    pages, small = wanted(parts)
    assert [item for item in items if isinstance(item, Said)] == pages
    small_blocks, cut, tail = items[-1]
    assert small_blocks == {"pc.bios": small}
    assert [device.raw for device in cut] == sections(devices)
    assert stream_of(parts, devices).endswith(b"".join(sections(devices)) + tail)


@given(parts=st.lists(st.lists(written(), max_size=2), max_size=2))
@settings(max_examples=20)
def test_a_stream_says_the_same_byte_by_byte(parts: list[list[Written]]) -> None:
    stream = stream_of(parts)

    assert heard(stream, [1]) == heard(stream)


@given(parts=parts_)
def test_sections_end_in_their_order(parts: list[list[Written]]) -> None:
    items = heard(stream_of(parts))

    kinds = [item.kind for item in items if isinstance(item, SectionEnded)]
    assert kinds == [SectionKind.START, *[SectionKind.PART] * (len(parts) - 1), SectionKind.END]


@given(parts=parts_)
def test_no_page_is_twice_in_an_event(parts: list[list[Written]]) -> None:
    """Else which of two is the newer one would have to be asked by everybody who takes the pages."""
    for event in events_of(RamStreamParser(), stream_of(parts)):
        if isinstance(event, PageRuns | ZeroPages):
            assert (np.diff(event.numbers) > 0).all()
            assert event.runs.sum(axis=0)[1] == len(event.numbers)


def test_pages_of_one_kind_come_together_also_where_they_are_no_neighbours() -> None:
    numbers = [*range(3, 20), 22, 40, 41]
    records = [page_record(n, 7, block="pc.ram" if n == 3 else "") for n in numbers]

    *_, event = events_of(RamStreamParser(), with_records(*records))

    assert isinstance(event, PageRuns)
    assert event.numbers.tolist() == numbers
    assert event.runs.tolist() == [[3, 17], [22, 1], [40, 2]]


@pytest.mark.parametrize("alike", [1, 2, 15, 16, 17, 79, 80, 81, 591, 592, 593, 700])
@pytest.mark.parametrize("fill", [None, 7])
@pytest.mark.parametrize("other", ["descends", "repeats", "other kind", "named", "torn"])
def test_an_event_ends_where_a_record_is_not_like_the_last(alike: int, fill: int | None, other: str) -> None:
    """However many of them are looked at together."""
    numbers = [5 + n * 3 for n in range(alike)]
    last = page_record(
        {"descends": 0, "repeats": numbers[-1]}.get(other, numbers[-1] + 1),
        fill if other != "other kind" else None if fill else 9,
        block="pc.ram" if other == "named" else "",
    )
    records = [page_record(n, fill, block="" if n > 5 else "pc.ram") for n in numbers]
    start = ram_start(listed(("pc.ram", 4096 * PAGE_SIZE)), *records, last[:-1] if other == "torn" else last)

    _, event, *rest = events_of(RamStreamParser(), BEGIN + start[: -len(footer()) - other.count("torn")])

    assert isinstance(event, PageRuns if fill else ZeroPages)
    assert event.numbers.tolist() == numbers
    assert len(rest) == (other != "torn")


def test_pages_are_a_view_of_what_was_received() -> None:
    parser = RamStreamParser()
    stream = with_records(page_record(3, 7, block="pc.ram"), page_record(4, 8))

    room = parser.buffer()
    room[: len(stream)] = stream
    parser.received(len(stream))
    *_, event = [parser.next_event() for _ in range(3)]

    assert isinstance(event, PageRuns)
    assert np.shares_memory(event.pages, np.frombuffer(room, np.uint8))
    assert not event.pages.flags.writeable
    assert event.pages.view(np.uint64).shape == (2, PAGE_SIZE // 8)


def test_a_block_goes_on_across_sections() -> None:
    """QEMU names it once, however many sections there are."""
    items = heard(HEAD + ram_part(page_record(1, 7, block="pc.ram"), EOS) + ram_part(page_record(2, 8)))

    assert [item.page for item in items if isinstance(item, Said)] == [1, 2]


def test_blocks_of_guest_ram_are_those_that_were_named() -> None:
    stream = whole(ram_end(page_record(1, 7, block="pc.bios"), page_record(1, 9, block="pc.ram"), EOS))

    items = heard(stream, parser=RamStreamParser(["pc.bios"]))

    assert Said("pc.bios", 1, b"\x07" * PAGE_SIZE) in items
    assert items[-1][0] == {"pc.ram": {1: b"\x09" * PAGE_SIZE}}


def test_every_known_subsection_of_the_configuration_is_kept_as_it_came() -> None:
    begin = HEADER + configuration(
        subsection("configuration/target-page-bits", struct.pack(">I", 12)),
        capabilities(),
        subsection("configuration/uuid", bytes(range(16))),
    )

    started, _ = first_and_last(composed(DEVICES, head=begin + COMMANDS + ram_start(LIST, EOS) + END))

    assert started.configuration == begin


def test_commands_and_flushes_of_newer_versions_are_stepped_over() -> None:
    """`send-switchover-start` came with machine types of 10.0, the flush with multifd of 8.1."""
    start = ram_start(LIST, record(0x200), EOS)
    stream = composed(DEVICES, head=BEGIN + COMMANDS + start + command(11) + ram_end(record(0x200), EOS))

    started, ended = first_and_last(stream)

    assert crafted(started, ended).head == BEGIN + ram_start(LIST, EOS) + END


# ---- the buffer


def test_a_buffer_that_nobody_empties_is_full() -> None:
    """A read into no room would look like the end of the connection."""
    parser = RamStreamParser(capacity_bytes=1 << 16)
    parser.received(len(parser.buffer()))

    with pytest.raises(UsageError, match="full"):
        parser.buffer()


@pytest.mark.parametrize("size", [-1, (1 << 16) + 1])
def test_more_than_there_was_room_for_cannot_have_been_received(size: int) -> None:
    parser = RamStreamParser(capacity_bytes=1 << 16)

    with pytest.raises(UsageError):
        parser.received(size)


def test_a_buffer_takes_at_least_a_few_pages() -> None:
    with pytest.raises(UsageError):
        RamStreamParser(capacity_bytes=4096)


@given(parts=parts_)
def test_there_is_always_room_when_all_events_were_taken(parts: list[list[Written]]) -> None:
    """Also in the smallest buffer, and also when as much is received each time as fits."""
    stream, parser, items, at = stream_of(parts), RamStreamParser(capacity_bytes=4 * PAGE_SIZE), [], 0

    while at < len(stream):
        room = parser.buffer()
        assert len(room) >= 2 * PAGE_SIZE
        piece = stream[at : at + len(room)]
        room[: len(piece)] = piece
        at += len(piece)
        parser.received(len(piece))
        while (event := parser.next_event()) is not None:
            items += said_by(event)

    assert items == heard(stream)


# ---- the stream for the destination


@given(parts=parts_, devices=devices_)
def test_a_crafted_stream_holds_all_but_guest_ram(parts: list[list[Written]], devices: list[Device]) -> None:
    stream = stream_of(parts, devices)
    started, ended = first_and_last(stream)

    again = heard(crafted(started, ended).joined())

    assert again == [started, SectionEnded(SectionKind.START), SectionEnded(SectionKind.END), heard(stream)[-1]]


@pytest.mark.parametrize("name", NAMES)
def test_a_crafted_stream_begins_as_qemus_own(name: str) -> None:
    """Blocks and their sizes have to be the very same: some are resized as they are loaded."""
    stream = recorded(name)
    started, _ = first_and_last(stream)

    begin = opening(started)

    assert begin.startswith(started.configuration)
    assert begin[len(started.configuration) :] in stream[:4096]


@given(parts=parts_, devices=devices_)
def test_a_crafted_stream_may_be_one_with_shared_ram(parts: list[list[Written]], devices: list[Device]) -> None:
    """Then it is one that the other page source might have made, and `stream` takes it."""
    started, ended = first_and_last(stream_of(parts, devices))

    made = crafted(started, ended, shared={"pc.ram": 1 << 20})

    assert parse_stream(made.joined()) == made
    assert [(block.name, block.gpa) for block in made.blocks] == [("pc.ram", 1 << 20), ("pc.bios", 0)]
    assert capabilities("x-ignore-shared") in made.head


# ---- QEMU itself


@contextlib.contextmanager
def destination(root: Path, machine_type: str, binary: str) -> Iterator[Qmp]:
    """A QEMU that waits for a stream, of a machine as in `ram-rounds`; its guest RAM is the file `ram`."""
    (root / "firmware").write_bytes(bytes(FIRMWARE["pc.bios"]))
    ram = f"memory-backend-file,id=pc.ram,size={RAM_BYTES},mem-path={root}/ram,share=on"
    with subprocess.Popen(
        [
            *(binary, "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-S"),
            *("-accel", "tcg", "-machine", f"{machine_type},memory-backend=pc.ram", "-cpu", "qemu64"),
            *("-object", ram, "-m", f"{RAM_BYTES >> 10}K", "-bios", f"{root}/firmware", "-serial", "null"),
            *("-qmp", f"unix:{root}/qmp,server=on,wait=off", "-incoming", "defer"),
        ],
        stdin=subprocess.DEVNULL,
    ) as process:
        qmp = Qmp(root / "qmp")
        try:
            yield qmp
        finally:
            qmp.close()
            process.kill()


async def prepare(qmp: Qmp, *, is_shared: bool) -> None:
    """As soon as it listens."""
    while True:
        with contextlib.suppress(OSError):
            if is_shared:
                await saving.prepare(qmp.execute)
            else:
                await qmp.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
            return
        await trio.sleep(0.01)


def _of_version_10() -> str:
    """A QEMU that has its machine type, or none."""
    for binary in filter(shutil.which, filter(None, (QEMU, OTHER_QEMU))):
        listed = subprocess.run([binary, "-machine", "help"], capture_output=True, text=True, check=False).stdout
        if "pc-i440fx-10.0 " in listed:
            return binary
    return ""


HAVE_10 = _of_version_10()


async def check_loading(name: str, who: str, root: Path, binary: str = QEMU) -> None:
    stream, is_shared = recorded(name), who.endswith("shared")
    started, ended = first_and_last(stream)
    if who != "qemu":
        (root / "ram").write_bytes(loaded(stream, [4 * MIB]))
        stream = crafted(started, ended, shared={"pc.ram": 0} if is_shared else None).joined()

    with trio.fail_after(30), destination(root, started.machine_type, binary) as qmp:
        await prepare(qmp, is_shared=is_shared)
        await saving.prepare_loading(qmp.execute, root / "in")
        await saving.load(qmp, root / "in", stream)
        size = FIRMWARE["pc.bios"]
        await qmp.execute("pmemsave", val=2**32 - size, size=size, filename=f"{root}/seen")

    (bios,) = [block for block in ended.small_blocks if block.name == "pc.bios"]
    assert hashlib.sha256((root / "ram").read_bytes()).hexdigest() == RECORDINGS[name].ram_sha256
    assert (root / "seen").read_bytes() == bios.pages.tobytes()


class TestWithQemu:
    pytestmark = requires_qemu

    @pytest.mark.parametrize("who", ["qemu", "crafted", "crafted-shared"])
    async def test_a_crafted_stream_makes_what_its_own_makes(self, who: str, root: Path) -> None:
        """Its own makes the RAM that the guest had; a crafted one finds that there, and leaves it alone."""
        await check_loading("7.2/ram-rounds", who, root)


@pytest.mark.skipif(not HAVE_10, reason="no QEMU here has pc-i440fx-10.0 (tools/other_qemu, VMM_OTHER_QEMU)")
@pytest.mark.parametrize("who", ["qemu", "crafted", "crafted-shared"])
async def test_a_crafted_stream_of_qemu_10_makes_what_its_own_makes(who: str, root: Path) -> None:
    await check_loading("10.0/ram-rounds", who, root, HAVE_10)


# ---- refusals


@pytest.mark.parametrize(
    ("flag", "name"), [(0x01, ""), (0x40, "xbzrle"), (0x80, "rdma"), (0x100, "compress"), (0x400, ""), (0x800, "")]
)
@pytest.mark.parametrize("flags", [0, PAGE, PAGE | CONTINUE, ZERO | CONTINUE], ids=hex)
def test_an_unknown_flag_is_named_as_soon_as_it_is_seen(flag: int, name: str, flags: int) -> None:
    with refused(hex(flag | flags), name):
        parsed(HEAD + ram_part()[:5] + record(flag | flags))


@pytest.mark.parametrize("flags", [0x00, ZERO | PAGE, 0x04 | PAGE, PAGE | 0x10, 0x04 | 0x10, CONTINUE, 0x30, 0x220])
def test_flags_that_exclude_each_other_are_refused(flags: int) -> None:
    with refused(hex(flags)):
        parsed(with_records(page_record(1, 7, block="pc.ram"), record(flags)))


@pytest.mark.parametrize("name", ["block", "dirty-bitmap", "vfio", "RAM", "slirp" + "x" * 200])
def test_another_section_that_is_sent_in_rounds_is_named(name: str) -> None:
    for before in (BEGIN, HEAD):
        with refused(name[:80]):
            parsed(before + b"\x01" + struct.pack(">I", 7) + text(name))


@pytest.mark.parametrize(("instance", "version"), [(0, 3), (0, 5), (1, 4)])
def test_ram_of_another_version_is_refused(instance: int, version: int) -> None:
    with refused("RAM", str(version)):
        parsed(BEGIN + b"\x01" + struct.pack(">I", 7) + text("ram") + struct.pack(">II", instance, version))


def test_a_part_of_another_section_is_refused() -> None:
    for stream in (HEAD + ram_part(section=7), BEGIN + ram_part(), HEAD + END + ram_part(), HEAD + END + END):
        with refused("not RAM"):
            parsed(stream)


@pytest.mark.parametrize("name", ["configuration/unheard-of", "uuid", ""])
def test_an_unknown_subsection_of_the_configuration_is_named(name: str) -> None:
    with refused(f"subsection {name} "):
        parsed(HEADER + configuration(b"\x05" + text(name)))


@pytest.mark.parametrize("name", ["x-ignore-shared", "mapped-ram", "\n\x1b[2J", "x" * 255])
def test_a_capability_that_changes_the_stream_is_named(name: str) -> None:
    with refused("capability"):
        parsed(HEADER + configuration(capabilities(name)))


@pytest.mark.parametrize("number", [0, 3, 4, 5, 6, 7, 8, 9, 10, 12, 0xFFFF])
def test_an_unknown_command_is_named(number: int) -> None:
    for before in (BEGIN, HEAD):
        with refused(f"command {number} "):
            parsed(before + b"\x08" + struct.pack(">HH", number, 0))


@pytest.mark.parametrize(("number", "size"), [(1, 1), (2, 0), (2, 8), (11, 4), (2, 0xFFFF)])
def test_a_known_command_with_other_arguments_is_refused(number: int, size: int) -> None:
    with refused(f"command {number} "):
        parsed(BEGIN + b"\x08" + struct.pack(">HH", number, size))


@pytest.mark.parametrize("kind", [0x05, 0x06, 0x09, 0x7E, 0xFF], ids=hex)
def test_an_unknown_kind_of_section_is_refused(kind: int) -> None:
    with refused(f"kind {kind}"):
        parsed(HEAD + bytes([kind]))


@pytest.mark.parametrize("before", [BEGIN, HEAD], ids=["RAM", "the end of RAM"])
def test_a_device_before_ram_has_ended_is_named(before: bytes) -> None:
    """`virtio-mem-early` is such a one: its state would have to be there before the pages."""
    with refused("virtio-mem-early"):
        parsed(before + b"\x04" + struct.pack(">I", 1) + text("virtio-mem-early"))
    with refused("ends before"):
        parsed(before + b"\x00")


@pytest.mark.parametrize(
    "stream",
    [
        b"\x11\x22\x33\x44\0\0\0\1",
        b"QEVM\0\0\0\2",
        HEADER + ram_start(LIST, EOS),
        HEADER + b"\x07" + struct.pack(">I", U32),
        HEADER + configuration(machine_type=b""),
        HEADER + configuration(machine_type=b"pc\xff"),
        BEGIN + configuration(),
        HEADER + configuration(subsection("configuration/target-page-bits", struct.pack(">I", 14))),
        HEADER + configuration(b"\x05" + text(b"\xff")),
        BEGIN + ram_start(EOS),
        HEAD[:-1] + b"\0",
        HEAD + ram_start(LIST, EOS),
    ],
    ids=[
        *("multifd", "version 2", "no configuration", "machine of 4 GiB", "machine of no name"),
        *("machine of no letters", "two configurations", "pages of 16 KiB", "subsection of no letters"),
        *("no list", "no footer", "two RAMs"),
    ],
)
def test_a_beginning_that_no_qemu_writes_is_refused(stream: bytes) -> None:
    with refused():
        parsed(stream)


@pytest.mark.parametrize(
    ("blocks", "word"),
    [
        (listed(("pc.ram", 4096)) * 2, "second list"),
        (record(0x04), "no RAM blocks"),
        (listed(("pc.ram", 4096), ("", 0), total_bytes=8192), "0 bytes"),
        (listed(("pc.ram", 8192), total_bytes=4096), "pc.ram"),
        (listed(("pc.ram", 4096), ("vga.vram", 2**64 - 1), total_bytes=8192), "vga.vram"),
        (listed(("pc.ram", 4097), ("pc.bios", 4095)), "no pages"),
        (listed(("pc.ram", 4096), ("pc.ram", 4096)), "one name"),
        (listed(("pc.rom", 4096)), "pc.ram"),
        (listed(("pc.ram", 4096), (b"\xff", 4096)), "ASCII"),
        (listed(("pc.ram", 1 << 40), ("pc.rom", 4096), ("nvdimm", MAX_SMALL_BYTES)), "nvdimm"),
        (listed(("pc.ram", 4096), *((f"rom{n}", 4096) for n in range(MAX_BLOCKS))), "blocks"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_list_of_blocks_that_cannot_be_is_refused(blocks: bytes, word: str) -> None:
    """Before a page has come, and so before anything has been done to the guest."""
    with refused(word):
        parsed(BEGIN + COMMANDS + ram_start(blocks)[: -len(footer())])


def test_as_many_blocks_as_there_may_be_are_taken_soon() -> None:
    began = time.thread_time()

    first, *_ = heard(BEGIN + ram_start(listed(*((f"rom{n}", 4096) for n in range(1, MAX_BLOCKS)), ("pc.ram", 4096))))

    assert len(first.blocks) == MAX_BLOCKS
    assert time.thread_time() - began < SOON_S


@pytest.mark.parametrize(
    ("records", "word"),
    [
        ([page_record(1, 7)], "no RAM block"),
        ([page_record(1, None)], "no RAM block"),
        ([page_record(1, 7, block="pc.rom")], "pc.rom"),
        ([page_record(1, 7, block="pc.ra")], "pc.ra"),
        ([record(PAGE, text(b"\xff\n\x1b"))], "unknown RAM block"),
        ([page_record(RAM_PAGES, 7, block="pc.ram")], f"page {RAM_PAGES} of RAM block pc.ram"),
        ([page_record(BIOS_PAGES, None, block="pc.bios")], "pc.bios"),
        ([page_record(1, 7, block="pc.ram"), page_record(2**52 - 1, 7)], "pc.ram"),
        ([page_record(1, 7, block="pc.ram"), page_record(2, 7), page_record(RAM_PAGES, 7)], "pc.ram"),
        ([page_record(1, None, block="pc.ram"), page_record(2, None), page_record(RAM_PAGES, None)], "pc.ram"),
        ([page_record(1, None, block="pc.ram")[:-1] + b"\1"], "0x1"),
        ([page_record(1, None, block="pc.ram"), page_record(2, None)[:-1] + b"\xff"], "0xff"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_page_that_is_not_there_is_refused(records: list[bytes], word: str) -> None:
    with refused(word):
        parsed(with_records(*records))


def test_what_is_before_a_bad_record_still_comes() -> None:
    parser, items = RamStreamParser(), []
    parser.receive(with_records(page_record(1, 7, block="pc.ram"), page_record(2, 8), record(0x40)))

    with refused("0x40"):
        while (event := parser.next_event()) is not None:
            items += said_by(event)

    assert [item.page for item in items if isinstance(item, Said)] == [1, 2]


@pytest.mark.parametrize("good", [1, 15, 16, 17, 79, 80, 81, 592])
@pytest.mark.parametrize(
    ("fill", "bad", "word"),
    [
        (None, page_record(4096, None), "page 4096 of"),
        (7, page_record(4096, 7), "page 4096 of"),
        (None, page_record(4000, None)[:-1] + b"\x2a", "0x2a"),
    ],
    ids=["zeros beyond the end", "a page beyond the end", "no zeros"],
)
def test_a_bad_record_behind_many_good_ones_is_refused(good: int, fill: int | None, bad: bytes, word: str) -> None:
    """However many of them are looked at together; and the good ones come."""
    records = [page_record(n, fill, block="" if n else "pc.ram") for n in range(good)]
    start = ram_start(listed(("pc.ram", 4096 * PAGE_SIZE)), *records, bad)
    parser, items = RamStreamParser(), []

    with refused(word):
        for event in events_of(parser, BEGIN + start):
            items += said_by(event)

    assert [item.page for item in items if isinstance(item, Said)] == [*range(good)]


def test_a_refusal_is_for_good() -> None:
    parser = RamStreamParser()

    for piece in (b"QEVM\0\0\0\1", HEADER, whole(END)):
        parser.receive(piece)
        with refused("version 3"):
            parser.next_event()


def test_refusals_are_one_printable_line() -> None:
    for stream in (
        HEADER + configuration(b"\x05" + text("\n\x1b[2J")),
        with_records(record(PAGE, text(b"\xff\n\x1b"))),
        BEGIN + b"\x01" + struct.pack(">I", 7) + text("a\nb\x07"),
    ):
        with pytest.raises(PayloadError) as caught:
            parsed(stream)
        assert caught.value.text.isprintable()


# ---- the end


def test_what_follows_the_end_is_refused() -> None:
    parser = RamStreamParser()
    parser.receive(whole(END))
    *_, last = iter(parser.next_event, None)
    assert isinstance(last, Ended)
    assert parser.next_event() is None

    parser.receive(b"\0")

    with refused("behind"):
        parser.next_event()


FALSE_END = b"\x00\x06\x00\x00\x00\x02{}"


def test_what_looks_like_the_end_in_a_device_is_none() -> None:
    """Though what was received until then ends there."""
    stream = whole(END, devices=[Device("apic", body=FALSE_END * 3), Device("hpet")])
    parser = RamStreamParser()

    seen = [event for piece in stream.split(b"{}") for event in events_of(parser, piece + b"{}")]

    assert not any(isinstance(event, Ended) for event in seen[:-1])
    assert parser.doubt is not None
    with refused("description"):
        raise parser.doubt


def test_a_length_that_looks_like_an_end_mark_hides_no_end() -> None:
    for size in (0x0006_0006, 0x0000_0600, 0x0006_0600, 0x0001_0006):
        description = b'{"devices": []'.ljust(size - 1) + b"}"

        *_, last = heard(whole(END, devices=[], description=description), [1000])

        assert last[2] == tail_of(description)


def test_ends_without_end_are_refused_soon() -> None:
    """To look at one costs as much as has come so far."""
    parser = RamStreamParser()
    list(events_of(parser, HEAD + END + Device("apic").section(1)))

    with refused():
        for _ in range(100_000):
            list(events_of(parser, FALSE_END))


def test_devices_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ramstream, "MAX_DEVICE_BYTES", 1 << 20)
    parser = RamStreamParser()
    list(events_of(parser, HEAD + END + b"\x04"))

    with refused(str(1 << 20)):
        for _ in range(20):
            list(events_of(parser, bytes(1 << 16)))


# ---- torn and changed streams


@given(parts=parts_, share=st.floats(0, 1, exclude_max=True))
def test_a_stream_that_breaks_off_is_neither_wrong_nor_over(parts: list[list[Written]], share: float) -> None:
    stream = stream_of(parts)

    items = heard(stream[: int(share * len(stream))])

    assert items == heard(stream)[: len(items)]
    assert not any(isinstance(item, list) for item in items)


@given(cut=st.integers(0, 400))
def test_a_beginning_that_breaks_off_is_not_wrong(cut: int) -> None:
    heard(HEAD[:cut])


def test_nothing_received_is_no_event() -> None:
    parser = RamStreamParser()

    assert list(events_of(parser, b"")) == []


def plainly(records: bytes) -> tuple[list[tuple[str, int, bytes]], bool]:
    """Pages of records in the plainest way there is, and whether what follows them is wrong."""
    sizes, names = {"pc.ram": RAM_PAGES, "pc.bios": BIOS_PAGES}, {b"pc.ram", b"pc.bios"}
    found, at, block = list[tuple[str, int, bytes]](), 0, b""
    while at + 8 <= len(records):
        word, behind = int.from_bytes(records[at : at + 8], "big"), at + 8
        flags, page = word % 4096, word // 4096
        if flags not in (PAGE, ZERO, PAGE | CONTINUE, ZERO | CONTINUE):
            return found, flags not in (0x10, 0x200)
        if not flags & CONTINUE:
            named = records[behind + 1 : behind + 1 + records[behind]] if behind < len(records) else b""
            if behind == len(records) or len(named) < records[behind]:
                return found, False
            block, behind = named, behind + 1 + len(named)
        if block not in names or page >= sizes[block.decode()]:
            return found, True
        size = PAGE_SIZE if flags & PAGE else 1
        contents = records[behind : behind + size]
        if len(contents) < size:
            return found, False
        if size == 1 and contents != b"\0":
            return found, True
        found.append((block.decode(), page, contents.ljust(PAGE_SIZE, b"\0")))
        at = behind + size
    return found, False


@st.composite
def changed_records(draw: st.DrawFn) -> bytes:
    """Records, some of which were damaged where their words, names and seams are."""
    raw = bytearray(part_of([run for many in draw(parts_) for run in many])[0])
    words = [at for at in range(0, len(raw), 9) if raw[at : at + 5] == bytes(5)] or [0]
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.one_of(st.sampled_from(words), st.integers(0, len(raw))))
        fresh = draw(st.one_of(st.binary(max_size=9), st.sampled_from([page_record(3, None), page_record(9, 9)])))
        raw[at : at + draw(st.sampled_from([0, len(fresh), 1, 300]))] = fresh
    return bytes(raw)


@given(records=changed_records(), sizes=st.lists(st.integers(40, 30_000), min_size=1, max_size=4))
def test_records_say_what_they_say_one_by_one_or_are_refused(records: bytes, sizes: list[int]) -> None:
    pages, is_wrong = plainly(records)
    parser, said, refusal = RamStreamParser(), list[Said](), None

    try:
        for piece in pieces_of(HEAD + ram_part()[:5] + records, sizes):
            for event in events_of(parser, piece):
                said += [item for item in said_by(event) if isinstance(item, Said)]
    except PayloadError as exc:
        refusal = exc

    plain = [Said(block, page, contents) for block, page, contents in pages if block == "pc.ram"]
    zeros = bytes(PAGE_SIZE)
    assert [(item.page, item.contents or zeros) for item in said][: len(plain)] == [
        (item.page, item.contents) for item in plain
    ]
    assert refusal is not None or not is_wrong


@cache
def _small() -> bytes:
    """The devices of a recorded stream behind a little RAM."""
    _, ended = first_and_last(recorded("7.2/ram-rounds"))
    ram = ram_part(page_record(1, 7, block="pc.ram"), page_record(2, 8), page_record(5, None), EOS)
    end = ram_end(page_record(2, 9, block="pc.bios"), EOS)
    return b"".join([HEAD, ram, end, *(device.raw for device in ended.devices), ended.tail])


@given(data=st.data(), size=st.sampled_from([100, 4096, 1 << 20]))
def test_a_stream_that_was_changed_is_taken_or_refused(data: st.DataObject, size: int) -> None:
    """Anything but a `PayloadError` fails."""
    stream = bytearray(_small())
    places = st.one_of(st.integers(0, len(HEAD) + 100), st.integers(0, len(stream) - 1))
    for at in data.draw(st.lists(places, min_size=1, max_size=4)):
        fresh = data.draw(st.one_of(st.binary(max_size=9), st.sampled_from([b"\xff" * 8, b"\x7e", b"\x00\x06"])))
        stream[at : at + data.draw(st.sampled_from([0, len(fresh), 1, 300]))] = fresh

    with contextlib.suppress(PayloadError):
        heard(bytes(stream), [size])


def test_what_is_changed_is_a_stream() -> None:
    *_, last = heard(_small())

    assert [device.label for device in last[1]] == RECORDINGS["7.2/ram-rounds"].devices


@given(noise=st.binary(max_size=300))
def test_noise_is_taken_or_refused(noise: bytes) -> None:
    for before in (b"", HEADER, BEGIN, BEGIN + b"\x01", HEAD, HEAD + ram_part()[:5], HEAD + END):
        with contextlib.suppress(PayloadError):
            heard(before + noise)


@pytest.mark.parametrize(
    "records",
    [
        b"".join(page_record(n % RAM_PAGES, None) for n in range(100_000, 0, -1)),
        b"".join(page_record(n % 2, None if n % 2 else 7) for n in range(5_000)),
        b"".join(page_record(63 - n % RAM_PAGES, 7) for n in range(5_000)),
        page_record(1, None, block="pc.bios") * 50_000,
    ],
    ids=["zeros that descend", "pages and zeros in turn", "pages that descend", "one page again and again"],
)
def test_records_made_to_be_many_events_are_parsed_soon(records: bytes) -> None:
    parser = RamStreamParser()
    began = time.thread_time()

    for piece in pieces_of(with_records(page_record(63, 7, block="pc.ram"), records), [4 * MIB]):
        for _ in events_of(parser, piece):
            pass

    assert time.thread_time() - began < SOON_S
