"""The sealed transport: bulk records under AES-256-GCM on a plain socket, at less cost than TLS from Python.

Problem: TLS cuts everything into records of 16 KiB, copies each several times, and takes the cipher of the
interpreter's own OpenSSL. A bulk stream knows better what it sends: few large parts in one direction, to a peer with
whom secrets were exchanged over TLS. So it begins as TLS, with the same handshake and hello as every bulk stream
(`net.door`), and then goes on as this on the same connection.

What is sent is a sequence of **parts**, each a ciphertext and its tag, and nothing else: no length, no counter, no
type. How long the next part is, the receiver knows beforehand, from what was opened before: a header has a fixed
length and says, authenticated, how long table and payload are. So there is nothing on the wire that could be believed
too early. The number of the part is the nonce; whatever is dropped, doubled, swapped or spliced in fails at its tag.

key = HKDF-SHA-256 as in `net.secrets`, bound to the session, the stream, the direction and the number of the key.
Nonce = number of the part under this key, 12 bytes, big-endian. The next key comes before a key has sealed 64 GiB. A
nonce never repeats: a session has fresh secrets, a stream of it is given its keys once (`SessionSecrets.claim`), one
side only seals and the other only opens, and the number moves on before the cipher is called.

A part that does not open leaves unauthenticated bytes where it was opened into: that is the end of the migration, not
of the link (`seal_broken`; `Landing.breach` in `net.receiving` keeps it so, whatever else fails at the same time).

Sockets block, with time limits of the kernel's: one call moves a whole part, without the interpreter in between.

Source: design.md 4.5; NIST SP 800-38D; RFC 5869.
"""

from __future__ import annotations

import contextlib
import math
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from vmmigrate.errors import LocalProtocolError, RemoteProtocolError, TransportError
from vmmigrate.net.links import pace, unsent_bytes
from vmmigrate.net.secrets import SessionSecrets
from vmmigrate.net.tls import watch_peer
from vmmigrate.net.tls_errors import map_tls_errors

TAG_BYTES: Final = 16
NONCE_BYTES: Final = 12
RATCHET_BYTES: Final = 64 << 30  # 2^32 cipher blocks of a key: far below what would tell two of them apart
MAX_PART_BYTES: Final = 1 << 20
_LABEL: Final = "bulk seal"

TO_DESTINATION: Final = "to destination"


class PartKeys:
    """Key and nonce of each part of one stream in one direction, in order. Both sides have one and stay in step."""

    def __init__(
        self,
        secrets: SessionSecrets,
        stream: int,
        direction: str = TO_DESTINATION,
        *,
        ratchet_bytes: int = RATCHET_BYTES,
    ) -> None:
        """Raises: LocalProtocolError `already_claimed`: this end has the keys of that stream in use already."""
        secrets.claim(_LABEL, str(stream), direction)
        self._secrets = secrets
        self._purpose = (str(stream), direction)
        self._ratchet_bytes = ratchet_bytes
        self._key_number = -1
        self._turn()

    def next(self, part_bytes: int) -> tuple[AESGCM, bytes]:
        """What seals or opens the next part; never given twice.

        A tag counts as bytes, so that empty parts wear a key out, too.

        Raises: LocalProtocolError `part_too_large`: a defect of ours, caught before anything is sealed or awaited.
        """
        if part_bytes > MAX_PART_BYTES:
            raise LocalProtocolError(
                f"a part of {part_bytes} bytes, at most are {MAX_PART_BYTES}", code="part_too_large"
            )
        if self._sealed_bytes + part_bytes + TAG_BYTES > self._ratchet_bytes:
            self._turn()
        self._sealed_bytes += part_bytes + TAG_BYTES
        number = self._parts
        self._parts += 1
        return self._cipher, number.to_bytes(NONCE_BYTES, "big")

    def _turn(self) -> None:
        self._key_number += 1
        self._parts = 0
        self._sealed_bytes = 0
        self._cipher = AESGCM(self._secrets.key(_LABEL, *self._purpose, str(self._key_number)))


class _SealedSocket:
    """What both ends of a sealed stream are: a plain socket that blocks, and ends when its peer is revoked."""

    def __init__(self, sock: socket.socket, keys: PartKeys, peer: str, stall_limit_s: float) -> None:
        """Take over the connection of *sock*; TLS on it, of which nothing may be under way any more, is left.

        Raises: IdentityError `certificate_revoked`: the peer was, since the handshake; *sock* is then as it was.
        """
        self._leave: Callable[[], None] = lambda: None
        if isinstance(sock, ssl.SSLSocket):
            self._leave = watch_peer(sock, lambda _: self.shutdown())
        self._sock = socket.socket(fileno=sock.detach())
        self._sock.setblocking(True)
        limit = _timeval(stall_limit_s)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self._keys = keys
        self._doing = f"bulk stream with {peer}"

    def shutdown(self) -> None:
        """Make calls of other threads fail; they must be joined before `close`."""
        with contextlib.suppress(OSError):  # it may be disconnected already
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._leave()
        self._sock.close()

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[None]:
        with map_tls_errors(self._doing, late="stalled"):
            try:
                yield
            except BlockingIOError:
                raise TimeoutError from None  # the kernel's way to say that its time limit has passed


class SealingLink(_SealedSocket):
    """The source's end: it seals and sends, and nothing else."""

    def __init__(self, sock: socket.socket, keys: PartKeys, peer: str, stall_limit_s: float) -> None:
        super().__init__(sock, keys, peer, stall_limit_s)
        self._buffer = memoryview(bytearray(MAX_PART_BYTES + (1 << 16)))

    def send(self, *parts: memoryview | bytes) -> None:
        """Seal each of *parts* straight from where it lies, and send all of it.

        A part that changes meanwhile, as guest RAM does, is sealed as it was read: once.
        """
        end = 0
        for part in parts:
            size = len(part) + TAG_BYTES
            if end + size > len(self._buffer):
                self._flush(end)
                end = 0
            cipher, nonce = self._keys.next(len(part))
            cipher.encrypt_into(nonce, part, None, self._buffer[end : end + size])
            end += size
        self._flush(end)

    def _flush(self, end: int) -> None:
        with self._mapped():
            self._sock.sendall(self._buffer[:end])

    def unsent_bytes(self) -> int:
        return unsent_bytes(self._sock)

    def pace(self, bytes_per_s: int) -> None:
        pace(self._sock, bytes_per_s)


class OpeningLink(_SealedSocket):
    """The destination's end: it receives and opens, and nothing else."""

    def __init__(self, sock: socket.socket, keys: PartKeys, peer: str, stall_limit_s: float) -> None:
        super().__init__(sock, keys, peer, stall_limit_s)
        self._sealed = memoryview(bytearray(MAX_PART_BYTES + TAG_BYTES))

    def await_into(self, target: memoryview) -> None:
        """Open the next part, whenever it comes, into *target*, which has its length."""
        self._open_into(target, patient=True)

    def receive_into(self, target: memoryview) -> None:
        """Open the next part, which is under way, into *target*, which has its length.

        Raises: RemoteProtocolError `seal_broken`: it is not what the source sealed as its next part; *target* then
            holds anything. TransportError: cut or stalled; *target* is as it was.
        """
        self._open_into(target, patient=False)

    def _open_into(self, target: memoryview, *, patient: bool) -> None:
        cipher, nonce = self._keys.next(len(target))
        sealed = self._sealed[: len(target) + TAG_BYTES]
        self._receive(sealed, patient)
        try:
            cipher.decrypt_into(nonce, sealed, None, target)
        except InvalidTag:
            text = f"{self._doing}: what came is not what the source sealed"
            raise RemoteProtocolError(text, code="seal_broken") from None

    def _receive(self, sealed: memoryview, patient: bool) -> None:
        received = 0
        with self._mapped():
            while received < len(sealed):
                try:
                    count = self._sock.recv_into(sealed[received:], 0, socket.MSG_WAITALL)
                except BlockingIOError:
                    if patient and received == 0:
                        continue  # between rounds a stream may be silent for long
                    raise
                if count == 0:
                    raise TransportError(f"{self._doing}: cut", code="link_lost")
                received += count


def _timeval(seconds: float) -> bytes:
    """As the kernel wants a time limit; it takes zero for none."""
    fraction, whole = math.modf(seconds)
    return struct.pack("ll", int(whole), max(int(fraction * 1e6), 1))
