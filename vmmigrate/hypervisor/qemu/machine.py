"""From a guest's plan to the arguments of its QEMU. Pure: nothing is opened or asked here.

Devices get ids by their place in the plan (`disk0`, `nic0`), since QEMU's ids cannot hold every name of a spec; so both
ends of a migration, which have the same spec, have the same ids. What QEMU cannot show the guest is told by `problems`,
by the component's name, before anything is built.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from vmmigrate.hypervisor.base import DiskPlan, GuestPlan, NicPlan
from vmmigrate.hypervisor.qemu.cpuid import cpu_model
from vmmigrate.hypervisor.qemu.files import QemuFiles
from vmmigrate.hypervisor.qemu.settings import QemuFacts, QemuSettings
from vmmigrate.memory import LOW_RAM_LIMIT_BYTES, RamLayout

RAM_BLOCK: Final = "pc.ram"  # the name that the machine would give it, so that peers with an ordinary -m match
STAMP_OBJECT: Final = "vmmigrate"
RAM_FD, MONITOR_FD, FIRST_PIPE_FD = (
    10,
    11,
    12,
)  # what QEMU inherits: guest RAM, its monitor's listener, and pipes of keys
_RAM_PATH: Final = {"mem-path": f"/proc/self/fd/{RAM_FD}"}
PROGRAM_DEFAULT: Final = "idle"  # boot what the firmware finds
SANDBOX: Final = ("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
_COM_PORTS: Final = ("com1", "com2", "com3", "com4")
_OCCUPIED: Final = {(0, 0): "host bridge", (1, 0): "ISA bridge", (1, 1): "IDE controller", (1, 3): "power management"}
_LONGEST_INTERFACE: Final = 15
_PROGRAM_WORDS: Final = {"name", "kernel", "initrd", "append", "vitals_gpa"}
_LONGEST_APPEND: Final = 2000


def problems(plan: GuestPlan, settings: QemuSettings, facts: QemuFacts) -> list[str]:
    """What QEMU cannot realise of *plan*, and what this host's operator did not allow; everything at once."""
    return [
        *_board_problems(plan, settings, facts),
        *_address_problems(plan),
        *(text for disk in plan.disks for text in _disk_problems(disk, settings, facts)),
        *_nic_problems(plan.nics, settings),
        *_program_problems(plan.program, settings),
    ]


def _board_problems(plan: GuestPlan, settings: QemuSettings, facts: QemuFacts) -> Iterator[str]:
    board = plan.board
    if board.enable_pcie:
        yield "machine: QEMU's i440FX has no PCIe (enable_pcie), allowed is false"
    if board.hv_interface != "bhyve":
        yield f"machine: hypervisor interface {board.hv_interface} is not there, allowed is bhyve (QEMU shows its own)"
    for name, bus in board.bridges.items():
        yield f"{name}: QEMU's firmware numbers the buses behind bridges itself, bus {bus} cannot be promised"
    if plan.injector is not None:
        yield f"{plan.injector.name}: only the embedded machine has a migration failure injector"
    if plan.layout != RamLayout.for_size(plan.layout.size_bytes):
        yield "machine: RAM must lie below 3 GiB, and the rest from 4 GiB on"
    for fact, there in (("machine_type", facts.machine_types), ("cpu_model", facts.cpu_models)):
        if plan.like.get("hypervisor") == "qemu" and plan.like.get(fact) not in there:
            yield f"machine: {fact} {plan.like.get(fact)} is not among those of this QEMU: {', '.join(there)}"
    if board.cpuid is not None:
        yield from (f"machine: {text}" for text in cpu_model(board.cpuid, available=facts.features)[1])


def _address_problems(plan: GuestPlan) -> Iterator[str]:
    placed = [(device.name, device.pci_path) for device in _pci_devices(plan)]
    slots = {path[:2] for _, path in placed if path[2] == 0}
    for name, (bus, device, function) in placed:
        if bus:
            yield f"{name}: PCI bus {bus} lies behind a bridge, allowed is bus 0"
        elif owner := _OCCUPIED.get((device, function)):
            yield f"{name}: PCI address 0.{device}.{function} is that of the chipset's {owner}"
        elif (bus, device) not in slots and device != 1:
            yield f"{name}: PCI device 0.{device} needs a function 0, and {function} is its first"


def _pci_devices(plan: GuestPlan) -> list[DiskPlan | NicPlan]:
    return [*plan.disks, *plan.nics]


def _disk_problems(disk: DiskPlan, settings: QemuSettings, facts: QemuFacts) -> Iterator[str]:
    if not disk.serial.isascii():
        yield f"{disk.name}: QEMU takes serial numbers of ASCII alone, this one has other bytes"
    if disk.backend_kind != "crucible":
        return
    volume = disk.backend["volume_id"]
    if volume in settings.regions:
        return
    plain = disk.backend.get("plain")
    if plain is None:
        yield f"{disk.backend_name}: volume {volume} has regions, and no NBD address is configured for it on this host"
    elif "url" in plain:
        scheme = plain["url"].partition(":")[0]
        if scheme not in {"http", "https"} or scheme not in facts.drivers:
            yield f"{disk.backend_name}: this QEMU opens no {scheme} addresses"
        if not disk.readonly:
            yield f"{disk.backend_name}: a URL can only be read, allowed is readonly"


def _nic_problems(nics: Sequence[NicPlan], settings: QemuSettings) -> Iterator[str]:
    """QEMU saves the state of every network of its own under one name: a guest with two could not be moved."""
    if settings.network == "user":
        yield from (f"{nic.name}: QEMU's own network is for one NIC of a guest" for nic in nics[1:])
        return
    for nic in nics:
        if not 0 < len(nic.vnic_name.encode()) <= _LONGEST_INTERFACE:
            text = f"{nic.vnic_name!r} is no interface name, allowed are 1..{_LONGEST_INTERFACE} bytes"
            yield f"{nic.backend_name}: {text}"


def _program_problems(program: Mapping[str, Any], settings: QemuSettings) -> Iterator[str]:
    name = program.get("name", PROGRAM_DEFAULT)
    if name not in (PROGRAM_DEFAULT, "kernel"):
        yield f"program {name!r}: there is none of that name, allowed are {PROGRAM_DEFAULT} and kernel"
        return
    unknown = set(program) - (_PROGRAM_WORDS if name == "kernel" else {"name"})
    for word in sorted(unknown):
        yield f"program {name}: no such setting {word!r}"
    if name != "kernel":
        return
    for word in ("kernel", "initrd"):
        path = program.get(word)
        if word == "kernel" and path is None:
            yield "program kernel: the setting kernel, a path, is needed"
        elif path is not None and not _is_allowed(path, settings.kernels):
            yield f"program kernel: {word} {path!r} lies in no directory that is allowed for kernels on this host"
    append = program.get("append", "")
    if not isinstance(append, str) or len(append) > _LONGEST_APPEND or not append.isprintable():
        yield f"program kernel: append must be a text of at most {_LONGEST_APPEND} printable characters"
    vitals = program.get("vitals_gpa", 0)
    if type(vitals) is not int or not 0 <= vitals < LOW_RAM_LIMIT_BYTES or vitals % 4096:
        yield "program kernel: vitals_gpa must be the address of a page below 3 GiB"


def _is_allowed(path: object, roots: Sequence[Path]) -> bool:
    if not isinstance(path, str) or not path.startswith("/") or not path.isprintable():
        return False
    try:
        resolved = Path(path).resolve()
    except (OSError, RuntimeError):  # a ring of links
        return False
    return any(resolved.is_relative_to(root) for root in roots)


# --------------------------------------------------------------------------- arguments


def machine_type(plan: GuestPlan, settings: QemuSettings, facts: QemuFacts) -> str:
    """That of the guest at the source, else what the operator said, else the newest: always one with a version."""
    return _like(plan, "machine_type") or settings.machine_type or facts.machine_types[-1]


def base_cpu(plan: GuestPlan, settings: QemuSettings) -> str:
    """The model for `-cpu`, without properties."""
    if plan.board.cpuid is not None:
        return cpu_model(plan.board.cpuid)[0].model
    return _like(plan, "cpu_model") or settings.cpu_model


def _like(plan: GuestPlan, fact: str) -> str | None:
    """A fact of the guest at the source, if that is one of QEMU."""
    return plan.like.get(fact) if plan.like.get("hypervisor") == "qemu" else None


def arguments(
    plan: GuestPlan,
    settings: QemuSettings,
    facts: QemuFacts,
    files: QemuFiles,
    *,
    stamp: str,
    for_migration: bool,
) -> list[str]:
    """The whole command line of a guest's QEMU, which starts stopped.

    Args:
        stamp: First contents of the object that remembers who the guest is.
    """
    size_bytes = plan.layout.size_bytes
    return [
        settings.binary,
        *("-name", f"vmmigrate-{hashlib.sha256(plan.instance_id.encode()).hexdigest()[:12]},debug-threads=on"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-S"),
        *(SANDBOX if facts.has_sandbox else ()),
        *("-action", "reboot=reset,shutdown=pause,panic=none"),
        *("-accel", settings.accelerator),
        *("-machine", _machine(machine_type(plan, settings, facts))),
        *(
            "-cpu",
            _cpu(plan, settings),
            "-smp",
            f"{plan.cpus},sockets={plan.cpus},cores=1,threads=1",
            "-m",
            f"{size_bytes // 1024}K",
        ),
        *("-object", _json("memory-backend-file", RAM_BLOCK, size=size_bytes, share=True, **_RAM_PATH)),
        *("-object", _json("authz-simple", STAMP_OBJECT, identity=stamp)),
        *("-chardev", f"socket,id=monitor,fd={MONITOR_FD},server=on,wait=on"),
        *("-mon", "chardev=monitor,mode=control", "-pidfile", str(files.pid)),
        *_identity(plan),
        *_serial_ports(plan),
        *(() if not plan.board.pvpanic_isa else ("-device", "pvpanic")),
        *(word for number, disk in enumerate(plan.disks) for word in _disk(number, disk, plan, settings, files)),
        *(word for number, nic in enumerate(plan.nics) for word in _nic(number, nic, settings, plan)),
        *_kernel(plan.program),
        *(("-incoming", "defer") if for_migration else ()),
    ]


def _machine(kind: str) -> str:
    return f"{kind},memory-backend={RAM_BLOCK},max-ram-below-4g={LOW_RAM_LIMIT_BYTES}"


def _cpu(plan: GuestPlan, settings: QemuSettings) -> str:
    if plan.board.cpuid is not None:
        return cpu_model(plan.board.cpuid)[0].argument()
    return base_cpu(plan, settings)


def _json(kind: str, name: str, **fields: Any) -> str:
    return json.dumps({"qom-type": kind, "id": name, **fields})


def _identity(plan: GuestPlan) -> Iterator[str]:
    """SMBIOS type 1, and its UUID when the instance's id is one."""
    with contextlib.suppress(ValueError):
        yield from ("-uuid", str(uuid.UUID(plan.instance_id)))
    for table in smbios_tables(plan):
        yield from ("-smbios", table)


def smbios_tables(plan: GuestPlan) -> Iterator[str]:
    """What `-smbios` is given."""
    smbios = plan.board.smbios
    if smbios is not None:
        words = {"manufacturer": "manufacturer", "product_name": "product", "serial_number": "serial"}
        spelled = [f"{word}={_escaped(smbios[name])}" for name, word in words.items()]
        yield ",".join(["type=1", *spelled, f"version={_escaped(smbios['version'])}"])


def _serial_ports(plan: GuestPlan) -> Iterator[str]:
    """Each begins with nothing behind it; its files are put there before the guest runs (`QemuGuest`)."""
    for port in plan.serial_ports:
        yield from ("-chardev", f"null,id={port.num}")
        yield from ("-device", f"isa-serial,chardev={port.num},index={_COM_PORTS.index(port.num)},id=uart-{port.num}")


def _disk(number: int, disk: DiskPlan, plan: GuestPlan, settings: QemuSettings, files: QemuFiles) -> Iterator[str]:
    node = {"driver": "raw", "node-name": node_of(number), "read-only": disk.readonly}
    yield from ("-blockdev", json.dumps({**node, "file": _protocol(number, disk, settings, files)}))
    fields = {"drive": node_of(number), "id": f"dev{number}", **_place(disk, plan)}
    if disk.name in plan.board.boot_order:
        fields["bootindex"] = str(plan.board.boot_order.index(disk.name) + 1)
    driver = "virtio-blk-pci"
    if disk.model == "nvme":
        driver, fields["serial"] = "nvme", _escaped(disk.serial)
    yield from ("-device", ",".join([driver, *(f"{key}={value}" for key, value in fields.items())]))


def node_of(number: int) -> str:
    """What QEMU calls the image of a disk."""
    return f"disk{number}"


def _protocol(number: int, disk: DiskPlan, settings: QemuSettings, files: QemuFiles) -> dict[str, Any]:
    """The node that really opens something: a file is locked, so that no other QEMU may write to it."""
    access = {"read-only": disk.readonly}
    if disk.backend_kind == "blob":
        return {"driver": "file", "filename": str(files.blob(number)), "locking": "on", **access}
    if disk.backend_kind == "file":
        return {"driver": "file", "filename": disk.backend["path"], "locking": "on", **access}
    endpoint = settings.regions.get(disk.backend["volume_id"])
    if endpoint is not None:
        return {**nbd_node(endpoint), **access}
    plain = disk.backend["plain"]
    if "file" in plain:
        return {"driver": "file", "filename": plain["file"], "locking": "on", **access}
    return {"driver": plain["url"].partition(":")[0], "url": plain["url"], **access}


def location(disk: DiskPlan, settings: QemuSettings) -> str:
    """Where the image of a disk that is no blob lies: a path, or an address as QEMU spells it."""
    if disk.backend_kind == "file":
        return str(disk.backend["path"])
    endpoint = settings.regions.get(disk.backend["volume_id"])
    if endpoint is not None:
        return endpoint
    return str(disk.backend["plain"].get("file") or disk.backend["plain"]["url"])


def locked_files(plan: GuestPlan, settings: QemuSettings, files: QemuFiles) -> dict[int, Path]:
    """Disks, by number, that are files which the guest may write to: QEMU locks them."""
    nodes = {number: _protocol(number, disk, settings, files) for number, disk in enumerate(plan.disks)}
    return {
        number: Path(node["filename"])
        for number, node in nodes.items()
        if node["driver"] == "file" and not node["read-only"]
    }


def nbd_node(address: str) -> dict[str, Any]:
    """The block node of an NBD address: `nbd://HOST:PORT/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`.

    Raises: ValueError: neither of them.

    Source: NBD URI specification (NetworkBlockDevice/nbd, doc/uri.md).
    """
    from urllib.parse import parse_qs, unquote, urlsplit

    parts = urlsplit(address)
    export = unquote(parts.path.removeprefix("/"))
    if parts.scheme == "nbd+unix" and not parts.netloc:
        told = parse_qs(parts.query, keep_blank_values=True)
        sockets = told.get("socket", [])
        if set(told) == {"socket"} and len(sockets) == 1 and sockets[0].startswith("/") and not parts.fragment:
            return {"driver": "nbd", "server": {"type": "unix", "path": sockets[0]}, "export": export}
    is_plain = not (parts.query or parts.fragment or parts.username is not None or parts.port == 0)
    if parts.scheme == "nbd" and parts.hostname and is_plain:
        server = {"type": "inet", "host": parts.hostname, "port": str(parts.port or 10809)}
        return {"driver": "nbd", "server": server, "export": export}
    raise ValueError(
        f"{address!r} is no NBD address, needed is nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH"
    )


def _nic(number: int, nic: NicPlan, settings: QemuSettings, plan: GuestPlan) -> Iterator[str]:
    netdev = f"user,id=net{number}"
    if settings.network == "none":
        netdev = f"hubport,id=net{number},hubid={number}"
    if settings.network == "tap":
        netdev = f"tap,id=net{number},ifname={_escaped(nic.vnic_name)},script=no,downscript=no,vhost=off"
    yield from ("-netdev", netdev)
    # No option ROM: it would be a piece of this host's files in the guest, and nobody boots from the network here.
    fields = {"netdev": f"net{number}", "id": f"nic{number}", "mac": mac_of(nic), "romfile": "", **_place(nic, plan)}
    yield from ("-device", ",".join(["virtio-net-pci", *(f"{key}={value}" for key, value in fields.items())]))


def mac_of(nic: NicPlan) -> str:
    """A locally administered address that follows from the interface's id, and so is the same on every host."""
    digest = hashlib.sha256((nic.interface_id or nic.name).encode()).digest()
    return ":".join(f"{byte:02x}" for byte in (0x02, *digest[:5]))


def _place(device: DiskPlan | NicPlan, plan: GuestPlan) -> dict[str, str]:
    _, slot, function = device.pci_path
    functions = Counter(other.pci_path[1] for other in _pci_devices(plan))
    place = {"bus": "pci.0", "addr": f"{slot:x}.{function:x}"}
    if functions[slot] > 1:
        place["multifunction"] = "on"
    return place


def _kernel(program: Mapping[str, Any]) -> Iterator[str]:
    if program.get("name") == "kernel":
        for word in ("kernel", "initrd"):
            if program.get(word):
                yield from (
                    f"-{word}",
                    str(Path(program[word]).resolve()),
                )  # what was allowed, whatever a link says now
        if program.get("append"):
            yield from ("-append", program["append"])


def _escaped(text: str) -> str:
    """As a value among others that commas part."""
    return text.replace(",", ",,")
