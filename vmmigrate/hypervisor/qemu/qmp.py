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
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from vmmigrate.errors import HypervisorError

MAX_LINE_BYTES: Final = 8 << 20  # the longest answer we ask for, QEMU's schema in tests, has less than half a MiB
MAX_EVENT_BYTES: Final = 1 << 12  # those that we wait for take some hundred; as objects they take twenty times as much
GREETING_S: Final = 3.0
_CHUNK_BYTES: Final = 1 << 16
_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid
_EVENTS_KEPT: Final = 1024
_NAME_CHARS: Final = 64
_END_OF_TIME_S: Final = 1 << 40


class QmpError(HypervisorError):
    """QEMU refused a command. `details` holds the command and QEMU's class of the error."""

    default_code = "qemu_refused"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that QEMU told without being asked. `number` counts them from 1; `at_s` is by `time.time`, of QEMU."""

    number: int
    name: str
    data: Mapping[str, Any]
    at_s: float


class _Connection:
    """One connection: what was read of it, and who waits for what. Over for good when anything about it is wrong."""

    def __init__(self, sock: trio.socket.SocketType, path: Path) -> None:
        self._sock, self._path = sock, path
        self._unread = bytearray()
        self._scanned = 0
        self.awaited: set[int] = set()
        self.replies: dict[int, dict[str, Any]] = {}
        self.is_read = self.is_over = False
        self.filed = trio.Event()

    @property
    def peer_pid(self) -> int:
        """The process that listened there. Source: unix(7), SO_PEERCRED."""
        told = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return int(_CREDENTIALS.unpack(told)[0])

    def close(self) -> None:
        if not self.is_over:
            self.is_over = True
            self._sock.close()
            self.filed.set()

    async def send(self, line: bytes) -> None:
        """Raises: OSError, EOFError: it is over."""
        left = memoryview(line)
        try:
            while left:
                left = left[await self._sock.send(left) :]
        except trio.ClosedResourceError:
            raise EOFError from None
        except BaseException as exc:
            # With half a line out, this stream says nothing sensible any more.
            if len(left) < len(line) or not isinstance(exc, trio.Cancelled):
                self.close()
            raise

    async def next_message(self) -> dict[str, Any]:
        """Raises: OSError, EOFError; HypervisorError `qemu_protocol`: no JSON object, or a line without an end."""
        while (end := self._unread.find(b"\n", self._scanned)) < 0:
            self._scanned = len(self._unread)
            if self._scanned > MAX_LINE_BYTES:
                raise self._nonsense(f"a line of more than {MAX_LINE_BYTES} bytes")
            self._unread += await self._receive()
        line = bytes(self._unread[:end])
        del self._unread[: end + 1]
        self._scanned = 0
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise self._nonsense("a line that is no JSON object")
        name = message.get("event")
        if isinstance(name, str) and len(line) > MAX_EVENT_BYTES:
            return {"event": name[:_NAME_CHARS]}
        return message

    async def agree(self) -> list[dict[str, Any]]:
        """Leave negotiation mode; what else was said meanwhile. Raises: as `next_message`."""
        if "QMP" not in await self.next_message():
            raise self._nonsense("what listens there is no QMP monitor")
        await self.send(b'{"execute": "qmp_capabilities"}\n')
        beside = []
        while "return" not in (reply := await self.next_message()):
            if "error" in reply:
                raise self._nonsense("it refuses to talk")
            beside.append(reply)
        return beside

    async def _receive(self) -> bytes:
        try:
            chunk = await self._sock.recv(_CHUNK_BYTES)
        except OSError:
            self.close()
            raise
        except trio.ClosedResourceError:
            raise EOFError from None
        if not chunk:
            self.close()
            raise EOFError
        return chunk

    def _nonsense(self, text: str) -> HypervisorError:
        self.close()
        return HypervisorError(f"{self._path}: {text}", code="qemu_protocol")


class Qmp:
    """One client of one monitor; connects when it is first needed, and is closed for good by `close`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: _Connection | None = None
        self._opening: _Connection | None = None
        self._ids = itertools.count(1)
        self._events: deque[Event] = deque(maxlen=_EVENTS_KEPT)
        self._write_lock = trio.Lock()
        self._closed = False
        self.events_seen = 0

    async def execute(self, command: str, **arguments: Any) -> Any:
        """What QEMU answers. Underscores in names of arguments stand for QMP's hyphens. The caller sets the deadline.

        Raises:
            QmpError: QEMU's own error. OSError, EOFError: the connection is over. HypervisorError `qemu_protocol`.
        """
        number = next(self._ids)
        spelled = {name.replace("_", "-"): value for name, value in arguments.items()}
        line = json.dumps({"execute": command, "arguments": spelled, "id": number}).encode() + b"\n"
        async with self._write_lock:
            connection = await self._connected()
            connection.awaited.add(number)
            try:
                await connection.send(line)
            except BaseException:
                connection.awaited.discard(number)
                raise
        try:
            while number not in connection.replies:
                await self._wait_for_some(connection)
            reply = connection.replies[number]
        finally:
            connection.awaited.discard(number)
            connection.replies.pop(number, None)
        return _result(command, reply)

    async def wait_event(
        self, name: str, after: int, matches: Callable[[Mapping[str, Any]], bool] | None = None
    ) -> Event:
        """The first event of that *name* beyond number *after* (`events_seen` at an earlier moment) that *matches*.

        Raises: OSError, EOFError: the connection is over.
        """
        connection = self._connection
        while True:
            for event in self._events:
                if event.number > after and event.name == name and (matches is None or matches(event.data)):
                    return event
            if connection is None:
                raise EOFError
            await self._wait_for_some(connection)

    def events(self, name: str, after: int) -> list[Event]:
        """Those of that *name* that have been read, beyond number *after*; few are kept."""
        return [event for event in self._events if event.name == name and event.number > after]

    def close(self) -> None:
        self._closed = True
        for connection in (self._connection, self._opening):
            if connection is not None:
                connection.close()

    @property
    def peer_pid(self) -> int:
        """The process at the other end, of one that is open. Raises: EOFError, OSError."""
        if self._connection is None or self._connection.is_over:
            raise EOFError
        return self._connection.peer_pid

    async def open(self) -> None:
        """Connect and leave negotiation mode; again, when there is no greeting. The caller sets the deadline.

        A QEMU that starts can lose a client that was there before it (seen in one of 500 starts), unless its monitor
        waits for one (`wait=on`).

        Raises: OSError, EOFError: nobody there, or it went away. HypervisorError `qemu_protocol`, `guest_detached`.
        """
        connection = None
        while connection is None:
            with trio.move_on_after(GREETING_S):
                connection = await self._open()
        self._connection = connection

    async def _open(self) -> _Connection:
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._opening = connection = _Connection(sock, self._path)
        try:
            await sock.connect(str(self._path))
            for message in await connection.agree():
                self._file(connection, message)
        except trio.ClosedResourceError:
            raise EOFError from None
        except BaseException:
            connection.close()
            raise
        finally:
            self._opening = None
        return connection

    async def _connected(self) -> _Connection:
        if self._connection is None or self._connection.is_over:
            if self._closed:
                raise HypervisorError("this daemon has let go of the guest", code="guest_detached")
            await self.open()
            assert self._connection is not None
            if self._closed:
                self._connection.close()
                raise EOFError
        return self._connection

    async def _wait_for_some(self, connection: _Connection) -> None:
        """Until something has been read, by us or by another. Nobody queues: it may have been filed by then."""
        if connection.is_over:
            raise EOFError
        if connection.is_read:
            await connection.filed.wait()
            return
        connection.is_read = True
        try:
            self._file(connection, await connection.next_message())
        finally:
            connection.is_read = False
            connection.filed.set()
            connection.filed = trio.Event()

    def _file(self, connection: _Connection, message: dict[str, Any]) -> None:
        name, number = message.get("event"), message.get("id")
        if isinstance(name, str):
            told = message.get("data")
            self.events_seen += 1
            at_s = _seconds(message.get("timestamp"))
            self._events.append(Event(self.events_seen, name, told if isinstance(told, dict) else {}, at_s))
        elif type(number) is int and number in connection.awaited:
            connection.replies[number] = message


def text_of(answer: Any, field: str) -> str:
    """A field of what QEMU answered. Raises: HypervisorError `qemu_protocol`: a guest may have taken QEMU over."""
    text = answer.get(field) if isinstance(answer, dict) else None
    if not isinstance(text, str):
        raise HypervisorError(f"QEMU answered without {field}", code="qemu_protocol")
    return text


def _seconds(timestamp: Any) -> float:
    """When an event was; now, when QEMU does not say it."""
    told = timestamp if isinstance(timestamp, dict) else {}
    seconds, microseconds = told.get("seconds"), told.get("microseconds")
    if type(seconds) is not int or type(microseconds) is not int:
        return time.time()
    if not (0 <= seconds < _END_OF_TIME_S and 0 <= microseconds < 1_000_000):  # QEMU says -1 when it does not know
        return time.time()
    return seconds + microseconds / 1e6


def _result(command: str, reply: Mapping[str, Any]) -> Any:
    error = reply.get("error")
    if isinstance(error, dict):
        details = {"command": command, "class": error.get("class", "")}
        raise QmpError(f"{command}: {error.get('desc', 'no reason given')}", details=details)
    if "return" not in reply:
        raise HypervisorError(f"{command}: an answer that says nothing", code="qemu_protocol")
    return reply["return"]
