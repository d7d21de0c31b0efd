"""Spec version v3: adds the component `virtio_socket`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Final

from vmmigrate.spec import v1, v2
from vmmigrate.spec.decode import U64, KeyedMap, Nullable, Struct
from vmmigrate.spec.keys import SpecKey
from vmmigrate.spec.loss import Loss

NAME: Final = "v3"


class VirtioSocket(v1.Component):
    """The type allows every context id; gate `creatable` does not."""

    tag: ClassVar[str] = "virtio_socket"
    guest_cid: U64
    pci_path: v1.PciPath


COMPONENT: Final = v1.COMPONENT.and_also(VirtioSocket)


class InstanceSpec(Struct):
    """A v3 document."""

    unknown_fields: ClassVar[str] = "ignore"
    board: v1.Board
    components: Annotated[Mapping[SpecKey, v1.Component], KeyedMap(COMPONENT)]
    smbios: Annotated[v2.SmbiosType1Input | None, Nullable(v2.SmbiosType1Input.table)] = None


def from_v2(spec: v2.InstanceSpec) -> InstanceSpec:
    """Every v2 spec is a v3 spec without sockets."""
    return InstanceSpec(board=spec.board, components=spec.components, smbios=spec.smbios)


def to_v2(spec: InstanceSpec) -> tuple[v2.InstanceSpec, list[Loss]]:
    """What v2 can say of the spec, and what it cannot."""
    losses = [Loss(key, part.tag) for key, part in spec.components.items() if isinstance(part, VirtioSocket)]
    kept = {key: part for key, part in spec.components.items() if not isinstance(part, VirtioSocket)}
    return v2.InstanceSpec(board=spec.board, components=kept, smbios=spec.smbios), losses
