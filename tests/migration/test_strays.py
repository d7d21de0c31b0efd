"""Guest processes that no journal record explains: found by their stamp, left as they are, and nothing is decided."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio

from tests.migration.fleet import (
    Fleet,
    ObservedHypervisor,
    RunningHost,
    begin,
    create,
    files_of,
    migrate,
    open_fleet,
    spec_v3,
    stress,
    wait_heartbeats,
    wait_in_doubt,
    wait_outcome,
)
from tests.migration.test_in_doubt import SlowToOpen
from vmmigrate.api.client import open_client
from vmmigrate.engine.journal import Journal
from vmmigrate.errors import VmMigrateError
from vmmigrate.hypervisor.base import Guest, GuestPlan, GuestProcess, GuestStamp, GuestStatus
from vmmigrate.ownership import records as r
from vmmigrate.ownership import rules

MIGRATION = "7f9c24e5-1b2c-4d3e-8f90-a1b2c3d4e5f6"


class OrphansItsGuests(ObservedHypervisor):
    """A host whose daemon "dies" between the start of a guest process and its record."""

    async def build(self, plan: GuestPlan, stamp: GuestStamp, *, for_migration: bool) -> Guest:
        guest = await super().build(plan, stamp, for_migration=for_migration)
        guest.detach()
        self.orphaned.set()
        await trio.sleep_forever()
        raise AssertionError("woken up")

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.orphaned = trio.Event()


class DiesWhenLookedAt(ObservedHypervisor):
    """A host whose adopted guest answers one question, and is dead."""

    async def adopt(self, stamp: GuestStamp, plan: GuestPlan, process: GuestProcess) -> Guest | None:
        guest = await super().adopt(stamp, plan, process)
        assert guest is not None
        really_look = guest.status

        async def status() -> GuestStatus:
            seen = await really_look()
            os.kill(process.pid, signal.SIGKILL)
            return seen

        guest.status = status  # type: ignore[method-assign]
        return guest


def processes_of(host: RunningHost) -> set[int]:
    """The guest processes that the host knows of without owning them."""
    return {guest.process.pid for guest in host.hypervisor.seen.values()}


async def _settle(fleet: Fleet, host: RunningHost, migration: str) -> str:
    """The code with which *host* refuses to tell host alpha what became of the migration."""
    own = files_of(fleet.root, "alpha")
    async with open_client(host.url, own) as client:
        with pytest.raises(VmMigrateError) as refusal:
            await client.post(f"/v1/migrations/{migration}/side:settle")
    return refusal.value.code


async def _refusal(host: RunningHost, path: str, body: dict[str, object] | None = None) -> str:
    with pytest.raises(VmMigrateError) as refusal:
        await host.client.post(path, body)
    return refusal.value.code


async def test_a_guest_whose_journal_was_lost_is_found_and_left_as_it_is(tmp_path: Path) -> None:
    """The empty journal knows of nothing; the guest goes on, and nothing may be done here with its instance."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=stress(2, 500))
        pid = (await alpha.instance(instance))["guest"]["pid"]
        await alpha.stop()
        (tmp_path / "alpha" / "state" / "journal.vmmj").unlink()

        alpha = await fleet.start("alpha")

        shown = await alpha.instance(instance)
        assert shown["state"] == "indeterminate"
        assert str(pid) in shown["reason"]
        assert [known["id"] for known in await alpha.client.get("/v1/instances")] == [instance]
        os.kill(pid, 0)
        other = await create(beta)
        again = {"id": instance, "spec_version": "v3", "spec": spec_v3()}
        assert await _refusal(alpha, "/v1/instances", again) == "indeterminate"
        assert await _refusal(alpha, f"/v1/instances/{instance}:start") == "indeterminate"
        assert await _refusal(alpha, f"/v1/instances/{instance}:migrate-out", {"destination_host": "beta"}) == (
            "indeterminate"
        )
        assert (await migrate(beta, alpha, other))["outcome"] == "moved"
        os.kill(pid, signal.SIGKILL)


async def test_a_host_with_an_unexplained_process_is_no_destination_for_its_instance(tmp_path: Path) -> None:
    """It came, its journal was lost; the instance is sent again from where the journal still says it is."""
    async with open_fleet(tmp_path, "alpha", "beta", "gamma") as fleet:
        alpha, beta, gamma = [await fleet.start(name) for name in ("alpha", "beta", "gamma")]
        instance = await create(alpha)
        assert (await migrate(alpha, beta, instance))["outcome"] == "moved"
        assert (await migrate(beta, gamma, instance))["outcome"] == "moved"
        pid = (await gamma.instance(instance))["guest"]["pid"]
        await gamma.stop()
        (tmp_path / "gamma" / "state" / "journal.vmmj").unlink()
        gamma = await fleet.start("gamma")

        ticket = {
            "migration_id": MIGRATION,
            "instance_id": instance,
            "source_host": "beta",
            "source_address": "127.0.0.1:1",
            "source_url": beta.url,
            "ticket": "00" * 32,
        }
        assert await _refusal(gamma, "/v1/migrations:migrate-in", ticket) == "indeterminate"
        os.kill(pid, signal.SIGKILL)


async def test_a_process_whose_daemon_died_before_its_record_is_ended_at_the_restart(tmp_path: Path) -> None:
    """At the source of a start, and at the destination of a migration; neither ever ran, nobody owns them."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha")
        beta = await fleet.start("beta", hypervisor_class=OrphansItsGuests)
        instance = await create(alpha)
        migration = await begin(alpha, beta, instance)
        assert isinstance(beta.hypervisor, OrphansItsGuests)
        with trio.fail_after(20):
            await beta.hypervisor.orphaned.wait()
        runtime = beta.config.directories.runtime
        assert len(list(runtime.glob("*.sock"))) == 1
        await beta.stop()

        beta = await fleet.start("beta")

        assert list(runtime.iterdir()) == []
        assert await beta.client.get("/v1/instances") == []
        assert (await wait_outcome(alpha, migration))["outcome"] == "refused"
        assert (await migrate(alpha, beta, instance))["outcome"] == "moved"


async def test_a_restored_journal_decides_nothing_for_a_guest_that_remembers_more(tmp_path: Path) -> None:
    """The copy says `acquired`; the guest was told of `started`. The source is not answered, and stays in doubt."""
    SlowToOpen.may_open, SlowToOpen.is_opening = trio.Event(), trio.Event()
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha", limits="verdict_s = 0.3")
        beta = await fleet.start("beta", hypervisor_class=SlowToOpen)
        instance = await create(alpha, program=stress(2, 500))
        migration = await begin(alpha, beta, instance)
        with trio.fail_after(30):
            await SlowToOpen.is_opening.wait()
        await wait_in_doubt(alpha, migration)
        await alpha.stop()
        journal = tmp_path / "beta" / "state" / "journal.vmmj"
        copy = journal.read_bytes()
        SlowToOpen.may_open.set()
        await wait_heartbeats(beta, instance)
        await beta.stop()
        journal.write_bytes(copy)

        beta = await fleet.start("beta", api_port=beta.facts["api_port"])
        alpha = await fleet.start("alpha")

        assert (await beta.instance(instance))["state"] == "indeterminate"
        assert await _settle(fleet, beta, migration) == "indeterminate"
        assert (await alpha.instance(instance))["state"] == "in_doubt"
        assert await _refusal(alpha, f"/v1/instances/{instance}:start") == "in_doubt"
        (process,) = processes_of(beta)
        os.kill(process, signal.SIGKILL)


@pytest.mark.slow
async def test_a_restored_journal_that_has_grown_again_still_decides_nothing(tmp_path: Path) -> None:
    """The copy took another id when it was noticed; the guests that it does explain were told, and go on."""
    async with open_fleet(tmp_path, "alpha") as fleet:
        alpha = await fleet.start("alpha")
        explained, remembers = await create(alpha), await create(alpha)
        journal = tmp_path / "alpha" / "state" / "journal.vmmj"
        copy, old_id = journal.read_bytes(), (await alpha.client.get("/v1/host"))["journal_id"]
        await alpha.client.post(f"/v1/instances/{remembers}:stop")
        await alpha.client.post(f"/v1/instances/{remembers}:start")
        process = alpha.guest(remembers).process
        await alpha.stop()
        journal.write_bytes(copy)

        for _ in range(2):
            alpha = await fleet.start("alpha")
            assert (await alpha.client.get("/v1/host"))["journal_id"] != old_id
            assert (await alpha.instance(remembers))["state"] == "indeterminate"
            assert (await alpha.instance(explained))["state"] == "running"
            await wait_heartbeats(alpha, explained)
            for _ in range(8):  # longer than any guest remembers
                await alpha.client.post(f"/v1/instances/{explained}:migrate-out", {"destination_host": "beta"})
            await alpha.stop()
        os.kill(process.pid, signal.SIGKILL)
        alpha = await fleet.start("alpha")


async def test_a_guest_that_dies_while_its_daemon_recovers_is_lost_and_said_so(tmp_path: Path) -> None:
    """Its pause was to be undone, and it died between the look at it and the order to run."""
    async with open_fleet(tmp_path, "alpha") as fleet:
        alpha = await fleet.start("alpha")
        instance = await create(alpha)
        await alpha.stop()
        journal = Journal(tmp_path / "alpha" / "state" / "journal.vmmj")
        journal.commit(rules.IssueTicket(r.TicketIssued(MIGRATION, instance, "beta", "ab" * 32, 2_000_000_000)))
        journal.commit(rules.ConsumeTicket(MIGRATION, instance, "ab" * 32, "beta", 1_900_000_000))
        journal.commit(rules.BeginPause(MIGRATION, "running"))
        journal.close()

        alpha = await fleet.start("alpha", hypervisor_class=DiesWhenLookedAt)

        assert (await alpha.instance(instance))["state"] == "lost"
        record = await alpha.record(MIGRATION)
        assert (record["outcome"], record["error"]["code"]) == ("guest_lost", "guest_lost")
        assert list(alpha.config.directories.runtime.iterdir()) == []
