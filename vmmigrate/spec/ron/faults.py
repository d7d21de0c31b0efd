"""What can be wrong with a RON text, in the words of the reference implementation.

Its migration protocol reports these texts to the peer, so they are part of what a captured stream holds. A fault about
a struct's fields learns the struct's name while it climbs (`named`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

_WORD: Final = re.compile("[A-Za-z_][0-9A-Za-z_]*")
_RAW_WORD: Final = re.compile(r"[0-9A-Za-z_.+\-]+")


class RonError(Exception):
    """A text that is not RON, or not RON of the type."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self._text = text

    @property
    def text(self) -> str:
        """The message, without a position."""
        return self._text


class RawIdentifierError(RonError):
    """A name that is one only as `r#name`."""

    def __init__(self, name: str) -> None:
        text = f"Found invalid std identifier `{name}`, try the raw identifier `r#{name}` instead"
        super().__init__("ron_syntax", text)
        self.name = name


class FieldError(RonError):
    """A field that is unknown, missing or there twice; `owner` is the struct, once known."""

    owner: str | None = None

    def __init__(self, code: str, text: str, gap: str = " ", rest: str = "") -> None:
        super().__init__(code, text)
        self._gap, self._rest = gap, rest

    @property
    def text(self) -> str:
        owner = "" if self.owner is None else f"{self._gap}in {ident(self.owner)}"
        return f"{self._text}{owner}{self._rest}"


class VariantError(RonError):
    """A variant that is unknown; `owner` is the enum, once known."""

    owner: str | None = None

    def __init__(self, found: str, known: Sequence[str]) -> None:
        super().__init__("unknown_variant", found)
        self._known = known

    @property
    def text(self) -> str:
        rest = _one_of(self._known, "variants")
        if self.owner is None:
            return f"Unexpected enum variant named {ident(self._text)}, {rest}"
        return f"Unexpected variant named {ident(self._text)}in enum {ident(self.owner)}, {rest}"


def unknown_field(name: str, known: Sequence[str]) -> FieldError:
    # Their text has no gap before the struct's name.
    return FieldError("unknown_field", f"Unexpected field named {ident(name)}", "", f", {_one_of(known, 'fields')}")


def missing_field(name: str) -> FieldError:
    return FieldError("missing_field", f"Unexpected missing field {ident(name)}")


def duplicate_field(name: str) -> FieldError:
    return FieldError("duplicate_field", f"Unexpected duplicate field {ident(name)}")


def unexpected(found: str, expected: str) -> RonError:
    """A value of another type, or outside of what the type allows."""
    return RonError("invalid_type", f"Expected {expected} but found {found} instead")


def wrong_length(found: int, expected: str) -> RonError:
    count = {0: "zero elements", 1: "one element"}.get(found, f"{found} elements")
    return RonError("invalid_value", f"Expected {expected} but found {count} instead")


def ident(name: str) -> str:
    """A name as these texts quote it."""
    if _WORD.fullmatch(name):
        return f"`{name}`"
    return f"`r#{name}`" if _RAW_WORD.fullmatch(name) else f'"{name}"_[invalid identifier]'


def _one_of(names: Sequence[str], none: str) -> str:
    if not names:
        return f"there are no {none}"
    quoted = [ident(name) for name in names]
    if len(names) <= 2:
        return f"expected {'either ' if len(names) == 2 else ''}{' or '.join(quoted)} instead"
    return f"expected one of {', '.join(quoted)} instead"
