"""Serial ports and the PS/2 controller.

`uart-16550` version 1 is Propolis'. Version 2 is ours: it also carries the keys that the host holds for the guest
because the receive FIFO is full. Version 1 can say a port exactly as long as there are none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Any

from vmmigrate.devices.fields import U8, Bits, Flag, Maybe, Octets, Struct

UART_FIFO_BYTES = 16
MAX_PENDING_INPUT_BYTES = 64 << 10
MAX_PS2_BUFFER_BYTES = 256
PS2_RAM_BYTES = 31
DATA_READY = 0x01  # in line_status


@dataclass(frozen=True, slots=True)
class Uart16550V1:
    intr_enable: Annotated[int, Bits(0x0F)]
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
class Uart16550V2:
    """As version 1, and `pending_input`: what was typed, in order, and does not fit the receive FIFO."""

    intr_enable: Annotated[int, Bits(0x0F)]
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
    pending_input: Annotated[bytes, Octets(0, MAX_PENDING_INPUT_BYTES)]


def uart_from_v1(old: Uart16550V1) -> Uart16550V2:
    return Uart16550V2(**_registers(old), pending_input=b"")


def uart_to_v1(new: Uart16550V2) -> Uart16550V1:
    return Uart16550V1(**{name: value for name, value in _registers(new).items() if name != "pending_input"})


def _registers(state: Uart16550V1 | Uart16550V2) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in fields(state)}


def uart_problems(state: Uart16550V2) -> Iterator[str]:
    if state.rx_fifo and not state.line_status & DATA_READY:
        yield "rx_fifo holds bytes, and line_status says that there are none"
    if state.pending_input and len(state.rx_fifo) < UART_FIFO_BYTES:
        yield "pending_input holds bytes, and rx_fifo is not full"


@dataclass(frozen=True, slots=True)
class Ps2Controller:
    response: Annotated[int | None, Maybe(Bits(0xFF))]
    cmd_prefix: Annotated[int | None, Maybe(Bits(0xFF))]
    ctrl_cfg: Annotated[int, Bits(0x77)]
    ctrl_out_port: U8
    ram: Annotated[bytes, Octets(PS2_RAM_BYTES, PS2_RAM_BYTES)]


@dataclass(frozen=True, slots=True)
class Ps2Keyboard:
    buf: Annotated[bytes, Octets(0, MAX_PS2_BUFFER_BYTES)]
    current_cmd: Annotated[int | None, Maybe(Bits(0xFF))]
    enabled: Flag
    led_status: Annotated[int, Bits(0x07)]
    typematic: U8
    scan_code_set: Annotated[int, Bits(0x03)]


@dataclass(frozen=True, slots=True)
class Ps2Mouse:
    buf: Annotated[bytes, Octets(0, MAX_PS2_BUFFER_BYTES)]
    current_cmd: Annotated[int | None, Maybe(Bits(0xFF))]
    status: U8
    resolution: U8
    sample_rate: U8


@dataclass(frozen=True, slots=True)
class Ps2CtrlV1:
    ctrl: Annotated[Ps2Controller, Struct(Ps2Controller)]
    kbd: Annotated[Ps2Keyboard, Struct(Ps2Keyboard)]
    mouse: Annotated[Ps2Mouse, Struct(Ps2Mouse)]
