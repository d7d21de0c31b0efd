"""The beginning of a migration at the source: choose from the offer, send the preamble. Nothing is touched yet."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from urllib.parse import urlsplit

import trio

from vmmigrate.engine import preamble
from vmmigrate.engine.metrics import MigrationRecord
from vmmigrate.engine.outgoing import SourceMigration
from vmmigrate.errors import NegotiationError, RemoteProtocolError
from vmmigrate.hypervisor.base import PayloadDescription
from vmmigrate.net.channel import Channel, refusal_of
from vmmigrate.net.secrets import RANDOM_BYTES, SessionContext, SessionSecrets
from vmmigrate.spec import chain
from vmmigrate.wire import messages as m
from vmmigrate.wire.negotiate import Abilities, Choice, choose
from vmmigrate.wire.phases import Kind


@dataclass(frozen=True)
class Agreed:
    """What was negotiated, and the secrets of the session."""

    select: m.Select
    secrets: SessionSecrets
    payloads: tuple[PayloadDescription, ...]


async def negotiate(channel: Channel, offer: m.Offer, migration: SourceMigration) -> Agreed:
    """Choose from the offer, or refuse with every reason at once; nothing is touched."""
    payloads = await migration.live.list_payloads()
    needed = {item.kind: (item.instance_name, item.versions) for item in payloads if not item.optional}
    try:
        _check_url(offer.api_url)
        choice, (spec_version, _) = _choose_all(offer, migration, Abilities(payloads=needed))
    except NegotiationError as error:
        await channel.send(refusal_of(error))
        raise
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
    note_negotiated(migration.record, select)
    await channel.send(select)
    context = SessionContext(
        choice.protocol,
        migration.migration_id,
        migration.instance_id,
        migration.own.name,
        migration.destination.name,
        migration.session_number,
    )
    return Agreed(select, SessionSecrets(context, offer.random, random), payloads)


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


def _choose_all(
    offer: m.Offer, migration: SourceMigration, abilities: Abilities
) -> tuple[Choice, tuple[str, chain.AnySpec]]:
    """Everything that is negotiated; one refusal names all that have nothing in common."""
    failures: list[NegotiationError] = []
    choice, version = None, None
    try:
        choice = choose(offer, abilities, migration.options.streams)
    except NegotiationError as error:
        failures.append(error)
    try:
        version = chain.negotiate(migration.spec, offer.spec_versions)
    except NegotiationError as error:
        failures.append(error)
    if choice is None or version is None:
        if len(failures) == 1:
            raise failures[0]
        raise NegotiationError(
            "; ".join(failure.text for failure in failures),
            code="no_common_ground",
            details={"refusals": [failure.as_dict() for failure in failures]},
        )
    return choice, version


def note_negotiated(record: MigrationRecord, select: m.Select) -> None:
    record.negotiated.update(
        protocol=select.protocol,
        spec_version=select.spec_version,
        transport=select.transport,
        encodings=list(select.encodings),
        digest=select.digest,
        streams=select.streams,
        verify=select.verify,
        page_source="tracker",
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
        )
    )
    answer = await channel.expect(m.PreambleOk, m.Refuse, deadline_s=migration.deadlines.build_s)
    if isinstance(answer, m.Refuse):
        raise NegotiationError(answer.text, code=answer.code, details=answer.details)
    if answer.select_digest != channel.session.digests[Kind.SELECT]:
        raise RemoteProtocolError("the destination saw another selection than was sent", code="downgrade")
    if dict(answer.blob_digests) != preamble.digest_blobs(migration.blobs):
        raise RemoteProtocolError("the destination holds other blobs than were sent", code="blob_mismatch")
    migration.record.negotiated["amended"] = list(answer.amended)
