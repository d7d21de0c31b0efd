"""A revoked certificate: refused by every door, and whoever is inside already is put out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from vmmigrate.errors import IdentityError, UsageError, VmMigrateError
from vmmigrate.net import pki, revocation
from vmmigrate.net.channel import open_channel
from vmmigrate.net.door import SEALED, TLS
from vmmigrate.net.identity import Role
from vmmigrate.net.links import TlsLink
from vmmigrate.net.revocation import LivePeers
from vmmigrate.net.tls import (
    ServerCredentials,
    TlsFiles,
    TlsStream,
    client_context,
    close_tls,
    connect_blocking,
    connect_tls,
    load_identity,
    server_context,
)
from vmmigrate.wire import messages as m
from vmmigrate.wire import phases

from .conftest import HOUR, Site, host_identity
from .test_door import HELLO_0, open_door, proven, secrets_of
from .test_tls import LOOPBACK, WAIT_S, echo, served

SOURCE, DESTINATION = host_identity("source"), host_identity("destination")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A CA of this test's own: what it revokes is nobody else's business."""
    own = Site(tmp_path / "ca")
    revocation.renew(own.directory)
    return own


def with_list(site: Site, files: TlsFiles) -> TlsFiles:
    return TlsFiles(files.ca, files.certificate, files.key, site.directory / "crl.pem")


def sign_list(
    authority: pki.Authority,
    path: Path,
    *,
    begins_in: timedelta = -HOUR,
    ends_in: timedelta = HOUR,
    revoked: tuple[x509.Certificate, ...] = (),
) -> Path:
    """A list with any validity, however wrong."""
    now = datetime.now(UTC)
    builder = x509.CertificateRevocationListBuilder().issuer_name(authority.certificate.subject)
    builder = builder.last_update(now + begins_in).next_update(now + ends_in)
    for certificate in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number).revocation_date(now)
        builder = builder.add_revoked_certificate(entry.build())
    path.write_bytes(builder.sign(authority.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return path


# --------------------------------------------------------------------------- the list


def test_a_revoked_certificate_is_on_the_list_and_others_are_not(site: Site) -> None:
    own, revoked, other = site.host("source"), site.host("destination"), site.host("third")

    written = revocation.revoke(site.directory, revoked.certificate)
    read = revocation.read_list(written.path, own.ca, own.certificate)

    assert written.revoked == 1
    assert read.has(_der(revoked.certificate))
    assert not read.has(_der(other.certificate))
    assert read.next_update == written.next_update


def test_revoking_twice_lists_once_and_every_list_has_a_higher_number(site: Site) -> None:
    first, second = site.host("a"), site.host("b")
    numbers = [_number(site)]

    for files in (first, second, first):
        written = revocation.revoke(site.directory, files.certificate)
        numbers.append(_number(site))

    assert written.revoked == 2
    assert numbers == sorted(set(numbers))
    assert revocation.renew(site.directory, 90).revoked == 2
    assert [path.name for path in site.directory.glob("crl*")] == ["crl.pem"]


def test_a_certificate_of_another_authority_cannot_be_revoked(site: Site, other_site: Site) -> None:
    before = (site.directory / "crl.pem").read_bytes()

    with pytest.raises(IdentityError) as refusal:
        revocation.revoke(site.directory, other_site.host("h").certificate)

    assert refusal.value.code == "wrong_ca"
    assert (site.directory / "crl.pem").read_bytes() == before


def test_a_list_of_another_authority_is_not_carried_on(site: Site, other_site: Site) -> None:
    sign_list(other_site.authority, site.directory / "crl.pem")

    with pytest.raises(IdentityError) as refusal:
        revocation.renew(site.directory)

    assert refusal.value.code == "wrong_ca"


@pytest.mark.parametrize("days", [0, -1, 36_501])
def test_a_list_lives_for_a_time_that_can_be_meant(site: Site, days: int) -> None:
    with pytest.raises(UsageError) as refusal:
        revocation.renew(site.directory, days)

    assert refusal.value.code == "lifetime"


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda site, other, path: path.unlink(), "tls_file_missing"),
        (lambda site, other, path: path.write_bytes(b""), "tls_file_malformed"),
        (lambda site, other, path: path.write_bytes(path.read_bytes()[:200]), "tls_file_malformed"),
        (
            lambda site, other, path: path.write_bytes(b"-----BEGIN X509 CRL-----\nMAAw\n-----END X509 CRL-----\n"),
            "tls_file_malformed",
        ),
        (lambda site, other, path: sign_list(other.authority, path), "wrong_ca"),
        (lambda site, other, path: sign_list(site.authority, path, begins_in=-2 * HOUR, ends_in=-HOUR), "crl_expired"),
        (
            lambda site, other, path: sign_list(site.authority, path, begins_in=HOUR, ends_in=2 * HOUR),
            "crl_not_yet_valid",
        ),
    ],
    ids=["missing", "empty", "cut", "nonsense", "another CA's", "expired", "not yet valid"],
)
def test_a_list_that_cannot_be_used_is_refused_in_one_line_that_names_it(
    site: Site, other_site: Site, spoil: Callable[[Site, Site, Path], object], code: str
) -> None:
    """Loaded silently it would let everybody in, or nobody."""
    files = with_list(site, site.host("source"))
    assert files.crl is not None
    spoil(site, other_site, files.crl)

    for load in (load_identity, server_context, client_context, ServerCredentials):
        with pytest.raises(VmMigrateError) as refusal:
            load(files)
        assert refusal.value.code == code
        assert str(files.crl) in refusal.value.text
        assert "\n" not in refusal.value.text


def test_a_list_that_names_ourselves_is_refused(site: Site) -> None:
    own = site.host("source")
    revocation.revoke(site.directory, own.certificate)

    with pytest.raises(IdentityError) as refusal:
        load_identity(with_list(site, own))

    assert refusal.value.code == "certificate_revoked"


def test_a_list_without_one_of_our_own_authority_is_refused(site: Site, other_site: Site, tmp_path: Path) -> None:
    """Nobody of our CA could be let in with it: trusted are two CAs, the list is of the other."""
    own = site.host("source")
    both = tmp_path / "both.pem"
    both.write_bytes(site.files.certificate.read_bytes() + other_site.files.certificate.read_bytes())
    other_list = sign_list(other_site.authority, tmp_path / "other.pem")

    with pytest.raises(IdentityError) as refusal:
        load_identity(TlsFiles(both, own.certificate, own.key, other_list))
    # Lists of both in one file are fine; the CAs are told apart by key only, for their names are equal.
    other_list.write_bytes(other_list.read_bytes() + (site.directory / "crl.pem").read_bytes())

    assert refusal.value.code == "crl_missing"
    assert load_identity(TlsFiles(both, own.certificate, own.key, other_list)) == SOURCE


def test_a_list_warns_when_a_quarter_of_its_life_is_left(site: Site) -> None:
    own = site.host("source")
    path = sign_list(site.authority, site.directory / "crl.pem", begins_in=-3 * HOUR, ends_in=HOUR)
    read = revocation.read_list(path, own.ca, own.certificate)

    assert not read.ends_soon(read.next_update - 1.01 * HOUR)
    assert read.ends_soon(read.next_update - 0.99 * HOUR)


# --------------------------------------------------------------------------- the doors


async def test_a_revoked_peer_who_connects_is_refused_and_told(site: Site) -> None:
    source, revoked = with_list(site, site.host("source")), site.host("destination")
    revocation.revoke(site.directory, revoked.certificate)
    async with served(ServerCredentials(source).current) as door:
        stream, _ = await connect_tls(LOOPBACK, door.port, revoked, SOURCE, WAIT_S)
        with pytest.raises(trio.BrokenResourceError) as told:
            await stream.receive_some()
        refusal = await door.wait_refusal()
        await trio.aclose_forcefully(stream)

    assert refusal.code == "certificate_revoked"
    assert "CERTIFICATE_REVOKED" in str(told.value.__cause__)


async def test_a_revoked_peer_who_answers_is_refused(site: Site) -> None:
    revoked, client = site.host("source"), with_list(site, site.host("destination"))
    revocation.revoke(site.directory, revoked.certificate)
    async with served(ServerCredentials(revoked).current) as door:
        with pytest.raises(IdentityError) as refusal:
            await connect_tls(LOOPBACK, door.port, client, SOURCE, WAIT_S)

    assert refusal.value.code == "certificate_revoked"


async def test_a_new_certificate_of_a_host_whose_old_one_was_revoked_is_welcome(site: Site) -> None:
    """The key was stolen, not the host."""
    source, stolen, fresh = with_list(site, site.host("source")), site.host("destination"), site.host("destination")
    revocation.revoke(site.directory, stolen.certificate)
    async with served(ServerCredentials(source).current) as door:
        stream, identity = await connect_tls(LOOPBACK, door.port, fresh, SOURCE, WAIT_S)
        assert await stream.receive_some()
        await close_tls(stream)

    assert identity == SOURCE


async def test_a_list_that_expires_while_we_serve_lets_nobody_in_and_says_why(site: Site) -> None:
    source, peer = with_list(site, site.host("source")), site.host("destination")
    assert source.crl is not None
    sign_list(site.authority, source.crl, ends_in=timedelta(seconds=1))
    credentials = ServerCredentials(source)
    async with served(credentials.current) as door:
        await _wait_expiry(source)
        stream, _ = await connect_tls(LOOPBACK, door.port, peer, SOURCE, WAIT_S)
        refusal = await door.wait_refusal()
        await trio.aclose_forcefully(stream)

    assert refusal.code == "crl_expired"


async def _wait_expiry(files: TlsFiles) -> None:
    with trio.fail_after(WAIT_S):
        while True:
            try:
                load_identity(files)
            except IdentityError:
                return
            await trio.sleep(0.05)


# --------------------------------------------------------------------------- who is inside already


async def test_a_reload_ends_the_connections_of_the_revoked_and_of_nobody_else(site: Site) -> None:
    credentials = ServerCredentials(with_list(site, site.host("source")))
    revoked, other = site.host("destination"), site.host("third")
    async with served(credentials.current, echo) as door:
        streams = [await connect_tls(LOOPBACK, door.port, files, SOURCE, WAIT_S) for files in (revoked, other)]
        for stream, _ in streams:
            assert await stream.receive_some()
        revocation.revoke(site.directory, revoked.certificate)

        ended = credentials.reload()

        assert [error.code for error in ended] == ["certificate_revoked"]
        assert str(DESTINATION) in ended[0].text
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(WAIT_S):
            await streams[0][0].receive_some()
        await streams[1][0].send_all(b"still here")
        assert await streams[1][0].receive_some() == b"still here"
        for stream, _ in streams:
            await trio.aclose_forcefully(stream)
    assert credentials.reload() == [], "who has left is not ended again"


async def test_a_channel_fails_with_the_reason_on_the_side_that_learns_of_it(site: Site) -> None:
    """As a channel's failure, so that the migration's record tells it; on the other side the link is cut."""
    credentials = ServerCredentials(with_list(site, site.host("source")))
    revoked = site.host("destination")
    seen = trio.Event()
    errors: list[VmMigrateError] = []

    async def converse(stream: TlsStream, _: object) -> None:
        async with open_channel(stream, phases.Role.SOURCE) as channel:
            seen.set()
            with pytest.raises(IdentityError) as failure:
                await channel.expect(m.Offer, deadline_s=WAIT_S)
            errors.append(failure.value)

    async with served(credentials.current, converse) as door:
        stream, _ = await connect_tls(LOOPBACK, door.port, revoked, SOURCE, WAIT_S)
        await seen.wait()
        revocation.revoke(site.directory, revoked.certificate)
        credentials.reload()
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(WAIT_S):
            await stream.receive_some()
        await trio.aclose_forcefully(stream)

    assert [error.code for error in errors] == ["certificate_revoked"]


async def test_a_connection_that_we_made_ends_when_its_peer_is_revoked(site: Site) -> None:
    credentials = ServerCredentials(with_list(site, site.host("destination")))
    revoked = site.host("source")
    async with served(ServerCredentials(revoked).current) as door:
        stream, _ = await connect_tls(LOOPBACK, door.port, credentials.client(SOURCE), SOURCE, WAIT_S)
        async with open_channel(stream, phases.Role.DESTINATION) as channel:
            revocation.revoke(site.directory, revoked.certificate)
            credentials.reload()
            with pytest.raises(IdentityError) as failure:
                await channel.expect(m.Select, deadline_s=WAIT_S)
        await trio.aclose_forcefully(stream)

    assert failure.value.code == "certificate_revoked"


@pytest.mark.parametrize("transport", [SEALED, TLS])
async def test_a_bulk_stream_of_a_revoked_peer_is_shut_down(site: Site, transport: str) -> None:
    """Also when it has left TLS, and with it the certificate."""
    credentials = ServerCredentials(with_list(site, site.host("source")))
    revoked = site.host("destination")
    async with (
        open_door(credentials) as opened,
    ):
        with opened.door.expect(secrets_of(), DESTINATION, 1, transport) as appointment:
            tls = await trio.to_thread.run_sync(_hello, opened.port, revoked)
            (link,) = await opened.door.collect(appointment)
        revocation.revoke(site.directory, revoked.certificate)

        ended = credentials.reload()

        with pytest.raises(VmMigrateError):
            link.send(b"!")
        link.close()
        tls.close()
    assert [error.code for error in ended] == ["certificate_revoked"]


def _hello(port: int, files: TlsFiles) -> TlsLink:
    tls, _ = connect_blocking(LOOPBACK, port, client_context(files), SOURCE, WAIT_S)
    tls.sendall(proven(HELLO_0))
    tls.recv(64)
    return TlsLink(tls, "source")


def test_who_enters_after_the_reload_is_held_against_the_new_list(site: Site) -> None:
    """The handshake may have begun before it."""
    own, revoked = site.host("source"), _der(site.host("destination").certificate)
    (site.directory / "leaf.pem").write_bytes(_pem(revoked))
    revocation.revoke(site.directory, site.directory / "leaf.pem")
    peers = LivePeers()
    leave = peers.enter(revoked, lambda _: None)
    leave()
    peers.apply(revocation.read_list(site.directory / "crl.pem", own.ca, own.certificate))

    with pytest.raises(IdentityError) as refusal:
        peers.enter(revoked, lambda _: None)

    assert refusal.value.code == "certificate_revoked"
    assert peers.apply(None) == []
    peers.enter(revoked, lambda _: None)()


def test_the_latest_connection_is_ended_first(site: Site) -> None:
    """A channel lies upon a stream: it has to know the reason before the stream is cut under it."""
    own, files = site.host("source"), site.host("destination")
    revocation.revoke(site.directory, files.certificate)
    peers, order = LivePeers(), list[str]()
    peers.enter(_der(files.certificate), lambda _: order.append("stream"))
    peers.enter(_der(files.certificate), lambda _: order.append("channel"))

    peers.apply(revocation.read_list(site.directory / "crl.pem", own.ca, own.certificate))

    assert order == ["channel", "stream"]


def test_threads_come_and_go_while_lists_are_applied(site: Site) -> None:
    own, files = site.host("source"), site.host("destination")
    certificate = _der(files.certificate)
    listed = revocation.read_list(site.directory / "crl.pem", own.ca, own.certificate)
    peers = LivePeers()

    def come_and_go() -> None:
        for _ in range(200):
            peers.enter(certificate, lambda _: None)()

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        assert peers.apply(listed) == []
    for thread in threads:
        thread.join()
    assert peers._inside == {}


async def test_bad_files_at_a_reload_change_nothing(site: Site) -> None:
    files = with_list(site, site.host("source"))
    credentials = ServerCredentials(files, SOURCE)
    before = credentials.current()
    assert files.crl is not None
    good = files.crl.read_bytes()
    files.crl.write_bytes(b"")

    with pytest.raises(UsageError):
        credentials.reload()

    assert credentials.current() is before
    files.crl.write_bytes(good)
    credentials.reload()
    assert credentials.current() is not before


async def test_a_reload_cannot_make_another_host_of_us(site: Site) -> None:
    """Every journal, ticket and migration names this host."""
    files, other = site.host("source"), site.host("third")
    credentials = ServerCredentials(files, SOURCE)
    files.certificate.write_bytes(other.certificate.read_bytes())
    files.key.write_bytes(other.key.read_bytes())

    with pytest.raises(IdentityError) as refusal:
        credentials.reload()

    assert refusal.value.code == "wrong_host"
    assert credentials.current().own == SOURCE


def _der(path: Path) -> bytes:
    return x509.load_pem_x509_certificate(path.read_bytes()).public_bytes(serialization.Encoding.DER)


def _pem(der: bytes) -> bytes:
    return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)


def _number(site: Site) -> int:
    listed = x509.load_pem_x509_crl((site.directory / "crl.pem").read_bytes())
    return listed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


def test_every_role_can_be_revoked(site: Site) -> None:
    own = site.host("source")
    for role in Role:
        revocation.revoke(site.directory, site.party(role, "x").certificate)

    assert len(revocation.read_list(site.directory / "crl.pem", own.ca, own.certificate).revoked) == len(Role)
