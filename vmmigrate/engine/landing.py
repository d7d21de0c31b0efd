"""RAM at the destination: bulk streams, rounds, and what of them has landed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import trio

from vmmigrate.engine.incoming import Agreed, DestinationMigration
from vmmigrate.engine.populating import Populating
from vmmigrate.errors import TransportError
from vmmigrate.memory import PAGE_SIZE
from vmmigrate.net.channel import Channel
from vmmigrate.net.door import open_streams
from vmmigrate.net.receiving import BulkDestination, Landing
from vmmigrate.net.threads import open_group
from vmmigrate.ram.digest import Condenser, PageHash
from vmmigrate.wire import messages as m

T = TypeVar("T")


@dataclass
class Arriving:
    """RAM under way; it outlives a cut link.

    Attributes:
        condenser: Condenses the table of what has landed.
        untold: The pages that have landed, and of which it does not know yet.
        applied_round: The last round of which everything has landed.
        received_bytes: In sessions that have ended.
    """

    page_hash: PageHash
    landing: Landing
    condenser: Condenser
    populating: Populating
    applied_round: int = 0
    received_bytes: int = 0
    _condensing: trio.Lock = field(default_factory=trio.Lock)

    def __post_init__(self) -> None:
        self.untold = np.zeros(len(self.landing.fresh), dtype=np.bool_)

    def end_round(self) -> None:
        """The source has been told of what is fresh; from now on it is what lands after that."""
        self.untold |= self.landing.fresh
        self.landing.fresh[:] = False

    async def condense(self) -> None:
        """Let the condenser know of all that the source was told. Cancelled, it knows as much as before, or all."""
        async with self._condensing:
            touched, self.untold = self.untold, np.zeros_like(self.untold)
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self.condenser.refresh, touched)


@contextlib.asynccontextmanager
async def bulk_streams(
    agreed: Agreed, arriving: Arriving, migration: DestinationMigration
) -> AsyncIterator[BulkDestination]:
    """The bulk streams of the session, receiving; on leaving their threads are joined and they are closed."""
    assert migration.guest is not None
    ram = migration.guest.ram
    links = await open_streams(
        migration.source_host,
        agreed.select.bulk_port,
        migration.context,
        migration.source,
        agreed.secrets,
        agreed.select.streams,
        agreed.select.transport,
        deadline_s=migration.deadlines.hello_s,
        stall_limit_s=migration.deadlines.stall_s,
    )
    bulk = BulkDestination(
        links,
        ram.layout,
        ram.pages,
        arriving.page_hash,
        arriving.landing,
        encodings=agreed.select.encodings,
        fill=ram.fill if ram.fills else None,
    )
    try:
        async with open_group() as group:
            group.start_soon(bulk.receive_forever)
            yield bulk
            group.cancel_scope.cancel()
    finally:
        bulk.close()
        arriving.received_bytes += bulk.bytes_received


async def receive_ram(
    channel: Channel, bulk: BulkDestination, arriving: Arriving, migration: DestinationMigration, beside: trio.Nursery
) -> None:
    """Rounds while the guest runs at the source, then the one after its pause. What nobody waits for goes *beside*."""
    migration.record.ram.total_bytes = len(bulk.table) * PAGE_SIZE
    paused = False
    while True:
        message = await _while_bulk_moves(
            bulk, migration, partial(channel.expect, m.RoundEnd, m.Paused, deadline_s=math.inf)
        )
        if isinstance(message, m.Paused):
            paused = True
            continue
        applied = await _land_round(bulk, arriving, migration, message)
        arriving.end_round()
        if paused:
            beside.start_soon(channel.send, applied)
            await _while_bulk_moves(bulk, migration, bulk.wait_end)
            return
        await channel.send(applied)
        beside.start_soon(arriving.condense)
        beside.start_soon(migration.journal.reserve)  # it is done once more in the pause, and finds nothing to do then


async def _while_bulk_moves(
    bulk: BulkDestination, migration: DestinationMigration, wait: Callable[[], Awaitable[T]]
) -> T:
    """Wait as long as bulk data keeps coming: how long a round takes depends on the guest, a stall does not.

    Raises: TransportError `timed_out`: not a byte for `round_s`.
    """
    result: list[T] = []
    async with open_group() as group:

        async def run() -> None:
            result.append(await wait())
            group.cancel_scope.cancel()

        group.start_soon(run)
        received = -1
        while received != bulk.bytes_received:
            received = bulk.bytes_received
            await trio.sleep(migration.deadlines.round_s)
        raise TransportError(f"no bulk data for {migration.deadlines.round_s:g} s", code="timed_out")
    return result[0]


async def _land_round(
    bulk: BulkDestination, arriving: Arriving, migration: DestinationMigration, end: m.RoundEnd
) -> m.RoundApplied:
    """All of a round has landed: what tells the source so."""
    await _while_bulk_moves(bulk, migration, partial(bulk.wait_round, end.round_number, end.records))
    await arriving.populating.settle()
    arriving.applied_round = end.round_number
    record, received = migration.record, arriving.received_bytes + bulk.bytes_received
    record.ram.rounds.append({"pages": end.pages, "bytes": received - record.ram.sent_bytes})
    record.ram.sent_bytes = received
    record.progress.update(round=end.round_number, bytes=received, dirty_pages=end.dirty_pages)
    return m.RoundApplied(end.round_number, received)
