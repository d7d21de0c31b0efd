"""What a restarted daemon does, as data: from the re-read journal and the guests that are still there.

A guest runs only if the journal makes this host the current owner; every other running guest is paused *first*,
before anything else is done (rule 7). A guest that no journal explains is left as it is: the journal may be the thing
that was lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from vmmigrate.ownership.records import NO_EPOCH, Epoch
from vmmigrate.ownership.state import Holding, Incoming, IncomingState, InstanceState, Outgoing, Ownership


class Step(StrEnum):
    """One thing to do. `pause` steps come first in every plan."""

    PAUSE = "pause"  # the guest runs and must not
    KEEP = "keep"  # adopt; leave it running or paused as it is
    UNDO_PAUSE = "undo_pause"  # a migration paused it and never released it: run if desired, *then* journal `resumed`
    END_ATTEMPT = "end_attempt"  # the attempt died with the daemon before anything was paused
    SETTLE = "settle"  # released and in doubt: keep paused, ask the destination
    FINISH_START = "finish_start"  # acquired: open and `started`, or `returned`
    RUN = "run"  # started is durable, and the guest was never told to run
    RETURN = "return"  # acquired, and the guest is dead
    REFUSE = "refuse"  # prepared (or less): the connection died with the daemon
    DESTROY = "destroy"  # a process that belongs to nobody any more
    LOST = "lost"  # the owner's guest is gone
    INDETERMINATE = "indeterminate"  # a guest that this journal does not explain


@dataclass(frozen=True, slots=True)
class SeenGuest:
    """A guest process that answered after the restart. `epoch` is the one under which it was told to run last:
    opening disks under a newer one does not count. It was told of `last_record` of the journal `last_journal`."""

    running: bool
    epoch: Epoch
    last_record: int
    last_journal: str = ""


@dataclass(frozen=True, slots=True)
class Stray:
    """A guest process that carries this host's stamp, and that the journal does not name."""

    instance: str
    migration: str | None
    seen: SeenGuest


@dataclass(frozen=True, slots=True)
class RecoveryStep:
    step: Step
    instance: str
    migration: str | None = None
    reason: str = ""


def is_half_built(state: Ownership, stray: Stray) -> bool:
    """Whether the daemon died between the start of a process and its record: it never ran, and nobody owns it.

    Every other stray is one that the journal should explain: the journal may be the thing that was lost.
    """
    if stray.seen.running or stray.seen.epoch != NO_EPOCH or stray.seen.last_record:
        return False
    if stray.migration is not None:
        incoming = state.incoming.get(stray.migration)
        return incoming is not None and incoming.stage in {Incoming.RESERVED, Incoming.ABANDONED}
    known = state.instances.get(stray.instance)
    return known is not None and known.holding in {Holding.HELD, Holding.REMOVED}


def remembers_more(seen: SeenGuest, newest_record: int, journal_id: str) -> bool:
    """Whether the guest knows of a record that is not in the journal: that one was lost, or is an older copy."""
    return seen.last_journal not in {"", journal_id} or seen.last_record > newest_record


def is_older_copy(guests: Iterable[SeenGuest], newest_record: int, journal_id: str) -> bool:
    """Whether a guest proves that this very journal was longer once."""
    return any(seen.last_journal == journal_id and seen.last_record > newest_record for seen in guests)


def plan(
    state: Ownership,
    guests: Mapping[str, SeenGuest],
    newest_record: int,
    unreachable: Mapping[str, str] = MappingProxyType({}),
    journal_id: str = "",
) -> tuple[RecoveryStep, ...]:
    """The steps of a recovery, in the order to take them.

    Args:
        guests: By instance id: every guest process that was found.
        newest_record: Number of the last record in the journal. A guest that was told of a later one proves that
            this journal is an older copy: nothing is decided for that instance.
        unreachable: By instance id, why: guest processes that are there and could not be adopted. They are not dead,
            so nothing is decided for them either.
        journal_id: A guest that was told of records of another journal is not decided about by this one.
    """
    steps: list[RecoveryStep] = []
    shortened = {name for name, seen in guests.items() if remembers_more(seen, newest_record, journal_id)}
    steps += [RecoveryStep(Step.INDETERMINATE, name, reason=why) for name, why in sorted(unreachable.items())]
    for name in sorted(shortened):
        is_ours = guests[name].last_journal in {"", journal_id}
        reason = "the journal is shorter than the guest remembers" if is_ours else "the guest remembers another journal"
        steps.append(RecoveryStep(Step.INDETERMINATE, name, reason=reason))
    shortened |= unreachable.keys()
    for name, known in state.instances.items():
        if name not in shortened:
            steps.extend(_instance_steps(state, known, guests.get(name)))
    for migration, incoming in state.incoming.items():
        if incoming.instance not in shortened and incoming.stage in {Incoming.RESERVED, Incoming.PREPARED}:
            steps.extend(_arriving_steps(state, migration, incoming, guests.get(incoming.instance)))
    for name in sorted(guests.keys() - shortened - state.instances.keys()):
        if state.open_incoming(name) is None:
            steps.extend(_leftover_steps(state, name, guests[name]))
    return tuple(sorted(steps, key=lambda step: step.step is not Step.PAUSE))


def _instance_steps(state: Ownership, known: InstanceState, seen: SeenGuest | None) -> Iterator[RecoveryStep]:
    name, migration = known.instance, known.last_migration
    arriving = state.open_incoming(name) is not None and known.holding is not Holding.ACQUIRED
    # `acquired` is an owner that may open disks, but no vCPU runs before `started` is durable (rule 2).
    may_run = state.may_run(name, known.epoch)
    if seen is not None and seen.running and not (may_run and known.holding is Holding.HELD):
        yield RecoveryStep(Step.PAUSE, name)
    if known.holding is Holding.HELD:
        yield from _held_steps(state, known, seen)
    elif known.holding is Holding.RELEASED:
        yield RecoveryStep(Step.SETTLE, name, migration)
    elif known.holding is Holding.ACQUIRED:
        can_start = seen is not None and may_run
        yield RecoveryStep(Step.FINISH_START if can_start else Step.RETURN, name, migration, "daemon_restarted")
    elif seen is not None and not arriving:
        yield RecoveryStep(Step.DESTROY, name)


def _arriving_steps(
    state: Ownership, migration: str, incoming: IncomingState, seen: SeenGuest | None
) -> Iterator[RecoveryStep]:
    name = incoming.instance
    if seen is None or not seen.running:
        yield RecoveryStep(Step.REFUSE, name, migration, "daemon_restarted")
        return
    # Before `refused` is answered, no guest of M may run (rule 6); one that does contradicts the journal.
    if name not in state.instances:
        yield RecoveryStep(Step.PAUSE, name)
    yield RecoveryStep(Step.INDETERMINATE, name, migration, "not acquired, and yet its guest runs")


def _leftover_steps(state: Ownership, name: str, seen: SeenGuest) -> Iterator[RecoveryStep]:
    if all(incoming.instance != name for incoming in state.incoming.values()):
        yield RecoveryStep(Step.INDETERMINATE, name, reason="no journal record explains this guest")
        return
    # Refused or abandoned durably, and the daemon died before it ended the process.
    if seen.running:
        yield RecoveryStep(Step.PAUSE, name)
    yield RecoveryStep(Step.DESTROY, name)


def _held_steps(state: Ownership, known: InstanceState, seen: SeenGuest | None) -> Iterator[RecoveryStep]:
    name = known.instance
    migration = state.open_outgoing(name)
    if known.guest is None:
        if migration is not None:
            yield RecoveryStep(Step.END_ATTEMPT, name, migration, "daemon_restarted")
        if seen is not None:
            yield RecoveryStep(Step.DESTROY, name)
        return
    if seen is None:
        yield RecoveryStep(Step.LOST, name, migration, "the guest process is gone")
        return
    if state.is_superseded(name, known.epoch):
        # It stays paused until the winner confirms that it runs (rule 8); neither `undo_pause` nor `run`.
        if migration is not None:
            yield RecoveryStep(Step.END_ATTEMPT, name, migration, "superseded")
        yield RecoveryStep(Step.KEEP, name, known.last_migration, "superseded")
        return
    if migration is not None and state.outgoing[migration].stage is Outgoing.PAUSING:
        yield RecoveryStep(Step.UNDO_PAUSE, name, migration, "daemon_restarted")
        return
    if migration is not None:
        yield RecoveryStep(Step.END_ATTEMPT, name, migration, "daemon_restarted")
    # An owner whose guest never saw the epoch died between `started` (or `reclaimed`) and `run`.
    yield RecoveryStep(Step.RUN if seen.epoch < known.epoch else Step.KEEP, name, known.last_migration)
