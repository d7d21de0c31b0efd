"""A migration that does not converge by itself, and what may be changed while it runs.

What a link carries is made small by `bandwidth_mib_s`, which the kernel keeps, so that how long a round takes is known
on any machine: a guest that writes everything meanwhile never gets there, and one that writes nothing needs that long.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from tests.migration.fleet import (
    DEADLINE_S,
    Fleet,
    Host,
    ObservedHypervisor,
    RunningHost,
    begin,
    check,
    create,
    migrate,
    open_fleet,
    stress,
    wait_filled,
    wait_heartbeats,
    wait_outcome,
    witnesses,
)
from tests.migration.holding import HoldingHypervisor
from tools.faults.site import HostProcess, open_site
from vmmigrate.errors import HypervisorError, VmMigrateError
from vmmigrate.hypervisor.base import Guest, GuestPlan, GuestStamp
from vmmigrate.hypervisor.embedded import finding
from vmmigrate.memory import MIB, PAGE_SIZE

pytestmark = pytest.mark.slow

RESTLESS: Final = stress(3, 3000)
# All of the working set takes more than 400 ms, in which all of it is written again: no such pause is ever in sight.
HOPELESS: Final = {"bandwidth_mib_s": 6, "downtime_ms": 350, "max_rounds": 1000}
AMPLE: Final = {"downtime_ms": 5000}  # for a guest that is to be paused at the first occasion, on a busy machine, too


@dataclass(frozen=True)
class Site:
    """Two hosts, and a guest at alpha."""

    fleet: Fleet
    alpha: RunningHost
    beta: RunningHost
    instance: str

    async def throttle_percent(self, host: RunningHost) -> int:
        """As the guest itself says."""
        return (await host.guest(self.instance).status()).throttle_percent


@contextlib.asynccontextmanager
async def open_with_guest(root: Path, program: Mapping[str, Any] = RESTLESS, **options: Any) -> AsyncIterator[Site]:
    """*options* are those of host alpha (`Fleet.start`)."""
    async with open_fleet(root, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha", **options), await fleet.start("beta")
        instance = await create(alpha, program=program)
        await wait_filled(alpha, instance, program["working_set_mib"] * 256)
        yield Site(fleet, alpha, beta, instance)


# --------------------------------------------------------------------------- the time for the whole


async def test_a_guest_that_never_converges_runs_on_at_the_source_when_its_time_is_over(tmp_path: Path) -> None:
    async with open_with_guest(tmp_path) as site:
        migration = await begin(site.alpha, site.beta, site.instance, timeout_s=1.0, **HOPELESS)

        ours, theirs = await wait_outcome(site.alpha, migration), await wait_outcome(site.beta, migration)

        assert (ours["outcome"], theirs["outcome"]) == ("timed_out", "timed_out")
        assert ours["error"]["code"] == theirs["error"]["code"] == "timed_out_total"
        assert (await site.alpha.instance(site.instance))["state"] == "running"
        await wait_heartbeats(site.alpha, site.instance)
        assert await site.beta.client.get("/v1/instances") == []
        assert (await check(site.alpha, site.instance))["consistent"]
        assert witnesses(site.fleet, site.instance).hosts == ("alpha",)


async def test_a_guest_that_never_converges_moves_when_its_time_is_over_if_that_was_wanted(tmp_path: Path) -> None:
    """The time ends in the first round, which is broken off: what it did not send travels in the pause. (What waits in
    the sockets, some MiB, is sent all the same.)"""
    async with open_with_guest(tmp_path, stress(24, 6000)) as site:
        options = {**HOPELESS, "bandwidth_mib_s": 12, "timeout_s": 0.5, "on_timeout": "force", "verify": "full"}

        record = await migrate(site.alpha, site.beta, site.instance, **options)

        assert record["outcome"] == "moved", record
        assert sum(each["pages"] for each in record["ram"]["rounds"][:-1]) < 24 * 256
        assert record["downtime_s"] > HOPELESS["downtime_ms"] / 1000
        assert record["digest"]["source"] == record["digest"]["destination"]
        assert (await check(site.beta, site.instance))["consistent"]


# --------------------------------------------------------------------------- limits that change


async def test_a_migration_that_its_bandwidth_holds_back_ends_once_that_is_lifted(tmp_path: Path) -> None:
    """In the first round, by the sockets that are sending it: at its old speed it would outlast any deadline here."""
    async with open_with_guest(tmp_path, stress(32, 0)) as site:
        assert DEADLINE_S < 32 / 1
        migration = await begin(site.alpha, site.beta, site.instance, bandwidth_mib_s=1, **AMPLE)
        await _wait_sent(site.alpha, migration)

        adjusted = await _adjust(site.alpha, migration, bandwidth_mib_s=0)

        assert (adjusted["outcome"], adjusted["ram"]["rounds"]) == (None, [])
        assert adjusted["options"]["bandwidth_mib_s"] == 0
        record = await wait_outcome(site.alpha, migration)
        assert record["outcome"] == "moved", record
        assert record["options"]["bandwidth_mib_s"] == 0
        assert (await check(site.beta, site.instance))["consistent"]


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        (AMPLE, "moved"),
        ({"max_rounds": 1}, "failed"),
        ({"max_rounds": 1, "force": True}, "moved"),
        ({"timeout_s": 0.1}, "timed_out"),
        ({"timeout_s": 0.1, "on_timeout": "force"}, "moved"),
        pytest.param({"auto_converge": True}, "moved", marks=pytest.mark.slow),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else value,
)
async def test_a_limit_that_is_changed_while_it_runs_counts_from_then_on(
    tmp_path: Path, changes: dict[str, Any], outcome: str
) -> None:
    """Rounds and time that were spent already count. The record names what is in force, and the rest is as it was."""
    async with open_with_guest(tmp_path) as site:
        migration = await begin(site.alpha, site.beta, site.instance, **HOPELESS)
        await _wait_rounds(site.alpha, migration, 1)
        before = (await site.alpha.record(migration))["options"]

        adjusted = await _adjust(site.alpha, migration, **changes)

        assert adjusted["options"] == {**before, **changes}
        record = await wait_outcome(site.alpha, migration)
        assert record["outcome"] == outcome, record
        assert record["options"] == {**before, **changes}
        if outcome == "moved":
            assert (await check(site.beta, site.instance))["consistent"]
        else:
            assert (await site.alpha.instance(site.instance))["state"] == "running"


async def test_what_cannot_be_adjusted_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    """Also what is lawful beside it; and the migration goes on."""
    async with open_with_guest(tmp_path) as site:
        migration = await begin(site.alpha, site.beta, site.instance, **HOPELESS)
        before = (await site.alpha.record(migration))["options"]

        for body in (
            {},
            {"downtime_ms": None},
            {"downtime_ms": 500, "bogus": 1},
            {"downtime_ms": 500, "streams": 4},  # chosen for good when it began
            {"downtime_ms": 500, "delta_cache_mib": 0},
            {"downtime_ms": 0},
            {"downtime_ms": "500"},
            {"downtime_ms": 500, "timeout_s": 0},
            {"on_timeout": "pray"},
            {"max_rounds": 0},
            {"force": 1},
            {"bandwidth_mib_s": -1, "downtime_ms": 500},
        ):
            assert await _refusal(site.alpha, migration, body) == "bad_request", body

        record = await site.alpha.record(migration)
        assert (record["outcome"], record["options"]) == (None, before)
        await site.alpha.client.post(f"/v1/migrations/{migration}:cancel")
        assert (await wait_outcome(site.alpha, migration))["outcome"] == "cancelled"


async def test_limits_are_adjusted_at_the_source_until_the_pause_begins_and_no_later(tmp_path: Path) -> None:
    """The pause is held up where it has just begun."""
    async with open_with_guest(tmp_path, hypervisor_class=HoldingHypervisor) as site:
        assert isinstance(site.alpha.hypervisor, HoldingHypervisor)
        hold = site.alpha.hypervisor.hold("pause_for_handoff")
        migration = await begin(site.alpha, site.beta, site.instance, **AMPLE)
        await hold.wait_reached()
        before = (await site.alpha.record(migration))["options"]
        longer = {"downtime_ms": 6000}

        refused = [await _refusal(host, migration, longer) for host in (site.alpha, site.beta)]
        hold.go.set()
        outcomes = [(await wait_outcome(host, migration))["outcome"] for host in (site.alpha, site.beta)]
        too_late = [await _refusal(host, migration, longer) for host in (site.alpha, site.beta)]

        assert refused == ["guest_paused", "not_the_source"]
        assert outcomes == ["moved", "moved"]
        assert too_late == ["migration_over", "not_the_source"]
        assert (await site.alpha.record(migration))["options"] == before
        assert await _refusal(site.alpha, "7d1a3f7e-0000-4000-8000-00000000000f", longer) == "unknown_migration"


# --------------------------------------------------------------------------- auto-converge


async def test_a_guest_that_writes_faster_than_ram_is_sent_is_throttled_moves_and_is_let_go(tmp_path: Path) -> None:
    """In steps: each is told in the record, and the guest feels the last one until it is paused."""
    async with open_with_guest(tmp_path, hypervisor_class=HoldingHypervisor) as site:
        assert isinstance(site.alpha.hypervisor, HoldingHypervisor)
        hold = site.alpha.hypervisor.hold("pause_for_handoff")
        migration = await begin(site.alpha, site.beta, site.instance, auto_converge=True, **HOPELESS)
        await _wait_throttled(site.alpha, migration)
        await hold.wait_reached()
        held_by = await site.throttle_percent(site.alpha)
        hold.go.set()

        record = await wait_outcome(site.alpha, migration)

        assert record["outcome"] == "moved", record
        steps = [each["throttle_percent"] for each in record["ram"]["rounds"][:-1]]
        assert steps[:2] == [0, 0]  # nothing is throttled before two rounds have said that it is needed
        assert steps == sorted(steps)
        assert 0 < held_by == steps[-1] == record["progress"]["throttle_percent"]
        await wait_heartbeats(site.beta, site.instance)
        assert await site.throttle_percent(site.beta) == 0
        assert (await check(site.beta, site.instance))["consistent"]


@pytest.mark.parametrize("end", ["cancelled", "timed_out"])
async def test_a_throttled_guest_is_let_go_when_its_migration_ends_without_a_move(tmp_path: Path, end: str) -> None:
    async with open_with_guest(tmp_path, stress(2, 6000)) as site:
        options = {**HOPELESS, "auto_converge": True, "downtime_ms": 1}
        migration = await begin(site.alpha, site.beta, site.instance, **options)
        await _wait_throttled(site.alpha, migration)
        held_by = await site.throttle_percent(site.alpha)

        if end == "cancelled":
            await site.alpha.client.post(f"/v1/migrations/{migration}:cancel")
        else:
            await _adjust(site.alpha, migration, timeout_s=0.1)

        assert held_by > 0
        record = await wait_outcome(site.alpha, migration)
        assert record["outcome"] == end
        assert record["progress"]["throttle_percent"] >= held_by
        assert await site.throttle_percent(site.alpha) == 0
        assert (await site.alpha.instance(site.instance))["state"] == "running"


async def test_a_throttled_guest_is_let_go_when_that_is_no_longer_wanted(tmp_path: Path) -> None:
    async with open_with_guest(tmp_path, stress(2, 6000)) as site:
        options = {**HOPELESS, "auto_converge": True, "downtime_ms": 1}
        migration = await begin(site.alpha, site.beta, site.instance, **options)
        await _wait_throttled(site.alpha, migration)

        await _adjust(site.alpha, migration, auto_converge=False)

        with trio.fail_after(DEADLINE_S):
            while await site.throttle_percent(site.alpha):
                await trio.sleep(0.01)
        assert (await site.alpha.record(migration))["outcome"] is None
        await site.alpha.client.post(f"/v1/migrations/{migration}:cancel")
        assert (await wait_outcome(site.alpha, migration))["outcome"] == "cancelled"


@pytest.mark.slow
async def test_a_daemon_that_was_killed_while_its_guest_was_throttled_lets_go_of_it_when_it_is_back(
    tmp_path: Path,
) -> None:
    """Whether it did is asked of the guest while it has no daemon: it listens to one at a time."""
    async with open_site(tmp_path, "alpha", "beta") as site:
        alpha, beta = await site.start("alpha"), await site.start("beta")
        instance = await create(alpha, program=stress(2, 6000))
        options = {**HOPELESS, "auto_converge": True, "downtime_ms": 1}
        migration = await begin(alpha, beta, instance, **options)
        await _wait_throttled(alpha, migration)
        await alpha.kill()
        held_by = await _throttle_of_the_guest_at(alpha)

        alpha = await site.start("alpha")
        shown = await alpha.instance(instance)
        await alpha.kill()

        assert held_by > 0
        assert shown["state"] == "running"
        assert await _throttle_of_the_guest_at(alpha) == 0


class CannotThrottle(ObservedHypervisor):
    """A hypervisor without that power: whatever is asked of it in this respect is refused."""

    async def build(self, plan: GuestPlan, stamp: GuestStamp, *, for_migration: bool) -> Guest:
        guest = await super().build(plan, stamp, for_migration=for_migration)

        async def throttle(percent: int) -> None:
            raise HypervisorError("the processors of this guest cannot be held", code="not_supported")

        guest.throttle = throttle  # type: ignore[method-assign]
        return guest


async def test_a_guest_that_cannot_be_throttled_goes_on_as_it_is_and_the_record_says_why(tmp_path: Path) -> None:
    """Nothing has to be let go of when it is called off then, so that this cannot fail either."""
    host = {"hypervisor_class": CannotThrottle, "limits": "undo_s = 3\nguest_request_s = 2"}
    async with open_with_guest(tmp_path, stress(2, 6000), **host) as site:
        options = {**HOPELESS, "auto_converge": True, "downtime_ms": 1}
        migration = await begin(site.alpha, site.beta, site.instance, **options)
        with trio.fail_after(DEADLINE_S):
            while not (record := await site.alpha.record(migration))["notes"]:
                await trio.sleep(0.01)
        assert [note for note in record["notes"] if "cannot be throttled" in note]

        await site.alpha.client.post(f"/v1/migrations/{migration}:cancel")

        record = await wait_outcome(site.alpha, migration)
        assert record["outcome"] == "cancelled", record
        assert (await site.alpha.instance(site.instance))["state"] == "running"


# --------------------------------------------------------------------------- fewer bytes on a slow link


async def test_pages_that_compress_travel_compressed_over_a_slow_link(tmp_path: Path) -> None:
    """From the first round on, as soon as the link is known: some 4 MiB for a stream."""
    async with open_with_guest(tmp_path, stress(16, 2000, pattern="compressible")) as site:
        record = await migrate(site.alpha, site.beta, site.instance, bandwidth_mib_s=16, streams=1, **AMPLE)

        assert record["outcome"] == "moved", record
        zstd = record["ram"]["encodings"]["zstd"]
        assert zstd["bytes"] < zstd["pages"] * PAGE_SIZE / 4
        assert record["ram"]["sent_bytes"] < 12 * MIB
        assert (await check(site.beta, site.instance))["consistent"]


async def test_nothing_is_compressed_that_is_not_to_be(tmp_path: Path) -> None:
    async with open_with_guest(tmp_path, stress(4, 500, pattern="compressible")) as site:
        options = {"bandwidth_mib_s": 16, "compression": "off", **AMPLE}
        record = await migrate(site.alpha, site.beta, site.instance, **options)

        assert record["outcome"] == "moved", record
        assert "zstd" not in record["ram"]["encodings"]
        assert "zstd" not in record["negotiated"]["encodings"]
        assert (await check(site.beta, site.instance))["consistent"]


@pytest.mark.parametrize("cache_mib", [32, 0])
async def test_pages_that_are_sent_again_and_again_travel_as_what_changed_in_them(
    tmp_path: Path, cache_mib: int
) -> None:
    """If copies of them may be kept. The guest changes 64 bytes of each of its pages in every round."""
    async with open_with_guest(tmp_path, stress(12, 20_000, pattern="sparse")) as site:
        options = {"bandwidth_mib_s": 24, "streams": 1, "max_rounds": 3, "force": True}
        record = await migrate(site.alpha, site.beta, site.instance, delta_cache_mib=cache_mib, **options)

        assert record["outcome"] == "moved", record
        if cache_mib:
            delta = record["ram"]["encodings"]["delta"]
            assert delta["bytes"] < delta["pages"] * PAGE_SIZE / 8
        else:
            assert "delta" not in record["ram"]["encodings"]
        assert (await check(site.beta, site.instance))["consistent"]


# --------------------------------------------------------------------------- steps of the tests


async def _adjust(host: Host, migration: str, **changes: Any) -> dict[str, Any]:
    return dict(await host.client.post(f"/v1/migrations/{migration}:adjust", changes))


async def _refusal(host: Host, migration: str, body: Mapping[str, Any]) -> str:
    with pytest.raises(VmMigrateError) as refusal:
        await host.client.post(f"/v1/migrations/{migration}:adjust", body)
    return refusal.value.code


async def _wait_sent(host: Host, migration: str) -> None:
    with trio.fail_after(DEADLINE_S):
        while not (await host.record(migration))["ram"]["sent_bytes"]:
            await trio.sleep(0.01)


async def _wait_rounds(host: Host, migration: str, rounds: int) -> None:
    with trio.fail_after(DEADLINE_S):
        while len((await host.record(migration))["ram"]["rounds"]) < rounds:
            await trio.sleep(0.01)


async def _wait_throttled(host: Host, migration: str) -> None:
    """Until a round has begun under a throttle: the guest obeys it by then."""
    with trio.fail_after(DEADLINE_S):
        while not (record := await host.record(migration))["progress"].get("throttle_percent"):
            assert record["outcome"] is None, record
            await trio.sleep(0.01)
        rounds = len(record["ram"]["rounds"])
        while (await host.record(migration))["progress"]["round"] <= rounds:
            await trio.sleep(0.01)


async def _throttle_of_the_guest_at(host: HostProcess) -> int:
    """Of a host without a daemon."""
    (socket,) = host.runtime.glob("*.sock")
    found = await finding.greet(socket, DEADLINE_S)
    assert found is not None
    return found.status.throttle_percent
