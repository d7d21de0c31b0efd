"""Guests whose QEMU tells what they write: it is held until the rest is worth a pause, and let go of afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs

from tests.hypervisor.qemu_hosts import requires_qemu
from tests.migration.fleet import RunningHost, begin, check, migrate, open_fleet, spec_v3, wait_heartbeats, wait_outcome
from tests.migration.qemu_fleet import create_ready, start_both
from tests.migration.test_qemu_failures import SLOWLY, goes_on
from tests.migration.test_resume import Link
from vmmigrate.hypervisor.qemu.guest import QemuGuest
from vmmigrate.hypervisor.qemu.pagestream import PageStream

pytestmark = [*requires_qemu, pytest.mark.slow]


async def test_an_idle_guest_is_not_stopped_before_its_ram_is_there(tmp_path: Path) -> None:
    """QEMU would stop it after the first pass; by then nearly all of it has landed."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start_both(fleet, "stream")
        instance = await create_ready(alpha, spec_v3(), rate=0)

        record = await migrate(alpha, beta, instance, bandwidth_mib_s=64, compression="off")

        assert record["outcome"] == "moved", record["error"]
        ram, pause = record["ram"]["rounds"], record["ram"]["rounds"][-1]
        assert ram[0]["seconds"] > 0.5
        assert pause["pages"] < 512
        assert record["downtime_s"] < ram[0]["seconds"] / 2
        assert sum(record["downtime_parts_s"].values()) == pytest.approx(record["downtime_s"], abs=0.001)
        await goes_on(beta, instance)


async def test_a_guest_that_writes_faster_than_the_link_is_not_paused_beyond_the_limit(tmp_path: Path) -> None:
    """QEMU goes on naming what it writes; in the end the migration is given up, and QEMU is quiet again."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start_both(fleet, "stream")
        instance = await create_ready(alpha, spec_v3(), ws_mib=16, rate=60)

        record = await migrate(  # a quarter of what it writes
            alpha, beta, instance, bandwidth_mib_s=8, compression="off", downtime_ms=300, max_rounds=2, timeout_s=60
        )

        assert (record["outcome"], record["error"]["code"]) == ("failed", "will_not_converge"), record
        assert record["downtime_s"] == 0
        assert len(record["ram"]["rounds"]) >= 2
        await is_quiet(alpha.guest(instance))
        await goes_on(alpha, instance)


async def test_a_pause_that_would_be_too_long_whatever_is_left_is_given_up_before_qemu_can_stop_the_guest(
    tmp_path: Path,
) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start_both(fleet, "stream")
        instance = await create_ready(alpha, spec_v3(), rate=0)

        record = await migrate(alpha, beta, instance, downtime_ms=1)

        assert (record["outcome"], record["error"]["code"]) == ("failed", "will_not_converge"), record
        assert alpha.guest(instance).stopped_s is None
        await is_quiet(alpha.guest(instance))
        await moves_all_the_same(alpha, beta, instance)


async def moves_all_the_same(alpha: RunningHost, beta: RunningHost, instance: str) -> None:
    record = await migrate(alpha, beta, instance)
    assert record["outcome"] == "moved", record["error"]
    await goes_on(beta, instance)


async def test_a_guest_that_is_forced_arrives_whole(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start_both(fleet, "stream")
        instance = await create_ready(alpha, spec_v3(), ws_mib=16, rate=40)
        record = await migrate(alpha, beta, instance, timeout_s=0.5, on_timeout="force", **SLOWLY)

        assert record["outcome"] == "moved", record["error"]
        await goes_on(beta, instance)


async def test_a_link_cut_while_qemu_names_pages_is_waited_out_and_the_guest_runs_meanwhile(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start_both(fleet, "stream")
        link = Link(alpha)
        await fleet.nursery.start(link.run)
        instance = await create_ready(alpha, spec_v3(), ws_mib=16, rate=2)
        migration = await begin(alpha, beta, instance, source_address=link.address, **SLOWLY)
        await link.wait_bytes(4 << 20)

        with capture_logs() as events:
            link.cut()
            await wait_cut(events)
            await wait_heartbeats(alpha, instance, 1000)
            link.mend()

            record = await wait_outcome(alpha, migration)

        assert record["outcome"] == "moved", record["error"]
        assert record["negotiated"]["sessions"] == 2
        await goes_on(beta, instance)


async def test_a_guest_that_qemu_stops_while_the_link_is_cut_does_not_stand_until_it_comes_back(tmp_path: Path) -> None:
    """The window is a minute; it goes on at once, and can be moved again. What QEMU had not named is taken in here, so
    that it is sure to stop the guest."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start_both(fleet, "stream")
        link = Link(alpha)
        await fleet.nursery.start(link.run)
        instance = await create_ready(alpha, spec_v3(), rate=0)
        migration = await begin(alpha, beta, instance, source_address=link.address, **SLOWLY)
        await link.wait_bytes(4 << 20)
        guest = alpha.guest(instance)

        with capture_logs() as events, trio.fail_after(20):
            link.cut()
            await wait_cut(events)
            while guest.stopped_s is None:
                await guest.mark_dirty(await guest.take_dirty())
                await guest.name_ahead()

        record = await wait_outcome(alpha, migration)
        assert (record["outcome"], record["error"]["code"]) == ("failed", "link_lost"), record
        assert "it runs on here" in record["error"]["message"]
        await is_quiet(guest)
        await goes_on(alpha, instance)
        link.mend()
        assert (await wait_outcome(beta, migration))["outcome"] == "failed"
        await moves_all_the_same(alpha, beta, instance)


async def wait_cut(events: list[Any]) -> None:
    """Until both ends have noticed that their link is gone, and have let go of what they were doing with it."""
    with trio.fail_after(20):
        while [event["event"] for event in events].count("migration.link_lost") < 2:
            await trio.sleep(0.01)


@pytest.mark.parametrize("step", ["more", "finish", "_take_the_rest"])
async def test_a_qemu_that_breaks_its_migration_off_at_any_step_goes_on_at_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Somebody else at the monitor calls it off, say."""
    real, broken = getattr(PageStream, step), []

    async def spoilt(self: PageStream, *args: Any) -> Any:
        if not broken and self.unnamed < 8000:
            broken.append(step)
            await self._ask("migrate_cancel")
            while (await self._ask("query-migrate"))["status"] not in {"cancelled", "failed"}:
                await trio.sleep(0.001)
        return await real(self, *args)

    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start_both(fleet, "stream")
        instance = await create_ready(alpha, spec_v3())
        monkeypatch.setattr(PageStream, step, spoilt)

        record = await migrate(alpha, beta, instance)

        assert broken
        assert record["outcome"] == "failed", record
        assert record["error"]["code"] in {"dirty_tracking", "qemu_refused"}
        await is_quiet(alpha.guest(instance))
        await goes_on(alpha, instance)
        await moves_all_the_same(alpha, beta, instance)


async def test_a_plan_for_a_guest_whose_qemu_names_pages_foretells_the_move_and_pauses_nothing(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start_both(fleet, "stream")
        instance = await create_ready(alpha, spec_v3(), ws_mib=16, rate=2)
        options = {"bandwidth_mib_s": 64, "compression": "off"}
        migration = await begin(alpha, beta, instance, plan=True, **options)
        ours = await wait_outcome(alpha, migration)

        plan = ours["plan"]
        assert ours["negotiated"]["page_source"] == "stream"
        assert plan["converges"], plan
        assert 32 << 20 < plan["rate_bytes_per_s"] < 80 << 20
        assert 2 << 20 < plan["working_set_bytes"] < 24 << 20
        guest = alpha.guest(instance)
        assert guest.stopped_s is None
        await is_quiet(guest)
        record = await migrate(alpha, beta, instance, **options)
        assert record["outcome"] == "moved", record["error"]
        assert record["total_s"] < 3 * plan["total_s"]
        await wait_heartbeats(beta, instance)
        assert (await check(beta, instance))["consistent"]


async def is_quiet(guest: Any) -> None:
    """QEMU migrates nothing, and its next migration would be that of a pause."""
    assert isinstance(guest, QemuGuest)
    assert guest.pages is not None
    assert not guest.pages.is_naming
    assert (await guest.ask("query-migrate"))["status"] in {"cancelled", "failed"}
    switched = {item["capability"]: item["state"] for item in await guest.ask("query-migrate-capabilities")}
    assert (switched["x-ignore-shared"], switched["pause-before-switchover"]) == (True, False)
