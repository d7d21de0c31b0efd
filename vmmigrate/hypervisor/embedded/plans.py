"""Plans and stamps as plain maps: what a guest process is told when it starts."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

from vmmigrate.hypervisor.base import (
    DiskPlan,
    GuestPlan,
    GuestStamp,
    GuestStatus,
    InjectorPlan,
    NicPlan,
    RunState,
    SerialPortPlan,
)
from vmmigrate.memory import RamLayout, Region


def stamp_to_map(stamp: GuestStamp) -> dict[str, Any]:
    return asdict(stamp)


def stamp_from_map(tree: dict[str, Any]) -> GuestStamp:
    term, n = tree["epoch"]
    return GuestStamp(tree["instance_id"], tree["host_id"], (term, n), tree["migration_id"])


def status_from_map(tree: dict[str, Any]) -> GuestStatus:
    return GuestStatus(
        stamp=stamp_from_map(tree["stamp"]),
        run_state=RunState(tree["run_state"]),
        heartbeats=tree["heartbeats"],
        last_record=tree["last_record"],
        last_journal=tree["last_journal"],
        ran_epoch=(tree["ran_epoch"][0], tree["ran_epoch"][1]),
        backends_open=tree["backends_open"],
        program=tree["program"],
        handoff=tree["handoff"],
        throttle_percent=tree.get("throttle_percent", 0),  # a guest of a release before had none
    )


def plan_to_map(plan: GuestPlan) -> dict[str, Any]:
    return {
        "instance_id": plan.instance_id,
        "regions": [[region.gpa, region.size_bytes] for region in plan.layout.regions],
        "cpus": plan.cpus,
        "serial_ports": [asdict(port) for port in plan.serial_ports],
        "disks": [{**_fields(disk), "backend": dict(disk.backend)} for disk in plan.disks],
        "nics": [asdict(nic) for nic in plan.nics],
        "injector": None if plan.injector is None else asdict(plan.injector),
        "program": dict(plan.program),
        "unmigratable": list(plan.unmigratable),
    }


def plan_from_map(tree: dict[str, Any]) -> GuestPlan:
    return GuestPlan(
        instance_id=tree["instance_id"],
        layout=RamLayout(Region(gpa, size_bytes) for gpa, size_bytes in tree["regions"]),
        cpus=tree["cpus"],
        serial_ports=tuple(SerialPortPlan(**port) for port in tree["serial_ports"]),
        disks=tuple(DiskPlan(**disk) for disk in tree["disks"]),
        nics=tuple(NicPlan(**nic) for nic in tree["nics"]),
        injector=None if tree["injector"] is None else InjectorPlan(**tree["injector"]),
        program=tree["program"],
        unmigratable=tuple(tree["unmigratable"]),
    )


def device_tree(plan: GuestPlan) -> str:
    """A digest of the devices that the guest sees, by name and kind; backends do not count."""
    devices = [
        *(f"uart {port.num} {port.name}" for port in plan.serial_ports),
        *(f"{disk.model} {disk.name}" for disk in plan.disks),
        *(f"nic {nic.name}" for nic in plan.nics),
        *([] if plan.injector is None else [f"injector {plan.injector.name}"]),
    ]
    return hashlib.sha256("\n".join(devices).encode()).hexdigest()


def _fields(disk: DiskPlan) -> dict[str, Any]:
    return {name: getattr(disk, name) for name in DiskPlan.__slots__ if name != "backend"}
