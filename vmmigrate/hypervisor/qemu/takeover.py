"""Making a QEMU that something else started ours, and giving it back. It was looked at before (`survey`, `anatomy`).

What a QEMU of ours is told on its command line, this one is told over its monitor. Consoles come last: what was behind
them cannot be put there again. Until the object that remembers whose guest it is knows of a record in a journal,
whoever finds it gives it back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.base import GuestPlan, GuestStamp
from vmmigrate.hypervisor.qemu import images, launch, saving, witness
from vmmigrate.hypervisor.qemu.files import QemuFiles
from vmmigrate.hypervisor.qemu.machine import STAMP_OBJECT
from vmmigrate.hypervisor.qemu.qmp import QmpError
from vmmigrate.hypervisor.qemu.remembered import Remembered

Ask = Callable[..., Awaitable[Any]]

_ACTIONS: Final = {"reboot": "reset", "shutdown": "pause", "panic": "none"}


def link_monitor(files: QemuFiles, monitor: Path) -> None:
    """Make the directory of a QEMU whose monitor is elsewhere. Blocking. Raises: HypervisorError `guest_files`."""
    try:
        files.directory.mkdir(mode=0o700)
        files.monitor.symlink_to(monitor.resolve())
    except OSError as exc:
        raise HypervisorError(f"{files.directory}: {exc.strerror}", code="guest_files") from exc


def make_files(plan: GuestPlan, files: QemuFiles, stamp: GuestStamp) -> None:
    """What the directory of a QEMU of ours has had since it was launched. Blocking."""
    launch.make_files(plan, files)
    for port in plan.serial_ports:
        os.mkfifo(f"{files.held_keys(port.num)}.out", 0o600)  # nothing is ever written to it
    files.log.touch(mode=0o600)
    witness.note_guest(files, stamp.instance_id, stamp.host_id)


async def take(ask: Ask, plan: GuestPlan, files: QemuFiles, memory: Remembered) -> None:
    """All but the consoles. Raises: QmpError: some of it may be done (`give_back`)."""
    await ask("object-add", qom_type="authz-simple", id=STAMP_OBJECT, identity=memory.to_text())
    await ask("set-action", **_ACTIONS)
    wanted = await ask("query-migrate-capabilities")
    on = [entry["capability"] for entry in wanted if entry["state"]]
    if on:  # somebody's preferences, such as several channels
        off = [{"capability": name, "state": False} for name in on]
        await ask("migrate-set-capabilities", capabilities=off)
    await ask("migrate-set-parameters", tls_creds="", tls_hostname="")
    await saving.prepare(ask)
    with contextlib.suppress(QmpError):  # there is one: any will do
        await images.prepare(ask, files)
    for port in plan.serial_ports:
        # QEMU itself keeps the pipe from ending when nobody writes to it.
        held = {"type": "pipe", "data": {"device": str(files.held_keys(port.num))}}
        await ask("chardev-add", id=_holder(port.num), backend=held)


async def give_back(ask: Ask, ports: Sequence[str]) -> None:
    """Let go of what `take` put there; what is not there, or not heard, does not matter."""
    for command, arguments in (
        *(("chardev-remove", {"id": _holder(port)}) for port in ports),
        ("object-del", {"id": STAMP_OBJECT}),
    ):
        with contextlib.suppress(HypervisorError):
            await ask(command, **arguments)


def _holder(port: str) -> str:
    return f"{STAMP_OBJECT}-{port}"
