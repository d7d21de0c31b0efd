"""The chipset: host bridge, ISA bridge with its interrupt controllers and timers, power management, clock, HPET.

`bhyve-rtc` has two versions, as in Propolis: version 1 told the time of day beside the registers (`time_sec`,
`time_nsec`, at `time_base`), version 2 tells it in the registers alone, at `base_clock`, and knows when the periodic
interrupt fired last. Propolis dropped the older one; here it is read, and written when it can say the clock exactly.

Source: propolis.md 5.2; Propolis, lib/propolis/src/hw/{bhyve,chipset}; illumos, vmm_data.h (both RTC versions).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

from vmmigrate.devices.fields import I64, U8, U16, U32, U64, Bits, Integer, ListOf, Octets, Struct
from vmmigrate.errors import PayloadError

CMOS_BYTES = 128
NS_PER_S = 1_000_000_000
I64_MIN, I64_MAX = -(1 << 63), (1 << 63) - 1
PM_BUTTON = 0x0100
PM_CONTROL = 0x3C01  # SCI enable, suspend type, suspend enable
_STATUS_B = 0x0B
_HOURS_24 = 0x02
_BINARY = 0x04
_LAST_SECOND = 253_402_300_799  # of the year 9999, the last that CMOS can name


@dataclass(frozen=True, slots=True)
class I440FxHbV1:
    pci_cfg_addr: U32


@dataclass(frozen=True, slots=True)
class Piix3LpcV1:
    pir_regs: Annotated[bytes, Octets(4, 4)]
    post_code: U8


@dataclass(frozen=True, slots=True)
class AtPicChip:
    icw_state: U8
    status: U8
    reg_irr: U8
    reg_isr: U8
    reg_imr: U8
    irq_base: U8
    lowprio: U8
    elc: U8
    level: Annotated[tuple[int, ...], ListOf(Integer(0, 0xFFFF_FFFF), 8, 8)]


@dataclass(frozen=True, slots=True)
class BhyveAtPicV1:
    chips: Annotated[tuple[AtPicChip, ...], ListOf(Struct(AtPicChip), 2, 2)]


@dataclass(frozen=True, slots=True)
class AtPitChannel:
    initial: U16
    reg_cr: U16
    reg_ol: U16
    reg_status: U8
    mode: Annotated[int, Integer(0, 7)]
    status: U8
    time_target: I64


@dataclass(frozen=True, slots=True)
class BhyveAtPitV1:
    channel: Annotated[tuple[AtPitChannel, ...], ListOf(Struct(AtPitChannel), 3, 3)]


@dataclass(frozen=True, slots=True)
class BhyveIoApicV1:
    id: U32
    reg_sel: U32
    registers: Annotated[tuple[int, ...], ListOf(Integer(0, (1 << 64) - 1), 32, 32)]
    levels: Annotated[tuple[int, ...], ListOf(Integer(0, 0xFFFF_FFFF), 32, 32)]


@dataclass(frozen=True, slots=True)
class Piix3PmV1:
    pm_base: U16
    pm_status: Annotated[int, Bits(PM_BUTTON)]
    pm_ena: Annotated[int, Bits(PM_BUTTON)]
    pm_ctrl: Annotated[int, Bits(PM_CONTROL)]


@dataclass(frozen=True, slots=True)
class BhyvePmTimerV1:
    start_time: I64


@dataclass(frozen=True, slots=True)
class HpetTimer:
    config: U64
    msi: U64
    comp_val: U32
    comp_rate: U32
    time_target: I64


@dataclass(frozen=True, slots=True)
class BhyveHpetV1:
    config: U64
    isr: U64
    count_base: U32
    time_base: I64
    timers: Annotated[tuple[HpetTimer, ...], ListOf(Struct(HpetTimer), 8, 8)]


# --------------------------------------------------------------------------- the clock


@dataclass(frozen=True, slots=True)
class BhyveRtcV1:
    """At `time_base` (ns since the guest booted) it was `time_sec` and `time_nsec` since 1970.

    The time of day in `cmos` counts for nothing: it is that of the last update.
    """

    cmos: Annotated[bytes, Octets(CMOS_BYTES, CMOS_BYTES)]
    time_sec: Annotated[int, Integer(0, _LAST_SECOND)]
    time_nsec: Annotated[int, Integer(0, NS_PER_S - 1)]
    time_base: Annotated[int, Integer(I64_MIN + NS_PER_S, I64_MAX)]
    addr: Annotated[int, Integer(0, CMOS_BYTES - 1)]


@dataclass(frozen=True, slots=True)
class BhyveRtcV2:
    """`base_clock`: ns since the guest booted at which `cmos` told the time."""

    base_clock: I64
    last_period: I64
    cmos: Annotated[bytes, Octets(CMOS_BYTES, CMOS_BYTES)]
    addr: Annotated[int, Integer(0, CMOS_BYTES - 1)]


def rtc_from_v1(old: BhyveRtcV1) -> BhyveRtcV2:
    """The registers tell whole seconds, so the rest of the second goes into the moment at which they told it."""
    cmos = bytearray(old.cmos)
    write_time(cmos, old.time_sec)
    return BhyveRtcV2(old.time_base - old.time_nsec, 0, bytes(cmos), old.addr)


def rtc_to_v1(new: BhyveRtcV2) -> BhyveRtcV1:
    try:
        seconds = read_time(new.cmos)
    except ValueError as exc:
        raise PayloadError(f"the clock's registers hold no time of day ({exc})", code="payload_lossy") from None
    return BhyveRtcV1(new.cmos, seconds, 0, new.base_clock, new.addr)


def rtc_problems(state: BhyveRtcV2) -> Iterator[str]:
    try:
        read_time(state.cmos)
    except ValueError as exc:
        yield f"cmos: no time of day ({exc})"


def read_time(cmos: bytes | bytearray) -> int:
    """Seconds since 1970 of the time of day in CMOS.

    Raises:
        ValueError: The registers hold no date.
    """
    second, minute, hour, day, month, year, century = (_read(cmos, n) for n in (0, 2, 4, 7, 8, 9, 0x32))
    if not cmos[_STATUS_B] & _HOURS_24:
        hour = _read_12_hours(cmos)
    return int(datetime(century * 100 + year, month, day, hour, minute, second, tzinfo=UTC).timestamp())


def write_time(cmos: bytearray, seconds: int) -> None:
    """Set the registers to the time of day, in the coding that CMOS itself asks for."""
    now = datetime.fromtimestamp(seconds, UTC)
    registers = {0: now.second, 2: now.minute, 4: now.hour, 6: now.isoweekday() % 7 + 1, 7: now.day, 8: now.month}
    registers |= {9: now.year % 100, 0x32: now.year // 100}
    for register, value in registers.items():
        cmos[register] = _coded(cmos, value)
    if not cmos[_STATUS_B] & _HOURS_24:
        cmos[4] = _coded(cmos, now.hour % 12 or 12) | (0x80 if now.hour >= 12 else 0)


def _read(cmos: bytes | bytearray, register: int) -> int:
    return _decoded(cmos, cmos[register])


def _read_12_hours(cmos: bytes | bytearray) -> int:
    hour = _decoded(cmos, cmos[4] & 0x7F)
    if not 1 <= hour <= 12:
        raise ValueError(f"hour {hour} of a clock of 12 hours")
    return hour % 12 + (12 if cmos[4] & 0x80 else 0)


def _decoded(cmos: bytes | bytearray, value: int) -> int:
    if cmos[_STATUS_B] & _BINARY:
        return value
    if value & 0x0F > 9 or value >> 4 > 9:
        raise ValueError(f"{value:#x} is not BCD")
    return (value >> 4) * 10 + (value & 0x0F)


def _coded(cmos: bytes | bytearray, value: int) -> int:
    return value if cmos[_STATUS_B] & _BINARY else value // 10 << 4 | value % 10
