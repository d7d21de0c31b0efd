"""Frames: an 8-byte header, then a body. Nothing is buffered beyond what a header has been allowed to announce.

Header, big-endian: body length u32, message tag u16, reserved u16 (zero). The tag is checked and the length compared
with that tag's cap as soon as the header is there, so a hostile length never makes us wait or allocate.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from vmmigrate.errors import LocalProtocolError, RemoteProtocolError
from vmmigrate.wire.phases import Kind

HEADER = struct.Struct("!IHH")

KIB, MIB = 1 << 10, 1 << 20

# Caps on bodies. Generous for what a message is for; small for everything that is not bulk.
MAX_BODY_BYTES: Mapping[Kind, int] = {
    Kind.OFFER: 256 * KIB,
    Kind.SELECT: 256 * KIB,
    Kind.REFUSE: 256 * KIB,
    Kind.PREAMBLE: 32 * MIB,
    Kind.PREAMBLE_OK: 256 * KIB,
    Kind.ROUND_END: 4 * KIB,
    Kind.ROUND_APPLIED: 4 * KIB,
    Kind.PAUSED: 4 * KIB,
    Kind.TIME_DATA: 4 * KIB,
    Kind.DEVICE_STATE: 65 * MIB,
    Kind.CONSOLE_HISTORY: 3 * MIB,
    Kind.STATE_END: 4 * KIB,
    Kind.READY: 4 * KIB,
    Kind.HANDOFF: 4 * KIB,
    Kind.RUNNING: 4 * KIB,
    Kind.REFUSED: 64 * KIB,
    Kind.RETURNED: 64 * KIB,
    Kind.PROGRESS: 4 * KIB,
    Kind.HEARTBEAT: 4 * KIB,
    Kind.CANCEL: 64 * KIB,
    Kind.FAILED: 256 * KIB,
    Kind.RESUME: 4 * KIB,
    Kind.RESUMED: 4 * KIB,
    Kind.APPLIED: 33 * MIB,
}


@dataclass(frozen=True, slots=True)
class Frame:
    kind: Kind
    body: bytes


def encode_frame(frame: Frame) -> bytes:
    """Header and body.

    Raises:
        LocalProtocolError: The body is larger than its kind allows; nothing was sent.
    """
    if len(frame.body) > MAX_BODY_BYTES[frame.kind]:
        raise LocalProtocolError(
            f"{frame.kind.name}: a body of {len(frame.body)} bytes, at most {MAX_BODY_BYTES[frame.kind]} are allowed",
            code="message_too_large",
        )
    return HEADER.pack(len(frame.body), frame.kind, 0) + frame.body


class FrameDecoder:
    """Turns received bytes into frames: feed bytes, ask for frames; None means "more, please".

    After an error the decoder is spent: the position in the stream is lost.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._header: tuple[int, Kind] | None = None

    @property
    def buffered_bytes(self) -> int:
        return len(self._buffer)

    @property
    def announced(self) -> Kind | None:
        """What is being received, while its header is there and its body is not."""
        return self._header[1] if self._header else None

    @property
    def is_inside_frame(self) -> bool:
        """Whether the stream would be cut in the middle of a frame if it ended now."""
        return bool(self._buffer) or self._header is not None

    def receive_data(self, chunk: bytes | bytearray | memoryview) -> None:
        self._buffer += chunk

    def next_frame(self) -> Frame | None:
        """The next whole frame, or None.

        Raises:
            RemoteProtocolError: Unknown tag, reserved bits set, or a length above the tag's cap.
        """
        if self._header is None:
            if len(self._buffer) < HEADER.size:
                return None
            self._header = _check_header(*HEADER.unpack_from(self._buffer))
            del self._buffer[: HEADER.size]
        length, kind = self._header
        if len(self._buffer) < length:
            return None
        body = bytes(memoryview(self._buffer)[:length])
        del self._buffer[:length]
        self._header = None
        return Frame(kind, body)


def _check_header(length: int, tag: int, reserved: int) -> tuple[int, Kind]:
    try:
        kind = Kind(tag)
    except ValueError:
        raise RemoteProtocolError(f"unknown message tag {tag}", code="unknown_message") from None
    if reserved:
        raise RemoteProtocolError(f"{kind.name}: reserved bits {reserved:#x} are set, zero is allowed")
    if length > MAX_BODY_BYTES[kind]:
        raise RemoteProtocolError(
            f"{kind.name}: a body of {length} bytes, at most {MAX_BODY_BYTES[kind]} are allowed",
            code="message_too_large",
        )
    return length, kind
