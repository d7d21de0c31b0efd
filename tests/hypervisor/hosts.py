"""Hosts for tests: each is a runtime directory with an embedded adapter; and plans of guests to build there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vmmigrate.hypervisor.base import DiskPlan, GuestPlan, GuestStamp, InjectorPlan, NicPlan, SerialPortPlan
from vmmigrate.hypervisor.embedded.adapter import EmbeddedHypervisor
from vmmigrate.hypervisor.embedded.remote import EmbeddedGuest
from vmmigrate.hypervisor.embedded.witness import read_witnesses
from vmmigrate.hypervisor.intervals import Verdict, check_single_owner
from vmmigrate.memory import MIB, RamLayout

INSTANCE = "instance-under-test"
STRESS = {"name": "stress", "working_set_pages": 400, "rate_pages_per_s": 20_000}


class Hosts:
    """Adapters by host name, all under one short temporary directory (socket paths have 107 bytes)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.witness_dir = root / "witness"
        self.witness_dir.mkdir(exist_ok=True)
        self.guests: list[EmbeddedGuest] = []

    async def open(self, name: str = "a", **options: Any) -> EmbeddedHypervisor:
        return await EmbeddedHypervisor.open(self.root / name, witness_dir=self.witness_dir, **options)

    async def build(
        self,
        plan: GuestPlan,
        host: str = "a",
        *,
        epoch: tuple[int, int] = (1, 1),
        for_migration: bool = False,
        **options: Any,
    ) -> EmbeddedGuest:
        hypervisor = await self.open(host, **options)
        stamp = GuestStamp(plan.instance_id, host, epoch, None)
        guest = await hypervisor.build(plan, stamp, for_migration=for_migration)
        assert isinstance(guest, EmbeddedGuest)
        self.guests.append(guest)
        return guest

    def verdict(self) -> Verdict:
        return check_single_owner(read_witnesses(self.witness_dir, INSTANCE))


def plan_of(
    program: dict[str, Any] | None = None, *, ram_bytes: int = 4 * MIB, layout: RamLayout | None = None, **devices: Any
) -> GuestPlan:
    ports = (SerialPortPlan("console", "com1"),)
    chosen = {"serial_ports": ports, **devices}
    return GuestPlan(INSTANCE, layout or RamLayout.for_size(ram_bytes), 2, program=program or STRESS, **chosen)


def plan_with_every_device(root: Path, *, program: dict[str, Any] | None = None) -> GuestPlan:
    volume = root / "volume"
    volume.write_bytes(bytes(MIB))
    crucible = {"volume_id": "5c5ab0c8", "generation": 3}
    return plan_of(
        program,
        serial_ports=(SerialPortPlan("console", "com1"), SerialPortPlan("aux", "com2")),
        disks=(
            DiskPlan("disk-0", "virtio", "disk-0-backend", "file", False, {"path": str(volume)}),
            DiskPlan("disk-1", "nvme", "disk-1-backend", "blob", False, {"contents": b"blob" * 2048}),
            DiskPlan("disk-2", "virtio", "disk-2-backend", "crucible", False, crucible),
        ),
        nics=(NicPlan("nic-0", "nic-0-backend", "vnic0"),),
        injector=InjectorPlan("injector", 0, 0),
    )
