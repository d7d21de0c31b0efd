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
from dataclasses import dataclass
from typing import Any, Final

from vmmigrate.errors import SpecCreatableError, SpecParseError
from vmmigrate.jsontext import Path
from vmmigrate.spec.keys import SpecKey, in_key_order
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

_PCI_PATH: Final = ("pci_path",)


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken rule: which component (None: the machine as a whole), which rule, what is there, what is allowed.

    `field` leads to the value: inside of the component, or from the document's root.
    """

    component: SpecKey | None
    rule: str
    text: str
    allowed: str
    field: Path = ()

    def __str__(self) -> str:
        return f"{self.component or 'machine'}: {self.text}, allowed: {self.allowed}"

    def as_dict(self) -> dict[str, Any]:
        """The problem in an error's details."""
        return {"component": self.component, "rule": self.rule, "message": self.text, "allowed": self.allowed}


def check_creatable(spec: Spec) -> None:
    """Raises: SpecCreatableError with every problem in `details["problems"]`."""
    found = problems(spec)
    if found:
        raise SpecCreatableError(
            "no host could create this machine: " + "; ".join(map(str, found)),
            details={"problems": [problem.as_dict() for problem in found]},
        )


def problems(spec: Spec) -> list[Problem]:
    """Every broken rule; empty when a host could create the machine."""
    rules = (_board, _first_serial_port, _chipset_slots, _bridges, _buses, _boot_disks, _blobs, _volumes, _cid, _smbios)
    return [problem for rule in rules for problem in rule(spec)]


def _board(spec: Spec) -> Iterator[Problem]:
    """Memory counts in MiB, so its size is always one of whole pages."""
    if spec.board.cpus < 1:
        yield Problem(None, "cpus_zero", "no CPU", "1..255 CPUs", ("board", "cpus"))
    memory = spec.board.memory_mb
    if not 0 < memory <= LARGEST_MEMORY_MIB:
        yield Problem(None, "memory_size", f"{memory} MiB", f"1..{LARGEST_MEMORY_MIB} MiB", ("board", "memory_mb"))


def _first_serial_port(spec: Spec) -> Iterator[Problem]:
    ports = {port.number for port in spec.serial.values() if port.owner is SerialOwner.UART}
    if SerialPortNumber.COM1 not in ports:
        yield Problem(None, "com1_missing", "no serial port com1", "a machine with a serial port com1", ("components",))


def _chipset_slots(spec: Spec) -> Iterator[Problem]:
    for key, path in spec.pci_paths().items():
        if owner := CHIPSET_FUNCTIONS.get(str(path)):
            text = f"PCI path {path} is that of the chipset's {owner}"
            yield Problem(key, "pci_path_of_chipset", text, f"any PCI path but {path}", _PCI_PATH)


def _bridges(spec: Spec) -> Iterator[Problem]:
    owners: dict[int, SpecKey] = {}
    for key, bridge in spec.pci_bridges.items():
        bus = bridge.downstream_bus
        if bus == 0:
            yield Problem(key, "downstream_bus_zero", "downstream bus 0", "1..255", ("downstream_bus",))
        elif bus in owners:
            text = f"downstream bus {bus} is that of {owners[bus]}"
            yield Problem(key, "downstream_bus_in_use", text, f"a downstream bus other than {bus}", ("downstream_bus",))
        owners.setdefault(bus, key)


def _buses(spec: Spec) -> Iterator[Problem]:
    reachable = _reachable_buses(spec)
    for key, path in spec.pci_paths().items():
        if path.bus not in reachable:
            buses = ", ".join(map(str, sorted(reachable)))
            text = f"no bridge leads to bus {path.bus}"
            yield Problem(key, "pci_bus_without_bridge", text, f"a bus that can be reached: {buses}", _PCI_PATH)


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
            text = f"a disk of the boot order on bus {disk.device.pci_path.bus}"
            yield Problem(entry.id, "boot_disk_bus", text, "bus 0", _PCI_PATH)


def _blobs(spec: Spec) -> Iterator[Problem]:
    for disk in spec.disks.values():
        if isinstance(disk.backend, BlobStorageBackend) and not _is_base64(disk.backend.base64):
            key = disk.device.backend_id
            yield Problem(key, "base64", "not base64", "standard base64 with padding", ("base64",))


def _is_base64(text: str) -> bool:
    """Exactly one text stands for each sequence of bytes; what decodes but would be written otherwise is refused."""
    try:
        return base64.b64encode(base64.b64decode(text.encode(), validate=True)) == text.encode()
    except binascii.Error:
        return False


def _volumes(spec: Spec) -> Iterator[Problem]:
    owners: dict[str, SpecKey] = {}
    for key, backend in _crucible_backends(spec).items():
        try:
            volume = volume_id(parse_volume(backend.request_json))
        except SpecParseError as error:
            text = f"no volume construction request: {error.text}"
            yield Problem(key, "volume_request", text, "a volume construction request", ("request_json",))
            continue
        if volume in owners:
            text = f"volume {volume} is that of {owners[volume]}"
            yield Problem(key, "volume_id_in_use", text, f"a volume other than {volume}", ("request_json",))
        owners.setdefault(volume, key)


def _crucible_backends(spec: Spec) -> Mapping[SpecKey, CrucibleStorageBackend]:
    pairs = {disk.device.backend_id: disk.backend for disk in spec.disks.values()}
    return {key: part for key, part in in_key_order(pairs).items() if isinstance(part, CrucibleStorageBackend)}


def _cid(spec: Spec) -> Iterator[Problem]:
    if spec.vsock is not None and spec.vsock.component.guest_cid not in GUEST_CIDS:
        text = f"guest CID {spec.vsock.component.guest_cid}"
        allowed = f"{GUEST_CIDS.start}..{GUEST_CIDS.stop - 1}"
        yield Problem(spec.vsock.key, "guest_cid", text, allowed, ("guest_cid",))


def _smbios(spec: Spec) -> Iterator[Problem]:
    if spec.smbios is None:
        return
    for name in ("manufacturer", "product_name", "serial_number"):
        value: str = getattr(spec.smbios, name)
        if len(value) > LONGEST_SMBIOS_TEXT or "\0" in value:
            text = f"{name} has a NUL" if "\0" in value else f"{name} has {len(value)} characters"
            allowed = f"at most {LONGEST_SMBIOS_TEXT} characters, none of them NUL"
            yield Problem(None, f"smbios_{name}", text, allowed, ("smbios", name))
