"""Daemons that end in the worst moments: a disk that fails, a guest that is gone or silent when the next one starts."""

from __future__ import annotations

import errno
import os
import signal
import uuid
from pathlib import Path

import pytest
import trio

from tests.hypervisor.faults import out_of_descriptors
from tests.migration.fleet import (
    ObservedHypervisor,
    RunningHost,
    begin,
    create,
    migrate,
    open_fleet,
    spec_v3,
    stress,
    wait_heartbeats,
    wait_in_doubt,
    wait_outcome,
    witnesses,
)
from tests.migration.test_in_doubt import SlowToOpen
from vmmigrate.errors import VmMigrateError
from vmmigrate.hypervisor import processes
from vmmigrate.hypervisor.base import Guest, GuestPlan, GuestStamp

pytestmark = pytest.mark.slow


class Disk:
    """A disk whose fsync fails from the moment that a test says so."""

    def __init__(self) -> None:
        self.fails = False

    def fsync(self, fd: int) -> None:
        if self.fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        os.fsync(fd)


class OpensAndThenTheDiskFails(ObservedHypervisor):
    """A host whose disk fails right after the guest's own disks were opened: at `started`."""

    disk: Disk

    async def build(self, plan: GuestPlan, stamp: GuestStamp, *, for_migration: bool) -> Guest:
        guest = await super().build(plan, stamp, for_migration=for_migration)
        really_open = guest.open_backends

        async def open_backends(epoch: tuple[int, int]) -> None:
            await really_open(epoch)
            self.disk.fails = True

        guest.open_backends = open_backends  # type: ignore[method-assign]
        return guest


async def test_a_disk_that_fails_at_the_point_of_no_return_costs_no_guest(tmp_path: Path) -> None:
    """Nobody knows whether `started` is durable: the daemon exits, and what the next one reads is the truth."""
    disk = OpensAndThenTheDiskFails.disk = Disk()
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha", limits="verdict_s = 0.5")
        beta = await fleet.start("beta", hypervisor_class=OpensAndThenTheDiskFails, fsync=disk.fsync)
        instance = await create(alpha, program=stress(2, 500))
        migration = await begin(alpha, beta, instance)
        with trio.fail_after(30):
            await beta.stopped.wait()

        assert [failure.code for failure in beta.failures] == ["journal_poisoned"]
        assert (await alpha.instance(instance))["state"] == "in_doubt"
        await fleet.start("beta", api_port=beta.facts["api_port"])

        assert (await wait_outcome(alpha, migration))["outcome"] == "moved"
        await wait_heartbeats(fleet.hosts["beta"], instance)
        assert (await fleet.hosts["beta"].instance(instance))["state"] == "running"
        owners = witnesses(fleet, instance)
        assert (owners.single, owners.hosts) == (True, ("alpha", "beta")), owners.problems


async def test_a_daemon_whose_journal_is_poisoned_by_a_request_ends(tmp_path: Path) -> None:
    disk = Disk()
    async with open_fleet(tmp_path, "alpha") as fleet:
        alpha = await fleet.start("alpha", fsync=disk.fsync)
        instance = await create(alpha)
        disk.fails = True

        with pytest.raises(VmMigrateError):
            await alpha.client.post(f"/v1/instances/{instance}:stop")

        with trio.fail_after(10):
            await alpha.stopped.wait()
        assert [failure.code for failure in alpha.failures] == ["journal_poisoned"]


async def test_a_source_that_lost_its_guest_in_doubt_still_learns_the_verdict(tmp_path: Path) -> None:
    """The host crashed after it gave the guest away: what is left is a fact to learn, and a tombstone."""
    SlowToOpen.may_open, SlowToOpen.is_opening = trio.Event(), trio.Event()
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha", limits="verdict_s = 0.3")
        beta = await fleet.start("beta", hypervisor_class=SlowToOpen)
        instance = await create(alpha, program=stress(2, 500))
        pid = (await alpha.instance(instance))["guest"]["pid"]
        migration = await begin(alpha, beta, instance)
        await wait_in_doubt(alpha, migration)
        await alpha.stop()
        os.kill(pid, signal.SIGKILL)

        alpha = await fleet.start("alpha")

        assert (await alpha.instance(instance))["state"] == "in_doubt"
        SlowToOpen.may_open.set()
        assert (await wait_outcome(alpha, migration))["outcome"] == "moved"
        assert (await alpha.instance(instance))["state"] == "elsewhere"
        await wait_heartbeats(beta, instance)


async def test_a_guest_that_died_while_there_was_no_daemon_is_lost_and_said_so(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha") as fleet:
        alpha = await fleet.start("alpha")
        instance = await create(alpha)
        pid = (await alpha.instance(instance))["guest"]["pid"]
        await alpha.stop()
        os.kill(pid, signal.SIGKILL)

        alpha = await fleet.start("alpha")

        assert (await alpha.instance(instance))["state"] == "lost"
        with pytest.raises(VmMigrateError) as refusal:
            await alpha.client.post(f"/v1/instances/{instance}:start")
        assert refusal.value.code == "not_owner"
        await alpha.client.delete(f"/v1/instances/{instance}")
        assert await alpha.client.get("/v1/instances") == []


async def test_a_guest_that_does_not_answer_is_left_alone_and_the_others_are_served(tmp_path: Path) -> None:
    """Not adopted is not dead: nothing is decided about it, and no second process of it can be started."""
    async with open_fleet(tmp_path, "alpha") as fleet:
        alpha = await fleet.start("alpha")
        silent, healthy = await create(alpha), await create(alpha)
        pid = (await alpha.instance(silent))["guest"]["pid"]
        await alpha.stop()
        os.kill(pid, signal.SIGSTOP)
        try:
            alpha = await fleet.start("alpha", start_deadline_s=0.5)

            assert (await alpha.instance(silent))["state"] == "indeterminate"
            assert (await alpha.instance(healthy))["state"] == "running"
            for call in ("start", "stop"):
                with pytest.raises(VmMigrateError) as refusal:
                    await alpha.client.post(f"/v1/instances/{silent}:{call}")
                assert refusal.value.code == "indeterminate"
        finally:
            os.kill(pid, signal.SIGCONT)
        await alpha.stop()
        alpha = await fleet.start("alpha")
        assert (await alpha.instance(silent))["state"] == "running"


async def test_a_guest_that_cannot_be_looked_at_is_left_alone_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon without descriptors is no evidence that a guest is gone."""
    really_find = processes.find

    def find(pid: int, start_ticks: int) -> processes.ProcessWatch | None:
        with out_of_descriptors():
            return really_find(pid, start_ticks)

    async with open_fleet(tmp_path, "alpha") as fleet:
        alpha = await fleet.start("alpha")
        instance = await create(alpha)
        pid = (await alpha.instance(instance))["guest"]["pid"]
        await alpha.stop()

        with monkeypatch.context() as patch:
            patch.setattr(processes, "find", find)
            alpha = await fleet.start("alpha")

        shown = await alpha.instance(instance)
        assert (shown["state"], "Too many open files" in shown["reason"]) == ("indeterminate", True)
        await alpha.stop()
        alpha = await fleet.start("alpha")
        shown = await alpha.instance(instance)
        assert (shown["state"], shown["guest"]["pid"]) == ("running", pid)
        await wait_heartbeats(alpha, instance)


async def test_a_guest_that_ends_by_itself_is_lost_at_once(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha") as fleet:
        alpha = await fleet.start("alpha")
        instance = await create(alpha)

        os.kill((await alpha.instance(instance))["guest"]["pid"], signal.SIGKILL)

        with trio.fail_after(10):
            while (await alpha.instance(instance))["state"] != "lost":
                await trio.sleep(0.01)


async def test_only_the_newest_records_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory and on disk, also over a restart: a daemon that lives long and migrates often does not grow."""
    monkeypatch.setattr("vmmigrate.daemon.reports.RECORDS_KEPT", 2)
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha)
        moved = []
        for source, destination in ((alpha, beta), (beta, alpha)):
            moved.append((await migrate(source, destination, instance))["migration_id"])
        await alpha.stop()
        alpha = await fleet.start("alpha")
        for source, destination in ((alpha, beta), (beta, alpha)):
            moved.append((await migrate(source, destination, instance))["migration_id"])

        with trio.fail_after(10):
            for host in (alpha, beta):
                while await _kept_records(host) != (moved[-2:], sorted(moved[-2:])):
                    await trio.sleep(0.01)


async def _kept_records(host: RunningHost) -> tuple[list[str], list[str]]:
    """Ids of the migrations that it lists, and of those that have a file."""
    listed = [record["migration_id"] for record in await host.client.get("/v1/migrations")]
    files = (host.config.directories.state / "migrations").glob("*.json")
    return listed, sorted(path.name.partition(".")[0] for path in files)


async def test_a_record_that_was_not_saved_in_time_is_told_by_the_journal(tmp_path: Path) -> None:
    """Both daemons died between the last record of their journals and the files."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha)
        moved = (await migrate(alpha, beta, instance))["migration_id"]
        back = await beta.client.post(f"/v1/instances/{instance}:migrate-out", {"destination_host": "alpha"})
        await beta.client.post(f"/v1/migrations/{back['migration_id']}:cancel")
        for host in (alpha, beta):
            await host.stop()
            for path in (host.config.directories.state / "migrations").iterdir():
                path.unlink()

        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")

        for host in (alpha, beta):
            assert (await host.record(moved))["outcome"] == "moved"
        record = await beta.record(back["migration_id"])
        assert (record["outcome"], record["error"]["code"]) == ("cancelled", "cancelled")


async def test_a_migration_whose_guest_ends_before_its_destination_comes_ends_with_it(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha") as fleet:
        alpha = await fleet.start("alpha")
        instance = await create(alpha)
        ticket = await alpha.client.post(f"/v1/instances/{instance}:migrate-out", {"destination_host": "beta"})

        os.kill((await alpha.instance(instance))["guest"]["pid"], signal.SIGKILL)

        record = await wait_outcome(alpha, ticket["migration_id"])
        assert (record["outcome"], record["error"]["code"]) == ("guest_lost", "guest_lost")


async def test_what_a_daemon_left_half_written_is_gone_after_a_restart(tmp_path: Path) -> None:
    """It died between the new file and its rename."""
    async with open_fleet(tmp_path, "alpha") as fleet:
        alpha = await fleet.start("alpha")
        instance = await create(alpha)
        await alpha.stop()
        state = alpha.config.directories.state
        (state / "instances" / f"{instance}.json.0badcafe.new").write_text("{")
        (state / "migrations" / f"{uuid.uuid4()}.source.json.0badcafe.new").write_text("")

        alpha = await fleet.start("alpha")

        assert list(state.rglob("*.new")) == []
        assert (await alpha.instance(instance))["state"] == "running"


async def test_of_two_requests_for_one_id_only_one_creates_it(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha") as fleet:
        alpha = await fleet.start("alpha")
        instance = str(uuid.uuid4())
        results: list[str] = []

        async def create_one() -> None:
            try:
                body = {"id": instance, "spec_version": "v3", "spec": spec_v3()}
                await alpha.client.post("/v1/instances", body)
                results.append("created")
            except VmMigrateError as refusal:
                results.append(refusal.code)

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(create_one)

        assert sorted(results) == ["created", "instance_exists", "instance_exists", "instance_exists"]
        assert not alpha.stopped.is_set()


async def test_the_record_of_a_migration_outlives_the_daemon(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha)
        record = await migrate(alpha, beta, instance)
        await alpha.stop()

        alpha = await fleet.start("alpha")

        assert (await alpha.record(record["migration_id"]))["outcome"] == "moved"
