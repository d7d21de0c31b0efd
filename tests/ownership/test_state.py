"""What records add up to: every legal step, and a refusal of every other one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest

from vmmigrate.errors import JournalError
from vmmigrate.ownership import records as r
from vmmigrate.ownership.records import RECORD_TYPES, Epoch, Record
from vmmigrate.ownership.state import (
    _APPLY,
    INCOMING_STEPS,
    OPEN_INCOMING,
    OPEN_OUTGOING,
    OUTGOING_STEPS,
    Holding,
    Incoming,
    Outgoing,
    Ownership,
    apply,
)

from .world import VM, fold, spawned

N = Epoch(1, 1)
BORN: list[Record] = [r.Created(VM, N), spawned()]

OUT: Mapping[type[Record], Record] = {
    r.TicketIssued: r.TicketIssued("m1", VM, "b", "hash", 60),
    r.TicketConsumed: r.TicketConsumed("m1"),
    r.Pausing: r.Pausing("m1", "running"),
    r.Resumed: r.Resumed("m1"),
    r.Ended: r.Ended("m1", "cancelled"),
    r.Released: r.Released("m1", N, "b", "journal-of-b", "https://b"),
    r.Reclaimed: r.Reclaimed("m1", N.taken_back()),
    r.Freed: r.Freed("m1", N.handed_over()),
    r.Resolved: r.Resolved("m1", N.next_term(), "its power is off"),
}
IN: Mapping[type[Record], Record] = {
    r.Reserved: r.Reserved("m1", VM, "a", "https://a"),
    r.Abandoned: r.Abandoned("m1", "cancelled"),
    r.Prepared: r.Prepared("m1", N, "running"),
    r.Acquired: r.Acquired("m1", N.handed_over()),
    r.Refused: r.Refused("m1", "settled"),
    r.Started: r.Started("m1", N.handed_over()),
    r.Returned: r.Returned("m1", "disk_busy"),
}
Steps = Mapping[tuple[Any, type[Record]], Any]


def path_to(steps: Steps, samples: Mapping[type[Record], Record], stage: Any) -> list[Record]:
    """Records that lead from nothing to *stage*, by the table alone."""
    paths: dict[Any, list[Record]] = {None: []}
    frontier = [None]
    while frontier:
        before = frontier.pop(0)
        for (begin, cls), after in steps.items():
            if begin is before and after not in paths:
                paths[after] = [*paths[before], samples[cls]]
                frontier.append(after)
    return paths[stage]


def illegal(state: Ownership, record: Record) -> None:
    before = (state.instances, state.outgoing, state.incoming, state.superseded)
    with pytest.raises(JournalError, match="is illegal here") as caught:
        apply(state, record)
    assert caught.value.code == "illegal_record"
    assert (state.instances, state.outgoing, state.incoming, state.superseded) == before


def test_every_record_type_is_applied_by_exactly_one_function() -> None:
    assert set(_APPLY) == set(RECORD_TYPES.values())


@pytest.mark.parametrize(
    ("stage", "cls"),
    list(itertools.product([None, *Outgoing], OUT)),
    ids=lambda part: getattr(part, "__name__", str(part)),
)
def test_the_full_product_of_stages_and_records_at_the_source(stage: Outgoing | None, cls: type[Record]) -> None:
    state = fold([*BORN, *path_to(OUTGOING_STEPS, OUT, stage)])
    wanted = OUTGOING_STEPS.get((stage, cls))

    if wanted is None:
        illegal(state, OUT[cls])
        return
    after = apply(state, OUT[cls])

    assert after.outgoing["m1"].stage is wanted
    assert after.open_outgoing(VM) == ("m1" if wanted in OPEN_OUTGOING else None)
    assert after.instances[VM].holding is {
        Outgoing.RELEASED: Holding.RELEASED,
        Outgoing.FREED: Holding.ELSEWHERE,
    }.get(wanted, Holding.HELD)
    assert after.instances[VM].epoch == {
        Outgoing.RECLAIMED: N.taken_back(),
        Outgoing.FREED: N.handed_over(),
        Outgoing.RESOLVED: N.next_term(),
    }.get(wanted, N)


@pytest.mark.parametrize(
    ("stage", "cls"),
    list(itertools.product([None, *Incoming], IN)),
    ids=lambda part: getattr(part, "__name__", str(part)),
)
def test_the_full_product_of_stages_and_records_at_the_destination(stage: Incoming | None, cls: type[Record]) -> None:
    state = fold(path_to(INCOMING_STEPS, IN, stage))
    wanted = INCOMING_STEPS.get((stage, cls))

    if wanted is None:
        illegal(state, IN[cls])
        return
    after = apply(state, IN[cls])

    assert after.incoming["m1"].stage is wanted
    assert after.open_incoming(VM) == ("m1" if wanted in OPEN_INCOMING else None)
    known = after.instances.get(VM)
    assert (known and known.holding) == {
        Incoming.ACQUIRED: Holding.ACQUIRED,
        Incoming.STARTED: Holding.HELD,
        Incoming.RETURNED: Holding.ELSEWHERE,
    }.get(wanted)
    assert known is None or known.epoch == N.handed_over()


@pytest.mark.parametrize("stage", [None, *Incoming])
def test_only_a_verdict_can_be_acknowledged(stage: Incoming | None) -> None:
    state = fold(path_to(INCOMING_STEPS, IN, stage))

    if stage in {Incoming.STARTED, Incoming.REFUSED, Incoming.RETURNED}:
        assert apply(state, r.Acknowledged("m1")).incoming["m1"].acknowledged
    else:
        illegal(state, r.Acknowledged("m1"))


# How this host came to be what it is to the instance.
HISTORIES: Mapping[Holding | None, list[Record]] = {
    None: [],
    Holding.HELD: BORN,
    Holding.RELEASED: [*BORN, *path_to(OUTGOING_STEPS, OUT, Outgoing.RELEASED)],
    Holding.ELSEWHERE: [*BORN, *path_to(OUTGOING_STEPS, OUT, Outgoing.FREED)],
    Holding.ACQUIRED: path_to(INCOMING_STEPS, IN, Incoming.ACQUIRED),
    Holding.LOST: [*BORN, r.Lost(VM, "killed")],
    Holding.REMOVED: [*BORN, r.Removed(VM, "deleted")],
}
INSTANCE_RECORDS: Mapping[Record, set[Holding | None]] = {
    r.Created(VM, Epoch(2, 0)): {None, Holding.REMOVED},
    spawned(): {Holding.HELD},
    r.Stopped(VM): {Holding.HELD, Holding.RELEASED},
    r.Removed(VM, "deleted"): {Holding.HELD, Holding.LOST},
    r.Lost(VM, "killed"): {Holding.HELD},
    r.Superseded(VM, Epoch(2, 0)): {None, *Holding},
}


@pytest.mark.parametrize("holding", list(HISTORIES), ids=str)
@pytest.mark.parametrize("record", list(INSTANCE_RECORDS), ids=lambda record: type(record).__name__)
def test_the_full_product_of_holdings_and_records_of_an_instance(holding: Holding | None, record: Record) -> None:
    """No record of an instance can be explained for a host that is nothing, or no longer, to it."""
    state = fold(HISTORIES[holding])
    assert (VM in state.instances and state.instances[VM].holding) == (holding or False)

    if holding in INSTANCE_RECORDS[record]:
        apply(state, record)
    else:
        illegal(state, record)


@pytest.mark.parametrize("holding", list(HISTORIES), ids=str)
def test_only_the_owner_may_run_and_only_under_its_own_epoch(holding: Holding | None) -> None:
    state = fold(HISTORIES[holding])
    epochs = [Epoch(0, 9), N, N.handed_over(), N.taken_back(), Epoch(2, 0)]
    own = state.instances[VM].epoch if holding else None

    allowed = [epoch for epoch in epochs if state.may_run(VM, epoch)]

    assert allowed == ([own] if holding in {Holding.HELD, Holding.ACQUIRED} else [])


def test_a_superseded_owner_may_not_run() -> None:
    state = fold([*BORN, r.Superseded(VM, Epoch(2, 0))])

    assert not state.may_run(VM, N)
    assert state.is_superseded(VM, Epoch(1, 99))
    assert not state.is_superseded(VM, Epoch(2, 0))
    illegal(state, r.Superseded(VM, Epoch(2, 0)))
    illegal(state, r.Superseded(VM, Epoch(1, 9)))


@pytest.mark.parametrize(
    ("stage", "record"),
    [
        (Outgoing.PAUSING, r.Released("m1", Epoch(1, 2), "b", "j", "u")),
        (Outgoing.RELEASED, r.Reclaimed("m1", N)),
        (Outgoing.RELEASED, r.Freed("m1", N)),
        (Outgoing.RELEASED, r.Freed("m1", Epoch(0, 9))),
    ],
)
def test_an_ownership_record_of_the_wrong_epoch_is_illegal_at_the_source(stage: Outgoing, record: Record) -> None:
    illegal(fold([*BORN, *path_to(OUTGOING_STEPS, OUT, stage)]), record)


def test_an_ownership_record_of_the_wrong_epoch_is_illegal_at_the_destination() -> None:
    illegal(fold(path_to(INCOMING_STEPS, IN, Incoming.PREPARED)), r.Acquired("m1", N))
    illegal(fold(path_to(INCOMING_STEPS, IN, Incoming.ACQUIRED)), r.Started("m1", N))
    newer: list[Record] = [r.Created(VM, Epoch(1, 2)), spawned(), r.Removed(VM, "deleted")]
    illegal(fold([*newer, *path_to(INCOMING_STEPS, IN, Incoming.PREPARED)]), IN[r.Acquired])


def test_a_guest_process_follows_its_instance_and_ends_with_it() -> None:
    arriving = spawned(migration="m1")
    state = fold([IN[r.Reserved], arriving, IN[r.Prepared]])
    assert state.incoming["m1"].guest == arriving
    assert VM not in state.instances

    state = apply(apply(state, IN[r.Acquired]), IN[r.Started])
    assert state.instances[VM].guest == spawned(), "no longer half built"

    state = apply(state, r.Stopped(VM))
    assert state.instances[VM].guest is None


def test_a_half_built_guest_belongs_to_a_reservation() -> None:
    for stage in [stage for stage in [None, *Incoming] if stage is not Incoming.RESERVED]:
        illegal(fold(path_to(INCOMING_STEPS, IN, stage)), spawned(migration="m1"))


def test_states_are_never_changed_in_place() -> None:
    before = fold(BORN)
    kept = dict(before.instances)

    apply(before, OUT[r.TicketIssued])
    apply(before, r.Lost(VM, "killed"))

    assert dict(before.instances) == kept
    assert not before.outgoing


@pytest.mark.parametrize("last", [[], [r.Lost(VM, "guest_lost")]], ids=["now", "by an earlier release"])
def test_an_instance_taken_back_without_its_guest_is_lost_by_that_one_record(last: list[Record]) -> None:
    """Two records could be torn apart, and the instance look as if an operator had stopped it. Found by the model."""
    in_doubt = [*BORN, *path_to(OUTGOING_STEPS, OUT, Outgoing.RELEASED), r.Stopped(VM)]

    after = fold([*in_doubt, OUT[r.Reclaimed], *last])

    assert after.instances[VM].holding is Holding.LOST
    assert after.outgoing["m1"].stage is Outgoing.RECLAIMED
    assert not after.may_run(VM, N.taken_back())
