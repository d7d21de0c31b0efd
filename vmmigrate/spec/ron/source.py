"""Where values of RON come from: the text itself (`live`), or a value that was kept until its type was known (`kept`).

RON does not say what a text means: `com1` is an enum's variant where an enum is wanted and nothing at all (a unit)
where anything is. So a text is read by asking for what is wanted, and a visitor takes what is there. An enum whose
content stands before its tag has to keep the content first; kept values follow other rules than live ones (a name is
lost, a list passes for a struct, `Some(..)` may be left out), and both sets are those of the reference implementation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, TypeAlias, TypeVar

from vmmigrate.spec.ron.escapes import quoted_for_errors
from vmmigrate.spec.ron.faults import RonError, unexpected
from vmmigrate.spec.ron.scan import IDENTIFIER_EXPECTED

T = TypeVar("T")

_LONGEST_SHOWN: Final = 40


# ---- contents: bool, str, list and these


@dataclass(frozen=True, slots=True)
class Unsigned:
    value: int


@dataclass(frozen=True, slots=True)
class Signed:
    """A number with a sign in front."""

    value: int


@dataclass(frozen=True, slots=True)
class Floating:
    value: float


@dataclass(frozen=True, slots=True)
class Character:
    value: str


@dataclass(frozen=True, slots=True)
class Some:
    content: Any


@dataclass(frozen=True, slots=True)
class Pairs:
    """A map, or a struct whose name is gone."""

    pairs: tuple[tuple[Any, Any], ...]


class Mark:
    """A value without parts."""


UNIT: Final = Mark()
NONE: Final = Mark()
DONE: Final = Mark()
"""What a list or map answers when there is nothing further."""

Content: TypeAlias = Any
Reader: TypeAlias = "Callable[[Source], T]"


def shown(content: Content) -> str:
    """A kept value in an error text. A long string is not shown: it may be a secret."""
    match content:
        case bool():
            return f"the boolean `{'true' if content else 'false'}`"
        case Unsigned():
            return f"the unsigned integer `{content.value}`"
        case Signed():
            return f"the signed integer `{content.value}`"
        case Floating():
            return f"the floating point number `{_plain(content.value)}`"
        case Character():
            return f"the UTF-8 character `{content.value}`"
        case str():
            if len(content) > _LONGEST_SHOWN:
                return f"a string of {len(content)} characters"
            return f"the string {quoted_for_errors(content)}"
        case Some():
            return "an optional value"
        case list():
            return "a sequence"
        case Pairs():
            return "a map"
        case _:
            return "a unit value" if content is UNIT else "an optional value"


def _plain(number: float) -> str:
    """A number without an exponent, and without a fraction of zero."""
    if number != number or number in (float("inf"), float("-inf")):
        return {"nan": "NaN"}.get(str(number), str(number))
    text = format(Decimal(repr(number)), "f")
    return text.removesuffix(".0")


class Visitor:
    """Takes one kind of value. Whatever it has no method for is refused with what it expects."""

    expecting: str = ""

    def scalar(self, content: Content) -> Any:
        """A bool, number, character, string, unit or none."""
        raise unexpected(shown(content), self.expecting)

    def some(self, source: Source) -> Any:
        raise unexpected("an optional value", self.expecting)

    def elements(self, elements: Elements) -> Any:
        raise unexpected("a sequence", self.expecting)

    def members(self, members: Members) -> Any:
        raise unexpected("a map", self.expecting)

    def variant(self, variant: Variant) -> Any:
        raise unexpected("an enum", self.expecting)


class Source:
    """One value, asked for as the kind that is wanted. By itself it is a place where only a name can stand."""

    def boolean(self, visitor: Visitor) -> Any:
        raise RonError("ron_syntax", IDENTIFIER_EXPECTED)

    def unsigned(self, maximum: int, visitor: Visitor) -> Any:
        raise RonError("ron_syntax", IDENTIFIER_EXPECTED)

    def text(self, visitor: Visitor) -> Any:
        raise RonError("ron_syntax", IDENTIFIER_EXPECTED)

    def option(self, visitor: Visitor) -> Any:
        raise RonError("ron_syntax", IDENTIFIER_EXPECTED)

    def sequence(self, visitor: Visitor) -> Any:
        raise RonError("ron_syntax", IDENTIFIER_EXPECTED)

    def fixed(self, visitor: Visitor) -> Any:
        """A sequence of known length."""
        raise RonError("ron_syntax", IDENTIFIER_EXPECTED)

    def mapping(self, visitor: Visitor) -> Any:
        raise RonError("ron_syntax", IDENTIFIER_EXPECTED)

    def struct(self, name: str, visitor: Visitor) -> Any:
        raise RonError("ron_syntax", IDENTIFIER_EXPECTED)

    def enum(self, name: str, visitor: Visitor) -> Any:
        raise RonError("ron_syntax", IDENTIFIER_EXPECTED)

    def identifier(self, visitor: Visitor) -> Any:
        """The name of a field or variant."""
        raise RonError("ron_syntax", IDENTIFIER_EXPECTED)

    def any(self, visitor: Visitor) -> Any:
        raise RonError("ron_syntax", IDENTIFIER_EXPECTED)

    def ignored(self) -> None:
        self.any(Ignore())

    def content(self) -> Content:
        return self.any(Keep())


class Elements(ABC):
    """The elements of a sequence, one after the other."""

    @abstractmethod
    def next(self, read: Reader[T]) -> T | Mark: ...


class Members(ABC):
    """The members of a struct or map, one after the other: a key, then its value."""

    @abstractmethod
    def next_key(self, read: Reader[T]) -> T | Mark: ...

    @abstractmethod
    def value(self, read: Reader[T]) -> T: ...


class Variant(ABC):
    """A variant of an enum: its name first, then what belongs to it."""

    @abstractmethod
    def name(self, read: Reader[T]) -> T: ...

    @abstractmethod
    def unit(self) -> None: ...

    def newtype(self, read: Reader[T]) -> T:
        """The only field. Enums with fields are never kept, so by itself a variant has none."""
        raise unexpected("a unit variant", "newtype variant")

    def tuple(self, visitor: Visitor) -> Any:
        """Several fields."""
        raise unexpected("a unit variant", "tuple variant")


class Ignore(Visitor):
    """Takes anything and drops it."""

    def scalar(self, content: Content) -> None:
        return None

    def some(self, source: Source) -> None:
        source.ignored()

    def elements(self, elements: Elements) -> None:
        while elements.next(lambda source: source.ignored()) is not DONE:
            pass

    def members(self, members: Members) -> None:
        while members.next_key(lambda source: source.ignored()) is not DONE:
            members.value(lambda source: source.ignored())


class Keep(Visitor):
    """Takes anything and keeps it."""

    def scalar(self, content: Content) -> Content:
        return content

    def some(self, source: Source) -> Some:
        return Some(source.content())

    def elements(self, elements: Elements) -> list[Content]:
        kept = []
        while (item := elements.next(lambda source: source.content())) is not DONE:
            kept.append(item)
        return kept

    def members(self, members: Members) -> Pairs:
        pairs = []
        while (key := members.next_key(lambda source: source.content())) is not DONE:
            pairs.append((key, members.value(lambda source: source.content())))
        return Pairs(tuple(pairs))
