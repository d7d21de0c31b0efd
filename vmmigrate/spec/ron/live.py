"""Values that stand in the text, read as they are asked for."""

from __future__ import annotations

from typing import Any, Final, TypeVar

from vmmigrate.spec.ron.faults import FieldError, RonError, VariantError, ident
from vmmigrate.spec.ron.scan import Extensions, Scanner
from vmmigrate.spec.ron.source import (
    DONE,
    NONE,
    UNIT,
    Character,
    Content,
    Elements,
    Floating,
    Mark,
    Members,
    Reader,
    Signed,
    Source,
    Unsigned,
    Variant,
    Visitor,
)

T = TypeVar("T")

DEEPEST: Final = 128
"""Values inside one another; a preamble needs about forty."""

_I64_MIN, _I64_MAX, _U64_MAX = -(2**63), 2**63 - 1, 2**64 - 1


class _Depth:
    """Counts how deep a value is inside of others; entered for each level."""

    def __init__(self) -> None:
        self._room = DEEPEST

    def __enter__(self) -> None:
        if self._room == 0:
            text = "Exceeded recursion limit, try increasing the limit and using `serde_stacker` to protect against a"
            raise RonError("ron_depth", f"{text} stack overflow")
        self._room -= 1

    def __exit__(self, *exc_info: object) -> None:
        self._room += 1


class Live(Source):
    """The value that stands at the scanner's cursor."""

    def __init__(self, scanner: Scanner) -> None:
        self.scanner = scanner
        self.deeper = _Depth()

    def end(self) -> None:
        """Raises: RonError: there is more text."""
        self.scanner.skip_space()
        if self.scanner.peek() is not None:
            raise RonError("ron_syntax", "Non-whitespace trailing characters")

    def boolean(self, visitor: Visitor) -> Any:
        return visitor.scalar(self.scanner.boolean())

    def unsigned(self, maximum: int, visitor: Visitor) -> Any:
        return visitor.scalar(Unsigned(self.scanner.unsigned(maximum)))

    def text(self, visitor: Visitor) -> Any:
        return visitor.scalar(self.scanner.string())

    def option(self, visitor: Visitor) -> Any:
        scanner = self.scanner
        if scanner.consume("None"):
            return visitor.scalar(NONE)
        opened = False
        if scanner.consume("Some"):
            scanner.skip_space()
            opened = scanner.consume("(")
        if not opened:
            if Extensions.IMPLICIT_SOME not in scanner.extensions:
                raise RonError("invalid_type", "Expected option")
            with self.deeper:
                return visitor.some(self)
        scanner.skip_space()
        with self.deeper:
            value = visitor.some(self)
        scanner.comma()
        self._close(")")
        return value

    def sequence(self, visitor: Visitor) -> Any:
        return self._list("[", "]", visitor)

    def fixed(self, visitor: Visitor) -> Any:
        return self._list("(", ")", visitor)

    def mapping(self, visitor: Visitor) -> Any:
        self._open("{")
        with self.deeper:
            value = visitor.members(_LiveMembers(self, "}"))
        self.scanner.skip_space()
        self._close("}")
        return value

    def struct(self, name: str, visitor: Visitor) -> Any:
        self.scanner.struct_name(name)
        self.scanner.skip_space()
        return self._struct_without_name(name, visitor)

    def enum(self, name: str, visitor: Visitor) -> Any:
        try:
            with self.deeper:
                return visitor.variant(_LiveVariant(self))
        except VariantError as error:
            error.owner = error.owner or name
            raise

    def identifier(self, visitor: Visitor) -> Any:
        return visitor.scalar(self.scanner.identifier())

    def any(self, visitor: Visitor) -> Any:
        scanner = self.scanner
        for word, content in _WORDS.items():
            if scanner.consume_word(word):
                return visitor.scalar(content)
        if scanner.is_word("Some"):
            return self.option(visitor)
        if scanner.consume("()"):
            return visitor.scalar(UNIT)
        try:
            scanner.identifier()
        except RonError:
            return self._any_without_name(visitor)
        scanner.skip_space()
        return self._any_struct(visitor)

    def _any_without_name(self, visitor: Visitor) -> Any:
        byte = chr(self.scanner.peek_or_end())
        if byte == "(":
            return self._any_struct(visitor)
        if byte == "[":
            return self.sequence(visitor)
        if byte == "{":
            return self.mapping(visitor)
        if byte in "0123456789+-":
            return visitor.scalar(self._any_number())
        if byte == ".":
            return visitor.scalar(Floating(self.scanner.float_number()))
        if byte in '"r':
            return self.text(visitor)
        if byte == "'":
            return visitor.scalar(Character(self.scanner.character()))
        raise self.scanner.unexpected_byte(ord(byte))

    def _any_number(self) -> Content:
        scanner, start = self.scanner, self.scanner.offset
        if scanner.is_float():
            return Floating(scanner.float_number())
        try:
            if scanner.peek() in (ord("+"), ord("-")):
                return Signed(scanner.signed(_I64_MIN, _I64_MAX))
            return Unsigned(scanner.unsigned(_U64_MAX))
        except RonError:
            scanner.go_back(start)
            return Floating(scanner.float_number())

    def _any_struct(self, visitor: Visitor) -> Any:
        """What follows a name, or has none: a unit, a sequence in parentheses, or a struct."""
        if not self.scanner.starts_with("("):
            return visitor.scalar(UNIT)
        if self.scanner.is_tuple():
            return self.fixed(visitor)
        return self._struct_without_name("", visitor)

    def _struct_without_name(self, name: str, visitor: Visitor) -> Any:
        if not self.scanner.consume("("):
            raise RonError("invalid_type", f"Expected opening `(` for struct {ident(name)}")
        try:
            with self.deeper:
                value = visitor.members(_LiveMembers(self, ")"))
        except FieldError as error:
            error.owner = error.owner or name or None
            raise
        self.scanner.skip_space()
        self._close(")")
        return value

    def _list(self, opening: str, closing: str, visitor: Visitor) -> Any:
        self._open(opening)
        with self.deeper:
            value = visitor.elements(_LiveElements(self, closing))
        self.scanner.skip_space()
        self._close(closing)
        return value

    def _open(self, bracket: str) -> None:
        if not self.scanner.consume(bracket):
            raise RonError("invalid_type", f"Expected opening `{bracket}`")

    def _close(self, bracket: str) -> None:
        if not self.scanner.consume(bracket):
            raise RonError("ron_syntax", f"Expected closing `{bracket}`")


_WORDS: Final[dict[str, Content]] = {
    "true": True,
    "false": False,
    "None": NONE,
    "inf": Floating(float("inf")),
    "-inf": Floating(float("-inf")),
    "NaN": Floating(float("nan")),
}


class _FieldName(Source):
    """The key of a struct's member: an identifier, whatever is asked for."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def text(self, visitor: Visitor) -> Any:
        return self._live.identifier(visitor)

    def identifier(self, visitor: Visitor) -> Any:
        return self._live.identifier(visitor)

    def any(self, visitor: Visitor) -> Any:
        return self._live.identifier(visitor)


class _CommaSeparated:
    def __init__(self, live: Live, closing: str) -> None:
        self._live, self._closing, self._had_comma = live, closing, True

    def _has_next(self) -> bool:
        self._live.scanner.skip_space()
        more = self._live.scanner.peek_or_end() != ord(self._closing)
        if more and not self._had_comma:
            raise RonError("ron_syntax", "Expected comma")
        return more

    def _read(self, read: Reader[T]) -> T:
        with self._live.deeper:
            value = read(self._live)
        self._had_comma = self._live.scanner.comma()
        return value


class _LiveElements(_CommaSeparated, Elements):
    def next(self, read: Reader[T]) -> T | Mark:
        return self._read(read) if self._has_next() else DONE


class _LiveMembers(_CommaSeparated, Members):
    def next_key(self, read: Reader[T]) -> T | Mark:
        if not self._has_next():
            return DONE
        with self._live.deeper:
            return read(_FieldName(self._live) if self._closing == ")" else self._live)

    def value(self, read: Reader[T]) -> T:
        self._live.scanner.skip_space()
        if not self._live.scanner.consume(":"):
            raise RonError("ron_syntax", "Expected colon")
        self._live.scanner.skip_space()
        return self._read(read)


class _LiveVariant(Variant):
    def __init__(self, live: Live) -> None:
        self._live = live

    def name(self, read: Reader[T]) -> T:
        self._live.scanner.skip_space()
        with self._live.deeper:
            return read(self._live)

    def unit(self) -> None:
        return None

    def newtype(self, read: Reader[T]) -> T:
        scanner = self._live.scanner
        scanner.skip_space()
        if not scanner.consume("("):
            raise RonError("invalid_type", "Expected opening `(`")
        scanner.skip_space()
        with self._live.deeper:
            value = read(self._live)
        scanner.comma()
        if not scanner.consume(")"):
            raise RonError("ron_syntax", "Expected closing `)`")
        return value

    def tuple(self, visitor: Visitor) -> Any:
        self._live.scanner.skip_space()
        return self._live.fixed(visitor)
