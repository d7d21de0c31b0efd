"""QEMU guests on the hosts of a fleet: specs, programs, and waiting for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trio

from tests.hypervisor.qemu_hosts import ACCELERATOR, QEMU, stress_kernel, stress_program
from tests.migration.fleet import Fleet, RunningHost, check, create, migrate, spec_v3, wait_heartbeats
from vmmigrate.memory import MIB, PAGE_SIZE

QEMU_SETTINGS = f'network = "user"\naccelerator = "{ACCELERATOR}"'


async def start(fleet: Fleet, name: str, source: str = "tracker", *, binary: str = QEMU, **options: Any) -> RunningHost:
    """*source*: the page source of guests that this host starts. *binary*: its QEMU."""
    allow = f'paths = ["{stress_kernel().parent}", "{fleet.root}"]\nmonitors = ["{fleet.root}"]'
    chosen = options.pop("qemu", QEMU_SETTINGS) + ("\ntracker = false" if source == "stream" else "")
    return await fleet.start(name, qemu=f'binary = "{binary}"\n{chosen}', allow=allow, **options)


async def start_both(fleet: Fleet, source: str) -> tuple[RunningHost, RunningHost]:
    return await start(fleet, "alpha", source), await start(fleet, "beta", source)


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


async def create_ready(host: RunningHost, spec: dict[str, Any], *, mem_mib: int = 56, **program: Any) -> str:
    """A stress guest that beats, with all of its memory filled; its id."""
    chosen = {"ws_mib": 8, "rate": 10, **program}
    # Two pages of RAM less than in the spec: QEMU before 9.0 then sees all that a guest under TCG writes.
    odd = {"overrides": {"ram_bytes": spec["board"]["memory_mb"] * MIB - 2 * PAGE_SIZE}}
    tracked = host.config.qemu.tracker
    instance = await create(host, spec, program=stress_program(mem_mib=mem_mib, **chosen), **({} if tracked else odd))
    await wait_ready(host, instance)
    return instance


async def moves_whole(here: RunningHost, there: RunningHost, instance: str, source: str) -> dict[str, Any]:
    """Move a guest of `machine` with all of its RAM compared, and let it check itself and its disk; the record."""
    record = await migrate(here, there, instance, verify="full", replacements=VNIC, downtime_ms=2000)
    assert record["outcome"] == "moved", record
    assert record["digest"]["source"] == record["digest"]["destination"] != ""
    assert record["negotiated"]["page_source"] == source
    await wait_heartbeats(there, instance, 300)
    verdict = await check(there, instance)
    assert verdict["consistent"], verdict
    seen = (await there.guest(instance).status()).program
    assert (seen["disk_read_backs"] > 0, seen["disk_failures"]) == (True, 0)
    return record


async def wait_hashed_again(source: RunningHost, migration: str) -> None:
    """The RAM that stayed behind was as it was sent: no write was missed."""
    with trio.fail_after(20):
        while (found := (await source.record(migration))["integrity"]["rehash"]) == "pending":
            await trio.sleep(0.02)
    assert found == "equal"
