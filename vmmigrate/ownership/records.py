"""What a journal says. Each record is a fact that was durable before anybody acted upon it.

An **epoch** is (term, n), compared in that order; exactly one host holds the newest. A hand-over raises n by one,
taking back raises it by two (so that it never equals the epoch the destination might have acquired), an operator's
`resolve` raises the term.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from vmmigrate.errors import JournalError


class Epoch(NamedTuple):
    """(term, n): compared in that order."""

    term: int
    n: int

    def handed_over(self) -> Epoch:
        return Epoch(self.term, self.n + 1)

    def taken_back(self) -> Epoch:
        return Epoch(self.term, self.n + 2)

    def next_term(self) -> Epoch:
        return Epoch(self.term + 1, 0)


FIRST_EPOCH = Epoch(1, 1)
NO_EPOCH = Epoch(0, 0)  # below every other


# --------------------------------------------------------------------------- any host


@dataclass(frozen=True, slots=True)
class Created:
    """The instance was born here."""

    instance: str
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Spawned:
    """A guest process exists. pid and start time together are unique; `migration` is set while it is half built."""

    instance: str
    migration: str | None
    pid: int
    start_ticks: int
    socket: str


@dataclass(frozen=True, slots=True)
class Stopped:
    """The guest process is being ended on purpose; written before the process is touched."""

    instance: str


@dataclass(frozen=True, slots=True)
class Removed:
    """The instance was deleted (or its guest is lost and was cleared away)."""

    instance: str
    reason: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The guest process of the owner is gone: nobody has this guest any more."""

    instance: str
    reason: str


@dataclass(frozen=True, slots=True)
class Superseded:
    """An operator gave the instance a higher epoch elsewhere; nothing below it may run here, ever. The winner had
    given away `since`: every host that got the instance after that has to know."""

    instance: str
    epoch: Epoch
    since: Epoch = NO_EPOCH


@dataclass(frozen=True, slots=True)
class Yielded:
    """The winner of `epoch` runs the guest; the superseded one, kept here until now, is being ended."""

    instance: str
    epoch: Epoch


# --------------------------------------------------------------------------- source


@dataclass(frozen=True, slots=True)
class TicketIssued:
    """migrate-out: M exists, awaiting its peer. The ticket stands here as a hash only."""

    migration: str
    instance: str
    destination_host: str
    ticket_hash: str
    expires_at_s: int


@dataclass(frozen=True, slots=True)
class TicketConsumed:
    """The destination came; nobody can use this ticket again."""

    migration: str


@dataclass(frozen=True, slots=True)
class Pausing:
    """About to pause for M; `desired` tells a migration's pause from an operator's after a restart."""

    migration: str
    desired: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """The attempt ended before `released`; the guest is as it was."""

    migration: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The attempt ended at the source before anything was paused."""

    migration: str
    code: str


@dataclass(frozen=True, slots=True)
class Released:
    """Epoch N of the instance was given away for M. From here the source is in doubt until evidence comes."""

    migration: str
    epoch: Epoch
    destination_host: str
    destination_journal: str
    destination_url: str


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """The destination durably refused or returned; the source holds N+2."""

    migration: str
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Freed:
    """The destination runs the guest at N+1: the tombstone."""

    migration: str
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Resolved:
    """An operator gave the instance back to its source, which was in doubt about M, under a higher term. The text
    tells how it was known that nobody else runs the guest; it stays here for the audit."""

    migration: str
    epoch: Epoch
    fencing_proof: str


@dataclass(frozen=True, slots=True)
class Notified:
    """The destination of M has durably acknowledged that *epoch* supersedes what it got."""

    migration: str
    epoch: Epoch


# --------------------------------------------------------------------------- destination


@dataclass(frozen=True, slots=True)
class Reserved:
    """migrate-in: resources are kept for M, bound to one source host."""

    migration: str
    instance: str
    source_host: str
    source_url: str


@dataclass(frozen=True, slots=True)
class Abandoned:
    """The attempt ended here before `prepared`; nothing was promised, nothing is left."""

    migration: str
    code: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything is imported and checked; from here a verdict on M will be given exactly once."""

    migration: str
    epoch: Epoch
    run_state: str


@dataclass(frozen=True, slots=True)
class Acquired:
    """First verdict, yes: this host holds N+1, and has not run the guest yet."""

    migration: str
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Refused:
    """First verdict, no: this host will never run the guest for M."""

    migration: str
    code: str


@dataclass(frozen=True, slots=True)
class Started:
    """Second verdict, yes: the point of no return, before the first vCPU instruction."""

    migration: str
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Returned:
    """Second verdict, no: everything is closed again; the source may take N+2."""

    migration: str
    code: str


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The source knows the verdict on M; compaction may forget it."""

    migration: str


# --------------------------------------------------------------------------- what a compaction leaves


@dataclass(frozen=True, slots=True)
class KeptInstance:
    """An instance as it was when the journal was compacted; `holding` as in `state.Holding`."""

    instance: str
    epoch: Epoch
    holding: str
    last_migration: str | None
    guest: Spawned | None


@dataclass(frozen=True, slots=True)
class KeptOutgoing:
    """A migration at its source as it was; `stage` as in `state.Outgoing`."""

    ticket: TicketIssued
    stage: str
    desired: str | None
    released: Released | None
    resolved: Resolved | None
    notified: Epoch | None
    code: str | None


@dataclass(frozen=True, slots=True)
class KeptIncoming:
    """A migration at its destination as it was, with its verdict; `stage` as in `state.Incoming`."""

    reserved: Reserved
    stage: str
    guest: Spawned | None
    prepared: Prepared | None
    code: str | None
    acknowledged: bool


@dataclass(frozen=True, slots=True)
class KeptLeftover:
    """A guest process that nobody owns and that may still be there."""

    guest: Spawned


Record = (
    Created
    | Spawned
    | Stopped
    | Removed
    | Lost
    | Superseded
    | Yielded
    | TicketIssued
    | TicketConsumed
    | Pausing
    | Resumed
    | Ended
    | Released
    | Reclaimed
    | Freed
    | Resolved
    | Notified
    | Reserved
    | Abandoned
    | Prepared
    | Acquired
    | Refused
    | Started
    | Returned
    | Acknowledged
    | KeptInstance
    | KeptOutgoing
    | KeptIncoming
    | KeptLeftover
)

# Names as they stand in journals: never rename, never re-use.
RECORD_TYPES: Mapping[str, type[Record]] = {
    "created": Created,
    "spawned": Spawned,
    "stopped": Stopped,
    "removed": Removed,
    "lost": Lost,
    "superseded": Superseded,
    "ticket_issued": TicketIssued,
    "ticket_consumed": TicketConsumed,
    "pausing": Pausing,
    "resumed": Resumed,
    "ended": Ended,
    "released": Released,
    "reclaimed": Reclaimed,
    "freed": Freed,
    "reserved": Reserved,
    "abandoned": Abandoned,
    "prepared": Prepared,
    "acquired": Acquired,
    "refused": Refused,
    "started": Started,
    "returned": Returned,
    "acknowledged": Acknowledged,
    "resolved": Resolved,
    "notified": Notified,
    "yielded": Yielded,
    "kept_instance": KeptInstance,
    "kept_outgoing": KeptOutgoing,
    "kept_incoming": KeptIncoming,
    "kept_leftover": KeptLeftover,
}
RECORD_NAMES: Mapping[type[Record], str] = {cls: name for name, cls in RECORD_TYPES.items()}

# Records that may stand inside of others; none of them holds another one.
_INNER: Mapping[str, str] = {
    cls.__name__: RECORD_NAMES[cls] for cls in (Spawned, TicketIssued, Released, Resolved, Reserved, Prepared)
}


def to_plain(record: Record) -> dict[str, Any]:
    """The record as a map of plain values, its name under `record`."""
    plain: dict[str, Any] = {"record": RECORD_NAMES[type(record)]}
    for field in fields(record):
        plain[field.name] = _plain(getattr(record, field.name))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Epoch):
        return list(value)
    return to_plain(value) if type(value) in RECORD_NAMES else value


def from_plain(plain: Mapping[str, Any]) -> Record:
    """The record of a plain map.

    Raises:
        JournalError: `unknown_record`, or fields that are missing, unknown or of the wrong type. A record that this
            release does not know must not be skipped: it may be a verdict.
    """
    values = dict(plain)
    name = values.pop("record", None)
    cls = RECORD_TYPES.get(name) if isinstance(name, str) else None
    if cls is None:
        raise JournalError(f"unknown record {name!r}: written by a newer release?", code="unknown_record")
    if values.keys() != {field.name for field in fields(cls)}:
        raise JournalError(f"record {name}: fields {sorted(values)} are not those of this release", code="bad_record")
    return cls(**{field.name: _checked(name, field.name, field.type, values[field.name]) for field in fields(cls)})


def _checked(record: Any, field: str, declared: Any, value: Any) -> Any:
    wanted, optional, _ = declared.partition(" | ")
    if value is None and optional:
        return None
    if wanted == "Epoch":
        if isinstance(value, list) and len(value) == 2 and all(type(part) is int for part in value):
            return Epoch(*value)
    elif wanted in _INNER:
        if isinstance(value, dict) and value.get("record") == _INNER[wanted]:
            return from_plain(value)
    elif type(value).__name__ == wanted:
        return value
    raise JournalError(f"record {record}: field {field} is {value!r}, expected {declared}", code="bad_record")
