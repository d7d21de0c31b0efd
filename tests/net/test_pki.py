"""What the CA mints, and what it does to the disk."""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from vmmigrate.errors import IdentityError, UsageError
from vmmigrate.net import pki
from vmmigrate.net.identity import Identity, Role
from vmmigrate.net.tls import TlsFiles, load_identity

from .conftest import TRUST_DOMAIN, host_identity


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    pki.init_authority(tmp_path / "ca", TRUST_DOMAIN)
    return tmp_path / "ca"


@pytest.fixture
def no_umask() -> Iterator[None]:
    old = os.umask(0)
    yield
    os.umask(old)


def test_the_authority_can_sign_leaves_and_nothing_below_them(directory: Path) -> None:
    certificate = x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes())
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)

    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert usage.value.crl_sign
    assert not usage.value.digital_signature
    assert certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)


def test_the_authority_remembers_its_trust_domain(directory: Path) -> None:
    assert pki.load_authority(directory).trust_domain == TRUST_DOMAIN


def test_a_leaf_names_its_party_in_one_critical_uri_and_has_no_subject(directory: Path) -> None:
    files = pki.issue(directory, host_identity("h1"), ["h1.example"], ["127.0.0.1", "::1"])
    leaf = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    ca = x509.load_pem_x509_certificate(files.ca.read_bytes())

    assert leaf.subject == x509.Name([])
    assert names.critical
    assert names.value.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://site.example/host/h1"]
    assert names.value.get_values_for_type(x509.DNSName) == ["h1.example"]
    assert [str(ip) for ip in names.value.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    assert set(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == {
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    }
    authority_id = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    assert authority_id == ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    leaf.verify_directly_issued_by(ca)


def test_a_leaf_is_valid_at_once_also_where_clocks_are_a_little_behind(directory: Path) -> None:
    files = pki.issue(directory, host_identity("h1"), lifetime_days=7)
    leaf = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    now = datetime.now(UTC)

    assert leaf.not_valid_before_utc <= now - timedelta(minutes=4)
    assert timedelta(days=6) < leaf.not_valid_after_utc - now <= timedelta(days=7)


def test_issued_files_are_what_tls_wants(directory: Path) -> None:
    for role in Role:
        identity = Identity(TRUST_DOMAIN, role, f"the-{role.value}")
        files = pki.issue(directory, identity)

        assert load_identity(TlsFiles(files.ca, files.certificate, files.key)) == identity


@pytest.mark.usefixtures("no_umask")
def test_keys_are_private_whatever_the_umask(tmp_path: Path) -> None:
    authority = pki.init_authority(tmp_path / "ca", TRUST_DOMAIN)
    files = pki.issue(tmp_path / "ca", host_identity("h1"))

    assert [_mode(path) for path in (authority.key, files.key)] == [0o600, 0o600]
    assert [_mode(path) for path in (authority.certificate, files.certificate)] == [0o644, 0o644]
    assert _mode(tmp_path / "ca") == 0o700


def test_keys_are_private_from_their_first_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chmod after the creation would leave a moment in which anybody can open the file."""
    opened: list[tuple[str, int, int]] = []
    real_open = os.open

    def recording_open(path: str | Path, flags: int, mode: int = 0o777) -> int:
        opened.append((Path(path).name, flags, mode))
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", recording_open)
    pki.init_authority(tmp_path / "ca", TRUST_DOMAIN)
    monkeypatch.undo()

    assert [(name, mode) for name, _, mode in opened] == [("ca-key.pem", 0o600), ("ca.pem", 0o644)]
    assert all(flags & os.O_EXCL for _, flags, _ in opened)


def test_an_authority_is_never_overwritten(directory: Path) -> None:
    before = _contents(directory)

    with pytest.raises(UsageError) as caught:
        pki.init_authority(directory, TRUST_DOMAIN)

    assert caught.value.code == "exists"
    assert str(directory / "ca-key.pem") in caught.value.text
    assert _contents(directory) == before


@pytest.mark.parametrize("occupied", ["h1.pem", "h1-key.pem"])
def test_a_certificate_is_never_overwritten_and_half_a_pair_is_never_left(directory: Path, occupied: str) -> None:
    (directory / occupied).write_text("precious")
    before = _contents(directory)

    with pytest.raises(UsageError) as caught:
        pki.issue(directory, host_identity("h1"))

    assert caught.value.code == "exists"
    assert _contents(directory) == before


def test_a_key_is_not_written_through_a_link(directory: Path, tmp_path: Path) -> None:
    (directory / "h1-key.pem").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(UsageError, match="exists already"):
        pki.issue(directory, host_identity("h1"))

    assert not (tmp_path / "elsewhere").exists()


def test_certificates_go_where_they_are_wanted(directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()

    files = pki.issue(directory, host_identity("h1"), out=out)

    assert (files.certificate, files.key) == (out / "h1.pem", out / "h1-key.pem")
    assert files.ca == directory / "ca.pem"


def test_a_directory_that_is_not_there_is_named(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no-such-place") as caught:
        pki.issue(directory, host_identity("h1"), out=tmp_path / "no-such-place")

    assert caught.value.code == "cannot_write"


def test_a_file_is_no_directory_for_an_authority(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(UsageError) as caught:
        pki.init_authority(tmp_path / "file", TRUST_DOMAIN)

    assert caught.value.code == "cannot_write"


def test_an_identity_of_another_trust_domain_is_not_issued(directory: Path) -> None:
    with pytest.raises(IdentityError) as caught:
        pki.issue(directory, Identity("elsewhere.example", Role.HOST, "h1"))

    assert caught.value.code == "foreign_trust_domain"
    assert TRUST_DOMAIN in caught.value.text
    assert not (directory / "h1.pem").exists()


@pytest.mark.parametrize("days", [0, -1, 4000, 10**9])
def test_a_leaf_does_not_outlive_its_authority(directory: Path, days: int) -> None:
    with pytest.raises(UsageError) as caught:
        pki.issue(directory, host_identity("h1"), lifetime_days=days)

    assert caught.value.code == "lifetime"
    assert "allowed are" in caught.value.text


@pytest.mark.parametrize("name", ["", "a b", "ä.example", "-x", "x" * 300, "a..b"])
def test_a_bad_dns_name_is_refused(directory: Path, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        pki.issue(directory, host_identity("h1"), dns_names=[name])

    assert caught.value.code == "bad_dns_name"
    assert not (directory / "h1.pem").exists()


def test_a_bad_address_is_refused(directory: Path) -> None:
    with pytest.raises(UsageError) as caught:
        pki.issue(directory, host_identity("h1"), ip_addresses=["300.1.1.1"])

    assert caught.value.code == "bad_ip_address"


@pytest.mark.parametrize("trust_domain", ["", "Site.example", "a/b", "x" * 256])
def test_a_bad_trust_domain_makes_no_authority(tmp_path: Path, trust_domain: str) -> None:
    with pytest.raises(IdentityError) as caught:
        pki.init_authority(tmp_path / "ca", trust_domain)

    assert caught.value.code == "bad_uri"
    assert not (tmp_path / "ca").exists()


def test_what_is_no_authority_is_named(directory: Path, tmp_path: Path) -> None:
    stranger = pki.make_authority("elsewhere.example")
    stranger_key = stranger.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    leaf = pki.issue(directory, host_identity("h1"))
    spoilt = {
        "ca.pem": [None, b"junk", leaf.certificate.read_bytes()],
        "ca-key.pem": [None, b"junk", stranger_key],
    }
    good = {name: (directory / name).read_bytes() for name in spoilt}

    for name, contents in spoilt.items():
        for content in contents:
            (directory / name).unlink()
            if content is not None:
                (directory / name).write_bytes(content)
            with pytest.raises(UsageError, match="vmmigrate pki init") as caught:
                pki.issue(directory, host_identity("h2"))
            assert caught.value.code == "no_authority"
            (directory / name).write_bytes(good[name])


def test_a_leaf_as_authority_names_no_trust_domain(directory: Path, tmp_path: Path) -> None:
    leaf = pki.issue(directory, host_identity("h1"))
    (tmp_path / "ca.pem").write_bytes(leaf.certificate.read_bytes())
    (tmp_path / "ca-key.pem").write_bytes(leaf.key.read_bytes())

    with pytest.raises(UsageError, match="names no trust domain"):
        pki.load_authority(tmp_path)


def test_the_interpreters_tls_accepts_both(directory: Path) -> None:
    files = pki.issue(directory, host_identity("h1"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

    context.load_verify_locations(files.ca)
    context.load_cert_chain(files.certificate, files.key)

    assert len(context.get_ca_certs()) == 1


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
