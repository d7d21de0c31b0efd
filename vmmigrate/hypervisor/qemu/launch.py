"""Starting a QEMU: its directory, the memfd of guest RAM, what it inherits. Blocking: called in threads.

The daemon makes the monitor's listening socket and hands it down, so it can connect before QEMU is up and nobody polls
for a file to appear; when QEMU dies early, the kernel resets that connection. Guest RAM is a memfd: it has no name that
anybody could open, and is gone when QEMU and the daemon are.
"""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor import kernel, processes
from vmmigrate.hypervisor.base import GuestPlan, GuestStamp
from vmmigrate.hypervisor.processes import ProcessWatch
from vmmigrate.hypervisor.qemu import witness
from vmmigrate.hypervisor.qemu.files import QemuFiles
from vmmigrate.hypervisor.qemu.machine import FIRST_PIPE_FD, MONITOR_FD, RAM_FD
from vmmigrate.hypervisor.qemu.tracker import RamIdentity

_PRIVATE_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
_CREATED: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


@dataclass(frozen=True)
class Launched:
    """A QEMU that was started. `ram_fd` belongs to whoever has this."""

    watch: ProcessWatch
    files: QemuFiles
    ram_fd: int


def launch(
    runtime_dir: Path,
    witness_dir: Path | None,
    plan: GuestPlan,
    stamp: GuestStamp,
    arguments: Callable[[QemuFiles], Sequence[str]],
    tracker: Path | None,
) -> Launched:
    """Start the QEMU of a guest in a session of its own.

    Args:
        witness_dir: Where consoles are to outlive the guest.
        tracker: The library to load into it.

    Raises: HypervisorError `guest_start`; nothing is left behind.
    """
    files = QemuFiles(runtime_dir / secrets.token_hex(processes.TOKEN_BYTES), witness_dir)
    try:
        files.directory.mkdir(mode=0o700)
        make_files(plan, files)
        witness.note_guest(files, stamp.instance_id, stamp.host_id)
        ram_fd = os.memfd_create("vmmigrate-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(ram_fd, plan.layout.size_bytes)
            kernel.seal_size(ram_fd)  # a guest that breaks out could end this daemon by making it shorter
            environment = {} if tracker is None else RamIdentity.of(ram_fd).environment(tracker)
            watch = start(
                arguments(files), files, ram_fd, [files.keys(port.num) for port in plan.serial_ports], environment
            )
        except BaseException:
            os.close(ram_fd)
            raise
    except BaseException as exc:
        files.remove()
        if isinstance(exc, OSError):
            raise HypervisorError(f"cannot start QEMU: {exc}", code="guest_start") from exc
        raise
    return Launched(watch, files, ram_fd)


def make_files(plan: GuestPlan, files: QemuFiles) -> None:
    """Consoles, and the disks that are blobs."""
    for port in plan.serial_ports:
        os.close(os.open(files.output(port.num), _CREATED, 0o600))
        os.mkfifo(files.keys(port.num), 0o600)
    for number, disk in enumerate(plan.disks):
        if disk.backend_kind == "blob":
            with open(os.open(files.blob(number), _CREATED, 0o600), "wb") as file:
                file.write(_contents(disk.backend["contents"]))


def _contents(blob: Any) -> bytes:
    return blob if isinstance(blob, bytes) else base64.b64decode(blob)


def start(
    arguments: Sequence[str],
    files: QemuFiles,
    ram_fd: int | None = None,
    pipes: Sequence[Path] = (),
    environment: Mapping[str, str] | None = None,
) -> ProcessWatch:
    """Start a QEMU that inherits its monitor's listener and, where given, guest RAM and both ends of pipes.

    Raises: HypervisorError `qemu_missing`, `guest_unresponsive`; OSError.
    """
    program = shutil.which(arguments[0])
    if program is None:
        raise HypervisorError(
            f"{arguments[0]} is not there; on Debian: apt-get install qemu-system-x86", code="qemu_missing"
        )
    with _inherited(files, ram_fd, pipes) as actions:
        own = {"PATH": os.defpath, "LANG": "C.UTF-8", **(environment or {})}
        pid = os.posix_spawn(program, list(arguments), own, file_actions=actions, setsid=True, setsigmask=[])
    return processes.watch_child(pid)


@contextlib.contextmanager
def _inherited(files: QemuFiles, ram_fd: int | None, pipes: Sequence[Path]) -> Iterator[list[Any]]:
    with contextlib.ExitStack() as stack:
        log = processes.opened_high(stack, os.open(files.log, _PRIVATE_FILE, 0o600))
        null = processes.opened_high(stack, os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(files.monitor))
        listener.listen(4)
        sources = {0: null, 1: log, 2: log}
        sources[MONITOR_FD] = processes.opened_high(stack, os.dup(listener.fileno()))
        if ram_fd is not None:
            sources[RAM_FD] = processes.opened_high(stack, os.dup(ram_fd))
        for number, pipe in enumerate(pipes):
            # For reading and writing: QEMU itself then keeps the pipe from ending when nobody else writes to it.
            sources[FIRST_PIPE_FD + number] = processes.opened_high(stack, os.open(pipe, os.O_RDWR | os.O_CLOEXEC))
        yield [*_not_for_it(set(sources)), *((os.POSIX_SPAWN_DUP2, fd, target) for target, fd in sources.items())]


def _not_for_it(wanted: set[int]) -> Iterator[tuple[int, int]]:
    """Descriptors that the daemon was itself started with, such as the pipe of a shell that waits for all writers to
    end: a guest outlives it and must hold none of them."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if int(name) not in wanted and os.get_inheritable(int(name)):
                yield (os.POSIX_SPAWN_CLOSE, int(name))
