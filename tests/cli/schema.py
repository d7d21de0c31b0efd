"""The part of JSON Schema that docs/contracts uses, for tests: says what does not fit, and where."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_CONTRACTS = Path(__file__).parents[2] / "docs" / "contracts"
_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}
_KEYWORDS = {
    "type", "enum", "required", "properties", "additionalProperties", "items", "minimum", "description",
}  # fmt: skip


def contract(name: str, definition: str) -> dict[str, Any]:
    document = json.loads((_CONTRACTS / f"{name}.json").read_text(encoding="utf-8"))
    schema: dict[str, Any] = document["$defs"][definition]
    return schema


def misfits(schema: Mapping[str, Any], value: Any, where: str = "$") -> Iterator[str]:
    """What of *value* does not fit. A keyword that this cannot check is a defect of the test."""
    assert set(schema) <= _KEYWORDS, f"{where}: cannot check {set(schema) - _KEYWORDS}"
    if "type" in schema and not _is_of(schema["type"], value):
        yield f"{where}: {value!r} is no {schema['type']}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is not one of {schema['enum']}"
    if "minimum" in schema and value < schema["minimum"]:
        yield f"{where}: {value!r} is less than {schema['minimum']}"
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            yield from misfits(schema["items"], item, f"{where}[{index}]")
    if isinstance(value, dict):
        yield from _object_misfits(schema, value, where)


def _object_misfits(schema: Mapping[str, Any], value: dict[str, Any], where: str) -> Iterator[str]:
    known = schema.get("properties", {})
    yield from (f"{where}: {name} is missing" for name in schema.get("required", ()) if name not in value)
    for name, item in value.items():
        if name in known:
            yield from misfits(known[name], item, f"{where}.{name}")
        elif schema.get("additionalProperties") is False:
            yield f"{where}: {name} is not in the contract"


def _is_of(names: str | list[str], value: Any) -> bool:
    wanted = [names] if isinstance(names, str) else names
    if isinstance(value, bool):
        return "boolean" in wanted
    return any(isinstance(value, _TYPES[name]) for name in wanted)
