"""Strict JSON text to an ordered tree that hides nothing, and back.

The types that we are compatible with tell apart what Python's `json.loads` merges: duplicate keys, `1` and `1.0`
and `-0`, integers beyond 64 bits, lone surrogates. So this module returns a tree in which all of it is still
visible:

    object   tuple of (key, value) pairs, in the order of the text, duplicates kept
    array    list
    string   str, never with a surrogate
    number   int when spelled as an integer of 64 bits (signed or unsigned); otherwise `Float` with its spelling
    true, false, null as in Python
    `Flaw`   a lone surrogate or a number out of range. Such text is JSON, but has no value: an error where somebody
             reads it, harmless where it is ignored

Scanning is done by the interpreter's C scanner through its hooks (a kilobyte takes about 10 microseconds), which
keeps the grammar of RFC 8259: no BOM, comments, trailing commas or raw control characters. The one thing that it
adds, NaN and Infinity, is refused by its hook. Positions are worked out by `locate` only once there is an error to
report.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias, Union

from vmmigrate.errors import SpecParseError

MAX_DEPTH = 127
"""Arrays and objects inside one another. serde_json's limit; a document of ours needs seven."""

_U64_MAX = 2**64 - 1
_I64_MIN = -(2**63)
_LONGEST_INTEGER = len(str(_I64_MIN))


@dataclass(frozen=True, slots=True)
class Float:
    """A number that is no 64-bit integer: `1.0`, `1e0`, `-0`, `18446744073709551616`."""

    spelling: str


@dataclass(frozen=True, slots=True)
class Flaw:
    """Text that is JSON but has no value."""

    code: str
    text: str


Json: TypeAlias = Union[bool, int, str, Float, Flaw, list["Json"], "JsonObject", None]
JsonObject: TypeAlias = tuple[tuple[str, "Json"], ...]
Path: TypeAlias = tuple[str | int, ...]

LONE_SURROGATE = Flaw("json_surrogate", "text with a lone surrogate")
NUMBER_OUT_OF_RANGE = Flaw("json_number", "number out of range")


@dataclass(frozen=True, slots=True)
class Position:
    """Line and column of a character, both from 1."""

    line: int
    column: int


def parse(text: str | bytes) -> Json:
    """The tree of one JSON document.

    Raises: SpecParseError with a code that starts with `json_`; details hold line, column and path.
    """
    text = decode_utf8(text)
    try:
        tree: Json = _DECODER.decode(text)
    except json.JSONDecodeError as exc:
        _refuse(text, exc.pos, "json_syntax", _syntax_text(exc))
    except RecursionError:
        _refuse_depth(text)
    if text.count("{") + text.count("[") > MAX_DEPTH and _is_deeper(tree, MAX_DEPTH):
        _refuse_depth(text)
    if "\\u" in text and _ESCAPED_SURROGATE.search(text):
        tree = _mark_surrogates(tree)
    return tree


def decode_utf8(text: str | bytes) -> str:
    """Text whose every character can be written as UTF-8."""
    if isinstance(text, bytes):
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as exc:
            reason = f"not UTF-8 at byte {exc.start}"
            raise SpecParseError(reason, code="json_encoding", details={"path": ""}) from exc
    if not text.isascii() and (found := _SURROGATE.search(text)):
        _refuse(text, found.start(), "json_encoding", "text with a lone surrogate")
    return text


def compact(value: Any) -> str:
    """JSON as serde_json writes it: no spaces, no escapes that are not needed. Objects are dicts here."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def unparse(tree: Json) -> str:
    """The text of a tree, with its spellings of numbers and its duplicates.

    Raises: ValueError: the tree has a flaw.
    """
    if isinstance(tree, tuple):
        return "{" + ",".join(f"{compact(key)}:{unparse(value)}" for key, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(unparse, tree)) + "]"
    if isinstance(tree, Float):
        return tree.spelling
    if isinstance(tree, Flaw):
        raise ValueError(f"{tree.text} cannot be written")
    return compact(tree)


def find_flaw(tree: Json) -> Flaw | None:
    """The first flaw anywhere in the tree; ignored values included."""
    level: list[Json] = [tree]
    while level:
        for node in level:
            if type(node) is Flaw:
                return node
        level = [child for node in level for child in _children(node)]
    return None


def pointer(path: Iterable[str | int]) -> str:
    """The path as a JSON Pointer (RFC 6901); the root is the empty string."""
    return "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in path)


# ---- how the C scanner is set up


def _integer(spelling: str) -> Json:
    if len(spelling) <= _LONGEST_INTEGER and spelling != "-0":
        value = int(spelling)
        if _I64_MIN <= value <= _U64_MAX:
            return value
    return _float(spelling)


def _float(spelling: str) -> Json:
    return NUMBER_OUT_OF_RANGE if math.isinf(float(spelling)) else Float(spelling)


class _NotJsonError(ValueError):
    """NaN or Infinity, which the scanner would let pass."""


def _constant(spelling: str) -> NoReturn:
    raise _NotJsonError(spelling)


class _Decoder(json.JSONDecoder):
    def decode(self, s: str, *args: Any) -> Any:
        try:
            return super().decode(s, *args)
        except _NotJsonError as exc:
            raise json.JSONDecodeError("Expecting value", s, _constant_at(s, str(exc))) from None


_DECODER = _Decoder(object_pairs_hook=tuple, parse_int=_integer, parse_float=_float, parse_constant=_constant)
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def _constant_at(text: str, spelling: str) -> int:
    """Where the constant stands outside of any string; the text before it is sound."""
    tokens = re.finditer(rf"{_STRING}|{re.escape(spelling)}", text)
    return next(found.start() for found in tokens if found.group() == spelling)


def _children(node: Json) -> Iterable[Json]:
    if type(node) is tuple:
        return [value for _, value in node]
    return node if type(node) is list else ()


def _is_deeper(tree: Json, depth: int) -> bool:
    level = [tree] if type(tree) in (tuple, list) else []
    for _ in range(depth):
        level = [child for node in level for child in _children(node) if type(child) in (tuple, list)]
        if not level:
            return False
    return True


def _mark_surrogates(tree: Json) -> Json:
    """The tree with flaws in place of strings that cannot be text. An object with such a key is a flaw as a whole."""
    if isinstance(tree, str):
        return LONE_SURROGATE if _SURROGATE.search(tree) else tree
    if isinstance(tree, list):
        return [_mark_surrogates(child) for child in tree]
    if isinstance(tree, tuple):
        if any(_SURROGATE.search(key) for key, _ in tree):
            return LONE_SURROGATE
        return tuple((key, _mark_surrogates(child)) for key, child in tree)
    return tree


# ---- where something stands, once there is an error

_STRING = r'"(?:[^"\\]|\\.)*"'
_SPACE = re.compile(r"[ \t\n\r]*")
_SCALAR = re.compile(rf"{_STRING}|[^\s,\]}}]+", re.DOTALL)
_KEY = re.compile(_STRING, re.DOTALL)
_BRACKET = re.compile(rf"{_STRING}|[\[\]{{}}]", re.DOTALL)


def locate(text: str | bytes, path: Path) -> Position:
    """Where the value at *path* begins. The text must have been parsed; of duplicate keys the last one counts."""
    text = decode_utf8(text)
    offset = _skip_space(text, 0)
    for step in path:
        found = _find_member(text, offset, step)
        if found is None:
            break
        offset = found
    return position(text, offset)


def position(text: str, offset: int) -> Position:
    """Line and column of a character offset."""
    return Position(text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset))


def _skip_space(text: str, offset: int) -> int:
    found = _SPACE.match(text, offset)
    return found.end() if found else offset


def _find_member(text: str, offset: int, step: str | int) -> int | None:
    """Offset of one member's value, given the offset of its array or object."""
    is_object = text[offset] == "{"
    if not is_object and text[offset] != "[":
        return None
    result, index, offset = None, 0, _skip_space(text, offset + 1)
    while text[offset] not in "]}":
        name: str | int = index
        if is_object:
            key = _KEY.match(text, offset)
            assert key is not None, "only text that was parsed is searched"
            name = json.loads(key.group())
            offset = _skip_space(text, _skip_space(text, key.end()) + 1)
        if name == step:
            result = offset
        offset, index = _skip_space(text, _skip_value(text, offset)), index + 1
        if text[offset] == ",":
            offset = _skip_space(text, offset + 1)
    return result


def _skip_value(text: str, offset: int) -> int:
    if text[offset] not in "[{":
        found = _SCALAR.match(text, offset)
        return found.end() if found else offset
    depth = 0
    for found in _BRACKET.finditer(text, offset):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found.group(), 0)
        if depth == 0:
            return found.end()
    return len(text)


_SYNTAX_TEXTS = {
    "Expecting value": "a value is missing",
    "Expecting ',' delimiter": "a comma or a closing bracket is missing",
    "Expecting ':' delimiter": "a colon is missing",
    "Expecting property name": "a key in double quotes is missing",
    "Illegal trailing comma": "a trailing comma is not allowed",
    "Extra data": "text after the end of the document",
    "Invalid control character": "a control character must be escaped",
    "Invalid \\": "not an escape",
    "Unterminated string": "the string has no end",
}


def _syntax_text(exc: json.JSONDecodeError) -> str:
    """One wording whatever the interpreter's version says."""
    return next((text for start, text in _SYNTAX_TEXTS.items() if exc.msg.startswith(start)), exc.msg)


def _refuse(text: str, offset: int, code: str, reason: str) -> NoReturn:
    at = position(text, offset)
    raise SpecParseError(
        f"not JSON: {reason} (line {at.line}, column {at.column})",
        code=code,
        details={"path": "", "reason": f"not JSON: {reason}", "line": at.line, "column": at.column},
    )


def _refuse_depth(text: str) -> NoReturn:
    depth = 0
    for found in _BRACKET.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found.group(), 0)
        if depth > MAX_DEPTH:
            _refuse(text, found.start(), "json_depth", f"more than {MAX_DEPTH} arrays and objects inside one another")
    raise AssertionError("depth was reported but is not there")
