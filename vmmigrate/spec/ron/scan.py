"""The tokens of RON 0.8: identifiers, numbers, strings, comments, and where each of them stands.

Rules that differ from JSON and from later RON: text is looked at byte by byte, so identifiers and white space are ASCII
and columns count bytes; `r#name` is a raw identifier; integers take `0x`, `0o`, `0b` and underscores; `1e3` is no
integer and no shorthand for one. A token that cannot be read leaves the cursor where the reference implementation
leaves it, since its error texts carry that position.
"""

from __future__ import annotations

import re
from enum import Flag, auto
from typing import Final, NoReturn

from vmmigrate.spec.ron.faults import RawIdentifierError, RonError, ident


class Extensions(Flag):
    """What a text may ask for in its head: `#![enable(implicit_some)]`."""

    NONE = 0
    UNWRAP_NEWTYPES = auto()
    IMPLICIT_SOME = auto()
    UNWRAP_VARIANT_NEWTYPES = auto()


END: Final = "Unexpected end of RON"
IDENTIFIER_EXPECTED: Final = "Expected identifier"

_EXTENSIONS: Final = {
    "unwrap_newtypes": Extensions.UNWRAP_NEWTYPES,
    "implicit_some": Extensions.IMPLICIT_SOME,
    "unwrap_variant_newtypes": Extensions.UNWRAP_VARIANT_NEWTYPES,
}
_SPACE: Final = re.compile(rb"[ \t\n\r]*")
_SPACE_STARTS: Final = frozenset({b" ", b"\t", b"\n", b"\r", b"/"})
_INTEGER: Final = re.compile(rb"[0-9a-fA-F_]*")
_FLOAT: Final = re.compile(rb"[0-9.eE+\-_]*")
_WORD: Final = re.compile(rb"[0-9A-Za-z_]*")
_RAW_WORD: Final = re.compile(rb"[0-9A-Za-z_.+\-]*")
_WORD_START: Final = re.compile(rb"[A-Za-z_]")
_RAW_WORD_START: Final = re.compile(rb"[0-9A-Za-z_.+\-]")
_STRING_STOP: Final = re.compile(rb'["\\]')
_COMMENT_STOP: Final = re.compile(rb"[/*]")
_HEX: Final = b"0123456789abcdefABCDEF"
_BASES: Final = {b"0x": 16, b"0b": 2, b"0o": 8}
_SIMPLE_ESCAPES: Final = {
    ord(letter): text
    for letter, text in {"'": "'", '"': '"', "\\": "\\", "n": "\n", "r": "\r", "t": "\t", "0": "\0"}.items()
}
_FLOAT_WORDS: Final = ("inf", "+inf", "-inf", "NaN", "+NaN", "-NaN")


class Scanner:
    """A cursor over one text."""

    def __init__(self, text: str) -> None:
        self._bytes = text.encode()
        self.offset = 0
        self._counted_twice: list[tuple[int, int]] = []
        self.extensions = Extensions.NONE

    def read_head(self) -> None:
        """Skip to the first value, taking in attributes that switch extensions on."""
        self.skip_space()
        while self.peek() == ord("#"):
            self._read_attribute()
            self.skip_space()

    # ---- the cursor

    def peek(self) -> int | None:
        return self._bytes[self.offset] if self.offset < len(self._bytes) else None

    def peek_or_end(self) -> int:
        if self.offset >= len(self._bytes):
            raise RonError("ron_syntax", END)
        return self._bytes[self.offset]

    def advance(self, count: int) -> None:
        self.offset += count

    def go_back(self, offset: int) -> None:
        """Read on from an earlier place in the same line. Columns go on counting, as theirs do."""
        self._counted_twice.append((offset, self.offset - offset))
        self.offset = offset

    def position(self) -> tuple[int, int]:
        """Line and column of the cursor, both from 1; columns are bytes."""
        start = self._bytes.rfind(b"\n", 0, self.offset) + 1
        again = sum(count for offset, count in self._counted_twice if offset >= start)
        return self._bytes.count(b"\n", 0, self.offset) + 1, self.offset - start + 1 + again

    def starts_with(self, text: str) -> bool:
        return self._bytes.startswith(text.encode(), self.offset)

    def consume(self, text: str) -> bool:
        found = self._bytes.startswith(text.encode(), self.offset)
        if found:
            self.offset += len(text)
        return found

    def expect_byte(self, byte: str, text: str) -> None:
        """The byte is taken even when it is another one."""
        if self._take_byte() != ord(byte):
            raise RonError("ron_syntax", text)

    def _take_byte(self) -> int:
        byte = self.peek_or_end()
        self.advance(1)
        return byte

    def _matched(self, pattern: re.Pattern[bytes], skip: int = 0) -> int:
        """How many bytes from here (or *skip* further) the pattern takes."""
        start = self.offset + skip
        found = pattern.match(self._bytes, start)
        return found.end() - start if found else 0

    def _text(self, length: int) -> str:
        return self._bytes[self.offset : self.offset + length].decode()

    # ---- between tokens

    def skip_space(self) -> None:
        """White space and comments; most of the time there are none."""
        if self._bytes[self.offset : self.offset + 1] not in _SPACE_STARTS:
            return
        self.advance(self._matched(_SPACE))
        while self._skip_comment():
            self.advance(self._matched(_SPACE))

    def comma(self) -> bool:
        """Skip space, a comma if there is one, and the space after it."""
        self.skip_space()
        if not self.consume(","):
            return False
        self.skip_space()
        return True

    def _skip_comment(self) -> bool:
        if not self.consume("/"):
            return False
        kind = self._take_byte()
        if kind == ord("/"):
            end = self._bytes.find(b"\n", self.offset)
            self.advance((end if end >= 0 else len(self._bytes)) - self.offset)
        elif kind == ord("*"):
            self._skip_block()
        else:
            raise self.unexpected_byte(kind)
        return True

    def unexpected_byte(self, byte: int) -> RonError:
        return RonError("ron_syntax", f"Unexpected byte '{_shown_byte(byte)}'")

    def _skip_block(self) -> None:
        """Block comments nest."""
        level = 1
        while level:
            found = _COMMENT_STOP.search(self._bytes, self.offset)
            at_end = self.peek() is None
            self.advance((found.start() if found else len(self._bytes)) - self.offset)
            if self.consume("/*"):
                level += 1
            elif self.consume("*/"):
                level -= 1
            elif at_end or self.peek() is None:
                raise RonError("ron_syntax", "Unclosed block comment")
            else:
                self.advance(1)

    def _read_attribute(self) -> None:
        if not self._consume_all("#", "!", "[", "enable", "("):
            raise RonError("ron_syntax", "Expected an `#![enable(...)]` attribute")
        self.skip_space()
        more = True
        while more:
            name = self.identifier()
            if name not in _EXTENSIONS:
                raise RonError("ron_syntax", f"No RON extension named {ident(name)}")
            self.extensions |= _EXTENSIONS[name]
            comma, further = self.comma(), self._matched(_WORD) > 0
            if further and not comma:
                raise RonError("ron_syntax", "Expected comma")
            more = comma and further
        self.skip_space()
        if not self._consume_all(")", "]"):
            raise RonError("ron_syntax", "Expected closing `)]` after the enable attribute")

    def _consume_all(self, *parts: str) -> bool:
        every = True
        for part in parts:
            if self.consume(part):
                self.skip_space()
            else:
                every = False
        return every

    # ---- names

    def is_word(self, word: str) -> bool:
        """Whether the word stands here and no letter, digit or underscore follows it."""
        return self.starts_with(word) and not self._matched(_WORD, len(word))

    def consume_word(self, word: str) -> bool:
        found = self.is_word(word)
        if found:
            self.advance(len(word))
        return found

    def identifier(self) -> str:
        """An identifier, raw or not. The cursor does not move when there is none."""
        if not self._matched(_WORD_START):
            self.peek_or_end()
            if self._matched(_RAW_WORD_START):
                self._suggest_raw()
            raise RonError("ron_syntax", IDENTIFIER_EXPECTED)
        start = self._bytes[self.offset : self.offset + 2]
        if start == b'r"' or (start == b"r#" and not self._matched(_RAW_WORD_START, 2)):
            raise RonError("ron_syntax", IDENTIFIER_EXPECTED)
        if start == b"r#":
            self.advance(2)
            length = self._matched(_RAW_WORD)
        else:
            length = self._matched(_WORD)
            if self._matched(_RAW_WORD_START, length):
                self._suggest_raw()
        name = self._text(length)
        self.advance(length)
        return name

    def _suggest_raw(self) -> NoReturn:
        raise RawIdentifierError(self._text(self._matched(_RAW_WORD)))

    def struct_name(self, name: str) -> None:
        """Skip the struct's name, which may stand before its opening parenthesis. Raises: RonError: another name."""
        if not self._matched(_WORD):
            return
        try:
            found = self.identifier()
        except RonError as error:
            if isinstance(error, RawIdentifierError) and error.name == name:
                raise
            raise RonError("invalid_type", f"Expected opening `(` for struct {ident(name)}") from None
        if found != name:
            raise RonError("invalid_type", f"Expected struct {ident(name)} but found {ident(found)}")

    def is_tuple(self) -> bool:
        """Whether the parenthesis that opens here holds values without names. Only looks ahead."""
        here = self.offset
        try:
            self.advance(1)
            self.skip_space()
            try:
                self.identifier()
            except RonError:
                return True
            self.skip_space()
            return self.peek_or_end() != ord(":")
        finally:
            self.offset = here

    # ---- numbers

    def unsigned(self, maximum: int) -> int:
        return self._digits(maximum)

    def signed(self, minimum: int, maximum: int) -> int:
        byte = self.peek_or_end()
        if byte in b"+-":
            self.advance(1)
        return -self._digits(-minimum) if byte == ord("-") else self._digits(maximum)

    def is_float(self) -> bool:
        """Whether more characters fit a floating point number than an integer."""
        sign = 1 if self.peek() in (ord("+"), ord("-")) else 0
        return self._matched(_FLOAT, sign) > self._matched(_INTEGER, sign)

    def float_number(self) -> float:
        for word in _FLOAT_WORDS:
            if self.consume_word(word):
                return float(word)
        spelling = self._text(self._matched(_FLOAT))
        if "_" in spelling:
            self.advance(spelling.index("_"))
            raise RonError("ron_syntax", "Unexpected underscore in float")
        self.advance(len(spelling))
        try:
            return float(spelling)
        except ValueError:
            raise RonError("ron_syntax", "Expected float") from None

    def _digits(self, maximum: int) -> int:
        base = _BASES.get(self._bytes[self.offset : self.offset + 2], 10)
        if base != 10:
            self.advance(2)
        digits = self._text(self._matched(_INTEGER))
        if not digits:
            raise RonError("invalid_type", "Expected integer")
        if digits.startswith("_"):
            raise RonError("ron_syntax", "Unexpected leading underscore in an integer")
        self.advance(len(digits))
        value = 0
        for digit in digits.replace("_", ""):
            if value * base > maximum:
                raise RonError("invalid_value", "Integer is out of bounds")
            if int(digit, 16) >= base:
                raise RonError("invalid_type", "Expected integer")
            value = value * base + int(digit, 16)
            if value > maximum:
                raise RonError("invalid_value", "Integer is out of bounds")
        return value

    # ---- other scalars

    def boolean(self) -> bool:
        if self.consume("true"):
            return True
        if self.consume("false"):
            return False
        raise RonError("invalid_type", "Expected boolean")

    def character(self) -> str:
        if not self.consume("'"):
            raise RonError("ron_syntax", "Expected char")
        if self.peek_or_end() == ord("\\"):
            self.advance(1)
            character = self._escape()
        else:
            character = self._plain_character()
        if not self.consume("'"):
            raise RonError("ron_syntax", "Expected char")
        return character

    def _plain_character(self) -> str:
        length = self._bytes.find(b"'", self.offset, self.offset + 5) - self.offset
        text = self._text(length) if length > 0 else ""
        if len(text) != 1:
            raise RonError("ron_syntax", "Expected char")
        self.advance(length)
        return text

    def string(self) -> str:
        """A string in quotes, or a raw one: `r#"..."#`."""
        if self.consume('"'):
            return self._escaped_string()
        if self.consume("r"):
            return self._raw_string()
        raise RonError("invalid_type", "Expected string")

    def _escaped_string(self) -> str:
        parts: list[str] = []
        while True:
            found = _STRING_STOP.search(self._bytes, self.offset)
            if found is None:
                raise RonError("ron_syntax", "Expected end of string" if not parts else END)
            length = found.start() - self.offset
            parts.append(self._text(length))
            self.advance(length + 1)
            if found.group() == b'"':
                return "".join(parts)
            parts.append(self._escape())

    def _raw_string(self) -> str:
        hashes = self._matched(re.compile(rb"#*"))
        self.advance(hashes)
        if not self.consume('"'):
            raise RonError("invalid_type", "Expected string")
        end = self._bytes.find(b'"' + b"#" * hashes, self.offset)
        if end < 0:
            raise RonError("ron_syntax", "Expected end of string")
        text = self._text(end - self.offset)
        self.advance(end - self.offset + 1 + hashes)
        return text

    def _escape(self) -> str:
        byte = self._take_byte()
        if byte in _SIMPLE_ESCAPES:
            return _SIMPLE_ESCAPES[byte]
        if byte == ord("x"):
            return chr(16 * self._hex_digit() + self._hex_digit())
        if byte == ord("u"):
            return self._unicode_escape()
        raise RonError("ron_syntax", "Unknown escape character")

    def _unicode_escape(self) -> str:
        self.expect_byte("{", "Missing { in Unicode escape")
        value = count = 0
        while count < 6 and self.peek_or_end() != ord("}"):
            value, count = 16 * value + self._hex_digit(), count + 1
        if not count:
            raise RonError("ron_syntax", "Expected 1-6 digits, got 0 digits in Unicode escape")
        self.expect_byte("}", "No } at the end of Unicode escape")
        if value > 0x10FFFF or 0xD800 <= value <= 0xDFFF:
            raise RonError("ron_syntax", "Not a valid char")
        return chr(value)

    def _hex_digit(self) -> int:
        byte = self._take_byte()
        if byte not in _HEX:
            raise RonError("ron_syntax", "Non-hex digit found")
        return int(chr(byte), 16)


def _shown_byte(byte: int) -> str:
    """A byte in an error text; a quote or a control character is escaped."""
    return {0: "\\0", 9: "\\t", 10: "\\n", 13: "\\r", 39: "\\'", 92: "\\\\"}.get(byte) or (
        chr(byte) if 32 <= byte < 127 or byte > 160 else f"\\u{{{byte:x}}}"
    )
