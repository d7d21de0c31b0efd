"""Starting, finding and ending guest processes, and the files that belong to one. Blocking: called in threads.

The daemon makes the listening socket and hands it down, so it can connect before the guest is up and nobody polls for
a file to appear; when the guest dies early, the kernel resets that connection.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import select
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgpack

import vmmigrate
from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor import kernel
from vmmigrate.hypervisor.embedded.protocol import MAX_SOCKET_PATH_BYTES

_GUEST_MODULE: Final = "vmmigrate.hypervisor.embedded.guest"
_CONFIG_FD, _LISTENER_FD = 3, 4
_SAFE_FD: Final = 64  # above every descriptor number that the child gets
_TOKEN_BYTES: Final = 4
_LOG_TAIL_BYTES: Final = 2000
_SINGLE_THREADED: Final = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True, slots=True)
class GuestFiles:
    """The paths of one guest process. The witness outlives it when it is kept elsewhere on purpose."""

    socket: Path
    log: Path
    witness: Path
    keep_witness: bool

    @classmethod
    def in_directory(cls, runtime_dir: Path, token: str, witness_dir: Path | None) -> GuestFiles:
        base = runtime_dir / token
        witness = (witness_dir or runtime_dir) / f"{token}.witness"
        return cls(base.with_suffix(".sock"), base.with_suffix(".log"), witness, keep_witness=witness_dir is not None)

    def remove(self) -> None:
        paths = [self.socket, self.log] + ([] if self.keep_witness else [self.witness])
        for path in paths:
            path.unlink(missing_ok=True)

    def log_tail(self) -> str:
        """The last line that the guest process said; for error messages."""
        try:
            lines = self.log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1] if lines else ""


class ProcessWatch:
    """A guest process, by pidfd: no pid of it can be mistaken for another's."""

    def __init__(self, pid: int) -> None:
        """Raises: ProcessLookupError."""
        self.pid = pid
        self.fd = os.pidfd_open(pid)
        self._exit_status: int | None = None

    def is_alive(self) -> bool:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return not poll.poll(0)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.fd, signal.SIGKILL)

    def reap(self) -> int:
        """The exit status of an ended process (negative: the signal), or -1 when it was not our child."""
        if self._exit_status is None:
            self._exit_status = -1
            with contextlib.suppress(ChildProcessError):
                ended = os.waitid(os.P_PIDFD, self.fd, os.WEXITED)
                if ended is not None:
                    self._exit_status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        return self._exit_status

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def prepare_runtime_dir(path: Path) -> None:
    """Make the directory of sockets, or check that nobody else can reach into it.

    Raises:
        HypervisorError: `runtime_dir`.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as exc:
        raise HypervisorError(f"runtime directory {path}: {exc.strerror}", code="runtime_dir") from exc
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        text = f"runtime directory {path}: must belong to user {os.geteuid()} alone (mode 0700)"
        raise HypervisorError(text, code="runtime_dir")
    longest = len(os.fsencode(path / ("0" * 2 * _TOKEN_BYTES + ".sock")))
    if longest > MAX_SOCKET_PATH_BYTES:
        text = f"runtime directory {path}: socket paths of {longest} bytes, allowed are {MAX_SOCKET_PATH_BYTES}"
        raise HypervisorError(text, code="runtime_dir")


def spawn(runtime_dir: Path, witness_dir: Path | None, config: dict[str, Any]) -> tuple[ProcessWatch, GuestFiles]:
    """Start a guest process in a session of its own; its stdio goes to a file. The witness path is added to *config*.

    Raises:
        HypervisorError: `guest_start`; nothing is left behind.
    """
    files = GuestFiles.in_directory(runtime_dir, secrets.token_hex(_TOKEN_BYTES), witness_dir)
    packed: bytes = msgpack.packb({**config, "witness": str(files.witness)})
    try:
        with _inherited(files, packed) as (actions, environment):
            arguments = [sys.executable, "-P", "-m", _GUEST_MODULE, str(_CONFIG_FD), str(_LISTENER_FD)]
            pid = os.posix_spawn(
                sys.executable, arguments, environment, file_actions=actions, setsid=True, setsigmask=[]
            )
        return ProcessWatch(pid), files
    except OSError as exc:
        files.remove()
        raise HypervisorError(f"cannot start a guest process: {exc}", code="guest_start") from exc


@contextlib.contextmanager
def _inherited(files: GuestFiles, config: bytes) -> Iterator[tuple[list[Any], dict[str, str]]]:
    """What the child gets: stdio, configuration, listening socket; and a small environment."""
    with contextlib.ExitStack() as stack:
        null = _opened(stack, os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        log = _opened(stack, os.open(files.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600))
        memory = _opened(stack, os.memfd_create("vmmigrate-config", os.MFD_CLOEXEC))
        with open(memory, "wb", closefd=False) as stream:
            stream.write(config)
        os.lseek(memory, 0, os.SEEK_SET)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(files.socket))
        listener.listen(4)
        listening = _opened(stack, os.dup(listener.fileno()))
        sources = {0: null, 1: log, 2: log, _CONFIG_FD: memory, _LISTENER_FD: listening}
        package_root = str(Path(vmmigrate.__file__).resolve().parent.parent)
        environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONPATH": package_root, **_SINGLE_THREADED}
        yield [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in sources.items()], environment


def _opened(stack: contextlib.ExitStack, fd: int) -> int:
    """The same file at a number that no child descriptor has, closed with *stack*."""
    try:
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _SAFE_FD)
    finally:
        os.close(fd)
    stack.callback(os.close, moved)
    return moved


def find(pid: int, start_ticks: int) -> ProcessWatch | None:
    """A process by pid and start time; None when it is gone (or a zombie)."""
    try:
        watch = ProcessWatch(pid)
    except OSError:
        return None
    if kernel.start_ticks_of(pid) == start_ticks and watch.is_alive():
        return watch
    watch.close()
    return None
