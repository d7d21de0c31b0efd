"""Keeping the journal short while the daemon serves: learn what sources know, then forget what nobody asks for.

A verdict has to stay until its source cannot ask for it any more (rule 6). The source tells so by its side of the
migration, which it may be asked for at any time: once that is over there, the acknowledgement is journalled here.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Final

import structlog
import trio

from vmmigrate.api.client import HostClient, open_client
from vmmigrate.daemon.host import Host
from vmmigrate.errors import HypervisorError, JournalError, StorageError, TransportError, VmMigrateError
from vmmigrate.hypervisor import kernel
from vmmigrate.net.identity import Identity, Role
from vmmigrate.ownership import rules
from vmmigrate.ownership.compaction import is_unacknowledged
from vmmigrate.ownership.records import Spawned
from vmmigrate.ownership.state import OPEN_OUTGOING, IncomingState, Outgoing, Ownership

log = structlog.get_logger(__name__)

PERIOD_S: Final = 60.0
ASK_DEADLINE_S: Final = 10.0
# Of one that an operator resolved the destination is still to be told, which has to know it then.
_OPEN: Final = {stage.value for stage in (*OPEN_OUTGOING, Outgoing.RESOLVED)}


async def keep_journal_short(host: Host) -> None:
    """For as long as the daemon serves."""
    with host.journal_failures():
        silent: set[str] = set()
        while True:
            await compact_if_due(host)
            await trio.sleep(PERIOD_S)
            await ask_sources(host, silent)


async def compact_if_due(host: Host) -> bool:
    """Compact the journal when it is longer than the configuration allows. Whether it was. Raises: JournalError."""
    settings = host.config.journal
    if not host.journal.is_due(settings.compact_bytes):
        return False
    # A ticket that was called off is looked at once more when it expires.
    remember_s = max(settings.remember_s, host.config.limits.deadlines.ticket_s + PERIOD_S)
    gone = await trio.to_thread.run_sync(_gone, host.journal.state.leftovers)
    try:
        is_shorter = await host.journal.compact(remember_s, gone)
    except StorageError as exc:
        log.warning("journal.not_compacted", code=exc.code, text=exc.text)
        return False
    log.info("journal.compacted", bytes=host.journal.size_bytes, forgotten=host.journal.forgotten)
    return is_shorter


def _gone(leftovers: Iterable[Spawned]) -> frozenset[Spawned]:
    """Processes that have ended: none has their pid, or one that began at another time. Who cannot be looked at just
    now has not."""
    gone = set()
    for guest in leftovers:
        with contextlib.suppress(HypervisorError):
            if kernel.start_ticks_of(guest.pid) != guest.start_ticks:
                gone.add(guest)
    return frozenset(gone)


async def ask_sources(host: Host, silent: set[str]) -> None:
    """Ask each source of a verdict that it has not acknowledged; one that cannot be reached is asked again later.

    Args:
        silent: Migrations of which a source would not tell; they are added here, and not asked for again.

    Raises: JournalError.
    """
    for (name, url), migrations in _unacknowledged(host.journal.state, silent):
        source = Identity(host.identity.trust_domain, Role.HOST, name)
        try:
            with trio.fail_after(ASK_DEADLINE_S):
                async with open_client(url, host.config.tls_files(), source) as client:
                    for migration in migrations:
                        if await _is_over(client, migration, silent):
                            await host.journal.commit(rules.Acknowledge(migration))
        except JournalError:
            raise
        except trio.TooSlowError:
            log.info("journal.source_silent", host=name)
        except VmMigrateError as exc:
            log.info("journal.source_silent", host=name, code=exc.code)


async def _is_over(client: HostClient, migration: str, silent: set[str]) -> bool:
    """Whether the source has journalled how the migration ended. One that it does not know may be one that it lost."""
    try:
        side = await client.get(f"/v1/migrations/{migration}/side")
    except TransportError:
        raise
    except VmMigrateError as exc:
        log.info("journal.source_does_not_tell", migration=migration, code=exc.code)
        silent.add(migration)
        return False
    stage = side.get("outgoing") if isinstance(side, dict) else None
    return isinstance(stage, str) and stage not in _OPEN


def _unacknowledged(state: Ownership, silent: set[str]) -> Iterator[tuple[tuple[str, str], list[str]]]:
    """Migrations with a verdict that is still to be acknowledged, by host and URL of their source."""

    def source(item: tuple[str, IncomingState]) -> tuple[str, str]:
        return item[1].reserved.source_host, item[1].reserved.source_url

    due = (item for item in state.incoming.items() if is_unacknowledged(item[1]) and item[0] not in silent)
    waiting = sorted(due, key=source)
    for key, group in groupby(waiting, key=source):
        yield key, [migration for migration, _ in group]


def sweep() -> None:
    """Free what a migration has left.

    An error keeps the frames that it names, and they keep the error and the tables of a whole migration, 0.2 % of the
    guest's RAM, until the garbage collector comes by; in a quiet daemon that may be never. A daemon of its own has
    frozen all that it has imported, so that this takes about a millisecond.
    """
    gc.collect()
