"""Daemons without the second that their imports take: forked from a process that has imported everything.

What runs is `vmmigrate.cli.main.main`, in a process of its own with its own session, as if it were executed. Only the
memory of the imported modules is shared, so nothing that measures memory may use it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Protocol

import trio

import vmmigrate

_MAX_REQUEST_BYTES = 1 << 16
_READY_DEADLINE_S = 30.0


class DaemonProcess(Protocol):
    """What is needed of a daemon process; also `trio.Process` has it."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    def send_signal(self, number: int, /) -> None: ...

    async def wait(self) -> int: ...


class ForkedProcess:
    """A forked process, by pidfd. Its exit status is its parent's to know: here it is 0 once it has ended."""

    def __init__(self, pid: int, fd: int) -> None:
        self.pid = pid
        self._fd = fd
        self._waiting = trio.Lock()  # trio lets only one task wait on a descriptor

    @property
    def returncode(self) -> int | None:
        if self._fd < 0:
            return 0
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return 0 if poll.poll(0) else None

    def send_signal(self, number: int, /) -> None:
        if self._fd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, number)

    async def wait(self) -> int:
        """Until it has ended."""
        async with self._waiting:
            if self._fd >= 0:
                await trio.lowlevel.wait_readable(self._fd)
                os.close(self._fd)
                self._fd = -1
        return 0


class Forks:
    """The process that forks, from outside."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._lock = trio.Lock()

    async def start(self, arguments: Sequence[str], stdout: int, stderr: int) -> ForkedProcess:
        """`vmmigrate *arguments*` with these descriptors; they stay the caller's."""
        async with self._lock:
            await trio.lowlevel.wait_writable(self._control)
            socket.send_fds(self._control, [json.dumps(list(arguments)).encode()], [stdout, stderr])
            await trio.lowlevel.wait_readable(self._control)
            reply, fds, _, _ = socket.recv_fds(self._control, _MAX_REQUEST_BYTES, 1)
        assert len(fds) == 1, "the forking process has ended"
        return ForkedProcess(int(reply), fds[0])


@contextlib.asynccontextmanager
async def open_forks() -> AsyncIterator[Forks]:
    """A process that forks daemons; it ends with the block, those that it forked do not."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "tools.faults.forks", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": _package_root(), "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        theirs.close()
        try:
            with trio.fail_after(_READY_DEADLINE_S):
                await trio.lowlevel.wait_readable(ours)
            assert ours.recv(_MAX_REQUEST_BYTES) == b"ready", "the forking process did not start"
            yield Forks(ours)
        finally:
            ours.close()
            with trio.CancelScope(shield=True):
                await process.wait()


def _package_root() -> str:
    return str(Path(vmmigrate.__file__).parent.parent)


# --------------------------------------------------------------------------- the process that forks


def serve(control: socket.socket) -> None:
    """Fork whenever asked, until the other end is closed. Single-threaded, or a fork would not be safe."""
    import vmmigrate.cli.commands.daemon
    import vmmigrate.cli.main
    import vmmigrate.daemon.server  # noqa: F401  (what a daemon imports when it runs)

    gc.collect()
    gc.freeze()
    control.send(b"ready")
    while True:
        request, fds, _, _ = socket.recv_fds(control, _MAX_REQUEST_BYTES, 2)
        _reap()
        if not request:
            return
        pid = os.fork()
        if pid == 0:
            _become_daemon(json.loads(request), fds, control)
        for fd in fds:
            os.close(fd)
        pidfd = os.pidfd_open(pid)
        socket.send_fds(control, [str(pid).encode()], [pidfd])
        os.close(pidfd)


def _become_daemon(arguments: list[str], fds: list[int], control: socket.socket) -> None:
    status = 1
    try:
        os.setsid()
        control.close()
        for target, fd in enumerate(fds, start=1):
            os.dup2(fd, target)
            os.close(fd)
        from vmmigrate.cli.main import main

        status = main(arguments)
    finally:
        os._exit(status)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
