"""Who gets through the door, and what everybody else is told. Real TLS over loopback."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from vmmigrate.errors import IdentityError, TransportError, UsageError, VmMigrateError
from vmmigrate.net.identity import Call, Identity, Role
from vmmigrate.net.refusals import RefusalLog
from vmmigrate.net.tls import (
    ServeLimits,
    ServerCredentials,
    TlsContext,
    TlsFiles,
    TlsStream,
    bound_port,
    client_context,
    close_tls,
    connect_blocking,
    connect_tls,
    load_identity,
    open_listeners,
    peer_identity,
    serve_tls,
    server_context,
    wrap_blocking_server,
)
from vmmigrate.net.tls_errors import closed_after_handshake, map_tls_errors

from .conftest import HOUR, TRUST_DOMAIN, Site, host_identity

LOOPBACK = "127.0.0.1"
SOURCE = host_identity("source")
DESTINATION = host_identity("destination")
WAIT_S = 5


class Served:
    """A served port and what its door reported."""

    def __init__(self, port: int, refusals: trio.MemoryReceiveChannel[VmMigrateError]) -> None:
        self.port = port
        self._refusals = refusals

    async def wait_refusal(self) -> VmMigrateError:
        with trio.fail_after(WAIT_S):
            return await self._refusals.receive()


async def echo(stream: TlsStream, identity: Identity) -> None:
    """Say who the peer is, then everything it says."""
    await stream.send_all(identity.uri.encode() + b"\n")
    with map_tls_errors("echo"):
        async for chunk in stream:
            await stream.send_all(chunk)


@asynccontextmanager
async def served(
    credentials: Callable[[], TlsContext], on_connection: Any = echo, **options: Any
) -> AsyncIterator[Served]:
    refused, refusals = trio.open_memory_channel[VmMigrateError](100)
    listeners = await open_listeners(LOOPBACK, 0)
    port = bound_port(listeners)

    def on_refusal(peer: str, error: VmMigrateError) -> None:
        assert peer.startswith("127.0.0.1:")
        refused.send_nowait(error)

    async with trio.open_nursery() as nursery, refused, refusals:
        await nursery.start(partial(serve_tls, listeners, credentials, on_connection, on_refusal=on_refusal, **options))
        yield Served(port, refusals)
        nursery.cancel_scope.cancel()


def wearing(context: TlsContext, files: TlsFiles) -> TlsContext:
    """*context*, but showing another certificate: what somebody does whose own checks are not ours."""
    context.load_cert_chain(files.certificate, files.key)
    return context


def foreign_client(ca: Path, shows: TlsFiles | None, version: ssl.TLSVersion) -> ssl.SSLContext:
    """A client not written by us."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(ca)
    context.minimum_version = context.maximum_version = version
    if shows is not None:
        context.load_cert_chain(shows.certificate, shows.key)
    return context


async def first_answer(port: int, context: ssl.SSLContext) -> bytes:
    """What a client that shakes hands and reads gets."""
    transport = await trio.open_tcp_stream(LOOPBACK, port)
    stream = trio.SSLStream(transport, context)
    try:
        with trio.fail_after(WAIT_S), map_tls_errors("asking", first_answer=True):
            answer = bytes(await stream.receive_some())
            if not answer:
                raise closed_after_handshake("asking")
            return answer
    finally:
        await trio.aclose_forcefully(stream)


# ---------------------------------------------------------------------------------------------------------------------
# Those who belong together


async def test_both_sides_know_each_other_and_talk(source_files: TlsFiles, destination_files: TlsFiles) -> None:
    async with served(ServerCredentials(source_files).current) as source:
        stream, identity = await connect_tls(LOOPBACK, source.port, destination_files, SOURCE, WAIT_S)
        await stream.send_all(b"hello")
        heard = b""
        while not heard.endswith(b"hello"):
            heard += await stream.receive_some()
        await close_tls(stream)

    assert identity == SOURCE
    assert heard == DESTINATION.uri.encode() + b"\nhello"


async def test_the_connection_is_tls_1_3_without_resumption(
    source_files: TlsFiles, destination_files: TlsFiles
) -> None:
    """A ticket would carry an identity past the check of the next handshake."""
    async with served(ServerCredentials(source_files).current) as source:
        stream, _ = await connect_tls(LOOPBACK, source.port, destination_files, SOURCE, WAIT_S)
        await stream.receive_some()

        assert stream.version() == "TLSv1.3"
        assert stream.compression() is None
        assert not stream.session_reused
        assert not stream.session.has_ticket
        sock = stream.transport_stream.socket
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        await close_tls(stream)


async def test_whoever_is_of_the_trust_domain_may_answer_when_nobody_is_expected(
    source_files: TlsFiles, destination_files: TlsFiles
) -> None:
    async with served(ServerCredentials(source_files).current) as source:
        stream, identity = await connect_tls(LOOPBACK, source.port, destination_files, None, WAIT_S)
        await close_tls(stream)

    assert identity == SOURCE


async def test_new_certificates_count_from_the_next_handshake_on(site: Site, destination_files: TlsFiles) -> None:
    first, second = site.host("before"), site.host("after")
    credentials = ServerCredentials(first)
    async with served(credentials.current) as source:
        old, before = await connect_tls(LOOPBACK, source.port, destination_files, None, WAIT_S)
        first.certificate.write_bytes(second.certificate.read_bytes())
        with pytest.raises(UsageError) as caught:
            credentials.reload()
        new, still = await connect_tls(LOOPBACK, source.port, destination_files, None, WAIT_S)
        first.key.write_bytes(second.key.read_bytes())
        credentials.reload()
        newest, after = await connect_tls(LOOPBACK, source.port, destination_files, None, WAIT_S)
        for stream in (old, new, newest):
            assert await stream.receive_some()
            await close_tls(stream)

    assert caught.value.code == "tls_key_mismatch"
    assert [before.name, still.name, after.name] == ["before", "before", "after"]


# ---------------------------------------------------------------------------------------------------------------------
# Those who do not get in


@pytest.fixture(scope="module")
def strangers(site: Site, other_site: Site) -> dict[str, TlsFiles]:
    foreign = Identity("elsewhere.example", Role.HOST, "destination")
    return {
        "wrong CA": other_site.host("destination"),
        "expired": site.leaf([DESTINATION.uri], begins_in=-2 * HOUR, ends_in=-HOUR),
        "not yet valid": site.leaf([DESTINATION.uri], begins_in=HOUR, ends_in=2 * HOUR),
        "no URI": site.leaf([], dns_names=["destination.example"]),
        "two URIs": site.leaf([DESTINATION.uri, SOURCE.uri]),
        "bad URI": site.leaf(["https://site.example/host/destination"]),
        "foreign trust domain": site.leaf([foreign.uri]),
    }


STRANGERS = [
    ("wrong CA", "wrong_ca", "our CA did not issue the peer's certificate"),
    ("expired", "certificate_expired", "the peer's certificate has expired"),
    ("not yet valid", "certificate_not_yet_valid", "the peer's certificate is not yet valid"),
    ("no URI", "no_uri_san", "no URI in its subject alternative name"),
    ("two URIs", "several_uri_sans", "has 2 URIs"),
    ("bad URI", "bad_uri", "'https://site.example/host/destination' is no identity of ours"),
    ("foreign trust domain", "foreign_trust_domain", "allowed is site.example"),
]

# What the refused client can learn: OpenSSL's alert, or only that it was put out.
TOLD = {
    "wrong CA": "wrong_ca",
    "expired": "certificate_expired",
    "not yet valid": "certificate_refused",
}


@pytest.mark.parametrize(("stranger", "code", "text"), STRANGERS)
async def test_a_stranger_who_connects_is_refused_with_the_reason(
    strangers: dict[str, TlsFiles], source_files: TlsFiles, stranger: str, code: str, text: str
) -> None:
    context = foreign_client(source_files.ca, strangers[stranger], ssl.TLSVersion.TLSv1_3)
    async with served(ServerCredentials(source_files).current) as source:
        with pytest.raises(VmMigrateError) as told:
            await first_answer(source.port, context)
        refusal = await source.wait_refusal()

    assert isinstance(refusal, IdentityError)
    assert refusal.code == code
    assert text in refusal.text
    assert refusal.text.startswith("TLS handshake with 127.0.0.1:")
    assert told.value.code == TOLD.get(stranger, "closed_after_handshake")


@pytest.mark.parametrize(("stranger", "code", "text"), STRANGERS)
async def test_a_stranger_who_answers_is_refused_with_the_reason(
    strangers: dict[str, TlsFiles],
    source_files: TlsFiles,
    destination_files: TlsFiles,
    stranger: str,
    code: str,
    text: str,
) -> None:
    context = wearing(server_context(source_files), strangers[stranger])
    async with served(lambda: context) as source:
        with pytest.raises(IdentityError) as caught:
            await connect_tls(LOOPBACK, source.port, destination_files, None, WAIT_S)
        refusal = await source.wait_refusal()

    assert caught.value.code == code
    assert text in caught.value.text
    assert refusal.code == TOLD.get(stranger, "disconnected")


async def test_a_client_without_certificate_is_refused(source_files: TlsFiles) -> None:
    context = foreign_client(source_files.ca, None, ssl.TLSVersion.TLSv1_3)
    async with served(ServerCredentials(source_files).current) as source:
        with pytest.raises(IdentityError) as told:
            await first_answer(source.port, context)
        refusal = await source.wait_refusal()

    assert refusal.code == told.value.code == "no_client_certificate"
    assert "the peer showed no certificate" in refusal.text
    assert "demands a certificate of us" in told.value.text


async def test_tls_1_2_is_refused(source_files: TlsFiles, destination_files: TlsFiles) -> None:
    context = foreign_client(source_files.ca, destination_files, ssl.TLSVersion.TLSv1_2)
    async with served(ServerCredentials(source_files).current) as source:
        with pytest.raises(TransportError) as told:
            await first_answer(source.port, context)
        refusal = await source.wait_refusal()

    assert refusal.code == told.value.code == "tls_version"
    assert "TLS 1.3 only" in refusal.text


async def test_a_tls_1_2_server_is_refused(source_files: TlsFiles, destination_files: TlsFiles) -> None:
    context = server_context(source_files)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with served(lambda: context) as source:
        with pytest.raises(TransportError) as caught:
            await connect_tls(LOOPBACK, source.port, destination_files, SOURCE, WAIT_S)
        refusal = await source.wait_refusal()

    assert caught.value.code == refusal.code == "tls_version"


@pytest.mark.parametrize(
    "greeting", [b"GET / HTTP/1.1\r\n\r\n", b"\x00\x00\x00\x20a frame of some protocol of ours", b"\n" * 99]
)
async def test_a_plaintext_client_is_refused(source_files: TlsFiles, greeting: bytes) -> None:
    async with served(ServerCredentials(source_files).current) as source:
        client = await trio.open_tcp_stream(LOOPBACK, source.port)
        await client.send_all(greeting)
        refusal = await source.wait_refusal()
        await client.aclose()

    assert isinstance(refusal, TransportError)
    assert refusal.code == "plaintext"
    assert "does not speak TLS" in refusal.text


async def test_a_plaintext_server_is_refused(nursery: trio.Nursery, destination_files: TlsFiles) -> None:
    async def greet(stream: trio.SocketStream) -> None:
        await stream.send_all(b"220 plaintext speaks first\r\n")
        await stream.receive_some()

    (listener,) = await nursery.start(partial(trio.serve_tcp, greet, 0, host=LOOPBACK))

    with pytest.raises(TransportError) as caught:
        await connect_tls(LOOPBACK, listener.socket.getsockname()[1], destination_files, SOURCE, WAIT_S)

    assert caught.value.code == "plaintext"
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("expected", "code"),
    [
        (host_identity("another"), "wrong_host"),
        (Identity(TRUST_DOMAIN, Role.ORCHESTRATOR, "source"), "wrong_role"),
        (Identity("elsewhere.example", Role.HOST, "source"), "foreign_trust_domain"),
    ],
)
async def test_somebody_else_than_expected_is_refused(
    source_files: TlsFiles, destination_files: TlsFiles, expected: Identity, code: str
) -> None:
    async with served(ServerCredentials(source_files).current) as source:
        with pytest.raises(IdentityError) as caught:
            await connect_tls(LOOPBACK, source.port, destination_files, expected, WAIT_S)

    assert caught.value.code == code


async def test_a_role_that_has_no_business_here_is_refused(site: Site, source_files: TlsFiles) -> None:
    operator = site.party(Role.OPERATOR, "ada")
    async with served(ServerCredentials(source_files).current, call=Call.MIGRATION_PROTOCOL) as source:
        stream, _ = await connect_tls(LOOPBACK, source.port, operator, SOURCE, WAIT_S)
        with pytest.raises(TransportError) as told, map_tls_errors("reading", first_answer=True):
            await stream.receive_some()
        refusal = await source.wait_refusal()
        await close_tls(stream)

    assert refusal.code == "forbidden"
    assert "operator/ada may not use migration_protocol" in refusal.text
    assert told.value.code == "closed_after_handshake"


async def test_nothing_is_heard_by_the_server_from_somebody_refused(
    strangers: dict[str, TlsFiles], source_files: TlsFiles
) -> None:
    async def must_not_be_called(stream: TlsStream, identity: Identity) -> None:
        raise AssertionError("let in")

    context = foreign_client(source_files.ca, strangers["two URIs"], ssl.TLSVersion.TLSv1_3)
    async with served(ServerCredentials(source_files).current, must_not_be_called) as source:
        stream = trio.SSLStream(await trio.open_tcp_stream(LOOPBACK, source.port), context)
        with map_tls_errors("sending"):
            await stream.send_all(b"delete everything")
        await source.wait_refusal()
        await trio.aclose_forcefully(stream)


# ---------------------------------------------------------------------------------------------------------------------
# Those who waste time


async def test_a_silent_client_is_put_out_at_its_deadline(source_files: TlsFiles) -> None:
    limits = ServeLimits(handshake_deadline_s=0.05)
    async with served(ServerCredentials(source_files).current, limits=limits) as source:
        client = await trio.open_tcp_stream(LOOPBACK, source.port)
        refusal = await source.wait_refusal()
        assert await client.receive_some() == b""
        await client.aclose()

    assert refusal.code == "handshake_timeout"


async def test_a_slow_handshake_delays_nobody_and_is_shed_when_there_are_too_many(
    source_files: TlsFiles, destination_files: TlsFiles
) -> None:
    limits = ServeLimits(handshake_deadline_s=60, max_handshakes=3)
    async with served(ServerCredentials(source_files).current, limits=limits) as source:
        slow = [await trio.open_tcp_stream(LOOPBACK, source.port) for _ in range(3)]
        for silent in slow:
            await silent.send_all(b"\x16\x03\x01")  # the beginning of a ClientHello
        for _ in range(2):
            stream, _ = await connect_tls(LOOPBACK, source.port, destination_files, SOURCE, WAIT_S)
            assert await stream.receive_some()
            await close_tls(stream)
        refusal = await source.wait_refusal()
        with pytest.raises(trio.TooSlowError), trio.fail_after(0):
            await slow[1].receive_some()
        assert await slow[0].receive_some() == b""  # the oldest, and only it
        for silent in slow:
            await silent.aclose()

    assert refusal.code == "too_many_handshakes"


async def test_a_connection_too_many_is_refused_and_a_place_that_is_left_is_free(
    source_files: TlsFiles, destination_files: TlsFiles
) -> None:
    left = trio.Event()

    async def echo_and_tell(stream: TlsStream, identity: Identity) -> None:
        await echo(stream, identity)
        left.set()

    limits = ServeLimits(max_connections=1)
    connect = partial(connect_tls, LOOPBACK, files=destination_files, expected=SOURCE, deadline_s=WAIT_S)
    async with served(ServerCredentials(source_files).current, echo_and_tell, limits=limits) as source:
        inside, _ = await connect(port=source.port)
        assert await inside.receive_some()
        outside, _ = await connect(port=source.port)
        refusal = await source.wait_refusal()
        await close_tls(outside)
        await close_tls(inside)
        await left.wait()
        await trio.testing.wait_all_tasks_blocked()
        again, _ = await connect(port=source.port)
        assert await again.receive_some()
        await close_tls(again)

    assert refusal.code == "too_many_connections"


async def test_a_server_that_never_answers_is_given_up_at_the_deadline(
    listening_socket: socket.socket, destination_files: TlsFiles
) -> None:
    port = listening_socket.getsockname()[1]

    with pytest.raises(TransportError) as caught:
        await connect_tls(LOOPBACK, port, destination_files, SOURCE, 0.05)

    assert caught.value.code == "handshake_timeout"


async def test_closing_takes_bounded_time_when_the_peer_does_not_read(
    source_files: TlsFiles, destination_files: TlsFiles
) -> None:
    release = trio.Event()

    async def deaf(stream: TlsStream, identity: Identity) -> None:
        await release.wait()

    async with served(ServerCredentials(source_files).current, deaf) as source:
        stream, _ = await connect_tls(LOOPBACK, source.port, destination_files, SOURCE, WAIT_S)
        with trio.move_on_after(0.1):
            await stream.send_all(bytes(64 * 1024 * 1024))
        with trio.fail_after(WAIT_S):
            await close_tls(stream)
        release.set()


# ---------------------------------------------------------------------------------------------------------------------
# The link


async def test_nobody_listening_is_told_apart(destination_files: TlsFiles) -> None:
    with socket.socket() as sock:
        sock.bind((LOOPBACK, 0))
        port = sock.getsockname()[1]

        with pytest.raises(TransportError) as caught:
            await connect_tls(LOOPBACK, port, destination_files, SOURCE, WAIT_S)

    assert caught.value.code == "connection_refused"
    assert f"127.0.0.1:{port}" in caught.value.text


async def test_a_cut_is_not_the_end_of_the_stream(source_files: TlsFiles, destination_files: TlsFiles) -> None:
    """Whoever is between the two can close a TCP connection; only the peer can say that it is done."""

    async def cut(stream: TlsStream, identity: Identity) -> None:
        await stream.send_all(b"half of it")
        await trio.aclose_forcefully(stream.transport_stream)

    async with served(ServerCredentials(source_files).current, cut) as source:
        stream, _ = await connect_tls(LOOPBACK, source.port, destination_files, SOURCE, WAIT_S)
        assert await stream.receive_some() == b"half of it"
        with pytest.raises(TransportError) as caught, map_tls_errors("reading"):
            await stream.receive_some()
        await close_tls(stream)
        with pytest.raises(TransportError) as closed, map_tls_errors("reading"):
            await stream.receive_some()

    assert caught.value.code == "disconnected"
    assert closed.value.code == "closed"


@pytest.mark.parametrize(
    ("foreign", "code"),
    [
        (OSError(113, "No route to host"), "unreachable"),
        (socket.gaierror(-2, "Name or service not known"), "unknown_host"),
        (TimeoutError(), "timed_out"),
        (trio.TooSlowError(), "timed_out"),
        (BrokenPipeError(), "disconnected"),
        (trio.BrokenResourceError(), "disconnected"),
        (OSError(9, "Bad file descriptor"), "disconnected"),
        (OSError(28, "No space left on device"), "transport"),
        (ssl.SSLError(1, "something new"), "tls"),
        (ssl.SSLCertVerificationError(), "certificate_invalid"),
    ],
)
def test_foreign_errors_become_ours_and_keep_their_cause(foreign: Exception, code: str) -> None:
    if isinstance(foreign, ssl.SSLCertVerificationError):
        foreign.verify_code, foreign.verify_message = 26, "unsuitable certificate purpose"

    with pytest.raises(VmMigrateError) as caught, map_tls_errors("doing something"):
        raise foreign

    assert caught.value.code == code
    assert caught.value.text.startswith("doing something: ")
    assert caught.value.__cause__ is foreign


def test_errors_that_are_ours_or_nobodys_pass_unchanged() -> None:
    for error in (UsageError("x"), ZeroDivisionError()):
        with pytest.raises(type(error)) as caught, map_tls_errors("doing something"):
            raise error
        assert caught.value is error


def test_the_default_report_is_one_event(capsys: pytest.CaptureFixture[str]) -> None:
    RefusalLog("tls.refused")("127.0.0.1:1", IdentityError("no", code="wrong_ca"))

    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert "tls.refused" in line
    assert "wrong_ca" in line


# ---------------------------------------------------------------------------------------------------------------------
# Listening


async def test_a_port_in_use_is_one_clear_line(listening_socket: socket.socket) -> None:
    port = listening_socket.getsockname()[1]

    with pytest.raises(UsageError) as caught:
        await open_listeners(LOOPBACK, port)

    assert caught.value.code == "port_in_use"
    assert caught.value.text == f"cannot listen on 127.0.0.1:{port}: address already in use"


@pytest.mark.parametrize(("host", "code"), [("192.0.2.1", "cannot_listen"), ("no such name", "unknown_host")])
async def test_an_address_that_is_not_ours_is_one_clear_line(host: str, code: str) -> None:
    with pytest.raises(UsageError) as caught:
        await open_listeners(host, 1024)

    assert caught.value.code == code
    assert caught.value.text.startswith(f"cannot listen on {host}:1024: ")


async def test_port_zero_means_one_address_and_one_port() -> None:
    listeners = await open_listeners("localhost", 0)

    assert len(listeners) == 1
    assert bound_port(listeners) > 0
    await listeners[0].aclose()


# ---------------------------------------------------------------------------------------------------------------------
# Our own files


def test_our_own_files_say_who_we_are(source_files: TlsFiles) -> None:
    assert load_identity(source_files) == SOURCE


@pytest.mark.parametrize("which", ["ca", "certificate", "key"])
@pytest.mark.parametrize(
    ("spoil", "code"),
    [("missing", "tls_file_missing"), ("directory", "tls_file_unreadable"), ("junk", "tls_file_malformed")],
)
def test_a_bad_file_is_named(source_files: TlsFiles, tmp_path: Path, which: str, spoil: str, code: str) -> None:
    path = tmp_path / "the-file.pem"
    if spoil == "directory":
        path.mkdir()
    elif spoil == "junk":
        path.write_bytes(b"\x80 no PEM")
    files = TlsFiles(**{**vars(source_files), which: path})

    for make in (load_identity, server_context, client_context):
        with pytest.raises(UsageError) as caught:
            make(files)
        assert caught.value.code == code
        assert caught.value.text.startswith(str(path))
        assert "needed is" in caught.value.text
        assert "\n" not in caught.value.text


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_a_password(source_files: TlsFiles, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    encryption = serialization.BestAvailableEncryption(b"secret")
    path = tmp_path / "key.pem"
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))

    with pytest.raises(UsageError, match="needed is an unencrypted PEM private key") as caught:
        server_context(TlsFiles(source_files.ca, source_files.certificate, path))

    assert caught.value.code == "tls_file_malformed"


def test_a_key_of_another_certificate_is_refused(source_files: TlsFiles, destination_files: TlsFiles) -> None:
    with pytest.raises(UsageError) as caught:
        server_context(TlsFiles(source_files.ca, source_files.certificate, destination_files.key))

    assert caught.value.code == "tls_key_mismatch"
    assert str(source_files.certificate) in caught.value.text


@pytest.mark.parametrize(
    ("begins_in", "ends_in", "code"),
    [(-2 * HOUR, -HOUR, "certificate_expired"), (HOUR, 2 * HOUR, "certificate_not_yet_valid")],
)
def test_our_own_certificate_must_be_valid_now(site: Site, begins_in: timedelta, ends_in: timedelta, code: str) -> None:
    files = site.leaf([SOURCE.uri], begins_in=begins_in, ends_in=ends_in)

    with pytest.raises(IdentityError) as caught:
        client_context(files)

    assert caught.value.code == code
    assert caught.value.text.startswith(str(files.certificate))


def test_our_own_certificate_must_be_of_our_ca(source_files: TlsFiles, other_site: Site) -> None:
    with pytest.raises(IdentityError) as caught:
        server_context(TlsFiles(other_site.files.certificate, source_files.certificate, source_files.key))

    assert caught.value.code == "wrong_ca"


def test_our_own_certificate_must_say_who_we_are(site: Site) -> None:
    files = site.leaf([SOURCE.uri, DESTINATION.uri])

    with pytest.raises(IdentityError) as caught:
        server_context(files)

    assert caught.value.code == "several_uri_sans"
    assert caught.value.text.startswith(str(files.certificate))


def test_contexts_are_as_strict_as_promised(source_files: TlsFiles) -> None:
    for context in (server_context(source_files), client_context(source_files)):
        assert context.minimum_version is context.maximum_version is ssl.TLSVersion.TLSv1_3
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.options & ssl.OP_NO_TICKET
        assert context.options & ssl.OP_NO_COMPRESSION
        assert not context.check_hostname
    assert server_context(source_files).num_tickets == 0


# ---------------------------------------------------------------------------------------------------------------------
# Threads


@contextmanager
def in_thread(call: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
    """Run *call* beside the test; the value is a function that waits for its result."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call)
        yield lambda: future.result(WAIT_S)


def accept_blocking(listening: socket.socket, context: TlsContext, deadline_s: float = WAIT_S) -> Any:
    sock, _ = listening.accept()
    return wrap_blocking_server(sock, context, deadline_s)


def test_threads_know_each_other_and_talk(
    listening_socket: socket.socket, source_files: TlsFiles, destination_files: TlsFiles
) -> None:
    with in_thread(partial(accept_blocking, listening_socket, server_context(source_files))) as accepted:
        port = listening_socket.getsockname()[1]
        client, identity = connect_blocking(LOOPBACK, port, client_context(destination_files), SOURCE, WAIT_S)
        server, peer = accepted()

    with client, server:
        server.sendall(b"page")
        assert client.recv(4) == b"page"
        assert (identity, peer) == (SOURCE, DESTINATION)
        assert peer_identity(client) == SOURCE
        assert client.gettimeout() is server.gettimeout() is None
        assert client.version() == "TLSv1.3"
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) > 0


def test_a_cut_is_not_the_end_of_the_stream_for_threads_either(
    listening_socket: socket.socket, source_files: TlsFiles, destination_files: TlsFiles
) -> None:
    with in_thread(partial(accept_blocking, listening_socket, server_context(source_files))) as accepted:
        port = listening_socket.getsockname()[1]
        client, _ = connect_blocking(LOOPBACK, port, client_context(destination_files), SOURCE, WAIT_S)
        server, _ = accepted()

    server.close()
    with client, pytest.raises(TransportError) as caught, map_tls_errors("reading"):
        client.recv(1)

    assert caught.value.code == "disconnected"


def test_a_thread_that_reads_is_ended_by_shutdown(
    listening_socket: socket.socket, source_files: TlsFiles, destination_files: TlsFiles
) -> None:
    with in_thread(partial(accept_blocking, listening_socket, server_context(source_files))) as accepted:
        port = listening_socket.getsockname()[1]
        client, _ = connect_blocking(LOOPBACK, port, client_context(destination_files), SOURCE, WAIT_S)
        server, _ = accepted()

    def read() -> None:
        with map_tls_errors("reading"):
            server.recv(1)

    with client, server, in_thread(read) as ended:
        server.shutdown(socket.SHUT_RDWR)
        with pytest.raises(TransportError) as caught:
            ended()

    assert caught.value.code == "disconnected"


@pytest.mark.parametrize(("stranger", "code", "text"), STRANGERS)
def test_a_stranger_is_refused_by_a_thread(
    listening_socket: socket.socket,
    strangers: dict[str, TlsFiles],
    source_files: TlsFiles,
    stranger: str,
    code: str,
    text: str,
) -> None:
    context = foreign_client(source_files.ca, strangers[stranger], ssl.TLSVersion.TLSv1_3)
    with in_thread(partial(accept_blocking, listening_socket, server_context(source_files))) as accepted:
        raw = socket.create_connection(listening_socket.getsockname(), WAIT_S)
        with context.wrap_socket(raw, suppress_ragged_eofs=False) as client:
            with pytest.raises(IdentityError) as caught:
                accepted()
            with pytest.raises(VmMigrateError) as told, map_tls_errors("reading", first_answer=True):
                client.recv(1)

    assert caught.value.code == code
    assert text in caught.value.text
    assert told.value.code == TOLD.get(stranger, "closed_after_handshake")


@pytest.mark.parametrize(("stranger", "code", "text"), STRANGERS)
def test_a_stranger_who_answers_is_refused_by_a_thread(
    listening_socket: socket.socket,
    strangers: dict[str, TlsFiles],
    source_files: TlsFiles,
    destination_files: TlsFiles,
    stranger: str,
    code: str,
    text: str,
) -> None:
    context = wearing(server_context(source_files), strangers[stranger])

    def accept() -> None:
        try:
            tls, _ = accept_blocking(listening_socket, context)
            tls.close()
        except VmMigrateError:
            pass

    with in_thread(accept) as accepted:
        port = listening_socket.getsockname()[1]
        with pytest.raises(IdentityError) as caught:
            connect_blocking(LOOPBACK, port, client_context(destination_files), SOURCE, WAIT_S)
        accepted()

    assert caught.value.code == code
    assert text in caught.value.text


def test_another_host_than_expected_is_refused_by_a_thread(
    listening_socket: socket.socket, source_files: TlsFiles, destination_files: TlsFiles
) -> None:
    with in_thread(partial(accept_blocking, listening_socket, server_context(source_files))) as accepted:
        port = listening_socket.getsockname()[1]
        with pytest.raises(IdentityError) as caught:
            connect_blocking(LOOPBACK, port, client_context(destination_files), host_identity("h9"), WAIT_S)
        accepted()[0].close()

    assert caught.value.code == "wrong_host"


def test_a_silent_client_holds_a_thread_only_until_the_deadline(
    listening_socket: socket.socket, source_files: TlsFiles
) -> None:
    context = server_context(source_files)
    with socket.create_connection(listening_socket.getsockname()), pytest.raises(TransportError) as caught:
        accept_blocking(listening_socket, context, 0.05)

    assert caught.value.code == "handshake_timeout"


def test_a_plaintext_client_is_refused_by_a_thread(listening_socket: socket.socket, source_files: TlsFiles) -> None:
    context = server_context(source_files)
    with socket.create_connection(listening_socket.getsockname()) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(TransportError) as caught:
            accept_blocking(listening_socket, context)

    assert caught.value.code == "plaintext"


def test_a_silent_server_holds_a_thread_only_until_the_deadline(
    listening_socket: socket.socket, destination_files: TlsFiles
) -> None:
    port = listening_socket.getsockname()[1]

    with pytest.raises(TransportError) as caught:
        connect_blocking(LOOPBACK, port, client_context(destination_files), SOURCE, 0.05)

    assert caught.value.code == "handshake_timeout"


def test_nobody_listening_is_told_to_a_thread(destination_files: TlsFiles) -> None:
    with socket.socket() as sock:
        sock.bind((LOOPBACK, 0))
        with pytest.raises(TransportError) as caught:
            connect_blocking(LOOPBACK, sock.getsockname()[1], client_context(destination_files), SOURCE, WAIT_S)

    assert caught.value.code == "connection_refused"
