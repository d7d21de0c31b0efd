"""What crosses the wire for a device: (instance name, kind, version, optional, bytes)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DevicePayload:
    """The state of one device (or a part of it) in one version of its kind.

    Attributes:
        instance_name: The component's key in the spec, or a fixed name such as `vcpu-0`.
        kind: Names the layout together with `version`; zero is never a version.
        optional: An importer that does not know the kind may skip it and must report so.
        body: The encoded fields; its cap is `MAX_PAYLOAD_BYTES`.
    """

    instance_name: str
    kind: str
    version: int
    body: bytes
    optional: bool = False


MAX_PAYLOAD_BYTES = 64 << 20
MAX_PAYLOADS = 4096
