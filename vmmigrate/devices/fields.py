"""Field types of device payloads: each bound is written once, in the annotation of a dataclass field.

A payload's *shape* is a frozen dataclass whose annotations carry a `FieldType` (`reg: U8`). From it come the strict
decoder, the encoder and the schema text whose hash tells that a shape changed. Decoding is strict because a field that
is dropped in silence is state that the guest loses: unknown, missing and out-of-range fields are all problems, and all
of them are reported, each with its path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, get_type_hints

Problems = list[str]
Path = str | None  # of a field within a body; None: nobody wants to know, and making it costs as much as checking


class FieldType(Protocol):
    """One kind of value: how it is checked, written and described."""

    def decode(self, tree: Any, path: Path, problems: Problems) -> Any:
        """The value of *tree*; what is wrong is added to *problems* and the result is then meaningless."""

    def encode(self, value: Any) -> Any: ...

    def describe(self) -> str:
        """The text that the schema hash is made of."""


@dataclass(frozen=True, slots=True)
class Integer:
    low: int
    high: int

    def decode(self, tree: Any, path: Path, problems: Problems) -> Any:
        if type(tree) is not int or not self.low <= tree <= self.high:
            problems.append(f"{path}: {_shown(tree)}, allowed is an integer from {self.low} to {self.high}")
        return tree

    def encode(self, value: Any) -> Any:
        return value

    def describe(self) -> str:
        return f"int {self.low}..{self.high}"


@dataclass(frozen=True, slots=True)
class Bits:
    """A register of which only the bits of *allowed* exist."""

    allowed: int

    def decode(self, tree: Any, path: Path, problems: Problems) -> Any:
        if type(tree) is not int or tree < 0 or tree & ~self.allowed:
            problems.append(f"{path}: {_shown(tree)}, which has unknown bits; allowed are those of {self.allowed:#x}")
        return tree

    def encode(self, value: Any) -> Any:
        return value

    def describe(self) -> str:
        return f"bits {self.allowed:#x}"


@dataclass(frozen=True, slots=True)
class Boolean:
    def decode(self, tree: Any, path: Path, problems: Problems) -> Any:
        if type(tree) is not bool:
            problems.append(f"{path}: {_shown(tree)}, allowed is true or false")
        return tree

    def encode(self, value: Any) -> Any:
        return value

    def describe(self) -> str:
        return "bool"


@dataclass(frozen=True, slots=True)
class Octets:
    """Bytes; the length is bounded, the content is free."""

    shortest: int
    longest: int

    def decode(self, tree: Any, path: Path, problems: Problems) -> Any:
        if type(tree) is not bytes or not self.shortest <= len(tree) <= self.longest:
            problems.append(f"{path}: {_shown(tree)}, allowed are {self.shortest} to {self.longest} bytes")
        return tree

    def encode(self, value: Any) -> Any:
        return bytes(value)

    def describe(self) -> str:
        return f"bytes {self.shortest}..{self.longest}"


@dataclass(frozen=True, slots=True)
class Text:
    """Unicode of at most *longest* characters; one of *allowed* when that is given."""

    longest: int
    allowed: tuple[str, ...] = ()

    def decode(self, tree: Any, path: Path, problems: Problems) -> Any:
        if type(tree) is not str or len(tree) > self.longest or (self.allowed and tree not in self.allowed):
            choice = f"one of {', '.join(self.allowed)}"
            wanted = choice if self.allowed else f"text of at most {self.longest} characters"
            problems.append(f"{path}: {_shown(tree)}, allowed is {wanted}")
        return tree

    def encode(self, value: Any) -> Any:
        return str(value)

    def describe(self) -> str:
        return f"text {self.longest} {'|'.join(self.allowed)}".rstrip()


@dataclass(frozen=True, slots=True)
class ListOf:
    item: FieldType
    shortest: int
    longest: int

    def decode(self, tree: Any, path: Path, problems: Problems) -> Any:
        if not isinstance(tree, list) or not self.shortest <= len(tree) <= self.longest:
            problems.append(f"{path}: {_shown(tree)}, allowed is a list of {self.shortest} to {self.longest} items")
            return ()
        decode = self.item.decode
        if path is None:
            return tuple([decode(item, None, problems) for item in tree])
        return tuple([decode(item, f"{path}[{n}]", problems) for n, item in enumerate(tree)])

    def encode(self, value: Any) -> Any:
        return [self.item.encode(item) for item in value]

    def describe(self) -> str:
        return f"list {self.shortest}..{self.longest} of ({self.item.describe()})"


@dataclass(frozen=True, slots=True)
class Maybe:
    """A value or None; the field itself must be there."""

    item: FieldType

    def decode(self, tree: Any, path: Path, problems: Problems) -> Any:
        return None if tree is None else self.item.decode(tree, path, problems)

    def encode(self, value: Any) -> Any:
        return None if value is None else self.item.encode(value)

    def describe(self) -> str:
        return f"maybe ({self.item.describe()})"


@dataclass(frozen=True, slots=True)
class Scalars:
    """A flat map from names to integers, texts and booleans: the parameters of a program."""

    most: int

    def decode(self, tree: Any, path: Path, problems: Problems) -> Any:
        if not isinstance(tree, Mapping) or len(tree) > self.most:
            problems.append(f"{path}: {_shown(tree)}, allowed is a map of at most {self.most} entries")
            return {}
        for key, value in tree.items():
            if type(key) is not str or len(key) > 64 or not _is_scalar(value):
                problems.append(f"{path}.{str(key)[:64]}: allowed are short names and integers, texts or booleans")
        return dict(tree)

    def encode(self, value: Any) -> Any:
        return dict(value)

    def describe(self) -> str:
        return f"scalars {self.most}"


@dataclass(frozen=True, slots=True)
class Struct:
    """A nested shape."""

    shape: type[Any]

    def decode(self, tree: Any, path: Path, problems: Problems) -> Any:
        table = fields_of(self.shape)
        if type(tree) is not dict:
            problems.append(f"{path or 'body'}: {_shown(tree)}, allowed is a map of {', '.join(table)}")
            return None
        before = len(problems)
        if tree.keys() != table.keys():
            problems.extend(f"{_join(path, str(name)[:64])}: unknown field" for name in tree if name not in table)
            problems.extend(f"{_join(path, name)}: missing" for name in table if name not in tree)
        if path is None and len(problems) == before:
            values = {name: kind.decode(tree[name], None, problems) for name, kind in table.items()}
        else:
            values = {
                name: kind.decode(tree[name], _join(path, name), problems)
                for name, kind in table.items()
                if name in tree
            }
        return self.shape(**values) if len(problems) == before else None

    def encode(self, value: Any) -> Any:
        return {name: kind.encode(getattr(value, name)) for name, kind in fields_of(self.shape).items()}

    def describe(self) -> str:
        return "{" + ", ".join(f"{name}: {kind.describe()}" for name, kind in fields_of(self.shape).items()) + "}"


def decode_body(shape: type[Any], tree: Any) -> tuple[Any, Problems]:
    """A whole body as *shape*, and all that is wrong with it, each with its path; then the body means nothing."""
    problems: Problems = []
    body = Struct(shape).decode(tree, None, problems)
    if problems:
        problems.clear()
        Struct(shape).decode(tree, "", problems)
    return body, problems


U8 = Annotated[int, Integer(0, 0xFF)]
U16 = Annotated[int, Integer(0, 0xFFFF)]
U32 = Annotated[int, Integer(0, 0xFFFF_FFFF)]
U64 = Annotated[int, Integer(0, (1 << 64) - 1)]
I64 = Annotated[int, Integer(-(1 << 63), (1 << 63) - 1)]
Flag = Annotated[bool, Boolean()]


_tables: dict[type[Any], Mapping[str, FieldType]] = {}


def fields_of(shape: type[Any]) -> Mapping[str, FieldType]:
    """The field table of a shape, in order.

    Raises:
        TypeError: A field without a field type: found when the registry is built, not when a guest moves.
    """
    if shape not in _tables:
        _tables[shape] = _read_fields(shape)
    return _tables[shape]


def _read_fields(shape: type[Any]) -> Mapping[str, FieldType]:
    hints = get_type_hints(shape, include_extras=True)
    table: dict[str, FieldType] = {}
    for field in dataclasses.fields(shape):
        metadata: Sequence[Any] = getattr(hints[field.name], "__metadata__", ())
        if not metadata:
            raise TypeError(f"{shape.__name__}.{field.name} has no field type")
        table[field.name] = metadata[0]
    return table


def _is_scalar(value: Any) -> bool:
    return type(value) in (int, bool) or (type(value) is str and len(value) <= 4096)


def _join(path: Path, name: str) -> str:
    return f"{path}.{name}" if path else name


def _shown(tree: Any) -> str:
    """What stands there, without ever showing contents: device state may hold the guest's secrets."""
    if type(tree) in (int, bool) or tree is None:
        return f"is {str(tree)[:40]}"
    if isinstance(tree, (bytes, str, list, Mapping)):
        return f"is {type(tree).__name__} of length {len(tree)}"
    return f"is {type(tree).__name__}"
