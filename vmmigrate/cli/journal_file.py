"""A journal's file for people: what is printed of it. Reads only, so that it may be used while a daemon writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from vmmigrate.engine.journal_format import FORMAT, Contents, survey
from vmmigrate.errors import JournalError, UsageError, VmMigrateError
from vmmigrate.ownership.records import Record, to_plain
from vmmigrate.ownership.state import Ownership, apply

_HIDDEN: Final = frozenset({"ticket_hash"})


def journal_check(file: Path) -> dict[str, Any]:
    """Whether a daemon could start with it. Raises: UsageError; JournalError: not even its header can be read."""
    contents, _, problem = _read(file)
    return _facts(file, contents, problem)


def journal_show(file: Path) -> dict[str, Any]:
    """As `journal_check`, with what its records say and add up to, as far as they can be read."""
    contents, state, problem = _read(file)
    return {
        **_facts(file, contents, problem),
        "instances": list(_instances(state)),
        "migrations": [*_outgoing(state), *_incoming(state)],
        "superseded": [{"instance": name, "epoch": list(epoch)} for name, epoch in state.superseded.items()],
        "leftovers": [
            {"instance": guest.instance, "pid": guest.pid, "socket": guest.socket} for guest in state.leftovers
        ],
        "records": list(_records(contents)),
    }


def _read(file: Path) -> tuple[Contents, Ownership, VmMigrateError | None]:
    try:
        raw = file.read_bytes()
    except OSError as exc:
        raise UsageError(f"{file}: {exc.strerror}", code="bad_file") from None
    contents, problem = survey(raw, file.name)
    state, illegal = _folded(contents.records)
    return contents, state, illegal or problem


def _folded(records: Iterable[Record]) -> tuple[Ownership, JournalError | None]:
    state = Ownership()
    for record in records:
        try:
            state = apply(state, record)
        except JournalError as exc:
            return state, exc
    return state, None


def _facts(file: Path, contents: Contents, problem: VmMigrateError | None) -> dict[str, Any]:
    return {
        "ok": problem is None,
        "file": str(file),
        "format": FORMAT,
        "journal_id": contents.id,
        "newest_record": contents.newest_record,
        "forgotten": contents.forgotten,
        "torn_bytes": contents.torn_bytes,
        "problem": None if problem is None else {"code": problem.code, "message": problem.text},
    }


def _instances(state: Ownership) -> Iterator[dict[str, Any]]:
    for name, known in state.instances.items():
        yield {
            "instance": name,
            "holding": known.holding.value,
            "epoch": list(known.epoch),
            "last_migration": known.last_migration,
            "pid": known.guest.pid if known.guest else None,
        }


def _outgoing(state: Ownership) -> Iterator[dict[str, Any]]:
    for migration, out in state.outgoing.items():
        yield {
            "migration": migration,
            "instance": out.instance,
            "role": "source",
            "peer": out.ticket.destination_host,
            "stage": out.stage.value,
            "acknowledged": None,
        }


def _incoming(state: Ownership) -> Iterator[dict[str, Any]]:
    for migration, inc in state.incoming.items():
        yield {
            "migration": migration,
            "instance": inc.instance,
            "role": "destination",
            "peer": inc.reserved.source_host,
            "stage": inc.stage.value,
            "acknowledged": inc.acknowledged,
        }


def _records(contents: Contents) -> Iterator[dict[str, Any]]:
    for number, record in enumerate(contents.records, start=contents.forgotten + 1):
        fields = _shown(to_plain(record))
        yield {"number": number, "record": fields.pop("record"), "fields": fields}


def _shown(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Without what only proves something."""
    return {
        name: _shown(value) if isinstance(value, dict) else value
        for name, value in plain.items()
        if name not in _HIDDEN
    }
