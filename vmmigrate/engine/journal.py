"""The ownership journal: append, fsync, and only then act.

One file, one writer. Its header names the format and a random id; every record carries a number, and checksums over
its header and body apart, so that a damaged length is told from a torn tail.

- Only an *incomplete* last record is dropped (a torn write was never acknowledged). A complete record whose checksum
  is wrong is corruption: the file is kept as it is and nothing is decided from it.
- At every open the valid prefix is rewritten to a new file and fsynced (file and directory) before any record is acted
  upon: after a failed fsync the page cache may show records that the disk does not have.
- A failed write or fsync poisons the journal: no further record, no verdict; the daemon must exit.
- Space for the records to come is allocated ahead (`reserve`), so that a disk that fills up while a guest is being
  given away refuses the next migration instead of poisoning the journal in the middle of this one.

Source: Rebello et al., "Can applications recover from fsync failures?" (USENIX ATC 2020); ownership rules 3 and 4.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import trio

from vmmigrate.errors import JournalError, StorageError
from vmmigrate.ownership.records import Record, from_plain, to_plain
from vmmigrate.ownership.rules import Decision, Event, decide
from vmmigrate.ownership.state import Ownership, apply

MAGIC = b"VMMJ"
FORMAT = 1
_PREFIX = struct.Struct("!IQII")  # body length, number, crc32 of the body, crc32 of the three before
MAX_RECORD_BYTES = 1 << 20

# What is kept allocated beyond the end: the records of some hundred migrations that are all about to be decided.
RESERVE_BYTES = 256 << 10
_FALLOC_FL_KEEP_SIZE = 1


class Journal:
    """An open journal. Blocking; `commit` is the one way in, and is safe from several threads.

    Attributes:
        id: Random, made with the file; a host whose journal id changed decides nothing for open migrations.
        state: What all records so far add up to.
        newest_record: Number of the last durable record.
    """

    def __init__(self, path: Path, fsync: Callable[[int], None] = os.fsync) -> None:
        """Open or create.

        Raises:
            JournalError: `journal_locked` (another daemon has it), `journal_corrupt`, `journal_format`, or an I/O
                error (`journal_io`). The file is as it was.
        """
        self.path = path
        self._fsync = fsync
        self._lock = threading.Lock()
        self._poisoned: str | None = None
        self._is_closed = False
        self._lock_fd = _take_lock(path.with_suffix(".lock"))
        try:
            self.id, records = _read_or_create(path)
            self.state = Ownership()
            for record in records:
                self.state = apply(self.state, record)
            self.newest_record = len(records)
            self._fd = self._rewrite(records)
            self._size = os.fstat(self._fd).st_size
            self._allocated = 0
            with contextlib.suppress(StorageError):  # then nothing that needs it is begun
                self._reserve()
        except BaseException:
            os.close(self._lock_fd)
            raise

    def commit(self, event: Event) -> Decision:
        """Decide *event* and make its records durable: one conditional append.

        Raises:
            OwnershipRefusal, RequestError, IdentityError: The rules say no; nothing was written.
            JournalError: `journal_poisoned`: this or an earlier write failed. Nobody may act or answer; exit.
        """
        with self._lock:
            self._check_usable()
            decision = decide(self.state, event)
            if decision.records:
                self._append(decision.records)
            return decision

    def reserve(self) -> None:
        """Make sure that there is space for the records of what is about to be decided.

        Raises:
            StorageError: `journal_full`: there is none; what is written already, and what was reserved, is not touched.
            JournalError: as `commit`.
        """
        with self._lock:
            self._check_usable()
            self._reserve()

    def close(self) -> None:
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._poisoned = self._poisoned or "closed"
                os.close(self._fd)
                os.close(self._lock_fd)

    def _check_usable(self) -> None:
        if self._poisoned is not None:
            raise JournalError(f"journal {self.path.name}: {self._poisoned}", code="journal_poisoned")

    def _append(self, records: tuple[Record, ...]) -> None:
        state = self.state
        for record in records:
            state = apply(state, record)
        chunk = b"".join(_encode(record, self.newest_record + 1 + i) for i, record in enumerate(records))
        # Until the fsync has returned, whatever leaves this block leaves the file in an unknown state.
        self._poisoned = "a write was interrupted; the daemon must restart"
        try:
            _write_all(self._fd, chunk)
            self._fsync(self._fd)
        except OSError as exc:
            self._poisoned = f"a write failed ({exc.strerror}); the daemon must restart"
            raise JournalError(f"journal {self.path.name}: {self._poisoned}", code="journal_poisoned") from exc
        self._poisoned = None
        self.state = state
        self.newest_record += len(records)
        self._size += len(chunk)
        if self._allocated - self._size < RESERVE_BYTES // 2:
            with contextlib.suppress(StorageError):
                self._reserve()

    def _reserve(self) -> None:
        try:
            _allocate(self._fd, self._size, RESERVE_BYTES)
        except OSError as exc:
            raise StorageError(
                f"journal {self.path}: no space for what is to be decided ({exc.strerror})", code="journal_full"
            ) from exc
        self._allocated = self._size + RESERVE_BYTES

    def _rewrite(self, records: list[Record]) -> int:
        """Write the valid prefix to a new file, make it durable, and put it in the old one's place."""
        fresh = self.path.with_suffix(".new")
        with _io_errors(self.path), contextlib.ExitStack() as undo:
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
            undo.callback(os.close, fd)
            _write_all(fd, _encode_header(self.id))
            _write_all(fd, b"".join(_encode(record, i + 1) for i, record in enumerate(records)))
            self._fsync(fd)
            os.rename(fresh, self.path)
            sync_directory(self.path.parent, self._fsync)
            undo.pop_all()
        return fd


class AsyncJournal:
    """The journal for trio: every commit runs in a thread, one after the other, and is never abandoned half-way."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._limiter = trio.CapacityLimiter(1)

    @property
    def id(self) -> str:
        return self._journal.id

    @property
    def state(self) -> Ownership:
        return self._journal.state

    @property
    def newest_record(self) -> int:
        return self._journal.newest_record

    async def commit(self, event: Event) -> Decision:
        """As `Journal.commit`. Once begun it finishes, also when the caller is cancelled."""
        return await trio.to_thread.run_sync(self._journal.commit, event, limiter=self._limiter)

    async def reserve(self) -> None:
        """As `Journal.reserve`."""
        await trio.to_thread.run_sync(self._journal.reserve, limiter=self._limiter)

    def close(self) -> None:
        self._journal.close()


def sync_directory(directory: Path, fsync: Callable[[int], None] = os.fsync) -> None:
    """Make a creation or rename in *directory* durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fsync(fd)
    finally:
        os.close(fd)


def read_records(raw: bytes, name: str) -> tuple[str, list[Record]]:
    """The journal id and the records of a journal's bytes; an incomplete last record is dropped.

    Raises:
        JournalError: `journal_format` or `journal_corrupt`.
    """
    frames = _frames(raw, name)
    header = next(frames, None)
    if header is None:
        raise JournalError(f"journal {name}: it is empty or its header is torn", code="journal_corrupt")
    if header.get("format") != FORMAT or not isinstance(header.get("id"), str):
        raise JournalError(
            f"journal {name}: format {header.get('format')}, this release reads {FORMAT}", code="journal_format"
        )
    return header["id"], [from_plain(plain) for plain in frames]


def _frames(raw: bytes, name: str) -> Iterator[dict[str, Any]]:
    if raw[: len(MAGIC)] != MAGIC[: len(raw)]:
        raise JournalError(f"journal {name}: not a vmmigrate journal", code="journal_format")
    position, number = len(MAGIC), 0
    while len(raw) - position >= _PREFIX.size:
        length, written, body_crc, prefix_crc = _PREFIX.unpack_from(raw, position)
        prefix_ok = zlib.crc32(raw[position : position + _PREFIX.size - 4]) == prefix_crc
        if not prefix_ok or written != number or length > MAX_RECORD_BYTES:
            raise _corrupt(name, number, position)
        body = raw[position + _PREFIX.size : position + _PREFIX.size + length]
        if len(body) < length:
            return
        if zlib.crc32(body) != body_crc:
            raise _corrupt(name, number, position)
        yield _unpack_body(body, name, number, position)
        position += _PREFIX.size + length
        number += 1


def _unpack_body(body: bytes, name: str, number: int, position: int) -> dict[str, Any]:
    try:
        plain = msgpack.unpackb(body, raw=False, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException):
        raise _corrupt(name, number, position) from None
    if not isinstance(plain, dict):
        raise _corrupt(name, number, position)
    return plain


def _corrupt(name: str, number: int, position: int) -> JournalError:
    return JournalError(
        f"journal {name}: record {number} at byte {position} is damaged; the file is kept, nothing is decided from it",
        code="journal_corrupt",
    )


def _frame(plain: dict[str, Any], number: int) -> bytes:
    body: bytes = msgpack.packb(plain, use_bin_type=True)
    if len(body) > MAX_RECORD_BYTES:
        # The reader would take it for damage, and the whole journal with it.
        raise JournalError(
            f"journal record of {len(body)} bytes, at most {MAX_RECORD_BYTES} are allowed", code="record_too_large"
        )
    prefix = _PREFIX.pack(len(body), number, zlib.crc32(body), 0)[:-4]
    return prefix + zlib.crc32(prefix).to_bytes(4, "big") + body


def _encode(record: Record, number: int) -> bytes:
    return _frame(to_plain(record), number)


def _encode_header(journal_id: str) -> bytes:
    return MAGIC + _frame({"format": FORMAT, "id": journal_id}, 0)


def _read_or_create(path: Path) -> tuple[str, list[Record]]:
    with _io_errors(path):
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return secrets.token_hex(16), []
    return read_records(raw, path.name)


def _take_lock(path: Path) -> int:
    with _io_errors(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise JournalError(f"journal {path.stem}: another daemon has it open", code="journal_locked") from None
    return fd


def _allocate(fd: int, start: int, length: int) -> None:
    """Allocate space in a file without making it longer. Raises: OSError.

    Not `os.posix_fallocate`, which makes it longer: zeros behind the last record would be taken for damage. A file
    system that cannot allocate ahead is asked whether it has as much, which is the most that it can say.
    """
    code = errno.EINTR
    while code == errno.EINTR:
        if _fallocate(fd, _FALLOC_FL_KEEP_SIZE, start, length) == 0:
            return
        code = ctypes.get_errno()
    if code in {errno.EOPNOTSUPP, errno.ENOSYS}:
        space = os.fstatvfs(fd)
        if space.f_bavail * space.f_frsize >= length:
            return
        code = errno.ENOSPC
    raise OSError(code, os.strerror(code))


_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate64 if hasattr(_libc, "fallocate64") else _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def _write_all(fd: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(fd, view) :]


@contextlib.contextmanager
def _io_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise JournalError(f"journal {path}: {exc.strerror}", code="journal_io") from exc
