"""The ownership journal: append, fsync, and only then act.

One file, one writer; `journal_format` has its bytes. A journal that is damaged is kept as it is, and nothing is decided
from it.

- At every open the valid prefix is rewritten to a new file and fsynced (file and directory) before any record is acted
  upon: after a failed fsync the page cache may show records that the disk does not have.
- A failed write or fsync poisons the journal: no further record, no verdict; the daemon must exit.
- Space for the records to come is allocated ahead (`reserve`), so that a disk that fills up while a guest is being
  given away refuses the next migration instead of poisoning the journal in the middle of this one.
- A compaction writes what has to be kept to a new file, with room ahead, and makes it durable; only then it takes the
  old one's place. Until the rename a crash or a failure leaves the old journal, and after it both say the same.

Source: Rebello et al., "Can applications recover from fsync failures?" (USENIX ATC 2020); ownership rules 3 and 4.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import trio

from vmmigrate.engine.journal_format import Contents, encode, encode_records, read_contents
from vmmigrate.errors import JournalError, StorageError
from vmmigrate.ownership.compaction import compacted, snapshot
from vmmigrate.ownership.records import Record, Spawned
from vmmigrate.ownership.rules import Decision, Event, decide
from vmmigrate.ownership.state import Ownership, apply
from vmmigrate.ram.forecast import Typical

# What is kept allocated beyond the end: the records of some hundred migrations that are all about to be decided.
RESERVE_BYTES = 256 << 10
_FALLOC_FL_KEEP_SIZE = 1


class Journal:
    """An open journal. Blocking; `commit` is the one way in, and is safe from several threads.

    Attributes:
        id: Random, made with the file, and anew when the file turns out to be an older copy; a host whose journal id
            changed decides nothing for open migrations.
        state: What all records so far add up to.
        newest_record: Number of the last durable record; a compaction does not change it.
        forgotten: How many of them a compaction has dropped.
        size_bytes: Of the file.
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
            contents = _read_or_create(path)
            self.id = contents.id
            self.state = Ownership()
            for record in contents.records:
                self.state = apply(self.state, record)
            self.newest_record, self.forgotten = contents.newest_record, contents.forgotten
            self._touched: dict[str, float] = {}
            with _io_errors(path):
                self._fd, self.size_bytes = self._write_fresh(contents.forgotten, contents.records)
                self._put_in_place(self._fd)
            self._compacted_bytes = 0
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

    def is_due(self, limit_bytes: int) -> bool:
        """Whether it is longer than that, and twice as long as the last compaction could make it."""
        return self.size_bytes > max(limit_bytes, 2 * self._compacted_bytes)

    def compact(self, remember_s: float, gone: Collection[Spawned] = ()) -> bool:
        """Forget what no rule asks for any more. False: there was nothing to forget.

        Args:
            remember_s: Migrations of which a record was written since are kept, whatever they are.
            gone: Processes that are known not to exist any more.

        Raises:
            StorageError: `journal_not_compacted`: the journal is as it was, and goes on.
            JournalError: as `commit`.
        """
        with self._lock:
            self._check_usable()
            since = time.monotonic() - remember_s
            self._touched = {name: at for name, at in self._touched.items() if at > since}
            state = compacted(self.state, self._touched.keys(), gone)
            records = snapshot(state)
            forgotten = self.newest_record - len(records)
            is_shorter = forgotten > self.forgotten
            if is_shorter:
                self._replace(forgotten, records)
                self.state, self.forgotten = state, forgotten
            self._compacted_bytes = self.size_bytes
            return is_shorter

    def renew_id(self) -> None:
        """Take another id: this file is an older copy that was put back, and what it was asked for before must not be
        answered by it.

        Raises: StorageError, JournalError: as `compact`.
        """
        with self._lock:
            self._check_usable()
            records = snapshot(self.state)
            before, self.id = self.id, secrets.token_hex(16)
            try:
                self._replace(self.newest_record - len(records), records)
            except BaseException:
                self.id = before
                raise
            self.forgotten = self.newest_record - len(records)

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
        chunk = encode_records(records, self.newest_record + 1)
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
        self.size_bytes += len(chunk)
        now = time.monotonic()
        self._touched |= {name: now for record in records if (name := getattr(record, "migration", None)) is not None}
        if self._allocated - self.size_bytes < RESERVE_BYTES // 2:
            with contextlib.suppress(StorageError):
                self._reserve()

    def _reserve(self) -> None:
        try:
            _allocate(self._fd, self.size_bytes, RESERVE_BYTES)
        except OSError as exc:
            raise StorageError(
                f"journal {self.path}: no space for what is to be decided ({exc.strerror})", code="journal_full"
            ) from exc
        self._allocated = self.size_bytes + RESERVE_BYTES

    def _replace(self, forgotten: int, records: tuple[Record, ...]) -> None:
        """Put a new file with *records* in the place of this one, with as much room ahead as it had."""
        try:
            fd, size_bytes = self._write_fresh(forgotten, records, RESERVE_BYTES)
        except (OSError, JournalError) as exc:
            raise StorageError(f"journal {self.path}: not compacted ({exc})", code="journal_not_compacted") from exc
        # From the rename on, what leaves this block leaves it open which file the next daemon will find.
        self._poisoned = "a compaction was interrupted; the daemon must restart"
        try:
            self._put_in_place(fd)
        except OSError as exc:
            self._poisoned = f"a compaction failed ({exc.strerror}); the daemon must restart"
            raise JournalError(f"journal {self.path.name}: {self._poisoned}", code="journal_poisoned") from exc
        os.close(self._fd)
        self._fd, self.size_bytes, self._allocated = fd, size_bytes, size_bytes + RESERVE_BYTES
        self._poisoned = None

    def _write_fresh(self, forgotten: int, records: tuple[Record, ...], room_bytes: int = 0) -> tuple[int, int]:
        """A new file beside the journal, durable but not in its place: its descriptor and size. Raises: OSError."""
        fresh, text = self._fresh_path(), encode(self.id, forgotten, records)
        with contextlib.ExitStack() as undo:
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
            undo.callback(os.close, fd)
            undo.callback(fresh.unlink)
            _write_all(fd, text)
            if room_bytes:
                _allocate(fd, len(text), room_bytes)
            self._fsync(fd)
            undo.pop_all()
        return fd, len(text)

    def _put_in_place(self, fd: int) -> None:
        """The new file is the journal. Raises: OSError; *fd* is then closed."""
        try:
            os.rename(self._fresh_path(), self.path)
            sync_directory(self.path.parent, self._fsync)
        except BaseException:
            os.close(fd)
            raise

    def _fresh_path(self) -> Path:
        return self.path.with_suffix(".new")


class AsyncJournal:
    """The journal for trio: every commit runs in a thread, one after the other, and is never abandoned half-way.

    Attributes:
        write_s: What a commit takes, with the wait for its turn: a part of every pause.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._limiter = trio.CapacityLimiter(1)
        self.write_s = Typical()

    @property
    def id(self) -> str:
        return self._journal.id

    @property
    def state(self) -> Ownership:
        return self._journal.state

    @property
    def newest_record(self) -> int:
        return self._journal.newest_record

    @property
    def size_bytes(self) -> int:
        return self._journal.size_bytes

    @property
    def forgotten(self) -> int:
        return self._journal.forgotten

    @property
    def position(self) -> tuple[str, int]:
        """The journal's id and the number of its newest record: what a guest is told."""
        return self._journal.id, self._journal.newest_record

    def is_due(self, limit_bytes: int) -> bool:
        """As `Journal.is_due`."""
        return self._journal.is_due(limit_bytes)

    async def commit(self, event: Event) -> Decision:
        """As `Journal.commit`. Once begun it finishes, also when the caller is cancelled."""
        begun = trio.current_time()
        decision = await trio.to_thread.run_sync(self._journal.commit, event, limiter=self._limiter)
        if decision.records:
            self.write_s.note(trio.current_time() - begun)
        return decision

    async def reserve(self) -> None:
        """As `Journal.reserve`."""
        await trio.to_thread.run_sync(self._journal.reserve, limiter=self._limiter)

    async def renew_id(self) -> None:
        """As `Journal.renew_id`."""
        await trio.to_thread.run_sync(self._journal.renew_id, limiter=self._limiter)

    async def compact(self, remember_s: float, gone: Collection[Spawned] = ()) -> bool:
        """As `Journal.compact`."""
        return await trio.to_thread.run_sync(self._journal.compact, remember_s, gone, limiter=self._limiter)

    def close(self) -> None:
        self._journal.close()


def sync_directory(directory: Path, fsync: Callable[[int], None] = os.fsync) -> None:
    """Make a creation or rename in *directory* durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fsync(fd)
    finally:
        os.close(fd)


def _read_or_create(path: Path) -> Contents:
    with _io_errors(path):
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return Contents(secrets.token_hex(16), 0, (), 0)
    return read_contents(raw, path.name)


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
