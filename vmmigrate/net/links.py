"""One bulk connection: what a sender and a receiver of guest RAM need of a transport, and the one over TLS.

The transports are sealed (`net.sealed`) and a TLS socket (`TlsLink`). Calls block; they are made in worker threads.
Cancel is `shutdown()`, join, then `close()`: closing first would hand the file number to the next connection while a
thread still reads from it.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import ssl
import struct
import termios
from typing import Final, Protocol

from vmmigrate.errors import TransportError
from vmmigrate.net.tls import watch_peer
from vmmigrate.net.tls_errors import map_tls_errors

STALL_LIMIT_S: Final = 30.0

_SO_MAX_PACING_RATE: Final = 47  # linux/socket.h; Python has no name for it
_UNPACED: Final = (1 << 64) - 1


class Link(Protocol):
    """One bulk connection, authenticated and bound to its migration, session, stream and direction."""

    def shutdown(self) -> None:
        """Make calls of other threads fail; they must be joined before `close`."""

    def close(self) -> None: ...


class SendLink(Link, Protocol):
    """The source's end."""

    def send(self, *parts: memoryview | bytes) -> None:
        """Send all of it; the destination receives part by part, each of at most 1 MiB."""

    def unsent_bytes(self) -> int:
        """How much of what was sent the peer's host has not got yet: it is what the network has to catch up with."""

    def pace(self, bytes_per_s: int) -> None:
        """Send no faster than this from now on; 0 lifts the limit. Any thread may say so at any time."""


class ReceiveLink(Link, Protocol):
    """The destination's end. Both calls raise TransportError when cut, RemoteProtocolError when it is a forgery."""

    def receive_into(self, target: memoryview) -> None:
        """Fill *target* with the next part; a peer that stalls in the middle of a record is given `STALL_LIMIT_S`."""

    def await_into(self, target: memoryview) -> None:
        """Fill *target* with the first part of the next record, whenever that comes; once begun, as `receive_into`."""


class TlsLink:
    """Either end over a blocking TLS socket; it is shut down when its peer is revoked."""

    def __init__(self, sock: ssl.SSLSocket, peer: str, stall_limit_s: float = STALL_LIMIT_S) -> None:
        """Raises: IdentityError `certificate_revoked`: the peer was, since the handshake."""
        sock.settimeout(stall_limit_s)
        self._sock = sock
        self._stall_limit_s = stall_limit_s
        self._doing = f"bulk stream with {peer}"
        self._leave = watch_peer(sock, lambda _: self.shutdown())

    def send(self, *parts: memoryview | bytes) -> None:
        with map_tls_errors(self._doing, late="stalled"):
            for part in parts:
                self._sock.sendall(part)

    def unsent_bytes(self) -> int:
        return unsent_bytes(self._sock)

    def pace(self, bytes_per_s: int) -> None:
        pace(self._sock, bytes_per_s)

    def await_into(self, target: memoryview) -> None:
        # Between rounds a stream may be silent for long; the control channel's heartbeats tell a dead peer.
        self._sock.settimeout(None)
        rest = self._receive_some(target)
        self._sock.settimeout(self._stall_limit_s)
        self.receive_into(rest)

    def receive_into(self, target: memoryview) -> None:
        while target:
            target = self._receive_some(target)

    def _receive_some(self, target: memoryview) -> memoryview:
        """Fill the beginning of *target*; what is left of it."""
        with map_tls_errors(self._doing, late="stalled"):
            received = self._sock.recv_into(target)
        if received == 0:
            raise TransportError(f"{self._doing}: cut", code="link_lost")
        return target[received:]

    def shutdown(self) -> None:
        # Not SSLSocket.shutdown: that drops the TLS state under the feet of the thread that uses it.
        with contextlib.suppress(OSError):  # it may be disconnected already
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        self._leave()
        self._sock.close()


def unsent_bytes(sock: socket.socket) -> int:
    """What lies in the socket's queue until the peer's host has acknowledged it; 0 for one that is gone."""
    with contextlib.suppress(OSError, ValueError):
        (waiting,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))
        return int(waiting)
    return 0


def pace(sock: socket.socket, bytes_per_s: int) -> None:
    """Let the kernel send no faster than this; 0 lifts the limit. What waits in the queue keeps to it, too."""
    with contextlib.suppress(OSError):  # one that is gone sends nothing
        sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, struct.pack("Q", bytes_per_s or _UNPACED))
