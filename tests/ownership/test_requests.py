"""What an instance is to a host, what may then be asked of it, and a guest that powers itself off."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.ownership.world import VM, Host, boot, hand_over, present, reach_ready, release, spawned, ticket
from vmmigrate.errors import VmMigrateError
from vmmigrate.ownership import records as r
from vmmigrate.ownership import rules
from vmmigrate.ownership.records import Epoch
from vmmigrate.ownership.requests import DONE, REFUSALS, Request, Standing, refusal, standing
from vmmigrate.ownership.rules import OwnershipRefusal
from vmmigrate.ownership.state import Holding, Outgoing


def _awaiting() -> Host:
    host = boot()
    host.commit(rules.IssueTicket(ticket("m1", "b")))
    return host


def _copying() -> Host:
    host = _awaiting()
    host.commit(present("m1", "b"))
    return host


def _pair(*, acquired: bool = False) -> tuple[Host, Host]:
    source, destination = boot("a"), Host("b")
    reach_ready(source, destination)
    epoch = release(source, destination)
    if acquired:
        destination.commit(rules.Acquire("m1", epoch))
    return source, destination


def _paused() -> Host:
    source = boot("a")
    reach_ready(source, Host("b"))
    return source


def _elsewhere() -> Host:
    source = boot("a")
    hand_over(source, Host("b"))
    return source


def _lost() -> Host:
    host = boot()
    host.commit(rules.Lose(VM, "gone"))
    return host


def _superseded() -> Host:
    host = boot()
    host.commit(rules.Supersede(VM, Epoch(9, 1)))
    return host


def _coming_back() -> Host:
    host = _elsewhere()
    host.commit(rules.Reserve(r.Reserved("m2", VM, "b", "https://b")))
    return host


def _removed() -> Host:
    host = boot()
    host.commit(rules.Remove(VM))
    return host


HISTORIES: list[tuple[Standing, Callable[[], Host]]] = [
    (Standing.FREE, boot),
    (Standing.AWAITING_PEER, _awaiting),
    (Standing.COPYING, _copying),
    (Standing.PAUSED, _paused),
    (Standing.IN_DOUBT, lambda: _pair()[0]),
    (Standing.ARRIVING, lambda: _pair()[1]),
    (Standing.ARRIVING, _coming_back),
    (Standing.TAKING_OVER, lambda: _pair(acquired=True)[1]),
    (Standing.ELSEWHERE, _elsewhere),
    (Standing.LOST, _lost),
    (Standing.SUPERSEDED, _superseded),
    (Standing.UNKNOWN, lambda: Host("a")),
    (Standing.UNKNOWN, _removed),
]


@pytest.mark.parametrize(("expected", "history"), HISTORIES)
def test_every_history_has_its_standing_and_every_request_its_code_and_words(
    expected: Standing, history: Callable[[], Host]
) -> None:
    state = history().state

    assert standing(state, VM) is expected
    for request in Request:
        code, text = refusal(state, VM, request)
        assert code == REFUSALS[expected][request]
        assert (text == "") == (code == DONE)
        assert "None" not in text
        if code == DONE:
            rules.permit(state, VM, request)
            continue
        with pytest.raises(VmMigrateError) as refused:
            rules.permit(state, VM, request)
        assert refused.value.code == code
        assert isinstance(refused.value, OwnershipRefusal) == (code in {"in_doubt", "not_owner", "superseded"})


def test_the_histories_reach_every_standing() -> None:
    assert {expected for expected, _ in HISTORIES} == set(Standing)


def test_a_guest_that_powers_itself_off_is_stopped_and_can_be_started_again() -> None:
    host = boot()

    host.commit(rules.PowerOff(VM, spawned()))

    known = host.state.instances[VM]
    assert (known.holding, known.guest) == (Holding.HELD, None)
    host.commit(rules.Spawn(spawned(pid=8)))
    assert host.commit(rules.PowerOff(VM, spawned())).records == ()  # told late of the first process


@pytest.mark.parametrize("history", [_awaiting, _copying, _paused])
def test_an_attempt_ends_with_the_guest_that_powered_itself_off(history: Callable[[], Host]) -> None:
    host = history()

    host.commit(rules.PowerOff(VM, spawned()))

    assert host.state.outgoing["m1"].stage is Outgoing.ENDED
    assert standing(host.state, VM) is Standing.FREE


def test_no_power_off_is_heard_of_a_guest_that_was_given_away() -> None:
    """It is paused, and cannot have done it; the destination alone knows what becomes of it."""
    source, destination = _pair()

    assert source.commit(rules.PowerOff(VM, spawned())).records == ()
    assert destination.commit(rules.PowerOff(VM, spawned())).records == ()
