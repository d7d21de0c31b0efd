"""Migrations of one host: tickets out, arrivals in, the protocol port, settling, cancelling, records."""

from __future__ import annotations

import contextlib
import secrets
import time
import uuid
from collections import defaultdict
from collections.abc import Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import structlog
import trio

from vmmigrate.api.client import open_client
from vmmigrate.api.models import MigrateIn, MigrateOut
from vmmigrate.daemon.host import Host
from vmmigrate.daemon.orders import options_of, options_shown, source_address_of
from vmmigrate.daemon.reports import Reports
from vmmigrate.daemon.upkeep import sweep
from vmmigrate.engine.abilities import narrowed, of_this_release
from vmmigrate.engine.destination import migrate_in
from vmmigrate.engine.frozen import Frozen, note_integrity
from vmmigrate.engine.incoming import DestinationMigration
from vmmigrate.engine.limits import MigrationOptions
from vmmigrate.engine.metrics import MigrationRecord, Outcome, outcome_of
from vmmigrate.engine.outgoing import SettleAnswer, SourceMigration, settle
from vmmigrate.engine.source import migrate_out
from vmmigrate.engine.steering import Steering
from vmmigrate.errors import (
    HandoffInDoubt,
    IdentityError,
    JournalError,
    MigrationCancelled,
    PeerError,
    RequestError,
    TransportError,
    UsageError,
    VmMigrateError,
)
from vmmigrate.hypervisor.base import Guest, RunState
from vmmigrate.net.channel import Channel, ChannelLimits, open_channel, refusal_of
from vmmigrate.net.door import BulkDoor
from vmmigrate.net.identity import Identity, Role
from vmmigrate.net.secrets import ticket_hash
from vmmigrate.net.tls import ServerCredentials, TlsStream, close_tls, connect_tls
from vmmigrate.ownership import records as r
from vmmigrate.ownership import rules
from vmmigrate.ownership.requests import Request
from vmmigrate.ownership.rules import Answer, OwnershipRefusal
from vmmigrate.ownership.state import OPEN_INCOMING, Holding, Incoming, Outgoing
from vmmigrate.ram.forecast import PauseHistory
from vmmigrate.spec import amend
from vmmigrate.wire import phases
from vmmigrate.wire.messages import Offer, Resume
from vmmigrate.wire.negotiate import Abilities

log = structlog.get_logger(__name__)

TICKET_BYTES = 32
_LEARNT_KEPT = 1000
K = TypeVar("K", bound=dict[Any, Any])


class Migrations:
    """All migrations that this daemon knows of, both ways.

    Attributes:
        reports: What is known of each, also of those that are over.
        sources: Outgoing migrations whose guest this daemon holds; arriving: incoming ones under way.
        channels: The control channel of each migration that is under way.
        abilities: What this host offers and chooses among.
        cancelled: Migrations that were called off, and why.
    """

    def __init__(
        self,
        host: Host,
        door: BulkDoor,
        credentials: ServerCredentials,
        ports: Mapping[str, int],
        api_url: str,
        abilities: Abilities | None = None,
    ) -> None:
        self.host = host
        self.door = door
        self.credentials = credentials
        self.ports = ports
        self.api_url = api_url
        self.reports = Reports(host.documents)
        self.sources: dict[str, SourceMigration] = {}
        self.channels: dict[str, Channel] = {}
        self.cancelled: dict[str, VmMigrateError] = {}
        self.arriving: dict[str, DestinationMigration] = {}
        self._plans: dict[tuple[str, str], dict[str, Any]] = {}
        self._histories: defaultdict[str, PauseHistory] = defaultdict(PauseHistory)
        self.abilities = abilities or _abilities(host)
        self.deadlines = deadlines = host.config.limits.deadlines
        self._channel_limits = ChannelLimits(
            heartbeat_s=deadlines.heartbeat_s,
            silence_s=deadlines.silence_s,
            send_s=deadlines.send_s,
            goodbye_s=deadlines.goodbye_s,
        )

        host.on_guest_end = self._guest_ended

    # -- what is known ---------------------------------------------------------------------------------------------

    def side(self, migration_id: str) -> dict[str, Any]:
        """What this host's journal says of M: a pure read, never evidence."""
        state = self.host.journal.state
        incoming, outgoing = state.incoming.get(migration_id), state.outgoing.get(migration_id)
        return {
            "migration_id": migration_id,
            "journal_id": self.host.journal.id,
            "incoming": incoming.stage.value if incoming else None,
            "outgoing": outgoing.stage.value if outgoing else None,
            "verdict": rules.verdict(state, migration_id).value,
            "released_epoch": list(outgoing.released.epoch) if outgoing and outgoing.released else None,
            "notified_epoch": list(outgoing.notified) if outgoing and outgoing.notified else None,
        }

    # -- out: the source -------------------------------------------------------------------------------------------

    async def migrate_out(self, instance_id: str, request: MigrateOut) -> dict[str, Any]:
        """Make a migration that awaits its peer, and the ticket for it.

        Raises: RequestError, OwnershipRefusal, HypervisorError (`not_migratable`); nothing was made.
        """
        host = self.host
        host.permit(instance_id, Request.MIGRATE_OUT)
        guest = host.guest(instance_id)
        if request.destination_host == host.identity.name:
            raise RequestError(f"instance {instance_id} is on host {host.identity.name} already", code="same_host")
        await guest.list_payloads()
        migration_id, ticket = request.migration_id or str(uuid.uuid4()), secrets.token_hex(TICKET_BYTES)
        expires_at_s = int(time.time() + self.deadlines.ticket_s)
        destination = Identity(host.identity.trust_domain, Role.HOST, request.destination_host)
        migration = self.make_source(migration_id, instance_id, destination, guest, options_of(request))
        issue = rules.IssueTicket(
            r.TicketIssued(migration_id, instance_id, request.destination_host, ticket_hash(ticket), expires_at_s)
        )
        async with host.instance(instance_id).lock:  # whatever was asked of the guest before is done
            decision = await host.journal.commit(issue)
        for record in decision.records:
            if isinstance(record, r.Ended):
                newer = RequestError("a newer migration took its place", code="superseded")
                self._close_record(record.migration, newer)
        self.sources[migration_id], self.reports.records[migration_id] = migration, migration.record
        host.nursery.start_soon(self._expire, migration_id, expires_at_s)
        log.info("migration.awaits_peer", migration=migration_id, instance=instance_id, to=destination.name)
        return {
            "migration_id": migration_id,
            "ticket": ticket,
            "instance_id": instance_id,
            "source_host": host.identity.name,
            "source_address": f"{self._advertised()}:{self.ports['migration']}",
            "source_url": self.api_url,
            "expires_at_s": expires_at_s,
        }

    def make_source(
        self,
        migration_id: str,
        instance_id: str,
        destination: Identity,
        guest: Guest | None,
        options: MigrationOptions,
    ) -> SourceMigration:
        """An outgoing migration, with its record; nothing knows of it yet."""
        instance = self.host.instance(instance_id)
        record = MigrationRecord(
            migration_id,
            instance_id,
            phases.Role.SOURCE,
            {"source": self.host.identity.uri, "destination": destination.uri},
        )
        steering = Steering(options)
        record.options = partial(options_shown, steering)
        return SourceMigration(
            migration_id=migration_id,
            instance_id=instance_id,
            own=self.host.identity,
            destination=destination,
            guest=guest,
            spec=instance.document.spec,
            properties=instance.document.properties(),
            blobs=instance.document.blobs,
            journal=self.host.journal,
            door=self.door,
            bulk_port=self.ports["bulk"],
            record=record,
            ask_destination=partial(self._ask_destination, destination),
            abilities=self.abilities,
            steering=steering,
            history=_newest(self._histories)[destination.name],
            planned=self._plans.get((instance_id, destination.name)),
            deadlines=self.deadlines,
        )

    async def _expire(self, migration_id: str, expires_at_s: int) -> None:
        await trio.sleep(max(expires_at_s - time.time(), 0))
        with self.host.journal_failures():
            error = RequestError("no destination came before the ticket expired", code="ticket_expired")
            await self.end_awaiting(migration_id, error)

    async def end_awaiting(self, migration_id: str, error: VmMigrateError) -> bool:
        """End a migration whose peer has not come. False: it has come meanwhile, or is over."""
        awaiting = frozenset({Outgoing.AWAITING_PEER})
        decision = await self.host.journal.commit(rules.EndAttempt(migration_id, error.code, awaiting))
        if decision.records:
            self._close_record(migration_id, error)
        return bool(decision.records)

    def _close_record(self, migration_id: str, error: VmMigrateError) -> None:
        self.sources.pop(migration_id, None)
        record = self.reports.records.get(migration_id)
        if record is not None:
            record.finish(outcome_of(error, None), error)
            self.host.nursery.start_soon(self.reports.save, record)

    async def serve_source(self, stream: TlsStream, peer: Identity) -> None:
        """One connection on the migration port: a destination that comes for its guest."""
        with self.host.journal_failures():
            async with open_channel(stream, phases.Role.SOURCE, self._channel_limits) as channel:
                try:
                    offer = await channel.expect(Offer, Resume, deadline_s=self.deadlines.offer_s)
                    if isinstance(offer, Resume):
                        await self._hand_in(channel, offer, peer)
                        return
                    await self._consume_ticket(offer, peer)
                except JournalError:
                    raise
                except VmMigrateError as error:
                    log.info("migration.refused", peer=str(peer), code=error.code, text=error.text)
                    await self._refuse(channel, error)
                    return
                await self._run_source(channel, offer)

    async def _consume_ticket(self, offer: Offer, peer: Identity) -> None:
        """Durably used before anything is answered. Raises: IdentityError."""
        event = rules.ConsumeTicket(
            offer.migration_id, offer.instance_id, ticket_hash(offer.ticket), peer.name, int(time.time())
        )
        await self.host.journal.commit(event)

    async def _hand_in(self, channel: Channel, resume: Resume, peer: Identity) -> None:
        """A destination that was cut off comes again: its channel goes to the migration that waits for it.

        Raises: RequestError, IdentityError; the destination is told.
        """
        migration = self.sources.get(resume.migration_id)
        if migration is None or migration.over.is_set():
            raise self._why_not_resumable(resume.migration_id, peer)
        if peer != migration.destination:
            raise IdentityError(f"{peer} is not the destination of {resume.migration_id}", code="wrong_host")
        old = self.channels.get(resume.migration_id)
        if old is not None:
            old.fail(TransportError("the destination has come again: the session is over", code="link_lost"))
        migration.resumption.hand_in(channel, resume)
        self._enter(resume.migration_id, channel)
        await migration.over.wait()
        if channel.phase is phases.Phase.RESUMING:
            raise self._why_not_resumable(resume.migration_id, peer)

    def _why_not_resumable(self, migration_id: str, peer: Identity) -> VmMigrateError:
        """For a destination that was cut off, what ended its migration here: both records then say the same."""
        with contextlib.suppress(RequestError):
            record = self.reports.describe(migration_id)
            if record["error"] is not None and record["peers"]["destination"] == peer.uri:
                return RequestError(record["error"]["message"], code=record["error"]["code"])
        return RequestError(f"no migration {migration_id} goes on here", code="not_resumable")

    def _guest_ended(self, migration_id: str, error: VmMigrateError) -> None:
        """The guest of an outgoing migration ended by itself, and durably the attempt with it."""
        record = self.reports.records.get(migration_id)
        if record is not None and record.awaiting_peer and migration_id not in self.channels:
            self._close_record(migration_id, error)
        self.abort(migration_id, error)

    async def _refuse(self, channel: Channel, error: VmMigrateError) -> None:
        if channel.phase in {phases.Phase.OFFERED, phases.Phase.RESUMING}:
            with trio.move_on_after(self.deadlines.goodbye_s):
                await channel.send(refusal_of(error))
        else:
            await channel.say_goodbye(error)

    async def _run_source(self, channel: Channel, offer: Offer) -> None:
        migration = self.sources.get(offer.migration_id)
        if migration is None:  # its guest ended in the very moment when the ticket was used
            await channel.say_goodbye(self.cancelled[offer.migration_id])
            return
        self._enter(migration.migration_id, channel)
        try:
            await migrate_out(channel, offer, migration)
        finally:
            self._note_plan(migration)
            self.channels.pop(migration.migration_id, None)
            self.cancelled.pop(migration.migration_id, None)
            await self._let_go(migration)
            if migration.record.outcome is not Outcome.UNKNOWN:
                self.sources.pop(migration.migration_id, None)
        if migration.record.outcome is Outcome.UNKNOWN:
            self.host.nursery.start_soon(self.settle_source, migration)
        else:
            await self.reports.save(migration.record)
        sweep()

    def _note_plan(self, migration: SourceMigration) -> None:
        """A plan is kept until the move is made, or planned anew."""
        key = (migration.instance_id, migration.destination.name)
        if migration.record.plan is not None:
            _newest(self._plans)[key] = migration.record.plan
        elif migration.record.outcome is Outcome.MOVED:
            self._plans.pop(key, None)

    def _enter(self, migration_id: str, channel: Channel) -> None:
        """The channel of a migration is open; one that was cancelled on the way here ends at once."""
        self.channels[migration_id] = channel
        if migration_id in self.cancelled:
            channel.fail(self.cancelled[migration_id])

    async def _let_go(self, migration: SourceMigration) -> None:
        """Forget the guest once the journal says that it is not ours any more, and free what is left of a lost one:
        whoever was the first to notice may have been the engine. A superseded one goes now."""
        known = self.host.journal.state.instances[migration.instance_id]
        instance = self.host.instances.get(migration.instance_id)
        if migration.frozen is not None and migration.frozen.ram is not None:
            self.host.nursery.start_soon(self._hash_again, migration, migration.frozen)
        with trio.CancelScope(shield=True):
            if instance is not None and known.holding in {Holding.ELSEWHERE, Holding.LOST}:
                guest, instance.guest = instance.guest, None
                if guest is not None:
                    await guest.destroy()
            await self.host.give_way(migration.instance_id)

    async def _hash_again(self, migration: SourceMigration, frozen: Frozen) -> None:
        """The guest runs elsewhere. Was everything sent as it was last?"""
        migration.frozen = None
        await note_integrity(migration.record, frozen)
        await self.reports.save(migration.record)

    async def settle_source(self, migration: SourceMigration) -> None:
        """Ask until there is evidence, or an operator resolves it; the record then tells the outcome."""
        self.sources[migration.migration_id] = migration
        with self.host.journal_failures():
            try:
                await settle(migration)
            except HandoffInDoubt as doubt:
                migration.record.finish(Outcome.UNKNOWN, doubt)
                log.error("migration.indeterminate", migration=migration.migration_id, text=doubt.text)
                return
            await self._let_go(migration)
            self.sources.pop(migration.migration_id, None)
            await self.reports.save(migration.record)

    async def _ask_destination(self, destination: Identity, url: str, migration_id: str) -> SettleAnswer:
        """Raises: VmMigrateError: anything but a well formed answer in time; none of it is evidence."""
        try:
            with trio.fail_after(self.deadlines.settle_s):
                async with open_client(url, self.host.config.tls_files(), destination) as client:
                    reply = await client.post(f"/v1/migrations/{migration_id}/side:settle")
            code = reply.get("code")
            return SettleAnswer(Answer(reply["answer"]), str(reply["journal_id"]), None if code is None else str(code))
        except trio.TooSlowError:
            raise TransportError(f"{url}: no answer within {self.deadlines.settle_s:g} s", code="timed_out") from None
        except (KeyError, TypeError, ValueError, AttributeError):
            raise PeerError(f"{url}: not an answer to settle", code="bad_reply") from None

    # -- in: the destination ---------------------------------------------------------------------------------------

    async def migrate_in(self, request: MigrateIn) -> dict[str, Any]:
        """Reserve, and fetch the guest in the background; the record tells how it goes.

        Raises: RequestError, OwnershipRefusal, UsageError, SpecError; nothing was reserved.
        """
        host = self.host
        host.check_determinate(request.instance_id)
        address = source_address_of(request.source_address)
        replacements = amend.parse_replacements(request.replacements)
        source = Identity(host.identity.trust_domain, Role.HOST, request.source_host)
        context = self.credentials.client(source)
        await host.journal.commit(
            rules.Reserve(r.Reserved(request.migration_id, request.instance_id, source.name, request.source_url))
        )
        record = MigrationRecord(
            request.migration_id,
            request.instance_id,
            phases.Role.DESTINATION,
            {"source": source.uri, "destination": host.identity.uri},
            awaiting_peer=False,
        )
        self.reports.records[request.migration_id] = record
        migration = DestinationMigration(
            migration_id=request.migration_id,
            instance_id=request.instance_id,
            own=host.identity,
            source=source,
            source_host=address[0],
            ticket=request.ticket,
            context=context,
            journal=host.journal,
            record=record,
            build_guest=partial(host.build_arrival, request.migration_id, request.instance_id),
            welcome=partial(host.welcome, request.migration_id, request.instance_id),
            api_url=self.api_url,
            abilities=self.abilities,
            replacements=replacements,
            allowances=amend.Allowances.of(
                request.keep,
                allow_same_generation=request.allow_same_generation,
                allow_volume_change=request.allow_volume_change,
            ),
            features=frozenset(host.config.allow.features),
            max_ram_bytes=host.config.limits.max_ram_bytes,
            deadlines=self.deadlines,
        )
        host.nursery.start_soon(self._run_destination, migration, address)
        return record.as_dict()

    async def _run_destination(self, migration: DestinationMigration, address: tuple[str, int]) -> None:
        self.arriving[migration.migration_id] = migration
        migration.reconnect = partial(self._connected, migration, address)
        with self.host.journal_failures():
            try:
                async with self._connected(migration, address) as channel:
                    await migrate_in(channel, migration)
            except JournalError:
                raise
            except VmMigrateError as error:
                await self._fail_unconnected(migration, error)
            del self.arriving[migration.migration_id]
            self.cancelled.pop(migration.migration_id, None)
            await self.host.finish_arrival(migration.migration_id, migration.instance_id)
            migration.over.set()
            await self.reports.save(migration.record)
        sweep()

    @asynccontextmanager
    async def _connected(self, migration: DestinationMigration, address: tuple[str, int]) -> Any:
        stream, _ = await connect_tls(*address, migration.context, migration.source, self.deadlines.connect_s)
        try:
            async with open_channel(stream, phases.Role.DESTINATION, self._channel_limits) as channel:
                self._enter(migration.migration_id, channel)
                try:
                    yield channel
                finally:
                    if self.channels.get(migration.migration_id) is channel:
                        del self.channels[migration.migration_id]
        finally:
            with trio.CancelScope(shield=True):
                await close_tls(stream)

    async def _fail_unconnected(self, migration: DestinationMigration, error: VmMigrateError) -> None:
        """The source could not be reached, or is not who it should be."""
        await self.host.journal.commit(rules.Refuse(migration.migration_id, error.code))
        migration.record.finish(outcome_of(error, None), error)
        log.info("migration.ended", migration=migration.migration_id, code=error.code, text=error.text)

    async def settle_side(self, migration_id: str, asking: Identity) -> dict[str, Any]:
        """Decide M for its source (or an orchestrator): what is answered is durable.

        Raises: IdentityError `forbidden`, OwnershipRefusal `indeterminate`.
        """
        host = asking.name if asking.role is Role.HOST else None
        self._check_can_decide(migration_id)
        decision = await self.host.journal.commit(
            rules.Settle(migration_id, host, await self._arriving_guest_runs(migration_id))
        )
        if decision.records and migration_id in self.channels:
            # The handoff may still come out of a socket buffer: it will find `refused`.
            self.channels[migration_id].fail(OwnershipRefusal("the source asked and was refused", code="settled"))
        answer = decision.answer
        assert answer is not None
        if answer is Answer.STARTED and migration_id in self.host.arrivals:
            answer = Answer.PENDING  # any moment now: whoever hears that it moved shall find it here
        incoming = self.host.journal.state.incoming.get(migration_id)
        return {
            "migration_id": migration_id,
            "answer": answer.value,
            "journal_id": self.host.journal.id,
            "code": incoming.code if incoming else None,
        }

    def _check_can_decide(self, migration_id: str) -> None:
        """What was decided stays decided; but a host that cannot explain its processes decides nothing new.

        Raises: OwnershipRefusal `indeterminate`.
        """
        incoming = self.host.journal.state.incoming.get(migration_id)
        reason = self.host.indeterminate.get(incoming.instance) if incoming else None
        if incoming is not None and incoming.stage in OPEN_INCOMING and reason is not None:
            raise OwnershipRefusal(f"instance {incoming.instance}: {reason}", code="indeterminate")

    async def _arriving_guest_runs(self, migration_id: str) -> bool:
        incoming = self.host.journal.state.incoming.get(migration_id)
        arrival = self.host.arrivals.get(migration_id)
        if incoming is None or incoming.stage is not Incoming.PREPARED or arrival is None or arrival.guest is None:
            return False
        return (await arrival.guest.status()).run_state is RunState.RUNNING

    # -- cancel ----------------------------------------------------------------------------------------------------

    async def cancel(self, migration_id: str, reason: str) -> dict[str, Any]:
        """Stop a migration that can still be stopped. One answer for both sides: what has answered here stays true.

        Raises: RequestError `in_doubt` (409: given away, nobody can call it back), `verdict_given` (taken over),
            `migration_over`.
        """
        self.reports.describe(migration_id)
        record = self.reports.records.get(migration_id)
        self._check_not_given_away(migration_id, record)
        error = MigrationCancelled(reason)
        state = self.host.journal.state
        if migration_id in state.outgoing and await self.end_awaiting(migration_id, error):
            return self.reports.describe(migration_id)
        if record is None or record.outcome is not None:
            raise RequestError(f"migration {migration_id} is over", code="migration_over")
        incoming = state.incoming.get(migration_id)
        if incoming is not None and incoming.stage is Incoming.PREPARED:
            # The handoff may be on its way, or be waiting for the journal: whoever writes first has decided.
            await self.host.journal.commit(rules.Refuse(migration_id, error.code))
        self.abort(migration_id, error)
        return self.reports.describe(migration_id)

    def _check_not_given_away(self, migration_id: str, record: MigrationRecord | None) -> None:
        """The session tells it earlier than the journal: `released` may be on its way to the disk, and cannot be called
        back from there.

        Raises: RequestError `in_doubt`, `verdict_given`.
        """
        state = self.host.journal.state
        outgoing, incoming = state.outgoing.get(migration_id), state.incoming.get(migration_id)
        session = record.session if record is not None and record.outcome is None else None
        giving = session is not None and phases.Phase.IN_DOUBT in {session.phase, session.failed_in}
        if outgoing is not None and (giving or outgoing.stage is Outgoing.RELEASED):
            raise RequestError(f"migration {migration_id} is in doubt: the guest was given away", code="in_doubt")
        if incoming is not None and incoming.stage in {Incoming.ACQUIRED, Incoming.STARTED}:
            raise RequestError(f"migration {migration_id}: this host has taken the guest over", code="verdict_given")

    # -- adjust ----------------------------------------------------------------------------------------------------

    def adjust(self, migration_id: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Other limits for an outgoing migration, from now on.

        Raises: RequestError `not_the_source`, `migration_over`, `guest_paused` (the pause has begun: too late);
            UsageError `bad_request`: nothing was asked for.
        """
        record = self.reports.describe(migration_id)
        if not changes:
            raise UsageError("request: nothing to adjust was named", code="bad_request")
        if record["role"] != phases.Role.SOURCE.value:
            raise RequestError(f"migration {migration_id} is adjusted at its source", code="not_the_source")
        migration = self.sources.get(migration_id)
        if migration is None or record["outcome"] not in {None, Outcome.UNKNOWN.value}:
            raise RequestError(f"migration {migration_id} is over", code="migration_over")
        if migration.is_pausing:
            raise RequestError(f"migration {migration_id}: the pause of the guest has begun", code="guest_paused")
        migration.steering.change(changes)
        log.info("migration.adjusted", migration=migration_id, **changes)
        return self.reports.describe(migration_id)

    def abort(self, migration_id: str, error: VmMigrateError) -> None:
        """End a migration that is under way; the engine undoes it. One about to open its channel finds the word."""
        self.cancelled[migration_id] = error
        if migration_id in self.channels:
            self.channels[migration_id].fail(error)
        if migration_id in self.sources:
            self.sources[migration_id].resumption.abort(error)
        if migration_id in self.arriving:
            self.arriving[migration_id].cancelled = error

    def _advertised(self) -> str:
        host = self.host.config.listen.advertise or self.host.config.listen.migration[0]
        return f"[{host}]" if ":" in host else host


def _newest(kept: K) -> K:
    """The same, with room for another: what is learnt of hosts and instances that are named is not kept for ever."""
    while len(kept) >= _LEARNT_KEPT:
        del kept[next(iter(kept))]
    return kept


def _abilities(host: Host) -> Abilities:
    """What this release can do with this hypervisor, narrowed as the configuration says."""
    compat, bulk = host.config.compat, host.config.bulk
    everything = of_this_release(host.hypervisor.capabilities)
    return narrowed(everything, compat.spec_versions, compat.payloads, bulk.transports)
