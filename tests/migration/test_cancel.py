"""Calling a migration off: from either side, in every state, with one answer that both sides keep to."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.migration.fleet import (
    Fleet,
    RunningHost,
    begin,
    check,
    create,
    migrate,
    open_fleet,
    stress,
    wait_heartbeats,
    wait_outcome,
    witnesses,
)
from tests.migration.holding import PATIENCE_S, HeldFsync, HoldingHypervisor
from vmmigrate.errors import VmMigrateError
from vmmigrate.net.threads import open_group

# Where a migration can be held up: on which host, at which call of its hypervisor, and the phase that shows it.
UNTIL_READY = {
    "validate": ("beta", "build"),
    "ram_pre_pause": ("alpha", "pause_for_handoff"),  # `pausing` is durable; the peer has not been told
    "ram_post_pause": ("alpha", "export_devices"),  # beside the last round
    "import": ("beta", "import_devices"),
}


@pytest.mark.slow
@pytest.mark.parametrize("canceller", ["alpha", "beta"])
@pytest.mark.parametrize("phase", UNTIL_READY)
async def test_until_ready_either_side_can_call_it_off(tmp_path: Path, phase: str, canceller: str) -> None:
    """Both records say cancelled, the guest runs at the source, the destination keeps nothing, the next try works."""
    host, step = UNTIL_READY[phase]
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        await fleet.start("alpha", hypervisor_class=HoldingHypervisor)
        await fleet.start("beta", hypervisor_class=HoldingHypervisor)
        alpha, beta = fleet.hosts["alpha"], fleet.hosts["beta"]
        instance = await create(alpha, program=stress(2, 500))
        hypervisor = fleet.hosts[host].hypervisor
        assert isinstance(hypervisor, HoldingHypervisor)
        hold = hypervisor.hold(step)
        migration = await begin(alpha, beta, instance)
        await hold.wait_reached()
        assert (await alpha.record(migration))["state"] == phase

        await fleet.hosts[canceller].client.post(f"/v1/migrations/{migration}:cancel", {"reason": "enough"})
        if step == "pause_for_handoff":
            hold.go.set()  # a pause is waited for: undone it is afterwards

        source, destination = await wait_outcome(alpha, migration), await wait_outcome(beta, migration)
        assert (source["outcome"], destination["outcome"]) == ("cancelled", "cancelled")
        assert source["error"]["code"] == destination["error"]["code"] == "cancelled"
        assert (await alpha.instance(instance))["state"] == "running"
        await wait_heartbeats(alpha, instance)
        assert await beta.client.get("/v1/instances") == []
        hold.go.set()
        assert (await migrate(alpha, beta, instance))["outcome"] == "moved"
        assert await _refusal(alpha, migration) == await _refusal(beta, migration) == "migration_over"
        assert witnesses(fleet, instance).single


async def test_a_migration_whose_destination_never_came_is_called_off_at_the_source(tmp_path: Path) -> None:
    """The other host has never heard of it; the ticket is worth nothing any more."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha)
        ticket = await alpha.client.post(f"/v1/instances/{instance}:migrate-out", {"destination_host": "beta"})
        migration = ticket["migration_id"]
        assert await _refusal(beta, migration) == "unknown_migration"

        await alpha.client.post(f"/v1/migrations/{migration}:cancel")

        assert (await alpha.record(migration))["outcome"] == "cancelled"
        del ticket["expires_at_s"]
        await beta.client.post("/v1/migrations:migrate-in", ticket)
        assert (await wait_outcome(beta, migration))["error"]["code"] == "ticket_used"
        assert (await alpha.instance(instance))["state"] == "running"


async def test_a_source_that_is_giving_the_guest_away_does_not_promise_to_keep_it(tmp_path: Path) -> None:
    """`released` is on its way to the disk: nobody can call it back, so the cancel is refused, and the guest moves."""
    fsync = HeldFsync()
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha", fsync=fsync)
        beta = await fleet.start("beta", hypervisor_class=HoldingHypervisor)
        instance, migration = await _up_to_import(fleet)
        fsync.hold()  # the source's next record is `released`
        _let_import(beta)
        await fsync.wait_reached()

        refusal = await _refusal(alpha, migration)
        fsync.go()

        assert refusal == "in_doubt"
        assert (await wait_outcome(alpha, migration))["outcome"] == "moved"
        assert (await wait_outcome(beta, migration))["outcome"] == "moved"
        await _assert_runs_once_at(fleet, beta, instance, ("alpha", "beta"))


async def test_a_cancel_at_the_destination_that_comes_after_the_handoff_is_refused(tmp_path: Path) -> None:
    """`acquired` is on its way to the disk; the cancel waits for the journal, and finds the verdict given."""
    fsync = HeldFsync()
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha")
        beta = await fleet.start("beta", hypervisor_class=HoldingHypervisor, fsync=fsync)
        instance, migration = await _up_to_import(fleet)
        fsync.hold(let_pass=1)  # `prepared`; the next one is `acquired`
        _let_import(beta)
        await fsync.wait_reached()

        answers: list[str] = []
        async with open_group() as group:
            group.start_soon(_cancel, beta, migration, answers)
            await _wait_phase(beta, migration, "in_doubt")
            fsync.go()

        assert answers == ["verdict_given"]
        assert (await wait_outcome(alpha, migration))["outcome"] == "moved"
        assert (await wait_outcome(beta, migration))["outcome"] == "moved"
        await _assert_runs_once_at(fleet, beta, instance, ("alpha", "beta"))


async def test_a_cancel_at_the_destination_that_comes_before_the_handoff_wins(tmp_path: Path) -> None:
    """`refused` is on its way to the disk when the handoff arrives. It loses: both say cancelled, the source has it."""
    released, refused = HeldFsync(), HeldFsync()
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha", fsync=released)
        beta = await fleet.start("beta", hypervisor_class=HoldingHypervisor, fsync=refused)
        instance, migration = await _up_to_import(fleet)
        released.hold()
        _let_import(beta)
        await released.wait_reached()
        refused.hold()

        answers: list[str] = []
        async with open_group() as group:
            group.start_soon(_cancel, beta, migration, answers)
            await refused.wait_reached()
            released.go()
            await _wait_phase(beta, migration, "in_doubt")  # the handoff has come
            refused.go()

        source, destination = await wait_outcome(alpha, migration), await wait_outcome(beta, migration)
        assert answers == ["cancelled"]
        assert (source["outcome"], destination["outcome"]) == ("cancelled", "cancelled")
        assert source["error"]["code"] == destination["error"]["code"] == "cancelled"
        assert (await alpha.instance(instance))["epoch"] == [1, 3]
        await _assert_runs_once_at(fleet, alpha, instance, ("alpha",))


async def _up_to_import(fleet: Fleet) -> tuple[str, str]:
    """An instance and its migration, held up at beta just before its devices are imported."""
    alpha, beta = fleet.hosts["alpha"], fleet.hosts["beta"]
    instance = await create(alpha, program=stress(2, 500))
    assert isinstance(beta.hypervisor, HoldingHypervisor)
    hold = beta.hypervisor.hold("import_devices")
    migration = await begin(alpha, beta, instance)
    await hold.wait_reached()
    return instance, migration


def _let_import(host: RunningHost) -> None:
    assert isinstance(host.hypervisor, HoldingHypervisor)
    host.hypervisor.__dict__["holds"].pop("import_devices").go.set()


async def _cancel(host: RunningHost, migration: str, answers: list[str]) -> None:
    """Call it off; `cancelled`, or the code of the refusal."""
    try:
        await host.client.post(f"/v1/migrations/{migration}:cancel")
        answers.append("cancelled")
    except VmMigrateError as refusal:
        answers.append(refusal.code)


async def _wait_phase(host: RunningHost, migration: str, phase: str) -> None:
    with trio.fail_after(PATIENCE_S):
        while (await host.record(migration))["state"] != phase:
            await trio.sleep(0.01)


async def _refusal(host: RunningHost, migration: str) -> str:
    with pytest.raises(VmMigrateError) as refusal:
        await host.client.post(f"/v1/migrations/{migration}:cancel")
    return refusal.value.code


async def _assert_runs_once_at(fleet: Fleet, host: RunningHost, instance: str, hosts: tuple[str, ...]) -> None:
    await wait_heartbeats(host, instance)
    assert (await check(host, instance))["consistent"]
    owners = witnesses(fleet, instance)
    assert (owners.single, owners.hosts) == (True, hosts), owners.problems
