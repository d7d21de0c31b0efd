"""Guest processes of every adapter: started with exactly the descriptors they shall have, found again, ended. Blocking:
called in threads.

A process is gone when the kernel says that there is none of that number, and for no other reason: a daemon that is out
of descriptors, say, does not see it, and whoever took that for its end would kill a healthy guest.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
from pathlib import Path
from typing import Final

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor import kernel
from vmmigrate.hypervisor.base import GuestProcess

MAX_SOCKET_PATH_BYTES: Final = 107  # sockaddr_un, less its zero byte
TOKEN_BYTES: Final = 4
ANY_TOKEN: Final = "0" * 2 * TOKEN_BYTES
END_DEADLINE_S: Final = 30.0
_SAFE_FD: Final = 64  # above every descriptor number that a child gets
_LOG_TAIL_BYTES: Final = 2000
_NOBODY: Final = frozenset({errno.ESRCH, errno.ENOENT, errno.EINVAL})  # the last: the number is now that of a thread


class ProcessWatch:
    """A guest process, by pidfd: no pid of it can be mistaken for another's.

    Attributes:
        start_ticks: When it started, in clock ticks since boot.
    """

    def __init__(self, pid: int) -> None:
        """Raises: ProcessLookupError: there is none; HypervisorError `guest_unresponsive`: there may be one."""
        self.pid = pid
        self._exit_status: int | None = None
        try:
            self.fd = os.pidfd_open(pid)
        except OSError as exc:
            if exc.errno in _NOBODY:
                raise ProcessLookupError(errno.ESRCH, f"there is no process {pid}") from exc
            text = f"cannot look at process {pid}: {exc.strerror}"
            raise HypervisorError(text, code="guest_unresponsive") from exc
        try:
            self.start_ticks = self._started()
        except BaseException:
            os.close(self.fd)
            raise

    def _started(self) -> int:
        started = kernel.start_ticks_of(self.pid)
        if started is None:
            raise ProcessLookupError(errno.ESRCH, f"there is no process {self.pid}")
        return started

    def is_alive(self, wait_s: float = 0) -> bool:
        """Whether it is, also after so long; looked at until it is not."""
        poll = select.poll()  # as `select.select` takes no descriptors beyond 1023
        poll.register(self.fd, select.POLLIN)
        return not poll.poll(wait_s * 1000)

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


def prepare_runtime_dir(path: Path, socket_name: str) -> None:
    """Make the directory of sockets, or check that nobody else can reach into it; *socket_name* is the longest.

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
    longest = len(os.fsencode(path / socket_name))
    if longest > MAX_SOCKET_PATH_BYTES:
        text = f"runtime directory {path}: socket paths of {longest} bytes, allowed are {MAX_SOCKET_PATH_BYTES}"
        raise HypervisorError(text, code="runtime_dir")


def watch_child(pid: int) -> ProcessWatch:
    """The watch of a child that was just started. Raises: HypervisorError `guest_unresponsive`: it was ended again."""
    try:
        return ProcessWatch(pid)
    except BaseException:
        os.kill(pid, signal.SIGKILL)  # nobody has waited for it: the number is its own
        os.waitpid(pid, 0)
        raise


def opened_high(stack: contextlib.ExitStack, fd: int) -> int:
    """The same file at a number that no child descriptor has, closed with *stack*."""
    try:
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _SAFE_FD)
    finally:
        os.close(fd)
    stack.callback(os.close, moved)
    return moved


def find(pid: int, start_ticks: int) -> ProcessWatch | None:
    """A process by pid and start time; None when it is gone (or a zombie).

    Raises: HypervisorError `guest_unresponsive`: nobody can tell just now.
    """
    try:
        watch = ProcessWatch(pid)
    except ProcessLookupError:
        return None
    if watch.start_ticks == start_ticks and watch.is_alive():
        return watch
    watch.close()
    return None


def last_words(log: Path) -> str:
    """The last line that a guest process said; for error messages."""
    try:
        lines = log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    told = [line for line in lines if ": info: " not in line]  # QEMU's words for what is as it should be
    return told[-1] if told else ""


def end_process(process: GuestProcess) -> bool:
    """Kill the very process that *process* names, if it is still there, and wait until it is gone.

    Returns: Whether it was there. Raises: HypervisorError `guest_unresponsive`: it does not die, or as `find`.
    """
    watch = find(process.pid, process.start_ticks)
    if watch is None:
        return False
    watch.kill()
    is_alive = watch.is_alive(END_DEADLINE_S)
    watch.close()
    if is_alive:
        raise HypervisorError(f"process {process.pid} does not end", code="guest_unresponsive")
    return True
