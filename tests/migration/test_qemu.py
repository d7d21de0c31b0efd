"""Guests in real QEMU processes move between daemons: memory, disk, devices and console are as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trio

from tests.hypervisor.qemu_hosts import requires_qemu, stress_kernel, stress_program
from tests.migration.fleet import (
    Fleet,
    RunningHost,
    check,
    create,
    migrate,
    open_fleet,
    spec_v3,
    wait_heartbeats,
    witnesses,
)
from vmmigrate.memory import MIB

pytestmark = requires_qemu

QEMU = 'network = "user"'


async def start(fleet: Fleet, name: str, **options: Any) -> RunningHost:
    allow = f'paths = ["{stress_kernel().parent}", "{fleet.root}"]'
    return await fleet.start(name, qemu=options.pop("qemu", QEMU), allow=allow, **options)


def machine(root: Path, **components: Any) -> dict[str, Any]:
    """A machine with a disk that is a file of both hosts, and a NIC."""
    disk = root / "disk.img"
    if not disk.exists():
        disk.write_bytes(bytes(16 * MIB))
    return spec_v3(
        disk0={"type": "virtio_disk", "component": {"backend_id": "file0", "pci_path": pci(4)}},
        file0={
            "type": "file_storage_backend",
            "component": {"path": str(disk), "readonly": False, "block_size": 512, "workers": None},
        },
        nic0={
            "type": "virtio_nic",
            "component": {
                "backend_id": "vnic0",
                "interface_id": "6f5e0c1a-9b7d-4e2f-8a3c-000200000001",
                "pci_path": pci(8),
            },
        },
        vnic0={"type": "virtio_network_backend", "component": {"vnic_name": "vnic0"}},
        **components,
    )


def pci(device: int, function: int = 0) -> dict[str, int]:
    return {"bus": 0, "device": device, "function": function}


VNIC = '{"vnic0": {"component": "VirtioNetworkBackend", "spec": {"vnic_name": "vnic1"}}}'


async def wait_ready(host: RunningHost, instance: str) -> None:
    """Until the stress guest has filled its memory and beats."""
    with trio.fail_after(30):
        while (await host.guest(instance).status()).program.get("state") != 2:
            await trio.sleep(0.01)
    await wait_heartbeats(host, instance)


async def test_a_qemu_guest_moves_and_is_as_it_was(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start(fleet, "alpha"), await start(fleet, "beta")
        program = stress_program(mem_mib=56, ws_mib=8, rate=10, disk=True)
        instance = await create(alpha, machine(tmp_path), program=program)
        await wait_ready(alpha, instance)

        record = await migrate(alpha, beta, instance, verify="full", replacements=VNIC)

        assert record["outcome"] == "moved", record
        assert record["digest"]["source"] == record["digest"]["destination"] != ""
        await wait_heartbeats(beta, instance, 300)
        verdict = await check(beta, instance)
        assert verdict["consistent"], verdict
        program_seen = (await beta.guest(instance).status()).program
        assert program_seen["disk_read_backs"] > 0
        assert program_seen["disk_failures"] == 0
        owners = witnesses(fleet, instance)
        assert owners.single, owners.problems
        assert owners.hosts == ("alpha", "beta")
