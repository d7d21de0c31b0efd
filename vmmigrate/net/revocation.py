"""Revoked certificates: the list that a CA signs, who reads it, and what happens to those who are connected already.

OpenSSL looks at a revocation list during handshakes only: a connection that is open stays usable for as long as it
lasts, and a migration lasts. So everybody who is connected stands in `LivePeers` with the certificate that was shown,
and a new list ends those who are on it. Nobody slips through between the two: whoever enters is held against the list
that is in force at that moment, which may be newer than the one of the handshake.

A list that has expired makes OpenSSL refuse everybody, and it is right to: whoever can keep a newer list away could
otherwise keep a revoked certificate alive. `RevocationList.ends_in` exists so that somebody is warned before.

Source: RFC 5280 section 5; reference/dependencies.md 5.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

from vmmigrate.errors import IdentityError, UsageError
from vmmigrate.net import pki
from vmmigrate.net.identity import Identity, identity_of_certificate

DEFAULT_LIST_DAYS: Final = 30

# Issuer (DER) and serial number name one certificate among all.
CertificateName: TypeAlias = tuple[bytes, int]

_SIGNING_KEYS = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey
_PEM_BLOCK = re.compile(rb"-----BEGIN X509 CRL-----.*?-----END X509 CRL-----", re.DOTALL)


@dataclass(frozen=True)
class RevocationList:
    """What one file of revocation lists says, checked.

    Attributes:
        next_update: When the first of its lists expires; from then on nobody is let in.
    """

    path: Path
    revoked: frozenset[CertificateName]
    this_update: datetime
    next_update: datetime

    def has(self, certificate: bytes) -> bool:
        """Whether *certificate* (DER) was revoked."""
        return _name_of(x509.load_der_x509_certificate(certificate)) in self.revoked

    def ends_in(self, now: datetime) -> timedelta:
        return self.next_update - now

    def ends_soon(self, now: datetime) -> bool:
        """Whether it is time to warn: less than a quarter of the list's life is left."""
        return self.ends_in(now) < (self.next_update - self.this_update) / 4


def read_list(path: Path, ca: Path, certificate: Path) -> RevocationList:
    """The lists in *path*, after checking that they can be used: signed by the CA, valid now, and not of ourselves.

    Args:
        ca: The CAs that are trusted. certificate: Our own, leaf first; its intermediates may sign lists, too.

    Raises:
        UsageError: `tls_file_missing`, `tls_file_unreadable`, `tls_file_malformed`.
        IdentityError: `wrong_ca`, `crl_missing` (none of the CA that issued our own certificate), `crl_expired`,
            `crl_not_yet_valid`, `certificate_revoked` (our own).
    """
    leaf, *intermediates = pki.load_certificates(certificate, "certificate")
    issuers = [*pki.load_certificates(ca, "CA certificate"), *intermediates]
    lists = _load_lists(path)
    signers = [_signer(path, one, issuers) for one in lists]
    for one in lists:
        _check_time(path, one)
    # By key, not by name: the CAs that `vmmigrate pki` makes are all of one name.
    if not any(pki.has_issued(signer, leaf) for signer in signers):
        raise IdentityError(f"{path}: no revocation list of the CA that issued {certificate}", code="crl_missing")
    revoked = frozenset((_der(one.issuer), entry.serial_number) for one in lists for entry in one)
    if _name_of(leaf) in revoked:
        raise IdentityError(
            f"{certificate}: revoked by {path}: needed is a new certificate", code="certificate_revoked"
        )
    return RevocationList(
        path, revoked, max(one.last_update_utc for one in lists), min(_next_update(path, one) for one in lists)
    )


def _load_lists(path: Path) -> list[x509.CertificateRevocationList]:
    content = pki.read_tls_file(path, "revocation list")
    try:
        lists = [x509.load_pem_x509_crl(block) for block in _PEM_BLOCK.findall(content)]
        if lists:
            return lists
    except ValueError:
        pass
    raise UsageError(
        f"{path}: not a revocation list: needed is a PEM file with an X.509 CRL", code="tls_file_malformed"
    )


def _signer(
    path: Path, revocations: x509.CertificateRevocationList, issuers: Sequence[x509.Certificate]
) -> x509.Certificate:
    """Which of *issuers* has signed it."""
    for issuer in issuers:
        key = issuer.public_key()
        is_named = issuer.subject == revocations.issuer and isinstance(key, _SIGNING_KEYS)
        if is_named and revocations.is_signature_valid(key):  # type: ignore[arg-type]  # as checked
            return issuer
    raise IdentityError(
        f"{path}: not signed by a CA that this host trusts: needed is a list of that CA", code="wrong_ca"
    )


def _check_time(path: Path, revocations: x509.CertificateRevocationList) -> None:
    now = datetime.now(UTC)
    first, last = revocations.last_update_utc, _next_update(path, revocations)
    if now > last:
        raise IdentityError(
            f"{path}: the revocation list expired on {last:%Y-%m-%d %H:%M:%S} UTC: needed is a newer one",
            code="crl_expired",
        )
    if now < first:
        raise IdentityError(
            f"{path}: the revocation list is not valid before {first:%Y-%m-%d %H:%M:%S} UTC", code="crl_not_yet_valid"
        )


def _next_update(path: Path, revocations: x509.CertificateRevocationList) -> datetime:
    if revocations.next_update_utc is None:
        raise UsageError(
            f"{path}: a revocation list that never expires: it needs a nextUpdate", code="tls_file_malformed"
        )
    return revocations.next_update_utc


def _name_of(certificate: x509.Certificate) -> CertificateName:
    return _der(certificate.issuer), certificate.serial_number


def _der(name: x509.Name) -> bytes:
    return name.public_bytes()


# --------------------------------------------------------------------------- who is connected

End: TypeAlias = Callable[[IdentityError], None]


class LivePeers:
    """Everybody who is connected, by certificate, and what ends the connection. Threads may enter and leave."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._inside: dict[int, tuple[bytes, End]] = {}
        self._revocations: RevocationList | None = None

    def enter(self, certificate: bytes, end: End) -> Callable[[], None]:
        """Note a connection: *end* is called when *certificate* is revoked, until the returned function is called.

        Raises: IdentityError `certificate_revoked`: it is already.
        """
        with self._lock:
            if self._revocations is not None and self._revocations.has(certificate):
                raise _revoked(certificate)
            number = next(self._numbers)
            self._inside[number] = (certificate, end)

        def leave() -> None:
            with self._lock:
                self._inside.pop(number, None)

        return leave

    def apply(self, revocations: RevocationList | None) -> list[IdentityError]:
        """From now on *revocations* counts; who is on it is ended, the latest first. One error for each that was."""
        with self._lock:
            self._revocations = revocations
            if revocations is None:
                return []
            out = [number for number, (certificate, _) in self._inside.items() if revocations.has(certificate)]
            ended = [self._inside.pop(number) for number in reversed(out)]
        errors = []
        for certificate, end in ended:
            error = _revoked(certificate)
            end(error)
            errors.append(error)
        return errors


def _revoked(certificate: bytes) -> IdentityError:
    return IdentityError(f"the certificate of {_whose(certificate)} was revoked", code="certificate_revoked")


def _whose(certificate: bytes) -> Identity | str:
    try:
        return identity_of_certificate(certificate)
    except IdentityError:
        return "the peer"


# --------------------------------------------------------------------------- the CA's side


@dataclass(frozen=True)
class WrittenList:
    """What `revoke` and `renew` left on disk."""

    path: Path
    revoked: int
    next_update: datetime

    def as_dict(self) -> dict[str, Any]:
        return {"crl": str(self.path), "revoked": self.revoked, "next_update": self.next_update.isoformat()}


def revoke(directory: Path, certificate: Path, lifetime_days: int = DEFAULT_LIST_DAYS) -> WrittenList:
    """Put *certificate* on the list `crl.pem` of the CA in *directory*; a list that is not there yet is made.

    Idempotent. The list is replaced whole, or not at all.

    Raises:
        UsageError: `no_authority`; `tls_file_*`, about *certificate* or the old list; `lifetime`; `cannot_write`.
        IdentityError: `wrong_ca`: another CA issued it, or signed the old list.
    """
    authority = pki.load_authority(directory)
    leaf = pki.load_certificates(certificate, "certificate")[0]
    if not pki.has_issued(authority.certificate, leaf):
        raise IdentityError(f"{certificate}: not issued by the CA in {directory}", code="wrong_ca")
    return _rewrite(directory, authority, lifetime_days, leaf.serial_number)


def renew(directory: Path, lifetime_days: int = DEFAULT_LIST_DAYS) -> WrittenList:
    """Write the list `crl.pem` anew with the same entries, or an empty one. Raises: as `revoke`."""
    return _rewrite(directory, pki.load_authority(directory), lifetime_days, None)


def _rewrite(directory: Path, authority: pki.Authority, lifetime_days: int, serial: int | None) -> WrittenList:
    path = directory / "crl.pem"
    now = datetime.now(UTC).replace(microsecond=0)
    number, entries = _entries_of(path, authority)
    if serial is not None and serial not in [entry.serial_number for entry in entries]:
        builder = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now)
        entries.append(builder.build())
    signed = _sign(authority, entries, number + 1, now, now + pki.lifetime(lifetime_days))
    _replace(path, signed.public_bytes(serialization.Encoding.PEM))
    return WrittenList(path, len(entries), now + pki.lifetime(lifetime_days))


def _entries_of(path: Path, authority: pki.Authority) -> tuple[int, list[x509.RevokedCertificate]]:
    """Number and entries of the list so far; an expired one counts, one of another CA is refused."""
    if not path.exists():
        return 0, []
    old, *others = _load_lists(path)
    if others:
        raise UsageError(f"{path}: holds several lists, which cannot be rewritten", code="exists")
    _signer(path, old, [authority.certificate])
    try:
        number = old.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except x509.ExtensionNotFound:
        number = 0
    return number, list(old)


def _sign(
    authority: pki.Authority,
    entries: Iterable[x509.RevokedCertificate],
    number: int,
    now: datetime,
    next_update: datetime,
) -> x509.CertificateRevocationList:
    issuer_id = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(now - pki.BACKDATE)
        .next_update(next_update)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id), critical=False)
        .add_extension(x509.CRLNumber(number), critical=False)
    )
    for entry in entries:
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(authority.key, hashes.SHA256())


def _replace(path: Path, content: bytes) -> None:
    """A daemon that reads while this runs sees the old list or the new one, never half of one."""
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    try:
        with open(fresh, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as exc:
        fresh.unlink(missing_ok=True)
        raise UsageError(f"{path}: cannot write: {exc.strerror}", code="cannot_write") from exc
