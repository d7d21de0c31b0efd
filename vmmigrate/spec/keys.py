"""Names inside a spec: component keys, UUIDs and PCI paths.

A component key is text. Text that a UUID parser accepts *is* that UUID and is kept in its canonical spelling (lower
case, hyphens), so two spellings of one UUID are one key, and the original spelling is gone. All other text is a
name, kept as it is: no Unicode normalisation, and the empty name is legal. Since canonical UUIDs and names never
collide, the canonical text is the whole identity of a key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NewType, TypeVar

SpecKey = NewType("SpecKey", str)
"""Canonical text of a component key; made by `spec_key` only."""

Uuid = NewType("Uuid", str)
"""Canonical text of a UUID."""

_T = TypeVar("_T")

_HYPHENATED = r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
_UUID = re.compile(rf"(?:urn:uuid:)?({_HYPHENATED})|\{{({_HYPHENATED})\}}|([0-9a-fA-F]{{32}})")
_UUID_LENGTHS = frozenset({32, 36, 38, 45})
_CANONICAL = re.compile(_HYPHENATED.replace("A-F", ""))


def uuid_or_none(text: str) -> Uuid | None:
    """The UUID in one of its four spellings: hyphenated, 32 digits, `{hyphenated}`, `urn:uuid:hyphenated`."""
    if len(text) not in _UUID_LENGTHS or (found := _UUID.fullmatch(text)) is None:
        return None
    hyphenated, braced, digits = found.groups()
    if digits:
        hyphenated = "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
    return Uuid((hyphenated or braced).lower())


def spec_key(text: str) -> SpecKey:
    """The component key that *text* spells."""
    return SpecKey(uuid_or_none(text) or text)


def is_uuid(key: str) -> bool:
    """Whether a canonical key is a UUID."""
    return len(key) == 36 and _CANONICAL.fullmatch(key) is not None


def key_order(key: str) -> tuple[bool, str]:
    """Sort key: UUIDs by value, then names by their UTF-8 bytes (which is the order of code points)."""
    return not is_uuid(key), key


def in_key_order(entries: Mapping[SpecKey, _T]) -> dict[SpecKey, _T]:
    """The same entries in the order in which specs are written, iterated and reported."""
    return {key: entries[key] for key in sorted(entries, key=key_order)}
