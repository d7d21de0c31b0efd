"""Host sides of disks and NICs. All of them open nothing when they are made and everything in `open`.

A writable backend may be open on one host at a time: two daemons on one machine are kept apart by an exclusive lock on
the file (it belongs to the open file, so a killed guest process lets go of it), Crucible by its generation.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from vmmigrate.devices.payload import MAX_PAYLOAD_BYTES
from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.base import DiskPlan

_MAX_GENERATION_TEXT_BYTES: Final = 32


class Backend(Protocol):
    """The host side of one disk."""

    name: str
    readonly: bool
    is_open: bool

    @property
    def size_bytes(self) -> int:
        """0 while it is closed, unless its size is known without opening it."""

    def open(self) -> None:
        """Raises: HypervisorError; the backend is then closed."""

    def flush(self) -> None:
        """What was written is on stable storage. Raises: HypervisorError `flush_failed`, and from then on always."""

    def close(self) -> None:
        """Another host may open it. Does not flush. Idempotent."""

    def read(self, offset: int, size_bytes: int) -> bytes: ...

    def write(self, offset: int, content: bytes) -> None: ...


class FileBackend:
    """A file or block device, locked while it is open: exclusively for writing, shared for reading.

    A flush that failed once fails for good: the kernel tells of a lost write only once, and a later flush that succeeds
    says nothing about it.
    """

    def __init__(self, name: str, path: Path, *, readonly: bool) -> None:
        self.name, self.readonly, self.path = name, readonly, path
        self.is_open = False
        self.size_bytes = 0
        self._fd = -1
        self._written = False
        self._lost: str | None = None

    def open(self) -> None:
        if self.is_open:
            return
        try:
            self._fd = os.open(self.path, (os.O_RDONLY if self.readonly else os.O_RDWR) | os.O_CLOEXEC)
        except OSError as exc:
            raise self._error("backend_unavailable", f"cannot open {self.path}: {exc.strerror}") from exc
        try:
            fcntl.flock(self._fd, (fcntl.LOCK_SH if self.readonly else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            self.size_bytes = os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as exc:
            os.close(self._fd)
            raise self._error("backend_busy", f"{self.path} is open for writing elsewhere ({exc.strerror})") from exc
        self.is_open = True

    def flush(self) -> None:
        if self._lost is None and self._written:
            try:
                os.fdatasync(self._fd)
            except OSError as exc:
                self._lost = exc.strerror
            self._written = False
        if self._lost is not None:
            raise self._error("flush_failed", f"{self.path} did not take what was written to it ({self._lost})")

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            os.close(self._fd)

    def read(self, offset: int, size_bytes: int) -> bytes:
        return os.pread(self._fd, size_bytes, offset)

    def write(self, offset: int, content: bytes) -> None:
        self._written = True
        os.pwrite(self._fd, content, offset)

    def _error(self, code: str, text: str) -> HypervisorError:
        return HypervisorError(f"backend {self.name}: {text}", code=code, details={"backend": self.name})


class BlobBackend:
    """A disk in memory: its contents travel as a device payload."""

    def __init__(self, name: str, contents: bytes, *, readonly: bool) -> None:
        self.name, self.readonly = name, readonly
        self.is_open = False
        self.contents = bytearray(contents)

    @property
    def size_bytes(self) -> int:
        return len(self.contents)

    def open(self) -> None:
        self.is_open = True

    def flush(self) -> None: ...

    def close(self) -> None:
        self.is_open = False

    def read(self, offset: int, size_bytes: int) -> bytes:
        return bytes(self.contents[offset : offset + size_bytes])

    def write(self, offset: int, content: bytes) -> None:
        self.contents[offset : offset + len(content)] = content


class CrucibleBackend:
    """A model of a Crucible volume: it remembers the highest generation that opened it and refuses an older one.

    With a `path` the volume is that file, and the generation is kept beside it (`<path>.generation`, written under the
    lock). Without one there is nothing behind the disk, and the generation is all there is to check.
    """

    def __init__(self, name: str, volume_id: str, generation: int, path: Path | None, *, readonly: bool) -> None:
        self.name, self.readonly = name, readonly
        self.volume_id, self.generation = volume_id, generation
        self.is_open = False
        self._file = None if path is None else FileBackend(name, path, readonly=readonly)

    @property
    def size_bytes(self) -> int:
        return self._file.size_bytes if self._file else 0

    def open(self) -> None:
        if self._file is not None and not self.is_open:
            self._file.open()
            try:
                self._claim(self._file.path.with_name(self._file.path.name + ".generation"))
            except BaseException:
                self._file.close()
                raise
        self.is_open = True

    def _claim(self, record: Path) -> None:
        try:
            seen = int(record.read_bytes()[:_MAX_GENERATION_TEXT_BYTES]) if record.exists() else 0
            if seen > self.generation:
                text = f"backend {self.name}: volume {self.volume_id} was opened by generation {seen}"
                raise HypervisorError(f"{text}, this is generation {self.generation}", code="stale_generation")
            if not self.readonly:
                record.write_text(f"{self.generation}\n")
        except (OSError, ValueError) as exc:
            raise HypervisorError(f"backend {self.name}: {record}: {exc}", code="backend_unavailable") from exc

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        self.is_open = False
        if self._file is not None:
            self._file.close()

    def read(self, offset: int, size_bytes: int) -> bytes:
        return self._file.read(offset, size_bytes) if self._file else bytes(size_bytes)

    def write(self, offset: int, content: bytes) -> None:
        if self._file is not None:
            self._file.write(offset, content)


class VionaBackend:
    """A record of what a host NIC would do: the link is up while it is open, and each opening announces the guest."""

    def __init__(self, name: str, vnic_name: str) -> None:
        self.name, self.vnic_name = name, vnic_name
        self.is_open = False
        self.announcements = 0

    def open(self) -> None:
        self.announcements += not self.is_open
        self.is_open = True

    def close(self) -> None:
        self.is_open = False


def make_backend(plan: DiskPlan) -> Backend:
    """The backend of a disk, closed. Fields of `plan.backend` by kind:

    file: `path`; blob: `contents` (bytes); crucible: `volume_id`, `generation` and, optionally, `path`.

    Raises:
        HypervisorError: `backend_invalid`.
    """
    fields: Mapping[str, Any] = plan.backend
    try:
        if plan.backend_kind == "file":
            return FileBackend(plan.backend_name, Path(fields["path"]), readonly=plan.readonly)
        if plan.backend_kind == "blob":
            contents = bytes(fields["contents"])
            if len(contents) > MAX_PAYLOAD_BYTES - 64:
                raise ValueError(f"{len(contents)} bytes are too many for a disk in memory")
            return BlobBackend(plan.backend_name, contents, readonly=plan.readonly)
        if plan.backend_kind == "crucible":
            path = Path(fields["path"]) if fields.get("path") else None
            volume, generation = str(fields["volume_id"]), int(fields["generation"])
            return CrucibleBackend(plan.backend_name, volume, generation, path, readonly=plan.readonly)
    except (KeyError, TypeError, ValueError) as exc:
        text = f"backend {plan.backend_name} of kind {plan.backend_kind}: {exc}"
        raise HypervisorError(text, code="backend_invalid") from exc
    text = f"backend {plan.backend_name}: kind {plan.backend_kind!r}, allowed are file, blob, crucible"
    raise HypervisorError(text, code="backend_invalid")
