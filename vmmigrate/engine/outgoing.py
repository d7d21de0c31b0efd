"""One outgoing migration: all that it needs, and what becomes of its guest at the source.

Before `released` an attempt can always be undone. After it only evidence counts (ownership rule 5): a message of the
destination, or its answer to settle; then the guest is freed, or taken back under a higher epoch.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import structlog
import trio

from vmmigrate.engine.journal import AsyncJournal
from vmmigrate.engine.limits import Deadlines, MigrationOptions
from vmmigrate.engine.metrics import MigrationRecord, Outcome, outcome_of
from vmmigrate.errors import (
    HandoffInDoubt,
    HypervisorError,
    IdentityError,
    PeerError,
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
from vmmigrate.spec.latest import InstanceSpec

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class SettleAnswer:
    """What the destination answered to `side:settle`, and the code of its refusal, if it is one."""

    answer: Answer
    journal_id: str
    code: str | None = None


AskDestination = Callable[[str, str], Awaitable[SettleAnswer]]  # (its API URL, migration id)


@dataclass
class SourceMigration:
    """Everything that one outgoing migration needs.

    Attributes:
        ask_destination: Asks the destination's daemon for its verdict; injected by the daemon, which has the client.
        offered: Every page that was taken from the dirty marks in this attempt; put back when it fails.
    """

    migration_id: str
    instance_id: str
    own: Identity
    destination: Identity
    guest: Guest
    spec: InstanceSpec
    properties: Mapping[str, str]
    blobs: Mapping[str, bytes]
    journal: AsyncJournal
    door: BulkDoor
    bulk_port: int
    record: MigrationRecord
    ask_destination: AskDestination
    options: MigrationOptions = field(default_factory=MigrationOptions)
    deadlines: Deadlines = field(default_factory=Deadlines)
    session_number: int = 1
    destination_url: str = ""
    destination_journal: str = ""
    desired: RunState = RunState.RUNNING
    offered: PageBitmap | None = None
    backends_closed: bool = False


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
        await migration.guest.destroy()
        migration.record.finish(Outcome.MOVED)
        log.info("migration.moved", migration=migration.migration_id, instance=migration.instance_id)
        return
    unknown = VmMigrateError(f"the destination answered {answer.value}", code=f"destination_{answer.value}")
    await _take_back(migration, reason or unknown)


async def _take_back(migration: SourceMigration, error: VmMigrateError) -> None:
    """Run the guest again, under the epoch that the journal now holds."""
    try:
        await _resume_guest(migration)
    except HypervisorError as exc:
        await _guest_is_gone(migration, exc)
        return
    migration.record.finish(Outcome.FAILED, error)
    log.info("migration.reclaimed", migration=migration.migration_id, code=error.code, text=error.text)


async def _resume_guest(migration: SourceMigration) -> None:
    """What the guest was before the attempt: marks, disks, run state. Needs the present epoch to be ours."""
    guest = migration.guest
    epoch = migration.journal.state.instances[migration.instance_id].epoch
    if migration.offered is not None:
        await guest.mark_dirty(migration.offered)
    if migration.backends_closed:
        await guest.open_backends(epoch)
        migration.backends_closed = False
    if migration.desired is RunState.RUNNING:
        await guest.run(epoch)
    else:
        await guest.pause()


async def undo(channel: Channel, migration: SourceMigration, error: VmMigrateError) -> None:
    """Make the guest what it was, then end the attempt, then tell the peer. Shielded; bounded."""
    failed_in = channel.session.failed_in or channel.phase
    record = migration.record
    with trio.CancelScope(shield=True):
        await channel.say_goodbye(error)
        try:
            with trio.fail_after(migration.deadlines.undo_s):
                if migration.offered is not None:
                    await _resume_guest(migration)
                await migration.journal.commit(rules.EndAttempt(migration.migration_id, error.code))
        except (HypervisorError, trio.TooSlowError) as exc:
            await _guest_is_gone(migration, exc)
            return
    record.finish(outcome_of(error, failed_in), error)
    log.info("migration.ended", migration=migration.migration_id, code=error.code, text=error.text)


async def _guest_is_gone(migration: SourceMigration, exc: Exception) -> None:
    """The guest could not be resumed: it is lost, or it does not answer; say which."""
    text = f"the guest could not be resumed at the source: {exc}"
    log.error("migration.not_resumed", migration=migration.migration_id, instance=migration.instance_id, why=str(exc))
    if isinstance(exc, HypervisorError) and exc.code == "guest_lost":
        await migration.journal.commit(rules.Lose(migration.instance_id, exc.text))
        migration.record.finish(Outcome.GUEST_LOST, HypervisorError(text, code="guest_lost"))
        return
    # The journal still says `pausing`: the next start of the daemon undoes the pause.
    migration.record.finish(Outcome.FAILED, HypervisorError(text, code="not_resumed"))


# --------------------------------------------------------------------------- in doubt


async def settle(migration: SourceMigration) -> None:
    """Ask the destination until there is evidence. Runs as long as it takes: no timer resolves anything (rule 8).

    Raises:
        HandoffInDoubt: `indeterminate`: only an operator can resolve it.
    """
    released = migration.journal.state.outgoing[migration.migration_id].released
    assert released is not None
    pause_s = migration.deadlines.settle_first_s
    while migration.record.outcome in {None, Outcome.UNKNOWN}:
        try:
            reply = await migration.ask_destination(released.destination_url, migration.migration_id)
        except (TransportError, IdentityError, PeerError, RequestError) as exc:
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
