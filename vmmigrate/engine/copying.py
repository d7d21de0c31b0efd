"""RAM at the source, while the guest runs: rounds until the rest fits the pause, and what is learnt on the way.

A `Copy` outlives a cut link: what the destination holds, how fast rounds were, and what the pause will cost.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import structlog
import trio

from vmmigrate.engine.agreement import Agreed
from vmmigrate.engine.metrics import MigrationRecord, Outcome
from vmmigrate.engine.outgoing import SourceMigration
from vmmigrate.engine.resume import read_applied
from vmmigrate.errors import ConvergenceError, HypervisorError, PayloadError, RemoteProtocolError
from vmmigrate.hypervisor.base import Guest
from vmmigrate.memory import MIB, PAGE_SIZE, PageBitmap
from vmmigrate.net.channel import Channel
from vmmigrate.net.sending import BulkSource, RoundSent
from vmmigrate.net.threads import open_group
from vmmigrate.ram.convergence import Convergence, PauseForecast, Round, Verdict
from vmmigrate.ram.digest import Condenser, Digests, PageHash
from vmmigrate.ram.encoding import Tally
from vmmigrate.ram.forecast import Rehearsed, Typical
from vmmigrate.wire import messages as m

log = structlog.get_logger(__name__)

_PROGRESS_S: Final = 0.1
_HASH_SAMPLE_BYTES: Final = 4 * MIB
_REHEARSALS: Final = 3
_MOST_REHEARSALS: Final = 5
_LAST_PART: Final = 3  # of RAM: a third


@dataclass
class Rehearsals:
    """What belongs to a pause, done while the guest runs. Each is a `Typical` of seconds."""

    request_s: Typical = field(default_factory=Typical)
    devices_s: Typical = field(default_factory=Typical)
    verify_s: Typical = field(default_factory=Typical)

    def result(self, journal_s: float, round_trip_s: float) -> Rehearsed:
        return Rehearsed(self.devices_s.value, journal_s, round_trip_s, self.request_s.value, self.verify_s.value)


@dataclass
class Copy:
    """RAM under way.

    Attributes:
        number: The round that is being sent, or is next.
        pending: Its pages: what the destination does not hold, as far as is known. None before the first round.
        unsent: Those of them that it ends without, because it was broken off. None: not a single one.
        answer: What is still to be said to a destination that came again.
        condenser: Condenses `table`; it knows of all rounds but the one that is under way.
        fresh: The pages of the last round, of which it does not know yet.
        sent_bytes, tally: Of sessions that have ended.
        rehearsals: What a pause will cost here, as far as it can be measured beforehand.
        forecast: Of the pause, at the moment when it was decided upon.
        begun_s: When the first page was about to be sent.
        can_throttle: No hypervisor has said no so far.
    """

    page_hash: PageHash
    table: Digests
    condenser: Condenser
    judge: Convergence
    number: int = 1
    pending: PageBitmap | None = None
    unsent: PageBitmap | None = None
    fresh: PageBitmap | None = None
    answer: m.Resumed | None = None
    sent_bytes: int = 0
    tally: Tally = field(default_factory=Tally.empty)
    rehearsals: Rehearsals = field(default_factory=Rehearsals)
    forecast: PauseForecast | None = None
    begun_s: float | None = None
    can_throttle: bool = True

    def next_round(self, pages: PageBitmap) -> None:
        """The destination holds all that was sent of this round: *pages* are next, and what it ended without."""
        self.pending = pages if self.unsent is None else pages | self.unsent
        self.number, self.unsent = self.number + 1, None

    def close_session(self, bulk: BulkSource) -> None:
        """Close the streams of a session that is over; what it did is added up."""
        bulk.close()
        self.sent_bytes += bulk.bytes_sent
        self.tally += bulk.tally

    def refresh(self) -> None:
        """Let the condenser know of the last round. Blocking; not cancelled half-way."""
        if self.fresh is not None:
            self.condenser.refresh(self.fresh.flags())
            self.fresh = None


def new_copy(agreed: Agreed, migration: SourceMigration) -> Copy:
    """Nothing of *migration*'s RAM is sent yet."""
    pages = migration.live.ram.layout.pages
    table = np.zeros(pages, dtype=np.uint64)
    return Copy(
        PageHash(agreed.secrets.key("page digest")),
        table,
        Condenser(table, agreed.select.digest),
        Convergence(Rehearsed().fixed_s(migration.history)),
    )


async def copy_while_running(
    channel: Channel, bulk: BulkSource, agreed: Agreed, copy: Copy, migration: SourceMigration
) -> None:
    """Rounds until the rest fits the pause; `copy.pending` is then what is still to send.

    Raises: ConvergenceError: it never does.
    """
    if copy.pending is None:
        await begin_copy(agreed, copy, migration)
    while not migration.steering.is_forced and migration.live.stopped_s is None:
        verdict = await _one_round(channel, bulk, agreed, copy, migration)
        if verdict is Verdict.PAUSE or (verdict is Verdict.WILL_NOT_CONVERGE and migration.options.force):
            break
        if verdict is Verdict.WILL_NOT_CONVERGE:
            raise _will_not_converge(copy, migration)
        if verdict is Verdict.THROTTLE:
            await _throttle(copy, migration)
    assert copy.pending is not None
    await trio.to_thread.run_sync(copy.refresh)  # what can be done before the pause is done before it
    copy.forecast = copy.judge.forecast(copy.pending.count())


async def copy_the_rest(channel: Channel, bulk: BulkSource, copy: Copy, migration: SourceMigration) -> None:
    """The last round, of a guest that is paused: what was dirty, and what was written until the pause."""
    assert copy.pending is not None
    copy.pending |= await migration.live.take_dirty()
    _remember_offered(migration, copy.pending)
    begun = trio.current_time()
    sent = await _send_round(channel, bulk, copy, migration, last=True)
    copy.refresh()  # a few blocks: less than a way into a thread and back
    _note_round(migration.record, _round_of(sent, trio.current_time() - begun, 0), 0)
    migration.record.laps.lap("last_round")


async def catch_up(channel: Channel, copy: Copy, migration: SourceMigration) -> None:
    """Say that we go on after a cut, and learn what of the cut round has arrived: the rest is still to be sent."""
    assert copy.answer is not None
    await channel.send(copy.answer)
    applied = await channel.expect(m.Applied, deadline_s=migration.deadlines.answer_s)
    assert copy.pending is not None
    held = read_applied(applied, copy.pending.pages)
    # Of the cut round any page may have been hashed anew, also one that is not sent again.
    copy.fresh = copy.pending if copy.fresh is None else copy.fresh | copy.pending
    if applied.round_number == copy.number:
        copy.next_round(PageBitmap(copy.pending.pages))
    elif applied.round_number == copy.number - 1:
        copy.pending = copy.pending - held
    else:
        raise RemoteProtocolError(f"the destination holds round {applied.round_number}, sent was {copy.number}")
    with trio.CancelScope(shield=True):
        # Marks that were taken and then forgotten would be lost pages.
        copy.pending |= await migration.live.take_dirty()
    _remember_offered(migration, copy.pending)
    log.info("migration.resumed", migration=migration.migration_id, pages_left=copy.pending.count())


# --------------------------------------------------------------------------- the first round


async def begin_copy(agreed: Agreed, copy: Copy, migration: SourceMigration) -> None:
    """The first round: every page that was ever touched. Marks first, or a write in between would be lost."""
    guest, record = migration.live, migration.record
    for _ in range(_REHEARSALS):
        await _rehearse(agreed, copy, migration)
    record.ram.total_bytes = guest.ram.layout.size_bytes
    migration.offered = PageBitmap(guest.ram.layout.pages)  # from now on there is something to undo
    await guest.start_tracking()
    pages = await guest.first_pages()
    _remember_offered(migration, pages)
    copy.pending = pages
    copy.begun_s = time.monotonic()


async def _rehearse(agreed: Agreed, copy: Copy, migration: SourceMigration) -> None:
    """Measure once more what can be known of the pause beforehand, on this guest while it runs."""
    guest, rehearsals = migration.live, copy.rehearsals
    begun = trio.current_time()
    await guest.status()
    asked = trio.current_time()
    with contextlib.suppress(PayloadError, HypervisorError):  # whether it will succeed is seen when it counts
        await guest.rehearse_export(agreed.select.payloads)
    rehearsals.request_s.note(asked - begun)
    rehearsals.devices_s.note(trio.current_time() - asked)
    if agreed.select.verify == "full":
        populated = await trio.to_thread.run_sync(guest.ram.populated)
        rehearsals.verify_s.note(await trio.to_thread.run_sync(_hash_time_s, populated))


def _hash_time_s(populated: PageBitmap) -> float:
    """What hashing all of RAM will take, by hashing a little. Blocking."""
    begun = time.thread_time()
    hashlib.sha256(bytes(_HASH_SAMPLE_BYTES)).digest()
    return (time.thread_time() - begun) * populated.count() * PAGE_SIZE / _HASH_SAMPLE_BYTES


# --------------------------------------------------------------------------- rounds


async def _one_round(
    channel: Channel, bulk: BulkSource, agreed: Agreed, copy: Copy, migration: SourceMigration
) -> Verdict:
    """Send what is pending, wait until it has landed, and see what was written meanwhile: that is pending then."""
    begun = trio.current_time()
    sent = await _land_pass(channel, bulk, agreed, copy, migration)
    seconds = trio.current_time() - begun
    with trio.CancelScope(shield=True):
        # Marks that were taken and then forgotten would be lost pages: no cancel in between.
        copy.next_round(await migration.live.take_dirty())
    pending = copy.pending
    assert pending is not None
    _remember_offered(migration, pending)
    if not migration.options.auto_converge:
        await let_go(copy.judge, migration)
    copy.judge.fixed_s = _fixed_s(copy, migration)
    if copy.judge.forecast(0).total_s > migration.steering.limits.downtime_s:
        # It would not fit with nothing left to send: was it measured in a bad moment?
        await _rehearse(agreed, copy, migration)
        copy.judge.fixed_s = _fixed_s(copy, migration)
    number, finished = copy.number - 1, _round_of(sent, seconds, pending.count() + migration.live.unnamed_pages)
    throttled = copy.judge.throttle_percent
    limits = migration.steering.limits
    verdict = copy.judge.after_round(
        finished, replace(limits, auto_converge=limits.auto_converge and copy.can_throttle)
    )
    _note_round(migration.record, finished, throttled)
    _note_judgement(copy, migration)
    log.info("round.finished", round=number, pages=sent.pages, dirty_pages=finished.dirty_pages, verdict=verdict.value)
    return verdict


async def _land_pass(
    channel: Channel, bulk: BulkSource, agreed: Agreed, copy: Copy, migration: SourceMigration
) -> RoundSent:
    """Send what is pending; and, of a page source that names pages bit by bit, all that it names in this pass, a round
    for each bit.

    What is left of a pass decides when such a source stops the guest. So before the last part of it is asked for, a
    pause must be within the limit, as far as it does not depend on pages.

    Raises: ConvergenceError: it is not.
    """
    sent, is_checked = await _land_round(channel, bulk, copy, migration), migration.options.force
    while not migration.steering.is_forced:
        if not is_checked and is_last_part(migration.live):
            await _check_a_pause_is_possible(agreed, copy, migration)
            is_checked = True
        if not await _name_more(copy, migration):
            break
        sent = sent.and_then(await _land_and_name(channel, bulk, copy, migration))
    return sent


async def _land_and_name(channel: Channel, bulk: BulkSource, copy: Copy, migration: SourceMigration) -> RoundSent:
    """As `_land_round`; a stream names the next pages meanwhile. Not when it might stop the guest over that: what is
    under way would then be a part of the pause."""
    if not migration.live.unnamed_pages or is_last_part(migration.live):
        return await _land_round(channel, bulk, copy, migration)
    async with open_group() as group:
        group.start_soon(migration.live.name_ahead)
        return await _land_round(channel, bulk, copy, migration)
    raise AssertionError("a group that nobody cancels ends with its block")


def is_last_part(guest: Guest) -> bool:
    """Whether a stream that goes on naming pages might stop the guest soon."""
    return 0 < guest.unnamed_pages < guest.ram.layout.pages // _LAST_PART


async def _check_a_pause_is_possible(agreed: Agreed, copy: Copy, migration: SourceMigration) -> None:
    for _ in range(_MOST_REHEARSALS):
        copy.judge.fixed_s = _fixed_s(copy, migration)
        if copy.judge.forecast(0).total_s <= migration.steering.limits.downtime_s:
            return
        await _rehearse(agreed, copy, migration)  # was it measured in a bad moment?
    raise _will_not_converge(copy, migration)


async def _name_more(copy: Copy, migration: SourceMigration) -> bool:
    """What is pending are the next pages that a stream names; False: none, its pass is over."""
    more = await migration.live.more_pages()
    if more is None:
        return False
    copy.next_round(more)  # nothing may come between: pages that were named and then forgotten would be lost
    _remember_offered(migration, more)
    return True


async def land_named(
    channel: Channel, bulk: BulkSource, copy: Copy, migration: SourceMigration, *, goes_on: Callable[[], bool]
) -> RoundSent:
    """As `run_round`, of pages that a stream names as long as it *goes_on*."""
    begun = trio.current_time()
    sent = await _land_round(channel, bulk, copy, migration)
    while goes_on() and await _name_more(copy, migration):
        sent = sent.and_then(await _land_and_name(channel, bulk, copy, migration))
    copy.number += 1
    _note_probe(copy, migration, sent, trio.current_time() - begun)
    return sent


async def run_round(channel: Channel, bulk: BulkSource, copy: Copy, migration: SourceMigration) -> RoundSent:
    """Send what is pending and wait until it has landed, for the sake of how long that takes: marks are not taken."""
    begun = trio.current_time()
    sent = await _land_round(channel, bulk, copy, migration)
    copy.number += 1
    _note_probe(copy, migration, sent, trio.current_time() - begun)
    return sent


def _note_probe(copy: Copy, migration: SourceMigration, sent: RoundSent, seconds: float) -> None:
    finished = _round_of(sent, seconds, 0)
    copy.judge.note(finished)
    _note_round(migration.record, finished, 0)
    copy.judge.fixed_s = _fixed_s(copy, migration)


async def _land_round(channel: Channel, bulk: BulkSource, copy: Copy, migration: SourceMigration) -> RoundSent:
    sent = await _send_round(channel, bulk, copy, migration, last=False)
    applied = await channel.expect(m.RoundApplied, deadline_s=migration.deadlines.round_s)
    if applied.round_number != copy.number:
        raise RemoteProtocolError(f"round {applied.round_number} was applied, {copy.number} was sent")
    return sent


def _fixed_s(copy: Copy, migration: SourceMigration) -> float:
    """An empty round is little more than a message and its answer."""
    rehearsed = copy.rehearsals.result(migration.journal.write_s.high, copy.judge.overhead_s.mean)
    return rehearsed.fixed_s(migration.history)


async def _send_round(
    channel: Channel, bulk: BulkSource, copy: Copy, migration: SourceMigration, *, last: bool
) -> RoundSent:
    assert copy.pending is not None
    pages, number = copy.pending, copy.number
    copy.unsent = None
    migration.record.progress.update(round=number, pages_left=pages.count())
    fetch = migration.live.fetch if migration.live.ram.is_copied else None
    if last:
        sent = await bulk.send_round(pages, number, last=True, fetch=fetch)
    else:
        async with _beside(bulk, copy, migration.record, pages.count()):
            sent = await bulk.send_round(pages, number, fetch=fetch)
            copy.unsent = sent.unsent  # before the end of the round is said: who hears that may hold all but these
    copy.fresh = pages
    _note_bytes(bulk, copy, migration.record)
    channel.say_later(m.RoundEnd(number, sent.records, sent.pages, pages.count()))
    if not last:
        await channel.send_bytes(b"")
    return sent


@contextlib.asynccontextmanager
async def _beside(bulk: BulkSource, copy: Copy, record: MigrationRecord, pages: int) -> AsyncIterator[None]:
    """While a round is being sent, keep the record's counters fresh, and tell the condenser of the round before."""

    async def watch() -> None:
        done_before = bulk.pages_done
        while True:
            await trio.sleep(_PROGRESS_S)
            _note_bytes(bulk, copy, record)
            record.progress.update(
                bytes=record.ram.sent_bytes, pages_left=max(pages - (bulk.pages_done - done_before), 0)
            )

    async with open_group() as nursery:
        nursery.start_soon(watch)
        async with open_group() as told:
            if copy.fresh is not None:
                told.start_soon(trio.to_thread.run_sync, copy.refresh)
            yield
        nursery.cancel_scope.cancel()


async def _throttle(copy: Copy, migration: SourceMigration) -> None:
    """Hold the guest's processors; one that cannot be held goes on as it is."""
    migration.is_throttled = True
    percent = copy.judge.throttle_percent
    try:
        await migration.live.throttle(percent)
    except HypervisorError as error:
        if error.code == "guest_lost":
            raise
        if error.code == "not_supported":
            migration.is_throttled, copy.can_throttle, copy.judge.throttle_percent = False, False, 0
        _note_once(migration.record, f"the guest cannot be throttled: {error.text}")
        return
    log.info("guest.throttled", migration=migration.migration_id, percent=percent)


async def let_go(judge: Convergence, migration: SourceMigration) -> None:
    """The guest's processors are not held any more, if they were. Nothing else is wrong with a guest that does not obey
    at once: it is let go at the latest when it is resumed, here or there.
    """
    if not migration.is_throttled:
        return
    judge.throttle_percent = 0
    try:
        await migration.live.throttle(0)
    except HypervisorError as error:
        if error.code == "guest_lost":
            raise
        _note_once(migration.record, f"the guest is still throttled: {error.text}")
        return
    migration.is_throttled = False


def _will_not_converge(copy: Copy, migration: SourceMigration) -> ConvergenceError:
    assert copy.pending is not None
    dirty, allowed_s = copy.pending.count(), migration.steering.limits.downtime_s
    least_s = copy.judge.forecast(0).total_s
    if least_s > allowed_s:
        # What was learnt forbids every move to that host, and without one nothing new would be learnt.
        migration.history.beside_s.forget()
        return ConvergenceError(
            f"with nothing left to send the pause would still last about {least_s:.2f} s, allowed is {allowed_s:g} s"
        )
    pause_s = copy.judge.forecast(dirty).total_s
    return ConvergenceError(
        f"after {copy.number - 1} rounds {dirty} pages are dirty; the pause would last about {pause_s:.2f} s, allowed"
        f" is {allowed_s:g} s"
    )


# --------------------------------------------------------------------------- what is noted


def note_pause(copy: Copy, migration: SourceMigration) -> None:
    """The migration is over: how good was the forecast? A pause that ended well teaches the next one."""
    forecast, record = copy.forecast, migration.record
    if forecast is None or record.outcome is not Outcome.MOVED:
        return
    record.forecast = {
        "pause_s": forecast.total_s,
        "fixed_s": forecast.fixed_s,
        "overhead_s": forecast.overhead_s,
        "pages_s": forecast.pages_s,
        "error_s": record.laps.total_s - forecast.total_s,
    }
    if migration.planned is not None:
        record.forecast["planned"] = {
            "total_s": migration.planned["total_s"],
            "total_error_s": time.monotonic() - (copy.begun_s or 0.0) - migration.planned["total_s"],
            "pause_s": migration.planned["pause_s"],
            "pause_error_s": record.laps.total_s - migration.planned["pause_s"],
            "ram_bytes": migration.planned["ram_bytes"],
        }
    own_s = copy.rehearsals.devices_s.value + copy.rehearsals.verify_s.value
    migration.history.note(record.laps.total_s, forecast.overhead_s + forecast.pages_s, own_s)


def _round_of(sent: RoundSent, seconds: float, dirty_pages: int) -> Round:
    return Round(sent.pages, sent.bytes_sent, seconds, dirty_pages, sent.zero_pages)


def _remember_offered(migration: SourceMigration, dirty: PageBitmap) -> None:
    assert migration.offered is not None
    migration.offered |= dirty
    migration.record.ram.hole_bytes = (dirty.pages - migration.offered.count()) * PAGE_SIZE


def _note_round(record: MigrationRecord, finished: Round, throttle_percent: int) -> None:
    record.ram.rounds.append(
        {
            "pages": finished.pages,
            "bytes": finished.bytes_sent,
            "seconds": finished.seconds,
            "dirty_pages": finished.dirty_pages,
            "throttle_percent": throttle_percent,
        }
    )


def _note_bytes(bulk: BulkSource, copy: Copy, record: MigrationRecord) -> None:
    record.ram.sent_bytes = copy.sent_bytes + bulk.bytes_sent
    record.ram.note_tally(copy.tally + bulk.tally)


def _note_judgement(copy: Copy, migration: SourceMigration) -> None:
    assert copy.pending is not None
    judge, dirty = copy.judge, copy.pending.count()
    migration.record.progress.update(
        rate_bytes_per_s=int(judge.rate.mean),
        dirty_rate_bytes_per_s=int(judge.dirty_rate.mean),
        dirty_pages=dirty,
        forecast_pause_us=int(judge.forecast(dirty).total_s * 1e6),
        throttle_percent=judge.throttle_percent,
    )


def _note_once(record: MigrationRecord, text: str) -> None:
    if text not in record.notes:
        record.notes.append(text)
