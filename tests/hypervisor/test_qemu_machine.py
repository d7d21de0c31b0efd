"""From a plan to QEMU's arguments: all of it is there, at its place, and what cannot be is told by name before.

`fixtures/qemu/arguments.txt` holds the arguments of a machine with everything, one a line; values are indented.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from tests.hypervisor.qemu_hosts import QemuHosts, plan_of, requires_qemu, short_directory
from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.base import (
    BoardPlan,
    DiskPlan,
    GuestPlan,
    InjectorPlan,
    NicPlan,
    PciAddress,
    RunState,
    SerialPortPlan,
)
from vmmigrate.hypervisor.qemu.belongings import unsaved
from vmmigrate.hypervisor.qemu.files import QemuFiles
from vmmigrate.hypervisor.qemu.machine import (
    SANDBOX,
    arguments,
    base_cpu,
    locked_files,
    mac_of,
    machine_type,
    nbd_node,
    problems,
)
from vmmigrate.hypervisor.qemu.settings import QemuFacts, QemuSettings, read_facts
from vmmigrate.memory import GIB, MIB, RamLayout, Region
from vmmigrate.spec.latest import Cpuid, CpuidEntry, CpuidVendor

GOLDEN = Path(__file__).parents[2] / "fixtures" / "qemu" / "arguments.txt"
INSTANCE = "5f1b5b5e-5d3c-4f0e-9b6d-000000000001"
FILES = QemuFiles(Path("/run/vmmigrate/0a1b2c3d"))
STAMP = '{"stamp": "whose guest it is, with, commas"}'

FACTS = QemuFacts(
    version=(7, 2, 22),
    machine_types=["pc-i440fx-7.2", "pc-i440fx-8.0"],
    cpu_models=["qemu64", "EPYC"],
    features=frozenset({"sse", "sse2"}),
    drivers=frozenset({"raw", "file", "nbd", "https"}),
    has_sandbox=True,
)
SETTINGS = QemuSettings(
    regions={
        "volume-at-a-host": "nbd://storage.example:10810/volume%20one",
        "volume-at-a-socket": "nbd+unix:///two?socket=/run/nbd/two",
    },
    kernels=[Path("/srv/kernels")],
)


def two_features(edx: int = 0x0600_0000) -> Cpuid:
    """The list of a processor that has SSE and SSE2; in leaf 1 something else, if it is said."""
    return Cpuid(
        vendor=CpuidVendor.AMD,
        entries=(
            CpuidEntry(leaf=0, subleaf=None, eax=1, ebx=0x68747541, ecx=0x444D4163, edx=0x69746E65),
            CpuidEntry(leaf=1, subleaf=None, eax=0x00A00F11, ebx=0x800, ecx=0, edx=edx),
        ),
    )


def disk(name: str = "disk-0", place: PciAddress = (0, 4, 0), **fields: Any) -> DiskPlan:
    kind = {"model": "virtio", "backend_kind": "file", "readonly": False, "backend": {"path": "/disk"}, **fields}
    return DiskPlan(name=name, backend_name=f"{name}-backend", pci_path=place, **kind)


def volume(name: str, place: PciAddress, identity: str, plain: dict[str, str] | None = None, **fields: Any) -> DiskPlan:
    backend = {"volume_id": identity, "generation": 1, "path": None, "plain": plain}
    return disk(name, place, backend_kind="crucible", backend=backend, **fields)


def nic(name: str = "nic-0", place: PciAddress = (0, 8, 0), **fields: Any) -> NicPlan:
    return NicPlan(name, f"{name}-backend", fields.pop("vnic_name", "vnic0"), place, **fields)


EVERYTHING = GuestPlan(
    INSTANCE,
    RamLayout.for_size(4 * GIB),
    2,
    serial_ports=(SerialPortPlan("console", "com1"), SerialPortPlan("debug", "com4")),
    disks=(
        disk("root", (0, 4, 0), backend={"path": '/images/one, two and "three".img'}),
        disk("cloud-init", (0, 4, 1), backend_kind="blob", readonly=True, backend={"contents": b"blob"}),
        disk("fast", (0, 31, 7), model="nvme", serial="NVME,1"),
        disk("fast-too", (0, 31, 0), model="nvme", serial="NVME 2"),
        volume("at-a-host", (0, 6, 0), "volume-at-a-host"),
        volume("at-a-socket", (0, 7, 0), "volume-at-a-socket", readonly=True),
        volume("at-an-address", (0, 9, 0), "plain-url", {"url": "https://storage.example/a,b"}, readonly=True),
        volume("a-file", (0, 10, 0), "plain-file", {"file": "/volumes/a,b"}),
    ),
    nics=(
        nic("nic-0", (0, 8, 0), vnic_name="vnic,0", interface_id="c5f8b8a0-0000-4000-8000-000000000001"),
        nic("nic-1", (0, 1, 4), vnic_name="vnic1"),
    ),
    program={
        "name": "kernel",
        "kernel": "/srv/kernels/a,b",
        "initrd": "/srv/kernels/c",
        "append": "quiet a=1,2",
        "vitals_gpa": 4096,
    },
    board=BoardPlan(
        boot_order=("fast", "root"),
        smbios={"manufacturer": "Oxide, Inc.", "product_name": "a=b,,c", "serial_number": ",", "version": "7"},
        cpuid=two_features(),
        pvpanic_isa=True,
    ),
    like={"hypervisor": "qemu", "machine_type": "pc-i440fx-7.2", "cpu_model": "qemu64"},
)
PLAIN = GuestPlan("an instance whose id is no UUID", RamLayout.for_size(32 * MIB), 1)


def arguments_of(plan: GuestPlan, settings: QemuSettings = SETTINGS, *, for_migration: bool = False) -> list[str]:
    return arguments(plan, settings, FACTS, FILES, stamp=STAMP, for_migration=for_migration)


def after(option: str, words: list[str]) -> list[str]:
    """The values of an option, in their order."""
    return [words[n + 1] for n, word in enumerate(words) if word == option]


def fields_of(argument: str) -> dict[str, str]:
    """As QEMU takes an argument apart: commas part, and two of them are one that does not."""
    parts = argument.replace(",,", "\0").split(",")
    named = [part.replace("\0", ",").partition("=") for part in parts]
    return {name: value for name, _, value in named}


def devices_of(plan: GuestPlan, settings: QemuSettings = SETTINGS) -> dict[str, dict[str, str]]:
    """The arguments of the devices that are disks and NICs, by QEMU's id for them."""
    devices = [fields_of(argument) for argument in after("-device", arguments_of(plan, settings))]
    return {device["id"]: device for device in devices if device.get("id", "").startswith(("dev", "nic"))}


# ---- the whole


def test_a_machine_with_everything_has_the_golden_arguments() -> None:
    golden = [line.removeprefix("    ") for line in GOLDEN.read_text().splitlines()]

    assert arguments_of(EVERYTHING, for_migration=True) == golden


def test_a_guest_that_arrives_differs_in_nothing_but_that_it_waits() -> None:
    waiting, starting = arguments_of(EVERYTHING, for_migration=True), arguments_of(EVERYTHING)

    assert waiting == [*starting, "-incoming", "defer"]


def test_a_plain_machine_has_no_argument_of_what_it_has_not() -> None:
    words = arguments_of(PLAIN)

    assert not {"-uuid", "-smbios", "-device", "-blockdev", "-netdev", "-kernel", "-incoming"} & set(words)


def test_the_host_chooses_binary_accelerator_and_processor() -> None:
    chosen = replace(SETTINGS, binary="/opt/qemu", accelerator="kvm", cpu_model="EPYC")

    words = arguments_of(PLAIN, chosen)

    assert (words[0], after("-accel", words), after("-cpu", words)) == ("/opt/qemu", ["kvm"], ["EPYC"])


def test_the_stamp_is_what_the_guest_will_remember() -> None:
    objects = [json.loads(text) for text in after("-object", arguments_of(PLAIN))]

    stamp = next(entry for entry in objects if entry["qom-type"] == "authz-simple")
    assert stamp["identity"] == STAMP


def test_ram_is_as_large_as_the_layout_says() -> None:
    words = arguments_of(EVERYTHING)

    objects = [json.loads(text) for text in after("-object", words)]
    assert next(entry for entry in objects if "size" in entry)["size"] == 4 * GIB
    assert after("-m", words) == [f"{4 * GIB // 1024}K"]


@pytest.mark.parametrize("has_sandbox", [True, False])
def test_a_qemu_has_a_sandbox_where_it_can_have_one(has_sandbox: bool) -> None:
    """One that was built without seccomp would not start with it."""
    facts = replace(FACTS, has_sandbox=has_sandbox)

    words = arguments(PLAIN, SETTINGS, facts, FILES, stamp=STAMP, for_migration=False)

    assert after("-sandbox", words) == [SANDBOX[1]] * has_sandbox


# ---- machine and processor


def test_without_a_source_the_machine_is_the_newest_and_the_processor_the_hosts() -> None:
    assert machine_type(PLAIN, SETTINGS, FACTS) == "pc-i440fx-8.0"
    assert base_cpu(PLAIN, SETTINGS) == "qemu64"


def test_the_host_may_choose_a_machine_that_others_have_too() -> None:
    chosen = replace(SETTINGS, machine_type="pc-i440fx-7.2")
    arrived = replace(PLAIN, like={"hypervisor": "qemu", "machine_type": "pc-i440fx-8.0", "cpu_model": "EPYC"})

    assert machine_type(PLAIN, chosen, FACTS) == "pc-i440fx-7.2"
    assert machine_type(arrived, chosen, FACTS) == "pc-i440fx-8.0"


def test_a_guest_that_arrives_gets_the_machine_and_the_processor_of_its_source() -> None:
    plan = replace(PLAIN, like={"hypervisor": "qemu", "machine_type": "pc-i440fx-7.2", "cpu_model": "EPYC"})

    assert problems(plan, SETTINGS, FACTS) == []
    assert machine_type(plan, SETTINGS, FACTS) == "pc-i440fx-7.2"
    assert base_cpu(plan, SETTINGS) == "EPYC"


@pytest.mark.parametrize("hypervisor", ["qemu", "bhyve", "", None])
@pytest.mark.parametrize("fact", ["machine_type", "cpu_model"])
def test_no_fact_that_a_peer_told_reaches_the_arguments_unless_this_qemu_knows_it(
    fact: str, hypervisor: str | None
) -> None:
    """Facts come from the source. `-machine X,initrd=/etc/shadow` would hand the guest a file of this host."""
    fitting = {"machine_type": "pc-i440fx-7.2", "cpu_model": "qemu64"}
    like = {**fitting, fact: "X,initrd=/etc/shadow", **({} if hypervisor is None else {"hypervisor": hypervisor})}
    plan = replace(PLAIN, like=like)

    refused = problems(plan, SETTINGS, FACTS)

    assert refused or not any("shadow" in word for word in arguments_of(plan))


def test_the_processor_that_a_spec_describes_goes_before_that_of_the_source() -> None:
    plan = replace(EVERYTHING, like={**EVERYTHING.like, "cpu_model": "EPYC"})

    assert base_cpu(plan, SETTINGS) == "base"
    assert after("-cpu", arguments_of(plan))[0].startswith("base,")


# ---- problems


def with_board(**fields: Any) -> GuestPlan:
    return replace(PLAIN, board=BoardPlan(**fields))


def with_disks(*disks: DiskPlan) -> GuestPlan:
    return replace(PLAIN, disks=disks)


def with_kernel(**fields: Any) -> GuestPlan:
    program = {"name": "kernel", "kernel": "/srv/kernels/vmlinuz", **fields}
    return replace(PLAIN, program={word: value for word, value in program.items() if value is not None})


def like(**facts: str) -> GuestPlan:
    fitting = {"hypervisor": "qemu", "machine_type": "pc-i440fx-7.2", "cpu_model": "qemu64"}
    return replace(PLAIN, like=fitting | facts)


ODD_LAYOUT = replace(PLAIN, layout=RamLayout([Region(0, MIB), Region(16 * MIB, MIB)]))
FAULTY: dict[str, tuple[GuestPlan, str]] = {
    "pcie": (with_board(enable_pcie=True), "machine: QEMU's i440FX has no PCIe (enable_pcie), allowed is false"),
    "hyper-v": (with_board(hv_interface="hyper_v"), "machine: hypervisor interface hyper_v"),
    "bridge": (with_board(bridges={"bridge-1": 3}), "bridge-1: "),
    "injector": (replace(PLAIN, injector=InjectorPlan("failures", 1, 0)), "failures: "),
    "layout": (ODD_LAYOUT, "machine: RAM must lie below 3 GiB"),
    "machine type": (like(machine_type="pc-i440fx-9.9"), "machine_type pc-i440fx-9.9 is not among those of this QEMU"),
    "no machine type": (like(machine_type=""), "machine_type  is not among"),
    "cpu model": (like(cpu_model="Cray"), "cpu_model Cray is not among those of this QEMU: qemu64, EPYC"),
    "cpuid": (with_board(cpuid=two_features(0x0700_0000)), "fxsr"),
    "bus": (with_disks(disk("far", (1, 4, 0))), "far: PCI bus 1 lies behind a bridge, allowed is bus 0"),
    "host bridge": (with_disks(disk("first", (0, 0, 0))), "first: PCI address 0.0.0 is that of the chipset's host bri"),
    "ISA bridge": (with_disks(disk("isa", (0, 1, 0))), "isa: PCI address 0.1.0 is that of the chipset's ISA bridge"),
    "IDE": (replace(PLAIN, nics=(nic("ide", (0, 1, 1)),)), "ide: PCI address 0.1.1 is that of the chipset's IDE"),
    "power": (with_disks(disk("pm", (0, 1, 3))), "pm: PCI address 0.1.3 is that of the chipset's power management"),
    "no function 0": (with_disks(disk("second", (0, 4, 1))), "second: PCI device 0.4 needs a function 0, and 1 is its"),
    "region": (with_disks(volume("d", (0, 4, 0), "elsewhere")), "d-backend: volume elsewhere has regions, and no NBD"),
    "ftp": (
        with_disks(volume("d", (0, 4, 0), "v", {"url": "ftp://storage.example/a"}, readonly=True)),
        "d-backend: this QEMU opens no ftp addresses",
    ),
    "http that this QEMU was built without": (
        with_disks(volume("d", (0, 4, 0), "v", {"url": "http://storage.example/a"}, readonly=True)),
        "d-backend: this QEMU opens no http addresses",
    ),
    "driver that is no protocol": (
        with_disks(volume("d", (0, 4, 0), "v", {"url": "file:/etc/shadow"}, readonly=True)),
        "d-backend: this QEMU opens no file addresses",
    ),
    "writable address": (
        with_disks(volume("d", (0, 4, 0), "v", {"url": "https://storage.example/a"})),
        "d-backend: a URL can only be read, allowed is readonly",
    ),
    "long interface": (
        replace(PLAIN, nics=(nic(vnic_name="v" * 16),)),
        "nic-0-backend: 'vvvvvvvvvvvvvvvv' is no inter",
    ),
    "interface of many bytes": (replace(PLAIN, nics=(nic(vnic_name="\u00e4" * 8),)), "nic-0-backend: "),
    "no interface": (replace(PLAIN, nics=(nic(vnic_name=""),)), "nic-0-backend: '' is no interface name"),
    "program": (replace(PLAIN, program={"name": "stress"}), "program 'stress': there is none of that name"),
    "program of no name": (replace(PLAIN, program={"name": None}), "program None: there is none of that name"),
    "program that is a list": (replace(PLAIN, program={"name": ["kernel"]}), "program ['kernel']: there is none"),
    "setting of idle": (replace(PLAIN, program={"name": "idle", "kernel": "/x"}), "program idle: no such setting 'ker"),
    "setting of kernel": (with_kernel(dtb="/srv/kernels/x"), "program kernel: no such setting 'dtb'"),
    "no kernel": (with_kernel(kernel=None), "program kernel: the setting kernel, a path, is needed"),
    "kernel elsewhere": (
        with_kernel(kernel="/etc/shadow"),
        "program kernel: kernel '/etc/shadow' lies in no directory",
    ),
    "kernel above": (
        with_kernel(kernel="/srv/kernels/../../etc/shadow"),
        "program kernel: kernel '/srv/kernels/../../etc/shadow' lies in",
    ),
    "kernel beside": (
        with_kernel(kernel="/srv/kernels-of-others"),
        "program kernel: kernel '/srv/kernels-of-others' lies in no directory",
    ),
    "relative kernel": (with_kernel(kernel="kernels/vmlinuz"), "program kernel: kernel 'kernels/vmlinuz' lies in no"),
    "empty kernel": (with_kernel(kernel=""), "program kernel: kernel '' lies in no directory"),
    "kernel that is a number": (with_kernel(kernel=7), "program kernel: kernel 7 lies in no directory"),
    "kernel with a NUL": (with_kernel(kernel="/srv/kernels/a\0b"), "program kernel: kernel '/srv/kernels/a\\x00b'"),
    "initrd elsewhere": (
        with_kernel(initrd="/etc/shadow"),
        "program kernel: initrd '/etc/shadow' lies in no directory",
    ),
    "long append": (with_kernel(append="x" * 2001), "program kernel: append must be a text of at most 2000"),
    "append of two lines": (with_kernel(append="a\nb"), "program kernel: append must be"),
    "append with a NUL": (with_kernel(append="a\0b"), "program kernel: append must be"),
    "append that is a list": (with_kernel(append=["a"]), "program kernel: append must be"),
    "vitals within a page": (with_kernel(vitals_gpa=4095), "program kernel: vitals_gpa must be the address of a page"),
    "vitals in the hole": (with_kernel(vitals_gpa=3 * GIB), "program kernel: vitals_gpa must be"),
    "vitals below zero": (with_kernel(vitals_gpa=-4096), "program kernel: vitals_gpa must be"),
    "vitals that are true": (with_kernel(vitals_gpa=True), "program kernel: vitals_gpa must be"),
    "vitals that are a text": (with_kernel(vitals_gpa="4096"), "program kernel: vitals_gpa must be"),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_what_cannot_be_is_told_by_name(fault: str) -> None:
    plan, text = FAULTY[fault]

    told = problems(plan, SETTINGS, FACTS)

    assert len(told) == 1
    assert text in told[0]


def test_a_machine_with_everything_has_no_problem() -> None:
    assert problems(EVERYTHING, SETTINGS, FACTS) == []
    assert problems(PLAIN, SETTINGS, FACTS) == []


def test_all_problems_are_told_at_once() -> None:
    plan = GuestPlan(
        INSTANCE,
        ODD_LAYOUT.layout,
        1,
        disks=(disk("far", (1, 4, 0)), volume("d", (0, 5, 0), "elsewhere")),
        nics=(nic(vnic_name=""),),
        injector=InjectorPlan("failures", 1, 0),
        board=BoardPlan(enable_pcie=True, hv_interface="hyper_v", bridges={"bridge-1": 1, "bridge-2": 2}),
        program={"name": "kernel", "dtb": "", "append": "\0"},
    )

    told = problems(plan, SETTINGS, FACTS)

    assert len(told) == 12
    assert len(set(told)) == 12


def test_what_another_hypervisor_says_of_its_machine_chooses_none_here() -> None:
    """Typed payloads may come from anywhere; then this host chooses the machine."""
    plan = replace(PLAIN, like={"hypervisor": "bhyve", "machine_type": "i440fx"})

    assert problems(plan, SETTINGS, FACTS) == []
    assert machine_type(plan, SETTINGS, FACTS) == "pc-i440fx-8.0"


def test_in_qemus_own_network_interfaces_may_have_any_name() -> None:
    plan = replace(PLAIN, nics=(nic(vnic_name="a name that no interface of Linux has"),))

    assert problems(plan, replace(SETTINGS, network="user"), FACTS) == []


def test_a_second_nic_in_qemus_own_network_is_a_problem() -> None:
    """QEMU saves both as `slirp` 0, and loads both into the first: such a guest could not be moved."""
    plan = replace(PLAIN, nics=(nic("nic-0", (0, 8, 0)), nic("nic-1", (0, 9, 0))))

    told = problems(plan, replace(SETTINGS, network="user"), FACTS)

    assert len(told) == 1
    assert "nic-1" in told[0]


def test_a_function_of_the_chipsets_device_needs_no_function_0_of_the_plan() -> None:
    assert problems(with_disks(disk("beside", (0, 1, 2)), disk("too", (0, 1, 7))), SETTINGS, FACTS) == []


def test_a_volume_that_is_served_here_needs_no_address_of_its_own() -> None:
    plan = with_disks(volume("d", (0, 4, 0), "volume-at-a-host", {"url": "ftp://storage.example/a"}))

    assert problems(plan, SETTINGS, FACTS) == []


@pytest.mark.parametrize("word", ["kernel", "initrd"])
def test_a_link_out_of_the_directory_for_kernels_is_seen_through(word: str, tmp_path: Path) -> None:
    kernels, secret = tmp_path / "kernels", tmp_path / "secret"
    kernels.mkdir()
    secret.touch()
    (kernels / "vmlinuz").touch()
    (kernels / "link").symlink_to(secret)
    plan = with_kernel(**{"kernel": str(kernels / "vmlinuz"), word: str(kernels / "link")})

    told = problems(plan, replace(SETTINGS, kernels=[kernels.resolve()]), FACTS)

    assert len(told) == 1
    assert f"{word} '{kernels / 'link'}' lies in no directory" in told[0]


def test_a_link_that_leads_to_itself_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")

    told = problems(with_kernel(kernel=str(tmp_path / "loop")), replace(SETTINGS, kernels=[tmp_path.resolve()]), FACTS)

    assert len(told) == 1
    assert "loop" in told[0]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just("/srv/kernels/\0"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(
    program=st.fixed_dictionaries(
        {},
        optional={
            "name": st.sampled_from(["kernel", "idle"]) | json_values,
            **dict.fromkeys(["kernel", "initrd", "append", "vitals_gpa", "else"], json_values),
        },
    )
)
def test_a_program_of_anything_is_taken_or_told_of(program: Mapping[str, Any]) -> None:
    """A migration's source sends it; what is taken becomes arguments of a process."""
    plan = replace(PLAIN, program=program)

    if not problems(plan, SETTINGS, FACTS):
        assert all(isinstance(word, str) and "\0" not in word for word in arguments_of(plan))


# ---- places


def test_every_device_is_at_the_address_of_the_plan() -> None:
    devices = devices_of(EVERYTHING)

    planned = [device.pci_path for device in (*EVERYTHING.disks, *EVERYTHING.nics)]
    assert [(device["bus"], device["addr"]) for device in devices.values()] == [
        ("pci.0", f"{slot:x}.{function:x}") for _, slot, function in planned
    ]


@given(
    places=st.lists(st.tuples(st.just(0), st.integers(2, 31), st.integers(0, 7)), unique=True, min_size=1, max_size=12)
)
def test_devices_that_share_a_slot_are_functions_of_one_and_others_are_not(places: list[PciAddress]) -> None:
    plan = with_disks(*(disk(f"disk-{n}", place) for n, place in enumerate(places)))

    devices = list(devices_of(plan).values())

    slots = [slot for _, slot, _ in places]
    shares = [device.get("multifunction") == "on" for device in devices]
    assert [device["addr"] for device in devices] == [f"{slot:x}.{function:x}" for _, slot, function in places]
    assert shares == [slots.count(slot) > 1 for slot in slots]


def test_a_disk_and_a_nic_can_share_a_slot() -> None:
    plan = replace(with_disks(disk("d", (0, 4, 1))), nics=(nic("n", (0, 4, 0)),))

    assert all(device["multifunction"] == "on" for device in devices_of(plan).values())
    assert problems(plan, SETTINGS, FACTS) == []


def test_disks_are_booted_in_the_order_of_the_plan_and_others_never() -> None:
    indexes = {name: device.get("bootindex") for name, device in devices_of(EVERYTHING).items()}

    assert {name: index for name, index in indexes.items() if index} == {"dev2": "1", "dev0": "2"}


def test_serial_ports_have_the_places_that_a_pc_gives_them() -> None:
    plan = replace(PLAIN, serial_ports=tuple(SerialPortPlan(f"port {n}", f"com{n}") for n in (4, 1, 3)))

    ports = [fields_of(argument) for argument in after("-device", arguments_of(plan))]

    assert [(port["chardev"], port["index"]) for port in ports] == [("com4", "3"), ("com1", "0"), ("com3", "2")]


@pytest.mark.parametrize(("pvpanic", "there"), [(True, True), (False, False), (None, False)])
def test_a_pvpanic_device_is_there_if_its_isa_part_is_wanted(pvpanic: bool | None, there: bool) -> None:
    words = arguments_of(with_board(pvpanic_isa=pvpanic))

    assert ("pvpanic" in after("-device", words)) is there


# ---- names and texts

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
commas = st.one_of(texts, st.text(",=a", max_size=8))


@given(manufacturer=commas, product_name=commas, serial_number=commas, version=commas)
def test_smbios_texts_reach_the_guest_letter_by_letter(**smbios: str) -> None:
    words = arguments_of(with_board(smbios=smbios))

    told = fields_of(after("-smbios", words)[0])
    assert told == {
        "type": "1",
        "manufacturer": smbios["manufacturer"],
        "product": smbios["product_name"],
        "serial": smbios["serial_number"],
        "version": smbios["version"],
    }


@given(serial=commas, vnic_name=commas)
def test_serial_numbers_and_interfaces_are_one_value_whatever_stands_in_them(serial: str, vnic_name: str) -> None:
    plan = replace(with_disks(disk(model="nvme", serial=serial)), nics=(nic(vnic_name=vnic_name),))

    words = arguments_of(plan)

    assert devices_of(plan)["dev0"]["serial"] == serial
    assert fields_of(after("-netdev", words)[0])["ifname"] == vnic_name


@given(path=commas)
def test_paths_reach_qemu_letter_by_letter(path: str) -> None:
    plan = with_disks(disk(backend={"path": path}), volume("v", (0, 5, 0), "v", {"file": path}))

    nodes = [json.loads(text) for text in after("-blockdev", arguments_of(plan))]

    assert [(node["file"]["driver"], node["file"]["filename"]) for node in nodes] == [("file", path)] * 2


def test_every_file_is_locked_and_what_is_read_only_is_opened_so() -> None:
    nodes = [json.loads(text) for text in after("-blockdev", arguments_of(EVERYTHING))]

    assert [node["read-only"] for node in nodes] == [disk.readonly for disk in EVERYTHING.disks]
    assert all(node["read-only"] == node["file"]["read-only"] for node in nodes)
    assert all(node["file"]["locking"] == "on" for node in nodes if node["file"]["driver"] == "file")


def test_the_files_that_qemu_locks_for_writing_are_known() -> None:
    locked = locked_files(EVERYTHING, SETTINGS, FILES)

    assert locked == {
        0: Path('/images/one, two and "three".img'),
        2: Path("/disk"),
        3: Path("/disk"),
        7: Path("/volumes/a,b"),
    }


def test_a_blob_that_may_be_written_is_a_file_of_this_guest() -> None:
    plan = with_disks(disk("d"), disk("b", (0, 5, 0), backend_kind="blob", backend={"contents": b""}))

    assert locked_files(plan, SETTINGS, FILES) == {0: Path("/disk"), 1: FILES.blob(1)}


@pytest.mark.parametrize("spelling", [INSTANCE, INSTANCE.upper(), f"{{{INSTANCE}}}"])
def test_an_instance_whose_id_is_a_uuid_shows_it(spelling: str) -> None:
    assert after("-uuid", arguments_of(replace(PLAIN, instance_id=spelling))) == [INSTANCE]


def test_two_instances_have_processes_of_different_names() -> None:
    names = {after("-name", arguments_of(replace(PLAIN, instance_id=name)))[0] for name in ("a", "b", "a,b")}

    assert len(names) == 3
    assert all(name.count(",") == 1 for name in names)


# ---- MAC addresses


@given(interface_id=st.text(max_size=40), name=st.text(min_size=1, max_size=40))
def test_a_mac_address_is_unicast_and_locally_administered(interface_id: str, name: str) -> None:
    octets = [int(octet, 16) for octet in mac_of(nic(name, interface_id=interface_id)).split(":")]

    assert len(octets) == 6
    assert octets[0] & 0b11 == 0b10


def test_a_mac_address_stays_for_ever() -> None:
    """Both ends of a migration compute it, and they may be of different releases."""
    one = nic(interface_id="c5f8b8a0-0000-4000-8000-000000000001")

    assert mac_of(one) == mac_of(replace(one, name="renamed", vnic_name="vnic7", pci_path=(0, 9, 0)))
    assert mac_of(one) == "02:fd:44:67:01:3f"
    assert mac_of(nic("nic-0")) == "02:0e:6b:58:80:9d"


@given(ids=st.lists(st.text(min_size=1, max_size=40), unique=True, min_size=2, max_size=8))
def test_interfaces_have_different_mac_addresses(ids: list[str]) -> None:
    assert len({mac_of(nic(interface_id=identity)) for identity in ids}) == len(ids)


# ---- NBD


@pytest.mark.parametrize(
    ("address", "server", "export"),
    [
        ("nbd://storage.example/a", {"type": "inet", "host": "storage.example", "port": "10809"}, "a"),
        ("nbd://storage.example:1/a", {"type": "inet", "host": "storage.example", "port": "1"}, "a"),
        ("nbd://192.0.2.1", {"type": "inet", "host": "192.0.2.1", "port": "10809"}, ""),
        ("nbd://192.0.2.1/", {"type": "inet", "host": "192.0.2.1", "port": "10809"}, ""),
        ("nbd://[2001:db8::1]:10810/a/b", {"type": "inet", "host": "2001:db8::1", "port": "10810"}, "a/b"),
        ("nbd://h//a", {"type": "inet", "host": "h", "port": "10809"}, "/a"),
        ("nbd://h/a%20b%2Cc", {"type": "inet", "host": "h", "port": "10809"}, "a b,c"),
        ("nbd+unix:///a?socket=/run/nbd", {"type": "unix", "path": "/run/nbd"}, "a"),
        ("nbd+unix:///?socket=/run/n%2Cbd", {"type": "unix", "path": "/run/n,bd"}, ""),
        ("nbd+unix://?socket=/run/nbd", {"type": "unix", "path": "/run/nbd"}, ""),
    ],
)
def test_an_nbd_address_is_a_server_and_an_export(address: str, server: dict[str, str], export: str) -> None:
    assert nbd_node(address) == {"driver": "nbd", "server": server, "export": export}


@pytest.mark.parametrize(
    "address",
    [
        *("", "nbd", "nbd:", "nbd://", "nbd:///a", "nbd://:10809/a", "nbd:h:10809:exportname=a", "/run/nbd"),
        *("nbds://h/a", "nbd+vsock://1/a", "http://h/a", "nbd+unix:///a", "nbd+unix:///a?socket=", "nbd+unix://h/a?socket=/s"),
        *("nbd+unix:///a?socket=relative", "nbd+unix:///a?socket=/a&socket=/b", "nbd://h/a?tls-certificates=/x"),
        *("nbd://h:port/a", "nbd://h:65536/a", "nbd://h:-1/a", "nbd://[::1/a", "nbd://[h]/a"),
        *("nbd://h:0/a", "nbd://user:password@h/a", "nbd://h/a#b", "nbd+unix:///a?socket=/s&tls-hostname=h"),
    ],
)  # fmt: skip
def test_what_is_no_nbd_address_is_refused(address: str) -> None:
    """Nothing of an address is passed over: what the operator wrote is what is opened."""
    with pytest.raises(ValueError):
        nbd_node(address)


@given(address=st.one_of(st.text(), st.text("nbd+unix:/?[]@#%=&.0a", max_size=30).map(lambda rest: f"nbd://{rest}")))
def test_an_address_of_anything_is_a_node_or_refused(address: str) -> None:
    try:
        node = nbd_node(address)
    except ValueError:
        return
    assert node["driver"] == "nbd"
    assert isinstance(node["export"], str)


# ---- what a QEMU told


def answers(**changed: Any) -> dict[str, Any]:
    return {
        "query-version": {"qemu": {"major": 8, "minor": 2, "micro": 1}, "package": ""},
        "query-machines": [
            {"name": name}
            for name in (
                *("pc-i440fx-8.0", "pc", "none", "pc-q35-8.0", "pc-i440fx-10.0", "pc-i440fx-7.2", "pc-i440fx-2.12"),
                *("pc-i440fx-rhel7.6.0", "pc-i440fx-", "microvm", "pc-i440fx-7.1"),
            )
        ],
        "query-cpu-definitions": [
            {"name": "EPYC", "unavailable-features": []},
            {"name": "qemu64"},
            {"name": "Denverton", "unavailable-features": ["mpx"]},
        ],
        "query-cpu-model-expansion": {"model": {"name": "max", "props": {"sse": True, "sse2": False, "vendor": "x"}}},
        "query-qmp-schema": [
            {"name": "0", "meta-type": "object", "members": []},
            {"name": "1", "meta-type": "enum", "values": ["raw", "other"]},
            {"name": "2", "meta-type": "enum", "values": ["raw", "qcow2", "nbd"]},
            {"name": "migrate-incoming", "meta-type": "command", "arg-type": "3", "ret-type": "0"},
            {"name": "3", "meta-type": "object", "members": [{"name": "uri", "type": "str"}]},
            {"name": "4", "meta-type": "object", "members": [{"name": "exit-on-error", "type": "bool"}]},
        ],
        **changed,
    }


def test_a_qemu_that_can_be_told_to_stay_when_it_cannot_load_a_state_is_known_by_what_its_command_takes() -> None:
    told = answers()
    assert not read_facts(told, has_sandbox=True).outlives_bad_state

    told["query-qmp-schema"][3]["arg-type"] = "4"

    assert read_facts(told, has_sandbox=True).outlives_bad_state


def test_facts_are_what_qemu_told() -> None:
    facts = read_facts(answers(), has_sandbox=True)

    assert (facts.version, facts.version_text) == ((8, 2, 1), "8.2.1")
    assert facts.cpu_models == ["EPYC", "qemu64"]
    assert facts.drivers == {"raw", "qcow2", "nbd"}
    assert "sse" in facts.features
    assert "sse2" not in facts.features
    assert facts.has_sandbox


def test_machine_types_are_those_with_a_version_that_is_supported_the_newest_last() -> None:
    assert read_facts(answers(), has_sandbox=True).machine_types == ["pc-i440fx-7.2", "pc-i440fx-8.0", "pc-i440fx-10.0"]


def test_a_qemu_that_has_nothing_of_it_is_no_error() -> None:
    nothing = {"query-machines": [], "query-cpu-definitions": [], "query-qmp-schema": []}

    facts = read_facts(answers(**nothing), has_sandbox=False)

    assert (facts.machine_types, facts.cpu_models, facts.drivers) == ([], [], frozenset())


# ---- the machines that QEMU makes of it


@pytest.fixture
def short() -> Iterator[Path]:
    yield from short_directory()


@pytest.fixture
async def qemu_hosts(short: Path) -> AsyncIterator[QemuHosts]:
    hosts = QemuHosts(short)
    yield hosts
    await hosts.close()


def file_disk(root: Path, name: str, place: PciAddress, **fields: Any) -> DiskPlan:
    path = root / f"{name}, a file.img"
    path.write_bytes(bytes(MIB))
    return disk(name, place, backend={"path": str(path)}, **fields)


def real_plan(root: Path, *more: DiskPlan) -> GuestPlan:
    """Everything that there is in any QEMU, with nothing to boot."""
    return plan_of(
        {"name": "idle"},
        serial_ports=tuple(SerialPortPlan(f"port {n}", f"com{n}") for n in (1, 2, 3, 4)),
        disks=(
            file_disk(root, "second", (0, 4, 1)),
            file_disk(root, "first", (0, 4, 0)),
            disk("blob", (0, 31, 7), backend_kind="blob", backend={"contents": b"blob" * 128}),
            file_disk(root, "last", (0, 31, 0), readonly=True),
            file_disk(root, "beside-the-chipset", (0, 1, 2)),
            *more,
        ),
        nics=(nic("nic-0", (0, 8, 0), interface_id="c5f8b8a0-0000-4000-8000-000000000001"),),
        board=BoardPlan(
            boot_order=("first", "second"),
            smbios={
                "manufacturer": "Oxide, Inc.",
                "product_name": "a=b,,c",
                "serial_number": 'of "us"',
                "version": "7",
            },
            pvpanic_isa=True,
        ),
    )


async def made_places(guest: Any) -> dict[str, PciAddress]:
    """PCI addresses of the devices that have an id, as QEMU has them."""
    found = [device for bus in await guest.ask("query-pci") for device in bus["devices"]]
    return {d["qdev_id"]: (d["bus"], d["slot"], d["function"]) for d in found if d["qdev_id"]}


class TestInQemu:
    pytestmark = requires_qemu

    async def test_devices_sit_where_the_plan_says(self, qemu_hosts: QemuHosts, short: Path) -> None:
        plan = real_plan(short, file_disk(short, "nvme", (0, 12, 0), model="nvme", serial="NVME,1"))

        guest = await qemu_hosts.build(plan)

        planned = {f"dev{n}": disk.pci_path for n, disk in enumerate(plan.disks)}
        planned |= {f"nic{n}": nic.pci_path for n, nic in enumerate(plan.nics)}
        assert await made_places(guest) == planned

    async def test_devices_are_what_the_plan_says(self, qemu_hosts: QemuHosts, short: Path) -> None:
        plan = real_plan(short, file_disk(short, "nvme", (0, 12, 0), model="nvme", serial="NVME,1"))

        guest = await qemu_hosts.build(plan)

        async def told(device: str, name: str) -> Any:
            return await guest.ask("qom-get", path=f"/machine/peripheral/{device}", property=name)

        assert await told("dev5", "serial") == "NVME,1"
        assert (await told("nic0", "mac")).lower() == mac_of(plan.nics[0])
        assert [await told(f"dev{n}", "bootindex") for n in (0, 1, 2)] == [2, 1, -1]
        assert [await told(f"uart-com{n}", "index") for n in (1, 2, 3, 4)] == [0, 1, 2, 3]
        kinds = [entry["type"] for entry in await guest.ask("qom-list", path="/machine/peripheral-anon")]
        assert "child<pvpanic>" in kinds

    async def test_the_firmware_shows_what_smbios_says(self, qemu_hosts: QemuHosts, short: Path) -> None:
        """It copies the tables to below 1 MiB of the guest's RAM."""
        plan = real_plan(short)
        guest = await qemu_hosts.build(plan)
        assert await guest.ask("query-uuid") == {"UUID": plan.instance_id}

        await guest.run((1, 1))
        tables = guest.ram.view[0xE0000:0x100000]
        with trio.fail_after(20):
            while b"Oxide" not in bytes(tables):
                await trio.sleep(0.01)

        assert b'Oxide, Inc.\0a=b,,c\x007\0of "us"\0\0' in bytes(tables)
        tables.release()

    async def test_a_guest_with_everything_can_be_moved(self, qemu_hosts: QemuHosts, short: Path) -> None:
        guest = await qemu_hosts.build(real_plan(short))

        names = [described.instance_name for described in await guest.list_payloads()]

        assert len(set(names)) == len(names)
        assert {"0000:00:04.0/virtio-blk", "0000:00:04.1/virtio-blk", "0000:00:1f.7/virtio-blk", "serial#3"} <= {*names}
        assert "blob-backend" in names

    async def test_a_guest_with_an_nvme_disk_runs_and_stays(self, qemu_hosts: QemuHosts, short: Path) -> None:
        plan = plan_of(disks=(file_disk(short, "fast-disk", (0, 4, 0), model="nvme", serial="1"),))
        assert unsaved(plan)
        guest = await qemu_hosts.build(plan)

        await guest.run((1, 1))
        with trio.fail_after(20):
            while (await guest.status()).heartbeats < 5:
                await trio.sleep(0.01)
        with pytest.raises(HypervisorError) as caught:
            await guest.list_payloads()

        assert caught.value.code == "not_migratable"
        assert any("fast-disk" in device for device in caught.value.details["devices"])
        assert (await guest.status()).run_state is RunState.RUNNING

    async def test_a_guest_with_an_nvme_disk_that_was_to_be_moved_all_the_same_goes_on(
        self, qemu_hosts: QemuHosts, short: Path
    ) -> None:
        plan = plan_of(disks=(file_disk(short, "fast-disk", (0, 4, 0), model="nvme", serial="1"),))
        guest = await qemu_hosts.build(plan)
        await guest.run((1, 1))

        with pytest.raises(HypervisorError):
            await guest.pause_for_handoff("migration-that-nobody-asked-about")

        assert (await guest.status()).run_state is RunState.RUNNING
