"""Guests in real QEMU processes move between daemons: memory, disk, devices and console are as they were."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.hypervisor.qemu_hosts import requires_qemu
from tests.hypervisor.test_qemu_cpuid import FULL, leaves_of
from tests.migration.fleet import (
    check,
    create,
    migrate,
    open_fleet,
    spec_v3,
    wait_heartbeats,
    witnesses,
)
from tests.migration.qemu_fleet import VNIC, create_ready, machine, moves_whole, start, start_both, wait_hashed_again
from vmmigrate.errors import VmMigrateError
from vmmigrate.hypervisor.base import RunState
from vmmigrate.spec.latest import CpuidVendor

pytestmark = requires_qemu


@pytest.mark.parametrize("source", ["tracker", "stream"])
async def test_a_qemu_guest_moves_there_and_back_and_is_as_it_was(tmp_path: Path, source: str) -> None:
    """Memory, the disk that both hosts reach, the console; and nobody but its owner wrote a byte."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start_both(fleet, source)
        instance = await create_ready(alpha, machine(tmp_path), disk=True)

        for here, there in ((alpha, beta), (beta, alpha)):
            record = await moves_whole(here, there, instance, source)
            assert (await check(there, instance))["heartbeat"] is None
        owners = witnesses(fleet, instance)
        assert owners.single, owners.problems
        assert owners.hosts == ("alpha", "beta", "alpha")
        await wait_hashed_again(beta, record["migration_id"])


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["sealed", "tls"])
async def test_each_transport_carries_a_qemu_guest(tmp_path: Path, transport: str) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        hosts = [await start(fleet, name, limits=f'[bulk]\ntransports = ["{transport}"]') for name in ("alpha", "beta")]
        instance = await create_ready(hosts[0], spec_v3())

        record = await migrate(*hosts, instance)

        assert (record["outcome"], record["negotiated"]["transport"]) == ("moved", transport)
        await wait_heartbeats(hosts[1], instance)
        assert (await check(hosts[1], instance))["consistent"]


@pytest.mark.slow
async def test_memory_that_was_never_touched_is_neither_sent_nor_there_afterwards(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start(fleet, "alpha"), await start(fleet, "beta")
        instance = await create_ready(alpha, spec_v3(), mem_mib=16)
        touched = alpha.guest(instance).ram.populated().count()

        record = await migrate(alpha, beta, instance)

        assert record["ram"]["hole_bytes"] > 40 << 20
        assert touched < 20 * 256
        assert beta.guest(instance).ram.populated().count() <= touched + 64


@pytest.mark.slow
@pytest.mark.parametrize("source", ["tracker", "stream"])
async def test_a_paused_guest_arrives_paused_and_moves_on_before_it_has_run(tmp_path: Path, source: str) -> None:
    async with open_fleet(tmp_path, "alpha", "beta", "gamma") as fleet:
        hosts = [await start(fleet, name, source) for name in ("alpha", "beta", "gamma")]
        instance = await create_ready(hosts[0], spec_v3())
        await hosts[0].client.post(f"/v1/instances/{instance}:pause")
        beats = (await hosts[0].guest(instance).status()).heartbeats

        for here, there in itertools.pairwise(hosts):
            assert (await migrate(here, there, instance))["outcome"] == "moved"
            status = await there.guest(instance).status()
            assert (status.run_state, status.heartbeats) == (RunState.PAUSED, beats)

        await hosts[2].client.post(f"/v1/instances/{instance}:start")
        await wait_heartbeats(hosts[2], instance)
        assert (await check(hosts[2], instance))["consistent"]


@pytest.mark.slow
async def test_the_consoles_history_travels_and_goes_on(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start(fleet, "alpha"), await start(fleet, "beta")
        instance = await create_ready(alpha, spec_v3())

        assert (await migrate(alpha, beta, instance))["outcome"] == "moved"

        await wait_heartbeats(beta, instance, 100)
        history = await beta.guest(instance).console_history("com1")
        letters = (history.beginning + history.rolling).partition(b"<READY>\n")[2]
        assert len(letters) > 150
        assert all((after - before) % 26 == 1 for before, after in itertools.pairwise(letters))


@pytest.mark.slow
async def test_a_restarted_daemon_finds_its_qemu_guest_and_moves_it(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start(fleet, "alpha"), await start(fleet, "beta")
        instance = await create_ready(alpha, machine(tmp_path), disk=True)
        await alpha.stop()
        alpha = await start(fleet, "alpha")

        assert (await alpha.instance(instance))["state"] == "running"
        assert (await migrate(alpha, beta, instance, replacements=VNIC, downtime_ms=2000))["outcome"] == "moved"

        await wait_heartbeats(beta, instance)
        assert (await check(beta, instance))["consistent"]
        owners = witnesses(fleet, instance)
        assert owners.single, owners.problems


@pytest.mark.slow
async def test_an_instance_that_boots_from_its_disk_needs_no_program(tmp_path: Path) -> None:
    """Nothing is on the disk: the firmware says so, and the machine moves as it is."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start(fleet, "alpha"), await start(fleet, "beta")
        instance = await create(alpha, machine(tmp_path))

        record = await migrate(alpha, beta, instance, replacements=VNIC, downtime_ms=2000)

        assert record["outcome"] == "moved", record
        assert (await beta.instance(instance))["state"] == "running"


@pytest.mark.slow
async def test_a_processor_that_the_spec_lists_is_the_same_on_both_hosts(tmp_path: Path) -> None:
    """Every leaf of the list is what QEMU made, or it would not have started; and what it cannot make is refused."""
    leaves = leaves_of(CpuidVendor.INTEL, FULL - {"pcommit"})  # which later QEMUs have given up
    entries = [
        {"leaf": leaf, "subleaf": sub, "eax": eax, "ebx": ebx, "ecx": ecx, "edx": edx}
        for (leaf, sub), (eax, ebx, ecx, edx) in leaves.items()
    ]
    spec = spec_v3()
    spec["board"]["cpuid"] = {"entries": entries, "vendor": "intel"}
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start(fleet, "alpha"), await start(fleet, "beta")
        instance = await create_ready(alpha, spec)

        record = await migrate(alpha, beta, instance)

        assert record["outcome"] == "moved", record["error"]
        assert beta.guest(instance).facts["cpu_model"] == "base"
        await wait_heartbeats(beta, instance)
        assert (await check(beta, instance))["consistent"]
        spec["board"]["cpuid"]["entries"][1]["ecx"] |= 1 << 11  # a bit that QEMU has no name for
        with pytest.raises(VmMigrateError, match="cpuid leaf 0x1 ECX bit 11"):
            await create(alpha, spec)
