"""Sessions: the table applied on both ends, for every phase, speaker and message."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque

import pytest

from vmmigrate.errors import LocalProtocolError, RemoteProtocolError
from vmmigrate.wire import messages as m
from vmmigrate.wire.codec import encode
from vmmigrate.wire.framing import HEADER, encode_frame
from vmmigrate.wire.phases import TERMINAL, Kind, Phase, Role, expected, next_phase
from vmmigrate.wire.session import Session

from .pair import LIVE, SAMPLE, SessionPair, pair_in, path_to

PRODUCT = list(itertools.product(Phase, Role, Kind))
LEGAL = [(phase, role, kind) for phase, role, kind in PRODUCT if next_phase(phase, role, kind) is not None]
ILLEGAL = [entry for entry in PRODUCT if entry not in set(LEGAL)]


def named(entries: list[tuple[Phase, Role, Kind]]) -> pytest.MarkDecorator:
    ids = [f"{phase}-{role}-{kind.name}" for phase, role, kind in entries]
    return pytest.mark.parametrize(("phase", "speaker", "kind"), entries, ids=ids)


def failed_in(phase: Phase, before: Phase) -> Phase | None:
    return before if phase is Phase.FAILED else None


@named(LEGAL)
def test_a_legal_message_advances_both_ends_as_the_table_says(phase: Phase, speaker: Role, kind: Kind) -> None:
    pair = pair_in(phase)
    after = next_phase(phase, speaker, kind)
    assert after is not None

    pair.say(speaker, SAMPLE[kind])
    assert pair.ends[speaker].phase is after, "the phase advances before the bytes arrive"
    assert pair.ends[speaker.peer].phase is phase
    message = pair.deliver(speaker)

    assert message == SAMPLE[kind]
    assert pair.phases == (after, after)
    for end in pair.ends.values():
        assert end.failed_in is failed_in(after, phase)
        assert end.is_over == (after in TERMINAL)


@named(ILLEGAL)
def test_an_illegal_send_is_our_fault_and_leaves_failed(phase: Phase, speaker: Role, kind: Kind) -> None:
    end = pair_in(phase).ends[speaker]
    before = end.failed_in

    with pytest.raises(LocalProtocolError, match=f"{speaker} may not send {kind.name} in phase {phase}$"):
        end.send(SAMPLE[kind])

    assert end.phase is (Phase.DONE if phase is Phase.DONE else Phase.FAILED)
    assert end.failed_in is (before if phase in TERMINAL else phase)


@named(ILLEGAL)
def test_an_illegal_receive_is_the_peers_fault_and_leaves_failed(phase: Phase, speaker: Role, kind: Kind) -> None:
    end = pair_in(phase).ends[speaker.peer]
    before = end.failed_in
    end.receive_data(encode_frame(encode(SAMPLE[kind])))

    with pytest.raises(RemoteProtocolError, match=f"{speaker} may not send {kind.name} in phase {phase}") as caught:
        end.next_message()

    assert caught.value.code == "unexpected_message"
    assert end.phase is (Phase.DONE if phase is Phase.DONE else Phase.FAILED)
    assert end.failed_in is (before if phase in TERMINAL else phase)


@named([entry for entry in ILLEGAL if entry[0] not in TERMINAL])
def test_an_illegal_message_is_refused_before_its_body_is_awaited(phase: Phase, speaker: Role, kind: Kind) -> None:
    """A peer that announces 65 MiB of device state in the first phase must not make us keep them."""
    end = pair_in(phase).ends[speaker.peer]
    end.receive_data(HEADER.pack(1, kind, 0))

    with pytest.raises(RemoteProtocolError) as caught:
        end.next_message()

    assert caught.value.code == "unexpected_message"
    assert end.failed_in is phase


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("phase", LIVE)
def test_the_end_of_the_stream_in_a_live_phase_is_a_lost_link(phase: Phase, role: Role) -> None:
    end = pair_in(phase).ends[role]

    with pytest.raises(RemoteProtocolError, match=f"{role.peer} closed the connection in phase {phase}$") as caught:
        end.receive_eof()

    assert caught.value.code == "link_lost"
    assert (end.phase, end.failed_in) == (Phase.FAILED, phase)


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("phase", sorted(TERMINAL))
def test_the_end_of_the_stream_after_the_last_word_is_fine(phase: Phase, role: Role) -> None:
    end = pair_in(phase).ends[role]
    before = end.failed_in

    end.receive_eof()
    end.receive_data(b"\x00")
    end.receive_eof()

    assert (end.phase, end.failed_in) == (phase, before)


def test_a_cut_within_a_frame_is_a_lost_link() -> None:
    end = Session(Role.SOURCE)
    end.receive_data(encode_frame(encode(SAMPLE[Kind.OFFER]))[:-1])
    assert end.next_message() is None

    with pytest.raises(RemoteProtocolError) as caught:
        end.receive_eof()

    assert caught.value.code == "link_lost"
    assert end.failed_in is Phase.NEGOTIATE


def test_a_late_heartbeat_does_not_undo_a_finished_migration() -> None:
    """The source beats while it is in doubt; that beat may cross the destination's Running on the wire."""
    pair = pair_in(Phase.IN_DOUBT)
    pair.say(Role.DESTINATION, SAMPLE[Kind.RUNNING])
    pair.say(Role.SOURCE, SAMPLE[Kind.HEARTBEAT])

    with pytest.raises(RemoteProtocolError):
        pair.deliver(Role.SOURCE)
    pair.deliver(Role.DESTINATION)

    assert pair.phases == (Phase.DONE, Phase.DONE)
    assert pair.destination.failed_in is None


def test_a_late_handoff_after_a_refusal_is_not_heard() -> None:
    """Rule 3: the handoff comes out of a socket buffer after the destination refused; no message comes of it."""
    pair = pair_in(Phase.READY)
    pair.say(Role.SOURCE, SAMPLE[Kind.HANDOFF])
    pair.say(Role.DESTINATION, SAMPLE[Kind.REFUSED])

    with pytest.raises(RemoteProtocolError):
        pair.deliver(Role.SOURCE)
    message = pair.deliver(Role.DESTINATION)

    assert message == SAMPLE[Kind.REFUSED]
    assert (pair.source.failed_in, pair.destination.failed_in) == (Phase.IN_DOUBT, Phase.READY)


def test_a_message_that_cannot_be_sent_leaves_failed_too() -> None:
    end = pair_in(Phase.OFFERED).source
    too_long = m.Refuse(code="no", text="x", details={"reason": ["y" * 1000] * 300})

    with pytest.raises(LocalProtocolError) as caught:
        end.send(too_long)

    assert caught.value.code == "message_too_large"
    assert (end.phase, end.failed_in) == (Phase.FAILED, Phase.OFFERED)


def test_garbage_leaves_failed_and_names_the_phase() -> None:
    end = pair_in(Phase.RAM_PRE_PAUSE).destination
    end.receive_data(b"\xff" * 64)

    with pytest.raises(RemoteProtocolError):
        end.next_message()

    assert (end.phase, end.failed_in) == (Phase.FAILED, Phase.RAM_PRE_PAUSE)


def test_a_bad_body_leaves_failed_and_the_phase_has_not_advanced() -> None:
    end = pair_in(Phase.READY).destination
    end.receive_data(HEADER.pack(1, Kind.HANDOFF, 0) + b"\x80")

    with pytest.raises(RemoteProtocolError, match="'run_state' is missing"):
        end.next_message()

    assert (end.phase, end.failed_in) == (Phase.FAILED, Phase.READY)


def test_the_echo_digests_are_of_the_bodies_as_they_travelled() -> None:
    pair = pair_in(Phase.SYNC)
    wanted = {kind: hashlib.sha256(encode(SAMPLE[kind]).body).digest() for kind in (Kind.OFFER, Kind.SELECT)}

    assert pair.source.digests == pair.destination.digests == wanted


def test_a_whole_migration_is_spoken_message_by_message() -> None:
    pair = SessionPair()
    for speaker, kind in path_to(Phase.DONE):
        for role in Role:
            pair.pass_on(role, Kind.HEARTBEAT)
        assert pair.pass_on(speaker, kind) == SAMPLE[kind]

    assert pair.phases == (Phase.DONE, Phase.DONE)


# Two honest ends, with up to this many messages under way in each direction.
IN_FLIGHT = 2

State = tuple[Phase, Phase, tuple[Kind, ...], tuple[Kind, ...]]


def steps(state: State) -> list[tuple[State, tuple[Phase, Role, Kind] | None]]:
    """Every next state of two ends and the messages between them, with what a live listener had to refuse."""
    phases, flights = (
        {Role.SOURCE: state[0], Role.DESTINATION: state[1]},
        {Role.SOURCE: state[2], Role.DESTINATION: state[3]},
    )
    found = []

    def add(role: Role, phase: Phase, speaker: Role, flight: tuple[Kind, ...], refused: Kind | None = None) -> None:
        p, f = {**phases, role: phase}, {**flights, speaker: flight}
        after = (p[Role.SOURCE], p[Role.DESTINATION], f[Role.SOURCE], f[Role.DESTINATION])
        found.append((after, (phases[role], speaker, refused) if refused else None))

    for speaker in Role:
        if len(flights[speaker]) < IN_FLIGHT:
            for kind in expected(phases[speaker], speaker):
                after = next_phase(phases[speaker], speaker, kind)
                assert after is not None
                add(speaker, after, speaker, (*flights[speaker], kind))
        if flights[speaker]:
            kind, rest = flights[speaker][0], flights[speaker][1:]
            listener = speaker.peer
            if phases[listener] in TERMINAL:
                add(listener, phases[listener], speaker, ())
            else:
                after = next_phase(phases[listener], speaker, kind)
                refused = kind if after is None else None
                add(listener, after or Phase.FAILED, speaker, rest, refused)
    return found


def test_messages_of_two_honest_ends_may_cross_without_either_being_blamed() -> None:
    """Every interleaving of both ends: no legal message is illegal when it arrives."""
    seen: set[State] = {(Phase.NEGOTIATE, Phase.NEGOTIATE, (), ())}
    queue, refused = deque(seen), set()

    while queue:
        for after, blamed in steps(queue.popleft()):
            if blamed is not None:
                refused.add(blamed)
            if after not in seen:
                seen.add(after)
                queue.append(after)

    assert refused == set()
    live_ends = {(a, b) for a, b, _, _ in seen if a not in TERMINAL and b not in TERMINAL}
    assert len(live_ends) > len(LIVE), "phases do overlap"
