"""QEMU's device state as payloads, and back. Pure.

What stands before the first device, each device, and what stands behind the last one are payloads of their own: nobody
but QEMU reads their bytes, so whether they fit follows from facts (`devices.opaque`). On the way back they are put
together again exactly as they were: the description in the last of them says which devices there are, and in which
order. Disks that are blobs travel beside them, with their contents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from vmmigrate.devices import registry
from vmmigrate.devices.kinds import InMemoryBlockBackendV1
from vmmigrate.devices.payload import DevicePayload
from vmmigrate.devices.plan import ExpectedDevice, check_import
from vmmigrate.errors import PayloadError
from vmmigrate.hypervisor.base import PayloadDescription
from vmmigrate.hypervisor.qemu.files import MAX_KEYS_BYTES
from vmmigrate.hypervisor.qemu.stream import Described, DeviceStream, parse_stream, read_description

FRAME_KIND: Final = "qemu/stream"
DEVICE_KIND: Final = "qemu/device"
BLOB_KIND: Final = "in-memory-block-backend"
KEYS_KIND: Final = "qemu/keys"  # of a serial port: what was typed, and waits for the guest to read it
KINDS: Final[Mapping[str, tuple[int, ...]]] = {FRAME_KIND: (1,), DEVICE_KIND: (1,), KEYS_KIND: (1,)}
HEAD: Final = "qemu-stream-head"
TAIL: Final = "qemu-stream-tail"


def describe(labels: Sequence[str], blobs: Sequence[str]) -> tuple[PayloadDescription, ...]:
    """What a guest with devices of these *labels* will export."""
    named = [(HEAD, FRAME_KIND), *((label, DEVICE_KIND) for label in labels), (TAIL, FRAME_KIND)]
    own = tuple(PayloadDescription(name, kind, (1,)) for name, kind in named)
    return (*(PayloadDescription(name, BLOB_KIND, registry.KINDS[BLOB_KIND].writable) for name in blobs), *own)


def describe_keys(ports: Sequence[str]) -> tuple[PayloadDescription, ...]:
    return tuple(PayloadDescription(port, KEYS_KIND, (1,)) for port in ports)


def from_keys(keys: Mapping[str, bytes]) -> tuple[DevicePayload, ...]:
    """By port. An empty one says that nothing waits."""
    return tuple(DevicePayload(port, KEYS_KIND, 1, waiting) for port, waiting in keys.items())


def take_keys(
    payloads: Sequence[DevicePayload], ports: Sequence[str]
) -> tuple[Mapping[str, bytes], Sequence[DevicePayload]]:
    """What waits on each of *ports*, and the other payloads.

    Raises: PayloadError: as `devices.plan.check_import`; `payload_body`: more than a console takes.
    """
    of_keys = [payload for payload in payloads if payload.kind == KEYS_KIND]
    _check_versions(of_keys)
    check_import([ExpectedDevice(port, (KEYS_KIND,)) for port in ports], of_keys)
    for payload in of_keys:
        if len(payload.body) > MAX_KEYS_BYTES:
            text = f"{len(payload.body)} bytes, allowed are {MAX_KEYS_BYTES}"
            raise _error(payload.instance_name, KEYS_KIND, "payload_body", text)
    others = [payload for payload in payloads if payload.kind != KEYS_KIND]
    return {payload.instance_name: payload.body for payload in of_keys}, others


def from_stream(stream: DeviceStream, blobs: Mapping[str, bytes]) -> tuple[DevicePayload, ...]:
    """The payloads of a guest, blobs by the name of their backend."""
    return (
        *(registry.encode(name, BLOB_KIND, InMemoryBlockBackendV1(contents)) for name, contents in blobs.items()),
        DevicePayload(HEAD, FRAME_KIND, 1, stream.head),
        *(DevicePayload(device.label, DEVICE_KIND, 1, device.raw) for device in stream.devices),
        DevicePayload(TAIL, FRAME_KIND, 1, stream.tail),
    )


def to_stream(
    payloads: Sequence[DevicePayload], blobs: Sequence[str]
) -> tuple[DeviceStream, Mapping[str, bytes], tuple[tuple[str, str], ...]]:
    """The stream that *payloads* were, the contents of *blobs*, and the optional payloads that were skipped.

    Raises: PayloadError: as `devices.plan.check_import`, with every problem; `payload_body`: what one says of itself is
        not what it is.
    """
    _check_versions(payloads)
    listed = _listed(payloads)
    # Without one end nobody knows which devices there are: then those that came are not to blame.
    labels = [device.label for device in listed] if listed is not None else _device_names(payloads)
    plan = check_import(
        [
            *(ExpectedDevice(name, (BLOB_KIND,)) for name in blobs),
            *(ExpectedDevice(name, (FRAME_KIND,)) for name in (HEAD, TAIL)),
            *(ExpectedDevice(label, (DEVICE_KIND,)) for label in labels),
        ],
        payloads,
    )
    assert listed is not None
    pieces = {device.label: plan.states[device.label, DEVICE_KIND] for device in listed}
    _check_pieces(listed, pieces)
    frame = [plan.states[name, FRAME_KIND] for name in (HEAD, TAIL)]
    stream = _parsed(b"".join([frame[0], *pieces.values(), frame[1]]), frame[0], pieces, listed)
    return stream, {name: bytes(plan.states[name, BLOB_KIND].bytes) for name in blobs}, plan.skipped


def _check_versions(payloads: Sequence[DevicePayload]) -> None:
    for payload in payloads:
        if payload.kind in KINDS and payload.version not in KINDS[payload.kind]:
            text = f"version {payload.version}, can read only {', '.join(map(str, KINDS[payload.kind]))}"
            raise _error(payload.instance_name, payload.kind, "payload_version", text)


def _device_names(payloads: Sequence[DevicePayload]) -> list[str]:
    return sorted({payload.instance_name for payload in payloads if payload.kind == DEVICE_KIND})


def _listed(payloads: Sequence[DevicePayload]) -> list[Described] | None:
    """Devices in the order of the stream, as its end tells; None when there is not exactly one.

    Raises: PayloadError `payload_body`: it is no end.
    """
    tails = [payload.body for payload in payloads if (payload.instance_name, payload.kind) == (TAIL, FRAME_KIND)]
    if len(tails) != 1:
        return None
    tail = tails[0]
    if tail[:2] != b"\x00\x06" or len(tail) != 6 + int.from_bytes(tail[2:6], "big"):
        raise _error(TAIL, FRAME_KIND, "payload_body", "it is no end of a stream")
    try:
        devices = read_description(tail)
    except PayloadError as exc:
        raise _error(TAIL, FRAME_KIND, "payload_body", exc.text) from None
    labels = Counter(device.label for device in devices)
    twice = [label for label, count in labels.items() if count > 1]
    if twice:
        raise _error(TAIL, FRAME_KIND, "payload_body", f"it lists device {twice[0][:80]} {labels[twice[0]]} times")
    if len(devices) > len(payloads):
        raise _error(
            TAIL, FRAME_KIND, "payload_missing", f"it lists {len(devices)} devices, {len(payloads)} payloads came"
        )
    return devices


def _check_pieces(listed: Sequence[Described], pieces: Mapping[str, bytes]) -> None:
    """Each begins and ends as a section of that device does."""
    for device in listed:
        piece = pieces[device.label]
        footer = b"\x7e" + piece[1:5]
        if piece[:1] != b"\x04" or not piece.startswith(device.header, 5) or not piece.endswith(footer):
            raise _error(device.label, DEVICE_KIND, "payload_body", "it is not the state of that device")


def _parsed(joined: bytes, head: bytes, pieces: Mapping[str, bytes], listed: Sequence[Described]) -> DeviceStream:
    try:
        stream = parse_stream(joined, listed)
    except PayloadError as exc:
        raise _error(HEAD, FRAME_KIND, "payload_body", exc.text) from None
    if stream.head != head:
        raise _error(HEAD, FRAME_KIND, "payload_body", "it holds more than what stands before the devices")
    for device in stream.devices:
        if pieces[device.label] != device.raw:
            raise _error(device.label, DEVICE_KIND, "payload_body", "its state does not end where it should")
    return stream


def _error(device: str, kind: str, code: str, text: str) -> PayloadError:
    device = "".join(letter if letter.isprintable() else "?" for letter in device)
    details = {"device": device, "kind": kind}
    return PayloadError(f"device {device}, payload {kind}: {text}", code=code, details=details)
