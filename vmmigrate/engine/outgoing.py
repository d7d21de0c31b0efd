"""One outgoing migration: all that it needs, and what becomes of its guest at the source.

Before `released` an attempt can always be undone. After it only evidence counts (ownership rule 5): a message of the
destination, or its answer to settle; then the guest is freed, or taken back under a higher epoch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog
import trio

from vmmigrate.engine.abilities import of_this_release
from vmmigrate.engine.frozen import PENDING, Frozen, not_hashed
from vmmigrate.engine.journal import AsyncJournal
from vmmigrate.engine.limits import Deadlines, MigrationOptions
from vmmigrate.engine.metrics import MigrationRecord, Outcome, outcome_of
from vmmigrate.engine.steering import Steering
from vmmigrate.errors import (
    HandoffInDoubt,
    HypervisorError,
    JournalError,
    MigrationCancelled,
    RequestError,
    TransportError,
    VmMigrateError,
)
from vmmigrate.hypervisor.base import Guest, RunState
from vmmigrate.memory import PageBitmap
from vmmigrate.net.channel import Channel
from vmmigrate.net.door import BulkDoor
from vmmigrate.net.identity import Identity
from vmmigrate.ownership import rules
from vmmigrate.ownership.rules import Answer, OwnershipRefusal
from vmmigrate.ownership.state import Holding, Outgoing
from vmmigrate.ram.forecast import PauseHistory
from vmmigrate.spec.latest import InstanceSpec
from vmmigrate.wire import messages as m
from vmmigrate.wire.negotiate import Abilities
from vmmigrate.wire.phases import Phase

log = structlog.get_logger(__name__)

RESUME_AGAIN_S = 0.5


@dataclass(frozen=True)
class SettleAnswer:
    """What the destination answered to `side:settle`, and the code of its refusal, if it is one."""

    answer: Answer
    journal_id: str
    code: str | None = None


# A link that was cut, or takes nothing any more. Everything else that ends a session is somebody's word, or a forgery,
# and ends the migration; as does an answer that does not come (`timed_out`) from a peer that beats.
LINK_LOST = frozenset(
    {
        "link_lost",
        "disconnected",
        "closed",
        "closed_after_handshake",
        "stalled",
        "peer_silent",
        "connection_refused",
        "unreachable",
        "handshake_timeout",
        "hello_timeout",
        "bulk_timeout",
    }
)


# What a cut looks like from the end that one is at: by how the connection ended, and what was being done to it.
_CUT = frozenset({"disconnected", "closed", "closed_after_handshake"})


def of_the_link(error: VmMigrateError) -> VmMigrateError:
    """A cut link has one name on both sides, however each of them noticed it."""
    if isinstance(error, TransportError) and error.code in _CUT:
        return TransportError(error.text, code="link_lost")
    return error


def stayed_cut(error: VmMigrateError, window_s: float) -> VmMigrateError:
    """The link did not come back in time. What cut it is told in words: each side may have seen it otherwise. No
    TransportError: nothing that the link still says explains it better."""
    text = f"the link was cut and did not come back within {window_s:g} s: {error.text}"
    return VmMigrateError(text, code="link_lost")


def cut_in_a_stop(error: VmMigrateError) -> VmMigrateError:
    """The link is not waited for: the guest would stand still for as long as that."""
    text = f"the link was cut when the guest had been stopped for its last pages, so it runs on here: {error.text}"
    return VmMigrateError(text, code="link_lost")


# While these last the guest runs at the source, and both ends can go on after a cut.
RESUMABLE = frozenset({Phase.RAM_PRE_PAUSE, Phase.RESUMING, Phase.CATCHING_UP})


class Resumption:
    """Where a source whose link was cut waits for the destination to come again."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[tuple[Channel, m.Resume] | VmMigrateError](1)

    def hand_in(self, channel: Channel, resume: m.Resume) -> None:
        """A destination came and wants to go on. Raises: RequestError: another one waits already."""
        try:
            self._send.send_nowait((channel, resume))
        except trio.WouldBlock:
            raise RequestError("the destination is being answered already", code="not_resumable") from None

    def abort(self, error: VmMigrateError) -> None:
        """Nobody is to come any more. Best effort: a destination that came just before is dealt with first."""
        with contextlib.suppress(trio.WouldBlock):
            self._send.send_nowait(error)

    async def next(self) -> tuple[Channel, m.Resume]:
        """The next destination that comes. Raises: what `abort` was given."""
        arrived = await self._receive.receive()
        if isinstance(arrived, VmMigrateError):
            raise arrived
        return arrived


AskDestination = Callable[[str, str], Awaitable[SettleAnswer]]  # (its API URL, migration id)


@dataclass
class SourceMigration:
    """Everything that one outgoing migration needs.

    Attributes:
        abilities: What this host may do; everything, unless its configuration says less.
        steering: Its options, some of which may be changed while it runs.
        history: What pauses towards that destination took.
        planned: The last plan of this very move, if there was one.
        frozen: What is known of the RAM that was sent; with the RAM itself once the guest has moved.
        guest: None when its process is gone and only the verdict of the destination is still to be learnt.
        ask_destination: Asks the destination's daemon for its verdict; injected by the daemon, which has the client.
        offered: Every page that was taken from the dirty marks in this attempt; put back when it fails.
        is_throttled: The guest's processors are held back; they are let go when the attempt fails.
        is_pausing: From then on a cut link is no longer waited out.
        over: Set at the end: connections that were handed in may be closed.
    """

    migration_id: str
    instance_id: str
    own: Identity
    destination: Identity
    guest: Guest | None
    spec: InstanceSpec
    properties: Mapping[str, str]
    blobs: Mapping[str, bytes]
    journal: AsyncJournal
    door: BulkDoor
    bulk_port: int
    record: MigrationRecord
    ask_destination: AskDestination
    abilities: Abilities = field(default_factory=of_this_release)
    steering: Steering = field(default_factory=lambda: Steering(MigrationOptions()))
    history: PauseHistory = field(default_factory=PauseHistory)
    planned: Mapping[str, Any] | None = None
    frozen: Frozen | None = None
    deadlines: Deadlines = field(default_factory=Deadlines)
    session_number: int = 1
    destination_url: str = ""
    destination_journal: str = ""
    desired: RunState = RunState.RUNNING
    offered: PageBitmap | None = None
    is_throttled: bool = False
    is_pausing: bool = False
    resumption: Resumption = field(default_factory=Resumption)
    over: trio.Event = field(default_factory=trio.Event)

    @property
    def options(self) -> MigrationOptions:
        """As they are now."""
        return self.steering.options

    @property
    def live(self) -> Guest:
        """The guest, of which the engine's steps are sure that it is there."""
        assert self.guest is not None
        return self.guest


async def conclude(
    migration: SourceMigration,
    answer: Answer,
    journal_id: str,
    reason: VmMigrateError | None = None,
) -> None:
    """Act on what the destination durably decided: free the guest, or take it back. `pending` changes nothing.

    Args:
        reason: Why it refused or returned, if it said so.

    Raises:
        HandoffInDoubt: `indeterminate`: the answer comes from another journal than the one that said Ready.
    """
    try:
        decision = await migration.journal.commit(rules.Evidence(migration.migration_id, answer, journal_id))
    except OwnershipRefusal as refusal:
        raise HandoffInDoubt(refusal.text, code=refusal.code) from refusal
    if not decision.records:
        return
    if answer in {Answer.RUNNING, Answer.STARTED}:
        if migration.guest is not None:
            _keep_ram(migration)
        # The guest runs there, and this is durable here. To take down what it was here takes the kernel 0.1 s for a
        # GiB, and is no part of the move.
        migration.record.finish(Outcome.MOVED)
        log.info("migration.moved", migration=migration.migration_id, instance=migration.instance_id)
        if migration.guest is not None:
            await migration.guest.destroy()
        return
    unknown = VmMigrateError(f"the destination answered {answer.value}", code=f"destination_{answer.value}")
    await _take_back(migration, reason or unknown)


def _keep_ram(migration: SourceMigration) -> None:
    """RAM outlives the guest that moved, to be hashed once more."""
    if migration.guest is None or migration.frozen is None or migration.frozen.ram is not None:
        return
    if migration.guest.ram.is_copied:
        migration.record.integrity = not_hashed("guest RAM was its process's own, and ended with it")
        return
    migration.frozen.ram = migration.guest.release_ram()
    migration.record.integrity = dict(PENDING) if migration.frozen.ram else not_hashed("the guest process had ended")


async def _take_back(migration: SourceMigration, error: VmMigrateError) -> None:
    """Run the guest again, under the epoch that the journal now holds."""
    if migration.guest is None:
        _note_lost(migration, HypervisorError("the guest process ended while it was in doubt", code="guest_lost"))
    elif await _resume(migration) is None:
        called_off = error.code == MigrationCancelled.default_code
        migration.record.finish(Outcome.CANCELLED if called_off else Outcome.FAILED, error)
        log.info("migration.reclaimed", migration=migration.migration_id, code=error.code, text=error.text)


async def undo(channel: Channel, migration: SourceMigration, error: VmMigrateError) -> None:
    """Make the guest what it was, then tell the peer, then end the attempt. Shielded; bounded.

    Only an attempt that the journal still knows as under way owns the guest's run state: one that was ended meanwhile,
    or was given away, is left alone. Whatever the attempt failed with, the record of a guest that is gone says so.
    """
    failed_in = channel.session.failed_in or channel.phase
    outgoing = migration.journal.state.outgoing[migration.migration_id]
    with trio.CancelScope(shield=True):
        under_way = outgoing.stage in {Outgoing.ACTIVE, Outgoing.PAUSING}
        if under_way and migration.offered is not None:
            failure = await _resume(migration)
            if failure is not None:
                await channel.say_goodbye(failure)
                return
        error = of_the_link(await channel.true_reason(error))
        await channel.say_goodbye(error)
        if under_way:
            await migration.journal.commit(rules.EndAttempt(migration.migration_id, error.code))
    if migration.journal.state.instances[migration.instance_id].holding is Holding.LOST:
        _note_lost(migration, HypervisorError("the guest process ended by itself", code="guest_lost"))
    migration.record.finish(outcome_of(error, failed_in), error)
    log.info("migration.ended", migration=migration.migration_id, code=error.code, text=error.text)


async def _resume(migration: SourceMigration) -> HypervisorError | None:
    """Try until the guest is what it was before the attempt. Else why not: it is lost, or did not obey in `undo_s`."""
    failure: HypervisorError | None = None
    with trio.move_on_after(migration.deadlines.undo_s):
        while True:
            try:
                await _resume_once(migration)
                return None
            except HypervisorError as exc:
                failure = exc
                if exc.code == "guest_lost":
                    break
                log.warning("migration.resume_failed", migration=migration.migration_id, code=exc.code, text=exc.text)
                await trio.sleep(RESUME_AGAIN_S)
    return await _guest_is_gone(migration, failure or HypervisorError("no answer", code="guest_unresponsive"))


async def _resume_once(migration: SourceMigration) -> None:
    """Marks, disks and run state as they were. Nothing at all unless the journal says that the guest is ours."""
    state = migration.journal.state
    epoch = state.instances[migration.instance_id].epoch
    if not state.may_run(migration.instance_id, epoch):
        log.error("migration.not_ours", migration=migration.migration_id, instance=migration.instance_id)
        return
    guest = migration.live
    if migration.is_throttled:
        await guest.throttle(0)
    if migration.offered is not None:
        await guest.mark_dirty(migration.offered)
    if guest.page_source == "stream":
        await guest.stop_tracking()  # it would go on to stop the guest
    await guest.open_backends(epoch)
    if migration.desired is RunState.RUNNING:
        await guest.run(epoch)
    else:
        await guest.pause()
    await guest.note_record(*migration.journal.position)


async def _guest_is_gone(migration: SourceMigration, exc: HypervisorError) -> HypervisorError:
    """The guest could not be resumed: it is lost, or it does not answer; say which, as the record does."""
    log.error("migration.not_resumed", migration=migration.migration_id, instance=migration.instance_id, why=str(exc))
    if exc.code == "guest_lost":
        await migration.journal.commit(rules.Lose(migration.instance_id, exc.text))
        _note_lost(migration, exc)
        return exc
    # The journal still says `pausing`: the next start of the daemon undoes the pause.
    failure = HypervisorError(f"the guest could not be resumed at the source: {exc}", code="not_resumed")
    migration.record.finish(Outcome.FAILED, failure)
    return failure


def _note_lost(migration: SourceMigration, exc: HypervisorError) -> None:
    migration.record.finish(Outcome.GUEST_LOST, exc)


# --------------------------------------------------------------------------- in doubt


async def settle(migration: SourceMigration) -> None:
    """Ask the destination until there is evidence, or an operator resolves it. Runs as long as it takes: no timer
    resolves anything (rule 8).

    Raises:
        HandoffInDoubt: `indeterminate`: only an operator can resolve it.
    """
    released = migration.journal.state.outgoing[migration.migration_id].released
    assert released is not None
    pause_s = migration.deadlines.settle_first_s
    while migration.record.outcome in {None, Outcome.UNKNOWN}:
        try:
            reply = await migration.ask_destination(released.destination_url, migration.migration_id)
        except JournalError:
            raise
        except VmMigrateError as exc:
            # Whatever the destination answers instead of a verdict is no evidence: ask again.
            log.info("settle.unanswered", migration=migration.migration_id, code=exc.code, text=exc.text)
        else:
            log.info("settle.answered", migration=migration.migration_id, answer=reply.answer.value)
            with trio.CancelScope(shield=True):
                await conclude(migration, reply.answer, reply.journal_id, _reason(reply))
        if migration.record.outcome in {None, Outcome.UNKNOWN}:
            await trio.sleep(pause_s)
            pause_s = min(pause_s * 2, migration.deadlines.settle_most_s)


def _reason(reply: SettleAnswer) -> VmMigrateError | None:
    """The destination's own code, so that both records say the same."""
    if reply.code is None:
        return None
    return VmMigrateError(f"the destination answered {reply.answer.value}: {reply.code}", code=reply.code)
