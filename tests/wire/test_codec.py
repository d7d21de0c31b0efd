"""The codec table: what is written is read back, and nothing else is believed."""

from __future__ import annotations

import dataclasses
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmigrate.errors import LocalProtocolError, RemoteProtocolError
from vmmigrate.wire import messages as m
from vmmigrate.wire.codec import CODEC, MAX_EXTENTS, MAX_SPEC_BYTES, U64_MAX, decode, encode
from vmmigrate.wire.framing import MAX_BODY_BYTES, Frame
from vmmigrate.wire.phases import Kind

from .pair import SAMPLE
from .strategies import MESSAGES

KINDS = pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name)
FIELDS = [(kind, name) for kind in Kind for name in CODEC[kind].fields]
FIELD = pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda part: getattr(part, "name", part))


def body_of(kind: Kind) -> dict[str, Any]:
    """The sample of *kind* as the plain map that travels."""
    body: dict[str, Any] = msgpack.unpackb(encode(SAMPLE[kind]).body)
    return body


def frame_of(kind: Kind, body: Any) -> Frame:
    return Frame(kind, msgpack.packb(body))


def refusal(frame: Frame) -> str:
    """The text with which *frame* is refused."""
    with pytest.raises(RemoteProtocolError) as caught:
        decode(frame)
    assert caught.value.code == "bad_message"
    assert "\n" not in caught.value.text
    return caught.value.text


def outcome(frame: Frame) -> m.Message | RemoteProtocolError:
    """The message, or the refusal that a hostile body deserves; no other exception."""
    try:
        return decode(frame)
    except RemoteProtocolError as exc:
        return exc


@given(st.sampled_from(Kind).flatmap(MESSAGES.__getitem__))
def test_every_message_is_read_back_as_it_was_written(message: m.Message) -> None:
    frame = encode(message)

    assert decode(frame) == message
    assert encode(decode(frame)) == frame, "equal messages give equal bytes"


@KINDS
def test_the_table_names_exactly_the_fields_of_the_message(kind: Kind) -> None:
    cls = type(SAMPLE[kind])

    assert [field.name for field in dataclasses.fields(cls)] == list(CODEC[kind].fields)
    assert CODEC[kind].message is cls
    assert CODEC[kind].skip_unknown == (kind is Kind.OFFER)


@FIELD
def test_a_missing_field_is_refused_by_name(kind: Kind, name: str) -> None:
    body = body_of(kind)
    del body[name]

    assert refusal(frame_of(kind, body)) == f"{kind.name}: field {name!r} is missing"


@KINDS
def test_an_unknown_field_is_refused_by_name_except_in_an_offer(kind: Kind) -> None:
    """The offer is read before a version is agreed upon; a newer peer may say more there."""
    frame = frame_of(kind, {**body_of(kind), "novelty": {"any": [1, None, b"x"]}})

    if kind is Kind.OFFER:
        assert decode(frame) == SAMPLE[kind]
    else:
        assert refusal(frame) == f"{kind.name}: unknown field 'novelty'"


WRONG = (None, True, 7, -1, 1.5, float("nan"), "seven", b"seven", [], [[]], {}, {"a": 1}, {"a": None}, {b"a": "x"})


@FIELD
def test_a_value_of_another_type_is_refused_by_name(kind: Kind, name: str) -> None:
    """Of values of every type a field takes those of one type only; the others are refused, naming the field."""
    refused = 0
    for value in WRONG:
        frame = frame_of(kind, {**body_of(kind), name: value})
        found = outcome(frame)
        if isinstance(found, RemoteProtocolError):
            assert f"{kind.name}: field {name!r} is wrong, allowed is " in found.text
            refused += 1
        else:
            skipped = name == "ram" and isinstance(value, dict)  # topics of a newer peer that are no lists of words
            assert encode(found) == frame or isinstance(value, int) or skipped, f"{value!r} was coerced"

    assert refused >= len(WRONG) - 4


OUT_OF_RANGE: list[tuple[Kind, str, Any]] = [
    (Kind.OFFER, "protocols", [-1]),
    (Kind.OFFER, "protocols", [1 << 32]),
    (Kind.OFFER, "protocols", [1] * 257),
    (Kind.OFFER, "migration_id", "x" * 129),
    (Kind.OFFER, "ticket", "x" * 257),
    (Kind.OFFER, "spec_versions", ["x" * 65]),
    (Kind.OFFER, "payloads", {str(i): [1] for i in range(1025)}),
    (Kind.OFFER, "payloads", {"rtc": [1] * 65}),
    (Kind.OFFER, "payloads", {"x" * 257: [1]}),
    (Kind.OFFER, "ram", {str(i): [] for i in range(65)}),
    (Kind.OFFER, "max_streams", 0),
    (Kind.OFFER, "max_streams", 1025),
    (Kind.OFFER, "max_streams", True),
    (Kind.OFFER, "random", b"x" * 33),
    (Kind.SELECT, "protocol", 0),
    (Kind.SELECT, "protocol", 1 << 32),
    (Kind.SELECT, "bulk_port", 0),
    (Kind.SELECT, "bulk_port", 65_536),
    (Kind.SELECT, "verify", "none"),
    (Kind.SELECT, "offer_digest", b"x" * 65),
    (Kind.REFUSE, "code", "x" * 65),
    (Kind.REFUSE, "text", "x" * 16_385),
    (Kind.REFUSE, "details", {"a": float("nan")}),
    (Kind.REFUSE, "details", {"a": float("inf")}),
    (Kind.REFUSE, "details", {"a": b"bytes"}),
    (Kind.REFUSE, "details", {"a": {b"b": 1}}),
    (Kind.PREAMBLE, "run_state", "stopped"),
    (Kind.PREAMBLE, "epoch", [1]),
    (Kind.PREAMBLE, "epoch", [1, 2, 3]),
    (Kind.PREAMBLE, "epoch", [1, -1]),
    (Kind.PREAMBLE, "regions", [[0, 0]]),
    (Kind.PREAMBLE, "regions", [[0, 4096]] * 65),
    (Kind.PREAMBLE, "spec", b"x" * (MAX_SPEC_BYTES + 1)),
    (Kind.PREAMBLE, "devices", [["com1", "uart", 0, False]]),
    (Kind.PREAMBLE, "devices", [["com1", "uart", 1]]),
    (Kind.PREAMBLE, "devices", [["com1", "uart", 1, 0]]),
    (Kind.DEVICE_STATE, "payloads", [["com1", "uart", 1, False, "text"]]),
    (Kind.TIME_DATA, "values", {"tsc": 1.0}),
    (Kind.TIME_DATA, "values", {str(i): i for i in range(17)}),
    (Kind.STATE_END, "payloads", 4097),
    (Kind.HANDOFF, "run_state", ""),
    (Kind.RUNNING, "import_s", -0.001),
    (Kind.RUNNING, "import_s", 1e9 + 1),
    (Kind.RUNNING, "import_s", float("nan")),
    (Kind.RUNNING, "import_s", True),
    (Kind.PROGRESS, "counters", {"pages": -1}),
    (Kind.CANCEL, "reason", "x" * 4097),
]


@pytest.mark.parametrize(("kind", "name", "value"), OUT_OF_RANGE, ids=lambda part: str(part)[:24])
def test_a_value_out_of_its_bounds_is_refused_by_name_on_both_ends(kind: Kind, name: str, value: Any) -> None:
    frame = frame_of(kind, {**body_of(kind), name: value})
    sent = dataclasses.replace(SAMPLE[kind], **{name: value})

    assert f"{kind.name}: field {name!r} is wrong, allowed is " in refusal(frame)
    with pytest.raises(LocalProtocolError, match=f"{kind.name}: field {name!r} is wrong") as caught:
        encode(sent)
    assert caught.value.code == "bad_message"


def test_an_offer_leaves_room_for_a_newer_peer() -> None:
    offer = SAMPLE[Kind.OFFER]
    assert isinstance(offer, m.Offer)
    newer = frame_of(
        Kind.OFFER,
        {
            **body_of(Kind.OFFER),
            "protocols": [0, 1, U64_MAX >> 32],
            "ram": {"colours": ["red"], "lanes": 4, "levels": {"zstd": 3}, "names": ["x" * 65]},
            "x": [[]],
        },
    )

    decoded = decode(newer)

    assert decoded == dataclasses.replace(offer, protocols=(0, 1, U64_MAX >> 32), ram={"colours": ("red",)})


@pytest.mark.parametrize(
    ("details", "passes"),
    [({}, True), ({"a": [[[[[[0]]]]]]}, True), ({"a": [[[[[[[0]]]]]]]}, False), ({"a": {"b": {"c": None}}}, True)],
)
def test_details_are_nested_at_most_eight_deep(details: dict[str, Any], passes: bool) -> None:
    frame = frame_of(Kind.FAILED, {**body_of(Kind.FAILED), "details": details})

    if passes:
        assert decode(frame) == dataclasses.replace(SAMPLE[Kind.FAILED], details=details)
    else:
        assert "nested at most eight deep" in refusal(frame)


def test_a_whole_number_of_seconds_is_a_number_of_seconds() -> None:
    """`import_s=0` passes the type checker; refusing Running for it would leave a source in doubt for nothing."""
    running = dataclasses.replace(SAMPLE[Kind.RUNNING], import_s=0, resume_s=2)

    decoded = decode(encode(running))

    assert isinstance(decoded, m.Running)
    assert (decoded.import_s, decoded.resume_s) == (0.0, 2.0)
    assert isinstance(decoded.import_s, float)


@pytest.mark.parametrize("reason", ["\ud800", {"a": 1 << 64}], ids=["lone surrogate", "beyond 64 bits"])
def test_what_msgpack_cannot_say_is_our_fault_in_one_line(reason: Any) -> None:
    details = {"reason": reason}

    with pytest.raises(LocalProtocolError, match="FAILED: ") as caught:
        encode(m.Failed("code", "text", details))

    assert caught.value.code == "bad_message"


# --------------------------------------------------------------------------- hostile bodies

MAP_OF_ONE = b"\x81\xa6reason"
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "not a map": b"\x90",
    "nil": b"\xc0",
    "reserved byte": b"\xc1",
    "trailing byte": msgpack.packb({"reason": "x"}) + b"\x00",
    "two maps": msgpack.packb({"reason": "x"}) * 2,
    "cut off": msgpack.packb({"reason": "xyz"})[:-1],
    "not utf-8": MAP_OF_ONE + b"\xa1\xff",
    "number as name": b"\x81\x01\xa1x",
    "list as name": b"\x81\x90\xa1x",
    "string longer than the body": MAP_OF_ONE + b"\xdb\xff\xff\xff\xff",
    "array longer than the body": MAP_OF_ONE + b"\xdd\xff\xff\xff\xff",
    "map longer than the body": b"\xdf\xff\xff\xff\xff",
    "bin longer than the body": MAP_OF_ONE + b"\xc6\xff\xff\xff\xff",
    "a name twice": b"\x82\xa6reason\xa1x\xa6reason\xa1y",
    "a deep list": MAP_OF_ONE + b"\x91" * 4000 + b"\xc0",
    "a deep map": MAP_OF_ONE + b"\x81\xa1a" * 4000 + b"\xc0",
    "fixext1": MAP_OF_ONE + b"\xd4\x05x",
    "ext of nothing": MAP_OF_ONE + b"\xc7\x00\x05",
    "timestamp": MAP_OF_ONE + b"\xd6\xff\x00\x00\x00\x01",
    "timestamp of nothing": MAP_OF_ONE + b"\xc7\x00\xff",
    "ext of 4 GiB": MAP_OF_ONE + b"\xc9\xff\xff\xff\xff\x05",
}


@pytest.mark.parametrize("body", list(HOSTILE.values()), ids=list(HOSTILE))
def test_a_hostile_body_is_refused_in_one_line(body: bytes) -> None:
    assert refusal(Frame(Kind.CANCEL, body)).startswith("CANCEL: ")


@pytest.mark.parametrize("name", ["fixext1", "ext of nothing", "timestamp", "a name twice", "a deep list"])
def test_what_an_offer_skips_must_still_be_plain(name: str) -> None:
    """Unknown fields of an offer are skipped, not exempt: no extension types, no name twice, no abyss."""
    known = encode(SAMPLE[Kind.OFFER]).body
    extra = HOSTILE[name][1:]
    pairs = known[0] & 0x0F
    assert known[0] >> 4 == 8, "a fixmap, so that the count can be raised by hand"

    body = bytes([0x80 | pairs + (HOSTILE[name][0] & 0x0F)]) + known[1:] + extra

    refusal(Frame(Kind.OFFER, body))


def test_a_name_twice_is_refused_at_any_depth() -> None:
    details = b"\x82\xa1a\x01\xa1a\x02"
    body = b"\x83\xa4code\xa1x\xa4text\xa1y\xa7details" + details

    refusal(Frame(Kind.FAILED, body))


def test_more_extents_than_allowed_are_refused_before_they_are_unpacked() -> None:
    header = b"\x81\xa9populated\xdd" + (MAX_EXTENTS + 1).to_bytes(4, "big")

    refusal(Frame(Kind.PREAMBLE, header + b"\x00" * (MAX_EXTENTS + 1)))


LARGEST = [(kind, size) for kind, size in MAX_BODY_BYTES.items() if size > 1 << 20 or kind is Kind.OFFER]


@pytest.mark.parametrize(("kind", "size"), LARGEST, ids=lambda part: getattr(part, "name", ""))
@pytest.mark.parametrize(
    "filling",
    [b"\x90", b"\x80", b"\xa2ab", b"\xcd\xff\xff", b"\xca\x00\x00\x00\x01", b"\xc4\x02ab", b"\x91"],
    ids=["lists", "maps", "texts", "integers", "floats", "bytes", "abyss"],
)
def test_the_largest_body_costs_little_more_than_itself(kind: Kind, size: int, filling: bytes) -> None:
    """As many small objects as fit: unpacked they would take up to 60 times the body, gigabytes for device state."""
    count = (size - 16) // len(filling)
    body = b"\x81\xa1x\xdd" + count.to_bytes(4, "big") + filling * count
    frame = Frame(kind, body)
    tracemalloc.start()
    try:
        refusal(frame)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 32 << 20


@pytest.mark.parametrize("kind", [Kind.HEARTBEAT, Kind.DEVICE_STATE, Kind.PREAMBLE], ids=lambda kind: kind.name)
def test_nested_announcements_of_large_arrays_are_not_believed(kind: Kind) -> None:
    """Each header makes the unpacker allocate for all that it announces: 800 of them would ask for 6 GiB."""
    body = b"\x81\xa1x" + (b"\xdd" + (1 << 20).to_bytes(4, "big")) * 800
    tracemalloc.start()
    try:
        refusal(Frame(kind, body))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 1 << 20


def test_what_the_fields_allow_fits_the_count_of_objects() -> None:
    """The largest preamble and device state that we would send ourselves."""
    preamble = dataclasses.replace(
        SAMPLE[Kind.PREAMBLE],
        populated=tuple((i << 21, 1) for i in range(MAX_EXTENTS)),
        devices=(m.DeviceEntry("d", "k", 1, False),) * 4096,
    )
    state = m.DeviceState((m.PayloadItem("d", "k", 1, False, b""),) * 4096)

    for message in (preamble, state):
        assert decode(encode(message)) == message


def test_the_name_of_an_unknown_field_is_quoted_only_in_part() -> None:
    told = refusal(frame_of(Kind.FAILED, {**body_of(Kind.FAILED), "x" * 200_000: 1}))

    assert len(told) < 200


@given(st.sampled_from(Kind), st.binary(max_size=200))
def test_random_bytes_never_raise_anything_else(kind: Kind, body: bytes) -> None:
    found = outcome(Frame(kind, body))

    if isinstance(found, RemoteProtocolError):
        assert found.code == "bad_message"
    else:
        assert found.kind is kind


@given(st.sampled_from(Kind), st.data())
def test_a_damaged_frame_is_refused_or_is_a_message(kind: Kind, draw: st.DataObject) -> None:
    body = bytearray(encode(SAMPLE[kind]).body)
    at = draw.draw(st.integers(0, len(body) - 1))
    body[at] ^= draw.draw(st.integers(1, 255))

    found = outcome(Frame(kind, bytes(body)))

    if isinstance(found, RemoteProtocolError):
        assert found.code == "bad_message"
    else:
        assert decode(encode(found)) == found
