"""Promises of documents, keys and addresses that no single row of the corpora shows."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given

from tests.spec.spec_corpus import KEYS, UNHURRIED, VERSIONS, specs
from vmmigrate import jsontext
from vmmigrate.errors import SpecParseError
from vmmigrate.spec import document, latest
from vmmigrate.spec.address import canonical_socket_address
from vmmigrate.spec.chain import LATEST
from vmmigrate.spec.decode import Struct
from vmmigrate.spec.document import read_text
from vmmigrate.spec.keys import is_uuid, key_order, spec_key
from vmmigrate.spec.requests import TYPES

BOARD = '{"cpus":2,"memory_mb":1024,"chipset":{"type":"i440_fx","value":{"enable_pcie":false}}}'
UUID = "6f5e0c1a-9b7d-4e2f-8a3c-0000000000ff"
BARE = UUID.replace("-", "")


def with_component(component: str) -> str:
    return f'{{"board":{BOARD},"components":{{"c":{component}}}}}'


def refusal(version: str, text: str) -> SpecParseError:
    with pytest.raises(SpecParseError) as caught:
        document.parse(version, text)
    return caught.value


@UNHURRIED
@given(specs())
def test_a_document_that_is_written_is_read_back_as_the_same_spec(spec: latest.InstanceSpec) -> None:
    text = document.serialise(spec)

    again = document.parse(LATEST, text)

    assert again == spec
    assert document.serialise(again) == text
    assert document.from_tree(LATEST, jsontext.parse(text)) == spec


def test_an_unknown_version_is_answered_with_what_is_accepted() -> None:
    error = refusal("v9", "not even JSON")

    assert error.code == "unsupported_spec_version"
    assert error.text == "unsupported spec version v9, I accept {" + ", ".join(VERSIONS) + "}"


@pytest.mark.parametrize(
    ("component", "code", "path", "column"),
    [
        ('{"type":"qemu_pvpanic","component":{"enable_isa":1}}', "invalid_type", "component/enable_isa", 164),
        ('{"type":"qemu_pvpanic","component":{}}', "missing_field", "component", 150),
        ('{"type":"qemu_pvpanic","component":{"enable_isa":true,"x":1}}', "unknown_field", "component/x", 173),
        ('{"type":"nope","component":{}}', "unknown_variant", "type", 123),
        ('{"type":"qemu_pvpanic","type":"qemu_pvpanic"}', "duplicate_field", "type", 145),
    ],
)
def test_a_refusal_names_code_path_line_and_column(component: str, code: str, path: str, column: int) -> None:
    error = refusal("v1", with_component(component))

    assert error.code == code
    details = error.details
    assert (details["path"], details["line"], details["column"]) == (f"/components/c/{path}", 1, column)
    assert f"(line 1, column {column})" in error.text


def test_a_refusal_names_what_is_allowed() -> None:
    assert "allowed: 'type', 'component'" in refusal("v1", with_component('{"kind":"x"}')).text
    assert (
        "allowed 0..31"
        in refusal(
            "v1",
            with_component(
                '{"type":"soft_npu_p9","component":{"pci_path":{"bus":0,"device":32,"function":0}}}',
            ),
        ).text
    )


def test_a_refusal_never_shows_the_content_of_a_text() -> None:
    error = refusal("v1", with_component('{"type":"qemu_pvpanic","component":"s3cret"}'))

    assert "s3cret" not in error.text


def test_models_do_not_show_volume_requests_and_blobs() -> None:
    crucible = latest.CrucibleStorageBackend(request_json="s3cret", readonly=False)
    blob = latest.BlobStorageBackend(base64="s3cret", readonly=False)

    assert "s3cret" not in repr(crucible) + repr(blob) + str(crucible) + str(blob)


@pytest.mark.parametrize("value", ["1e999", r'"\ud800"', r'{"\ud800":1}'])
@pytest.mark.parametrize(("before", "accepted"), [('"type":"soft_npu_p9",', True), ("", False)])
def test_flaws_in_ignored_values_are_forgiven_only_after_the_tag(value: str, before: str, accepted: bool) -> None:
    """A value that comes before its tag has to be kept until the tag is known, so it has to be a value."""
    path = f'{{"bus":0,"device":1,"function":0,"x":{value}}}'
    after = "" if before else ',"type":"soft_npu_p9"'
    text = with_component(f'{{{before}"component":{{"pci_path":{path}}}{after}}}')

    if accepted:
        assert document.serialise(document.parse("v1", text)).count('"x"') == 0
    else:
        assert refusal("v1", text).code in {"json_number", "json_surrogate"}


def test_two_spellings_of_one_uuid_are_one_key_and_the_last_wins() -> None:
    first, second = (
        '"type":"qemu_pvpanic","component":{"enable_isa":true}',
        '"type":"serial_port","component":{"num":"com1"}',
    )
    text = f'{{"board":{BOARD},"components":{{"{UUID.upper()}":{{{first}}},"{{{UUID}}}":{{{second}}}}}}}'

    spec = document.parse("v1", text)

    assert list(spec.components) == [UUID]
    assert isinstance(spec.components[spec_key(UUID)], latest.SerialPort)


def test_a_value_under_a_key_that_loses_must_still_be_sound() -> None:
    text = f'{{"board":{BOARD},"components":{{"a":1,"a":{{"type":"qemu_pvpanic","component":{{"enable_isa":true}}}}}}}}'

    assert refusal("v1", text).code == "invalid_type"


@pytest.mark.parametrize(
    "text", [UUID, UUID.upper(), BARE, f"{{{UUID}}}", f"urn:uuid:{UUID}", f"urn:uuid:{UUID.upper()}"]
)
def test_four_spellings_are_uuids(text: str) -> None:
    assert spec_key(text) == UUID
    assert is_uuid(spec_key(text))


@pytest.mark.parametrize(
    "text",
    [
        f"{{{BARE}}}", f"urn:uuid:{BARE}", f"URN:UUID:{UUID}", f" {UUID}", f"{UUID}\n",
        UUID.replace("-", "_"), UUID.replace("6", "６"), f"({UUID})", f"{{{UUID}", "", "-",
    ],
)  # fmt: skip
def test_other_spellings_are_names(text: str) -> None:
    assert spec_key(text) == text
    assert not is_uuid(text)


@UNHURRIED
@given(KEYS, KEYS)
def test_keys_are_ordered_as_bytes_with_uuids_first(one: str, other: str) -> None:
    def as_bytes(key: str) -> tuple[bool, bytes]:
        return not is_uuid(key), bytes.fromhex(key.replace("-", "")) if is_uuid(key) else key.encode()

    assert (key_order(one) < key_order(other)) == (as_bytes(one) < as_bytes(other))


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("127.0.0.1:80", "127.0.0.1:80"),
        ("127.0.0.1:00080", "127.0.0.1:80"),
        ("127.0.0.01:80", None),
        ("127.0.0.1:65536", None),
        ("127.0.0.1", None),
        ("localhost:80", None),
        ("[0:0:0:0:0:0:0:1]:80", "[::1]:80"),
        ("[FD00::0001]:1", "[fd00::1]:1"),
        ("[fe80::1%7]:80", "[fe80::1%7]:80"),
        ("[fe80::1%0]:80", "[fe80::1]:80"),
        ("[fe80::1%eth0]:80", None),
        ("[::ffff:1.2.3.4]:1", "[::ffff:1.2.3.4]:1"),
        ("::1:80", None),
        ("127.0.0.1:" + "0" * 5000 + "1", "127.0.0.1:1"),
        ("127.0.0.1:" + "9" * 5000, None),
    ],
)
def test_a_socket_address_has_one_canonical_spelling(text: str, canonical: str | None) -> None:
    assert canonical_socket_address(text) == canonical


@pytest.mark.parametrize(
    ("spelling", "value"), [("0.1", 0.1), ("5", 5.0), ("16777217", 16777216.0), ("3.4028235e38", 3.4028235e38)]
)
def test_a_flush_timeout_is_kept_in_single_precision(spelling: str, value: float) -> None:
    request = read_text(TYPES["vcr"], region(spelling))

    assert request.opts.flush_timeout == value


def test_a_flush_timeout_beyond_single_precision_is_refused() -> None:
    with pytest.raises(SpecParseError, match="out of the range of 32-bit floating point"):
        read_text(TYPES["vcr"], region("1e39"))


def test_a_flush_timeout_must_be_a_number() -> None:
    with pytest.raises(SpecParseError, match="expected a number"):
        read_text(TYPES["vcr"], region("true"))


def test_a_field_without_a_codec_is_refused_when_its_class_is_made() -> None:
    with pytest.raises(TypeError, match="no codec"):
        type("Bad", (Struct,), {"__annotations__": {"field": int}, "__module__": __name__})


def region(flush_timeout: str) -> str:
    opts = f'{{"id":"{UUID}","target":[],"lossy":false,"read_only":false,"flush_timeout":{flush_timeout}}}'
    return f'{{"type":"region","block_size":512,"blocks_per_extent":1,"extent_count":1,"gen":1,"opts":{opts}}}'


@pytest.mark.parametrize(
    "text",
    ['{"type":"url","type":"url"}', '{"id":"x"}', '{"type":1}', '{"type":"x"}', "[]", '{"type":"url","x":1e999}'],
)
def test_a_volume_request_needs_exactly_one_known_type_and_no_flaw(text: str) -> None:
    with pytest.raises(SpecParseError):
        read_text(TYPES["vcr"], text)


def test_importing_the_package_and_the_strict_reader_costs_no_pydantic() -> None:
    """The command line asks for help without paying for models."""
    program = "import sys, vmmigrate.spec, vmmigrate.jsontext; sys.exit('pydantic' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
