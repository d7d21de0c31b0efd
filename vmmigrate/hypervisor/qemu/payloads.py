"""QEMU's device state as payloads, and back. Pure.

What stands before the first device, each device, and what stands behind the last one are payloads of their own: nobody
but QEMU reads their bytes, so whether they fit follows from facts (`devices.opaque`). On the way back they are put
together again exactly as they were: the description in the last of them says which devices there are, and in which
order. Disks that are blobs travel beside them, with their contents.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from vmmigrate.devices import registry
from vmmigrate.devices.kinds import InMemoryBlockBackendV1
from vmmigrate.devices.payload import DevicePayload
from vmmigrate.devices.plan import ExpectedDevice, check_import
from vmmigrate.errors import PayloadError
from vmmigrate.hypervisor.base import PayloadDescription
from vmmigrate.hypervisor.qemu.stream import DeviceStream, parse_stream

FRAME_KIND: Final = "qemu/stream"
DEVICE_KIND: Final = "qemu/device"
BLOB_KIND: Final = "in-memory-block-backend"
KINDS: Final[Mapping[str, tuple[int, ...]]] = {FRAME_KIND: (1,), DEVICE_KIND: (1,)}
HEAD: Final = "qemu-stream-head"
TAIL: Final = "qemu-stream-tail"


def describe(labels: Sequence[str], blobs: Sequence[str]) -> tuple[PayloadDescription, ...]:
    """What a guest with devices of these *labels* will export."""
    named = [(HEAD, FRAME_KIND), *((label, DEVICE_KIND) for label in labels), (TAIL, FRAME_KIND)]
    own = tuple(PayloadDescription(name, kind, (1,)) for name, kind in named)
    return (*(PayloadDescription(name, BLOB_KIND, registry.KINDS[BLOB_KIND].writable) for name in blobs), *own)


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
    known = [payload for payload in payloads if payload.version == 1 or payload.kind not in KINDS]
    if len(known) < len(payloads):
        wrong = next(payload for payload in payloads if payload not in known)
        text = f"device {wrong.instance_name}, payload {wrong.kind} version {wrong.version}: can read only 1"
        raise PayloadError(text, code="payload_version")
    labels = _labels(payloads)
    plan = check_import(
        [
            *(ExpectedDevice(name, (BLOB_KIND,)) for name in blobs),
            *(ExpectedDevice(name, (FRAME_KIND,)) for name in (HEAD, TAIL)),
            *(ExpectedDevice(label, (DEVICE_KIND,)) for label in labels),
        ],
        payloads,
    )
    pieces = [plan.states[HEAD, FRAME_KIND], *(plan.states[label, DEVICE_KIND] for label in labels)]
    stream = _parsed(b"".join([*pieces, plan.states[TAIL, FRAME_KIND]]), labels, pieces)
    contents = {name: bytes(plan.states[name, BLOB_KIND].bytes) for name in blobs}
    return stream, contents, plan.skipped


def _labels(payloads: Sequence[DevicePayload]) -> list[str]:
    """Devices in the order of the stream, as its end tells; none when there is no end, which is told elsewhere."""
    tails = [payload.body for payload in payloads if (payload.instance_name, payload.kind) == (TAIL, FRAME_KIND)]
    if len(tails) != 1:
        return []
    try:
        described: Any = json.loads(tails[0][6:])
        return [_label(entry) for entry in described["devices"]]
    except (ValueError, KeyError, TypeError):
        raise _body(TAIL, FRAME_KIND, "it is no description of devices") from None


def _label(entry: Mapping[str, Any]) -> str:
    name, instance = str(entry["name"]), int(entry["instance_id"])
    return f"{name}#{instance}" if instance else name


def _parsed(joined: bytes, labels: Sequence[str], pieces: Sequence[bytes]) -> DeviceStream:
    try:
        stream = parse_stream(joined)
    except PayloadError as exc:
        raise _body(HEAD, FRAME_KIND, exc.text) from None
    found = [stream.head, *(device.raw for device in stream.devices)]
    for label, piece, own in zip((HEAD, *labels), pieces, found, strict=True):
        if piece != own:
            raise _body(label, DEVICE_KIND, "its state does not end where it should")
    return stream


def _body(device: str, kind: str, text: str) -> PayloadError:
    details = {"device": device, "kind": kind}
    return PayloadError(f"device {device}, payload {kind}: {text}", code="payload_body", details=details)
