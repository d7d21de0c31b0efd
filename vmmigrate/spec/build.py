"""Gate `build`: does an API spec describe one machine? And if so, which?

The checks, their order and the first error reported are those of the reference implementation (its builder), with
two exceptions. It keeps the first of several sockets and the last of several boot settings, and says nothing: here
a second one is refused, as is a second SoftNPU P9 device or p9fs.

Order: CPUID first; then devices in key order, each taking its backend; then the boot order, since all disks are
known by then; then backends that nobody took (storage, viona, DLPI; first key of each); last the socket. What only
a host can object to is gate `creatable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeVar

from vmmigrate.errors import SpecBuildError
from vmmigrate.spec.chain import AnySpec, up
from vmmigrate.spec.keys import SpecKey, in_key_order, spec_key
from vmmigrate.spec.latest import (
    BlobStorageBackend,
    Board,
    BootSettings,
    Component,
    CpuidEntry,
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
    SoftNpuP9,
    SoftNpuPciPort,
    SoftNpuPort,
    VirtioDisk,
    VirtioNetworkBackend,
    VirtioNic,
    VirtioSocket,
)
from vmmigrate.spec.machine import (
    Disk,
    DiskDevice,
    Named,
    Nic,
    Serial,
    SerialOwner,
    SoftNpu,
    SoftNpuLink,
    Spec,
    StorageBackend,
)

FALCON: Final = "falcon"
FAILURE_INJECTION: Final = "failure-injection"
FEATURES: Final = frozenset({FALCON, FAILURE_INJECTION})

_SOFT_NPU_PORT_KEY: Final = spec_key("com4")
_STANDARD_LEAVES: Final = range(0x1_0000)
_EXTENDED_LEAVES: Final = range(0x8000_0000, 0x8001_0000)

_B = TypeVar("_B")
_C = TypeVar("_C", bound=Component)


def build(spec: AnySpec, features: frozenset[str] = frozenset()) -> Spec:
    """The machine that an API spec of any version describes, on a host built with *features*.

    Raises: SpecBuildError: the first rule broken, with a stable code; `details["component"]` names the culprit, or is
        None.
    """
    return _Builder(up(spec), features).build()


def _refuse(code: str, component: SpecKey | None, text: str) -> SpecBuildError:
    return SpecBuildError(text, code=code, details={"component": component})


class _Builder:
    """Collects one machine. Backends wait in three pools until a device takes them."""

    def __init__(self, source: InstanceSpec, features: frozenset[str]) -> None:
        self._source = source
        self._features = features
        self._storage = _of_type(source, (CrucibleStorageBackend, FileStorageBackend, BlobStorageBackend))
        self._viona = _of_type(source, (VirtioNetworkBackend,))
        self._dlpi = _of_type(source, (DlpiNetworkBackend,))
        self._names: set[SpecKey] = set()
        self._pci_paths: set[PciPath] = set()
        self._disks: dict[SpecKey, Disk] = {}
        self._nics: dict[SpecKey, Nic] = {}
        self._serial: dict[SpecKey, Serial] = {}
        self._bridges: dict[SpecKey, PciPciBridge] = {}
        self._links: dict[SpecKey, SoftNpuLink] = {}
        self._singles: dict[type[Component], Named[Any]] = {}

    def build(self) -> Spec:
        board = _board_with_sorted_cpuid(self._source.board)
        for key, component in self._source.components.items():
            self._add(key, component)
        self._check_boot_order()
        for pool in (self._storage, self._viona, self._dlpi):
            for key in pool:
                raise _refuse("backend_not_used", key, f"backend {key} not used by any device")
        self._add_sockets()
        return Spec(
            board=board,
            disks=self._disks,
            nics=self._nics,
            serial=in_key_order(self._serial),
            pci_bridges=self._bridges,
            boot_settings=self._singles.get(BootSettings),
            pvpanic=self._singles.get(QemuPvpanic),
            vsock=self._singles.get(VirtioSocket),
            failure_injector=self._singles.get(MigrationFailureInjector),
            soft_npu=SoftNpu(
                self._component(SoftNpuPciPort), self._links, self._component(SoftNpuP9), self._component(P9fs)
            ),
            smbios=self._source.smbios,
        )

    # ---- one component

    def _add(self, key: SpecKey, component: Component) -> None:
        match component:
            case VirtioDisk() | NvmeDisk():
                self._add_disk(key, component)
            case VirtioNic():
                self._add_nic(key, component)
            case SerialPort():
                self._add_serial_port(key, component.num)
            case PciPciBridge():
                self._take_name(key)
                self._take_pci_path(key, component.pci_path)
                self._bridges[key] = component
            case QemuPvpanic():
                self._take_name(key)
                self._set_single(key, component, "pvpanic_in_use", "pvpanic device already specified")
            case BootSettings():
                self._set_single(key, component, "boot_settings_in_use", "boot settings were already specified")
            case MigrationFailureInjector():
                self._need(FAILURE_INJECTION, key)
                self._take_name(key)
                text = "migration failure injection already enabled"
                self._set_single(key, component, "migration_failure_injection_in_use", text)
            case SoftNpuPciPort() | SoftNpuPort() | SoftNpuP9() | P9fs():
                self._need(FALCON, key)
                self._add_soft_npu(key, component)
            case _:
                pass  # backends wait in their pools, sockets for the end

    def _add_disk(self, key: SpecKey, device: DiskDevice) -> None:
        backend: StorageBackend | None = self._storage.pop(device.backend_id, None)
        if backend is None:
            text = f"storage backend {device.backend_id} not found for device {key}"
            raise _refuse("storage_backend_not_found", key, text)
        self._take_pair(key, device.backend_id)
        self._take_pci_path(key, device.pci_path)
        self._disks[key] = Disk(device, backend)

    def _add_nic(self, key: SpecKey, device: VirtioNic) -> None:
        backend = self._take_network_backend(self._viona, key, device.backend_id)
        self._take_pair(key, device.backend_id)
        self._take_pci_path(key, device.pci_path)
        self._nics[key] = Nic(device, backend)

    def _add_serial_port(self, key: SpecKey, number: SerialPortNumber, owner: SerialOwner = SerialOwner.UART) -> None:
        self._check_name(key)
        if any(port.number == number for port in self._serial.values()):
            raise _refuse("serial_port_in_use", key, f"serial port {number} already in use")
        self._take_name(key)
        self._serial[key] = Serial(number, owner)

    def _add_soft_npu(self, key: SpecKey, device: SoftNpuPciPort | SoftNpuPort | SoftNpuP9 | P9fs) -> None:
        if isinstance(device, SoftNpuPort):
            backend = self._take_network_backend(self._dlpi, key, device.backend_id)
            self._take_pair(key, device.backend_id)
            self._links[key] = SoftNpuLink(device, backend)
            return
        if isinstance(device, SoftNpuPciPort):
            self._add_serial_port(_SOFT_NPU_PORT_KEY, SerialPortNumber.COM4, SerialOwner.SOFT_NPU)
        self._take_pci_path(key, device.pci_path)
        self._set_single(key, device, f"{device.tag}_in_use", f"a {device.tag} device is already specified")

    def _add_sockets(self) -> None:
        for key, component in self._source.components.items():
            if isinstance(component, VirtioSocket):
                self._set_single(key, component, "vsock_in_use", "vsock device already specified")
                self._take_name(key)
                self._take_pci_path(key, component.pci_path)

    def _check_boot_order(self) -> None:
        settings = self._component(BootSettings)
        for entry in settings.order if settings is not None else ():
            if entry.id not in self._disks:
                text = f"boot option {entry.id} is not an attached device"
                raise _refuse("boot_option_missing", entry.id, text)

    # ---- what can be taken only once

    def _take_network_backend(self, pool: dict[SpecKey, _B], key: SpecKey, backend_id: SpecKey) -> _B:
        if backend_id not in pool:
            text = f"network backend {backend_id} not found for device {key}"
            raise _refuse("network_backend_not_found", key, text)
        return pool.pop(backend_id)

    def _take_pair(self, key: SpecKey, backend_id: SpecKey) -> None:
        # Both are keys of one map and of different kinds, so a device never is its own backend here.
        self._take_name(key)
        self._take_name(backend_id)

    def _check_name(self, key: SpecKey) -> None:
        if key in self._names:
            raise _refuse("component_name_in_use", key, f"a component with name {key} already exists")

    def _take_name(self, key: SpecKey) -> None:
        self._check_name(key)
        self._names.add(key)

    def _take_pci_path(self, key: SpecKey, path: PciPath) -> None:
        if path in self._pci_paths:
            raise _refuse("pci_path_in_use", key, f"a PCI device is already attached at {path}")
        self._pci_paths.add(path)

    def _set_single(self, key: SpecKey, component: Component, code: str, text: str) -> None:
        if type(component) in self._singles:
            raise _refuse(code, key, text)
        self._singles[type(component)] = Named(key, component)

    def _component(self, kind: type[_C]) -> _C | None:
        single = self._singles.get(kind)
        return None if single is None else single.component

    def _need(self, feature: str, key: SpecKey) -> None:
        if feature not in self._features:
            raise _refuse("feature_compiled_out", key, f"support for component {key} compiled out via {feature}")


def _of_type(spec: InstanceSpec, kinds: tuple[type[Any], ...]) -> dict[SpecKey, Any]:
    return {key: part for key, part in spec.components.items() if isinstance(part, kinds)}


# ---- CPUID


def _board_with_sorted_cpuid(board: Board) -> Board:
    if board.cpuid is None:
        return board
    entries: dict[int, list[CpuidEntry]] = {}
    for entry in board.cpuid.entries:
        if reason := _reason_against(entry, entries.setdefault(entry.leaf, [])):
            text = f"instance spec's CPUID entries are invalid: {reason}"
            raise _refuse("cpuid_entries_invalid", None, text)
        entries[entry.leaf].append(entry)
    ordered = [entry for leaf in sorted(entries) for entry in sorted(entries[leaf], key=_subleaf)]
    return board.model_copy(update={"cpuid": board.cpuid.model_copy(update={"entries": tuple(ordered)})})


def _subleaf(entry: CpuidEntry) -> int:
    return entry.subleaf or 0


def _reason_against(entry: CpuidEntry, before: Sequence[CpuidEntry]) -> str | None:
    """Why an entry cannot follow the ones of the same leaf; a leaf has either one entry or subleaves."""
    leaf = f"{entry.leaf:x}"
    if entry.leaf not in _STANDARD_LEAVES and entry.leaf not in _EXTENDED_LEAVES:
        return f"leaf {leaf} not in standard or extended range"
    if any(other.subleaf == entry.subleaf for other in before):
        subleaf = "None" if entry.subleaf is None else f"Some({entry.subleaf})"
        return f"duplicate leaf and subleaf ({leaf}, {subleaf})"
    if before and entry.subleaf is None:
        return f"leaf {leaf} has entries with subleaves"
    if before and before[0].subleaf is None:
        return f"leaf {leaf} has an entry without a subleaf"
    return None
