"""Looking at a QEMU that something else started: whether it is the machine of a spec, and where its parts are.

Nothing is changed here. All that is wrong is told at once.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import re
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import trio

from vmmigrate.errors import HypervisorError, SpecCreatableError
from vmmigrate.hypervisor import kernel
from vmmigrate.hypervisor.base import DiskPlan, GuestPlan
from vmmigrate.hypervisor.qemu import images, machine
from vmmigrate.hypervisor.qemu.anatomy import pci_place
from vmmigrate.hypervisor.qemu.files import QemuFiles
from vmmigrate.hypervisor.qemu.qmp import QmpError
from vmmigrate.hypervisor.qemu.settings import QemuSettings
from vmmigrate.memory import PAGE_SIZE

Ask = Callable[..., Awaitable[Any]]
T = TypeVar("T")

READY_STATES: Final = frozenset({"running", "paused"})
_IDLE: Final = frozenset({None, "none", "completed", "failed", "cancelled"})
_PORTS: Final = {0x3F8: "com1", 0x2F8: "com2", 0x3E8: "com3", 0x2E8: "com4"}
_HOST_ADDRESS: Final = re.compile(r"\((?P<block>[^)]*)\) is (?P<address>0x[0-9a-f]+)")
_MAPPING: Final = re.compile(
    r"^(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<rights>\S+) (?P<offset>[0-9a-f]+) (?P<device>\S+) (?P<inode>\d+)"
)
_NETDEV: Final = re.compile(r"^\s*\\\s(?P<name>[^:]+):.*\btype=(?P<kind>\w+)(?:.*\bifname=(?P<interface>[^,\s]+))?")


@dataclass
class Survey:
    """What was found.

    Attributes:
        wrong: What keeps it from being adopted, a line each.
        pid: 0 while it is not known.
        ram_fd: Its descriptor of guest RAM; None when RAM is its own.
        nodes: By disk of the plan; ports: by serial port of the plan.
    """

    wrong: list[str] = field(default_factory=list)
    pid: int = 0
    ram_address: int = 0
    ram_fd: int | None = None
    nodes: list[str] = field(default_factory=list)
    ports: dict[str, str] = field(default_factory=dict)


async def check_allowed(monitor: Path, allowed: Sequence[Path]) -> None:
    """Raises: SpecCreatableError `host_refuses`: it lies in no directory that is *allowed*."""
    resolved = await _in_thread(monitor.resolve)
    if not monitor.is_absolute() or not any(resolved.is_relative_to(root) for root in allowed):
        roots = ", ".join(map(str, allowed)) or "none, see allow.monitors"
        text = f"this host refuses: monitor {monitor} lies in no directory that is allowed for monitors: {roots}"
        raise SpecCreatableError(text, code="host_refuses")


def busy(monitor: Path) -> HypervisorError:
    """Nobody answers there."""
    text = f"monitor {monitor}: no answer; somebody else may be connected to it, and QEMU hears one at a time"
    return HypervisorError(text, code="monitor_busy")


def bare(plan: GuestPlan) -> GuestPlan:
    """The same machine with nothing behind its disks, to be looked at."""
    disks = [replace(disk, backend_kind="blob", backend={"contents": bytes(512)}) for disk in plan.disks]
    return replace(plan, disks=disks)


async def survey(ask: Ask, plan: GuestPlan, settings: QemuSettings, pid: int) -> Survey:
    """Look at everything but the machine itself (`anatomy`).

    Raises: HypervisorError `qemu_protocol`, or what *ask* raises.
    """
    found = Survey(pid=pid)
    found.wrong += await _in_thread(list, _process_problems(pid))
    try:
        await _look_at_state(ask, found)
        await _look_at_identity(ask, plan, found)
        await _look_at_ram(ask, plan, found)
        await _look_at_ports(ask, plan, found)
        await _look_at_disks(ask, plan, settings, found)
        await _look_at_nics(ask, plan, settings, found)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as exc:
        raise HypervisorError(f"QEMU's answers are none: {exc!r}", code="qemu_protocol") from exc
    return found


async def _look_at_state(ask: Ask, found: Survey) -> None:
    state = (await ask("query-status"))["status"]
    if state not in READY_STATES:
        found.wrong.append(f"its run state is {state}, allowed is running or paused")
    migration = (await ask("query-migrate")).get("status")
    if migration not in _IDLE:
        found.wrong.append(f"a migration of its own is {migration}")
    if jobs := await ask("query-block-jobs"):
        found.wrong.append(f"{len(jobs)} block jobs are under way")


async def _look_at_identity(ask: Ask, plan: GuestPlan, found: Survey) -> None:
    there = uuid.UUID((await ask("query-uuid"))["UUID"])
    try:
        wanted = uuid.UUID(plan.instance_id)
    except ValueError:
        wanted = uuid.UUID(int=0)
    if there != wanted:
        found.wrong.append(f"its UUID is {there}, that of instance {plan.instance_id} is {wanted}")
    found.wrong += await _in_thread(list, _smbios_problems(found.pid, list(machine.smbios_tables(plan))))


def _smbios_problems(pid: int, wanted: list[str]) -> Iterator[str]:
    """QEMU does not tell what it was given; its command line does. Takes some µs."""
    try:
        words = os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")
    except OSError as exc:
        yield f"process {pid} cannot be looked at: {exc.strerror}"
        return
    given = [value for word, value in itertools.pairwise(words) if word.lstrip("-") == "smbios"]
    if given != wanted:
        yield f"it was started with {_smbios_said(given)}, the spec's machine with {_smbios_said(wanted)}"


def _smbios_said(tables: list[str]) -> str:
    return " and ".join(f"-smbios {table}" for table in tables) or "no SMBIOS table"


async def _look_at_ram(ask: Ask, plan: GuestPlan, found: Survey) -> None:
    told = await ask("human-monitor-command", command_line="gpa2hva 0")
    place = _HOST_ADDRESS.search(told)
    if place is None:
        found.wrong.append(f"where guest RAM lies is not known: {told.strip()}")
        return
    if place["block"] != machine.RAM_BLOCK:
        found.wrong.append(f"guest RAM is the memory backend {place['block']!r}, allowed is {machine.RAM_BLOCK!r}")
    found.ram_address = int(place["address"], 16)
    found.wrong += await _in_thread(list, _map_problems(found, plan.layout.size_bytes))


def _map_problems(found: Survey, size_bytes: int) -> Iterator[str]:
    """Find the mapping of guest RAM in the process; that there is one proves that it is the right process. Takes some
    hundred µs."""
    try:
        text = Path(f"/proc/{found.pid}/maps").read_text(encoding="utf-8", errors="replace")
        rights, device, inode, offset = _mapping_at(text, found.ram_address, size_bytes)
        if rights[3] != "s":
            _read_a_page(found.pid, found.ram_address)
            return
        found.ram_fd = _descriptor_of(found.pid, device, inode)
    except OSError as exc:
        yield f"process {found.pid} cannot be looked at: {exc.strerror or exc}{_hint(exc)}"
        return
    except LookupError:
        yield (
            f"process {found.pid}, which made the monitor's socket, has no guest RAM of {size_bytes} bytes at"
            f" {found.ram_address:#x}; name QEMU's own with --pid"
        )
        return
    if found.ram_fd is None or offset:
        yield f"guest RAM of process {found.pid} is a part of a file, or of one that is open no more"


def _hint(exc: OSError) -> str:
    return "; is kernel.yama.ptrace_scope 0?" if exc.errno == errno.EPERM else ""


def _process_problems(pid: int) -> Iterator[str]:
    """Files of ours, such as consoles, are for QEMU to open: by the same user, in the same file systems."""
    try:
        uid, place = os.stat(f"/proc/{pid}").st_uid, os.stat(f"/proc/{pid}/ns/mnt")
    except OSError as exc:
        yield f"process {pid} cannot be looked at: {exc.strerror}"
        return
    if uid != os.geteuid():
        yield f"process {pid} is of user {uid}, and this daemon of user {os.geteuid()}"
    if not os.path.samestat(place, os.stat("/proc/self/ns/mnt")):
        yield f"process {pid} sees other file systems than this daemon (a container)"


async def _in_thread(call: Callable[..., T], *arguments: Any) -> T:
    """Files that others name may be on a file system that does not answer: nobody waits for it then."""
    return await trio.to_thread.run_sync(call, *arguments, abandon_on_cancel=True)


def _read_a_page(pid: int, address: int) -> None:
    """Whether it can be done. Raises: OSError: EPERM, as a rule."""
    buffer = ctypes.create_string_buffer(PAGE_SIZE)
    kernel.read_process(pid, address, ctypes.addressof(buffer), np.asarray([(0, 1)], dtype=np.int64))


def _mapping_at(text: str, address: int, size_bytes: int) -> tuple[str, str, int, int]:
    """Raises: LookupError: there is none, or it ends before."""
    for line in text.splitlines():
        mapping = _MAPPING.match(line)
        if mapping and int(mapping["start"], 16) <= address and address + size_bytes <= int(mapping["end"], 16):
            offset = int(mapping["offset"], 16) + address - int(mapping["start"], 16)
            return mapping["rights"], mapping["device"], int(mapping["inode"]), offset
    raise LookupError


def _descriptor_of(pid: int, device: str, inode: int) -> int | None:
    with os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            try:
                status = os.stat(entry.path)
            except OSError:
                continue
            if status.st_ino == inode and f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}" == device:
                return int(entry.name)
    return None


# --------------------------------------------------------------------------- what lies behind devices


async def _paths(ask: Ask, kind: str) -> list[str]:
    found = []
    for place in ("/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached"):
        for entry in await ask("qom-list", path=place):
            if entry["type"] == f"child<{kind}>":
                found.append(f"{place}/{entry['name']}")
    return found


async def _look_at_ports(ask: Ask, plan: GuestPlan, found: Survey) -> None:
    """That they are those of the spec is for the anatomy to say."""
    devices = {entry["label"]: entry["filename"] for entry in await ask("query-chardev")}
    behind = {}
    for path in await _paths(ask, "isa-serial"):
        number = _PORTS.get(await ask("qom-get", path=path, property="iobase"))
        if number is not None:
            behind[number] = await ask("qom-get", path=path, property="chardev")
    for port in plan.serial_ports:
        device = behind.get(port.num)
        if device is None:
            continue
        if devices.get(device, "mux") == "mux":
            found.wrong.append(f"{port.name}: {port.num} shares its character device with a monitor")
        found.ports[port.num] = device


async def _look_at_disks(ask: Ask, plan: GuestPlan, settings: QemuSettings, found: Survey) -> None:
    images_by_place = {}
    for drive in await ask("query-block"):
        device = str(drive.get("qdev", "")).removesuffix("/virtio-backend")
        if "inserted" not in drive:
            continue
        try:
            images_by_place[pci_place(await ask("qom-get", path=device, property="addr"))] = drive["inserted"]
        except QmpError:
            found.wrong.append(f"image {drive['inserted'].get('file')}: behind no PCI device")
    found.wrong += _nodes_too_many(await ask("query-named-block-nodes"), images_by_place.values())
    for disk in plan.disks:
        place = "{}.{}.{}".format(*disk.pci_path)
        image = images_by_place.get(place)
        if image is None:
            found.wrong.append(f"{disk.name}: there is no image at {place}")
            found.nodes.append("")
            continue
        found.nodes.append(image["node-name"])
        found.wrong += [f"{disk.name}: {text}" for text in await _in_thread(_image_problems, disk, image, settings)]
    held = machine.locked_files(plan, settings, QemuFiles(Path()))
    if held and not found.wrong:  # or it would be told in better words already
        try:
            numbers = await _in_thread(images.not_held, held, found.pid)
        except OSError as exc:
            found.wrong.append(f"process {found.pid} cannot be looked at: {exc.strerror}")
            return
        found.wrong += [f"{plan.disks[number].name}: QEMU holds no lock of {held[number]}" for number in numbers]


def _nodes_too_many(nodes: Sequence[Mapping[str, Any]], used: Collection[Mapping[str, Any]]) -> Iterator[str]:
    """Block nodes that are no disk's, nor what a disk's node reads and writes. QEMU makes all of them inactive with the
    images of disks, and ends when one is so already."""
    tops, files = {image["node-name"] for image in used}, [image["file"] for image in used]
    for node in nodes:
        if node["node-name"] in tops:
            continue
        if node.get("file") in files:
            files.remove(node["file"])  # one below each
        else:
            yield f"block node {node['node-name']} ({node.get('file')}) is no disk's"


def _image_problems(disk: DiskPlan, image: Mapping[str, Any], settings: QemuSettings) -> list[str]:
    return list(_differences_of(disk, image, settings))


def _differences_of(disk: DiskPlan, image: Mapping[str, Any], settings: QemuSettings) -> Iterator[str]:
    if disk.backend_kind == "blob":
        yield "its backend is a blob, which only a guest that was created here can have"
        return
    wanted = machine.location(disk, settings)
    if image["drv"] != "raw":
        yield f"format {image['drv']}, allowed is raw"
    if bool(image["ro"]) != disk.readonly:
        yield "it is read-only" if image["ro"] else "it can be written to, in the spec it is read-only"
    there = str(image["file"])
    if not (there == wanted or (wanted.startswith("/") and _is_same(there, wanted))):
        yield f"its image is {there}, that of the spec {wanted}"


def _is_same(path: str, other: str) -> bool:
    try:
        return Path(path).samefile(other)
    except OSError:
        return False


async def _look_at_nics(ask: Ask, plan: GuestPlan, settings: QemuSettings, found: Survey) -> None:
    told = (await ask("human-monitor-command", command_line="info network")).splitlines()
    behind = {line["name"].strip(): line for line in map(_NETDEV.match, told) if line}
    by_place: dict[str, Any] = {}
    for path in await _paths(ask, "virtio-net-pci"):
        place = pci_place(await ask("qom-get", path=path, property="addr"))
        by_place[place] = behind.get(await ask("qom-get", path=path, property="netdev"))
    for nic in plan.nics:
        netdev = by_place.get("{}.{}.{}".format(*nic.pci_path))
        kind = "nothing" if netdev is None else netdev["kind"]
        if kind != settings.network:
            found.wrong.append(f"{nic.name}: behind it is {kind}, on this host it has to be {settings.network}")
        elif netdev is not None and kind == "tap" and netdev["interface"] != nic.vnic_name:
            there = netdev["interface"] or "not told (a descriptor that QEMU was given)"
            found.wrong.append(f"{nic.name}: its interface is {there}, that of the spec {nic.vnic_name}")


def refuse(monitor: Path, wrong: Sequence[str]) -> None:
    """Raises: SpecCreatableError `not_that_machine`, with every line in `details["problems"]`."""
    if wrong:
        text = f"the QEMU at {monitor} cannot be adopted: {'; '.join(wrong)}"
        raise SpecCreatableError(text, code="not_that_machine", details={"problems": list(wrong)})
