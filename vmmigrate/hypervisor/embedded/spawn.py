"""Starting guest processes, and the files that belong to one. Blocking: called in threads.

The daemon makes the listening socket and hands it down, so it can connect before the guest is up and nobody polls for
a file to appear; when the guest dies early, the kernel resets that connection.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgpack

import vmmigrate
from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor import processes
from vmmigrate.hypervisor.processes import ProcessWatch

_GUEST_MODULE: Final = "vmmigrate.hypervisor.embedded.guest"
_CONFIG_FD, _LISTENER_FD = 3, 4
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
        return processes.last_words(self.log)


def spawn(runtime_dir: Path, witness_dir: Path | None, config: dict[str, Any]) -> tuple[ProcessWatch, GuestFiles]:
    """Start a guest process in a session of its own; its stdio goes to a file. The witness path is added to *config*.

    Raises:
        HypervisorError: `guest_start`; nothing is left behind.
    """
    files = GuestFiles.in_directory(runtime_dir, secrets.token_hex(processes.TOKEN_BYTES), witness_dir)
    packed: bytes = msgpack.packb({**config, "witness": str(files.witness)})
    try:
        with _inherited(files, packed) as (actions, environment):
            arguments = [sys.executable, "-P", "-m", _GUEST_MODULE, str(_CONFIG_FD), str(_LISTENER_FD)]
            pid = os.posix_spawn(
                sys.executable, arguments, environment, file_actions=actions, setsid=True, setsigmask=[]
            )
        return processes.watch_child(pid), files
    except (OSError, HypervisorError) as exc:
        files.remove()
        raise HypervisorError(f"cannot start a guest process: {exc}", code="guest_start") from exc


@contextlib.contextmanager
def _inherited(files: GuestFiles, config: bytes) -> Iterator[tuple[list[Any], dict[str, str]]]:
    """What the child gets: stdio, configuration, listening socket; and a small environment."""
    with contextlib.ExitStack() as stack:
        null = processes.opened_high(stack, os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        log = processes.opened_high(
            stack, os.open(files.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        )
        memory = processes.opened_high(stack, os.memfd_create("vmmigrate-config", os.MFD_CLOEXEC))
        with open(memory, "wb", closefd=False) as stream:
            stream.write(config)
        os.lseek(memory, 0, os.SEEK_SET)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(files.socket))
        listener.listen(4)
        listening = processes.opened_high(stack, os.dup(listener.fileno()))
        sources = {0: null, 1: log, 2: log, _CONFIG_FD: memory, _LISTENER_FD: listening}
        package_root = str(Path(vmmigrate.__file__).resolve().parent.parent)
        environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONPATH": package_root, **_SINGLE_THREADED}
        yield [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in sources.items()], environment
