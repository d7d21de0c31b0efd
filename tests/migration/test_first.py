"""What a migration promises when all goes well: the guest is as it was, ran once at a time, and its RAM is the same."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from tests.migration.fleet import (
    check,
    create,
    crucible_backend,
    migrate,
    open_fleet,
    spec_v3,
    stress,
    wait_filled,
    wait_heartbeats,
    witnesses,
)
from vmmigrate.memory import GIB, HIGH_RAM_GPA, MIB, PAGE_SIZE


async def test_a_guest_that_rewrites_its_memory_moves_in_rounds_and_is_as_it_was(tmp_path: Path) -> None:
    """At least three rounds, equal digests of all RAM, a heartbeat without hole or repeat, one owner at a time."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=stress(48, 6000))
        await wait_filled(alpha, instance, 48 * 256)

        record = await migrate(alpha, beta, instance, verify="full", downtime_ms=22, force=True)

        assert record["outcome"] == "moved", record
        assert len(record["ram"]["rounds"]) >= 3, record["ram"]
        assert record["digest"]["source"] == record["digest"]["destination"] != ""
        assert sum(record["downtime_parts_s"].values()) == pytest.approx(record["downtime_s"], abs=1e-3)
        await wait_heartbeats(beta, instance)
        verdict = await check(beta, instance)
        assert verdict["consistent"], verdict
        owners = witnesses(fleet, instance)
        assert owners.single, owners.problems
        assert owners.hosts == ("alpha", "beta")


async def test_a_guest_goes_round_three_hosts_and_comes_home(tmp_path: Path) -> None:
    """A to B to C to A: epochs grow, tombstones do not stand in the way, RAM stays as sparse as it was."""
    async with open_fleet(tmp_path, "alpha", "beta", "gamma") as fleet:
        hosts = [await fleet.start(name) for name in ("alpha", "beta", "gamma")]
        instance = await create(hosts[0], program=stress(4, 1000), overrides={"ram_bytes": 256 * MIB})
        await wait_filled(hosts[0], instance, 4 * 256)
        populated = hosts[0].guest(instance).ram.populated().count()

        for source, destination in zip(hosts, hosts[1:] + hosts[:1], strict=True):
            record = await migrate(source, destination, instance, verify="full")
            assert record["outcome"] == "moved", record
            await wait_heartbeats(destination, instance)

        home = await hosts[0].instance(instance)
        assert home["state"] == "running"
        assert home["epoch"] == [1, 4]
        assert hosts[0].guest(instance).ram.populated().count() <= populated
        assert (await check(hosts[0], instance))["consistent"]
        owners = witnesses(fleet, instance)
        assert owners.single, owners.problems
        assert owners.hosts == ("alpha", "beta", "gamma", "alpha")


@pytest.mark.parametrize(
    ("ram_bytes", "regions"),
    [
        pytest.param(PAGE_SIZE, [(0, PAGE_SIZE)], marks=pytest.mark.slow),
        pytest.param(127 * MIB, [(0, 127 * MIB)], marks=pytest.mark.slow),
        pytest.param(128 * MIB, [(0, 128 * MIB)], marks=pytest.mark.slow),
        (129 * MIB, [(0, 129 * MIB)]),
        (3 * GIB + 8 * MIB, [(0, 3 * GIB), (HIGH_RAM_GPA, 8 * MIB)]),
    ],
    ids=["one page", "127 MiB", "128 MiB", "129 MiB", "above 3 GiB"],
)
async def test_ram_of_any_size_and_layout_moves_and_stays_sparse(
    tmp_path: Path, ram_bytes: int, regions: list[tuple[int, int]]
) -> None:
    """Above 3 GiB RAM lies in two regions with a hole between; what was never touched is touched on neither side."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=stress(2, 500), overrides={"ram_bytes": ram_bytes})
        await wait_filled(alpha, instance, min(512, ram_bytes // PAGE_SIZE - 1))

        record = await migrate(alpha, beta, instance, verify="full")

        assert record["outcome"] == "moved", record
        guest = beta.guest(instance)
        assert [(region.gpa, region.size_bytes) for region in guest.ram.layout.regions] == regions
        assert guest.ram.populated().count() * PAGE_SIZE <= 3 * MIB
        assert record["ram"]["hole_bytes"] >= ram_bytes - 3 * MIB
        assert (await check(beta, instance))["consistent"]


async def test_backends_are_replaced_and_disks_console_and_blobs_arrive(tmp_path: Path) -> None:
    """The spec at the destination names its own volume generation and interface; contents and history are there."""
    spec = spec_v3(
        disk={"type": "virtio_disk", "component": {"backend_id": "volume", "pci_path": _slot(4)}},
        volume={"type": "crucible_storage_backend", "component": crucible_backend(1)},
        scratch={"type": "nvme_disk", "component": _nvme()},
        memory={"type": "blob_storage_backend", "component": {"base64": _base64(b"contents" * 512), "readonly": False}},
        net={"type": "virtio_nic", "component": _nic()},
        wire={"type": "virtio_network_backend", "component": {"vnic_name": "vnic0"}},
    )
    replacements = {
        "volume": {"component": "CrucibleStorageBackend", "spec": crucible_backend(2)},
        "wire": {"component": "VirtioNetworkBackend", "spec": {"vnic_name": "vnic7"}},
    }
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, spec, program={"name": "echo"}, blobs={"firmware": _base64(bytes(range(256)))})
        console = f"/v1/instances/{instance}/console"
        await alpha.client.post(console, {"port": "com1", "text": "before the move\r\n"})
        await wait_heartbeats(alpha, instance)

        record = await migrate(alpha, beta, instance, replacements=json.dumps(replacements))

        assert record["outcome"] == "moved", record
        assert sorted(record["negotiated"]["amended"]) == ["volume", "wire"]
        shown = (await beta.client.get(f"/v1/instances/{instance}/spec"))["spec"]["components"]
        assert shown["wire"]["component"]["vnic_name"] == "vnic7"
        assert '"gen":2' in shown["volume"]["component"]["request_json"].replace(" ", "")
        await beta.client.post(console, {"port": "com1", "text": "after it\r\n"})
        await wait_heartbeats(beta, instance)
        history = await beta.client.get(console, port="com1")
        assert history["beginning"].index("before the move") < history["beginning"].index("after it")


async def test_a_paused_guest_arrives_paused(tmp_path: Path) -> None:
    """`run_state` travels: nobody starts a guest that its operator had paused."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha)
        await wait_heartbeats(alpha, instance)
        await alpha.client.post(f"/v1/instances/{instance}:pause")
        beats = (await alpha.guest(instance).status()).heartbeats

        record = await migrate(alpha, beta, instance)

        assert record["outcome"] == "moved", record
        shown = await beta.instance(instance)
        assert (shown["state"], shown["guest"]["heartbeats"]) == ("paused", beats)
        await beta.client.post(f"/v1/instances/{instance}:start")
        await wait_heartbeats(beta, instance)
        assert witnesses(fleet, instance).single


async def test_an_older_destination_gets_the_newest_spec_version_that_says_everything(tmp_path: Path) -> None:
    """Created as v1, nothing of v2 or v3 in it: it crosses in the newest version all the same, and reads back as v1."""
    spec = spec_v3()
    del spec["smbios"]
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, spec, spec_version="v1")

        record = await migrate(alpha, beta, instance)

        assert record["negotiated"]["spec_version"] == "v3"
        shown = await beta.client.get(f"/v1/instances/{instance}/spec", version="v1")
        assert shown["spec"] == spec


def _slot(device: int) -> dict[str, int]:
    return {"bus": 0, "device": device, "function": 0}


def _nvme() -> dict[str, object]:
    return {"backend_id": "memory", "pci_path": _slot(5), "serial_number": [0] * 20}


def _nic() -> dict[str, object]:
    return {"backend_id": "wire", "interface_id": "5e0f6c1e-0000-4000-8000-000000000001", "pci_path": _slot(8)}


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
