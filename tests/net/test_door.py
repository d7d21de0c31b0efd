"""Who may open a bulk stream: nobody who has not proved his session, and nobody keeps him out who can."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import structlog
import trio
import trio.testing

from vmmigrate.errors import IdentityError, TransportError, VmMigrateError
from vmmigrate.net.door import (
    HELLO,
    SEALED,
    TLS,
    WAITING_BYTES,
    Appointment,
    BulkDoor,
    DoorLimits,
    StreamHello,
    open_streams,
)
from vmmigrate.net.identity import Role
from vmmigrate.net.links import ReceiveLink
from vmmigrate.net.secrets import SessionContext, SessionSecrets, proof
from vmmigrate.net.threads import open_group
from vmmigrate.net.tls import (
    ServerCredentials,
    TlsFiles,
    bound_port,
    client_context,
    connect_blocking,
    open_listeners,
    server_context,
    wrap_blocking_server,
)

from .bulk_pair import threads_in
from .conftest import Site, host_identity

LOOPBACK = "127.0.0.1"
WAIT_S = 5
SOURCE, DESTINATION = host_identity("source"), host_identity("destination")
MIGRATION = "3dd63c0a-1599-48bd-a84f-2e419b205049"
CONTEXT = SessionContext(1, MIGRATION, "1cee5a1b-936d-4132-9d0a-2b6fbb0a8b6e", "source", "destination", 3)


def secrets_of(context: SessionContext = CONTEXT, random: bytes = b"d" * 32) -> SessionSecrets:
    return SessionSecrets(context, random, b"s" * 32)


SECRETS = secrets_of()
HELLO_0 = StreamHello(MIGRATION, 3, 0)


def proven(hello: StreamHello, secrets: SessionSecrets = SECRETS) -> bytes:
    return hello.fields() + proof(secrets.key("bulk hello destination"), hello.fields())


class Opened:
    """A served door, and whom it refused."""

    def __init__(self, door: BulkDoor, port: int, refusals: trio.MemoryReceiveChannel[VmMigrateError]) -> None:
        self.door = door
        self.port = port
        self._refusals = refusals

    async def wait_refusal(self) -> VmMigrateError:
        with trio.fail_after(WAIT_S):
            return await self._refusals.receive()

    def refused(self) -> int:
        """How many refusals nobody has looked at yet."""
        return self._refusals.statistics().current_buffer_used


@asynccontextmanager
async def open_door(files: TlsFiles | ServerCredentials, **limits: float) -> AsyncIterator[Opened]:
    refused, refusals = trio.open_memory_channel[VmMigrateError](1000)

    def on_refusal(peer: str, error: VmMigrateError) -> None:
        assert peer.startswith(LOOPBACK) or "gone" in peer
        refused.send_nowait(error)

    credentials = files if isinstance(files, ServerCredentials) else ServerCredentials(files)
    door = BulkDoor(credentials.current, DoorLimits(**limits), on_refusal=on_refusal)  # type: ignore[arg-type]
    listeners = await open_listeners(LOOPBACK, 0)
    with refused, refusals:
        async with open_group() as nursery:
            nursery.start_soon(door.serve, listeners)
            yield Opened(door, bound_port(listeners), refusals)
            nursery.cancel_scope.cancel()
    assert threads_in("vmmigrate.net.door") == []


async def knock(port: int, files: TlsFiles, said: bytes) -> bytes:
    """What somebody with these files who says this is answered."""
    return await trio.to_thread.run_sync(_knock, port, files, said)


def _knock(port: int, files: TlsFiles, said: bytes) -> bytes:
    tls, _ = connect_blocking(LOOPBACK, port, client_context(files), None, WAIT_S)
    with closing(tls):
        tls.settimeout(WAIT_S)
        with suppress(OSError):  # refused: cut
            tls.sendall(said)
            return tls.recv(64)
    return b""


async def open_all(
    opened: Opened, files: TlsFiles, streams: int, secrets: SessionSecrets = SECRETS, transport: str = TLS
) -> tuple[ReceiveLink, ...]:
    return await open_streams(LOOPBACK, opened.port, client_context(files), SOURCE, secrets, streams, transport)


async def check_door_opens(
    opened: Opened, appointment: Appointment, files: TlsFiles, secrets: SessionSecrets = SECRETS
) -> None:
    """A right hello for each stream opens them; and each link is the one of its stream."""
    with trio.fail_after(WAIT_S):
        theirs = await open_all(opened, files, appointment.streams, secrets, appointment.transport)
        ours = await opened.door.collect(appointment)
    assert len(ours) == len(theirs) == appointment.streams
    for number, (link, other) in enumerate(zip(ours, theirs, strict=True)):
        link.send(bytes([number]))
        received = bytearray(1)
        other.receive_into(memoryview(received))
        assert received[0] == number
        link.close()
        other.close()


# --------------------------------------------------------------------------- those who belong


@pytest.mark.parametrize("transport", [SEALED, TLS])
@pytest.mark.parametrize("streams", [1, 3])
async def test_a_right_hello_opens_each_stream_in_its_place(
    source_files: TlsFiles, destination_files: TlsFiles, streams: int, transport: str
) -> None:
    async with open_door(source_files) as opened:
        with opened.door.expect(secrets_of(), DESTINATION, streams, transport) as appointment:
            await check_door_opens(opened, appointment, destination_files, secrets_of())
        assert opened.refused() == 0


@pytest.mark.parametrize("transport", [SEALED, TLS])
async def test_a_stream_works_ahead_of_a_slow_link(
    source_files: TlsFiles, destination_files: TlsFiles, transport: str
) -> None:
    """What is sent waits in the socket while the next is made ready, and not only the few KiB that trio lets wait."""
    async with open_door(source_files) as opened:
        with opened.door.expect(secrets_of(), DESTINATION, 1, transport) as appointment:
            (theirs,) = await open_all(opened, destination_files, 1, secrets_of(), transport)
            (ours,) = await opened.door.collect(appointment)
        ours.pace(1 << 20)

        await trio.to_thread.run_sync(ours.send, bytes(512 << 10))

        assert ours.unsent_bytes() > 200 << 10
        ours.close()
        theirs.close()


async def test_no_more_than_a_record_waits_in_a_socket(source_files: TlsFiles, destination_files: TlsFiles) -> None:
    """However much the kernel would take: all of it would have to drain before a pause is over."""
    async with open_door(source_files) as opened:
        with opened.door.expect(secrets_of(), DESTINATION, 1, SEALED) as appointment:
            (theirs,) = await open_all(opened, destination_files, 1, secrets_of(), SEALED)
            (ours,) = await opened.door.collect(appointment)
        ours.pace(8 << 20)
        reader = threading.Thread(target=_read_records, args=(theirs, 8))
        reader.start()

        for _ in range(8):
            await trio.to_thread.run_sync(ours.send, bytes(1 << 20))
        waiting = ours.unsent_bytes()

        assert 0 < waiting < WAITING_BYTES * 1.25
        await trio.to_thread.run_sync(reader.join)
        ours.close()
        theirs.close()


def _read_records(link: ReceiveLink, records: int) -> None:
    for _ in range(records):
        link.receive_into(memoryview(bytearray(1 << 20)))


@pytest.mark.parametrize("said", [b"!", bytes(1 << 20)], ids=["little", "much"])
async def test_what_a_source_seals_right_behind_its_proof_is_not_lost(
    source_files: TlsFiles, destination_files: TlsFiles, said: bytes
) -> None:
    """The destination leaves TLS with the proof; what came with it into the same buffers belongs to the stream."""
    async with open_door(source_files) as opened:
        with opened.door.expect(secrets_of(), DESTINATION, 1, SEALED) as appointment:
            async with open_group() as nursery:

                async def send() -> None:
                    (link,) = await opened.door.collect(appointment)
                    await trio.to_thread.run_sync(link.send, said)
                    link.close()

                nursery.start_soon(send)
                (theirs,) = await open_all(opened, destination_files, 1, secrets_of(), SEALED)
                received = bytearray(len(said))
                with trio.fail_after(WAIT_S):
                    await trio.to_thread.run_sync(theirs.receive_into, memoryview(received))
                theirs.close()

    assert received == said


async def test_a_sealed_stream_has_left_tls_and_shows_nothing(
    source_files: TlsFiles, destination_files: TlsFiles
) -> None:
    async with open_door(source_files) as opened:
        with opened.door.expect(secrets_of(), DESTINATION, 1, SEALED) as appointment:
            theirs = await trio.to_thread.run_sync(_say, opened.port, destination_files, proven(HELLO_0))
            (ours,) = await opened.door.collect(appointment)
            ours.send(b"what nobody may read" * 10)
            ours.close()
            with closing(socket.socket(fileno=theirs.detach())) as wire:
                wire.settimeout(WAIT_S)
                shown = wire.recv(4096)

    assert len(shown) == 200 + 16
    assert b"nobody" not in shown


def _say(port: int, files: TlsFiles, said: bytes) -> ssl.SSLSocket:
    tls, _ = connect_blocking(LOOPBACK, port, client_context(files), None, WAIT_S)
    tls.settimeout(WAIT_S)
    tls.sendall(said)
    assert len(tls.recv(64)) == 32
    return tls


async def test_sessions_side_by_side_get_their_own_streams(source_files: TlsFiles, destination_files: TlsFiles) -> None:
    others = secrets_of(replace(CONTEXT, session_number=4))
    async with open_door(source_files) as opened:
        with (
            opened.door.expect(SECRETS, DESTINATION, 2) as one,
            opened.door.expect(others, DESTINATION, 1) as two,
        ):
            await check_door_opens(opened, two, destination_files, others)
            assert not one.links
            await check_door_opens(opened, one, destination_files)


def test_the_hello_is_that_of_every_other_build() -> None:
    """Frozen: 8 bytes magic, migration, session, stream, direction, reserved; then the proof."""
    assert HELLO_0.fields().hex() == b"VMMBULK1".hex() + MIGRATION.replace("-", "") + "00000003" + "0000" + "01" + "00"
    assert HELLO.size == len(proven(HELLO_0)) == 64


# --------------------------------------------------------------------------- those who do not


def with_byte(raw: bytes, offset: int, value: int) -> bytes:
    return raw[:offset] + bytes([value]) + raw[offset + 1 :]


OTHER_MIGRATION = "00000000-1599-48bd-a84f-2e419b205049"
WRONG_HELLOS = {
    "wrong magic": (with_byte(proven(HELLO_0), 7, ord("2")), "bulk_bad_hello"),
    "reserved bits": (with_byte(proven(HELLO_0), 31, 1), "bulk_bad_hello"),
    "unknown migration": (proven(replace(HELLO_0, migration_id=OTHER_MIGRATION)), "bulk_unexpected"),
    "wrong session number": (proven(replace(HELLO_0, session_number=2)), "bulk_unexpected"),
    "stream index too high": (proven(replace(HELLO_0, stream=2)), "bulk_unexpected"),
    "highest stream index": (proven(replace(HELLO_0, stream=65_535)), "bulk_unexpected"),
    "wrong direction": (proven(replace(HELLO_0, direction=2)), "bulk_unproven"),
    "no proof": (HELLO_0.fields() + bytes(32), "bulk_unproven"),
    "key of another session": (
        proven(HELLO_0, secrets_of(replace(CONTEXT, session_number=2))),
        "bulk_unproven",
    ),
    "key of another conversation": (proven(HELLO_0, secrets_of(random=b"x" * 32)), "bulk_unproven"),
    "proof of another stream": (HELLO_0.fields() + proven(replace(HELLO_0, stream=1))[-32:], "bulk_unproven"),
    "proof of the source": (
        HELLO_0.fields() + proof(SECRETS.key("bulk hello source"), HELLO_0.fields()),
        "bulk_unproven",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_HELLOS)
async def test_a_wrong_hello_is_refused_once_and_harms_nobody(
    source_files: TlsFiles, destination_files: TlsFiles, wrong: str
) -> None:
    said, code = WRONG_HELLOS[wrong]
    async with open_door(source_files) as opened:
        with opened.door.expect(SECRETS, DESTINATION, 2) as appointment:
            answer = await knock(opened.port, destination_files, said)

            error = await opened.wait_refusal()
            assert answer == b""
            assert isinstance(error, IdentityError)
            assert error.code == code
            assert not appointment.links
            assert not appointment.taken
            await check_door_opens(opened, appointment, destination_files)
        assert opened.refused() == 0


async def test_a_hello_when_nobody_is_expected_is_refused(source_files: TlsFiles, destination_files: TlsFiles) -> None:
    async with open_door(source_files) as opened:
        answer = await knock(opened.port, destination_files, proven(HELLO_0))

        assert answer == b""
        assert (await opened.wait_refusal()).code == "bulk_unexpected"


@pytest.mark.parametrize(
    ("role", "name", "code"),
    [
        (Role.HOST, "another", "bulk_unproven"),
        (Role.HOST, "source", "bulk_unproven"),
        (Role.OPERATOR, "destination", "forbidden"),
        (Role.ORCHESTRATOR, "destination", "forbidden"),
    ],
)
async def test_a_right_proof_by_another_party_is_refused(
    site: Site, source_files: TlsFiles, destination_files: TlsFiles, role: Role, name: str, code: str
) -> None:
    """The proof shows the session, the certificate the host; both are needed."""
    stranger = site.party(role, name)
    async with open_door(source_files) as opened:
        with opened.door.expect(SECRETS, DESTINATION, 1) as appointment:
            answer = await knock(opened.port, stranger, proven(HELLO_0))

            assert answer == b""
            assert (await opened.wait_refusal()).code == code
            await check_door_opens(opened, appointment, destination_files)
        assert opened.refused() == 0


async def test_a_certificate_of_another_ca_is_refused(
    other_site: Site, source_files: TlsFiles, destination_files: TlsFiles
) -> None:
    stranger = replace(other_site.host("destination"), ca=destination_files.ca)
    context = client_context(destination_files)
    context.load_cert_chain(stranger.certificate, stranger.key)
    async with open_door(source_files) as opened:
        with opened.door.expect(SECRETS, DESTINATION, 1) as appointment:
            with pytest.raises((IdentityError, TransportError)):
                await open_streams(LOOPBACK, opened.port, context, SOURCE, SECRETS, 1)

            assert (await opened.wait_refusal()).code == "wrong_ca"
            await check_door_opens(opened, appointment, destination_files)


async def test_a_stream_opens_once(source_files: TlsFiles, destination_files: TlsFiles) -> None:
    """Also when the one who holds it is the same peer: no record number and no nonce may come twice."""
    async with open_door(source_files) as opened:
        with opened.door.expect(SECRETS, DESTINATION, 2) as appointment:
            first = await open_all(opened, destination_files, 1)
            again = await knock(opened.port, destination_files, proven(HELLO_0))

            assert again == b""
            assert (await opened.wait_refusal()).code == "bulk_unexpected"
            await knock(opened.port, destination_files, proven(replace(HELLO_0, stream=1)))
            links = await opened.door.collect(appointment)
            links[0].send(b"!")
            received = bytearray(1)
            first[0].receive_into(memoryview(received))
            assert received == b"!"
        for link in (*links, *first):
            link.close()


async def test_a_session_that_is_over_opens_no_stream(source_files: TlsFiles, destination_files: TlsFiles) -> None:
    async with open_door(source_files) as opened:
        with opened.door.expect(SECRETS, DESTINATION, 1):
            pass

        with pytest.raises(TransportError):
            await open_all(opened, destination_files, 1)

        assert (await opened.wait_refusal()).code == "bulk_unexpected"


# --------------------------------------------------------------------------- strangers


def stall(port: int) -> socket.socket:
    return socket.create_connection((LOOPBACK, port), WAIT_S)


def shake_hands_and_stall(port: int, files: TlsFiles) -> socket.socket:
    return connect_blocking(LOOPBACK, port, client_context(files), None, WAIT_S)[0]


async def wait_closed(sock: socket.socket) -> None:
    def read() -> None:
        sock.settimeout(WAIT_S)
        with suppress(ConnectionResetError, ssl.SSLEOFError):
            while sock.recv(1024):
                pass

    await trio.to_thread.run_sync(read)


async def test_plaintext_is_refused(source_files: TlsFiles, destination_files: TlsFiles) -> None:
    async with open_door(source_files) as opened:
        with opened.door.expect(SECRETS, DESTINATION, 1) as appointment, closing(stall(opened.port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\nHost: bulk\r\n\r\n" + bytes(64))

            assert (await opened.wait_refusal()).code == "plaintext"
            await wait_closed(stranger)
            await check_door_opens(opened, appointment, destination_files)


async def test_a_handshake_that_does_not_come_is_not_awaited(
    source_files: TlsFiles, destination_files: TlsFiles
) -> None:
    async with open_door(source_files, hello_deadline_s=0.2) as opened:
        with closing(stall(opened.port)) as stranger:
            assert (await opened.wait_refusal()).code == "handshake_timeout"
            await wait_closed(stranger)


@pytest.mark.parametrize("said", [b"", proven(HELLO_0)[:-1]], ids=["nothing", "all but one byte"])
async def test_a_hello_that_does_not_come_is_not_awaited(
    source_files: TlsFiles, destination_files: TlsFiles, said: bytes
) -> None:
    async with open_door(source_files, hello_deadline_s=0.3) as opened:
        with opened.door.expect(SECRETS, DESTINATION, 1) as appointment:
            stranger = await trio.to_thread.run_sync(shake_hands_and_stall, opened.port, destination_files)
            with closing(stranger):
                stranger.sendall(said)

                assert (await opened.wait_refusal()).code == "hello_timeout"
            await check_door_opens(opened, appointment, destination_files)


async def test_a_hello_byte_by_byte_has_the_same_deadline(source_files: TlsFiles, destination_files: TlsFiles) -> None:
    """Not one deadline per byte."""

    def drip(stranger: socket.socket) -> None:
        with suppress(OSError):
            while True:
                stranger.sendall(b"V")
                stranger.settimeout(0.05)
                with suppress(TimeoutError):
                    if not stranger.recv(1):
                        return

    async with open_door(source_files, hello_deadline_s=0.4) as opened:
        with trio.fail_after(1):
            stranger = await trio.to_thread.run_sync(shake_hands_and_stall, opened.port, destination_files)
            with closing(stranger):
                await trio.to_thread.run_sync(drip, stranger)
                assert (await opened.wait_refusal()).code == "hello_timeout"


@pytest.mark.parametrize("how", ["closes", "resets", "closes after the handshake"])
async def test_a_stranger_who_leaves_again_is_forgotten(
    source_files: TlsFiles, destination_files: TlsFiles, how: str
) -> None:
    async with open_door(source_files) as opened:
        with opened.door.expect(SECRETS, DESTINATION, 1) as appointment:
            if how == "closes after the handshake":
                (await trio.to_thread.run_sync(shake_hands_and_stall, opened.port, destination_files)).close()
            else:
                stranger = stall(opened.port)
                if how == "resets":
                    stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                stranger.close()

            assert isinstance(await opened.wait_refusal(), TransportError)
            await check_door_opens(opened, appointment, destination_files)


@contextmanager
def flood(knocking: Callable[[], socket.socket], strangers: int) -> Iterator[list[socket.socket]]:
    stalled = [knocking() for _ in range(strangers)]
    try:
        yield stalled
    finally:
        for sock in stalled:
            sock.close()


async def test_a_flood_of_strangers_who_stall_does_not_keep_out_a_peer(
    source_files: TlsFiles, destination_files: TlsFiles
) -> None:
    """One stranger above the cap pushes out the oldest; it does not close the door for five seconds."""
    async with open_door(source_files, max_strangers=4) as opened:
        with (
            opened.door.expect(SECRETS, DESTINATION, 2) as appointment,
            flood(partial(stall, opened.port), 12) as stalled,
        ):
            with trio.fail_after(2):
                await check_door_opens(opened, appointment, destination_files)

                for sock in stalled[:8]:
                    assert (await opened.wait_refusal()).code == "too_many_strangers"
                    await wait_closed(sock)


async def test_hosts_who_shake_hands_and_stall_do_not_keep_out_a_peer_either(
    site: Site, source_files: TlsFiles, destination_files: TlsFiles
) -> None:
    """They hold a thread that TLS has the socket of; pushing them out must reach it."""
    other = site.host("another")
    async with open_door(source_files, max_strangers=2) as opened:
        with opened.door.expect(SECRETS, DESTINATION, 1) as appointment, trio.fail_after(2):
            stalled = [
                await trio.to_thread.run_sync(shake_hands_and_stall, opened.port, other),
                await trio.to_thread.run_sync(shake_hands_and_stall, opened.port, other),
            ]

            await check_door_opens(opened, appointment, destination_files)

            assert (await opened.wait_refusal()).code == "too_many_strangers"
            await wait_closed(stalled[0])
            for sock in stalled:
                sock.close()


async def test_strangers_never_push_out_a_stream_that_is_open(
    source_files: TlsFiles, destination_files: TlsFiles
) -> None:
    async with open_door(source_files, max_strangers=2) as opened:
        with opened.door.expect(SECRETS, DESTINATION, 2) as appointment:
            theirs = await open_all(opened, destination_files, 2)
            with flood(partial(stall, opened.port), 6):
                for _ in range(4):
                    assert (await opened.wait_refusal()).code == "too_many_strangers"
                ours = await opened.door.collect(appointment)
                for link, other in zip(ours, theirs, strict=True):
                    other.send(b"!")
                    link.receive_into(memoryview(bytearray(1)))
                    link.close()
                    other.close()


@pytest.mark.parametrize("handshake", [False, True])
async def test_a_door_that_closes_does_not_wait_for_strangers(
    source_files: TlsFiles, destination_files: TlsFiles, handshake: bool
) -> None:
    """A daemon that stops does not wait for the deadline of somebody's hello."""
    with trio.fail_after(1):
        async with open_door(source_files, hello_deadline_s=30) as opened:
            if handshake:
                stranger = await trio.to_thread.run_sync(shake_hands_and_stall, opened.port, destination_files)
            else:
                stranger = stall(opened.port)
            await trio.testing.wait_all_tasks_blocked(0.01)
    stranger.close()


async def test_the_default_report_is_one_event_without_secrets(
    source_files: TlsFiles, destination_files: TlsFiles
) -> None:
    listeners = await open_listeners(LOOPBACK, 0)
    with structlog.testing.capture_logs() as events, trio.fail_after(WAIT_S):
        async with open_group() as nursery:
            nursery.start_soon(BulkDoor(ServerCredentials(source_files).current).serve, listeners)
            await knock(bound_port(listeners), destination_files, proven(HELLO_0))
            while not events:
                await trio.testing.wait_all_tasks_blocked(0.001)
            nursery.cancel_scope.cancel()

    assert [(event["event"], event["code"]) for event in events] == [("bulk.refused", "bulk_unexpected")]
    assert proven(HELLO_0)[-32:].hex() not in repr(events)


# --------------------------------------------------------------------------- the appointment


async def test_collect_gives_up_and_closes_what_came(source_files: TlsFiles, destination_files: TlsFiles) -> None:
    async with open_door(source_files, open_deadline_s=0.2) as opened:
        with opened.door.expect(SECRETS, DESTINATION, 2) as appointment:
            links = await open_all(opened, destination_files, 1)

            with pytest.raises(TransportError, match="1 of 2 bulk streams") as caught:
                await opened.door.collect(appointment)

        assert caught.value.code == "bulk_timeout"
        await expect_cut(links[0])


async def test_links_that_nobody_claimed_are_closed_with_the_appointment(
    source_files: TlsFiles, destination_files: TlsFiles
) -> None:
    async with open_door(source_files) as opened:
        with opened.door.expect(SECRETS, DESTINATION, 2):
            links = await open_all(opened, destination_files, 2)
            await trio.testing.wait_all_tasks_blocked(0.01)

        for link in links:
            await expect_cut(link)


async def test_links_that_were_claimed_outlive_the_appointment(
    source_files: TlsFiles, destination_files: TlsFiles
) -> None:
    async with open_door(source_files) as opened:
        with opened.door.expect(SECRETS, DESTINATION, 1) as appointment:
            theirs = await open_all(opened, destination_files, 1)
            ours = await opened.door.collect(appointment)

        ours[0].send(b"!")
        theirs[0].receive_into(memoryview(bytearray(1)))
        ours[0].close()
        theirs[0].close()


async def expect_cut(link: Any) -> None:
    with pytest.raises(TransportError):
        await trio.to_thread.run_sync(link.receive_into, memoryview(bytearray(1)))
    link.close()


# --------------------------------------------------------------------------- the destination's own doubts


@asynccontextmanager
async def answering(files: TlsFiles, answer: Callable[[bytes], bytes | None]) -> AsyncIterator[int]:
    """A source that answers a hello so; with None, not at all. The port."""
    with closing(socket.create_server((LOOPBACK, 0))) as listener:
        listener.settimeout(WAIT_S)

        def serve() -> None:
            accepted, _ = listener.accept()
            tls, _ = wrap_blocking_server(accepted, server_context(files), WAIT_S)
            with closing(tls), suppress(OSError):
                tls.settimeout(WAIT_S)
                said = answer(tls.recv(HELLO.size))
                if said is not None:
                    tls.sendall(said)
                while tls.recv(64):
                    pass

        async with open_group() as nursery:
            nursery.start_soon(quietly, partial(trio.to_thread.run_sync, serve))
            yield listener.getsockname()[1]


async def quietly(serve: Callable[[], Awaitable[None]]) -> None:
    with suppress(VmMigrateError, OSError):
        await serve()


def source_proof(hello: bytes, secrets: SessionSecrets) -> bytes:
    return proof(secrets.key("bulk hello source"), hello[:-32])


WRONG_ANSWERS: dict[str, Callable[[bytes], bytes]] = {
    "noise": lambda _: bytes(32),
    "our own proof": lambda hello: hello[-32:],
    "key of another session": lambda hello: source_proof(hello, secrets_of(random=b"x" * 32)),
    "proof of another stream": lambda _: source_proof(proven(replace(HELLO_0, stream=1)), SECRETS),
}


@pytest.mark.parametrize("wrong", WRONG_ANSWERS)
async def test_a_source_that_cannot_prove_its_session_gets_no_guest(
    source_files: TlsFiles, destination_files: TlsFiles, wrong: str
) -> None:
    async with answering(source_files, WRONG_ANSWERS[wrong]) as port:
        with pytest.raises(IdentityError) as caught, trio.fail_after(WAIT_S):
            await open_streams(LOOPBACK, port, client_context(destination_files), SOURCE, SECRETS, 1)

    assert caught.value.code == "bulk_unproven"


async def test_a_source_with_the_right_proof_is_believed(source_files: TlsFiles, destination_files: TlsFiles) -> None:
    """So that the tests above fail for their proof and for nothing else."""
    async with answering(source_files, lambda hello: source_proof(hello, SECRETS)) as port:
        (link,) = await open_streams(LOOPBACK, port, client_context(destination_files), SOURCE, SECRETS, 1)
        link.close()


async def test_another_host_in_place_of_the_source_is_refused_before_the_hello(
    site: Site, destination_files: TlsFiles
) -> None:
    heard: list[bytes] = []
    async with answering(site.host("another"), heard.append) as port:
        with pytest.raises(IdentityError) as caught, trio.fail_after(WAIT_S):
            await open_streams(LOOPBACK, port, client_context(destination_files), SOURCE, SECRETS, 1)

    assert caught.value.code == "wrong_host"
    assert not any(heard)


async def test_a_source_that_does_not_answer_is_not_awaited(
    source_files: TlsFiles, destination_files: TlsFiles
) -> None:
    async with answering(source_files, lambda _: None) as port:
        with pytest.raises(TransportError) as caught, trio.fail_after(WAIT_S):
            await open_streams(LOOPBACK, port, client_context(destination_files), SOURCE, SECRETS, 1, deadline_s=0.3)

    assert caught.value.code == "hello_timeout"


async def test_when_one_stream_is_refused_the_others_are_closed(
    source_files: TlsFiles, destination_files: TlsFiles
) -> None:
    async with open_door(source_files) as opened:
        with opened.door.expect(SECRETS, DESTINATION, 1) as appointment:
            with pytest.raises(TransportError):
                await open_all(opened, destination_files, 2)

            assert (await opened.wait_refusal()).code == "bulk_unexpected"
            (link,) = await opened.door.collect(appointment)
            await expect_cut(link)


async def test_a_port_where_nobody_listens_is_one_error(destination_files: TlsFiles) -> None:
    with closing(socket.create_server((LOOPBACK, 0))) as listener:
        port = listener.getsockname()[1]

    with pytest.raises(TransportError) as caught:
        await open_streams(LOOPBACK, port, client_context(destination_files), SOURCE, SECRETS, 3)

    assert caught.value.code == "connection_refused"
