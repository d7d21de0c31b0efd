"""Disks of QEMU guests across a move: an NBD server that both hosts reach, files that are locked, blobs that travel."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.hypervisor.qemu_hosts import requires_qemu
from tests.migration.fleet import (
    CRUCIBLE,
    RunningHost,
    begin,
    check,
    create,
    crucible_backend,
    migrate,
    open_fleet,
    spec_v3,
    wait_heartbeats,
    wait_outcome,
    witnesses,
)
from tests.migration.qemu_fleet import QEMU_SETTINGS, create_ready, machine, pci, start
from vmmigrate.errors import VmMigrateError
from vmmigrate.hypervisor.qemu import images
from vmmigrate.memory import MIB

pytestmark = [
    *requires_qemu,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="qemu-nbd is not installed (qemu-utils)"),
]


@contextlib.asynccontextmanager
async def nbd_server(image: Path) -> AsyncIterator[Path]:
    """A real NBD server for two clients; its socket."""
    address = image.with_suffix(".nbd")
    command = ["qemu-nbd", "--persistent", "--shared=2", "--format=raw", f"--socket={address}", str(image)]
    server = await trio.lowlevel.open_process(command, stderr=subprocess.DEVNULL)
    try:
        with trio.fail_after(10):
            while not await trio.Path(address).exists():
                await trio.sleep(0.01)
        yield address
    finally:
        server.kill()
        await server.wait()


def crucible_machine() -> dict[str, Any]:
    """A machine whose disk is a Crucible volume of one region."""
    return spec_v3(
        disk0={"type": "virtio_disk", "component": {"backend_id": "volume0", "pci_path": pci(4)}},
        volume0={"type": "crucible_storage_backend", "component": crucible_backend(1)},
    )


def newer() -> str:
    spec = crucible_backend(2)
    return json.dumps({"volume0": {"component": "CrucibleStorageBackend", "spec": spec}})


async def disk_counters(host: RunningHost, instance: str) -> tuple[int, int, int]:
    seen = (await host.guest(instance).status()).program
    return seen["disk_writes"], seen["disk_read_backs"], seen["disk_failures"]


async def test_a_crucible_volume_is_written_over_nbd_before_and_after_the_move(tmp_path: Path) -> None:
    """Every block that is written again is read first: a write that was lost on the way would be seen."""
    image = tmp_path / "volume.img"
    image.write_bytes(bytes(16 * MIB))
    async with nbd_server(image) as address, open_fleet(tmp_path, "alpha", "beta") as fleet:
        qemu = f'{QEMU_SETTINGS}\n[qemu.regions]\n{CRUCIBLE} = "nbd+unix:///?socket={address}"'
        alpha, beta = [await start(fleet, name, qemu=qemu) for name in ("alpha", "beta")]
        instance = await create_ready(alpha, crucible_machine(), disk=True)
        await wait_heartbeats(alpha, instance, 1500)  # all blocks are written once, and some twice
        written, _, _ = await disk_counters(alpha, instance)
        assert written > 256

        record = await migrate(alpha, beta, instance, replacements=newer())

        assert record["outcome"] == "moved", record
        assert record["negotiated"]["amended"] == ["volume0"]
        await wait_heartbeats(beta, instance, 1500)
        after, read_back, failures = await disk_counters(beta, instance)
        assert after > written + 256
        assert (read_back > written, failures) == (True, 0)
        assert (await check(beta, instance))["consistent"]
        assert witnesses(fleet, instance).single
    assert image.read_bytes().count(b"VMMB") >= 250, "the blocks are on the disk behind the server"


async def test_a_volume_with_regions_that_a_host_has_no_address_for_is_refused_by_its_id(tmp_path: Path) -> None:
    image = tmp_path / "volume.img"
    image.write_bytes(bytes(16 * MIB))
    async with nbd_server(image) as address, open_fleet(tmp_path, "alpha", "beta") as fleet:
        regions = f'[qemu.regions]\n{CRUCIBLE} = "nbd+unix:///?socket={address}"'
        alpha = await start(fleet, "alpha", qemu=f"{QEMU_SETTINGS}\n{regions}")
        beta = await start(fleet, "beta")
        instance = await create_ready(alpha, crucible_machine())

        record = await migrate(alpha, beta, instance, replacements=newer())

        assert record["outcome"] == "refused", record
        assert CRUCIBLE in record["error"]["message"]
        assert "volume0" in record["error"]["message"]
        assert record["ram"]["sent_bytes"] == 0
        await wait_heartbeats(alpha, instance)


def plain_volume(**leaf: Any) -> dict[str, Any]:
    """A volume of one file or URL."""
    part = {"id": "7d1a3f7e-0000-4000-8000-00000000000b", "block_size": 512, **leaf}
    volume = {
        "type": "volume",
        "id": CRUCIBLE,
        "block_size": 512,
        "sub_volumes": [part],
        "read_only_parent": None,
    }
    return {"type": "crucible_storage_backend", "component": {"request_json": json.dumps(volume), "readonly": False}}


async def test_a_volume_of_one_file_is_opened_directly_and_its_lock_is_handed_over(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(16 * MIB))
    spec = spec_v3(
        disk0={"type": "virtio_disk", "component": {"backend_id": "volume0", "pci_path": pci(4)}},
        volume0=plain_volume(type="file", path=str(disk)),
    )
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start(fleet, "alpha"), await start(fleet, "beta")
        instance = await create_ready(alpha, spec, disk=True)
        assert holders(alpha, instance, disk) == [alpha.guest(instance).process.pid]

        record = await migrate(alpha, beta, instance, keep=["volume0"])

        assert record["outcome"] == "moved", record
        assert holders(beta, instance, disk) == [beta.guest(instance).process.pid]
        await wait_heartbeats(beta, instance, 300)
        assert (await check(beta, instance))["consistent"]


def holders(host: RunningHost, instance: str, disk: Path) -> list[int]:
    """The guest's process, if it holds the lock for writing *disk*."""
    pid = host.guest(instance).process.pid
    return [] if images.not_held({0: disk}, pid) else [pid]


async def test_a_destination_whose_disk_is_held_elsewhere_gives_the_guest_back(tmp_path: Path) -> None:
    """Between `acquired` and `started` the file turns out to be open elsewhere: `returned`, and the source goes on."""
    disk = tmp_path / "disk.img"
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start(fleet, "alpha"), await start(fleet, "beta")
        instance = await create_ready(alpha, machine(tmp_path), disk=True)
        thief = alpha.guest(instance)
        real = thief.pause_for_handoff

        async def paused_and_stolen(migration: str) -> None:
            await real(migration)
            stack.enter_context(held(disk))

        with contextlib.ExitStack() as stack:
            thief.pause_for_handoff = paused_and_stolen  # type: ignore[method-assign]
            vnic = '{"vnic0": {"component": "VirtioNetworkBackend", "spec": {"vnic_name": "vnic1"}}}'
            migration = await begin(alpha, beta, instance, replacements=vnic)
            theirs = await wait_outcome(beta, migration)
            assert (theirs["outcome"], theirs["error"]["code"]) == ("failed", "backend_busy")
        thief.pause_for_handoff = real  # type: ignore[method-assign]

        ours = await wait_outcome(alpha, migration)
        assert (ours["outcome"], ours["error"]["code"]) == ("failed", "backend_busy")
        await wait_heartbeats(alpha, instance)
        assert (await check(alpha, instance))["consistent"]
        owners = witnesses(fleet, instance)
        assert owners.single, owners.problems


@contextlib.contextmanager
def held(disk: Path) -> Any:
    """Another QEMU program has the file open for writing."""
    holder = subprocess.Popen(
        ["qemu-io", "-f", "raw", str(disk)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    holder.stdin.write(b"read 0 512\n")
    holder.stdin.flush()
    holder.stdout.readline()
    try:
        yield
    finally:
        holder.kill()
        holder.communicate()


async def test_a_blob_disk_that_the_guest_wrote_travels_with_it(tmp_path: Path) -> None:
    import base64

    blob = {"base64": base64.b64encode(bytes(2 * MIB)).decode(), "readonly": False}
    spec = spec_v3(
        disk0={"type": "virtio_disk", "component": {"backend_id": "blob0", "pci_path": pci(4)}},
        blob0={"type": "blob_storage_backend", "component": blob},
    )
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start(fleet, "alpha"), await start(fleet, "beta")
        instance = await create_ready(alpha, spec, disk=True)
        await wait_heartbeats(alpha, instance, 500)

        record = await migrate(alpha, beta, instance)

        assert record["outcome"] == "moved", record
        await wait_heartbeats(beta, instance, 1500)
        _, read_back, failures = await disk_counters(beta, instance)
        assert (read_back > 0, failures) == (True, 0)


async def test_a_file_outside_the_allow_lists_is_refused(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha") as fleet:
        alpha = await start(fleet, "alpha")
        spec = spec_v3(
            disk0={"type": "virtio_disk", "component": {"backend_id": "volume0", "pci_path": pci(4)}},
            volume0=plain_volume(type="file", path="/etc/passwd"),
        )
        program = {"name": "kernel", "kernel": "/etc/passwd"}

        with pytest.raises(VmMigrateError, match="/etc/passwd is not under an allowed directory"):
            await create(alpha, spec)
        with pytest.raises(VmMigrateError, match="'/etc/passwd' lies in no directory that is allowed"):
            await create(alpha, spec_v3(), program=program)
