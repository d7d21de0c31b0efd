"""The ownership rules of design 4.2, one by one."""

from __future__ import annotations

import pytest

from vmmigrate.errors import IdentityError, RequestError, VmMigrateError
from vmmigrate.ownership import records as r
from vmmigrate.ownership import rules
from vmmigrate.ownership.records import Epoch
from vmmigrate.ownership.rules import Answer, Decision, Event, verdict
from vmmigrate.ownership.state import Holding, Incoming, Outgoing

from .world import VM, Host, boot, hand_over, present, reach_ready, release, spawned, ticket

N = Epoch(1, 1)


def refused(host: Host, event: Event, code: str) -> VmMigrateError:
    """*host* refuses *event* with *code*, and its journal is as it was."""
    before = list(host.records)
    with pytest.raises(VmMigrateError) as caught:
        host.commit(event)
    assert caught.value.code == code
    assert "\n" not in caught.value.text
    assert host.records == before
    return caught.value


def ready() -> tuple[Host, Host]:
    source, destination = boot("a"), Host("b")
    reach_ready(source, destination)
    return source, destination


def in_doubt() -> tuple[Host, Host, rules.Acquire]:
    """The source released; the Handoff is under way."""
    source, destination = ready()
    return source, destination, rules.Acquire("m1", release(source, destination))


# --------------------------------------------------------------------------- the way it should go


def test_a_migration_moves_the_instance_and_raises_n_by_one() -> None:
    source, destination = boot("a"), Host("b")

    hand_over(source, destination)

    assert (source.may_run(), destination.may_run()) == (False, True)
    assert destination.epoch() == source.epoch() == N.handed_over()
    assert source.state.instances[VM].holding is Holding.ELSEWHERE
    assert source.state.outgoing["m1"].stage is Outgoing.FREED


def test_there_and_back_and_there_again() -> None:
    a, b = boot("a"), Host("b")

    for turn, (source, destination) in enumerate([(a, b), (b, a), (a, b)]):
        hand_over(source, destination, f"m{turn}")
        assert (source.may_run(), destination.may_run()) == (False, True)

    assert b.epoch() == Epoch(1, 4)


def test_at_every_step_of_a_migration_at_most_one_host_may_run() -> None:
    source, destination, handoff = in_doubt()
    assert (source.may_run(), destination.may_run()) == (False, False)
    destination.commit(handoff)
    assert (source.may_run(), destination.may_run()) == (False, True)
    destination.commit(rules.Return("m1", "disk_busy"))
    assert (source.may_run(), destination.may_run()) == (False, False)
    source.commit(rules.Evidence("m1", Answer.RETURNED, destination.journal_id))
    assert (source.may_run(), destination.may_run()) == (True, False)


# --------------------------------------------------------------------------- 2, 3: one verdict per M


def test_a_handoff_that_arrives_after_the_refusal_does_nothing() -> None:
    _, destination, handoff = in_doubt()
    destination.commit(rules.Refuse("m1", "no_handoff"))

    refused(destination, handoff, "verdict_given")

    assert not destination.may_run()


def test_a_handoff_that_arrives_twice_acquires_once() -> None:
    _, destination, handoff = in_doubt()
    destination.commit(handoff)

    refused(destination, handoff, "verdict_given")


def test_what_was_acquired_cannot_be_refused() -> None:
    _, destination, handoff = in_doubt()
    destination.commit(handoff)

    refused(destination, rules.Refuse("m1", "late"), "verdict_given")


def test_started_and_returned_exclude_each_other() -> None:
    for first, second in ((rules.Start("m1"), rules.Return("m1", "x")), (rules.Return("m1", "x"), rules.Start("m1"))):
        _, destination, handoff = in_doubt()
        destination.commit(handoff)
        destination.commit(first)

        refused(destination, second, "verdict_given")
        refused(destination, first, "verdict_given")
        refused(destination, rules.Refuse("m1", "late"), "verdict_given")


@pytest.mark.parametrize("event", [rules.Start("m1"), rules.Return("m1", "x")], ids=["start", "return"])
def test_nothing_is_started_or_returned_that_was_not_acquired(event: Event) -> None:
    _, destination, _ = in_doubt()
    refused(destination, event, "verdict_given")

    destination.commit(rules.Refuse("m1", "no_handoff"))
    refused(destination, event, "verdict_given")


def test_a_refusal_said_twice_is_written_once() -> None:
    _, destination = ready()

    assert destination.commit(rules.Refuse("m1", "cancelled")).answer is Answer.REFUSED
    assert destination.commit(rules.Refuse("m1", "again")) == Decision((), Answer.REFUSED)


def test_nothing_is_acquired_before_it_was_prepared() -> None:
    source, destination = boot("a"), Host("b")
    source.commit(rules.IssueTicket(ticket("m1", "b")))
    destination.commit(rules.Reserve(r.Reserved("m1", VM, "a", "https://a")))

    refused(destination, rules.Acquire("m1", N), "verdict_given")
    refused(destination, rules.Acquire("m9", N), "unknown_migration")


def test_a_handoff_of_another_epoch_than_was_prepared_is_refused() -> None:
    _, destination, _ = in_doubt()

    refused(destination, rules.Acquire("m1", Epoch(1, 9)), "stale_epoch")


# --------------------------------------------------------------------------- 5, 6, 7: evidence


@pytest.mark.parametrize("answer", [Answer.RUNNING, Answer.STARTED])
def test_the_source_frees_when_the_destination_runs_it(answer: Answer) -> None:
    source, destination, _ = in_doubt()

    decision = source.commit(rules.Evidence("m1", answer, destination.journal_id))

    assert decision.records == (r.Freed("m1", N.handed_over()),)
    assert source.state.instances[VM].guest is None


@pytest.mark.parametrize("answer", [Answer.REFUSED, Answer.RETURNED])
def test_the_source_takes_back_at_n_plus_two_when_the_destination_refused_or_returned(answer: Answer) -> None:
    """Plus two, so that it never equals the epoch that the destination might have acquired."""
    source, destination, _ = in_doubt()

    decision = source.commit(rules.Evidence("m1", answer, destination.journal_id))

    assert decision.records == (r.Reclaimed("m1", Epoch(1, 3)),)
    assert source.may_run()
    assert source.state.instances[VM].guest == spawned()


@pytest.mark.parametrize("answer", [Answer.PENDING, Answer.UNKNOWN])
def test_pending_and_unknown_change_nothing_and_later_evidence_still_counts(answer: Answer) -> None:
    source, destination, _ = in_doubt()

    for journal_id in (destination.journal_id, "journal-of-nobody"):
        assert source.commit(rules.Evidence("m1", answer, journal_id)) == Decision((), answer)
    assert source.state.instances[VM].holding is Holding.RELEASED

    source.commit(rules.Evidence("m1", Answer.REFUSED, destination.journal_id))
    assert source.may_run()


@pytest.mark.parametrize("answer", [Answer.RUNNING, Answer.STARTED, Answer.REFUSED, Answer.RETURNED])
def test_an_answer_out_of_another_journal_is_indeterminate(answer: Answer) -> None:
    """The journal that said Ready was lost; what a new one says of M is no evidence."""
    source, _, _ = in_doubt()

    refused(source, rules.Evidence("m1", answer, "journal-of-b-restored"), "indeterminate")

    assert not source.may_run()


@pytest.mark.parametrize("answer", list(Answer))
def test_evidence_counts_only_while_the_last_ownership_record_is_released_m(answer: Answer) -> None:
    """Before `released`, after a settlement, and when a *later* migration is in doubt: old words change nothing."""
    early, destination = ready()
    settled, other, _ = in_doubt()
    settled.commit(rules.Evidence("m1", Answer.REFUSED, other.journal_id))
    again, third, _ = in_doubt()
    again.commit(rules.Evidence("m1", Answer.REFUSED, third.journal_id))
    third.commit(rules.Refuse("m1", "no_handoff"))
    reach_ready(again, third, "m2")
    release(again, third, "m2")

    for host in (early, settled, again):
        before = list(host.records)
        assert host.commit(rules.Evidence("m1", answer, destination.journal_id)) == Decision((), answer)
        assert host.records == before
    assert again.state.outgoing["m2"].stage is Outgoing.RELEASED


def test_evidence_for_a_migration_that_never_left_is_unknown() -> None:
    refused(boot(), rules.Evidence("m9", Answer.RUNNING, "j"), "unknown_migration")


def test_a_source_whose_paused_guest_died_in_doubt_says_so_when_it_gets_it_back() -> None:
    """Design 4.2: the crash of the owner's guest loses the guest, and says so; `held` without a guest is `stopped`."""
    source, destination, _ = in_doubt()
    assert source.commit(rules.Lose(VM, "killed")).records == (r.Stopped(VM),)
    assert source.state.instances[VM].holding is Holding.RELEASED, "the destination may still start it"

    source.commit(rules.Evidence("m1", Answer.REFUSED, destination.journal_id))

    assert source.state.instances[VM].holding is Holding.LOST
    assert not source.may_run()


def test_a_source_in_doubt_neither_ends_nor_stops_nor_migrates_nor_deletes() -> None:
    """Rules 5 and 11: cancel, errors, and operators change nothing there."""
    source, _, _ = in_doubt()

    refused(source, rules.EndAttempt("m1", "cancelled"), "in_doubt")
    refused(source, rules.Stop(VM), "in_doubt")
    refused(source, rules.Remove(VM), "in_doubt")
    refused(source, rules.IssueTicket(ticket("m2", "c")), "in_doubt")
    refused(source, rules.Spawn(spawned(pid=8)), "in_doubt")
    refused(source, rules.Release("m1", "j", "u"), "in_doubt")


# --------------------------------------------------------------------------- 5, 6: settle


def test_settle_refuses_durably_what_was_only_prepared() -> None:
    _, destination, handoff = in_doubt()

    decision = destination.commit(rules.Settle("m1", "a", guest_runs=False))

    assert decision == Decision((r.Refused("m1", "settled"),), Answer.REFUSED)
    refused(destination, handoff, "verdict_given")


@pytest.mark.parametrize(
    ("events", "answer"),
    [
        ([rules.Refuse("m1", "x")], Answer.REFUSED),
        ([rules.Acquire("m1", N)], Answer.PENDING),
        ([rules.Acquire("m1", N), rules.Start("m1")], Answer.STARTED),
        ([rules.Acquire("m1", N), rules.Return("m1", "x")], Answer.RETURNED),
    ],
)
def test_settle_gives_the_same_answer_however_often_it_is_asked(events: list[Event], answer: Answer) -> None:
    _, destination, _ = in_doubt()
    for event in events:
        destination.commit(event)

    for _ in range(2):
        assert destination.commit(rules.Settle("m1", "a", guest_runs=True)) == Decision((), answer)
        assert verdict(destination.state, "m1") is answer


def test_settle_twice_of_a_prepared_migration_gives_one_record_and_one_answer() -> None:
    _, destination, _ = in_doubt()

    answers = [destination.commit(rules.Settle("m1", "a", guest_runs=False)).answer for _ in range(3)]

    assert answers == [Answer.REFUSED] * 3
    assert destination.records.count(r.Refused("m1", "settled")) == 1


def test_a_migration_that_was_never_prepared_here_is_unknown_never_refused() -> None:
    """The record may have been lost with a journal."""
    destination = Host("b")
    assert destination.commit(rules.Settle("m1", "a", guest_runs=False)) == Decision((), Answer.UNKNOWN)

    destination.commit(rules.Reserve(r.Reserved("m1", VM, "a", "https://a")))
    assert destination.commit(rules.Settle("m1", "a", guest_runs=False)) == Decision((), Answer.UNKNOWN)

    destination.commit(rules.Refuse("m1", "cancelled"))
    assert destination.state.incoming["m1"].stage is Incoming.ABANDONED
    assert destination.commit(rules.Settle("m1", "a", guest_runs=False)) == Decision((), Answer.UNKNOWN)


def test_settle_is_open_to_the_source_of_m_and_to_an_orchestrator_only() -> None:
    _, destination, _ = in_doubt()

    assert isinstance(refused(destination, rules.Settle("m1", "c", guest_runs=False), "forbidden"), IdentityError)
    assert destination.commit(rules.Settle("m1", None, guest_runs=False)).answer is Answer.REFUSED


def test_a_prepared_migration_whose_guest_runs_is_indeterminate() -> None:
    _, destination, _ = in_doubt()

    refused(destination, rules.Settle("m1", "a", guest_runs=True), "indeterminate")


def test_reading_the_verdict_writes_nothing() -> None:
    _, destination, _ = in_doubt()
    before = list(destination.records)

    assert verdict(destination.state, "m1") is Answer.PENDING
    assert verdict(destination.state, "m9") is Answer.UNKNOWN
    assert destination.records == before


def test_a_verdict_is_acknowledged_once_and_only_once_given() -> None:
    _, destination, _ = in_doubt()
    assert destination.commit(rules.Acknowledge("m1")) == Decision()

    destination.commit(rules.Refuse("m1", "x"))

    assert destination.commit(rules.Acknowledge("m1")).records == (r.Acknowledged("m1"),)
    assert destination.commit(rules.Acknowledge("m1")) == Decision()
    assert verdict(destination.state, "m1") is Answer.REFUSED


def test_a_verdict_survives_what_becomes_of_the_instance() -> None:
    """Rule 6: verdicts are never derived from current ownership."""
    a, b = boot("a"), Host("b")
    hand_over(a, b, "m1")
    hand_over(b, a, "m2")

    assert verdict(b.state, "m1") is Answer.STARTED


# --------------------------------------------------------------------------- 8: superseded


def test_superseded_blocks_acquire_start_spawn_and_any_run_also_after_a_restart() -> None:
    above = rules.Supersede(VM, Epoch(2, 0))
    _, prepared, handoff = in_doubt()
    prepared.commit(above)
    _, acquired, _ = in_doubt()
    acquired.commit(handoff)
    acquired.commit(above)
    owner = boot("c")
    owner.commit(above)

    for host in (prepared, acquired, owner):
        host.crash()
        assert not host.may_run()
    refused(prepared, handoff, "superseded")
    refused(acquired, rules.Start("m1"), "superseded")
    refused(owner, rules.Spawn(spawned(pid=8)), "superseded")
    refused(owner, rules.IssueTicket(ticket("m1", "b")), "superseded")


def test_superseded_leaves_the_ways_out_open() -> None:
    """The superseded destination must still be able to refuse and to return."""
    _, prepared, handoff = in_doubt()
    prepared.commit(rules.Supersede(VM, Epoch(2, 0)))
    assert prepared.commit(rules.Settle("m1", "a", guest_runs=False)).answer is Answer.REFUSED

    _, acquired, _ = in_doubt()
    acquired.commit(handoff)
    acquired.commit(rules.Supersede(VM, Epoch(2, 0)))
    assert acquired.commit(rules.Return("m1", "superseded")).answer is Answer.RETURNED


def test_a_lower_or_repeated_supersession_is_acknowledged_and_not_written() -> None:
    host = boot()
    host.commit(rules.Supersede(VM, Epoch(2, 0)))

    assert host.commit(rules.Supersede(VM, Epoch(2, 0))) == Decision()
    assert host.commit(rules.Supersede(VM, Epoch(1, 9))) == Decision()


def test_an_epoch_above_the_supersession_is_welcome() -> None:
    host = Host("b")
    host.commit(rules.Supersede(VM, Epoch(2, 0)))
    host.commit(rules.Reserve(r.Reserved("m1", VM, "a", "https://a")))

    refused(host, rules.Prepare("m1", Epoch(1, 4), "running"), "superseded")
    host.commit(rules.Prepare("m1", Epoch(2, 0), "running"))


# --------------------------------------------------------------------------- 9, 11: pausing and cancelling


def test_the_wanted_run_state_stands_in_the_journal_before_the_pause() -> None:
    source, _ = ready()

    assert source.state.outgoing["m1"].desired == "running"
    assert source.state.instances[VM].holding is Holding.HELD


def test_an_attempt_that_ends_before_released_costs_nothing() -> None:
    """Rule 10: whatever stage it had reached, the owner is the owner and the next attempt is not larger."""
    for stage in (Outgoing.AWAITING_PEER, Outgoing.ACTIVE, Outgoing.PAUSING):
        source = boot("a")
        source.commit(rules.IssueTicket(ticket("m1", "b")))
        if stage is not Outgoing.AWAITING_PEER:
            source.commit(present("m1", "b"))
        if stage is Outgoing.PAUSING:
            source.commit(rules.BeginPause("m1", "running"))

        source.commit(rules.EndAttempt("m1", "cancelled"))
        assert source.commit(rules.EndAttempt("m1", "cancelled")) == Decision(), "said twice, written once"

        assert source.may_run()
        assert source.epoch() == N
        hand_over(source, Host("c"), "m2")


def test_a_destination_cancels_without_a_verdict_before_ready_and_with_one_after() -> None:
    source, destination = boot("a"), Host("b")
    source.commit(rules.IssueTicket(ticket("m1", "b")))
    destination.commit(rules.Reserve(r.Reserved("m1", VM, "a", "https://a")))
    assert destination.commit(rules.Refuse("m1", "cancelled")) == Decision((r.Abandoned("m1", "cancelled"),))
    assert destination.commit(rules.Refuse("m1", "again")) == Decision()

    _, prepared = ready()
    assert prepared.commit(rules.Refuse("m1", "cancelled")).records == (r.Refused("m1", "cancelled"),)


def test_only_a_paused_attempt_is_released_and_only_a_begun_one_is_paused() -> None:
    source = boot()
    source.commit(rules.IssueTicket(ticket("m1", "b")))
    refused(source, rules.BeginPause("m1", "running"), "migration_over")
    refused(source, rules.Release("m1", "j", "u"), "migration_over")

    source.commit(present("m1", "b"))
    refused(source, rules.Release("m1", "j", "u"), "migration_over")
    source.commit(rules.BeginPause("m1", "running"))
    source.commit(rules.EndAttempt("m1", "cancelled"))

    refused(source, rules.Release("m1", "j", "u"), "migration_over")
    refused(source, rules.BeginPause("m1", "running"), "migration_over")


# --------------------------------------------------------------------------- 12: who may be a destination


def test_a_host_in_doubt_refuses_to_be_the_destination() -> None:
    source, _, _ = in_doubt()

    refused(source, rules.Reserve(r.Reserved("m2", VM, "b", "https://b")), "in_doubt")


def test_an_owner_refuses_to_be_the_destination_of_its_own_instance() -> None:
    _, destination, handoff = in_doubt()
    destination.commit(handoff)

    for host in (boot(), destination):
        refused(host, rules.Reserve(r.Reserved("m2", VM, "c", "https://c")), "instance_exists")


def test_a_stale_epoch_is_refused_by_a_host_that_holds_a_higher_tombstone() -> None:
    source, destination = boot("a"), Host("b")
    hand_over(source, destination)
    source.commit(rules.Reserve(r.Reserved("m2", VM, "c", "https://c")))

    refused(source, rules.Prepare("m2", N, "running"), "stale_epoch")
    source.commit(rules.Prepare("m2", N.handed_over(), "running"))


def test_an_instance_arrives_once_at_a_time_and_an_id_is_used_once() -> None:
    _, destination = ready()

    refused(destination, rules.Reserve(r.Reserved("m2", VM, "c", "https://c")), "already_migrating")
    refused(destination, rules.Reserve(r.Reserved("m1", "vm2", "a", "https://a")), "migration_exists")
    refused(destination, rules.Create(VM), "instance_exists")


# --------------------------------------------------------------------------- tickets


def ticketed() -> Host:
    source = boot("a")
    source.commit(rules.IssueTicket(ticket("m1", "b")))
    return source


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (rules.ConsumeTicket("m1", VM, "hash-of-another", "b", 0), "ticket_wrong"),
        (rules.ConsumeTicket("m1", "vm2", "hash-m1", "b", 0), "ticket_wrong"),
        (rules.ConsumeTicket("m9", VM, "hash-m1", "b", 0), "ticket_unknown"),
        (present("m1", "c"), "wrong_host"),
        (present("m1", "b", now_s=60), "ticket_expired"),
        (present("m1", "b", now_s=10**9), "ticket_expired"),
    ],
    ids=["wrong", "foreign instance", "unknown migration", "foreign host", "just expired", "long expired"],
)
def test_a_ticket_that_is_not_for_this_caller_is_refused(event: rules.ConsumeTicket, code: str) -> None:
    source = ticketed()

    assert isinstance(refused(source, event, code), IdentityError)
    source.commit(present("m1", "b", now_s=59))


def test_a_ticket_is_used_once() -> None:
    source = ticketed()
    source.commit(present("m1", "b"))

    refused(source, present("m1", "b"), "ticket_used")
    refused(source, rules.ConsumeTicket("m1", VM, "hash-of-another", "b", 0), "ticket_wrong")
    refused(source, present("m1", "c"), "wrong_host")


def test_a_new_ticket_supersedes_one_that_nobody_used() -> None:
    source = ticketed()

    decision = source.commit(rules.IssueTicket(ticket("m2", "c")))

    assert decision.records == (r.Ended("m1", "superseded"), ticket("m2", "c"))
    refused(source, present("m1", "b"), "ticket_used")
    source.commit(present("m2", "c"))


def test_a_migration_under_way_is_not_superseded_by_a_new_ticket() -> None:
    source = ticketed()
    source.commit(present("m1", "b"))

    assert isinstance(refused(source, rules.IssueTicket(ticket("m2", "c")), "already_migrating"), RequestError)


def test_tickets_are_issued_by_the_owner_only_and_ids_are_used_once() -> None:
    source, destination = boot("a"), Host("b")
    hand_over(source, destination)

    refused(source, rules.IssueTicket(ticket("m2", "c")), "not_owner")
    refused(destination, rules.IssueTicket(ticket("m1", "c")), "migration_exists")
    refused(Host("d"), rules.IssueTicket(ticket("m3", "c")), "unknown_instance")


# --------------------------------------------------------------------------- instances


def test_an_instance_is_created_once_and_again_with_a_higher_term_after_its_deletion() -> None:
    host = boot()
    refused(host, rules.Create(VM), "instance_exists")

    host.commit(rules.Remove(VM))
    refused(host, rules.Stop(VM), "unknown_instance")
    host.commit(rules.Create(VM))

    assert host.epoch() == Epoch(2, 0)


def test_a_superseded_name_is_not_given_to_a_new_instance() -> None:
    host = Host("b")
    host.commit(rules.Supersede(VM, Epoch(2, 0)))

    refused(host, rules.Create(VM), "superseded")


def test_a_tombstone_is_not_deleted_like_an_instance() -> None:
    source, destination = boot("a"), Host("b")
    hand_over(source, destination)

    refused(source, rules.Remove(VM), "not_owner")
    refused(source, rules.Stop(VM), "not_owner")


def test_a_migrating_instance_is_neither_stopped_nor_deleted() -> None:
    source = ticketed()

    refused(source, rules.Stop(VM), "migrating")
    refused(source, rules.Remove(VM), "migrating")


def test_an_owner_whose_guest_died_is_lost_and_its_migration_ended() -> None:
    source, _ = ready()

    source.commit(rules.Lose(VM, "killed"))

    assert source.state.instances[VM].holding is Holding.LOST
    assert source.state.open_outgoing(VM) is None
    refused(source, rules.Release("m1", "j", "u"), "not_owner")
    assert source.commit(rules.Lose(VM, "again")) == Decision()
    assert source.commit(rules.Remove(VM)).records == (r.Removed(VM, "lost"),)


def test_stopping_what_has_no_guest_writes_nothing() -> None:
    host = boot()

    assert host.commit(rules.Stop(VM)).records == (r.Stopped(VM),)
    assert host.commit(rules.Stop(VM)) == Decision()


def test_a_guest_process_is_spawned_for_a_reservation_only_while_it_is_open() -> None:
    _, destination = ready()

    refused(destination, rules.Spawn(spawned(migration="m1", pid=8)), "migration_over")
    refused(destination, rules.Spawn(spawned(migration="m9")), "unknown_migration")
    refused(destination, rules.Spawn(spawned()), "unknown_instance")


@pytest.mark.parametrize(
    "event",
    [rules.BeginPause("m9", "running"), rules.EndAttempt("m9", "x"), rules.Refuse("m9", "x"), rules.Acknowledge("m9")],
)
def test_an_unknown_migration_is_a_bad_request(event: Event) -> None:
    assert isinstance(refused(boot(), event, "unknown_migration"), RequestError)
