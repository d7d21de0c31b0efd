"""Which payload kinds exist, in which versions, and how a body becomes state and back.

Every kind knows the versions it can read and the versions it can write, and a conversion between each pair of
neighbours; a version without its conversions is a TypeError at import, not an error at three in the morning.
State in memory is always of the newest version. Kinds without any entry are unknown: the import plan skips those that
are marked optional and refuses the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack

from vmmigrate.devices import kinds
from vmmigrate.devices.fields import Struct
from vmmigrate.devices.payload import MAX_PAYLOAD_BYTES, DevicePayload
from vmmigrate.errors import PayloadError

Conversion = Callable[[Any], Any]
SMALL_BODY_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Kind:
    """One payload kind.

    Attributes:
        shapes: Dataclass by version. Version 0 never exists.
        up: By version n, the conversion from n to the next newer one; total.
        down: By version n, the conversion from n to the next older one; exact, or PayloadError.
        max_bytes: Cap of a body.
    """

    name: str
    shapes: Mapping[int, type[Any]]
    up: Mapping[int, Conversion] = field(default_factory=dict)
    down: Mapping[int, Conversion] = field(default_factory=dict)
    max_bytes: int = SMALL_BODY_BYTES

    def __post_init__(self) -> None:
        versions = sorted(self.shapes)
        if not versions or versions[0] < 1 or set(self.up) != set(versions[:-1]) or set(self.down) != set(versions[1:]):
            raise TypeError(f"payload kind {self.name}: {versions} need a conversion each way between neighbours")
        for shape in self.shapes.values():
            Struct(shape).describe()

    @property
    def readable(self) -> tuple[int, ...]:
        """Newest first."""
        return tuple(sorted(self.shapes, reverse=True))

    @property
    def writable(self) -> tuple[int, ...]:
        """Newest first."""
        return self.readable

    @property
    def newest(self) -> int:
        return max(self.shapes)

    def schema_text(self, version: int) -> str:
        return f"{self.name} {version} {Struct(self.shapes[version]).describe()}"

    def schema_hash(self, version: int) -> str:
        """Changes whenever the shape changes: a changed hash without a new version is a broken promise."""
        return hashlib.sha256(self.schema_text(version).encode()).hexdigest()


def _single(name: str, version: int, shape: type[Any], max_bytes: int = SMALL_BODY_BYTES) -> Kind:
    return Kind(name, {version: shape}, max_bytes=max_bytes)


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        _single("uart-16550", 1, kinds.Uart16550V1),
        _single("embedded-console", 1, kinds.EmbeddedConsoleV1),
        _single("bhyve-rtc", 2, kinds.BhyveRtcV2),
        _single("pci-device", 1, kinds.PciDeviceV1),
        _single("pci-virtio", 1, kinds.PciVirtioV1),
        _single("pci-virtio-viona", 1, kinds.PciVirtioVionaV1),
        _single("nvme-ctrl", 1, kinds.NvmeCtrlV1),
        _single("in-memory-block-backend", 1, kinds.InMemoryBlockBackendV1, max_bytes=MAX_PAYLOAD_BYTES),
        _single("testdev-migration-failure", 1, kinds.MigrationFailureV1),
        _single("embedded-vcpu", 1, kinds.EmbeddedVcpuV1),
    )
}


def encode(
    instance_name: str, kind_name: str, state: Any, *, version: int | None = None, optional: bool = False
) -> DevicePayload:
    """Write *state* (of the newest version) as a payload, in an older version when one is asked for.

    Raises:
        PayloadError: `payload_version`: not writable; `payload_lossy` (from a conversion): the older version
            cannot say it.
    """
    kind = KINDS[kind_name]
    wanted = kind.newest if version is None else version
    if wanted not in kind.writable:
        raise _error(instance_name, kind_name, wanted, "payload_version", f"can write only {_listed(kind.writable)}")
    for step in range(kind.newest, wanted, -1):
        state = kind.down[step](state)
    body = msgpack.packb(Struct(kind.shapes[wanted]).encode(state), use_bin_type=True)
    return DevicePayload(instance_name, kind_name, wanted, body, optional)


def decode(payload: DevicePayload) -> Any:
    """Read a payload, strictly, and bring it up to the newest version.

    Raises:
        PayloadError: `payload_kind`, `payload_version`, `payload_too_large`, `payload_body`; the text names the
            device, the kind, every field at fault and what is allowed.
    """
    name, version = payload.instance_name, payload.version
    kind = KINDS.get(payload.kind)
    if kind is None:
        raise _error(name, payload.kind, version, "payload_kind", "unknown kind")
    if version not in kind.readable:
        raise _error(name, kind.name, version, "payload_version", f"can read only {_listed(kind.readable)}")
    if len(payload.body) > kind.max_bytes:
        text = f"{len(payload.body)} bytes, allowed are {kind.max_bytes}"
        raise _error(name, kind.name, version, "payload_too_large", text)
    problems: list[str] = []
    state = Struct(kind.shapes[version]).decode(_unpacked(payload), "", problems)
    if problems:
        raise _error(name, kind.name, version, "payload_body", "; ".join(problems[:20]))
    for step in range(version, kind.newest):
        state = kind.up[step](state)
    return state


def _unpacked(payload: DevicePayload) -> Any:
    try:
        return msgpack.unpackb(payload.body)  # its limits follow from the length of the body, which is capped
    except (ValueError, msgpack.UnpackException) as exc:
        name, kind, version = payload.instance_name, payload.kind, payload.version
        raise _error(name, kind, version, "payload_body", "the body is not one MessagePack map") from exc


def _listed(versions: tuple[int, ...]) -> str:
    return ", ".join(map(str, versions))


def _error(device: str, kind: str, version: int, code: str, text: str) -> PayloadError:
    details = {"device": device, "kind": kind, "version": version}
    return PayloadError(f"device {device}, payload {kind} version {version}: {text}", code=code, details=details)
