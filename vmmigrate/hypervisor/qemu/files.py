"""The directory of one QEMU, mode 0700: its monitor's socket, what it said, consoles, and its device state at rest.

A console is two files: what the guest wrote, which QEMU appends to, and a pipe that it types from. The output file *is*
the console's history: its size is the number of bytes that there were, its first and its last MiB are kept, and what
lies between is given back to the file system from time to time.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import termios
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmmigrate.errors import HypervisorError, PayloadError
from vmmigrate.hypervisor import kernel, processes
from vmmigrate.hypervisor.base import ConsoleHistory
from vmmigrate.hypervisor.qemu.stream import DeviceStream

HISTORY_BYTES: Final = 1 << 20
MAX_HISTORY_BYTES: Final = 1 << 40
_PUNCHED_FROM_BYTES: Final = 8 << 20
_PAGE_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class QemuFiles:
    """Paths in the directory of one QEMU.

    Attributes:
        witness_dir: Where console output lies instead, and outlives the guest (`witness`).
    """

    directory: Path
    witness_dir: Path | None = None

    @property
    def monitor(self) -> Path:
        return self.directory / "qmp"

    @property
    def log(self) -> Path:
        return self.directory / "log"

    @property
    def pid(self) -> Path:
        """QEMU writes it, and removes it when it ends by itself."""
        return self.directory / "pid"

    @property
    def outgoing(self) -> Path:
        """The socket to which QEMU saves device state."""
        return self.directory / "out"

    @property
    def incoming(self) -> Path:
        """The socket from which QEMU loads it."""
        return self.directory / "in"

    @property
    def exports(self) -> Path:
        """The socket of the block exports by which images are activated; nobody ever connects to it."""
        return self.directory / "nbd"

    @property
    def state(self) -> Path:
        """Device state as it was saved, or loaded, the last time."""
        return self.directory / "state"

    @property
    def devices(self) -> Path:
        """Which devices the guest has, and how large their state was."""
        return self.directory / "devices"

    @property
    def foreign(self) -> Path:
        """Of a QEMU that something else started (`foreign`)."""
        return self.directory / "foreign"

    @property
    def given_back(self) -> Path:
        """There when such a QEMU is not ours any more: nobody may end it."""
        return self.directory / "given-back"

    def keep_foreign(self, text: str) -> None:
        """Blocking."""
        _replace(self.foreign, text.encode())

    def held_keys(self, port: str) -> Path:
        """Of the pipe `keys`, as QEMU's character device `pipe` takes it: it opens `NAME.in` and `NAME.out`."""
        return self.directory / port

    def keep_state(self, stream: bytes) -> None:
        """Blocking. Whether it is the state of the guest is for the run state of QEMU to say, and for `Remembered`."""
        _replace(self.state, stream)

    def keep_devices(self, stream: DeviceStream, size_bytes: int) -> None:
        """Note which devices a guest has, from its first saved state. Blocking."""
        known = {"labels": [device.label for device in stream.devices], "bytes": size_bytes}
        _replace(self.devices, json.dumps(known).encode())

    def output(self, port: str) -> Path:
        if self.witness_dir is not None:
            return self.witness_dir / f"{self.directory.name}.{port}.log"
        return self.directory / f"{port}.log"

    def keys(self, port: str) -> Path:
        return self.directory / f"{port}.in"

    def blob(self, number: int) -> Path:
        return self.directory / f"blob{number}"

    def last_words(self) -> str:
        return processes.last_words(self.log)

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


def _replace(path: Path, contents: bytes) -> None:
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_bytes(contents)
    fresh.replace(path)


def read_history(output: Path, port: str) -> ConsoleHistory:
    """What `base.ConsoleHistory` says; gives back what lies between its two ends. Blocking."""
    with open(output, "rb+") as file:
        size = os.fstat(file.fileno()).st_size
        beginning = file.read(min(size, HISTORY_BYTES))
        # What came since the beginning, or the last MiB of it: nothing is told twice.
        rest = min(size - len(beginning), HISTORY_BYTES)
        file.seek(size - rest)
        rolling = file.read(rest)
        _give_back(file.fileno(), size)
    return ConsoleHistory(port, beginning, rolling, size)


def check_history(history: ConsoleHistory) -> None:
    """Raises: PayloadError `console_history`: lengths that no history can have."""
    if history.total_bytes > MAX_HISTORY_BYTES:
        text = f"{history.total_bytes} bytes, allowed are {MAX_HISTORY_BYTES}"
        raise PayloadError(f"console {history.port}: a history of {text}", code="console_history")
    after = history.total_bytes - len(history.beginning)
    if len(history.beginning) != min(history.total_bytes, HISTORY_BYTES) or len(history.rolling) != min(
        after, HISTORY_BYTES
    ):
        raise PayloadError(f"console {history.port}: a history that contradicts itself", code="console_history")


def write_history(output: Path, history: ConsoleHistory) -> None:
    """Make the output of a guest that has not run here begin with *history*. Blocking.

    Raises: PayloadError `console_history`: lengths that no history can have; nothing was changed. HypervisorError
        `console_history`: the disk does not take it.
    """
    check_history(history)
    try:
        with open(output, "rb+") as file:
            file.truncate(history.total_bytes)
            file.write(history.beginning)
            file.seek(history.total_bytes - len(history.rolling))
            file.write(history.rolling)
    except OSError as exc:
        raise HypervisorError(f"console {history.port}: {exc.strerror}", code="console_history") from exc


MAX_KEYS_BYTES: Final = 64 << 10  # as many as a pipe takes


def type_keys(pipe: Path, keys: bytes) -> None:
    """Put *keys* where QEMU reads them, all or none. Blocking, but not for long: nobody waits for room.

    Raises: HypervisorError `console_input`: the guest has not read what was typed before.
    """
    try:
        fd = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            waiting = int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)
            room = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) - waiting
            if len(keys) > room:
                text = f"{len(keys)} bytes, and there is room for {room}: the guest has not read what was typed before"
                raise HypervisorError(text, code="console_input")
            while keys:
                keys = keys[os.write(fd, keys) :]
        finally:
            os.close(fd)
    except OSError as exc:
        raise HypervisorError(f"the console takes no keys: {exc.strerror}", code="console_input") from exc


def waiting_keys(pipe: Path) -> bytes:
    """What was typed and not read; it stays where it is. Blocking."""
    fd = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return kernel.peek_pipe(fd)
    finally:
        os.close(fd)


def trim_output(output: Path) -> None:
    """Keep what nobody reads any more from filling the disk. Blocking, and cheap when there is nothing to do."""
    with contextlib.suppress(OSError), open(output, "rb+") as file:
        _give_back(file.fileno(), os.fstat(file.fileno()).st_size)


def _give_back(fd: int, size: int) -> None:
    if size < _PUNCHED_FROM_BYTES or os.fstat(fd).st_blocks * 512 < _PUNCHED_FROM_BYTES:
        return
    first, last = HISTORY_BYTES // _PAGE_BYTES, (size - HISTORY_BYTES) // _PAGE_BYTES
    with contextlib.suppress(OSError):  # a file system without holes keeps everything
        kernel.punch_holes(fd, [(first, last - first)])
