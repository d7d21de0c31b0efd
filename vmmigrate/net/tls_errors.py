"""The seam to ssl, sockets and trio: foreign errors become ours, once, with a code and a line that says what is needed.

Source: RFC 8446 section 6.2; OpenSSL's X509_V_ERR_* and reasons; trio's _ssl.py.
"""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, TypeAlias

import trio

from vmmigrate.errors import IdentityError, TransportError, VmMigrateError

_Verdict: TypeAlias = tuple[type[VmMigrateError], str, str]


def _party(code: str, text: str) -> _Verdict:
    return IdentityError, code, text


def _link(code: str, text: str) -> _Verdict:
    return TransportError, code, text


_PEER_NOT_OURS: Final = _party("wrong_ca", "our CA did not issue the peer's certificate")
_REFUSED: Final = _party("certificate_refused", "the peer refuses our certificate")
_PLAINTEXT: Final = _link("plaintext", "the peer does not speak TLS: needed is TLS 1.3")
_TLS_VERSION: Final = _link("tls_version", "no common TLS version: allowed is TLS 1.3 only")
_DISCONNECTED: Final = _link("disconnected", "the peer closed the connection")
_CLOSED_EARLY: Final = _link(
    "closed_after_handshake",
    "the peer closed the connection right after the handshake; it may have refused us, which its log would say",
)

# OpenSSL's X509_V_ERR_* of the peer's certificate.
_BY_VERIFY_CODE: Final[dict[int, _Verdict]] = {
    9: _party("certificate_not_yet_valid", "the peer's certificate is not yet valid"),
    10: _party("certificate_expired", "the peer's certificate has expired"),
    23: _party("certificate_revoked", "the peer's certificate was revoked"),
    3: _party("crl_missing", "our revocation list is not of the CA that issued the peer's certificate"),
    11: _party("crl_not_yet_valid", "our revocation list is not yet valid: nobody can be let in"),
    12: _party("crl_expired", "our revocation list has expired: nobody can be let in until a newer one is loaded"),
    **dict.fromkeys((2, 7, 18, 19, 20, 21), _PEER_NOT_OURS),
}

# OpenSSL's reasons; those with ALERT are what the peer says about us.
_BY_REASON: Final[dict[str, _Verdict]] = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": _party("no_client_certificate", "the peer showed no certificate"),
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": _party("no_client_certificate", "the peer demands a certificate of us"),
    "TLSV1_ALERT_UNKNOWN_CA": _party("wrong_ca", "the peer's CA did not issue our certificate"),
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": _party("certificate_expired", "the peer refuses our certificate as expired"),
    "SSLV3_ALERT_CERTIFICATE_REVOKED": _party("certificate_revoked", "the peer refuses our certificate as revoked"),
    # What OpenSSL says of a certificate that is not yet valid by its clock, among others.
    "SSLV3_ALERT_BAD_CERTIFICATE": _party(
        "certificate_refused", "the peer refuses our certificate (not yet valid by its clock, or damaged)"
    ),
    "UNEXPECTED_EOF_WHILE_READING": _DISCONNECTED,
    **dict.fromkeys(("SSLV3_ALERT_CERTIFICATE_UNKNOWN", "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE"), _REFUSED),
    **dict.fromkeys(("TLSV1_ALERT_PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL", "WRONG_SSL_VERSION"), _TLS_VERSION),
    **dict.fromkeys(("HTTP_REQUEST", "WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG"), _PLAINTEXT),
}

_UNREACHABLE: Final = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN})
_GONE: Final = frozenset({errno.ENOTCONN, errno.EBADF, errno.ESHUTDOWN})


@contextmanager
def map_tls_errors(doing: str, *, first_answer: bool = False, late: str = "timed_out") -> Iterator[None]:
    """Turn errors of ssl, sockets and trio into ours; the cause is kept. Errors of ours pass unchanged.

    Args:
        doing: What is being done with whom; the errors begin with it.
        first_answer: This is the first thing read after a client's handshake, so that a disconnect may be a refusal.
        late: The code of a missed deadline.

    Raises:
        IdentityError: `wrong_ca`, `certificate_expired`, `certificate_not_yet_valid`, `certificate_revoked`,
            `certificate_refused`, `certificate_invalid`, `no_client_certificate`.
        TransportError: `plaintext`, `tls_version`, `tls`, `disconnected`, `closed_after_handshake`, `closed` (by us),
            `timed_out` (or *late*), `connection_refused`, `unreachable`, `unknown_host`, `transport`.
    """
    try:
        yield
    except trio.ClosedResourceError as exc:
        raise TransportError(f"{doing}: the connection was closed on this side", code="closed") from exc
    except (trio.BrokenResourceError, trio.TooSlowError, OSError) as exc:
        error, code, text = _verdict(_root(exc), late)
        if first_answer and code == "disconnected":
            error, code, text = _CLOSED_EARLY
        raise error(f"{doing}: {text}", code=code) from exc


def closed_after_handshake(doing: str) -> TransportError:
    """The error for a clean end of stream where the first answer was due."""
    return TransportError(f"{doing}: {_CLOSED_EARLY[2]}", code=_CLOSED_EARLY[1])


def _root(exc: BaseException) -> BaseException:
    """What trio wrapped, if it wrapped something."""
    wraps = isinstance(exc, trio.BrokenResourceError) or (type(exc) is OSError and exc.errno is None)
    if wraps and exc.__cause__ is not None:
        return _root(exc.__cause__)
    if isinstance(exc, BaseExceptionGroup):
        return _root(exc.exceptions[0])
    return exc


def _verdict(exc: BaseException, late: str) -> _Verdict:
    if isinstance(exc, ssl.SSLError):
        return _verdict_on_tls(exc)
    if isinstance(exc, trio.TooSlowError | TimeoutError):
        return _link(late, "not finished in time")
    if isinstance(exc, trio.BrokenResourceError | ConnectionResetError | BrokenPipeError | ConnectionAbortedError):
        return _DISCONNECTED
    if isinstance(exc, ConnectionRefusedError):
        return _link("connection_refused", "connection refused: nobody listens there")
    if isinstance(exc, socket.gaierror):
        return _link("unknown_host", f"unknown host name ({exc.strerror})")
    if isinstance(exc, OSError) and exc.errno in _UNREACHABLE:
        return _link("unreachable", f"cannot be reached ({exc.strerror})")
    if isinstance(exc, OSError) and exc.errno in _GONE:
        return _DISCONNECTED
    return _link("transport", str(exc))


def _verdict_on_tls(exc: ssl.SSLError) -> _Verdict:
    if isinstance(exc, ssl.SSLCertVerificationError):
        other = _party("certificate_invalid", f"the peer's certificate is refused: {exc.verify_message}")
        return _BY_VERIFY_CODE.get(exc.verify_code, other)
    if isinstance(exc, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return _DISCONNECTED
    reason = getattr(exc, "reason", None) or str(exc)
    return _BY_REASON.get(reason, _link("tls", f"TLS failed: {reason.replace('_', ' ').lower()}"))


@contextmanager
def handshake_errors(peer: str) -> Iterator[None]:
    doing = f"TLS handshake with {peer}"
    try:
        with map_tls_errors(doing, late="handshake_timeout"):
            yield
    except IdentityError as exc:
        if exc.text.startswith(doing):
            raise
        raise IdentityError(f"{doing}: {exc.text}", code=exc.code) from exc
