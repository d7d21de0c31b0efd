"""Making a QEMU that something else started ours, and giving it back. It was looked at before (`survey`, `anatomy`).

First it gets the object that remembers whose guest it is (`stamp`): a second daemon is refused it. What a QEMU of ours
is told on its command line, this one is told over its monitor, at the end consoles: what was behind them cannot be put
there again. Until that object knows of a record in a journal, whoever finds it gives it back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from vmmigrate.errors import HypervisorError, SpecCreatableError
from vmmigrate.hypervisor.base import GuestPlan, GuestStamp
from vmmigrate.hypervisor.qemu import images, launch, saving, witness
from vmmigrate.hypervisor.qemu.files import QemuFiles
from vmmigrate.hypervisor.qemu.foreign import Foreign
from vmmigrate.hypervisor.qemu.machine import STAMP_OBJECT
from vmmigrate.hypervisor.qemu.qmp import QmpError
from vmmigrate.hypervisor.qemu.remembered import from_text

Ask = Callable[..., Awaitable[Any]]

_ACTIONS: Final = {"reboot": "reset", "shutdown": "pause", "panic": "none"}
_DEFAULT_ACTIONS: Final = {"reboot": "reset", "shutdown": "poweroff", "panic": "shutdown"}
_PARAMETERS: Final = ("tls-creds", "tls-hostname", "max-bandwidth", "downtime-limit")


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


async def stamp(ask: Ask, text: str) -> None:
    """Raises: SpecCreatableError `not_that_machine`: somebody has it already."""
    try:
        await ask("object-add", qom_type="authz-simple", id=STAMP_OBJECT, identity=text)
    except QmpError as exc:
        raise SpecCreatableError(f"a host daemon has this QEMU already: {exc.text}", code="not_that_machine") from exc


async def settings_of(ask: Ask) -> dict[str, Any]:
    """What `take` changes and `give_back` puts back. QEMU does not tell its actions, which are put back to its own
    defaults."""
    capabilities = await ask("query-migrate-capabilities")
    parameters = await ask("query-migrate-parameters")
    return {
        "capabilities": [entry["capability"] for entry in capabilities if entry["state"]],
        "parameters": {name: parameters[name] for name in _PARAMETERS if name in parameters},
    }


async def take(ask: Ask, plan: GuestPlan, files: QemuFiles, before: Mapping[str, Any]) -> None:
    """All but the stamp and the consoles. Raises: QmpError: some of it may be done (`give_back`)."""
    await ask("set-action", **_ACTIONS)
    await _choose(ask, before["capabilities"], False)  # somebody's preferences, such as several channels
    await ask("migrate-set-parameters", tls_creds="", tls_hostname="")
    await saving.prepare(ask)
    try:
        await images.prepare(ask, files)
    except QmpError as exc:
        if "already" not in exc.text:  # any server will do
            raise
    for port in plan.serial_ports:
        # QEMU itself keeps the pipe from ending when nobody writes to it.
        held = {"type": "pipe", "data": {"device": str(files.held_keys(port.num))}}
        await ask("chardev-add", id=_holder(port.num), backend=held)


async def give_back(ask: Ask, own: Foreign, files: QemuFiles) -> bool:
    """Undo `take`, if this QEMU was ours. What was behind its serial ports is not there any more: nothing is, then.

    Returns: Whether nothing of ours is left in it. False: it does not answer.
    """
    try:
        stamp = from_text(await ask("qom-get", path=f"/objects/{STAMP_OBJECT}", property="identity")).stamp
    except QmpError:  # it was never stamped
        return True
    except HypervisorError as exc:
        return exc.code in {"guest_lost", "qemu_protocol"}
    if not own.is_owned_by(stamp):
        return True
    try:
        for command, arguments in _undoing(own, files):
            with contextlib.suppress(QmpError):  # it was not done
                await ask(command, **arguments)
        if own.before:
            await _choose(ask, saving.CAPABILITIES, False)
            await _choose(ask, own.before["capabilities"], True)
        await ask("object-del", id=STAMP_OBJECT)
    except HypervisorError as exc:
        return exc.code == "guest_lost"
    return True


def _undoing(own: Foreign, files: QemuFiles) -> Iterator[tuple[str, dict[str, Any]]]:
    if own.has_consoles:
        nothing = {"type": "null", "data": {}}
        yield from (("chardev-change", {"id": device, "backend": nothing}) for device in own.ports.values())
    yield from (("chardev-remove", {"id": _holder(port)}) for port in own.ports)
    if files.exports.exists():
        yield "nbd-server-stop", {}
    if own.before:
        yield "migrate-set-parameters", {**own.before["parameters"]}
        yield "set-action", _DEFAULT_ACTIONS


async def _choose(ask: Ask, names: Sequence[str], state: bool) -> None:
    if names:
        await ask("migrate-set-capabilities", capabilities=[{"capability": name, "state": state} for name in names])


def _holder(port: str) -> str:
    return f"{STAMP_OBJECT}-{port}"
