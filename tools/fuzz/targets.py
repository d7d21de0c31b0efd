"""What is fuzzed: one function of bytes for each decoder, and what it may do with them.

A target reads *raw* as its decoder would get it. It may refuse, in the one class of error that its callers expect, in
one line; or accept, and then what was read must say the same again. Anything else (another exception, a hang, memory
without bound) is a defect. Seeds are small and valid, so that a fuzzer begins where the interesting code is.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tools.frame_fixtures import SAMPLES
from vmmigrate import jsontext
from vmmigrate.api import models
from vmmigrate.daemon import app
from vmmigrate.devices import registry
from vmmigrate.devices.payload import DevicePayload
from vmmigrate.engine import preamble
from vmmigrate.engine.journal import Journal
from vmmigrate.engine.journal_format import encode, read_contents
from vmmigrate.errors import (
    IdentityError,
    JournalError,
    PayloadError,
    RemoteProtocolError,
    SpecError,
    TransportError,
    UsageError,
    VmMigrateError,
)
from vmmigrate.hypervisor.qemu.payloads import TAIL, from_stream, to_stream
from vmmigrate.hypervisor.qemu.ramstream import RamStreamParser
from vmmigrate.hypervisor.qemu.stream import end_of_stream, parse_stream
from vmmigrate.memory import PAGE_SIZE, RamLayout, Region
from vmmigrate.net.door import HELLO, StreamHello, parse_hello
from vmmigrate.net.identity import Identity, identity_of_certificate
from vmmigrate.net.receiving import Landing, StreamReceiver
from vmmigrate.ownership import rules
from vmmigrate.ram.digest import PageHash
from vmmigrate.ram.encoding import WORDS
from vmmigrate.ram.records import HEADER, RecordHeader, RecordKind, pack_runs, unpack_header, unpack_runs
from vmmigrate.spec import amend, chain, document, ron, wire_v0
from vmmigrate.wire import codec
from vmmigrate.wire import messages as m
from vmmigrate.wire.framing import MAX_BODY_BYTES, Frame, FrameDecoder, encode_frame
from vmmigrate.wire.phases import Kind, Role
from vmmigrate.wire.session import Session

ROOT = Path(__file__).resolve().parents[2]
# Beyond 4300 digits a number is no int for Python; beyond 1000 levels recursion ends.
MAX_TEXT_BYTES = 10_000
CORPUS = ROOT / "tests" / "corpus"

Read = Callable[[bytes], None]


@dataclass(frozen=True)
class Target:
    """One decoder.

    Attributes:
        read: Feeds it; returns when the bytes were accepted, or refused as they should be.
        seeds: Valid inputs.
        max_bytes: Longer inputs tell nothing new.
    """

    name: str
    read: Read
    seeds: Sequence[bytes] = field(repr=False)
    max_bytes: int = 4096


def refusing(*allowed: type[VmMigrateError], max_chars: int = 2000) -> Callable[[Read], Read]:
    """A decoder that may refuse with *allowed*, and with nothing else, in one line that a log can hold."""

    def decorate(read: Read) -> Read:
        def refuse_or_read(raw: bytes) -> None:
            try:
                read(raw)
            except allowed as refusal:
                told = refusal
            else:
                return
            assert "\n" not in told.text, f"a refusal of several lines: {told.text!r}"
            assert len(told.text) < max_chars, f"a refusal of {len(told.text)} characters"
            assert told.code

        return refuse_or_read

    return decorate


# --------------------------------------------------------------------------- control channel


@refusing(RemoteProtocolError)
def read_frames(raw: bytes) -> None:
    """Whole, and byte by byte: the same frames, or the same refusal."""
    whole, single = FrameDecoder(), FrameDecoder()
    whole.receive_data(raw)
    frames = []
    for position in range(len(raw)):
        single.receive_data(raw[position : position + 1])
        while (frame := single.next_frame()) is not None:
            frames.append(frame)
            assert whole.next_frame() == frame
            assert len(frame.body) <= MAX_BODY_BYTES[frame.kind]
    assert whole.next_frame() is None
    assert b"".join(encode_frame(frame) for frame in frames) == raw[: len(raw) - _rest_of(single)]


def _rest_of(decoder: FrameDecoder) -> int:
    return decoder.buffered_bytes + (8 if decoder.announced is not None else 0)


@refusing(RemoteProtocolError)
def read_message(raw: bytes) -> None:
    """The first byte chooses the kind, the rest is its body."""
    kinds = list(Kind)
    frame = Frame(kinds[raw[0] % len(kinds)] if raw else Kind.OFFER, raw[1:])
    message = codec.decode(frame)
    assert codec.decode(codec.encode(message)) == message


@refusing(RemoteProtocolError)
def read_conversation(raw: bytes) -> None:
    """One end of a connection that hears *raw*; the first byte chooses which end."""
    session = Session(Role.SOURCE if not raw or raw[0] % 2 else Role.DESTINATION)
    session.receive_data(raw[1:])
    while not session.is_over and session.next_message() is not None:
        pass


@refusing(RemoteProtocolError, SpecError)
def read_preamble(raw: bytes) -> None:
    """The body of a preamble, as far as a destination reads it by itself."""
    message = codec.decode(Frame(Kind.PREAMBLE, raw))
    assert isinstance(message, m.Preamble)
    preamble.read_extents(message, preamble.read_layout(message, 1 << 36))
    preamble.digest_blobs(message.blobs)
    chain.up(preamble.read_spec(message, chain.CHAIN.names))


# --------------------------------------------------------------------------- bulk streams

LAYOUT = RamLayout([Region(0, 256 * PAGE_SIZE), Region(1 << 32, 64 * PAGE_SIZE)])
PAGE_HASH = PageHash(b"k" * 32)


@refusing(IdentityError)
def read_hello(raw: bytes) -> None:
    hello, proof = parse_hello(raw[: HELLO.size].ljust(HELLO.size, b"\0"))
    again, _ = parse_hello(hello.fields() + proof)
    assert again == hello


@refusing(RemoteProtocolError)
def read_record(raw: bytes) -> None:
    """A header and its table: what passes lies within guest RAM and in the stripes of its stream."""
    header = unpack_header(raw[: HEADER.size].ljust(HEADER.size, b"\0"), 0)
    table = raw[HEADER.size :][: header.runs * 12]
    runs = unpack_runs(table.ljust(header.runs * 12, b"\0"), header, LAYOUT, 0, 1)
    for first, count in runs.tolist():
        assert 0 <= first < first + count <= LAYOUT.pages


class _Recorded:
    """A link on which *raw* arrives, and then its end."""

    def __init__(self, raw: bytes) -> None:
        self._raw = memoryview(raw)

    def receive_into(self, target: memoryview) -> None:
        if len(self._raw) < len(target):
            raise TransportError("the recording ends", code="link_lost")
        target[:] = self._raw[: len(target)]
        self._raw = self._raw[len(target) :]

    await_into = receive_into

    def send(self, chunk: memoryview | bytes) -> None:
        raise AssertionError("a receiver sends nothing")

    def shutdown(self) -> None: ...

    def close(self) -> None: ...


@refusing(RemoteProtocolError, TransportError)
def read_stream(raw: bytes) -> None:
    """A whole stream into guest RAM, with pages beside it that nobody may touch."""
    memory = np.full((LAYOUT.pages + 2, PAGE_SIZE // 8), 0xA5, dtype=np.uint64)
    landing = Landing(LAYOUT.pages)
    receiver = StreamReceiver(_Recorded(raw), 0, 1, LAYOUT, memory[1:-1], PAGE_HASH, landing, WORDS)
    try:
        while receiver.receive_round() is not None:
            pass
    finally:
        assert (memory[0] == 0xA5).all()
        assert (memory[-1] == 0xA5).all()


# --------------------------------------------------------------------------- state


@refusing(PayloadError)
def read_payload(raw: bytes) -> None:
    """The first byte chooses the kind, the second the version, the rest is the body."""
    kinds = sorted(registry.KINDS)
    kind = registry.KINDS[kinds[raw[0] % len(kinds)] if raw else kinds[0]]
    version = kind.readable[raw[1] % len(kind.readable)] if raw[1:] else kind.newest
    registry.decode(DevicePayload("device", kind.name, version, raw[2:]))


@refusing(PayloadError)
def read_qemu_stream(raw: bytes) -> None:
    stream = parse_stream(raw)
    assert stream.joined() == raw
    assert end_of_stream(raw)


@refusing(PayloadError)
def read_qemu_ram(raw: bytes) -> None:
    """In pieces of a length that the input itself chooses."""
    parser, step = RamStreamParser(), 1 + sum(raw[-4:])
    for at in range(0, len(raw), step):
        parser.receive(raw[at : at + step])
        while parser.next_event() is not None:
            pass


@refusing(PayloadError)
def read_qemu_payloads(raw: bytes) -> None:
    """Cut where the seed is cut: the pieces of a damaged stream are payloads that a hostile peer might send."""
    payloads, at = [], 0
    for whole in from_stream(parse_stream(_qemu_seed()), {}):
        body = raw[at : at + len(whole.body)] if whole.instance_name != TAIL else raw[at:]
        payloads.append(replace(whole, body=body))
        at += len(whole.body)
    stream, _, _ = to_stream(payloads, [])
    assert stream.joined() == raw


@refusing(JournalError)
def read_journal(raw: bytes) -> None:
    contents = read_contents(raw, "journal")
    again = read_contents(encode(contents.id, contents.forgotten, contents.records), "journal")
    assert again == replace(contents, torn_bytes=0)


# --------------------------------------------------------------------------- texts


@refusing(SpecError)
def read_spec(raw: bytes) -> None:
    """The first byte chooses the version; what is accepted is written and read as the same, and goes up."""
    version = chain.CHAIN.names[raw[0] % len(chain.CHAIN.names)] if raw else chain.LATEST
    spec = document.parse(version, raw[1:])
    assert document.parse(version, document.serialise(spec)) == spec
    chain.up(spec)


@refusing(SpecError)
def read_json(raw: bytes) -> None:
    jsontext.parse(raw)


@refusing(SpecError)
def read_replacements(raw: bytes) -> None:
    amend.parse_replacements(raw)


# It quotes numbers whole, twice, as the reference implementation does.
@refusing(SpecError, max_chars=3 * MAX_TEXT_BYTES)
def read_ron_devices(raw: bytes) -> None:
    ron.read(wire_v0.DEVICES, raw)


@refusing(SpecError, max_chars=3 * MAX_TEXT_BYTES)
def read_ron_error(raw: bytes) -> None:
    ron.read(wire_v0.ERROR, raw)


@refusing(UsageError, SpecError)
def read_create_request(raw: bytes) -> None:
    body, _ = app.read_spec_request(raw)
    app.checked(models.CreateInstance, body)


@refusing(UsageError, SpecError)
def read_request(raw: bytes) -> None:
    """The first byte chooses what is asked for."""
    requests = (
        models.MigrateIn, models.MigrateOut, models.Cancel, models.ConsoleInput, models.Resolve, models.Superseded
    )  # fmt: skip
    app.checked(requests[raw[0] % len(requests) if raw else 0], app.read_json(raw[1:]))


# --------------------------------------------------------------------------- identity


@refusing(IdentityError)
def read_certificate(raw: bytes) -> None:
    identity = identity_of_certificate(raw)
    assert Identity.parse(identity.uri) == identity


@refusing(IdentityError)
def read_uri(raw: bytes) -> None:
    identity = Identity.parse(raw.decode("latin-1"))
    assert Identity.parse(identity.uri) == identity


# --------------------------------------------------------------------------- seeds


def _message_seeds() -> list[bytes]:
    kinds = list(Kind)
    return [bytes([kinds.index(sample.kind)]) + codec.encode(sample).body for sample in SAMPLES]


def _frame_seeds() -> list[bytes]:
    return [encode_frame(codec.encode(sample)) for sample in SAMPLES]


def _record_seeds() -> list[bytes]:
    runs = np.array([[0, 2], [4, 1]])
    pages = RecordHeader(RecordKind.PAGES, 2, 1, 3 * PAGE_SIZE, 0).pack() + pack_runs(LAYOUT, runs)
    zero = RecordHeader(RecordKind.ZERO, 2, 1, 0, 0).pack() + pack_runs(LAYOUT, runs)
    ends = [RecordHeader(kind, 0, 1, 0, 0).pack() for kind in (RecordKind.BARRIER, RecordKind.END)]
    return [pages + bytes(3 * PAGE_SIZE), zero, *ends]


def _stream_seed() -> bytes:
    runs = np.array([[0, 2]])
    parts = [
        RecordHeader(RecordKind.PAGES, 1, 1, 2 * PAGE_SIZE, 0).pack() + pack_runs(LAYOUT, runs) + b"p" * 2 * PAGE_SIZE,
        RecordHeader(RecordKind.ZERO, 1, 1, 0, 1).pack() + pack_runs(LAYOUT, runs),
        RecordHeader(RecordKind.BARRIER, 0, 1, 0, 2).pack(),
        RecordHeader(RecordKind.END, 0, 1, 0, 3).pack(),
    ]
    return b"".join(parts)


def _payload_seeds() -> list[bytes]:
    """The golden payloads, each behind its kind and version."""
    kinds, seeds = sorted(registry.KINDS), []
    for path in sorted((ROOT / "fixtures" / "payloads").glob("*/v*/*.hex")):
        kind, version = registry.KINDS[path.parent.parent.name], int(path.parent.name.removeprefix("v"))
        head = bytes([kinds.index(kind.name), kind.readable.index(version)])
        seeds.append(head + bytes.fromhex(path.read_text()))
    return seeds


def _qemu_seed(*records: bytes, with_address: bool = True) -> bytes:
    """A whole stream of QEMU's, as small as can be: a machine type, one block of RAM, two devices."""
    block = b"\x06pc.ram" + struct.pack(">Q", PAGE_SIZE) + (bytes(8) if with_address else b"")
    ram = b"\x01\0\0\0\2\x03ram" + struct.pack(">IIQ", 0, 4, PAGE_SIZE | 4) + block + struct.pack(">Q", 0x10)
    if records:
        ram += b"\x7e\0\0\0\2\x03\0\0\0\2" + b"".join(records) + struct.pack(">Q", 0x10)
    head = struct.pack(">II", 0x5145564D, 3) + b"\x07\0\0\0\x0dpc-i440fx-7.2" + ram + b"\x7e\0\0\0\2"
    devices = [b"\x04\0\0\0%c\x04apic\0\0\0%c\0\0\0\3state\x7e\0\0\0%c" % (3 + n, n, 3 + n) for n in range(2)]
    listed = [{"name": "apic", "instance_id": n, "version": 3} for n in range(2)]
    described = json.dumps({"devices": listed}).encode()
    return head + b"".join(devices) + b"\0\x06" + struct.pack(">I", len(described)) + described


def _qemu_ram_seed() -> bytes:
    """The same without `x-ignore-shared`: a page, then the same page as zeros."""
    page = struct.pack(">Q", 0x08) + b"\x06pc.ram" + b"p" * PAGE_SIZE
    return _qemu_seed(page, struct.pack(">Q", 0x22) + b"\0", with_address=False)


def _journal_seed() -> bytes:
    """A short history: an instance that was made, stopped and removed."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "journal.vmmj"
        journal = Journal(path)
        for event in (rules.Create("a"), rules.Stop("a"), rules.Remove("a"), rules.Create("b")):
            journal.commit(event)
        journal.compact(0)
        journal.commit(rules.Create("c"))
        journal.close()
        return path.read_bytes()


def _spec_seeds() -> list[bytes]:
    board = '{"cpus":1,"memory_mb":64,"chipset":{"type":"i440_fx","value":{"enable_pcie":false}}}'
    serial = '{"com1":{"type":"serial_port","component":{"num":"com1"}}}'
    text = f'{{"board":{board},"components":{serial}}}'.encode()
    return [bytes([number]) + text for number in range(len(chain.CHAIN.names))]


def _request_seeds() -> list[bytes]:
    spec = _spec_seeds()[0][1:]
    instance = b'"1cee5a1b-936d-4132-9d0a-2b6fbb0a8b6e"'
    return [b'{"id":' + instance + b',"spec_version":"v1","spec":' + spec + b',"start":true}']


_PREAMBLE = next(codec.encode(sample).body for sample in SAMPLES if sample.kind is Kind.PREAMBLE)
_HELLO = StreamHello("3dd63c0a-1599-48bd-a84f-2e419b205049", 1, 0).fields() + bytes(32)

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("frames", read_frames, _frame_seeds()),
        Target("messages", read_message, _message_seeds()),
        Target("conversation", read_conversation, [b"\1" + _frame_seeds()[0], b"\0" + b"".join(_frame_seeds()[1:3])]),
        Target("preamble", read_preamble, [_PREAMBLE]),
        Target("hello", read_hello, [_HELLO]),
        Target("record", read_record, _record_seeds()),
        Target("stream", read_stream, [_stream_seed()], 16_384),
        Target("payload", read_payload, _payload_seeds(), 16_384),
        Target("qemu_stream", read_qemu_stream, [_qemu_seed()], 16_384),
        Target("qemu_ram", read_qemu_ram, [_qemu_ram_seed()], 16_384),
        Target("qemu_payloads", read_qemu_payloads, [_qemu_seed()], 16_384),
        Target("journal", read_journal, [_journal_seed()]),
        Target("spec", read_spec, _spec_seeds(), MAX_TEXT_BYTES),
        Target("json", read_json, [b'{"a":[1,2.5,"x",null,true],"b":{}}'], MAX_TEXT_BYTES),
        Target(
            "replacements", read_replacements, [b'{"a":{"component":"VirtioNetworkBackend","spec":{"vnic_name":"v"}}}']
        ),
        Target(
            "ron_devices",
            read_ron_devices,
            [b'[(instance_name:"a",payload:[(kind:"k",version:1,data:"d")])]'],
            MAX_TEXT_BYTES,
        ),
        Target(
            "ron_error", read_ron_error, [b'Websocket("x")', b"UuidMismatch", b'ProtocolParse("a","b")'], MAX_TEXT_BYTES
        ),
        Target("create_request", read_create_request, _request_seeds(), MAX_TEXT_BYTES),
        Target(
            "request",
            read_request,
            [b'\1{"destination_host":"beta"}', b'\2{"reason":"x"}', b'\3{"port":"com1","text":""}'],
        ),
        Target("certificate", read_certificate, [b"\x30\x03\x02\x01\x01"]),
        Target("uri", read_uri, [b"spiffe://site.example/host/a", b"spiffe://site.example/operator/a"]),
    )
}


def corpus_of(target: Target) -> list[Path]:
    """Inputs that once found something, or that lead to rare code; replayed by every `make test`."""
    return sorted((CORPUS / target.name).glob("*"))
