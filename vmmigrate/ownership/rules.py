"""What may be decided: an event and the journal's state give the records to append, or a refusal.

Every decision is a *conditional append*: the journal calls `decide` and appends under one lock, so of two racing
events the second sees the record of the first (design: one verdict per M). The caller acts, or answers, only after the
fsync of what `decide` returned. A refusal appends nothing and the caller stops before any effect.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vmmigrate.errors import IdentityError, RequestError, VmMigrateError
from vmmigrate.ownership import records as r
from vmmigrate.ownership.events import (
    Acknowledge,
    Acquire,
    Answer,
    BeginPause,
    ConsumeTicket,
    Create,
    EndAttempt,
    Event,
    Evidence,
    IssueTicket,
    Lose,
    Notify,
    PowerOff,
    Prepare,
    Refuse,
    Release,
    Remove,
    Reserve,
    ResolveDestination,
    ResolveSource,
    Return,
    Settle,
    Spawn,
    Start,
    Stop,
    Supersede,
    Yield,
)
from vmmigrate.ownership.records import FIRST_EPOCH, NO_EPOCH, Epoch, Record
from vmmigrate.ownership.requests import DONE, Request, refusal
from vmmigrate.ownership.state import (
    GIVEN_AWAY,
    Holding,
    Incoming,
    IncomingState,
    InstanceState,
    Outgoing,
    OutgoingState,
    Ownership,
)

__all__ = [
    "Acknowledge",
    "Acquire",
    "Answer",
    "BeginPause",
    "ConsumeTicket",
    "Create",
    "Decision",
    "EndAttempt",
    "Event",
    "Evidence",
    "IssueTicket",
    "Lose",
    "Notice",
    "Notify",
    "OwnershipRefusal",
    "PowerOff",
    "Prepare",
    "Refuse",
    "Release",
    "Remove",
    "Reserve",
    "ResolveDestination",
    "ResolveSource",
    "Return",
    "Settle",
    "Spawn",
    "Start",
    "Stop",
    "Supersede",
    "Yield",
    "decide",
    "notices",
    "permit",
    "verdict",
]


class OwnershipRefusal(VmMigrateError):  # noqa: N818  (a verdict, not a fault)
    """The rules say no; nothing was written."""

    default_code = "ownership_refused"


@dataclass(frozen=True, slots=True)
class Decision:
    """Records to append (all or none), and what to answer once they are durable."""

    records: tuple[Record, ...] = ()
    answer: Answer | None = None


def decide(state: Ownership, event: Event) -> Decision:
    """The records that *event* calls for.

    Raises:
        OwnershipRefusal, RequestError, IdentityError: The rules say no; nothing is to be written.
    """
    return _DECIDE[type(event)](state, event)


# --------------------------------------------------------------------------- instances


def permit(state: Ownership, instance: str, request: Request) -> None:
    """Nothing when *request* may be done to *instance* just now.

    Raises: RequestError, OwnershipRefusal: the code is that of `requests.REFUSALS`.
    """
    code, text = refusal(state, instance, request)
    if code in _BY_OWNERSHIP:
        raise OwnershipRefusal(text, code=code)
    if code != DONE:
        raise RequestError(text, code=code)


_BY_OWNERSHIP = frozenset({"in_doubt", "not_owner", "superseded"})


def _instance(state: Ownership, instance: str) -> InstanceState:
    known = state.instances.get(instance)
    if known is None or known.holding is Holding.REMOVED:
        raise RequestError(f"no instance {instance} on this host", code="unknown_instance")
    return known


def _held(state: Ownership, instance: str) -> InstanceState:
    """The instance, if this host is its owner and may act on it."""
    known = _instance(state, instance)
    if known.holding is Holding.RELEASED:
        raise OwnershipRefusal(
            f"instance {instance}: migration {known.last_migration} is in doubt, wait until it is settled",
            code="in_doubt",
        )
    if known.holding is not Holding.HELD:
        raise OwnershipRefusal(f"instance {instance} is {known.holding} on this host", code="not_owner")
    if state.is_superseded(instance, known.epoch):
        raise OwnershipRefusal(f"instance {instance} was given to another host by an operator", code="superseded")
    return known


def _create(state: Ownership, event: Create) -> Decision:
    known = state.instances.get(event.instance)
    if known is not None and known.holding is not Holding.REMOVED:
        raise RequestError(f"instance {event.instance} is {known.holding} on this host", code="instance_exists")
    if state.open_incoming(event.instance) is not None:
        raise RequestError(f"instance {event.instance} is arriving at this host", code="instance_exists")
    if event.instance in state.superseded:
        raise OwnershipRefusal(f"instance {event.instance} was given to another host", code="superseded")
    epoch = FIRST_EPOCH if known is None else known.epoch.next_term()
    return Decision((r.Created(event.instance, epoch),))


def _spawn(state: Ownership, event: Spawn) -> Decision:
    migration = event.spawned.migration
    if migration is None:
        if _held(state, event.spawned.instance).guest is not None:
            raise RequestError(f"instance {event.spawned.instance} has a guest process already", code="running")
    elif _incoming(state, migration).stage is not Incoming.RESERVED:
        raise OwnershipRefusal(f"migration {migration} is over", code="migration_over")
    return Decision((event.spawned,))


def _stop(state: Ownership, event: Stop) -> Decision:
    permit(state, event.instance, Request.STOP)
    return Decision((r.Stopped(event.instance),) if state.instances[event.instance].guest else ())


def _remove(state: Ownership, event: Remove) -> Decision:
    permit(state, event.instance, Request.DELETE)
    known = state.instances[event.instance]
    if known.holding is Holding.LOST:
        return Decision((r.Removed(event.instance, "lost"),))
    stopped = (r.Stopped(event.instance),) if known.guest else ()
    return Decision((*stopped, r.Removed(event.instance, "deleted")))


def _power_off(state: Ownership, event: PowerOff) -> Decision:
    """A guest that is paused for a handoff cannot power itself off; one in doubt is none of ours."""
    known = state.instances.get(event.instance)
    if known is None or known.holding is not Holding.HELD or known.guest != event.guest:
        return Decision()
    migration = state.open_outgoing(event.instance)
    ended = () if migration is None else _end_attempt(state, EndAttempt(migration, "guest_powered_off")).records
    return Decision((*ended, r.Stopped(event.instance)))


def _lose(state: Ownership, event: Lose) -> Decision:
    known = state.instances.get(event.instance)
    if known is None or known.holding not in {Holding.HELD, Holding.RELEASED}:
        return Decision()
    if event.guest is not None and known.guest != event.guest:
        return Decision()
    if known.holding is Holding.RELEASED:
        # The destination may still start it; what is lost here is only the copy to fall back upon.
        return Decision((r.Stopped(event.instance),) if known.guest else ())
    migration = state.open_outgoing(event.instance)
    ended = () if migration is None else _end_attempt(state, EndAttempt(migration, "guest_lost")).records
    return Decision((*ended, r.Lost(event.instance, event.reason)))


# --------------------------------------------------------------------------- source


def _outgoing(state: Ownership, migration: str) -> OutgoingState:
    outgoing = state.outgoing.get(migration)
    if outgoing is None:
        raise RequestError(f"no migration {migration} leaves this host", code="unknown_migration")
    return outgoing


def _issue_ticket(state: Ownership, event: IssueTicket) -> Decision:
    ticket = event.ticket
    permit(state, ticket.instance, Request.MIGRATE_OUT)
    if state.instances[ticket.instance].guest is None:
        raise RequestError(f"instance {ticket.instance} has no guest on this host; start it", code="not_running")
    if ticket.migration in state.outgoing or ticket.migration in state.incoming:
        raise RequestError(f"migration id {ticket.migration} was used before", code="migration_exists")
    previous = state.open_outgoing(ticket.instance)
    return Decision((ticket,) if previous is None else (r.Ended(previous, "superseded"), ticket))


def _consume_ticket(state: Ownership, event: ConsumeTicket) -> Decision:
    outgoing = state.outgoing.get(event.migration)
    if outgoing is None:
        raise IdentityError(f"no migration {event.migration} awaits a peer here", code="ticket_unknown")
    ticket = outgoing.ticket
    # The same checks for a used ticket as for a fresh one, so that a thief learns nothing from the order.
    if event.host != ticket.destination_host:
        raise IdentityError(f"host {event.host} is not the destination of {event.migration}", code="wrong_host")
    if not hmac.compare_digest(event.ticket_hash, ticket.ticket_hash):
        raise IdentityError(f"that is not the ticket of migration {event.migration}", code="ticket_wrong")
    if event.instance != ticket.instance:
        raise IdentityError(f"the ticket of {event.migration} is for another instance", code="ticket_wrong")
    if outgoing.stage is not Outgoing.AWAITING_PEER:
        raise IdentityError(f"the ticket of migration {event.migration} was used before", code="ticket_used")
    if event.now_s >= ticket.expires_at_s:
        raise IdentityError(f"the ticket of migration {event.migration} has expired", code="ticket_expired")
    return Decision((r.TicketConsumed(event.migration),))


def _begin_pause(state: Ownership, event: BeginPause) -> Decision:
    outgoing = _outgoing(state, event.migration)
    _held(state, outgoing.instance)
    if outgoing.stage is not Outgoing.ACTIVE:
        raise OwnershipRefusal(f"migration {event.migration} is {outgoing.stage}", code="migration_over")
    return Decision((r.Pausing(event.migration, event.desired),))


def _end_attempt(state: Ownership, event: EndAttempt) -> Decision:
    outgoing = _outgoing(state, event.migration)
    if outgoing.stage is Outgoing.RELEASED:
        raise OwnershipRefusal(f"migration {event.migration} is in doubt", code="in_doubt")
    if event.only_in is not None and outgoing.stage not in event.only_in:
        return Decision()
    if outgoing.stage is Outgoing.PAUSING:
        return Decision((r.Resumed(event.migration),))
    if outgoing.stage in {Outgoing.AWAITING_PEER, Outgoing.ACTIVE}:
        return Decision((r.Ended(event.migration, event.code),))
    return Decision()


def _release(state: Ownership, event: Release) -> Decision:
    outgoing = _outgoing(state, event.migration)
    known = _held(state, outgoing.instance)
    if outgoing.stage is not Outgoing.PAUSING:
        raise OwnershipRefusal(f"migration {event.migration} is {outgoing.stage}", code="migration_over")
    released = r.Released(
        event.migration,
        known.epoch,
        outgoing.ticket.destination_host,
        event.destination_journal,
        event.destination_url,
    )
    return Decision((released,))


def _evidence(state: Ownership, event: Evidence) -> Decision:
    """Rule 5: evidence counts only while the last ownership record is `released M`."""
    outgoing = _outgoing(state, event.migration)
    known = state.instances.get(outgoing.instance)
    if known is None or known.holding is not Holding.RELEASED or known.last_migration != event.migration:
        return Decision(answer=event.answer)
    assert outgoing.released is not None
    if event.answer in {Answer.PENDING, Answer.UNKNOWN}:
        return Decision(answer=event.answer)
    if event.journal_id != outgoing.released.destination_journal:
        raise OwnershipRefusal(
            f"host {outgoing.ticket.destination_host} answers from another journal than the one that said Ready",
            code="indeterminate",
        )
    if event.answer in {Answer.RUNNING, Answer.STARTED}:
        return Decision((r.Freed(event.migration, known.epoch.handed_over()),), event.answer)
    # If the paused guest died while we were in doubt, this one record makes us the owner of a guest that nobody has.
    return Decision((r.Reclaimed(event.migration, known.epoch.taken_back()),), event.answer)


# --------------------------------------------------------------------------- destination


def _incoming(state: Ownership, migration: str) -> IncomingState:
    incoming = state.incoming.get(migration)
    if incoming is None:
        raise RequestError(f"no migration {migration} comes to this host", code="unknown_migration")
    return incoming


def _reserve(state: Ownership, event: Reserve) -> Decision:
    wanted = event.reserved
    if wanted.migration in state.incoming or wanted.migration in state.outgoing:
        raise RequestError(f"migration id {wanted.migration} was used before", code="migration_exists")
    permit(state, wanted.instance, Request.MIGRATE_IN)
    return Decision((wanted,))


def _prepare(state: Ownership, event: Prepare) -> Decision:
    incoming = _incoming(state, event.migration)
    if incoming.stage is not Incoming.RESERVED:
        raise OwnershipRefusal(f"migration {event.migration} is {incoming.stage}", code="migration_over")
    _check_newer(state, incoming.instance, event.epoch.handed_over())
    return Decision((r.Prepared(event.migration, event.epoch, event.run_state),))


def _check_newer(state: Ownership, instance: str, epoch: Epoch) -> None:
    """Rule 12: an epoch that this host has already seen surpassed is refused."""
    known = state.instances.get(instance)
    if known is not None and known.epoch >= epoch:
        raise OwnershipRefusal(
            f"instance {instance}: epoch {tuple(epoch)} is not newer than {tuple(known.epoch)} seen here",
            code="stale_epoch",
        )
    if state.is_superseded(instance, epoch):
        raise OwnershipRefusal(f"instance {instance} was given to another host by an operator", code="superseded")


def _acquire(state: Ownership, event: Acquire) -> Decision:
    incoming = _incoming(state, event.migration)
    if incoming.stage is not Incoming.PREPARED or incoming.prepared is None:
        raise OwnershipRefusal(f"migration {event.migration} is {incoming.stage}", code="verdict_given")
    if event.epoch != incoming.prepared.epoch:
        raise OwnershipRefusal(
            f"handoff of epoch {tuple(event.epoch)}, prepared for {tuple(incoming.prepared.epoch)}",
            code="stale_epoch",
        )
    epoch = incoming.prepared.epoch.handed_over()
    _check_newer(state, incoming.instance, epoch)
    return Decision((r.Acquired(event.migration, epoch),))


def _refuse(state: Ownership, event: Refuse) -> Decision:
    incoming = _incoming(state, event.migration)
    if incoming.stage is Incoming.RESERVED:
        return Decision((r.Abandoned(event.migration, event.code),))
    if incoming.stage is Incoming.PREPARED:
        return Decision((r.Refused(event.migration, event.code),), Answer.REFUSED)
    if incoming.stage in {Incoming.REFUSED, Incoming.ABANDONED}:
        return Decision(answer=Answer.REFUSED if incoming.stage is Incoming.REFUSED else None)
    raise OwnershipRefusal(f"migration {event.migration} is {incoming.stage}", code="verdict_given")


def _start(state: Ownership, event: Start) -> Decision:
    incoming = _incoming(state, event.migration)
    if incoming.stage is not Incoming.ACQUIRED or incoming.prepared is None:
        raise OwnershipRefusal(f"migration {event.migration} is {incoming.stage}", code="verdict_given")
    epoch = incoming.prepared.epoch.handed_over()
    if state.is_superseded(incoming.instance, epoch):
        raise OwnershipRefusal(f"instance {incoming.instance} was given to another host", code="superseded")
    return Decision((r.Started(event.migration, epoch),), Answer.STARTED)


def _return(state: Ownership, event: Return) -> Decision:
    incoming = _incoming(state, event.migration)
    if incoming.stage is not Incoming.ACQUIRED:
        raise OwnershipRefusal(f"migration {event.migration} is {incoming.stage}", code="verdict_given")
    return Decision((r.Returned(event.migration, event.code),), Answer.RETURNED)


# An M without `prepared` answers `unknown`, never `refused` (rule 6): the record may have been lost with a journal.
_ANSWERS: Mapping[Incoming, Answer] = {
    Incoming.RESERVED: Answer.UNKNOWN,
    Incoming.ABANDONED: Answer.UNKNOWN,
    Incoming.PREPARED: Answer.PENDING,
    Incoming.ACQUIRED: Answer.PENDING,
    Incoming.STARTED: Answer.STARTED,
    Incoming.REFUSED: Answer.REFUSED,
    Incoming.RETURNED: Answer.RETURNED,
}


def verdict(state: Ownership, migration: str) -> Answer:
    """What this destination's journal says of M: a pure read, and never evidence."""
    incoming = state.incoming.get(migration)
    return Answer.UNKNOWN if incoming is None else _ANSWERS[incoming.stage]


def _settle(state: Ownership, event: Settle) -> Decision:
    """The destination decides: a prepared M that the source asks about is refused, durably, before the answer."""
    incoming = state.incoming.get(event.migration)
    if incoming is None:
        return Decision(answer=Answer.UNKNOWN)
    if event.host is not None and event.host != incoming.reserved.source_host:
        raise IdentityError(f"host {event.host} is not the source of migration {event.migration}", code="forbidden")
    if incoming.stage is not Incoming.PREPARED:
        return Decision(answer=_ANSWERS[incoming.stage])
    if event.guest_runs:
        raise OwnershipRefusal(
            f"migration {event.migration}: not acquired, and yet its guest runs", code="indeterminate"
        )
    return Decision((r.Refused(event.migration, "settled"),), Answer.REFUSED)


# --------------------------------------------------------------------------- 8: an operator resolves


@dataclass(frozen=True, slots=True)
class Notice:
    """What the destination of M has still to acknowledge: `Supersede(instance, epoch, since)`."""

    migration: str
    instance: str
    epoch: Epoch
    since: Epoch
    host: str
    url: str


def notices(state: Ownership) -> tuple[Notice, ...]:
    """Whom this host has to tell of a supersession, until each has acknowledged it: as the winner, or as a host that
    was superseded and had given the instance away. So the word goes along the chain, to every later host."""
    due = []
    for migration, outgoing in state.outgoing.items():
        released = outgoing.released
        if released is None or outgoing.stage not in GIVEN_AWAY:
            continue
        limit, since = _limit(state, outgoing)
        if limit > (outgoing.notified or released.epoch):
            host, url = outgoing.ticket.destination_host, released.destination_url
            due.append(Notice(migration, outgoing.instance, limit, since, host, url))
    return tuple(due)


def _limit(state: Ownership, outgoing: OutgoingState) -> tuple[Epoch, Epoch]:
    """The newest epoch of an operator that supersedes what was given away by *outgoing*, and what its winner had given
    away. Hosts that had the instance before the winner are not told: the winner may be among them."""
    own, released = outgoing.resolved, outgoing.released
    assert released is not None
    limit = (own.epoch, released.epoch) if own else (NO_EPOCH, NO_EPOCH)
    since = state.superseded_since.get(outgoing.instance)
    if since is not None and released.epoch > since:
        limit = max(limit, (state.superseded[outgoing.instance], since))
    return limit


def _supersede(state: Ownership, event: Supersede) -> Decision:
    known = state.instances.get(event.instance)
    if event.epoch <= state.superseded.get(event.instance, NO_EPOCH):
        return Decision()
    # Of the same term and above: it has come back here from the winner meanwhile. What this host had passed on before
    # is superseded all the same, and its next host has to hear of it from here.
    came_back = known is not None and known.epoch.term == event.epoch.term and known.epoch > event.epoch
    if known is not None and known.epoch >= event.epoch and not came_back:
        # Acknowledged, it would let the sender believe that nothing older than itself can run here.
        raise OwnershipRefusal(
            f"instance {event.instance} is at {tuple(known.epoch)} here: {tuple(event.epoch)} does not supersede it",
            code="newer_epoch",
        )
    return Decision((r.Superseded(event.instance, event.epoch, event.since),))


def _resolve_source(state: Ownership, event: ResolveSource) -> Decision:
    outgoing = _outgoing(state, event.migration)
    known = _instance(state, outgoing.instance)
    if known.holding is not Holding.RELEASED or known.last_migration != event.migration:
        raise OwnershipRefusal(f"migration {event.migration} is not in doubt: {outgoing.stage}", code="not_in_doubt")
    if known.guest is None:
        raise OwnershipRefusal(f"migration {event.migration}: its guest is gone from the source", code="guest_lost")
    if not event.fencing_proof.strip():
        raise RequestError("how is it known that nobody else runs the guest?", code="no_fencing_proof")
    newest = max(known.epoch, state.superseded.get(outgoing.instance, known.epoch))
    return Decision((r.Resolved(event.migration, newest.next_term(), event.fencing_proof),))


def _resolve_destination(state: Ownership, event: ResolveDestination) -> Decision:
    """Nothing but the ordinary acquire: it loses against a verdict, and against `superseded`."""
    stage = _incoming(state, event.migration).stage
    if stage in {Incoming.ACQUIRED, Incoming.STARTED}:
        return Decision(answer=_ANSWERS[stage])
    return _acquire(state, Acquire(event.migration, event.released))


def _notify(state: Ownership, event: Notify) -> Decision:
    outgoing = _outgoing(state, event.migration)
    if outgoing.notified is not None and event.epoch <= outgoing.notified:
        return Decision()
    if outgoing.stage not in GIVEN_AWAY or event.epoch > _limit(state, outgoing)[0]:
        return Decision()
    return Decision((r.Notified(event.migration, event.epoch),))


def _yield(state: Ownership, event: Yield) -> Decision:
    known = state.instances.get(event.instance)
    if known is None or known.holding is not Holding.HELD or not state.is_superseded(event.instance, known.epoch):
        return Decision()
    if event.epoch != state.superseded[event.instance]:
        return Decision()
    migration = state.open_outgoing(event.instance)
    ended = () if migration is None else _end_attempt(state, EndAttempt(migration, "superseded")).records
    return Decision((*ended, r.Yielded(event.instance, event.epoch)))


def _acknowledge(state: Ownership, event: Acknowledge) -> Decision:
    incoming = _incoming(state, event.migration)
    if incoming.acknowledged or incoming.stage in {Incoming.RESERVED, Incoming.PREPARED, Incoming.ACQUIRED}:
        return Decision()
    return Decision((r.Acknowledged(event.migration),) if incoming.stage is not Incoming.ABANDONED else ())


_DECIDE: Mapping[type[Event], Callable[[Ownership, Any], Decision]] = {
    Create: _create,
    Spawn: _spawn,
    Stop: _stop,
    Remove: _remove,
    Lose: _lose,
    PowerOff: _power_off,
    IssueTicket: _issue_ticket,
    ConsumeTicket: _consume_ticket,
    BeginPause: _begin_pause,
    EndAttempt: _end_attempt,
    Release: _release,
    Evidence: _evidence,
    Reserve: _reserve,
    Prepare: _prepare,
    Acquire: _acquire,
    Refuse: _refuse,
    Start: _start,
    Return: _return,
    Settle: _settle,
    Supersede: _supersede,
    ResolveSource: _resolve_source,
    ResolveDestination: _resolve_destination,
    Notify: _notify,
    Yield: _yield,
    Acknowledge: _acknowledge,
}
