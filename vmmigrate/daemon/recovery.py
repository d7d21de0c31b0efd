"""A daemon's restart: find the guests that outlived it, and do what `ownership.recovery` says."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import structlog

from vmmigrate.daemon.host import Host, Instance
from vmmigrate.daemon.migrations import Migrations
from vmmigrate.engine.limits import MigrationOptions
from vmmigrate.engine.metrics import Outcome
from vmmigrate.errors import HandoffInDoubt, HypervisorError
from vmmigrate.hypervisor.base import Guest, GuestProcess, GuestStamp, RunState
from vmmigrate.net.identity import Identity, Role
from vmmigrate.ownership import rules
from vmmigrate.ownership.records import Epoch, Spawned
from vmmigrate.ownership.recovery import RecoveryStep, SeenGuest, Step, plan
from vmmigrate.ownership.state import Incoming

log = structlog.get_logger(__name__)


async def recover(host: Host, migrations: Migrations) -> None:
    """Re-adopt, pause what must not run, finish or undo what was under way. Before the daemon serves anybody.

    Raises: JournalError, SpecError: documents are damaged; nothing was decided.
    """
    _load_documents(host)
    for record in host.documents.load_records():
        migrations.past[record["migration_id"]] = record
    await _end_leftovers(host)
    guests = await _find_guests(host)
    seen = {name: await _look_at(guest) for name, guest in guests.items()}
    recovery = _Recovery(host, migrations, guests)
    for step in plan(host.journal.state, seen, host.journal.newest_record):
        log.info("recovery.step", step=step.step.value, instance=step.instance, migration=step.migration)
        await recovery.take(step)


def _load_documents(host: Host) -> None:
    """What the journal's instances are; documents of arrivals that ended are removed, of acquired ones promoted."""
    state = host.journal.state
    for migration, incoming in state.incoming.items():
        if incoming.stage in {Incoming.ACQUIRED, Incoming.STARTED}:
            host.documents.promote_arrival(migration, incoming.instance)
        elif incoming.stage not in {Incoming.RESERVED, Incoming.PREPARED}:
            host.documents.remove_arrival(migration)
    for document in host.documents.load_instances():
        if document.instance_id in state.instances:
            host.instances[document.instance_id] = Instance(document)
        else:
            host.documents.remove_instance(document.instance_id)


async def _end_leftovers(host: Host) -> None:
    """End processes that nobody owns any more; the last daemon may have died just before it did."""
    for spawned in host.journal.state.leftovers:
        if await host.hypervisor.end_leftover(_process(spawned)):
            log.info("recovery.leftover_ended", instance=spawned.instance, pid=spawned.pid)


async def _find_guests(host: Host) -> dict[str, Guest]:
    """Every guest process that the journal names and that still answers, by instance."""
    state = host.journal.state
    arriving = [
        x.guest for x in state.incoming.values() if x.guest and x.stage in {Incoming.RESERVED, Incoming.PREPARED}
    ]
    owned = [known.guest for known in state.instances.values() if known.guest]
    guests: dict[str, Guest] = {}
    for spawned in [*arriving, *owned]:
        guest = await _adopt(host, spawned)
        if guest is not None:
            guests[spawned.instance] = guest
    return guests


async def _adopt(host: Host, spawned: Spawned) -> Guest | None:
    if spawned.migration is not None:
        document = host.documents.load_arrival(spawned.migration)
    else:
        instance = host.instances.get(spawned.instance)
        document = instance.document if instance else None
    if document is None:
        log.error("recovery.no_document", instance=spawned.instance)
        await host.hypervisor.end_leftover(_process(spawned))
        return None
    stamp = GuestStamp(spawned.instance, host.identity.name, Epoch(0, 0), spawned.migration)
    try:
        return await host.hypervisor.adopt(stamp, host.plan(document), _process(spawned))
    except HypervisorError as exc:
        log.error("recovery.not_adopted", instance=spawned.instance, code=exc.code, text=exc.text)
        return None


def _process(spawned: Spawned) -> GuestProcess:
    return GuestProcess(spawned.pid, spawned.start_ticks, Path(spawned.socket))


async def _look_at(guest: Guest) -> SeenGuest:
    status = await guest.status()
    return SeenGuest(status.run_state is RunState.RUNNING, Epoch(*status.stamp.epoch), status.last_record)


class _Recovery:
    """Takes one step after the other."""

    def __init__(self, host: Host, migrations: Migrations, guests: Mapping[str, Guest]) -> None:
        self._host = host
        self._migrations = migrations
        self._guests = guests
        self._steps: Mapping[Step, Callable[[RecoveryStep], Awaitable[None]]] = {
            Step.PAUSE: self._pause,
            Step.KEEP: self._keep,
            Step.UNDO_PAUSE: self._undo_pause,
            Step.END_ATTEMPT: self._end_attempt,
            Step.SETTLE: self._settle,
            Step.FINISH_START: self._finish_start,
            Step.RUN: self._run,
            Step.RETURN: self._return,
            Step.REFUSE: self._refuse,
            Step.DESTROY: self._destroy,
            Step.LOST: self._lost,
            Step.INDETERMINATE: self._indeterminate,
        }

    async def take(self, step: RecoveryStep) -> None:
        await self._steps[step.step](step)

    def _epoch(self, step: RecoveryStep) -> Epoch:
        return self._host.journal.state.instances[step.instance].epoch

    async def _pause(self, step: RecoveryStep) -> None:
        await self._guests[step.instance].pause()

    async def _keep(self, step: RecoveryStep) -> None:
        self._host.watch(self._host.instances[step.instance], self._guests[step.instance])

    async def _undo_pause(self, step: RecoveryStep) -> None:
        assert step.migration is not None
        desired = self._host.journal.state.outgoing[step.migration].desired
        await self._host.journal.commit(rules.EndAttempt(step.migration, step.reason))
        guest = self._guests[step.instance]
        await guest.open_backends(self._epoch(step))
        if desired == RunState.RUNNING.value:
            await guest.run(self._epoch(step))
        await self._keep(step)

    async def _end_attempt(self, step: RecoveryStep) -> None:
        assert step.migration is not None
        await self._host.journal.commit(rules.EndAttempt(step.migration, step.reason))

    async def _settle(self, step: RecoveryStep) -> None:
        """In doubt: the guest stays paused (it may even be gone), and the destination is asked."""
        assert step.migration is not None
        outgoing = self._host.journal.state.outgoing[step.migration]
        guest = self._guests.get(step.instance)
        if guest is None:
            # What is left is a fact to learn, not a guest to resume.
            log.error("recovery.in_doubt_without_guest", instance=step.instance, migration=step.migration)
            return
        instance = self._host.instances[step.instance]
        self._host.watch(instance, guest)
        destination = Identity(self._host.identity.trust_domain, Role.HOST, outgoing.ticket.destination_host)
        migration = self._migrations.make_source(step.migration, step.instance, destination, MigrationOptions())
        migration.desired = RunState(outgoing.desired or RunState.RUNNING.value)
        migration.backends_closed = True
        migration.record.finish(Outcome.UNKNOWN, HandoffInDoubt("the daemon restarted while in doubt"))
        self._host.nursery.start_soon(self._migrations.settle_source, migration)

    async def _finish_start(self, step: RecoveryStep) -> None:
        """Acquired and alive: open everything and start, or return it durably."""
        assert step.migration is not None
        prepared = self._host.journal.state.incoming[step.migration].prepared
        assert prepared is not None
        guest = self._guests[step.instance]
        try:
            await guest.open_backends(self._epoch(step))
        except HypervisorError as exc:
            await guest.destroy()
            await self._host.journal.commit(rules.Return(step.migration, exc.code))
            return
        await self._host.journal.commit(rules.Start(step.migration))
        await self._run(step)

    async def _run(self, step: RecoveryStep) -> None:
        """The journal says this host owns it, and the guest was never told to run under that epoch."""
        guest = self._guests[step.instance]
        await guest.open_backends(self._epoch(step))
        if self._desired(step) is RunState.RUNNING:
            await guest.run(self._epoch(step))
        await self._keep(step)

    def _desired(self, step: RecoveryStep) -> RunState:
        state = self._host.journal.state
        incoming, outgoing = state.incoming.get(step.migration or ""), state.outgoing.get(step.migration or "")
        if incoming is not None and incoming.prepared is not None:
            return RunState(incoming.prepared.run_state)
        if outgoing is not None and outgoing.desired is not None:
            return RunState(outgoing.desired)
        return RunState.RUNNING

    async def _return(self, step: RecoveryStep) -> None:
        assert step.migration is not None
        await self._host.journal.commit(rules.Return(step.migration, "guest_lost"))

    async def _refuse(self, step: RecoveryStep) -> None:
        """The connection died with the daemon: no handoff can come. The verdict first, then the guest."""
        assert step.migration is not None
        await self._host.journal.commit(rules.Refuse(step.migration, step.reason))
        guest = self._guests.get(step.instance)
        if guest is not None:
            await guest.destroy()
        self._host.documents.remove_arrival(step.migration)

    async def _destroy(self, step: RecoveryStep) -> None:
        await self._guests[step.instance].destroy()

    async def _lost(self, step: RecoveryStep) -> None:
        log.error("guest.lost", instance=step.instance, why=step.reason)
        await self._host.journal.commit(rules.Lose(step.instance, step.reason))

    async def _indeterminate(self, step: RecoveryStep) -> None:
        log.error("recovery.indeterminate", instance=step.instance, why=step.reason)
