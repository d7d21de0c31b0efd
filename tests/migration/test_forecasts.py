"""Forecasts of the pause are learnt by measurement, and what was measured in a bad moment does not stay."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.cli.schema import contract, misfits
from tests.migration.fleet import (
    ObservedHypervisor,
    check,
    create,
    migrate,
    open_fleet,
    stress,
    wait_filled,
    wait_outcome,
)
from vmmigrate.hypervisor.base import Guest, GuestPlan, GuestStamp
from vmmigrate.ram.records import HEADER

BUSY_S = 0.4
RECORD = contract("migration-record", "record")


class BusyAtFirst(ObservedHypervisor):
    """A hypervisor whose guests are slow to answer for the first few rehearsals of an export."""

    async def build(self, plan: GuestPlan, stamp: GuestStamp, *, for_migration: bool) -> Guest:
        guest = await super().build(plan, stamp, for_migration=for_migration)
        really, left = guest.rehearse_export, [3]

        async def rehearse(left: list[int], versions: Any) -> int:
            if left[0]:
                left[0] -= 1
                await trio.sleep(BUSY_S)
            return await really(versions)

        guest.rehearse_export = partial(rehearse, left)
        return guest


async def test_a_forecast_that_was_made_in_a_bad_moment_is_made_again(tmp_path: Path) -> None:
    """What a pause costs whatever is left to send seemed to be more than is allowed: it is measured anew each round."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha", hypervisor_class=BusyAtFirst), await fleet.start("beta")
        instance = await create(alpha, program=stress(2, 500))
        await wait_filled(alpha, instance, 2 * 256)

        record = await migrate(alpha, beta, instance)

        assert record["outcome"] == "moved", record["error"]
        assert record["forecast"]["pause_s"] <= 0.3
        assert (await check(beta, instance))["consistent"]


@pytest.mark.parametrize("verify", [pytest.param("digest", marks=pytest.mark.slow), "full"])
async def test_how_far_a_forecast_was_off_is_recorded(tmp_path: Path, verify: str) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=stress(2, 500))

        record = await migrate(alpha, beta, instance, verify=verify)

        told = record["forecast"]
        parts = told["fixed_s"] + told["overhead_s"] + told["pages_s"]
        assert told["pause_s"] == pytest.approx(parts)
        assert told["pause_s"] + told["error_s"] == pytest.approx(record["downtime_s"])


async def test_the_records_of_both_hosts_are_as_their_contract_says(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=stress(2, 2000))
        await wait_filled(alpha, instance, 2 * 256)

        ours = await migrate(alpha, beta, instance, bandwidth_mib_s=32)
        theirs = await wait_outcome(beta, ours["migration_id"])

        assert [*misfits(RECORD, ours), *misfits(RECORD, theirs)] == []
        sent, landed = ours["ram"]["rounds"], theirs["ram"]["rounds"]
        assert [each["pages"] for each in sent] == [each["pages"] for each in landed]
        assert sum(each["bytes"] for each in landed) == theirs["ram"]["sent_bytes"]
        # That no record follows is said by each stream after the last round.
        assert 0 <= ours["ram"]["sent_bytes"] - theirs["ram"]["sent_bytes"] <= 2 * HEADER.size
