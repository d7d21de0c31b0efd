"""Spec version v1: the first. Every type of it, in the order in which its fields are written.

Source: reference types of API 1.0.0. Frozen: a released version never changes; a new version gets a module of its
own (recipe in `chain`).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, ClassVar, Final

from pydantic import Field

from vmmigrate.spec.decode import (
    OMIT_DEFAULT,
    U8,
    U32,
    U64,
    Bytes,
    Enumeration,
    Flag,
    Integer,
    Key,
    KeyedMap,
    ListOf,
    Nullable,
    SetOf,
    Struct,
    Tagged,
    Text,
    UuidText,
)
from vmmigrate.spec.keys import SpecKey

NAME: Final = "v1"

NVME_SERIAL_BYTES: Final = 20

# ---- board


class I440Fx(Struct):
    """The only chipset."""

    tag: ClassVar[str] = "i440_fx"
    enable_pcie: Flag


class HyperVFeature(StrEnum):
    REFERENCE_TSC = "reference_tsc"


class GuestHvInterface(Struct):
    """What the guest sees in the hypervisor CPUID leaves: `Bhyve` or `HyperV`."""


class Bhyve(GuestHvInterface):
    tag: ClassVar[str] = "bhyve"


class HyperV(GuestHvInterface):
    tag: ClassVar[str] = "hyper_v"
    features: Annotated[tuple[HyperVFeature, ...], SetOf(Enumeration(HyperVFeature))]


class CpuidVendor(StrEnum):
    AMD = "amd"
    INTEL = "intel"


class CpuidEntry(Struct):
    leaf: U32
    subleaf: Annotated[int | None, Field(ge=0, le=2**32 - 1), Nullable(Integer(2**32 - 1))] = None
    eax: U32
    ebx: U32
    ecx: U32
    edx: U32


class Cpuid(Struct):
    entries: Annotated[tuple[CpuidEntry, ...], ListOf(CpuidEntry.table)]
    vendor: Annotated[CpuidVendor, Enumeration(CpuidVendor)]


class Board(Struct):
    """`memory_mb` is in MiB. The type allows zero CPUs and zero memory; gate `creatable` does not."""

    cpus: U8
    memory_mb: U64
    chipset: Annotated[I440Fx, Tagged("type", "value", I440Fx)]
    guest_hv_interface: Annotated[GuestHvInterface, Tagged("type", "value", Bhyve, HyperV), OMIT_DEFAULT] = Bhyve()
    cpuid: Annotated[Cpuid | None, Nullable(Cpuid.table), OMIT_DEFAULT] = None


# ---- devices


class PciPath(Struct):
    """Where a PCI function sits; `bus` is a logical bus number. Written `bus.device.function` as text."""

    unknown_fields: ClassVar[str] = "ignore"
    bus: U8
    device: Annotated[int, Field(ge=0, le=31), Integer(31)]
    function: Annotated[int, Field(ge=0, le=7), Integer(7)]

    def __str__(self) -> str:
        return f"{self.bus}.{self.device}.{self.function}"


class Component(Struct):
    """What stands under a key of `components`."""


class VirtioDisk(Component):
    tag: ClassVar[str] = "virtio_disk"
    backend_id: Key
    pci_path: PciPath


class NvmeDisk(Component):
    tag: ClassVar[str] = "nvme_disk"
    backend_id: Key
    pci_path: PciPath
    serial_number: Annotated[
        bytes, Field(min_length=NVME_SERIAL_BYTES, max_length=NVME_SERIAL_BYTES), Bytes(NVME_SERIAL_BYTES)
    ]


class VirtioNic(Component):
    tag: ClassVar[str] = "virtio_nic"
    backend_id: Key
    interface_id: UuidText
    pci_path: PciPath


class SerialPortNumber(StrEnum):
    COM1 = "com1"
    COM2 = "com2"
    COM3 = "com3"
    COM4 = "com4"


class SerialPort(Component):
    tag: ClassVar[str] = "serial_port"
    num: Annotated[SerialPortNumber, Enumeration(SerialPortNumber)]


class PciPciBridge(Component):
    tag: ClassVar[str] = "pci_pci_bridge"
    downstream_bus: U8
    pci_path: PciPath


class QemuPvpanic(Component):
    tag: ClassVar[str] = "qemu_pvpanic"
    enable_isa: Flag


class BootOrderEntry(Struct):
    unknown_fields: ClassVar[str] = "ignore"
    id: Key


class BootSettings(Component):
    tag: ClassVar[str] = "boot_settings"
    order: Annotated[tuple[BootOrderEntry, ...], ListOf(BootOrderEntry.table)]


class SoftNpuPciPort(Component):
    tag: ClassVar[str] = "soft_npu_pci_port"
    pci_path: PciPath


class SoftNpuPort(Component):
    tag: ClassVar[str] = "soft_npu_port"
    link_name: Text
    backend_id: Key


class SoftNpuP9(Component):
    tag: ClassVar[str] = "soft_npu_p9"
    pci_path: PciPath


class P9fs(Component):
    tag: ClassVar[str] = "p9fs"
    source: Text
    target: Text
    chunk_size: U32
    pci_path: PciPath


class MigrationFailureInjector(Component):
    tag: ClassVar[str] = "migration_failure_injector"
    fail_exports: U32
    fail_imports: U32


# ---- backends


class CrucibleStorageBackend(Component):
    """`request_json` is opaque text to the type; it can hold keys, so it is never shown."""

    tag: ClassVar[str] = "crucible_storage_backend"
    request_json: Annotated[Text, Field(repr=False)]
    readonly: Flag


class FileStorageBackend(Component):
    tag: ClassVar[str] = "file_storage_backend"
    path: Text
    readonly: Flag
    block_size: U32
    workers: Annotated[int | None, Field(ge=1, le=2**64 - 1), Nullable(Integer(2**64 - 1, minimum=1))] = None


class BlobStorageBackend(Component):
    """`base64` is opaque text to the type; it can hold user data, so it is never shown."""

    tag: ClassVar[str] = "blob_storage_backend"
    base64: Annotated[Text, Field(repr=False)]
    readonly: Flag


class VirtioNetworkBackend(Component):
    tag: ClassVar[str] = "virtio_network_backend"
    vnic_name: Text


class DlpiNetworkBackend(Component):
    tag: ClassVar[str] = "dlpi_network_backend"
    vnic_name: Text


COMPONENT: Final = Tagged(
    "type",
    "component",
    VirtioDisk,
    NvmeDisk,
    VirtioNic,
    SerialPort,
    PciPciBridge,
    QemuPvpanic,
    BootSettings,
    SoftNpuPciPort,
    SoftNpuPort,
    SoftNpuP9,
    P9fs,
    MigrationFailureInjector,
    CrucibleStorageBackend,
    FileStorageBackend,
    BlobStorageBackend,
    VirtioNetworkBackend,
    DlpiNetworkBackend,
)


class InstanceSpec(Struct):
    """A v1 document. Unknown fields are rejected, unlike in later versions."""

    board: Board
    components: Annotated[Mapping[SpecKey, Component], KeyedMap(COMPONENT)]
