"""The shapes of the device payload kinds, newest version last in each family.

To add a version of a kind: copy its dataclass under a new name, change the copy, list it in `registry.KINDS` with the
two conversions between it and its elder neighbour, and leave the old one as it is for ever.

Source: propolis.md 5.2 (the names and widths of Propolis' structs); `embedded-*` are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from vmmigrate.devices.fields import (
    I64,
    U8,
    U16,
    U32,
    U64,
    Flag,
    Integer,
    ListOf,
    Maybe,
    Octets,
    Scalars,
    Struct,
    Text,
)
from vmmigrate.devices.payload import MAX_PAYLOAD_BYTES

UART_FIFO_BYTES = 16
CMOS_BYTES = 128
MAX_QUEUES = 64
MAX_VECTORS = 2048
MAX_MACS = 1024
MAX_PENDING_INPUT_BYTES = 64 << 10
MAX_GAP_BINS = 2048
MAX_NOTED_GAPS = 64

BlobContents = Annotated[bytes, Octets(0, MAX_PAYLOAD_BYTES - 64)]


@dataclass(frozen=True, slots=True)
class Uart16550V1:
    intr_enable: U8
    intr_status: U8
    line_ctrl: U8
    line_status: U8
    modem_ctrl: U8
    modem_status: U8
    scratch: U8
    div_low: U8
    div_high: U8
    thre_state: Flag
    rx_fifo: Annotated[bytes, Octets(0, UART_FIFO_BYTES)]
    tx_fifo: Annotated[bytes, Octets(0, UART_FIFO_BYTES)]


@dataclass(frozen=True, slots=True)
class EmbeddedConsoleV1:
    """Keys that were typed and that the guest has not read yet."""

    pending_input: Annotated[bytes, Octets(0, MAX_PENDING_INPUT_BYTES)]


@dataclass(frozen=True, slots=True)
class BhyveRtcV2:
    """`base_clock`: ns since the guest booted at which `cmos` told the time."""

    base_clock: I64
    last_period: I64
    cmos: Annotated[bytes, Octets(CMOS_BYTES, CMOS_BYTES)]
    addr: Annotated[int, Integer(0, CMOS_BYTES - 1)]


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
    # Propolis rejects unknown command bits: I/O, memory, bus master, INTx disable exist.
    reg_command: U16
    reg_intr_line: U8
    bars: Annotated[tuple[PciBar, ...], ListOf(Struct(PciBar), 6, 6)]
    msix: Annotated[Msix | None, Maybe(Struct(Msix))]


@dataclass(frozen=True, slots=True)
class VirtioDeviceRegisters:
    status: U8
    queue_select: U16
    negotiated_features: U64
    device_feature_select: U32
    driver_feature_select: U32
    config_generation: U8
    config_generation_seen: Flag
    device_config_size: U64
    mode: Annotated[int, Integer(0, 2)]  # legacy, transitional, modern
    msix_cfg_vec: U16
    msix_queue_vec: Annotated[tuple[int, ...], ListOf(Integer(0, 0xFFFF), 0, MAX_QUEUES)]
    isr_queue: Flag
    isr_cfg: Flag


@dataclass(frozen=True, slots=True)
class VirtioQueue:
    id: U16
    size: U16
    descr_gpa: U64
    mapping_valid: Flag
    live: Flag
    enabled: Flag
    is_control: Flag
    notify_data: U16
    avail_gpa: U64
    avail_cur_idx: U16
    used_gpa: U64
    used_idx: U16


@dataclass(frozen=True, slots=True)
class VirtioQueues:
    len: U64
    peak: U64
    queues: Annotated[tuple[VirtioQueue, ...], ListOf(Struct(VirtioQueue), 0, MAX_QUEUES)]


@dataclass(frozen=True, slots=True)
class PciVirtioV1:
    device: Annotated[VirtioDeviceRegisters, Struct(VirtioDeviceRegisters)]
    queues: Annotated[VirtioQueues, Struct(VirtioQueues)]


@dataclass(frozen=True, slots=True)
class PciVirtioVionaV1:
    promisc: Annotated[str, Text(16, ("None", "Multi", "All"))]
    filters: U8
    unicast_macs: Annotated[tuple[bytes, ...], ListOf(Octets(6, 6), 0, MAX_MACS)]
    multicast_macs: Annotated[tuple[bytes, ...], ListOf(Octets(6, 6), 0, MAX_MACS)]


@dataclass(frozen=True, slots=True)
class NvmeCompletionQueue:
    id: U16
    size: U32
    head: U16
    tail: U16
    avail: U16
    phase: Flag
    base: U64
    iv: U16


@dataclass(frozen=True, slots=True)
class NvmeSubmissionQueue:
    id: U16
    size: U32
    head: U16
    tail: U16
    base: U64
    cq_id: U16


@dataclass(frozen=True, slots=True)
class NvmeCtrlV1:
    cap: U64
    cc: U32
    csts: U32
    aqa: U32
    acq_base: U64
    asq_base: U64
    dbbuf_shadow: U64
    dbbuf_evtidx: U64
    cqs: Annotated[tuple[NvmeCompletionQueue, ...], ListOf(Struct(NvmeCompletionQueue), 0, MAX_QUEUES)]
    sqs: Annotated[tuple[NvmeSubmissionQueue, ...], ListOf(Struct(NvmeSubmissionQueue), 0, MAX_QUEUES)]


@dataclass(frozen=True, slots=True)
class InMemoryBlockBackendV1:
    """A blob disk as it is now, not as the spec made it. The cap leaves room for the map around it."""

    bytes: BlobContents


@dataclass(frozen=True, slots=True)
class MigrationFailureV1:
    """Nothing: the device is there only to fail."""


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
