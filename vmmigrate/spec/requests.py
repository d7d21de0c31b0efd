"""What surrounds a spec in Propolis' own API: requests, replies and states, version by version.

Used to read recorded traffic and to check compatibility; our own API has its own models. Unknown fields are ignored in
all of these, except in the container of versioned specs and in replacements.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, ClassVar, Final

from vmmigrate.spec import v1, v2, v3
from vmmigrate.spec.address import SocketAddress
from vmmigrate.spec.amend import REPLACEMENTS
from vmmigrate.spec.decode import KEY, U32, U64, Codec, Enumeration, Newtype, Nullable, Struct, Tagged, Text, UuidText
from vmmigrate.spec.keys import SpecKey
from vmmigrate.spec.volume import REQUEST


class _Lenient(Struct):
    unknown_fields: ClassVar[str] = "ignore"


# ---- instance


class InstanceMetadata(_Lenient):
    silo_id: UuidText
    project_id: UuidText
    sled_id: UuidText
    sled_serial: Text
    sled_revision: U32
    sled_model: Text


class InstanceProperties(_Lenient):
    id: UuidText
    name: Text
    description: Text
    metadata: InstanceMetadata


class InstanceState(StrEnum):
    CREATING = "Creating"
    STARTING = "Starting"
    RUNNING = "Running"
    STOPPING = "Stopping"
    STOPPED = "Stopped"
    REBOOTING = "Rebooting"
    MIGRATING = "Migrating"
    REPAIRING = "Repairing"
    FAILED = "Failed"
    DESTROYED = "Destroyed"


class InstanceStateRequested(StrEnum):
    RUN = "Run"
    STOP = "Stop"
    REBOOT = "Reboot"


# ---- ensure


class InitBySpec(_Lenient):
    """Start a new machine; each version has its own type of spec."""

    tag: ClassVar[str] = "Spec"


class InitBySpecV1(InitBySpec):
    spec: v1.InstanceSpec


class InitBySpecV2(InitBySpec):
    spec: v2.InstanceSpec


class InitBySpecV3(InitBySpec):
    spec: v3.InstanceSpec


class MigrationTarget(_Lenient):
    """Take a machine over from another host."""

    tag: ClassVar[str] = "MigrationTarget"
    migration_id: UuidText
    src_addr: SocketAddress
    replace_components: Annotated[Mapping[SpecKey, v1.Component], REPLACEMENTS]


def _init(by_spec: type[InitBySpec]) -> Tagged:
    return Tagged("method", "value", by_spec, MigrationTarget, strict=False)


class InstanceEnsureRequestV1(_Lenient):
    properties: InstanceProperties
    init: Annotated[InitBySpecV1 | MigrationTarget, _init(InitBySpecV1)]


class InstanceEnsureRequestV2(_Lenient):
    properties: InstanceProperties
    init: Annotated[InitBySpecV2 | MigrationTarget, _init(InitBySpecV2)]


class InstanceEnsureRequestV3(_Lenient):
    properties: InstanceProperties
    init: Annotated[InitBySpecV3 | MigrationTarget, _init(InitBySpecV3)]


class MigrationStarted(_Lenient):
    migration_id: UuidText


class InstanceEnsureResponse(_Lenient):
    migrate: Annotated[MigrationStarted | None, Nullable(MigrationStarted.table)] = None


# ---- get


class VersionedV0(Newtype):
    """The only container version; despite its name it holds a v1 spec."""

    tag: ClassVar[str] = "V0"
    spec: v1.InstanceSpec


VERSIONED: Final = Tagged("version", "spec", VersionedV0)


class WaitingForMigrationSource(Struct):
    tag: ClassVar[str] = "WaitingForMigrationSource"


class PresentV1(Newtype):
    tag: ClassVar[str] = "Present"
    spec: Annotated[VersionedV0, VERSIONED]


class PresentV2(Newtype):
    tag: ClassVar[str] = "Present"
    spec: v2.InstanceSpec


class PresentV3(Newtype):
    tag: ClassVar[str] = "Present"
    spec: v3.InstanceSpec


def _status(present: type[Newtype]) -> Tagged:
    return Tagged("type", "value", WaitingForMigrationSource, present, strict=False)


STATUS_V1: Final = _status(PresentV1)
STATUS_V2: Final = _status(PresentV2)
STATUS_V3: Final = _status(PresentV3)

_State = Annotated[InstanceState, Enumeration(InstanceState)]


class InstanceSpecGetResponseV1(_Lenient):
    properties: InstanceProperties
    state: _State
    spec: Annotated[WaitingForMigrationSource | PresentV1, STATUS_V1]


class InstanceSpecGetResponseV2(_Lenient):
    properties: InstanceProperties
    state: _State
    spec: Annotated[WaitingForMigrationSource | PresentV2, STATUS_V2]


class InstanceSpecGetResponseV3(_Lenient):
    properties: InstanceProperties
    state: _State
    spec: Annotated[WaitingForMigrationSource | PresentV3, STATUS_V3]


# ---- migration status


class MigrationState(StrEnum):
    SYNC = "Sync"
    RAM_PUSH = "RamPush"
    PAUSE = "Pause"
    RAM_PUSH_DIRTY = "RamPushDirty"
    DEVICE = "Device"
    RESUME = "Resume"
    RAM_PULL = "RamPull"
    SERVER = "Server"
    FINISH = "Finish"
    ERROR = "Error"


class MigrationStatus(_Lenient):
    id: UuidText
    state: Annotated[MigrationState, Enumeration(MigrationState)]


_MaybeStatus = Annotated[MigrationStatus | None, Nullable(MigrationStatus.table)]


class InstanceMigrateStatusResponse(_Lenient):
    migration_in: _MaybeStatus = None
    migration_out: _MaybeStatus = None


class InstanceStateMonitorResponse(_Lenient):
    gen: U64
    state: _State
    migration: InstanceMigrateStatusResponse


TYPES: Final[Mapping[str, Codec]] = {
    "speckey": KEY,
    "vcr": REQUEST,
    "ensure_v1": InstanceEnsureRequestV1.table,
    "ensure_v2": InstanceEnsureRequestV2.table,
    "ensure_v3": InstanceEnsureRequestV3.table,
    "ensure_response": InstanceEnsureResponse.table,
    "versioned": VERSIONED,
    "status_v1": STATUS_V1,
    "status_v2": STATUS_V2,
    "status_v3": STATUS_V3,
    "getresp_v1": InstanceSpecGetResponseV1.table,
    "getresp_v2": InstanceSpecGetResponseV2.table,
    "getresp_v3": InstanceSpecGetResponseV3.table,
    "migrate_status": InstanceMigrateStatusResponse.table,
    "state_monitor": InstanceStateMonitorResponse.table,
    "state_requested": Enumeration(InstanceStateRequested),
}
"""Every type by a short name."""
