"""Peers of another release: they say what was recorded of it, to the real daemons of this one, over real TLS.

What is different in every migration is put in (ids, the ticket, digests, numbers of records); RAM goes through the
bulk plane. All the rest is as the release said it: offers, selections, preambles, device states, console, time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import trio

from tests.migration.fleet import TRUST_DOMAIN, Fleet, RunningHost
from tools.record_transcript import read
from vmmigrate.memory import PAGE_SIZE, PageBitmap, RamLayout, Region
from vmmigrate.net.channel import Channel, open_channel
from vmmigrate.net.door import BulkDoor, open_streams
from vmmigrate.net.identity import Call, Identity, Role
from vmmigrate.net.receiving import BulkDestination
from vmmigrate.net.secrets import SessionContext, SessionSecrets
from vmmigrate.net.sending import BulkSource
from vmmigrate.net.threads import open_group
from vmmigrate.net.tls import (
    ServerCredentials,
    TlsFiles,
    bound_port,
    client_context,
    close_tls,
    connect_tls,
    open_listeners,
    serve_tls,
)
from vmmigrate.ram.digest import PageHash, condense
from vmmigrate.wire import codec, phases
from vmmigrate.wire import messages as m

WAIT_S = 10.0


@dataclass(frozen=True)
class Recorded:
    """What a release said in one migration."""

    said: Mapping[phases.Role, Sequence[m.Message]]

    @classmethod
    def read(cls, path: Path) -> Recorded:
        said: dict[phases.Role, list[m.Message]] = {role: [] for role in phases.Role}
        for role, frame in read(path).frames:
            said[role].append(codec.decode(frame))
        return cls(said)

    def of(self, kind: type[Any]) -> Any:
        """The first message of that kind, whoever said it."""
        return next(message for messages in self.said.values() for message in messages if isinstance(message, kind))

    def has(self, kind: type[Any]) -> bool:
        return any(isinstance(message, kind) for messages in self.said.values() for message in messages)


@dataclass
class RecordedSource:
    """A source of another release: listens where a migration port would be; the RAM of its guest is zero."""

    fleet: Fleet
    recorded: Recorded
    heard: list[m.Message] = field(default_factory=list)

    async def run(self, task_status: trio.TaskStatus[int]) -> None:
        credentials = ServerCredentials(files_of(self.fleet, "alpha"))
        migration, bulk = await open_listeners("127.0.0.1", 0), await open_listeners("127.0.0.1", 0)
        self._door, self._bulk_port = BulkDoor(credentials.current), bound_port(bulk)
        async with open_group() as nursery:
            nursery.start_soon(self._door.serve, bulk)
            task_status.started(bound_port(migration))
            await serve_tls(migration, credentials.current, self._give, call=Call.MIGRATION_PROTOCOL)

    async def _give(self, stream: Any, _: Identity) -> None:
        async with open_channel(stream, phases.Role.SOURCE) as channel:
            offer = await channel.expect(m.Offer, deadline_s=WAIT_S)
            self.heard.append(offer)
            if self.recorded.has(m.Refuse):
                await channel.send(self.recorded.of(m.Refuse))
                return
            select = replace(
                self.recorded.of(m.Select),
                offer_digest=channel.session.digests[phases.Kind.OFFER],
                bulk_port=self._bulk_port,
            )
            await channel.send(select)
            await channel.send(self.recorded.of(m.Preamble))
            self.heard.append(await channel.expect(m.PreambleOk, m.Refuse, deadline_s=WAIT_S))
            secrets = secrets_of(offer, select)
            with self._door.expect(secrets, host("beta"), select.streams) as appointment:
                links = await self._door.collect(appointment)
            layout = layout_of(self.recorded.of(m.Preamble))
            ram = np.zeros((layout.pages, PAGE_SIZE // 8), dtype=np.uint64)
            bulk = BulkSource(links, layout, ram, PageHash(secrets.key("page digest")))
            try:
                await self._tell_all(channel, bulk)
            finally:
                bulk.close()

    async def _tell_all(self, channel: Channel, bulk: BulkSource) -> None:
        """Everything after the preamble, as it was said, in the order in which it was said."""
        said = self.recorded.said[phases.Role.SOURCE]
        for message in said[said.index(self.recorded.of(m.Preamble)) + 1 :]:
            if isinstance(message, m.RoundEnd):
                last = any(isinstance(m_, m.Paused) for m_ in said[: said.index(message)])
                sent = await bulk.send_round(PageBitmap(len(bulk.table)), message.round_number, last=last)
                await channel.send(replace(message, records=sent.records))
                self.heard.append(await channel.expect(m.RoundApplied, deadline_s=WAIT_S))
            elif isinstance(message, m.StateEnd):
                await channel.send(replace(message, page_digest=condense(bulk.table)))
                self.heard.append(await channel.expect(m.Ready, deadline_s=WAIT_S))
            elif isinstance(message, m.Handoff):
                await channel.send(message)
                self.heard.append(await channel.expect(m.Running, m.Refused, deadline_s=WAIT_S))
            else:
                await channel.send(message)


@dataclass
class RecordedDestination:
    """A destination of another release: comes for a guest, takes its RAM, and ends as it did then."""

    fleet: Fleet
    recorded: Recorded
    heard: list[m.Message] = field(default_factory=list)

    async def fetch(self, source: RunningHost, ticket: Mapping[str, str]) -> None:
        files = files_of(self.fleet, "beta")
        stream, _ = await connect_tls("127.0.0.1", source.facts["migration"], files, host(source.name), WAIT_S)
        try:
            async with open_channel(stream, phases.Role.DESTINATION) as channel:
                await self._take(channel, ticket)
        finally:
            await close_tls(stream)

    async def _take(self, channel: Channel, ticket: Mapping[str, str]) -> None:
        offer = replace(
            self.recorded.of(m.Offer),
            migration_id=ticket["migration_id"],
            instance_id=ticket["instance_id"],
            ticket=ticket["ticket"],
        )
        await channel.send(offer)
        select = await self._hear(channel, m.Select, m.Refuse)
        if isinstance(select, m.Refuse):
            return
        preamble = await self._hear(channel, m.Preamble)
        digest = channel.session.digests[phases.Kind.SELECT]
        await channel.send(replace(self.recorded.of(m.PreambleOk), select_digest=digest))
        secrets = secrets_of(offer, select)
        context = client_context(files_of(self.fleet, "beta"), host("alpha"))
        links = await open_streams("127.0.0.1", select.bulk_port, context, host("alpha"), secrets, select.streams)
        layout = layout_of(preamble)
        ram = np.zeros((layout.pages, PAGE_SIZE // 8), dtype=np.uint64)
        bulk = BulkDestination(links, layout, ram, PageHash(secrets.key("page digest")))
        try:
            async with open_group() as group:
                group.start_soon(bulk.receive_forever)
                await self._hear_all(channel, bulk)
                group.cancel_scope.cancel()
        finally:
            bulk.close()

    async def _hear_all(self, channel: Channel, bulk: BulkDestination) -> None:
        """Whatever the source says after the preamble, answered as it was answered then."""
        while True:
            message = await self._hear(channel, object)
            if isinstance(message, m.RoundEnd):
                await bulk.wait_round(message.round_number, message.records)
                await channel.send(replace(self.recorded.of(m.RoundApplied), round_number=message.round_number))
            elif isinstance(message, m.StateEnd) and self.recorded.has(m.Failed):
                await channel.send(self.recorded.of(m.Failed))
                return
            elif isinstance(message, m.StateEnd):
                digest = condense(bulk.table)
                await channel.send(replace(self.recorded.of(m.Ready), page_digest=digest, ram_digest=b""))
            elif isinstance(message, m.Handoff):
                await channel.send(self.recorded.of(m.Running))
                return

    async def _hear(self, channel: Channel, *kinds: type[Any]) -> Any:
        message: Any = await channel.expect(*kinds, deadline_s=WAIT_S)  # type: ignore[call-overload]
        self.heard.append(message)
        return message


def secrets_of(offer: m.Offer, select: m.Select) -> SessionSecrets:
    context = SessionContext(
        select.protocol, offer.migration_id, offer.instance_id, "alpha", "beta", select.session_number
    )
    return SessionSecrets(context, offer.random, select.random)


def layout_of(preamble: m.Preamble) -> RamLayout:
    return RamLayout(Region(gpa, size) for gpa, size in preamble.regions)


def host(name: str) -> Identity:
    return Identity(TRUST_DOMAIN, Role.HOST, name)


def files_of(fleet: Fleet, name: str) -> TlsFiles:
    pki = fleet.root / "pki"
    return TlsFiles(pki / "ca.pem", pki / f"{name}.pem", pki / f"{name}-key.pem")
