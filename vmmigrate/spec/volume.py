"""Volume construction requests: what stands, as text, in a Crucible backend's `request_json`.

A request is a tree: a volume has sub-volumes and perhaps a read-only parent; leaves are Crucible regions, files and
URLs. Unknown fields are ignored everywhere. `differences` says whether one request may take another's place in a
migration: same tree, same ids, same sizes, same read-only marks, and for every region a larger generation, so that
the downstairs turn the old upstairs away. Regions under a read-only parent are never written and keep theirs.

Requests hold encryption keys: nothing here puts a request's text into an error.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final

from pydantic import Field

from vmmigrate.jsontext import Float, Json, compact
from vmmigrate.spec.address import SOCKET_ADDRESS
from vmmigrate.spec.decode import (
    TEXT,
    U32,
    U64,
    Codec,
    DecodeError,
    Flag,
    InternallyTagged,
    ListOf,
    Nullable,
    Sound,
    Struct,
    Text,
    UuidText,
    mismatch,
)
from vmmigrate.spec.reading import read_text


class _SinglePrecision(Codec):
    """A number of 32-bit floating point, kept as the shortest decimal that means it."""

    def read(self, node: Json) -> float:
        if type(node) is int:
            value = float(node)
        elif isinstance(node, Float):
            value = float(node.spelling)
        else:
            raise mismatch(node, "a number")
        single = _single(value)
        if math.isinf(single):
            raise DecodeError("invalid_value", "number out of the range of 32-bit floating point")
        return next(short for digits in range(1, 18) if _single(short := float(f"{single:.{digits}g}")) == single)


def _single(value: float) -> float:
    """The nearest number of 32-bit floating point."""
    try:
        result: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.inf
    return result


class VolumeRequest(Struct):
    """A node of the tree."""

    unknown_fields: ClassVar[str] = "ignore"


_NODE: Final = InternallyTagged("type", lambda: (Volume, Url, Region, File))
REQUEST: Final = Sound(_NODE)

_OptionalText = Annotated[str | None, Nullable(TEXT)]
_SecretText = Annotated[str | None, Nullable(TEXT), Field(repr=False)]


class Volume(VolumeRequest):
    tag: ClassVar[str] = "volume"
    id: UuidText
    block_size: U64
    sub_volumes: Annotated[tuple[VolumeRequest, ...], ListOf(_NODE)]
    read_only_parent: Annotated[VolumeRequest | None, Nullable(_NODE)] = None


class Url(VolumeRequest):
    tag: ClassVar[str] = "url"
    id: UuidText
    block_size: U64
    url: Text


class CrucibleOpts(Struct):
    """How the three downstairs of a region are reached."""

    unknown_fields: ClassVar[str] = "ignore"
    id: UuidText
    target: Annotated[tuple[str, ...], ListOf(SOCKET_ADDRESS)]
    lossy: Flag
    flush_timeout: Annotated[float | None, Nullable(_SinglePrecision())] = None
    key: _SecretText = None
    cert_pem: _OptionalText = None
    key_pem: _SecretText = None
    root_cert_pem: _OptionalText = None
    control: Annotated[str | None, Nullable(SOCKET_ADDRESS)] = None
    read_only: Flag


class Region(VolumeRequest):
    tag: ClassVar[str] = "region"
    block_size: U64
    blocks_per_extent: U64
    extent_count: U32
    opts: CrucibleOpts
    gen: U64


class File(VolumeRequest):
    tag: ClassVar[str] = "file"
    id: UuidText
    block_size: U64
    path: Text


def parse_volume(text: str) -> VolumeRequest:
    """The request that a `request_json` holds.

    Raises: SpecParseError: not a volume construction request; path, line and column refer to the inner text.
    """
    request: VolumeRequest = read_text(REQUEST, text)
    return request


def serialise_volume(request: VolumeRequest) -> str:
    """The request's JSON text."""
    return compact(REQUEST.write(request))


def volume_id(request: VolumeRequest) -> str:
    """The id under which a host registers the volume."""
    return request.opts.id if isinstance(request, Region) else str(_identity(request)["id"])


# ---- may one take the other's place?


@dataclass(frozen=True, slots=True)
class Difference:
    """One reason against a replacement, and where in the tree."""

    code: str
    text: str


def differences(
    before: VolumeRequest, after: VolumeRequest, *, allow_same_generation: bool = False
) -> list[Difference]:
    """Every reason why *after* may not take the place of *before*; empty when it may."""
    return list(_compare(before, after, "volume", _Rule(allow_same_generation)))


@dataclass(frozen=True, slots=True)
class _Rule:
    allow_same_generation: bool
    below_read_only_parent: bool = False


def _compare(before: VolumeRequest, after: VolumeRequest, where: str, rule: _Rule) -> Iterator[Difference]:
    if type(before) is not type(after):
        yield Difference("volume_shape_changed", f"{where}: a {after.tag} in place of a {before.tag}")
        return
    identity = _identity(before)
    for name, value in _identity(after).items():
        if identity[name] != value:
            code = _CODE_OF_FIELD[name]
            yield Difference(code, f"{where}: {name} {value}, allowed is only {identity[name]}")
    if isinstance(before, Region) and isinstance(after, Region):
        yield from _compare_generations(before, after, where, rule)
    if isinstance(before, Volume) and isinstance(after, Volume):
        yield from _compare_children(before, after, where, rule)


_CODE_OF_FIELD: Final = {
    "id": "volume_id_changed",
    "block_size": "volume_size_changed",
    "total_bytes": "volume_size_changed",
    "read_only": "volume_readonly_changed",
}


def _identity(request: VolumeRequest) -> dict[str, Any]:
    """What has to be the same on both hosts; paths, URLs and downstairs addresses may differ."""
    match request:
        case Region():
            return {
                "id": request.opts.id,
                "block_size": request.block_size,
                "total_bytes": request.block_size * request.blocks_per_extent * request.extent_count,
                "read_only": request.opts.read_only,
            }
        case Volume() | Url() | File():
            return {"id": request.id, "block_size": request.block_size}
        case _:
            raise TypeError(f"no volume request: {type(request).__name__}")


def _compare_generations(before: Region, after: Region, where: str, rule: _Rule) -> Iterator[Difference]:
    if rule.below_read_only_parent:
        return
    lowest = before.gen if rule.allow_same_generation else before.gen + 1
    if after.gen < lowest:
        yield Difference("generation_not_larger", f"{where}: generation {after.gen}, allowed is {lowest} or more")


def _compare_children(before: Volume, after: Volume, where: str, rule: _Rule) -> Iterator[Difference]:
    if len(before.sub_volumes) != len(after.sub_volumes):
        counts = f"{len(after.sub_volumes)} sub-volumes in place of {len(before.sub_volumes)}"
        yield Difference("volume_shape_changed", f"{where}: {counts}")
    else:
        for index, (old, new) in enumerate(zip(before.sub_volumes, after.sub_volumes, strict=True)):
            yield from _compare(old, new, f"{where}.sub_volumes[{index}]", rule)
    if (before.read_only_parent is None) != (after.read_only_parent is None):
        change = "added" if before.read_only_parent is None else "removed"
        yield Difference("volume_shape_changed", f"{where}: a read-only parent was {change}")
    elif before.read_only_parent is not None and after.read_only_parent is not None:
        below = _Rule(rule.allow_same_generation, below_read_only_parent=True)
        yield from _compare(before.read_only_parent, after.read_only_parent, f"{where}.read_only_parent", below)


def regions(request: VolumeRequest | None) -> Iterator[Region]:
    """Every region of the tree, in the order of the text."""
    if isinstance(request, Region):
        yield request
    elif isinstance(request, Volume):
        for child in (*request.sub_volumes, request.read_only_parent):
            yield from regions(child)
