"""An operator's word where evidence does not come: `resolve`, and `superseded`, which is carried to whoever may have
got the guest. Source of the rules: design 4.2, rule 8.

The winner runs its guest before it tells anybody, so a host that hears of it lets its own guest go at once. A host that
had passed the guest on passes the word on, too: what each has still to tell follows from its journal alone
(`rules.notices`), and is told again until it was acknowledged.
"""

from __future__ import annotations

import structlog
import trio

from vmmigrate.api.client import open_client
from vmmigrate.api.models import Resolve, Superseded
from vmmigrate.daemon.host import Host, Instance
from vmmigrate.daemon.migrations import Migrations
from vmmigrate.engine.incoming import HandedOver
from vmmigrate.engine.metrics import Outcome
from vmmigrate.errors import HypervisorError, IdentityError, JournalError, RequestError, VmMigrateError
from vmmigrate.hypervisor.base import Guest, RunState
from vmmigrate.net.identity import Identity, Role
from vmmigrate.net.threads import open_group
from vmmigrate.ownership import rules
from vmmigrate.ownership.records import Epoch, Reserved
from vmmigrate.ownership.rules import Notice, OwnershipRefusal
from vmmigrate.ownership.state import Incoming, Outgoing

log = structlog.get_logger(__name__)

DELIVER_AGAIN_FIRST_S = 0.5
DELIVER_AGAIN_MOST_S = 30.0


class Resolving:
    """Operators' words on the migrations of one host."""

    def __init__(self, host: Host, migrations: Migrations) -> None:
        self._host = host
        self._migrations = migrations
        self._being_run: set[str] = set()
        self._due = trio.Event()

    async def resolve(self, migration_id: str, wanted: Resolve, by: Identity) -> dict[str, object]:
        """Make this host the owner of the guest of M. The journal keeps who said so, and on what grounds.

        Returns: this host's side of M.

        Raises:
            RequestError, OwnershipRefusal: the rules say no; nothing was changed.
            HypervisorError: it is the owner now, and its guest could not be run; a restart of the daemon tries again.
        """
        log.warning("migration.resolve", migration=migration_id, winner=wanted.winner, by=by.uri)
        if wanted.winner == "source":
            await self._resolve_to_source(migration_id, wanted.fencing_proof, by)
        else:
            await self._resolve_to_destination(migration_id, wanted.released, by)
        return self._migrations.side(migration_id)

    # -- the source wins -------------------------------------------------------------------------------------------

    async def _resolve_to_source(self, migration_id: str, fencing_proof: str, by: Identity) -> None:
        journal = self._host.journal
        rules.decide(journal.state, rules.ResolveSource(migration_id, fencing_proof))
        proof = f"{by.uri}: {fencing_proof}"
        instance_id = journal.state.outgoing[migration_id].instance
        instance = self._host.instance(instance_id)
        async with instance.lock:
            guest = self._host.guest(instance_id)
            await guest.status()  # nothing is promised on behalf of a guest that is dead or does not answer
            self._being_run.add(instance_id)
            try:
                with trio.CancelScope(shield=True):
                    await journal.commit(rules.ResolveSource(migration_id, proof))
                    log.warning("migration.resolved", migration=migration_id, winner="source", proof=proof)
                    await self._run(migration_id, instance, guest)
                    await self._close_record(migration_id, proof)
            finally:
                self._being_run.discard(instance_id)
        self._due.set()

    async def _run(self, migration_id: str, instance: Instance, guest: Guest) -> None:
        """Run the guest under the operator's epoch, before anybody is told. Raises: HypervisorError."""
        instance_id, journal = instance.document.instance_id, self._host.journal
        epoch = journal.state.instances[instance_id].epoch
        try:
            await guest.open_backends(epoch)
            if journal.state.outgoing[migration_id].desired == RunState.RUNNING.value:
                await guest.run(epoch)
            await guest.note_record(*journal.position)
        except HypervisorError as exc:
            if exc.code == "guest_lost":
                await journal.commit(rules.Lose(instance_id, exc.text))
                instance.guest = None
                await guest.destroy()
            else:
                self._host.indeterminate[instance_id] = f"resolved to this host, and it could not be run: {exc.text}"
            raise

    async def _close_record(self, migration_id: str, proof: str) -> None:
        record = self._migrations.reports.records.get(migration_id)
        if record is not None:
            record.notes.append(f"resolved to the source by {proof}")
            error = VmMigrateError("an operator gave the guest back to the source", code="resolved_to_source")
            record.finish(Outcome.FAILED, error)
            await self._migrations.reports.save(record)

    # -- the destination wins --------------------------------------------------------------------------------------

    async def _resolve_to_destination(self, migration_id: str, released: list[int] | None, by: Identity) -> None:
        """The handoff that never came, from another hand: the migration goes on as if the source had sent it."""
        if released is None:
            raise RequestError("which epoch did the source's journal release?", code="no_released_epoch")
        state = self._host.journal.state
        rules.decide(state, rules.ResolveDestination(migration_id, Epoch(*released)))
        incoming = state.incoming[migration_id]
        self._host.check_determinate(incoming.instance)
        if incoming.stage is Incoming.PREPARED:
            await self._check_source_released(migration_id, incoming.reserved)
            channel = self._migrations.channels.get(migration_id)
            arriving = self._migrations.arriving.get(migration_id)
            if channel is None or arriving is None:
                raise OwnershipRefusal(f"migration {migration_id} is being given up here", code="migration_over")
            channel.fail(HandedOver(f"handed over by {by.uri}"))
            with trio.move_on_after(self._migrations.deadlines.resolve_s):
                await arriving.over.wait()

    async def _check_source_released(self, migration_id: str, reserved: Reserved) -> None:
        """The operator's word is taken only where the source cannot be asked. Raises: OwnershipRefusal."""
        source = Identity(self._host.identity.trust_domain, Role.HOST, reserved.source_host)
        try:
            with trio.fail_after(self._migrations.deadlines.settle_s):
                async with open_client(reserved.source_url, self._host.config.tls_files(), source) as client:
                    side = await client.get(f"/v1/migrations/{migration_id}/side")
        except (VmMigrateError, trio.TooSlowError) as exc:
            log.warning("resolve.source_silent", migration=migration_id, why=str(exc))
            return
        stage = side.get("outgoing") if isinstance(side, dict) else None
        if stage != Outgoing.RELEASED.value:
            text = f"migration {migration_id}: its source says {stage}, not that it gave the guest away"
            raise OwnershipRefusal(text, code="not_in_doubt")

    # -- superseded ------------------------------------------------------------------------------------------------

    async def supersede(self, migration_id: str, wanted: Superseded, asking: Identity) -> dict[str, object]:
        """Another host has the guest by an operator's word: durable first, then every guest of the instance is
        silenced, and only then it is acknowledged.

        Raises:
            IdentityError `forbidden`: *asking* did not give us the guest. OwnershipRefusal `newer_epoch`.
            HypervisorError: a guest did not obey; not acknowledged, so we shall be told again.
        """
        self._check_may_tell(migration_id, wanted.instance_id, asking)
        epoch, host = Epoch(*wanted.epoch), self._host
        async with host.lock_of(wanted.instance_id):
            with trio.CancelScope(shield=True):
                await self._supersede(wanted, epoch)
        self._due.set()
        log.warning("instance.superseded", instance=wanted.instance_id, epoch=list(epoch), by=asking.name)
        return {"migration_id": migration_id, "epoch": list(epoch), "journal_id": host.journal.id}

    async def _supersede(self, wanted: Superseded, epoch: Epoch) -> None:
        host = self._host
        await host.journal.commit(rules.Supersede(wanted.instance_id, epoch, Epoch(*wanted.since)))
        if not self._is_newer_here(wanted.instance_id, epoch):
            await host.silence(wanted.instance_id, epoch)
            await self._end_migrations(wanted.instance_id)

    def _check_may_tell(self, migration_id: str, instance_id: str, asking: Identity) -> None:
        """Only a host that gave us the guest: by this migration or, when a compaction has forgotten it, by another.
        And, when our journal was lost with that knowledge, any, because we own nothing that we could explain."""
        state = self._host.journal.state
        incoming = state.incoming.get(migration_id)
        by = state.incoming.values() if incoming is None else [incoming]
        if any((asking.name, instance_id) == (known.reserved.source_host, known.instance) for known in by):
            return
        if incoming is None and (instance_id not in state.instances or instance_id in self._host.indeterminate):
            return
        raise IdentityError(f"{asking} did not give instance {instance_id} to this host", code="forbidden")

    def _is_newer_here(self, instance_id: str, epoch: Epoch) -> bool:
        """Whether the guest has come back here from the winner meanwhile."""
        known = self._host.journal.state.instances.get(instance_id)
        return known is not None and known.epoch >= epoch

    async def _end_migrations(self, instance_id: str) -> None:
        """What is under way ends as superseded; the guest goes when nothing uses it any more."""
        error = OwnershipRefusal("the instance was given to another host by an operator", code="superseded")
        state, migrations = self._host.journal.state, self._migrations
        arriving = state.open_incoming(instance_id)
        if arriving is not None and arriving in migrations.channels:
            migrations.channels[arriving].fail(error)
        leaving = state.open_outgoing(instance_id)
        if leaving is None or await migrations.end_awaiting(leaving, error):
            await self._host.give_way(instance_id)
        elif state.outgoing[leaving].stage is not Outgoing.RELEASED:
            migrations.abort(leaving, error)

    # -- delivery --------------------------------------------------------------------------------------------------

    async def deliver_forever(self) -> None:
        """Tell whoever has to be told, until nobody is left; wakes when there may be somebody again."""
        pause_s = DELIVER_AGAIN_FIRST_S
        with self._host.journal_failures():
            while True:
                self._due = trio.Event()
                due = [notice for notice in rules.notices(self._host.journal.state) if self._may_tell(notice)]
                if await self._deliver_all(due):
                    pause_s = DELIVER_AGAIN_FIRST_S
                    await self._due.wait()
                    continue
                with trio.move_on_after(pause_s):
                    await self._due.wait()
                pause_s = min(2 * pause_s, DELIVER_AGAIN_MOST_S)

    def _may_tell(self, notice: Notice) -> bool:
        return notice.instance not in self._being_run and notice.instance not in self._host.indeterminate

    async def _deliver_all(self, due: list[Notice]) -> bool:
        """Whether all have acknowledged."""
        undelivered: list[Notice] = []

        async def deliver(notice: Notice) -> None:
            try:
                await self._deliver(notice)
            except JournalError:
                raise
            except VmMigrateError as exc:
                log.info("superseded.undelivered", migration=notice.migration, host=notice.host, code=exc.code)
                undelivered.append(notice)

        async with open_group() as nursery:
            for notice in due:
                nursery.start_soon(deliver, notice)
        return not undelivered

    async def _deliver(self, notice: Notice) -> None:
        """Raises: VmMigrateError: it was not acknowledged."""
        peer = Identity(self._host.identity.trust_domain, Role.HOST, notice.host)
        body = {"instance_id": notice.instance, "epoch": list(notice.epoch), "since": list(notice.since)}
        try:
            with trio.fail_after(self._migrations.deadlines.supersede_s):
                async with open_client(notice.url, self._host.config.tls_files(), peer) as client:
                    await client.post(f"/v1/migrations/{notice.migration}/side:supersede", body)
        except trio.TooSlowError:
            raise VmMigrateError(f"{notice.url}: no answer", code="timed_out") from None
        await self._host.journal.commit(rules.Notify(notice.migration, notice.epoch))
        log.warning("superseded.acknowledged", migration=notice.migration, host=notice.host)
