"""What differs between two specs, as rows for the operator. Secrets are compared, never shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Final

from vmmigrate.errors import SpecParseError
from vmmigrate.jsontext import compact
from vmmigrate.spec import chain
from vmmigrate.spec.chain import AnySpec
from vmmigrate.spec.decode import Struct
from vmmigrate.spec.keys import SpecKey, key_order
from vmmigrate.spec.volume import Region, parse_volume, regions

ABSENT: Final = "-"
_SECRET_FIELDS: Final = frozenset({"request_json", "base64"})


@dataclass(frozen=True, slots=True)
class DiffRow:
    """One difference: where (`board`, `smbios`, or a component's key), which field, and both sides as short texts."""

    where: str
    field: str
    before: str
    after: str


def diff(before: AnySpec, after: AnySpec) -> list[DiffRow]:
    """Every difference between two specs of any versions, compared in the newest; components in key order."""
    old, new = chain.up(before), chain.up(after)
    rows = list(_fields("board", old.board, new.board))
    for key in sorted({*old.components, *new.components}, key=key_order):
        rows += _components(key, old.components.get(key), new.components.get(key))
    if old.smbios != new.smbios:
        rows += _fields("smbios", old.smbios, new.smbios)
    return rows


def _components(key: SpecKey, before: Struct | None, after: Struct | None) -> Iterator[DiffRow]:
    if type(before) is not type(after):
        yield DiffRow(key, "type", before.tag if before else ABSENT, after.tag if after else ABSENT)
    elif before != after:
        yield from _fields(key, before, after)


def _fields(where: str, before: Struct | None, after: Struct | None) -> Iterator[DiffRow]:
    old = _flat(before.table.write(before)) if before is not None else {}
    new = _flat(after.table.write(after)) if after is not None else {}
    for name in dict.fromkeys([*old, *new]):
        if old.get(name, ABSENT) == new.get(name, ABSENT):
            continue
        if name == "request_json":
            yield from _volumes(where, old[name], new[name])
        elif name in _SECRET_FIELDS:
            yield DiffRow(where, name, f"{len(old[name])} characters", f"{len(new[name])} characters, changed")
        else:
            yield DiffRow(where, name, _shown(old, name), _shown(new, name))


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields of fields by dotted names; lists stay whole."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _shown(fields: dict[str, Any], name: str) -> str:
    if name not in fields:
        return ABSENT
    value = fields[name]
    return value if isinstance(value, str) else compact(value)


def _volumes(where: str, before: str, after: str) -> Iterator[DiffRow]:
    """Generations and addresses of two volume requests; of anything else only that it changed."""
    shown = False
    for index, (old, new) in enumerate(zip_longest(_regions(before), _regions(after))):
        for name, left, right in (
            ("generation", _generation(old), _generation(new)),
            ("target", _targets(old), _targets(new)),
        ):
            if left != right:
                shown = True
                yield DiffRow(where, f"region {index} {name}", left, right)
    if not shown:
        yield DiffRow(where, "request_json", "hidden", "hidden, changed")


def _regions(text: str) -> list[Region]:
    try:
        return list(regions(parse_volume(text)))
    except SpecParseError:
        return []


def _generation(region: Region | None) -> str:
    return ABSENT if region is None else str(region.gen)


def _targets(region: Region | None) -> str:
    return ABSENT if region is None else " ".join(region.opts.target)
