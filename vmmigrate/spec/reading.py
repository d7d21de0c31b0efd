"""Text to values of any type that has a table, and the errors that say where in the text something is wrong."""

from __future__ import annotations

from typing import Any

from vmmigrate import jsontext
from vmmigrate.errors import SpecParseError
from vmmigrate.jsontext import Json
from vmmigrate.spec.decode import Codec, DecodeError


def read_text(codec: Codec, text: str | bytes) -> Any:
    """A value of any type that has a table, from its own text."""
    tree = jsontext.parse(text)
    try:
        return codec.read(tree)
    except DecodeError as error:
        at = jsontext.locate(text, error.path)
        raise _refusal(error, f" (line {at.line}, column {at.column})", line=at.line, column=at.column) from None


def read_tree(codec: Codec, tree: Json) -> Any:
    """A value of any type that has a table, from a tree."""
    try:
        return codec.read(tree)
    except DecodeError as error:
        raise _refusal(error, "") from None


def _refusal(error: DecodeError, where: str, **place: int) -> SpecParseError:
    path = jsontext.pointer(error.path)
    return SpecParseError(
        f"{path or 'document'}: {error.text}{where}",
        code=error.code,
        details={"path": path, "reason": error.text, **place},
    )
