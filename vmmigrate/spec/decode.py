"""Field tables: what each type of a spec looks like in JSON, read and written by one description.

A version module declares its types as `Struct`s, frozen pydantic models whose annotations carry a `Codec`. The
table that reads and writes a struct is made from these annotations once, when the class is created; pydantic holds
the result and checks values that code makes by hand, but never sees text.

What the reader is strict about (each is a rule of the types that we are compatible with):

* no coercion: `1.0`, `"1"` and `true` are no integers, and integers have a width;
* a field that occurs twice is an error, also when both values are the same;
* unknown fields are rejected or ignored type by type (`unknown_fields`);
* in a tagged enum the content may come before its tag. It then has to be sound as a whole, while a value that is
  ignored and comes after the tag may hold a lone surrogate or a number out of range.

What it refuses although their deserialiser tolerates it: a struct or a tagged enum given as an array of its fields,
and `{"com1": null}` in place of `"com1"`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Final

from pydantic import BaseModel, ConfigDict, Field

from vmmigrate.jsontext import Flaw, Float, Json, JsonObject, find_flaw
from vmmigrate.spec.keys import SpecKey, Uuid, in_key_order, spec_key, uuid_or_none


class DecodeError(Exception):
    """A tree that is not a value of the type. `path` grows from the inside out while the error climbs."""

    def __init__(self, code: str, text: str, *path: str | int) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.reversed_path: list[str | int] = list(path)

    @property
    def path(self) -> tuple[str | int, ...]:
        return tuple(reversed(self.reversed_path))


class Codec(ABC):
    """Reads a JSON tree into a value, or raises DecodeError; writes a value as plain dicts, lists and scalars."""

    @abstractmethod
    def read(self, node: Json) -> Any: ...

    def write(self, value: Any) -> Any:
        return value


def mismatch(node: Json, expected: str) -> DecodeError:
    """The error for a value of the wrong type. It names the kind of value, never its content: that can be a secret."""
    if isinstance(node, Flaw):
        return DecodeError(node.code, f"{node.text}, expected {expected}")
    if isinstance(node, bool):
        found = "true" if node else "false"
    elif isinstance(node, int):
        found = f"integer {node}"
    elif isinstance(node, Float):
        found = f"floating point {node.spelling[:40]}"
    else:
        found = "null" if node is None else _JSON_NAMES[type(node)]
    return DecodeError("invalid_type", f"{found}, expected {expected}")


_JSON_NAMES: Final[dict[type, str]] = {str: "a string", list: "an array", tuple: "an object"}


def listed(names: Iterable[str]) -> str:
    """Names in quotes, for the end of a message."""
    return ", ".join(f"'{name}'" for name in names)


# ---- scalars


class TextCodec(Codec):
    def read(self, node: Json) -> str:
        if type(node) is not str:
            raise mismatch(node, "a string")
        return node


class BoolCodec(Codec):
    def read(self, node: Json) -> bool:
        if type(node) is not bool:
            raise mismatch(node, "true or false")
        return node


class Integer(Codec):
    """An unsigned integer within limits."""

    def __init__(self, maximum: int, minimum: int = 0) -> None:
        self.minimum = minimum
        self.maximum = maximum

    def read(self, node: Json) -> int:
        if type(node) is not int:
            raise mismatch(node, f"an integer {self.minimum}..{self.maximum}")
        if not self.minimum <= node <= self.maximum:
            raise DecodeError("invalid_value", f"integer {node}, allowed {self.minimum}..{self.maximum}")
        return node


class KeyCodec(Codec):
    def read(self, node: Json) -> SpecKey:
        if type(node) is not str:
            raise mismatch(node, "a component key (a string)")
        return spec_key(node)


class UuidCodec(Codec):
    def read(self, node: Json) -> Uuid:
        if type(node) is not str:
            raise mismatch(node, "a UUID (a string)")
        uuid = uuid_or_none(node)
        if uuid is None:
            raise DecodeError("invalid_value", "not a UUID; allowed are 8-4-4-4-12 or 32 hexadecimal digits")
        return uuid


class Enumeration(Codec):
    """One of the texts of a StrEnum."""

    def __init__(self, members: type[StrEnum]) -> None:
        self.type = members
        self._members = {member.value: member for member in members}

    def read(self, node: Json) -> StrEnum:
        if type(node) is not str:
            raise mismatch(node, f"one of {listed(self._members)}")
        member = self._members.get(node)
        if member is None:
            raise DecodeError("unknown_variant", f"unknown name '{node[:40]}', allowed: {listed(self._members)}")
        return member

    def write(self, value: StrEnum) -> str:
        return value.value


class Bytes(Codec):
    """Exactly *length* integers 0..255 in an array."""

    def __init__(self, length: int) -> None:
        self._items = ListOf(Integer(255))
        self.length = length

    def read(self, node: Json) -> bytes:
        values = self._items.read(node)
        if len(values) != self.length:
            raise DecodeError("invalid_value", f"an array of {len(values)}, allowed is one of {self.length} bytes")
        return bytes(values)

    def write(self, value: bytes) -> list[int]:
        return list(value)


TEXT: Final = TextCodec()
BOOL: Final = BoolCodec()
KEY: Final = KeyCodec()

U8 = Annotated[int, Field(ge=0, le=2**8 - 1), Integer(2**8 - 1)]
U32 = Annotated[int, Field(ge=0, le=2**32 - 1), Integer(2**32 - 1)]
U64 = Annotated[int, Field(ge=0, le=2**64 - 1), Integer(2**64 - 1)]
Text = Annotated[str, TEXT]
Flag = Annotated[bool, BOOL]
Key = Annotated[SpecKey, KEY]
UuidText = Annotated[Uuid, UuidCodec()]


# ---- containers


class Nullable(Codec):
    """Null, or a value."""

    def __init__(self, item: Codec) -> None:
        self.item = item

    def read(self, node: Json) -> Any:
        return None if node is None else self.item.read(node)

    def write(self, value: Any) -> Any:
        return None if value is None else self.item.write(value)


class ListOf(Codec):
    """An array of values, order and duplicates kept; a tuple here."""

    def __init__(self, item: Codec) -> None:
        self.item = item

    def read(self, node: Json) -> tuple[Any, ...]:
        if type(node) is not list:
            raise mismatch(node, "an array")
        values = []
        for index, child in enumerate(node):
            try:
                values.append(self.item.read(child))
            except DecodeError as error:
                error.reversed_path.append(index)
                raise
        return tuple(values)

    def write(self, value: Iterable[Any]) -> list[Any]:
        return [self.item.write(item) for item in value]


class SetOf(ListOf):
    """An array whose duplicates merge; a sorted tuple here."""

    def read(self, node: Json) -> tuple[Any, ...]:
        return tuple(sorted(set(super().read(node))))


class KeyedMap(Codec):
    """An object keyed by component keys. Keys that come out equal collide: all must be sound, the last one wins."""

    def __init__(self, item: Codec) -> None:
        self.item = item

    def read(self, node: Json) -> dict[SpecKey, Any]:
        if type(node) is not tuple:
            raise mismatch(node, "an object keyed by component keys")
        values = {}
        for text, child in node:
            try:
                values[spec_key(text)] = self.item.read(child)
            except DecodeError as error:
                error.reversed_path.append(text)
                raise
        return in_key_order(values)

    def write(self, value: Mapping[SpecKey, Any]) -> dict[str, Any]:
        return {key: self.item.write(item) for key, item in in_key_order(value).items()}


# ---- structs


class _OmitDefault:
    """Marks a field that is left out of the output when it has its default value."""


OMIT_DEFAULT: Final = _OmitDefault()


class Table(Codec):
    """What reads and writes one class; `names` are its fields, in the order in which they are written."""

    names: tuple[str, ...]

    @abstractmethod
    def read(self, node: Json) -> Struct: ...


class TableField:
    """One field of a struct: its name and codec, and what happens when it is absent."""

    def __init__(self, name: str, codec: Codec, field: Any) -> None:
        self.name, self.codec, self.default = name, codec, field.default
        self.is_required = field.is_required()
        self.is_omitted_by_default = OMIT_DEFAULT in field.metadata


class StructCodec(Table):
    """The table of a struct: an object with its fields."""

    def __init__(self, model: type[Struct]) -> None:
        self.model = model
        self.strict = model.unknown_fields == "reject"
        self.fields = tuple(TableField(name, _codec_of(field), field) for name, field in model.model_fields.items())
        self.names = tuple(field.name for field in self.fields)
        self._readers = [(field.name, field.codec.read, field.is_required) for field in self.fields]
        self._writers = [
            (field.name, _writer_of(field.codec), field.is_omitted_by_default, field.default) for field in self.fields
        ]

    def read(self, node: Json) -> Struct:
        if type(node) is not tuple:
            raise mismatch(node, f"an object with {listed(self.names) or 'no fields'}")
        members = dict(node)
        if len(members) != len(node):
            self._refuse_duplicates(node)
        values = {}
        for name, read, required in self._readers:
            if name in members:
                try:
                    values[name] = read(members[name])
                except DecodeError as error:
                    error.reversed_path.append(name)
                    raise
            elif required:
                raise DecodeError("missing_field", f"field '{name}' is missing")
        if self.strict and len(values) != len(members):
            unknown = next(name for name in members if name not in values)
            allowed = listed(self.names) or "none"
            raise DecodeError("unknown_field", f"unknown field '{unknown[:40]}', allowed: {allowed}", unknown)
        return self.model(**values)

    def write(self, value: Struct) -> dict[str, Any]:
        values, written = value.__dict__, {}
        for name, write, omit_default, default in self._writers:
            item = values[name]
            if not (omit_default and item == default):
                written[name] = item if write is None else write(item)
        return written

    def _refuse_duplicates(self, node: JsonObject) -> None:
        """Fields twice are an error, unknown ones only where unknown fields are."""
        seen = set()
        for name, _ in node:
            if name in seen and (self.strict or name in self.names):
                raise DecodeError("duplicate_field", f"field '{name[:40]}' occurs twice", name)
            seen.add(name)


class Struct(BaseModel):
    """A JSON object with named fields. Subclasses only declare; the table is made from the annotations."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    unknown_fields: ClassVar[str] = "reject"
    tag: ClassVar[str] = ""
    """Name of this struct as a variant of a tagged enum."""
    table: ClassVar[Table]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.table = StructCodec(cls)


class NewtypeCodec(Table):
    """The table of a newtype: its JSON is that of its only field."""

    def __init__(self, model: type[Newtype]) -> None:
        ((name, field),) = model.model_fields.items()
        self.names = (name,)
        self.model, self.inner = model, _codec_of(field)

    def read(self, node: Json) -> Newtype:
        return self.model(**{self.names[0]: self.inner.read(node)})

    def write(self, value: Newtype) -> Any:
        return self.inner.write(getattr(value, self.names[0]))


class Newtype(Struct):
    """A variant whose content is not an object of its own fields, but another type."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        cls.table = NewtypeCodec(cls)


def _codec_of(field: Any) -> Codec:
    """A field's codec: named in its annotation, or the table of the struct that the field holds."""
    for mark in field.metadata:
        if isinstance(mark, Codec):
            return mark
    if isinstance(field.annotation, type) and issubclass(field.annotation, Struct):
        return field.annotation.table
    raise TypeError(f"no codec for a field of type {field.annotation}")


def _writer_of(codec: Codec) -> Callable[[Any], Any] | None:
    """None when values are written as they are."""
    return None if type(codec).write is Codec.write else codec.write


# ---- tagged enums


class Tagged(Codec):
    """An adjacently tagged enum: an object with the variant's name under one key and its content under another.

    A variant without fields has no content key, or null under it. Whether other keys are rejected is a property of the
    enum; the content is read by the variant's own table.
    """

    def __init__(
        self,
        tag: str,
        content: str,
        *variants: type[Struct],
        strict: bool = True,
        name_of: Callable[[type[Struct]], str] = lambda variant: variant.tag,
    ) -> None:
        self.tag = tag
        self.content = content
        self.strict = strict
        self._keys = frozenset({tag, content})
        self.name_of = name_of
        self.variants: dict[str, type[Struct]] = {name_of(variant): variant for variant in variants}

    def and_also(self, *variants: type[Struct]) -> Tagged:
        """The enum of a newer version: more variants, or newer ones in the place of those of the same name."""
        both = (*self.variants.values(), *variants)
        return Tagged(self.tag, self.content, *both, strict=self.strict, name_of=self.name_of)

    def read(self, node: Json) -> Struct:
        if type(node) is not tuple:
            raise mismatch(node, f"an object with '{self.tag}' and '{self.content}'")
        members = dict(node)
        if len(members) != len(node) or (self.strict and not members.keys() <= self._keys):
            self._refuse_keys(node)
        if self.tag not in members:
            raise DecodeError("missing_field", f"field '{self.tag}' is missing")
        model = self._variant(members[self.tag])
        if self.content not in members:
            return self._without_content(model)
        if self._content_comes_first(node) and (flaw := find_flaw(members[self.content])):
            raise DecodeError(flaw.code, flaw.text, self.content)
        try:
            return self._with_content(model, members[self.content])
        except DecodeError as error:
            error.reversed_path.append(self.content)
            raise

    def write(self, value: Struct) -> dict[str, Any]:
        name = self.name_of(type(value))
        if not value.table.names:
            return {self.tag: name}
        return {self.tag: name, self.content: value.table.write(value)}

    def _content_comes_first(self, node: JsonObject) -> bool:
        return next(key for key, _ in node if key in (self.tag, self.content)) == self.content

    def _variant(self, node: Json) -> type[Struct]:
        if type(node) is not str:
            error = mismatch(node, f"one of {listed(self.variants)}")
        elif (model := self.variants.get(node)) is not None:
            return model
        else:
            error = DecodeError("unknown_variant", f"unknown name '{node[:40]}', allowed: {listed(self.variants)}")
        error.reversed_path.append(self.tag)
        raise error

    def _without_content(self, model: type[Struct]) -> Struct:
        if model.table.names:
            raise DecodeError("missing_field", f"field '{self.content}' is missing")
        return model()

    def _with_content(self, model: type[Struct], node: Json) -> Struct:
        if model.table.names:
            return model.table.read(node)
        if node is not None:
            raise mismatch(node, f"null, as '{model.tag}' has no '{self.content}'")
        return model()

    def _refuse_keys(self, node: JsonObject) -> None:
        seen = set()
        for key, _ in node:
            if key not in (self.tag, self.content):
                if self.strict:
                    allowed = listed((self.tag, self.content))
                    raise DecodeError("unknown_field", f"unknown field '{key[:40]}', allowed: {allowed}", key)
            elif key in seen:
                raise DecodeError("duplicate_field", f"field '{key}' occurs twice", key)
            seen.add(key)


class Sound(Codec):
    """A value without any flaw, ignored values included."""

    def __init__(self, item: Codec) -> None:
        self.item = item

    def read(self, node: Json) -> Any:
        if flaw := find_flaw(node):
            raise DecodeError(flaw.code, flaw.text)
        return self.item.read(node)

    def write(self, value: Any) -> Any:
        return self.item.write(value)


class InternallyTagged(Codec):
    """An enum whose variant's name stands among the variant's own fields, which may refer to the enum itself.

    The whole object is kept before the variant is known, so the outermost one has to be `Sound`.
    """

    def __init__(self, tag: str, variants: Callable[[], Iterable[type[Struct]]]) -> None:
        self._tag = tag
        self._variants = variants

    def read(self, node: Json) -> Struct:
        if type(node) is not tuple:
            raise mismatch(node, f"an object with '{self._tag}'")
        names = [value for key, value in node if key == self._tag]
        if len(names) != 1:
            code, text = ("duplicate_field", "occurs twice") if names else ("missing_field", "is missing")
            raise DecodeError(code, f"field '{self._tag}' {text}")
        variants = {variant.tag: variant for variant in self._variants()}
        if type(names[0]) is not str:
            raise mismatch(names[0], f"one of {listed(variants)}")
        if names[0] not in variants:
            raise DecodeError(
                "unknown_variant", f"unknown name '{names[0][:40]}', allowed: {listed(variants)}", self._tag
            )
        return variants[names[0]].table.read(tuple(member for member in node if member[0] != self._tag))

    def write(self, value: Struct) -> dict[str, Any]:
        return {self._tag: value.tag, **value.table.write(value)}
