"""What a journal may forget, and what it says once it has: the same decisions from fewer records.

Kept is everything that a rule may ask for:

- every instance: the epoch that this host has seen is what turns stale handoffs, tombstones and operators away;
- every migration that is not over, and the last one of each instance: a restart asks it for the run state;
- at a destination every verdict that its source has not acknowledged (rule 6), never derived from ownership;
- at a source, for each instance and host, the newest migration by which it was given away, and every one of which a
  supersession is still to be told: the word of an operator goes along that chain to all later hosts (rule 8). An older
  one to the same host needs no word of its own: what supersedes it and not the newer one has been superseded itself;
- at a destination, for each instance and host, the newest migration by which it came: that host may bring such a word;
- every supersession; every process that nobody owns and that may still be there, and what explains it.

A migration that ended a moment ago (`recent`) is kept too: tasks that tidy up after it still look at it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from vmmigrate.ownership import records as r
from vmmigrate.ownership.records import NO_EPOCH, Record
from vmmigrate.ownership.rules import notices
from vmmigrate.ownership.state import (
    GIVEN_AWAY,
    OPEN_INCOMING,
    OPEN_OUTGOING,
    Incoming,
    IncomingState,
    Ownership,
)

# Verdicts, of which a source may not know.
VERDICTS = frozenset({Incoming.STARTED, Incoming.REFUSED, Incoming.RETURNED})


def compacted(state: Ownership, recent: Collection[str] = (), gone: Collection[r.Spawned] = ()) -> Ownership:
    """*state* without what no rule asks for any more.

    Args:
        recent: Migrations that are kept whatever they are.
        gone: Processes that are known not to exist any more.
    """
    leftovers = tuple(guest for guest in state.leftovers if guest not in gone)
    explained = {guest.instance for guest in leftovers}
    wanted = {*recent, *(known.last_migration for known in state.instances.values())}
    chain = {*_newest_given_away(state), *_newest_received(state), *(notice.migration for notice in notices(state))}
    return replace(
        state,
        outgoing={
            m: out for m, out in state.outgoing.items() if out.stage in OPEN_OUTGOING or m in wanted or m in chain
        },
        incoming={
            m: inc
            for m, inc in state.incoming.items()
            if inc.stage in OPEN_INCOMING
            or m in wanted
            or m in chain
            or is_unacknowledged(inc)
            or inc.instance in explained
        },
        leftovers=leftovers,
    )


def is_unacknowledged(incoming: IncomingState) -> bool:
    """Whether its source may still ask for the verdict."""
    return incoming.stage in VERDICTS and not incoming.acknowledged


def _newest_given_away(state: Ownership) -> Iterator[str]:
    """For each instance and host, the migration by which it went there last."""
    newest: dict[tuple[str, str], tuple[r.Epoch, str]] = {}
    for migration, outgoing in state.outgoing.items():
        if outgoing.stage in GIVEN_AWAY and outgoing.released is not None:
            to = (outgoing.instance, outgoing.ticket.destination_host)
            newest[to] = max(newest.get(to, (NO_EPOCH, "")), (outgoing.released.epoch, migration))
    return (migration for _, migration in newest.values())


def _newest_received(state: Ownership) -> Iterator[str]:
    """For each instance and host, the migration by which it came from there last."""
    newest: dict[tuple[str, str], tuple[r.Epoch, str]] = {}
    for migration, incoming in state.incoming.items():
        if incoming.stage is Incoming.STARTED and incoming.prepared is not None:
            origin = (incoming.instance, incoming.reserved.source_host)
            newest[origin] = max(newest.get(origin, (NO_EPOCH, "")), (incoming.prepared.epoch, migration))
    return (migration for _, migration in newest.values())


def snapshot(state: Ownership) -> tuple[Record, ...]:
    """Records that add up to *state*; never more than those that it came from."""
    return tuple(_snapshot(state))


def _snapshot(state: Ownership) -> Iterator[Record]:
    for name, known in state.instances.items():
        yield r.KeptInstance(name, known.epoch, known.holding.value, known.last_migration, known.guest)
    for out in state.outgoing.values():
        yield r.KeptOutgoing(
            out.ticket, out.stage.value, out.desired, out.released, out.resolved, out.notified, out.code
        )
    for inc in state.incoming.values():
        yield r.KeptIncoming(inc.reserved, inc.stage.value, inc.guest, inc.prepared, inc.code, inc.acknowledged)
    for name, epoch in state.superseded.items():
        yield r.Superseded(name, epoch, state.superseded_since[name])
    for guest in state.leftovers:
        yield r.KeptLeftover(guest)
