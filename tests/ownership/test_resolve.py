"""Rule 8: what an operator may decide, and how every later host learns of it."""

from __future__ import annotations

import pytest

from vmmigrate.errors import JournalError, VmMigrateError
from vmmigrate.ownership import records as r
from vmmigrate.ownership import rules
from vmmigrate.ownership.records import Epoch
from vmmigrate.ownership.recovery import SeenGuest, Step, plan
from vmmigrate.ownership.rules import Answer, Decision, Event
from vmmigrate.ownership.state import GIVEN_AWAY, Holding, Outgoing, apply

from .world import VM, Host, boot, fold, hand_over, reach_ready, release

N = Epoch(1, 1)
WON = Epoch(2, 0)
TO_SOURCE = rules.ResolveSource("m1", "its power is off")


def refused(host: Host, event: Event, code: str) -> None:
    before = list(host.records)
    with pytest.raises(VmMigrateError) as caught:
        host.commit(event)
    assert caught.value.code == code
    assert host.records == before


def in_doubt() -> tuple[Host, Host]:
    source, destination = boot("a"), Host("b")
    reach_ready(source, destination)
    release(source, destination)
    return source, destination


def chain_in_doubt() -> tuple[Host, Host, Host]:
    """The guest went on from b to c; a has heard of nothing since it released it to b."""
    a, b, c = boot("a"), Host("b"), Host("c")
    reach_ready(a, b)
    epoch = release(a, b)
    b.commit(rules.Acquire("m1", epoch))
    b.commit(rules.Start("m1"))
    hand_over(b, c, "m2")
    return a, b, c


# --------------------------------------------------------------------------- the winner is the source


def test_a_source_in_doubt_with_its_paused_guest_becomes_the_owner_of_a_higher_term() -> None:
    source, _ = in_doubt()

    source.commit(TO_SOURCE)

    assert (source.epoch(), source.may_run()) == (WON, True)
    assert source.state.outgoing["m1"].stage is Outgoing.RESOLVED
    assert source.records[-1] == r.Resolved("m1", WON, "its power is off")


def test_a_restarted_winner_runs_its_guest() -> None:
    source, _ = in_doubt()
    source.commit(TO_SOURCE)
    source.crash()

    found = plan(source.state, {VM: SeenGuest(False, N, len(source.records))}, len(source.records))

    assert [step.step for step in found] == [Step.RUN]


def test_a_source_that_is_not_in_doubt_resolves_nothing() -> None:
    pausing, _ = boot("a"), Host("b")
    reach_ready(pausing, Host("b"))
    freed, moved = boot("a"), Host("b")
    hand_over(freed, moved)
    reclaimed, _ = in_doubt()
    reclaimed.commit(rules.Evidence("m1", Answer.REFUSED, "journal-of-b"))
    resolved, _ = in_doubt()
    resolved.commit(TO_SOURCE)

    for host in (pausing, freed, reclaimed, resolved):
        refused(host, TO_SOURCE, "not_in_doubt")
        assert rules.notices(host.state) == () or host is resolved
    refused(moved, TO_SOURCE, "unknown_migration")


def test_a_source_in_doubt_about_a_later_migration_cannot_resolve_an_older_one() -> None:
    source, destination = in_doubt()
    source.commit(rules.Evidence("m1", Answer.REFUSED, destination.journal_id))
    reach_ready(source, Host("c"), "m2")
    release(source, Host("c"), "m2")

    refused(source, TO_SOURCE, "not_in_doubt")
    source.commit(rules.ResolveSource("m2", "its power is off"))


def test_a_source_whose_guest_is_gone_cannot_win() -> None:
    source, _ = in_doubt()
    source.commit(rules.Lose(VM, "gone"))

    refused(source, TO_SOURCE, "guest_lost")


@pytest.mark.parametrize("proof", ["", "  "])
def test_nobody_resolves_without_saying_how_the_other_host_is_fenced(proof: str) -> None:
    source, _ = in_doubt()

    refused(source, rules.ResolveSource("m1", proof), "no_fencing_proof")


@pytest.mark.parametrize("answer", list(Answer))
def test_evidence_that_comes_after_the_operator_changes_nothing(answer: Answer) -> None:
    source, destination = in_doubt()
    source.commit(TO_SOURCE)

    assert source.commit(rules.Evidence("m1", answer, destination.journal_id)).records == ()
    assert source.epoch() == WON


def test_a_superseded_source_that_is_resolved_takes_a_term_above_both() -> None:
    source, _ = in_doubt()
    source.commit(rules.Supersede(VM, Epoch(5, 0)))

    source.commit(TO_SOURCE)

    assert (source.epoch(), source.may_run()) == (Epoch(6, 0), True)


# --------------------------------------------------------------------------- superseded, along the chain


def test_the_winner_tells_its_destination_until_that_has_acknowledged_also_after_a_restart() -> None:
    source, destination = in_doubt()
    assert rules.notices(source.state) == ()
    source.commit(TO_SOURCE)
    due = rules.Notice("m1", VM, WON, N, "b", "https://d")

    source.crash()
    assert rules.notices(source.state) == (due,)
    destination.commit(rules.Supersede(due.instance, due.epoch))
    source.commit(rules.Notify("m1", WON))

    assert rules.notices(source.state) == ()
    assert source.commit(rules.Notify("m1", WON)) == Decision()


def test_the_word_goes_along_the_chain_to_every_later_host() -> None:
    a, b, c = chain_in_doubt()
    a.commit(TO_SOURCE)

    b.commit(rules.Supersede(VM, WON, N))

    assert [(notice.migration, notice.host) for notice in rules.notices(b.state)] == [("m2", "c")]
    c.commit(rules.Supersede(VM, WON, N))
    assert rules.notices(c.state) == ()
    assert [host.may_run() for host in (a, b, c)] == [True, False, False]
    b.commit(rules.Notify("m2", WON))
    assert rules.notices(b.state) == ()


def test_a_winner_to_whom_the_guest_had_come_from_its_destination_is_not_told_of_itself() -> None:
    """a to b and back to a, and b wins: a's older tombstone names b. Found by the model."""
    a, b = boot("a"), Host("b")
    hand_over(a, b)
    reach_ready(b, a, "m2")
    released = release(b, a, "m2")
    b.commit(rules.ResolveSource("m2", "its power is off"))

    a.commit(rules.Supersede(VM, WON, released))

    assert [notice.host for notice in rules.notices(b.state)] == ["a"]
    assert rules.notices(a.state) == ()


def test_a_host_without_a_supersession_tells_nobody() -> None:
    for host in chain_in_doubt():
        assert rules.notices(host.state) == ()


def test_a_destination_that_refused_needs_no_word() -> None:
    source, destination = in_doubt()
    source.commit(rules.Evidence("m1", Answer.REFUSED, destination.journal_id))
    source.commit(rules.Supersede(VM, WON, Epoch(0, 9)))

    assert rules.notices(source.state) == ()
    assert source.commit(rules.Notify("m1", WON)) == Decision()


def test_an_acknowledgement_of_what_was_never_said_is_not_written() -> None:
    source, _ = in_doubt()

    assert source.commit(rules.Notify("m1", WON)) == Decision()
    source.commit(TO_SOURCE)
    assert source.commit(rules.Notify("m1", Epoch(3, 0))) == Decision()


def test_a_host_at_the_same_or_a_higher_epoch_does_not_acknowledge() -> None:
    """Two operators, two winners of one term: neither may believe that the other one will not run."""
    a, b, _ = chain_in_doubt()
    late, _ = in_doubt()
    reach_ready(b_owner := boot("b"), Host("c"), "m2")
    release(b_owner, Host("c"), "m2")
    b_owner.commit(rules.ResolveSource("m2", "its power is off"))

    refused(b_owner, rules.Supersede(VM, WON), "newer_epoch")
    refused(b_owner, rules.Supersede(VM, N), "newer_epoch")
    refused(late, rules.Supersede(VM, N), "newer_epoch")
    b_owner.commit(rules.Supersede(VM, Epoch(3, 0)))
    assert not b_owner.may_run()
    assert a.commit(TO_SOURCE).records
    assert b.commit(rules.Supersede(VM, WON)).records


def test_a_host_that_got_the_guest_from_the_winner_acknowledges_and_runs_on() -> None:
    """The winner has moved on before its word arrived. Found by the model."""
    source, destination = in_doubt()
    destination.commit(rules.Settle("m1", "a", guest_runs=False))
    source.commit(TO_SOURCE)
    hand_over(source, destination, "m2")

    assert destination.commit(rules.Supersede(VM, WON, N)).records
    assert destination.may_run()
    assert rules.notices(destination.state) == ()


def test_a_host_that_got_the_guest_from_the_winner_still_tells_whom_it_had_passed_it_on_to() -> None:
    """The fence falls with its acknowledgement: the host after it must have heard of the word by then, or from it."""
    a, b, c = chain_in_doubt()
    a.commit(TO_SOURCE)
    hand_over(a, b, "m3")

    b.commit(rules.Supersede(VM, WON, N))

    assert [(notice.migration, notice.host) for notice in rules.notices(b.state)] == [("m2", "c")]
    assert [host.may_run() for host in (a, b, c)] == [False, True, True]
    c.commit(rules.Supersede(VM, WON, N))
    assert not c.may_run()


# --------------------------------------------------------------------------- the superseded guest


def test_the_superseded_guest_is_kept_until_the_winner_runs() -> None:
    source, destination = in_doubt()
    destination.commit(rules.Acquire("m1", N))
    destination.commit(rules.Start("m1"))
    source.commit(TO_SOURCE)
    destination.commit(rules.Supersede(VM, WON))
    assert destination.state.instances[VM].guest is not None

    destination.commit(rules.Yield(VM, WON))

    known = destination.state.instances[VM]
    assert (known.holding, known.epoch, known.guest) == (Holding.ELSEWHERE, WON, None)
    assert len(destination.state.leftovers) == 1
    assert destination.commit(rules.Yield(VM, WON)) == Decision()
    assert destination.commit(rules.Supersede(VM, WON)) == Decision()


def test_a_superseded_host_that_yielded_may_receive_the_instance_again() -> None:
    source, destination = in_doubt()
    destination.commit(rules.Acquire("m1", N))
    destination.commit(rules.Start("m1"))
    source.commit(TO_SOURCE)
    destination.commit(rules.Supersede(VM, WON))
    destination.commit(rules.Yield(VM, WON))

    hand_over(source, destination, "m2")

    assert destination.epoch() == WON.handed_over()
    assert (source.may_run(), destination.may_run()) == (False, True)


def test_an_attempt_of_a_superseded_host_ends_when_it_yields() -> None:
    host = boot("b")
    reach_ready(host, Host("c"), "m2")
    host.commit(rules.Supersede(VM, WON))

    assert host.commit(rules.Yield(VM, WON)).records == (r.Resumed("m2"), r.Yielded(VM, WON))


def test_only_a_superseded_owner_yields_and_only_to_the_one_that_superseded_it() -> None:
    owner = boot()
    assert owner.commit(rules.Yield(VM, WON)) == Decision()
    assert Host("b").commit(rules.Yield(VM, WON)) == Decision()
    owner.commit(rules.Supersede(VM, Epoch(3, 0)))

    assert owner.commit(rules.Yield(VM, WON)) == Decision()
    with pytest.raises(JournalError):
        apply(owner.state, r.Yielded(VM, WON))
    with pytest.raises(JournalError):
        apply(fold([]), r.Yielded(VM, WON))


# --------------------------------------------------------------------------- the winner is the destination


def test_the_destination_wins_by_the_ordinary_acquire() -> None:
    source, destination = in_doubt()

    decision = destination.commit(rules.ResolveDestination("m1", N))

    assert decision.records == (r.Acquired("m1", N.handed_over()),)
    destination.commit(rules.Start("m1"))
    source.commit(rules.Evidence("m1", Answer.STARTED, destination.journal_id))
    assert (source.may_run(), destination.may_run()) == (False, True)


def test_the_destination_loses_against_every_verdict_against_superseded_and_against_another_epoch() -> None:
    event = rules.ResolveDestination("m1", N)
    _, refusing = in_doubt()
    refusing.commit(rules.Settle("m1", "a", guest_runs=False))
    _, returning = in_doubt()
    returning.commit(rules.Acquire("m1", N))
    returning.commit(rules.Return("m1", "disk_busy"))
    _, superseded = in_doubt()
    superseded.commit(rules.Supersede(VM, WON))

    refused(refusing, event, "verdict_given")
    refused(returning, event, "verdict_given")
    refused(superseded, event, "superseded")
    refused(in_doubt()[1], rules.ResolveDestination("m1", Epoch(1, 2)), "stale_epoch")
    refused(Host("b"), event, "unknown_migration")


def test_a_destination_that_has_acquired_already_says_so() -> None:
    _, destination = in_doubt()
    event = rules.ResolveDestination("m1", N)
    destination.commit(rules.Acquire("m1", N))

    assert destination.commit(event) == Decision(answer=Answer.PENDING)
    destination.commit(rules.Start("m1"))
    assert destination.commit(event) == Decision(answer=Answer.STARTED)


def test_stages_that_may_have_given_the_guest_away() -> None:
    assert {Outgoing.RELEASED, Outgoing.FREED, Outgoing.RESOLVED} == GIVEN_AWAY
