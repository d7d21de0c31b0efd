"""The bulk port: who may open a bulk stream, and how a stream proves what it belongs to.

The destination connects; the source's daemon has one bulk port for all migrations. After the TLS handshake the
destination says hello: migration, session, stream, direction, and a proof by a key that only the two ends of that
session's control connection can derive. The source answers with a proof of its own. No buffer is given, and no record
read, before both proofs were checked. A (session, stream) opens once. What follows on the connection is the transport
that was selected: `tls` goes on in it, `sealed` leaves it (`net.sealed`). Leaving needs no farewell: the hello is the
last thing that one side says in TLS, the answer the last of the other, and no ticket comes behind them.

Handshakes run in threads of their own, capped, each with one deadline for everything before the proof. One stranger
more than the cap pushes out the oldest, which had the longest chance: strangers that stall do not keep out a peer. Who
has proved his session is no stranger any more, and is not pushed out.
"""

from __future__ import annotations

import contextlib
import hmac
import socket
import ssl
import struct
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import structlog
import trio

from vmmigrate.errors import IdentityError, TransportError, VmMigrateError
from vmmigrate.net.identity import Call, Identity, check_allowed
from vmmigrate.net.links import STALL_LIMIT_S, ReceiveLink, SendLink, TlsLink
from vmmigrate.net.refusals import RefusalLog
from vmmigrate.net.sealed import OpeningLink, PartKeys, SealingLink
from vmmigrate.net.secrets import SessionSecrets, proof
from vmmigrate.net.threads import open_group, run_joined
from vmmigrate.net.tls import (
    OnRefusal,
    TlsContext,
    address_text,
    connect_blocking,
    wrap_blocking_server,
)
from vmmigrate.net.tls_errors import map_tls_errors

log = structlog.get_logger(__name__)

MAGIC = b"VMMBULK1"
HELLO = struct.Struct("!8s16sIHBB32s")  # magic, migration, session, stream, direction, reserved, proof
PROOF_BYTES = 32
DIRECTION_TO_DESTINATION = 1
HELLO_DEADLINE_S = 5.0
MAX_STRANGERS = 64
OPEN_DEADLINE_S = 15.0
WAITING_BYTES = 1 << 20  # may wait to be sent in a stream's socket: a record; more would have to drain in the pause
SEALED, TLS = "sealed", "tls"


@dataclass(frozen=True, kw_only=True)
class DoorLimits:
    """What strangers and peers may use up.

    Attributes:
        hello_deadline_s: From accept to a proven hello.
        max_strangers: Connections that have not proved their session yet.
        open_deadline_s: From the beginning of `collect` until every stream of the session is open.
        stall_limit_s: For the rest of a record, or for one to be taken.
    """

    hello_deadline_s: float = HELLO_DEADLINE_S
    max_strangers: int = MAX_STRANGERS
    open_deadline_s: float = OPEN_DEADLINE_S
    stall_limit_s: float = STALL_LIMIT_S


@dataclass(frozen=True, slots=True)
class StreamHello:
    """What a bulk stream claims to be."""

    migration_id: str
    session_number: int
    stream: int
    direction: int = DIRECTION_TO_DESTINATION

    def fields(self) -> bytes:
        migration = uuid.UUID(self.migration_id).bytes
        return HELLO.pack(MAGIC, migration, self.session_number, self.stream, self.direction, 0, b"")[:-PROOF_BYTES]


def _proof_of_destination(secrets: SessionSecrets, hello: StreamHello) -> bytes:
    return proof(secrets.key("bulk hello destination"), hello.fields())


def _proof_of_source(secrets: SessionSecrets, hello: StreamHello) -> bytes:
    return proof(secrets.key("bulk hello source"), hello.fields())


@dataclass
class Appointment:
    """A session that awaits its bulk streams."""

    secrets: SessionSecrets
    peer: Identity
    streams: int
    transport: str = TLS
    links: dict[int, SendLink] = field(default_factory=dict)
    taken: set[int] = field(default_factory=set)
    changed: trio.Event = field(default_factory=trio.Event)


@dataclass(eq=False)
class _Visitor:
    """One connection until it belongs to an appointment.

    `handle` is a second descriptor of it: TLS takes over the first one, and then only this one can end the thread.
    """

    sock: socket.socket
    handle: socket.socket
    context: TlsContext
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    is_proven: bool = False

    def shut(self) -> None:
        # Once proven it may be in the hands of its migration, and its thread is about to return by itself.
        if not self.is_proven:
            _shut(self.handle)


class BulkDoor:
    """The bulk port of a source daemon. *on_refusal*, or else the log, is told (address, error) of all who stay out."""

    def __init__(
        self,
        credentials: Callable[[], TlsContext],
        limits: DoorLimits | None = None,
        *,
        on_refusal: OnRefusal | None = None,
    ) -> None:
        self._credentials = credentials
        self._limits = limits or DoorLimits()
        self._on_refusal = on_refusal or RefusalLog("bulk.refused")
        self._appointments: dict[tuple[str, int], Appointment] = {}
        self._strangers: list[_Visitor] = []  # oldest first
        self._limiter = trio.CapacityLimiter(self._limits.max_strangers)

    async def serve(self, listeners: Sequence[trio.SocketListener]) -> None:
        """Accept until cancelled. One stranger above the cap pushes out the oldest."""
        await trio.serve_listeners(self._meet, list(listeners))

    @contextlib.contextmanager
    def expect(
        self, secrets: SessionSecrets, peer: Identity, streams: int, transport: str = TLS
    ) -> Iterator[Appointment]:
        """Await *streams* streams of a session; on leaving, whatever came and was not taken is closed."""
        key = (secrets.context.migration_id, secrets.context.session_number)
        appointment = self._appointments[key] = Appointment(secrets, peer, streams, transport)
        try:
            yield appointment
        finally:
            del self._appointments[key]
            for link in appointment.links.values():
                link.close()

    async def collect(self, appointment: Appointment) -> tuple[SendLink, ...]:
        """All streams of *appointment*, in order; they are the caller's now.

        Raises: TransportError `bulk_timeout`: some did not come in time.
        """
        try:
            with trio.fail_after(self._limits.open_deadline_s):
                while len(appointment.links) < appointment.streams:
                    await appointment.changed.wait()
        except trio.TooSlowError:
            raise TransportError(
                f"{len(appointment.links)} of {appointment.streams} bulk streams came within"
                f" {self._limits.open_deadline_s:g} s",
                code="bulk_timeout",
            ) from None
        links = tuple(appointment.links[i] for i in range(appointment.streams))
        appointment.links.clear()
        return links

    async def _meet(self, stream: trio.SocketStream) -> None:
        context = self._credentials()
        sock = socket.socket(fileno=stream.socket.detach())
        try:
            # Trio lets hardly anything wait in its sockets; a thread that blocks could then not work ahead of the link.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, WAITING_BYTES)
            peer_name = address_text(*sock.getpeername()[:2])
            visitor = _Visitor(sock, sock.dup(), context)
        except OSError as exc:  # gone again already, or no descriptors left
            sock.close()
            self._on_refusal("a peer that is gone", TransportError(f"bulk connection not taken: {exc}"))
            return
        self._make_room()
        self._strangers.append(visitor)
        try:
            await self._host(visitor)
        except VmMigrateError as exc:
            self._on_refusal(peer_name, exc)
        finally:
            self._no_stranger(visitor)
            visitor.handle.close()

    async def _host(self, visitor: _Visitor) -> None:
        with visitor.scope:
            await run_joined(lambda: self._admit(visitor), end=visitor.shut, limiter=self._limiter)
        if visitor.scope.cancelled_caught and not visitor.is_proven:
            raise TransportError(
                f"bulk hello: shed, more than {self._limits.max_strangers} strangers at once", code="too_many_strangers"
            )

    def _make_room(self) -> None:
        while len(self._strangers) >= self._limits.max_strangers:
            self._strangers.pop(0).scope.cancel()

    def _no_stranger(self, visitor: _Visitor) -> None:
        if visitor in self._strangers:
            self._strangers.remove(visitor)

    def _admit(self, visitor: _Visitor) -> None:
        """In a thread: TLS, hello, proof, answer; then hand the link to its appointment."""
        deadline = time.monotonic() + self._limits.hello_deadline_s
        visitor.sock.setblocking(True)
        tls, identity = wrap_blocking_server(visitor.sock, visitor.context, self._limits.hello_deadline_s)
        try:
            check_allowed(identity, Call.BULK)
            with map_tls_errors(f"bulk hello of {identity}", late="hello_timeout"):
                raw = _receive_exactly(tls, HELLO.size, deadline)
            hello, claimed = parse_hello(raw)
            appointment = trio.from_thread.run_sync(self._check, visitor, hello, claimed, identity)
            with map_tls_errors(f"bulk hello of {identity}"):
                tls.sendall(_proof_of_source(appointment.secrets, hello))
            trio.from_thread.run_sync(self._hand_over, appointment, hello, tls, identity)
        except BaseException:
            tls.close()
            raise

    def _check(self, visitor: _Visitor, hello: StreamHello, claimed: bytes, identity: Identity) -> Appointment:
        """The appointment that *hello* proves to belong to; its stream is taken from now on."""
        appointment = self._appointments.get((hello.migration_id, hello.session_number))
        if appointment is None:
            raise IdentityError(
                f"bulk hello for migration {hello.migration_id}, session {hello.session_number}: not expected",
                code="bulk_unexpected",
            )
        proven = hmac.compare_digest(claimed, _proof_of_destination(appointment.secrets, hello))
        if not proven or identity != appointment.peer or hello.direction != DIRECTION_TO_DESTINATION:
            raise IdentityError(f"bulk hello of {identity} does not prove its session", code="bulk_unproven")
        if hello.stream >= appointment.streams or hello.stream in appointment.taken:
            raise IdentityError(f"bulk stream {hello.stream} is not free to open", code="bulk_unexpected")
        appointment.taken.add(hello.stream)
        visitor.is_proven = True
        self._no_stranger(visitor)
        return appointment

    def _hand_over(self, appointment: Appointment, hello: StreamHello, tls: ssl.SSLSocket, peer: Identity) -> None:
        if self._appointments.get((hello.migration_id, hello.session_number)) is not appointment:
            raise IdentityError("the migration ended while its bulk stream came", code="bulk_unexpected")
        stall_limit_s = self._limits.stall_limit_s
        if appointment.transport == SEALED:
            keys = PartKeys(appointment.secrets, hello.stream)
            appointment.links[hello.stream] = SealingLink(tls, keys, str(peer), stall_limit_s)
        else:
            appointment.links[hello.stream] = TlsLink(tls, str(peer), stall_limit_s)
        appointment.changed.set()
        appointment.changed = trio.Event()


async def open_streams(
    host: str,
    port: int,
    context: TlsContext,
    source: Identity,
    secrets: SessionSecrets,
    streams: int,
    transport: str = TLS,
    *,
    deadline_s: float = HELLO_DEADLINE_S,
    stall_limit_s: float = STALL_LIMIT_S,
) -> tuple[ReceiveLink, ...]:
    """Open and prove all bulk streams of a session, as the destination; each within *deadline_s*.

    Raises: TransportError, IdentityError; then none is left open.
    """
    links: dict[int, ReceiveLink] = {}
    limiter = trio.CapacityLimiter(streams)

    async def open_one(stream: int) -> None:
        hello = StreamHello(secrets.context.migration_id, secrets.context.session_number, stream)
        links[stream] = await trio.to_thread.run_sync(
            _open_one,
            host,
            port,
            context,
            source,
            secrets,
            hello,
            transport,
            deadline_s,
            stall_limit_s,
            limiter=limiter,
        )

    try:
        async with open_group() as nursery:
            for stream in range(streams):
                nursery.start_soon(open_one, stream)
    except BaseException:
        for link in links.values():
            link.close()
        raise
    return tuple(links[i] for i in range(streams))


def _open_one(
    host: str,
    port: int,
    context: TlsContext,
    source: Identity,
    secrets: SessionSecrets,
    hello: StreamHello,
    transport: str,
    deadline_s: float,
    stall_limit_s: float,
) -> ReceiveLink:
    deadline = time.monotonic() + deadline_s
    tls, identity = connect_blocking(host, port, context, source, deadline_s)
    try:
        with map_tls_errors(f"bulk hello to {identity}", first_answer=True, late="hello_timeout"):
            tls.settimeout(max(deadline - time.monotonic(), 0.001))
            tls.sendall(hello.fields() + _proof_of_destination(secrets, hello))
            answer = _receive_exactly(tls, PROOF_BYTES, deadline)
        if not hmac.compare_digest(answer, _proof_of_source(secrets, hello)):
            raise IdentityError(
                f"{identity} does not prove the session of bulk stream {hello.stream}", code="bulk_unproven"
            )
        if transport == SEALED:
            return OpeningLink(tls, PartKeys(secrets, hello.stream), str(identity), stall_limit_s)
        return TlsLink(tls, str(identity), stall_limit_s)
    except BaseException:
        tls.close()
        raise


def parse_hello(raw: bytes) -> tuple[StreamHello, bytes]:
    """What `HELLO.size` bytes claim, and the proof that goes with it. Raises: IdentityError `bulk_bad_hello`."""
    magic, migration, session, stream, direction, reserved, claimed = HELLO.unpack(raw)
    if magic != MAGIC or reserved:
        raise IdentityError("not a bulk hello of this protocol", code="bulk_bad_hello")
    return StreamHello(str(uuid.UUID(bytes=migration)), session, stream, direction), claimed


def _receive_exactly(tls: ssl.SSLSocket, size: int, deadline: float) -> bytes:
    received = b""
    while len(received) < size:
        tls.settimeout(max(deadline - time.monotonic(), 0.001))
        chunk = tls.recv(size - len(received))
        if not chunk:
            raise ConnectionResetError("closed before the hello was complete")
        received += chunk
    return received


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # gone, or taken over by its TLS socket, which has a deadline of its own
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
