"""The daemon's connection to one guest process: requests with deadlines over trio sockets.

Several requests may be under way; replies carry ids. One of those who wait reads for all: one chunk, the replies in it
are filed, and then all look for theirs; the first that does not find it is the next to read. A request that is given up
leaves the stream whole unless half of it was sent; then the connection is closed and the next request opens a new one,
which the guest accepts in place of the old.
"""

from __future__ import annotations

import array
import itertools
import os
import socket
from pathlib import Path
from typing import Any, Final

import trio

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.embedded import protocol

_CHUNK_BYTES: Final = 1 << 18
_MAX_DESCRIPTORS: Final = 3


class GuestLink:
    """One guest's socket; closed until `open`, and again after `close`, which is for good."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sock: trio.socket.SocketType | None = None
        self._decoder = protocol.FrameDecoder()
        self._ids = itertools.count(1)
        self._awaited: set[int] = set()
        self._replies: dict[int, dict[str, Any]] = {}
        self._write_lock = trio.Lock()
        self._is_read = False
        self._filed = trio.Event()
        self._closed = False

    async def open(self) -> tuple[dict[str, Any], list[int]]:
        """Connect and shake hands: the guest's answer, and its descriptors, which now belong to the caller.

        Raises:
            HypervisorError: What the guest says; OSError: nobody there; EOFError: it went away.
        """
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        fds: list[int] = []
        try:
            await sock.connect(str(self._path))
            await _send_all(sock, protocol.encode_frame({"hello": list(protocol.VERSIONS)}))
            decoder = protocol.FrameDecoder()
            while (answer := decoder.next_message()) is None:
                chunk, rights, _, _ = await sock.recvmsg(
                    _CHUNK_BYTES, socket.CMSG_SPACE(4 * _MAX_DESCRIPTORS), socket.MSG_CMSG_CLOEXEC
                )
                fds += _descriptors(rights)
                if not chunk:
                    raise EOFError
                decoder.receive(chunk)
            if "error" in answer:
                raise protocol.error_from_map(answer["error"])
        except BaseException:
            sock.close()
            close_all(fds)
            raise
        self._sock, self._decoder = sock, decoder
        return answer, fds

    async def request(self, op: str, **args: Any) -> Any:
        """Ask and wait for the answer. The caller sets the deadline.

        Raises:
            VmMigrateError: The guest's own error. OSError, EOFError: the connection is over.
        """
        number = next(self._ids)
        frame = protocol.encode_frame({"id": number, "op": op, "args": args})
        self._awaited.add(number)
        try:
            await self._send(frame)
            while number not in self._replies:
                await self._wait_for_some()
            reply = self._replies[number]
        finally:
            self._awaited.discard(number)
            self._replies.pop(number, None)
        if "error" in reply:
            raise protocol.error_from_map(reply["error"])
        return reply["result"]

    async def _send(self, frame: bytes) -> None:
        async with self._write_lock:
            if self._sock is None:
                if self._closed:
                    raise HypervisorError("this daemon has let go of the guest", code="guest_detached")
                _, fds = await self.open()
                close_all(fds)
            assert self._sock is not None
            try:
                await _send_all(self._sock, frame)
            except BaseException:  # perhaps half a frame is out: this stream says nothing sensible any more
                self._drop()
                raise

    async def _wait_for_some(self) -> None:
        """Until a chunk has been read, by us or by another. Nobody queues: the reply may have been filed by then."""
        if self._is_read:
            await self._filed.wait()
            return
        self._is_read = True
        try:
            await self._read_some()
        finally:
            self._is_read = False
            self._filed.set()
            self._filed = trio.Event()

    async def _read_some(self) -> None:
        sock = self._sock
        if sock is None:
            raise EOFError
        try:
            chunk = await sock.recv(_CHUNK_BYTES)
        except OSError:
            self._drop()
            raise
        except trio.ClosedResourceError:  # another request gave up in the middle of its frame
            raise EOFError from None
        if not chunk:
            self._drop()
            raise EOFError
        self._decoder.receive(chunk)
        while (message := self._decoder.next_message()) is not None:
            if message.get("id") in self._awaited:
                self._replies[message["id"]] = message

    def _drop(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def close(self) -> None:
        self._closed = True
        self._drop()


async def _send_all(sock: trio.socket.SocketType, frame: bytes) -> None:
    left = memoryview(frame)
    while left:
        left = left[await sock.send(left) :]


def _descriptors(rights: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, payload in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return list(fds)


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
