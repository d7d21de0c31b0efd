"""What the records of a journal add up to. `apply` is total over legal histories and refuses every other one.

Stages of a migration are tables, one per end. A record that its table does not know in the present stage cannot have
been written by the rules: the journal is corrupt, and nothing may be decided from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, TypeVar

from vmmigrate.errors import JournalError
from vmmigrate.ownership import records as r
from vmmigrate.ownership.records import NO_EPOCH, Epoch, Record

E = TypeVar("E", bound=StrEnum)


class Holding(StrEnum):
    """What this host is to an instance."""

    HELD = "held"  # the owner
    RELEASED = "released"  # gave it away for M; no evidence yet: in doubt
    ACQUIRED = "acquired"  # the owner that has not started it yet
    ELSEWHERE = "elsewhere"  # a tombstone
    LOST = "lost"  # was the owner; the guest is gone
    REMOVED = "removed"  # was the owner; deleted by an operator


class Outgoing(StrEnum):
    """Stages of M at its source."""

    AWAITING_PEER = "awaiting_peer"
    ACTIVE = "active"
    PAUSING = "pausing"
    RELEASED = "released"
    ENDED = "ended"
    RECLAIMED = "reclaimed"
    FREED = "freed"
    RESOLVED = "resolved"


class Incoming(StrEnum):
    """Stages of M at its destination."""

    RESERVED = "reserved"
    PREPARED = "prepared"
    ACQUIRED = "acquired"
    STARTED = "started"
    REFUSED = "refused"
    RETURNED = "returned"
    ABANDONED = "abandoned"


OUTGOING_STEPS: Mapping[tuple[Outgoing | None, type[Record]], Outgoing] = {
    (None, r.TicketIssued): Outgoing.AWAITING_PEER,
    (Outgoing.AWAITING_PEER, r.TicketConsumed): Outgoing.ACTIVE,
    (Outgoing.AWAITING_PEER, r.Ended): Outgoing.ENDED,
    (Outgoing.ACTIVE, r.Ended): Outgoing.ENDED,
    (Outgoing.ACTIVE, r.Pausing): Outgoing.PAUSING,
    (Outgoing.PAUSING, r.Resumed): Outgoing.ENDED,
    (Outgoing.PAUSING, r.Released): Outgoing.RELEASED,
    (Outgoing.RELEASED, r.Reclaimed): Outgoing.RECLAIMED,
    (Outgoing.RELEASED, r.Freed): Outgoing.FREED,
    (Outgoing.RELEASED, r.Resolved): Outgoing.RESOLVED,
}

INCOMING_STEPS: Mapping[tuple[Incoming | None, type[Record]], Incoming] = {
    (None, r.Reserved): Incoming.RESERVED,
    (Incoming.RESERVED, r.Abandoned): Incoming.ABANDONED,
    (Incoming.RESERVED, r.Prepared): Incoming.PREPARED,
    (Incoming.PREPARED, r.Acquired): Incoming.ACQUIRED,
    (Incoming.PREPARED, r.Refused): Incoming.REFUSED,
    (Incoming.ACQUIRED, r.Started): Incoming.STARTED,
    (Incoming.ACQUIRED, r.Returned): Incoming.RETURNED,
}

OPEN_OUTGOING = frozenset({Outgoing.AWAITING_PEER, Outgoing.ACTIVE, Outgoing.PAUSING, Outgoing.RELEASED})
# The destination may have got the guest: who supersedes it has to tell it.
GIVEN_AWAY = frozenset({Outgoing.RELEASED, Outgoing.FREED, Outgoing.RESOLVED})
OPEN_INCOMING = frozenset({Incoming.RESERVED, Incoming.PREPARED, Incoming.ACQUIRED})


@dataclass(frozen=True, slots=True)
class InstanceState:
    """One instance as this host's journal knows it.

    Attributes:
        epoch: The newest epoch that this host has seen for it.
        holding: What this host is to it.
        last_migration: The M of the last ownership record (None: it was created here).
        guest: Its process, while there is one.
    """

    instance: str
    epoch: Epoch
    holding: Holding
    last_migration: str | None = None
    guest: r.Spawned | None = None


@dataclass(frozen=True, slots=True)
class OutgoingState:
    """One migration at its source. `notified` is the highest epoch of which its destination knows that it
    supersedes what it got."""

    ticket: r.TicketIssued
    stage: Outgoing
    desired: str | None = None
    released: r.Released | None = None
    resolved: r.Resolved | None = None
    notified: Epoch | None = None
    code: str | None = None

    @property
    def instance(self) -> str:
        return self.ticket.instance


@dataclass(frozen=True, slots=True)
class IncomingState:
    """One migration at its destination."""

    reserved: r.Reserved
    stage: Incoming
    guest: r.Spawned | None = None
    prepared: r.Prepared | None = None
    code: str | None = None
    acknowledged: bool = False

    @property
    def instance(self) -> str:
        return self.reserved.instance


@dataclass(frozen=True, slots=True)
class Ownership:
    """Everything a journal says. Immutable: `apply` returns a new one.

    `leftovers` are guest processes that nobody owns any more. They were ended, or a daemon died just before it ended
    them: a restart makes sure.
    """

    instances: Mapping[str, InstanceState] = field(default_factory=dict)
    outgoing: Mapping[str, OutgoingState] = field(default_factory=dict)
    incoming: Mapping[str, IncomingState] = field(default_factory=dict)
    superseded: Mapping[str, Epoch] = field(default_factory=dict)
    superseded_since: Mapping[str, Epoch] = field(default_factory=dict)
    leftovers: tuple[r.Spawned, ...] = ()

    def open_outgoing(self, instance: str) -> str | None:
        """The M by which this host is giving *instance* away at present, or None."""
        return next(
            (m for m, out in self.outgoing.items() if out.instance == instance and out.stage in OPEN_OUTGOING), None
        )

    def open_incoming(self, instance: str) -> str | None:
        """The M by which this host is receiving *instance* at present, or None."""
        return next(
            (m for m, inc in self.incoming.items() if inc.instance == instance and inc.stage in OPEN_INCOMING), None
        )

    def may_run(self, instance: str, epoch: Epoch) -> bool:
        """Whether this host may run *instance* under *epoch*: vCPU start, disks for writing, NIC activation."""
        known = self.instances.get(instance)
        if known is None or known.epoch != epoch or known.holding not in {Holding.HELD, Holding.ACQUIRED}:
            return False
        return not self.is_superseded(instance, epoch)

    def is_superseded(self, instance: str, epoch: Epoch) -> bool:
        limit = self.superseded.get(instance)
        return limit is not None and epoch < limit


def apply(state: Ownership, record: Record) -> Ownership:
    """The state after *record*.

    Raises:
        JournalError: `illegal_record`: the rules can never have written this here.
    """
    return _APPLY[type(record)](state, record)


def _illegal(record: Record, why: str) -> JournalError:
    return JournalError(f"record {r.RECORD_NAMES[type(record)]} is illegal here: {why}", code="illegal_record")


def _with_instance(state: Ownership, known: InstanceState) -> Ownership:
    return replace(state, instances={**state.instances, known.instance: known})


def _known(state: Ownership, record: Any, *holdings: Holding) -> InstanceState:
    known = state.instances.get(record.instance)
    if known is None or known.holding not in holdings:
        raise _illegal(record, f"instance {record.instance} is {known.holding if known else 'unknown'}")
    return known


def _created(state: Ownership, record: r.Created) -> Ownership:
    known = state.instances.get(record.instance)
    if known is not None and (known.holding is not Holding.REMOVED or record.epoch <= known.epoch):
        raise _illegal(record, f"instance {record.instance} is {known.holding} at {tuple(known.epoch)}")
    return _with_instance(state, InstanceState(record.instance, record.epoch, Holding.HELD))


def _spawned(state: Ownership, record: r.Spawned) -> Ownership:
    if record.migration is None:
        return _with_instance(state, replace(_known(state, record, Holding.HELD), guest=record))
    incoming = state.incoming.get(record.migration)
    if incoming is None or incoming.stage is not Incoming.RESERVED:
        raise _illegal(record, f"migration {record.migration} is not reserved")
    return _with_incoming(state, record.migration, replace(incoming, guest=record))


def _leave(state: Ownership, guest: r.Spawned | None) -> Ownership:
    return state if guest is None else replace(state, leftovers=(*state.leftovers, guest))


def _without_guest(state: Ownership, known: InstanceState, holding: Holding) -> Ownership:
    return _with_instance(_leave(state, known.guest), replace(known, guest=None, holding=holding))


def _stopped(state: Ownership, record: r.Stopped) -> Ownership:
    known = _known(state, record, Holding.HELD, Holding.RELEASED)
    return _without_guest(state, known, known.holding)


def _removed(state: Ownership, record: r.Removed) -> Ownership:
    return _without_guest(state, _known(state, record, Holding.HELD, Holding.LOST), Holding.REMOVED)


def _lost(state: Ownership, record: r.Lost) -> Ownership:
    known = state.instances.get(record.instance)
    last = state.outgoing.get(known.last_migration or "") if known else None
    if known is not None and known.holding is Holding.LOST and last is not None and last.stage is Outgoing.RECLAIMED:
        return state  # written after `reclaimed` by an earlier release; that record says it alone now
    return _without_guest(state, _known(state, record, Holding.HELD), Holding.LOST)


def _superseded(state: Ownership, record: r.Superseded) -> Ownership:
    if record.epoch <= state.superseded.get(record.instance, NO_EPOCH):
        raise _illegal(record, "not above what superseded it before")
    return replace(
        state,
        superseded={**state.superseded, record.instance: record.epoch},
        superseded_since={**state.superseded_since, record.instance: record.since},
    )


def _yielded(state: Ownership, record: r.Yielded) -> Ownership:
    known = _known(state, record, Holding.HELD)
    if state.superseded.get(record.instance) != record.epoch or known.epoch >= record.epoch:
        raise _illegal(record, f"it does not supersede {tuple(known.epoch)}")
    return _without_guest(state, replace(known, epoch=record.epoch), Holding.ELSEWHERE)


# --------------------------------------------------------------------------- source


def _with_outgoing(state: Ownership, migration: str, outgoing: OutgoingState) -> Ownership:
    return replace(state, outgoing={**state.outgoing, migration: outgoing})


def _step_outgoing(state: Ownership, record: Any) -> OutgoingState:
    """The migration of *record*, moved on to its next stage."""
    outgoing = state.outgoing.get(record.migration)
    stage = OUTGOING_STEPS.get((outgoing.stage if outgoing else None, type(record)))
    if stage is None or (outgoing is None and not isinstance(record, r.TicketIssued)):
        raise _illegal(record, f"migration {record.migration} is {outgoing.stage if outgoing else 'unknown'}")
    return replace(outgoing, stage=stage) if outgoing else OutgoingState(record, stage)


def _outgoing_step(state: Ownership, record: Any) -> Ownership:
    outgoing = _step_outgoing(state, record)
    if isinstance(record, r.Pausing):
        outgoing = replace(outgoing, desired=record.desired)
    if isinstance(record, r.Ended):
        outgoing = replace(outgoing, code=record.code)
    return _with_outgoing(state, record.migration, outgoing)


def _outgoing_ownership(state: Ownership, record: Any) -> Ownership:
    """Released, Reclaimed, Freed, Resolved: the migration moves on, and so does who holds the instance."""
    outgoing = _step_outgoing(state, record)
    known = state.instances.get(outgoing.instance)
    before, after, epoch_ok = {
        r.Released: (Holding.HELD, Holding.RELEASED, known is not None and record.epoch == known.epoch),
        r.Reclaimed: (Holding.RELEASED, Holding.HELD, known is not None and record.epoch > known.epoch),
        r.Freed: (Holding.RELEASED, Holding.ELSEWHERE, known is not None and record.epoch > known.epoch),
        r.Resolved: (Holding.RELEASED, Holding.HELD, known is not None and record.epoch.term > known.epoch.term),
    }[type(record)]
    if known is None or known.holding is not before or not epoch_ok:
        raise _illegal(record, f"instance {outgoing.instance} is not {before} at the right epoch")
    if isinstance(record, r.Released):
        outgoing = replace(outgoing, released=record)
    elif known.last_migration != record.migration:
        raise _illegal(record, "the last ownership record is of another migration")
    if isinstance(record, r.Resolved):
        outgoing = replace(outgoing, resolved=record)
    state = _with_outgoing(state, record.migration, outgoing)
    known = replace(known, epoch=record.epoch, last_migration=record.migration)
    if isinstance(record, r.Freed):
        return _without_guest(state, known, after)
    if isinstance(record, r.Reclaimed) and known.guest is None:
        # Its paused guest died meanwhile. A record `lost` of its own could be torn off, and the loss go unsaid.
        after = Holding.LOST
    return _with_instance(state, replace(known, holding=after))


def _notified(state: Ownership, record: r.Notified) -> Ownership:
    outgoing = state.outgoing.get(record.migration)
    if outgoing is None or outgoing.stage not in GIVEN_AWAY or record.epoch <= (outgoing.notified or NO_EPOCH):
        raise _illegal(record, f"migration {record.migration} has nobody to notify of that")
    return _with_outgoing(state, record.migration, replace(outgoing, notified=record.epoch))


# --------------------------------------------------------------------------- destination


def _with_incoming(state: Ownership, migration: str, incoming: IncomingState) -> Ownership:
    return replace(state, incoming={**state.incoming, migration: incoming})


def _step_incoming(state: Ownership, record: Any) -> IncomingState:
    incoming = state.incoming.get(record.migration)
    stage = INCOMING_STEPS.get((incoming.stage if incoming else None, type(record)))
    if stage is None or (incoming is None and not isinstance(record, r.Reserved)):
        raise _illegal(record, f"migration {record.migration} is {incoming.stage if incoming else 'unknown'}")
    return replace(incoming, stage=stage) if incoming else IncomingState(record, stage)


def _incoming_step(state: Ownership, record: Any) -> Ownership:
    incoming = _step_incoming(state, record)
    if isinstance(record, r.Prepared):
        incoming = replace(incoming, prepared=record)
    if isinstance(record, r.Refused | r.Abandoned):
        state = _leave(state, incoming.guest)
        incoming = replace(incoming, code=record.code, guest=None)
    return _with_incoming(state, record.migration, incoming)


def _incoming_ownership(state: Ownership, record: Any) -> Ownership:
    """Acquired, Started, Returned: the migration moves on, and so does who holds the instance."""
    incoming = _step_incoming(state, record)
    if incoming.prepared is None:
        raise _illegal(record, "it was never prepared")
    epoch = incoming.prepared.epoch.handed_over()
    if isinstance(record, r.Acquired | r.Started) and record.epoch != epoch:
        raise _illegal(record, f"epoch {tuple(record.epoch)} is not {tuple(epoch)}")
    before = state.instances.get(incoming.instance)
    if isinstance(record, r.Acquired) and before is not None and before.epoch >= epoch:
        raise _illegal(record, f"instance {incoming.instance} was seen at {tuple(before.epoch)}")
    holding = {r.Acquired: Holding.ACQUIRED, r.Started: Holding.HELD, r.Returned: Holding.ELSEWHERE}[type(record)]
    guest = incoming.guest and replace(incoming.guest, migration=None)
    if isinstance(record, r.Returned):
        state, guest = _leave(state, guest), None
        incoming = replace(incoming, code=record.code, guest=None)
    known = InstanceState(incoming.instance, epoch, holding, record.migration, guest)
    return _with_instance(_with_incoming(state, record.migration, incoming), known)


def _acknowledged(state: Ownership, record: r.Acknowledged) -> Ownership:
    incoming = state.incoming.get(record.migration)
    if incoming is None or incoming.stage not in {Incoming.STARTED, Incoming.REFUSED, Incoming.RETURNED}:
        raise _illegal(record, f"migration {record.migration} has no verdict")
    return _with_incoming(state, record.migration, replace(incoming, acknowledged=True))


# --------------------------------------------------------------------------- what a compaction left


def _check_fresh(record: Record, name: str, known: Mapping[str, Any]) -> None:
    if name in known:
        raise _illegal(record, f"{name} has a history of its own")


def _enum(record: Record, kind: type[E], value: str) -> E:
    try:
        return kind(value)
    except ValueError:
        raise _illegal(record, f"{value!r} is no {kind.__name__.lower()}") from None


def _kept_instance(state: Ownership, record: r.KeptInstance) -> Ownership:
    _check_fresh(record, record.instance, state.instances)
    holding = _enum(record, Holding, record.holding)
    known = InstanceState(record.instance, record.epoch, holding, record.last_migration, record.guest)
    return _with_instance(state, known)


def _kept_outgoing(state: Ownership, record: r.KeptOutgoing) -> Ownership:
    migration = record.ticket.migration
    _check_fresh(record, migration, state.outgoing)
    stage = _enum(record, Outgoing, record.stage)
    if stage in GIVEN_AWAY and record.released is None:
        raise _illegal(record, f"it is {stage} and was never released")
    kept = OutgoingState(
        record.ticket, stage, record.desired, record.released, record.resolved, record.notified, record.code
    )
    return _with_outgoing(state, migration, kept)


def _kept_incoming(state: Ownership, record: r.KeptIncoming) -> Ownership:
    migration = record.reserved.migration
    _check_fresh(record, migration, state.incoming)
    stage = _enum(record, Incoming, record.stage)
    if stage not in {Incoming.RESERVED, Incoming.ABANDONED} and record.prepared is None:
        raise _illegal(record, f"it is {stage} and was never prepared")
    kept = IncomingState(record.reserved, stage, record.guest, record.prepared, record.code, record.acknowledged)
    return _with_incoming(state, migration, kept)


def _kept_leftover(state: Ownership, record: r.KeptLeftover) -> Ownership:
    return _leave(state, record.guest)


_APPLY: Mapping[type[Record], Callable[[Ownership, Any], Ownership]] = {
    r.Created: _created,
    r.Spawned: _spawned,
    r.Stopped: _stopped,
    r.Removed: _removed,
    r.Lost: _lost,
    r.Superseded: _superseded,
    r.Yielded: _yielded,
    r.TicketIssued: _outgoing_step,
    r.TicketConsumed: _outgoing_step,
    r.Pausing: _outgoing_step,
    r.Resumed: _outgoing_step,
    r.Ended: _outgoing_step,
    r.Released: _outgoing_ownership,
    r.Reclaimed: _outgoing_ownership,
    r.Freed: _outgoing_ownership,
    r.Resolved: _outgoing_ownership,
    r.Notified: _notified,
    r.Reserved: _incoming_step,
    r.Abandoned: _incoming_step,
    r.Prepared: _incoming_step,
    r.Refused: _incoming_step,
    r.Acquired: _incoming_ownership,
    r.Started: _incoming_ownership,
    r.Returned: _incoming_ownership,
    r.Acknowledged: _acknowledged,
    r.KeptInstance: _kept_instance,
    r.KeptOutgoing: _kept_outgoing,
    r.KeptIncoming: _kept_incoming,
    r.KeptLeftover: _kept_leftover,
}
