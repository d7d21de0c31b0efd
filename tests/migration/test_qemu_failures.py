"""What goes wrong while a QEMU guest moves: the source goes on, or it is said to be lost; the next attempt is fine."""

from __future__ import annotations

import base64
import os
import shutil
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.hypervisor.qemu_hosts import requires_qemu, stress_program
from tests.migration.fleet import (
    RunningHost,
    begin,
    check,
    create,
    migrate,
    open_fleet,
    spec_v3,
    wait_heartbeats,
    wait_outcome,
    witnesses,
)
from tests.migration.qemu_fleet import VNIC, create_ready, machine, pci, start, start_both
from vmmigrate.errors import VmMigrateError
from vmmigrate.hypervisor.qemu import saving

pytestmark = [*requires_qemu, pytest.mark.slow]

SLOWLY = {"bandwidth_mib_s": 16, "compression": "off"}  # some seconds for 56 MiB


async def in_transit(source: RunningHost, migration: str) -> None:
    """Until RAM is on its way."""
    with trio.fail_after(20):
        while not (await source.record(migration))["ram"]["sent_bytes"]:
            await trio.sleep(0.01)


async def goes_on(host: RunningHost, instance: str) -> None:
    await wait_heartbeats(host, instance)
    assert (await host.instance(instance))["state"] == "running"
    assert (await check(host, instance))["consistent"]


async def outcomes(alpha: RunningHost, beta: RunningHost, migration: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return await wait_outcome(alpha, migration), await wait_outcome(beta, migration)


SOURCES = pytest.mark.parametrize("source", ["tracker", "stream"])


@pytest.mark.parametrize(
    ("source", "spoil"), [("tracker", "cut"), ("tracker", "garbled"), ("tracker", "nothing"), ("stream", "garbled")]
)
async def test_a_state_that_does_not_load_ends_that_qemu_and_the_source_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, spoil: str
) -> None:
    real = saving.load

    async def load(qmp: Any, path: Path, stream: bytes) -> None:
        cpu = stream.index(b"\x03cpu\0\0\0\0") + 20
        spoilt = {"cut": stream[:cpu], "garbled": stream[:cpu] + stream[cpu + 8 :], "nothing": b""}
        await real(qmp, path, spoilt[spoil])

    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start_both(fleet, source)
        instance = await create_ready(alpha, machine(tmp_path), disk=True)
        with monkeypatch.context() as patched:
            patched.setattr(saving, "load", load)
            migration = await begin(alpha, beta, instance, replacements=VNIC)
            ours, theirs = await outcomes(alpha, beta, migration)

        assert (ours["outcome"], theirs["outcome"]) == ("failed", "failed")
        assert ours["error"]["code"] == theirs["error"]["code"] == "device_load_failed"
        assert "did not load the device state: " in ours["error"]["message"]
        assert "no reason given" not in ours["error"]["message"]
        assert list(beta.config.directories.runtime.iterdir()) == []
        await goes_on(alpha, instance)
        assert (await migrate(alpha, beta, instance, replacements=VNIC))["outcome"] == "moved"
        await goes_on(beta, instance)
        owners = witnesses(fleet, instance)
        assert owners.single, owners.problems


async def kill_source(alpha: RunningHost, beta: RunningHost, instance: str) -> None:
    os.kill(alpha.guest(instance).process.pid, signal.SIGKILL)


async def kill_destination(alpha: RunningHost, beta: RunningHost, instance: str) -> None:
    os.kill(beta.guest(instance).process.pid, signal.SIGKILL)


async def power_off(alpha: RunningHost, beta: RunningHost, instance: str) -> None:
    await alpha.guest(instance).console_input("com1", b"p")


@SOURCES
@pytest.mark.parametrize(
    ("strike", "outcome", "code", "state"),
    [
        (kill_source, "guest_lost", "guest_lost", "lost"),
        (kill_destination, "failed", "arriving_guest_lost", "running"),
        (power_off, "failed", "guest_powered_off", "stopped"),
    ],
    ids=["qemu dies at the source", "qemu dies at the destination", "the guest powers itself off"],
)
async def test_what_happens_to_the_guest_while_its_ram_moves_has_one_outcome(
    tmp_path: Path,
    source: str,
    strike: Callable[[RunningHost, RunningHost, str], Awaitable[None]],
    outcome: str,
    code: str,
    state: str,
) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start_both(fleet, source)
        instance = await create_ready(alpha, spec_v3())
        migration = await begin(alpha, beta, instance, **SLOWLY)
        await in_transit(alpha, migration)

        await strike(alpha, beta, instance)

        ours, theirs = await outcomes(alpha, beta, migration)
        assert (ours["outcome"], ours["error"]["code"]) == (outcome, code), ours["error"]
        assert theirs["outcome"] != "moved"
        assert (await alpha.instance(instance))["state"] == state
        assert list(beta.config.directories.runtime.iterdir()) == []
        if state == "running":
            await goes_on(alpha, instance)
            assert (await migrate(alpha, beta, instance))["outcome"] == "moved"


@SOURCES
async def test_a_guest_that_reboots_while_its_ram_moves_arrives(tmp_path: Path, source: str) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start_both(fleet, source)
        instance = await create_ready(alpha, spec_v3())
        migration = await begin(alpha, beta, instance, **SLOWLY)
        await in_transit(alpha, migration)

        await alpha.guest(instance).console_input("com1", b"r")

        ours, _ = await outcomes(alpha, beta, migration)
        assert ours["outcome"] == "moved", ours["error"]
        with trio.fail_after(20):
            while (await beta.guest(instance).status()).program.get("state") != 2:
                await trio.sleep(0.01)
        await goes_on(beta, instance)


@SOURCES
async def test_a_cancelled_migration_leaves_the_guest_as_it_was(tmp_path: Path, source: str) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start_both(fleet, source)
        instance = await create_ready(alpha, spec_v3())
        for canceller in (alpha, beta):
            migration = await begin(alpha, beta, instance, **SLOWLY)
            await in_transit(alpha, migration)

            await canceller.client.post(f"/v1/migrations/{migration}:cancel")

            ours, theirs = await outcomes(alpha, beta, migration)
            assert (ours["outcome"], theirs["outcome"]) == ("cancelled", "cancelled")
            await goes_on(alpha, instance)
        assert list(beta.config.directories.runtime.iterdir()) == []


async def test_a_guest_that_boots_from_other_files_there_is_refused_before_ram_moves(tmp_path: Path) -> None:
    """A reboot at the destination would read them: they are compared while nothing has been touched."""
    kernel = tmp_path / "kernel.elf"
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start(fleet, "alpha"), await start(fleet, "beta")
        program = stress_program(mem_mib=16, ws_mib=1, rate=1)
        shutil.copy(program["kernel"], kernel)
        instance = await create(alpha, spec_v3(), program={**program, "kernel": str(kernel)})
        await wait_heartbeats(alpha, instance)
        with open(kernel, "ab") as file:  # noqa: ASYNC230
            file.write(b"another")

        record = await migrate(alpha, beta, instance)

        assert (record["outcome"], record["error"]["code"]) == ("refused", "opaque_facts"), record["error"]
        assert "device_tree" in record["error"]["message"]
        assert record["ram"]["sent_bytes"] == 0
        await wait_heartbeats(alpha, instance)


async def test_a_guest_with_an_nvme_disk_runs_and_is_refused_by_the_disks_name(tmp_path: Path) -> None:
    nvme = {"backend_id": "blob0", "pci_path": pci(5), "serial_number": [0x41, *bytes(19)]}
    blob = {"base64": base64.b64encode(bytes(8192)).decode(), "readonly": False}
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start(fleet, "alpha"), await start(fleet, "beta")
        spec = spec_v3(
            nvme0={"type": "nvme_disk", "component": nvme},
            blob0={"type": "blob_storage_backend", "component": blob},
        )
        instance = await create_ready(alpha, spec)

        with pytest.raises(VmMigrateError, match="nvme0") as refusal:
            await begin(alpha, beta, instance)

        assert refusal.value.code == "not_migratable"
        await goes_on(alpha, instance)


async def test_what_qemu_cannot_realise_is_refused_by_name_when_it_is_created(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha") as fleet:
        alpha = await start(fleet, "alpha")
        spec = spec_v3(
            bridge={"type": "pci_pci_bridge", "component": {"downstream_bus": 1, "pci_path": pci(6)}},
            injector={"type": "migration_failure_injector", "component": {"fail_exports": 1, "fail_imports": 0}},
        )
        spec["board"]["chipset"]["value"]["enable_pcie"] = True

        with pytest.raises(VmMigrateError) as refusal:
            await create(alpha, spec, program={"name": "stress"})

        assert refusal.value.code == "spec_not_creatable"
        assert len(refusal.value.details["problems"]) == 4
        for name in ("bridge", "injector", "enable_pcie", "stress"):
            assert name in refusal.value.text
        assert await alpha.client.get("/v1/instances") == []
