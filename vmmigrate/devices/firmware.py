"""What firmware talks to: fw_cfg, the RAM framebuffer, the Hyper-V interface.

Source: propolis.md 5.2; Propolis, lib/propolis/src/hw/qemu and enlightenment/hyperv.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from vmmigrate.devices.fields import U16, U32, U64, ListOf, Maybe, Octets, Struct, Text
from vmmigrate.memory import PAGE_SIZE, RamLayout

MAX_FW_CFG_ENTRIES = 256
MAX_FW_CFG_BYTES = 1 << 20
_HYPERCALL_ENABLED = 1
_OVERLAY_PAGE = ~(PAGE_SIZE - 1) & ((1 << 64) - 1)


@dataclass(frozen=True, slots=True)
class FwCfgSelected:
    selector: U16
    offset: U32
    cached_value: Annotated[bytes | None, Maybe(Octets(0, MAX_FW_CFG_BYTES))]


@dataclass(frozen=True, slots=True)
class FwCfgEntry:
    """`contents` only when `kind` is Bytes; the other two are made by the device itself."""

    selector: U16
    name: Annotated[str, Text(56)]
    kind: Annotated[str, Text(8, ("FileDir", "RamFb", "Bytes"))]
    contents: Annotated[bytes | None, Maybe(Octets(0, MAX_FW_CFG_BYTES))]


@dataclass(frozen=True, slots=True)
class QemuFwCfgV2:
    dma_addr: U64
    selected: Annotated[FwCfgSelected | None, Maybe(Struct(FwCfgSelected))]
    entries: Annotated[tuple[FwCfgEntry, ...], ListOf(Struct(FwCfgEntry), 0, MAX_FW_CFG_ENTRIES)]


def fw_cfg_problems(state: QemuFwCfgV2) -> Iterator[str]:
    selectors = Counter(entry.selector for entry in state.entries)
    names = Counter(entry.name for entry in state.entries)
    yield from (f"entries: selector {selector:#x} stands there {n} times" for selector, n in selectors.items() if n > 1)
    yield from (f"entries: a name of {len(name)} characters is there {n} times" for name, n in names.items() if n > 1)
    for n, entry in enumerate(state.entries):
        if (entry.contents is None) == (entry.kind == "Bytes"):
            yield f"entries[{n}] is {entry.kind} and has {'no ' if entry.contents is None else ''}contents"
    if state.selected is not None and state.selected.selector not in selectors:
        yield f"selected: selector {state.selected.selector:#x} is no entry"


@dataclass(frozen=True, slots=True)
class QemuRamFbV1:
    addr: U64
    fourcc: U32
    flags: U32
    width: U32
    height: U32
    stride: U32


@dataclass(frozen=True, slots=True)
class ReferenceTsc:
    msr_value: U64
    guest_freq: U64


@dataclass(frozen=True, slots=True)
class GuestHypervInterfaceV1:
    msr_guest_os_id: U64
    msr_hypercall: U64
    reference_tsc: Annotated[ReferenceTsc | None, Maybe(Struct(ReferenceTsc))]


def hyperv_problems(state: GuestHypervInterfaceV1) -> Iterator[str]:
    if state.msr_hypercall & _HYPERCALL_ENABLED and not state.msr_guest_os_id:
        yield "msr_hypercall is enabled, and msr_guest_os_id is 0"
    if state.reference_tsc is not None and not state.reference_tsc.guest_freq:
        yield "reference_tsc.guest_freq is 0"


def hyperv_differences(new: GuestHypervInterfaceV1, layout: RamLayout, *, has_reference_tsc: bool) -> Iterator[str]:
    """What of *new* does not fit a machine with this RAM and this choice of the reference clock."""
    if (new.reference_tsc is not None) != has_reference_tsc:
        yield f"reference_tsc is {'there' if new.reference_tsc else 'missing'}, here the spec says otherwise"
    registers = {"msr_hypercall": new.msr_hypercall}
    if new.reference_tsc is not None:
        registers["reference_tsc.msr_value"] = new.reference_tsc.msr_value
    for name, value in registers.items():
        page = value & _OVERLAY_PAGE
        if value & _HYPERCALL_ENABLED and layout.locate(page, 1) is None:
            yield f"{name}: its page {page:#x} does not lie in RAM"
