"""The phase table itself: total, connected, and never renumbered."""

from __future__ import annotations

import itertools

import pytest

from vmmigrate.wire.phases import (
    IF_IT_BREAKS,
    IN_EVERY_LIVE_PHASE,
    MAY_RUN,
    TERMINAL,
    TRANSITIONS,
    Kind,
    MayRun,
    Phase,
    Role,
    expected,
    next_phase,
)

from .pair import LIVE, path_to

# What crosses the wire: a line is only ever added.
FROZEN_TAGS = {
    "OFFER": 1,
    "SELECT": 2,
    "REFUSE": 3,
    "PREAMBLE": 4,
    "PREAMBLE_OK": 5,
    "ROUND_END": 6,
    "ROUND_APPLIED": 7,
    "PAUSED": 8,
    "TIME_DATA": 9,
    "DEVICE_STATE": 10,
    "CONSOLE_HISTORY": 11,
    "STATE_END": 12,
    "READY": 13,
    "HANDOFF": 14,
    "RUNNING": 15,
    "REFUSED": 16,
    "RETURNED": 17,
    "PROGRESS": 18,
    "HEARTBEAT": 19,
    "CANCEL": 20,
    "FAILED": 21,
    "RESUME": 22,
    "RESUMED": 23,
    "APPLIED": 24,
}

# What status words, logs and metrics say.
FROZEN_PHASES = [
    "negotiate",
    "offered",
    "resuming",
    "catching_up",
    "sync",
    "validate",
    "ram_pre_pause",
    "ram_post_pause",
    "device_state",
    "import",
    "ready",
    "in_doubt",
    "done",
    "failed",
]


def successors(phase: Phase) -> set[Phase]:
    return {
        after for role, kind in itertools.product(Role, Kind) if (after := next_phase(phase, role, kind)) is not None
    }


def test_tags_are_never_renumbered_and_zero_is_none() -> None:
    assert {kind.name: kind.value for kind in Kind} == FROZEN_TAGS


def test_phase_words_are_never_changed() -> None:
    assert [phase.value for phase in Phase] == FROZEN_PHASES


def test_who_may_run_and_what_follows_a_break_is_said_for_every_phase() -> None:
    assert set(MAY_RUN) == set(IF_IT_BREAKS) == set(Phase)
    assert all(IF_IT_BREAKS.values())


def test_no_phase_lets_two_ends_run_and_the_guest_changes_hands_once_only() -> None:
    """Along the happy path: source, then neither, then unknown, then destination; never back."""
    order = list(dict.fromkeys(MAY_RUN[phase] for phase in Phase if phase is not Phase.FAILED))

    assert order == [MayRun.SOURCE, MayRun.NEITHER, MayRun.UNKNOWN, MayRun.DESTINATION]
    for phase in LIVE:
        for after in successors(phase) - {Phase.FAILED}:
            assert order.index(MAY_RUN[phase]) <= order.index(MAY_RUN[after])


def test_every_phase_is_reached_from_negotiate() -> None:
    for phase in Phase:
        assert path_to(phase) is not None


@pytest.mark.parametrize("phase", LIVE)
def test_every_live_phase_can_end_well_and_badly(phase: Phase) -> None:
    reached, frontier = {phase}, [phase]
    while frontier:
        for after in successors(frontier.pop()) - reached:
            reached.add(after)
            frontier.append(after)

    assert reached >= TERMINAL


def test_a_terminal_phase_accepts_nothing() -> None:
    for phase, role in itertools.product(TERMINAL, Role):
        assert expected(phase, role) == frozenset()
        assert successors(phase) == set()


def test_terminal_phases_are_exactly_those_without_rows() -> None:
    assert frozenset(Phase) - {phase for phase, _, _ in TRANSITIONS} == TERMINAL


def test_every_kind_can_be_said_in_some_phase() -> None:
    said = {kind for _, _, kind in TRANSITIONS} | set(IN_EVERY_LIVE_PHASE)

    assert said == set(Kind)
    assert not {kind for _, _, kind in TRANSITIONS} & set(IN_EVERY_LIVE_PHASE)


def test_cancel_is_legal_everywhere_but_in_doubt_and_for_a_destination_that_is_ready() -> None:
    """Rule 11: what was given away is not called back by asking; after Ready `refused` has to be durable first."""
    for phase, role in itertools.product(LIVE, Role):
        forbidden = phase is Phase.IN_DOUBT or (phase, role) == (Phase.READY, Role.DESTINATION)
        assert next_phase(phase, role, Kind.CANCEL) is (None if forbidden else Phase.FAILED)


def test_only_running_leads_to_done_and_only_the_handoff_into_doubt() -> None:
    rows = {(after, kind) for (_, _, kind), after in TRANSITIONS.items() if after in {Phase.DONE, Phase.IN_DOUBT}}

    assert rows == {(Phase.DONE, Kind.RUNNING), (Phase.IN_DOUBT, Kind.HANDOFF)}


def test_each_end_is_the_other_ends_peer() -> None:
    assert [role.peer for role in Role] == [Role.DESTINATION, Role.SOURCE]
