"""A spec's CPUID list as a CPU of QEMU's (7.2 upward): exactly, or refused leaf by leaf and bit by bit.

QEMU takes no list of leaves. It takes a model and properties, and computes from them what a guest reads. So this module
knows what QEMU would answer (`_answers`), and refuses every register for which that is not what the list says. The
model to start from is `base`, which has no feature at all; each bit that is set becomes a property. `enforce` makes
QEMU exit where it would drop a feature with a warning.

What a list means here:

- A leaf that is listed is what the guest reads. A feature bit that is not listed is zero. Any other leaf that is left
  out is QEMU's to fill: caches, topology, sizes of XSAVE areas. The versioned machine type keeps it the same on every
  host, but for XSAVE state beyond AVX, whose layout is the host CPU's under KVM. Leaf 0xb is off unless it is listed.
- Without leaf 0 or 0x80000000 the highest leaf is the highest that is listed. Above the highest leaf QEMU repeats the
  contents of the highest basic one, so nothing can be listed there, not even zeros.
- The list is one for all CPUs, so what differs between CPUs or follows from their number is zero in it: APIC ids, and
  in leaf 1 bit HT and the count in EBX. The host fills them in, as the reference implementation does. If the two in
  leaf 1 are not zero they have to be right.
- OSXSAVE and OSPKE follow the guest's CR4: either value is taken. The same goes for sizes that follow XCR0.
- Hypervisor leaves (0x40000000) are not in the list; the spec's `guest_hv_interface` is about them.

What cannot be had: topology and caches other than QEMU's own (leaves 2, 4, 0xb, 0x80000005, 0x80000006, 0x8000001d,
0x8000001e), leaf 5 without its two extensions, zeros in leaf 0x80000000 of an Intel CPU, leaf 0xd with state beyond
AVX (the host's layout counts), the leaves of SGX and processor trace, and a highest leaf from 0x1c on: there 7.2
answers with what happened to be in its memory, another thing in every process.

Source: QEMU 7.2.22, machine pc-i440fx-7.2: the names by setting one property at a time and reading `feature-words`, the
answers by a guest that asked for every leaf (tests/hypervisor/test_qemu_cpuid.py asks again).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

from vmmigrate.spec.latest import Cpuid, CpuidEntry, CpuidVendor

REGISTERS: Final = ("EAX", "EBX", "ECX", "EDX")
VENDORS: Final = {CpuidVendor.AMD: "AuthenticAMD", CpuidVendor.INTEL: "GenuineIntel"}

HIGHEST_BASIC_LEAF: Final = 0x1B
"""From 0x1c on QEMU 7.2 answers with bytes that it never set."""

_BASIC_LEAVES: Final = range(0x1_0000)
_EXTENDED_LEAVES: Final = range(0x8000_0000, 0x8001_0000)
_HYPERVISOR_LEAVES: Final = range(0x4000_0000, 0x8000_0000)
_BRAND_LEAVES: Final = range(0x8000_0002, 0x8000_0005)
_INDEXED_LEAVES: Final = {0x4, 0x7, 0xB, 0xD, 0xF, 0x10, 0x12, 0x14, 0x17, 0x18, 0x8000_001D, 0x8000_0020, 0x8000_0026}
_PHYSICAL_ADDRESS_BITS: Final = range(32, 53)
_ALL: Final = 2**32 - 1


class Word(NamedTuple):
    """One register of one leaf; subleaf 0 where a leaf has none."""

    leaf: int
    subleaf: int
    register: str

    def __str__(self) -> str:
        return f"{_place(self.leaf, self.subleaf)} {self.register}"


def _place(leaf: int, subleaf: int) -> str:
    suffix = f".{subleaf:x}" if subleaf or leaf in _INDEXED_LEAVES else ""
    return f"cpuid leaf {leaf:#x}{suffix}"


def _is_of_cpu(leaf: int) -> bool:
    return leaf in _BASIC_LEAVES or leaf in _EXTENDED_LEAVES


# ---- names of features


def _by_bit(*names: str) -> dict[int, str]:
    return {bit: name for bit, name in enumerate(" ".join(names).split()) if name != "-"}


FEATURES: Final[Mapping[Word, Mapping[int, str]]] = {
    Word(0x1, 0, "ECX"): _by_bit(
        "pni pclmulqdq dtes64 monitor ds-cpl vmx smx est",
        "tm2 ssse3 cid - fma cx16 xtpr pdcm",
        "- pcid dca sse4.1 sse4.2 x2apic movbe popcnt",
        "tsc-deadline aes xsave - avx f16c rdrand hypervisor",
    ),
    Word(0x1, 0, "EDX"): _by_bit(
        "fpu vme de pse tsc msr pae mce",
        "cx8 apic - sep mtrr pge mca cmov",
        "pat pse36 pn clflush - ds acpi mmx",
        "fxsr sse sse2 ss ht tm ia64 pbe",
    ),
    Word(0x6, 0, "EAX"): _by_bit("- - arat"),
    Word(0x7, 0, "EBX"): _by_bit(
        "fsgsbase tsc-adjust sgx bmi1 hle avx2 - smep",
        "bmi2 erms invpcid rtm - - mpx -",
        "avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt",
        "clwb intel-pt avx512pf avx512er avx512cd sha-ni avx512bw avx512vl",
    ),
    Word(0x7, 0, "ECX"): _by_bit(
        "- avx512vbmi umip pku - waitpkg avx512vbmi2 -",
        "gfni vaes vpclmulqdq avx512vnni avx512bitalg - avx512-vpopcntdq -",
        "la57 - - - - - rdpid -",
        "bus-lock-detect cldemote - movdiri movdir64b - sgxlc pks",
    ),
    Word(0x7, 0, "EDX"): _by_bit(
        "- - avx512-4vnniw avx512-4fmaps fsrm - - -",
        "avx512-vp2intersect - md-clear - - - serialize -",
        "tsx-ldtrk - - arch-lbr - - amx-bf16 avx512-fp16",
        "amx-tile amx-int8 spec-ctrl stibp - arch-capabilities core-capability ssbd",
    ),
    Word(0x7, 1, "EAX"): _by_bit("- - - - avx-vnni avx512-bf16"),
    Word(0xD, 1, "EAX"): _by_bit("xsaveopt xsavec xgetbv1 xsaves xfd"),
    Word(0x8000_0001, 0, "ECX"): _by_bit(
        "lahf-lm cmp-legacy svm extapic cr8legacy abm sse4a misalignsse",
        "3dnowprefetch osvw ibs xop skinit wdt - lwp",
        "fma4 tce - nodeid-msr - tbm topoext perfctr-core",
        "perfctr-nb",
    ),
    Word(0x8000_0001, 0, "EDX"): _by_bit(
        "- - - - - - - -",
        "- - - syscall - - - -",
        "- - - - nx - mmxext -",
        "- fxsr-opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    Word(0x8000_0007, 0, "EDX"): _by_bit("- - - - - - - - invtsc"),
    Word(0x8000_0008, 0, "EBX"): _by_bit(
        "clzero - xsaveerptr - - - - -",
        "- wbnoinvd - - ibpb - ibrs amd-stibp",
        "- - - - - - - -",
        "amd-ssbd virt-ssbd amd-no-ssb",
    ),
    Word(0x8000_000A, 0, "EDX"): _by_bit(
        "npt lbrv svm-lock nrip-save tsc-scale vmcb-clean flushbyasid decodeassists",
        "- - pause-filter - pfthreshold avic - v-vmsave-vmload",
        "vgif - - - - - - -",
        "- - - - svme-addr-chk",
    ),
}
"""QEMU's names. Left out: what it sets by itself (0xd.0), leaves of SGX and processor trace (0x12, 0x14), and leaves
that no list has (0x40000001, 0xc0000001)."""

PLACES: Final = {name: (word, bit) for word, names in FEATURES.items() for bit, name in names.items()}

_ECX_1: Final = Word(0x1, 0, "ECX")
_EDX_1: Final = Word(0x1, 0, "EDX")
_ECX_7: Final = Word(0x7, 0, "ECX")
_EAX_D: Final = Word(0xD, 0, "EAX")
_ECX_EXTENDED: Final = Word(0x8000_0001, 0, "ECX")
_EDX_EXTENDED: Final = Word(0x8000_0001, 0, "EDX")

_APIC: Final = 1 << 9
_HT: Final = 1 << 28
_CMP_LEGACY: Final = 1 << 1
_ALIASES: Final = 0x0183_F3FF
"""Bits of leaf 0x80000001 EDX which in an AMD CPU repeat those of leaf 1 EDX."""

_FROM_CR4: Final = {_ECX_1: 1 << 27, _ECX_7: 1 << 4}
"""OSXSAVE and OSPKE."""

_NEEDED: Final = {0xD: "xsave", 0x8000_000A: "svm"}
"""Without the feature the leaf has no other."""

_XSAVE_STATE: Final = {"xsave": 0x3, "avx": 0x4, "mpx": 0x18, "avx512f": 0xE0, "pku": 0x200, "amx-tile": 0x6_0000}
_LEGACY_AREA_BYTES: Final = 0x240
_AVX_AREA_BYTES: Final = 0x100


# ---- what is asked for


class _Asked:
    """A list by leaf and subleaf. `cores`: how many cores a package has, each of one thread."""

    def __init__(self, cpuid: Cpuid, cores: int) -> None:
        self.vendor = cpuid.vendor
        self.cores = cores
        self.entries: dict[tuple[int, int], CpuidEntry] = {}
        for entry in cpuid.entries:
            if _is_of_cpu(entry.leaf):
                self.entries.setdefault((entry.leaf, entry.subleaf or 0), entry)

    def __getitem__(self, word: Word) -> int:
        entry = self.entries.get(word[:2])
        return 0 if entry is None else int(getattr(entry, word.register.lower()))

    def has(self, name: str) -> bool:
        word, bit = PLACES[name]
        return bool(self[word] >> bit & 1)

    def is_listed(self, leaf: int) -> bool:
        return any(listed == leaf for listed, _ in self.entries)

    def is_zero(self, leaf: int) -> bool:
        """Also when it is not listed."""
        return all(self[Word(*at, register)] == 0 for at in self.entries if at[0] == leaf for register in REGISTERS)

    def highest(self, leaves: range) -> int:
        if self.is_listed(leaves.start):
            return self[Word(leaves.start, 0, "EAX")]
        return max((leaf for leaf, _ in self.entries if leaf in leaves), default=leaves.start)

    def is_beyond(self, leaf: int) -> bool:
        return leaf > self.highest(_BASIC_LEAVES if leaf in _BASIC_LEAVES else _EXTENDED_LEAVES)

    @property
    def is_amd(self) -> bool:
        return self.vendor is CpuidVendor.AMD

    @property
    def version(self) -> int:
        """Family, model and stepping, which two leaves have."""
        return self[Word(0x1 if self.is_listed(0x1) else 0x8000_0001, 0, "EAX")]

    @property
    def brand(self) -> bytes:
        words = [self[Word(leaf, 0, register)] for leaf in _BRAND_LEAVES for register in REGISTERS]
        return b"".join(word.to_bytes(4, "little") for word in words)

    @property
    def xsave_state(self) -> int:
        """What XCR0 may hold: QEMU derives it from the features."""
        return sum(bits for name, bits in _XSAVE_STATE.items() if self.has(name)) if self.has("xsave") else 0

    def features(self) -> Iterator[str]:
        """The features that have to be named to QEMU; those that follow from something else are not among them."""
        for name in PLACES:
            if self.has(name) and name != "ht" and not (name == "cmp-legacy" and self.is_amd):
                yield name


# ---- what QEMU answers


class _Answer(NamedTuple):
    """What QEMU gives. In bits that are `free` the list is right whatever it says: a property or the guest decides."""

    value: int = 0
    free: int = 0


_Answers: TypeAlias = tuple[_Answer, _Answer, _Answer, _Answer]
_ANYTHING: Final = _Answer(free=_ALL)


def _fixed(eax: int = 0, ebx: int = 0, ecx: int = 0, edx: int = 0) -> _Answers:
    return _Answer(eax), _Answer(ebx), _Answer(ecx), _Answer(edx)


_ZEROS: Final = _fixed()
_CACHES: Final = {
    0x2: _fixed(0x1, 0, 0x4D, 0x2C_307D),
    0x8000_0005: _fixed(0x01FF_01FF, 0x01FF_01FF, 0x4002_0140, 0x4002_0140),
    0x8000_0006: _fixed(0, 0x4200_4200, 0x0200_8140, 0x0080_8140),
}


def _answers(asked: _Asked, leaf: int, subleaf: int) -> _Answers | str:
    """Registers of a leaf, or why nothing can be listed for it."""
    match leaf:
        case 0x0 | 0x8000_0000:
            return _highest_leaf(asked)
        case 0x1:
            return _version_leaf(asked)
        case 0x2 | 0x4 if asked.is_amd:
            return _ZEROS
        case 0x2 | 0x8000_0005 | 0x8000_0006:
            return _CACHES[leaf]
        case 0x4 | 0x8000_001D:
            return "QEMU computes the cache topology itself"
        case 0x5:
            return _fixed(ecx=0x3)
        case 0x7 if subleaf == 0:
            return _ANYTHING, _features_of(asked, Word(leaf, 0, "EBX")), *_two_features(asked, leaf)
        case 0xB:
            return _topology_leaf(asked, subleaf)
        case 0xD:
            return _xsave_leaf(asked, subleaf)
        case 0x12 if asked.has("sgx"):
            return "with sgx QEMU fills in the leaf itself"
        case 0x14 if asked.has("intel-pt"):
            return "with intel-pt QEMU fills in the leaf itself"
        case 0x8000_0001:
            return _Answer(_version_word(asked)), _Answer(), *_two_features(asked, leaf)
        case 0x8000_0002 | 0x8000_0003 | 0x8000_0004:
            return _ANYTHING, _ANYTHING, _ANYTHING, _ANYTHING
        case 0x8000_0008:
            return _address_leaf(asked)
        case 0x8000_000A if asked.has("svm"):
            return _Answer(0x1), _Answer(0x10), _Answer(), _features_of(asked, Word(leaf, 0, "EDX"))
        case _:
            eax, ebx, ecx, edx = (_features_of(asked, Word(leaf, subleaf, register)) for register in REGISTERS)
            return eax, ebx, ecx, edx


def _features_of(asked: _Asked, word: Word) -> _Answer:
    """Bits with a name are the list's to set, unless QEMU sets them itself; the others are zero."""
    named = sum(1 << bit for bit in FEATURES.get(word, {})) | _FROM_CR4.get(word, 0)
    value, own = _own_bits(asked, word)
    return _Answer(value, named & ~own)


def _own_bits(asked: _Asked, word: Word) -> tuple[int, int]:
    """Value and mask of the feature bits that QEMU derives from something else."""
    if word == _EDX_1:
        # Zero leaves it to the host, and then it is free.
        return (_HT if asked.cores > 1 else 0, _HT) if asked[word] & _HT else (0, 0)
    if word == _ECX_EXTENDED and asked.is_amd:
        return _CMP_LEGACY if asked.cores > 1 else 0, _CMP_LEGACY
    if word == _EDX_EXTENDED and asked.is_amd:
        return asked[_EDX_1] & _ALIASES, _ALIASES
    return 0, 0


def _two_features(asked: _Asked, leaf: int) -> tuple[_Answer, _Answer]:
    return _features_of(asked, Word(leaf, 0, "ECX")), _features_of(asked, Word(leaf, 0, "EDX"))


def _highest_leaf(asked: _Asked) -> _Answers:
    """The vendor's name reads EBX, EDX, ECX."""
    text = VENDORS[asked.vendor].encode()
    first, second, third = (_Answer(int.from_bytes(text[at : at + 4], "little")) for at in (0, 4, 8))
    return _ANYTHING, first, third, second


def _family(version: int) -> int:
    family, extended = version >> 8 & 0xF, version >> 20 & 0xFF
    return family + extended if family == 0xF else family


def _model(version: int) -> int:
    return (version >> 4 & 0xF) | (version >> 12 & 0xF0)


def _version_word(asked: _Asked) -> int:
    """What QEMU makes of the three numbers: the type and an extended family of families below 15 are lost."""
    family, model = _family(asked.version), _model(asked.version)
    extended = max(family - 0xF, 0) << 20 | (model >> 4) << 16
    return extended | min(family, 0xF) << 8 | (model & 0xF) << 4 | asked.version & 0xF


def _version_leaf(asked: _Asked) -> _Answers:
    """EBX: lines of 64 bytes, and how many logical processors a package has."""
    count = 0xFF << 16
    free = 0 if asked[Word(0x1, 0, "EBX")] & count else count
    processors = asked.cores << 16 if asked.cores > 1 else 0
    return _Answer(_version_word(asked)), _Answer(processors | 0x800, free), *_two_features(asked, 0x1)


def _topology_leaf(asked: _Asked, subleaf: int) -> _Answers:
    """EDX is the CPU's APIC id."""
    if asked.is_zero(0xB):
        return _ZEROS
    levels = (_fixed(0, 1, 0x100), _fixed(_id_bits(asked.cores), asked.cores, 0x201))
    return levels[subleaf] if subleaf < len(levels) else _fixed(ecx=subleaf & 0xFF)


def _id_bits(count: int) -> int:
    return (count - 1).bit_length()


def _xsave_leaf(asked: _Asked, subleaf: int) -> _Answers | str:
    state = asked.xsave_state
    if state & ~0x7:
        return "the layout of state beyond AVX is the accelerator's"
    size = _LEGACY_AREA_BYTES + (_AVX_AREA_BYTES if state & 0x4 else 0) if state else 0
    follows_xcr0 = _Answer(size, size ^ _LEGACY_AREA_BYTES if state else 0)
    match subleaf:
        case 0:
            return _Answer(state), follows_xcr0, _Answer(size), _Answer()
        case 1:
            return _features_of(asked, Word(0xD, 1, "EAX")), follows_xcr0, _Answer(), _Answer()
        case 2 if state & 0x4:
            return _fixed(_AVX_AREA_BYTES, _LEGACY_AREA_BYTES)
        case _:
            return _ZEROS


def _address_leaf(asked: _Asked) -> _Answers:
    """EAX: bits of addresses; without long mode QEMU lets nobody choose. ECX: cores, and how many bits number them."""
    physical = asked[Word(0x8000_0008, 0, "EAX")] & 0xFF
    if not asked.has("lm"):
        bits = 36 if asked.has("pse36") else 32
    else:
        virtual = 57 if asked.has("la57") else 48
        bits = virtual << 8 | (physical if physical in _PHYSICAL_ADDRESS_BITS else 40)
    cores = _id_bits(asked.cores) << 12 | asked.cores - 1
    return _Answer(bits), _features_of(asked, Word(0x8000_0008, 0, "EBX")), _Answer(cores), _Answer()


# ---- the CPU


@dataclass(frozen=True, slots=True)
class CpuModel:
    """A CPU as QEMU is told of it: the model to start from, and its properties in order."""

    model: str
    properties: tuple[tuple[str, str], ...]

    def argument(self) -> str:
        """The text for `-cpu`."""
        return ",".join((self.model, *(f"{name}={value}" for name, value in self.properties)))


def available_features(properties: Mapping[str, Any]) -> frozenset[str]:
    """What an accelerator has, from `query-cpu-model-expansion` (type full) of model `max`."""
    return frozenset(name for name in PLACES if properties.get(name) is True)


def cpu_model(
    cpuid: Cpuid, base: str = "base", *, cores: int = 1, available: frozenset[str] | None = None
) -> tuple[CpuModel, list[str]]:
    """The CPU that answers as the list says, and why there is none; a CPU with problems is not to be started.

    Args:
        base: A model without features of its own; `check_words` finds out if it has any.
        cores: Cores of one package, each of one thread: 1 is `-smp N,sockets=N,cores=1,threads=1`.
        available: The features that QEMU's accelerator has (`available_features`); None: whatever has a name.
    """
    asked = _Asked(cpuid, cores)
    found = (_shape(cpuid, asked), _highest_leaves(asked), _brand(asked), _registers(asked), _lacking(asked, available))
    return CpuModel(base, tuple(_properties(asked))), [problem for problems in found for problem in problems]


def _properties(asked: _Asked) -> Iterator[tuple[str, str]]:
    yield "enforce", "on"
    yield "vendor", VENDORS[asked.vendor]
    yield "level", f"{asked.highest(_BASIC_LEAVES):#x}"
    yield "xlevel", f"{asked.highest(_EXTENDED_LEAVES):#x}"
    yield "level-func7", str(asked[Word(0x7, 0, "EAX")])
    yield "cpuid-0xb", "off" if asked.is_zero(0xB) else "on"
    yield "family", str(_family(asked.version))
    yield "model", str(_model(asked.version))
    yield "stepping", str(asked.version & 0xF)
    yield "model-id", asked.brand.partition(b"\0")[0].decode("ascii", "replace")
    if asked.is_listed(0x8000_0008) and asked.has("lm"):
        yield "phys-bits", str(asked[Word(0x8000_0008, 0, "EAX")] & 0xFF)
    for name in asked.features():
        yield name, "on"


def _shape(cpuid: Cpuid, asked: _Asked) -> Iterator[str]:
    """Entries that cannot be told apart, or that mean something else to QEMU."""
    seen: set[tuple[int, int]] = set()
    for entry in cpuid.entries:
        at = (entry.leaf, entry.subleaf or 0)
        place = _place(*at)
        if at in seen:
            yield f"{place} is listed twice, allowed: once"
        seen.add(at)
        if not _is_of_cpu(entry.leaf):
            yield f"{place} is not of the CPU, allowed: 0x0..0xffff and 0x80000000..0x8000ffff"
        elif entry.leaf not in _INDEXED_LEAVES and entry.subleaf:
            yield f"{place}: QEMU does not tell subleaves of this leaf apart, allowed: an entry without a subleaf"
        elif entry.leaf in _INDEXED_LEAVES and entry.subleaf is None and not asked.is_zero(entry.leaf):
            yield f"cpuid leaf {entry.leaf:#x} is for all subleaves, allowed: entries with a subleaf each, or zeros"


def _highest_leaves(asked: _Asked) -> Iterator[str]:
    basic, extended = asked.highest(_BASIC_LEAVES), asked.highest(_EXTENDED_LEAVES)
    if basic > HIGHEST_BASIC_LEAF:
        yield (
            f"cpuid leaf 0x0 EAX: the highest leaf is {basic:#x}, but in leaf {HIGHEST_BASIC_LEAF + 1:#x} QEMU answers"
            f" with what it never set, allowed: 0x0..{HIGHEST_BASIC_LEAF:#x}"
        )
    if extended not in _EXTENDED_LEAVES:
        yield f"cpuid leaf 0x80000000 EAX: the highest leaf is {extended:#x}, allowed: 0x80000000..0x8000ffff"
    if asked[Word(0x7, 0, "EAX")] == _ALL:
        yield f"cpuid leaf 0x7.0 EAX is {_ALL:#x}, which means automatic to QEMU, allowed: 0x0..{_ALL - 1:#x}"
    for leaf, subleaf in asked.entries:
        if asked.is_beyond(leaf):
            place = _place(leaf, subleaf)
            yield f"{place}: above the highest leaf QEMU repeats leaf {basic:#x}, allowed: no such entry"


def _brand(asked: _Asked) -> Iterator[str]:
    """The text goes through a comma-separated argument, in which a comma cannot be escaped."""
    place = "cpuid leaves 0x80000002..0x80000004"
    text, _, rest = asked.brand.partition(b"\0")
    if any(rest):
        yield f"{place} go on after the end of the text, allowed: zeros after it"
    for byte in sorted({byte for byte in text if byte not in range(0x20, 0x7F) or byte == ord(",")}):
        yield f"{place} have a byte {byte:#04x}, allowed: printable ASCII but for the comma"


def _registers(asked: _Asked) -> Iterator[str]:
    for leaf, subleaf in asked.entries:
        if asked.is_beyond(leaf):
            continue
        answers = _answers(asked, leaf, subleaf)
        if isinstance(answers, str):
            yield f"{_place(leaf, subleaf)}: {answers}, allowed: no such entry"
            continue
        for register, answer in zip(REGISTERS, answers, strict=True):
            yield from _differences(asked, Word(leaf, subleaf, register), answer)


def _differences(asked: _Asked, word: Word, answer: _Answer) -> Iterator[str]:
    value = asked[word]
    wrong = (value ^ answer.value) & ~answer.free
    if not wrong:
        return
    if word not in FEATURES:
        yield f"{word} is {value:#x}, allowed: {value & answer.free | answer.value & ~answer.free:#x}, which QEMU gives"
        return
    _, own = _own_bits(asked, word)
    for bit in _bits(wrong):
        reason = "QEMU sets it by itself" if own >> bit & 1 else "QEMU has no name for it"
        yield f"{_bit_name(word, bit)}: {reason}, allowed: {answer.value >> bit & 1}"


def _lacking(asked: _Asked, available: frozenset[str] | None) -> Iterator[str]:
    for name in asked.features():
        word, bit = PLACES[name]
        if available is not None and name not in available:
            yield f"{_bit_name(word, bit)}: this QEMU does not have it, allowed: 0"
        elif (needed := _NEEDED.get(word.leaf)) and not asked.has(needed):
            yield f"{_bit_name(word, bit)}: QEMU gives it with {needed} only, allowed: 0, or {needed} as well"


def _bits(value: int) -> list[int]:
    return [bit for bit in range(32) if value >> bit & 1]


def _bit_name(word: Word, bit: int) -> str:
    name = FEATURES.get(word, {}).get(bit)
    return f"{word} bit {bit}" + (f" ({name})" if name else "")


# ---- what QEMU made of it


def check_words(cpuid: Cpuid, feature_words: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every bit in which the CPU object's property `feature-words` differs from the list.

    Not compared: OSXSAVE and OSPKE, which are not in there; HT and, for AMD, CmpLegacy, which are in there or not
    depending on QEMU's version; an APIC bit that went out because the guest switched its APIC off; hypervisor leaves.
    """
    asked = _Asked(cpuid, cores=1)
    actual = {_word(item): int(item["features"]) for item in feature_words}
    words = sorted({*actual, *(word for word in FEATURES if asked[word])})
    return [problem for word in words for problem in _mismatches(asked, word, actual.get(word, 0))]


def _word(item: Mapping[str, Any]) -> Word:
    return Word(int(item["cpuid-input-eax"]), int(item.get("cpuid-input-ecx", 0)), str(item["cpuid-register"]))


def _mismatches(asked: _Asked, word: Word, actual: int) -> Iterator[str]:
    if word.leaf in _HYPERVISOR_LEAVES:
        return
    wanted, ignored = _wanted(asked, word), _FROM_CR4.get(word, 0)
    if word == _EDX_1:
        ignored |= _HT | (wanted & ~actual & _APIC)
    if word == _ECX_EXTENDED and asked.is_amd:
        ignored |= _CMP_LEGACY
    for bit in _bits((wanted ^ actual) & ~ignored):
        yield f"{_bit_name(word, bit)}: QEMU has {actual >> bit & 1}, allowed: {wanted >> bit & 1}"


def _wanted(asked: _Asked, word: Word) -> int:
    if word == _EAX_D:
        return asked.xsave_state
    if word == _EDX_EXTENDED and asked.is_amd:
        return asked[word] & ~_ALIASES | asked[_EDX_1] & _ALIASES
    return asked[word]
