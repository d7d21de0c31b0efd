"""Spec documents: text in and text out, for a version that is named beside the text (as on the wire).

A decoder that does not know the version says so and names what it accepts; it never guesses from the text.
"""

from __future__ import annotations

from typing import Any, cast

from vmmigrate import jsontext
from vmmigrate.jsontext import Json
from vmmigrate.spec.chain import CHAIN, AnySpec
from vmmigrate.spec.decode import Struct
from vmmigrate.spec.reading import read_text, read_tree

__all__ = ["from_tree", "parse", "read_text", "read_tree", "serialise", "to_json"]


def parse(version: str, text: str | bytes) -> AnySpec:
    """The document of that version.

    Raises: SpecParseError: unknown version, not JSON, or not a document of it; details hold path, line and column.
    """
    return cast(AnySpec, read_text(CHAIN.version(version).model.table, text))


def from_tree(version: str, tree: Json) -> AnySpec:
    """The document of that version from a tree that was parsed as part of something larger.

    Raises: SpecParseError; its path is relative to the document, and there is no line.
    """
    model = CHAIN.version(version).model
    return cast(AnySpec, read_tree(model.table, tree))


def serialise(spec: AnySpec) -> str:
    """The document's JSON text: compact, fields and components in their fixed order."""
    return jsontext.compact(to_json(spec))


def to_json(spec: Struct) -> dict[str, Any]:
    """The document as plain dicts, lists and scalars, in the order in which it is written."""
    written: dict[str, Any] = spec.table.write(spec)
    return written
