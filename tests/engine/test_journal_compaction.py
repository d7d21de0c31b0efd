"""Compaction of a journal file: what it says stays, its id and its numbers stay, and no step of it can do harm."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.disks.small import small_disk
from vmmigrate.engine import journal as journal_module
from vmmigrate.engine.journal import RESERVE_BYTES, AsyncJournal, Journal
from vmmigrate.engine.journal_format import read_contents
from vmmigrate.errors import JournalError, StorageError
from vmmigrate.ownership import records as r
from vmmigrate.ownership import rules
from vmmigrate.ownership.compaction import compacted
from vmmigrate.ownership.records import Epoch
from vmmigrate.ownership.state import Incoming

EPOCH = Epoch(1, 1)


class Crash(BaseException):
    """The process ends here."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    directory = tmp_path / "state"
    directory.mkdir()
    return directory / "journal.vmmj"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    with closing(Journal(path)) as opened:
        yield opened


def live(journal: Journal) -> None:
    """A history of which much can be forgotten, and a verdict that may not."""
    for number in range(40):
        journal.commit(rules.Create(f"vm{number % 4}"))
        journal.commit(rules.Remove(f"vm{number % 4}"))
    for number in range(20):
        migration = f"over-{number}"
        journal.commit(rules.Reserve(r.Reserved(migration, "vm", "host-a", "https://a")))
        journal.commit(rules.Refuse(migration, "no_handoff"))
    journal.commit(rules.Reserve(r.Reserved("m1", "vm", "host-a", "https://a")))
    journal.commit(rules.Prepare("m1", EPOCH, "running"))
    journal.commit(rules.Refuse("m1", "no_handoff"))


def test_a_compacted_journal_is_short_and_says_the_same(journal: Journal, path: Path) -> None:
    live(journal)
    before, size = journal.state, path.stat().st_size
    facts = (journal.id, journal.newest_record)

    assert journal.compact(remember_s=0)

    assert path.stat().st_size == journal.size_bytes < size / 5
    assert journal.state == compacted(before)
    assert (journal.id, journal.newest_record) == facts
    kept = read_contents(path.read_bytes(), path.name)
    assert (kept.id, kept.newest_record, kept.forgotten) == (*facts, journal.forgotten)


def test_records_go_on_after_a_compaction_and_all_is_read_again(path: Path) -> None:
    with closing(Journal(path)) as journal:
        live(journal)
        journal.compact(remember_s=0)
        journal.commit(rules.Create("later"))
        facts = (journal.id, journal.newest_record, journal.forgotten, journal.state)

    with closing(Journal(path)) as again:
        assert (again.id, again.newest_record, again.forgotten, again.state) == facts
        assert again.state.incoming["m1"].stage is Incoming.REFUSED
        again.commit(rules.Acknowledge("m1"))
        assert again.compact(remember_s=0)
    with closing(Journal(path)) as last:
        assert last.state.incoming == {}
        assert last.newest_record == facts[1] + 1


def test_there_is_nothing_to_forget_twice(journal: Journal, path: Path) -> None:
    live(journal)
    journal.compact(remember_s=0)
    before = path.read_bytes()

    assert not journal.compact(remember_s=0)

    assert path.read_bytes() == before


def test_what_was_touched_a_moment_ago_is_kept(journal: Journal) -> None:
    """Tasks that tidy up after a migration still ask the journal for it."""
    live(journal)
    journal.compact(remember_s=600)
    assert set(journal.state.incoming) == {*(f"over-{number}" for number in range(20)), "m1"}

    journal.compact(remember_s=0)

    assert set(journal.state.incoming) == {"m1"}


def test_a_journal_is_due_again_when_it_is_twice_as_long(journal: Journal) -> None:
    """Else one that has much to keep would be rewritten at every look at it."""
    assert not journal.is_due(1000)
    for number in range(100):
        journal.commit(rules.Create(f"vm{number}"))
    assert journal.is_due(1000)
    journal.compact(remember_s=0)
    assert not journal.is_due(1000)

    for number in range(100, 300):
        journal.commit(rules.Create(f"vm{number}"))

    assert journal.is_due(1000)


def test_a_journal_that_was_put_back_takes_another_id_and_says_the_same(path: Path) -> None:
    with closing(Journal(path)) as journal:
        live(journal)
        before, state, newest = journal.id, journal.state, journal.newest_record

        journal.renew_id()

        assert journal.id != before
        assert (journal.state, journal.newest_record) == (state, newest)
        journal.commit(rules.Create("later"))
        now = journal.id
    with closing(Journal(path)) as again:
        assert (again.id, again.newest_record) == (now, newest + 1)
        assert "later" in again.state.instances


def test_an_id_that_could_not_be_made_durable_is_not_taken(path: Path) -> None:
    disk = Disk()
    with closing(Journal(path, disk.fsync)) as journal:
        live(journal)
        before, disk.left = journal.id, 1

        with pytest.raises(StorageError):
            journal.renew_id()

        assert journal.id == before
        journal.commit(rules.Create("later"))
    with closing(Journal(path)) as again:
        assert again.id == before


# --------------------------------------------------------------------------- crashes


class Steps:
    """Counts what a compaction asks of the disk, and ends the process before one step, or after it.

    At that moment the directory is copied: what tidies up on the way out does not run in a process that is killed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path, copy: Path) -> None:
        self.names: list[str] = []
        self.dies_at: tuple[int, bool] | None = None
        self._path, self._copy = path, copy
        for owner, name in ((os, "open"), (os, "write"), (os, "rename"), (journal_module, "_fallocate")):
            monkeypatch.setattr(owner, name, self._wrapped(name, getattr(owner, name)))

    def fsync(self, fd: int) -> None:
        self._step("fsync", os.fsync, fd)

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._step(name, call, *args, **kwargs)

    def _step(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        number = len(self.names)
        self.names.append(name)
        if self.dies_at == (number, False):
            self._die()
        result = call(*args, **kwargs)
        if self.dies_at == (number, True):
            self._die()
        return result

    def _die(self) -> None:
        self.dies_at = None
        shutil.copytree(self._path.parent, self._copy)
        raise Crash


def after_a_host_crash(copy: Path, name: str, old: bytes, was_synced: bool) -> Iterator[tuple[str, Path]]:
    """What the next boot may find: as it was, or without what no fsync had reached."""
    yield "as it was", copy
    if (copy / "journal.new").exists():
        half = copy.with_name("half")
        shutil.copytree(copy, half)
        os.truncate(half / "journal.new", (half / "journal.new").stat().st_size // 2)
        yield "half of the new file", half
    if not was_synced:
        unnamed = copy.with_name("unnamed")
        shutil.copytree(copy, unnamed)
        (unnamed / name).write_bytes(old)
        yield "the rename undone", unnamed


# The last two are of the directory.
STEPS = ["open", "write", "_fallocate", "fsync", "rename", "open", "fsync"]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", range(len(STEPS)))
def test_a_crash_at_any_step_leaves_a_journal_that_says_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, after: bool
) -> None:
    with monkeypatch.context() as patch:
        steps = Steps(patch, path, tmp_path / "crashed")
        journal = Journal(path, steps.fsync)
        live(journal)
        before, old, begun = journal.state, path.read_bytes(), len(steps.names)
        names = slice(len(steps.names), len(steps.names) + number + 1)
        steps.dies_at = (begun + number, after)
        with pytest.raises(Crash):
            journal.compact(remember_s=0)
        assert steps.names[names] == STEPS[: number + 1]
        journal.close()

    was_synced = (number, after) == (len(STEPS) - 1, True)
    for what, copy in after_a_host_crash(tmp_path / "crashed", path.name, old, was_synced):
        with closing(Journal(copy / path.name)) as again:
            assert again.state in (before, compacted(before)), what
            assert (again.id, again.newest_record) == (journal.id, journal.newest_record), what
            assert again.state.incoming["m1"].stage is Incoming.REFUSED
            again.commit(rules.Create("later"))
            assert list(copy.glob("*.new")) == []


@pytest.mark.parametrize(("number", "goes_on"), [(0, True), (3, True), (4, False), (6, False)])
def test_an_interrupt_before_the_rename_poisons_nothing_and_after_it_everything(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, goes_on: bool
) -> None:
    """Until the rename the old journal goes on; then nobody can know which of the two the next daemon finds."""
    steps = Steps(monkeypatch, path, tmp_path / "copy")
    with closing(Journal(path, steps.fsync)) as journal:
        live(journal)
        steps.dies_at = (len(steps.names) + number, False)
        with pytest.raises(Crash):
            journal.compact(remember_s=0)

        if goes_on:
            journal.commit(rules.Create("later"))
            assert list(path.parent.glob("*.new")) == []
        else:
            with pytest.raises(JournalError, match="compaction was interrupted"):
                journal.commit(rules.Create("later"))


# --------------------------------------------------------------------------- disks


class Disk:
    """An fsync that fails at a count from the moment that a test sets it."""

    def __init__(self) -> None:
        self.left = -1

    def fsync(self, fd: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        os.fsync(fd)


def test_a_new_file_that_cannot_be_made_durable_is_dropped_and_the_old_one_goes_on(path: Path) -> None:
    disk = Disk()
    with closing(Journal(path, disk.fsync)) as journal:
        live(journal)
        before, disk.left = journal.state, 1

        with pytest.raises(StorageError) as failure:
            journal.compact(remember_s=0)

        assert failure.value.code == "journal_not_compacted"
        assert list(path.parent.glob("*.new")) == []
        assert journal.state == before
        journal.commit(rules.Create("later"))
    with closing(Journal(path)) as again:
        assert "later" in again.state.instances


def test_a_directory_that_cannot_be_made_durable_poisons(path: Path) -> None:
    """It decides which file is there after a power cut: a record that is written before may be in the other one."""
    disk = Disk()
    with closing(Journal(path, disk.fsync)) as journal:
        live(journal)
        disk.left = 2

        with pytest.raises(JournalError, match="compaction failed"):
            journal.compact(remember_s=0)
        with pytest.raises(JournalError) as poisoned:
            journal.commit(rules.Create("later"))

        assert poisoned.value.code == "journal_poisoned"
    with closing(Journal(path)) as again:
        assert again.state.incoming["m1"].stage is Incoming.REFUSED
        assert "later" not in again.state.instances


def test_a_disk_without_room_for_a_second_file_keeps_the_first_and_its_reserve(tmp_path: Path) -> None:
    """What was promised is not given up for a shorter file."""
    with small_disk(tmp_path / "disk", 1024) as disk, closing(Journal(disk.root / "journal")) as journal:
        live(journal)
        journal.reserve()
        disk.fill(leave_bytes=65536)

        with pytest.raises(StorageError) as refusal:
            journal.compact(remember_s=0)

        assert refusal.value.code == "journal_not_compacted"
        assert "No space left" in refusal.value.text
        disk.fill()
        for number in range(500):
            journal.commit(rules.Create(f"instance-{number}"))
        disk.free()
        assert journal.compact(remember_s=0)


def test_a_compacted_journal_has_room_ahead(journal: Journal, path: Path) -> None:
    live(journal)

    journal.compact(remember_s=0)

    assert path.stat().st_blocks * 512 >= journal.size_bytes + RESERVE_BYTES


def test_a_record_that_could_not_be_read_back_keeps_the_journal_as_it_is(
    journal: Journal, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live(journal)
    before = path.read_bytes()
    monkeypatch.setattr("vmmigrate.engine.journal_format.MAX_RECORD_BYTES", 10)

    with pytest.raises(StorageError, match="not compacted"):
        journal.compact(remember_s=0)

    assert path.read_bytes() == before


def test_a_closed_journal_is_not_compacted(journal: Journal) -> None:
    live(journal)
    journal.close()

    with pytest.raises(JournalError, match="closed"):
        journal.compact(remember_s=0)


async def test_it_is_compacted_in_a_thread_between_commits(path: Path) -> None:
    raw = Journal(path)
    live(raw)
    journal = AsyncJournal(raw)
    assert journal.is_due(1000)

    assert await journal.compact(0)

    assert not journal.is_due(1000)
    await journal.commit(rules.Create("later"))
    journal.close()
