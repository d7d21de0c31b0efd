"""What of a guest lies in files of its QEMU's directory, beside guest RAM: device state, disks that are blobs, and keys
that were typed and not read. Out of them payloads are made, and they are made of payloads. Blocking."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vmmigrate.devices.payload import DevicePayload
from vmmigrate.errors import HypervisorError, PayloadError
from vmmigrate.hypervisor.base import DiskPlan, GuestPlan
from vmmigrate.hypervisor.qemu import files as consoles
from vmmigrate.hypervisor.qemu import payloads
from vmmigrate.hypervisor.qemu.files import QemuFiles
from vmmigrate.hypervisor.qemu.stream import DeviceStream, parse_stream


def blobs_of(plan: GuestPlan) -> dict[str, int]:
    """Blob disks that the guest may have written: the number of each by its backend's name."""
    return {
        disk.backend_name: number
        for number, disk in enumerate(plan.disks)
        if disk.backend_kind == "blob" and not disk.readonly
    }


def unsaved(plan: GuestPlan) -> list[DiskPlan]:
    """Disks behind a controller whose state QEMU does not save (hw/nvme/ctrl.c: unmigratable)."""
    return [disk for disk in plan.disks if disk.model == "nvme"]


def collect(plan: GuestPlan, files: QemuFiles, saved: DeviceStream | None) -> tuple[DevicePayload, ...]:
    """The payloads of a guest that stands still. *saved*: its device state, if it need not be read from its file."""
    contents = {name: files.blob(number).read_bytes() for name, number in blobs_of(plan).items()}
    keys = {port.name: consoles.waiting_keys(files.keys(port.num)) for port in plan.serial_ports}
    return (
        *payloads.from_keys(keys),
        *payloads.from_stream(saved or parse_stream(files.state.read_bytes()), contents),
    )


def take_in(
    plan: GuestPlan, files: QemuFiles, received: Sequence[DevicePayload]
) -> tuple[bytes, tuple[tuple[str, str], ...]]:
    """Check everything, then put into files what is no business of QEMU's.

    Returns: What QEMU is to load, and which payloads were skipped. Raises: PayloadError: nothing was written.
    """
    blobs, nums = blobs_of(plan), {port.name: port.num for port in plan.serial_ports}
    keys, others = payloads.take_keys(received, list(nums))
    parsed, contents, skipped = payloads.to_stream(others, list(blobs))
    for name, body in contents.items():
        size = files.blob(blobs[name]).stat().st_size
        if len(body) != size:
            text = f"device {name}: {len(body)} bytes, the disk here has {size}"
            raise PayloadError(text, code="payload_value", details={"device": name})
    stream = parsed.joined()
    for name, body in contents.items():
        files.blob(blobs[name]).write_bytes(body)
    files.keep_devices(parsed, len(stream))
    files.keep_state(stream)
    for port, waiting in keys.items():
        consoles.type_keys(files.keys(nums[port]), waiting)
    return stream, skipped


def note_devices(files: QemuFiles) -> None:
    """Keep which devices the guest has, from its state as it was saved first. Blocking."""
    stream = files.state.read_bytes()
    files.keep_devices(parse_stream(stream), len(stream))


def known_devices(files: QemuFiles) -> dict[str, Any]:
    """Labels of the devices that QEMU saves, and how many bytes that is: they are those of its life. Blocking.

    Raises: HypervisorError `not_migratable`: nobody knows.
    """
    try:
        known: dict[str, Any] = json.loads(files.devices.read_text())
    except (OSError, ValueError) as exc:
        raise HypervisorError("what devices it has is not known", code="not_migratable") from exc
    return known
