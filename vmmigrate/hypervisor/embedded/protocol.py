"""How a daemon talks to an embedded guest process: length-prefixed MessagePack over the guest's unix socket.

A frame is four bytes of length (little endian) and one map. The daemon speaks first: `{"hello": [versions]}`; the guest
answers with the version it chose (the newest common one) and hands over RAM and tracking descriptors by SCM_RIGHTS
with the first byte of that answer. Then requests `{"id", "op", "args"}` and replies `{"id", "result"}` or
`{"id", "error": {code, text, details}}`; a reply may overtake another, so the id counts.

The socket lies in a directory of mode 0700, and the guest checks the peer's user id: both ends are the same user, so
caps here catch defects and stale builds, not attackers. A guest process lives across daemon upgrades: version N
guests are driven by N and N+1 daemons. To change the protocol, add a version and keep the previous one.
"""

from __future__ import annotations

from typing import Any, Final

import msgpack

from vmmigrate.errors import HypervisorError, PayloadError, VmMigrateError

VERSIONS: Final = (1,)
MAX_FRAME_BYTES: Final = 256 << 20
_PREFIX_BYTES: Final = 4

_ERRORS: dict[str, type[VmMigrateError]] = {"payload": PayloadError, "hypervisor": HypervisorError}


def encode_frame(message: dict[str, Any]) -> bytes:
    body: bytes = msgpack.packb(message, use_bin_type=True)
    if len(body) > MAX_FRAME_BYTES:
        raise HypervisorError(f"a message of {len(body)} bytes exceeds {MAX_FRAME_BYTES}", code="guest_protocol")
    return len(body).to_bytes(_PREFIX_BYTES, "little") + body


class FrameDecoder:
    """Bytes in, messages out; None means "more, please"."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def receive(self, chunk: bytes) -> None:
        self._buffer += chunk

    def next_message(self) -> dict[str, Any] | None:
        """The next whole message.

        Raises:
            HypervisorError: `guest_protocol`: too long, or not one map; the stream is then useless.
        """
        if len(self._buffer) < _PREFIX_BYTES:
            return None
        size = int.from_bytes(self._buffer[:_PREFIX_BYTES], "little")
        if size > MAX_FRAME_BYTES:
            raise HypervisorError(f"a message of {size} bytes exceeds {MAX_FRAME_BYTES}", code="guest_protocol")
        if len(self._buffer) < _PREFIX_BYTES + size:
            return None
        body = bytes(self._buffer[_PREFIX_BYTES : _PREFIX_BYTES + size])
        del self._buffer[: _PREFIX_BYTES + size]
        try:
            message = msgpack.unpackb(body)
        except (ValueError, msgpack.UnpackException) as exc:
            raise HypervisorError("a message is not MessagePack", code="guest_protocol") from exc
        if not isinstance(message, dict):
            raise HypervisorError("a message is not a map", code="guest_protocol")
        return message


def choose_version(offered: Any) -> int | None:
    """The newest version that both ends speak; what is unknown is skipped."""
    common = [v for v in offered if v in VERSIONS] if isinstance(offered, list) else []
    return max(common, default=None)


def error_to_map(error: VmMigrateError) -> dict[str, Any]:
    family = "payload" if isinstance(error, PayloadError) else "hypervisor"
    return {"family": family, "code": error.code, "text": error.text, "details": error.details}


def error_from_map(tree: dict[str, Any]) -> VmMigrateError:
    return _ERRORS.get(tree["family"], HypervisorError)(tree["text"], code=tree["code"], details=tree["details"])
