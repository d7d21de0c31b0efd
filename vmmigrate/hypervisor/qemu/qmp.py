"""QMP, QEMU's control protocol: JSON lines over a unix socket; commands with ids, and events.

Several commands may be under way. One of those who wait reads for all: what it reads is filed, and then all look for
theirs; the first that does not find it is the next to read. So nothing runs in the background, and what nobody waits
for stays in QEMU's buffer. A command that is given up leaves the stream whole unless half of it was sent; then the
connection is closed and the next command opens a new one. A monitor has one client at a time: the next one is greeted
when the last has gone.

Source: QEMU, docs/interop/qmp-spec.
"""

from __future__ import annotations

import itertools
import json
import socket
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from vmmigrate.errors import HypervisorError

MAX_LINE_BYTES: Final = 64 << 20
GREETING_S: Final = 3.0
_CHUNK_BYTES: Final = 1 << 16
_EVENTS_KEPT: Final = 1024


class QmpError(HypervisorError):
    """QEMU refused a command. `details` holds the command and QEMU's class of the error."""

    default_code = "qemu_refused"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that QEMU told without being asked. `number` counts them from 1."""

    number: int
    name: str
    data: Mapping[str, Any]


class Qmp:
    """One client of one monitor; connects when it is first needed, and is closed for good by `close`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sock: trio.socket.SocketType | None = None
        self._unread = bytearray()
        self._scanned = 0
        self._ids = itertools.count(1)
        self._awaited: set[int] = set()
        self._replies: dict[int, dict[str, Any]] = {}
        self._events: deque[Event] = deque(maxlen=_EVENTS_KEPT)
        self._write_lock = trio.Lock()
        self._is_read = False
        self._filed = trio.Event()
        self._closed = False
        self.events_seen = 0

    async def execute(self, command: str, **arguments: Any) -> Any:
        """What QEMU answers. Underscores in names of arguments stand for QMP's hyphens. The caller sets the deadline.

        Raises:
            QmpError: QEMU's own error. OSError, EOFError: the connection is over.
        """
        number = next(self._ids)
        spelled = {name.replace("_", "-"): value for name, value in arguments.items()}
        line = json.dumps({"execute": command, "arguments": spelled, "id": number}).encode() + b"\n"
        self._awaited.add(number)
        try:
            await self._send(line)
            while number not in self._replies:
                await self._wait_for_some()
            reply = self._replies[number]
        finally:
            self._awaited.discard(number)
            self._replies.pop(number, None)
        return _result(command, reply)

    async def wait_event(
        self, name: str, after: int, matches: Callable[[Mapping[str, Any]], bool] | None = None
    ) -> Event:
        """The first event of that *name* beyond number *after* (`events_seen` at an earlier moment) that *matches*.

        Raises: OSError, EOFError: the connection is over.
        """
        while True:
            for event in self._events:
                if event.number > after and event.name == name and (matches is None or matches(event.data)):
                    return event
            await self._wait_for_some()

    def close(self) -> None:
        self._closed = True
        self._drop()

    async def open(self) -> None:
        """Connect and leave negotiation mode; again, when there is no greeting: a QEMU that starts can miss a client
        that was there before it (seen once in some thousand starts). The caller sets the deadline.

        Raises: OSError, EOFError: nobody there, or it went away.
        """
        while True:
            with trio.move_on_after(GREETING_S):
                await self._open()
                return

    async def _open(self) -> None:
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            await sock.connect(str(self._path))
            self._sock, self._unread, self._scanned = sock, bytearray(), 0
            greeting = await self._next_message()
            if "QMP" not in greeting:
                raise HypervisorError(f"{self._path}: what listens there is no QMP monitor", code="qemu_protocol")
            await _send_all(sock, b'{"execute": "qmp_capabilities"}\n')
            while "return" not in (reply := await self._next_message()):
                self._file(reply)
        except BaseException:
            sock.close()
            self._sock = None
            raise

    async def _send(self, line: bytes) -> None:
        async with self._write_lock:
            if self._sock is None:
                if self._closed:
                    raise HypervisorError("this daemon has let go of the guest", code="guest_detached")
                await self.open()
            assert self._sock is not None
            try:
                await _send_all(self._sock, line)
            except BaseException:  # perhaps half a line is out: this stream says nothing sensible any more
                self._drop()
                raise

    async def _wait_for_some(self) -> None:
        """Until something has been read, by us or by another. Nobody queues: it may have been filed by then."""
        if self._is_read:
            await self._filed.wait()
            return
        self._is_read = True
        try:
            self._file(await self._next_message())
        finally:
            self._is_read = False
            self._filed.set()
            self._filed = trio.Event()

    def _file(self, message: dict[str, Any]) -> None:
        if "event" in message:
            self.events_seen += 1
            self._events.append(Event(self.events_seen, message["event"], message.get("data", {})))
        elif message.get("id") in self._awaited:
            self._replies[message["id"]] = message

    async def _next_message(self) -> dict[str, Any]:
        """Raises: OSError, EOFError; HypervisorError `qemu_protocol`: no JSON object, or a line without an end."""
        while (end := self._unread.find(b"\n", self._scanned)) < 0:
            self._scanned = len(self._unread)
            if self._scanned > MAX_LINE_BYTES:
                self._drop()
                raise HypervisorError(f"{self._path}: a line of more than {MAX_LINE_BYTES} bytes", code="qemu_protocol")
            self._unread += await self._receive()
        line = bytes(self._unread[:end])
        del self._unread[: end + 1]
        self._scanned = 0
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            self._drop()
            raise HypervisorError(f"{self._path}: a line that is no JSON object", code="qemu_protocol")
        return message

    async def _receive(self) -> bytes:
        sock = self._sock
        if sock is None:
            raise EOFError
        try:
            chunk = await sock.recv(_CHUNK_BYTES)
        except OSError:
            self._drop()
            raise
        except trio.ClosedResourceError:  # another command gave up in the middle of its line
            raise EOFError from None
        if not chunk:
            self._drop()
            raise EOFError
        return chunk

    def _drop(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def _result(command: str, reply: Mapping[str, Any]) -> Any:
    if "error" in reply:
        error = reply["error"]
        details = {"command": command, "class": error.get("class", "")}
        raise QmpError(f"{command}: {error.get('desc', 'no reason given')}", details=details)
    return reply["return"]


async def _send_all(sock: trio.socket.SocketType, line: bytes) -> None:
    left = memoryview(line)
    while left:
        left = left[await sock.send(left) :]
