"""QEMU's stream is cut without a loss, and a stream that a hostile peer made is refused: always, by name, and soon.

`fixtures/qemu` holds what real QEMUs wrote, by version. What none writes is composed here, piece by piece.
"""

from __future__ import annotations

import gzip
import json
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmigrate.errors import PayloadError
from vmmigrate.hypervisor.qemu.stream import MAX_DEVICES, RamBlock, end_of_stream, parse_stream

RECORDED = Path(__file__).parents[2] / "fixtures" / "qemu"
NAMES = [f"{version}/{name}" for version in ("7.2", "10.0") for name in ("bare", "devices", "network")]
U32 = 2**32 - 1
RAM_ID = 2
SOON_S = 5.0

BOARD = [
    *("timer", "cpu_common", "cpu", "kvm-tpr-opt", "apic", "fw_cfg", "PCIHost", "PCIBUS", "0000:00:00.0/I440FX"),
    *("dma", "dma#1", "0000:00:01.0/PIIX3", "i8259", "i8259#1", "ioapic", "hpet", "mc146818rtc", "i8254", "pcspk"),
    *("fdc", "ps2kbd", "ps2mouse", "pckbd", "vmmouse", "port92", "0000:00:01.1/ide", "i2c_bus"),
    *("0000:00:01.3/piix4_pm", "acpi_build", "globalstate"),
]
# The same ones; since 8.0 those of the south bridge are made with it.
BOARD_10 = [
    *("timer", "cpu_common", "cpu", "kvm-tpr-opt", "apic", "0000:00:00.0/I440FX", "PCIHost", "PCIBUS", "fw_cfg"),
    *("dma", "dma#1", "mc146818rtc", "0000:00:01.1/ide", "i2c_bus", "0000:00:01.3/piix4_pm", "0000:00:01.0/PIIX3"),
    *("i8259", "i8259#1", "ioapic", "hpet", "i8254", "pcspk"),
    *("fdc", "ps2kbd", "ps2mouse", "pckbd", "vmmouse", "port92", "acpi_build", "globalstate"),
]


def _labels(version: str, board: list[str]) -> dict[str, list[str]]:
    ports, nic = ["serial", "serial#1"], "0000:00:08.0/virtio-net"
    return {
        f"{version}/bare": board,
        f"{version}/devices": [*board[:-2], *ports, "0000:00:04.0/virtio-blk", nic, *board[-2:]],
        f"{version}/network": ["timer", "slirp", *board[1:-2], nic, *board[-2:]],
    }


LABELS = _labels("7.2", BOARD) | _labels("10.0", BOARD_10)
BLOCKS = (
    RamBlock("pc.ram", 32 << 20, 0),
    RamBlock("/rom@etc/acpi/tables", 128 << 10, 0),
    RamBlock("pc.rom", 128 << 10, 0xC0000),
    RamBlock("pc.bios", 64 << 10, 0xFFFF0000),
    RamBlock("/rom@etc/table-loader", 4096, 0),
    RamBlock("/rom@etc/acpi/rsdp", 4096, 0),
)


@cache
def recorded(name: str) -> bytes:
    """A stream as QEMU wrote it."""
    return gzip.decompress((RECORDED / f"{name}.gz").read_bytes())


# ---- streams that nobody wrote


def text(name: str | bytes) -> bytes:
    return bytes([len(name)]) + (name if isinstance(name, bytes) else name.encode())


HEADER = struct.pack(">II", 0x5145564D, 3)


def configuration(*subsections: bytes, machine_type: bytes = b"pc-i440fx-7.2") -> bytes:
    return b"\x07" + struct.pack(">I", len(machine_type)) + machine_type + b"".join(subsections)


def subsection(name: str, body: bytes = b"") -> bytes:
    return b"\x05" + text(name) + struct.pack(">I", 1) + body


def capabilities(*names: str, count: int | None = None) -> bytes:
    number = len(names) if count is None else count
    return subsection("configuration/capabilities", struct.pack(">I", number) + b"".join(map(text, names)))


def command(number: int, body: bytes = b"") -> bytes:
    return b"\x08" + struct.pack(">HH", number, len(body)) + body


def record(flags: int, rest: bytes = b"", *, offset: int = 0) -> bytes:
    return struct.pack(">Q", offset | flags) + rest


EOS = record(0x10)


def footer(section: int = RAM_ID) -> bytes:
    return b"\x7e" + struct.pack(">I", section)


def ram_start(*records: bytes, name: str = "ram") -> bytes:
    return b"\x01" + struct.pack(">I", RAM_ID) + text(name) + struct.pack(">II", 0, 4) + b"".join(records) + footer()


def ram_end(*records: bytes, section: int = RAM_ID) -> bytes:
    return b"\x03" + struct.pack(">I", section) + b"".join(records) + footer(section)


def block_list(*blocks: tuple[str, int, int], total_bytes: int | None = None) -> bytes:
    listed = b"".join(text(name) + struct.pack(">QQ", size, gpa) for name, size, gpa in blocks)
    return record(0x04, listed, offset=sum(size for _, size, _ in blocks) if total_bytes is None else total_bytes)


@dataclass(frozen=True)
class Device:
    name: str
    instance: int = 0
    version: int = 1
    body: bytes = b"state"
    tells_version: bool = True

    def section(self, number: int) -> bytes:
        head = b"\x04" + struct.pack(">I", number) + text(self.name) + struct.pack(">II", self.instance, self.version)
        return head + self.body + footer(number)

    def entry(self) -> dict[str, Any]:
        told = {"vmsd_name": self.name, "version": self.version} if self.tells_version else {"size": len(self.body)}
        return {"name": self.name, "instance_id": self.instance, **told}


def sections(devices: Sequence[Device]) -> list[bytes]:
    return [device.section(10 + n) for n, device in enumerate(devices)]


def tail_of(description: Any) -> bytes:
    """The end mark and a description: any value, or the very bytes."""
    spelled = description if isinstance(description, bytes) else json.dumps(description).encode()
    return b"\x00\x06" + struct.pack(">I", len(spelled)) + spelled


def described(devices: Sequence[Device]) -> dict[str, Any]:
    return {"page_size": 4096, "devices": [device.entry() for device in devices]}


BEGIN = HEADER + configuration(capabilities("x-ignore-shared")) + command(1) + command(2, bytes(4))
RAM = ram_start(block_list(("pc.ram", 1 << 20, 0), ("pc.bios", 1 << 16, 0xFFFF0000)), EOS)


def composed(devices: Sequence[Device] = (), *, head: bytes = BEGIN + RAM, description: Any = None) -> bytes:
    told = described(devices) if description is None else description
    return b"".join([head, *sections(devices), tail_of(told)])


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """What stands in here is refused as `qemu_stream`, with these words, before anybody gets impatient.

    Time is that of the processor, so that the neighbours of a test do not count.
    """
    began = time.thread_time()
    with pytest.raises(PayloadError) as caught:
        yield
    assert caught.value.code == "qemu_stream"
    for word in words:
        assert word in caught.value.text
    assert time.thread_time() - began < SOON_S


def is_cut_or_refused(stream: bytes) -> bool:
    """Whether *stream* is taken; whatever is not cut exactly is refused. Anything else fails the test."""
    parsed = None
    with suppress(PayloadError):
        parsed = parse_stream(stream)
    assert parsed is None or parsed.joined() == stream
    return parsed is not None


# ---- streams as QEMU writes them


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_stream_is_cut_into_pieces_that_are_its_bytes(name: str) -> None:
    stream = recorded(name)

    parsed = parse_stream(stream)

    assert parsed.joined() == stream
    assert json.loads(parsed.tail[6:]).keys() - {"configuration"} == {"page_size", "devices"}  # which 10 has, too


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_stream_tells_its_machine_and_its_blocks(name: str) -> None:
    parsed = parse_stream(recorded(name))

    assert parsed.machine_type == f"pc-i440fx-{name.partition('/')[0]}"
    assert tuple(parsed.blocks) == BLOCKS


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_stream_tells_its_devices_in_their_order(name: str) -> None:
    parsed = parse_stream(recorded(name))

    assert [device.label for device in parsed.devices] == LABELS[name]


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("/network")])
def test_a_device_of_the_old_style_has_the_version_that_stands_in_the_stream(name: str) -> None:
    """`slirp` is described without one."""
    parsed = parse_stream(recorded(name))

    versions = {device.label: device.version for device in parsed.devices}
    assert (versions["slirp"], versions["vmmouse"], versions["0000:00:08.0/virtio-net"]) == (4, 0, 11)


def test_the_last_round_of_a_newer_qemu_is_announced_where_its_machine_has_that() -> None:
    """So that the recordings hold what is said to be new."""
    announced = command(11) + b"\x03"

    assert [name for name in NAMES if announced in recorded(name)] == [n for n in NAMES if n.startswith("10.0/")]


@pytest.mark.parametrize("name", NAMES)
def test_each_device_of_a_recorded_stream_is_a_whole_section(name: str) -> None:
    parsed = parse_stream(recorded(name))

    for device in parsed.devices:
        section = device.raw[1:5]
        assert device.raw[5:].startswith(text(device.name) + struct.pack(">II", device.instance, device.version))
        assert (device.raw[0], device.raw[-5:]) == (4, b"\x7e" + section)


# ---- streams that are composed

bodies = st.one_of(
    st.binary(max_size=60),
    # Made of what the cutting looks for: footers, section starts, end marks.
    st.lists(
        st.sampled_from(
            [footer(10), footer(11), b"\x7e", b"\x04", b"\x00\x06", b"\x00\x06\x00\x00\x00\x02{}", b"\x05a"]
        )
    ).map(b"".join),
)
devices_ = st.lists(
    st.builds(
        Device,
        name=st.text(st.characters(codec="ascii", min_codepoint=33, exclude_characters="#"), min_size=1, max_size=20),
        instance=st.one_of(st.integers(0, 3), st.integers(0, U32)),
        version=st.integers(0, U32),
        body=bodies,
        tells_version=st.booleans(),
    ),
    max_size=6,
    unique_by=lambda device: (device.name, device.instance),
)


@given(devices=devices_)
def test_devices_are_cut_where_they_were_joined(devices: list[Device]) -> None:
    stream = composed(devices)

    parsed = parse_stream(stream)

    assert [device.raw for device in parsed.devices] == sections(devices)
    assert [(d.name, d.instance, d.version) for d in parsed.devices] == [
        (d.name, d.instance, d.version) for d in devices
    ]
    assert (parsed.head, parsed.joined()) == (BEGIN + RAM, stream)


def test_a_machine_without_devices_is_a_stream() -> None:
    parsed = parse_stream(composed())

    assert parsed.devices == ()


def test_pages_and_zeros_of_small_blocks_belong_to_the_head() -> None:
    """Their contents may look like anything."""
    page = (footer() + b"\x04\x00\x06{}").ljust(4096, b"\x7e")
    ram = RAM + ram_end(
        record(0x08, text("pc.bios") + page),
        record(0x08 | 0x20, page, offset=4096),
        record(0x02, text("pc.rom") + b"\0"),
        record(0x02 | 0x20, b"\0", offset=4096),
        record(0x200),
        EOS,
    )

    parsed = parse_stream(composed([Device("apic")], head=BEGIN + ram))

    assert parsed.head == BEGIN + ram


def test_every_known_subsection_of_the_configuration_is_stepped_over() -> None:
    known = [
        capabilities("x-ignore-shared", "another"),
        subsection("configuration/uuid", bytes(16)),
        subsection("configuration/target-page-bits", bytes(4)),
    ]

    parsed = parse_stream(composed([Device("apic")], head=HEADER + configuration(*known) + RAM))

    assert parsed.machine_type == "pc-i440fx-7.2"


def test_the_command_with_which_qemu_10_begins_its_last_round_is_stepped_over() -> None:
    """`send-switchover-start`, which machine types from 10.0 on have: hosts may run any QEMU from 7.2 on."""
    head = BEGIN + RAM + command(11) + ram_end(EOS)

    parsed = parse_stream(composed([Device("apic")], head=head))

    assert parsed.head == head


# ---- the end


@pytest.mark.parametrize("name", NAMES)
def test_the_end_is_seen_when_it_is_there_and_never_before(name: str) -> None:
    """At each length of what has come, and so in whatever pieces it comes."""
    stream, come = recorded(name), bytearray()

    ends = []
    for byte in stream:
        come.append(byte)
        if end_of_stream(come):
            ends.append(len(come))

    assert ends == [len(stream)]


@given(devices=devices_)
def test_a_composed_stream_ends_at_its_end(devices: list[Device]) -> None:
    assert end_of_stream(composed(devices))


def test_a_length_that_looks_like_an_end_mark_hides_no_end() -> None:
    """A description of 0x0006_0006 bytes: its length holds the mark, twice."""
    description = b'{"devices": []'.ljust(0x0006_0005) + b"}"

    stream = composed(description=description)

    assert end_of_stream(stream)
    assert parse_stream(stream).tail == tail_of(description)


@pytest.mark.parametrize("forged", [b"{}", b'{"devices": []}'], ids=["empty", "of no devices"])
def test_state_that_looks_like_a_description_is_not_the_end(forged: bytes) -> None:
    """A guest chooses much of its devices' state, and QEMU's writes may end anywhere."""
    stream = composed([Device("virtio", body=b"begun" + tail_of(forged) + b"goes on")])

    until = stream.index(forged) + len(forged)
    assert not end_of_stream(stream[:until])


def test_something_behind_the_description_is_no_end() -> None:
    stream = composed([Device("apic")])

    assert not end_of_stream(stream + b"}")
    assert not end_of_stream(stream + b"\x00\x06")
    assert not end_of_stream(b"")


# ---- torn and changed streams


def _cuts(stream: bytes) -> list[int]:
    """Lengths at which to tear: everywhere in the first header and around each seam, and here and there between."""
    parsed = parse_stream(stream)
    seams = [len(parsed.head)]
    for device in parsed.devices:
        seams.append(seams[-1] + len(device.raw))
    near = {seam + by for seam in seams for by in (-6, -5, -1, 0, 1, 5, 6, 7, 12)}
    return sorted({*range(400), *near, *range(400, len(stream), 1009), len(stream) - 1} & {*range(len(stream))})


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_that_breaks_off_is_refused_wherever_it_does(name: str) -> None:
    stream = recorded(name)

    for cut in _cuts(stream):
        with refused():
            parse_stream(stream[:cut])


@cache
def _small() -> bytes:
    """A recorded stream without most of its pages, which are its largest part and its dullest."""
    parsed = parse_stream(recorded("7.2/bare"))
    description = json.loads(parsed.tail[6:])
    for entry in description["devices"]:
        entry.pop("fields", None), entry.pop("subsections", None)
    return b"".join([BEGIN, RAM, *(device.raw for device in parsed.devices), tail_of(description)])


@cache
def _places() -> list[int]:
    """Where it hurts: lengths, kinds, ids, names, footers."""
    parsed = parse_stream(_small())
    seams = [len(parsed.head)]
    for device in parsed.devices:
        seams.append(seams[-1] + len(device.raw))
    near = {seam + by for seam in seams for by in range(-5, 24)}
    return sorted({*range(len(BEGIN) + len(RAM)), *near} & {*range(len(_small()))})


@st.composite
def changed(draw: st.DrawFn) -> bytes:
    stream = bytearray(_small())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.one_of(st.sampled_from(_places()), st.integers(0, len(stream) - 1)))
        fresh = draw(
            st.one_of(st.binary(max_size=9), st.sampled_from([b"\xff" * 4, b"\xff" * 8, b"\x7e", b"\x00\x06"]))
        )
        stream[at : at + draw(st.sampled_from([0, len(fresh), 1, 300]))] = fresh
    return bytes(stream)


@given(stream=changed())
def test_a_stream_that_was_changed_is_cut_exactly_or_refused(stream: bytes) -> None:
    is_cut_or_refused(stream)
    end_of_stream(stream)


def test_what_is_changed_is_a_stream() -> None:
    assert is_cut_or_refused(_small())


@given(noise=st.binary(max_size=300), devices=devices_)
def test_noise_behind_the_header_is_cut_exactly_or_refused(noise: bytes, devices: list[Device]) -> None:
    is_cut_or_refused(HEADER + noise)
    is_cut_or_refused(BEGIN + noise + tail_of(described(devices)))
    is_cut_or_refused(composed(devices, head=BEGIN + RAM + noise))


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4) | st.just("apic"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {}, optional={"name": values, "instance_id": values, "version": values, "fields": values}
)


@given(listed=st.lists(st.one_of(entries, values), max_size=4) | values)
def test_a_description_of_anything_is_taken_or_refused(listed: Any) -> None:
    for description in (listed, {"devices": listed}):
        is_cut_or_refused(composed([Device("apic")], description=description))


@given(spelled=st.binary(max_size=40))
def test_a_description_that_is_no_json_is_refused(spelled: bytes) -> None:
    with refused("description"):
        parse_stream(composed(description=b'{"devices": [], ' + spelled))


def test_devices_in_another_order_than_described_are_refused_by_name() -> None:
    one, other = Device("apic"), Device("hpet")

    with refused("apic"):
        parse_stream(composed([other, one], description=described([one, other])))


@pytest.mark.parametrize(
    "entry", [{"name": "hpet"}, {"instance_id": 1}, {"version": 2}], ids=["name", "instance", "version"]
)
def test_a_device_that_is_not_as_described_is_refused(entry: dict[str, Any]) -> None:
    description = {"devices": [{**Device("apic").entry(), **entry}]}

    with refused(str(entry.get("name", "apic"))):
        parse_stream(composed([Device("apic")], description=description))


def test_a_device_without_its_end_is_refused_by_name() -> None:
    devices = [Device("apic"), Device("hpet")]
    first, second = sections(devices)

    with refused("apic"):
        parse_stream(BEGIN + RAM + first[:-1] + second + tail_of(described(devices)))


def test_a_device_that_is_not_described_is_refused() -> None:
    devices = [Device("apic"), Device("hpet")]

    with refused("more than the description says"):
        parse_stream(BEGIN + RAM + b"".join(sections(devices)) + tail_of(described([])))


def test_a_device_that_is_there_twice_is_refused_by_name() -> None:
    """QEMU would load both states into the same device. Two user networks of QEMU 7.2 really are both `slirp` 0."""
    twice = [Device("slirp", tells_version=False), Device("apic"), Device("slirp", tells_version=False)]

    with refused("slirp"):
        parse_stream(composed(twice))


def test_labels_of_different_devices_differ() -> None:
    """Or a payload could stand for either."""
    with refused("apic#1"):
        parse_stream(composed([Device("apic", instance=1), Device("apic#1")]))


# ---- what we do not know


@pytest.mark.parametrize("flag", [0x01, 0x40, 0x80, 0x100, 0x400, 0x800], ids=hex)
def test_an_unknown_flag_of_a_ram_record_is_named(flag: int) -> None:
    """XBZRLE, RDMA, compression: capabilities that are off."""
    with refused(hex(flag)):
        parse_stream(composed(head=BEGIN + ram_start(record(flag), EOS)))


@pytest.mark.parametrize("flags", [0x00, 0x02 | 0x08, 0x04 | 0x08, 0x08 | 0x10, 0x04 | 0x10], ids=hex)
def test_flags_of_a_ram_record_that_exclude_each_other_are_refused(flags: int) -> None:
    """QEMU would read them otherwise than we do, or not at all."""
    rest = text("pc.bios") + bytes(4096)

    with refused("flags"):
        parse_stream(composed(head=BEGIN + ram_start(record(flags, rest if flags & 0x0A else b""), EOS)))


@pytest.mark.parametrize("name", ["block", "dirty-bitmap", "vfio", "RAM", "slirp" + "x" * 200])
def test_another_section_that_is_sent_in_rounds_is_named(name: str) -> None:
    with refused(name[:80]):
        parse_stream(composed(head=BEGIN + ram_start(EOS, name=name)))


def test_a_part_of_an_unknown_section_is_refused() -> None:
    for head in (BEGIN + RAM + ram_end(EOS, section=7), BEGIN + ram_end(EOS)):
        with refused("not RAM"):
            parse_stream(composed(head=head))


@pytest.mark.parametrize("name", ["configuration/unheard-of", "uuid", ""])
def test_an_unknown_subsection_of_the_configuration_is_named(name: str) -> None:
    with refused(f"subsection {name} "):
        parse_stream(composed(head=HEADER + configuration(subsection(name, bytes(16))) + RAM))


@pytest.mark.parametrize("number", [0, 3, 4, 5, 6, 7, 8, 9, 10, 0xFFFF])
def test_an_unknown_command_is_named(number: int) -> None:
    """3 to 10 are of post-copy and COLO: QEMU 7.2 takes them though they are switched off, and aborts or hangs up."""
    with refused(f"command {number}"):
        parse_stream(composed(head=BEGIN + command(number, bytes(4)) + RAM))


@pytest.mark.parametrize("section", [0x06, 0x09, 0x7E, 0xFF], ids=hex)
def test_an_unknown_kind_of_section_is_refused(section: int) -> None:
    with refused():
        parse_stream(composed([Device("apic")], head=BEGIN + RAM + bytes([section])))


@pytest.mark.parametrize("magic", [b"", b"QEVM", b"QEVM\0\0\0\2", b"QEVM\0\0\0\4", b"\x11\x22\x33\x44\0\0\0\1"])
def test_what_is_no_stream_of_version_3_is_refused(magic: bytes) -> None:
    with refused():
        parse_stream(magic + composed([Device("apic")])[8:])


@pytest.mark.parametrize(
    ("head", "word"),
    [
        (HEADER + RAM, "configuration"),
        (BEGIN + configuration() + RAM, "configuration"),
        (BEGIN, "RAM"),
        (BEGIN + RAM + RAM, "RAM"),
    ],
    ids=["no configuration", "two configurations", "no RAM", "two lists of blocks"],
)
def test_a_head_that_no_qemu_writes_is_refused(head: bytes, word: str) -> None:
    """The machine type and the blocks that we tell must be those that QEMU will go by."""
    with refused(word):
        parse_stream(composed([Device("apic")], head=head))


@pytest.mark.parametrize("by", [-4096, 4096], ids=["less", "more"])
def test_a_list_of_blocks_whose_sizes_are_not_their_sum_is_refused(by: int) -> None:
    """QEMU reads on until the sum is used up exactly."""
    listed = block_list(("pc.ram", 1 << 20, 0), ("pc.bios", 1 << 16, 0), total_bytes=(1 << 20) + (1 << 16) + by)

    with refused():
        parse_stream(composed(head=BEGIN + ram_start(listed, EOS)))


# ---- absurd numbers


@pytest.mark.parametrize("missing", [1, 4096, U32], ids=["one more", "a page more", "all that can be said"])
def test_lengths_that_reach_beyond_the_end_are_refused(missing: int) -> None:
    stream = composed([Device("apic")])
    description = len(tail_of(described([Device("apic")]))) - 6
    longer = min(description + missing, U32)

    with refused("description"):
        parse_stream(stream[: -description - 4] + struct.pack(">I", longer) + stream[-description:])
    with refused("middle"):
        parse_stream(HEADER + b"\x07" + struct.pack(">I", max(missing, len(stream))) + stream[8:])


@pytest.mark.parametrize(
    "head",
    [
        HEADER + configuration(capabilities("x-ignore-shared", count=U32)) + RAM,
        HEADER + configuration(capabilities(*[""] * 300)) + RAM,
        HEADER + configuration(machine_type=b"pc\xff") + RAM,
        HEADER + configuration(subsection("configuration/uuid", bytes(3))),
        BEGIN + b"\x08\x00\x02\xff\xff",
        BEGIN + ram_start(record(0x04, offset=1 << 63), EOS),
        BEGIN + ram_start(block_list(("pc.ram", 0, 0), total_bytes=4096), EOS),
        BEGIN + ram_start(record(0x04, text("a") + b"\xff" * 16, offset=4096), EOS),
        BEGIN + ram_start(record(0x08, text(b"\xff" * 255)), EOS),
        BEGIN + ram_start(record(0x08, text("pc.bios"))),
        BEGIN + b"\x01",
        BEGIN + RAM[:-1] + b"\0",
    ],
    ids=[
        "more capabilities than there are",
        "300 capabilities",
        "machine of no letters",
        "half a UUID",
        "command of 64 KiB",
        "blocks of 8 EiB",
        "block of no bytes",
        "block of 16 EiB",
        "block of no letters",
        "half a page",
        "half a header",
        "RAM without its end",
    ],
)
def test_a_head_with_absurd_numbers_is_refused(head: bytes) -> None:
    with refused():
        parse_stream(composed([Device("apic")], head=head))


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("instance_id", -1),
        ("instance_id", 2**32),
        ("instance_id", 2**32 + 7),
        ("instance_id", 2**64),
        ("instance_id", 10**400),
        ("instance_id", True),
        ("instance_id", None),
        ("instance_id", "0"),
        ("instance_id", float("inf")),
        ("version", -1),
        ("version", 2**32),
        ("version", 10**400),
        ("version", True),
        ("version", 1.0),
        ("version", None),
        ("name", ""),
        ("name", "x" * 256),
        ("name", "\u00e4pic"),
        ("name", ["apic"]),
        ("name", {}),
    ],
    ids=lambda value: str(value)[:12],
)
def test_an_absurd_entry_of_the_description_is_refused(word: str, value: Any) -> None:
    """Also where it is the right one once it is cut to 32 bits: what we tell must be what QEMU reads."""
    number = int(value) & U32 if word == "instance_id" and isinstance(value, int) else 0
    device = Device("apic", instance=number)

    with refused():
        parse_stream(composed([device], description={"devices": [{**device.entry(), word: value}]}))


@pytest.mark.parametrize("count", [MAX_DEVICES + 1, 10**6])
def test_more_devices_than_a_machine_has_are_refused(count: int) -> None:
    stream = composed(description={"devices": [Device("apic").entry()] * count})

    with refused():
        parse_stream(stream)


def test_as_many_devices_as_a_machine_may_have_are_cut_soon() -> None:
    devices = [Device("apic", instance=n) for n in range(MAX_DEVICES)]
    began = time.thread_time()

    parsed = parse_stream(composed(devices))

    assert len(parsed.devices) == MAX_DEVICES
    assert time.thread_time() - began < SOON_S


@pytest.mark.parametrize("brackets", [("[", "]"), ('{"a":', "}")], ids=["lists", "objects"])
@pytest.mark.parametrize("depth", [2000, 500_000])
def test_a_deep_description_is_refused(depth: int, brackets: tuple[str, str]) -> None:
    opened, closed = brackets
    stream = composed(description=f'{{"devices": [], "deep": {opened * depth}1{closed * depth}}}'.encode())

    with refused("description"):
        parse_stream(stream)


def test_a_description_longer_than_that_of_any_machine_is_refused_unread() -> None:
    """To read JSON takes some twenty times its bytes of memory; that of a machine with 255 processors has 4 MiB."""
    stream = composed(description=b'{"devices": []' + b" " * (32 << 20) + b"}")

    with refused("description"):
        parse_stream(stream)


def test_a_list_of_very_many_blocks_is_refused() -> None:
    many = record(0x04, (text("") + struct.pack(">QQ", 4096, 0)) * 100_000, offset=4096 * 100_000)
    stream = composed(head=BEGIN + ram_start(many, EOS))

    with refused("blocks"):
        parse_stream(stream)


@pytest.mark.parametrize(
    "body",
    [
        footer(10) * 400_000,
        b"\x00\x06" * 1_000_000,
        (footer(10) + b"\x04\0\0\0\x0b" + text("hpet")) * 100_000,
        b"\x00\x06\x00\x00\x00\x02{}" * 250_000,
    ],
    ids=["footers", "end marks", "half headers", "descriptions"],
)
def test_state_made_to_be_searched_is_cut_soon(body: bytes) -> None:
    devices = [Device("apic", body=body), Device("hpet", body=body)]
    stream = composed(devices)
    began = time.thread_time()

    parsed = parse_stream(stream)

    assert [device.label for device in parsed.devices] == ["apic", "hpet"]
    assert parsed.joined() == stream
    assert time.thread_time() - began < SOON_S


def test_end_marks_without_a_description_are_refused_soon() -> None:
    with refused("description"):
        parse_stream(BEGIN + RAM + b"\x00\x06" * 1_000_000)


def test_seams_of_a_recorded_stream_are_where_its_sections_begin() -> None:
    """What tears and changes streams here looks for places near them: it must know them."""
    starts = [place for place in _places() if _small()[place] == 4]

    assert len(starts) >= len(BOARD)
    assert all(one < other for one, other in pairwise(starts))
