"""`vmmigrate journal`: what an operator learns from a journal's file, whatever has become of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Commands, Done
from tests.cli.schema import contract, misfits
from vmmigrate.cli.exits import Exit
from vmmigrate.engine.journal import Journal
from vmmigrate.engine.journal_format import encode_records
from vmmigrate.ownership import records as r
from vmmigrate.ownership import rules
from vmmigrate.ownership.records import Epoch

TICKET = "a-hash-that-is-nobody's-business"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A journal of six records."""
    path = tmp_path / "journal.vmmj"
    journal = Journal(path)
    for event in (
        rules.Create("vm1"),
        rules.Spawn(r.Spawned("vm1", None, 12, 34, "/run/vm1.sock")),
        rules.IssueTicket(r.TicketIssued("m1", "vm1", "beta", TICKET, 60)),
        rules.Reserve(r.Reserved("m2", "vm2", "gamma", "https://gamma")),
        rules.Prepare("m2", Epoch(1, 1), "running"),
        rules.Refuse("m2", "\u001b[31mred"),
    ):
        journal.commit(event)
    journal.close()
    return path


def fits(done: Done, name: str) -> Any:
    document = done.document
    assert list(misfits(contract(f"journal-{name}", "document"), document)) == []
    return document


@pytest.mark.parametrize("command", ["show", "check"])
def test_a_sound_journal_is_told_so_and_not_touched(run: Commands, file: Path, command: str) -> None:
    before = file.read_bytes(), sorted(path.name for path in file.parent.iterdir())

    done = run("journal", command, file, "-o", "json")

    assert done.code == Exit.OK
    document = fits(done, command)
    assert (document["ok"], document["newest_record"], document["torn_bytes"]) == (True, 6, 0)
    assert (file.read_bytes(), sorted(path.name for path in file.parent.iterdir())) == before


def test_show_tells_what_the_records_add_up_to_and_each_of_them(run: Commands, file: Path) -> None:
    document = fits(run("journal", "show", file, "-o", "json"), "show")

    assert document["instances"] == [
        {"instance": "vm1", "holding": "held", "epoch": [1, 1], "last_migration": None, "pid": 12}
    ]
    assert [(m["migration"], m["role"], m["peer"], m["stage"], m["acknowledged"]) for m in document["migrations"]] == [
        ("m1", "source", "beta", "awaiting_peer", None),
        ("m2", "destination", "gamma", "refused", False),
    ]
    assert [(line["number"], line["record"]) for line in document["records"]] == list(
        enumerate(["created", "spawned", "ticket_issued", "reserved", "prepared", "refused"], start=1)
    )


def test_for_people_it_shows_the_same_without_secrets_and_without_commands_to_the_terminal(
    run: Commands, file: Path
) -> None:
    done = run("journal", "show", file)

    assert done.code == Exit.OK
    for told in ("vm1", "held", "1.1", "awaiting_peer", "gamma", "ticket_issued", "/run/vm1.sock"):
        assert told in done.out
    assert TICKET not in done.out + run("journal", "show", file, "-o", "json").out
    assert "\u001b" not in done.out
    assert "ok             true" in run("journal", "check", file).out


def test_a_journal_in_use_is_read(run: Commands, file: Path) -> None:
    journal = Journal(file)
    try:
        done = run("journal", "check", file, "-o", "json")
        journal.commit(rules.Create("later"))
    finally:
        journal.close()

    assert (done.code, done.document["newest_record"]) == (Exit.OK, 6)
    assert done.document["journal_id"] == journal.id


def test_a_compacted_journal_keeps_its_numbers(run: Commands, file: Path) -> None:
    journal = Journal(file)
    assert journal.compact(remember_s=0)
    journal.commit(rules.Create("later"))
    journal.close()

    document = fits(run("journal", "show", file, "-o", "json"), "show")

    assert document["forgotten"] == 6 - 3
    assert [line["number"] for line in document["records"]] == [4, 5, 6, 7]
    assert [line["record"] for line in document["records"]] == [
        "kept_instance",
        "kept_outgoing",
        "kept_incoming",
        "created",
    ]
    assert TICKET not in run("journal", "show", file, "-o", "json").out


def test_a_torn_tail_is_told_and_is_no_damage(run: Commands, file: Path) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[:-1])

    done = run("journal", "check", file, "-o", "json")

    assert done.code == Exit.OK
    document = fits(done, "check")
    assert (document["ok"], document["newest_record"]) == (True, 5)
    assert document["torn_bytes"] > 0


def flipped(raw: bytes) -> bytes:
    return raw[:-1] + bytes([raw[-1] ^ 1])


def illegal(raw: bytes) -> bytes:
    return raw + encode_records((r.Acquired("m2", Epoch(1, 2)),), 7)


@pytest.mark.parametrize(
    ("damage", "code", "readable"), [(flipped, "journal_corrupt", 5), (illegal, "illegal_record", 7)]
)
def test_of_a_damaged_journal_it_shows_what_stands_before_the_damage(
    run: Commands, file: Path, damage: Callable[[bytes], bytes], code: str, readable: int
) -> None:
    file.write_bytes(damage(file.read_bytes()))

    for command in ("check", "show"):
        done = run("journal", command, file, "-o", "json")
        assert done.code == Exit.FAILED
        document = fits(done, command)
        assert (document["ok"], document["problem"]["code"]) == (False, code)
    assert len(document["records"]) == readable
    assert document["instances"][0]["instance"] == "vm1"
    told = run("journal", "show", file)
    assert told.code == Exit.FAILED
    assert told.complaint == document["problem"]["message"]


@pytest.mark.parametrize(("raw", "code"), [(b"", "journal_corrupt"), (b"ELF", "journal_format")])
def test_a_file_that_is_no_journal_is_one_line(run: Commands, tmp_path: Path, raw: bytes, code: str) -> None:
    file = tmp_path / "other"
    file.write_bytes(raw)

    done = run("journal", "check", file)
    as_json = run("journal", "show", file, "-o", "json")

    assert (done.code, as_json.code) == (Exit.FAILED, Exit.FAILED)
    assert done.complaint
    assert as_json.document["error"]["code"] == code
