"""The HTTPS serve loop with a real client over loopback."""

from __future__ import annotations

import json
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import fastapi
import httpx2
import pytest
import trio
from cryptography import x509

from vmmigrate.errors import IdentityError, UsageError, VmMigrateError
from vmmigrate.net.https import BodyCap, HttpsLimits, Message, Receive, Scope, Send, identity_of_scope, serve_https
from vmmigrate.net.identity import Identity, Role
from vmmigrate.net.tls import ServerCredentials, TlsFiles, client_context

from .conftest import HOUR, TRUST_DOMAIN, Site, host_identity

LOOPBACK = "127.0.0.1"
SOURCE = host_identity("source")
OPERATOR = Identity(TRUST_DOMAIN, Role.OPERATOR, "ada")
WAIT_S = 5


@pytest.fixture(scope="module")
def operator_files(site: Site) -> TlsFiles:
    return site.party(Role.OPERATOR, "ada")


class Daemon:
    """A served application, and what its door reported."""

    def __init__(self, port: int, refusals: trio.MemoryReceiveChannel[VmMigrateError], shutdown: trio.Event) -> None:
        self.port = port
        self.shutdown = shutdown
        self._refusals = refusals

    @property
    def url(self) -> str:
        return f"https://{LOOPBACK}:{self.port}"

    async def wait_refusal(self) -> VmMigrateError:
        with trio.fail_after(WAIT_S):
            return await self._refusals.receive()


@asynccontextmanager
async def served(app: Any, files: TlsFiles | ServerCredentials, **limits: Any) -> AsyncIterator[Daemon]:
    refused, refusals = trio.open_memory_channel[VmMigrateError](100)
    shutdown = trio.Event()
    serve = partial(
        serve_https,
        app,
        LOOPBACK,
        0,
        files,
        limits=HttpsLimits(**limits),
        shutdown=shutdown,
        on_refusal=lambda _, error: refused.send_nowait(error),
    )
    async with trio.open_nursery() as nursery, refused, refusals:
        port: int = await nursery.start(serve)
        yield Daemon(port, refusals, shutdown)
        nursery.cancel_scope.cancel()


def client(files: TlsFiles, expected: Identity | None = SOURCE) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(verify=client_context(files, expected), timeout=WAIT_S)


async def show_tls(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with what the application knows of its client."""
    assert scope["type"] == "http"
    tls = scope["extensions"]["tls"]
    leaf = x509.load_der_x509_certificate(tls["client_cert_der"])
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    known = {
        "client_uri": tls["client_uri"],
        "version": tls["version"],
        "certificate": names.get_values_for_type(x509.UniformResourceIdentifier),
        "identity": str(identity_of_scope(scope)),
    }
    await answer(send, json.dumps(known).encode())


async def count_body(scope: Scope, receive: Receive, send: Send) -> None:
    size = 0
    while True:
        message = await receive()
        size += len(message["body"])
        if not message["more_body"]:
            break
    await answer(send, str(size).encode())


async def answer(send: Send, body: bytes) -> None:
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def must_not_be_called(scope: Scope, receive: Receive, send: Send) -> None:
    assert scope["type"] == "lifespan", "a refused request reached the application"


# ---------------------------------------------------------------------------------------------------------------------
# Who asks


async def test_the_application_knows_who_asks(source_files: TlsFiles, operator_files: TlsFiles) -> None:
    async with served(show_tls, source_files) as daemon, client(operator_files) as http:
        known = (await http.get(daemon.url)).json()

    assert known == {
        "client_uri": OPERATOR.uri,
        "version": "TLSv1.3",
        "certificate": [OPERATOR.uri],
        "identity": OPERATOR.uri,
    }


async def test_two_clients_at_once_are_not_confused(
    source_files: TlsFiles, operator_files: TlsFiles, destination_files: TlsFiles
) -> None:
    async with (
        served(show_tls, source_files) as daemon,
        client(operator_files) as first,
        client(destination_files) as second,
    ):
        seen = [(await http.get(daemon.url)).json()["client_uri"] for http in (first, second, first, second)]

    assert seen == [OPERATOR.uri, "spiffe://site.example/host/destination"] * 2


async def test_a_fastapi_application_works_with_its_lifespan(source_files: TlsFiles, operator_files: TlsFiles) -> None:
    events: list[str] = []

    @asynccontextmanager
    async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
        events.append("started")
        yield
        events.append("ended")

    app = fastapi.FastAPI(lifespan=lifespan)

    @app.post("/who")
    async def who(request: fastapi.Request) -> dict[str, Any]:
        return {"who": identity_of_scope(request.scope).name, "body": await request.json()}

    async with served(app, source_files) as daemon, client(operator_files) as http:
        reply = await http.post(daemon.url + "/who", json={"x": 1})
        missing = await http.get(daemon.url + "/nothing")
        daemon.shutdown.set()
        with trio.fail_after(WAIT_S):
            while events != ["started", "ended"]:
                await trio.lowlevel.checkpoint()

    assert reply.json() == {"who": "ada", "body": {"x": 1}}
    assert missing.status_code == 404


async def test_an_application_that_cannot_start_says_so_and_nothing_is_served(source_files: TlsFiles) -> None:
    @asynccontextmanager
    async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
        raise RuntimeError("no room for the journal")
        yield

    with pytest.raises(VmMigrateError, match="no room for the journal"):
        await serve_https(fastapi.FastAPI(lifespan=lifespan), LOOPBACK, 0, source_files)


def test_a_request_from_elsewhere_has_no_identity() -> None:
    with pytest.raises(IdentityError) as caught:
        identity_of_scope({"type": "http"})

    assert caught.value.code == "no_certificate"


async def test_a_client_checks_who_answers_before_it_asks(
    destination_files: TlsFiles, operator_files: TlsFiles
) -> None:
    """The request may carry a ticket: no byte of it may reach another host than the one it is for."""
    async with served(must_not_be_called, destination_files) as daemon, client(operator_files, SOURCE) as http:
        with pytest.raises(IdentityError) as caught:
            await http.post(daemon.url, content=b"ticket")

    assert caught.value.code == "wrong_host"


async def test_a_blocking_client_checks_it_too(destination_files: TlsFiles, operator_files: TlsFiles) -> None:
    def ask(url: str) -> None:
        with httpx2.Client(verify=client_context(operator_files, SOURCE), timeout=WAIT_S) as http:
            http.post(url, content=b"ticket")

    async with served(must_not_be_called, destination_files) as daemon:
        with pytest.raises(IdentityError) as caught:
            await trio.to_thread.run_sync(ask, daemon.url)

    assert caught.value.code == "wrong_host"


STRANGERS = ["wrong_ca", "certificate_expired", "certificate_not_yet_valid", "several_uri_sans", "no_uri_san"]


@pytest.fixture(scope="module")
def strangers(site: Site, other_site: Site) -> dict[str, TlsFiles]:
    return {
        "wrong_ca": other_site.party(Role.OPERATOR, "ada"),
        "certificate_expired": site.leaf([OPERATOR.uri], begins_in=-2 * HOUR, ends_in=-HOUR),
        "certificate_not_yet_valid": site.leaf([OPERATOR.uri], begins_in=HOUR, ends_in=2 * HOUR),
        "several_uri_sans": site.leaf([OPERATOR.uri, SOURCE.uri]),
        "no_uri_san": site.leaf([], dns_names=["ada.example"]),
    }


@pytest.mark.parametrize("code", STRANGERS)
async def test_a_stranger_never_reaches_the_application(
    strangers: dict[str, TlsFiles], source_files: TlsFiles, operator_files: TlsFiles, code: str
) -> None:
    context = client_context(operator_files)
    context.load_cert_chain(strangers[code].certificate, strangers[code].key)
    async with served(must_not_be_called, source_files) as daemon:
        async with httpx2.AsyncClient(verify=context, timeout=WAIT_S) as http:
            with pytest.raises(httpx2.TransportError):
                await http.get(daemon.url)
        refusal = await daemon.wait_refusal()

    assert refusal.code == code


async def test_a_client_without_certificate_never_reaches_the_application(source_files: TlsFiles) -> None:
    context = ssl.create_default_context(cafile=source_files.ca)
    context.check_hostname = False
    async with served(must_not_be_called, source_files) as daemon:
        async with httpx2.AsyncClient(verify=context, timeout=WAIT_S) as http:
            with pytest.raises(httpx2.TransportError):
                await http.get(daemon.url)
        refusal = await daemon.wait_refusal()

    assert refusal.code == "no_client_certificate"


async def test_plain_http_never_reaches_the_application(source_files: TlsFiles) -> None:
    async with served(must_not_be_called, source_files) as daemon:
        async with httpx2.AsyncClient(timeout=WAIT_S) as http:
            with pytest.raises(httpx2.TransportError):
                await http.get(f"http://{LOOPBACK}:{daemon.port}")
        refusal = await daemon.wait_refusal()

    assert refusal.code == "plaintext"


async def test_certificates_are_replaced_while_serving(site: Site, operator_files: TlsFiles) -> None:
    files, renamed = site.host("before"), site.host("after")
    credentials = ServerCredentials(files)
    async with served(show_tls, credentials) as daemon:
        async with client(operator_files, host_identity("before")) as http:
            await http.get(daemon.url)
        files.certificate.write_bytes(renamed.certificate.read_bytes())
        files.key.write_bytes(renamed.key.read_bytes())
        credentials.reload()
        async with client(operator_files, host_identity("after")) as http:
            assert (await http.get(daemon.url)).status_code == 200


# ---------------------------------------------------------------------------------------------------------------------
# How much


@pytest.mark.parametrize("size", [0, 1, 1000])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_within_the_cap_arrives_whole(
    source_files: TlsFiles, operator_files: TlsFiles, size: int, chunked: bool
) -> None:
    async with served(count_body, source_files, max_body_bytes=1000) as daemon, client(operator_files) as http:
        reply = await http.post(daemon.url, content=body_of(size, chunked))

    assert reply.text == str(size)


@pytest.mark.parametrize("size", [1001, 300_000, 10_000_000])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_cap_is_one_clear_answer_and_no_request(
    source_files: TlsFiles, operator_files: TlsFiles, size: int, chunked: bool
) -> None:
    app = must_not_be_called
    async with served(app, source_files, max_body_bytes=1000) as daemon, client(operator_files) as http:
        reply = await http.post(daemon.url, content=body_of(size, chunked))

    assert reply.status_code == 413
    error = reply.json()["error"]
    assert error == {"code": "body_too_large", "message": "the body is larger than 1000 bytes", "details": {}}
    assert "\n" not in reply.text


async def test_a_body_that_does_not_come_is_one_clear_answer(source_files: TlsFiles, operator_files: TlsFiles) -> None:
    async with served(must_not_be_called, source_files, body_deadline_s=0.05) as daemon:
        stream = await raw_request(daemon, operator_files, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx")
        head = bytes(await stream.receive_some())
        await trio.aclose_forcefully(stream)

    assert head.startswith(b"HTTP/1.1 408 ")


async def test_half_a_body_is_no_request() -> None:
    """The client left in the middle; what came may even parse, as a shorter document."""
    arriving: list[Message] = [
        {"type": "http.request", "body": b"1", "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[Message] = []

    async def receive() -> Message:
        return arriving.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    await BodyCap(must_not_be_called, HttpsLimits(max_body_bytes=1000))({"type": "http", "headers": []}, receive, send)

    assert sent == arriving == []


async def test_a_connection_too_many_is_refused(source_files: TlsFiles, operator_files: TlsFiles) -> None:
    async with served(show_tls, source_files, max_connections=1) as daemon, client(operator_files) as first:
        await first.get(daemon.url)
        async with client(operator_files) as second:
            with pytest.raises(httpx2.TransportError):
                await second.get(daemon.url)
        refusal = await daemon.wait_refusal()
        assert (await first.get(daemon.url)).status_code == 200

    assert refusal.code == "too_many_connections"


async def test_one_client_cannot_take_all_connections(
    source_files: TlsFiles, destination_files: TlsFiles, operator_files: TlsFiles
) -> None:
    async with served(show_tls, source_files, max_connections_per_peer=1) as daemon, client(operator_files) as first:
        await first.get(daemon.url)
        async with client(operator_files) as second:
            with pytest.raises(httpx2.TransportError):
                await second.get(daemon.url)
        refusal = await daemon.wait_refusal()
        async with client(destination_files) as other:
            assert (await other.get(daemon.url)).status_code == 200

    assert refusal.code == "too_many_connections"
    assert "of this peer" in refusal.text


async def test_a_client_that_has_left_takes_up_no_connection(source_files: TlsFiles, operator_files: TlsFiles) -> None:
    """A command line comes, asks and goes; waiting for its next request would lock out those that follow."""
    async with served(show_tls, source_files, max_connections_per_peer=1, keep_alive_s=1000) as daemon:
        async with client(operator_files) as first:
            await first.get(daemon.url)
            await trio.testing.wait_all_tasks_blocked()

        assert OPERATOR.uri in await text_once_let_in(daemon, operator_files)


async def test_a_client_that_was_killed_in_the_middle_of_its_answer_takes_up_no_connection(
    source_files: TlsFiles, operator_files: TlsFiles
) -> None:
    async def generous(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await answer(send, bytes(16 << 20))

    async with served(generous, source_files, max_connections_per_peer=1, keep_alive_s=1000) as daemon:
        first = await raw_request(daemon, operator_files, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await first.receive_some()).startswith(b"HTTP/1.1 200")
        await trio.testing.wait_all_tasks_blocked()
        await trio.aclose_forcefully(first)  # with unread bytes: the server sees a reset

        assert len(await text_once_let_in(daemon, operator_files)) == 16 << 20


async def test_a_host_has_nothing_to_say_in_a_body(
    source_files: TlsFiles, destination_files: TlsFiles, operator_files: TlsFiles
) -> None:
    """It may ask about a migration. What would be buffered for it is no more than that takes."""
    async with served(count_body, source_files, max_host_body_bytes=100) as daemon:
        for files, size, status in (
            (destination_files, 100, 200),
            (destination_files, 101, 413),
            (operator_files, 101, 200),
        ):
            async with client(files) as http:
                reply = await http.post(daemon.url, content=bytes(size))
            assert reply.status_code == status


@pytest.mark.parametrize(
    "greeting",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
        b"GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: \r\n\r\n",
    ],
    ids=["prior knowledge", "upgrade"],
)
async def test_http_2_is_not_spoken(source_files: TlsFiles, operator_files: TlsFiles, greeting: bytes) -> None:
    """A hundred streams in one connection would each have the limits of a connection."""
    heard = b""
    async with served(must_not_be_called, source_files) as daemon:
        stream = await raw_request(daemon, operator_files, greeting)
        with suppress(trio.BrokenResourceError), trio.fail_after(WAIT_S):
            while chunk := await stream.receive_some():
                heard += chunk
        await trio.aclose_forcefully(stream)

    assert b"200" not in heard
    assert b"\x00\x00" not in heard, "no frame of HTTP/2"


async def test_a_slow_handshake_is_shed_and_delays_nobody(source_files: TlsFiles, operator_files: TlsFiles) -> None:
    async with served(show_tls, source_files, handshake_deadline_s=0.3) as daemon:
        slow = await trio.open_tcp_stream(LOOPBACK, daemon.port)
        async with client(operator_files) as http:
            assert (await http.get(daemon.url)).status_code == 200
        refusal = await daemon.wait_refusal()
        await slow.aclose()

    assert refusal.code == "handshake_timeout"


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n"])
async def test_an_idle_connection_and_a_slow_head_are_closed(
    source_files: TlsFiles, operator_files: TlsFiles, sent: bytes
) -> None:
    async with served(must_not_be_called, source_files, keep_alive_s=0.05) as daemon:
        stream = await raw_request(daemon, operator_files, sent)
        assert await stream.receive_some() == b""
        await trio.aclose_forcefully(stream)


async def test_a_client_that_does_not_read_is_given_up(source_files: TlsFiles, operator_files: TlsFiles) -> None:
    ended = trio.Event()

    async def flood(scope: Scope, receive: Receive, send: Send) -> None:
        """An application that does not care whether anybody listens."""
        if scope["type"] != "http":
            return
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        finally:
            ended.set()

    async with served(flood, source_files, send_deadline_s=0.1) as daemon:
        stream = await raw_request(daemon, operator_files, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        with trio.fail_after(WAIT_S):
            await ended.wait()
        await trio.aclose_forcefully(stream)


# ---------------------------------------------------------------------------------------------------------------------
# Start and end


async def test_a_port_in_use_is_one_clear_line(listening_socket: socket.socket, source_files: TlsFiles) -> None:
    port = listening_socket.getsockname()[1]

    with pytest.raises(UsageError) as caught:
        await serve_https(must_not_be_called, LOOPBACK, port, source_files)

    assert caught.value.code == "port_in_use"
    assert caught.value.text == f"cannot listen on 127.0.0.1:{port}: address already in use"


async def test_bad_files_are_told_before_the_port_is_taken(source_files: TlsFiles, site: Site) -> None:
    files = TlsFiles(source_files.ca, source_files.certificate, site.directory / "nowhere.pem")

    with pytest.raises(UsageError) as caught:
        await serve_https(must_not_be_called, LOOPBACK, 0, files)

    assert caught.value.code == "tls_file_missing"


async def test_a_running_request_ends_well_in_a_shutdown(source_files: TlsFiles, operator_files: TlsFiles) -> None:
    asked, may_answer = trio.Event(), trio.Event()

    async def patient(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            asked.set()
            await may_answer.wait()
            await answer(send, b"done")

    async with (
        served(patient, source_files, graceful_s=WAIT_S) as daemon,
        client(operator_files) as http,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(expect_text, http, daemon.url, "done")
        await asked.wait()
        daemon.shutdown.set()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(OSError, match="attempts to connect"):
            await trio.open_tcp_stream(LOOPBACK, daemon.port)
        may_answer.set()


async def test_a_shutdown_takes_bounded_time_whatever_requests_do(
    source_files: TlsFiles, operator_files: TlsFiles
) -> None:
    asked, shutdown = trio.Event(), trio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            asked.set()
            while True:
                await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})

    limits = HttpsLimits(graceful_s=0.05, send_deadline_s=0.2)
    async with trio.open_nursery() as nursery:
        port = await nursery.start(
            partial(serve_https, endless, LOOPBACK, 0, source_files, limits=limits, shutdown=shutdown)
        )
        stream = await raw_request(port, operator_files, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await asked.wait()
        shutdown.set()
        nursery.cancel_scope.deadline = trio.current_time() + WAIT_S
    await trio.aclose_forcefully(stream)

    assert not nursery.cancel_scope.cancelled_caught


async def test_a_failing_application_harms_one_request_only_and_is_one_event(
    source_files: TlsFiles, operator_files: TlsFiles, capfd: pytest.CaptureFixture[str]
) -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            raise ZeroDivisionError("a defect")

    async with served(failing, source_files) as daemon, client(operator_files) as http:
        replies = [await http.get(daemon.url) for _ in range(2)]

    assert [reply.status_code for reply in replies] == [500, 500]
    captured = capfd.readouterr()
    assert "http.request_failed" in captured.out + captured.err


async def test_serving_is_quiet_and_leaves_the_logging_of_others_alone(
    source_files: TlsFiles, operator_files: TlsFiles, capfd: pytest.CaptureFixture[str]
) -> None:
    async with served(show_tls, source_files) as daemon, client(operator_files) as http:
        reply = await http.get(daemon.url)

    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert not logging.getLogger("hypercorn.error").handlers
    assert "server" not in reply.headers


async def expect_text(http: httpx2.AsyncClient, url: str, text: str) -> None:
    assert (await http.get(url)).text == text


async def text_once_let_in(daemon: Daemon, files: TlsFiles) -> str:
    """What is answered to a client that tries until there is room for it."""
    with trio.fail_after(WAIT_S):
        while True:
            async with client(files) as http:
                with suppress(httpx2.TransportError):
                    return (await http.get(daemon.url)).text
            await daemon.wait_refusal()


async def raw_request(daemon: Daemon | int, files: TlsFiles, request: bytes) -> Any:
    """A connection on which *request* was sent; nothing is read."""
    port = daemon if isinstance(daemon, int) else daemon.port
    stream = trio.SSLStream(
        await trio.open_tcp_stream(LOOPBACK, port), client_context(files, SOURCE), https_compatible=True
    )
    await stream.do_handshake()
    if request:
        await stream.send_all(request)
    return stream


def body_of(size: int, chunked: bool) -> Any:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, size, 65_536):
            yield bytes(min(65_536, size - start))

    return chunks() if chunked else bytes(size)
