"""Findings with their places, overviews without secrets, and what a host would open."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given

from tests.spec.spec_corpus import VERSIONS, documents, specs
from vmmigrate.errors import SpecParseError
from vmmigrate.jsontext import compact
from vmmigrate.spec import document
from vmmigrate.spec.build import FALCON
from vmmigrate.spec.chain import AnySpec
from vmmigrate.spec.openings import AllowLists, Opening, openings, refusals
from vmmigrate.spec.overview import overview
from vmmigrate.spec.validate import Finding, validate

UUID = "6f5e0c1a-9b7d-4e2f-8a3c-00000000000a"
KEY = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
BOARD = '"board": {"cpus": 1, "memory_mb": 1, "chipset": {"type": "i440_fx", "value": {"enable_pcie": false}}}'
COM1 = '"com1": {"type": "serial_port", "component": {"num": "com1"}}'


def text_of(components: str, board: str = BOARD) -> str:
    """Two lines before the components, one component per line."""
    return f"{{\n {board},\n {{}}\n}}".replace("{}", f'"components": {{{components}}}')


def only(text: str, features: frozenset[str] = frozenset(), version: str = "v3") -> Finding:
    (finding,) = validate(version, text, features)
    return finding


def test_a_machine_that_can_be_created_has_no_findings() -> None:
    assert validate("v3", text_of(COM1)) == []


@pytest.mark.parametrize(
    ("text", "code", "place", "path", "allowed"),
    [
        ("{", "json_syntax", (1, 2), "", ""),
        (text_of(COM1.replace('"com1"}', '"com9"}')), "unknown_variant", (3, 70), "/components/com1/component/num",
         "'com1', 'com2', 'com3', 'com4'"),
        (text_of(COM1, BOARD.replace(": 1,", ": 256,", 1)), "invalid_value", (2, 20), "/board/cpus", "0..255"),
        (text_of(COM1, BOARD.replace(": 1,", ": 1.0,", 1)), "invalid_type", (2, 20), "/board/cpus",
         "an integer 0..255"),
        (text_of(COM1.replace('"num"', '"nim"')), "missing_field", (3, 62), "/components/com1/component", ""),
    ],
)  # fmt: skip
def test_what_is_no_document_is_found_with_line_column_path_and_what_is_allowed(
    text: str, code: str, place: tuple[int, int], path: str, allowed: str
) -> None:
    finding = only(text)

    assert (finding.gate, finding.code, finding.path, finding.allowed) == ("document", code, path, allowed)
    assert (finding.line, finding.column) == place


def test_an_unknown_version_is_no_finding() -> None:
    with pytest.raises(SpecParseError, match="I accept"):
        validate("v99", "{}")


SOCKET = '{"type": "virtio_socket", "component": {"guest_cid": %d, "pci_path": {"bus": 0, "device": 4, "function": 0}}}'
P9 = '{"type": "soft_npu_p9", "component": {"pci_path": {"bus": 7, "device": 4, "function": 0}}}'


@pytest.mark.parametrize(
    ("components", "code", "component", "path"),
    [
        (f'"{UUID.upper()}": {{"type": "blob_storage_backend", "component": {{"base64": "", "readonly": true}}}}',
         "backend_not_used", UUID, f"/components/{UUID.upper()}"),
        ('"b": {"type": "boot_settings", "component": {"order": []}},\n"a": {"type": "boot_settings", "component": '
         '{"order": [{"id": "x"}]}}', "boot_settings_in_use", "b", "/components/b"),
        ('"b": {"type": "boot_settings", "component": {"order": [{"id": "y"}]}}', "boot_option_missing", "y",
         "/components/b/component/order/0"),
        (COM1.replace('"com1"', '"com4"') + ',"s": {"type": "soft_npu_pci_port", "component": {"pci_path": {"bus": 0, '
         '"device": 4, "function": 0}}}', "component_name_in_use", "com4", "/components/com4"),
        ('"com3": {"type": "serial_port", "component": {"num": "com4"}},"s": {"type": "soft_npu_pci_port", '
         '"component": {"pci_path": {"bus": 0, "device": 4, "function": 0}}}', "serial_port_in_use", "com4",
         "/components"),
    ],
)  # fmt: skip
def test_what_is_no_machine_is_found_where_its_culprit_stands(
    components: str, code: str, component: str, path: str
) -> None:
    finding = only(text_of(components), frozenset({FALCON}))

    assert (finding.gate, finding.code, finding.component, finding.path) == ("machine", code, component, path)


def test_a_bad_cpuid_set_is_found_at_the_board() -> None:
    entry = {"leaf": 2**30, "eax": 0, "ebx": 0, "ecx": 0, "edx": 0}
    board = BOARD[:-1] + f', "cpuid": {json.dumps({"entries": [entry], "vendor": "amd"})}}}'

    assert only(text_of(COM1, board)).path == "/board/cpuid"


def test_everything_that_no_host_could_create_is_found_at_once() -> None:
    text = text_of(f'"{UUID.upper()}": {SOCKET % 2},\n"p": {P9}', BOARD.replace(": 1,", ": 0,", 1))

    found = validate("v3", text, frozenset({FALCON}))

    assert [(finding.code, finding.line, finding.path) for finding in found] == [
        ("cpus_zero", 2, "/board/cpus"),
        ("com1_missing", 3, "/components"),
        ("pci_bus_without_bridge", 3, "/components"),  # its own name is not kept
        ("guest_cid", 3, f"/components/{UUID.upper()}/component/guest_cid"),
    ]
    assert all(finding.gate == "host" and finding.allowed for finding in found)


@pytest.mark.parametrize("field", ["manufacturer", "product_name", "serial_number"])
def test_a_long_smbios_text_is_found_at_its_field(field: str) -> None:
    smbios = {"manufacturer": "", "product_name": "", "serial_number": "", "version": 0, field: "x" * 65}
    text = text_of(COM1)[:-2] + f',\n "smbios": {json.dumps(smbios)}\n}}'

    finding = only(text)

    assert (finding.path, finding.line) == (f"/smbios/{field}", 4)


# ---- overview


@pytest.mark.parametrize(("version", "path"), documents())
def test_every_frozen_document_has_an_overview(version: str, path: Any) -> None:
    shown = overview(document.parse(version, path.read_bytes()))

    assert shown["spec_version"] == version
    assert [part["key"] for part in shown["components"]] == list(json.loads(path.read_bytes())["components"])
    assert shown["versions"][version] == []
    assert KEY not in compact(shown)


@given(specs())
def test_any_document_has_an_overview(spec: AnySpec) -> None:
    assert set(overview(spec)["versions"]) == set(VERSIONS)


def crucible(request: Any) -> dict[str, Any]:
    text = request if isinstance(request, str) else compact(request)
    return {"type": "crucible_storage_backend", "component": {"request_json": text, "readonly": False}}


def region(target: list[str], **more: Any) -> dict[str, Any]:
    opts = {"id": UUID, "target": target, "lossy": False, "key": KEY, "read_only": False, **more}
    return {"type": "region", "block_size": 512, "blocks_per_extent": 1, "extent_count": 1, "opts": opts, "gen": 7}


def spec_of(**components: Any) -> AnySpec:
    return document.parse("v3", text_of("")[:-5] + json.dumps(components)[:-1] + "}}" if components else text_of(""))


def test_an_overview_shows_volumes_by_their_ids_and_generations_only() -> None:
    url = {"type": "url", "id": UUID, "block_size": 512, "url": "https://user:pass@h/"}

    shown = overview(
        spec_of(a=crucible(region(["1.2.3.4:5"]))),
    )
    others = overview(spec_of(b=crucible(url), c=crucible("s3cret")))

    assert shown["components"][0]["details"] == f"region {UUID}, generation 7, readonly false"
    assert [part["details"] for part in others["components"]] == [
        f"url {UUID}, readonly false", "request_json 6 characters, no volume request, readonly false",
    ]  # fmt: skip


# ---- what a host would open

FILE = {"type": "file_storage_backend", "component": {"path": "/disks/a", "readonly": True, "block_size": 512}}
NIC = {"type": "virtio_network_backend", "component": {"vnic_name": "vnic7"}}
P9FS = {"type": "p9fs", "component": {"source": "/share", "target": "t", "chunk_size": 1,
        "pci_path": {"bus": 0, "device": 4, "function": 0}}}  # fmt: skip
TREE = {
    "type": "volume",
    "id": UUID,
    "block_size": 512,
    "sub_volumes": [region(["[fd00::1]:1", "10.0.0.1:2"], control="10.0.0.2:3")],
    "read_only_parent": {
        "type": "volume",
        "id": UUID,
        "block_size": 512,
        "sub_volumes": [
            {"type": "file", "id": UUID, "block_size": 512, "path": "/images/base"},
            {"type": "url", "id": UUID, "block_size": 512, "url": "https://user@Images.example:8443/x"},
        ],
    },
}


def test_everything_that_would_be_opened_is_listed() -> None:
    found = openings(spec_of(c=crucible(TREE), f=FILE, n=NIC, p=P9FS, x=crucible("none")))

    assert [(opening.component, opening.what, opening.value) for opening in found] == [
        ("c", "host", "fd00::1"), ("c", "host", "10.0.0.1"), ("c", "host", "10.0.0.2"),
        ("c", "path", "/images/base"), ("c", "host", "images.example"),
        ("f", "path", "/disks/a"), ("n", "interface", "vnic7"), ("p", "path", "/share"),
        ("x", "volume", "a volume request that cannot be read"),
    ]  # fmt: skip


def test_empty_lists_allow_nothing_and_full_ones_all() -> None:
    spec = spec_of(c=crucible(TREE), f=FILE, n=NIC, p=P9FS)
    hosts = ("fd00::1", "10.0.0.1", "10.0.0.2", "images.example")

    assert len(refusals(spec, AllowLists(), str)) == len(openings(spec)) == 8
    assert refusals(spec, AllowLists(("/disks", "/images", "/share"), hosts, ("vnic*",)), str) == []


@pytest.mark.parametrize(
    ("listed", "host", "allowed"),
    [
        ("fd00:1122:3344::/48", "fd00:1122:3344:104::16", True), ("fd00:1122:3344::/48", "fd00:1122:3345::1", False),
        ("10.0.0.0/8", "10.255.0.1", True), ("10.0.0.0/8", "::1", False), ("::1", "0:0:0:0:0:0:0:1", True),
        ("10.0.0.0/8", "images.example", False), ("images.example", "images.example", True),
        ("images.example", "evil.images.example", False),
    ],
)  # fmt: skip
def test_a_host_is_allowed_by_its_name_its_address_or_its_network(listed: str, host: str, allowed: bool) -> None:
    url = f"https://[{host}]/x" if ":" in host else f"https://{host}/x"
    volume = {"type": "url", "id": UUID, "block_size": 512, "url": url}

    found = refusals(spec_of(c=crucible(volume)), AllowLists(hosts=(listed,)), str)

    assert (found == []) is allowed


def test_an_unreadable_volume_request_is_refused_by_any_list() -> None:
    (refusal,) = refusals(spec_of(x=crucible("none")), AllowLists(("/",), ("",), ("*",)), str)

    assert refusal.message == "a volume request that cannot be read"


@pytest.mark.parametrize("path", ["disks/a", "/disks/../etc/passwd", "/disksx/a", "/disks/\0", "/disks/link/a"])
def test_a_path_that_leads_elsewhere_is_refused_after_links_are_resolved(path: str) -> None:
    file = {**FILE, "component": {**FILE["component"], "path": path}}
    links = {"/disks/../etc/passwd": "/etc/passwd", "/disks/link/a": "/secret/a"}

    found = refusals(spec_of(f=file), AllowLists(path_roots=("/disks",)), lambda name: links.get(name, name))

    assert [refusal.opening for refusal in found] == [Opening(found[0].opening.component, "path", path)]
    assert "/disks)" in found[0].message


@pytest.mark.parametrize("url", ["file:///etc/passwd", "no url", "http://[::1", "https:///x", "ftp://h/"])
def test_a_url_without_a_web_host_is_never_allowed(url: str) -> None:
    volume = {"type": "url", "id": UUID, "block_size": 512, "url": url}

    (refusal,) = refusals(spec_of(c=crucible(volume)), AllowLists(hosts=("", "h", "::1")), str)

    assert refusal.message.startswith("host of a URL without one is not allowed")
