"""The source of a migration, as straight-line code: one function per phase, in the order of the sequence diagram.

Everything before `released` can be undone, and is: the guest runs as before, its dirty marks are put back. From the
moment `released` is handed to the journal the source is in doubt; it stays paused, and only evidence (ownership rule
5) resolves it: a message of the destination, or its answer to settle.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping

import structlog
import trio

from vmmigrate.engine.agreement import Agreed, negotiate, synchronise
from vmmigrate.engine.metrics import MigrationRecord, Outcome
from vmmigrate.engine.outgoing import SourceMigration, conclude, undo
from vmmigrate.engine.ram import hash_ram_in_thread
from vmmigrate.errors import (
    ConvergenceError,
    HandoffInDoubt,
    HypervisorError,
    JournalError,
    PayloadError,
    RemoteProtocolError,
    VmMigrateError,
)
from vmmigrate.memory import PAGE_SIZE, PageBitmap
from vmmigrate.net.bulk import BulkSource, RoundSent
from vmmigrate.net.channel import Channel
from vmmigrate.net.threads import open_group
from vmmigrate.ownership import rules
from vmmigrate.ownership.rules import Answer
from vmmigrate.ram.convergence import Convergence, Round, Verdict
from vmmigrate.ram.digest import PageHash, condense
from vmmigrate.wire import messages as m

log = structlog.get_logger(__name__)


async def migrate_out(channel: Channel, offer: m.Offer, migration: SourceMigration) -> None:
    """Give the guest to the destination, which has proved who it is and used its ticket.

    The record tells the outcome; nothing is raised for a migration that failed.

    Raises:
        JournalError: The journal is poisoned; the daemon must exit. trio.Cancelled: the daemon stops; what could be
            undone was undone.
    """
    record = migration.record
    record.begin(channel.session)
    try:
        await _up_to_ready(channel, offer, migration)
        await _hand_off(channel, migration)
    except JournalError:
        # Nobody knows what is durable, so nobody may act: the daemon exits, and its restart reads the journal anew.
        raise
    except HandoffInDoubt as doubt:
        log.warning("migration.in_doubt", migration=migration.migration_id, code=doubt.code, text=doubt.text)
        record.finish(Outcome.UNKNOWN, doubt)
    except VmMigrateError as error:
        await undo(channel, migration, error)
    except trio.Cancelled:
        await undo(channel, migration, VmMigrateError("the source daemon is stopping", code="daemon_stopping"))
        raise
    except Exception:
        # A defect must not take the guest with it. What is undone here is undone again, harmlessly, at a restart.
        log.exception("migration.defect", migration=migration.migration_id)
        await undo(channel, migration, VmMigrateError("the source has a defect; its log says more", code="internal"))


async def _up_to_ready(channel: Channel, offer: m.Offer, migration: SourceMigration) -> None:
    """All that can be undone."""
    try:
        with trio.fail_after(migration.options.timeout_s), channel.interruptible():
            agreed = await negotiate(channel, offer, migration)
            async with _bulk_streams(channel, agreed, migration) as bulk:
                dirty, rounds = await _copy_while_running(channel, bulk, migration)
                await _pause(channel, migration, rounds + 1)
                await _copy_the_rest(channel, bulk, migration, dirty, rounds + 1)
                page_digest = await _send_state(channel, bulk, agreed, migration)
                await _wait_ready(channel, page_digest, agreed, migration)
    except trio.TooSlowError:
        raise ConvergenceError(
            f"the migration did not finish within {migration.options.timeout_s:g} s", code="timed_out_total"
        ) from None


# --------------------------------------------------------------------------- RAM


@contextlib.asynccontextmanager
async def _bulk_streams(channel: Channel, agreed: Agreed, migration: SourceMigration) -> AsyncIterator[BulkSource]:
    """The bulk streams of the session, closed on leaving; their threads are joined by then.

    They are expected before the preamble is sent: the destination opens them as soon as it has answered that.
    """
    layout, pages = migration.live.ram.layout, migration.live.ram.pages
    page_hash = PageHash(agreed.secrets.key("page digest"))
    with migration.door.expect(agreed.secrets, migration.destination, agreed.select.streams) as appointment:
        await synchronise(channel, agreed, migration)
        links = await migration.door.collect(appointment)
    bulk = BulkSource(links, layout, pages, page_hash)
    try:
        yield bulk
    finally:
        bulk.close()


async def _copy_while_running(channel: Channel, bulk: BulkSource, migration: SourceMigration) -> tuple[PageBitmap, int]:
    """Rounds until the rest fits the pause; returns what is still to send, and the number of rounds."""
    guest, record, options = migration.live, migration.record, migration.options
    judge = Convergence(options.downtime_ms / 1000, max_rounds=options.max_rounds)
    await guest.start_tracking()
    pages = await trio.to_thread.run_sync(guest.ram.populated)
    record.ram.total_bytes = guest.ram.layout.size_bytes
    record.ram.hole_bytes = (guest.ram.layout.pages - pages.count()) * PAGE_SIZE
    migration.offered = pages.copy()
    number = 0
    while True:
        number += 1
        pages, verdict = await _one_round(channel, bulk, migration, judge, pages, number)
        if verdict is Verdict.PAUSE or (verdict is Verdict.WILL_NOT_CONVERGE and options.force):
            return pages, number
        if verdict is Verdict.WILL_NOT_CONVERGE:
            raise ConvergenceError(
                f"after {number} rounds {pages.count()} pages are dirty; the pause would last about"
                f" {judge.forecast_pause_s(pages.count()):.2f} s, allowed is {judge.downtime_s:g} s"
            )


async def _one_round(
    channel: Channel,
    bulk: BulkSource,
    migration: SourceMigration,
    judge: Convergence,
    pages: PageBitmap,
    number: int,
) -> tuple[PageBitmap, Verdict]:
    """Send *pages*, wait until they have landed, and see what was written meanwhile."""
    begun = trio.current_time()
    sent = await _send_round(channel, bulk, migration, pages, number, last=False)
    applied = await channel.expect(m.RoundApplied, deadline_s=migration.deadlines.round_s)
    _check_round(applied, number)
    seconds = trio.current_time() - begun
    dirty = await migration.live.take_dirty()
    _remember_offered(migration, dirty)
    finished = Round(sent.pages, sent.bytes_sent, seconds, dirty.count())
    verdict = judge.after_round(finished)
    _note_round(migration.record, finished)
    migration.record.progress.update(rate_bytes_per_s=int(judge.rate), dirty_pages=finished.dirty_pages)
    log.info("round.finished", round=number, pages=sent.pages, dirty_pages=finished.dirty_pages, verdict=verdict.value)
    return dirty, verdict


async def _send_round(
    channel: Channel, bulk: BulkSource, migration: SourceMigration, pages: PageBitmap, number: int, *, last: bool
) -> RoundSent:
    migration.record.progress.update(round=number, pages_left=pages.count())
    async with _watched(bulk, migration.record, pages.count()):
        sent = await bulk.send_round(pages, number, last=last)
    migration.record.ram.sent_bytes = bulk.bytes_sent
    migration.record.ram.zero_bytes = bulk.zero_pages * PAGE_SIZE
    await channel.send(m.RoundEnd(number, sent.records, sent.pages, pages.count()))
    return sent


@contextlib.asynccontextmanager
async def _watched(bulk: BulkSource, record: MigrationRecord, pages: int) -> AsyncIterator[None]:
    """Keep the record's counters fresh while a round is being sent."""

    async def watch() -> None:
        done_before = bulk.pages_done
        while True:
            await trio.sleep(0.1)
            record.ram.sent_bytes = bulk.bytes_sent
            record.progress.update(bytes=bulk.bytes_sent, pages_left=max(pages - (bulk.pages_done - done_before), 0))

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
    await migration.journal.commit(rules.BeginPause(migration.migration_id, migration.desired.value))
    await _note_record(migration)
    migration.record.laps.start()
    # Closes the disks, too: the destination opens them for writing before the guest starts there.
    await migration.live.pause_for_handoff(migration.migration_id)
    migration.record.laps.lap("pause")
    await channel.send(m.Paused(number))


async def _copy_the_rest(
    channel: Channel, bulk: BulkSource, migration: SourceMigration, dirty: PageBitmap, number: int
) -> None:
    """The last round: what was dirty, and what was written until the pause."""
    rest = dirty | await migration.live.take_dirty()
    _remember_offered(migration, rest)
    begun = trio.current_time()
    sent = await _send_round(channel, bulk, migration, rest, number, last=True)
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
    items = tuple(m.PayloadItem(p.instance_name, p.kind, p.version, p.optional, p.body) for p in payloads)
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
            await channel.send_bytes(handoff)
            await _note_record(migration)
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
        await migration.live.note_record(migration.journal.newest_record)


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
