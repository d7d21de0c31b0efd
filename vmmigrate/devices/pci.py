"""Configuration space of PCI devices: the payload `pci-device`, which every PCI device has.

Source: propolis.md 5.2; Propolis, lib/propolis/src/hw/pci (command bits, BAR kinds).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from vmmigrate.devices.fields import U8, U16, U32, U64, Bits, Flag, ListOf, Maybe, Struct, Text

MAX_VECTORS = 2048
COMMAND_BITS = 0x0407  # I/O, memory, bus master, INTx disable
_LARGEST_BAR = {"Pio": 1 << 16, "Mmio": 1 << 32, "Mmio64": 1 << 63}


@dataclass(frozen=True, slots=True)
class PciBar:
    kind: Annotated[str, Text(8, ("Empty", "Pio", "Mmio", "Mmio64"))]
    size: U64
    value: U64


@dataclass(frozen=True, slots=True)
class MsixEntry:
    addr: U64
    data: U32
    is_vec_masked: Flag
    is_pending: Flag


@dataclass(frozen=True, slots=True)
class Msix:
    count: U16
    is_enabled: Flag
    is_func_masked: Flag
    entries: Annotated[tuple[MsixEntry, ...], ListOf(Struct(MsixEntry), 0, MAX_VECTORS)]


@dataclass(frozen=True, slots=True)
class PciDeviceV1:
    reg_command: Annotated[int, Bits(COMMAND_BITS)]
    reg_intr_line: U8
    bars: Annotated[tuple[PciBar, ...], ListOf(Struct(PciBar), 6, 6)]
    msix: Annotated[Msix | None, Maybe(Struct(Msix))]


def problems_in(state: PciDeviceV1) -> Iterator[str]:
    """What no PCI device can have."""
    for n, bar in enumerate(state.bars):
        yield from _bar_problems(n, bar)
        if bar.kind == "Mmio64" and (n == 5 or state.bars[n + 1].kind != "Empty"):
            yield f"bars[{n}] is Mmio64 and needs an Empty one after it"
    if state.msix is not None and len(state.msix.entries) != state.msix.count:
        yield f"msix says {state.msix.count} vectors and lists {len(state.msix.entries)}"


def _bar_problems(n: int, bar: PciBar) -> Iterator[str]:
    if bar.kind == "Empty":
        if bar.size or bar.value:
            yield f"bars[{n}] is Empty and has size {bar.size:#x} and value {bar.value:#x}, allowed is 0"
        return
    largest = _LARGEST_BAR[bar.kind]
    if not 0 < bar.size <= largest or bar.size & (bar.size - 1):
        yield f"bars[{n}] has {bar.size:#x} bytes, allowed are powers of two up to {largest:#x} for {bar.kind}"
    elif bar.value % bar.size or bar.value + bar.size > 2 * largest:
        yield f"bars[{n}] lies at {bar.value:#x}, which no {bar.kind} of {bar.size:#x} bytes can"


def differences(new: PciDeviceV1, own: PciDeviceV1) -> Iterator[str]:
    """What of *new* another device has than the one that is *own*."""
    for n, (bar, own_bar) in enumerate(zip(new.bars, own.bars, strict=True)):
        if (bar.kind, bar.size) != (own_bar.kind, own_bar.size):
            here = f"{own_bar.kind} of {own_bar.size:#x}"
            yield f"pci-device bars[{n}] is {bar.kind} of {bar.size:#x} bytes, here it is {here}"
    theirs, ours = (None if side.msix is None else side.msix.count for side in (new, own))
    if theirs != ours:
        yield f"pci-device msix has {theirs} vectors, here it has {ours}"
