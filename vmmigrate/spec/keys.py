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
_GROUP_LENGTHS = (8, 4, 4, 4, 12)
_HEX_DIGITS = frozenset("0123456789abcdefABCDEF")
_CANONICAL = re.compile(_HYPHENATED.replace("A-F", ""))


def uuid_or_none(text: str) -> Uuid | None:
    """The UUID in one of its four spellings: hyphenated, 32 digits, `{hyphenated}`, `urn:uuid:hyphenated`."""
    if len(text) not in _UUID_LENGTHS or (found := _UUID.fullmatch(text)) is None:
        return None
    hyphenated, braced, digits = found.groups()
    if digits:
        hyphenated = "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
    return Uuid((hyphenated or braced).lower())


def why_no_uuid(text: str) -> str:
    """What keeps text that is no UUID from being one, in the words of the reference implementation."""
    digits, offset, braced_or_prefixed = text, 0, True
    if text.startswith("{") and text.endswith("}"):
        digits, offset = text[1:-1], 1
    elif text.startswith("urn:uuid:"):
        digits, offset = text[9:], 9
    else:
        braced_or_prefixed = False
    for character in digits:
        if character != "-" and character not in _HEX_DIGITS:
            at = offset + len(digits.partition(character)[0].encode()) + 1
            return f"invalid character: found `{character}` at {at}"
    groups = [len(group) for group in digits.split("-")]
    if len(groups) == 1 and not braced_or_prefixed:
        return f"invalid length: expected length 32 for simple format, found {len(text)}"
    if len(groups) != len(_GROUP_LENGTHS):
        return f"invalid group count: expected {len(_GROUP_LENGTHS)}, found {len(groups)}"
    wrong = next((index for index in range(4) if groups[index] != _GROUP_LENGTHS[index]), 4)
    found = groups[wrong] if wrong < 4 else len(text) - 24
    return f"invalid group length in group {wrong}: expected {_GROUP_LENGTHS[wrong]}, found {found}"


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
