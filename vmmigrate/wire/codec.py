"""Messages to bytes and back: one table. A body is one msgpack map from field name to value.

How many objects a body is made of is counted before one of them is made (`packed`), so that a small body cannot
grow to gigabytes. Every field has a check that bounds it; what passes is of the declared type and size. Unknown fields
are refused, except in `Offer`, which is read before a protocol version is agreed upon: there a newer peer may say more,
and it is skipped. Nothing is ever unpickled, no extension types, no trailing bytes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from vmmigrate.errors import LocalProtocolError, RemoteProtocolError
from vmmigrate.packed import check_shape
from vmmigrate.wire import messages as m
from vmmigrate.wire.framing import MAX_BODY_BYTES, Frame
from vmmigrate.wire.phases import Kind

Check = Callable[[Any], Any]

U64_MAX = (1 << 64) - 1
MAX_ENTRIES = 65_536
MAX_EXTENTS = 1 << 17
# As large as a request that creates an instance may be; a spec that no request could have made is not read.
MAX_SPEC_BYTES = 4 << 20
MAX_PAYLOAD_ITEMS = 4096

# How many msgpack objects a body may be made of; kinds that are not here share one limit. A refusal keeps alive, for as
# long as it is being told, what it refuses: so the limit counts for every connection that there may be.
MAX_OBJECTS: Mapping[Kind, int] = {
    Kind.PREAMBLE: 3 * MAX_EXTENTS + MAX_ENTRIES,
    Kind.DEVICE_STATE: 6 * MAX_PAYLOAD_ITEMS + 16,
    Kind.CONSOLE_HISTORY: 16,
}
_MAX_OBJECTS_ELSEWHERE = 1 << 14


def text(max_chars: int = 1024) -> Check:
    def check(value: Any) -> str:
        if not isinstance(value, str) or len(value) > max_chars:
            raise ValueError(f"a text of at most {max_chars} characters")
        return value

    return check


def blob(max_bytes: int) -> Check:
    def check(value: Any) -> bytes:
        if not isinstance(value, bytes) or len(value) > max_bytes:
            raise ValueError(f"at most {max_bytes} bytes")
        return value

    return check


def number(low: int = 0, high: int = U64_MAX) -> Check:
    def check(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"an integer {low}..{high}")
        return value

    return check


def seconds(value: Any) -> float:
    # A whole number is a float too, for the type checker and so for the wire.
    if not isinstance(value, float | int) or isinstance(value, bool) or not 0 <= value <= 1e9:
        raise ValueError("a number of seconds 0..1e9")
    return float(value)


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def one_of(*allowed: str) -> Check:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(" or ".join(repr(word) for word in allowed))
        return value

    return check


def list_of(item: Check, max_items: int = MAX_ENTRIES) -> Check:
    def check(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) > max_items:
            raise ValueError(f"a list of at most {max_items} entries")
        return tuple(item(entry) for entry in value)

    return check


def map_of(item: Check, max_items: int = MAX_ENTRIES, key: Check | None = None) -> Check:
    check_key = key or text(256)

    def check(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > max_items:
            raise ValueError(f"a map of at most {max_items} entries")
        return {check_key(name): item(entry) for name, entry in value.items()}

    return check


def topics(item: Check, max_items: int) -> Check:
    """A map of which a newer peer may fill some entries in a way unknown to us: those are skipped."""
    check_map = map_of(lambda value: value, max_items)

    def check(value: Any) -> dict[str, Any]:
        known: dict[str, Any] = {}
        for name, entry in check_map(value).items():
            with contextlib.suppress(ValueError):
                known[name] = item(entry)
        return known

    return check


def tuple_of(*items: Check) -> Check:
    def check(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) != len(items):
            raise ValueError(f"a list of {len(items)} entries")
        return tuple(item(entry) for item, entry in zip(items, value, strict=True))

    return check


def plain(value: Any) -> Any:
    """Details of an error: JSON values, nested at most eight deep."""
    return _plain(value, 8)


def _plain(value: Any, depth: int) -> Any:
    if depth == 0:
        raise ValueError("JSON values nested at most eight deep")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("JSON values, which know neither NaN nor infinity")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(entry, depth - 1) for entry in value]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: _plain(entry, depth - 1) for name, entry in value.items()}
    raise ValueError("JSON values")


def plain_map(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("a map of JSON values")
    checked = plain(value)
    assert isinstance(checked, dict)
    return checked


def nested(build: Callable[..., Any], *items: Check) -> Check:
    fields = tuple_of(*items)
    return lambda value: build(*fields(value))


_ID = text(128)
_WORDS = list_of(text(64), 256)
_FACTS = map_of(text(1024), 256)
_DIGEST = blob(64)
_RANDOM = blob(32)
_EPOCH = tuple_of(number(), number())
_RUN_STATE = one_of("running", "paused")
_VERSION = number(1, 0xFFFF_FFFF)
_COUNT = number(0, 0xFFFF_FFFF)
_CODE = text(64)
_LONG_TEXT = text(16_384)
_PORT = number(1, 65_535)
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class MessageCodec:
    """How one message is read: its class, the check of each field, and whether unknown fields are skipped."""

    message: Callable[..., m.Message]
    fields: Mapping[str, Check]
    skip_unknown: bool = False


CODEC: Mapping[Kind, MessageCodec] = {
    Kind.OFFER: MessageCodec(
        m.Offer,
        {
            "protocols": list_of(number(0, 0xFFFF_FFFF), 256),
            "migration_id": _ID,
            "instance_id": _ID,
            "ticket": text(256),
            "spec_versions": _WORDS,
            "payloads": map_of(list_of(number(0, 0xFFFF_FFFF), 64), 1024),
            "ram": topics(_WORDS, 64),
            "max_streams": number(1, 1024),
            "facts": _FACTS,
            "api_url": text(2048),
            "random": _RANDOM,
        },
        skip_unknown=True,
    ),
    Kind.SELECT: MessageCodec(
        m.Select,
        {
            "protocol": _VERSION,
            "spec_version": text(64),
            "payloads": map_of(_VERSION, 1024),
            "transport": text(64),
            "encodings": _WORDS,
            "digest": text(64),
            "streams": number(1, 1024),
            "bulk_port": _PORT,
            "session_number": _COUNT,
            "verify": one_of("digest", "full"),
            "offer_digest": _DIGEST,
            "random": _RANDOM,
        },
    ),
    Kind.REFUSE: MessageCodec(m.Refuse, {"code": _CODE, "text": _LONG_TEXT, "details": plain_map}),
    Kind.PREAMBLE: MessageCodec(
        m.Preamble,
        {
            "spec_version": text(64),
            "spec": blob(MAX_SPEC_BYTES),
            "blobs": map_of(blob(8 * _MIB), 256),
            "properties": map_of(text(4096), 64),
            "run_state": _RUN_STATE,
            "epoch": _EPOCH,
            "regions": list_of(tuple_of(number(), number(1)), 64),
            "populated": list_of(tuple_of(number(), number(1)), MAX_EXTENTS),
            "devices": list_of(nested(m.DeviceEntry, text(256), text(64), _VERSION, flag), 4096),
            "facts": _FACTS,
        },
    ),
    Kind.PREAMBLE_OK: MessageCodec(
        m.PreambleOk,
        {"select_digest": _DIGEST, "blob_digests": map_of(_DIGEST, 256), "amended": list_of(text(256), 4096)},
    ),
    Kind.ROUND_END: MessageCodec(
        m.RoundEnd,
        {"round_number": _COUNT, "records": list_of(number(), 1024), "pages": number(), "dirty_pages": number()},
    ),
    Kind.ROUND_APPLIED: MessageCodec(m.RoundApplied, {"round_number": _COUNT, "bytes_received": number()}),
    Kind.PAUSED: MessageCodec(m.Paused, {"round_number": _COUNT}),
    Kind.TIME_DATA: MessageCodec(m.TimeDataMessage, {"values": map_of(number(-(1 << 63)), 16)}),
    Kind.DEVICE_STATE: MessageCodec(
        m.DeviceState,
        {
            "payloads": list_of(
                nested(m.PayloadItem, text(256), text(64), _VERSION, flag, blob(64 * _MIB)), MAX_PAYLOAD_ITEMS
            )
        },
    ),
    Kind.CONSOLE_HISTORY: MessageCodec(
        m.ConsoleHistoryMessage,
        {"port": text(256), "beginning": blob(_MIB), "rolling": blob(_MIB), "total_bytes": number()},
    ),
    Kind.STATE_END: MessageCodec(m.StateEnd, {"page_digest": _DIGEST, "payloads": number(0, 4096)}),
    Kind.READY: MessageCodec(m.Ready, {"journal_id": _ID, "page_digest": _DIGEST, "ram_digest": _DIGEST}),
    Kind.HANDOFF: MessageCodec(m.Handoff, {"run_state": _RUN_STATE, "epoch": _EPOCH}),
    Kind.RUNNING: MessageCodec(
        m.Running, {"journal_id": _ID, "epoch": _EPOCH, "import_s": seconds, "resume_s": seconds}
    ),
    Kind.REFUSED: MessageCodec(m.Refused, {"journal_id": _ID, "code": _CODE, "text": _LONG_TEXT}),
    Kind.RETURNED: MessageCodec(m.Returned, {"journal_id": _ID, "code": _CODE, "text": _LONG_TEXT}),
    Kind.PROGRESS: MessageCodec(m.Progress, {"counters": map_of(number(), 64)}),
    Kind.HEARTBEAT: MessageCodec(m.Heartbeat, {}),
    Kind.CANCEL: MessageCodec(m.Cancel, {"reason": text(4096)}),
    Kind.RESUME: MessageCodec(
        m.Resume, {"migration_id": _ID, "session_number": _COUNT, "random": _RANDOM, "proof": _DIGEST}
    ),
    Kind.RESUMED: MessageCodec(
        m.Resumed, {"session_number": _COUNT, "bulk_port": _PORT, "random": _RANDOM, "proof": _DIGEST}
    ),
    Kind.APPLIED: MessageCodec(m.Applied, {"round_number": _COUNT, "pages": blob(32 * _MIB)}),
    Kind.FAILED: MessageCodec(m.Failed, {"code": _CODE, "text": _LONG_TEXT, "details": plain_map}),
}


def encode(message: m.Message) -> Frame:
    """The frame of *message*; fields in the order of the table, so equal messages give equal bytes.

    Raises:
        LocalProtocolError: `bad_message`: a field that the peer would refuse.
    """
    codec = CODEC[message.kind]
    body = {}
    for name, check in codec.fields.items():
        body[name] = _packable(getattr(message, name))
        try:
            check(body[name])
        except ValueError as exc:
            raise LocalProtocolError(_wrong(message.kind, name, exc), code="bad_message") from None
    try:
        packed: bytes = msgpack.packb(body, use_bin_type=True)
        _check_shape(message.kind, packed)
        return Frame(message.kind, packed)
    except (ValueError, OverflowError) as exc:  # text that is not Unicode, details beyond 64 bits
        raise LocalProtocolError(f"{message.kind.name}: {exc}", code="bad_message") from None


def _wrong(kind: Kind, field: str, allowed: ValueError) -> str:
    return f"{kind.name}: field {field!r} is wrong, allowed is {allowed}"


def _packable(value: Any) -> Any:
    if isinstance(value, m.DeviceEntry):
        return [value.instance_name, value.payload_kind, value.version, value.optional]
    if isinstance(value, m.PayloadItem):
        return [value.instance_name, value.payload_kind, value.version, value.optional, value.body]
    if isinstance(value, tuple | list):
        return [_packable(entry) for entry in value]
    if isinstance(value, Mapping):
        return {name: _packable(entry) for name, entry in value.items()}
    return value


def decode(frame: Frame) -> m.Message:
    """The message of *frame*.

    Raises:
        RemoteProtocolError: Not one msgpack map, a field missing, unknown, or out of its bounds.
    """
    codec = CODEC[frame.kind]
    body = _unpack(frame)
    unknown = body.keys() - codec.fields.keys()
    if unknown and not codec.skip_unknown:
        raise RemoteProtocolError(f"{frame.kind.name}: unknown field {_shortest(unknown)!r}", code="bad_message")
    values = {}
    for name, check in codec.fields.items():
        if name not in body:
            raise RemoteProtocolError(f"{frame.kind.name}: field {name!r} is missing", code="bad_message")
        try:
            values[name] = check(body[name])
        except ValueError as exc:
            raise RemoteProtocolError(_wrong(frame.kind, name, exc), code="bad_message") from None
    return codec.message(**values)


def _shortest(names: Iterable[Any]) -> str:
    """One of *names* that a line can hold: the peer chose them."""
    return min(str(name[:64]) for name in names)


def _check_shape(kind: Kind, body: bytes) -> None:
    check_shape(body, MAX_OBJECTS.get(kind, _MAX_OBJECTS_ELSEWHERE))


def _refuse_extension(code: int, _: bytes) -> Any:
    raise ValueError(f"extension type {code}")


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A map, unless a name stands in it twice: two readers might believe different ones."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name twice in one map")
    return values


def _unpack(frame: Frame) -> dict[str, Any]:
    cap = MAX_BODY_BYTES[frame.kind]
    try:
        _check_shape(frame.kind, frame.body)
        body = msgpack.unpackb(
            frame.body,
            raw=False,
            strict_map_key=True,
            max_str_len=cap,
            max_bin_len=cap,
            max_array_len=MAX_EXTENTS,
            max_map_len=MAX_ENTRIES,
            max_ext_len=0,
            ext_hook=_refuse_extension,
            object_pairs_hook=_unique,
        )
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as exc:
        raise RemoteProtocolError(f"{frame.kind.name}: the body is not msgpack ({exc})", code="bad_message") from None
    if not isinstance(body, dict):
        raise RemoteProtocolError(f"{frame.kind.name}: the body is not a map", code="bad_message")
    return body
