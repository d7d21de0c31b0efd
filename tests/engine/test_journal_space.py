"""The journal on a disk that fills up: what was reserved can be written, what was not is refused before it matters."""

from __future__ import annotations

import errno
import os
from contextlib import closing
from pathlib import Path

import pytest

from tests.disks.small import small_disk
from vmmigrate.engine import journal as journal_module
from vmmigrate.engine.journal import RESERVE_BYTES, Journal
from vmmigrate.engine.journal_format import read_contents
from vmmigrate.errors import JournalError, StorageError
from vmmigrate.ownership import rules


def test_reserved_space_does_not_make_the_journal_longer(tmp_path: Path) -> None:
    """Zeros behind the last record would be damage."""
    path = tmp_path / "journal"
    with closing(Journal(path)) as journal:
        journal.commit(rules.Create("a"))
        size = path.stat().st_size

        journal.reserve()

        assert path.stat().st_size == size
        assert path.stat().st_blocks * 512 >= RESERVE_BYTES
        journal.commit(rules.Create("b"))
    assert len(read_contents(path.read_bytes(), "journal").records) == 2


def test_what_was_reserved_can_be_written_on_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1024) as disk, closing(Journal(disk.root / "journal")) as journal:
        journal.reserve()
        disk.fill()

        committed = 0
        while committed < 500:
            journal.commit(rules.Create(f"instance-{committed}"))
            committed += 1

        kept = read_contents((disk.root / "journal").read_bytes(), "journal").records
        assert len(kept) == 500


def test_a_full_disk_is_told_by_the_reservation_and_poisons_nothing(tmp_path: Path) -> None:
    """Whoever asks before he begins is refused; the verdicts of those who began are still written."""
    with small_disk(tmp_path / "disk", 1024) as disk, closing(Journal(disk.root / "journal")) as journal:
        disk.fill()
        for number in range(200):  # so that the next reservation needs another block
            journal.commit(rules.Create(f"instance-{number}"))

        with pytest.raises(StorageError) as refusal:
            journal.reserve()

        assert refusal.value.code == "journal_full"
        assert "No space left" in refusal.value.text
        journal.commit(rules.Create("b"))
        disk.free()
        journal.reserve()
        journal.commit(rules.Create("c"))


def test_a_disk_that_is_full_beyond_the_reserve_poisons_and_loses_nothing_acknowledged(tmp_path: Path) -> None:
    """What did not fit was never acknowledged; after the disk has space again, all that was is there."""
    with small_disk(tmp_path / "disk", 1024) as disk:
        path = disk.root / "journal"
        acknowledged: list[str] = []
        with closing(Journal(path)) as journal:
            disk.fill()
            with pytest.raises(JournalError) as failure:
                _create_until_it_fails(journal, acknowledged)
            with pytest.raises(JournalError) as again:
                journal.commit(rules.Create("later"))
        assert failure.value.code == again.value.code == "journal_poisoned"
        with pytest.raises(JournalError) as unopened:
            Journal(path)
        assert unopened.value.code == "journal_io"

        disk.free()

        with closing(Journal(path)) as reopened:
            assert list(reopened.state.instances)[: len(acknowledged)] == acknowledged
            assert len(reopened.state.instances) - len(acknowledged) in {0, 1}


def _create_until_it_fails(journal: Journal, acknowledged: list[str]) -> None:
    for number in range(100_000):
        journal.commit(rules.Create(f"instance-{number}"))
        acknowledged.append(f"instance-{number}")


def test_a_read_only_disk_is_one_clear_line_and_changes_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1024) as disk:
        path = disk.root / "journal"
        with closing(Journal(path)) as journal:
            journal.commit(rules.Create("a"))
        before = path.read_bytes()
        disk.remount("ro")

        with pytest.raises(JournalError) as refusal:
            Journal(path)

        assert refusal.value.code == "journal_io"
        assert "Read-only" in refusal.value.text
        assert path.read_bytes() == before


@pytest.mark.parametrize(("free_blocks", "fits"), [(1, False), (1 << 20, True)])
def test_a_file_system_that_cannot_allocate_ahead_is_asked_for_its_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_blocks: int, fits: bool
) -> None:
    def not_supported(fd: int, mode: int, start: int, length: int) -> int:
        journal_module.ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    fields = list(os.statvfs(tmp_path))
    fields[1], fields[4] = 4096, free_blocks
    with closing(Journal(tmp_path / "journal")) as journal:
        monkeypatch.setattr(journal_module, "_fallocate", not_supported)
        monkeypatch.setattr(os, "fstatvfs", lambda _: os.statvfs_result(fields))
        if fits:
            journal.reserve()
            return
        with pytest.raises(StorageError) as refusal:
            journal.reserve()

    assert refusal.value.code == "journal_full"


def test_an_allocation_that_a_signal_interrupted_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = [errno.EINTR, errno.EINTR, 0]

    def interrupted(fd: int, mode: int, start: int, length: int) -> int:
        code = codes.pop(0)
        journal_module.ctypes.set_errno(code)
        return -1 if code else 0

    with closing(Journal(tmp_path / "journal")) as journal:
        monkeypatch.setattr(journal_module, "_fallocate", interrupted)
        journal.reserve()

    assert codes == []


def test_a_poisoned_journal_reserves_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.close()

    with pytest.raises(JournalError) as refusal:
        journal.reserve()

    assert refusal.value.code == "journal_poisoned"
