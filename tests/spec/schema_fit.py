"""The part of JSON Schema that our schemas use, for tests: says what does not fit, and where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "null": type(None),
}
_KEYWORDS = {
    "$schema", "title", "description", "$defs", "$ref", "type", "const", "enum", "anyOf", "oneOf", "format", "minimum",
    "maximum", "required", "properties", "additionalProperties", "items", "minItems", "maxItems", "uniqueItems",
}  # fmt: skip


def misfits(schema: Mapping[str, Any], value: Any, root: Mapping[str, Any], where: str = "$") -> Iterator[str]:
    """What of *value* does not fit. A keyword that this cannot check is a defect of the test."""
    assert set(schema) <= _KEYWORDS, f"{where}: cannot check {set(schema) - _KEYWORDS}"
    if "$ref" in schema:
        yield from misfits(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root, where)
    if "type" in schema and not _is_of(schema["type"], value):
        yield f"{where}: {value!r} is no {schema['type']}"
        return
    if ("const" in schema and value != schema["const"]) or ("enum" in schema and value not in schema["enum"]):
        yield f"{where}: {value!r} is not one that is allowed"
    for options, fitting in (("anyOf", range(1, 99)), ("oneOf", range(1, 2))):
        if options in schema:
            count = sum(not list(misfits(option, value, root, where)) for option in schema[options])
            if count not in fitting:
                yield f"{where}: fits {count} of {options}"
    if isinstance(value, int) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        yield f"{where}: {value} is out of bounds"
    if isinstance(value, list):
        yield from _list_misfits(schema, value, root, where)
    if isinstance(value, dict):
        yield from _object_misfits(schema, value, root, where)


def _list_misfits(schema: Mapping[str, Any], value: list[Any], root: Mapping[str, Any], where: str) -> Iterator[str]:
    count = len(value)
    if not schema.get("minItems", count) <= count <= schema.get("maxItems", count):
        yield f"{where}: {count} elements"
    if schema.get("uniqueItems") and len(set(map(str, value))) != count:
        yield f"{where}: an element occurs twice"
    for index, item in enumerate(value):
        yield from misfits(schema.get("items", {}), item, root, f"{where}[{index}]")


def _object_misfits(
    schema: Mapping[str, Any], value: dict[str, Any], root: Mapping[str, Any], where: str
) -> Iterator[str]:
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    yield from (f"{where}: {name} is missing" for name in schema.get("required", ()) if name not in value)
    for name, item in value.items():
        if name in known:
            yield from misfits(known[name], item, root, f"{where}.{name}")
        elif others is False:
            yield f"{where}: {name} is unknown"
        elif isinstance(others, dict):
            yield from misfits(others, item, root, f"{where}.{name}")


def _is_of(names: str | list[str], value: Any) -> bool:
    wanted = [names] if isinstance(names, str) else names
    if isinstance(value, bool):
        return "boolean" in wanted
    return any(isinstance(value, _TYPES[name]) for name in wanted)
