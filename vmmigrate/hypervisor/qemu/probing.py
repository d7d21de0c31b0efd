"""Asking the QEMU of this host what it can do, and finding the QEMU of a directory."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog
import trio

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor import kernel, processes
from vmmigrate.hypervisor.base import GuestProcess
from vmmigrate.hypervisor.qemu import foreign, inspecting, launch, machine
from vmmigrate.hypervisor.qemu.files import QemuFiles
from vmmigrate.hypervisor.qemu.qmp import Qmp
from vmmigrate.hypervisor.qemu.settings import QemuFacts, QemuSettings

log = structlog.get_logger(__name__)

_PROBE: Final = "probe-"


async def ask_facts(runtime_dir: Path, settings: QemuSettings, deadline_s: float) -> QemuFacts:
    """Start a QEMU without a machine, and ask it. Its sandbox is left out where it was built without one."""
    try:
        return await _probe(runtime_dir, settings, deadline_s, has_sandbox=True)
    except HypervisorError as exc:
        if "sandbox" not in exc.text and "seccomp" not in exc.text:
            raise
    log.warning("qemu.no_sandbox", binary=settings.binary)
    return await _probe(runtime_dir, settings, deadline_s, has_sandbox=False)


async def _probe(runtime_dir: Path, settings: QemuSettings, deadline_s: float, *, has_sandbox: bool) -> QemuFacts:
    """Raises: HypervisorError `qemu_missing`, `guest_start`; `accelerator`: with what QEMU said."""
    files = QemuFiles(runtime_dir / f"{_PROBE}{secrets.token_hex(processes.TOKEN_BYTES)[:2]}")
    arguments = [
        settings.binary,
        *("-nodefaults", "-no-user-config", "-display", "none", "-machine", "none", "-S"),
        *(machine.SANDBOX if has_sandbox else ()),
        *("-accel", settings.accelerator, "-chardev", f"socket,id=monitor,fd={machine.MONITOR_FD},server=on,wait=on"),
        *("-mon", "chardev=monitor,mode=control", "-pidfile", str(files.pid)),
    ]
    watch = None
    try:
        watch = await trio.to_thread.run_sync(_start_probe, arguments, files)
        with contextlib.closing(Qmp(files.monitor)) as qmp, trio.fail_after(deadline_s):
            return await inspecting.abilities(qmp.execute, has_sandbox=has_sandbox)
    except (OSError, EOFError, trio.TooSlowError) as exc:
        words = files.last_words() or str(exc) or type(exc).__name__
        text = f"{settings.binary} does not start with accelerator {settings.accelerator}: {words}"
        raise HypervisorError(text, code="accelerator") from exc
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(_end_probe, watch, files)


def end_old_probes(runtime_dir: Path) -> None:
    """Those of a daemon that was killed while it asked."""
    for directory in runtime_dir.glob(f"{_PROBE}*"):
        files = QemuFiles(directory)
        pid = pid_of(files)
        started = None if pid is None else kernel.start_ticks_of(pid)
        if pid is not None and started is not None:
            processes.end_process(GuestProcess(pid, started, files.monitor))
        files.remove()


def _start_probe(arguments: Sequence[str], files: QemuFiles) -> processes.ProcessWatch:
    shutil.rmtree(files.directory, ignore_errors=True)
    files.directory.mkdir(mode=0o700)
    try:
        return launch.start(arguments, files)
    except OSError as exc:
        raise HypervisorError(f"cannot start {arguments[0]}: {exc}", code="guest_start") from exc


def _end_probe(watch: processes.ProcessWatch | None, files: QemuFiles) -> None:
    if watch is not None:
        watch.kill()
        watch.reap()
        watch.close()
    files.remove()


def is_started_with(pid: int | str, files: QemuFiles) -> bool:
    """Whether that process is the QEMU of a directory, started from here. Blocking.

    Raises: HypervisorError `guest_unresponsive`: it cannot be told just now.
    """
    try:
        return os.fsencode(files.pid) in Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
    except OSError as exc:
        text = f"{files.directory}: its QEMU cannot be looked for: {exc.strerror or exc}"
        raise HypervisorError(text, code="guest_unresponsive") from exc


def pid_of(files: QemuFiles) -> int | None:
    """The QEMU of a directory. Its pid file may not be written yet, and it outlives a QEMU that was killed: the number
    may be somebody else's by now. So every process is looked at, for the argument that names that file. Blocking.

    Raises: HypervisorError `guest_unresponsive`: they cannot be looked at just now.
    """
    if (known := foreign.load(files)) is not None:
        return known.pid if kernel.start_ticks_of(known.pid) == known.start_ticks else None
    try:
        names = [name for name in os.listdir("/proc") if name.isdecimal()]
    except OSError as exc:
        raise HypervisorError(f"/proc: {exc.strerror}", code="guest_unresponsive") from exc
    return next((int(name) for name in names if is_started_with(name, files)), None)
