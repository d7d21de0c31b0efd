"""A migration that is only foretold: measured on both hosts and on the guest, and nothing moves.

What the link carries is made small by `bandwidth_mib_s` where a plan is to say something that is known beforehand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from tests.cli.schema import contract, misfits
from tests.migration.fleet import (
    DEADLINE_S,
    Host,
    begin,
    check,
    create,
    migrate,
    open_fleet,
    spec_v3,
    stress,
    wait_filled,
    wait_heartbeats,
    wait_outcome,
    witnesses,
)
from vmmigrate.errors import VmMigrateError

pytestmark = pytest.mark.slow

PLAN: Final = contract("plan", "document")["properties"]["plan"]
RECORD: Final = contract("migration-record", "record")
RESTLESS: Final = stress(4, 4000)
# A round of all that the guest writes takes more than 550 ms, in which it writes all of it again.
HOPELESS: Final = {"bandwidth_mib_s": 6, "downtime_ms": 500}
AMPLE: Final = {"downtime_ms": 5000}  # for a guest that is to be paused at the first occasion, on a busy machine, too
NIC: Final = {
    "net": {
        "type": "virtio_nic",
        "component": {
            "backend_id": "wire",
            "interface_id": "5e0f6c1e-0000-4000-8000-000000000001",
            "pci_path": {"bus": 0, "device": 8, "function": 0},
        },
    },
    "wire": {"type": "virtio_network_backend", "component": {"vnic_name": "vnic0"}},
}
NOT_ALLOWED: Final = {"wire": {"component": "VirtioNetworkBackend", "spec": {"vnic_name": "eth0"}}}
VSOCK: Final = {
    "vsock": {
        "type": "virtio_socket",
        "component": {"guest_cid": 42, "pci_path": {"bus": 0, "device": 9, "function": 0}},
    }
}


async def test_a_plan_tells_what_a_migration_would_be_like_and_moves_nothing(tmp_path: Path) -> None:
    """It is a migration that was called off before the pause; the guest never stopped."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=stress(4, 1000))
        await wait_filled(alpha, instance, 4 * 256)
        before = await alpha.instance(instance)

        ours, theirs = await _plan(alpha, beta, instance, **AMPLE)

        assert (ours["outcome"], theirs["outcome"]) == ("cancelled", "cancelled")
        assert ours["error"]["code"] == theirs["error"]["code"] == "cancelled"
        plan = ours["plan"]
        assert list(misfits(PLAN, plan)) == []
        assert list(misfits(RECORD, ours)) == []
        assert plan["converges"]
        assert plan["in_time"]
        assert plan["would_help"] == []
        assert plan["pause_s"] == pytest.approx(sum(plan["pause_parts_s"].values()))
        assert plan["limit_s"] == 5
        assert plan["ram_bytes"] >= 4 << 20
        assert plan["dirty_rate_bytes_per_s"] > 0
        assert 0 < plan["working_set_bytes"] <= (4 << 20) + 4096  # and the page of the heartbeat
        assert plan["rate_bytes_per_s"] > 0
        after = await alpha.instance(instance)
        assert after["state"] == "running"
        assert (after["epoch"], after["guest"]["pid"]) == (before["epoch"], before["guest"]["pid"])
        gaps = await alpha.guest(instance).heartbeat_gaps()
        assert (gaps["pause_gaps_ms"], gaps["move_gaps_ms"]) == ([], [])
        assert ours["downtime_s"] == 0
        assert await beta.client.get("/v1/instances") == []
        assert list((tmp_path / "run-beta").glob("*.sock")) == []
        await wait_heartbeats(alpha, instance)
        assert (await check(alpha, instance))["consistent"]
        assert witnesses(fleet, instance).hosts == ("alpha",)


async def test_a_plan_of_a_guest_that_will_not_converge_says_so_and_what_would_help(tmp_path: Path) -> None:
    """With the pause that each remedy costs; and nothing moves."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=RESTLESS)
        await wait_filled(alpha, instance, 4 * 256)

        ours, _ = await _plan(alpha, beta, instance, **HOPELESS)

        plan = ours["plan"]
        assert list(misfits(PLAN, plan)) == []
        assert (plan["converges"], plan["in_time"]) == (False, True)
        assert plan["pause_s"] > plan["limit_s"] == 0.5
        remedies = {next(iter(each["options"])): each for each in plan["would_help"]}
        assert list(remedies) == ["auto_converge", "downtime_ms", "force"]
        assert remedies["auto_converge"]["options"] == {"auto_converge": True}
        assert remedies["auto_converge"]["pause_s"] <= 0.5
        assert remedies["downtime_ms"]["options"]["downtime_ms"] >= remedies["downtime_ms"]["pause_s"] * 1000
        assert remedies["force"]["options"] == {"force": True}
        assert (await alpha.instance(instance))["state"] == "running"
        assert await beta.client.get("/v1/instances") == []


@pytest.mark.slow
async def test_what_a_plan_says_would_help_helps(tmp_path: Path) -> None:
    """A pause that is long, so that a busy machine changes little of it: the plan leaves a fifth of it for that."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=stress(8, 4000))
        await wait_filled(alpha, instance, 8 * 256)
        options = {"bandwidth_mib_s": 4, "downtime_ms": 1000}
        plan = (await _plan(alpha, beta, instance, **options))[0]["plan"]
        (longer,) = [each["options"] for each in plan["would_help"] if "downtime_ms" in each["options"]]

        moved = await migrate(alpha, beta, instance, **{**options, **longer})

        assert moved["outcome"] == "moved", moved
        assert (await check(beta, instance))["consistent"]


@pytest.mark.parametrize("timeout_s", [9.0, 1.0])
async def test_a_plan_says_when_the_time_would_not_be_enough_and_what_time_would_be(
    tmp_path: Path, timeout_s: float
) -> None:
    """Also when the plan itself takes longer than that: it is the migration that is to be over in time."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=stress(24, 0))
        await wait_filled(alpha, instance, 24 * 256)

        ours, _ = await _plan(alpha, beta, instance, bandwidth_mib_s=2, timeout_s=timeout_s, **AMPLE)

        assert ours["outcome"] == "cancelled", ours["error"]
        assert ours["plan"]["converges"]
        assert not ours["plan"]["in_time"]
        (remedy,) = ours["plan"]["would_help"]
        assert remedy["options"]["timeout_s"] > ours["plan"]["total_s"] > timeout_s


async def test_a_paused_guest_is_planned_and_stays_paused(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=stress(2, 500))
        await wait_filled(alpha, instance, 2 * 256)
        await alpha.client.post(f"/v1/instances/{instance}:pause")

        ours, _ = await _plan(alpha, beta, instance, **AMPLE)

        assert ours["plan"]["converges"], ours
        assert ours["plan"]["dirty_rate_bytes_per_s"] == 0
        assert (await alpha.instance(instance))["state"] == "paused"


async def test_a_plan_that_is_called_off_is_none(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=RESTLESS)
        await wait_filled(alpha, instance, 4 * 256)
        migration = await begin(alpha, beta, instance, plan=True, **HOPELESS)
        with trio.fail_after(DEADLINE_S):
            while not (await alpha.record(migration))["ram"]["sent_bytes"]:
                await trio.sleep(0.01)

        await alpha.client.post(f"/v1/migrations/{migration}:cancel", {"reason": "enough"})

        record = await wait_outcome(alpha, migration)
        assert (record["outcome"], record["error"]["message"]) == ("cancelled", "enough")
        assert record["plan"] is None
        assert (await alpha.instance(instance))["state"] == "running"


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("components", "arrival", "limits", "code"),
    [
        (VSOCK, {}, "", "not_migratable"),
        (NIC, {}, "", "spec_amend"),
        (NIC, {"replacements": json.dumps(NOT_ALLOWED)}, "", "host_refuses"),
        ({}, {}, "max_ram_bytes = 16777216", "bad_regions"),
    ],
    ids=["device", "backend", "host", "memory"],
)
async def test_what_a_migration_would_be_refused_for_a_plan_is_refused_for(
    tmp_path: Path, components: dict[str, Any], arrival: dict[str, Any], limits: str, code: str
) -> None:
    """With the same code, and without a plan; nothing was touched either way."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta", limits=limits)
        instance = await create(alpha, spec_v3(**components))

        codes = [await _refused_as(alpha, beta, instance, plan=plan, **arrival) for plan in (True, False)]

        assert codes == [code, code]
        assert (await alpha.instance(instance))["state"] == "running"
        assert await beta.client.get("/v1/instances") == []


# --------------------------------------------------------------------------- how good forecasts were


async def test_a_real_move_tells_how_far_off_its_plan_was_once(tmp_path: Path) -> None:
    """The plan was of this move: one that follows has none."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=stress(4, 1000))
        await wait_filled(alpha, instance, 4 * 256)
        plan = (await _plan(alpha, beta, instance, **AMPLE))[0]["plan"]

        moved = await migrate(alpha, beta, instance, **AMPLE)
        back = await migrate(beta, alpha, instance, **AMPLE)
        again = await migrate(alpha, beta, instance, **AMPLE)

        assert [record["outcome"] for record in (moved, back, again)] == ["moved"] * 3
        planned = moved["forecast"]["planned"]
        assert (planned["total_s"], planned["pause_s"], planned["ram_bytes"]) == (
            plan["total_s"],
            plan["pause_s"],
            plan["ram_bytes"],
        )
        assert planned["pause_error_s"] == pytest.approx(moved["downtime_s"] - plan["pause_s"])
        took_s = plan["total_s"] + planned["total_error_s"]  # as the plan: from the first page to the running guest
        rounds_s = sum(each["seconds"] for each in moved["ram"]["rounds"][:-1])
        assert rounds_s + moved["downtime_s"] <= took_s <= moved["total_s"]
        assert "planned" not in back["forecast"]
        assert "planned" not in again["forecast"]


async def test_a_plan_for_another_host_is_no_plan_of_this_move(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta", "gamma") as fleet:
        alpha, beta, gamma = [await fleet.start(name) for name in ("alpha", "beta", "gamma")]
        instance = await create(alpha, program=stress(2, 500))
        await _plan(alpha, gamma, instance, **AMPLE)

        moved = await migrate(alpha, beta, instance, **AMPLE)

        assert moved["outcome"] == "moved", moved
        assert "planned" not in moved["forecast"]


async def test_every_move_tells_how_far_off_the_forecast_of_its_pause_was(tmp_path: Path) -> None:
    """And what it was made of. One that did not move tells nothing: there was no pause to compare it with."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=RESTLESS)
        await wait_filled(alpha, instance, 4 * 256)

        stayed = await migrate(alpha, beta, instance, max_rounds=1, **HOPELESS)
        moves = [await migrate(alpha, beta, instance, **AMPLE), await migrate(beta, alpha, instance, **AMPLE)]

        assert (stayed["outcome"], stayed["forecast"]) == ("failed", {})
        for record in moves:
            assert record["outcome"] == "moved", record
            forecast = record["forecast"]
            assert forecast["pause_s"] == pytest.approx(
                forecast["fixed_s"] + forecast["overhead_s"] + forecast["pages_s"]
            )
            assert forecast["error_s"] == pytest.approx(record["downtime_s"] - forecast["pause_s"])


# --------------------------------------------------------------------------- steps of the tests


async def _plan(
    source: Host, destination: Host, instance: str, **request: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both records."""
    migration = await begin(source, destination, instance, plan=True, **request)
    return await wait_outcome(source, migration), await wait_outcome(destination, migration)


async def _refused_as(source: Host, destination: Host, instance: str, **request: Any) -> str:
    try:
        record = await migrate(source, destination, instance, **request)
    except VmMigrateError as refusal:
        return refusal.code
    assert (record["outcome"], record["plan"], record["ram"]["sent_bytes"]) == ("refused", None, 0), record
    return str(record["error"]["code"])
