"""RON: every row of the real types' verdicts, the rules behind them, and the way there and back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.spec.spec_corpus import FIXTURES, UNHURRIED, VERSIONS, rows, specs
from vmmigrate.errors import SpecParseError
from vmmigrate.jsontext import compact
from vmmigrate.spec import ron, v1
from vmmigrate.spec.captured import KINDS, codec_of, from_ron, to_ron
from vmmigrate.spec.decode import TEXT, Codec, ListOf, Nullable, Tagged
from vmmigrate.spec.document import read_text
from vmmigrate.spec.ron.escapes import quoted
from vmmigrate.spec.ron.faults import RawIdentifierError, VariantError, unknown_field
from vmmigrate.spec.ron.kept import Kept
from vmmigrate.spec.ron.scan import Scanner
from vmmigrate.spec.ron.shapes import reader_of
from vmmigrate.spec.ron.source import Signed, Source, Unsigned, Visitor
from vmmigrate.spec.wire_v0 import DEVICES, ERROR, MigrateError, Preamble

PREAMBLE = Preamble.table
BOARD = "cpus:2,memory_mb:1024,chipset:(type:i440_fx,value:(enable_pcie:false))"
HEAD = f"(instance_spec:(version:V0,spec:(board:({BOARD}),components:"


def preamble(components: str) -> str:
    return f"{HEAD}{{{components}}})),blobs:[])"


def verdict(codec: Codec, text: str) -> str:
    """How the text is written again, or the report about it as the reference implementation words it."""
    try:
        return ron.write(codec, ron.read(codec, text))
    except SpecParseError as error:
        return f"{error.details['line']}:{error.details['column']}: {error.details['reported']}"


def reported(components: str) -> str:
    """The report without its position."""
    return verdict(PREAMBLE, preamble(components)).partition(": ")[2]


# ---- conformance


def test_conformance_of_every_ron_text_offered_to_the_real_decoder_with_position_and_words() -> None:
    """All of them, words and positions too."""
    found = list(rows("ron_cases"))

    for row in found:
        assert verdict(PREAMBLE, row["input"]) == (row["reserialized"] or row["error"]), row["id"]
        if row["accepted"]:
            assert compact(from_ron(row["input"], "preamble")) == compact(row["value"]), row["id"]
    assert len(found) >= 78


def test_conformance_of_every_preamble_that_the_real_server_wrote() -> None:
    found = list(rows("preambles"))

    for row in found:
        value = {"instance_spec": {"version": "V0", "spec": row["spec"]}, "blobs": row["blobs"]}
        assert to_ron(read_text(PREAMBLE, compact(value)), "preamble") == row["ron"], row["id"]
        assert compact(from_ron(row["ron"], "preamble")) == compact(value), row["id"]
        assert row["ron_reparses"], "and so does ours"
        assert row["reparsed_equals_spec"]
    assert len(found) >= 38


@pytest.mark.parametrize(
    ("name", "kind", "at_least"), [("wire_errors", "error", 22), ("wire_device_states", "devices", 2)]
)
def test_conformance_of_errors_and_device_states(name: str, kind: str, at_least: int) -> None:
    found = list(rows(name))

    for row in found:
        assert compact(from_ron(row["ron"], kind)) == compact(row["json"])
        assert to_ron(read_text(codec_of(kind), compact(row["json"])), kind) == row["ron"]
    assert len(found) >= at_least


def test_conformance_of_errors_inside_of_amendments() -> None:
    texts = [
        row[name]
        for row in rows("amend")
        for name in ("error_ron", "error_ron_as_reported_by_destination")
        if name in row
    ]

    assert [verdict(ERROR, text) for text in texts] == texts
    assert texts


@pytest.mark.slow
def test_conformance_of_the_escape_of_every_character() -> None:
    table = json.loads((FIXTURES / "conformance" / "ron_escapes.json").read_text())
    ranges = iter([*table["unicode_escape_ranges"], [0x110000, 0x110000]])
    first, last = next(ranges)

    for code in range(0x110000):
        if code > last:
            first, last = next(ranges)
        escaped = table["short"].get(f"{code:x}") or (f"\\u{{{code:x}}}" if code >= first else chr(code))
        assert 0xD800 <= code <= 0xDFFF or quoted(chr(code)) == f'"{escaped}"', hex(code)


# ---- laws


@UNHURRIED
@given(specs("v1"), st.lists(st.lists(st.integers(0, 255), max_size=4).map(tuple), max_size=2).map(tuple))
def test_a_preamble_that_is_written_is_read_back_as_the_same(spec: v1.InstanceSpec, blobs: Any) -> None:
    value = Preamble.of(spec).model_copy(update={"blobs": blobs})

    text = ron.write(PREAMBLE, value)

    assert ron.read(PREAMBLE, text) == value
    assert from_ron(text, "spec") == v1.InstanceSpec.table.write(spec)
    assert not blobs or to_ron(spec, "spec") != text


@given(st.text(alphabet="(){}[]:,\"'\\/*#!r01x.-+e_ \n\tabSomeNone\u0301é", max_size=30))
def test_any_text_is_read_or_refused_with_a_position(text: str) -> None:
    for codec in (ERROR, DEVICES, PREAMBLE):
        verdict(codec, text)


@given(st.data())
def test_a_preamble_that_is_cut_or_damaged_is_read_or_refused_with_a_position(data: st.DataObject) -> None:
    whole = preamble('"a":(type:serial_port,component:(num:com1)),"b":(component:(enable_isa:true),type:qemu_pvpanic)')
    at = data.draw(st.integers(0, len(whole)))
    patch = data.draw(st.sampled_from(["", "(", ")", ",", '"', "0", "Some(", "/*", "\\", ":"]))

    verdict(PREAMBLE, whole[:at] + patch + whole[at + data.draw(st.integers(0, 3)) :])


# ---- rules: content before its tag


@pytest.mark.parametrize(
    "component",
    [
        "(component:(enable_isa:true),type:qemu_pvpanic)",
        "(component:(true),type:qemu_pvpanic)",
        "(component:[true],type:qemu_pvpanic)",
        '(component:{"enable_isa":true},type:qemu_pvpanic)',
        "(component:{0:true},type:qemu_pvpanic)",
        "(component:AnyName(enable_isa:true),type:qemu_pvpanic)",
    ],
)
def test_a_kept_struct_has_no_name_and_may_be_a_list_or_a_map(component: str) -> None:
    expected = preamble('"p":(type:qemu_pvpanic,component:(enable_isa:true))')

    assert verdict(PREAMBLE, preamble(f'"p":{component}')) == expected


@pytest.mark.parametrize("number", ['"com1"', '{"com1":()}', '{"com1":{}}', "{0:()}"])
def test_a_kept_variant_is_a_string_or_a_map_but_never_a_name(number: str) -> None:
    expected = preamble('"p":(type:serial_port,component:(num:com1))')

    assert verdict(PREAMBLE, preamble(f'"p":(component:(num:{number}),type:serial_port)')) == expected


@pytest.mark.parametrize(
    ("number", "told"),
    [
        ("com1", "Expected string or map but found a unit value instead"),
        ("{}", "Expected map with a single key but found a map instead"),
        ('"com9"', "Unexpected enum variant named `com9`, expected one of `com1`, `com2`, `com3`, `com4` instead"),
        ("{9:()}", "Expected variant index 0 <= i < 4 but found the unsigned integer `9` instead"),
        ('{"com1":1}', "Expected unit but found the unsigned integer `1` instead"),
        ("{1.5:()}", "Expected variant identifier but found the floating point number `1.5` instead"),
    ],
)
def test_other_kept_variants_are_refused(number: str, told: str) -> None:
    assert reported(f'"p":(component:(num:{number}),type:serial_port)') == told


@pytest.mark.parametrize(
    ("workers", "written"),
    [("4", "Some(4)"), ("+4", "Some(4)"), ("Some(4)", "Some(4)"), ("None", "None"), ("()", "None"), ("foo", "None")],
)
def test_a_kept_option_needs_no_some(workers: str, written: str) -> None:
    fields = 'path:"/f",readonly:false,block_size:512,workers:'
    expected = preamble(f'"p":(type:file_storage_backend,component:({fields}{written}))')

    assert verdict(PREAMBLE, preamble(f'"p":(component:({fields}{workers}),type:file_storage_backend)')) == expected


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('("/f",false,512)', "Expected struct FileStorageBackend with 4 elements but found 3 elements instead"),
        ('("/f",false,512,1,2)', "Expected 4 elements in sequence but found 5 elements instead"),
        ('("/f",false,-512,1)', "Expected u32 but found the signed integer `-512` instead"),
        ('("/f",false,1e3,1)', "Expected u32 but found the floating point number `1000` instead"),
        ('("/f",false,18446744073709551616,1)', "found the floating point number `18446744073709552000` instead"),
        ('("/f",false,NaN,1)', "Expected u32 but found the floating point number `NaN` instead"),
        ('("/f",false,-inf,1)', "Expected u32 but found the floating point number `-inf` instead"),
        ('("/f",false,.5,1)', "Expected u32 but found the floating point number `0.5` instead"),
        ("(1,false,512,1)", "Expected a string but found the unsigned integer `1` instead"),
        ("('c',false,512,1)", "Expected a string but found the UTF-8 character `c` instead"),
        ("(None,false,512,1)", "Expected a string but found an optional value instead"),
        ("(Some(1),false,512,1)", "Expected a string but found an optional value instead"),
        ("([],false,512,1)", "Expected a string but found a sequence instead"),
        ('("/f","it\'s",512,1)', 'Expected a boolean but found the string "it\'s" instead'),
        (f'("/f","{"s" * 41}",512,1)', "Expected a boolean but found a string of 41 characters instead"),
        ('"/f"', 'Expected struct FileStorageBackend but found the string "/f" instead'),
        ("true", "Expected struct FileStorageBackend but found the boolean `true` instead"),
        ("{1.5:1}", "Expected field identifier but found the floating point number `1.5` instead"),
        ("{9:1}", "Expected field index 0 <= i < 4 but found the unsigned integer `9` instead"),
    ],
)
def test_kept_content_of_the_wrong_kind_is_refused(content: str, told: str) -> None:
    """A long string may be a key: it is not shown."""
    assert reported(f'"p":(component:{content},type:file_storage_backend)').endswith(told)


def test_a_spec_before_its_version_is_read_when_no_name_stands_in_it() -> None:
    board = '(cpus:2,memory_mb:1,chipset:(type:"i440_fx",value:(enable_pcie:false)))'
    chipset = '["i440_fx",(enable_pcie:false)]'
    listed = f"(cpus:2,memory_mb:1,chipset:{chipset})"

    texts = [f"(instance_spec:(spec:(board:{each},components:{{}}),version:V0),blobs:[])" for each in (board, listed)]

    assert verdict(PREAMBLE, texts[0]) == verdict(PREAMBLE, texts[1])
    assert verdict(PREAMBLE, texts[0]).startswith("(instance_spec:(version:V0,spec:(board:(cpus:2,memory_mb:1,")


@pytest.mark.parametrize(
    ("chipset", "told"),
    [
        ("[]", "Expected adjacently tagged enum Chipset but found zero elements instead"),
        ('["i440_fx"]', "Expected adjacently tagged enum Chipset but found one element instead"),
        ("1", "Expected adjacently tagged enum Chipset but found the unsigned integer `1` instead"),
        ("{2:1}", 'Expected "type" or "value" but found the unsigned integer `2` instead'),
    ],
)
def test_a_kept_envelope_of_the_wrong_shape_is_refused(chipset: str, told: str) -> None:
    spec = f"(board:(cpus:2,memory_mb:1,chipset:{chipset}),components:{{}})"

    assert verdict(PREAMBLE, f"(instance_spec:(spec:{spec},version:V0),blobs:[])").endswith(told)


def test_a_kept_board_may_leave_out_only_what_has_a_default() -> None:
    """As a list: two fields at the end; a hypervisor interface has fields of its own and takes no list."""
    chipset, text = '("i440_fx",(false))', "(instance_spec:(spec:([{}],{{}}),version:V0),blobs:[])"
    hv = '("hyper_v",[["reference_tsc"]])'

    whole = verdict(PREAMBLE, text.format(f"2,1,{chipset}"))
    short = verdict(PREAMBLE, text.format("2,1"))
    listed = verdict(PREAMBLE, text.format(f"2,1,{chipset},{hv}"))

    assert whole.startswith("(instance_spec:(version:V0,")
    assert short.endswith("Expected struct Board with 5 elements but found 2 elements instead")
    assert listed.endswith("Expected struct variant GuestHypervisorInterface::HyperV but found a sequence instead")


# ---- rules: values in the text


@pytest.mark.parametrize(
    ("component", "told"),
    [
        ("(type:serial_port)", "Unexpected missing field `component` in `Component`"),
        ("(component:(num:1))", "Unexpected missing field `type` in `Component`"),
        ("()", "Unexpected missing field `type` in `Component`"),
        ("(type:serial_port,type:serial_port)", "Unexpected duplicate field `type` in `Component`"),
        ("(component:(),component:())", "Unexpected duplicate field `component` in `Component`"),
        ("(type:serial_port,component:(num:com1),type:x)", "Unexpected duplicate field `type` in `Component`"),
        ("(type:serial_port,component:(num:com1,num:com1))", "Unexpected duplicate field `num` in `SerialPort`"),
        ("(type:serial_port,component:(num:r#com1)", "Expected comma"),
        ("(type:serial_port,component:(0:com1))", "Found invalid std identifier `0`, try the raw identifier `r#0`"),
        ("(type:serial_port,component:(r#a.b:com1))", "Unexpected field named `r#a.b`in `SerialPort`, expected `num`"),
        ("(type:serial_port,component:0(num:com1))", "Expected opening `(` for struct `SerialPort`"),
        ("(type:serial_port,component:Serial-Port(num:com1))", "Expected opening `(` for struct `SerialPort`"),
        ("(type:virtio_disk,component:(backend_id:1,x:1))", "data did not match any variant of untagged enum SpecKey"),
        ("(type:virtio_disk,component:(backend_id:@", "Unexpected byte '@'"),
        ("(type:virtio_disk,component:(backend_id:\x01", "Unexpected byte '\\u{1}'"),
        ("(type:virtio_disk,component:(backend_id:é", "Unexpected byte 'Ã'"),
        ("[serial_port,(num:com1)]", "Expected opening `(` for struct `Component`"),
    ],
)
def test_what_is_no_component_is_refused(component: str, told: str) -> None:
    text = preamble(f'"p":{component}')

    assert told in verdict(PREAMBLE, text)


@pytest.mark.parametrize(
    ("interface", "told"),
    [
        ("(type:bhyve)", None),
        ("(type:bhyve,value:())", None),
        ("(type:bhyve,value:None)", None),
        ("(type:bhyve,value:Anything)", None),
        ("(value:(),type:bhyve)", None),
        ("(type:bhyve,value:{})", "Expected unit variant GuestHypervisorInterface::Bhyve but found a map instead"),
        ("(type:bhyve,value:Some(1))", "GuestHypervisorInterface::Bhyve but found an optional value instead"),
        ("(type:bhyve,value:1)", "GuestHypervisorInterface::Bhyve but found the unsigned integer `1` instead"),
        ("(type:hyper_v,value:{features:[]})", None),
        ("(type:hyper_v,value:Named(features:[]))", None),
        ("(type:hyper_v,value:())", "GuestHypervisorInterface::HyperV but found a unit value instead"),
        ("(type:hyper_v,value:([]))", "GuestHypervisorInterface::HyperV but found a sequence instead"),
        ("(type:hyper_v,value:( ))", "GuestHypervisorInterface::HyperV but found a sequence instead"),
        ("(type:hyper_v,value:(x:1))", "Unexpected field named `x`in `GuestHypervisorInterface`, expected `features`"),
    ],
)
def test_the_hypervisor_interface_takes_any_spelling_of_nothing_and_any_name(interface: str, told: str | None) -> None:
    text = f"{HEAD[: -len('),components:')]},guest_hv_interface:{interface}),components:{{}})),blobs:[])"

    got = verdict(PREAMBLE, text)

    assert told in got if told else got.startswith("(instance_spec:")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "1:1: Expected opening `(` for struct `Preamble`"),
        ("(", "1:2: Unexpected end of RON"),
        ("(x:/", "1:5: Unexpected end of RON"),
        ("/* /* */", "1:9: Unclosed block comment"),
        ("/* *", "1:5: Unclosed block comment"),
        ("/* a/b */ // c\n(", "2:2: Unexpected end of RON"),
        ("/x", "1:3: Unexpected byte 'x'"),
        ("(x 1)", "1:4: Expected colon"),
        ("(x:1 y:2)", "1:6: Expected comma"),
        ('(x:"a\\', "1:7: Unexpected end of RON"),
        ('(x:"a\\n', "1:8: Unexpected end of RON"),
        ('(x:"\\xg0")', "1:8: Non-hex digit found"),
        ('(x:"\\u0")', "1:8: Missing { in Unicode escape"),
        ('(x:"\\u{}")', "1:8: Expected 1-6 digits, got 0 digits in Unicode escape"),
        ('(x:"\\u{0000041}")', "1:15: No } at the end of Unicode escape"),
        ('(x:"\\u{110000}")', "1:15: Not a valid char"),
        ('(x:r#"a")', "1:7: Expected end of string"),
        ("(x:r#)", "1:6: Expected string"),
        ("(x:'ab')", "1:5: Expected char"),
        ("(x:'')", "1:5: Expected char"),
        ("(x:'\\n)", "1:7: Expected char"),
        ("(x:1_0.5)", "1:5: Unexpected underscore in float"),
        ("(x:1.2.3)", "1:9: Expected float"),
        ("(x:-_1)", "1:6: Unexpected underscore in float"),
        ("(x:0b2)", "1:8: Expected comma"),
        ("(blobs:[[_1]])", "1:10: Unexpected leading underscore in an integer"),
        ("(blobs:[[0b2]])", "1:13: Expected integer"),
        ("(blobs:[[0x100]])", "1:15: Integer is out of bounds"),
        ("(blobs:[[99f]])", "1:13: Integer is out of bounds"),
        ("(blobs:[[1]", "1:12: Unexpected end of RON"),
        ("(blobs:[],blobs:[])", "1:16: Unexpected duplicate field `blobs` in `Preamble`"),
        ("(blobs:[])", "1:10: Unexpected missing field `instance_spec` in `Preamble`"),
        ("#![enable(foo)]()", "1:14: No RON extension named `foo`"),
        ("#![enable(implicit_some unwrap_newtypes)]()", "1:25: Expected comma"),
        ("#![enable(implicit_some]()", "1:25: Expected closing `)]` after the enable attribute"),
        ("#[enable(implicit_some)]()", "1:10: Expected an `#![enable(...)]` attribute"),
        (f"(x:{'[' * 200}", "1:68: Exceeded recursion limit"),
    ],
)
def test_what_is_no_ron_is_refused_with_the_place_where_reading_stopped(text: str, told: str) -> None:
    assert verdict(PREAMBLE, text).startswith(told)


ANY_VALUES = """inf|-inf|+NaN|1.5|-1|+1|-9223372036854775809|18446744073709551616|'a'|'\\''|'é'|r"\\"|r##"a"#"##|
"\\x41\\u{1F600}\\0"|Some(Some(1))|None|(1,(2),[])|{1:2,'a':(b:c)}|true|Unit|Name(a:1)|r#raw.name(x:1,)|rest|
( )|(a)|(a,)"""


@pytest.mark.parametrize("value", ANY_VALUES.replace("\n", "").split("|"))
def test_any_value_may_stand_in_an_ignored_field(value: str) -> None:
    whole = preamble("")

    assert verdict(PREAMBLE, f"{whole[:-1]},other:{value})") == whole


def test_extensions_are_heeded() -> None:
    fields = 'path:"/f",readonly:false,block_size:512,workers:'
    text = preamble(f'"p":(type:file_storage_backend,component:({fields}4))')

    assert verdict(PREAMBLE, text).endswith("Expected option")
    for head in (
        "#![enable(implicit_some,)]",
        "#![enable(unwrap_newtypes)]\n#![enable(implicit_some, unwrap_newtypes)] ",
    ):
        assert verdict(PREAMBLE, head + text) == preamble(
            f'"p":(type:file_storage_backend,component:({fields}Some(4)))'
        )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (' // x\n Websocket( "a" , )', 'Websocket("a")'),
        ("Foo", "Unexpected variant named `Foo`in enum `MigrateError`, expected one of `Websocket`"),
        ("Websocket", "1:10: Expected opening `(`"),
        ('Websocket("a"', "1:14: Expected closing `)`"),
        (
            'ProtocolParse("a")',
            "Expected tuple variant MigrateError::ProtocolParse with 2 elements but found one element",
        ),
        ('RemoteError("Source","x")', "1:13: Expected identifier"),
        ('Initiate("x")', "1:9: Non-whitespace trailing characters"),
        ("{}", "1:1: Expected identifier"),
    ],
)
def test_errors_are_read_by_their_names(text: str, told: str) -> None:
    assert told in verdict(ERROR, text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("zz", "invalid character: found `z` at 1"),
        ("{6f5e0c1a9b7d4e2f8a3c0000000000ff}", "invalid group count: expected 5, found 1"),
        ("urn:uuid:6f5e0c1a9b7d4e2f8a3c0000000000ff", "invalid group count: expected 5, found 1"),
        ("urn:uuid:é", "invalid character: found `é` at 10"),
        ("6f5e0c1a-9b7d-4e2f-8a3c-0000000000f", "invalid group length in group 4: expected 12, found 11"),
        ("6f5e0c1-9b7d-4e2f-8a3c-0000000000ff", "invalid group length in group 0: expected 8, found 7"),
        ("", "invalid length: expected length 32 for simple format, found 0"),
    ],
)
def test_a_uuid_that_is_none_says_why(text: str, told: str) -> None:
    nic = f'(backend_id:"b",interface_id:"{text}",pci_path:(bus:0,device:1,function:0))'

    assert reported(f'"p":(type:virtio_nic,component:{nic})') == f"UUID parsing failed: {told}"


def test_a_kept_uuid_has_to_be_a_string() -> None:
    nic = '(backend_id:"b",interface_id:7,pci_path:[0,1,0])'

    told = "Expected a formatted UUID string but found the unsigned integer `7` instead"
    assert reported(f'"p":(component:{nic},type:virtio_nic)') == told


def test_pci_functions_are_checked_once_the_path_is_whole() -> None:
    p9 = "(type:soft_npu_p9,component:(pci_path:(bus:0,device:{},function:{})))"

    assert reported(f'"p":{p9.format(32, 8)}') == "PCI device 32 outside range of 0-31"
    assert reported(f'"p":{p9.format(31, 8)}') == "PCI function 8 outside range of 0-7"
    assert reported(f'"p":{p9.format(31, 256)}') == "Integer is out of bounds"


# ---- the parts, where no type of the protocol reaches


class Anything(Visitor):
    expecting = "something"


def test_a_visitor_refuses_what_it_has_no_method_for() -> None:
    for content, told in (([], "a sequence"), ("Source", "an enum"), (Unsigned(1), "the unsigned integer `1`")):
        with pytest.raises(Exception, match=f"Expected something but found {told} instead"):
            Kept(content).enum("E", Anything()) if content == "Source" else Kept(content).any(Anything())


def test_a_place_for_a_name_holds_nothing_else() -> None:
    source, visitor = Source(), Anything()
    asked = [source.boolean, source.text, source.option, source.sequence, source.fixed, source.mapping]

    for ask in [*asked, source.identifier, source.any, lambda v: source.unsigned(1, v)]:
        with pytest.raises(Exception, match="Expected identifier"):
            ask(visitor)
    for ask_named in (source.struct, source.enum):
        with pytest.raises(Exception, match="Expected identifier"):
            ask_named("Name", visitor)


def test_kept_errors_have_no_fields() -> None:
    for name, told in (("Websocket", "newtype variant"), ("ProtocolParse", "tuple variant")):
        with pytest.raises(Exception, match=f"Expected {told} but found a unit variant instead"):
            reader_of(ERROR)(Kept(name))
    assert reader_of(ERROR)(Kept("Phase")) == MigrateError("Phase")


def test_kept_values_of_any_kind_can_be_ignored_and_nested() -> None:
    read = reader_of(Nullable(ListOf(TEXT)))

    assert read(Kept(["a"])) == ("a",)
    assert Kept(Signed(1)).content() == Signed(1)
    assert VariantError("x", ()).text == "Unexpected enum variant named `x`, there are no variants"
    assert unknown_field("a b", ("c d",)).text.startswith('Unexpected field named "a b"_[invalid identifier], expected')


# ---- JSON forms


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('"Bogus"', "unknown_variant"),
        ('{"Bogus":[]}', "unknown_variant"),
        ('"Websocket"', "invalid_value"),
        ('{"Websocket":1}', "invalid_type"),
        ('{"ProtocolParse":["a"]}', "invalid_value"),
        ('{"ProtocolParse":"a"}', "invalid_type"),
        ('{"Initiate":[],"Phase":[]}', "invalid_type"),
        ("1", "invalid_type"),
    ],
)
def test_what_is_no_error_in_json_is_refused(text: str, code: str) -> None:
    with pytest.raises(SpecParseError) as caught:
        read_text(ERROR, text)

    assert caught.value.code == code


def test_a_captured_spec_is_the_one_in_the_preamble() -> None:
    text = preamble("")

    spec = from_ron(text, "spec")

    assert to_ron(read_text(codec_of("spec"), compact(spec)), "spec") == text
    assert KINDS == ("preamble", "spec", "error", "devices")
    assert VERSIONS[0] == "v1"


# ---- what is left of the scanner and the parts


@pytest.mark.parametrize(
    ("codec", "text", "told"),
    [
        (PREAMBLE, "(r#a:1)", "1:7: Unexpected missing field"),
        (PREAMBLE, "(x:'é')", "1:8: Unexpected missing field"),
        (PREAMBLE, "(x:'", "1:5: Unexpected end of RON"),
        (PREAMBLE, "Pre-amble()", "1:1: Expected opening `(` for struct `Preamble`"),
        (PREAMBLE, "r#Preamble()", "1:12: Unexpected missing field"),
        (PREAMBLE, '(x:r"a', "1:6: Expected end of string"),
        (PREAMBLE, "(r", "1:3: Expected colon"),
        (DEVICES, '[(instance_name:"a",payload:[],(', "1:32: Expected identifier"),
        (DEVICES, '[(instance_name:"a",payload:[(kind:"k",version:+1', "1:48: Expected integer"),
        (ERROR, 'Websocket( // x\n r"a")', 'Websocket("a")'),
    ],
)
def test_places_where_reading_stops(codec: Codec, text: str, told: str) -> None:
    assert verdict(codec, text).startswith(told)


def test_a_name_that_is_one_only_as_raw_identifier_says_so_for_the_struct_itself() -> None:
    scanner = Scanner("a-b(x:1)")

    with pytest.raises(RawIdentifierError, match="try the raw identifier `r#a-b` instead"):
        scanner.struct_name("a-b")


@pytest.mark.parametrize(
    ("interface", "told"),
    [
        ("(value:Some(1),type:bhyve)", "GuestHypervisorInterface::Bhyve but found an optional value instead"),
        ("(value:[1],type:bhyve)", "GuestHypervisorInterface::Bhyve but found a sequence instead"),
        ("(value:(a:1),type:bhyve)", "GuestHypervisorInterface::Bhyve but found a map instead"),
        ("(value:None,type:bhyve)", None),
        ("(value:1,type:bhyve)", "GuestHypervisorInterface::Bhyve but found the unsigned integer `1` instead"),
        ("(value:(features:[]),type:hyper_v)", None),
    ],
)
def test_a_kept_hypervisor_interface_follows_the_same_rules(interface: str, told: str | None) -> None:
    text = f"{HEAD[: -len('),components:')]},guest_hv_interface:{interface}),components:{{}})),blobs:[])"

    got = verdict(PREAMBLE, text)

    assert told in got if told else got.startswith("(instance_spec:")


def test_kept_structs_ignore_what_live_ones_ignore_and_keep_their_bytes() -> None:
    path, serial = "(bus:0,device:1,function:0,extra:(1,2))", ",".join(["7"] * 20)
    component = f'(backend_id:"b",pci_path:{path},serial_number:[{serial}])'

    got = verdict(PREAMBLE, preamble(f'"p":(component:{component},type:nvme_disk)'))

    assert f"pci_path:(bus:0,device:1,function:0),serial_number:({serial})" in got


def test_a_variant_without_content_is_written_as_its_tag() -> None:
    bhyve = Tagged("type", "value", v1.Bhyve, v1.HyperV)

    assert ron.write(bhyve, v1.Bhyve()) == "(type:bhyve)"
