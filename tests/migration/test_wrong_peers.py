"""Wrong peers at the doors of a running daemon: each is refused, told apart, logged once, and has changed nothing.

A host is served with a guest, and with a ticket that was issued for *beta* and not used yet. Then somebody comes who is
not beta with that ticket. "Nothing changed" is read off the journal's records and the guest, not off an answer.
"""

from __future__ import annotations

import contextlib
import ssl
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio

from tests.migration.fleet import (
    TRUST_DOMAIN,
    Fleet,
    RunningHost,
    begin,
    create,
    files_of,
    migrate,
    open_fleet,
    stress,
    wait_filled,
    wait_heartbeats,
    wait_outcome,
    witnesses,
)
from vmmigrate.api.client import open_client
from vmmigrate.devices import registry
from vmmigrate.engine.journal_format import read_contents
from vmmigrate.errors import VmMigrateError
from vmmigrate.net import pki, revocation
from vmmigrate.net.channel import Channel, open_channel
from vmmigrate.net.door import StreamHello
from vmmigrate.net.identity import Identity, Role
from vmmigrate.net.tls import (
    TlsFiles,
    TlsStream,
    close_tls,
    connect_tls,
    open_listeners,
    serve_tls,
    server_context,
)
from vmmigrate.ownership import records as r
from vmmigrate.ownership.records import Record
from vmmigrate.wire import messages as m
from vmmigrate.wire import phases

pytestmark = pytest.mark.slow

LOOPBACK = "127.0.0.1"
DEADLINE_S = 10.0
HOUR = timedelta(hours=1)
REFUSALS = frozenset({"tls.refused", "bulk.refused", "migration.refused", "api.refused", "migration.ended"})
SPEC_VERSIONS = ("v3", "v2", "v1")

Log = list[Any]


@dataclass
class Target:
    """A daemon that a wrong peer comes to, and what it has.

    Attributes:
        before: The journal's records before the wrong peer came.
    """

    fleet: Fleet
    host: RunningHost
    instance: str
    migration: str
    ticket: str
    log: Log
    before: list[Record] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.fleet.root

    def offer(self, **changes: Any) -> m.Offer:
        """What beta would say, but for *changes*."""
        return replace(
            m.Offer(
                protocols=(1,),
                migration_id=self.migration,
                instance_id=self.instance,
                ticket=self.ticket,
                spec_versions=SPEC_VERSIONS,
                payloads={name: kind.readable for name, kind in registry.KINDS.items()},
                ram={"transports": ("tls",), "encodings": ("raw", "zero"), "digests": ("multilinear-64",)},
                max_streams=1,
                facts={},
                api_url="https://127.0.0.1:1",
                random=bytes(32),
            ),
            **changes,
        )

    def records(self) -> list[Record]:
        return list(
            read_contents((self.host.config.directories.state / "journal.vmmj").read_bytes(), "journal").records
        )

    def begin(self) -> None:
        """What comes now is the wrong peer's doing."""
        self.log.clear()
        self.before = self.records()

    def refusals(self) -> list[tuple[str, str]]:
        return [(entry["event"], entry["code"]) for entry in self.log if entry["event"] in REFUSALS]

    async def wait_refusal(self) -> None:
        with trio.fail_after(DEADLINE_S):
            while not self.refusals():
                await trio.sleep(0.005)


@contextlib.asynccontextmanager
async def open_target(root: Path) -> AsyncIterator[Target]:
    with structlog.testing.capture_logs() as log:
        async with open_fleet(root, "alpha", "beta", "gamma") as fleet:
            crl = revocation.renew(root / "pki").path
            alpha = await fleet.start("alpha", tls=f'crl = "{crl}"')
            instance = await create(alpha)
            ticket = await alpha.client.post(f"/v1/instances/{instance}:migrate-out", {"destination_host": "beta"})
            target = Target(fleet, alpha, instance, ticket["migration_id"], ticket["ticket"], log)
            target.begin()
            yield target


Attempt = Callable[[Target], Awaitable[None]]


def leaf(
    target: Target, *uris: str, begins_in: timedelta = -HOUR, ends_in: timedelta = HOUR, authority: Path | None = None
) -> TlsFiles:
    """A certificate with these URIs and this validity, however wrong; by default of the site's CA."""
    signer = pki.load_authority(authority or target.root / "pki")
    now = datetime.now(UTC)
    issued = pki.make_leaf(signer, uris, now + begins_in, now + ends_in, dns_names=["beta.example"])
    name = uuid.uuid4().hex
    files = TlsFiles(target.root / "pki" / "ca.pem", target.root / f"{name}.pem", target.root / f"{name}-key.pem")
    pki.write_leaf(issued, files.certificate, files.key)
    return files


def uri(role: Role, name: str, trust_domain: str = TRUST_DOMAIN) -> str:
    return Identity(trust_domain, role, name).uri


BETA = uri(Role.HOST, "beta")
ALPHA = Identity(TRUST_DOMAIN, Role.HOST, "alpha")


# --------------------------------------------------------------------------- certificates


def showing(files: TlsFiles | None, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    """A client that was not written by us: it does not check itself first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    if files is not None:
        context.load_cert_chain(files.certificate, files.key)
    return context


async def shake_hands(target: Target, context: ssl.SSLContext, port: str = "migration") -> None:
    """Connect and read: the refusal comes after the client's own handshake."""
    transport = await trio.open_tcp_stream(LOOPBACK, target.host.facts[port])
    stream = trio.SSLStream(transport, context)
    with contextlib.suppress(trio.BrokenResourceError), trio.fail_after(DEADLINE_S):
        await stream.receive_some()
    await trio.aclose_forcefully(stream)


async def of_another_ca(target: Target) -> None:
    pki.init_authority(target.root / "other-ca", TRUST_DOMAIN)
    await shake_hands(target, showing(leaf(target, BETA, authority=target.root / "other-ca")))


async def expired(target: Target) -> None:
    await shake_hands(target, showing(leaf(target, BETA, begins_in=-2 * HOUR, ends_in=-HOUR)))


async def not_yet_valid(target: Target) -> None:
    await shake_hands(target, showing(leaf(target, BETA, begins_in=HOUR, ends_in=2 * HOUR)))


async def without_certificate(target: Target) -> None:
    await shake_hands(target, showing(None))


async def without_uri(target: Target) -> None:
    await shake_hands(target, showing(leaf(target)))


async def with_two_uris(target: Target) -> None:
    await shake_hands(target, showing(leaf(target, BETA, uri(Role.HOST, "gamma"))))


async def of_a_foreign_trust_domain(target: Target) -> None:
    await shake_hands(target, showing(leaf(target, uri(Role.HOST, "beta", "elsewhere.example"))))


async def an_operator(target: Target) -> None:
    await shake_hands(target, showing(files_of(target.root, "tester")))


async def an_orchestrator(target: Target) -> None:
    await shake_hands(target, showing(leaf(target, uri(Role.ORCHESTRATOR, "o1"))))


async def with_tls_1_2(target: Target) -> None:
    await shake_hands(target, showing(files_of(target.root, "beta"), ssl.TLSVersion.TLSv1_2))


async def in_plaintext(target: Target) -> None:
    stream = await trio.open_tcp_stream(LOOPBACK, target.host.facts["migration"])
    await stream.send_all(b"\x00\x00\x00\x20\x00\x01\x00\x00")
    await target.wait_refusal()
    await stream.aclose()


async def revoked(target: Target) -> None:
    """Revoked while the daemon runs: one signal later it is known."""
    revocation.revoke(target.root / "pki", files_of(target.root, "beta").certificate)
    await target.host.reload()
    await shake_hands(target, showing(files_of(target.root, "beta")))


# --------------------------------------------------------------------------- tickets


async def come(target: Target, files: TlsFiles, offer: m.Offer) -> None:
    """A peer with a good certificate that says *offer*: what it hears is a refusal."""
    async with connected(target, files) as channel:
        await channel.send(offer)
        await channel.expect(m.Refuse, deadline_s=DEADLINE_S)


@contextlib.asynccontextmanager
async def connected(target: Target, files: TlsFiles) -> AsyncIterator[Channel]:
    stream, _ = await connect_tls(LOOPBACK, target.host.facts["migration"], files, ALPHA, DEADLINE_S)
    try:
        async with open_channel(stream, phases.Role.DESTINATION) as channel:
            yield channel
    finally:
        await close_tls(stream)


async def with_a_stolen_ticket(target: Target) -> None:
    await come(target, files_of(target.root, "gamma"), target.offer())


async def with_the_ticket_of_another_migration(target: Target) -> None:
    other = await create(target.host)
    stolen = await target.host.client.post(f"/v1/instances/{other}:migrate-out", {"destination_host": "beta"})
    target.begin()
    await come(target, files_of(target.root, "beta"), target.offer(ticket=stolen["ticket"]))


async def with_the_ticket_of_another_instance(target: Target) -> None:
    await come(target, files_of(target.root, "beta"), target.offer(instance_id=str(uuid.uuid4())))


async def with_a_right_certificate_and_a_wrong_migration(target: Target) -> None:
    await come(target, files_of(target.root, "beta"), target.offer(migration_id=str(uuid.uuid4())))


async def without_a_ticket(target: Target) -> None:
    await come(target, files_of(target.root, "beta"), target.offer(ticket=""))


async def who_says_something_else_first(target: Target) -> None:
    """A frame that is legal later: nothing of it is read but its header."""
    async with connected(target, files_of(target.root, "beta")) as channel:
        await channel.send_bytes(bytes.fromhex("0000000100080000") + b"\x80")
        with contextlib.suppress(VmMigrateError):
            await channel.expect(m.Refuse, deadline_s=DEADLINE_S)


# --------------------------------------------------------------------------- replay


async def who_replays_a_connection(target: Target) -> None:
    """All bytes that beta once sent on a good connection, sent again: TLS keys are new each time."""
    recorded = await _record(target)
    await wait_outcome(target.host, target.migration)
    target.begin()
    stream = await trio.open_tcp_stream(LOOPBACK, target.host.facts["migration"])
    with contextlib.suppress(trio.BrokenResourceError):
        await stream.send_all(recorded)
    with contextlib.suppress(trio.BrokenResourceError), trio.fail_after(DEADLINE_S):
        while await stream.receive_some():
            pass
    await stream.aclose()


async def _record(target: Target) -> bytes:
    """The bytes of a connection that was refused for an offer without common ground; its ticket is used up by that."""
    recorded = bytearray()

    async def relay(client: trio.SocketStream) -> None:
        server = await trio.open_tcp_stream(LOOPBACK, target.host.facts["migration"])
        async with server, trio.open_nursery() as nursery:
            nursery.start_soon(_copy, server, client, bytearray())
            await _copy(client, server, recorded)

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, relay, 0, host=LOOPBACK))
        port = listener.socket.getsockname()[1]
        stream, _ = await connect_tls(LOOPBACK, port, files_of(target.root, "beta"), ALPHA, DEADLINE_S)
        async with open_channel(stream, phases.Role.DESTINATION) as channel:
            await channel.send(target.offer(ram={"transports": ("pigeon",)}))
            assert (await channel.expect(m.Refuse, deadline_s=DEADLINE_S)).code == "no_common_ground"
        await close_tls(stream)
        nursery.cancel_scope.cancel()
    return bytes(recorded)


async def _copy(source: trio.SocketStream, to: trio.SocketStream, recorded: bytearray) -> None:
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async for chunk in source:
            recorded += chunk
            await to.send_all(chunk)
        await to.send_eof()


# --------------------------------------------------------------------------- bulk


async def knock_bulk(target: Target, files: TlsFiles, hello: bytes) -> None:
    stream, _ = await connect_tls(LOOPBACK, target.host.facts["bulk"], files, ALPHA, DEADLINE_S)
    await stream.send_all(hello)
    with contextlib.suppress(trio.BrokenResourceError), trio.fail_after(DEADLINE_S):
        assert not await stream.receive_some()
    await trio.aclose_forcefully(stream)


async def with_a_bulk_hello_for_nothing(target: Target) -> None:
    hello = StreamHello(target.migration, 1, 0).fields() + bytes(32)
    await knock_bulk(target, files_of(target.root, "beta"), hello)


async def with_something_else_than_a_bulk_hello(target: Target) -> None:
    await knock_bulk(target, files_of(target.root, "beta"), b"VMMBULK9" + bytes(56))


async def an_operator_on_the_bulk_port(target: Target) -> None:
    await shake_hands(target, showing(files_of(target.root, "tester")), "bulk")


# --------------------------------------------------------------------------- the API


async def ask(target: Target, files: TlsFiles, method: str, path: str, body: Mapping[str, Any] | None = None) -> None:
    async with open_client(target.host.url, files) as client:
        with pytest.raises(VmMigrateError):
            await (client.get(path) if method == "GET" else client.post(path, body))


async def a_third_host_that_looks(target: Target) -> None:
    await ask(target, files_of(target.root, "gamma"), "GET", f"/v1/migrations/{target.migration}/side")


async def an_operator_that_settles(target: Target) -> None:
    await ask(target, files_of(target.root, "tester"), "POST", f"/v1/migrations/{target.migration}/side:settle")


async def a_host_that_commands(target: Target) -> None:
    path = f"/v1/instances/{target.instance}:migrate-out"
    await ask(target, files_of(target.root, "gamma"), "POST", path, {"destination_host": "gamma"})


WRONG_PEERS: dict[Attempt, tuple[str, str]] = {
    of_another_ca: ("tls.refused", "wrong_ca"),
    expired: ("tls.refused", "certificate_expired"),
    not_yet_valid: ("tls.refused", "certificate_not_yet_valid"),
    revoked: ("tls.refused", "certificate_revoked"),
    without_certificate: ("tls.refused", "no_client_certificate"),
    without_uri: ("tls.refused", "no_uri_san"),
    with_two_uris: ("tls.refused", "several_uri_sans"),
    of_a_foreign_trust_domain: ("tls.refused", "foreign_trust_domain"),
    an_operator: ("tls.refused", "forbidden"),
    an_orchestrator: ("tls.refused", "forbidden"),
    with_tls_1_2: ("tls.refused", "tls_version"),
    in_plaintext: ("tls.refused", "plaintext"),
    with_a_stolen_ticket: ("migration.refused", "wrong_host"),
    with_the_ticket_of_another_migration: ("migration.refused", "ticket_wrong"),
    with_the_ticket_of_another_instance: ("migration.refused", "ticket_wrong"),
    with_a_right_certificate_and_a_wrong_migration: ("migration.refused", "ticket_unknown"),
    without_a_ticket: ("migration.refused", "ticket_wrong"),
    who_says_something_else_first: ("migration.refused", "unexpected_message"),
    who_replays_a_connection: ("tls.refused", "tls"),
    with_a_bulk_hello_for_nothing: ("bulk.refused", "bulk_unexpected"),
    with_something_else_than_a_bulk_hello: ("bulk.refused", "bulk_bad_hello"),
    an_operator_on_the_bulk_port: ("bulk.refused", "forbidden"),
    a_third_host_that_looks: ("api.refused", "forbidden"),
    an_operator_that_settles: ("api.refused", "forbidden"),
    a_host_that_commands: ("api.refused", "forbidden"),
}


@pytest.mark.parametrize("attempt", WRONG_PEERS, ids=lambda attempt: attempt.__name__)
async def test_a_wrong_peer_is_refused_logged_once_and_changes_nothing(tmp_path: Path, attempt: Attempt) -> None:
    async with open_target(tmp_path) as target:
        await attempt(target)

        await target.wait_refusal()
        assert target.refusals() == [WRONG_PEERS[attempt]]
        assert target.records() == target.before
        assert (await target.host.instance(target.instance))["guest"]["run_state"] == "running"
        await wait_heartbeats(target.host, target.instance, 5)
        assert not any(target.ticket in str(entry) for entry in target.log), "a ticket was logged"


async def test_after_every_wrong_peer_the_right_one_is_served(tmp_path: Path) -> None:
    """Nothing that they did has used up the ticket: beta comes with it, and gets the guest."""
    async with open_target(tmp_path) as target:
        for attempt in (of_another_ca, with_a_stolen_ticket, with_a_bulk_hello_for_nothing, a_third_host_that_looks):
            await attempt(target)
        beta = await target.fleet.start("beta")

        await beta.client.post(
            "/v1/migrations:migrate-in",
            {
                "migration_id": target.migration,
                "instance_id": target.instance,
                "source_host": "alpha",
                "source_address": f"{LOOPBACK}:{target.host.facts['migration']}",
                "source_url": target.host.url,
                "ticket": target.ticket,
            },
        )

        assert (await wait_outcome(target.host, target.migration))["outcome"] == "moved"
        owners = witnesses(target.fleet, target.instance)
        assert (owners.single, owners.hosts) == (True, ("alpha", "beta")), owners.problems


# --------------------------------------------------------------------------- downgrade


async def test_a_source_whose_selection_arrived_edited_gives_nothing_away(tmp_path: Path) -> None:
    """The destination echoes the digest of the selection that it saw; another one means somebody in between."""
    async with open_target(tmp_path) as target, connected(target, files_of(tmp_path, "beta")) as channel:
        await channel.send(target.offer())
        select = await channel.expect(m.Select, deadline_s=DEADLINE_S)
        preamble = await channel.expect(m.Preamble, deadline_s=DEADLINE_S)
        blobs = dict.fromkeys(preamble.blobs, b"")

        await channel.send(m.PreambleOk(bytes(32), blobs, ()))

        with pytest.raises(VmMigrateError) as told:
            await channel.expect(m.RoundEnd, deadline_s=DEADLINE_S)
        record = await wait_outcome(target.host, target.migration)
        assert select.protocol == 1
        assert told.value.code == record["error"]["code"] == "downgrade"
        assert target.refusals() == [("migration.ended", "downgrade")]
        assert _kinds(target) == [r.TicketConsumed, r.Ended]
        assert (await target.host.instance(target.instance))["state"] == "running"


async def test_a_destination_whose_offer_arrived_edited_builds_nothing(tmp_path: Path) -> None:
    """Somebody in between struck out the better choices; the source's digest of the offer tells it."""
    async with open_scripted_source(tmp_path, edited=True) as (target, migration):
        record = await wait_outcome(target.host, migration)

        assert record["error"]["code"] == "downgrade"
        assert _kinds(target) == [r.Reserved, r.Abandoned]
        assert target.refusals() == [("migration.ended", "downgrade")]
        assert await target.host.client.get("/v1/instances") == []


async def test_a_destination_that_is_given_what_it_did_not_offer_builds_nothing(tmp_path: Path) -> None:
    async with open_scripted_source(tmp_path, protocol=7) as (target, migration):
        record = await wait_outcome(target.host, migration)

        assert record["error"]["code"] == "protocol_remote"
        assert "protocol" in record["error"]["message"]
        assert _kinds(target) == [r.Reserved, r.Abandoned]
        assert await target.host.client.get("/v1/instances") == []


async def test_another_host_at_the_address_of_the_source_is_not_told_the_ticket(tmp_path: Path) -> None:
    """The destination checks who answers in the handshake: before its offer, which holds the ticket."""
    async with open_scripted_source(tmp_path, shows="gamma") as (target, migration):
        record = await wait_outcome(target.host, migration)

        assert record["error"]["code"] == "wrong_host"
        assert target.refusals() == [("migration.ended", "wrong_host")]
        assert _kinds(target) == [r.Reserved, r.Abandoned]


@contextlib.asynccontextmanager
async def open_scripted_source(
    root: Path, shows: str = "alpha", protocol: int = 1, edited: bool = False
) -> AsyncIterator[tuple[Target, str]]:
    """Beta, told to fetch a guest from a source that follows a script."""
    with structlog.testing.capture_logs() as log:
        async with open_fleet(root, "alpha", "beta", "gamma") as fleet:
            beta = await fleet.start("beta")
            target = Target(fleet, beta, str(uuid.uuid4()), str(uuid.uuid4()), "0" * 64, log)

            async def answer(stream: TlsStream, _: Identity) -> None:
                with contextlib.suppress(VmMigrateError):
                    await _select(stream, protocol, edited)

            listeners = await open_listeners(LOOPBACK, 0)
            context = server_context(files_of(root, shows))
            # A refused handshake is the destination's business here.
            serve = partial(serve_tls, listeners, lambda: context, answer, on_refusal=lambda *_: None)
            await fleet.nursery.start(serve)
            target.begin()
            await beta.client.post(
                "/v1/migrations:migrate-in",
                {
                    "migration_id": target.migration,
                    "instance_id": target.instance,
                    "source_host": "alpha",
                    "source_address": f"{LOOPBACK}:{listeners[0].socket.getsockname()[1]}",
                    "source_url": "https://127.0.0.1:1",
                    "ticket": target.ticket,
                },
            )
            yield target, target.migration


async def _select(stream: TlsStream, protocol: int, edited: bool) -> None:
    async with open_channel(stream, phases.Role.SOURCE) as channel:
        await channel.expect(m.Offer, deadline_s=DEADLINE_S)
        seen = bytes(32) if edited else channel.session.digests[phases.Kind.OFFER]
        await channel.send(
            m.Select(
                protocol=protocol,
                spec_version="v3",
                payloads={},
                transport="tls",
                encodings=("raw", "zero"),
                digest="multilinear-64",
                streams=1,
                bulk_port=1,
                session_number=1,
                verify="digest",
                offer_digest=seen,
                random=bytes(32),
            )
        )
        await channel.expect(m.PreambleOk, deadline_s=DEADLINE_S)


def _kinds(target: Target) -> list[type[Record]]:
    return [type(record) for record in target.records()[len(target.before) :]]


# --------------------------------------------------------------------------- beside a running migration


async def test_bulk_hellos_of_others_do_not_enter_a_migration_that_runs(tmp_path: Path) -> None:
    """Another migration, another session, another stream, no proof, no right to one: each is refused."""
    with structlog.testing.capture_logs() as log:
        async with open_fleet(tmp_path, "alpha", "beta", "gamma") as fleet:
            alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
            instance = await create(alpha, program=stress(16, 4000))
            await wait_filled(alpha, instance, 16 * 256)
            migration = await begin(alpha, beta, instance, downtime_ms=1, max_rounds=1000, streams=1)
            await _wait_rounds(alpha, migration, 1)
            target = Target(fleet, alpha, instance, migration, "-", log)
            for files, hello, code in (
                ("beta", StreamHello(str(uuid.uuid4()), 1, 0), "bulk_unexpected"),
                ("beta", StreamHello(migration, 2, 0), "bulk_unexpected"),
                ("beta", StreamHello(migration, 1, 0), "bulk_unexpected"),
                ("gamma", StreamHello(migration, 1, 0), "bulk_unexpected"),
            ):
                target.begin()

                await knock_bulk(target, files_of(tmp_path, files), hello.fields() + bytes(32))

                await target.wait_refusal()
                assert target.refusals() == [("bulk.refused", code)]
            assert (await alpha.record(migration))["outcome"] is None
            await alpha.client.post(f"/v1/migrations/{migration}:cancel")
            assert (await wait_outcome(alpha, migration))["outcome"] == "cancelled"


async def test_a_third_host_cannot_settle_a_migration_that_runs(tmp_path: Path) -> None:
    """Its verdict would be `unknown` or `refused`, and the second would end the migration of others."""
    with structlog.testing.capture_logs() as log:
        async with open_fleet(tmp_path, "alpha", "beta", "gamma") as fleet:
            alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
            instance = await create(alpha, program=stress(16, 4000))
            await wait_filled(alpha, instance, 16 * 256)
            migration = await begin(alpha, beta, instance, downtime_ms=1, max_rounds=1000)
            await _wait_rounds(alpha, migration, 1)
            target = Target(fleet, beta, instance, migration, "-", log)
            target.begin()

            await ask(target, files_of(tmp_path, "gamma"), "POST", f"/v1/migrations/{migration}/side:settle")

            assert target.refusals() == [("api.refused", "forbidden")]
            assert target.records() == target.before
            assert (await alpha.record(migration))["outcome"] is None
            await alpha.client.post(f"/v1/migrations/{migration}:cancel")
            assert (await wait_outcome(alpha, migration))["outcome"] == "cancelled"


async def test_a_third_host_cannot_settle_a_migration_that_ended(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as log:
        async with open_fleet(tmp_path, "alpha", "beta", "gamma") as fleet:
            alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
            instance = await create(alpha)
            record = await migrate(alpha, beta, instance)
            target = Target(fleet, beta, instance, record["migration_id"], "-", log)
            for files in ("gamma", "tester"):
                target.begin()

                await ask(target, files_of(tmp_path, files), "POST", f"/v1/migrations/{target.migration}/side:settle")

                assert target.refusals() == [("api.refused", "forbidden")]
                assert target.records() == target.before
            assert (await beta.instance(instance))["state"] == "running"


async def test_a_destination_that_is_revoked_in_the_middle_gets_no_further(tmp_path: Path) -> None:
    """All its connections end at the reload; the guest goes on at the source, and both records say why."""
    with structlog.testing.capture_logs() as log:
        async with open_fleet(tmp_path, "alpha", "beta") as fleet:
            crl = revocation.renew(tmp_path / "pki").path
            alpha, beta = await fleet.start("alpha", tls=f'crl = "{crl}"'), await fleet.start("beta")
            instance = await create(alpha, program=stress(16, 4000))
            await wait_filled(alpha, instance, 16 * 256)
            migration = await begin(alpha, beta, instance, downtime_ms=1, max_rounds=1000)
            await _wait_rounds(alpha, migration, 1)
            revocation.revoke(tmp_path / "pki", files_of(tmp_path, "beta").certificate)

            await alpha.reload()

            record = await wait_outcome(alpha, migration)
            assert (record["outcome"], record["error"]["code"]) == ("failed", "certificate_revoked")
            assert (await wait_outcome(beta, migration))["outcome"] == "failed"
            assert (await alpha.instance(instance))["state"] == "running"
            ended = [entry for entry in log if entry["event"] == "tls.connection_ended"]
            assert {entry["code"] for entry in ended} == {"certificate_revoked"}
            assert len(ended) >= 3, "the control connection and both bulk streams"
            await wait_heartbeats(alpha, instance)
            again = await begin(alpha, beta, instance)
            assert (await wait_outcome(beta, again))["error"]["code"] == "certificate_revoked"


async def test_a_source_that_is_revoked_in_the_middle_is_left_by_its_destination(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        crl = revocation.renew(tmp_path / "pki").path
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta", tls=f'crl = "{crl}"')
        instance = await create(alpha, program=stress(16, 4000))
        await wait_filled(alpha, instance, 16 * 256)
        migration = await begin(alpha, beta, instance, downtime_ms=1, max_rounds=1000)
        await _wait_rounds(alpha, migration, 1)
        revocation.revoke(tmp_path / "pki", files_of(tmp_path, "alpha").certificate)

        await beta.reload()

        record = await wait_outcome(beta, migration)
        assert (record["outcome"], record["error"]["code"]) == ("failed", "certificate_revoked")
        assert (await wait_outcome(alpha, migration))["outcome"] == "failed"
        assert (await alpha.instance(instance))["state"] == "running"
        assert await beta.client.get("/v1/instances") == []


async def _wait_rounds(host: RunningHost, migration: str, rounds: int) -> None:
    with trio.fail_after(30):
        while len((await host.record(migration))["ram"]["rounds"]) < rounds:
            await trio.sleep(0.01)
