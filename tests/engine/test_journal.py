"""The journal: what was acknowledged survives, what was not is never believed."""

from __future__ import annotations

import errno
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio

from vmmigrate.engine.journal import AsyncJournal, Journal, sync_directory
from vmmigrate.engine.journal_format import MAGIC, MAX_RECORD_BYTES, encode_records, frame, read_contents
from vmmigrate.errors import JournalError, RequestError
from vmmigrate.ownership import records as r
from vmmigrate.ownership import rules
from vmmigrate.ownership.records import Epoch, Record
from vmmigrate.ownership.rules import Decision, Event, OwnershipRefusal
from vmmigrate.ownership.state import Holding, Incoming

EPOCH = Epoch(1, 1)
RESERVED = r.Reserved("m1", "vm1", "host-a", "https://a")
PREPARE: tuple[Event, ...] = (rules.Reserve(RESERVED), rules.Prepare("m1", EPOCH, "running"))


class Disk:
    """An fsync that counts, and fails from the call on that a test names."""

    def __init__(self, fails_at: int | None = None, error: BaseException | None = None) -> None:
        self.calls = 0
        self.fails_at = fails_at
        self.error = error or OSError(errno.EIO, "Input/output error")

    def fsync(self, fd: int) -> None:
        os.fsync(fd)
        self.calls += 1
        if self.fails_at is not None and self.calls >= self.fails_at:
            raise self.error


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ownership.journal"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    with closing(Journal(path)) as opened:
        yield opened


def commit_all(journal: Journal, *events: Event) -> list[Record]:
    return [record for event in events for record in journal.commit(event).records]


def reread(path: Path) -> tuple[str, list[Record]]:
    return read_records(path.read_bytes(), path.name)


def read_records(raw: bytes, name: str) -> tuple[str, list[Record]]:
    contents = read_contents(raw, name)
    return contents.id, list(contents.records)


def written(path: Path) -> tuple[bytes, list[Record]]:
    """A journal of four records, closed: its bytes and what they say."""
    with closing(Journal(path)) as journal:
        records = commit_all(
            journal,
            rules.Create("vm2"),
            *PREPARE,
            rules.Refuse("m1", "no_handoff"),
        )
    assert len(records) == 4
    return path.read_bytes(), records


def refusal(act: Callable[[], object]) -> JournalError:
    with pytest.raises(JournalError) as caught:
        act()
    assert "\n" not in caught.value.text
    return caught.value


# --------------------------------------------------------------------------- durability


def test_what_was_committed_survives_a_reopen(path: Path) -> None:
    with closing(Journal(path)) as journal:
        records = commit_all(journal, rules.Create("vm2"), *PREPARE)
        before = (journal.id, journal.state, journal.newest_record)

    with closing(Journal(path)) as journal:
        assert (journal.id, journal.state, journal.newest_record) == before
        assert journal.state.incoming["m1"].stage is Incoming.PREPARED
        assert journal.newest_record == 3
        commit_all(journal, rules.Acquire("m1", EPOCH))

    assert reread(path)[1] == [*records, r.Acquired("m1", Epoch(1, 2))]


def test_a_commit_returns_only_after_its_fsync(path: Path) -> None:
    disk = Disk()
    with closing(Journal(path, disk.fsync)) as journal:
        opened = disk.calls
        assert opened == 2, "the new file and its directory, before any record is acted upon"

        for number, event in enumerate(PREPARE, start=1):
            journal.commit(event)
            assert disk.calls == opened + number


def test_all_records_of_one_decision_share_one_fsync(path: Path) -> None:
    """A ticket that replaces another: the end of the old one and the new one are one decision."""
    disk = Disk()
    with closing(Journal(path, disk.fsync)) as journal:
        journal.commit(rules.Create("vm1"))
        journal.commit(rules.Spawn(r.Spawned("vm1", None, 7, 1, "/run/7.sock")))
        for migration in ("m1", "m2"):
            before = disk.calls
            decision = journal.commit(rules.IssueTicket(r.TicketIssued(migration, "vm1", "b", "hash", 60)))
            assert disk.calls == before + 1

    assert [type(record) for record in decision.records] == [r.Ended, r.TicketIssued]


def test_two_journals_have_different_ids(tmp_path: Path) -> None:
    ids = set()
    for name in ("a.journal", "b.journal"):
        with closing(Journal(tmp_path / name)) as journal:
            ids.add(journal.id)

    assert len(ids) == 2


def test_a_lost_journal_comes_back_with_another_id(path: Path) -> None:
    """Design 4.2: a host whose id changed decides nothing for open migrations."""
    with closing(Journal(path)) as journal:
        lost = journal.id
    path.unlink()

    with closing(Journal(path)) as journal:
        assert journal.id != lost
        assert journal.newest_record == 0


# --------------------------------------------------------------------------- refusals


def test_a_refused_decision_writes_nothing(journal: Journal, path: Path) -> None:
    commit_all(journal, *PREPARE, rules.Refuse("m1", "settled"))
    before = path.read_bytes()

    with pytest.raises(OwnershipRefusal):
        journal.commit(rules.Acquire("m1", EPOCH))
    with pytest.raises(RequestError):
        journal.commit(rules.Stop("nobody"))
    assert journal.commit(rules.Refuse("m1", "again")) == Decision((), rules.Answer.REFUSED)

    assert path.read_bytes() == before
    assert journal.newest_record == 3
    journal.commit(rules.Create("vm2"))


def test_of_many_threads_exactly_one_gives_the_verdict(tmp_path: Path) -> None:
    """Rule 3: acquire and refuse are one conditional append; the losers stop before any effect."""
    for attempt in range(20):
        path = tmp_path / f"{attempt}.journal"
        with closing(Journal(path, lambda fd: None)) as journal:
            commit_all(journal, *PREPARE)
            start = threading.Barrier(6)
            won: list[Record] = []
            lost: list[Exception] = []

            def race(event: Event, start: threading.Barrier = start, journal: Journal = journal) -> None:
                start.wait(timeout=10)
                try:
                    won.extend(journal.commit(event).records)  # noqa: B023
                except OwnershipRefusal as exc:
                    lost.append(exc)  # noqa: B023

            events = [rules.Acquire("m1", EPOCH), rules.Refuse("m1", "late"), rules.Settle("m1", "host-a", False)] * 2
            threads = [threading.Thread(target=race, args=(event,)) for event in events]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(timeout=10)

        verdicts = [record for record in reread(path)[1] if isinstance(record, r.Acquired | r.Refused)]
        assert verdicts == won
        assert len(won) == 1
        assert all(isinstance(exc, OwnershipRefusal) and exc.code == "verdict_given" for exc in lost)
        assert len(lost) >= (1 if isinstance(won[0], r.Acquired) else 2)


# --------------------------------------------------------------------------- torn and damaged


def test_a_tail_torn_at_any_byte_is_dropped_and_never_an_earlier_record(path: Path) -> None:
    raw, records = written(path)
    shorter = path.with_name("shorter.journal")
    begins: dict[int, int] = {}
    for length in range(len(raw) + 1):
        try:
            begins.setdefault(len(read_records(raw[:length], "j")[1]), length)
        except JournalError:
            continue
    last = begins[4]
    assert last == len(raw)

    for length in range(begins[3], len(raw)):
        shorter.write_bytes(raw[:length])
        with closing(Journal(shorter)) as journal:
            assert journal.newest_record == 3
        assert reread(shorter)[1] == records[:3], f"cut at byte {length}"


def test_a_journal_cut_anywhere_says_a_prefix_or_nothing(path: Path) -> None:
    raw, records = written(path)

    for length in range(len(raw)):
        try:
            _, found = read_records(raw[:length], "j")
        except JournalError as exc:
            assert exc.code == "journal_corrupt"  # noqa: PT017  (only the header can be missing)
        else:
            assert found == records[: len(found)]


def test_records_go_on_after_a_torn_tail(path: Path) -> None:
    raw, records = written(path)
    path.write_bytes(raw[:-1])

    with closing(Journal(path)) as journal:
        journal.commit(rules.Acquire("m1", EPOCH))

    assert reread(path)[1] == [*records[:3], r.Acquired("m1", Epoch(1, 2))]


def test_every_flipped_byte_is_noticed_and_the_file_is_kept(path: Path) -> None:
    """Damage is not a torn tail: nothing is decided from it, and nothing is repaired away."""
    raw, _ = written(path)

    for at in range(len(raw)):
        for mask in (0x01, 0x80, 0xFF):
            damaged = bytearray(raw)
            damaged[at] ^= mask
            exc = refusal(lambda damaged=bytes(damaged): read_records(damaged, "j"))  # type: ignore[misc]
            assert exc.code in {"journal_corrupt", "journal_format"}, f"byte {at}"

    damaged = bytearray(raw)
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert "record 4 at byte" in refusal(lambda: Journal(path)).text
    assert path.read_bytes() == bytes(damaged)


def test_a_record_out_of_sequence_is_damage(path: Path) -> None:
    """A block of an older file, valid in itself, must not pass for the present."""
    raw, _ = written(path)
    first = next(n for n in range(len(raw)) if _count(raw[:n]) == 1)
    second = next(n for n in range(len(raw)) if _count(raw[:n]) == 2)

    assert refusal(lambda: read_records(raw[:second] + raw[first:second], "j")).code == "journal_corrupt"
    assert refusal(lambda: read_records(raw[:first] + raw[second:], "j")).code == "journal_corrupt"


def _count(raw: bytes) -> int:
    try:
        return len(read_records(raw, "j")[1])
    except JournalError:
        return -1


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "journal_corrupt"),
        (b"VM", "journal_corrupt"),
        (b"VMMJ", "journal_corrupt"),
        (b"PK\x03\x04", "journal_format"),
    ],
)
def test_a_file_that_is_no_journal_is_refused_and_kept(path: Path, raw: bytes, code: str) -> None:
    path.write_bytes(raw)

    exc = refusal(lambda: Journal(path))

    assert exc.code == code
    assert path.name in exc.text
    assert path.read_bytes() == raw


def test_a_history_that_the_rules_cannot_have_written_is_refused(path: Path) -> None:
    """Checksums hold, and still: `acquired` without `prepared` is no journal of ours."""
    with closing(Journal(path)) as journal:
        journal.commit(rules.Reserve(RESERVED))
        forged = path.read_bytes() + encode_records((r.Acquired("m1", Epoch(1, 2)),), 2)
    path.write_bytes(forged)

    assert refusal(lambda: Journal(path)).code == "illegal_record"
    assert path.read_bytes() == forged


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ({"format": 2, "id": "x", "forgotten": 0}, "journal_format"),
        ({"format": 1, "id": "x"}, "journal_format"),
        ({"format": 1, "id": 7, "forgotten": 0}, "journal_format"),
        ({"format": 1, "id": "x", "forgotten": True}, "journal_format"),
        ({"format": 1, "id": "x", "forgotten": -1}, "journal_format"),
        ([1, "x"], "journal_corrupt"),
    ],
)
def test_a_header_of_another_release_is_refused_and_the_file_kept(path: Path, header: Any, code: str) -> None:
    path.write_bytes(MAGIC + frame(header, 0))
    before = path.read_bytes()

    assert refusal(lambda: Journal(path)).code == code
    assert path.read_bytes() == before


def test_a_record_that_this_release_does_not_know_is_refused_never_skipped(path: Path) -> None:
    raw, _ = written(path)
    path.write_bytes(raw + frame({"record": "divorced", "instance": "vm1"}, 5))

    assert refusal(lambda: Journal(path)).code == "unknown_record"


def test_a_body_that_is_not_msgpack_is_damage_although_its_checksum_holds() -> None:
    body = b"\xc1"
    prefix = struct.pack("!IQI", len(body), 0, zlib.crc32(body))

    forged = MAGIC + prefix + zlib.crc32(prefix).to_bytes(4, "big") + body

    assert refusal(lambda: read_records(forged, "j")).code == "journal_corrupt"


# --------------------------------------------------------------------------- poison


def test_a_failed_fsync_poisons_the_journal(path: Path) -> None:
    disk = Disk(fails_at=4)
    with closing(Journal(path, disk.fsync)) as journal:
        journal.commit(PREPARE[0])

        assert refusal(lambda: journal.commit(PREPARE[1])).code == "journal_poisoned"

        assert journal.state.incoming["m1"].stage is Incoming.RESERVED, "nobody may act on it"
        disk.fails_at = None
        for event in (PREPARE[1], rules.Create("vm2"), rules.Stop("nobody")):
            assert refusal(lambda event=event: journal.commit(event)).code == "journal_poisoned"  # type: ignore[misc]
        assert journal.newest_record == 1


def test_a_failed_write_poisons_the_journal(path: Path) -> None:
    """/dev/full takes the place of the file: every write says ENOSPC."""
    with closing(Journal(path)) as journal:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, journal._fd)
        os.close(full)

        exc = refusal(lambda: journal.commit(PREPARE[0]))

        assert exc.code == "journal_poisoned"
        assert "No space left" in exc.text
        assert refusal(lambda: journal.commit(PREPARE[0])).code == "journal_poisoned"
    with closing(Journal(path)) as journal:
        assert journal.newest_record == 0


def test_an_interrupt_between_write_and_fsync_poisons_too(path: Path) -> None:
    """Or the next record would get the number of one that lies in the file already."""
    disk = Disk(fails_at=3, error=KeyboardInterrupt())
    with closing(Journal(path, disk.fsync)) as journal:
        with pytest.raises(KeyboardInterrupt):
            journal.commit(PREPARE[0])
        disk.fails_at = None

        assert refusal(lambda: journal.commit(PREPARE[0])).code == "journal_poisoned"


def test_a_poisoned_journal_can_be_opened_again_once_it_is_closed(path: Path) -> None:
    """The supervisor restarts the daemon; what the disk has, and only that, is believed."""
    disk = Disk(fails_at=3)
    with closing(Journal(path, disk.fsync)) as journal:
        refusal(lambda: journal.commit(PREPARE[0]))

    with closing(Journal(path)) as journal:
        assert journal.newest_record in {0, 1}
        assert reread(path)[1] == [RESERVED][: journal.newest_record]


@pytest.mark.parametrize("call", [1, 2], ids=["file", "directory"])
def test_an_fsync_that_fails_at_open_refuses_to_open(path: Path, call: int) -> None:
    _, records = written(path)
    disk = Disk(fails_at=call)

    exc = refusal(lambda: Journal(path, disk.fsync))

    assert (exc.code, "Input/output error" in exc.text) == ("journal_io", True)
    assert reread(path)[1] == records
    with closing(Journal(path)) as journal:
        assert journal.newest_record == 4


def test_a_record_that_could_not_be_read_back_is_not_written(journal: Journal, path: Path) -> None:
    """The reader takes a length above its cap for damage; one oversize text must not cost the whole journal."""
    before = path.read_bytes()

    exc = refusal(lambda: journal.commit(rules.Reserve(r.Reserved("m1", "vm1", "a", "x" * MAX_RECORD_BYTES))))

    assert exc.code == "record_too_large"
    assert path.read_bytes() == before
    commit_all(journal, *PREPARE)


# --------------------------------------------------------------------------- files


def test_a_second_opener_is_told_that_the_journal_is_in_use(journal: Journal, path: Path) -> None:
    assert refusal(lambda: Journal(path)).code == "journal_locked"
    journal.commit(rules.Create("vm1"))


def test_a_refused_open_leaves_the_journal_free(path: Path) -> None:
    raw, _ = written(path)
    path.write_bytes(raw[:-1] + b"\x00")
    refusal(lambda: Journal(path))

    path.write_bytes(raw)

    Journal(path).close()


def test_opening_leaves_no_second_file_and_closing_twice_is_fine(path: Path) -> None:
    written(path)
    left = path.with_suffix(".new")
    left.touch(0o600)
    left.write_bytes(b"by a crash")

    journal = Journal(path)
    journal.close()
    journal.close()

    assert sorted(entry.name for entry in path.parent.iterdir()) == ["ownership.journal", "ownership.lock"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_nothing_is_committed_after_close(path: Path) -> None:
    journal = Journal(path)
    journal.close()

    assert "closed" in refusal(lambda: journal.commit(rules.Create("vm1"))).text


def test_open_and_close_leak_no_descriptor(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    raw, _ = written(path)
    for damaged in (raw[:-1] + b"\x00", b""):
        path.write_bytes(damaged)
        refusal(lambda: Journal(path))

    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("kind", ["missing directory", "file as directory", "directory as file"])
def test_a_place_that_cannot_hold_a_journal_is_one_clear_line(tmp_path: Path, kind: str) -> None:
    path = {
        "missing directory": tmp_path / "none" / "x.journal",
        "file as directory": tmp_path / "file" / "x.journal",
        "directory as file": tmp_path / "x.journal",
    }[kind]
    (tmp_path / "file").write_text("")
    if kind == "directory as file":
        path.mkdir()

    exc = refusal(lambda: Journal(path))

    assert exc.code == "journal_io"
    assert str(path.with_suffix("")) in exc.text


def test_a_directory_is_synced_and_its_descriptor_closed(tmp_path: Path) -> None:
    seen: list[int] = []

    sync_directory(tmp_path, seen.append)

    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(seen[0])


# --------------------------------------------------------------------------- trio


async def test_a_commit_that_was_begun_finishes_although_its_caller_is_cancelled(path: Path) -> None:
    """Half a verdict is none: the caller is cancelled, the record is durable all the same."""
    entered, go_on = threading.Event(), threading.Event()

    def slow_fsync(fd: int) -> None:
        entered.set()
        assert go_on.wait(timeout=10)

    go_on.set()
    journal = AsyncJournal(Journal(path, slow_fsync))
    with closing(journal):
        await journal.commit(rules.Create("vm1"))
        entered.clear()
        go_on.clear()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(journal.commit, rules.Create("vm2"))
            await trio.to_thread.run_sync(entered.wait, 10)
            nursery.cancel_scope.cancel()
            go_on.set()

        assert journal.newest_record == 2
        assert journal.state.instances["vm2"].holding is Holding.HELD
        assert journal.id == reread(path)[0]
        assert len(reread(path)[1]) == 2


async def test_commits_of_many_tasks_are_numbered_one_after_the_other(path: Path) -> None:
    journal = AsyncJournal(Journal(path, lambda fd: None))
    with closing(journal):
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(journal.commit, rules.Create(f"vm{number}"))

    assert {record.instance for record in reread(path)[1] if isinstance(record, r.Created)} == {
        f"vm{number}" for number in range(20)
    }
