"""A CPUID list as a CPU of QEMU's: exactly, or refused leaf by leaf and bit by bit."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hypervisor.qemu_hosts import QEMU
from vmmigrate.hypervisor.qemu.cpuid import (
    FEATURES,
    PLACES,
    REGISTERS,
    VENDORS,
    CpuModel,
    Word,
    available_features,
    check_words,
    cpu_model,
)
from vmmigrate.spec.latest import Cpuid, CpuidEntry, CpuidVendor

AMD, INTEL = CpuidVendor.AMD, CpuidVendor.INTEL
BRAND: Final = "vmmigrate test CPU @ 3.0GHz"
ALIASES: Final = 0x0183_F3FF

TCG_NAMES: Final = """
    pni pclmulqdq monitor ssse3 fma cx16 sse4.1 sse4.2 movbe popcnt aes xsave avx f16c rdrand hypervisor
    fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush acpi mmx fxsr sse sse2 ss arat
    fsgsbase bmi1 avx2 smep bmi2 erms mpx adx smap pcommit clflushopt clwb umip pku vaes la57 pks xsaveopt xgetbv1
    lahf-lm svm cr8legacy abm sse4a syscall nx mmxext pdpe1gb rdtscp lm 3dnowext 3dnow npt vgif svme-addr-chk
"""
TCG_HAS: Final = frozenset(TCG_NAMES.split())
"""What QEMU 7.2 can emulate."""

FULL: Final = TCG_HAS - {"mpx", "pku"}
"""All of it that a list can tell together with the leaf on XSAVE areas."""

Registers = tuple[int, int, int, int]
Leaves = dict[tuple[int, int | None], Registers]


# ---- lists


def leaves_of(vendor: CpuidVendor, names: frozenset[str] = FULL) -> Leaves:
    """A straightforward list of one CPU per package with these features."""
    vendor_text = struct.unpack("<3I", VENDORS[vendor].encode())
    vendor_words = (vendor_text[0], vendor_text[2], vendor_text[1])
    version = 0x00A0_0F11
    brand = struct.unpack("<12I", BRAND.encode().ljust(48, b"\0"))
    state = (3 | (4 if "avx" in names else 0)) if "xsave" in names else 0
    size = (0x340 if state & 4 else 0x240) if state else 0
    aliases = word_of(names, 0x1, "EDX") & ALIASES if vendor is AMD else 0
    return {
        (0x0, None): (0xD, *vendor_words),
        (0x1, None): (version, 0x800, word_of(names, 0x1, "ECX"), word_of(names, 0x1, "EDX")),
        (0x6, None): (word_of(names, 0x6, "EAX"), 0, 0, 0),
        (0x7, 0): (0, word_of(names, 0x7, "EBX"), word_of(names, 0x7, "ECX"), word_of(names, 0x7, "EDX")),
        (0xD, 0): (state, size and 0x240, size, 0),
        (0xD, 1): (word_of(names, 0xD, "EAX", 1), size, 0, 0),
        (0xD, 2): (0x100, 0x240, 0, 0) if state & 4 else (0, 0, 0, 0),
        (0x8000_0000, None): (0x8000_000A, *vendor_words),
        (0x8000_0001, None): (
            version,
            0,
            word_of(names, 0x8000_0001, "ECX"),
            word_of(names, 0x8000_0001, "EDX") | aliases,
        ),
        (0x8000_0002, None): brand[0:4],
        (0x8000_0003, None): brand[4:8],
        (0x8000_0004, None): brand[8:12],
        (0x8000_0008, None): (0x3930 if {"lm", "la57"} <= names else 0x3030, 0, 0, 0),
        (0x8000_000A, None): (1, 0x10, 0, word_of(names, 0x8000_000A, "EDX")) if "svm" in names else (0, 0, 0, 0),
    }


def word_of(names: frozenset[str], leaf: int, register: str, subleaf: int = 0) -> int:
    return sum(1 << bit for bit, name in FEATURES[Word(leaf, subleaf, register)].items() if name in names)


def cpuid_of(vendor: CpuidVendor, leaves: Leaves) -> Cpuid:
    entries = tuple(
        CpuidEntry(leaf=leaf, subleaf=subleaf, eax=eax, ebx=ebx, ecx=ecx, edx=edx)
        for (leaf, subleaf), (eax, ebx, ecx, edx) in leaves.items()
    )
    return Cpuid(vendor=vendor, entries=entries)


def amended(vendor: CpuidVendor, leaf: int, subleaf: int | None = None, **registers: int) -> Leaves:
    """The straightforward list with a leaf in which these registers are set to something else."""
    leaves = leaves_of(vendor)
    before = dict(zip(("eax", "ebx", "ecx", "edx"), leaves.get((leaf, subleaf), (0, 0, 0, 0)), strict=True))
    assert registers.keys() <= before.keys()
    after = before | registers
    return leaves | {(leaf, subleaf): (after["eax"], after["ebx"], after["ecx"], after["edx"])}


def problems_of(vendor: CpuidVendor, leaves: Leaves, **options: Any) -> list[str]:
    _, problems = cpu_model(cpuid_of(vendor, leaves), **options)
    return problems


def words_of(model: CpuModel) -> dict[Word, int]:
    """The feature words that the properties of a model stand for."""
    words: dict[Word, int] = {}
    for name, value in model.properties:
        if name in PLACES:
            assert value == "on"
            word, bit = PLACES[name]
            words[word] = words.get(word, 0) | 1 << bit
    return words


def feature_words(words: Mapping[Word, int]) -> list[dict[str, Any]]:
    """As `qom-get` gives them."""
    return [
        {"cpuid-input-eax": leaf, "cpuid-input-ecx": subleaf, "cpuid-register": register, "features": value}
        for (leaf, subleaf, register), value in words.items()
    ]


def words_asked_for(leaves: Leaves) -> dict[Word, int]:
    return {
        word: registers[REGISTERS.index(word.register)]
        for (leaf, subleaf), registers in leaves.items()
        for word in FEATURES
        if (word.leaf, word.subleaf) == (leaf, subleaf or 0)
    }


def as_qemu_reports(leaves: Leaves) -> dict[Word, int]:
    return words_asked_for(leaves) | {Word(0xD, 0, "EAX"): leaves[0xD, 0][0]}


# ---- what can be had


def test_every_name_stands_for_one_bit_and_every_bit_is_one_of_a_register() -> None:
    assert len(PLACES) == sum(len(names) for names in FEATURES.values())
    assert all(word.register in REGISTERS and 0 <= bit < 32 for word, bit in PLACES.values())


@pytest.mark.parametrize("vendor", [AMD, INTEL])
def test_a_list_of_what_qemu_can_say_has_no_problems(vendor: CpuidVendor) -> None:
    assert problems_of(vendor, leaves_of(vendor), available=TCG_HAS) == []


def test_the_argument_says_everything_in_one_text() -> None:
    leaves = leaves_of(INTEL, frozenset({"fpu", "sse4.1", "lm", "bmi1"}))

    model, problems = cpu_model(cpuid_of(INTEL, leaves), "base")

    assert problems == []
    assert model.argument() == (
        "base,enforce=on,vendor=GenuineIntel,level=0xd,xlevel=0x8000000a,level-func7=0,cpuid-0xb=off,family=25,model=1,"
        f"stepping=1,model-id={BRAND},phys-bits=48,sse4.1=on,fpu=on,bmi1=on,lm=on"
    )


@given(vendor=st.sampled_from([AMD, INTEL]), names=st.frozensets(st.sampled_from(sorted(FULL))))
def test_the_properties_stand_for_the_words_that_were_asked_for(vendor: CpuidVendor, names: frozenset[str]) -> None:
    leaves = leaves_of(vendor, names | {"xsave", "svm", "lm"})

    model, problems = cpu_model(cpuid_of(vendor, leaves))

    asked = words_asked_for(leaves)
    if vendor is AMD:  # these follow leaf 1, so nobody has to say them
        asked[Word(0x8000_0001, 0, "EDX")] &= ~ALIASES
    assert problems == []
    assert words_of(model) == {word: value for word, value in asked.items() if value}


def test_a_list_of_nothing_is_a_cpu_of_nothing() -> None:
    model, problems = cpu_model(Cpuid(vendor=AMD, entries=()))

    assert problems == []
    assert words_of(model) == {}
    assert ("level", "0x0") in model.properties
    assert ("xlevel", "0x80000000") in model.properties


def test_without_the_leaves_that_say_it_the_highest_leaf_is_the_highest_listed() -> None:
    leaves = leaves_of(AMD)
    del leaves[0x0, None], leaves[0x8000_0000, None], leaves[0x8000_000A, None]
    leaves[0x8000_0001, None] = leaves_of(AMD, FULL - {"svm"})[0x8000_0001, None]

    model, problems = cpu_model(cpuid_of(AMD, leaves))

    assert problems == []
    assert ("level", "0xd") in model.properties
    assert ("xlevel", "0x80000008") in model.properties


def test_leaf_b_is_off_unless_it_is_listed_as_qemu_gives_it() -> None:
    left_out, _ = cpu_model(cpuid_of(AMD, leaves_of(AMD)))
    zeros = leaves_of(AMD) | {(0xB, 0): (0, 0, 0, 0)}
    given_by_qemu = leaves_of(AMD) | {(0xB, 0): (0, 1, 0x100, 0), (0xB, 1): (0, 1, 0x201, 0), (0xB, 2): (0, 0, 2, 0)}

    assert ("cpuid-0xb", "off") in left_out.properties
    assert ("cpuid-0xb", "off") in cpu_model(cpuid_of(AMD, zeros))[0].properties
    assert ("cpuid-0xb", "on") in cpu_model(cpuid_of(AMD, given_by_qemu))[0].properties
    assert problems_of(AMD, zeros) == problems_of(AMD, given_by_qemu) == []


@pytest.mark.parametrize("bit", [(0x1, None, "ecx", 27), (0x7, 0, "ecx", 4)], ids=["osxsave", "ospke"])
def test_bits_that_follow_the_guests_cr4_may_have_either_value(bit: tuple[int, int | None, str, int]) -> None:
    leaf, subleaf, register, number = bit
    before = leaves_of(AMD)[leaf, subleaf][2]
    leaves = amended(AMD, leaf, subleaf, **{register: before | 1 << number})

    assert problems_of(AMD, leaves, available=TCG_HAS) == []
    assert check_words(cpuid_of(AMD, leaves), feature_words(as_qemu_reports(leaves_of(AMD)))) == []


@pytest.mark.parametrize("vendor", [AMD, INTEL])
def test_the_number_of_processors_in_a_package_is_the_hosts_to_fill_in_or_right(vendor: CpuidVendor) -> None:
    """The reference implementation sets both itself; a list with zeros there is the usual one."""
    ht, edx = 1 << 28, leaves_of(vendor)[0x1, None][3]
    cmp_legacy = {"ecx": leaves_of(vendor)[0x8000_0001, None][2] | (2 if vendor is AMD else 0)}
    cores = amended(vendor, 0x8000_0001, **cmp_legacy) | {(0x8000_0008, None): (0x3930, 0, 0x2003, 0)}
    filled_in = cores | {(0x1, None): amended(vendor, 0x1, ebx=0x0004_0800, edx=edx | ht)[0x1, None]}

    assert problems_of(vendor, cores, cores=4) == []
    assert problems_of(vendor, filled_in, cores=4) == []
    assert len(problems_of(vendor, filled_in, cores=1)) == (4 if vendor is AMD else 3)


# ---- what is refused

REFUSED: Final[dict[str, tuple[CpuidVendor, Leaves, list[str]]]] = {
    "another vendor": (
        INTEL,
        amended(INTEL, 0x0, ebx=0x6874_7541),
        ["cpuid leaf 0x0 EBX is 0x68747541, allowed: 0x756e6547, which QEMU gives"],
    ),
    "no vendor in the extended leaf": (
        INTEL,
        amended(INTEL, 0x8000_0000, ebx=0),
        ["cpuid leaf 0x80000000 EBX is 0x0, allowed: 0x756e6547, which QEMU gives"],
    ),
    "a bit without a name": (
        AMD,
        amended(AMD, 0x7, 0, ecx=leaves_of(AMD)[0x7, 0][2] | 1 << 13),
        ["cpuid leaf 0x7.0 ECX bit 13: QEMU has no name for it, allowed: 0"],
    ),
    "a feature that the accelerator lacks": (
        AMD,
        amended(AMD, 0x1, ecx=leaves_of(AMD)[0x1, None][2] | 1 << 21),
        ["cpuid leaf 0x1 ECX bit 21 (x2apic): this QEMU does not have it, allowed: 0"],
    ),
    "a feature without the one it belongs to": (
        AMD,
        amended(AMD, 0x8000_0001, ecx=0) | {(0x8000_000A, None): (0, 0, 0, 1)},
        ["cpuid leaf 0x8000000a EDX bit 0 (npt): QEMU gives it with svm only, allowed: 0, or svm as well"],
    ),
    "an alias that is not its original": (
        AMD,
        amended(AMD, 0x8000_0001, edx=leaves_of(AMD)[0x8000_0001, None][3] & ~1),
        ["cpuid leaf 0x80000001 EDX bit 0: QEMU sets it by itself, allowed: 1"],
    ),
    "aliases in an Intel CPU": (
        INTEL,
        amended(INTEL, 0x8000_0001, edx=leaves_of(INTEL)[0x8000_0001, None][3] | 1),
        ["cpuid leaf 0x80000001 EDX bit 0: QEMU has no name for it, allowed: 0"],
    ),
    "HT of a package with one processor": (
        AMD,
        amended(AMD, 0x1, edx=leaves_of(AMD)[0x1, None][3] | 1 << 28),
        ["cpuid leaf 0x1 EDX bit 28 (ht): QEMU sets it by itself, allowed: 0"],
    ),
    "CmpLegacy of a package with one processor": (
        AMD,
        amended(AMD, 0x8000_0001, ecx=leaves_of(AMD)[0x8000_0001, None][2] | 1 << 1),
        ["cpuid leaf 0x80000001 ECX bit 1 (cmp-legacy): QEMU sets it by itself, allowed: 0"],
    ),
    "an APIC id, which is one CPU's": (
        AMD,
        amended(AMD, 0x1, ebx=0x0300_0800),
        ["cpuid leaf 0x1 EBX is 0x3000800, allowed: 0x800, which QEMU gives"],
    ),
    "an extended family of family 6": (
        INTEL,
        amended(INTEL, 0x1, eax=0x0010_06A1) | {(0x8000_0001, None): (0x6A1, *leaves_of(INTEL)[0x8000_0001, None][1:])},
        [
            "cpuid leaf 0x1 EAX is 0x1006a1, allowed: 0x6a1, which QEMU gives",
        ],
    ),
    "another version in the extended leaf": (
        AMD,
        amended(AMD, 0x8000_0001, eax=0),
        ["cpuid leaf 0x80000001 EAX is 0x0, allowed: 0xa00f11, which QEMU gives"],
    ),
    "cache descriptors": (
        INTEL,
        amended(INTEL, 0x2, eax=0xFF01),
        [
            "cpuid leaf 0x2 EAX is 0xff01, allowed: 0x1, which QEMU gives",
            "cpuid leaf 0x2 ECX is 0x0, allowed: 0x4d, which QEMU gives",
            "cpuid leaf 0x2 EDX is 0x0, allowed: 0x2c307d, which QEMU gives",
        ],
    ),
    "the cache topology of Intel": (
        INTEL,
        amended(INTEL, 0x4, 0, eax=0x1C00_4121),
        ["cpuid leaf 0x4.0: QEMU computes the cache topology itself, allowed: no such entry"],
    ),
    "the cache topology of AMD": (
        AMD,
        amended(AMD, 0x8000_0000, eax=0x8000_0021) | {(0x8000_001D, 0): (0, 0, 0, 0)},
        ["cpuid leaf 0x8000001d.0: QEMU computes the cache topology itself, allowed: no such entry"],
    ),
    "MONITOR without its extensions": (
        AMD,
        amended(AMD, 0x5),
        ["cpuid leaf 0x5 ECX is 0x0, allowed: 0x3, which QEMU gives"],
    ),
    "threads": (
        AMD,
        amended(AMD, 0xB, 0, eax=1, ebx=2, ecx=0x100),
        [
            "cpuid leaf 0xb.0 EAX is 0x1, allowed: 0x0, which QEMU gives",
            "cpuid leaf 0xb.0 EBX is 0x2, allowed: 0x1, which QEMU gives",
        ],
    ),
    "XSAVE state that no feature has": (
        INTEL,
        amended(INTEL, 0xD, 0, eax=0x1F),
        ["cpuid leaf 0xd.0 EAX is 0x1f, allowed: 0x7, which QEMU gives"],
    ),
    "the layout of XSAVE state beyond AVX": (
        INTEL,
        amended(INTEL, 0x7, 0, ecx=leaves_of(INTEL)[0x7, 0][2] | 1 << 3),
        [
            f"cpuid leaf 0xd.{subleaf}: the layout of state beyond AVX is the accelerator's, allowed: no such entry"
            for subleaf in range(3)
        ],
    ),
    "XSAVE features without XSAVE": (
        INTEL,
        leaves_of(INTEL, FULL - {"xsave"}),
        [
            f"cpuid leaf 0xd.1 EAX bit {bit} ({name}): QEMU gives it with xsave only, allowed: 0, or xsave as well"
            for bit, name in ((0, "xsaveopt"), (2, "xgetbv1"))
        ],
    ),
    "counters": (
        INTEL,
        amended(INTEL, 0xA, eax=0x0830_0802),
        ["cpuid leaf 0xa EAX is 0x8300802, allowed: 0x0, which QEMU gives"],
    ),
    "long addresses without long mode": (
        INTEL,
        leaves_of(INTEL, FULL - {"lm"}),
        ["cpuid leaf 0x80000008 EAX is 0x3030, allowed: 0x24, which QEMU gives"],
    ),
    "other virtual addresses": (
        INTEL,
        amended(INTEL, 0x8000_0008, eax=0x3030),
        ["cpuid leaf 0x80000008 EAX is 0x3030, allowed: 0x3930, which QEMU gives"],
    ),
    "more physical addresses than there are": (
        INTEL,
        amended(INTEL, 0x8000_0008, eax=0x393F),
        ["cpuid leaf 0x80000008 EAX is 0x393f, allowed: 0x3928, which QEMU gives"],
    ),
    "cores that are not there": (
        AMD,
        amended(AMD, 0x8000_0008, ecx=0x7),
        ["cpuid leaf 0x80000008 ECX is 0x7, allowed: 0x0, which QEMU gives"],
    ),
    "a highest leaf from which on QEMU reads what it never wrote": (
        INTEL,
        amended(INTEL, 0x0, eax=0x20),
        [
            "cpuid leaf 0x0 EAX: the highest leaf is 0x20, but in leaf 0x1c QEMU answers with what it never set,"
            " allowed: 0x0..0x1b"
        ],
    ),
    "a highest extended leaf that is none": (
        AMD,
        {(0x8000_0000, None): (0, *leaves_of(AMD)[0x8000_0000, None][1:])},
        [
            "cpuid leaf 0x80000000 EAX: the highest leaf is 0x0, allowed: 0x80000000..0x8000ffff",
            "cpuid leaf 0x80000000: above the highest leaf QEMU repeats leaf 0x0, allowed: no such entry",
        ],
    ),
    "zeros above the highest leaf": (
        AMD,
        leaves_of(AMD) | {(0xFFFF, None): (0, 0, 0, 0)},
        ["cpuid leaf 0xffff: above the highest leaf QEMU repeats leaf 0xd, allowed: no such entry"],
    ),
    "the number that means automatic": (
        AMD,
        amended(AMD, 0x7, 0, eax=0xFFFF_FFFF),
        ["cpuid leaf 0x7.0 EAX is 0xffffffff, which means automatic to QEMU, allowed: 0x0..0xfffffffe"],
    ),
    "a text with something after its end": (
        AMD,
        amended(AMD, 0x8000_0004, edx=0x41),
        ["cpuid leaves 0x80000002..0x80000004 go on after the end of the text, allowed: zeros after it"],
    ),
    "a text with a comma": (
        AMD,
        amended(AMD, 0x8000_0002, eax=0x2C41_4141),
        ["cpuid leaves 0x80000002..0x80000004 have a byte 0x2c, allowed: printable ASCII but for the comma"],
    ),
    "hypervisor leaves": (
        AMD,
        leaves_of(AMD) | {(0x4000_0000, None): (0x4000_0001, 0, 0, 0)},
        ["cpuid leaf 0x40000000 is not of the CPU, allowed: 0x0..0xffff and 0x80000000..0x8000ffff"],
    ),
    "a subleaf of a leaf that has none": (
        AMD,
        leaves_of(AMD) | {(0x6, 1): (0, 0, 0, 0)},
        ["cpuid leaf 0x6.1: QEMU does not tell subleaves of this leaf apart, allowed: an entry without a subleaf"],
    ),
    "one entry for all subleaves": (
        AMD,
        leaves_of(AMD, FULL - {"avx"}) | {(0xD, None): (1, 1, 1, 1)},
        [
            "cpuid leaf 0xd is for all subleaves, allowed: entries with a subleaf each, or zeros",
            "cpuid leaf 0xd.0 is listed twice, allowed: once",
        ],
    ),
    "SGX leaves with SGX": (
        INTEL,
        {
            (0x7, 0): (0, 1 << 2, 0, 0),
            (0x12, 0): (0, 0, 0, 0),
        },
        [
            "cpuid leaf 0x12.0: with sgx QEMU fills in the leaf itself, allowed: no such entry",
            "cpuid leaf 0x7.0 EBX bit 2 (sgx): this QEMU does not have it, allowed: 0",
        ],
    ),
    "processor trace": (
        INTEL,
        {
            (0x7, 0): (0, 1 << 25, 0, 0),
            (0x14, 0): (0, 0, 0, 0),
        },
        [
            "cpuid leaf 0x14.0: with intel-pt QEMU fills in the leaf itself, allowed: no such entry",
            "cpuid leaf 0x7.0 EBX bit 25 (intel-pt): this QEMU does not have it, allowed: 0",
        ],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_had_is_refused_by_leaf_with_what_is_allowed(case: str) -> None:
    vendor, leaves, expected = REFUSED[case]

    problems = problems_of(vendor, leaves, available=TCG_HAS)

    assert sorted(problems) == sorted(expected)


@pytest.mark.parametrize("document", ["v1/board_cpuid_milan_amd", "v1/board_cpuid_intel_hyperv"])
def test_lists_of_another_hypervisors_hosts_are_refused_in_whole_sentences(document: str) -> None:
    text = (Path(__file__).parents[2] / "fixtures" / "specs" / f"{document}.json").read_text()
    given = json.loads(text)["board"]["cpuid"]
    leaves = {(e["leaf"], e["subleaf"]): (e["eax"], e["ebx"], e["ecx"], e["edx"]) for e in given["entries"]}

    problems = problems_of(CpuidVendor(given["vendor"]), leaves, available=TCG_HAS)

    assert problems
    assert all(problem.startswith("cpuid lea") and ", allowed: " in problem for problem in problems)
    assert len(set(problems)) == len(problems)


def test_what_an_accelerator_has_are_the_features_that_its_largest_cpu_has() -> None:
    properties = {"fpu": True, "vme": False, "sse4.1": True, "sse4_1": True, "level": 13, "check": True}

    assert available_features(properties) == {"fpu", "sse4.1"}


# ---- comparing with what QEMU made of it


@pytest.mark.parametrize("vendor", [AMD, INTEL])
def test_the_words_that_were_asked_for_are_right(vendor: CpuidVendor) -> None:
    leaves = leaves_of(vendor)

    assert check_words(cpuid_of(vendor, leaves), feature_words(as_qemu_reports(leaves))) == []


@pytest.mark.parametrize("name", sorted(PLACES.keys() - {"ht", "cmp-legacy"}))
def test_every_wrong_bit_is_noticed_by_name(name: str) -> None:
    leaves = leaves_of(AMD)
    word, bit = PLACES[name]
    words = as_qemu_reports(leaves)
    words[word] = words.get(word, 0) ^ 1 << bit
    wanted = 1 - (words[word] >> bit & 1)

    problems = check_words(cpuid_of(AMD, leaves), feature_words(words))

    expected = [f"{word} bit {bit} ({name}): QEMU has {1 - wanted}, allowed: {wanted}"]
    assert problems == ([] if name == "apic" else expected)  # a guest may switch its APIC off


def test_a_word_that_qemu_does_not_report_is_one_of_zeros() -> None:
    leaves = leaves_of(AMD)
    words = as_qemu_reports(leaves)
    del words[Word(0x6, 0, "EAX")]

    problems = check_words(cpuid_of(AMD, leaves), feature_words(words))

    assert problems == ["cpuid leaf 0x6 EAX bit 2 (arat): QEMU has 0, allowed: 1"]


def test_words_that_this_module_does_not_know_are_to_be_zero() -> None:
    """A later QEMU reports more of them."""
    words = as_qemu_reports(leaves_of(AMD))
    of_hypervisor, unknown = Word(0x4000_0001, 0, "EAX"), Word(0x8000_0021, 0, "EAX")

    problems = check_words(cpuid_of(AMD, leaves_of(AMD)), feature_words(words | {of_hypervisor: 1, unknown: 1 << 6}))

    assert problems == ["cpuid leaf 0x80000021 EAX bit 6: QEMU has 1, allowed: 0"]


def test_an_apic_that_nobody_asked_for_is_noticed() -> None:
    leaves = leaves_of(INTEL, FULL - {"apic"})
    words = as_qemu_reports(leaves)
    words[Word(0x1, 0, "EDX")] |= 1 << 9

    problems = check_words(cpuid_of(INTEL, leaves), feature_words(words))

    assert problems == ["cpuid leaf 0x1 EDX bit 9 (apic): QEMU has 1, allowed: 0"]


def test_aliases_of_a_list_without_the_extended_leaf_follow_leaf_1() -> None:
    leaves = leaves_of(AMD)
    del leaves[0x8000_0001, None]
    words = as_qemu_reports(leaves) | {Word(0x8000_0001, 0, "EDX"): leaves[0x1, None][3] & ALIASES}

    assert check_words(cpuid_of(AMD, leaves), feature_words(words)) == []


# ---- the real QEMU

MACHINE: Final = (
    "-accel", "tcg", "-machine", "pc-i440fx-7.2", "-m", "16", "-nodefaults", "-no-user-config", "-display", "none",
)  # fmt: skip
DEADLINE_S: Final = 60

needs_qemu = pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"no {QEMU} on this host")


class Monitor:
    """QMP over a connected socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._lines = sock.makefile("rwb")
        json.loads(self._lines.readline() or pytest.fail("QEMU did not start"))
        self.run("qmp_capabilities")

    def run(self, command: str, **arguments: Any) -> Any:
        self._lines.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._lines.flush()
        while True:
            reply = json.loads(self._lines.readline())
            assert "error" not in reply, reply
            if "return" in reply:
                return reply["return"]

    def words(self, name: str = "feature-words") -> list[dict[str, Any]]:
        words: list[dict[str, Any]] = self.run("qom-get", path="/machine/unattached/device[0]", property=name)
        return words

    def close(self) -> None:
        self._lines.close()


@contextlib.contextmanager
def stopped_qemu(cpu: str) -> Iterator[Monitor]:
    """A QEMU whose guest has not run yet."""
    ours, its = socket.socketpair()
    monitor = ("-chardev", f"socket,id=qmp,fd={its.fileno()}", "-mon", "chardev=qmp,mode=control")
    ours.settimeout(DEADLINE_S)
    with ours, its:
        command = [QEMU, *MACHINE, "-S", "-cpu", cpu, *monitor]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[its.fileno()])
        try:
            its.close()
            with contextlib.closing(Monitor(ours)) as client:
                yield client
        finally:
            process.kill()
            process.wait(DEADLINE_S)


def answers_to_guest(cpu: str, asked: list[tuple[int, int]], folder: Path, *arguments: str) -> list[Registers]:
    """What the first CPU reads, by a guest that does nothing but ask."""
    kernel, output = folder / "kernel", folder / "output"
    kernel.write_bytes(asking_guest(asked))
    devices = (
        *("-chardev", f"file,id=out,path={output}", "-device", "isa-debugcon,iobase=0xe9,chardev=out"),
        *("-device", "isa-debug-exit,iobase=0xf4,iosize=1"),
    )
    command = [QEMU, *MACHINE, *arguments, "-cpu", cpu, "-kernel", str(kernel), *devices]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.wait(DEADLINE_S)
    assert errors == ""
    told = output.read_bytes()[-16 * len(asked) :]
    return list(struct.iter_unpack("<4I", told))


def asking_guest(asked: list[tuple[int, int]]) -> bytes:
    """A multiboot kernel: CPUID for each leaf and subleaf of a table, the registers to port 0xe9, then out."""
    base, header_bytes = 0x10_0000, 32
    table = base + header_bytes + len(_asking_code(0, 0, 0))
    buffer = table + 8 * len(asked)
    magic, flags, end = 0x1BAD_B002, 0x1_0000, buffer + 16
    header = struct.pack("<8I", magic, flags, -(magic + flags) & 0xFFFF_FFFF, base, base, end, end, base + header_bytes)
    rows = b"".join(struct.pack("<2I", *at) for at in asked)
    return header + _asking_code(table, buffer, len(asked)) + rows + bytes(16)


def _asking_code(table: int, buffer: int, count: int) -> bytes:
    loop = (
        b"\x8b\x07\x8b\x4f\x04"  # mov eax, [edi]; mov ecx, [edi+4]
        b"\x83\xc7\x08\x0f\xa2"  # add edi, 8; cpuid
        b"\xbe" + struct.pack("<I", buffer) +  # mov esi, buffer
        b"\x89\x06\x89\x5e\x04\x89\x4e\x08\x89\x56\x0c"  # mov [esi], eax; ebx, ecx, edx behind it
        b"\xb9\x10\x00\x00\x00\xba\xe9\x00\x00\x00\xf3\x6e"  # mov ecx, 16; mov edx, 0xe9; rep outsb
        b"\x4d"  # dec ebp
    )  # fmt: skip
    start = b"\xbf" + struct.pack("<I", table) + b"\xbd" + struct.pack("<I", count)  # mov edi, table; mov ebp, count
    back = b"\x75" + struct.pack("<b", -(len(loop) + 2))  # jnz loop
    return start + loop + back + b"\xba\xf4\x00\x00\x00\x30\xc0\xee\xf4\xeb\xfd"  # mov edx, 0xf4; out; hlt forever


def features_at_hand() -> frozenset[str]:
    with stopped_qemu("max") as monitor:
        largest = monitor.run("query-cpu-model-expansion", type="full", model={"name": "max"})["model"]["props"]
    return available_features(largest)


@needs_qemu
@pytest.mark.required
def test_a_qemu_tells_which_features_it_has() -> None:
    """Later ones have more of them, but no `pcommit`, of which no processor was ever made."""
    assert features_at_hand() >= TCG_HAS - {"pcommit"}


@needs_qemu
@pytest.mark.required
@pytest.mark.parametrize("vendor", [AMD, INTEL])
def test_qemu_makes_the_words_that_were_asked_for_and_a_wrong_bit_is_noticed(vendor: CpuidVendor) -> None:
    available = features_at_hand()
    full = FULL & available
    cpuid = cpuid_of(vendor, leaves_of(vendor, full))
    without_avx2 = cpuid_of(vendor, leaves_of(vendor, full - {"avx2"}))
    model, problems = cpu_model(cpuid, available=available)

    with stopped_qemu(model.argument()) as monitor:
        words = monitor.words()

    assert problems == []
    assert check_words(cpuid, words) == []
    assert check_words(without_avx2, words) == ["cpuid leaf 0x7.0 EBX bit 5 (avx2): QEMU has 1, allowed: 0"]


@needs_qemu
@pytest.mark.required
def test_qemu_does_not_start_with_a_feature_that_it_would_drop() -> None:
    """For whoever did not ask what is available: better no guest than one with another CPU."""
    names = FULL & features_at_hand() | {"tsc-deadline"}
    model, problems = cpu_model(cpuid_of(AMD, leaves_of(AMD, names)))

    command = [QEMU, *MACHINE, "-S", "-cpu", model.argument()]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=DEADLINE_S)

    assert problems == []
    assert ended.returncode == 1
    assert "tsc-deadline" in ended.stderr


FROM_QEMU: Final[Leaves] = {
    (0x3, None): (0, 0, 0, 0),
    (0x5, None): (0, 0, 3, 0),
    (0xA, None): (0, 0, 0, 0),
    (0x8000_0005, None): (0x01FF_01FF, 0x01FF_01FF, 0x4002_0140, 0x4002_0140),
    (0x8000_0006, None): (0, 0x4200_4200, 0x0200_8140, 0x0080_8140),
    (0x8000_0007, None): (0, 0, 0, 0),
    (0x8000_0009, None): (0, 0, 0, 0),
}
"""Leaves that a list may have if it has them like this."""


@needs_qemu
@pytest.mark.required
@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("vendor", [AMD, INTEL])
def test_a_guest_reads_every_register_of_the_list(vendor: CpuidVendor, cores: int, tmp_path: Path) -> None:
    """The truth, of which feature words are a part: also the leaves that QEMU computes, if they are accepted."""
    bits = (cores - 1).bit_length()
    leaves = leaves_of(vendor, FULL & features_at_hand()) | FROM_QEMU
    leaves |= {(0xB, 0): (0, 1, 0x100, 0), (0xB, 1): (bits, cores, 0x201, 0), (0xB, 2): (0, 0, 2, 0)}
    leaves |= {(0x8000_0008, None): (0x3930, 0, bits << 12 | cores - 1, 0)}
    if vendor is AMD:
        leaves |= {(0x2, None): (0, 0, 0, 0), (0x4, 0): (0, 0, 0, 0)}
    else:
        leaves |= {(0x2, None): (1, 0, 0x4D, 0x2C_307D)}
    if cores > 1:
        eax, ebx, ecx, edx = leaves[0x1, None]
        leaves[0x1, None] = (eax, ebx | cores << 16, ecx, edx | 1 << 28)
        eax, ebx, ecx, edx = leaves[0x8000_0001, None]
        leaves[0x8000_0001, None] = (eax, ebx, ecx | (2 if vendor is AMD else 0), edx)
    model, problems = cpu_model(cpuid_of(vendor, leaves), cores=cores)
    asked = [(leaf, subleaf or 0) for leaf, subleaf in leaves]

    topology = f"3,sockets={3 // cores},cores={cores},threads=1"
    read = answers_to_guest(model.argument(), asked, tmp_path, "-smp", topology)

    assert problems == []
    told = dict(zip(leaves, read, strict=True))
    if vendor is INTEL:  # such a processor shows this one in 64-bit mode alone, and QEMUs from 9 on do it likewise
        syscall = word_of(frozenset({"syscall"}), 0x8000_0001, "EDX")
        eax, ebx, ecx, edx = told[0x8000_0001, None]
        told[0x8000_0001, None] = (eax, ebx, ecx, edx | syscall)
    assert {at: _in_hex(told[at]) for at in leaves} == {at: _in_hex(leaves[at]) for at in leaves}


def _in_hex(registers: Registers) -> str:
    return " ".join(f"{register:08x}" for register in registers)


@needs_qemu
@pytest.mark.required
def test_every_name_is_the_bit_that_qemu_gives_it() -> None:
    """Each name has a number; QEMU is started once for each binary digit, with the names that have it."""
    numbers = {name: number for number, name in enumerate(sorted(PLACES), 1)}
    found: dict[tuple[Word, int], int] = {}
    for digit in range(len(numbers).bit_length()):
        names = [name for name, number in numbers.items() if number >> digit & 1]
        for place in _bits_that_come_with(names):
            found[place] = found.get(place, 0) | 1 << digit

    assert found == {PLACES[name]: number for name, number in numbers.items()}


def _bits_that_come_with(names: list[str]) -> set[tuple[Word, int]]:
    """Bits that QEMU sets, or would set if it had the feature."""
    with stopped_qemu("base,check=off," + ",".join(f"{name}=on" for name in names)) as monitor:
        words = monitor.words("feature-words") + monitor.words("filtered-features")
    return {
        (word, bit)
        for item in words
        if (word := Word(item["cpuid-input-eax"], item.get("cpuid-input-ecx", 0), item["cpuid-register"])) in FEATURES
        for bit in range(32)
        if item["features"] >> bit & 1
    }
