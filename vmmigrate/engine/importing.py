"""Device state at the destination: collected whole, then imported whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vmmigrate.devices.payload import MAX_PAYLOAD_BYTES, MAX_PAYLOADS, DevicePayload
from vmmigrate.devices.time import TimeData
from vmmigrate.errors import PayloadError
from vmmigrate.hypervisor.base import ConsoleHistory, Guest
from vmmigrate.net.channel import Channel
from vmmigrate.net.threads import open_group
from vmmigrate.wire import messages as m


@dataclass
class ReceivedState:
    """Device state as it arrives; nothing is applied before all of it is here."""

    time: TimeData
    payloads: list[DevicePayload] = field(default_factory=list)
    histories: list[ConsoleHistory] = field(default_factory=list)
    body_bytes: int = 0

    def add(self, state: m.DeviceState) -> None:
        for item in state.payloads:
            self.payloads.append(
                DevicePayload(item.instance_name, item.payload_kind, item.version, item.body, item.optional)
            )
            self.body_bytes += len(item.body)
        if len(self.payloads) > MAX_PAYLOADS or self.body_bytes > 4 * MAX_PAYLOAD_BYTES:
            raise PayloadError("more device state than a guest can have", code="payload_count")


async def collect_state(channel: Channel, deadline_s: float) -> tuple[ReceivedState, m.StateEnd]:
    """Time, devices and console histories, up to the end that the source announces. Each message has a deadline."""
    time_message = await channel.expect(m.TimeDataMessage, deadline_s=deadline_s)
    received = ReceivedState(TimeData.from_map(dict(time_message.values)))
    while True:
        message = await channel.expect(m.DeviceState, m.ConsoleHistoryMessage, m.StateEnd, deadline_s=deadline_s)
        if isinstance(message, m.StateEnd):
            return received, message
        if isinstance(message, m.DeviceState):
            received.add(message)
        else:
            history = ConsoleHistory(message.port, message.beginning, message.rolling, message.total_bytes)
            received.histories.append(history)


async def import_state(
    guest: Guest, received: ReceivedState, left_out: frozenset[tuple[str, str]]
) -> Sequence[tuple[str, str]]:
    """Time first: timers are normalised against it. Devices: all are validated before one is applied.

    Args:
        left_out: Optional payloads, as (device, kind), of which it was agreed that they are not imported.

    Returns: Optional payloads that no device here took, as (device, kind).
    """
    await guest.import_time(received.time)
    wanted = [p for p in received.payloads if (p.instance_name, p.kind) not in left_out]
    async with open_group() as beside:  # asked in one breath: the guest stands still for as long as this takes
        for history in received.histories:
            beside.start_soon(guest.import_console_history, history)
        skipped = await guest.import_devices(wanted)
    guest.ram.make_read_only()
    return skipped
