"""Spec version v2: the SMBIOS table can be set. Unknown top-level fields are ignored from here on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Final

from vmmigrate.spec import v1
from vmmigrate.spec.decode import U64, KeyedMap, Nullable, Struct, Text
from vmmigrate.spec.keys import SpecKey
from vmmigrate.spec.loss import Loss

NAME: Final = "v2"


class SmbiosType1Input(Struct):
    """System information that the guest's firmware shows; absent means the host's own texts."""

    manufacturer: Text
    product_name: Text
    serial_number: Text
    version: U64


class InstanceSpec(Struct):
    """A v2 document."""

    unknown_fields: ClassVar[str] = "ignore"
    board: v1.Board
    components: Annotated[Mapping[SpecKey, v1.Component], KeyedMap(v1.COMPONENT)]
    smbios: Annotated[SmbiosType1Input | None, Nullable(SmbiosType1Input.table)] = None


def from_v1(spec: v1.InstanceSpec) -> InstanceSpec:
    """Every v1 spec is a v2 spec without SMBIOS texts."""
    return InstanceSpec(board=spec.board, components=spec.components)


def to_v1(spec: InstanceSpec) -> tuple[v1.InstanceSpec, list[Loss]]:
    """What v1 can say of the spec, and what it cannot."""
    losses = [] if spec.smbios is None else [Loss(None, "smbios")]
    return v1.InstanceSpec(board=spec.board, components=spec.components), losses
