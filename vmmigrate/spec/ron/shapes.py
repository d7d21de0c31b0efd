"""Reading RON by the field tables: one reader for each codec that the types of protocol version 0 use.

A reader is what the reference implementation derives from the type: in which order fields are asked for, what may be
missing, and which words an error has. JSON is read by the codecs themselves; their rules are stricter on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final, TypeAlias

from vmmigrate.spec import v1
from vmmigrate.spec.decode import (
    BoolCodec,
    Bytes,
    Codec,
    Enumeration,
    Integer,
    KeyCodec,
    KeyedMap,
    ListOf,
    NewtypeCodec,
    Nullable,
    SetOf,
    Struct,
    StructCodec,
    Tagged,
    TextCodec,
    UuidCodec,
)
from vmmigrate.spec.keys import in_key_order, spec_key, uuid_or_none, why_no_uuid
from vmmigrate.spec.requests import VersionedV0
from vmmigrate.spec.ron.faults import (
    RonError,
    VariantError,
    duplicate_field,
    missing_field,
    unexpected,
    unknown_field,
    wrong_length,
)
from vmmigrate.spec.ron.kept import Kept
from vmmigrate.spec.ron.source import (
    DONE,
    NONE,
    UNIT,
    Content,
    Elements,
    Members,
    Signed,
    Source,
    Unsigned,
    Variant,
    Visitor,
    shown,
)
from vmmigrate.spec.wire_v0 import ExternallyTagged, MigrateError

Reader: TypeAlias = Callable[[Source], Any]

# Where their names differ from ours. Names of structs may stand in the text; all of them stand in error texts.
_STRUCT_NAMES: Final[dict[type, str]] = {v1.PciPath: "Raw"}
_ENUM_NAMES: Final[dict[type, str]] = {
    v1.I440Fx: "Chipset",
    v1.Bhyve: "GuestHypervisorInterface",
    v1.VirtioDisk: "Component",
    v1.HyperVFeature: "HyperVFeatureFlag",
    VersionedV0: "VersionedInstanceSpec",
}
# Variants that have fields of their own; the content of all others is a struct, or nothing.
_STRUCT_VARIANTS: Final = frozenset({v1.HyperV})

_INTEGER_NAMES: Final = {2**8 - 1: "u8", 2**32 - 1: "u32", 2**64 - 1: "u64"}


@cache
def reader_of(codec: Codec) -> Reader:
    """What reads a value of this codec."""
    return next(make(codec) for kind, make in _MAKERS if isinstance(codec, kind))


# ---- scalars


class _Scalar(Visitor):
    """Takes content as it is. Sources offer only what they were asked for."""

    def __init__(self, expecting: str) -> None:
        self.expecting = expecting

    def scalar(self, content: Content) -> Any:
        return content


class _Number(Visitor):
    """An integer. Theirs have 8, 32 or 64 bits; narrower limits are checked by the struct that has the field."""

    def __init__(self, codec: Integer) -> None:
        self.maximum = next(limit for limit in _INTEGER_NAMES if limit >= codec.maximum)
        self.expecting = "a nonzero usize" if codec.minimum else _INTEGER_NAMES[self.maximum]
        self._minimum = codec.minimum

    def scalar(self, content: Content) -> int:
        if isinstance(content, (Unsigned, Signed)) and self._minimum <= content.value <= self.maximum:
            return content.value
        raise unexpected(shown(content), self.expecting)


class _UuidText(Visitor):
    expecting = "a formatted UUID string"

    def scalar(self, content: Content) -> Any:
        uuid = uuid_or_none(content)
        if uuid is None:
            raise RonError("invalid_value", f"UUID parsing failed: {why_no_uuid(content)}")
        return uuid


class _Name(Visitor):
    """The name of a field or variant, or its index. Gives None for a name that is unknown."""

    def __init__(self, names: Sequence[str], expecting: str) -> None:
        self._names, self.expecting = names, expecting
        self.unknown: Content = None

    def scalar(self, content: Content) -> str | None:
        if isinstance(content, str) and content in self._names:
            return content
        if isinstance(content, Unsigned) and content.value < len(self._names):
            return self._names[content.value]
        self.unknown = content
        return None


def _read_text(source: Source) -> Any:
    return source.text(_Scalar("a string"))


def _read_bool(source: Source) -> Any:
    return source.boolean(_Scalar("a boolean"))


def _read_key(source: Source) -> Any:
    content = source.content()
    if not isinstance(content, str):
        raise RonError("invalid_type", "data did not match any variant of untagged enum SpecKey")
    return spec_key(content)


def _integer(codec: Integer) -> Reader:
    visitor = _Number(codec)
    return lambda source: source.unsigned(visitor.maximum, visitor)


def _variant_name(variant: Variant, names: Sequence[str]) -> str:
    visitor = _Name(names, "variant identifier")
    name: str | None = variant.name(lambda source: source.identifier(visitor))
    if name is not None:
        return name
    if isinstance(visitor.unknown, str):
        raise VariantError(visitor.unknown, names)
    raise unexpected(shown(visitor.unknown), f"variant index 0 <= i < {len(names)}")


class _UnitVariant(Visitor):
    """A variant without fields, of an enum or of a tag."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def variant(self, variant: Variant) -> str:
        name = _variant_name(variant, self._names)
        variant.unit()
        return name


def _enumeration(codec: Enumeration) -> Reader:
    members = {member.value: member for member in codec.type}
    name, visitor = _ENUM_NAMES.get(codec.type, codec.type.__name__), _UnitVariant(tuple(members))
    return lambda source: members[source.enum(name, visitor)]


class _OneOfErrors(Visitor):
    """A variant with its name outside: nothing, one field, or a tuple of fields."""

    def __init__(self, codec: ExternallyTagged) -> None:
        self._codec = codec

    def variant(self, variant: Variant) -> MigrateError:
        name = _variant_name(variant, tuple(self._codec.variants))
        readers = [reader_of(codec) for codec in self._codec.variants[name]]
        if not readers:
            variant.unit()
            return MigrateError(name)
        if len(readers) == 1:
            return MigrateError(name, (variant.newtype(readers[0]),))
        expecting = f"tuple variant {self._codec.name}::{name} with {len(readers)} elements"
        return MigrateError(name, variant.tuple(_Row(readers, expecting)))


def _external(codec: ExternallyTagged) -> Reader:
    return lambda source: source.enum(codec.name, _OneOfErrors(codec))


# ---- containers


class _Optional(Visitor):
    expecting = "option"

    def __init__(self, read: Reader) -> None:
        self._read = read

    def scalar(self, content: Content) -> None:
        return None  # only asked about none

    def some(self, source: Source) -> Any:
        return self._read(source)


def _nullable(codec: Nullable) -> Reader:
    visitor = _Optional(reader_of(codec.item))
    return lambda source: source.option(visitor)


class _Sequence(Visitor):
    expecting = "a sequence"

    def __init__(self, read: Reader) -> None:
        self._read = read

    def elements(self, elements: Elements) -> tuple[Any, ...]:
        items = []
        while (item := elements.next(self._read)) is not DONE:
            items.append(item)
        return tuple(items)


def _list(codec: ListOf) -> Reader:
    visitor = _Sequence(reader_of(codec.item))
    return lambda source: source.sequence(visitor)


def _set(codec: SetOf) -> Reader:
    visitor = _Sequence(reader_of(codec.item))
    return lambda source: tuple(sorted(set(source.sequence(visitor))))


class _Row(Visitor):
    """As many elements as there are readers."""

    def __init__(self, readers: Sequence[Reader], expecting: str) -> None:
        self._readers, self.expecting = readers, expecting

    def elements(self, elements: Elements) -> tuple[Any, ...]:
        items: list[Any] = []
        for read in self._readers:
            item = elements.next(read)
            if item is DONE:
                raise wrong_length(len(items), self.expecting)
            items.append(item)
        return tuple(items)


def _bytes(codec: Bytes) -> Reader:
    visitor = _Row([reader_of(Integer(255))] * codec.length, f"an array of length {codec.length}")
    return lambda source: bytes(source.fixed(visitor))


class _Keyed(Visitor):
    expecting = "a map"

    def __init__(self, read: Reader) -> None:
        self._read = read

    def members(self, members: Members) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        while (key := members.next_key(_read_key)) is not DONE:
            values[key] = members.value(self._read)
        return in_key_order(values)


def _map(codec: KeyedMap) -> Reader:
    visitor = _Keyed(reader_of(codec.item))
    return lambda source: source.mapping(visitor)


# ---- structs


class _Fields(Visitor):
    """The fields of a struct, by their names; of a kept list, by their order."""

    def __init__(self, codec: StructCodec, title: str, *, takes_lists: bool = True) -> None:
        self._codec, self.expecting, self._takes_lists = codec, title, takes_lists
        # A PCI path is checked as a whole, later.
        self._make: Callable[..., Any] = dict if codec.model is v1.PciPath else codec.model
        self._fields = {field.name: (field, reader_of(field.codec)) for field in codec.fields}

    def members(self, members: Members) -> Any:
        values: dict[str, Any] = {}
        while (name := members.next_key(self._name)) is not DONE:
            if name is None:
                members.value(lambda source: source.ignored())
                continue
            assert isinstance(name, str), "names come from the table"
            if name in values:
                raise duplicate_field(name)
            values[name] = members.value(self._fields[name][1])
        for field, _ in self._fields.values():
            may_be_missing = field.is_omitted_by_default or isinstance(field.codec, Nullable)
            if field.name not in values and not may_be_missing:
                raise missing_field(field.name)
        return self._make(**values)

    def elements(self, elements: Elements) -> Any:
        if not self._takes_lists:
            return super().elements(elements)
        values: dict[str, Any] = {}
        for index, (field, read) in enumerate(self._fields.values()):
            item = elements.next(read)
            if item is not DONE:
                values[field.name] = item
            elif not field.is_omitted_by_default:
                plural = "element" if len(self._fields) == 1 else "elements"
                raise wrong_length(index, f"{self.expecting} with {len(self._fields)} {plural}")
        return self._make(**values)

    def _name(self, source: Source) -> str | None:
        visitor = _Name(self._codec.names, "field identifier")
        name: str | None = source.identifier(visitor)
        if name is None and self._codec.strict:
            if isinstance(visitor.unknown, str):
                raise unknown_field(visitor.unknown, self._codec.names)
            raise unexpected(shown(visitor.unknown), f"field index 0 <= i < {len(self._codec.names)}")
        return name


def _struct(codec: StructCodec) -> Reader:
    name = _STRUCT_NAMES.get(codec.model, codec.model.__name__)
    visitor = _Fields(codec, f"struct {name}")
    if codec.model is v1.PciPath:
        return lambda source: v1.PciPath(**_within_limits(source.struct(name, visitor)))
    return lambda source: source.struct(name, visitor)


def _within_limits(values: dict[str, int]) -> dict[str, int]:
    """A PCI path's numbers. Theirs are bytes first, and checked once all have been read."""
    for name, limit in (("device", 31), ("function", 7)):
        if values[name] > limit:
            raise RonError("invalid_value", f"PCI {name} {values[name]} outside range of 0-{limit}")
    return values


# ---- tagged enums


class _Envelope(Visitor):
    """An adjacently tagged enum: a tag and a content, in either order; of a kept list, the tag first."""

    def __init__(self, codec: Tagged, title: str) -> None:
        self._codec, self.title = codec, title
        self.expecting = f"adjacently tagged enum {title}"
        self._tag_visitor = _UnitVariant(tuple(codec.variants))
        self._readers = {name: _content_reader(model, title) for name, model in codec.variants.items()}

    def members(self, members: Members) -> Any:
        first = members.next_key(self._key)
        if first is DONE:
            raise missing_field(self._codec.tag)
        if first == self._codec.tag:
            return self._tag_first(members)
        content = members.value(lambda source: source.content())
        second = members.next_key(self._key)
        if second is DONE:
            raise missing_field(self._codec.tag)
        if second == self._codec.content:
            raise duplicate_field(self._codec.content)
        read = self._readers[members.value(self._tag)]
        return self._last(members, read(Kept(content)))

    def elements(self, elements: Elements) -> Any:
        tag = elements.next(self._tag)
        if tag is DONE:
            raise wrong_length(0, self.expecting)
        assert isinstance(tag, str), "names come from the table"
        content = elements.next(self._readers[tag])
        if content is DONE:
            raise wrong_length(1, self.expecting)
        return content

    def _tag_first(self, members: Members) -> Any:
        tag: str = members.value(self._tag)
        second = members.next_key(self._key)
        if second == self._codec.tag:
            raise duplicate_field(self._codec.tag)
        if second is DONE:
            if self._codec.variants[tag].table.names:
                raise missing_field(self._codec.content)
            return self._codec.variants[tag]()
        return self._last(members, members.value(self._readers[tag]))

    def _last(self, members: Members, value: Any) -> Any:
        further = members.next_key(self._key)
        if further is not DONE:
            raise duplicate_field(str(further))
        return value

    def _key(self, source: Source) -> str:
        expecting = f'"{self._codec.tag}" or "{self._codec.content}"'
        visitor = _Name((self._codec.tag, self._codec.content), expecting)
        name: str | None = source.identifier(visitor)
        if name is None:
            raise unexpected(shown(visitor.unknown), expecting)
        return name

    def _tag(self, source: Source) -> str:
        name: str = source.enum(self.title, self._tag_visitor)
        return name


class _NoContent(Visitor):
    def __init__(self, model: type[Struct], title: str) -> None:
        self._model = model
        self.expecting = f"unit variant {title}::{model.__name__}"

    def scalar(self, content: Content) -> Any:
        return self._model() if content is UNIT or content is NONE else super().scalar(content)


def _content_reader(model: type[Struct], title: str) -> Reader:
    table = model.table
    if not table.names:
        nothing = _NoContent(model, title)
        return lambda source: source.any(nothing)
    if isinstance(table, StructCodec) and model in _STRUCT_VARIANTS:
        fields = _Fields(table, f"struct variant {title}::{model.__name__}", takes_lists=False)
        return lambda source: source.any(fields)
    return reader_of(table)


def _tagged(codec: Tagged) -> Reader:
    title = _ENUM_NAMES[next(iter(codec.variants.values()))]
    visitor = _Envelope(codec, title)
    return lambda source: source.struct(title, visitor)


def _newtype(codec: NewtypeCodec) -> Reader:
    read = reader_of(codec.inner)
    return lambda source: codec.model(**{codec.names[0]: read(source)})


_MAKERS: Final[tuple[tuple[type[Codec], Callable[[Any], Reader]], ...]] = (
    (TextCodec, lambda _: _read_text),
    (BoolCodec, lambda _: _read_bool),
    (KeyCodec, lambda _: _read_key),
    (UuidCodec, lambda _: lambda source: source.text(_UuidText())),
    (Integer, _integer),
    (Enumeration, _enumeration),
    (ExternallyTagged, _external),
    (Bytes, _bytes),
    (Nullable, _nullable),
    (SetOf, _set),
    (ListOf, _list),
    (KeyedMap, _map),
    (StructCodec, _struct),
    (NewtypeCodec, _newtype),
    (Tagged, _tagged),
)
