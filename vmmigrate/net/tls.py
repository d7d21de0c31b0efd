"""TLS 1.3 with certificates on both sides: contexts, and the trio and the blocking side.

Problem: Python's TLS checks names of *machines*, we need the identity of a *party* (`net.identity`). Checked after the
handshake by each caller, that check is one day forgotten. So the contexts made here carry it: their socket classes
check the peer's identity as the last part of `do_handshake`, whoever calls that (we, hypercorn, an HTTP client).
No byte of application data passes before it.

What is peculiar about TLS 1.3 and must be known to read this module:

- The client finishes its handshake *before* the server has looked at the client's certificate. A refused client learns
  it from its first read: an alert, or a plain disconnect. `map_tls_errors(..., first_answer=True)` gives that its name.
- trio drops the alert of a failed handshake (`SSLStream._retry` raises before it sends what OpenSSL has written), so
  that the other side would only ever see a disconnect. `_send_alert` sends it, as far as the link lets it.
- Resumption would carry on an identity that was checked long ago: no tickets are sent, none are accepted.

Socket buffers stay in the hands of the kernel on purpose: setting SO_SNDBUF or SO_RCVBUF switches off autotuning (up to
4 and 6 MiB) and is cut to net.core.*mem_max, on most hosts 208 KiB.

Source: design.md 4.5 and 4.7; reference/dependencies.md 2 and 5; RFC 8446 sections 4.4.2 and 6.2; trio's _ssl.py.
"""

from __future__ import annotations

import errno
import itertools
import socket
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

import structlog
import trio

from vmmigrate.errors import IdentityError, TransportError, UsageError, VmMigrateError
from vmmigrate.net.identity import Call, Identity, check_allowed, check_expected, identity_of_certificate
from vmmigrate.net.pki import check_leaf_files
from vmmigrate.net.refusals import RefusalLog
from vmmigrate.net.revocation import End, LivePeers, RevocationList, read_list
from vmmigrate.net.tls_errors import handshake_errors, map_tls_errors

log = structlog.get_logger(__name__)

TlsStream: TypeAlias = trio.SSLStream[trio.SocketStream]

# No delay of small writes; a peer that vanished without a FIN is noticed after about 30 s, written to or not.
_SOCKET_OPTIONS: Final = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
)

_ALERT_DEADLINE_S: Final = 0.5
_CLOSE_DEADLINE_S: Final = 1.0


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: whom we trust, who we are (leaf first, then any intermediates), our key, and whom we trust no more."""

    ca: Path
    certificate: Path
    key: Path
    crl: Path | None = None


class TlsContext(ssl.SSLContext):
    """An SSL context that knows who we are and lets only parties of our trust domain through.

    Attributes:
        own: Our own identity.
        expected: The only peer that is let through; None: every one of the trust domain.
        revocations: Certificates that are not let through; None: the site has no revocation list.
        peers: Where connections are noted that end when their peer is revoked.
    """

    own: Identity
    expected: Identity | None = None
    revocations: RevocationList | None = None
    peers: LivePeers | None = None

    def check_peer(self, certificate: bytes | None) -> Identity:
        """The identity behind *certificate* (DER). Raises IdentityError as `identity_of_certificate`."""
        return identity_of_certificate(certificate, trust_domain=self.own.trust_domain, expected=self.expected)


class _CheckedObject(ssl.SSLObject):
    """What trio wraps: a handshake that ends with the check of the identity."""

    def do_handshake(self) -> None:
        super().do_handshake()
        peer_identity(self)


class _CheckedSocket(ssl.SSLSocket):
    """What threads use. Closed when the identity is refused: `wrap_socket` would leave it open."""

    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        try:
            peer_identity(self)
        except IdentityError:
            self.close()
            raise


def load_identity(files: TlsFiles) -> Identity:
    """Who we are, after checking that *files* are complete, fit together and are valid now.

    Raises:
        UsageError: `tls_file_missing`, `tls_file_unreadable`, `tls_file_malformed`, `tls_key_mismatch`.
        IdentityError: `certificate_expired`, `certificate_not_yet_valid`, `wrong_ca` (the CA file did not issue it),
            and as `identity_of_certificate` and `revocation.read_list`.
    """
    return _load(files)[0]


def _load(files: TlsFiles) -> tuple[Identity, RevocationList | None]:
    own = check_leaf_files(files.ca, files.certificate, files.key)
    return own, None if files.crl is None else read_list(files.crl, files.ca, files.certificate)


def server_context(files: TlsFiles) -> TlsContext:
    """A context for accepting. Raises as `load_identity`."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, files)
    context.num_tickets = 0
    return context


def client_context(files: TlsFiles, expected: Identity | None = None) -> TlsContext:
    """A context for connecting, also for HTTP clients: *expected* is checked before the first request leaves.

    Raises as `load_identity`.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT, files)
    context.expected = expected
    return context


class ServerCredentials:
    """What a daemon shows and whom it trusts, replaceable without a restart.

    Attributes:
        files: Where it is read from.
        peers: Everybody who is connected by a context of these credentials.
    """

    def __init__(self, files: TlsFiles, owner: Identity | None = None) -> None:
        """*owner*: whom the certificate must belong to, also after `reload`. Raises: as `load_identity`."""
        self.files = files
        self.peers = LivePeers()
        self._owner = owner
        self._context = self._load()
        self.peers.apply(self._context.revocations)

    def current(self) -> TlsContext:
        """The server context in force."""
        return self._context

    def client(self, expected: Identity) -> TlsContext:
        """A context for connecting; the connections, too, end when their peer is revoked. Raises: `load_identity`."""
        context = client_context(self.files, expected)
        context.peers = self.peers
        return context

    def reload(self) -> list[IdentityError]:
        """Read the files again; new handshakes use them. Open connections stay, but for those whose peer is revoked.

        Returns: One error for each connection that was ended.
        Raises: as `load_identity`, `wrong_host` when it is not the owner's; the old context then stays in force.
        """
        self._context = self._load()
        return self.peers.apply(self._context.revocations)

    def _load(self) -> TlsContext:
        context = server_context(self.files)
        if self._owner is not None:
            check_expected(context.own, self._owner)
        context.peers = self.peers
        return context


def watch_peer(tls: ssl.SSLSocket | TlsStream, end: End) -> Callable[[], None]:
    """Have *end* called when the peer's certificate is revoked, until the returned function is called.

    Raises: IdentityError `certificate_revoked`: that happened since the handshake.
    """
    context, certificate = tls.context, tls.getpeercert(binary_form=True)
    if not isinstance(context, TlsContext) or context.peers is None or certificate is None:
        return lambda: None
    return context.peers.enter(certificate, end)


def _context(protocol: ssl._SSLMethod, files: TlsFiles) -> TlsContext:
    own, revocations = _load(files)
    context = TlsContext(protocol)
    context.own, context.revocations = own, revocations
    context.sslobject_class = _CheckedObject
    context.sslsocket_class = _CheckedSocket
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    try:
        context.load_verify_locations(cafile=files.ca)
        if files.crl is not None:
            context.load_verify_locations(cafile=files.crl)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        # The empty password keeps OpenSSL from asking for one on the terminal.
        context.load_cert_chain(files.certificate, files.key, password="")
    except (OSError, ValueError) as exc:
        # Checked a moment ago: somebody replaces the files right now.
        raise UsageError(
            f"{files.certificate}, {files.key}, {files.ca}: cannot be used: {exc}", code="tls_file_malformed"
        ) from exc
    return context


def _context_of(tls: ssl.SSLObject | ssl.SSLSocket | TlsStream) -> TlsContext:
    context = tls.context
    assert isinstance(context, TlsContext)
    return context


# ---------------------------------------------------------------------------------------------------------------------
# trio side


async def connect_tls(
    host: str, port: int, files: TlsFiles | TlsContext, expected: Identity | None, deadline_s: float
) -> tuple[TlsStream, Identity]:
    """Connect, shake hands, and check who answers, all within *deadline_s*.

    Args:
        files: Our own; or a context made for *expected* by `ServerCredentials.client`.

    That we were accepted is known only when the first answer arrives; read it under
    `map_tls_errors(..., first_answer=True)`. After a failure nothing is left open.

    Raises:
        UsageError, IdentityError: as `load_identity`, about our own files.
        IdentityError, TransportError: as `map_tls_errors` and `identity_of_certificate`; `handshake_timeout`.
    """
    context = files if isinstance(files, TlsContext) else client_context(files, expected)
    where = address_text(host, port)
    deadline = trio.current_time() + deadline_s
    with map_tls_errors(f"connecting to {where}"), trio.fail_at(deadline):
        transport = await trio.open_tcp_stream(host, port)
    stream = trio.SSLStream(transport, context)
    try:
        with handshake_errors(where), trio.fail_at(deadline):
            tune_socket(transport.socket)
            await stream.do_handshake()
        return stream, peer_identity(stream)
    except BaseException as exc:
        try:
            await _send_alert(stream, exc)
        finally:
            await trio.aclose_forcefully(transport)
        raise


@dataclass(frozen=True, kw_only=True)
class ServeLimits:
    """What strangers and peers may use up.

    Attributes:
        handshake_deadline_s: From accept to known identity.
        max_handshakes: Connections whose identity is not known yet. One more pushes out the oldest of them, which had
            the longest chance; so that stalled strangers do not keep out a peer.
        max_connections: Connections whose identity is known. One more is refused.
        max_connections_per_peer: Of them, those of one identity: no single peer can keep out all others.
    """

    handshake_deadline_s: float = 5.0
    max_handshakes: int = 64
    max_connections: int = 256
    max_connections_per_peer: int = 64


OnConnection: TypeAlias = Callable[[TlsStream, Identity], Awaitable[None]]
OnRefusal: TypeAlias = Callable[[str, VmMigrateError], None]


async def serve_tls(
    listeners: Sequence[trio.SocketListener],
    credentials: Callable[[], TlsContext],
    on_connection: OnConnection,
    *,
    limits: ServeLimits | None = None,
    call: Call | None = None,
    on_refusal: OnRefusal | None = None,
    https_compatible: bool = False,
    connection_nursery: trio.Nursery | None = None,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Accept until cancelled; call *on_connection* for every peer that is who it must be.

    Each connection has a task of its own from the first byte, so nobody waits for another's handshake. The stream is
    closed when *on_connection* returns or raises. A VmMigrateError of its is reported; anything else ends the server.

    Args:
        listeners: Closed when this returns.
        credentials: Asked for every connection, so that certificates can be replaced (`ServerCredentials.current`).
        call: What all peers come here for; a role that may not use it is refused (`forbidden`).
        on_refusal: Told (address, error) of everybody who did not get in, or failed inside: errors as `map_tls_errors`
            and `identity_of_certificate`, `handshake_timeout`, `too_many_handshakes`, `too_many_connections`,
            `forbidden`.
        connection_nursery: Where connections run, if they shall outlive accepting.
    """
    door = _Door(
        credentials,
        on_connection,
        limits or ServeLimits(),
        call,
        on_refusal or RefusalLog("tls.refused"),
        https_compatible,
    )
    await trio.serve_listeners(door.admit, list(listeners), handler_nursery=connection_nursery, task_status=task_status)


@dataclass
class _Door:
    """Who is inside, and who still stands at the door."""

    _credentials: Callable[[], TlsContext]
    _on_connection: OnConnection
    _limits: ServeLimits
    _call: Call | None
    _on_refusal: OnRefusal
    _https_compatible: bool
    _inside: Counter[Identity] = field(default_factory=Counter)
    _waiting: dict[int, trio.CancelScope] = field(default_factory=dict)  # oldest first
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    async def admit(self, transport: trio.SocketStream) -> None:
        peer = _peer_text(transport.socket)
        try:
            tune_socket(transport.socket)
            stream = trio.SSLStream(
                transport, self._credentials(), server_side=True, https_compatible=self._https_compatible
            )
            identity = await self._authenticate(stream, peer)
            leave = watch_peer(stream, lambda _: _shut(transport.socket))
        except VmMigrateError as exc:
            self._on_refusal(peer, exc)
            return
        except OSError:
            return  # Gone between accept and here.
        self._inside[identity] += 1
        try:
            await self._on_connection(stream, identity)
        except VmMigrateError as exc:
            self._on_refusal(peer, exc)
        finally:
            self._inside -= Counter([identity])
            leave()
            await close_tls(stream)

    async def _authenticate(self, stream: TlsStream, peer: str) -> Identity:
        """The identity of the peer, allowed in. After a failure the peer was told what can be told."""
        self._make_room()
        number = next(self._numbers)
        scope = self._waiting[number] = trio.CancelScope()
        try:
            with scope, handshake_errors(peer), trio.fail_after(self._limits.handshake_deadline_s):
                await stream.do_handshake()
        except VmMigrateError as exc:
            await _send_alert(stream, exc)
            raise
        finally:
            del self._waiting[number]
        if scope.cancelled_caught:
            raise TransportError(
                f"TLS handshake with {peer}: shed, more than {self._limits.max_handshakes} handshakes at once",
                code="too_many_handshakes",
            )
        identity = peer_identity(stream)
        if self._call is not None:
            check_allowed(identity, self._call)
        self._check_room(identity, peer)
        return identity

    def _check_room(self, identity: Identity, peer: str) -> None:
        limits = self._limits
        for used, most, whose in (
            (self._inside.total(), limits.max_connections, ""),
            (self._inside[identity], limits.max_connections_per_peer, " of this peer"),
        ):
            if used >= most:
                text = f"{identity} at {peer}: more than {most} connections{whose} at once"
                raise TransportError(text, code="too_many_connections")

    def _make_room(self) -> None:
        waiting = [scope for scope in self._waiting.values() if not scope.cancel_called]
        if len(waiting) >= self._limits.max_handshakes:
            waiting[0].cancel()


async def open_listeners(host: str, port: int) -> list[trio.SocketListener]:
    """Listen on *host*:*port*; with port 0 on one address only and a port that the kernel chooses.

    Raises:
        UsageError: `port_in_use`, `unknown_host`, `cannot_listen`; nothing is left open.
    """
    where = address_text(host, port)
    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except socket.gaierror as exc:
        raise UsageError(f"cannot listen on {where}: unknown host name", code="unknown_host") from exc
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise UsageError(f"cannot listen on {where}: address already in use", code="port_in_use") from exc
        raise UsageError(f"cannot listen on {where}: {exc.strerror or exc}", code="cannot_listen") from exc
    for other in listeners[1:] if port == 0 else []:
        await other.aclose()
    return listeners[:1] if port == 0 else listeners


def bound_port(listeners: Sequence[trio.SocketListener]) -> int:
    """The port behind the first of *listeners*."""
    return int(listeners[0].socket.getsockname()[1])


async def close_tls(stream: TlsStream) -> None:
    """Say goodbye (close_notify) and close; bounded in time also when the peer does not read. Raises only Cancelled."""
    with trio.move_on_after(_CLOSE_DEADLINE_S):
        try:
            await stream.aclose()
        except trio.BrokenResourceError:
            await trio.aclose_forcefully(stream)


def peer_identity(tls: TlsStream | ssl.SSLSocket | ssl.SSLObject) -> Identity:
    """Who is at the other end of an established connection made with a `TlsContext`."""
    return _context_of(tls).check_peer(tls.getpeercert(binary_form=True))


async def _send_alert(stream: TlsStream, failure: BaseException) -> None:
    """Send what OpenSSL has to say about a handshake that it failed, if the link takes it at once.

    Not for failures of our own check: what waits to be sent is then the end of a good handshake.
    """
    outgoing: Any = getattr(stream, "_outgoing", None)  # trio keeps it private; without it the peer learns less
    if outgoing is None or not isinstance(failure.__cause__, trio.BrokenResourceError):
        return
    with trio.move_on_after(_ALERT_DEADLINE_S), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.transport_stream.send_all(outgoing.read())
        await stream.transport_stream.send_eof()


def _shut(sock: trio.socket.SocketType) -> None:
    with suppress(OSError):  # it is gone already
        sock.shutdown(socket.SHUT_RDWR)


def _peer_text(sock: socket.socket | trio.socket.SocketType) -> str:
    try:
        return address_text(*sock.getpeername()[:2])
    except OSError:
        return "a peer that is gone"


# ---------------------------------------------------------------------------------------------------------------------
# Blocking side, for the threads of bulk streams


def wrap_blocking_server(sock: socket.socket, context: TlsContext, deadline_s: float) -> tuple[ssl.SSLSocket, Identity]:
    """Shake hands over an accepted *sock*, which is taken over: it is closed after a failure.

    The result blocks without a deadline; end it from another thread by `shutdown()`, join, then `close()`. An end of
    stream without close_notify raises, it is never mistaken for the end of the data.

    Raises:
        IdentityError, TransportError: as `map_tls_errors` and `identity_of_certificate`; `handshake_timeout`.
    """
    return _blocking_handshake(sock, context, _peer_text(sock), deadline_s, server_side=True)


def connect_blocking(
    host: str, port: int, context: TlsContext, expected: Identity | None, deadline_s: float
) -> tuple[ssl.SSLSocket, Identity]:
    """Connect, shake hands and check who answers, within *deadline_s*; else as `wrap_blocking_server`.

    That we were accepted is known only when the first answer arrives (`map_tls_errors(..., first_answer=True)`).
    """
    where = address_text(host, port)
    deadline = time.monotonic() + deadline_s
    with map_tls_errors(f"connecting to {where}"):
        sock = socket.create_connection((host, port), timeout=deadline_s)
    left_s = max(deadline - time.monotonic(), 0.001)
    return _blocking_handshake(sock, context, where, left_s, expected=expected)


def _blocking_handshake(
    sock: socket.socket,
    context: TlsContext,
    peer: str,
    deadline_s: float,
    *,
    server_side: bool = False,
    expected: Identity | None = None,
) -> tuple[ssl.SSLSocket, Identity]:
    try:
        with handshake_errors(peer):
            tune_socket(sock)
            sock.settimeout(deadline_s)
            sock = tls = context.wrap_socket(
                sock, server_side=server_side, do_handshake_on_connect=False, suppress_ragged_eofs=False
            )
            tls.do_handshake()  # The time-out holds for the handshake as a whole.
            tls.settimeout(None)
            identity = peer_identity(tls)
            check_expected(identity, expected or identity)
            return tls, identity
    except BaseException:
        sock.close()
        raise


def tune_socket(sock: socket.socket | trio.socket.SocketType) -> None:
    """Set `_SOCKET_OPTIONS`. Raises OSError when the socket is gone."""
    for level, option, value in _SOCKET_OPTIONS:
        sock.setsockopt(level, option, value)


def address_text(host: str, port: int) -> str:
    """*host*:*port* as people write it; IPv6 addresses in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
