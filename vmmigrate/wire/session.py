"""One end of a control connection, without I/O: the phase table applied to bytes in both directions."""

from __future__ import annotations

import hashlib

from vmmigrate.errors import LocalProtocolError, RemoteProtocolError
from vmmigrate.wire import codec
from vmmigrate.wire.framing import FrameDecoder, encode_frame
from vmmigrate.wire.messages import Message, Offer, Select
from vmmigrate.wire.phases import TERMINAL, Kind, Phase, Role, expected, next_phase


class Session:
    """Feeds on bytes, gives messages, refuses what the table does not know.

    The phase advances *before* bytes leave: a send that fails later finds the session already in the new phase, so
    that nobody resumes a guest that may have been given away.

    Attributes:
        phase: Where the migration stands.
        failed_in: The phase in which it failed, once `phase` is FAILED.
        digests: SHA-256 of the Offer and Select bodies as sent or received, for the echo against downgrades.
    """

    def __init__(self, role: Role) -> None:
        self.role = role
        self.phase = Phase.NEGOTIATE
        self.failed_in: Phase | None = None
        self.digests: dict[Kind, bytes] = {}
        self._decoder = FrameDecoder()

    @property
    def is_over(self) -> bool:
        return self.phase in TERMINAL

    def send(self, message: Message) -> bytes:
        """The bytes to put on the wire; the phase has already advanced.

        Raises:
            LocalProtocolError: We may not say this now, or not so; the session has FAILED.
        """
        phase = self.phase
        following = next_phase(phase, self.role, message.kind)
        if following is None:
            self._fail()
            raise LocalProtocolError(f"the {self.role} may not send {message.kind.name} in phase {phase}")
        try:
            frame = codec.encode(message)
            encoded = encode_frame(frame)
        except LocalProtocolError:
            self._fail()
            raise
        self._remember(message, frame.body)
        self._advance(following)
        return encoded

    def receive_data(self, chunk: bytes | bytearray | memoryview) -> None:
        self._decoder.receive_data(chunk)

    def receive_eof(self) -> None:
        """The peer closed the stream.

        Raises:
            RemoteProtocolError: Before the end of the conversation (`link_lost`); the session has FAILED.
        """
        if self.is_over:
            # What may still lie in the buffer crossed our last word on the way: a heartbeat, say.
            return
        phase = self.phase
        self._fail()
        raise RemoteProtocolError(f"the {self.role.peer} closed the connection in phase {phase}", code="link_lost")

    def next_message(self) -> Message | None:
        """The next message of the peer, or None when more bytes are needed.

        Raises:
            RemoteProtocolError: A bad frame, a bad body, or a message that is illegal now; the session has FAILED.
        """
        try:
            frame = self._decoder.next_frame()
            if frame is None:
                # Refuse what is illegal before its body is awaited and kept.
                if self._decoder.announced is not None:
                    self._check_legal(self._decoder.announced)
                return None
            following = self._check_legal(frame.kind)
            message = codec.decode(frame)
        except RemoteProtocolError:
            self._fail()
            raise
        self._remember(message, frame.body)
        self._advance(following)
        return message

    def _check_legal(self, kind: Kind) -> Phase:
        following = next_phase(self.phase, self.role.peer, kind)
        if following is None:
            allowed = ", ".join(sorted(k.name for k in expected(self.phase, self.role.peer))) or "nothing"
            raise RemoteProtocolError(
                f"the {self.role.peer} may not send {kind.name} in phase {self.phase}; allowed: {allowed}",
                code="unexpected_message",
            )
        return following

    def _remember(self, message: Message, body: bytes) -> None:
        if isinstance(message, Offer | Select):
            self.digests[message.kind] = hashlib.sha256(body).digest()

    def _advance(self, following: Phase) -> None:
        if following is Phase.FAILED:
            self._fail()
        else:
            self.phase = following

    def _fail(self) -> None:
        # A phase that is over stays: a heartbeat that crossed our Running does not undo a finished migration.
        if not self.is_over:
            self.failed_in = self.phase
            self.phase = Phase.FAILED
