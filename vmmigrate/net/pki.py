"""A certificate authority for small sites, and the check of certificate files, whoever issued them.

One CA, leaf certificates for hosts, orchestrators and operators.

The CA keeps its trust domain in its own certificate, as the URI `spiffe://<trust domain>`, so that whoever issues needs
nothing but the directory. Files, all PEM: `ca.pem`, `ca-key.pem`, `<name>.pem`, `<name>-key.pem`.

A key file is created with O_EXCL and mode 0600, never created first and restricted after: in between anybody could
open it. Nothing is ever overwritten, because a lost CA key cannot be had back; a half-written set is removed again.

Source: reference/dependencies.md 5 (what Python's ssl accepts); RFC 5280 (empty subject needs a critical subject
alternative name, key identifiers); OpenSSL's X509 strict checks, which `net.tls` switches on.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from vmmigrate.errors import IdentityError, UsageError
from vmmigrate.net.identity import Identity, check_trust_domain, identity_of_certificate

DEFAULT_AUTHORITY_DAYS: Final = 3650
DEFAULT_LEAF_DAYS: Final = 90
MAX_LIFETIME_DAYS: Final = 36_500

# Clocks of hosts differ a little; a certificate must work at once everywhere.
BACKDATE: Final = timedelta(minutes=5)

_DNS_NAME = re.compile(r"(?:\*\.)?(?:[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.?)+", re.ASCII)
_MAX_DNS_NAME_CHARS: Final = 253
_SPIFFE: Final = "spiffe://"


@dataclass(frozen=True)
class Authority:
    """A CA that can sign. Holds its private key in memory."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    trust_domain: str


@dataclass(frozen=True)
class Leaf:
    """A certificate and its private key, not yet on disk."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def certificate_pem(self) -> bytes:
        return _certificate_pem(self.certificate)

    def key_pem(self) -> bytes:
        return _key_pem(self.key)


@dataclass(frozen=True)
class AuthorityFiles:
    """Where `init_authority` put what."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class IssuedFiles:
    """Where `issue` put what, and the CA certificate that goes with it."""

    ca: Path
    certificate: Path
    key: Path


def init_authority(directory: Path, trust_domain: str, lifetime_days: int = DEFAULT_AUTHORITY_DAYS) -> AuthorityFiles:
    """Mint a CA for *trust_domain* into *directory*, which is created (mode 0700) if it is missing.

    After a failure neither file exists, unless it existed before.

    Raises:
        IdentityError: `bad_uri`, the trust domain is malformed.
        UsageError: `lifetime`; `exists`; `cannot_write`.
    """
    authority = make_authority(trust_domain, lifetime_days=lifetime_days)
    files = AuthorityFiles(directory / "ca.pem", directory / "ca-key.pem")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise UsageError(f"{directory}: cannot make this directory: {exc.strerror}", code="cannot_write") from exc
    _create_all(
        [
            (files.key, _key_pem(authority.key), 0o600),
            (files.certificate, _certificate_pem(authority.certificate), 0o644),
        ]
    )
    return files


def issue(
    directory: Path,
    identity: Identity,
    dns_names: Sequence[str] = (),
    ip_addresses: Sequence[str] = (),
    lifetime_days: int = DEFAULT_LEAF_DAYS,
    out: Path | None = None,
) -> IssuedFiles:
    """Issue a certificate for *identity*, signed by the CA in *directory*, into *out* (default: the same directory).

    After a failure neither file exists, unless it existed before.

    Raises:
        IdentityError: `foreign_trust_domain`, the CA is of another trust domain.
        UsageError: `no_authority`; `lifetime`, too long or longer than the CA's; `bad_dns_name`; `bad_ip_address`;
            `exists`; `cannot_write`.
    """
    authority = load_authority(directory)
    if identity.trust_domain != authority.trust_domain:
        raise IdentityError(
            f"{identity} is of another trust domain than the CA in {directory}: allowed is {authority.trust_domain}",
            code="foreign_trust_domain",
        )
    now = _now()
    not_after = now + lifetime(lifetime_days)
    last = authority.certificate.not_valid_after_utc
    if not_after > last:
        raise UsageError(
            f"the CA in {directory} ends on {last:%Y-%m-%d}, before the certificate would:"
            f" allowed are {max(0, (last - now).days)} days",
            code="lifetime",
        )
    leaf = make_leaf(
        authority, [identity.uri], now - BACKDATE, not_after, dns_names=dns_names, ip_addresses=ip_addresses
    )
    folder = out or directory
    files = IssuedFiles(directory / "ca.pem", folder / f"{identity.name}.pem", folder / f"{identity.name}-key.pem")
    _create_all([(files.key, leaf.key_pem(), 0o600), (files.certificate, leaf.certificate_pem(), 0o644)])
    return files


def load_authority(directory: Path) -> Authority:
    """The CA that `init_authority` left in *directory*.

    Raises:
        UsageError: `no_authority`, with the file and what is wrong with it.
    """
    certificate_path, key_path = directory / "ca.pem", directory / "ca-key.pem"
    try:
        certificate = x509.load_pem_x509_certificate(_read(certificate_path))
    except ValueError as exc:
        raise _no_authority(certificate_path, "is no PEM certificate") from exc
    try:
        key = serialization.load_pem_private_key(_read(key_path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise _no_authority(key_path, "is no unencrypted PEM private key") from exc
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise _no_authority(key_path, f"does not belong to {certificate_path}")
    return Authority(certificate, key, _trust_domain_of(certificate, certificate_path))


def make_authority(trust_domain: str, *, lifetime_days: int = DEFAULT_AUTHORITY_DAYS) -> Authority:
    """A new CA in memory. Raises IdentityError (`bad_uri`), UsageError (`lifetime`)."""
    check_trust_domain(trust_domain)
    now = _now()
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vmmigrate CA")])
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(_SPIFFE + trust_domain)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + lifetime(lifetime_days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate, key, trust_domain)


def make_leaf(
    authority: Authority,
    uris: Sequence[str],
    not_before: datetime,
    not_after: datetime,
    *,
    dns_names: Sequence[str] = (),
    ip_addresses: Sequence[str] = (),
) -> Leaf:
    """A leaf certificate in memory, with these URIs exactly: also none, several, or malformed ones.

    Pure but for the random key and serial number. Tests use it to make what `issue` would refuse to.

    Raises:
        UsageError: `bad_dns_name`, `bad_ip_address`.
    """
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
    names += [_dns_name(name) for name in dns_names]
    names += [_ip_address(address) for address in ip_addresses]
    key = ec.generate_private_key(ec.SECP256R1())
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    issuer_id = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    return Leaf(builder.sign(authority.key, hashes.SHA256()), key)


def write_leaf(leaf: Leaf, certificate: Path, key: Path) -> None:
    """Put *leaf* on disk; both files or none. Raises UsageError (`exists`, `cannot_write`)."""
    _create_all([(key, leaf.key_pem(), 0o600), (certificate, leaf.certificate_pem(), 0o644)])


def check_leaf_files(ca: Path, certificate: Path, key: Path) -> Identity:
    """Whom *certificate* belongs to, after checking that the three files fit together and are valid now.

    Raises:
        UsageError: `tls_file_missing`, `tls_file_unreadable`, `tls_file_malformed`, `tls_key_mismatch`.
        IdentityError: `certificate_expired`, `certificate_not_yet_valid`, `wrong_ca`, and as `identity_of_certificate`.
    """
    authorities = load_certificates(ca, "CA certificate")
    chain = load_certificates(certificate, "certificate")
    _check_key(key, certificate, chain[0])
    _check_validity(certificate, chain[0])
    if not any(has_issued(issuer, chain[0]) for issuer in [*chain[1:], *authorities]):
        raise IdentityError(
            f"{certificate}: not issued by the CA in {ca}: needed is a certificate of that CA", code="wrong_ca"
        )
    try:
        return identity_of_certificate(chain[0].public_bytes(serialization.Encoding.DER))
    except IdentityError as exc:
        raise IdentityError(f"{certificate}: {exc.text}", code=exc.code) from exc


def load_certificates(path: Path, what: str) -> list[x509.Certificate]:
    """All certificates of a PEM file. Raises: UsageError: as `read_tls_file`; `tls_file_malformed`."""
    content = read_tls_file(path, what)
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError as exc:
        raise UsageError(
            f"{path}: not a {what}: needed is a PEM file with an X.509 certificate", code="tls_file_malformed"
        ) from exc


def _check_key(path: Path, certificate_path: Path, certificate: x509.Certificate) -> None:
    content = read_tls_file(path, "private key")
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise UsageError(
            f"{path}: not a private key: needed is an unencrypted PEM private key", code="tls_file_malformed"
        ) from exc
    if key.public_key() != certificate.public_key():
        raise UsageError(
            f"{path}: not the key of {certificate_path}: needed are a certificate and its own key",
            code="tls_key_mismatch",
        )


def _check_validity(path: Path, certificate: x509.Certificate) -> None:
    now = datetime.now(UTC)
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > last:
        raise IdentityError(
            f"{path}: expired on {last:%Y-%m-%d %H:%M:%S} UTC: needed is a certificate that is valid now",
            code="certificate_expired",
        )
    if now < first:
        raise IdentityError(
            f"{path}: not valid before {first:%Y-%m-%d %H:%M:%S} UTC: needed is a certificate that is valid now",
            code="certificate_not_yet_valid",
        )


def has_issued(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    """Whether the key of *issuer* has signed *certificate*."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def read_tls_file(path: Path, what: str) -> bytes:
    """The content of a file of keys or certificates. Raises: UsageError `tls_file_missing`, `tls_file_unreadable`."""
    try:
        return path.read_bytes()
    except FileNotFoundError as exc:
        raise UsageError(f"{path}: no such {what} file: needed is a PEM file", code="tls_file_missing") from exc
    except OSError as exc:
        raise UsageError(
            f"{path}: {what} cannot be read ({exc.strerror}): needed is a PEM file that this user may read",
            code="tls_file_unreadable",
        ) from exc


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _dns_name(name: str) -> x509.DNSName:
    if len(name) > _MAX_DNS_NAME_CHARS or not _DNS_NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no DNS name: allowed is for example host1.example.org", code="bad_dns_name")
    return x509.DNSName(name)


def _ip_address(address: str) -> x509.IPAddress:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError as exc:
        raise UsageError(
            f"{address!r} is no IP address: allowed is for example 192.0.2.7 or 2001:db8::7",
            code="bad_ip_address",
        ) from exc


def _trust_domain_of(certificate: x509.Certificate, path: Path) -> str:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        trust_domain = uri.removeprefix(_SPIFFE)
        check_trust_domain(trust_domain)
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, IdentityError) as exc:
        raise _no_authority(path, f"names no trust domain (one URI, {_SPIFFE}<trust domain>)") from exc
    return trust_domain


def _no_authority(path: Path, why: str) -> UsageError:
    return UsageError(f"{path} {why}: needed is what `vmmigrate pki init` made", code="no_authority")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise _no_authority(path, f"cannot be read ({exc.strerror})") from exc


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def lifetime(days: int) -> timedelta:
    """*days*, which must be a number that can be meant. Raises: UsageError `lifetime`."""
    if not 1 <= days <= MAX_LIFETIME_DAYS:
        raise UsageError(f"a lifetime of {days} days: allowed are 1 to {MAX_LIFETIME_DAYS}", code="lifetime")
    return timedelta(days=days)


def _certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _create_all(files: Sequence[tuple[Path, bytes, int]]) -> None:
    """Create every (path, content, mode), or none of them."""
    created: list[Path] = []
    try:
        for path, content, mode in files:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            created.append(path)
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
    except OSError as exc:
        for done in created:
            done.unlink(missing_ok=True)
        if isinstance(exc, FileExistsError):
            raise UsageError(
                f"{path} exists already and is not overwritten: move it away or choose another name or directory",
                code="exists",
            ) from exc
        raise UsageError(f"{path}: cannot write: {exc.strerror}", code="cannot_write") from exc
