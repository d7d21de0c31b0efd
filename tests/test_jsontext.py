"""Promises of the strict JSON reader."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmmigrate import jsontext
from vmmigrate.errors import SpecParseError
from vmmigrate.jsontext import Flaw, Float, Json, Position

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(TEXTS, children, max_size=4),
    max_leaves=20,
)


def tree_of(value: Any) -> Json:
    """The tree that a plain value's text must parse to."""
    if isinstance(value, dict):
        return tuple((key, tree_of(child)) for key, child in value.items())
    if isinstance(value, list):
        return [tree_of(child) for child in value]
    return value


def refusal(text: str | bytes) -> SpecParseError:
    with pytest.raises(SpecParseError) as caught:
        jsontext.parse(text)
    return caught.value


@settings(deadline=None)
@given(VALUES)
def test_every_value_survives_compact_text_and_indented_text(value: Any) -> None:
    text = jsontext.compact(value)

    assert jsontext.parse(text) == tree_of(value)
    assert jsontext.parse(text.encode()) == tree_of(value)
    assert jsontext.parse(json.dumps(value, indent=2, ensure_ascii=True)) == tree_of(value)
    assert jsontext.unparse(jsontext.parse(text)) == text


@settings(deadline=None)
@given(VALUES, st.data())
def test_locate_finds_the_value_at_every_path(value: Any, data: st.DataObject) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False)
    path: list[str | int] = []
    while isinstance(value, dict | list) and value and data.draw(st.booleans()):
        step = data.draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
        value = value[step]
        path.append(step)

    at = jsontext.locate(text, tuple(path))

    rest = "\n".join([text.split("\n")[at.line - 1][at.column - 1 :], *text.split("\n")[at.line :]])
    assert json.JSONDecoder().raw_decode(rest)[0] == value


@pytest.mark.parametrize(
    "spelling", ["1.0", "1e0", "1E+2", "-0", "-0.0", "18446744073709551616", "-9223372036854775809"]
)
def test_a_number_that_is_no_64_bit_integer_keeps_its_spelling(spelling: str) -> None:
    assert jsontext.parse(spelling) == Float(spelling)
    assert jsontext.unparse(jsontext.parse(spelling)) == spelling


@pytest.mark.parametrize("number", [0, -1, 2**64 - 1, -(2**63)])
def test_an_integer_of_64_bits_is_exact(number: int) -> None:
    assert jsontext.parse(str(number)) == number


@pytest.mark.parametrize("spelling", ["1e999", "-1e999", "9" * 400])
def test_a_number_out_of_range_is_a_flaw_and_no_value(spelling: str) -> None:
    tree = jsontext.parse(f'{{"a":[{spelling}]}}')

    assert isinstance(jsontext.find_flaw(tree), Flaw)
    with pytest.raises(ValueError, match="out of range"):
        jsontext.unparse(tree)


def test_duplicate_keys_and_their_order_stay_visible() -> None:
    assert jsontext.parse('{"b":1,"a":2,"b":3}') == (("b", 1), ("a", 2), ("b", 3))


@pytest.mark.parametrize("escape", [r"\ud800", r"\udfff", r"\ud800x", r"\ud800\ud800", r"\uD83D\u0041"])
def test_a_lone_surrogate_is_a_flaw_where_it_stands(escape: str) -> None:
    """Where nobody reads the value it does no harm, so the document as a whole is not refused."""
    tree = jsontext.parse(f'{{"good":1,"bad":"{escape}"}}')

    assert tree == (("good", 1), ("bad", jsontext.LONE_SURROGATE))


def test_a_key_with_a_lone_surrogate_makes_its_object_a_flaw() -> None:
    assert jsontext.parse(r'[{"\ud800":1}]') == [jsontext.LONE_SURROGATE]


def test_an_escaped_surrogate_pair_is_one_character() -> None:
    assert jsontext.parse(r'"\ud83d\ude80"') == "🚀"
    assert jsontext.parse(r'"\\ud800"') == r"\ud800"


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "\ufeff{}", "{'a':1}", "[1,]", '{"a":1,}', "// c\n1", "NaN", "[Infinity]", "-Infinity", '{"a" 1}',
        "[1 2]", "01", "1.", ".5", "+1", "-", "1e", '"\t"', '"\x00"', r'"\x"', r'"\u12"', '"a', "{} {}", "nul", "True",
        "\u00a01", "\x0c1", '{1:2}',
    ],
)  # fmt: skip
def test_what_is_not_json_is_refused_with_its_place(text: str) -> None:
    error = refusal(text)

    assert error.code == "json_syntax"
    assert error.details["line"] >= 1
    assert error.details["column"] >= 1


def test_a_constant_inside_of_a_string_does_not_confuse_the_place() -> None:
    details = refusal('["NaN",\n NaN]').details

    assert (details["path"], details["line"], details["column"]) == ("", 2, 2)


def test_bytes_that_are_not_utf8_are_refused() -> None:
    assert refusal(b'"\xff"').code == "json_encoding"
    assert refusal(b'"\xed\xa0\x80"').code == "json_encoding"


def test_text_that_cannot_be_written_as_utf8_is_refused() -> None:
    assert refusal('"\ud800"').code == "json_encoding"


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_depth_is_capped_and_the_place_of_the_first_bracket_too_many_is_named(opening: str, closing: str) -> None:
    deep = jsontext.MAX_DEPTH

    jsontext.parse(opening * deep + "1" + closing * deep)
    error = refusal(opening * (deep + 1) + "1" + closing * (deep + 1))

    assert error.code == "json_depth"
    assert error.details["column"] == deep * len(opening) + 1


def test_hostile_depth_is_refused_as_depth_and_not_as_a_crash() -> None:
    assert refusal("[" * 1_000_000).code == "json_depth"


def test_brackets_inside_of_strings_are_no_depth() -> None:
    assert jsontext.parse(jsontext.compact(["[" * 500])) == ["[" * 500]


def test_of_duplicate_keys_locate_finds_the_last() -> None:
    assert jsontext.locate('{"a":1,\n"a":2}', ("a",)) == Position(2, 5)


@pytest.mark.parametrize(("text", "path"), [('{"a":1}', ("b",)), ("1", ("a",)), ("[]", (0,))])
def test_of_what_is_not_there_locate_finds_where_it_should_be(text: str, path: jsontext.Path) -> None:
    assert jsontext.locate(text, path) == Position(1, 1)


def test_compact_text_escapes_only_what_must_be() -> None:
    assert jsontext.compact({"é\u2028\x7f": '"\\\n\x01'}) == '{"é\u2028\x7f":"\\"\\\\\\n\\u0001"}'


def test_pointer_escapes_its_two_special_characters() -> None:
    assert jsontext.pointer(("a/b", "~", 0)) == "/a~1b/~0/0"
    assert jsontext.pointer(()) == ""
