"""The control channel: a Session over a TLS stream, with deadlines, heartbeats, and one reader.

The reader runs all the time, so that a Cancel, a failure or a cut is noticed while we are busy elsewhere. It queues
messages for `expect`, keeps `Progress` for whoever looks, and on failure cancels every `interruptible` block.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, overload

import trio

from vmmigrate.errors import (
    LocalProtocolError,
    MigrationCancelled,
    PeerError,
    RemoteProtocolError,
    TransportError,
    VmMigrateError,
)
from vmmigrate.net.threads import open_group
from vmmigrate.net.tls import TlsStream, watch_peer
from vmmigrate.net.tls_errors import map_tls_errors
from vmmigrate.wire.codec import encode
from vmmigrate.wire.framing import encode_frame
from vmmigrate.wire.messages import (
    Cancel,
    ConsoleHistoryMessage,
    DeviceState,
    Failed,
    Heartbeat,
    Message,
    Progress,
    Refuse,
    Refused,
)
from vmmigrate.wire.phases import NO_CANCEL, Phase, Role
from vmmigrate.wire.session import Session

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")

HEARTBEAT_INTERVAL_S = 1.0
SILENCE_LIMIT_S = 10.0
SEND_DEADLINE_S = 30.0
GOODBYE_DEADLINE_S = 2.0
FINISH_SENDING_S = 1.0
TRUE_REASON_S = GOODBYE_DEADLINE_S / 2
_MAX_REASON_CHARS = 4096  # as codec.py allows them
_MAX_TEXT_CHARS = 16_384
_RECEIVE_BYTES = 1 << 16
# What may wait for `expect`: a guest's whole device state, in messages of any size, and no more.
_MAX_QUEUED = 4096
_MAX_QUEUED_BYTES = 320 << 20


@dataclass(frozen=True, kw_only=True)
class ChannelLimits:
    """How long the other end may keep us waiting.

    Attributes:
        heartbeat_s: We give a sign of life so often; the other end, too.
        silence_s: Without any sign of the other end, the link is dead.
        send_s: For one message to be taken.
        goodbye_s: For a last word to be taken; half of it for the other end's own reason to come.
    """

    heartbeat_s: float = HEARTBEAT_INTERVAL_S
    silence_s: float = SILENCE_LIMIT_S
    send_s: float = SEND_DEADLINE_S
    goodbye_s: float = GOODBYE_DEADLINE_S


class Channel:
    """One end of the control connection. Make it with `open_channel`.

    Attributes:
        session: The phase table's view of the conversation.
        peer_progress: The newest counters the peer sent.
    """

    def __init__(self, stream: TlsStream, session: Session, limits: ChannelLimits | None = None) -> None:
        self.session = session
        self._limits = limits or ChannelLimits()
        self.peer_progress: Mapping[str, int] = {}
        self._stream = stream
        self._send_lock = trio.Lock()
        self._unsent = bytearray()
        self._queue: deque[Message] = deque()
        self._queued_bytes = 0
        self._wakeup = trio.Event()
        self._failure: VmMigrateError | None = None
        self._scopes: set[trio.CancelScope] = set()
        self._heard = 0  # how often
        self._owes_reason = False

    @property
    def role(self) -> Role:
        return self.session.role

    @property
    def phase(self) -> Phase:
        return self.session.phase

    async def send(self, message: Message) -> None:
        """Say *message*. The phase advances before a byte leaves.

        Raises:
            LocalProtocolError: Not now, or not so; a conversation that was not over fails with it.
            TransportError: It may or may not have arrived.
        """
        self.say_later(message)
        await self.send_bytes(b"")

    def say_later(self, message: Message) -> None:
        """Say *message* together with whatever is said next, in this order: one write where each would be a delay.

        Raises: LocalProtocolError: as `send`.
        """
        was_over = self.session.is_over
        try:
            self._unsent += self.session.send(message)
        except LocalProtocolError as exc:
            if not was_over:
                self._owes_reason = True
                self.fail(exc)
            raise

    async def send_bytes(self, encoded: bytes) -> None:
        """Put on the wire what `session.send` gave (apart, for what must happen in between)."""
        self._unsent += encoded
        async with self._send_lock:
            waiting, self._unsent = self._unsent, bytearray()
            if not waiting:
                return  # somebody else has just sent it
            with (
                map_tls_errors(f"sending to the {self.role.peer}", late="stalled"),
                trio.fail_after(self._limits.send_s),
            ):
                await self._send_whole(bytes(waiting))

    async def _send_whole(self, encoded: bytes) -> None:
        """Send; when cancelled in the middle of it, go on for a moment. Half a TLS record would break the stream, and
        with it every word that is still to be said, the reason of the cancel among them."""
        sent, scope = trio.Event(), trio.CancelScope(shield=True)

        async def send() -> None:
            with scope:
                await self._stream.send_all(encoded)
            sent.set()

        async with open_group() as group:
            group.start_soon(send)
            try:
                await sent.wait()
            except trio.Cancelled:
                scope.deadline = trio.current_time() + FINISH_SENDING_S
                raise

    @overload
    async def expect(self, first: type[A], /, *, deadline_s: float) -> A: ...

    @overload
    async def expect(self, first: type[A], second: type[B], /, *, deadline_s: float) -> A | B: ...

    @overload
    async def expect(self, first: type[A], second: type[B], third: type[C], /, *, deadline_s: float) -> A | B | C: ...

    async def expect(self, *kinds: type[Any], deadline_s: float) -> Any:
        """The next message, which must be one of *kinds*.

        Raises:
            TransportError: `timed_out`, or the link is cut. PeerError: the peer failed, with its code.
            MigrationCancelled: the peer cancelled. RemoteProtocolError: it said something else.
        """
        try:
            with trio.fail_after(deadline_s):
                while not self._queue:
                    self._check_alive()
                    await self._wakeup.wait()
        except trio.TooSlowError:
            names = " or ".join(kind.__name__ for kind in kinds)
            raise TransportError(
                f"no {names} from the {self.role.peer} within {deadline_s:g} s", code="timed_out"
            ) from None
        message = self._queue.popleft()
        self._queued_bytes -= _bulk_of(message)
        if not isinstance(message, kinds):
            raise RemoteProtocolError(
                f"{type(message).__name__} came where {' or '.join(kind.__name__ for kind in kinds)} was due",
                code="unexpected_message",
            )
        return message

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Give up the block as soon as the peer fails, cancels, or is cut off; raise what happened.

        Also when it happens too late to stop the block: who leaves it, leaves it with a peer that was there.
        Outer cancellation passes through unchanged.
        """
        self._check_alive()
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                yield
            except VmMigrateError:
                # What went wrong here may only be the echo of what the peer has told us.
                self._check_alive()
                raise
            finally:
                self._scopes.discard(scope)
        self._check_alive()

    async def true_reason(self, error: VmMigrateError) -> VmMigrateError:
        """The peer's own error, when it comes soon after *error*; else *error*.

        A peer that fails closes its bulk streams, and that is often noticed before its message is read.
        """
        if not isinstance(error, TransportError):
            return error
        with trio.move_on_after(self._limits.goodbye_s / 2, shield=True):
            while self._failure is None:
                await self._wakeup.wait()
        return self._failure or error

    def fail(self, error: VmMigrateError) -> None:
        """End the conversation on our side: every `expect` and `interruptible` raises *error* from now on."""
        if self._failure is None:
            self._failure = error
            self._wake()
            for scope in self._scopes:
                scope.cancel()

    async def say_goodbye(self, error: VmMigrateError) -> None:
        """Tell the peer why we give up, if it can still be told and does not know. Never raises; bounded."""
        word = _last_word(error, self.phase, self.role)
        with trio.move_on_after(self._limits.goodbye_s, shield=True), contextlib.suppress(VmMigrateError):
            owes, self._owes_reason = self._owes_reason, False
            if not self.session.is_over:
                await self.send(word)
            elif owes:
                # The session failed by our own judgement, so it says nothing more; the peer's is still open.
                await self.send_bytes(encode_frame(encode(word)))

    async def read_forever(self) -> None:
        """The reader: runs until the link ends, the conversation is over, or it is cancelled."""
        try:
            while await self._read_some():
                pass
        except VmMigrateError as exc:
            self._owes_reason = isinstance(exc, RemoteProtocolError)
            self.fail(exc)

    async def beat_forever(self) -> None:
        """Heartbeats out."""
        while self._is_live:
            await trio.sleep(self._limits.heartbeat_s)
            if self._is_live:
                await self._beat()

    async def watch_forever(self) -> None:
        """Notice a peer that says nothing. Not in `beat_forever`: what we send may long wait for a peer that is stuck.

        Counted in turns of our own: when it is we who were stopped, the peer is not to blame.
        """
        silent_s = 0.0
        while self._is_live:
            heard = self._heard
            await trio.sleep(self._limits.heartbeat_s)
            silent_s = silent_s + self._limits.heartbeat_s if self._heard == heard else 0.0
            if silent_s >= self._limits.silence_s:
                self.fail(TransportError(f"the {self.role.peer} is silent for {silent_s:g} s", code="peer_silent"))

    @property
    def _is_live(self) -> bool:
        return self._failure is None and not self.session.is_over

    async def _beat(self) -> None:
        try:
            await self.send(Heartbeat())
        except (TransportError, LocalProtocolError) as exc:
            self.fail(exc)

    async def _read_some(self) -> bool:
        """Read once; False at the end of the conversation."""
        with map_tls_errors(f"receiving from the {self.role.peer}", late="link_lost"):
            chunk = await self._stream.receive_some(_RECEIVE_BYTES)
        self._heard += 1
        if self.session.is_over:
            # What comes now crossed our last word on its way; it neither belongs here nor is a fault.
            return False
        if not chunk:
            with contextlib.suppress(RemoteProtocolError):
                self.session.receive_eof()
            raise TransportError(f"the {self.role.peer} closed the connection", code="link_lost")
        self.session.receive_data(chunk)
        while not self.session.is_over and (message := self.session.next_message()) is not None:
            self._deliver(message)
        return not self.session.is_over

    def _deliver(self, message: Message) -> None:
        if isinstance(message, Heartbeat):
            return
        if isinstance(message, Progress):
            self.peer_progress = message.counters
        elif isinstance(message, Failed):
            # The code is the peer's own: both records then say the same.
            self.fail(PeerError(message.text, code=message.code, details=message.details))
        elif isinstance(message, Cancel):
            self.fail(MigrationCancelled(message.reason))
        elif isinstance(message, Refused) and self.session.failed_in is Phase.READY:
            # Nobody waits for it: the guest was not given away yet, and now will not be.
            self.fail(PeerError(message.text, code=message.code))
        else:
            self._queued_bytes += _bulk_of(message)
            if len(self._queue) >= _MAX_QUEUED or self._queued_bytes > _MAX_QUEUED_BYTES:
                raise RemoteProtocolError(
                    "more unanswered messages than a guest's state needs", code="too_many_messages"
                )
            self._queue.append(message)
            self._wake()

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _wake(self) -> None:
        self._wakeup.set()
        self._wakeup = trio.Event()


def _bulk_of(message: Message) -> int:
    """The bytes that *message* holds on to, of those messages that can hold many."""
    if isinstance(message, DeviceState):
        return sum(len(item.body) for item in message.payloads)
    if isinstance(message, ConsoleHistoryMessage):
        return len(message.beginning) + len(message.rolling)
    return 0


def _last_word(error: VmMigrateError, phase: Phase, role: Role) -> Message:
    """What tells *error*, such that it fits the wire: a goodbye must not fail for its text or its details."""
    text = error.text.encode(errors="backslashreplace").decode()
    if isinstance(error, MigrationCancelled) and (phase, role) not in NO_CANCEL:
        return Cancel(text[:_MAX_REASON_CHARS])
    word = Failed(error.code, text[:_MAX_TEXT_CHARS], error.details)
    try:
        encode_frame(encode(word))
    except LocalProtocolError:
        return replace(word, details={})
    return word


def refusal_of(error: VmMigrateError) -> Refuse:
    """A refusal that tells *error*, such that it fits the wire."""
    text = error.text.encode(errors="backslashreplace").decode()[:_MAX_TEXT_CHARS]
    word = Refuse(error.code, text, error.details)
    try:
        encode_frame(encode(word))
    except LocalProtocolError:
        return replace(word, details={})
    return word


@contextlib.asynccontextmanager
async def open_channel(stream: TlsStream, role: Role, limits: ChannelLimits | None = None) -> AsyncIterator[Channel]:
    """A channel over *stream* with its reader, heartbeat and watch. The stream is the caller's to close.

    Raises: IdentityError `certificate_revoked`: the peer was, since the handshake; later the channel fails with it.
    """
    channel = Channel(stream, Session(role), limits)
    async with open_group() as nursery:
        leave = watch_peer(stream, channel.fail)
        nursery.start_soon(channel.read_forever)
        nursery.start_soon(channel.beat_forever)
        nursery.start_soon(channel.watch_forever)
        try:
            yield channel
        finally:
            leave()
            nursery.cancel_scope.cancel()
