"""What a machine of QEMU is made of, as far as its guest can see it, in words that two machines can be compared by.

Each key names a part, and stands in messages; each value what that part is. How the person who started QEMU called its
devices, and what lies behind them on this host, is not of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.qemu import inspecting
from vmmigrate.hypervisor.qemu.qmp import QmpError
from vmmigrate.memory import LOW_RAM_LIMIT_BYTES

Ask = Callable[..., Awaitable[Any]]
Anatomy = Mapping[str, str]

_MACHINE: Final = "/machine"
_UNATTACHED: Final = "/machine/unattached"
_FIRST_CPU: Final = f"{_UNATTACHED}/device[0]"
_PLACES: Final = ("/machine/peripheral", "/machine/peripheral-anon", _UNATTACHED)
_NO_DEVICES: Final = frozenset({"child<memory-region>", "child<irq>", "child<container>"})
_SCALARS: Final = frozenset({"bool", "int", "str", "string", "size", "OnOffAuto"})
# Of the machine, what its guest can see.
_BOARD: Final = frozenset(
    {
        *("acpi", "smm", "hpet", "pit", "pic", "i8042", "vmport", "sata", "smbus", "usb", "nvdimm", "firmware"),
        *("kernel", "initrd", "append", "dtb", "smbios-entry-point-type", "x-oem-id", "x-oem-table-id"),
    }
)
# What lies behind a device, how it is called, and what QEMU says of a disk image's size in its own terms.
_NOT_SEEN: Final = frozenset(
    {
        *("type", "id", "drive", "netdev", "chardev", "iothread", "hotplugged", "realized", "parent_bus"),
        *("cyls", "heads", "secs", "bios-chs-trans", "share-rw", "rerror", "werror", "discard_granularity"),
        *("addr", "host_mtu", "apic-id", "legacy-instance-id", "wakeup-supported", "hotpluggable", "opt_io_size"),
        *("x-pcie-lnksta-dllla", "tx", "x-txtimer", "x-txburst", "rombar"),
        "smb_io_base",  # where firmware put it
    }
)


async def anatomy(ask: Ask, *, with_board: bool = True) -> Anatomy:
    """Of the machine of a QEMU. Its guest may run; QEMU is asked some hundred questions, each of well below a
    millisecond.

    Args:
        with_board: Also what follows from the machine type: how QEMU composes it is alike only in one version of QEMU.

    Raises: HypervisorError `qemu_protocol`, or what *ask* raises.
    """
    try:
        parts = {
            "machine type": str(await ask("qom-get", path=_MACHINE, property="type")).removesuffix("-machine"),
            "processor": str(await ask("qom-get", path=_FIRST_CPU, property="type")).removesuffix("-x86_64-cpu"),
            "features of the processor": await _features(ask),
            "processors": await _topology(ask),
            **await _memory(ask),
            **{f"machine, {name}": value async for name, value in _properties(ask, _MACHINE, _BOARD)},
        }
        counts: Counter[str] = Counter()
        async for device, path in _devices(ask, with_board):
            kind = device.removeprefix("child<").removesuffix(">")
            properties = {name: value async for name, value in _properties(ask, path, await _settings(ask, kind))}
            name = f"{kind}{await _placed(ask, path)}"
            counts[name] += 1
            named = name if counts[name] == 1 else f"{name} ({counts[name]})"
            parts[named] = "there"
            parts |= {f"{named}, {key}": value for key, value in properties.items()}
        return parts | await _pci(ask)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as exc:
        raise HypervisorError(f"QEMU's answers are none: {exc!r}", code="qemu_protocol") from exc


def differences(there: Anatomy, wanted: Anatomy, *, same_version: bool = True) -> list[str]:
    """What *there* is not as *wanted*, a line each. Parts that are missing, or too many, are told without what they
    are made of.

    Args:
        same_version: Of QEMU. Otherwise what only one of them lets be chosen is as the machine type has it, in both.
    """
    told = []
    for key in sorted(there.keys() | wanted.keys()):
        is_there, should_be, part = there.get(key), wanted.get(key), key.partition(", ")[0]
        is_of_one = part != key and (is_there is None or should_be is None)
        if is_there == should_be or (is_of_one and (not same_version or (part in there) != (part in wanted))):
            continue
        if is_there is None:
            told.append(f"{key}: missing" + ("" if should_be == "there" else f", the spec's machine has {should_be}"))
        elif should_be is None:
            told.append(f"{key}: there is none in the machine of the spec")
        else:
            told.append(f"{key}: {is_there}, in the machine of the spec {should_be}")
    return told


async def _features(ask: Ask) -> str:
    lines = inspecting.features_of(await ask("qom-get", path=_FIRST_CPU, property="feature-words"))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


async def _topology(ask: Ask) -> str:
    smp = await ask("qom-get", path=_MACHINE, property="smp")
    said = [f"{smp[name]} {name}" for name in ("cpus", "maxcpus")]
    return ", ".join(said + [f"{smp.get(name, 1)} {name}" for name in ("sockets", "dies", "cores", "threads")])


async def _memory(ask: Ask) -> dict[str, str]:
    """Blocks with their largest sizes (the tables of the firmware are smaller at times), and where RAM is split."""
    listed = [block.rpartition(":") for block in await inspecting.ram_blocks(ask)]
    blocks = {f"memory block {name}": f"{size} bytes" for name, _, size in listed}
    size = (await ask("query-memory-size-summary"))["base-memory"]
    limit = await ask("qom-get", path=_MACHINE, property="max-ram-below-4g")
    low = min(size, limit) if size > LOW_RAM_LIMIT_BYTES else size
    return {**blocks, "memory": f"{size} bytes", "memory below 4 GiB": f"{low} bytes"}


async def _devices(ask: Ask, with_board: bool) -> AsyncIterator[tuple[str, str]]:
    """Without the board, only what was asked for; a serial port may have been by `-serial`."""
    found = []
    for place in _PLACES:
        for entry in await ask("qom-list", path=place):
            kind = entry["type"]
            is_asked_for = with_board or place != _UNATTACHED or kind == "child<isa-serial>"
            if is_asked_for and kind.startswith("child<") and kind not in _NO_DEVICES and not kind.endswith("-cpu>"):
                found.append((kind, f"{place}/{entry['name']}"))
    for kind, path in sorted(found, key=lambda pair: (pair[0], len(pair[1]), pair[1])):
        yield kind, path


async def _placed(ask: Ask, path: str) -> str:
    """Where the guest finds a device: its PCI address, or its port."""
    with contextlib.suppress(QmpError):
        return f" at {pci_place(await ask('qom-get', path=path, property='addr'))}"
    with contextlib.suppress(QmpError):
        return f" at port {await ask('qom-get', path=path, property='iobase'):#x}"
    return ""


def pci_place(addr: int) -> str:
    """0.4.1, of QEMU's number for device 4 and function 1."""
    return f"0.{addr >> 3}.{addr & 7}"


async def _settings(ask: Ask, kind: str) -> frozenset[str]:
    """What can be chosen of a device when it is made. Others are what its guest made of it since."""
    try:
        listed = await ask("device-list-properties", typename=kind)
    except QmpError:  # nothing that QEMU calls a device
        return frozenset()
    return frozenset(entry["name"] for entry in listed) - _NOT_SEEN


async def _properties(ask: Ask, path: str, chosen: frozenset[str]) -> AsyncIterator[tuple[str, str]]:
    for entry in await ask("qom-list", path=path):
        name, kind = entry["name"], entry["type"]
        if name in chosen and (kind in _SCALARS or kind.startswith(("uint", "int"))):
            try:
                yield name, json.dumps(await ask("qom-get", path=path, property=name))
            except QmpError:
                continue  # some are only to be set


async def _pci(ask: Ask) -> dict[str, str]:
    found = {}
    for bus in await ask("query-pci"):
        for device in bus["devices"]:
            identity = device["id"]
            place = f"PCI function {device['bus']}.{device['slot']}.{device['function']}"
            found[place] = f"{identity['vendor']:04x}:{identity['device']:04x} {device['class_info'].get('desc', '')}"
    return found
