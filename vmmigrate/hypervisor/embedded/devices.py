"""The PCI devices, clock and failure injector of the embedded machine.

Nothing here emulates a driver's view register by register: the embedded guest talks to its disk and console directly.
The state is real all the same: it is exported, checked against this machine's own shape, and applied.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from vmmigrate.devices import block, chipset, kinds, pci, virtio
from vmmigrate.devices.plan import ExpectedDevice
from vmmigrate.errors import PayloadError
from vmmigrate.hypervisor.base import DiskPlan, InjectorPlan, NicPlan
from vmmigrate.hypervisor.embedded.backends import Backend, BlobBackend, VionaBackend
from vmmigrate.memory import RamLayout

RTC_NAME: Final = "pci-piix3-lpc"  # where Propolis keeps it
_QUEUE_SIZE: Final = 256
_MSIX_SIZE_BYTES: Final = 0x4000


class Device(Protocol):
    """A device whose state moves with the guest."""

    name: str

    def expected(self) -> ExpectedDevice: ...

    def export(self) -> dict[str, Any]:
        """State by payload kind, of the newest version."""

    def apply(self, states: Mapping[str, Any]) -> None:
        """Take over states that `expected().check` found well."""


class PciDevice:
    """What all PCI devices share: configuration space and MSI-X, and the payloads of one device as a whole."""

    def __init__(self, name: str, layout: RamLayout, vectors: int) -> None:
        self.name = name
        self._layout = layout
        self._states: dict[str, Any] = {"pci-device": _pci_device(vectors)}

    def expected(self) -> ExpectedDevice:
        return ExpectedDevice(self.name, tuple(self._states), check=self._check)

    def export(self) -> dict[str, Any]:
        return dict(self._states)

    def apply(self, states: Mapping[str, Any]) -> None:
        self._states.update(states)

    def _check(self, states: Mapping[str, Any]) -> Sequence[str]:
        return list(pci.differences(states["pci-device"], self._states["pci-device"]))


class VirtioDevice(PciDevice):
    """A virtio disk, or the half of a NIC that is not viona."""

    def __init__(self, name: str, layout: RamLayout, queues: int, *, control_queue: bool, config_bytes: int) -> None:
        super().__init__(name, layout, vectors=queues + 1)
        self._states["pci-virtio"] = _virtio(queues, control_queue, config_bytes)

    def _check(self, states: Mapping[str, Any]) -> Sequence[str]:
        own, new = self._states["pci-virtio"], states["pci-virtio"]
        return [*super()._check(states), *virtio.virtio_differences(new, own, self._layout)]


class Disk(VirtioDevice):
    def __init__(self, plan: DiskPlan, layout: RamLayout) -> None:
        super().__init__(plan.name, layout, queues=1, control_queue=False, config_bytes=60)


class NvmeDisk(PciDevice):
    def __init__(self, plan: DiskPlan, layout: RamLayout) -> None:
        super().__init__(plan.name, layout, vectors=2)
        self._states["nvme-ctrl"] = kinds.NvmeCtrlV1(0x20_0000_0FFF, 0, 0, 0, 0, 0, 0, 0, cqs=(), sqs=())

    def _check(self, states: Mapping[str, Any]) -> Sequence[str]:
        return [*super()._check(states), *block.nvme_differences(states["nvme-ctrl"], self._states["nvme-ctrl"])]


class Nic(VirtioDevice):
    """A virtio NIC; its filters are applied to the host NIC by the backend, which this machine only records."""

    def __init__(self, plan: NicPlan, layout: RamLayout) -> None:
        super().__init__(plan.name, layout, queues=3, control_queue=True, config_bytes=12)
        self.backend = VionaBackend(plan.backend_name, plan.vnic_name)
        self._states["pci-virtio-viona"] = kinds.PciVirtioVionaV1("None", 0, (), ())

    def _check(self, states: Mapping[str, Any]) -> Sequence[str]:
        return [*super()._check(states), *virtio.viona_differences(states["pci-virtio"])]


class BlobDevice:
    """The payload of a disk in memory: its contents."""

    def __init__(self, backend: BlobBackend) -> None:
        self.name = backend.name
        self._backend = backend

    def expected(self) -> ExpectedDevice:
        return ExpectedDevice(self.name, ("in-memory-block-backend",), check=self._check)

    def export(self) -> dict[str, Any]:
        return {"in-memory-block-backend": kinds.InMemoryBlockBackendV1(bytes(self._backend.contents))}

    def apply(self, states: Mapping[str, Any]) -> None:
        self._backend.contents[:] = states["in-memory-block-backend"].bytes

    def _check(self, states: Mapping[str, Any]) -> Sequence[str]:
        size = len(states["in-memory-block-backend"].bytes)
        if size != self._backend.size_bytes:
            return [f"in-memory-block-backend holds {size} bytes, this backend has {self._backend.size_bytes}"]
        return []


class Rtc:
    """A clock chip: CMOS holds the time of day of the moment `base_clock` (ns since the guest booted).

    It goes on by the guest's uptime, and so moves with time data; nothing here needs to tick.
    """

    name = RTC_NAME

    def __init__(self) -> None:
        self._cmos = bytearray(kinds.CMOS_BYTES)
        self._cmos[0x0B], self._cmos[0x0D] = 0x02, 0x80  # 24 hours; battery good
        self._base_clock = 0
        self._last_period = 0
        self._addr = 0
        chipset.write_time(self._cmos, int(time.time()))

    def expected(self) -> ExpectedDevice:
        return ExpectedDevice(self.name, ("bhyve-rtc",))

    def export(self) -> dict[str, Any]:
        return {"bhyve-rtc": kinds.BhyveRtcV2(self._base_clock, self._last_period, bytes(self._cmos), self._addr)}

    def apply(self, states: Mapping[str, Any]) -> None:
        state: kinds.BhyveRtcV2 = states["bhyve-rtc"]
        self._base_clock, self._last_period = state.base_clock, state.last_period
        self._cmos, self._addr = bytearray(state.cmos), state.addr


class FailureInjector:
    """Fails its first exports and imports (of this process); the payload is empty."""

    def __init__(self, plan: InjectorPlan) -> None:
        self.name = plan.name
        self._exports, self._imports = plan.fail_exports, plan.fail_imports

    def expected(self) -> ExpectedDevice:
        return ExpectedDevice(self.name, ("testdev-migration-failure",))

    def export(self) -> dict[str, Any]:
        if self._exports > 0:
            self._exports -= 1
            raise self._failure("export")
        return {"testdev-migration-failure": kinds.MigrationFailureV1()}

    def maybe_fail_import(self) -> None:
        """Called when all payloads are found well and before any is applied."""
        if self._imports > 0:
            self._imports -= 1
            raise self._failure("import")

    def apply(self, states: Mapping[str, Any]) -> None:
        pass

    def _failure(self, step: str) -> PayloadError:
        return PayloadError(f"device {self.name}: {step} fails on purpose", code="injected_failure")


def blob_device(backend: Backend) -> BlobDevice | None:
    return BlobDevice(backend) if isinstance(backend, BlobBackend) else None


def _pci_device(vectors: int) -> kinds.PciDeviceV1:
    empty = kinds.PciBar("Empty", 0, 0)
    bars = (kinds.PciBar("Pio", 0x200, 0xC000), kinds.PciBar("Mmio", _MSIX_SIZE_BYTES, 0xC000_0000), *[empty] * 4)
    entry = kinds.MsixEntry(addr=0, data=0, is_vec_masked=True, is_pending=False)
    msix = kinds.Msix(vectors, is_enabled=True, is_func_masked=False, entries=(entry,) * vectors)
    return kinds.PciDeviceV1(reg_command=0x0007, reg_intr_line=0, bars=bars, msix=msix)


def _virtio(queues: int, control_queue: bool, config_bytes: int) -> kinds.PciVirtioV2:
    rings = tuple(
        kinds.VirtioQueue(
            id=n,
            size=_QUEUE_SIZE,
            descr_gpa=0,
            mapping_valid=False,
            live=False,
            enabled=False,
            is_control=control_queue and n == queues - 1,
            notify_data=n,
            avail_gpa=0,
            avail_cur_idx=0,
            used_gpa=0,
            used_idx=0,
        )
        for n in range(queues)
    )
    registers = kinds.VirtioDeviceRegisters(
        status=0,
        queue_select=0,
        negotiated_features=0,
        device_feature_select=0,
        driver_feature_select=0,
        config_generation=0,
        config_generation_seen=False,
        device_config_size=config_bytes,
        mode=1,
        msix_cfg_vec=0xFFFF,
        msix_queue_vec=(0xFFFF,) * queues,
        isr_queue=False,
        isr_cfg=False,
    )
    return kinds.PciVirtioV2(registers, kinds.VirtioQueues(queues, queues, rings))
