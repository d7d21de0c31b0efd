"""Hosts with the QEMU adapter, and the guests that tests run there. What is missing is a visible skip."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.base import DiskPlan, GuestPlan, GuestStamp, NicPlan, SerialPortPlan
from vmmigrate.hypervisor.qemu.adapter import QemuHypervisor
from vmmigrate.hypervisor.qemu.guest import QemuGuest
from vmmigrate.hypervisor.qemu.settings import QemuSettings
from vmmigrate.hypervisor.qemu.stress import VITALS_GPA, build_stress_guest, stress_append
from vmmigrate.memory import MIB, PAGE_SIZE, RamLayout

# `VMM_KVM=1` runs the tests with KVM, where /dev/kvm works; otherwise QEMU interprets its guests.
# `VMM_QEMU` names the QEMU that tests run with, if it is not the one that is installed; `VMM_OTHER_QEMU` one of another
# version, for tests that move guests between the two.
QEMU = os.environ.get("VMM_QEMU") or "qemu-system-x86_64"
OTHER_QEMU = os.environ.get("VMM_OTHER_QEMU", "")
ACCELERATOR = "kvm" if os.environ.get("VMM_KVM") == "1" else "tcg"
INSTANCE = "5f1b5b5e-5d3c-4f0e-9b6d-000000000001"
RAM_MIB = 32

uses_qemu = [
    pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed"),
    pytest.mark.skipif(ACCELERATOR == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no C compiler for the tracker and the guest"),
]
requires_qemu = [pytest.mark.required, *uses_qemu]


@functools.cache
def stress_kernel() -> Path:
    """The stress guest, built once for all tests of a run, and removed at its end."""
    directory = Path(tempfile.mkdtemp(prefix="vmm-stress-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return build_stress_guest(directory)


def stress_program(*, mem_mib: int = RAM_MIB - 4, ws_mib: int = 4, rate: int = 4, disk: bool = False) -> dict[str, Any]:
    return {
        "name": "kernel",
        "kernel": str(stress_kernel()),
        "append": stress_append(mem_mib=mem_mib, ws_mib=ws_mib, rate=rate, disk=disk),
        "vitals_gpa": VITALS_GPA,
    }


def plan_of(program: dict[str, Any] | None = None, *, ram_mib: int = RAM_MIB, **fields: Any) -> GuestPlan:
    ports = (SerialPortPlan("console", "com1"),)
    layout = RamLayout.for_size(ram_mib * MIB)
    chosen = {"serial_ports": ports, **fields}
    return GuestPlan(INSTANCE, layout, 1, program=program or stress_program(), **chosen)


def plan_with_devices(root: Path, *, program: dict[str, Any] | None = None) -> GuestPlan:
    volume = root / "volume"
    if not volume.exists():  # a guest may have it open
        volume.write_bytes(bytes(16 * MIB))
    return plan_of(
        program or stress_program(disk=True),
        serial_ports=(SerialPortPlan("console", "com1"), SerialPortPlan("aux", "com2")),
        disks=(
            DiskPlan("disk-0", "virtio", "disk-0-backend", "file", False, {"path": str(volume)}, (0, 4, 0)),
            DiskPlan("disk-1", "virtio", "disk-1-backend", "blob", False, {"contents": b"blob" * 2048}, (0, 5, 0)),
        ),
        nics=(NicPlan("nic-0", "nic-0-backend", "vnic0", (0, 8, 0), "c5f8b8a0-0000-4000-8000-000000000001"),),
    )


def odd(plan: GuestPlan) -> GuestPlan:
    """With two pages of RAM less: QEMU before 9.0 then sees all that a guest under TCG writes."""
    return replace(plan, layout=RamLayout.for_size(plan.layout.size_bytes - 2 * PAGE_SIZE))


class QemuHosts:
    """Adapters by host name, under one short temporary directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.guests: list[QemuGuest] = []
        self.settings = QemuSettings(QEMU, accelerator=ACCELERATOR, network="user", kernels=[stress_kernel().parent])

    async def open(self, name: str = "a", *, settings: dict[str, Any] | None = None, **options: Any) -> QemuHypervisor:
        return await QemuHypervisor.open(self.root / name, replace(self.settings, **(settings or {})), **options)

    async def build(
        self,
        plan: GuestPlan,
        host: str = "a",
        *,
        epoch: tuple[int, int] = (1, 1),
        for_migration: bool = False,
        **options: Any,
    ) -> QemuGuest:
        hypervisor = await self.open(host, **options)
        if problems := hypervisor.problems(plan):
            raise HypervisorError("; ".join(problems))
        stamp = GuestStamp(plan.instance_id, host, epoch, "migration-under-test" if for_migration else None)
        guest = await hypervisor.build(plan, stamp, for_migration=for_migration)
        assert isinstance(guest, QemuGuest)
        self.guests.append(guest)
        return guest

    async def close(self) -> None:
        for guest in self.guests:
            await guest.destroy()


def short_directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="vmm-"))
    yield path
    shutil.rmtree(path)
