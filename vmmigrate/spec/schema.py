"""JSON Schemas made from the field tables: what documents of a version look like, for people and other programs.

They say what is written, and what may be left out or be ignored when it is read. What a schema cannot say (order of
keys, which texts are UUIDs, spellings of numbers) stays with the tables; these decide.
"""

from __future__ import annotations

from typing import Any, Final

from vmmigrate.spec.decode import (
    BoolCodec,
    Bytes,
    Codec,
    Enumeration,
    Integer,
    KeyedMap,
    ListOf,
    Nullable,
    SetOf,
    Struct,
    StructCodec,
    Tagged,
    UuidCodec,
)

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]


def schema_of(version: str, model: type[Struct]) -> Schema:
    """The schema of a version's documents. Structs stand under `$defs`, by their names."""
    definitions: dict[str, Schema] = {}
    root = _of(model.table, definitions)
    return {
        "$schema": DIALECT,
        "title": f"Instance spec {version}",
        **root,
        "$defs": {name: definitions[name] for name in sorted(definitions)},
    }


def _of(codec: Codec, definitions: dict[str, Schema]) -> Schema:
    match codec:
        case BoolCodec():
            return {"type": "boolean"}
        case Integer():
            return {"type": "integer", "minimum": codec.minimum, "maximum": codec.maximum}
        case UuidCodec():
            return {"type": "string", "format": "uuid"}
        case Enumeration():
            return {"enum": [member.value for member in codec.type]}
        case Bytes():
            item = {"type": "integer", "minimum": 0, "maximum": 255}
            return {"type": "array", "items": item, "minItems": codec.length, "maxItems": codec.length}
        case Nullable():
            return {"anyOf": [{"type": "null"}, _of(codec.item, definitions)]}
        case SetOf():
            return {"type": "array", "items": _of(codec.item, definitions), "uniqueItems": True}
        case ListOf():
            return {"type": "array", "items": _of(codec.item, definitions)}
        case KeyedMap():
            return {"type": "object", "additionalProperties": _of(codec.item, definitions)}
        case Tagged():
            return {"oneOf": [_variant(codec, name, model, definitions) for name, model in codec.variants.items()]}
        case StructCodec():
            return _reference(codec, definitions)
        case _:
            return {"type": "string"}


def _reference(codec: StructCodec, definitions: dict[str, Schema]) -> Schema:
    name = codec.model.__name__
    if name not in definitions:
        definitions[name] = {}  # so that a struct may hold its own kind
        definitions[name] = _struct(codec, definitions)
    return {"$ref": f"#/$defs/{name}"}


def _struct(codec: StructCodec, definitions: dict[str, Schema]) -> Schema:
    schema: Schema = {
        "type": "object",
        "required": [field.name for field in codec.fields if field.is_required],
        "properties": {field.name: _of(field.codec, definitions) for field in codec.fields},
    }
    if codec.strict:
        schema["additionalProperties"] = False
    return schema


def _variant(codec: Tagged, name: str, model: type[Struct], definitions: dict[str, Schema]) -> Schema:
    table = model.table
    content = _of(table, definitions) if table.names else {"type": "null"}
    return {
        "type": "object",
        "required": [codec.tag, codec.content] if table.names else [codec.tag],
        "properties": {codec.tag: {"const": name}, codec.content: content},
        "additionalProperties": not codec.strict,
    }
