"""Two and three daemons as processes of their own, driven over HTTPS, killed without warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from tests.migration.fleet import begin, check, create, migrate, stress, wait_outcome
from tools.faults.site import HostProcess, guest_pids, open_site
from vmmigrate.hypervisor.embedded.witness import read_witness
from vmmigrate.hypervisor.intervals import check_single_owner


@pytest.mark.slow
async def test_two_daemon_processes_migrate_a_guest_over_their_api(tmp_path: Path) -> None:
    """Created, migrated, checked and deleted by a client; afterwards no guest process is left."""
    async with open_site(tmp_path, "alpha", "beta") as site:
        alpha, beta = await site.start("alpha"), await site.start("beta")
        instance = await create(alpha, program=stress(16, 3000))
        await _filled(alpha, instance, 16 * 256)

        record = await migrate(alpha, beta, instance, verify="full")

        assert record["outcome"] == "moved", record
        assert record["digest"]["source"] == record["digest"]["destination"] != ""
        assert (await check(beta, instance))["consistent"]
        assert (await beta.instance(instance))["guest"]["pid"] in guest_pids(tmp_path)
        await beta.client.delete(f"/v1/instances/{instance}")
        assert guest_pids(tmp_path) == []


@pytest.mark.slow
async def test_the_source_goes_on_when_the_destination_daemon_is_killed_in_pre_copy(tmp_path: Path) -> None:
    """Its guest never stops, and then it moves to a third host. The killed host keeps nothing once it is back."""
    async with open_site(tmp_path, "alpha", "beta", "gamma") as site:
        alpha, beta, gamma = [await site.start(name) for name in ("alpha", "beta", "gamma")]
        instance = await create(alpha, program=stress(16, 40_000))
        await _filled(alpha, instance, 16 * 256)
        migration = await begin(alpha, beta, instance, downtime_ms=1, max_rounds=1000)
        await _rounds(alpha, migration, 2)

        await beta.kill()

        record = await wait_outcome(alpha, migration)
        assert record["outcome"] == "failed", record
        assert (await alpha.instance(instance))["state"] == "running"
        moved = await migrate(alpha, gamma, instance, verify="full")
        assert moved["outcome"] == "moved", moved
        assert (await check(gamma, instance))["consistent"]
        beta = await site.start("beta")
        assert await beta.client.get("/v1/instances") == []
        assert len(guest_pids(tmp_path)) == 1
        assert list((tmp_path / "run-beta").glob("*.sock")) == []
        owners = check_single_owner(_intervals(tmp_path))
        assert owners.single, owners.problems


async def test_a_killed_source_daemon_takes_its_running_guest_over_again(tmp_path: Path) -> None:
    """SIGKILL in pre-copy: the guest runs on without a daemon; the next one adopts it and migrates it."""
    async with open_site(tmp_path, "alpha", "beta") as site:
        alpha, beta = await site.start("alpha"), await site.start("beta")
        instance = await create(alpha, program=stress(16, 40_000))
        await _filled(alpha, instance, 16 * 256)
        pid = (await alpha.instance(instance))["guest"]["pid"]
        migration = await begin(alpha, beta, instance, downtime_ms=1, max_rounds=1000)
        await _rounds(alpha, migration, 1)

        await alpha.kill()

        assert (await wait_outcome(beta, migration))["outcome"] == "failed"
        alpha = await site.start("alpha")
        shown = await alpha.instance(instance)
        assert (shown["state"], shown["guest"]["pid"]) == ("running", pid)
        moved = await migrate(alpha, beta, instance, verify="full")
        assert moved["outcome"] == "moved", moved
        assert (await check(beta, instance))["consistent"]
        assert len(guest_pids(tmp_path)) == 1


def _intervals(root: Path) -> list[Any]:
    return [interval for path in (root / "witness").glob("*.witness") for interval in read_witness(path)]


async def _filled(host: HostProcess, instance: str, pages: int) -> None:
    with trio.fail_after(60):
        while (await host.instance(instance))["guest"]["program"]["filled_pages"] < pages:
            await trio.sleep(0.02)


async def _rounds(host: HostProcess, migration: str, rounds: int) -> None:
    with trio.fail_after(60):
        while len((await host.record(migration))["ram"]["rounds"]) < rounds:
            await trio.sleep(0.01)
