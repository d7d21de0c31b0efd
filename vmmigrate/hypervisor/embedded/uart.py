"""A 16550 serial port with the history of everything the guest wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from vmmigrate.devices.kinds import MAX_PENDING_INPUT_BYTES, UART_FIFO_BYTES, Uart16550V2
from vmmigrate.devices.plan import ExpectedDevice
from vmmigrate.errors import HypervisorError, PayloadError

HISTORY_BYTES: Final = 1 << 20  # of the beginning, and of the most recent output
_LSR_DATA_READY, _LSR_THR_EMPTY, _LSR_IDLE = 0x01, 0x20, 0x40
_KIND: Final = "uart-16550"


class History:
    """The first MiB, the most recent MiB of what came after it, and how many bytes there were."""

    def __init__(self) -> None:
        self._beginning = bytearray()
        self._rolling = bytearray()
        self._total = 0

    def append(self, output: bytes) -> None:
        self._total += len(output)
        room = HISTORY_BYTES - len(self._beginning)
        self._beginning += output[:room]
        self._rolling += output[room:]
        if len(self._rolling) > 2 * HISTORY_BYTES:  # trimmed seldom, because trimming copies
            del self._rolling[:-HISTORY_BYTES]

    def export(self) -> dict[str, Any]:
        rolling = bytes(self._rolling[-HISTORY_BYTES:])
        return {"beginning": bytes(self._beginning), "rolling": rolling, "total_bytes": self._total}

    def restore(self, beginning: bytes, rolling: bytes, total_bytes: int) -> None:
        """Take over the history of another host.

        Raises:
            PayloadError: `console_history`: lengths that no history can have; nothing was changed.
        """
        after = total_bytes - len(beginning)
        if len(beginning) != min(total_bytes, HISTORY_BYTES) or len(rolling) != min(after, HISTORY_BYTES):
            lengths = f"{len(beginning)} + {len(rolling)} of {total_bytes} bytes"
            raise PayloadError(f"console history: {lengths} do not fit together", code="console_history")
        self._beginning, self._rolling, self._total = bytearray(beginning), bytearray(rolling), total_bytes


class Uart:
    """One port. What the guest writes leaves at once (and into history); what is typed waits until the guest reads."""

    def __init__(self, name: str, num: str) -> None:
        self.name = name
        self.num = num
        self.history = History()
        self.reset()

    def reset(self) -> None:
        """As after power-on; the history of what was written stays, and what was typed and not read is gone."""
        self._registers = _after_reset()
        self._receive = bytearray()
        self._pending = bytearray()

    def type_keys(self, keys: bytes) -> None:
        """Type on the console.

        Raises:
            HypervisorError: `console_full`: the guest does not read; nothing was typed.
        """
        if len(self._pending) + len(keys) > MAX_PENDING_INPUT_BYTES:
            waiting = f"{len(self._pending)} bytes of input wait, allowed are {MAX_PENDING_INPUT_BYTES}"
            raise HypervisorError(f"console {self.name}: {waiting}", code="console_full")
        self._pending += keys
        self._refill()

    def guest_read(self, most: int) -> bytes:
        """What the guest gets when it reads its receive register until it is empty, at most *most* bytes."""
        read = bytearray()
        while self._receive and len(read) < most:
            read += self._receive
            self._receive.clear()
            self._refill()
        return bytes(read)

    def guest_write(self, output: bytes) -> None:
        self.history.append(output)

    def _refill(self) -> None:
        room = UART_FIFO_BYTES - len(self._receive)
        self._receive += self._pending[:room]
        del self._pending[:room]

    def expected(self) -> ExpectedDevice:
        return ExpectedDevice(self.name, (_KIND,))

    def export(self) -> dict[str, Any]:
        line_status = _LSR_THR_EMPTY | _LSR_IDLE | (_LSR_DATA_READY if self._receive else 0)
        held = {"rx_fifo": bytes(self._receive), "pending_input": bytes(self._pending)}
        return {_KIND: Uart16550V2(**{**self._registers, "line_status": line_status, **held})}

    def apply(self, states: Mapping[str, Any]) -> None:
        uart: Uart16550V2 = states[_KIND]
        self._registers = {name: getattr(uart, name) for name in Uart16550V2.__slots__}
        if uart.tx_fifo:  # this machine transmits at once; another's unsent bytes are sent here
            self.history.append(uart.tx_fifo)
            self._registers["tx_fifo"] = b""
        self._receive = bytearray(uart.rx_fifo)
        self._pending = bytearray(uart.pending_input)


def _after_reset() -> dict[str, Any]:
    registers: dict[str, Any] = dict.fromkeys(Uart16550V2.__slots__, 0)
    registers |= {"intr_status": 1, "line_status": _LSR_THR_EMPTY | _LSR_IDLE}
    return {**registers, "thre_state": False, "rx_fifo": b"", "tx_fifo": b"", "pending_input": b""}
