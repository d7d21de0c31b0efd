"""The device-state list of Propolis' migration protocol, as a tree: which device has payloads of which kind.

What a payload says (`data`) is text of Propolis' own; it is carried, not read. The list itself is read strictly, so
that a kind or a version is never taken from a malformed entry.

Source: Propolis, bin/propolis-server/src/lib/migrate (Device, DevicePayload); fixtures/payloads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from vmmigrate.devices.fields import U32, ListOf, Struct, Text
from vmmigrate.devices.payload import MAX_PAYLOAD_BYTES, MAX_PAYLOADS
from vmmigrate.errors import PayloadError


@dataclass(frozen=True, slots=True)
class PropolisPayload:
    kind: Annotated[str, Text(256)]
    version: U32
    data: Annotated[str, Text(MAX_PAYLOAD_BYTES)]


@dataclass(frozen=True, slots=True)
class PropolisDevice:
    instance_name: Annotated[str, Text(256)]
    payload: Annotated[tuple[PropolisPayload, ...], ListOf(Struct(PropolisPayload), 0, MAX_PAYLOADS)]


_DEVICES = ListOf(Struct(PropolisDevice), 0, MAX_PAYLOADS)


def read_device_states(tree: Any) -> tuple[PropolisDevice, ...]:
    """The devices of a list that was parsed from JSON or RON.

    Raises:
        PayloadError: `payload_body`: every field that is wrong, with its path.
    """
    problems: list[str] = []
    devices: tuple[PropolisDevice, ...] = _DEVICES.decode(tree, "devices", problems)
    if problems:
        raise PayloadError(f"device states: {'; '.join(problems[:20])}", code="payload_body")
    return devices


def write_device_states(devices: tuple[PropolisDevice, ...]) -> list[Any]:
    """The tree that Propolis would write."""
    written: list[Any] = _DEVICES.encode(devices)
    return written
