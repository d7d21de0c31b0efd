"""An operator resolves a migration in doubt: the winner runs at once, and whoever had the guest later gives way."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.migration.fleet import (
    Fleet,
    RunningHost,
    begin,
    check,
    create,
    files_of,
    migrate,
    open_fleet,
    stress,
    wait_heartbeats,
    wait_in_doubt,
    wait_outcome,
    witnesses,
)
from tests.migration.test_in_doubt import SlowToOpen, TellsWhenImported, Wire
from vmmigrate.api.client import open_client
from vmmigrate.errors import VmMigrateError

pytestmark = pytest.mark.slow

PROOF = "beta is powered off, ticket 4711"


@asynccontextmanager
async def in_doubt(root: Path, *, paused: bool = False) -> AsyncIterator[tuple[Fleet, str, str]]:
    """A fleet whose host alpha, which is down, does not know that host beta has the guest: (fleet, instance, M)."""
    SlowToOpen.may_open, SlowToOpen.is_opening = trio.Event(), trio.Event()
    async with open_fleet(root, "alpha", "beta", "gamma") as fleet:
        alpha = await fleet.start("alpha", limits="verdict_s = 0.3")
        beta = await fleet.start("beta", hypervisor_class=SlowToOpen)
        instance = await create(alpha, program=stress(2, 500))
        if paused:
            await wait_heartbeats(alpha, instance)
            await alpha.client.post(f"/v1/instances/{instance}:pause")
        migration = await begin(alpha, beta, instance)
        with trio.fail_after(30):
            await SlowToOpen.is_opening.wait()
        await wait_in_doubt(alpha, migration)
        await alpha.stop()
        SlowToOpen.may_open.set()
        with trio.fail_after(20):
            while not await beta.client.get("/v1/instances"):
                await trio.sleep(0.02)
        yield fleet, instance, migration


async def resolve(host: RunningHost, migration: str, winner: str = "source", **words: Any) -> dict[str, Any]:
    words = {"fencing_proof": PROOF, **words} if winner == "source" else words
    return dict(await host.client.post(f"/v1/migrations/{migration}:resolve", {"winner": winner, **words}))


async def refusal(host: RunningHost, migration: str, winner: str = "source", **words: Any) -> str:
    with pytest.raises(VmMigrateError) as caught:
        await resolve(host, migration, winner, **words)
    return caught.value.code


async def wait_state(host: RunningHost, instance: str, state: str) -> dict[str, Any]:
    with trio.fail_after(20):
        while (shown := await host.instance(instance))["state"] != state:
            await trio.sleep(0.02)
        return shown


async def wait_gone(host: RunningHost) -> None:
    """Wait until no guest process of *host* is left, and nothing of one."""
    with trio.fail_after(20):
        while os.listdir(host.config.directories.runtime):
            await trio.sleep(0.02)


async def wait_notified(host: RunningHost, migration: str, epoch: list[int]) -> None:
    with trio.fail_after(40):
        while (await host.client.get(f"/v1/migrations/{migration}/side"))["notified_epoch"] != epoch:
            await trio.sleep(0.02)


async def test_the_source_runs_its_guest_again_and_the_fenced_host_learns_of_it_when_it_is_back(tmp_path: Path) -> None:
    async with in_doubt(tmp_path) as (fleet, instance, migration):
        beta = fleet.hosts["beta"]
        pid = (await beta.instance(instance))["guest"]["pid"]
        await beta.stop()
        os.kill(pid, signal.SIGKILL)  # the fence
        alpha = await fleet.start("alpha")
        assert (await alpha.instance(instance))["state"] == "in_doubt"

        side = await resolve(alpha, migration)

        assert (side["outgoing"], side["notified_epoch"]) == ("resolved", None)
        shown = await alpha.instance(instance)
        assert (shown["state"], shown["epoch"]) == ("running", [2, 0])
        await wait_heartbeats(alpha, instance)
        record = await wait_outcome(alpha, migration)
        assert (record["outcome"], record["error"]["code"]) == ("failed", "resolved_to_source")
        assert record["notes"] == [f"resolved to the source by spiffe://test.example/operator/tester: {PROOF}"]
        beta = await fleet.start("beta", api_port=beta.facts["api_port"])
        await wait_notified(alpha, migration, [2, 0])
        assert (await check(alpha, instance))["consistent"]
        assert (await migrate(alpha, beta, instance))["outcome"] == "moved"
        assert (await beta.instance(instance))["epoch"] == [2, 1]
        owners = witnesses(fleet, instance)
        assert owners.hosts == ("alpha", "beta", "alpha", "beta")
        # What the fenced guest had lived through is lost: its beats are counted again, and nothing else is wrong.
        (again,) = owners.problems
        assert again.startswith("host beta epoch 1.2")
        assert "both counted" in again


async def test_a_superseded_guest_is_silenced_and_goes(tmp_path: Path) -> None:
    """The fenced host comes back with its guest, paused; it gives way before anybody could run it again."""
    async with in_doubt(tmp_path, paused=True) as (fleet, instance, migration):
        beta = fleet.hosts["beta"]
        await beta.stop()
        alpha = await fleet.start("alpha")
        await resolve(alpha, migration)
        assert (await alpha.instance(instance))["guest"]["run_state"] == "paused"
        await alpha.client.post(f"/v1/instances/{instance}:start")
        await wait_heartbeats(alpha, instance)

        beta = await fleet.start("beta", api_port=beta.facts["api_port"])

        shown = await wait_state(beta, instance, "elsewhere")
        assert shown["guest"] is None
        await wait_gone(beta)
        await wait_notified(alpha, migration, [2, 0])
        with pytest.raises(VmMigrateError) as caught:
            await beta.client.post(f"/v1/instances/{instance}:start")
        assert caught.value.code == "not_owner"
        owners = witnesses(fleet, instance)
        assert (owners.single, owners.hosts) == (True, ("alpha",)), owners.problems


async def test_the_word_goes_along_the_chain_to_the_host_that_has_the_guest_now(tmp_path: Path) -> None:
    """Beta has passed the guest on, to a host that alpha has never heard of."""
    async with in_doubt(tmp_path, paused=True) as (fleet, instance, migration):
        beta, gamma = fleet.hosts["beta"], await fleet.start("gamma")
        assert (await migrate(beta, gamma, instance))["outcome"] == "moved"
        await beta.stop()
        alpha = await fleet.start("alpha")

        await resolve(alpha, migration)

        assert (await gamma.instance(instance))["state"] == "paused"
        await fleet.start("beta", api_port=beta.facts["api_port"])
        await wait_state(gamma, instance, "elsewhere")
        await wait_notified(alpha, migration, [2, 0])
        await wait_gone(gamma)


async def test_a_resolved_guest_is_run_by_the_next_daemon_too(tmp_path: Path) -> None:
    async with in_doubt(tmp_path, paused=True) as (fleet, instance, migration):
        await fleet.hosts["beta"].stop()
        alpha = await fleet.start("alpha")
        await resolve(alpha, migration)
        await alpha.stop()

        alpha = await fleet.start("alpha")

        await alpha.client.post(f"/v1/instances/{instance}:start")
        await wait_heartbeats(alpha, instance)
        assert (await alpha.instance(instance))["epoch"] == [2, 0]
        await fleet.start("beta", api_port=fleet.hosts["beta"].facts["api_port"])
        await wait_notified(alpha, migration, [2, 0])


async def test_what_is_not_in_doubt_or_not_proved_is_not_resolved(tmp_path: Path) -> None:
    async with in_doubt(tmp_path, paused=True) as (fleet, instance, migration):
        beta, alpha = fleet.hosts["beta"], await fleet.start("alpha")
        assert (await wait_outcome(alpha, migration))["outcome"] == "moved"

        assert await refusal(alpha, migration) == "not_in_doubt"
        assert await refusal(beta, migration) == "unknown_migration"
        assert await refusal(beta, migration, "destination") == "no_released_epoch"
        assert (await resolve(beta, migration, "destination", released=[1, 1]))["verdict"] == "started"
        moved = await begin(beta, alpha, instance)
        assert (await wait_outcome(alpha, moved))["outcome"] == "moved"
        assert await refusal(alpha, migration, fencing_proof=" ") == "not_in_doubt"


async def test_an_empty_proof_changes_nothing(tmp_path: Path) -> None:
    async with in_doubt(tmp_path, paused=True) as (fleet, instance, migration):
        await fleet.hosts["beta"].stop()
        alpha = await fleet.start("alpha")

        assert await refusal(alpha, migration, fencing_proof=" \n") == "no_fencing_proof"

        shown = await alpha.instance(instance)
        assert (shown["state"], shown["epoch"]) == ("in_doubt", [1, 1])
        await fleet.start("beta", api_port=fleet.hosts["beta"].facts["api_port"])
        assert (await wait_outcome(alpha, migration))["outcome"] == "moved"


async def test_only_the_host_that_gave_the_guest_can_supersede_it(tmp_path: Path) -> None:
    async with in_doubt(tmp_path, paused=True) as (fleet, instance, migration):
        beta = fleet.hosts["beta"]
        body = {"instance_id": instance, "epoch": [9, 0], "since": [0, 0]}
        for name, path in (
            ("gamma", migration),
            ("gamma", "7f9c24e5-1b2c-4d3e-8f90-a1b2c3d4e5f6"),
        ):
            async with open_client(beta.url, files_of(tmp_path, name)) as client:
                with pytest.raises(VmMigrateError) as caught:
                    await client.post(f"/v1/migrations/{path}/side:supersede", body)
            assert caught.value.code == "forbidden"
        with pytest.raises(VmMigrateError) as caught:
            await beta.client.post(f"/v1/migrations/{migration}/side:supersede", body)
        assert caught.value.code == "forbidden"

        assert (await beta.instance(instance))["state"] == "paused"
        await beta.client.post(f"/v1/instances/{instance}:start")
        await wait_heartbeats(beta, instance)


async def test_the_destination_takes_over_by_an_operators_word_when_the_handoff_is_lost(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha", limits="verdict_s = 8")
        beta = await fleet.start("beta", hypervisor_class=TellsWhenImported, limits="handoff_window_s = 20")
        instance = await create(alpha, program=stress(2, 500))
        wire = Wire(alpha.facts["migration"], "destination")
        port = await fleet.nursery.start(wire.run)
        TellsWhenImported.on_import = staticmethod(lambda: setattr(wire, "swallows", True))
        migration = await begin(alpha, beta, instance, source_address=f"127.0.0.1:{port}")
        with trio.fail_after(20):
            while (await alpha.client.get(f"/v1/migrations/{migration}/side"))["outgoing"] != "released":
                await trio.sleep(0.01)
        TellsWhenImported.on_import = staticmethod(lambda: None)
        assert await refusal(beta, migration, "destination", released=[1, 2]) == "stale_epoch"

        side = await resolve(beta, migration, "destination", released=[1, 1])

        assert side["verdict"] == "started"
        await wait_heartbeats(beta, instance)
        assert (await wait_outcome(alpha, migration))["outcome"] == "moved"
        assert (await check(beta, instance))["consistent"]
        owners = witnesses(fleet, instance)
        assert (owners.single, owners.hosts) == (True, ("alpha", "beta")), owners.problems


async def test_a_source_that_can_be_asked_is_asked_before_the_destination_wins(tmp_path: Path) -> None:
    """The operator says that the guest was given away; the source runs it, says so, and is believed."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha")
        beta = await fleet.start("beta", hypervisor_class=TellsWhenImported)
        instance = await create(alpha, program=stress(2, 500))
        wire = Wire(alpha.facts["migration"], "both")
        wire.swallows_ready = True
        port = await fleet.nursery.start(wire.run)
        TellsWhenImported.on_import = staticmethod(lambda: setattr(wire, "swallows", True))
        migration = await begin(alpha, beta, instance, source_address=f"127.0.0.1:{port}")
        with trio.fail_after(20):
            while (await beta.client.get(f"/v1/migrations/{migration}/side"))["incoming"] != "prepared":
                await trio.sleep(0.01)
        TellsWhenImported.on_import = staticmethod(lambda: None)

        assert await refusal(beta, migration, "destination", released=[1, 1]) == "not_in_doubt"

        assert (await beta.client.get(f"/v1/migrations/{migration}/side"))["incoming"] == "prepared"
        await alpha.client.post(f"/v1/migrations/{migration}:cancel", {})
        await wait_heartbeats(alpha, instance)
        owners = witnesses(fleet, instance)
        assert (owners.single, owners.hosts) == (True, ("alpha",)), owners.problems
