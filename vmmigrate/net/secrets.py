"""Keys of one session, derived from what both sides sent over its authenticated control connection.

key = HKDF-SHA-256(salt = destination's random + source's random, info = label, protocol, M, instance, both host ids,
session number, and what some purposes add: stream, direction, number of the key). Every field of `info` is
length-prefixed, so that no two different sessions or purposes give the same bytes. A session number is used once per
migration and every session has fresh randoms: a key never serves two sessions.

Source: RFC 5869; design 4.5.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from vmmigrate.errors import LocalProtocolError, RemoteProtocolError

RANDOM_BYTES = 32


@dataclass(frozen=True, slots=True)
class SessionContext:
    """What a session's keys are bound to. `repr` is safe to log: it holds no secret."""

    protocol: int
    migration_id: str
    instance_id: str
    source_host: str
    destination_host: str
    session_number: int


class SessionSecrets:
    """The secrets of one session. Python cannot promise to erase them; they are never logged or stored."""

    __slots__ = ("_claimed", "_context", "_salt")

    def __init__(self, context: SessionContext, destination_random: bytes, source_random: bytes) -> None:
        """Raises: RemoteProtocolError `bad_message`: a random of another length than 32; ours never is."""
        if {len(destination_random), len(source_random)} != {RANDOM_BYTES}:
            raise RemoteProtocolError(f"the random of a session has {RANDOM_BYTES} bytes", code="bad_message")
        self._context = context
        self._salt = destination_random + source_random
        self._claimed: set[tuple[str, ...]] = set()

    def __repr__(self) -> str:
        return f"SessionSecrets({self._context!r})"

    @property
    def context(self) -> SessionContext:
        return self._context

    def key(self, label: str, *purpose: str) -> bytes:
        """32 bytes for *label* and what it is used for in particular (such as stream, direction, number of the key)."""
        c = self._context
        fields = (label, str(c.protocol), c.migration_id, c.instance_id, c.source_host, c.destination_host)
        info = b"".join(_prefixed(field) for field in (*fields, str(c.session_number), *purpose))
        return HKDF(algorithm=SHA256(), length=32, salt=self._salt, info=info).derive(self._salt)

    def claim(self, *purpose: str) -> None:
        """Take *purpose* for oneself: whoever seals with its keys counts nonces, and two who count give one twice.

        Raises: LocalProtocolError `already_claimed`: a defect of ours, caught before anything is sealed.
        """
        if purpose in self._claimed:
            raise LocalProtocolError(f"the keys of {', '.join(purpose)} are in use already", code="already_claimed")
        self._claimed.add(purpose)


def _prefixed(field: str) -> bytes:
    raw = field.encode()
    return len(raw).to_bytes(4, "big") + raw


def ticket_hash(ticket: str) -> str:
    """How a ticket is stored. Tickets are 32 random bytes, so a plain hash cannot be searched backwards."""
    return hashlib.sha256(b"vmmigrate ticket v1" + ticket.encode()).hexdigest()


def proof(key: bytes, *parts: bytes) -> bytes:
    """HMAC-SHA-256 over length-prefixed *parts*."""
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        mac.update(len(part).to_bytes(4, "big") + part)
    return mac.digest()
