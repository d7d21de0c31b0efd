"""Which guests outlived the last daemon: those that the journal names are adopted, the others explain themselves."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import structlog
import trio

from vmmigrate.daemon.documents import InstanceDocument
from vmmigrate.daemon.host import Host, process_of
from vmmigrate.errors import HypervisorError, SpecError
from vmmigrate.hypervisor.base import FoundGuest, Guest, GuestProcess, GuestStamp, GuestStatus, RunState
from vmmigrate.ownership.records import Epoch, Spawned
from vmmigrate.ownership.recovery import SeenGuest, Stray, is_half_built, is_older_copy, remembers_more
from vmmigrate.ownership.state import Incoming

log = structlog.get_logger(__name__)


@dataclass
class Found:
    """Guest processes after a restart.

    Attributes:
        guests: Adopted ones, by instance id; seen: how they were found.
        unreachable: By instance id, why nothing may be decided: a process of it is there, and it could not be adopted,
            or the journal does not explain it.
        strays: These processes; they were left as they are.
        unexplained: How those that the journal does not explain were found.
    """

    guests: dict[str, Guest] = field(default_factory=dict)
    seen: dict[str, SeenGuest] = field(default_factory=dict)
    unreachable: dict[str, str] = field(default_factory=dict)
    strays: defaultdict[str, list[GuestProcess]] = field(default_factory=lambda: defaultdict(list))
    unexplained: list[SeenGuest] = field(default_factory=list)


async def find_guests(host: Host) -> Found:
    """Every guest process of this host; those that nobody owns are ended."""
    found = Found()
    await _end_leftovers(host, found)
    named = _named(host)
    for other in await host.hypervisor.find_others({Path(spawned.socket) for spawned in named}):
        await _explain(host, other, found)
    for spawned in named:
        try:
            await _adopt_into(found, host, spawned)
        except (HypervisorError, SpecError) as exc:
            log.error("recovery.not_adopted", instance=spawned.instance, code=exc.code, text=exc.text)
            found.unreachable[spawned.instance] = f"its guest process {spawned.pid} cannot be adopted: {exc.text}"
            found.strays[spawned.instance].append(process_of(spawned))
    return found


async def renew_older_copy(host: Host, found: Found) -> None:
    """A journal that a guest proves to be an older copy takes another id, so that the proof stays when it has grown
    again; the guests that it does explain are told.

    Raises: StorageError, JournalError.
    """
    journal_id, newest = host.journal.position
    if not is_older_copy([*found.seen.values(), *found.unexplained], newest, journal_id):
        return
    await host.journal.renew_id()
    log.error("journal.older_copy", newest_record=newest, old_id=journal_id, new_id=host.journal.id)
    for name, guest in found.guests.items():
        if not remembers_more(found.seen[name], newest, journal_id):
            with contextlib.suppress(HypervisorError):
                await guest.note_record(*host.journal.position)


def _named(host: Host) -> list[Spawned]:
    """The processes that the journal names: first those that are still arriving."""
    state = host.journal.state
    under_way = {Incoming.RESERVED, Incoming.PREPARED}
    arriving = [x.guest for x in state.incoming.values() if x.guest and x.stage in under_way]
    return arriving + [known.guest for known in state.instances.values() if known.guest]


async def _end_leftovers(host: Host, found: Found) -> None:
    """End processes that nobody owns any more; the last daemon may have died just before it did.

    The runtime directory does not outlive the machine's boot, and pids do not either: no socket, no process of ours.
    """
    for spawned in host.journal.state.leftovers:
        if not await trio.Path(spawned.socket).exists():
            continue
        try:
            if await host.hypervisor.end_leftover(process_of(spawned)):
                log.info("recovery.leftover_ended", instance=spawned.instance, pid=spawned.pid)
        except HypervisorError as exc:
            found.unreachable[spawned.instance] = f"a former guest process of it cannot be ended: {exc.text}"


async def _explain(host: Host, other: FoundGuest, found: Found) -> None:
    """A process that the journal does not name: half built and ended, or a matter for an operator."""
    stamp, process = other.status.stamp, other.process
    stray = Stray(stamp.instance_id, stamp.migration_id, _seen(other.status))
    if stamp.host_id == host.identity.name and is_half_built(host.journal.state, stray):
        with contextlib.suppress(HypervisorError):
            await host.hypervisor.end_leftover(process)
            log.info("recovery.half_built_ended", instance=stray.instance, pid=process.pid)
            return
    text = f"process {process.pid} is a guest of {stamp.host_id} that no journal record explains"
    log.error("recovery.stray", instance=stray.instance, pid=process.pid, running=stray.seen.running)
    found.unreachable[stray.instance] = text
    found.strays[stray.instance].append(process)
    found.unexplained.append(stray.seen)


async def _adopt_into(found: Found, host: Host, spawned: Spawned) -> None:
    """Raises: HypervisorError, SpecError: the process is there and could not be adopted."""
    guest = None
    try:
        guest = await _adopt(host, spawned)
        if guest is not None:
            status = await guest.status()
            if status.throttle_percent:  # by a migration that died with the last daemon
                await guest.throttle(0)
            found.seen[spawned.instance] = _seen(status)
            found.guests[spawned.instance] = guest
    except HypervisorError as exc:
        if guest is not None:
            guest.detach()
        if exc.code != "guest_lost":
            raise
        await host.hypervisor.end_leftover(process_of(spawned))  # it died under our hands; its files are left


async def _adopt(host: Host, spawned: Spawned) -> Guest | None:
    """The guest of a process, or None when that process is gone. Raises: HypervisorError, SpecError."""
    document = _document_of(host, spawned)
    if document is None and spawned.migration is not None:
        # Died between the record of the process and the document: half built, and nobody's.
        await host.hypervisor.end_leftover(process_of(spawned))
        return None
    if document is None:
        raise HypervisorError("its document is missing", code="no_document")
    stamp = GuestStamp(spawned.instance, host.identity.name, Epoch(0, 0), spawned.migration)
    return await host.hypervisor.adopt(stamp, host.plan(document), process_of(spawned))


def _document_of(host: Host, spawned: Spawned) -> InstanceDocument | None:
    if spawned.migration is not None:
        return host.documents.load_arrival(spawned.migration)
    instance = host.instances.get(spawned.instance)
    return instance.document if instance else None


def _seen(status: GuestStatus) -> SeenGuest:
    running = status.run_state is RunState.RUNNING
    return SeenGuest(running, Epoch(*status.ran_epoch), status.last_record, status.last_journal)
