"""The two gates: does a document describe one machine, and could any host create it?"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.spec.spec_corpus import UNHURRIED, machines
from vmmigrate.errors import LossyDowngradeError, SpecBuildError, SpecCreatableError
from vmmigrate.jsontext import compact
from vmmigrate.spec import document, keys
from vmmigrate.spec.build import FALCON, build
from vmmigrate.spec.chain import CHAIN, LATEST
from vmmigrate.spec.creatable import check_creatable, problems
from vmmigrate.spec.keys import in_key_order, spec_key
from vmmigrate.spec.latest import (
    BlobStorageBackend,
    Board,
    BootOrderEntry,
    BootSettings,
    Component,
    Cpuid,
    CpuidEntry,
    CpuidVendor,
    CrucibleStorageBackend,
    DlpiNetworkBackend,
    FileStorageBackend,
    I440Fx,
    InstanceSpec,
    P9fs,
    PciPath,
    PciPciBridge,
    SerialPort,
    SerialPortNumber,
    SmbiosType1Input,
    SoftNpuP9,
    SoftNpuPciPort,
    SoftNpuPort,
    VirtioDisk,
    VirtioSocket,
)
from vmmigrate.spec.machine import Spec, to_latest

FILE = FileStorageBackend(path="/f", readonly=False, block_size=512)
COM1 = SerialPort(num=SerialPortNumber.COM1)
BOARD = Board(cpus=1, memory_mb=512, chipset=I440Fx(enable_pcie=False))


def at(device: int, bus: int = 0, function: int = 0) -> PciPath:
    return PciPath(bus=bus, device=device, function=function)


def disk(backend: str, device: int, bus: int = 0) -> VirtioDisk:
    return VirtioDisk(backend_id=spec_key(backend), pci_path=at(device, bus))


def socket(device: int) -> VirtioSocket:
    return VirtioSocket(guest_cid=3, pci_path=at(device))


def bridge(downstream_bus: int, device: int, bus: int = 0) -> PciPciBridge:
    return PciPciBridge(downstream_bus=downstream_bus, pci_path=at(device, bus))


def blob(text: str) -> BlobStorageBackend:
    return BlobStorageBackend(base64=text, readonly=True)


def smbios(manufacturer: str = "", serial_number: str = "") -> SmbiosType1Input:
    return SmbiosType1Input(manufacturer=manufacturer, product_name="", serial_number=serial_number, version=0)


def spec_of(board: Board = BOARD, smbios: SmbiosType1Input | None = None, **parts: Component) -> InstanceSpec:
    components = in_key_order({spec_key(name.replace("_", "-")): part for name, part in parts.items()})
    return InstanceSpec(board=board, components=components, smbios=smbios)


def cpuid_board(*leaves: tuple[int, int | None]) -> Board:
    entries = tuple(CpuidEntry(leaf=leaf, subleaf=subleaf, eax=0, ebx=0, ecx=0, edx=0) for leaf, subleaf in leaves)
    return BOARD.model_copy(update={"cpuid": Cpuid(entries=entries, vendor=CpuidVendor.AMD)})


# ---- build


@UNHURRIED
@given(machines())
def test_a_machine_goes_in_and_comes_out_as_the_same_document(spec: InstanceSpec) -> None:
    assert document.serialise(to_latest(build(spec))) == document.serialise(spec)


@pytest.mark.parametrize(
    ("spec", "code", "component"),
    [
        (spec_of(d=disk("b", 4)), "storage_backend_not_found", "d"),
        (spec_of(d=disk("b", 4), e=disk("b", 5), b=FILE), "storage_backend_not_found", "e"),
        (spec_of(b=FILE, a=FILE), "backend_not_used", "a"),
        (spec_of(b=FILE, c=FILE, d=disk("b", 4), e=disk("c", 4)), "pci_path_in_use", "e"),
        (spec_of(a=COM1, b=COM1), "serial_port_in_use", "b"),
        (spec_of(s=BootSettings(order=(BootOrderEntry(id=spec_key("x")),))), "boot_option_missing", "x"),
        (spec_of(s=BootSettings(order=()), t=BootSettings(order=())), "boot_settings_in_use", "t"),
        (spec_of(v=socket(4), w=socket(4)), "vsock_in_use", "w"),
        (spec_of(b=FILE, d=disk("b", 4), v=socket(4)), "pci_path_in_use", "v"),
        (spec_of(s=SoftNpuP9(pci_path=at(4))), "feature_compiled_out", "s"),
        (spec_of(cpuid_board((1, None), (1, None)), d=disk("b", 4)), "cpuid_entries_invalid", None),
    ],
)  # fmt: skip
def test_a_document_that_is_no_machine_is_refused_with_code_and_culprit(
    spec: InstanceSpec, code: str, component: str | None
) -> None:
    with pytest.raises(SpecBuildError) as caught:
        build(spec)

    assert caught.value.code == code
    assert caught.value.details == {"component": component}


@pytest.mark.parametrize(
    ("leaves", "reason"),
    [
        ([(0x10000, None)], "leaf 10000 not in standard or extended range"),
        ([(0x40000000, None)], "leaf 40000000 not in standard or extended range"),
        ([(0x80010000, None)], "leaf 80010000 not in standard or extended range"),
        ([(1, None), (1, None)], "duplicate leaf and subleaf (1, None)"),
        ([(0xFF, 16), (0xFF, 16)], "duplicate leaf and subleaf (ff, Some(16))"),
        ([(10, 1), (10, None)], "leaf a has entries with subleaves"),
        ([(10, None), (10, 1)], "leaf a has an entry without a subleaf"),
    ],
)
def test_a_bad_cpuid_set_is_refused_with_its_reason(leaves: list[tuple[int, int | None]], reason: str) -> None:
    with pytest.raises(SpecBuildError) as caught:
        build(spec_of(cpuid_board(*leaves)))

    assert caught.value.text == f"instance spec's CPUID entries are invalid: {reason}"


def test_cpuid_entries_come_out_sorted_and_holes_are_fine() -> None:
    spec = build(spec_of(cpuid_board((0x80000000, None), (7, 5), (7, 0), (0, None), (0xFFFF, None))))

    assert spec.board.cpuid is not None
    assert [(entry.leaf, entry.subleaf) for entry in spec.board.cpuid.entries] == [
        (0, None), (7, 0), (7, 5), (0xFFFF, None), (0x80000000, None),
    ]  # fmt: skip


def test_soft_npu_devices_come_back_under_generated_names_and_take_com4() -> None:
    source = spec_of(
        a=SoftNpuPciPort(pci_path=at(9)),
        b=SoftNpuP9(pci_path=at(10)),
        c=P9fs(source="s", target="t", chunk_size=1, pci_path=at(11)),
        e=SoftNpuPort(link_name="qsfp0", backend_id=spec_key("e-be")),
        e_be=DlpiNetworkBackend(vnic_name="v"),
    )

    spec = build(source, frozenset({FALCON}))

    assert list(to_latest(spec).components) == ["e", "e-be", "p9fs-0.11.0", "softnpu-p9-0.10.0", "softnpu-pci-0.9.0"]
    assert list(spec.serial) == ["com4"]


def test_generated_names_stand_for_soft_npu_devices_in_the_list_of_pci_paths() -> None:
    spec = build(spec_of(s=SoftNpuP9(pci_path=at(9)), v=socket(4)), frozenset({FALCON}))

    assert {key: str(path) for key, path in spec.pci_paths().items()} == {"softnpu-p9-0.9.0": "0.9.0", "v": "0.4.0"}


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ({"a": SoftNpuP9(pci_path=at(9)), "b": SoftNpuP9(pci_path=at(10))}, "soft_npu_p9_in_use"),
        ({"a": SoftNpuPciPort(pci_path=at(9)), "com4": SerialPort(num=SerialPortNumber.COM4)}, "component_name_in_use"),
        ({"a": SoftNpuPciPort(pci_path=at(9)), "z": SerialPort(num=SerialPortNumber.COM4)}, "serial_port_in_use"),
        ({"a": SoftNpuPort(link_name="q", backend_id=spec_key("x"))}, "network_backend_not_found"),
    ],
)
def test_soft_npu_devices_that_clash_are_refused(parts: dict[str, Component], code: str) -> None:
    with pytest.raises(SpecBuildError) as caught:
        build(spec_of(**parts), frozenset({FALCON}))

    assert caught.value.code == code


def test_a_generated_name_that_is_taken_is_refused_and_overwrites_nothing() -> None:
    parts = {spec_key("x"): SoftNpuP9(pci_path=at(10)), spec_key("softnpu-p9-0.10.0"): COM1}
    spec = build(InstanceSpec(board=BOARD, components=in_key_order(parts)), frozenset({FALCON}))

    with pytest.raises(SpecBuildError) as caught:
        to_latest(spec)

    assert caught.value.code == "component_name_in_use"


def test_every_field_of_the_internal_spec_reaches_the_document() -> None:
    """A field that `to_latest` forgot would be lost in every migration: each is dropped once, and must be missed."""
    full = build(
        spec_of(
            smbios=SmbiosType1Input(manufacturer="m", product_name="p", serial_number="s", version=1),
            com1=COM1,
            d=disk("d-be", 4),
            d_be=FILE,
            bridge=PciPciBridge(downstream_bus=1, pci_path=at(5)),
            boot=BootSettings(order=()),
            v=VirtioSocket(guest_cid=3, pci_path=at(6)),
            p9=SoftNpuP9(pci_path=at(7)),
        ),
        frozenset({FALCON}),
    )
    whole = document.serialise(to_latest(full))

    filled = {name for name in vars_of(full) if getattr(full, name) not in ({}, None) and name != "board"}
    for name in filled:
        assert document.serialise(to_latest(dataclasses.replace(full, **{name: vars_of(Spec(BOARD))[name]}))) != whole
    assert filled == {"disks", "serial", "pci_bridges", "boot_settings", "vsock", "soft_npu", "smbios"}


def vars_of(spec: Spec) -> dict[str, Any]:
    return {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}


# ---- creatable


def rules(spec: InstanceSpec) -> list[tuple[str | None, str]]:
    return [(problem.component, problem.rule) for problem in problems(build(spec))]


VOLUME = CrucibleStorageBackend(
    request_json='{"type":"url","id":"6f5e0c1a-9b7d-4e2f-8a3c-000000000001","block_size":512,"url":"http://h/"}',
    readonly=False,
)
NO_VOLUME = CrucibleStorageBackend(request_json="no", readonly=True)


def test_a_sound_machine_passes() -> None:
    spec = spec_of(
        com1=COM1,
        bridge=PciPciBridge(downstream_bus=7, pci_path=at(5)),
        inner=PciPciBridge(downstream_bus=8, pci_path=at(0, bus=7)),
        d=disk("d-be", 4),
        d_be=VOLUME,
        e=disk("e-be", 1, bus=8),
        e_be=BlobStorageBackend(base64="AGVsbG8=", readonly=True),
        boot=BootSettings(order=(BootOrderEntry(id=spec_key("d")),)),
        v=VirtioSocket(guest_cid=3, pci_path=at(6)),
        smbios=SmbiosType1Input(manufacturer="x" * 64, product_name="", serial_number="", version=0),
    )

    check_creatable(build(spec))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (spec_of(), (None, "com1_missing")),
        (spec_of(BOARD.model_copy(update={"cpus": 0}), com1=COM1), (None, "cpus_zero")),
        (spec_of(BOARD.model_copy(update={"memory_mb": 0}), com1=COM1), (None, "memory_size")),
        (spec_of(BOARD.model_copy(update={"memory_mb": 2**32 + 1}), com1=COM1), (None, "memory_size")),
        (spec_of(com1=COM1, v=VirtioSocket(guest_cid=2, pci_path=at(4))), ("v", "guest_cid")),
        (spec_of(com1=COM1, v=VirtioSocket(guest_cid=2**32 - 1, pci_path=at(4))), ("v", "guest_cid")),
        (spec_of(com1=COM1, v=VirtioSocket(guest_cid=3, pci_path=at(0))), ("v", "pci_path_of_chipset")),
        (spec_of(com1=COM1, v=VirtioSocket(guest_cid=3, pci_path=at(1, function=3))), ("v", "pci_path_of_chipset")),
        (spec_of(com1=COM1, d=disk("b", 4, bus=1), b=FILE), ("d", "pci_bus_without_bridge")),
        (spec_of(com1=COM1, x=bridge(0, 4)), ("x", "downstream_bus_zero")),
        (spec_of(com1=COM1, x=bridge(1, 4), y=bridge(1, 5)), ("y", "downstream_bus_in_use")),
        (spec_of(com1=COM1, x=bridge(1, 4, bus=1)), ("x", "pci_bus_without_bridge")),
        (spec_of(com1=COM1, d=disk("b", 4), b=blob("AGVsbG8")), ("b", "base64")),
        (spec_of(com1=COM1, d=disk("b", 4), b=blob("é")), ("b", "base64")),
        (spec_of(com1=COM1, d=disk("b", 4), b=NO_VOLUME), ("b", "volume_request")),
        (spec_of(com1=COM1, d=disk("b", 4), b=VOLUME, e=disk("c", 5), c=VOLUME), ("c", "volume_id_in_use")),
        (spec_of(com1=COM1, smbios=smbios(manufacturer="x" * 65)), (None, "smbios_manufacturer")),
        (spec_of(com1=COM1, smbios=smbios(serial_number="\0")), (None, "smbios_serial_number")),
    ],
)  # fmt: skip
def test_a_machine_that_no_host_can_create_is_refused(spec: InstanceSpec, expected: tuple[str | None, str]) -> None:
    assert rules(spec) == [expected]


def test_a_boot_disk_behind_a_bridge_is_refused() -> None:
    spec = spec_of(
        com1=COM1,
        bridge=PciPciBridge(downstream_bus=1, pci_path=at(5)),
        d=disk("b", 4, bus=1),
        b=FILE,
        boot=BootSettings(order=(BootOrderEntry(id=spec_key("d")),)),
    )

    assert rules(spec) == [("d", "boot_disk_bus")]


def test_all_problems_are_named_at_once_each_with_what_is_allowed() -> None:
    spec = spec_of(
        BOARD.model_copy(update={"cpus": 0, "memory_mb": 0}), v=VirtioSocket(guest_cid=0, pci_path=at(9, bus=3))
    )

    with pytest.raises(SpecCreatableError) as caught:
        check_creatable(build(spec))

    found = caught.value.details["problems"]
    assert [problem["rule"] for problem in found] == [
        "cpus_zero", "memory_size", "com1_missing", "pci_bus_without_bridge", "guest_cid",
    ]  # fmt: skip
    assert all(problem["allowed"] for problem in found)


@pytest.mark.parametrize("text", ["AGVsbG8", "AGVsbG9=", "AGVsbG8=\n", "AGVs bG8=", "AGVsbG8==", "=", "é"])
def test_base64_that_could_be_written_otherwise_is_refused(text: str) -> None:
    """The real decoder takes exactly one text for each sequence of bytes."""
    assert rules(spec_of(com1=COM1, d=disk("b", 4), b=blob(text))) == [("b", "base64")]


def test_any_whole_mib_of_memory_is_whole_pages() -> None:
    """So the alignment of memory needs no rule of its own."""
    for memory_mb in (1, 3, 2**32):
        assert rules(spec_of(BOARD.model_copy(update={"memory_mb": memory_mb}), com1=COM1)) == []


# ---- API spec -> machine -> API spec, up to the spellings that are allowed to change


def respelled(data: st.DataObject, node: Any, where: tuple[str, ...] = ()) -> Any:
    """The same document otherwise: order of keys and entries, nulls, UUID keys, features, ignored fields."""
    if isinstance(node, list):
        items = [respelled(data, item, (*where, "[]")) for item in node]
        if where[-1:] == ("features",):
            return items * data.draw(st.integers(1, 2)) if items else items
        return data.draw(st.permutations(items)) if where[-1:] == ("entries",) else items
    if not isinstance(node, dict):
        is_uuid_text = isinstance(node, str) and where[-1:] in (("backend_id",), ("id",)) and keys.is_uuid(node)
        return data.draw(st.sampled_from([node, node.upper(), f"{{{node}}}"])) if is_uuid_text else node
    members = []
    for key, value in node.items():
        if value is None and key in ("workers", "subleaf", "smbios") and data.draw(st.booleans()):
            continue
        spelled = key
        if where == ("components",) and keys.is_uuid(key):
            spelled = data.draw(st.sampled_from([key, key.upper(), key.replace("-", ""), f"urn:uuid:{key}"]))
        members.append((spelled, respelled(data, value, (*where, key))))
    if not where or where[-1] == "pci_path":
        members.append(("ignored", {"whatever": 1}))
    order = data.draw(st.permutations(members))
    return dict(order)


@UNHURRIED
@given(st.data(), machines())
def test_api_to_machine_to_api_is_the_identity_but_for_spellings(data: st.DataObject, spec: InstanceSpec) -> None:
    """Which spellings: those of propolis.md 1.7, and no others."""
    text = compact(respelled(data, document.to_json(spec)))

    again = to_latest(build(document.parse(LATEST, text)))

    assert document.serialise(again) == document.serialise(spec)


@UNHURRIED
@given(st.data(), machines(), st.sampled_from(CHAIN.names))
def test_a_machine_is_the_same_in_every_version_that_can_say_it(
    data: st.DataObject, spec: InstanceSpec, version: str
) -> None:
    try:
        older = CHAIN.convert(spec, version)
    except LossyDowngradeError:
        return

    assert build(older) == build(spec)
