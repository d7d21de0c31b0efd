"""Counting the objects of a msgpack body agrees with the unpacker about what a body is."""

from __future__ import annotations

import contextlib
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmmigrate.packed import check_shape

PLAIN: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, width=32)
    | st.text(max_size=40)
    | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=4), inner, max_size=20),
    max_leaves=30,
)


def count(value: Any) -> int:
    if isinstance(value, list):
        return 1 + sum(map(count, value))
    if isinstance(value, dict):
        return 1 + sum(count(name) + count(entry) for name, entry in value.items())
    return 1


@given(PLAIN, st.booleans())
def test_a_body_has_exactly_the_objects_that_were_packed(value: Any, single: bool) -> None:
    body = msgpack.packb(value, use_single_float=single)
    objects = count(value)

    check_shape(body, objects)
    with pytest.raises(ValueError, match=f"more than {objects - 1} objects"):
        check_shape(body, objects - 1)


@given(PLAIN, st.data())
def test_a_body_that_is_cut_or_goes_on_is_refused(value: Any, draw: st.DataObject) -> None:
    body = msgpack.packb(value)
    cut = draw.draw(st.integers(0, len(body) - 1))

    for wrong in (body[:cut], body + b"\x00"):
        with pytest.raises(ValueError, match=r"cut off|bytes after the end"):
            check_shape(wrong, 1 << 20)


@given(st.binary(max_size=100))
@example(b"\x82\x90\x00\x00")  # cut off, behind a name that is a list
@example(b"\x81\x90\x00\x00")
def test_what_passes_is_unpacked_and_what_is_refused_would_be_refused(body: bytes) -> None:
    """But for text that is not UTF-8 and names that are lists or maps, which only the unpacker sees."""
    try:
        check_shape(body, 1 << 20)
    except ValueError as refusal:
        if "none of ours" not in str(refusal):
            with pytest.raises((ValueError, TypeError)):  # whichever it comes upon first
                msgpack.unpackb(body, raw=True, strict_map_key=False)
        return
    with contextlib.suppress(TypeError):  # unhashable
        msgpack.unpackb(body, raw=True, strict_map_key=False)


@pytest.mark.parametrize("tag", [0xC1, *range(0xC7, 0xCA), *range(0xD4, 0xD9)])
def test_extension_types_and_the_format_that_is_never_used_are_refused(tag: int) -> None:
    with pytest.raises(ValueError, match="none of ours"):
        check_shape(bytes([tag]) + bytes(20), 100)


@pytest.mark.parametrize("header", ["dd ffffffff", "df ffffffff", "dc ffff", "de ffff", "db ffffffff", "c6 ffffffff"])
def test_an_announcement_without_bytes_for_it_is_cut_off(header: str) -> None:
    with pytest.raises(ValueError, match=r"cut off|more than"):
        check_shape(bytes.fromhex(header) + b"\x00" * 100, 1 << 40)
