"""From the internal Spec to what an adapter builds."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vmmigrate.hypervisor.base import BoardPlan, DiskPlan, GuestPlan, InjectorPlan, NicPlan, PciAddress, SerialPortPlan
from vmmigrate.memory import MIB, RamLayout
from vmmigrate.spec.latest import (
    BlobStorageBackend,
    CrucibleStorageBackend,
    FileStorageBackend,
    HyperV,
    NvmeDisk,
    PciPath,
)
from vmmigrate.spec.machine import Disk, Nic, SerialOwner, Spec
from vmmigrate.spec.volume import File, Region, Url, Volume, VolumeRequest, parse_volume, volume_id


def guest_plan(
    instance_id: str,
    spec: Spec,
    layout: RamLayout,
    *,
    program: Mapping[str, Any],
    cpus: int | None = None,
    volumes: Mapping[str, Path] | None = None,
    like: Mapping[str, str] | None = None,
) -> GuestPlan:
    """The plan of a guest with RAM of *layout*, which is the spec's unless an override says otherwise.

    Args:
        like: Facts of the guest at the source, when it arrives from there.
        volumes: Where this host finds Crucible volumes, by volume id; a volume that is not here has no contents.
    """
    return GuestPlan(
        instance_id=instance_id,
        layout=layout,
        cpus=cpus or spec.board.cpus,
        serial_ports=tuple(
            SerialPortPlan(str(key), serial.number.value)
            for key, serial in spec.serial.items()
            if serial.owner is SerialOwner.UART
        ),
        disks=tuple(_disk_plan(str(key), disk, volumes or {}) for key, disk in spec.disks.items()),
        nics=tuple(_nic_plan(str(key), nic) for key, nic in spec.nics.items()),
        injector=_injector_plan(spec),
        program=program,
        unmigratable=tuple(_unmigratable(spec)),
        board=_board_plan(spec),
        like=dict(like or {}),
    )


def layout_of(spec: Spec) -> RamLayout:
    """The RAM layout that the spec asks for."""
    return RamLayout.for_size(spec.board.memory_mb * MIB)


def _board_plan(spec: Spec) -> BoardPlan:
    board, boot, smbios, pvpanic = spec.board, spec.boot_settings, spec.smbios, spec.pvpanic
    return BoardPlan(
        enable_pcie=board.chipset.enable_pcie,
        hv_interface="hyper_v" if isinstance(board.guest_hv_interface, HyperV) else "bhyve",
        boot_order=() if boot is None else tuple(str(entry.id) for entry in boot.component.order),
        smbios=None if smbios is None else {name: str(getattr(smbios, name)) for name in _SMBIOS_FIELDS},
        cpuid=board.cpuid,
        pvpanic_isa=None if pvpanic is None else pvpanic.component.enable_isa,
        bridges={str(key): bridge.downstream_bus for key, bridge in spec.pci_bridges.items()},
    )


_SMBIOS_FIELDS = ("manufacturer", "product_name", "serial_number", "version")


def _nic_plan(name: str, nic: Nic) -> NicPlan:
    device = nic.device
    address = _address(device.pci_path)
    return NicPlan(name, str(device.backend_id), nic.backend.vnic_name, address, str(device.interface_id))


def _address(path: PciPath) -> PciAddress:
    return (path.bus, path.device, path.function)


def _injector_plan(spec: Spec) -> InjectorPlan | None:
    if spec.failure_injector is None:
        return None
    component = spec.failure_injector.component
    return InjectorPlan(str(spec.failure_injector.key), component.fail_exports, component.fail_imports)


def _disk_plan(name: str, disk: Disk, volumes: Mapping[str, Path]) -> DiskPlan:
    backend = disk.backend
    kind, opened = _backend(backend, volumes)
    return DiskPlan(
        name=name,
        model="nvme" if isinstance(disk.device, NvmeDisk) else "virtio",
        backend_name=str(disk.device.backend_id),
        backend_kind=kind,
        readonly=backend.readonly,
        backend=opened,
        pci_path=_address(disk.device.pci_path),
        serial=_serial(disk.device.serial_number) if isinstance(disk.device, NvmeDisk) else "",
    )


def _serial(number: bytes) -> str:
    """As an NVMe controller shows it: up to the first NUL."""
    return number.partition(b"\0")[0].decode("latin-1")


def _backend(
    backend: CrucibleStorageBackend | FileStorageBackend | BlobStorageBackend, volumes: Mapping[str, Path]
) -> tuple[str, dict[str, Any]]:
    """Kind and fields as `base.DiskPlan` has them; the request was parsed before, by the `creatable` gate."""
    if isinstance(backend, FileStorageBackend):
        return "file", {"path": backend.path}
    if isinstance(backend, BlobStorageBackend):
        return "blob", {"contents": base64.b64decode(backend.base64)}
    request = parse_volume(backend.request_json)
    identity = str(volume_id(request))
    path = volumes.get(identity)
    generation = max((region.gen for region in _regions(request)), default=0)
    return "crucible", {
        "volume_id": identity,
        "generation": generation,
        "path": None if path is None else str(path),
        "plain": _plain(request),
    }


def _plain(request: VolumeRequest) -> dict[str, str] | None:
    """The one file or URL that a volume is, if it is nothing else: what needs no Crucible to be opened."""
    while isinstance(request, Volume) and len(request.sub_volumes) == 1 and request.read_only_parent is None:
        request = request.sub_volumes[0]
    if isinstance(request, File):
        return {"file": request.path}
    return {"url": request.url} if isinstance(request, Url) else None


def _regions(request: VolumeRequest) -> Iterator[Region]:
    """The writable regions of a volume: those of a read-only parent are never opened for writing."""
    if isinstance(request, Region):
        yield request
    elif isinstance(request, Volume):
        for part in request.sub_volumes:
            yield from _regions(part)


def _unmigratable(spec: Spec) -> Iterator[str]:
    """Devices for which Propolis has no payload either (propolis.md 5.2), by name, with what they are."""
    if spec.vsock is not None:
        yield f"{spec.vsock.key} (virtio_socket)"
    for key in spec.pci_bridges:
        yield f"{key} (pci_pci_bridge)"
    soft_npu = spec.soft_npu
    if soft_npu.pci_port is not None or soft_npu.ports or soft_npu.p9 is not None:
        yield "softnpu (soft_npu_pci_port, soft_npu_port, soft_npu_p9)"
    if soft_npu.p9fs is not None:
        yield "p9fs"
