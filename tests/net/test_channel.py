"""The control channel: what is said arrives, what goes wrong is noticed in time and has the same name on both sides.

Real TLS over memory streams under a virtual clock, so that the real limits are waited for.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.wire.pair import SAMPLE, path_to
from vmmigrate.errors import (
    LocalProtocolError,
    MigrationCancelled,
    NegotiationError,
    PeerError,
    RemoteProtocolError,
    TransportError,
    VmMigrateError,
)
from vmmigrate.net.channel import (
    FINISH_SENDING_S,
    GOODBYE_DEADLINE_S,
    HEARTBEAT_INTERVAL_S,
    SEND_DEADLINE_S,
    SILENCE_LIMIT_S,
    TRUE_REASON_S,
    Channel,
    open_channel,
    refusal_of,
)
from vmmigrate.net.tls import (
    TlsFiles,
    TlsStream,
    client_context,
    server_context,
)
from vmmigrate.wire import messages as m
from vmmigrate.wire.codec import encode
from vmmigrate.wire.framing import HEADER, encode_frame
from vmmigrate.wire.phases import Kind, Phase, Role
from vmmigrate.wire.session import Session

from .conftest import host_identity

SOURCE = host_identity("source")
ROUND_END, ROUND_APPLIED = SAMPLE[Kind.ROUND_END], SAMPLE[Kind.ROUND_APPLIED]
WAIT_S = 60


@pytest.fixture
def clock() -> MockClock:
    """No thread and no process here: time jumps to the next deadline. For tests that wait for one."""
    return MockClock(autojump_threshold=0)


@dataclass
class Wire:
    """Both TLS streams, hands shaken."""

    source: TlsStream
    destination: TlsStream


MakeStreams = Callable[[], tuple[Any, Any]]


@asynccontextmanager
async def open_wire(
    source_files: TlsFiles,
    destination_files: TlsFiles,
    make: MakeStreams = trio.testing.memory_stream_pair,
) -> AsyncIterator[Wire]:
    left, right = make()
    source: TlsStream = trio.SSLStream(left, server_context(source_files), server_side=True)
    destination: TlsStream = trio.SSLStream(right, client_context(destination_files, SOURCE))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.do_handshake)
        nursery.start_soon(destination.do_handshake)
    try:
        yield Wire(source, destination)
    finally:
        await trio.aclose_forcefully(left)
        await trio.aclose_forcefully(right)


@dataclass
class Pair:
    wire: Wire
    source: Channel
    destination: Channel

    async def go_to(self, phase: Phase) -> None:
        """Both ends into *phase*, by legal messages alone."""
        for speaker, kind in path_to(phase):
            ends = {Role.SOURCE: self.source, Role.DESTINATION: self.destination}
            await ends[speaker].send(SAMPLE[kind])
            await ends[speaker.peer].expect(type(SAMPLE[kind]), deadline_s=5)
        assert (self.source.phase, self.destination.phase) == (phase, phase)


class Ends:
    """Opens pairs and single ends over TLS."""

    def __init__(self, source_files: TlsFiles, destination_files: TlsFiles) -> None:
        self._files = source_files, destination_files

    @asynccontextmanager
    async def pair(self, phase: Phase = Phase.NEGOTIATE) -> AsyncIterator[Pair]:
        async with (
            self.wire() as wire,
            open_channel(wire.source, Role.SOURCE) as source,
            open_channel(wire.destination, Role.DESTINATION) as destination,
        ):
            pair = Pair(wire, source, destination)
            await pair.go_to(phase)
            yield pair

    def wire(self, make: MakeStreams = trio.testing.memory_stream_pair) -> Any:
        return open_wire(*self._files, make)


@pytest.fixture
def ends(source_files: TlsFiles, destination_files: TlsFiles) -> Ends:
    return Ends(source_files, destination_files)


def raw(message: m.Message) -> bytes:
    return encode_frame(encode(message))


async def failure_of(channel: Channel) -> VmMigrateError:
    """What `expect` raises."""
    with pytest.raises(VmMigrateError) as caught:
        await channel.expect(m.Ready, deadline_s=WAIT_S)
    return caught.value


# --------------------------------------------------------------------------- send and expect


async def test_a_message_arrives_as_it_was_sent(ends: Ends) -> None:
    async with ends.pair() as pair:
        await pair.destination.send(SAMPLE[Kind.OFFER])

        offer = await pair.source.expect(m.Offer, deadline_s=5)

        assert offer == SAMPLE[Kind.OFFER]
        assert (pair.source.phase, pair.destination.phase) == (Phase.OFFERED, Phase.OFFERED)


async def test_expect_takes_any_of_several_kinds(ends: Ends) -> None:
    async with ends.pair(Phase.OFFERED) as pair:
        await pair.source.send(SAMPLE[Kind.REFUSE])

        assert isinstance(await pair.destination.expect(m.Select, m.Refuse, deadline_s=5), m.Refuse)


async def test_a_whole_conversation_goes_through_every_phase(ends: Ends) -> None:
    async with ends.pair(Phase.DONE) as pair:
        assert pair.source.session.is_over


async def test_a_message_that_is_legal_but_not_due_is_refused_by_name(ends: Ends) -> None:
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        await pair.source.send(SAMPLE[Kind.PAUSED])

        with pytest.raises(RemoteProtocolError, match="Paused came where RoundEnd was due") as caught:
            await pair.destination.expect(m.RoundEnd, deadline_s=5)

        assert caught.value.code == "unexpected_message"


async def test_an_answer_that_does_not_come_is_not_awaited_beyond_its_deadline(ends: Ends, clock: MockClock) -> None:
    async with ends.pair() as pair:
        begun = trio.current_time()

        with pytest.raises(TransportError, match="no Select or Refuse from the source within 7 s") as caught:
            await pair.destination.expect(m.Select, m.Refuse, deadline_s=7)

        assert caught.value.code == "timed_out"
        assert trio.current_time() - begun == pytest.approx(7)


async def test_a_message_longer_than_one_read_arrives(ends: Ends) -> None:
    big = m.ConsoleHistoryMessage("com1", b"b" * (1 << 20), b"r" * (1 << 20), 5 << 20)
    async with ends.pair(Phase.DEVICE_STATE) as pair:
        await pair.source.send(big)

        assert await pair.destination.expect(m.ConsoleHistoryMessage, deadline_s=5) == big


async def test_progress_is_kept_for_whoever_looks_and_awaited_by_nobody(ends: Ends) -> None:
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        await pair.source.send(m.Progress({"bytes": 1}))
        await pair.source.send(m.Progress({"bytes": 2}))
        await pair.source.send(ROUND_END)

        assert await pair.destination.expect(m.RoundEnd, deadline_s=5) == ROUND_END
        assert pair.destination.peer_progress == {"bytes": 2}


async def test_messages_of_two_tasks_go_out_in_the_order_of_the_session(ends: Ends) -> None:
    """Bytes that overtook others would be illegal at the peer."""
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(pair.source.send, m.RoundEnd(number, (1,), 1, 1))
                nursery.start_soon(pair.source.send, m.Heartbeat())
        numbers = [(await pair.destination.expect(m.RoundEnd, deadline_s=5)).round_number for _ in range(20)]

        assert sorted(numbers) == list(range(20))


async def test_what_is_said_later_goes_out_with_what_is_said_next_and_before_it(ends: Ends, clock: MockClock) -> None:
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        pair.source.say_later(m.Progress({"bytes": 1}))
        pair.source.say_later(ROUND_END)
        await trio.testing.wait_all_tasks_blocked()
        assert pair.destination.peer_progress == {}

        await pair.source.send(m.Progress({"bytes": 2}))

        assert await pair.destination.expect(m.RoundEnd, deadline_s=5) == ROUND_END
        await trio.testing.wait_all_tasks_blocked()
        assert pair.destination.peer_progress == {"bytes": 2}


async def test_what_must_not_be_said_is_refused_at_once_also_when_it_is_for_later(ends: Ends) -> None:
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        with pytest.raises(LocalProtocolError):
            pair.destination.say_later(ROUND_END)

        with pytest.raises(LocalProtocolError):
            await pair.destination.expect(m.RoundEnd, deadline_s=5)


# --------------------------------------------------------------------------- the end, from either side


@pytest.mark.parametrize("speaker", list(Role))
async def test_a_peer_that_failed_gives_its_own_code(ends: Ends, speaker: Role) -> None:
    """So that both records say the same."""
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        said, heard = (pair.source, pair.destination)[:: 1 if speaker is Role.SOURCE else -1]
        await said.say_goodbye(NegotiationError("nothing in common", code="payload_version", details={"device": "x"}))

        error = await failure_of(heard)

        assert isinstance(error, PeerError)
        assert (error.code, error.text, error.details) == ("payload_version", "nothing in common", {"device": "x"})
        assert (said.phase, heard.phase) == (Phase.FAILED, Phase.FAILED)


async def test_a_peer_that_cancels_makes_it_cancelled(ends: Ends) -> None:
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        await pair.source.say_goodbye(MigrationCancelled("the operator asked"))

        error = await failure_of(pair.destination)

        assert isinstance(error, MigrationCancelled)
        assert error.text == "the operator asked"


async def test_in_doubt_a_cancellation_is_only_a_report(ends: Ends) -> None:
    """After the guest was given away nobody can take it back by asking."""
    async with ends.pair(Phase.IN_DOUBT) as pair:
        await pair.destination.say_goodbye(MigrationCancelled("too late"))

        error = await failure_of(pair.source)

        assert isinstance(error, PeerError)
        assert error.code == "cancelled"


async def test_a_peer_that_closes_is_a_lost_link(ends: Ends) -> None:
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        await pair.wire.source.aclose()

        error = await failure_of(pair.destination)

        assert isinstance(error, TransportError)
        assert error.code == "link_lost"
        assert pair.destination.phase is Phase.FAILED


async def test_a_peer_that_is_cut_off_is_a_transport_error(ends: Ends) -> None:
    """No close_notify: the end of the link is not the end of the conversation."""
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        await trio.aclose_forcefully(pair.wire.source.transport_stream)

        assert isinstance(await failure_of(pair.destination), TransportError)


async def test_what_was_said_before_the_end_is_still_heard(ends: Ends) -> None:
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        await pair.source.send(ROUND_END)
        await pair.source.send(SAMPLE[Kind.PAUSED])
        await pair.wire.source.aclose()
        await trio.testing.wait_all_tasks_blocked()

        assert await pair.destination.expect(m.RoundEnd, deadline_s=5) == ROUND_END
        assert await pair.destination.expect(m.Paused, deadline_s=5) == SAMPLE[Kind.PAUSED]
        assert (await failure_of(pair.destination)).code == "link_lost"


async def test_an_end_once_known_is_known_to_everybody(ends: Ends) -> None:
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        pair.source.fail(MigrationCancelled("first"))
        pair.source.fail(TransportError("second"))

        for _ in range(2):
            assert (await failure_of(pair.source)).text == "first"


async def test_all_who_wait_learn_of_the_end(ends: Ends) -> None:
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        errors = []

        async def wait() -> None:
            errors.append(await failure_of(pair.destination))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            await pair.source.say_goodbye(TransportError("gone", code="x"))

        assert [error.code for error in errors] == ["x"] * 3


async def test_heartbeats_that_cross_the_last_word_are_no_fault(ends: Ends, clock: MockClock) -> None:
    """Who refuses must leave with its own reason, not with one about a message that came a moment too late."""
    async with ends.pair(Phase.OFFERED) as pair:

        async def refuse() -> None:
            with pair.source.interruptible():
                await pair.source.send(SAMPLE[Kind.REFUSE])
                await pair.wire.destination.send_all(raw(m.Heartbeat()))
                await pair.wire.destination.aclose()
                await trio.sleep(5)  # virtual: time to notice the end of the link, were it a fault
                raise NegotiationError("nothing in common")

        with pytest.raises(NegotiationError):
            await refuse()


async def test_after_done_the_end_of_the_link_is_no_failure(ends: Ends) -> None:
    async with ends.pair(Phase.DONE) as pair:
        await pair.wire.source.aclose()
        with pair.destination.interruptible():
            await trio.testing.wait_all_tasks_blocked()

        assert pair.destination.phase is Phase.DONE


# --------------------------------------------------------------------------- interruptible


async def test_a_block_is_left_as_soon_as_the_peer_fails(ends: Ends, clock: MockClock) -> None:
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        begun = trio.current_time()

        async def block() -> None:
            with pair.destination.interruptible():
                await pair.source.say_goodbye(TransportError("gone", code="disk_full"))
                await trio.sleep_forever()

        with pytest.raises(PeerError) as caught:
            await block()

        assert caught.value.code == "disk_full"
        assert trio.current_time() == begun


@pytest.mark.parametrize("how", ["cancelled by the peer", "cut", "failed by us"])
async def test_a_block_is_left_whatever_ends_the_conversation(ends: Ends, how: str) -> None:
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:

        async def block() -> None:
            with pair.destination.interruptible():
                if how == "cancelled by the peer":
                    await pair.source.say_goodbye(MigrationCancelled("asked for"))
                elif how == "cut":
                    await trio.aclose_forcefully(pair.wire.source.transport_stream)
                else:
                    pair.destination.fail(MigrationCancelled("asked for"))
                await trio.sleep_forever()

        expected = TransportError if how == "cut" else MigrationCancelled
        with pytest.raises(expected):
            await block()


async def test_an_error_in_a_block_gives_way_to_what_the_peer_had_said(ends: Ends) -> None:
    """It may only be its echo."""
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:

        async def block() -> None:
            with pair.destination.interruptible():
                pair.destination.fail(PeerError("disk full", code="disk_full"))
                raise TransportError("bulk stream: cut")

        with pytest.raises(PeerError):
            await block()


async def test_a_block_that_ends_in_the_moment_of_failure_does_not_end_well(ends: Ends) -> None:
    """Ready and Failed in one breath: the guest must not be given to a peer that has given up."""
    async with ends.pair(Phase.IMPORT) as pair:
        await pair.wire.destination.send_all(raw(SAMPLE[Kind.READY]) + raw(m.Failed("disk_full", "disk full")))
        await trio.testing.wait_all_tasks_blocked()

        with pytest.raises(PeerError) as caught, pair.source.interruptible():
            pass

        assert caught.value.code == "disk_full"

    async with ends.pair(Phase.IMPORT) as pair:

        async def block() -> None:
            with pair.source.interruptible():
                await pair.wire.destination.send_all(raw(SAMPLE[Kind.READY]) + raw(m.Failed("disk_full", "disk full")))
                await pair.source.expect(m.Ready, deadline_s=5)

        with pytest.raises(PeerError):
            await block()


async def test_a_defect_in_a_block_stays_a_defect(ends: Ends) -> None:
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        with pytest.raises(ZeroDivisionError), pair.source.interruptible():
            raise ZeroDivisionError


async def test_an_outer_cancellation_passes_through_a_block(ends: Ends, clock: MockClock) -> None:
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        with trio.move_on_after(3) as outer, pair.source.interruptible():
            await trio.sleep_forever()

        assert outer.cancelled_caught


async def test_a_block_that_is_over_is_not_left_by_a_later_failure(ends: Ends) -> None:
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        with pair.source.interruptible():
            pass
        pair.source.fail(TransportError("later"))

        await trio.lowlevel.checkpoint()


async def test_blocks_may_be_nested(ends: Ends) -> None:
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:

        async def block() -> None:
            with pair.source.interruptible(), pair.source.interruptible():
                pair.source.fail(TransportError("gone", code="x"))
                await trio.sleep_forever()

        with pytest.raises(TransportError) as caught:
            await block()

        assert caught.value.code == "x"


# --------------------------------------------------------------------------- the true reason


async def test_the_true_reason_is_that_of_the_peer_when_it_comes_soon(ends: Ends, clock: MockClock) -> None:
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:

        async def tell_later() -> None:
            await trio.sleep(TRUE_REASON_S / 2)
            await pair.source.say_goodbye(VmMigrateError("disk full", code="disk_full"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell_later)
            reason = await pair.destination.true_reason(TransportError("bulk stream: cut"))

        assert reason.code == "disk_full"


async def test_without_word_from_the_peer_the_reason_is_our_own(ends: Ends, clock: MockClock) -> None:
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        error, begun = TransportError("bulk stream: cut"), trio.current_time()

        assert await pair.destination.true_reason(error) is error
        assert trio.current_time() - begun == pytest.approx(TRUE_REASON_S)


async def test_an_error_that_no_peer_explains_is_not_held_up(ends: Ends, clock: MockClock) -> None:
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        error, begun = RemoteProtocolError("digest"), trio.current_time()

        assert await pair.destination.true_reason(error) is error
        assert trio.current_time() == begun


# --------------------------------------------------------------------------- heartbeats and silence


async def test_heartbeats_keep_a_quiet_conversation_alive(ends: Ends, clock: MockClock) -> None:
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        await trio.sleep(20 * SILENCE_LIMIT_S)

        await pair.source.send(ROUND_END)
        assert await pair.destination.expect(m.RoundEnd, deadline_s=5) == ROUND_END


async def test_silence_is_noticed(ends: Ends, clock: MockClock) -> None:
    """A stopped process keeps its connections open."""
    async with ends.wire() as wire, open_channel(wire.destination, Role.DESTINATION) as channel:
        begun = trio.current_time()

        error = await failure_of(channel)

        assert isinstance(error, TransportError)
        assert error.code == "peer_silent"
        assert trio.current_time() - begun <= SILENCE_LIMIT_S + 2 * HEARTBEAT_INTERVAL_S


async def test_a_slow_message_is_no_silence(ends: Ends, clock: MockClock) -> None:
    """Its pieces tell that the peer lives; no heartbeat fits in between."""
    async with ends.wire() as wire, open_channel(wire.destination, Role.DESTINATION) as channel:
        await channel.send(SAMPLE[Kind.OFFER])
        message = raw(SAMPLE[Kind.SELECT])
        for offset in range(0, len(message), 64):
            await wire.source.send_all(message[offset : offset + 64])
            await trio.sleep(SILENCE_LIMIT_S / 2)

        assert await channel.expect(m.Select, deadline_s=5) == SAMPLE[Kind.SELECT]


async def test_silence_is_noticed_in_time_by_one_who_is_stuck_in_sending(ends: Ends, clock: MockClock) -> None:
    """The peer neither reads nor says anything; sending alone would be given three times as long."""
    async with (
        ends.wire(trio.testing.lockstep_stream_pair) as wire,
        open_channel(wire.destination, Role.DESTINATION) as channel,
    ):
        begun = trio.current_time()

        async def send() -> None:
            with channel.interruptible():
                await channel.send(SAMPLE[Kind.OFFER])

        with pytest.raises(TransportError) as caught:
            await send()

        assert caught.value.code == "peer_silent"
        assert trio.current_time() - begun <= SILENCE_LIMIT_S + 2 * HEARTBEAT_INTERVAL_S


async def test_we_do_not_blame_the_peer_for_the_time_when_we_were_stopped(ends: Ends, clock: MockClock) -> None:
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        clock.jump(10 * SILENCE_LIMIT_S)
        await trio.sleep(2 * HEARTBEAT_INTERVAL_S)

        await pair.source.send(ROUND_END)
        assert await pair.destination.expect(m.RoundEnd, deadline_s=5) == ROUND_END


async def test_a_peer_that_does_not_read_is_given_a_limited_time(ends: Ends, clock: MockClock) -> None:
    async with ends.wire(trio.testing.lockstep_stream_pair) as wire:
        channel = Channel(wire.destination, Session(Role.DESTINATION))
        begun = trio.current_time()

        with pytest.raises(TransportError) as caught:
            await channel.send(SAMPLE[Kind.OFFER])

        assert caught.value.code == "stalled"
        assert trio.current_time() - begun == pytest.approx(SEND_DEADLINE_S + FINISH_SENDING_S)


# --------------------------------------------------------------------------- goodbye


async def test_a_goodbye_is_bounded_when_the_peer_does_not_read(ends: Ends, clock: MockClock) -> None:
    async with (
        ends.wire(trio.testing.lockstep_stream_pair) as wire,
        open_channel(wire.destination, Role.DESTINATION) as channel,
    ):
        begun = trio.current_time()

        await channel.say_goodbye(MigrationCancelled("asked for"))

        assert trio.current_time() - begun == pytest.approx(GOODBYE_DEADLINE_S + FINISH_SENDING_S)


async def test_a_goodbye_is_said_also_by_one_who_is_cancelled(ends: Ends) -> None:
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        with trio.CancelScope() as scope:
            scope.cancel()
            await pair.source.say_goodbye(TransportError("stopping", code="daemon_stopping"))

        assert (await failure_of(pair.destination)).code == "daemon_stopping"


async def test_a_goodbye_to_a_peer_that_is_gone_is_no_error(ends: Ends) -> None:
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        await trio.aclose_forcefully(pair.wire.destination.transport_stream)

        await pair.source.say_goodbye(TransportError("cut"))


async def test_after_a_message_that_was_cut_short_nothing_more_is_sent(ends: Ends, clock: MockClock) -> None:
    """A goodbye in the middle of another message would be read as part of it."""
    async with ends.wire(trio.testing.lockstep_stream_pair) as wire:
        channel = Channel(wire.destination, Session(Role.DESTINATION))
        with trio.move_on_after(1):
            await channel.send(SAMPLE[Kind.OFFER])

        await channel.say_goodbye(MigrationCancelled("asked for"))

        with trio.fail_after(5), pytest.raises(TransportError):
            await channel.send_bytes(raw(m.Heartbeat()))


ODD_ERRORS = [
    VmMigrateError("x" * 100_000, code="long"),
    VmMigrateError("a path \udcff of odd bytes", code="odd_text"),
    VmMigrateError("x", code="odd_details", details={"error": ZeroDivisionError()}),
    VmMigrateError("x", code="big_details", details={"all": ["y" * 1000] * 1000}),
    VmMigrateError("x", code="odd_text_in_details", details={"path": "\udcff"}),
    VmMigrateError("x", code="big_number", details={"number": 1 << 80}),
]


@pytest.mark.parametrize("error", ODD_ERRORS, ids=lambda error: error.code)
async def test_a_reason_arrives_however_odd_its_text_and_details(ends: Ends, error: VmMigrateError) -> None:
    """The code is what both records must share."""
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        await pair.source.say_goodbye(error)

        assert (await failure_of(pair.destination)).code == error.code


@pytest.mark.parametrize("error", ODD_ERRORS, ids=lambda error: error.code)
async def test_a_refusal_arrives_however_odd_its_text_and_details(ends: Ends, error: VmMigrateError) -> None:
    async with ends.pair(Phase.OFFERED) as pair:
        await pair.source.send(refusal_of(error))

        assert (await pair.destination.expect(m.Refuse, deadline_s=5)).code == error.code


@pytest.mark.parametrize("text", ["x" * 100_000, "\udcff"], ids=["long", "odd"])
async def test_a_cancellation_arrives_however_odd_its_reason(ends: Ends, text: str) -> None:
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        await pair.source.say_goodbye(MigrationCancelled(text))

        assert isinstance(await failure_of(pair.destination), MigrationCancelled)


# --------------------------------------------------------------------------- what must not be said


async def test_an_illegal_send_is_our_own_fault_and_ends_the_session(ends: Ends) -> None:
    async with ends.pair() as pair:
        with pytest.raises(LocalProtocolError):
            await pair.source.send(SAMPLE[Kind.HANDOFF])

        assert pair.source.phase is Phase.FAILED
        with pytest.raises(LocalProtocolError):
            await pair.source.send(SAMPLE[Kind.HEARTBEAT])
        assert isinstance(await failure_of(pair.source), LocalProtocolError)


async def test_the_peer_learns_of_our_own_fault(ends: Ends) -> None:
    async with ends.pair() as pair:
        with pytest.raises(LocalProtocolError) as caught:
            await pair.source.send(SAMPLE[Kind.HANDOFF])
        await pair.source.say_goodbye(caught.value)

        assert (await failure_of(pair.destination)).code == "protocol_local"


ILLEGAL = {
    "out of turn": (raw(SAMPLE[Kind.HANDOFF]), "unexpected_message"),
    "unknown message": (HEADER.pack(0, 99, 0), "unknown_message"),
    "too large": (HEADER.pack((1 << 32) - 1, Kind.HEARTBEAT, 0), "message_too_large"),
    "not msgpack": (HEADER.pack(1, Kind.HEARTBEAT, 0) + b"\xc1", "bad_message"),
}


@pytest.mark.parametrize("wrong", ILLEGAL)
async def test_an_illegal_message_has_the_same_code_on_both_sides(ends: Ends, wrong: str) -> None:
    said, code = ILLEGAL[wrong]
    async with ends.pair() as pair:
        await pair.wire.source.send_all(said)

        error = await failure_of(pair.destination)
        await pair.destination.say_goodbye(error)

        assert isinstance(error, RemoteProtocolError)
        assert error.code == code
        assert (await failure_of(pair.source)).code == code


async def test_a_reason_is_told_once(ends: Ends, clock: MockClock) -> None:
    async with ends.wire() as wire, open_channel(wire.destination, Role.DESTINATION) as channel:
        await wire.source.send_all(ILLEGAL["out of turn"][0])
        error = await failure_of(channel)

        await channel.say_goodbye(error)
        await channel.say_goodbye(error)

        assert await wire.source.receive_some() == raw(m.Failed(error.code, error.text))
        with trio.move_on_after(5) as more:
            await wire.source.receive_some()
        assert more.cancelled_caught


async def test_a_peer_that_has_failed_is_not_told_its_own_reason(ends: Ends, clock: MockClock) -> None:
    async with ends.wire() as wire, open_channel(wire.destination, Role.DESTINATION) as channel:
        await wire.source.send_all(raw(m.Failed("disk_full", "disk full")))

        await channel.say_goodbye(await failure_of(channel))

        with trio.move_on_after(5) as more:
            await wire.source.receive_some()
        assert more.cancelled_caught


async def test_messages_that_nobody_takes_are_capped_in_number(ends: Ends) -> None:
    """As many as a guest may have device payloads wait; one more ends the conversation."""
    async with ends.pair(Phase.RAM_PRE_PAUSE) as pair:
        await pair.wire.source.send_all(raw(ROUND_END) * 4097)
        await trio.testing.wait_all_tasks_blocked()

        for _ in range(4096):
            await pair.destination.expect(m.RoundEnd, deadline_s=5)
        assert (await failure_of(pair.destination)).code == "too_many_messages"


async def test_leaving_a_channel_leaves_no_task_and_the_stream_open(ends: Ends) -> None:
    async with ends.wire() as wire:
        async with open_channel(wire.destination, Role.DESTINATION):
            pass

        await wire.destination.send_all(b"still open")
        assert await wire.source.receive_some() == b"still open"


async def test_an_error_in_the_channel_block_comes_out_alone(ends: Ends) -> None:
    async def block() -> None:
        async with ends.wire() as wire, open_channel(wire.destination, Role.DESTINATION):
            raise NegotiationError("nothing in common")

    with pytest.raises(NegotiationError):
        await block()
