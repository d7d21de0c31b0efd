"""The destination of a migration, as straight-line code: one function per phase, in the order of the sequence diagram.

Up to `prepared` a failure costs nothing: the half-built guest is removed. After it exactly one verdict is given on M,
and each is durable before anybody acts on it or hears of it: `acquired` or `refused`, then `started` or `returned`.
`started` is the point of no return, written when everything is open and before the first vCPU instruction.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

import structlog
import trio

from vmmigrate.devices import opaque
from vmmigrate.engine import explain, preamble
from vmmigrate.engine.agreement import note_negotiated
from vmmigrate.engine.importing import collect_state, import_state
from vmmigrate.engine.incoming import Agreed, Arrival, DestinationMigration, HandedOver
from vmmigrate.engine.landing import Arriving, bulk_streams, receive_ram
from vmmigrate.engine.metrics import Outcome, outcome_of
from vmmigrate.engine.outgoing import LINK_LOST, RESUMABLE, of_the_link, stayed_cut
from vmmigrate.engine.populating import Populating
from vmmigrate.engine.ram import hash_ram_in_thread
from vmmigrate.engine.resume import ask_to_resume, check_resumed, tell_applied
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
from vmmigrate.hypervisor.base import Guest, RunState
from vmmigrate.net.channel import Channel, refusal_of
from vmmigrate.net.receiving import Landing
from vmmigrate.net.secrets import RANDOM_BYTES, SessionContext, SessionSecrets
from vmmigrate.net.threads import open_group
from vmmigrate.ownership import rules
from vmmigrate.ownership.records import Epoch
from vmmigrate.ownership.rules import OwnershipRefusal
from vmmigrate.ownership.state import Incoming
from vmmigrate.ram.digest import Condenser, PageHash
from vmmigrate.spec import chain
from vmmigrate.spec.amend import amend
from vmmigrate.wire import messages as m
from vmmigrate.wire.phases import Kind, Phase

log = structlog.get_logger(__name__)

T = TypeVar("T")

RECONNECT_FIRST_S = 0.1
RECONNECT_MOST_S = 2.0


async def migrate_in(channel: Channel, migration: DestinationMigration) -> None:
    """Take the guest over from a source that has proved who it is.

    The record tells the outcome; nothing is raised for a migration that failed.

    Raises:
        JournalError: The journal is poisoned; the daemon must exit. trio.Cancelled: the daemon stops.
    """
    migration.record.begin(channel.session)
    # Channels opened after a cut link live on this stack, and so to the end of the migration.
    async with contextlib.AsyncExitStack() as stack:
        way = _Way(channel, stack)
        try:
            run_state = await _up_to_handoff(way, migration)
            await _take_over(way.channel, migration, run_state)
        except JournalError:
            raise
        except VmMigrateError as error:
            await _give_up(way.channel, migration, error)
        except trio.Cancelled:
            stopping = VmMigrateError("the destination daemon is stopping", code="daemon_stopping")
            await _give_up(way.channel, migration, stopping)
            raise
        except Exception:
            # A defect, perhaps provoked by the peer: as long as no verdict was given it costs this attempt, no more.
            stage = migration.journal.state.incoming[migration.migration_id].stage
            if stage not in {Incoming.RESERVED, Incoming.PREPARED}:
                raise
            log.exception("migration.defect", migration=migration.migration_id)
            await _give_up(way.channel, migration, VmMigrateError("the destination has a defect", code="internal"))


@dataclass
class _Way:
    """The control channel in force: a cut link is followed by another one."""

    channel: Channel
    stack: contextlib.AsyncExitStack


async def _up_to_handoff(way: _Way, migration: DestinationMigration) -> RunState:
    """All before the first verdict, in as many sessions as it takes; returns what the guest shall do."""
    with way.channel.interruptible():
        agreed = await _offer(way.channel, migration)
        received = await _accept_preamble(way.channel, agreed, migration)
    page_hash = PageHash(agreed.secrets.key("page digest"))
    landing = Landing(received.layout.pages)
    assert migration.guest is not None
    populating = Populating(migration.guest.ram, received.extents, landing.written)
    arriving = Arriving(page_hash, landing, Condenser(landing.table, agreed.select.digest), populating)
    while True:
        try:
            await _one_session(way.channel, agreed, arriving, migration)
            break
        except TransportError as error:
            agreed = await _resume(way, agreed, arriving, migration, error)
    try:
        handoff = await way.channel.expect(m.Handoff, deadline_s=migration.deadlines.handoff_window_s)
    except HandedOver as word:
        log.warning("migration.handed_over", migration=migration.migration_id, text=word.text)
        return received.run_state
    if Epoch(*handoff.epoch) != received.epoch:
        raise RemoteProtocolError(f"handoff of epoch {handoff.epoch}, announced was {tuple(received.epoch)}")
    return RunState(handoff.run_state)


async def _one_session(channel: Channel, agreed: Agreed, arriving: Arriving, migration: DestinationMigration) -> None:
    with channel.interruptible():
        async with bulk_streams(agreed, arriving, migration) as bulk, open_group() as beside:
            assert migration.guest is not None
            if not migration.guest.ram.fills:
                beside.start_soon(arriving.populating.run)
            await receive_ram(channel, bulk, arriving, migration, beside)
            await _receive_state(channel, agreed, arriving, migration)


# --------------------------------------------------------------------------- a cut link


async def _resume(
    way: _Way, agreed: Agreed, arriving: Arriving, migration: DestinationMigration, error: TransportError
) -> Agreed:
    """Come to the source again, and go on where the link was cut. Every receiver thread was joined before.

    Raises: a breach of what has landed, before all; the reason of the cut, when this is no matter for coming again or
        the source was not reached in time; NegotiationError, IdentityError: the source does not go on.
    """
    if arriving.landing.breach is not None:
        # Who can forge can cut, too: a lost link beside a forgery is no lost link.
        raise arriving.landing.breach from error
    reason = await way.channel.true_reason(error)
    session = way.channel.session
    if not isinstance(reason, TransportError) or reason.code not in LINK_LOST:
        raise reason from error
    if (session.failed_in or session.phase) not in RESUMABLE:
        raise reason from error
    way.channel.fail(reason)
    log.warning("migration.link_lost", migration=migration.migration_id, code=reason.code, text=reason.text)
    deadline, pause_s = trio.current_time() + migration.deadlines.resume_window_s, RECONNECT_FIRST_S
    while trio.current_time() + pause_s < deadline and migration.cancelled is None:
        await trio.sleep(pause_s)
        pause_s = min(2 * pause_s, RECONNECT_MOST_S)
        try:
            return await _reconnect(way, agreed, arriving, migration)
        except TransportError as again:
            log.info("migration.not_reached", migration=migration.migration_id, code=again.code, text=again.text)
    raise migration.cancelled or stayed_cut(reason, migration.deadlines.resume_window_s)


async def _reconnect(way: _Way, agreed: Agreed, arriving: Arriving, migration: DestinationMigration) -> Agreed:
    """One try: connect, prove each other, tell what has landed."""
    async with contextlib.AsyncExitStack() as attempt:
        assert migration.reconnect is not None
        channel = await attempt.enter_async_context(migration.reconnect())
        with channel.interruptible():
            asked = ask_to_resume(agreed.secrets)
            await channel.send(asked)
            answer = await channel.expect(m.Resumed, m.Refuse, deadline_s=migration.deadlines.answer_s)
            if isinstance(answer, m.Refuse):
                raise NegotiationError(answer.text, code=answer.code, details=answer.details)
            secrets_of_new = check_resumed(answer, asked, agreed.secrets)
            applied = await trio.to_thread.run_sync(tell_applied, arriving.landing, arriving.applied_round)
            await channel.send(applied)
            # Told once: a page that is written and sent again must not count as here by what landed before that.
            arriving.end_round()
        way.channel = channel
        way.stack.push_async_exit(attempt.pop_all())
    number = answer.session_number
    migration.record.session = channel.session
    migration.record.negotiated["sessions"] = number
    log.info("migration.resumed", migration=migration.migration_id, session=number)
    select = replace(agreed.select, session_number=number, bulk_port=answer.bulk_port)
    return Agreed(select, secrets_of_new)


# --------------------------------------------------------------------------- negotiate and synchronise


async def _offer(channel: Channel, migration: DestinationMigration) -> Agreed:
    """Say what we can do, prove by the ticket that we were asked, and hear what the source chose."""
    random = secrets.token_bytes(RANDOM_BYTES)
    offer = _compose_offer(migration, random)
    explain.note_offer(migration.record, offer)
    await channel.send(offer)
    answer = await channel.expect(m.Select, m.Refuse, deadline_s=migration.deadlines.answer_s)
    if isinstance(answer, m.Refuse):
        raise _refused(answer, migration)
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


def _compose_offer(migration: DestinationMigration, random: bytes) -> m.Offer:
    able = migration.abilities
    return m.Offer(
        protocols=able.protocols,
        migration_id=migration.migration_id,
        instance_id=migration.instance_id,
        ticket=migration.ticket,
        spec_versions=able.spec_versions,
        payloads=able.payloads,
        ram={"transports": able.transports, "encodings": able.encodings, "digests": able.digests},
        max_streams=able.max_streams,
        facts=able.facts,
        api_url=migration.api_url,
        random=random,
    )


def _refused(answer: m.Refuse, migration: DestinationMigration) -> NegotiationError:
    """The source's own refusal, with its code and all its reasons."""
    refusal = NegotiationError(answer.text, code=answer.code, details=answer.details)
    explain.note_refusal(migration.record, refusal)
    return refusal


def _check_selection(select: m.Select, channel: Channel, migration: DestinationMigration) -> None:
    """The source must have chosen from what was offered, and must have seen the offer that was sent."""
    able = migration.abilities
    wrong = {
        "protocol": select.protocol not in able.protocols,
        "spec version": select.spec_version not in able.spec_versions,
        "transport": select.transport not in able.transports,
        "encodings": not set(select.encodings) <= set(able.encodings),
        "digest": select.digest not in able.digests,
        "streams": select.streams > able.max_streams,
        "payloads": any(v not in able.payloads.get(kind, ()) for kind, v in select.payloads.items()),
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
        raise _refused(answer, migration)
    try:
        arrival = _read_arrival(answer, agreed, migration)
        migration.guest = await migration.build_guest(arrival)
        _check_facts(answer, migration.guest, migration)
    except (SpecError, HypervisorError, OwnershipRefusal, NegotiationError) as failure:
        error = _of_the_arriving(failure)
        explain.note_refusal(migration.record, error)
        await channel.send(refusal_of(error))
        raise error from failure
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
    spec = preamble.read_spec(received, migration.abilities.spec_versions)
    amended = amend(spec, migration.replacements, migration.allowances, migration.features)
    _check_devices(received.devices, agreed.select, migration)
    layout = preamble.read_layout(received, migration.max_ram_bytes)
    return Arrival(
        spec=chain.up(amended),
        properties=dict(received.properties),
        blobs=dict(received.blobs),
        layout=layout,
        run_state=RunState(received.run_state),
        epoch=Epoch(*received.epoch),
        extents=preamble.read_extents(received, layout),
        facts=dict(received.facts),
    )


def _check_devices(devices: Sequence[m.DeviceEntry], select: m.Select, migration: DestinationMigration) -> None:
    """Every announced payload that is not optional must be one that was agreed upon: known before RAM moves."""
    unread = [e for e in devices if e.version not in migration.abilities.payloads.get(e.payload_kind, ())]
    unreadable = [f"{e.instance_name}: {e.payload_kind} version {e.version}" for e in unread if not e.optional]
    if unreadable:
        raise NegotiationError(
            "this host cannot import " + "; ".join(unreadable),
            code="payload_version",
            details={"unreadable": unreadable},
        )
    for entry in devices:
        if not entry.optional and entry.version != select.payloads.get(entry.payload_kind):
            raise RemoteProtocolError(
                f"device {entry.instance_name}: announced is {entry.payload_kind} version {entry.version}, selected was"
                f" {select.payloads.get(entry.payload_kind)}"
            )
    migration.skipped = frozenset((e.instance_name, e.payload_kind) for e in unread)
    explain.note_skipped(migration.record, migration.skipped, "the destination does not read it")


def _check_facts(received: m.Preamble, guest: Guest, migration: DestinationMigration) -> None:
    """What only its hypervisor reads fits the guest as it was built; optional payloads that do not fit are skipped.

    Raises: NegotiationError `opaque_facts`, with every fact that differs.
    """
    owned = [entry for entry in received.devices if opaque.owner_of(entry.payload_kind) is not None]
    differences = opaque.guest_differences(received.facts, guest.facts) if owned else []
    if differences and any(not entry.optional for entry in owned):
        raise NegotiationError(
            f"the guest as built here is another one: {opaque.listed(differences)}",
            code="opaque_facts",
            details={"mismatches": [asdict(difference) for difference in differences]},
        )
    if differences:
        unfit = frozenset((entry.instance_name, entry.payload_kind) for entry in owned)
        migration.skipped |= unfit
        explain.note_skipped(migration.record, unfit, "its hypervisor's facts differ")


# --------------------------------------------------------------------------- state


async def _receive_state(channel: Channel, agreed: Agreed, arriving: Arriving, migration: DestinationMigration) -> None:
    """Time, devices, console; import everything; compare digests; `prepared`; Ready."""
    received, end = await collect_state(channel, migration.deadlines.import_s)
    if end.payloads != len(received.payloads):
        raise PayloadError(
            f"{len(received.payloads)} device payloads came, {end.payloads} were sent", code="payload_count"
        )
    assert migration.guest is not None
    async with open_group() as beside:
        beside.start_soon(arriving.condense)
        beside.start_soon(migration.journal.reserve)
        skipped = await import_state(migration.guest, received, migration.skipped)
    explain.note_skipped(migration.record, skipped, "no device here takes it")
    page_digest = arriving.condenser.digest()
    if page_digest != end.page_digest:
        raise RemoteProtocolError("guest RAM as it landed is not as it was sent", code="digest_mismatch")
    ram_digest = b""
    if agreed.select.verify == "full":
        ram_digest = await hash_ram_in_thread(migration.guest.ram)
        migration.record.digest["destination"] = ram_digest.hex()
    await _prepare(channel, arriving, migration, ram_digest)


async def _prepare(channel: Channel, arriving: Arriving, migration: DestinationMigration, ram_digest: bytes) -> None:
    assert migration.arrival is not None
    await migration.journal.commit(
        rules.Prepare(migration.migration_id, migration.arrival.epoch, migration.arrival.run_state.value)
    )
    await channel.send(m.Ready(migration.journal.id, arriving.condenser.digest(), ram_digest))


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
        # The guest runs, and is among this host's. Whether the source hears of it is no longer decisive: it will ask.
        with contextlib.suppress(VmMigrateError):
            await channel.send(m.Running(migration.journal.id, epoch, 0.0, resume_s))
        await _settle_in(migration)


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
    lost = await _run_started(migration, guest, epoch, run_state)
    # Whoever reads `moved`, here or at the source, finds the instance here.
    await migration.welcome()
    migration.record.finish(Outcome.GUEST_LOST if lost else Outcome.MOVED, lost)
    return True


async def _run_started(
    migration: DestinationMigration, guest: Guest, epoch: Epoch, run_state: RunState
) -> HypervisorError | None:
    """`started` is durable: this host owns the guest, whatever comes.

    Returns: Why it is lost. Only a guest whose process is gone is.
    """
    try:
        # An operator may have given it to another host since `started`.
        if run_state is RunState.RUNNING and migration.journal.state.may_run(migration.instance_id, epoch):
            await guest.run(epoch)
    except HypervisorError as error:
        log.error("guest.not_run", instance=migration.instance_id, code=error.code, text=error.text)
        migration.record.notes.append(f"the guest was not run: {error.text}")
        if error.code == "guest_lost":
            await guest.destroy()
            await migration.journal.commit(rules.Lose(migration.instance_id, error.text))
            return error
    return None


async def _settle_in(migration: DestinationMigration) -> None:
    """What a guest that runs need not wait for. Whoever watches over it notices if it has gone."""
    assert migration.guest is not None
    with contextlib.suppress(HypervisorError):
        await migration.guest.note_record(*migration.journal.position)
    await trio.to_thread.run_sync(migration.guest.ram.drop_retired)


async def _open_in_time(guest: Guest, epoch: Epoch, start_s: float) -> None:
    try:
        with trio.fail_after(start_s):
            await guest.open_backends(epoch)
    except trio.TooSlowError:
        raise HypervisorError(f"disks and NICs did not open within {start_s:g} s", code="start_deadline") from None


async def _return_guest(migration: DestinationMigration, error: VmMigrateError) -> None:
    """Close everything, make `returned` durable, remove the guest: the source may take it back."""
    assert migration.guest is not None
    error = _of_the_arriving(error)
    with contextlib.suppress(HypervisorError):
        await migration.guest.close_backends()
    # Only a guest that is gone can surely hold nothing open: it goes before the verdict is given.
    while not await migration.guest.destroy():
        # The source is told `pending` for as long as it takes: no timer makes a disk free that may be written to.
        log.error("guest.does_not_end", instance=migration.instance_id, pid=migration.guest.process.pid)
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
    error = _of_the_arriving(of_the_link(error))
    with trio.CancelScope(shield=True):
        await migration.journal.commit(rules.Refuse(migration.migration_id, error.code))
        incoming = migration.journal.state.incoming[migration.migration_id]
        if error.code == "verdict_given" and incoming.code is not None:
            # The handoff came second; what came first is why, on both sides.
            error = OwnershipRefusal(f"refused before the handoff came: {incoming.code}", code=incoming.code)
        await _tell_refusal(channel, migration, error, incoming.stage)
        if migration.guest is not None:
            await migration.guest.destroy()
    migration.record.finish(outcome_of(error, failed_in), error)
    log.info("migration.ended", migration=migration.migration_id, code=error.code, text=error.text)


def _of_the_arriving(error: VmMigrateError) -> VmMigrateError:
    """That the guest under construction here died is no loss: the one at the source is the guest. A code of its own, so
    that nobody takes it for that."""
    if isinstance(error, HypervisorError) and error.code == "guest_lost":
        return HypervisorError(f"the guest under construction: {error.text}", code="arriving_guest_lost")
    return error


async def _tell_refusal(
    channel: Channel, migration: DestinationMigration, error: VmMigrateError, stage: Incoming
) -> None:
    if stage is Incoming.REFUSED and channel.phase in {Phase.READY, Phase.IN_DOUBT}:
        with contextlib.suppress(VmMigrateError):
            await channel.send(m.Refused(migration.journal.id, error.code, error.text[:16_384]))
    else:
        await channel.say_goodbye(error)
