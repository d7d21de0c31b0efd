"""Requests of the control API. Strict: nothing is coerced, unknown fields are refused.

Replies are the JSON of the things themselves (records, instances); their shape is documented in docs/api.md.
Specs are not modelled here: they are read by the spec plane from the request's own text (`daemon/app.py`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

INSTANCE_ID = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
MIGRATION_ID = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"

InstanceId = Annotated[str, Field(pattern=INSTANCE_ID)]
MigrationId = Annotated[str, Field(pattern=MIGRATION_ID)]


class Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class MachineOverrides(Request):
    """Departures from the spec for this host's guest, for tests and small machines; they travel with the guest.

    Attributes:
        ram_bytes: Instead of the spec's `memory_mb`; any positive multiple of 4096.
        cpus: Instead of the spec's.
    """

    ram_bytes: Annotated[int, Field(gt=0, multiple_of=4096)] | None = None
    cpus: Annotated[int, Field(gt=0, le=255)] | None = None


class NewInstance(Request):
    """Everything but the spec, which stands beside it in the same request as `spec_version` and `spec`."""

    id: InstanceId
    name: Annotated[str, Field(max_length=256)] = ""
    description: Annotated[str, Field(max_length=4096)] = ""
    overrides: MachineOverrides = MachineOverrides()
    program: dict[str, Any] = Field(default_factory=lambda: {"name": "idle"})


class AdoptInstance(NewInstance):
    """A guest that runs already.

    Attributes:
        id: Without it, QEMU's UUID; or a random word, if it has none.
        monitor: The path of the socket of its QEMU's monitor (QMP), on the host.
        pid: Its QEMU; without it, the process that made that socket.
    """

    id: InstanceId | Literal[""] = ""
    monitor: Annotated[str, Field(min_length=2, max_length=4096, pattern=r"^/[^\x00]*$")]
    pid: Annotated[int, Field(gt=1, lt=1 << 22)] | None = None


class CreateInstance(NewInstance):
    blobs: dict[str, str] = Field(default_factory=dict, max_length=256)  # base64
    start: bool = False


class MigrateOut(Request):
    """Ask the source for a ticket. The options are those of `engine.limits.MigrationOptions`.

    Attributes:
        plan: Only measure and forecast: nothing is to move.
    """

    migration_id: MigrationId | None = None
    destination_host: InstanceId
    downtime_ms: Annotated[int, Field(ge=1, le=3_600_000)] = 300
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 3600.0
    streams: Annotated[int, Field(ge=1, le=16)] = 2
    verify: Literal["digest", "full"] = "digest"
    max_rounds: Annotated[int, Field(ge=1, le=1000)] = 30
    force: bool = False
    on_timeout: Literal["cancel", "force"] = "cancel"
    auto_converge: bool = False
    compression: Literal["auto", "off"] = "auto"
    delta_cache_mib: Annotated[int, Field(ge=0, le=65_536)] = 32
    bandwidth_mib_s: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    plan: bool = False


class MigrateIn(Request):
    """Tell the destination to fetch a guest. `replacements` is the JSON text of the replacement map."""

    migration_id: MigrationId
    instance_id: InstanceId
    source_host: InstanceId
    source_address: Annotated[str, Field(max_length=300)]
    source_url: Annotated[str, Field(max_length=2048)]
    ticket: Annotated[str, Field(max_length=256)]
    replacements: Annotated[str, Field(max_length=1 << 20)] = "{}"
    keep: Annotated[list[str], Field(max_length=4096)] = Field(default_factory=list)
    allow_same_generation: bool = False
    allow_volume_change: bool = False


class Adjust(Request):
    """Other limits for a migration that runs; what is not named stays."""

    downtime_ms: Annotated[int, Field(ge=1, le=3_600_000)] | None = None
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] | None = None
    on_timeout: Literal["cancel", "force"] | None = None
    max_rounds: Annotated[int, Field(ge=1, le=1000)] | None = None
    force: bool | None = None
    auto_converge: bool | None = None
    bandwidth_mib_s: Annotated[int, Field(ge=0, le=1_000_000)] | None = None


class Cancel(Request):
    reason: Annotated[str, Field(max_length=1024)] = "cancelled by an operator"


EpochPair = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 63)]], Field(min_length=2, max_length=2)]


class Resolve(Request):
    """An operator's word on a migration in doubt.

    Attributes:
        fencing_proof: For the source: how it is known that no other host runs the guest, or will. Kept in the journal.
        released: For the destination: the epoch that the source's journal says it gave away.
    """

    winner: Literal["source", "destination"]
    fencing_proof: Annotated[str, Field(max_length=4096)] = ""
    released: EpochPair | None = None


class Superseded(Request):
    """Another host, which had given away *since*, has the instance under *epoch* by an operator's word."""

    instance_id: InstanceId
    epoch: EpochPair
    since: EpochPair


class ConsoleInput(Request):
    port: Annotated[str, Field(max_length=256)]
    text: Annotated[str, Field(max_length=65_536)]
