"""What a journal may forget: nothing that a rule may ask for, and all else. `test_two_hosts` compacts at random."""

from __future__ import annotations

from dataclasses import fields

import pytest

from vmmigrate.errors import JournalError, RequestError
from vmmigrate.ownership import records as r
from vmmigrate.ownership import rules
from vmmigrate.ownership.compaction import compacted, snapshot
from vmmigrate.ownership.records import Epoch
from vmmigrate.ownership.rules import Answer
from vmmigrate.ownership.state import (
    Holding,
    Incoming,
    IncomingState,
    InstanceState,
    OutgoingState,
    Ownership,
    apply,
)

from .world import VM, Host, boot, fold, hand_over, reach_ready, release, spawned

HOSTS = ("a", "b")


def back_and_forth(times: int, acknowledged: bool) -> tuple[Host, Host]:
    """Two hosts between which one guest went *times* times."""
    source, destination = boot("a"), Host("b")
    for number in range(times):
        hand_over(source, destination, f"m{number}")
        if acknowledged:
            destination.commit(rules.Acknowledge(f"m{number}"))
        source, destination = destination, source
    return (source, destination) if source.name == "a" else (destination, source)


def test_however_often_a_guest_went_back_and_forth_the_same_is_kept() -> None:
    few, many = back_and_forth(4, acknowledged=True), back_and_forth(40, acknowledged=True)

    for fewer, more in zip(few, many, strict=True):
        assert len(more.records) > 5 * len(fewer.records)
        fewer.compact(fewer.state.leftovers)
        more.compact(more.state.leftovers)
        assert len(more.records) == len(fewer.records) <= 5


def test_a_verdict_is_kept_until_its_source_has_acknowledged_it() -> None:
    """Rule 6: asked again years later, the answer is the verdict, and not what ownership has become meanwhile."""
    a, b = back_and_forth(6, acknowledged=False)

    b.compact()

    for migration in ("m0", "m2", "m4"):
        assert b.commit(rules.Settle(migration, "a", guest_runs=False)).answer is Answer.STARTED
        b.commit(rules.Acknowledge(migration))
    b.compact(b.state.leftovers)
    assert list(b.state.incoming) == ["m4"]
    assert b.commit(rules.Settle("m2", "a", guest_runs=False)).answer is Answer.UNKNOWN
    a.compact(a.state.leftovers)
    assert set(a.state.incoming) == {"m1", "m3", "m5"}


@pytest.mark.parametrize("code", ["refused", "returned"])
def test_a_refusal_is_kept_until_it_is_acknowledged(code: str) -> None:
    source, destination = boot(), Host("b")
    reach_ready(source, destination)
    epoch = release(source, destination)
    if code == "returned":
        destination.commit(rules.Acquire("m1", epoch))
    destination.commit(rules.Return("m1", "x") if code == "returned" else rules.Refuse("m1", "x"))

    destination.compact(destination.state.leftovers)

    answer = destination.commit(rules.Settle("m1", "a", guest_runs=False)).answer
    assert answer is Answer(code)
    source.commit(rules.Evidence("m1", answer, destination.journal_id))
    destination.commit(rules.Acknowledge("m1"))
    destination.compact()
    kept = {Incoming.RETURNED} if code == "returned" else set()
    assert {incoming.stage for incoming in destination.state.incoming.values()} == kept


def test_a_source_in_doubt_stays_in_doubt() -> None:
    source, destination = boot(), Host("b")
    reach_ready(source, destination)
    release(source, destination)

    source.compact()

    assert source.state.instances[VM].holding is Holding.RELEASED
    with pytest.raises(rules.OwnershipRefusal, match="another journal"):
        source.commit(rules.Evidence("m1", Answer.REFUSED, "another"))
    source.commit(rules.Evidence("m1", Answer.REFUSED, destination.journal_id))
    assert source.may_run()


def test_a_stale_handoff_and_a_used_id_of_an_instance_are_refused_after_everything_else_is_forgotten() -> None:
    a, _ = back_and_forth(3, acknowledged=True)
    a.compact(a.state.leftovers)

    a.commit(rules.Reserve(r.Reserved("late", VM, "b", "https://b")))
    with pytest.raises(rules.OwnershipRefusal) as refusal:
        a.commit(rules.Prepare("late", Epoch(1, 1), "running"))

    assert refusal.value.code == "stale_epoch"


def test_a_removed_instance_that_is_made_again_gets_a_higher_term() -> None:
    host = boot()
    host.commit(rules.Stop(VM))
    host.commit(rules.Remove(VM))
    host.compact(host.state.leftovers)

    host.commit(rules.Create(VM))

    assert host.epoch() == Epoch(2, 0)


def test_the_word_of_an_operator_still_goes_to_every_host_that_got_the_instance_later() -> None:
    """Rule 8: from the winner along the chain, also over migrations that ended long ago."""
    a, b, c, d = boot("a"), Host("b"), Host("c"), Host("d")
    for number in range(3):
        for source, destination in ((a, b), (b, c), (c, b), (b, d), (d, a)):
            hand_over(source, destination, f"{source.name}-{destination.name}-{number}")
            destination.commit(rules.Acknowledge(f"{source.name}-{destination.name}-{number}"))
    hand_over(a, b, "last")
    b.compact(b.state.leftovers)

    b.commit(rules.Supersede(VM, Epoch(2, 0), Epoch(1, 1)))

    due = {(notice.migration, notice.host) for notice in rules.notices(b.state)}
    assert due == {("b-c-2", "c"), ("b-d-2", "d")}


def test_the_newest_migration_from_each_host_is_kept_for_that_word_may_come_from_it() -> None:
    a, b, c = boot("a"), Host("b"), Host("c")
    for number in range(3):
        for source, destination in ((a, b), (b, c), (c, b), (b, a)):
            hand_over(source, destination, f"{source.name}-{destination.name}-{number}")
            destination.commit(rules.Acknowledge(f"{source.name}-{destination.name}-{number}"))

    b.compact(b.state.leftovers)

    assert list(b.state.incoming) == ["a-b-2", "c-b-2"]


def test_a_notice_that_is_still_to_be_told_is_kept_although_the_guest_went_there_again() -> None:
    a, b = boot("a"), Host("b")
    reach_ready(a, b, "m1")
    release(a, b, "m1")
    a.commit(rules.ResolveSource("m1", "its power is off"))
    b.commit(rules.Refuse("m1", "x"))
    hand_over(a, b, "m2")
    before = rules.notices(a.state)
    assert [notice.migration for notice in before] == ["m1"]

    a.compact()

    assert rules.notices(a.state) == before
    a.commit(rules.Notify("m1", before[0].epoch))
    a.compact()
    assert rules.notices(a.state) == ()
    assert list(a.state.outgoing) == ["m2"]


def test_what_superseded_an_instance_still_does() -> None:
    host = Host("a")
    host.commit(rules.Supersede(VM, Epoch(3, 0), Epoch(1, 4)))

    host.compact()

    assert host.state.superseded == {VM: Epoch(3, 0)}
    assert host.state.superseded_since == {VM: Epoch(1, 4)}
    with pytest.raises(rules.OwnershipRefusal, match="another host"):
        host.commit(rules.Create(VM))


def test_what_ended_a_moment_ago_is_kept() -> None:
    host, other = boot(), Host("b")
    reach_ready(host, other)
    host.commit(rules.EndAttempt("m1", "cancelled"))
    other.commit(rules.Refuse("m1", "cancelled"))
    other.commit(rules.Acknowledge("m1"))

    for side, kept in ((host, "outgoing"), (other, "incoming")):
        everything = compacted(side.state, recent={"m1"}, gone=side.state.leftovers)
        nothing = compacted(side.state, gone=side.state.leftovers)
        assert (list(getattr(everything, kept)), list(getattr(nothing, kept))) == (["m1"], [])
    assert host.commit(rules.EndAttempt("m1", "again")).records == ()


def test_a_process_that_may_still_be_there_is_kept_with_what_explains_it() -> None:
    _, destination = boot(), Host("b")
    source = boot()
    reach_ready(source, destination)
    destination.commit(rules.Refuse("m1", "x"))
    destination.commit(rules.Acknowledge("m1"))

    destination.compact()

    assert destination.state.leftovers == (spawned(migration="m1"),)
    assert list(destination.state.incoming) == ["m1"]
    destination.compact(gone={spawned(migration="m1")})
    assert destination.state == Ownership()
    assert destination.newest == 5


def test_numbers_of_records_go_on() -> None:
    a, _ = back_and_forth(4, acknowledged=True)
    newest = a.newest

    a.compact(a.state.leftovers)
    a.commit(rules.Stop(VM))

    assert a.newest == newest + 1


@pytest.mark.parametrize(
    "record",
    [
        r.KeptInstance(VM, Epoch(1, 1), "asleep", None, None),
        r.KeptOutgoing(r.TicketIssued("m", VM, "b", "h", 1), "gone", None, None, None, None, None),
        r.KeptOutgoing(r.TicketIssued("m", VM, "b", "h", 1), "freed", None, None, None, None, None),
        r.KeptIncoming(r.Reserved("m", VM, "a", "u"), "lost", None, None, None, False),
        r.KeptIncoming(r.Reserved("m", VM, "a", "u"), "prepared", None, None, None, False),
    ],
)
def test_what_no_compaction_can_have_written_is_refused(record: r.Record) -> None:
    with pytest.raises(JournalError) as refusal:
        apply(Ownership(), record)

    assert refusal.value.code == "illegal_record"


def test_what_is_kept_of_something_that_has_a_history_is_refused() -> None:
    source, destination = boot(), Host("b")
    hand_over(source, destination)
    for host in (source, destination):
        for record in snapshot(host.state):
            if isinstance(record, r.KeptLeftover):
                continue
            with pytest.raises(JournalError, match="illegal"):
                apply(fold(host.records), record)


def test_a_forgotten_migration_is_unknown() -> None:
    host, other = boot(), Host("b")
    reach_ready(host, other)
    host.commit(rules.EndAttempt("m1", "cancelled"))
    host.compact()

    with pytest.raises(RequestError, match="no migration"):
        host.commit(rules.EndAttempt("m1", "again"))


@pytest.mark.parametrize(
    ("state", "kept"),
    [(InstanceState, r.KeptInstance), (OutgoingState, r.KeptOutgoing), (IncomingState, r.KeptIncoming)],
)
def test_nothing_of_a_state_is_left_out(state: type, kept: type) -> None:
    """Who adds a field to a state has to say here what becomes of it."""
    assert [field.name for field in fields(kept)] == [field.name for field in fields(state)]


def test_nothing_of_a_journal_is_left_out() -> None:
    kept = {"instances", "outgoing", "incoming", "superseded", "superseded_since", "leftovers"}
    assert {field.name for field in fields(Ownership)} == kept
