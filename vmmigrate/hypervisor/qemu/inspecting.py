"""What a QEMU tells of itself: what it can do, and what machine it made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.base import GuestPlan
from vmmigrate.hypervisor.qemu import cpuid
from vmmigrate.hypervisor.qemu.settings import QemuFacts, read_facts, read_version, version_text

Ask = Callable[..., Awaitable[Any]]

_ABILITIES: Final[Mapping[str, dict[str, Any]]] = {
    "query-version": {},
    "query-machines": {},
    "query-cpu-definitions": {},
    "query-cpu-model-expansion": {"type": "full", "model": {"name": "max"}},
    "query-qmp-schema": {},
}
_LONGEST_FACT: Final = 1024
_FIRST_CPU: Final = "/machine/unattached/device[0]"


async def abilities(ask: Ask, *, has_sandbox: bool) -> QemuFacts:
    """Of a QEMU that was started with no machine, and with the accelerator that guests will have."""
    answers = {command: await ask(command, **arguments) for command, arguments in _ABILITIES.items()}
    return read_facts(answers, has_sandbox=has_sandbox)


async def version(ask: Ask) -> str:
    """Of the very QEMU that is asked: another one may be installed by now. Raises: HypervisorError `qemu_protocol`."""
    told = await ask("query-version")
    try:
        return version_text(read_version(told))
    except (KeyError, TypeError, ValueError) as exc:
        raise HypervisorError(f"QEMU's answers are none: {exc!r}", code="qemu_protocol") from exc


async def guest_facts(ask: Ask, plan: GuestPlan) -> dict[str, str]:
    """What `devices.opaque` calls the facts of a guest: machine, processor, RAM blocks and devices, as QEMU made them.
    Its QEMU may be older than the one that this host would start now.

    Raises: HypervisorError `cpu_differs`: the processor is not what the spec says; `qemu_protocol`.
    """
    try:
        version = read_version(await ask("query-version"))
        made = str(await ask("qom-get", path="/machine", property="type"))
        cpu = str(await ask("qom-get", path=_FIRST_CPU, property="type"))
        words = await ask("qom-get", path=_FIRST_CPU, property="feature-words")
        wrong = [] if plan.board.cpuid is None else cpuid.check_words(plan.board.cpuid, words)
        features = _digest(features_of(words))
        blocks, devices = await ram_blocks(ask), await _devices(ask)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as exc:
        raise HypervisorError(f"QEMU's answers are none: {exc!r}", code="qemu_protocol") from exc
    if wrong:
        raise HypervisorError("QEMU made another processor: " + "; ".join(wrong), code="cpu_differs")
    return {
        "hypervisor": "qemu",
        "hypervisor_version": version_text(version),
        "machine_type": made.removesuffix("-machine"),
        "cpu_model": cpu.removesuffix("-x86_64-cpu"),
        "cpu_features": features,
        "ram_blocks": _short(" ".join(blocks)),
        "device_tree": _digest([*devices, f"cpus {plan.cpus}"]),
    }


async def ram_blocks(ask: Ask) -> list[str]:
    """Names and largest sizes; the tables of the firmware are smaller at times."""
    text = await ask("human-monitor-command", command_line="info ramblock")
    head, *rows = [line.split() for line in text.splitlines() if line.strip()]
    # Later ones have more columns behind it. "Block Name" is one word in a row, and "4 KiB", below "PSize", are two.
    total = head.index("Total")
    return sorted(f"{row[0]}:{int(row[total], 16)}" for row in rows)


def features_of(words: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those that are there: later QEMUs tell of more registers, in which an older machine has nothing."""
    return sorted(json.dumps(word, sort_keys=True) for word in words if word["features"])


async def _devices(ask: Ask) -> list[str]:
    """Devices that were asked for with their types, and PCI functions with their places. The rest of the board follows
    from the machine type; how QEMU composes it is QEMU's own affair, and changes from version to version."""
    found = []
    for place in ("/machine/peripheral", "/machine/peripheral-anon"):
        for entry in await ask("qom-list", path=place):
            kind = entry["type"]
            if kind.startswith("child<"):
                named = entry["name"] if place == "/machine/peripheral" else "-"
                found.append(f"{named} {kind}")
    for bus in await ask("query-pci"):
        for device in bus["devices"]:
            identity = device["id"]
            place = f"{device['bus']}:{device['slot']}.{device['function']}"
            found.append(
                f"pci {place} {identity['vendor']:04x}:{identity['device']:04x} {device['class_info']['class']}"
            )
    return sorted(found)


def kernel_digest(plan: GuestPlan) -> str:
    """Of the files that the guest boots from without a disk: a reboot at the destination reads them again. Blocking.

    Raises: HypervisorError `program_missing`.
    """
    digest = hashlib.sha256(str(plan.program.get("append", "")).encode())
    for word in ("kernel", "initrd"):
        path = plan.program.get(word)
        if path is not None:
            try:
                digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
            except OSError as exc:
                raise HypervisorError(f"{word} {path}: {exc.strerror}", code="program_missing") from exc
    return digest.hexdigest()


def _short(text: str) -> str:
    """As it is, or a digest of what the wire would not carry."""
    return text if len(text) <= _LONGEST_FACT else _digest([text])


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]
