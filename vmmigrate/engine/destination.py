"""The destination of a migration, as straight-line code: one function per phase, in the order of the sequence diagram.

Up to `prepared` a failure costs nothing: the half-built guest is removed. After it exactly one verdict is given on M,
and each is durable before anybody acts on it or hears of it: `acquired` or `refused`, then `started` or `returned`.
`started` is the point of no return, written when everything is open and before the first vCPU instruction.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import structlog
import trio

from vmmigrate.devices.payload import MAX_PAYLOAD_BYTES, MAX_PAYLOADS, DevicePayload
from vmmigrate.devices.time import TimeData
from vmmigrate.engine import preamble
from vmmigrate.engine.agreement import note_negotiated
from vmmigrate.engine.journal import AsyncJournal
from vmmigrate.engine.limits import Deadlines
from vmmigrate.engine.metrics import MigrationRecord, Outcome, outcome_of
from vmmigrate.engine.ram import hash_ram_in_thread
from vmmigrate.errors import (
    HypervisorError,
    JournalError,
    NegotiationError,
    PayloadError,
    RemoteProtocolError,
    SpecError,
    TransportError,
    VmMigrateError,
)
from vmmigrate.hypervisor.base import ConsoleHistory, Guest, RunState
from vmmigrate.memory import PAGE_SIZE, RamLayout
from vmmigrate.net.bulk import BulkDestination
from vmmigrate.net.channel import Channel, refusal_of
from vmmigrate.net.door import open_streams
from vmmigrate.net.identity import Identity
from vmmigrate.net.secrets import RANDOM_BYTES, SessionContext, SessionSecrets
from vmmigrate.net.threads import open_group
from vmmigrate.net.tls import TlsContext
from vmmigrate.ownership import rules
from vmmigrate.ownership.records import Epoch
from vmmigrate.ownership.rules import OwnershipRefusal
from vmmigrate.ownership.state import Incoming
from vmmigrate.ram.digest import PageHash, condense
from vmmigrate.spec import chain
from vmmigrate.spec.amend import Allowances, Replacement, amend
from vmmigrate.spec.keys import SpecKey
from vmmigrate.spec.latest import InstanceSpec
from vmmigrate.wire import messages as m
from vmmigrate.wire.negotiate import DIGESTS, ENCODINGS, MAX_STREAMS, PROTOCOL_VERSIONS, TRANSPORTS
from vmmigrate.wire.phases import Kind, Phase

log = structlog.get_logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Arrival:
    """What the preamble says arrives, amended and upgraded; what a host needs to build the guest."""

    spec: InstanceSpec
    properties: Mapping[str, str]
    blobs: Mapping[str, bytes]
    layout: RamLayout
    run_state: RunState
    epoch: Epoch
    needed_bytes: int


BuildGuest = Callable[[Arrival], Awaitable[Guest]]


@dataclass
class DestinationMigration:
    """Everything that one incoming migration needs.

    Attributes:
        build_guest: Checks the arrival against this host and builds the guest, stopped; injected by the daemon.
        replacements: This host's backends, by the component they replace.
        payloads: Payload kinds and versions that this host can import.
        arrival: Known once the preamble was accepted.
    """

    migration_id: str
    instance_id: str
    own: Identity
    source: Identity
    source_host: str
    ticket: str
    context: TlsContext
    journal: AsyncJournal
    record: MigrationRecord
    build_guest: BuildGuest
    payloads: Mapping[str, tuple[int, ...]]
    facts: Mapping[str, str]
    api_url: str
    replacements: Mapping[SpecKey, Replacement] = field(default_factory=dict)
    allowances: Allowances = field(default_factory=Allowances)
    features: frozenset[str] = frozenset()
    spec_versions: tuple[str, ...] = chain.CHAIN.names
    max_ram_bytes: int = 1 << 46
    deadlines: Deadlines = field(default_factory=Deadlines)
    arrival: Arrival | None = None
    guest: Guest | None = None


@dataclass(frozen=True)
class Agreed:
    """What the source selected, and the secrets of the session."""

    select: m.Select
    secrets: SessionSecrets


async def migrate_in(channel: Channel, migration: DestinationMigration) -> None:
    """Take the guest over from a source that has proved who it is.

    The record tells the outcome; nothing is raised for a migration that failed.

    Raises:
        JournalError: The journal is poisoned; the daemon must exit. trio.Cancelled: the daemon stops.
    """
    migration.record.begin(channel.session)
    try:
        run_state = await _up_to_handoff(channel, migration)
        await _take_over(channel, migration, run_state)
    except JournalError:
        raise
    except VmMigrateError as error:
        await _give_up(channel, migration, error)
    except trio.Cancelled:
        stopping = VmMigrateError("the destination daemon is stopping", code="daemon_stopping")
        await _give_up(channel, migration, stopping)
        raise
    except Exception:
        # A defect, perhaps provoked by the peer: as long as no verdict was given it costs this attempt, no more.
        stage = migration.journal.state.incoming[migration.migration_id].stage
        if stage not in {Incoming.RESERVED, Incoming.PREPARED}:
            raise
        log.exception("migration.defect", migration=migration.migration_id)
        await _give_up(channel, migration, VmMigrateError("the destination has a defect", code="internal"))


async def _up_to_handoff(channel: Channel, migration: DestinationMigration) -> RunState:
    """All before the first verdict; returns what the guest shall do."""
    try:
        with channel.interruptible():
            agreed = await _offer(channel, migration)
            received = await _accept_preamble(channel, agreed, migration)
            async with _bulk_streams(migration, agreed) as bulk:
                await _receive_ram(channel, bulk, migration)
                await _receive_state(channel, bulk, agreed, migration)
        handoff = await channel.expect(m.Handoff, deadline_s=migration.deadlines.handoff_window_s)
    except TransportError as error:
        raise await channel.true_reason(error) from error
    if Epoch(*handoff.epoch) != received.epoch:
        raise RemoteProtocolError(f"handoff of epoch {handoff.epoch}, announced was {tuple(received.epoch)}")
    return RunState(handoff.run_state)


# --------------------------------------------------------------------------- negotiate and synchronise


async def _offer(channel: Channel, migration: DestinationMigration) -> Agreed:
    """Say what we can do, prove by the ticket that we were asked, and hear what the source chose."""
    random = secrets.token_bytes(RANDOM_BYTES)
    await channel.send(
        m.Offer(
            protocols=PROTOCOL_VERSIONS,
            migration_id=migration.migration_id,
            instance_id=migration.instance_id,
            ticket=migration.ticket,
            spec_versions=migration.spec_versions,
            payloads=migration.payloads,
            ram={"transports": TRANSPORTS, "encodings": ENCODINGS, "digests": DIGESTS},
            max_streams=MAX_STREAMS,
            facts=migration.facts,
            api_url=migration.api_url,
            random=random,
        )
    )
    answer = await channel.expect(m.Select, m.Refuse, deadline_s=migration.deadlines.answer_s)
    if isinstance(answer, m.Refuse):
        raise NegotiationError(answer.text, code=answer.code, details=answer.details)
    _check_selection(answer, channel, migration)
    context = SessionContext(
        answer.protocol,
        migration.migration_id,
        migration.instance_id,
        migration.source.name,
        migration.own.name,
        answer.session_number,
    )
    return Agreed(answer, SessionSecrets(context, random, answer.random))


def _check_selection(select: m.Select, channel: Channel, migration: DestinationMigration) -> None:
    """The source must have chosen from what was offered, and must have seen the offer that was sent."""
    wrong = {
        "protocol": select.protocol not in PROTOCOL_VERSIONS,
        "spec version": select.spec_version not in migration.spec_versions,
        "transport": select.transport not in TRANSPORTS,
        "encodings": not set(select.encodings) <= set(ENCODINGS),
        "digest": select.digest not in DIGESTS,
        "streams": select.streams > MAX_STREAMS,
        "payloads": any(v not in migration.payloads.get(kind, ()) for kind, v in select.payloads.items()),
    }
    chosen_wrongly = [topic for topic, is_wrong in wrong.items() if is_wrong]
    if chosen_wrongly:
        raise RemoteProtocolError(f"the source chose what was not offered: {', '.join(chosen_wrongly)}")
    if select.offer_digest != channel.session.digests[Kind.OFFER]:
        raise RemoteProtocolError("the source saw another offer than was sent", code="downgrade")
    note_negotiated(migration.record, select)


async def _accept_preamble(channel: Channel, agreed: Agreed, migration: DestinationMigration) -> Arrival:
    """Amend and check the spec, build the guest, stopped; or refuse with every blocker at once."""
    answer = await channel.expect(m.Preamble, m.Refuse, deadline_s=migration.deadlines.answer_s)
    if isinstance(answer, m.Refuse):
        raise NegotiationError(answer.text, code=answer.code, details=answer.details)
    try:
        arrival = _read_arrival(answer, agreed, migration)
        migration.guest = await migration.build_guest(arrival)
    except (SpecError, HypervisorError, OwnershipRefusal, NegotiationError) as error:
        await channel.send(refusal_of(error))
        raise
    migration.arrival = arrival
    await channel.send(
        m.PreambleOk(
            select_digest=channel.session.digests[Kind.SELECT],
            blob_digests=preamble.digest_blobs(arrival.blobs),
            amended=tuple(str(key) for key in migration.replacements),
        )
    )
    return arrival


def _read_arrival(received: m.Preamble, agreed: Agreed, migration: DestinationMigration) -> Arrival:
    if received.spec_version != agreed.select.spec_version:
        raise RemoteProtocolError(f"a preamble in {received.spec_version}, selected was {agreed.select.spec_version}")
    spec = preamble.read_spec(received, migration.spec_versions)
    amended = amend(spec, migration.replacements, migration.allowances, migration.features)
    _check_devices(received.devices, migration)
    return Arrival(
        spec=chain.up(amended),
        properties=dict(received.properties),
        blobs=dict(received.blobs),
        layout=preamble.read_layout(received, migration.max_ram_bytes),
        run_state=RunState(received.run_state),
        epoch=Epoch(*received.epoch),
        needed_bytes=preamble.extent_bytes(received),
    )


def _check_devices(devices: Sequence[m.DeviceEntry], migration: DestinationMigration) -> None:
    """Every announced payload that is not optional must be one that we read: known before RAM moves."""
    unreadable = [
        f"{entry.instance_name}: {entry.payload_kind} version {entry.version}"
        for entry in devices
        if not entry.optional and entry.version not in migration.payloads.get(entry.payload_kind, ())
    ]
    if unreadable:
        raise NegotiationError(
            "this host cannot import " + "; ".join(unreadable),
            code="payload_version",
            details={"unreadable": unreadable},
        )


# --------------------------------------------------------------------------- RAM


@contextlib.asynccontextmanager
async def _bulk_streams(migration: DestinationMigration, agreed: Agreed) -> AsyncIterator[BulkDestination]:
    """The bulk streams of the session, receiving; on leaving their threads are joined and they are closed."""
    assert migration.guest is not None
    ram = migration.guest.ram
    layout, pages, page_hash = ram.layout, ram.pages, PageHash(agreed.secrets.key("page digest"))
    links = await open_streams(
        migration.source_host,
        agreed.select.bulk_port,
        migration.context,
        migration.source,
        agreed.secrets,
        agreed.select.streams,
    )
    bulk = BulkDestination(links, layout, pages, page_hash)
    try:
        async with open_group() as group:
            group.start_soon(bulk.receive_forever)
            yield bulk
            group.cancel_scope.cancel()
    finally:
        bulk.close()


async def _receive_ram(channel: Channel, bulk: BulkDestination, migration: DestinationMigration) -> None:
    """Rounds while the guest runs at the source, then the one after its pause."""
    migration.record.ram.total_bytes = len(bulk.table) * PAGE_SIZE
    paused = False
    while True:
        message = await _while_bulk_moves(
            bulk, migration, partial(channel.expect, m.RoundEnd, m.Paused, deadline_s=math.inf)
        )
        if isinstance(message, m.RoundEnd):
            await _apply_round(channel, bulk, migration, message)
            if paused:
                await _while_bulk_moves(bulk, migration, bulk.wait_end)
                return
        else:
            paused = True


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


async def _apply_round(
    channel: Channel, bulk: BulkDestination, migration: DestinationMigration, end: m.RoundEnd
) -> None:
    await _while_bulk_moves(bulk, migration, partial(bulk.wait_round, end.round_number, end.records))
    migration.record.ram.sent_bytes = bulk.bytes_received
    migration.record.progress.update(round=end.round_number, bytes=bulk.bytes_received, dirty_pages=end.dirty_pages)
    migration.record.ram.rounds.append({"pages": end.pages, "bytes": bulk.bytes_received})
    await channel.send(m.RoundApplied(end.round_number, bulk.bytes_received))


# --------------------------------------------------------------------------- state


@dataclass
class _Received:
    """Device state as it arrives; nothing is applied before all of it is here."""

    time: TimeData
    payloads: list[DevicePayload] = field(default_factory=list)
    histories: list[ConsoleHistory] = field(default_factory=list)
    body_bytes: int = 0

    def add(self, state: m.DeviceState) -> None:
        for item in state.payloads:
            self.payloads.append(
                DevicePayload(item.instance_name, item.payload_kind, item.version, item.body, item.optional)
            )
            self.body_bytes += len(item.body)
        if len(self.payloads) > MAX_PAYLOADS or self.body_bytes > 4 * MAX_PAYLOAD_BYTES:
            raise PayloadError("more device state than a guest can have", code="payload_count")


async def _receive_state(
    channel: Channel, bulk: BulkDestination, agreed: Agreed, migration: DestinationMigration
) -> None:
    """Time, devices, console; import everything; compare digests; `prepared`; Ready."""
    received, end = await _collect_state(channel, migration)
    if end.payloads != len(received.payloads):
        raise PayloadError(
            f"{len(received.payloads)} device payloads came, {end.payloads} were sent", code="payload_count"
        )
    page_digest = await trio.to_thread.run_sync(condense, bulk.table)
    if page_digest != end.page_digest:
        raise RemoteProtocolError("guest RAM as it landed is not as it was sent", code="digest_mismatch")
    assert migration.guest is not None
    ram_digest = b""
    if agreed.select.verify == "full":
        ram_digest = await hash_ram_in_thread(migration.guest.ram)
        migration.record.digest["destination"] = ram_digest.hex()
    await _import(migration.guest, received)
    await _prepare(channel, migration, page_digest, ram_digest)


async def _collect_state(channel: Channel, migration: DestinationMigration) -> tuple[_Received, m.StateEnd]:
    answer_s = migration.deadlines.import_s
    time_message = await channel.expect(m.TimeDataMessage, deadline_s=answer_s)
    received = _Received(TimeData.from_map(dict(time_message.values)))
    while True:
        message = await channel.expect(m.DeviceState, m.ConsoleHistoryMessage, m.StateEnd, deadline_s=answer_s)
        if isinstance(message, m.StateEnd):
            return received, message
        if isinstance(message, m.DeviceState):
            received.add(message)
        else:
            history = ConsoleHistory(message.port, message.beginning, message.rolling, message.total_bytes)
            received.histories.append(history)


async def _import(guest: Guest, received: _Received) -> None:
    """Time first: timers are normalised against it. Devices: all are validated before one is applied."""
    await guest.import_time(received.time)
    await guest.import_devices(received.payloads)
    for history in received.histories:
        await guest.import_console_history(history)
    guest.ram.make_read_only()


async def _prepare(channel: Channel, migration: DestinationMigration, page_digest: bytes, ram_digest: bytes) -> None:
    assert migration.arrival is not None
    await migration.journal.commit(
        rules.Prepare(migration.migration_id, migration.arrival.epoch, migration.arrival.run_state.value)
    )
    await channel.send(m.Ready(migration.journal.id, page_digest, ram_digest))


# --------------------------------------------------------------------------- the verdict


async def _take_over(channel: Channel, migration: DestinationMigration, run_state: RunState) -> None:
    """First verdict: yes. Then open everything; second verdict; run; tell the source.

    Shielded: between `acquired` and the second verdict nothing may be left half-said. Steps inside have deadlines.
    """
    assert migration.arrival is not None
    with trio.CancelScope(shield=True):
        await migration.journal.commit(rules.Acquire(migration.migration_id, migration.arrival.epoch))
        begun = time.monotonic()
        if not await finish_start(migration, run_state):
            await _tell_verdict(channel, migration)
            return
        resume_s = time.monotonic() - begun
        epoch = migration.arrival.epoch.handed_over()
        log.info("migration.moved", migration=migration.migration_id, instance=migration.instance_id)
        # The guest runs. Whether the source hears of it is no longer decisive: it will ask.
        with contextlib.suppress(VmMigrateError):
            await channel.send(m.Running(migration.journal.id, epoch, 0.0, resume_s))


async def finish_start(migration: DestinationMigration, run_state: RunState) -> bool:
    """From `acquired` to `started` and a running guest, or to `returned`. Also what a restarted daemon does.

    Returns: True when `started` is durable. False: `returned` is, and the guest is removed.
    """
    guest = migration.guest
    assert guest is not None
    epoch = migration.journal.state.instances[migration.instance_id].epoch
    try:
        await _open_in_time(guest, epoch, migration.deadlines.start_s)
        await migration.journal.commit(rules.Start(migration.migration_id))
    except (HypervisorError, OwnershipRefusal) as error:
        await _return_guest(migration, error)
        return False
    migration.record.finish(Outcome.MOVED)
    await _run_started(migration, guest, epoch, run_state)
    return True


async def _run_started(migration: DestinationMigration, guest: Guest, epoch: Epoch, run_state: RunState) -> None:
    """`started` is durable: this host owns the guest, whatever comes. Only a guest whose process is gone is lost."""
    try:
        if run_state is RunState.RUNNING:
            await guest.run(epoch)
        await guest.note_record(migration.journal.newest_record)
    except HypervisorError as error:
        log.error("guest.not_run", instance=migration.instance_id, code=error.code, text=error.text)
        migration.record.notes.append(f"the guest was not run: {error.text}")
        if error.code == "guest_lost":
            await guest.destroy()
            await migration.journal.commit(rules.Lose(migration.instance_id, error.text))
            migration.record.outcome = Outcome.GUEST_LOST
            migration.record.error = error.as_dict()


async def _open_in_time(guest: Guest, epoch: Epoch, start_s: float) -> None:
    try:
        with trio.fail_after(start_s):
            await guest.open_backends(epoch)
    except trio.TooSlowError:
        raise HypervisorError(f"disks and NICs did not open within {start_s:g} s", code="start_deadline") from None


async def _return_guest(migration: DestinationMigration, error: VmMigrateError) -> None:
    """Close everything, make `returned` durable, remove the guest: the source may take it back."""
    assert migration.guest is not None
    with contextlib.suppress(HypervisorError):
        await migration.guest.close_backends()
    # Only a guest that is gone can surely hold nothing open: it goes before the verdict is given.
    await migration.guest.destroy()
    await migration.journal.commit(rules.Return(migration.migration_id, error.code))
    migration.record.finish(Outcome.FAILED, error)
    log.info("migration.returned", migration=migration.migration_id, code=error.code, text=error.text)


async def _tell_verdict(channel: Channel, migration: DestinationMigration) -> None:
    error = migration.record.error or {"code": "returned", "message": "the destination could not start the guest"}
    with contextlib.suppress(VmMigrateError):
        await channel.send(m.Returned(migration.journal.id, error["code"], error["message"]))


async def _give_up(channel: Channel, migration: DestinationMigration, error: VmMigrateError) -> None:
    """End an attempt before `acquired`: verdict first (when one is due), then tell, then remove the guest."""
    failed_in = channel.session.failed_in or channel.phase
    with trio.CancelScope(shield=True):
        await migration.journal.commit(rules.Refuse(migration.migration_id, error.code))
        stage = migration.journal.state.incoming[migration.migration_id].stage
        await _tell_refusal(channel, migration, error, stage)
        if migration.guest is not None:
            await migration.guest.destroy()
    migration.record.finish(outcome_of(error, failed_in), error)
    log.info("migration.ended", migration=migration.migration_id, code=error.code, text=error.text)


async def _tell_refusal(
    channel: Channel, migration: DestinationMigration, error: VmMigrateError, stage: Incoming
) -> None:
    if stage is Incoming.REFUSED and channel.phase in {Phase.READY, Phase.IN_DOUBT}:
        with contextlib.suppress(VmMigrateError):
            await channel.send(m.Refused(migration.journal.id, error.code, error.text[:16_384]))
    else:
        await channel.say_goodbye(error)
