"""Gate `creatable`: is there a host that could create this machine?

The reference implementation finds these faults only while it creates a VM, some of them by a panic; a migration
then fails after RAM has moved. Here they are found beforehand, all at once. What depends on one host (its CPUs,
memory, paths, interfaces) is checked by that host's daemon. This gate is asked by create, migrate-in and `spec
validate`; never by build, convert or negotiate.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Final

from vmmigrate.errors import SpecCreatableError, SpecParseError
from vmmigrate.spec.keys import SpecKey
from vmmigrate.spec.latest import BlobStorageBackend, CrucibleStorageBackend, SerialPortNumber
from vmmigrate.spec.machine import SerialOwner, Spec
from vmmigrate.spec.volume import parse_volume, volume_id

CHIPSET_FUNCTIONS: Final = {"0.0.0": "host bridge", "0.1.0": "ISA bridge", "0.1.3": "power management"}
"""PCI functions that the chipset occupies itself."""

LARGEST_MEMORY_MIB: Final = 2**32
"""Physical addresses of x86-64 have at most 52 bits."""

GUEST_CIDS: Final = range(3, 2**32 - 1)
"""0, 1 and 2 mean hypervisor, loopback and host; the last number of 32 bits means any."""

LONGEST_SMBIOS_TEXT: Final = 64
"""Characters that every version of the SMBIOS specification allows in a string."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken rule: which component (None: the machine as a whole), which rule, and what is allowed."""

    component: SpecKey | None
    rule: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.component or 'machine'}: {self.rule}, allowed: {self.allowed}"


def check_creatable(spec: Spec) -> None:
    """Raises: SpecCreatableError with every problem in `details["problems"]`."""
    found = problems(spec)
    if found:
        raise SpecCreatableError(
            "no host could create this machine: " + "; ".join(map(str, found)),
            details={"problems": [asdict(problem) for problem in found]},
        )


def problems(spec: Spec) -> list[Problem]:
    """Every broken rule; empty when a host could create the machine."""
    rules = (_board, _first_serial_port, _chipset_slots, _bridges, _buses, _boot_disks, _blobs, _volumes, _cid, _smbios)
    return [problem for rule in rules for problem in rule(spec)]


def _board(spec: Spec) -> Iterator[Problem]:
    if spec.board.cpus < 1:
        yield Problem(None, "cpus_zero", "1..255 CPUs")
    if not 0 < spec.board.memory_mb <= LARGEST_MEMORY_MIB:
        yield Problem(None, "memory_size", f"1..{LARGEST_MEMORY_MIB} MiB")


def _first_serial_port(spec: Spec) -> Iterator[Problem]:
    ports = {port.number for port in spec.serial.values() if port.owner is SerialOwner.UART}
    if SerialPortNumber.COM1 not in ports:
        yield Problem(None, "com1_missing", "a machine with a serial port com1")


def _chipset_slots(spec: Spec) -> Iterator[Problem]:
    for key, path in spec.pci_paths().items():
        if owner := CHIPSET_FUNCTIONS.get(str(path)):
            yield Problem(key, "pci_path_of_chipset", f"any PCI path but {path}, the chipset's {owner}")


def _bridges(spec: Spec) -> Iterator[Problem]:
    owners: dict[int, SpecKey] = {}
    for key, bridge in spec.pci_bridges.items():
        bus = bridge.downstream_bus
        if bus == 0:
            yield Problem(key, "downstream_bus_zero", "a downstream bus 1..255")
        elif bus in owners:
            yield Problem(key, "downstream_bus_in_use", f"a downstream bus other than {bus}, which {owners[bus]} has")
        owners.setdefault(bus, key)


def _buses(spec: Spec) -> Iterator[Problem]:
    reachable = _reachable_buses(spec)
    for key, path in spec.pci_paths().items():
        if path.bus not in reachable:
            buses = ", ".join(map(str, sorted(reachable)))
            yield Problem(key, "pci_bus_without_bridge", f"a bus that bridges lead to: {buses}")


def _reachable_buses(spec: Spec) -> set[int]:
    """Bus 0 and whatever bridges lead to from there; a ring of bridges leads nowhere."""
    reachable, grew = {0}, True
    while grew:
        further = {b.downstream_bus for b in spec.pci_bridges.values() if b.pci_path.bus in reachable}
        grew = not further <= reachable
        reachable |= further
    return reachable


def _boot_disks(spec: Spec) -> Iterator[Problem]:
    if spec.boot_settings is None:
        return
    for entry in spec.boot_settings.component.order:
        disk = spec.disks.get(entry.id)
        if disk is not None and disk.device.pci_path.bus != 0:
            yield Problem(entry.id, "boot_disk_bus", "bus 0 for a disk of the boot order")


def _blobs(spec: Spec) -> Iterator[Problem]:
    for disk in spec.disks.values():
        if isinstance(disk.backend, BlobStorageBackend):
            try:
                base64.b64decode(disk.backend.base64.encode(), validate=True)
            except binascii.Error:
                yield Problem(disk.device.backend_id, "base64", "standard base64 with padding")


def _volumes(spec: Spec) -> Iterator[Problem]:
    owners: dict[str, SpecKey] = {}
    for key, backend in _crucible_backends(spec).items():
        try:
            volume = volume_id(parse_volume(backend.request_json))
        except SpecParseError as error:
            yield Problem(key, "volume_request", f"a volume construction request; this one is none: {error.text}")
            continue
        if volume in owners:
            yield Problem(key, "volume_id_in_use", f"a volume other than {volume}, which {owners[volume]} has")
        owners.setdefault(volume, key)


def _crucible_backends(spec: Spec) -> Mapping[SpecKey, CrucibleStorageBackend]:
    disks = sorted(spec.disks.values(), key=lambda disk: disk.device.backend_id)
    return {disk.device.backend_id: disk.backend for disk in disks if isinstance(disk.backend, CrucibleStorageBackend)}


def _cid(spec: Spec) -> Iterator[Problem]:
    if spec.vsock is not None and spec.vsock.component.guest_cid not in GUEST_CIDS:
        yield Problem(spec.vsock.key, "guest_cid", f"{GUEST_CIDS.start}..{GUEST_CIDS.stop - 1}")


def _smbios(spec: Spec) -> Iterator[Problem]:
    if spec.smbios is None:
        return
    for name in ("manufacturer", "product_name", "serial_number"):
        text: str = getattr(spec.smbios, name)
        if len(text) > LONGEST_SMBIOS_TEXT or "\0" in text:
            yield Problem(None, f"smbios_{name}", f"at most {LONGEST_SMBIOS_TEXT} characters, none of them NUL")
