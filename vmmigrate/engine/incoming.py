"""One incoming migration: all that it needs, and what arrives."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

import trio

from vmmigrate.engine.abilities import of_this_release
from vmmigrate.engine.journal import AsyncJournal
from vmmigrate.engine.limits import Deadlines
from vmmigrate.engine.metrics import MigrationRecord
from vmmigrate.errors import VmMigrateError
from vmmigrate.hypervisor.base import Guest, RunState
from vmmigrate.memory import PAGE_SIZE, PageBitmap, RamLayout
from vmmigrate.net.channel import Channel
from vmmigrate.net.identity import Identity
from vmmigrate.net.secrets import SessionSecrets
from vmmigrate.net.tls import TlsContext
from vmmigrate.ownership.records import Epoch
from vmmigrate.spec.amend import Allowances, Replacement
from vmmigrate.spec.keys import SpecKey
from vmmigrate.spec.latest import InstanceSpec
from vmmigrate.wire import messages as m
from vmmigrate.wire.negotiate import Abilities


@dataclass(frozen=True)
class Arrival:
    """What the preamble says arrives, amended and upgraded; what a host needs to build the guest."""

    spec: InstanceSpec
    properties: Mapping[str, str]
    blobs: Mapping[str, bytes]
    layout: RamLayout
    run_state: RunState
    epoch: Epoch
    extents: PageBitmap
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def needed_bytes(self) -> int:
        """RAM that the guest is known to touch."""
        return self.extents.count() * PAGE_SIZE


BuildGuest = Callable[[Arrival], Awaitable[Guest]]
Welcome = Callable[[], Awaitable[None]]
Reconnect = Callable[[], AbstractAsyncContextManager[Channel]]


@dataclass
class DestinationMigration:
    """Everything that one incoming migration needs.

    Attributes:
        build_guest: Checks the arrival against this host and builds the guest, stopped; injected by the daemon.
        welcome: Makes the guest, which `started` is durable of, one of this host's; injected by the daemon.
        replacements: This host's backends, by the component they replace.
        abilities: What this host offers; everything, unless its configuration says less.
        skipped: Optional payloads, as (device, kind), that are not imported.
        reconnect: A new control channel to the source; injected by the daemon.
        arrival: Known once the preamble was accepted.
        cancelled: Set when somebody calls the migration off while there is no channel to fail.
    """

    migration_id: str
    instance_id: str
    own: Identity
    source: Identity
    source_host: str
    ticket: str
    context: TlsContext
    journal: AsyncJournal
    record: MigrationRecord
    build_guest: BuildGuest
    welcome: Welcome
    api_url: str
    abilities: Abilities = field(default_factory=of_this_release)
    replacements: Mapping[SpecKey, Replacement] = field(default_factory=dict)
    allowances: Allowances = field(default_factory=Allowances)
    features: frozenset[str] = frozenset()
    max_ram_bytes: int = 1 << 46
    deadlines: Deadlines = field(default_factory=Deadlines)
    reconnect: Reconnect | None = None
    arrival: Arrival | None = None
    guest: Guest | None = None
    skipped: frozenset[tuple[str, str]] = frozenset()
    cancelled: VmMigrateError | None = None
    over: trio.Event = field(default_factory=trio.Event)


class HandedOver(VmMigrateError):  # noqa: N818  (a word, not a fault)
    """What ends the wait for the handoff when an operator hands the guest over instead."""

    default_code = "handed_over"


@dataclass(frozen=True)
class Agreed:
    """What the source selected, and the secrets of the session."""

    select: m.Select
    secrets: SessionSecrets
