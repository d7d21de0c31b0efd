"""Frames: whole, in pieces, too long, and not ours."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmigrate.errors import LocalProtocolError, RemoteProtocolError
from vmmigrate.wire.codec import encode
from vmmigrate.wire.framing import HEADER, MAX_BODY_BYTES, MIB, Frame, FrameDecoder, encode_frame
from vmmigrate.wire.messages import Message
from vmmigrate.wire.phases import Kind

from .pair import SAMPLE

KINDS = pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name)
FRAMES = [encode(SAMPLE[kind]) for kind in Kind]


@KINDS
def test_every_frame_decodes_whole_bytewise_and_with_trailing_bytes(kind: Kind) -> None:
    frame = encode(SAMPLE[kind])
    encoded = encode_frame(frame)

    whole, bytewise, trailing = FrameDecoder(), FrameDecoder(), FrameDecoder()
    whole.receive_data(encoded)
    assert whole.next_frame() == frame
    assert not whole.is_inside_frame

    for at, byte in enumerate(encoded):
        assert bytewise.next_frame() is None
        assert bytewise.is_inside_frame == (at > 0)
        bytewise.receive_data(bytes([byte]))
    assert bytewise.next_frame() == frame

    trailing.receive_data(encoded + encoded[:5])
    assert trailing.next_frame() == frame
    assert trailing.next_frame() is None
    assert trailing.is_inside_frame
    assert trailing.buffered_bytes == 5


@given(st.lists(st.sampled_from(FRAMES), max_size=6), st.data())
def test_any_chunking_of_a_stream_gives_the_same_frames(frames: list[Frame], draw: st.DataObject) -> None:
    stream = b"".join(map(encode_frame, frames))
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    decoder, seen = FrameDecoder(), []

    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        decoder.receive_data(memoryview(stream)[begin:end])
        while (frame := decoder.next_frame()) is not None:
            seen.append(frame)

    assert seen == frames
    assert not decoder.is_inside_frame


@pytest.mark.parametrize("tag", [0, max(Kind) + 1, 0x7FFF, 0xFFFF])
def test_an_unknown_tag_is_refused_with_the_header(tag: int) -> None:
    decoder = FrameDecoder()
    decoder.receive_data(HEADER.pack(10, tag, 0))

    with pytest.raises(RemoteProtocolError, match=f"unknown message tag {tag}$") as caught:
        decoder.next_frame()

    assert caught.value.code == "unknown_message"


@pytest.mark.parametrize("bit", range(16))
def test_every_reserved_bit_is_refused_with_the_header(bit: int) -> None:
    decoder = FrameDecoder()
    decoder.receive_data(HEADER.pack(0, Kind.HEARTBEAT, 1 << bit))

    with pytest.raises(RemoteProtocolError, match="HEARTBEAT: reserved bits 0x"):
        decoder.next_frame()


@KINDS
@pytest.mark.parametrize("excess", [1, None], ids=["one too many", "4 GiB"])
def test_an_oversize_length_is_refused_before_any_body_arrives(kind: Kind, excess: int | None) -> None:
    length = 0xFFFF_FFFF if excess is None else MAX_BODY_BYTES[kind] + excess
    decoder = FrameDecoder()
    decoder.receive_data(HEADER.pack(length, kind, 0))

    with pytest.raises(RemoteProtocolError, match=f"{kind.name}: a body of {length} bytes") as caught:
        decoder.next_frame()

    assert caught.value.code == "message_too_large"
    assert decoder.buffered_bytes == HEADER.size


def test_a_spent_decoder_stays_spent() -> None:
    """After a bad header the place in the stream is lost: later bytes must not be taken for frames."""
    decoder = FrameDecoder()
    decoder.receive_data(HEADER.pack(0, 999, 0))
    with pytest.raises(RemoteProtocolError):
        decoder.next_frame()

    decoder.receive_data(encode_frame(FRAMES[0]))

    with pytest.raises(RemoteProtocolError):
        decoder.next_frame()


@pytest.mark.parametrize("kind", [kind for kind in Kind if MAX_BODY_BYTES[kind] <= MIB], ids=lambda kind: kind.name)
def test_a_body_of_exactly_its_cap_passes_and_one_byte_more_is_never_sent(kind: Kind) -> None:
    cap = MAX_BODY_BYTES[kind]

    assert len(encode_frame(Frame(kind, bytes(cap)))) == HEADER.size + cap
    with pytest.raises(LocalProtocolError, match="at most") as caught:
        encode_frame(Frame(kind, bytes(cap + 1)))

    assert caught.value.code == "message_too_large"


def test_the_header_is_length_tag_and_reserved_in_network_order() -> None:
    assert encode_frame(Frame(Kind.HANDOFF, b"xyz")) == struct.pack(">IHH", 3, 14, 0) + b"xyz"


def test_a_header_tells_what_is_coming_while_its_body_is_missing() -> None:
    encoded = encode_frame(encode(SAMPLE[Kind.READY]))
    decoder = FrameDecoder()
    assert decoder.announced is None

    decoder.receive_data(encoded[:-1])
    assert decoder.next_frame() is None
    assert decoder.announced is Kind.READY

    decoder.receive_data(encoded[-1:])
    assert decoder.next_frame() is not None
    assert decoder.announced is None


def test_every_kind_has_a_cap_and_a_sample() -> None:
    assert set(MAX_BODY_BYTES) == set(SAMPLE) == set(Kind)
    assert all(isinstance(sample, Message) for sample in SAMPLE.values())
