"""Values that were kept until their type was known, and are read then."""

from __future__ import annotations

from typing import Any, TypeVar

from vmmigrate.spec.ron.faults import unexpected, wrong_length
from vmmigrate.spec.ron.source import (
    DONE,
    NONE,
    UNIT,
    Content,
    Elements,
    Mark,
    Members,
    Pairs,
    Reader,
    Signed,
    Some,
    Source,
    Unsigned,
    Variant,
    Visitor,
    shown,
)

T = TypeVar("T")


class Kept(Source):
    """A value that was read before its type was known."""

    def __init__(self, content: Content) -> None:
        self._content = content

    def _scalar(self, visitor: Visitor, *kinds: type) -> Any:
        if not isinstance(self._content, kinds):
            raise unexpected(shown(self._content), visitor.expecting)
        return visitor.scalar(self._content)

    def boolean(self, visitor: Visitor) -> Any:
        return self._scalar(visitor, bool)

    def unsigned(self, maximum: int, visitor: Visitor) -> Any:
        return self._scalar(visitor, Unsigned, Signed)

    def text(self, visitor: Visitor) -> Any:
        return self._scalar(visitor, str)

    def option(self, visitor: Visitor) -> Any:
        if self._content is NONE or self._content is UNIT:
            return visitor.scalar(NONE)
        if isinstance(self._content, Some):
            return visitor.some(Kept(self._content.content))
        return visitor.some(self)

    def sequence(self, visitor: Visitor) -> Any:
        if not isinstance(self._content, list):
            raise unexpected(shown(self._content), visitor.expecting)
        elements = _KeptElements(self._content)
        value = visitor.elements(elements)
        elements.end()
        return value

    def fixed(self, visitor: Visitor) -> Any:
        return self.sequence(visitor)

    def mapping(self, visitor: Visitor) -> Any:
        if not isinstance(self._content, Pairs):
            raise unexpected(shown(self._content), visitor.expecting)
        return visitor.members(_KeptMembers(self._content))

    def struct(self, name: str, visitor: Visitor) -> Any:
        return self.sequence(visitor) if isinstance(self._content, list) else self.mapping(visitor)

    def enum(self, name: str, visitor: Visitor) -> Any:
        content = self._content
        if isinstance(content, Pairs):
            if len(content.pairs) != 1:
                raise unexpected("a map", "map with a single key")
            key, value = content.pairs[0]
            return visitor.variant(_KeptVariant(key, value))
        if not isinstance(content, str):
            raise unexpected(shown(content), "string or map")
        return visitor.variant(_KeptVariant(content, DONE))

    def identifier(self, visitor: Visitor) -> Any:
        content = self._content
        # Names may be given as indices of 8 or 64 bits, as others are never asked about.
        is_index = isinstance(content, Unsigned) and not 2**8 <= content.value < 2**32
        if not (isinstance(content, str) or is_index):
            raise unexpected(shown(content), visitor.expecting)
        return visitor.scalar(content)

    def any(self, visitor: Visitor) -> Any:
        match self._content:
            case Some():
                return visitor.some(Kept(self._content.content))
            case list():
                return self.sequence(visitor)
            case Pairs():
                return self.mapping(visitor)
            case _:
                return visitor.scalar(self._content)

    def ignored(self) -> None:
        return None

    def content(self) -> Content:
        return self._content


class _KeptElements(Elements):
    def __init__(self, items: list[Content]) -> None:
        self._items, self._taken = items, 0

    def next(self, read: Reader[T]) -> T | Mark:
        if self._taken == len(self._items):
            return DONE
        self._taken += 1
        return read(Kept(self._items[self._taken - 1]))

    def end(self) -> None:
        if self._taken < len(self._items):
            plural = "element" if self._taken == 1 else "elements"
            raise wrong_length(len(self._items), f"{self._taken} {plural} in sequence")


class _KeptMembers(Members):
    """Visitors read every member, so unlike a list it needs no check at its end."""

    def __init__(self, content: Pairs) -> None:
        self._pairs = iter(content.pairs)
        self._value: Content = UNIT

    def next_key(self, read: Reader[T]) -> T | Mark:
        pair = next(self._pairs, None)
        if pair is None:
            return DONE
        self._value = pair[1]
        return read(Kept(pair[0]))

    def value(self, read: Reader[T]) -> T:
        return read(Kept(self._value))


class _KeptVariant(Variant):
    """`content` is DONE for a variant that is a mere name."""

    def __init__(self, name: Content, content: Content) -> None:
        self._name, self._content = name, content

    def name(self, read: Reader[T]) -> T:
        return read(Kept(self._name))

    def unit(self) -> None:
        empty = isinstance(self._content, Pairs) and not self._content.pairs
        if self._content is not DONE and self._content is not UNIT and not empty:
            raise unexpected(shown(self._content), "unit")
