"""How RON writes strings: which characters it escapes. A table, since it depends on a release of Unicode.

`escapes.json` was worked out by the reference implementation for every scalar value; a test compares it with the
corpus.
"""

from __future__ import annotations

import json
import re
from functools import cache
from importlib.resources import files
from typing import Any


def quoted(text: str) -> str:
    """The text as a RON string."""
    return f'"{_escaped_pattern().sub(_escape, text)}"'


def quoted_for_errors(text: str) -> str:
    """The text as error messages show it: the same, but an apostrophe stays as it is."""
    return quoted(text).replace("\\'", "'")


def _escape(found: re.Match[str]) -> str:
    character = found.group()
    return _table()["short"].get(f"{ord(character):x}") or f"\\u{{{ord(character):x}}}"


@cache
def _table() -> Any:
    return json.loads(files(__package__).joinpath("escapes.json").read_text(encoding="utf-8"))


@cache
def _escaped_pattern() -> re.Pattern[str]:
    table = _table()
    characters = "".join(re.escape(chr(int(code, 16))) for code in table["short"])
    ranges = "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in table["unicode_escape_ranges"])
    return re.compile(f"[{characters}{ranges}]")
