"""The beginning of a migration at the source: choose from the offer, send the preamble. Nothing is touched yet."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import trio

from vmmigrate.devices import opaque
from vmmigrate.engine import explain, preamble
from vmmigrate.engine.abilities import needs_of
from vmmigrate.engine.metrics import MigrationRecord
from vmmigrate.engine.outgoing import SourceMigration
from vmmigrate.errors import HypervisorError, NegotiationError, RemoteProtocolError
from vmmigrate.hypervisor.base import PayloadDescription
from vmmigrate.net.channel import Channel, refusal_of
from vmmigrate.net.secrets import RANDOM_BYTES, SessionContext, SessionSecrets
from vmmigrate.ram import encoding
from vmmigrate.spec import chain
from vmmigrate.wire import messages as m
from vmmigrate.wire.negotiate import Abilities, Choice, Mismatch, Need, choose
from vmmigrate.wire.phases import Kind


@dataclass(frozen=True)
class Agreed:
    """What was negotiated, and the secrets of the session. `skipped`: optional payloads that are not sent."""

    select: m.Select
    secrets: SessionSecrets
    payloads: tuple[PayloadDescription, ...]
    skipped: frozenset[tuple[str, str]] = frozenset()


async def negotiate(channel: Channel, offer: m.Offer, migration: SourceMigration) -> Agreed:
    """Choose from the offer, or refuse with every reason at once; nothing is touched."""
    record, abilities = migration.record, _abilities(migration)
    explain.note_offer(record, offer)
    payloads, failures = await _list_payloads(migration)
    needs = needs_of(payloads, abilities)
    explain.note_needs(record, abilities, needs)
    try:
        _check_url(offer.api_url)
        needs, found, unfit = _match_facts(needs, migration.live.facts, offer.facts)
        choice, (spec_version, _) = _choose_all(offer, migration, abilities, needs, found, failures)
    except (NegotiationError, HypervisorError) as error:
        explain.note_refusal(record, error)
        await channel.send(refusal_of(error))
        raise
    explain.note_skipped(record, choice.skipped, "the destination does not read it")
    explain.note_skipped(record, unfit, "its hypervisor's facts differ")
    random = secrets.token_bytes(RANDOM_BYTES)
    select = m.Select(
        protocol=choice.protocol,
        spec_version=spec_version,
        payloads=dict(choice.payloads),
        transport=choice.transport,
        encodings=choice.encodings,
        digest=choice.digest,
        streams=choice.streams,
        bulk_port=migration.bulk_port,
        session_number=migration.session_number,
        verify=migration.options.verify,
        offer_digest=channel.session.digests[Kind.OFFER],
        random=random,
    )
    migration.destination_url = offer.api_url
    note_negotiated(record, select)
    record.negotiated["page_source"] = migration.live.page_source
    explain.note_passed_over(record, offer, select, abilities, needs, migration.spec)
    await channel.send(select)
    context = SessionContext(
        choice.protocol,
        migration.migration_id,
        migration.instance_id,
        migration.own.name,
        migration.destination.name,
        migration.session_number,
    )
    skipped = frozenset((*choice.skipped, *unfit))
    return Agreed(select, SessionSecrets(context, offer.random, random), payloads, skipped)


def _abilities(migration: SourceMigration) -> Abilities:
    """What this host may do, less the encodings that this migration shall do without."""
    options, unwanted = migration.options, set[str]()
    if options.compression == "off":
        unwanted.add(encoding.ZSTD)
    if not options.delta_cache_mib:
        unwanted.add(encoding.DELTA)
    able = migration.abilities
    return replace(able, encodings=tuple(word for word in able.encodings if word not in unwanted))


def _check_url(url: str) -> None:
    """In doubt, this is the only way to the truth: an address that cannot be asked is found out before anything moves.

    Raises: NegotiationError `bad_api_url`.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme == "https" and bool(parts.hostname) and parts.port is not None
    except ValueError:
        usable = False
    if not usable or not url.isascii():
        raise NegotiationError(
            f"the destination's API URL {url[:200]!r} is none; needed is https://HOST:PORT", code="bad_api_url"
        )


async def _list_payloads(
    migration: SourceMigration,
) -> tuple[tuple[PayloadDescription, ...], list[NegotiationError | HypervisorError]]:
    """What the guest will export; that it has devices which cannot move is one reason among others."""
    try:
        return await migration.live.list_payloads(), []
    except HypervisorError as error:
        if error.code != "not_migratable":
            raise
        return (), [error]


def _match_facts(
    needs: list[Need], guest: opaque.Facts, host: opaque.Facts
) -> tuple[list[Need], list[Mismatch], list[tuple[str, str]]]:
    """Whether the destination's hypervisor can load what only it reads: the needs that remain, every fact that stands
    in the way of a mandatory one, and the optional ones that stay behind."""
    owned = [need for need in needs if opaque.owner_of(need.kind) is not None]
    differences = opaque.host_differences(guest, host) if owned else []
    if not differences:
        return needs, [], []
    unfit = [(need.device, need.kind) for need in owned if need.optional]
    found = [Mismatch(f"fact {x.fact}", (x.source,), (x.destination,)) for x in differences]
    remain = [need for need in needs if (need.device, need.kind) not in unfit]
    return remain, found if len(unfit) < len(owned) else [], unfit


def _choose_all(
    offer: m.Offer,
    migration: SourceMigration,
    abilities: Abilities,
    needs: Sequence[Need],
    found: Sequence[Mismatch],
    failures: list[NegotiationError | HypervisorError],
) -> tuple[Choice, tuple[str, chain.AnySpec]]:
    """Everything that is negotiated; one refusal names all that stands in the way.

    Raises: NegotiationError, HypervisorError `not_migratable`.
    """
    choice, version = None, None
    try:
        choice = choose(offer, abilities, migration.options.streams, needs, found)
    except NegotiationError as error:
        failures.append(error)
    try:
        version = _choose_spec_version(offer, migration)
    except NegotiationError as error:
        failures.append(error)
    if choice is None or version is None or failures:
        if len(failures) == 1:
            raise failures[0]
        raise NegotiationError(
            "; ".join(failure.text for failure in failures),
            code="no_common_ground",
            details={"refusals": [failure.as_dict() for failure in failures]},
        )
    return choice, version


def _choose_spec_version(offer: m.Offer, migration: SourceMigration) -> tuple[str, chain.AnySpec]:
    """The newest that the destination reads, this host may write, and that says all of the spec."""
    ours, theirs = migration.abilities.spec_versions, offer.spec_versions
    try:
        return chain.negotiate(migration.spec, set(ours) & set(theirs))
    except NegotiationError as error:
        reasons = {name: explain.why_not(migration.spec, name, ours, theirs) for name in reversed(chain.CHAIN.names)}
        raise NegotiationError(
            f"no common spec version: {'; '.join(f'{name}: {why}' for name, why in reasons.items())}",
            code=error.code,
            details={"reasons": reasons, "accepted": sorted(theirs)},
        ) from None


def note_negotiated(record: MigrationRecord, select: m.Select) -> None:
    explain.note_choice(record, select)
    record.negotiated.update(
        protocol=select.protocol,
        spec_version=select.spec_version,
        transport=select.transport,
        encodings=list(select.encodings),
        digest=select.digest,
        streams=select.streams,
        verify=select.verify,
        payloads=dict(select.payloads),
    )


async def synchronise(channel: Channel, agreed: Agreed, migration: SourceMigration) -> None:
    """Send the preamble; the destination builds the guest, stopped."""
    guest = migration.live
    status = await guest.status()
    migration.desired = status.run_state
    populated = await trio.to_thread.run_sync(guest.ram.populated)
    version = agreed.select.spec_version
    known = migration.journal.state.instances[migration.instance_id]
    chosen = agreed.select.payloads
    await channel.send(
        preamble.compose(
            spec_version=version,
            spec=chain.convert(migration.spec, version),
            blobs=migration.blobs,
            properties=migration.properties,
            run_state=status.run_state.value,
            epoch=known.epoch,
            layout=guest.ram.layout,
            populated=populated,
            devices=[
                m.DeviceEntry(item.instance_name, item.kind, chosen.get(item.kind, max(item.versions)), item.optional)
                for item in agreed.payloads
            ],
            facts=guest.facts,
        )
    )
    answer = await channel.expect(m.PreambleOk, m.Refuse, deadline_s=migration.deadlines.build_s)
    if isinstance(answer, m.Refuse):
        refusal = NegotiationError(answer.text, code=answer.code, details=answer.details)
        explain.note_refusal(migration.record, refusal)
        raise refusal
    if answer.select_digest != channel.session.digests[Kind.SELECT]:
        raise RemoteProtocolError("the destination saw another selection than was sent", code="downgrade")
    if dict(answer.blob_digests) != preamble.digest_blobs(migration.blobs):
        raise RemoteProtocolError("the destination holds other blobs than were sent", code="blob_mismatch")
    migration.record.negotiated["amended"] = list(answer.amended)
