"""Calling off a migration whose destination has said Ready: `refused` is durable first (ownership rule 11)."""

from __future__ import annotations

from pathlib import Path

import trio

from tests.migration.fleet import begin, check, create, migrate, open_fleet, stress, wait_heartbeats, wait_outcome
from tests.migration.test_in_doubt import TellsWhenImported, Wire


async def test_a_destination_that_is_ready_refuses_durably_when_it_is_called_off(tmp_path: Path) -> None:
    """Its Handoff is stuck on the way. The operator at the destination calls it off: the source hears `Refused`, which
    is evidence, takes the guest back under a new epoch, and both records say `cancelled`."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha")
        beta = await fleet.start("beta", hypervisor_class=TellsWhenImported)
        instance = await create(alpha, program=stress(2, 500))
        wire = Wire(alpha.facts["migration"], "destination")
        port = await fleet.nursery.start(wire.run)
        TellsWhenImported.on_import = staticmethod(lambda: setattr(wire, "swallows", True))
        migration = await begin(alpha, beta, instance, source_address=f"127.0.0.1:{port}")
        with trio.fail_after(30):
            while (await alpha.record(migration))["state"] != "in_doubt":
                await trio.sleep(0.02)

        await beta.client.post(f"/v1/migrations/{migration}:cancel")

        ours, theirs = await wait_outcome(alpha, migration), await wait_outcome(beta, migration)
        assert (theirs["outcome"], theirs["error"]["code"]) == ("cancelled", "cancelled")
        assert ours["error"]["code"] == "cancelled"
        assert (await alpha.instance(instance))["epoch"] == [1, 3]
        await wait_heartbeats(alpha, instance)
        assert (await beta.client.get(f"/v1/migrations/{migration}/side"))["verdict"] == "refused"
        TellsWhenImported.on_import = staticmethod(lambda: None)
        assert (await migrate(alpha, beta, instance))["outcome"] == "moved"
        assert (await check(beta, instance))["consistent"]
