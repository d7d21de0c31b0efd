"""The source of a migration, as straight-line code: one function per phase, in the order of the sequence diagram.

Everything before `released` can be undone, and is: the guest runs as before, its dirty marks are put back. From the
moment `released` is handed to the journal the source is in doubt; it stays paused, and only evidence (ownership rule
5) resolves it: a message of the destination, or its answer to settle.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import numpy as np
import structlog
import trio

from vmmigrate.engine.agreement import Agreed, negotiate, synchronise
from vmmigrate.engine.metrics import MigrationRecord, Outcome
from vmmigrate.engine.outgoing import LINK_LOST, RESUMABLE, SourceMigration, conclude, stayed_cut, undo
from vmmigrate.engine.ram import hash_ram_in_thread
from vmmigrate.engine.resume import accept_resume, read_applied
from vmmigrate.errors import (
    ConvergenceError,
    HandoffInDoubt,
    HypervisorError,
    IdentityError,
    JournalError,
    PayloadError,
    RemoteProtocolError,
    TransportError,
    VmMigrateError,
)
from vmmigrate.memory import PAGE_SIZE, PageBitmap
from vmmigrate.net.channel import Channel
from vmmigrate.net.sending import BulkSource, RoundSent
from vmmigrate.net.threads import open_group
from vmmigrate.ownership import rules
from vmmigrate.ownership.rules import Answer
from vmmigrate.ram.convergence import Convergence, Round, Verdict
from vmmigrate.ram.digest import Digests, PageHash, condense
from vmmigrate.wire import messages as m

log = structlog.get_logger(__name__)


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
        await _up_to_ready(way, offer, migration)
        await _hand_off(way.channel, migration)
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
        migration.over.set()


@dataclass
class _Way:
    """The control channel in force: a cut link is followed by another one."""

    channel: Channel


@dataclass
class _Copy:
    """RAM under way; it outlives a cut link.

    Attributes:
        number: The round that is being sent, or is next.
        pending: Its pages: what the destination does not hold, as far as is known. None before the first round.
        answer: What is still to be said to a destination that came again.
        sent_bytes, zero_pages: Of sessions that have ended.
    """

    page_hash: PageHash
    table: Digests
    judge: Convergence
    number: int = 1
    pending: PageBitmap | None = None
    answer: m.Resumed | None = None
    sent_bytes: int = 0
    zero_pages: int = 0


async def _up_to_ready(way: _Way, offer: m.Offer, migration: SourceMigration) -> None:
    """All that can be undone, in as many sessions as it takes."""
    options, pages = migration.options, migration.live.ram.layout.pages
    try:
        with trio.fail_after(options.timeout_s):
            with way.channel.interruptible():
                agreed = await negotiate(way.channel, offer, migration)
            copy = _Copy(
                PageHash(agreed.secrets.key("page digest")),
                np.zeros(pages, dtype=np.uint64),
                Convergence(options.downtime_ms / 1000, max_rounds=options.max_rounds),
            )
            while True:
                try:
                    await _one_session(way.channel, agreed, copy, migration)
                    return
                except TransportError as error:
                    agreed = await _resume(way, agreed, copy, migration, error)
    except trio.TooSlowError:
        raise ConvergenceError(
            f"the migration did not finish within {options.timeout_s:g} s", code="timed_out_total"
        ) from None


async def _one_session(channel: Channel, agreed: Agreed, copy: _Copy, migration: SourceMigration) -> None:
    with channel.interruptible():
        async with _bulk_streams(channel, agreed, copy, migration) as bulk:
            await _copy_while_running(channel, bulk, copy, migration)
            await _pause(channel, migration, copy.number)
            await _copy_the_rest(channel, bulk, copy, migration)
            page_digest = await _send_state(channel, bulk, agreed, migration)
            await _wait_ready(channel, page_digest, agreed, migration)


# --------------------------------------------------------------------------- a cut link


async def _resume(way: _Way, agreed: Agreed, copy: _Copy, migration: SourceMigration, error: TransportError) -> Agreed:
    """Wait, with the guest running, until the destination comes again and proves that it is the one that was cut off.

    Raises: *error*, when this is no matter for waiting or nobody came in time; what the wait was aborted with.
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
    with trio.move_on_after(migration.deadlines.resume_window_s):
        while True:
            channel, resume = await migration.resumption.next()
            try:
                resumed, copy.answer = accept_resume(resume, agreed, migration.bulk_port)
            except IdentityError as refusal:
                log.info("migration.resume_refused", migration=migration.migration_id, text=refusal.text)
                channel.fail(refusal)
                continue
            way.channel = channel
            migration.record.session = channel.session
            migration.record.negotiated["sessions"] = resumed.select.session_number
            return resumed
    raise stayed_cut(error, migration.deadlines.resume_window_s) from error


async def _catch_up(channel: Channel, copy: _Copy, migration: SourceMigration) -> None:
    """Say that we go on, and learn what of the cut round has arrived: the rest of it is still to be sent."""
    assert copy.answer is not None
    await channel.send(copy.answer)
    applied = await channel.expect(m.Applied, deadline_s=migration.deadlines.answer_s)
    assert copy.pending is not None
    held = read_applied(applied, copy.pending.pages)
    if applied.round_number == copy.number:
        copy.pending, copy.number = PageBitmap(copy.pending.pages), copy.number + 1
    elif applied.round_number == copy.number - 1:
        copy.pending = copy.pending - held
    else:
        raise RemoteProtocolError(f"the destination holds round {applied.round_number}, sent was {copy.number}")
    with trio.CancelScope(shield=True):
        # Marks that were taken and then forgotten would be lost pages.
        copy.pending |= await migration.live.take_dirty()
    _remember_offered(migration, copy.pending)
    log.info("migration.resumed", migration=migration.migration_id, pages_left=copy.pending.count())


# --------------------------------------------------------------------------- RAM


@contextlib.asynccontextmanager
async def _bulk_streams(
    channel: Channel, agreed: Agreed, copy: _Copy, migration: SourceMigration
) -> AsyncIterator[BulkSource]:
    """The bulk streams of the session, closed on leaving; their threads are joined by then.

    They are expected before the preamble (or the word that we go on) is sent: the destination opens them as soon as it
    has answered that.
    """
    layout, pages = migration.live.ram.layout, migration.live.ram.pages
    streams, transport = agreed.select.streams, agreed.select.transport
    with migration.door.expect(agreed.secrets, migration.destination, streams, transport) as appointment:
        if copy.pending is None:
            await synchronise(channel, agreed, migration)
        else:
            await _catch_up(channel, copy, migration)
        links = await migration.door.collect(appointment)
    bulk = BulkSource(links, layout, pages, copy.page_hash, copy.table)
    try:
        yield bulk
    finally:
        bulk.close()
        copy.sent_bytes += bulk.bytes_sent
        copy.zero_pages += bulk.zero_pages


async def _copy_while_running(channel: Channel, bulk: BulkSource, copy: _Copy, migration: SourceMigration) -> None:
    """Rounds until the rest fits the pause; `copy.pending` is then what is still to send."""
    if copy.pending is None:
        await _begin_copy(copy, migration)
    options, judge = migration.options, copy.judge
    while True:
        verdict = await _one_round(channel, bulk, copy, migration)
        if verdict is Verdict.PAUSE or (verdict is Verdict.WILL_NOT_CONVERGE and options.force):
            return
        if verdict is Verdict.WILL_NOT_CONVERGE:
            assert copy.pending is not None
            dirty = copy.pending.count()
            raise ConvergenceError(
                f"after {copy.number - 1} rounds {dirty} pages are dirty; the pause would last about"
                f" {judge.forecast_pause_s(dirty):.2f} s, allowed is {judge.downtime_s:g} s"
            )


async def _begin_copy(copy: _Copy, migration: SourceMigration) -> None:
    """The first round: every page that was ever touched. Marks first, or a write in between would be lost."""
    guest, record = migration.live, migration.record
    await guest.start_tracking()
    pages = await trio.to_thread.run_sync(guest.ram.populated)
    record.ram.total_bytes = guest.ram.layout.size_bytes
    record.ram.hole_bytes = (guest.ram.layout.pages - pages.count()) * PAGE_SIZE
    migration.offered = pages.copy()
    copy.pending = pages


async def _one_round(channel: Channel, bulk: BulkSource, copy: _Copy, migration: SourceMigration) -> Verdict:
    """Send what is pending, wait until it has landed, and see what was written meanwhile: that is pending then."""
    assert copy.pending is not None
    number, begun = copy.number, trio.current_time()
    sent = await _send_round(channel, bulk, copy, migration, last=False)
    applied = await channel.expect(m.RoundApplied, deadline_s=migration.deadlines.round_s)
    _check_round(applied, number)
    seconds = trio.current_time() - begun
    with trio.CancelScope(shield=True):
        # Marks that were taken and then forgotten would be lost pages: no cancel in between.
        copy.pending = await migration.live.take_dirty()
        copy.number += 1
    _remember_offered(migration, copy.pending)
    finished = Round(sent.pages, sent.bytes_sent, seconds, copy.pending.count())
    verdict = copy.judge.after_round(finished)
    _note_round(migration.record, finished)
    migration.record.progress.update(rate_bytes_per_s=int(copy.judge.rate), dirty_pages=finished.dirty_pages)
    log.info("round.finished", round=number, pages=sent.pages, dirty_pages=finished.dirty_pages, verdict=verdict.value)
    return verdict


async def _send_round(
    channel: Channel, bulk: BulkSource, copy: _Copy, migration: SourceMigration, *, last: bool
) -> RoundSent:
    assert copy.pending is not None
    pages, number = copy.pending, copy.number
    migration.record.progress.update(round=number, pages_left=pages.count())
    async with _watched(bulk, copy, migration.record, pages.count()):
        sent = await bulk.send_round(pages, number, last=last)
    migration.record.ram.sent_bytes = copy.sent_bytes + bulk.bytes_sent
    migration.record.ram.zero_bytes = (copy.zero_pages + bulk.zero_pages) * PAGE_SIZE
    await channel.send(m.RoundEnd(number, sent.records, sent.pages, pages.count()))
    return sent


@contextlib.asynccontextmanager
async def _watched(bulk: BulkSource, copy: _Copy, record: MigrationRecord, pages: int) -> AsyncIterator[None]:
    """Keep the record's counters fresh while a round is being sent."""

    async def watch() -> None:
        done_before = bulk.pages_done
        while True:
            await trio.sleep(0.1)
            record.ram.sent_bytes = copy.sent_bytes + bulk.bytes_sent
            record.progress.update(
                bytes=record.ram.sent_bytes, pages_left=max(pages - (bulk.pages_done - done_before), 0)
            )

    async with open_group() as nursery:
        nursery.start_soon(watch)
        yield
        nursery.cancel_scope.cancel()


def _check_round(applied: m.RoundApplied, number: int) -> None:
    if applied.round_number != number:
        raise RemoteProtocolError(f"round {applied.round_number} was applied, {number} was sent")


def _remember_offered(migration: SourceMigration, dirty: PageBitmap) -> None:
    assert migration.offered is not None
    migration.offered |= dirty


def _note_round(record: MigrationRecord, finished: Round) -> None:
    record.ram.rounds.append(
        {
            "pages": finished.pages,
            "bytes": finished.bytes_sent,
            "seconds": finished.seconds,
            "dirty_pages": finished.dirty_pages,
        }
    )


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
    migration.record.laps.lap("pause")
    await channel.send(m.Paused(number))


async def _copy_the_rest(channel: Channel, bulk: BulkSource, copy: _Copy, migration: SourceMigration) -> None:
    """The last round: what was dirty, and what was written until the pause."""
    assert copy.pending is not None
    copy.pending |= await migration.live.take_dirty()
    _remember_offered(migration, copy.pending)
    begun = trio.current_time()
    sent = await _send_round(channel, bulk, copy, migration, last=True)
    _note_round(migration.record, Round(sent.pages, sent.bytes_sent, trio.current_time() - begun, 0))
    migration.record.laps.lap("last_round")


async def _send_state(channel: Channel, bulk: BulkSource, agreed: Agreed, migration: SourceMigration) -> bytes:
    """Time, devices, console history, and the digest of all pages sent."""
    guest = migration.live
    await channel.send(m.TimeDataMessage((await guest.export_time()).to_map()))
    payloads = await guest.export_devices(agreed.select.payloads)
    promised = {(item.instance_name, item.kind) for item in agreed.payloads if not item.optional}
    missing = promised - {(payload.instance_name, payload.kind) for payload in payloads}
    if missing:
        device, kind = min(missing)
        raise PayloadError(f"device {device} exported no payload of kind {kind}", code="payload_missing")
    items = tuple(
        m.PayloadItem(p.instance_name, p.kind, p.version, p.optional, p.body)
        for p in payloads
        if (p.instance_name, p.kind) not in agreed.skipped
    )
    for chunk in _chunks(items):
        await channel.send(m.DeviceState(chunk))
    for port in guest.plan.serial_ports:
        history = await guest.console_history(port.name)
        await channel.send(
            m.ConsoleHistoryMessage(history.port, history.beginning, history.rolling, history.total_bytes)
        )
    migration.record.laps.lap("device_save")
    page_digest = await trio.to_thread.run_sync(condense, bulk.table)
    await channel.send(m.StateEnd(page_digest, len(items)))
    return page_digest


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


async def _wait_ready(channel: Channel, page_digest: bytes, agreed: Agreed, migration: SourceMigration) -> None:
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
    if ready.page_digest != page_digest or ready.ram_digest != digest:
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
