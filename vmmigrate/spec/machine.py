"""The internal `Spec`: one machine, with every device joined to its backend.

Never serialised, free to change. Because a device holds its backend, a `Spec` cannot have a dangling or an orphan
one. The way back to the newest API version is `to_latest`, which reads every field of `Spec`; a test compares the
two lists, so that a new field cannot be forgotten.

Source: reference implementation's internal spec. Unlike it, a missing CPUID stays missing here: what a host would
put in its place is that host's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeAlias, TypeVar

from vmmigrate.errors import SpecBuildError
from vmmigrate.spec.keys import SpecKey, in_key_order, spec_key
from vmmigrate.spec.latest import (
    BlobStorageBackend,
    Board,
    BootSettings,
    Component,
    CrucibleStorageBackend,
    DlpiNetworkBackend,
    FileStorageBackend,
    InstanceSpec,
    MigrationFailureInjector,
    NvmeDisk,
    P9fs,
    PciPath,
    PciPciBridge,
    QemuPvpanic,
    SerialPort,
    SerialPortNumber,
    SmbiosType1Input,
    SoftNpuP9,
    SoftNpuPciPort,
    SoftNpuPort,
    VirtioDisk,
    VirtioNetworkBackend,
    VirtioNic,
    VirtioSocket,
)

DiskDevice: TypeAlias = VirtioDisk | NvmeDisk
StorageBackend: TypeAlias = CrucibleStorageBackend | FileStorageBackend | BlobStorageBackend

_C = TypeVar("_C", bound=Component)


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk device and the storage behind it; the backend's key is `device.backend_id`."""

    device: DiskDevice
    backend: StorageBackend


@dataclass(frozen=True, slots=True)
class Nic:
    """A NIC and the interface behind it; the backend's key is `device.backend_id`."""

    device: VirtioNic
    backend: VirtioNetworkBackend


@dataclass(frozen=True, slots=True)
class SoftNpuLink:
    """A SoftNPU port and the DLPI interface behind it."""

    device: SoftNpuPort
    backend: DlpiNetworkBackend


class SerialOwner(Enum):
    """What sits behind a serial port. SoftNPU takes COM4 for itself; that port is in no API spec."""

    UART = "uart"
    SOFT_NPU = "soft_npu"


@dataclass(frozen=True, slots=True)
class Serial:
    number: SerialPortNumber
    owner: SerialOwner


@dataclass(frozen=True, slots=True)
class Named(Generic[_C]):
    """A component of which a machine has at most one, with its key."""

    key: SpecKey
    component: _C


@dataclass(frozen=True, slots=True)
class SoftNpu:
    """The group of devices that feature `falcon` adds. Those without a key get generated names on the way back."""

    pci_port: SoftNpuPciPort | None = None
    ports: Mapping[SpecKey, SoftNpuLink] = field(default_factory=dict)
    p9: SoftNpuP9 | None = None
    p9fs: P9fs | None = None


@dataclass(frozen=True, slots=True)
class Spec:
    """One machine. Mappings are in key order; CPUID entries are sorted by leaf and subleaf."""

    board: Board
    disks: Mapping[SpecKey, Disk] = field(default_factory=dict)
    nics: Mapping[SpecKey, Nic] = field(default_factory=dict)
    serial: Mapping[SpecKey, Serial] = field(default_factory=dict)
    pci_bridges: Mapping[SpecKey, PciPciBridge] = field(default_factory=dict)
    boot_settings: Named[BootSettings] | None = None
    pvpanic: Named[QemuPvpanic] | None = None
    vsock: Named[VirtioSocket] | None = None
    failure_injector: Named[MigrationFailureInjector] | None = None
    soft_npu: SoftNpu = SoftNpu()
    smbios: SmbiosType1Input | None = None

    def pci_paths(self) -> dict[SpecKey, PciPath]:
        """Where every PCI device sits, by the key under which it stands in `to_latest`."""
        paths = {key: disk.device.pci_path for key, disk in self.disks.items()}
        paths |= {key: nic.device.pci_path for key, nic in self.nics.items()}
        paths |= {key: bridge.pci_path for key, bridge in self.pci_bridges.items()}
        if self.vsock is not None:
            paths[self.vsock.key] = self.vsock.component.pci_path
        for name, device in _generated(self.soft_npu).items():
            paths[name] = device.pci_path
        return in_key_order(paths)


def to_latest(spec: Spec) -> InstanceSpec:
    """The newest API version's document of the machine.

    Raises: SpecBuildError `component_name_in_use`: a generated SoftNPU name is taken by another component.
    """
    parts: dict[SpecKey, Component] = {}
    pairs: dict[SpecKey, Disk | Nic | SoftNpuLink] = {**spec.disks, **spec.nics, **spec.soft_npu.ports}
    for key, joined in pairs.items():
        parts[key] = joined.device
        parts[joined.device.backend_id] = joined.backend
    for key, port in spec.serial.items():
        if port.owner is SerialOwner.UART:
            parts[key] = SerialPort(num=port.number)
    parts.update(spec.pci_bridges)
    for single in (spec.boot_settings, spec.pvpanic, spec.vsock, spec.failure_injector):
        if single is not None:
            parts[single.key] = single.component
    for name, device in _generated(spec.soft_npu).items():
        if name in parts:
            raise SpecBuildError(
                f"component name {name} already exists in output spec",
                code="component_name_in_use",
                details={"component": name},
            )
        parts[name] = device
    return InstanceSpec(board=spec.board, components=in_key_order(parts), smbios=spec.smbios)


def _generated(group: SoftNpu) -> dict[SpecKey, SoftNpuPciPort | SoftNpuP9 | P9fs]:
    """The SoftNPU devices whose own names the internal spec does not keep."""
    devices = {"softnpu-pci": group.pci_port, "softnpu-p9": group.p9, "p9fs": group.p9fs}
    return {spec_key(f"{prefix}-{device.pci_path}"): device for prefix, device in devices.items() if device is not None}
