"""The source of a migration, as straight-line code: one function per phase, in the order of the sequence diagram.

Everything before `released` can be undone, and is: the guest runs as before, its dirty marks are put back. From the
moment `released` is handed to the journal the source is in doubt; it stays paused, and only evidence (ownership rule
5) resolves it: a message of the destination, or its answer to settle.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

import structlog
import trio

from vmmigrate.devices.payload import DevicePayload
from vmmigrate.devices.time import TimeData
from vmmigrate.engine.agreement import Agreed, negotiate, synchronise
from vmmigrate.engine.copying import (
    Copy,
    catch_up,
    copy_the_rest,
    copy_while_running,
    let_go,
    new_copy,
    note_pause,
)
from vmmigrate.engine.frozen import Frozen
from vmmigrate.engine.metrics import MigrationRecord, Outcome
from vmmigrate.engine.outgoing import (
    LINK_LOST,
    RESUMABLE,
    SourceMigration,
    conclude,
    cut_in_a_stop,
    stayed_cut,
    undo,
)
from vmmigrate.engine.planning import plan_out
from vmmigrate.engine.ram import hash_ram_in_thread
from vmmigrate.engine.resume import accept_resume
from vmmigrate.errors import (
    HandoffInDoubt,
    HypervisorError,
    IdentityError,
    JournalError,
    PayloadError,
    RemoteProtocolError,
    TransportError,
    VmMigrateError,
)
from vmmigrate.hypervisor.base import ConsoleHistory, RunState
from vmmigrate.memory import MIB
from vmmigrate.net.channel import Channel
from vmmigrate.net.sending import BulkSource
from vmmigrate.net.threads import open_group
from vmmigrate.ownership import rules
from vmmigrate.ownership.rules import Answer
from vmmigrate.wire import messages as m

log = structlog.get_logger(__name__)

_LOOK_S = 0.2


async def migrate_out(channel: Channel, offer: m.Offer, migration: SourceMigration) -> None:
    """Give the guest to the destination, which has proved who it is and used its ticket.

    The record tells the outcome; nothing is raised for a migration that failed.

    Raises:
        JournalError: The journal is poisoned; the daemon must exit. trio.Cancelled: the daemon stops; what could be
            undone was undone.
    """
    way = _Way(channel)
    migration.record.begin(channel.session)
    try:
        copy = await _up_to_ready(way, offer, migration)
        migration.frozen = Frozen(copy.page_hash, copy.table)
        await _hand_off(way.channel, migration)
        note_pause(copy, migration)
    except JournalError:
        # Nobody knows what is durable, so nobody may act: the daemon exits, and its restart reads the journal anew.
        raise
    except HandoffInDoubt as doubt:
        log.warning("migration.in_doubt", migration=migration.migration_id, code=doubt.code, text=doubt.text)
        migration.record.finish(Outcome.UNKNOWN, doubt)
    except VmMigrateError as error:
        await undo(way.channel, migration, error)
    except trio.Cancelled:
        await undo(way.channel, migration, VmMigrateError("the source daemon is stopping", code="daemon_stopping"))
        raise
    except Exception:
        # A defect must not take the guest with it. What is undone here is undone again, harmlessly, at a restart.
        log.exception("migration.defect", migration=migration.migration_id)
        defect = VmMigrateError("the source has a defect; its log says more", code="internal")
        await undo(way.channel, migration, defect)
    finally:
        way.leftovers.close()
        migration.over.set()


@dataclass
class _Way:
    """The control channel in force: a cut link is followed by another one.

    Attributes:
        leftovers: What need not be closed before the guest runs elsewhere.
    """

    channel: Channel
    leftovers: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


async def _up_to_ready(way: _Way, offer: m.Offer, migration: SourceMigration) -> Copy:
    """All that can be undone, in as many sessions as it takes."""
    async with open_group() as group:
        if not migration.options.plan_only:  # what is foretold is also whether the time would be enough
            group.start_soon(migration.steering.watch_the_time)
        with way.channel.interruptible():
            agreed = await negotiate(way.channel, offer, migration)
        copy = new_copy(agreed, migration)
        while True:
            try:
                await _one_session(way, agreed, copy, migration)
                break
            except TransportError as error:
                agreed = await _resume(way, agreed, copy, migration, error)
        group.cancel_scope.cancel()
    return copy


async def _one_session(way: _Way, agreed: Agreed, copy: Copy, migration: SourceMigration) -> None:
    channel = way.channel
    with channel.interruptible():
        async with _bulk_streams(way, agreed, copy, migration) as bulk:
            if migration.options.plan_only:
                await plan_out(channel, bulk, agreed, copy, migration)
            await copy_while_running(channel, bulk, agreed, copy, migration)
            await _pause(channel, migration, copy.number)
            state = await _copy_and_save(channel, bulk, agreed, copy, migration)
            await _send_state(channel, state, agreed, copy, migration)
            await _wait_ready(channel, agreed, copy, migration)


# --------------------------------------------------------------------------- a cut link


async def _resume(way: _Way, agreed: Agreed, copy: Copy, migration: SourceMigration, error: TransportError) -> Agreed:
    """Wait, with the guest running, until the destination comes again and proves that it is the one that was cut off.

    Raises: *error*, when this is no matter for waiting, nobody came in time, or the guest does not run; what the wait
        was aborted with.
    """
    reason = await way.channel.true_reason(error)
    if not isinstance(reason, TransportError):
        raise reason from error
    session = way.channel.session
    may_wait = (session.failed_in or session.phase) in RESUMABLE and error.code in LINK_LOST
    if not may_wait or migration.is_pausing or copy.pending is None:
        raise error
    way.channel.fail(error)
    log.warning("migration.link_lost", migration=migration.migration_id, code=error.code, text=error.text)
    await let_go(copy.judge, migration)  # nothing is sent that it could be too fast for
    with trio.move_on_after(migration.deadlines.resume_window_s):
        async with open_group() as group:
            if migration.live.page_source == "stream":
                group.start_soon(_watch_for_a_stop, migration, error)
            resumed = await _next_resumed(way, agreed, copy, migration)
            group.cancel_scope.cancel()
        migration.record.session = way.channel.session
        migration.record.negotiated["sessions"] = resumed.select.session_number
        return resumed
    raise stayed_cut(error, migration.deadlines.resume_window_s) from error


async def _next_resumed(way: _Way, agreed: Agreed, copy: Copy, migration: SourceMigration) -> Agreed:
    """The next destination that comes and is the one that was cut off: *way* is over its channel then."""
    while True:
        channel, resume = await migration.resumption.next()
        try:
            resumed, copy.answer = accept_resume(resume, agreed, migration.bulk_port)
        except IdentityError as refusal:
            log.info("migration.resume_refused", migration=migration.migration_id, text=refusal.text)
            channel.fail(refusal)
            continue
        way.channel = channel
        return resumed


async def _watch_for_a_stop(migration: SourceMigration, error: TransportError) -> None:
    """A stream stops the guest by itself when hardly anything is left to name, also when nobody is there to send it to.

    It is asked to name more only of a guest that stands still: otherwise it would go on with its pass, and stop the
    guest over that.

    Raises: VmMigrateError: it has stopped the guest.
    """
    guest = migration.live
    while True:
        if migration.desired is RunState.RUNNING and (await guest.status()).run_state is RunState.PAUSED:
            with trio.CancelScope(shield=True):
                await guest.mark_dirty(await guest.take_dirty())  # it looks when nothing that it named lies there
            await guest.name_ahead()
            if guest.stopped_s is not None:
                raise cut_in_a_stop(error) from error
        await trio.sleep(_LOOK_S)


# --------------------------------------------------------------------------- RAM


@contextlib.asynccontextmanager
async def _bulk_streams(way: _Way, agreed: Agreed, copy: Copy, migration: SourceMigration) -> AsyncIterator[BulkSource]:
    """The bulk streams of the session. On leaving their threads are joined; they are closed when it failed, and
    otherwise once the guest was given away: closing them takes time, and the guest is paused.

    They are expected before the preamble (or the word that we go on) is sent: the destination opens them as soon as it
    has answered that.
    """
    layout, pages = migration.live.ram.layout, migration.live.ram.pages
    streams, transport = agreed.select.streams, agreed.select.transport
    with migration.door.expect(agreed.secrets, migration.destination, streams, transport) as appointment:
        if copy.pending is None:
            await synchronise(way.channel, agreed, migration)
        else:
            await catch_up(way.channel, copy, migration)
        links = await migration.door.collect(appointment)
    bulk = BulkSource(
        links,
        layout,
        pages,
        copy.page_hash,
        copy.table,
        encodings=agreed.select.encodings,
        delta_cache_bytes=migration.options.delta_cache_mib * MIB,
    )
    with contextlib.ExitStack() as closing:
        closing.callback(copy.close_session, bulk)
        with migration.steering.over(bulk):
            yield bulk
        way.leftovers.push(closing.pop_all())


# --------------------------------------------------------------------------- the pause


async def _pause(channel: Channel, migration: SourceMigration, number: int) -> None:
    """Pause so that the guest stays paused even if we die. What it is to be afterwards is durable before."""
    await migration.journal.reserve()
    migration.is_pausing = True
    await migration.journal.commit(rules.BeginPause(migration.migration_id, migration.desired.value))
    await _note_record(migration)
    migration.record.laps.start()
    # Closes the disks, too: the destination opens them for writing before the guest starts there.
    await migration.live.pause_for_handoff(migration.migration_id)
    if migration.live.stopped_s is not None:
        migration.record.laps.start(migration.live.stopped_s)
    migration.record.laps.lap("pause")
    channel.say_later(m.Paused(number))


@dataclass
class _State:
    """What a guest is beside its RAM, as it was saved."""

    time: TimeData | None = None
    payloads: Sequence[DevicePayload] = ()
    histories: dict[str, ConsoleHistory] = field(default_factory=dict)


async def _copy_and_save(
    channel: Channel, bulk: BulkSource, agreed: Agreed, copy: Copy, migration: SourceMigration
) -> _State:
    """The last pages and, meanwhile, the state of the devices."""
    guest, state = migration.live, _State()

    async def save_time() -> None:
        state.time = await guest.export_time()

    async def save_devices() -> None:
        state.payloads = await guest.export_devices(agreed.select.payloads)

    async def save_console(port: str) -> None:
        state.histories[port] = await guest.console_history(port)

    async with open_group() as group:
        group.start_soon(save_time)
        group.start_soon(save_devices)
        for port in guest.plan.serial_ports:
            group.start_soon(save_console, port.name)
        await copy_the_rest(channel, bulk, copy, migration)
    migration.record.laps.lap("device_save")
    return state


async def _send_state(channel: Channel, state: _State, agreed: Agreed, copy: Copy, migration: SourceMigration) -> None:
    """Time, devices, console history, and the digest of all pages sent. What is small is said in one breath."""
    assert state.time is not None
    promised = {(item.instance_name, item.kind) for item in agreed.payloads if not item.optional}
    missing = promised - {(payload.instance_name, payload.kind) for payload in state.payloads}
    if missing:
        device, kind = min(missing)
        raise PayloadError(f"device {device} exported no payload of kind {kind}", code="payload_missing")
    items = tuple(
        m.PayloadItem(p.instance_name, p.kind, p.version, p.optional, p.body)
        for p in state.payloads
        if (p.instance_name, p.kind) not in agreed.skipped
    )
    channel.say_later(m.TimeDataMessage(state.time.to_map()))
    for chunk in _chunks(items):
        await _say_soon(channel, m.DeviceState(chunk), sum(len(item.body) for item in chunk))
    for port in migration.live.plan.serial_ports:
        history = state.histories[port.name]
        size = len(history.beginning) + len(history.rolling)
        told = m.ConsoleHistoryMessage(history.port, history.beginning, history.rolling, history.total_bytes)
        await _say_soon(channel, told, size)
    await channel.send(m.StateEnd(copy.condenser.digest(), len(items)))
    migration.record.laps.lap("device_send")


async def _say_soon(channel: Channel, message: m.Message, size_bytes: int) -> None:
    """What is large is on its way while the next is made ready."""
    if size_bytes < _CHUNK_BYTES // 2:
        channel.say_later(message)
    else:
        await channel.send(message)


_CHUNK_BYTES = 1 << 20


def _chunks(items: tuple[m.PayloadItem, ...]) -> list[tuple[m.PayloadItem, ...]]:
    """Payloads in messages of about a MiB; a larger payload has one to itself."""
    chunks: list[list[m.PayloadItem]] = [[]]
    size = 0
    for item in items:
        if chunks[-1] and size + len(item.body) > _CHUNK_BYTES:
            chunks.append([])
            size = 0
        chunks[-1].append(item)
        size += len(item.body)
    return [tuple(chunk) for chunk in chunks if chunk]


async def _wait_ready(channel: Channel, agreed: Agreed, copy: Copy, migration: SourceMigration) -> None:
    """Ready, with equal digests; after it the destination's journal holds `prepared`."""
    full = agreed.select.verify == "full"
    digest = b""
    if full:
        digest = await hash_ram_in_thread(migration.live.ram)
        migration.record.laps.lap("verify_source")
        migration.record.digest["source"] = digest.hex()
    await channel.expect(m.RoundApplied, deadline_s=migration.deadlines.round_s)
    ready = await channel.expect(m.Ready, deadline_s=migration.deadlines.import_s)
    migration.record.laps.lap("import_and_verify")
    if full:
        migration.record.digest["destination"] = ready.ram_digest.hex()
    if ready.page_digest != copy.condenser.digest() or ready.ram_digest != digest:
        raise RemoteProtocolError("guest RAM at the destination is not that of the source", code="digest_mismatch")
    migration.destination_journal = ready.journal_id


# --------------------------------------------------------------------------- the handoff


async def _hand_off(channel: Channel, migration: SourceMigration) -> None:
    """Give the guest away, and learn what became of it.

    Raises:
        OwnershipRefusal: The rules forbid it; nothing was given away.
        HandoffInDoubt: The destination may or may not run the guest; it stays paused here until settled.
        JournalError: The journal is poisoned: nobody knows whether `released` is durable.
    """
    laps = migration.record.laps
    # Not interruptible and shielded: from here on a cancel could only leave doubt behind. Every wait has a deadline.
    with trio.CancelScope(shield=True):
        epoch = migration.journal.state.instances[migration.instance_id].epoch
        # The phase is IN_DOUBT before a byte of `released` is written, so that nothing can resume the guest.
        handoff = channel.session.send(m.Handoff(migration.desired.value, epoch))
        await migration.journal.commit(
            rules.Release(migration.migration_id, migration.destination_journal, migration.destination_url)
        )
        laps.lap("journal_released")
        try:
            # Told before a byte leaves: were this journal lost and an older copy put back, the guest would know.
            await _note_record(migration)
            await channel.send_bytes(handoff)
            answer = await channel.expect(m.Running, m.Refused, m.Returned, deadline_s=migration.deadlines.verdict_s)
        except VmMigrateError as exc:
            raise HandoffInDoubt(f"no clear answer to the handoff: {exc.text}", details={"cause": exc.code}) from exc
        _note_start(migration.record, answer)
        await conclude(migration, _ANSWER_OF[type(answer)], answer.journal_id, _reason_of(answer))


async def _note_record(migration: SourceMigration) -> None:
    """Tell the guest how long the journal is: a shorter one at a restart is an older copy, and decides nothing.

    Only of what is durable, or a crash in between would look like such a copy.
    """
    with contextlib.suppress(HypervisorError):
        await migration.live.note_record(*migration.journal.position)


def _note_start(record: MigrationRecord, answer: m.Running | m.Refused | m.Returned) -> None:
    """Split the last wait by what the destination says it did meanwhile."""
    record.laps.lap("handoff_and_start")
    if isinstance(answer, m.Running):
        spent = record.laps.parts["handoff_and_start"]
        resume = min(answer.resume_s, spent)
        record.laps.parts["destination_start"] = resume
        record.laps.parts["handoff_and_start"] = spent - resume


def _reason_of(answer: m.Running | m.Refused | m.Returned) -> VmMigrateError | None:
    return None if isinstance(answer, m.Running) else VmMigrateError(answer.text, code=answer.code)


_ANSWER_OF: Mapping[type, Answer] = {
    m.Running: Answer.RUNNING,
    m.Refused: Answer.REFUSED,
    m.Returned: Answer.RETURNED,
}
