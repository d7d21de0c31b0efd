"""RAM that stayed behind is hashed once more, when the guest already runs elsewhere: an alarm, or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import trio

from tests.hypervisor.faults import ForgetfulTracker
from tests.migration.fleet import (
    DEADLINE_S,
    Host,
    begin,
    check,
    create,
    migrate,
    open_fleet,
    stress,
    wait_filled,
    wait_heartbeats,
    wait_outcome,
)
from tests.migration.holding import HoldingHypervisor
from vmmigrate.hypervisor.conformance import wait_heartbeats as wait_beats


async def test_ram_that_was_sent_as_it_was_last_raises_no_alarm(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=stress(8, 2000))
        await wait_filled(alpha, instance, 8 * 256)

        moved = await migrate(alpha, beta, instance)
        record = await _hashed(alpha, moved["migration_id"])

        assert record["outcome"] == "moved"
        assert record["integrity"]["rehash"] == "equal"
        assert record["integrity"]["pages_checked"] >= 8 * 256
        assert record["integrity"]["different_pages"] == 0
        assert not [note for note in record["notes"] if "ALARM" in note]


async def test_pages_that_dirty_tracking_missed_raise_an_alarm_after_the_move(tmp_path: Path) -> None:
    """They were sent and landed alike, so that no comparison of both ends finds them; the guest's own check does.

    Marks are lost from the moment when the pause begins: what the guest writes until then comes when all is sent.
    """
    forgotten: list[int] = []
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start(
            "alpha",
            hypervisor_class=HoldingHypervisor,
            wrap_tracker=lambda tracker: ForgetfulTracker(tracker, forgotten),
        )
        beta = await fleet.start("beta")
        instance = await create(alpha, program=stress(2, 500))
        await wait_filled(alpha, instance, 2 * 256)
        assert isinstance(alpha.hypervisor, HoldingHypervisor)
        hold = alpha.hypervisor.hold("pause_for_handoff")
        migration = await begin(alpha, beta, instance)
        await hold.wait_reached()
        forgotten.extend(range(1, 600))
        guest = alpha.guest(instance)
        await wait_beats(guest, (await guest.status()).heartbeats + 200)
        hold.go.set()

        await wait_outcome(alpha, migration)
        record = await _hashed(alpha, migration)

        assert record["outcome"] == "moved", record
        assert record["integrity"]["rehash"] == "different"
        assert 0 < record["integrity"]["different_pages"] < 600
        assert record["integrity"]["first_gpa"] is not None
        (alarm,) = [note for note in record["notes"] if note.startswith("ALARM")]
        assert f"{record['integrity']['different_pages']} pages" in alarm
        assert f"{record['integrity']['first_gpa']:#x}" in alarm
        assert not (await check(beta, instance))["consistent"]


async def test_a_daemon_that_stops_before_all_is_hashed_says_so_when_it_is_back(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=stress(2, 500))
        migration = (await migrate(alpha, beta, instance))["migration_id"]
        await _hashed(alpha, migration)
        await alpha.stop()
        (saved,) = (tmp_path / "alpha/state").rglob(f"{migration}.source.json")
        report = json.loads(saved.read_text())
        saved.write_text(json.dumps({**report, "integrity": {"rehash": "pending"}}))

        alpha = await fleet.start("alpha")

        record = await alpha.record(migration)
        assert (record["outcome"], record["integrity"]["rehash"]) == ("moved", "not_done")
        assert "stopped" in record["integrity"]["reason"]
        await wait_heartbeats(beta, instance)


async def _hashed(host: Host, migration_id: str) -> dict[str, Any]:
    with trio.fail_after(DEADLINE_S):
        while (record := await host.record(migration_id))["integrity"].get("rehash") == "pending":
            await trio.sleep(0.02)
    return record
