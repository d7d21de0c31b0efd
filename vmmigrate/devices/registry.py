"""Which payload kinds exist, in which versions, and how a body becomes state and back.

Every kind knows the versions it can read and the versions it can write, and a conversion between each pair of
neighbours; a version without its conversions is a TypeError at import, not an error at three in the morning.
State in memory is always of the newest version. Kinds without any entry are unknown: the import plan skips those that
are marked optional and refuses the others. Kinds that a hypervisor owns are not here but in `opaque`.

An older version is written *exactly*: what it says, read back, must be the very state that was to be said. The
conversions need not watch that; it is checked here, for all of them.

A shape never changes under its number. `fixtures/payloads/schemas.toml` holds the hash of every shape;
`shape_changes` compares, and a test and `python -m tools.payload_fixtures --check` fail on what it finds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack

from vmmigrate.devices import block, chipset, firmware, kinds, pci, serial, vcpu, virtio
from vmmigrate.devices.fields import Struct, decode_body
from vmmigrate.devices.payload import MAX_PAYLOAD_BYTES, DevicePayload
from vmmigrate.errors import PayloadError
from vmmigrate.packed import check_shape

Conversion = Callable[[Any], Any]
Check = Callable[[Any], Iterable[str]]
SMALL_BODY_BYTES = 256 << 10
LARGE_BODY_BYTES = 8 << 20
# Arrays nest, so a body of some KiB could ask for gigabytes; no device has more values than this.
MAX_OBJECTS = 1 << 16


def _nothing_to_check(_: Any) -> Iterable[str]:
    return ()


@dataclass(frozen=True, slots=True)
class Kind:
    """One payload kind.

    Attributes:
        shapes: Dataclass by version, without a gap. Version 0 never exists.
        up: By version n, the conversion from n to the next newer one; total.
        down: By version n, the conversion from n to the next older one; the registry refuses what is not exact.
        check: What is wrong with a state of the newest version although every field is in its bounds.
        max_bytes: Cap of a body.
    """

    name: str
    shapes: Mapping[int, type[Any]]
    up: Mapping[int, Conversion] = field(default_factory=dict)
    down: Mapping[int, Conversion] = field(default_factory=dict)
    check: Check = _nothing_to_check
    max_bytes: int = SMALL_BODY_BYTES

    def __post_init__(self) -> None:
        versions = sorted(self.shapes)
        if not versions or versions[0] < 1 or versions != list(range(versions[0], versions[-1] + 1)):
            raise TypeError(f"payload kind {self.name}: versions {versions} have a gap, or begin before 1")
        if set(self.up) != set(versions[:-1]) or set(self.down) != set(versions[1:]):
            raise TypeError(f"payload kind {self.name}: {versions} need a conversion each way between neighbours")
        for shape in self.shapes.values():
            Struct(shape).describe()

    @property
    def readable(self) -> tuple[int, ...]:
        """Newest first."""
        return tuple(sorted(self.shapes, reverse=True))

    @property
    def writable(self) -> tuple[int, ...]:
        """Newest first. Which of them can say a given state is `exact_versions`' to tell."""
        return self.readable

    @property
    def newest(self) -> int:
        return max(self.shapes)

    def schema_text(self, version: int) -> str:
        return f"{self.name} {version} {Struct(self.shapes[version]).describe()}"

    def schema_hash(self, version: int) -> str:
        """Changes whenever the shape changes: a changed hash without a new version is a broken promise."""
        return hashlib.sha256(self.schema_text(version).encode()).hexdigest()


def _single(
    name: str, version: int, shape: type[Any], check: Check = _nothing_to_check, max_bytes: int = SMALL_BODY_BYTES
) -> Kind:
    return Kind(name, {version: shape}, check=check, max_bytes=max_bytes)


_UART = Kind(
    "uart-16550",
    {1: serial.Uart16550V1, 2: serial.Uart16550V2},
    up={1: serial.uart_from_v1},
    down={2: serial.uart_to_v1},
    check=serial.uart_problems,
)
_RTC = Kind(
    "bhyve-rtc",
    {1: chipset.BhyveRtcV1, 2: chipset.BhyveRtcV2},
    up={1: chipset.rtc_from_v1},
    down={2: chipset.rtc_to_v1},
    check=chipset.rtc_problems,
)
_VIRTIO = Kind(
    "pci-virtio",
    {1: virtio.PciVirtioV1, 2: virtio.PciVirtioV2},
    up={1: virtio.virtio_from_v1},
    down={2: virtio.virtio_to_v1},
    check=virtio.virtio_problems,
)

KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        _single("pci-device", 1, pci.PciDeviceV1, pci.problems_in),
        _single("i440fx-hb", 1, chipset.I440FxHbV1),
        _single("piix3-lpc", 1, chipset.Piix3LpcV1),
        _single("bhyve-atpic", 1, chipset.BhyveAtPicV1),
        _single("bhyve-atpit", 1, chipset.BhyveAtPitV1),
        _single("bhyve-ioapic", 1, chipset.BhyveIoApicV1),
        _RTC,
        _single("piix3-pm", 1, chipset.Piix3PmV1),
        _single("bhyve-pmtimer", 1, chipset.BhyvePmTimerV1),
        _single("bhyve-hpet", 1, chipset.BhyveHpetV1),
        _UART,
        _single("ps2-ctrl", 1, serial.Ps2CtrlV1),
        _single("qemu-fwcfg", 2, firmware.QemuFwCfgV2, firmware.fw_cfg_problems, LARGE_BODY_BYTES),
        _single("qemu-ramfb", 1, firmware.QemuRamFbV1),
        _single("guest-hyperv-interface", 1, firmware.GuestHypervInterfaceV1, firmware.hyperv_problems),
        _single("bhyve-x86-vcpu-runstate", 1, vcpu.VcpuRunStateV1),
        _single("bhyve-x86-vcpu-gpregs", 1, vcpu.VcpuGpRegsV1),
        _single("bhyve-x86-vcpu-ctrlregs", 1, vcpu.VcpuCtrlRegsV1),
        _single("bhyve-x86-vcpu-dbgregs", 1, vcpu.VcpuDbgRegsV1),
        _single("bhyve-x86-vcpu-segregs", 1, vcpu.VcpuSegRegsV1),
        _single("bhyve-x86-cpu-msregs", 1, vcpu.VcpuMsrsV1, vcpu.msr_problems),
        _single("bhyve-x86-cpu-fpu", 1, vcpu.VcpuFpuV1),
        _single("bhyve-x86-lapic", 1, vcpu.VcpuLapicV1),
        _single("bhyve-x86-pmu-amd", 1, vcpu.VcpuPmuAmdV1),
        _VIRTIO,
        _single("pci-virtio-viona", 1, virtio.PciVirtioVionaV1, virtio.viona_problems),
        _single("nvme-ctrl", 1, block.NvmeCtrlV1, block.nvme_problems),
        _single("in-memory-block-backend", 1, kinds.InMemoryBlockBackendV1, max_bytes=MAX_PAYLOAD_BYTES),
        _single("testdev-migration-failure", 1, block.MigrationFailureV1),
        _single("embedded-vcpu", 1, vcpu.EmbeddedVcpuV1, vcpu.embedded_vcpu_problems),
    )
}


def shape_changes(recorded: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What differs between the shapes of this build and *recorded* (kind -> version -> hash), one line each.

    A new version that is not recorded yet is among it: recording it is part of adding it.
    """
    current = {
        (kind.name, str(version)): kind.schema_hash(version) for kind in KINDS.values() for version in kind.shapes
    }
    known = {(kind, version): text for kind, versions in recorded.items() for version, text in versions.items()}
    return [
        *(f"{kind} version {version} is not recorded yet" for kind, version in current if (kind, version) not in known),
        *(f"{kind} version {version} is gone; what was released is read for ever" for kind, version in known
          if (kind, version) not in current),
        *(f"{kind} version {version} has another shape than was recorded; give the new shape a new version"
          for (kind, version), text in current.items() if known.get((kind, version), text) != text),
    ]  # fmt: skip


def exact_versions(kind_name: str, state: Any) -> tuple[int, ...]:
    """The versions, newest first, in which *state* (of the newest version) can be said without a loss."""
    kind = KINDS[kind_name]
    return tuple(version for version in kind.writable if not _loss(kind, state, version))


def encode(
    instance_name: str, kind_name: str, state: Any, *, version: int | None = None, optional: bool = False
) -> DevicePayload:
    """Write *state* (of the newest version) as a payload, in an older version when one is asked for.

    Raises:
        PayloadError: `payload_version`: not writable; `payload_lossy`: the older version cannot say it, and the text
            names what it cannot say.
    """
    kind = KINDS[kind_name]
    wanted = kind.newest if version is None else version
    if wanted not in kind.writable:
        raise _error(instance_name, kind_name, wanted, "payload_version", f"can write only {_listed(kind.writable)}")
    loss = _loss(kind, state, wanted)
    if loss:
        raise _error(instance_name, kind_name, wanted, "payload_lossy", f"cannot say {loss}")
    body = msgpack.packb(Struct(kind.shapes[wanted]).encode(_older(kind, state, wanted)), use_bin_type=True)
    return DevicePayload(instance_name, kind_name, wanted, body, optional)


def _loss(kind: Kind, state: Any, version: int) -> str:
    """What *version* cannot say of *state*; empty when it says all of it."""
    if version == kind.newest:
        return ""
    shape = Struct(kind.shapes[version])
    try:
        older = _older(kind, state, version)
    except PayloadError as exc:
        return exc.text
    problems: list[str] = []
    shape.decode(shape.encode(older), "", problems)
    newest = Struct(kind.shapes[kind.newest])
    if not problems:
        problems += _differing(newest.encode(state), newest.encode(_newest(kind, older, version)), "")
    return ", ".join(problems[:20])


def _older(kind: Kind, state: Any, version: int) -> Any:
    for step in range(kind.newest, version, -1):
        state = kind.down[step](state)
    return state


def _newest(kind: Kind, state: Any, version: int) -> Any:
    for step in range(version, kind.newest):
        state = kind.up[step](state)
    return state


def _differing(one: Any, other: Any, path: str) -> Iterator[str]:
    """Paths of what differs; contents are never shown."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in one:
            yield from _differing(one[name], other.get(name), f"{path}.{name}" if path else name)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for n, (item, other_item) in enumerate(zip(one, other, strict=True)):
            yield from _differing(item, other_item, f"{path}[{n}]")
    elif one != other:
        yield path


def decode(payload: DevicePayload) -> Any:
    """Read a payload, strictly, and bring it up to the newest version.

    Raises:
        PayloadError: `payload_kind`, `payload_version`, `payload_too_large`, `payload_body` (a field), `payload_value`
            (fields that do not go together); the text names the device, the kind, every field at fault and what is
            allowed.
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
    state, problems = decode_body(kind.shapes[version], _unpacked(payload))
    if problems:
        raise _error(name, kind.name, version, "payload_body", "; ".join(problems[:20]))
    state = _newest(kind, state, version)
    problems += kind.check(state)
    if problems:
        raise _error(name, kind.name, version, "payload_value", "; ".join(problems[:20]))
    return state


def _unpacked(payload: DevicePayload) -> Any:
    try:
        check_shape(payload.body, MAX_OBJECTS)
        return msgpack.unpackb(payload.body)
    except (ValueError, msgpack.UnpackException) as exc:
        name, kind, version = payload.instance_name, payload.kind, payload.version
        raise _error(name, kind, version, "payload_body", "the body is not one MessagePack map") from exc


def _listed(versions: tuple[int, ...]) -> str:
    return ", ".join(map(str, versions))


def _error(device: str, kind: str, version: int, code: str, text: str) -> PayloadError:
    details = {"device": device, "kind": kind, "version": version}
    return PayloadError(f"device {device}, payload {kind} version {version}: {text}", code=code, details=details)
