"""Serve an ASGI application over mutual TLS 1.3, and tell it who is asking.

Problem: hypercorn's own serve loop hides the client certificate from the application, binds and logs by itself, and has
deadlines but no limits. So the loop is ours (`serve_https`), the accepting and the handshakes are those of `net.tls`,
and only the conversation after the handshake is hypercorn's: its `TCPServer` is handed a stream that is established
and whose peer is known. A stranger's first byte never reaches an HTTP parser.

The application finds the peer in `scope["extensions"]["tls"]`; `identity_of_scope` reads it.

What is relied upon in hypercorn 0.18 (the dependency is pinned to it): the constructor of `TCPServer`, `run`,
`_read_data`, `protocol_send`, `idle_task`, and `WorkerContext`. Its `protocol_send` shields a send from every
cancellation, so a client that stops reading would hold up a shutdown for ever; ours gives up after a deadline. Its
timer for idle clients goes on when the client has left, and keeps the connection until it is over; ours is stopped.

Source: reference/dependencies.md 2; hypercorn's trio/run.py and trio/tcp_server.py.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias, cast

import structlog
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.logging import Logger
from hypercorn.protocol.h11 import H2CProtocolRequiredError, H2ProtocolAssumedError
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState

from vmmigrate.errors import IdentityError, VmMigrateError
from vmmigrate.net.identity import Identity, Role
from vmmigrate.net.tls import (
    OnRefusal,
    ServeLimits,
    ServerCredentials,
    TlsFiles,
    TlsStream,
    bound_port,
    open_listeners,
    serve_tls,
)

log = structlog.get_logger(__name__)

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
AsgiApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

# After a refused body, this long and this much is still read and thrown away: closing at once resets the connection,
# and the reset can overtake the answer.
_DISCARD_S: Final = 1.0
_DISCARD_BYTES: Final = 16 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class HttpsLimits:
    """What clients may use up.

    Attributes:
        max_body_bytes: Of one request; more is answered with 413.
        max_host_body_bytes: The same for hosts, whose requests have nothing to say in a body.
        body_deadline_s: For one request body to arrive; longer is answered with 408.
        max_connections: Clients at once; also the cap on handshakes at once is this.
        max_connections_per_peer: Of them, those of one identity.
        handshake_deadline_s: From accept to known identity.
        keep_alive_s: Idle between requests, and for a request's head to arrive.
        send_deadline_s: For one chunk of a response to be taken by the client.
        graceful_s: For running requests to end after a shutdown was asked for.
    """

    max_body_bytes: int = 4 * 1024 * 1024
    max_host_body_bytes: int = 4096
    body_deadline_s: float = 30.0
    max_connections: int = 256
    max_connections_per_peer: int = 64
    handshake_deadline_s: float = 5.0
    keep_alive_s: float = 15.0
    send_deadline_s: float = 10.0
    graceful_s: float = 3.0


async def serve_https(
    app: AsgiApp,
    host: str,
    port: int,
    files: TlsFiles | ServerCredentials,
    *,
    limits: HttpsLimits | None = None,
    shutdown: trio.Event | None = None,
    on_refusal: OnRefusal | None = None,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve *app* until *shutdown* is set (running requests may end) or until cancelled (at once).

    Started with the bound port, after the application's lifespan startup. A failing request ends itself, a failing
    connection itself, neither the server.

    Args:
        files: Give `ServerCredentials` to replace certificates while this runs.
        shutdown: Stop accepting, close idle connections, wait at most `graceful_s` for the others, return.
        on_refusal: As in `serve_tls`.

    Raises:
        UsageError: `port_in_use`, `unknown_host`, `cannot_listen`, and as `load_identity`; nothing is left open.
        IdentityError: as `load_identity`.
        VmMigrateError: `internal`, the application's lifespan refused to start.
    """
    limits = limits or HttpsLimits()
    credentials = files if isinstance(files, ServerCredentials) else ServerCredentials(files)
    capped = BodyCap(app, limits)
    service = _Service(capped, limits)
    listeners = await open_listeners(host, port)
    accept = partial(
        serve_tls,
        listeners,
        credentials.current,
        service.converse,
        limits=_serve_limits(limits),
        on_refusal=on_refusal,
        https_compatible=True,
    )
    try:
        await service.run(accept, bound_port(listeners), trio.Event() if shutdown is None else shutdown, task_status)
    finally:
        for listener in listeners:
            listener.socket.close()


def identity_of_scope(scope: Mapping[str, Any]) -> Identity:
    """Who sent the request of *scope*. Raises IdentityError (`no_certificate`) outside of `serve_https`."""
    tls = scope.get("extensions", {}).get("tls")
    if tls is None:
        raise IdentityError("the request did not come over mutual TLS", code="no_certificate")
    return Identity.parse(tls["client_uri"])


class BodyCap:
    """ASGI middleware: the application sees a request only when its whole body is there, in time and within the cap.

    So a refused request changed nothing. Other scopes than "http" pass.
    """

    def __init__(self, app: AsgiApp, limits: HttpsLimits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = self._limits.max_host_body_bytes if _is_host(scope) else self._limits.max_body_bytes
        deadline_s = self._limits.body_deadline_s
        try:
            body = await _receive_body(scope, receive, most, deadline_s)
        except trio.TooSlowError:
            await _refuse(send, 408, "body_too_slow", f"the body did not arrive within {deadline_s:g} s")
        except _TooLargeError:
            await _discard(receive)
            await _refuse(send, 413, "body_too_large", f"the body is larger than {most} bytes")
        except _GoneError:
            return
        else:
            await self._app(scope, _replay(body, receive), send)


def _is_host(scope: Scope) -> bool:
    tls = scope.get("extensions", {}).get("tls")
    return tls is not None and Identity.parse(tls["client_uri"]).role is Role.HOST


async def _receive_body(scope: Scope, receive: Receive, max_body_bytes: int, deadline_s: float) -> bytes:
    if _announced_bytes(scope) > max_body_bytes:
        raise _TooLargeError
    body = bytearray()
    with trio.fail_after(deadline_s):
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise _GoneError
            body += message.get("body", b"")
            if len(body) > max_body_bytes:
                raise _TooLargeError
            if not message.get("more_body", False):
                return bytes(body)


class _TooLargeError(Exception):
    pass


class _GoneError(Exception):
    """The client left before its body was complete; half a body is no request."""


def _announced_bytes(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name.lower() == b"content-length" and value.isdigit():
            return int(value[:20])
    return 0


def _replay(body: bytes, receive: Receive) -> Receive:
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_replayed() -> Message:
        return first.pop() if first else await receive()

    return receive_replayed


async def _discard(receive: Receive) -> None:
    left_bytes = _DISCARD_BYTES
    with trio.move_on_after(_DISCARD_S):
        while left_bytes > 0 and (message := await receive()).get("more_body", False):
            left_bytes -= len(message.get("body", b""))


async def _refuse(send: Send, status: int, code: str, text: str) -> None:
    error = {"code": code, "message": text, "details": {}}
    body = json.dumps({"error": error}, separators=(",", ":")).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


# ---------------------------------------------------------------------------------------------------------------------
# hypercorn


class _EventLog(Logger):
    """hypercorn's log: failures of the application become events, the rest is dropped; nothing global is touched."""

    async def exception(self, message: str, *args: Any, **kwargs: Any) -> None:
        log.exception("http.request_failed")


class _ClientGoneError(OSError):
    """What an application gets that sends to nobody, as ASGI 2.4 asks for; otherwise it could send for ever."""


class _Connection(TCPServer):
    """hypercorn's end of one established connection."""

    peer: Identity
    send_deadline_s: float
    gone: trio.Event
    _has_left = False

    async def _read_data(self) -> None:
        """As hypercorn's, but HTTP/1.1 only: with HTTP/2 each limit on a connection would hold for each of 100 streams.

        The wrapper that is taken off here would change the protocol when a client begins with HTTP/2 or asks for it.
        And once the client has left nobody waits for its next request: a running timer would keep the connection.
        """
        self.protocol = self.protocol.protocol  # type: ignore[assignment]
        try:
            await super()._read_data()
        except (H2ProtocolAssumedError, H2CProtocolRequiredError):
            log.info("http.refused", peer=str(self.peer), code="http_version", text="HTTP/2: needed is HTTP/1.1")
            await self.protocol.handle(Closed())
        self._has_left = True
        await self.idle_task.stop()

    async def protocol_send(self, event: Event) -> None:
        """As hypercorn's, but who does not read counts as gone after a while, and who has left is not timed."""
        if isinstance(event, Updated) and self._has_left:
            return
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        async with self.send_lock:
            try:
                with trio.move_on_after(self.send_deadline_s, shield=True) as scope:
                    await self.stream.send_all(event.data)
                if not scope.cancelled_caught:
                    return
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
        self.gone.set()
        await trio.aclose_forcefully(self.stream)  # ends the reading task, too
        await self.protocol.handle(Closed())


class _Lifespan:
    """The application's own start and end. One that knows no lifespan returns or raises at once, and that is fine.

    Not hypercorn's, which fails when the application returns before it is asked.
    """

    def __init__(self, app: AsgiApp, state: dict[str, Any]) -> None:
        self._app = app
        self._state = state
        self._asked = False
        self.failure: str | None = None
        self.started, self.leave, self.ended = trio.Event(), trio.Event(), trio.Event()

    async def run(self) -> None:
        scope = {"type": "lifespan", "asgi": {"spec_version": "2.0", "version": "3.0"}, "state": self._state}
        try:
            await self._app(scope, self._receive, self._send)
        except Exception:
            if self.started.is_set() and self.failure is None:
                log.exception("http.lifespan_failed")
        finally:
            self.started.set()
            self.ended.set()

    async def _receive(self) -> Message:
        if self._asked:
            await self.leave.wait()
            return {"type": "lifespan.shutdown"}
        self._asked = True
        return {"type": "lifespan.startup"}

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "lifespan.startup.failed":
            self.failure = message.get("message") or "no reason given"
        if kind.startswith("lifespan.startup."):
            self.started.set()
        else:
            self.ended.set()


class _Service:
    """The application while it is served: lifespan, hypercorn's state, one `converse` per connection."""

    def __init__(self, app: AsgiApp, limits: HttpsLimits) -> None:
        self._app = app
        self._limits = limits
        self._config = _hypercorn_config(limits)
        self._context = WorkerContext(None)
        self._state: dict[str, Any] = {}

    async def run(
        self,
        accept: Callable[..., Awaitable[None]],
        port: int,
        shutdown: trio.Event,
        task_status: trio.TaskStatus[int],
    ) -> None:
        lifespan = _Lifespan(self._app, self._state)
        async with trio.open_nursery() as lifespan_nursery:
            lifespan_nursery.start_soon(lifespan.run)
            await lifespan.started.wait()
            if lifespan.failure is None:
                await self._accept_until(shutdown, accept, port, task_status)
                lifespan.leave.set()
                with trio.move_on_after(self._limits.graceful_s):
                    await lifespan.ended.wait()
            lifespan_nursery.cancel_scope.cancel()
        if lifespan.failure is not None:
            raise VmMigrateError(f"the application did not start: {lifespan.failure}")

    async def _accept_until(
        self,
        shutdown: trio.Event,
        accept: Callable[..., Awaitable[None]],
        port: int,
        task_status: trio.TaskStatus[int],
    ) -> None:
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as accepting:
                await accepting.start(partial(accept, connection_nursery=connections))
                task_status.started(port)
                await shutdown.wait()
                accepting.cancel_scope.cancel()
            await self._context.terminated.set()  # idle connections close
            connections.cancel_scope.deadline = trio.current_time() + self._limits.graceful_s

    async def converse(self, stream: TlsStream, identity: Identity) -> None:
        """Answer the requests of one client until it leaves, is idle for too long, or we end."""
        facts = {
            "client_uri": identity.uri,
            "client_cert_der": stream.getpeercert(binary_form=True),
            "version": stream.version(),
        }
        gone = trio.Event()
        app = ASGIWrapper(cast(ASGIFramework, _for_one_client(self._app, facts, gone)))
        state = ConnectionState(self._state.copy())
        connection = _Connection(app, self._config, self._context, state, stream)
        connection.send_deadline_s = self._limits.send_deadline_s
        connection.gone = gone
        connection.peer = identity
        try:
            await connection.run()
        except Exception:  # One connection's defect is not the others'.
            log.exception("http.connection_failed", peer=identity.uri)


def _for_one_client(app: AsgiApp, facts: Mapping[str, Any], gone: trio.Event) -> AsgiApp:
    async def app_for_one_client(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_while_there(message: Message) -> None:
            if gone.is_set():
                raise _ClientGoneError("the client is gone")
            await send(message)

        scope.setdefault("extensions", {})["tls"] = dict(facts)
        try:
            await app(scope, receive, send_while_there)
        except* _ClientGoneError:
            pass

    return app_for_one_client


def _hypercorn_config(limits: HttpsLimits) -> Config:
    config = Config()
    config.logger_class = _EventLog
    config.accesslog = None
    config.errorlog = None
    config.include_server_header = False
    config.keep_alive_timeout = limits.keep_alive_s
    config.websocket_max_message_size = limits.max_body_bytes
    return config


def _serve_limits(limits: HttpsLimits) -> ServeLimits:
    return ServeLimits(
        handshake_deadline_s=limits.handshake_deadline_s,
        max_handshakes=limits.max_connections,
        max_connections=limits.max_connections,
        max_connections_per_peer=limits.max_connections_per_peer,
    )
