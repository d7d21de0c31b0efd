"""The wire between destination and source, in our hands.

A TCP relay in front of a source's migration port. It reads no message (it cannot: TLS), but it sees the records of TLS,
and each message is sent as records of its own: between two records lies a message boundary. At a chosen boundary it
calls a fault, and it can cut, stall, duplicate, truncate and corrupt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum

import trio

_HEADER_BYTES = 5
_LENGTH = slice(3, 5)


class Side(StrEnum):
    """Who sends the record."""

    SOURCE = "source"
    DESTINATION = "destination"


class Damage(StrEnum):
    """What happens to the record at the boundary, beside what happens to processes."""

    NONE = "none"
    CUT = "cut"
    HALF_CUT = "half_cut"
    STALL = "stall"
    DUPLICATE = "duplicate"
    TRUNCATE = "truncate"
    CORRUPT = "corrupt"


@dataclass(frozen=True)
class Boundary:
    """Before the record *number* (from 0) that *side* sends."""

    side: Side
    number: int

    def __str__(self) -> str:
        return f"{self.side.value}#{self.number}"


Strike = Callable[[], Awaitable[None]]


class Relay:
    """Relays connections to *port* of this machine, and strikes once, at *boundary*.

    A stall is a black hole: it swallows this connection and all that come later. All other damage is done to one
    connection, and who comes again finds a good one.

    Attributes:
        records: How many records each side has sent.
        struck: Set when the boundary was reached.
    """

    def __init__(self, port: int, boundary: Boundary | None, damage: Damage, strike: Strike) -> None:
        self._port = port
        self._boundary = boundary
        self._damage = damage
        self._strike = strike
        self._is_stalled = False
        self.records = dict.fromkeys(Side, 0)
        self.struck = trio.Event()

    async def serve(self, task_status: trio.TaskStatus[int]) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        task_status.started(listeners[0].socket.getsockname()[1])
        await trio.serve_listeners(self._connect, listeners)

    async def _connect(self, destination: trio.SocketStream) -> None:
        try:
            source = await trio.open_tcp_stream("127.0.0.1", self._port)
        except OSError:
            return  # it is dead at present: the destination sees a closed connection
        async with source, trio.open_nursery() as nursery:
            nursery.start_soon(self._pass_on, Side.DESTINATION, destination, source, nursery)
            nursery.start_soon(self._pass_on, Side.SOURCE, source, destination, nursery)

    async def _pass_on(
        self, side: Side, origin: trio.SocketStream, sink: trio.SocketStream, nursery: trio.Nursery
    ) -> None:
        pending, muted = bytearray(), False
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for chunk in origin:
                pending += chunk
                while (record := _take_record(pending)) is not None:
                    is_here = self._is_boundary(side)
                    if is_here:
                        muted = self._damage is Damage.HALF_CUT
                        await self._hit(nursery)
                        record = self._damaged(record)
                    if not muted and not self._is_stalled:
                        await sink.send_all(record)
                    if is_here and self._damage is Damage.TRUNCATE:
                        nursery.cancel_scope.cancel()
            if not muted and not self._is_stalled:
                await sink.send_eof()

    def _is_boundary(self, side: Side) -> bool:
        here = Boundary(side, self.records[side])
        self.records[side] += 1
        return here == self._boundary

    async def _hit(self, nursery: trio.Nursery) -> None:
        self.struck.set()
        await self._strike()
        if self._damage is Damage.CUT:
            nursery.cancel_scope.cancel()
        elif self._damage is Damage.STALL:
            self._is_stalled = True

    def _damaged(self, record: bytes) -> bytes:
        if self._damage is Damage.DUPLICATE:
            return record + record
        if self._damage is Damage.TRUNCATE:
            return record[: len(record) // 2]
        if self._damage is Damage.CORRUPT:
            return record[:-1] + bytes([record[-1] ^ 1])
        return record


def _take_record(pending: bytearray) -> bytes | None:
    """The next whole TLS record, header included."""
    if len(pending) < _HEADER_BYTES:
        return None
    size = _HEADER_BYTES + int.from_bytes(pending[_LENGTH], "big")
    if len(pending) < size:
        return None
    record = bytes(pending[:size])
    del pending[:size]
    return record
