"""Who the peer is, and what it may ask for.

A certificate says who somebody is in exactly one place: its only URI in the subject alternative name,

    spiffe://<trust domain>/host/<id>
    spiffe://<trust domain>/orchestrator/<id>
    spiffe://<trust domain>/operator/<name>

DNS names and addresses in a certificate serve browsers and curl; no decision here looks at them. A certificate with two
URIs is refused rather than searched for a fitting one, because whoever picks decides.

What a role may do is the one table `ALLOWED`; what is not in it is denied. The table cannot know whether a host is
the *peer of that migration*: the daemon checks that afterwards, for `SIDE` and `SIDE_SETTLE`.

This module imports neither ssl nor, until it is handed DER, cryptography: the command line starts without them.

Source: design.md 4.7; the SPIFFE ID and X.509-SVID standards (one URI, lower-case trust domain, allowed letters).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from vmmigrate.errors import IdentityError

MAX_TRUST_DOMAIN_CHARS: Final = 255
MAX_NAME_CHARS: Final = 64
MAX_URI_CHARS: Final = len("spiffe://") + MAX_TRUST_DOMAIN_CHARS + len("/orchestrator/") + MAX_NAME_CHARS

# A stranger's text is quoted in our errors and logs, but never more of it than this.
_QUOTED_CHARS: Final = 120

_TRUST_DOMAIN = re.compile(r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)

FORM: Final = "spiffe://<trust domain>/host/<id>, .../orchestrator/<id> or .../operator/<name>"


class Role(Enum):
    """What kind of party a certificate belongs to. The value is the word in the URI."""

    HOST = "host"
    ORCHESTRATOR = "orchestrator"
    OPERATOR = "operator"


class Call(Enum):
    """Everything that can be asked of a daemon, as far as rights differ."""

    INSTANCE_READ = "instance_read"
    INSTANCE_WRITE = "instance_write"
    MIGRATE = "migrate"
    MIGRATION_READ = "migration_read"
    MIGRATION_CANCEL = "migration_cancel"
    MIGRATION_ADJUST = "migration_adjust"
    SIDE = "side"
    SIDE_SETTLE = "side_settle"
    SUPERSEDE = "supersede"
    RESOLVE = "resolve"
    MIGRATION_PROTOCOL = "migration_protocol"
    BULK = "bulk"


_COMMANDS: Final = frozenset(
    {
        Call.INSTANCE_READ,
        Call.INSTANCE_WRITE,
        Call.MIGRATE,
        Call.MIGRATION_READ,
        Call.MIGRATION_CANCEL,
        Call.MIGRATION_ADJUST,
        Call.SIDE,
        Call.RESOLVE,
    }
)

# Settling makes a host decide who owns a guest, so it is open to the source host of that migration and to an
# orchestrator on its behalf, not to operators. Source: design.md 4.2 rule 5.
ALLOWED: Final[Mapping[Role, frozenset[Call]]] = {
    Role.OPERATOR: _COMMANDS,
    Role.ORCHESTRATOR: _COMMANDS | {Call.SIDE_SETTLE},
    Role.HOST: frozenset({Call.MIGRATION_PROTOCOL, Call.BULK, Call.SIDE, Call.SIDE_SETTLE, Call.SUPERSEDE}),
}


@dataclass(frozen=True)
class Identity:
    """One party. An existing Identity is always well formed.

    Raises:
        IdentityError: `bad_uri`, from the constructor and from `parse`.
    """

    trust_domain: str
    role: Role
    name: str

    def __post_init__(self) -> None:
        check_trust_domain(self.trust_domain)
        if len(self.name) > MAX_NAME_CHARS or not _NAME.fullmatch(self.name):
            raise IdentityError(
                f"{_quoted(self.name)} cannot name a {self.role.value}: allowed are 1 to {MAX_NAME_CHARS}"
                " letters, digits, '.', '_' and '-', beginning with a letter or digit",
                code="bad_uri",
            )

    @classmethod
    def parse(cls, uri: str) -> Identity:
        """The identity that *uri* spells; nothing is normalised, so equal identities have equal URIs."""
        if len(uri) <= MAX_URI_CHARS and uri.startswith("spiffe://"):
            trust_domain, *path = uri.removeprefix("spiffe://").split("/")
            if len(path) == 2 and path[0] in _ROLE_BY_WORD:
                return cls(trust_domain, _ROLE_BY_WORD[path[0]], path[1])
        raise IdentityError(f"{_quoted(uri)} is no identity of ours: allowed is {FORM}", code="bad_uri")

    @property
    def uri(self) -> str:
        return f"spiffe://{self.trust_domain}/{self.role.value}/{self.name}"

    def __str__(self) -> str:
        return self.uri


_ROLE_BY_WORD: Final = {role.value: role for role in Role}


def check_trust_domain(trust_domain: str) -> None:
    """Raise IdentityError (`bad_uri`) unless *trust_domain* can stand in a URI of ours."""
    if len(trust_domain) > MAX_TRUST_DOMAIN_CHARS or not _TRUST_DOMAIN.fullmatch(trust_domain):
        raise IdentityError(
            f"{_quoted(trust_domain)} is no trust domain: allowed are 1 to {MAX_TRUST_DOMAIN_CHARS}"
            " lower-case letters, digits, '.', '_' and '-', beginning and ending with a letter or digit",
            code="bad_uri",
        )


def identity_of_certificate(
    certificate: Mapping[str, Any] | bytes | None,
    *,
    trust_domain: str | None = None,
    expected: Identity | None = None,
) -> Identity:
    """Who a *verified* certificate belongs to.

    Args:
        certificate: DER, or the dictionary of `ssl.SSLSocket.getpeercert()`.
        trust_domain: The only domain that is accepted; None accepts every one that the CA vouched for.
        expected: The only identity that is accepted.

    Raises:
        IdentityError: `no_certificate`, `no_uri_san`, `several_uri_sans`, `bad_uri`, `foreign_trust_domain`,
            `wrong_role`, `wrong_host`, `wrong_name`, `certificate_invalid` (not DER).
    """
    if certificate is None:
        raise IdentityError("the peer showed no certificate", code="no_certificate")
    uris = _uris_of_der(certificate) if isinstance(certificate, bytes) else _uris_of_dictionary(certificate)
    if not uris:
        raise IdentityError(
            f"the certificate has no URI in its subject alternative name: needed is exactly one, {FORM}",
            code="no_uri_san",
        )
    if len(uris) > 1:
        raise IdentityError(
            f"the certificate has {len(uris)} URIs in its subject alternative name: allowed is exactly one, {FORM}",
            code="several_uri_sans",
        )
    identity = Identity.parse(uris[0])
    if trust_domain is not None and identity.trust_domain != trust_domain:
        raise IdentityError(
            f"{identity} belongs to trust domain {identity.trust_domain}: allowed is {trust_domain}",
            code="foreign_trust_domain",
        )
    if expected is not None:
        check_expected(identity, expected)
    return identity


def check_expected(identity: Identity, expected: Identity) -> None:
    """Raise IdentityError unless *identity* is exactly *expected*; the code names the first part that differs."""
    if identity == expected:
        return
    if identity.trust_domain != expected.trust_domain:
        code = "foreign_trust_domain"
    elif identity.role is not expected.role:
        code = "wrong_role"
    else:
        code = "wrong_host" if expected.role is Role.HOST else "wrong_name"
    raise IdentityError(f"the peer is {identity}, expected is {expected}", code=code)


def check_allowed(identity: Identity, call: Call) -> None:
    """Raise IdentityError (`forbidden`) unless the table gives *call* to the role of *identity*."""
    if call not in ALLOWED.get(identity.role, frozenset()):
        allowed = ", ".join(sorted(role.value for role, calls in ALLOWED.items() if call in calls))
        raise IdentityError(f"{identity} may not use {call.value}: allowed for {allowed or 'nobody'}", code="forbidden")


def _uris_of_dictionary(certificate: Mapping[str, Any]) -> list[str]:
    return [value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"]


def _uris_of_der(der: bytes) -> list[str]:
    from cryptography import x509

    try:
        extensions = x509.load_der_x509_certificate(der).extensions
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    except (ValueError, x509.DuplicateExtension) as exc:
        raise IdentityError(f"the certificate cannot be read: {exc}", code="certificate_invalid") from exc
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _QUOTED_CHARS else text[:_QUOTED_CHARS] + "...")
