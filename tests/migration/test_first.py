"""One migration, inside one test."""

from __future__ import annotations

from pathlib import Path

from tests.migration.fleet import check, create, migrate, open_fleet


async def test_a_running_guest_moves_and_is_as_it_was(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program={"name": "stress", "working_set_mib": 16, "rate_pages_per_s": 2000})

        record = await migrate(alpha, beta, instance, verify="full")

        assert record["outcome"] == "moved", record
        print(record)
        assert (await beta.instance(instance))["state"] == "running"
        verdict = await check(beta, instance)
        print(verdict)
        assert verdict["consistent"], verdict
