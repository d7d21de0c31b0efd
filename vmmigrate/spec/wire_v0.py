"""What Propolis' migration protocol, version 0, carries as text: the preamble, errors, and the list of device states.

There the text is RON (`spec.ron`); the same types have a JSON form, which tools show. We never speak this protocol;
captured streams are read and written for tests and for operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Final

from vmmigrate.jsontext import Json
from vmmigrate.spec import v1
from vmmigrate.spec.decode import (
    TEXT,
    U32,
    Codec,
    DecodeError,
    Enumeration,
    Integer,
    ListOf,
    Struct,
    Text,
    listed,
    mismatch,
)
from vmmigrate.spec.requests import VERSIONED, VersionedV0


class Preamble(Struct):
    """What the source sends first. The spec is always v1; the server itself sends no blobs."""

    unknown_fields: ClassVar[str] = "ignore"
    instance_spec: Annotated[VersionedV0, VERSIONED]
    blobs: Annotated[tuple[tuple[int, ...], ...], ListOf(ListOf(Integer(255)))] = ()

    @classmethod
    def of(cls, spec: v1.InstanceSpec) -> Preamble:
        """The preamble that the server would send for this spec."""
        return cls(instance_spec=VersionedV0(spec=spec))


class DevicePayload(Struct):
    """One payload of a device; `data` is RON inside of RON."""

    unknown_fields: ClassVar[str] = "ignore"
    kind: Text
    version: U32
    data: Text


class Device(Struct):
    unknown_fields: ClassVar[str] = "ignore"
    instance_name: Text
    payload: Annotated[tuple[DevicePayload, ...], ListOf(DevicePayload.table)]


DEVICES: Final = ListOf(Device.table)


# ---- errors


@dataclass(frozen=True, slots=True)
class MigrateError:
    """An error as it crosses the wire: the variant's name, and its texts."""

    name: str
    fields: tuple[Any, ...] = ()


class MigrateRole(StrEnum):
    SOURCE = "Source"
    DESTINATION = "Destination"


class ExternallyTagged(Codec):
    """An enum whose variant's name stands outside: `"Name"`, `{"Name": field}` or `{"Name": [field, field]}`."""

    def __init__(self, name: str, variants: Mapping[str, tuple[Codec, ...]]) -> None:
        self.name, self.variants = name, variants

    def read(self, node: Json) -> MigrateError:
        if type(node) is str:
            return self._read(node, [])
        if type(node) is not tuple or len(node) != 1:
            raise mismatch(node, "a name, or an object with one name and its fields")
        ((name, content),) = node
        single = len(self.variants.get(name, ())) == 1
        if not single and type(content) is not list:
            raise mismatch(content, "an array")
        return self._read(name, [content] if single else content)  # type: ignore[arg-type]

    def write(self, value: MigrateError) -> Any:
        codecs = self.variants[value.name]
        fields = [codec.write(field) for codec, field in zip(codecs, value.fields, strict=True)]
        if not fields:
            return value.name
        return {value.name: fields[0] if len(fields) == 1 else fields}

    def _read(self, name: str, nodes: list[Json]) -> MigrateError:
        if name not in self.variants:
            raise DecodeError("unknown_variant", f"unknown name '{name[:40]}', allowed: {listed(self.variants)}")
        codecs = self.variants[name]
        if len(codecs) != len(nodes):
            raise DecodeError("invalid_value", f"{len(nodes)} fields, allowed for '{name}' is {len(codecs)}", name)
        return MigrateError(name, tuple(codec.read(node) for codec, node in zip(codecs, nodes, strict=True)))


_ROLE: Final = Enumeration(MigrateRole)

ERROR: Final = ExternallyTagged(
    "MigrateError",
    {
        "Websocket": (TEXT,),
        "Initiate": (),
        "ProtocolParse": (TEXT, TEXT),
        "NoMatchingProtocol": (TEXT, TEXT),
        "UpgradeExpected": (),
        "PreambleParse": (TEXT,),
        "InstanceSpecsIncompatible": (TEXT,),
        "TargetInstanceInitializationFailed": (TEXT,),
        "UuidMismatch": (),
        "MigrationAlreadyInProgress": (),
        "NoMigrationInProgress": (),
        "StateMachine": (TEXT,),
        "Codec": (TEXT,),
        "InvalidInstanceState": (),
        "UnexpectedMessage": (),
        "SourcePause": (),
        "Phase": (),
        "TimeData": (TEXT,),
        "DeviceState": (TEXT,),
        "UnknownDevice": (TEXT,),
        "RemoteError": (_ROLE, TEXT),
    },
)
