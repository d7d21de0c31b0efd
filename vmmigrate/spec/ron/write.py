"""Writing RON by the field tables: no spaces, no struct names, fields and keys in their fixed order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vmmigrate.spec.decode import (
    BoolCodec,
    Bytes,
    Codec,
    Enumeration,
    Integer,
    KeyedMap,
    ListOf,
    NewtypeCodec,
    Nullable,
    StructCodec,
    Tagged,
)
from vmmigrate.spec.keys import in_key_order
from vmmigrate.spec.ron.escapes import quoted
from vmmigrate.spec.wire_v0 import ExternallyTagged


def write(codec: Codec, value: Any) -> str:
    """The RON text of a value that the codec read, or that code made."""
    match codec:
        case BoolCodec():
            return "true" if value else "false"
        case Integer():
            return str(value)
        case Enumeration():
            return str(value.value)
        case Nullable():
            return "None" if value is None else f"Some({write(codec.item, value)})"
        case Bytes():
            return _joined("()", map(str, value))
        case ListOf():
            return _joined("[]", (write(codec.item, item) for item in value))
        case KeyedMap():
            entries = in_key_order(value).items()
            return _joined("{}", (f"{quoted(key)}:{write(codec.item, item)}" for key, item in entries))
        case StructCodec():
            return _joined("()", _fields(codec, value))
        case NewtypeCodec():
            return write(codec.inner, getattr(value, codec.names[0]))
        case Tagged():
            return _tagged(codec, value)
        case ExternallyTagged():
            fields = [write(*pair) for pair in zip(codec.variants[value.name], value.fields, strict=True)]
            return f"{value.name}{_joined('()', fields)}" if fields else str(value.name)
        case _:
            return quoted(value)  # texts, keys and UUIDs


def _joined(brackets: str, parts: Iterable[str]) -> str:
    return f"{brackets[0]}{','.join(parts)}{brackets[1]}"


def _fields(codec: StructCodec, value: Any) -> Iterable[str]:
    for field in codec.fields:
        item = getattr(value, field.name)
        if not (field.is_omitted_by_default and item == field.default):
            yield f"{field.name}:{write(field.codec, item)}"


def _tagged(codec: Tagged, value: Any) -> str:
    tag = f"{codec.tag}:{codec.name_of(type(value))}"
    if not value.table.names:
        return f"({tag})"
    return f"({tag},{codec.content}:{write(value.table, value)})"
