"""Virtio devices and the filters of a NIC.

`pci-virtio` has two versions. Propolis has had several shapes under the number 1; here the last step got a number of
its own: version 2 says of every queue whether it is enabled, whether it is the control queue, and what the guest
writes to notify it, and how many queues there ever were (`peak`). Version 1 says none of that, so reading it supplies
what held for every device of its time: a queue that is live is enabled, notified by its number, the last of an odd
number (above one) is the control queue, and there were never more queues than there are.

Source: propolis.md 5.2 and 5.3 (the fields that came without a new number).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Any

from vmmigrate.devices.fields import U8, U16, U32, U64, Bits, Flag, Integer, ListOf, Octets, Struct, Text
from vmmigrate.memory import PAGE_SIZE, RamLayout

MAX_QUEUES = 64
MAX_MACS = 1024
LARGEST_QUEUE = 1 << 15
STATUS_BITS = 0xCF  # acknowledge, driver, driver ok, features ok, needs reset, failed
LEGACY = 0


@dataclass(frozen=True, slots=True)
class VirtioDeviceRegisters:
    status: Annotated[int, Bits(STATUS_BITS)]
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
class VirtioQueueV1:
    id: U16
    size: U16
    descr_gpa: U64
    mapping_valid: Flag
    live: Flag
    avail_gpa: U64
    avail_cur_idx: U16
    used_gpa: U64
    used_idx: U16


@dataclass(frozen=True, slots=True)
class PciVirtioV1:
    device: Annotated[VirtioDeviceRegisters, Struct(VirtioDeviceRegisters)]
    queues: Annotated[tuple[VirtioQueueV1, ...], ListOf(Struct(VirtioQueueV1), 0, MAX_QUEUES)]


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
class PciVirtioV2:
    device: Annotated[VirtioDeviceRegisters, Struct(VirtioDeviceRegisters)]
    queues: Annotated[VirtioQueues, Struct(VirtioQueues)]


def virtio_from_v1(old: PciVirtioV1) -> PciVirtioV2:
    count = len(old.queues)
    control = count - 1 if count > 1 and count % 2 else None
    queues = tuple(
        VirtioQueue(**_values(queue), enabled=queue.live, is_control=n == control, notify_data=queue.id)
        for n, queue in enumerate(old.queues)
    )
    return PciVirtioV2(old.device, VirtioQueues(count, count, queues))


def virtio_to_v1(new: PciVirtioV2) -> PciVirtioV1:
    kept = {field.name for field in fields(VirtioQueueV1)}
    queues = (_values(queue) for queue in new.queues.queues)
    return PciVirtioV1(
        new.device,
        tuple(VirtioQueueV1(**{name: value for name, value in queue.items() if name in kept}) for queue in queues),
    )


def _values(queue: VirtioQueueV1 | VirtioQueue) -> dict[str, Any]:
    return {field.name: getattr(queue, field.name) for field in fields(queue)}


def virtio_problems(state: PciVirtioV2) -> Iterator[str]:
    """What no virtio device can have."""
    listed = len(state.queues.queues)
    if not state.queues.len == listed <= state.queues.peak:
        yield f"queues: len {state.queues.len}, peak {state.queues.peak}, {listed} listed"
    if len(state.device.msix_queue_vec) != listed:
        yield f"device.msix_queue_vec has {len(state.device.msix_queue_vec)} entries for {listed} queues"
    for n, queue in enumerate(state.queues.queues):
        if not 0 < queue.size <= LARGEST_QUEUE or queue.size & queue.size - 1:
            yield f"queues[{n}].size is {queue.size}, allowed are powers of two up to {LARGEST_QUEUE}"


def virtio_differences(new: PciVirtioV2, own: PciVirtioV2, layout: RamLayout) -> Iterator[str]:
    """What of *new* does not fit the device that is *own*, in RAM of *layout*."""
    for field in ("mode", "device_config_size"):
        theirs, here = getattr(new.device, field), getattr(own.device, field)
        if theirs != here:
            yield f"pci-virtio device.{field} is {theirs}, here it is {here}"
    theirs, here = len(new.queues.queues), len(own.queues.queues)
    if theirs != here:
        yield f"pci-virtio has {theirs} queues, here there are {here}"
    for n, (queue, own_queue) in enumerate(zip(new.queues.queues, own.queues.queues, strict=False)):
        yield from _queue_differences(f"pci-virtio queues[{n}]", queue, own_queue, own.device.mode, layout)


def _queue_differences(where: str, new: VirtioQueue, own: VirtioQueue, mode: int, layout: RamLayout) -> Iterator[str]:
    for field in ("id", "notify_data", "is_control"):
        if getattr(new, field) != getattr(own, field):
            yield f"{where}.{field} is {getattr(new, field)}, here it is {getattr(own, field)}"
    if new.size > own.size or (mode == LEGACY and new.size != own.size):
        yield f"{where}.size is {new.size}, here it is {own.size}"
    if new.mapping_valid:
        for field in ("descr_gpa", "avail_gpa", "used_gpa"):
            gpa = getattr(new, field)
            if layout.locate(gpa // PAGE_SIZE * PAGE_SIZE, 1) is None:
                yield f"{where}.{field} {gpa:#x} does not lie in RAM"


@dataclass(frozen=True, slots=True)
class PciVirtioVionaV1:
    promisc: Annotated[str, Text(16, ("None", "Multi", "All"))]
    filters: U8
    unicast_macs: Annotated[tuple[bytes, ...], ListOf(Octets(6, 6), 0, MAX_MACS)]
    multicast_macs: Annotated[tuple[bytes, ...], ListOf(Octets(6, 6), 0, MAX_MACS)]


def viona_problems(state: PciVirtioVionaV1) -> Iterator[str]:
    for name, macs, group in (("unicast_macs", state.unicast_macs, 0), ("multicast_macs", state.multicast_macs, 1)):
        if any(mac[0] & 1 != group for mac in macs):
            yield f"{name} holds an address of the other sort"


def viona_differences(virtio: PciVirtioV2) -> Iterator[str]:
    """A NIC has pairs of I/O queues, beside its control queue."""
    io_queues = sum(not queue.is_control for queue in virtio.queues.queues)
    if io_queues % 2:
        yield f"pci-virtio has {io_queues} I/O queues, a NIC has an even number"
