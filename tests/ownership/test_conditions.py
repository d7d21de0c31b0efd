"""Decisions that hold only for what the caller has seen: an operator's word, a process, a journal."""

from __future__ import annotations

import pytest

from tests.ownership.world import VM, Host, boot, present, reach_ready, release, spawned, ticket
from vmmigrate.errors import RequestError
from vmmigrate.ownership import rules
from vmmigrate.ownership.records import Epoch
from vmmigrate.ownership.recovery import SeenGuest, Step, plan
from vmmigrate.ownership.state import Outgoing

AWAITING = frozenset({Outgoing.AWAITING_PEER})


def test_an_attempt_whose_peer_came_meanwhile_is_not_ended_as_one_that_awaits_it() -> None:
    """A cancel that raced with the ticket would else let a second attempt begin beside the first."""
    source = boot()
    source.commit(rules.IssueTicket(ticket("m1", "b")))
    source.commit(present("m1", "b"))

    assert source.commit(rules.EndAttempt("m1", "cancelled", AWAITING)).records == ()
    assert source.state.outgoing["m1"].stage is Outgoing.ACTIVE


def test_an_attempt_that_still_awaits_its_peer_is_ended() -> None:
    source = boot()
    source.commit(rules.IssueTicket(ticket("m1", "b")))

    source.commit(rules.EndAttempt("m1", "cancelled", AWAITING))

    assert source.state.outgoing["m1"].stage is Outgoing.ENDED


def test_the_death_of_an_older_process_does_not_lose_the_instance() -> None:
    """Stopped and started again: the watch over the first process reports late."""
    host = boot()
    host.commit(rules.Stop(VM))
    host.commit(rules.Spawn(spawned(pid=8)))

    assert host.commit(rules.Lose(VM, "gone", spawned(pid=7))).records == ()
    assert host.commit(rules.Lose(VM, "gone", spawned(pid=8))).records != ()


def test_the_death_of_a_guest_that_nobody_knows_any_more_changes_nothing() -> None:
    assert Host("a").commit(rules.Lose(VM, "gone")).records == ()


def test_an_instance_has_one_guest_process() -> None:
    host = boot()

    with pytest.raises(RequestError) as refusal:
        host.commit(rules.Spawn(spawned(pid=8)))

    assert refusal.value.code == "running"


def test_no_ticket_is_issued_for_an_instance_without_a_guest() -> None:
    host = boot()
    host.commit(rules.Stop(VM))

    with pytest.raises(RequestError) as refusal:
        host.commit(rules.IssueTicket(ticket("m1", "b")))

    assert refusal.value.code == "not_running"


def test_nothing_is_decided_about_a_guest_that_is_there_and_cannot_be_adopted() -> None:
    """It may run: neither `lost` nor a second process is allowed."""
    host = boot()

    steps = plan(host.state, {}, len(host.records), {VM: "it does not answer"})

    assert [(step.step, step.instance) for step in steps] == [(Step.INDETERMINATE, VM)]


def test_nothing_is_decided_from_a_journal_shorter_than_the_guest_remembers() -> None:
    """Restored from a copy made before `pausing`: the guest may have been given away since."""
    source, destination = boot("a"), Host("b")
    reach_ready(source, destination)
    release(source, destination)
    remembered = len(source.records)
    source.crash(kept=2)

    seen = {VM: SeenGuest(running=False, epoch=Epoch(1, 1), last_record=remembered)}
    steps = plan(source.state, seen, len(source.records))

    assert [(step.step, step.instance) for step in steps] == [(Step.INDETERMINATE, VM)]
