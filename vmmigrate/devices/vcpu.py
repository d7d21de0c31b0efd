"""Processors: the payloads of bhyve's vCPUs, and the one of the embedded machine.

Source: propolis.md 5.2; Propolis, lib/propolis/src/vcpu.rs. `embedded-*` is ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

from vmmigrate.devices.fields import I64, U8, U16, U32, U64, Flag, Integer, ListOf, Octets, Scalars, Struct, Text

MAX_MSRS = 1024
MAX_FPU_BYTES = 64 << 10
MAX_GAP_BINS = 2048
MAX_NOTED_GAPS = 64

EightWords = Annotated[tuple[int, ...], ListOf(Integer(0, 0xFFFF_FFFF), 8, 8)]
SixRegisters = Annotated[tuple[int, ...], ListOf(Integer(0, (1 << 64) - 1), 6, 6)]


@dataclass(frozen=True, slots=True)
class VcpuRunStateV1:
    run_state: U32
    sipi_vector: U8
    intr_shadow: Flag
    pending_nmi: Flag
    pending_extint: Flag
    pending_exception: U64
    pending_intinfo: U64


@dataclass(frozen=True, slots=True)
class VcpuGpRegsV1:
    rax: U64
    rcx: U64
    rdx: U64
    rbx: U64
    rsp: U64
    rbp: U64
    rsi: U64
    rdi: U64
    r8: U64
    r9: U64
    r10: U64
    r11: U64
    r12: U64
    r13: U64
    r14: U64
    r15: U64
    rip: U64
    rflags: U64


@dataclass(frozen=True, slots=True)
class VcpuCtrlRegsV1:
    cr0: U64
    cr2: U64
    cr3: U64
    cr4: U64
    xcr0: U64
    efer: U64


@dataclass(frozen=True, slots=True)
class VcpuDbgRegsV1:
    dr0: U64
    dr1: U64
    dr2: U64
    dr3: U64
    dr6: U64
    dr7: U64
    debugctl: U64


@dataclass(frozen=True, slots=True)
class SegmentDescriptor:
    base: U64
    limit: U32
    access: U32
    selector: U16


Segment = Annotated[SegmentDescriptor, Struct(SegmentDescriptor)]


@dataclass(frozen=True, slots=True)
class VcpuSegRegsV1:
    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    gdtr: Segment
    idtr: Segment
    ldtr: Segment
    tr: Segment


@dataclass(frozen=True, slots=True)
class MsrEntry:
    ident: U32
    value: U64


@dataclass(frozen=True, slots=True)
class VcpuMsrsV1:
    msrs: Annotated[tuple[MsrEntry, ...], ListOf(Struct(MsrEntry), 0, MAX_MSRS)]


def msr_problems(state: VcpuMsrsV1) -> Iterator[str]:
    counts = Counter(entry.ident for entry in state.msrs)
    yield from (f"msrs: register {ident:#x} stands there {n} times" for ident, n in counts.items() if n > 1)


@dataclass(frozen=True, slots=True)
class VcpuFpuV1:
    """The XSAVE area, which only the processor reads."""

    blob: Annotated[bytes, Octets(0, MAX_FPU_BYTES)]


@dataclass(frozen=True, slots=True)
class LapicPage:
    id: U32
    version: U32
    tpr: U32
    apr: U32
    ldr: U32
    dfr: U32
    svr: U32
    isr: EightWords
    tmr: EightWords
    irr: EightWords
    esr: U32
    lvt_cmci: U32
    icr: U64
    lvt_timer: U32
    lvt_thermal: U32
    lvt_pcint: U32
    lvt_lint0: U32
    lvt_lint1: U32
    lvt_error: U32
    icr_timer: U32
    dcr_timer: U32


@dataclass(frozen=True, slots=True)
class VcpuLapicV1:
    page: Annotated[LapicPage, Struct(LapicPage)]
    msr_apicbase: U64
    timer_target: I64
    esr_pending: U32


@dataclass(frozen=True, slots=True)
class VcpuPmuAmdV1:
    """Performance counters; optional: only AMD processors have them, and a guest can do without."""

    evtsel: SixRegisters
    counter: SixRegisters


# --------------------------------------------------------------------------- the embedded machine


@dataclass(frozen=True, slots=True)
class NotedGap:
    """One long silence between two heartbeats of the guest."""

    heartbeat: U64
    gap_ns: U64
    after_pause: Flag
    after_move: Flag


@dataclass(frozen=True, slots=True)
class GapBin:
    bin: Annotated[int, Integer(0, MAX_GAP_BINS - 1)]
    count: U64


@dataclass(frozen=True, slots=True)
class EmbeddedVcpuV1:
    """All that the embedded machine's processor knows; what every page of RAM must hold follows from it.

    Attributes:
        filled_pages: How much of the working set the program has filled.
        steps: Pages rewritten since boot.
        disk_steps: Blocks written to the disk under test since boot.
        heartbeats: Ticks since boot; `last_beat_ns` is CLOCK_MONOTONIC of the last one.
        moves: How often the guest was imported.
    """

    program: Annotated[str, Text(32)]
    parameters: Annotated[Mapping[str, int | str | bool], Scalars(32)]
    filled_pages: U64
    steps: U64
    disk_steps: U64
    heartbeats: U64
    last_beat_ns: U64
    moves: U32
    gap_bins: Annotated[tuple[GapBin, ...], ListOf(Struct(GapBin), 0, MAX_GAP_BINS)]
    noted_gaps: Annotated[tuple[NotedGap, ...], ListOf(Struct(NotedGap), 0, MAX_NOTED_GAPS)]


def embedded_vcpu_problems(state: EmbeddedVcpuV1) -> Iterator[str]:
    if state.last_beat_ns and not state.heartbeats:
        yield "last_beat_ns without a heartbeat"
