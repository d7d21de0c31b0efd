"""A daemon's restart: find the guests that outlived it, and do what `ownership.recovery` says."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence

import structlog

from vmmigrate.daemon.adoption import find_guests, renew_older_copy
from vmmigrate.daemon.foreign import finish_adoptions
from vmmigrate.daemon.host import Host, Instance, process_of
from vmmigrate.daemon.migrations import Migrations
from vmmigrate.engine.frozen import PENDING, not_hashed
from vmmigrate.engine.limits import MigrationOptions
from vmmigrate.engine.metrics import MigrationRecord, Outcome, outcome_of
from vmmigrate.errors import HandoffInDoubt, HypervisorError, JournalError, VmMigrateError
from vmmigrate.hypervisor.base import Guest, RunState
from vmmigrate.net.identity import Identity, Role
from vmmigrate.ownership import rules
from vmmigrate.ownership.records import Epoch
from vmmigrate.ownership.recovery import RecoveryStep, Step, plan
from vmmigrate.ownership.state import Holding, Incoming, Outgoing
from vmmigrate.wire import phases

log = structlog.get_logger(__name__)


async def recover(host: Host, migrations: Migrations) -> None:
    """Re-adopt, pause what must not run, finish or undo what was under way. Before the daemon serves anybody.

    One instance that cannot be decided about (`indeterminate`) does not keep the others waiting.

    Raises: JournalError, StorageError.
    """
    _load_documents(host)
    for record in host.documents.load_records():
        if record.get("integrity") == PENDING:
            record["integrity"] = not_hashed("the daemon stopped before it was done")
        migrations.reports.past[record["migration_id"]] = record
    found = await find_guests(host)
    host.strays = dict(found.strays)
    recovery = _Recovery(host, migrations, found.guests)
    journal = host.journal
    try:
        steps = plan(journal.state, found.seen, journal.newest_record, found.unreachable, journal.id)
        await renew_older_copy(host, found)
        await recovery.take_all(steps)
    except BaseException:
        for guest in found.guests.values():
            guest.detach()
        raise
    for instance_id in list(host.instances):
        await host.give_way(instance_id)
    await finish_adoptions(host)
    recovery.note_unsaved()


def _load_documents(host: Host) -> None:
    """What the journal's instances are; documents of arrivals that ended are removed, of acquired ones promoted.

    A document that the journal does not know is left where it is: the journal may be the thing that was lost.
    """
    state = host.journal.state
    for migration, incoming in state.incoming.items():
        if incoming.stage in {Incoming.ACQUIRED, Incoming.STARTED}:
            host.documents.promote_arrival(migration, incoming.instance)
        elif incoming.stage not in {Incoming.RESERVED, Incoming.PREPARED}:
            host.documents.remove_arrival(migration)
    for document in host.documents.load_instances():
        known = state.instances.get(document.instance_id)
        if known is None:
            log.error("recovery.unknown_document", instance=document.instance_id)
        elif known.holding is Holding.REMOVED:
            host.documents.remove_instance(document.instance_id)
        else:
            host.instances[document.instance_id] = Instance(document)


class _Recovery:
    """Takes one step after the other."""

    def __init__(self, host: Host, migrations: Migrations, guests: Mapping[str, Guest]) -> None:
        self._host = host
        self._migrations = migrations
        self._guests = dict(guests)
        self._done: set[str] = set()
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

    async def take_all(self, steps: Sequence[RecoveryStep]) -> None:
        """Take the steps in order. An instance on which one fails is left to an operator, unless its guest is gone:
        that is a fact of its own, and decides what is to be done instead.

        Raises: JournalError.
        """
        for step in steps:
            if step.instance in self._done:
                continue
            log.info("recovery.step", step=step.step.value, instance=step.instance, migration=step.migration)
            try:
                await self._steps[step.step](step)
                self._note_record(step)
            except JournalError:
                raise
            except VmMigrateError as exc:
                self._done.add(step.instance)
                await self._after_failure(step, exc)

    async def _after_failure(self, step: RecoveryStep, exc: VmMigrateError) -> None:
        log.error("recovery.step_failed", step=step.step.value, instance=step.instance, code=exc.code, why=exc.text)
        guest = self._guests.pop(step.instance, None)
        if exc.code == "guest_lost" and guest is not None:
            await guest.destroy()
            without = plan(self._host.journal.state, {}, self._host.journal.newest_record)
            others = _Recovery(self._host, self._migrations, {})
            await others.take_all([again for again in without if again.instance == step.instance])
            return
        self._mark(step.instance, f"{step.step.value} failed at the restart: {exc.text}")
        if guest is not None:
            self._let_be(step.instance, guest)

    def _mark(self, instance_id: str, reason: str) -> None:
        self._host.indeterminate[instance_id] = reason

    def _let_be(self, instance_id: str, guest: Guest) -> None:
        """Nothing is decided about it: it stays as it is, and can be found to be silenced."""
        guest.detach()
        instance = self._host.instances.get(instance_id)
        if instance is not None:
            instance.guest = None
        self._host.strays.setdefault(instance_id, []).append(guest.process)

    def _note_record(self, step: RecoveryStep) -> None:
        """A migration that ended with the last daemon has a record all the same."""
        ended = _OUTCOMES.get(step.step)
        if step.migration is not None and ended is not None:
            self._write_record(step.migration, ended, step.reason)

    def note_unsaved(self) -> None:
        """So has one that had ended already, when the last daemon died before it had saved the record. Only of the
        newest: those of long ago have been dropped."""
        state = self._host.journal.state
        for migration, outgoing in list(state.outgoing.items())[-_UNSAVED:]:
            if outgoing.stage in _OUTGOING_OUTCOMES:
                code = "resolved_to_source" if outgoing.stage is Outgoing.RESOLVED else outgoing.code
                self._write_record(migration, _OUTGOING_OUTCOMES[outgoing.stage], code)
        for migration, incoming in list(state.incoming.items())[-_UNSAVED:]:
            if incoming.stage in _INCOMING_OUTCOMES:
                self._write_record(migration, _INCOMING_OUTCOMES[incoming.stage], incoming.code)

    def _write_record(self, migration: str, ended: Outcome, code: str | None) -> None:
        if migration in self._migrations.reports.past or migration in self._migrations.reports.records:
            return
        state, own = self._host.journal.state, self._host.identity
        incoming, outgoing = state.incoming.get(migration), state.outgoing.get(migration)
        found = incoming or outgoing
        assert found is not None
        role = phases.Role.DESTINATION if incoming else phases.Role.SOURCE
        peer = incoming.reserved.source_host if incoming else outgoing.ticket.destination_host if outgoing else ""
        peers = {role.value: own.uri, role.peer.value: Identity(own.trust_domain, Role.HOST, peer).uri}
        if code == "guest_lost" and role is phases.Role.SOURCE and self._is_lost(found.instance):
            ended = Outcome.GUEST_LOST
        record = MigrationRecord(migration, found.instance, role, peers, awaiting_peer=False)
        code = "guest_lost" if ended is Outcome.GUEST_LOST else code or "daemon_restarted"
        error = VmMigrateError("the daemon restarted", code=code)
        if ended is Outcome.FAILED:
            ended = outcome_of(error, phases.Phase.FAILED)
        record.finish(ended, None if ended is Outcome.MOVED else error)
        self._migrations.reports.records[migration] = record
        self._host.nursery.start_soon(self._migrations.reports.save, record)  # the journal forgets it one day

    def _is_lost(self, instance: str) -> bool:
        known = self._host.journal.state.instances.get(instance)
        return known is not None and known.holding is Holding.LOST

    def _epoch(self, step: RecoveryStep) -> Epoch:
        return self._host.journal.state.instances[step.instance].epoch

    async def _pause(self, step: RecoveryStep) -> None:
        await self._guests[step.instance].pause()

    async def _keep(self, step: RecoveryStep) -> None:
        self._host.watch(self._host.instances[step.instance], self._guests[step.instance])

    async def _undo_pause(self, step: RecoveryStep) -> None:
        """The guest first: a crash in between finds the attempt still open, and undoes it again."""
        assert step.migration is not None
        guest = self._guests[step.instance]
        await guest.open_backends(self._epoch(step))
        if self._host.journal.state.outgoing[step.migration].desired == RunState.RUNNING.value:
            await guest.run(self._epoch(step))
        await self._host.journal.commit(rules.EndAttempt(step.migration, step.reason))
        await self._keep(step)

    async def _end_attempt(self, step: RecoveryStep) -> None:
        assert step.migration is not None
        await self._host.journal.commit(rules.EndAttempt(step.migration, step.reason))

    async def _settle(self, step: RecoveryStep) -> None:
        """In doubt: the guest stays paused, and the destination is asked; also when the guest is gone meanwhile."""
        assert step.migration is not None
        outgoing = self._host.journal.state.outgoing[step.migration]
        guest = self._guests.get(step.instance)
        if guest is None:
            log.error("recovery.in_doubt_without_guest", instance=step.instance, migration=step.migration)
            await self._host.journal.commit(rules.Lose(step.instance, "the guest process is gone"))
        else:
            with contextlib.suppress(HypervisorError):
                await guest.note_record(*self._host.journal.position)
            self._host.watch(self._host.instances[step.instance], guest)
        destination = Identity(self._host.identity.trust_domain, Role.HOST, outgoing.ticket.destination_host)
        migration = self._migrations.make_source(step.migration, step.instance, destination, guest, MigrationOptions())
        migration.desired = RunState(outgoing.desired or RunState.RUNNING.value)
        migration.record.finish(Outcome.UNKNOWN, HandoffInDoubt("the daemon restarted while in doubt"))
        self._migrations.reports.records[step.migration] = migration.record
        self._host.nursery.start_soon(self._migrations.settle_source, migration)

    async def _finish_start(self, step: RecoveryStep) -> None:
        """Acquired and alive: open everything and start, or return it durably."""
        assert step.migration is not None
        guest = self._guests[step.instance]
        try:
            await guest.open_backends(self._epoch(step))
        except HypervisorError as exc:
            await self._return_durably(step, exc.code)
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
        await self._return_durably(step, "guest_lost" if step.instance not in self._guests else step.reason)

    async def _return_durably(self, step: RecoveryStep, code: str) -> None:
        """Only a process that is gone can surely hold no disk open: it ends before the verdict is given."""
        assert step.migration is not None
        spawned = self._host.journal.state.instances[step.instance].guest
        guest = self._guests.get(step.instance)
        if guest is not None:
            guest.detach()
        if spawned is not None:
            await self._host.hypervisor.end_leftover(process_of(spawned))
        await self._host.journal.commit(rules.Return(step.migration, code))

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
        self._mark(step.instance, step.reason)
        guest = self._guests.get(step.instance)
        if guest is not None:
            self._let_be(step.instance, guest)


# How a migration ended that a step finished; steps that go on (settle) or have none (keep) are not here.
_OUTCOMES: Mapping[Step, Outcome] = {
    Step.END_ATTEMPT: Outcome.FAILED,
    Step.UNDO_PAUSE: Outcome.FAILED,
    Step.REFUSE: Outcome.FAILED,
    Step.RETURN: Outcome.FAILED,
    Step.FINISH_START: Outcome.MOVED,
    Step.LOST: Outcome.GUEST_LOST,
}

_UNSAVED = 64  # more cannot have been about to be saved

# How a migration had ended before, by what the journal says of it.
_OUTGOING_OUTCOMES: Mapping[Outgoing, Outcome] = {
    Outgoing.ENDED: Outcome.FAILED,
    Outgoing.RECLAIMED: Outcome.FAILED,
    Outgoing.FREED: Outcome.MOVED,
    Outgoing.RESOLVED: Outcome.FAILED,
}
_INCOMING_OUTCOMES: Mapping[Incoming, Outcome] = {
    Incoming.STARTED: Outcome.MOVED,
    Incoming.REFUSED: Outcome.FAILED,
    Incoming.RETURNED: Outcome.FAILED,
    Incoming.ABANDONED: Outcome.FAILED,
}
