"""Disks of hosts that are full, read-only, failing or slow: nothing is acknowledged before it is durable, and the
guests that the disk has nothing to do with go on."""

from __future__ import annotations

import errno
import os
import stat
import threading
import uuid
from pathlib import Path

import pytest
import trio

from tests.disks.small import SmallDisk, small_disk
from tests.migration.fleet import (
    RunningHost,
    begin,
    check,
    create,
    migrate,
    open_fleet,
    spec_v3,
    stress,
    wait_heartbeats,
    wait_outcome,
    witnesses,
)
from vmmigrate.errors import JournalError, VmMigrateError
from vmmigrate.memory import MIB

pytestmark = pytest.mark.slow

DEADLINE_S = 30.0
NO_ROOM_KIB = 2048
SOON = "verdict_s = 0.5\nresume_window_s = 0.5"


class Disk:
    """A disk whose nth fsync fails, counted from the moment that a test says so, and all after it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.left: int | None = None
        self.failed = 0

    def fsync(self, fd: int) -> None:
        with self._lock:
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    self.failed += 1
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
        os.fsync(fd)


class DocumentsFail:
    """A disk that fails for directories, as it does where documents are renamed; the journal's file is fine."""

    fails = False

    def fsync(self, fd: int) -> None:
        if self.fails and stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        os.fsync(fd)


class SlowDisk:
    """A disk that keeps the journal waiting until it is told to go on."""

    def __init__(self) -> None:
        self.is_slow = False
        self.waiting = threading.Event()
        self.go_on = threading.Event()

    def fsync(self, fd: int) -> None:
        if self.is_slow:
            self.waiting.set()
            assert self.go_on.wait(DEADLINE_S)
        os.fsync(fd)


# --------------------------------------------------------------------------- full


async def test_a_destination_without_room_refuses_and_goes_on(tmp_path: Path) -> None:
    """Its journal has room ahead, so that it can say so; its other guest never notices."""
    with small_disk(tmp_path / "beta" / "state", NO_ROOM_KIB) as disk:
        async with open_fleet(tmp_path, "alpha", "beta") as fleet:
            alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
            instance, bystander = await create(alpha, program=stress(2, 500)), await create(beta)
            disk.fill()

            migration = await begin(alpha, beta, instance)

            record = await wait_outcome(alpha, migration)
            assert (record["outcome"], record["error"]["code"]) == ("refused", "document_io")
            assert (await wait_outcome(beta, migration))["error"]["code"] == "document_io"
            assert (await alpha.instance(instance))["state"] == "running"
            await wait_heartbeats(beta, bystander)
            assert not beta.stopped.is_set()
            disk.free()
            assert (await migrate(alpha, beta, instance))["outcome"] == "moved"


async def test_a_source_without_room_does_not_even_pause_the_guest(tmp_path: Path) -> None:
    with small_disk(tmp_path / "alpha" / "state", NO_ROOM_KIB) as disk:
        async with open_fleet(tmp_path, "alpha", "beta") as fleet:
            alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
            instance = await create(alpha, program=stress(2, 500))
            await _use_reserve(alpha, disk)

            migration = await begin(alpha, beta, instance)

            record = await wait_outcome(alpha, migration)
            assert (record["outcome"], record["error"]["code"]) == ("failed", "journal_full")
            assert (await wait_outcome(beta, migration))["error"]["code"] == "journal_full"
            assert (await alpha.instance(instance))["state"] == "running"
            assert not alpha.stopped.is_set()
            disk.free()
            assert (await migrate(alpha, beta, instance))["outcome"] == "moved"
            assert witnesses(fleet, instance).single


async def _use_reserve(host: RunningHost, disk: SmallDisk) -> None:
    """Fill the disk, and then so much of what the journal has ahead that there is a block to ask for."""
    disk.fill()
    for _ in range(40):
        with pytest.raises(VmMigrateError):
            await host.client.post("/v1/instances", {"id": str(uuid.uuid4()), "spec_version": "v3", "spec": spec_v3()})
    instance = next(iter(await host.client.get("/v1/instances")))["id"]
    for _ in range(30):
        await host.client.post(f"/v1/instances/{instance}:migrate-out", {"destination_host": "beta"})
    newest = (await host.client.get("/v1/migrations"))[-1]["migration_id"]
    await host.client.post(f"/v1/migrations/{newest}:cancel")


async def test_an_instance_that_cannot_be_kept_is_not_created_and_the_daemon_goes_on(tmp_path: Path) -> None:
    with small_disk(tmp_path / "alpha" / "state", NO_ROOM_KIB) as disk:
        async with open_fleet(tmp_path, "alpha") as fleet:
            alpha = await fleet.start("alpha")
            bystander = await create(alpha)
            disk.fill()

            with pytest.raises(VmMigrateError) as refusal:
                await create(alpha)

            assert refusal.value.code == "document_io"
            assert [shown["id"] for shown in await alpha.client.get("/v1/instances")] == [bystander]
            await wait_heartbeats(alpha, bystander)
            disk.free()
            await create(alpha)


async def test_a_journal_beyond_its_reserve_ends_the_daemon_and_no_guest(tmp_path: Path) -> None:
    """Nobody acts on what may not be durable. With room again, the next daemon takes all guests over."""
    with small_disk(tmp_path / "alpha" / "state", NO_ROOM_KIB) as disk:
        async with open_fleet(tmp_path, "alpha") as fleet:
            alpha = await fleet.start("alpha")
            instance = await create(alpha)
            pid = (await alpha.instance(instance))["guest"]["pid"]
            disk.fill()
            with trio.fail_after(2 * DEADLINE_S):
                while not alpha.stopped.is_set():
                    await _try_ticket(alpha, instance)
            assert [failure.code for failure in alpha.failures] == ["journal_poisoned"]
            with pytest.raises(JournalError) as unstartable:
                await _start_again(fleet)
            assert unstartable.value.code == "journal_io"

            disk.free()
            alpha = await fleet.start("alpha")

            shown = await alpha.instance(instance)
            assert (shown["state"], shown["guest"]["pid"]) == ("running", pid)
            assert witnesses(fleet, instance).single


async def _try_ticket(host: RunningHost, instance: str) -> None:
    with trio.move_on_after(2):
        try:
            await host.client.post(f"/v1/instances/{instance}:migrate-out", {"destination_host": "x" * 60})
        except VmMigrateError:
            await trio.sleep(0.01)


async def _start_again(fleet: object) -> None:
    from vmmigrate.daemon.server import run_daemon

    config = fleet.hosts["alpha"].config  # type: ignore[attr-defined]
    await run_daemon(config, lambda _: None)


async def test_a_read_only_state_directory_is_one_clear_line(tmp_path: Path) -> None:
    from vmmigrate.daemon.server import run_daemon

    with small_disk(tmp_path / "alpha" / "state", NO_ROOM_KIB) as disk:
        async with open_fleet(tmp_path, "alpha") as fleet:
            alpha = await fleet.start("alpha")
            instance = await create(alpha)
            await alpha.stop()
            disk.remount("ro")

            with pytest.raises(VmMigrateError) as refusal:
                await run_daemon(alpha.config, lambda _: None)

            assert "Read-only" in refusal.value.text
            assert "\n" not in refusal.value.text
            disk.remount("rw")
            alpha = await fleet.start("alpha")
            assert (await alpha.instance(instance))["state"] == "running"


# --------------------------------------------------------------------------- failing


# As many as a migration has, of the journal and of documents.
FSYNCS = [("source", nth) for nth in range(7)] + [("destination", nth) for nth in range(10)]


@pytest.mark.parametrize(("side", "nth"), FSYNCS)
async def test_whichever_fsync_of_a_migration_fails_there_is_one_owner(tmp_path: Path, side: str, nth: int) -> None:
    """The daemon of that side ends or the attempt fails; after both are up again exactly one host runs the guest."""
    disk = Disk()
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha", limits=SOON, fsync=disk.fsync if side == "source" else os.fsync)
        beta = await fleet.start("beta", limits=SOON, fsync=disk.fsync if side == "destination" else os.fsync)
        instance, bystander = await create(alpha, program=stress(2, 500)), await create(beta)
        disk.left = nth
        with trio.fail_after(DEADLINE_S):
            await _migrate_and_let_fail(alpha, beta, instance)
        disk.left = None
        for host in (alpha, beta):
            assert {failure.code for failure in host.failures} <= {"journal_poisoned"}
            if host.stopped.is_set():
                await fleet.start(host.name, limits=SOON, api_port=host.facts["api_port"])

        owner = await _wait_owner(fleet.hosts["alpha"], fleet.hosts["beta"], instance)

        await wait_heartbeats(owner, instance)
        assert (await check(owner, instance))["consistent"]
        owners = witnesses(fleet, instance)
        assert owners.single, owners.problems
        await wait_heartbeats(fleet.hosts["beta"], bystander)


async def _migrate_and_let_fail(alpha: RunningHost, beta: RunningHost, instance: str) -> None:
    """Until each daemon has ended, or has told how the attempt ended for it."""
    try:
        migration = await begin(alpha, beta, instance)
    except VmMigrateError:  # its daemon ends, and may not even be able to say so
        while not (alpha.stopped.is_set() or beta.stopped.is_set()):
            await trio.sleep(0.01)
        return
    for host in (alpha, beta):
        while not host.stopped.is_set() and not await _is_told(host, migration):
            await trio.sleep(0.01)


async def _is_told(host: RunningHost, migration: str) -> bool:
    try:
        return (await host.record(migration))["outcome"] is not None
    except VmMigrateError:
        return False  # it is about to end


async def _wait_owner(alpha: RunningHost, beta: RunningHost, instance: str) -> RunningHost:
    """The host that runs the guest, once every doubt is settled."""
    with trio.fail_after(2 * DEADLINE_S):
        while True:
            states = {}
            for host in (alpha, beta):
                try:
                    states[host.name] = (await host.instance(instance))["state"]
                except VmMigrateError as unknown:
                    states[host.name] = unknown.code
            if states["alpha"] in {"running", "migrating"} and states["beta"] != "running":
                return alpha
            if states["beta"] == "running" and states["alpha"] not in {"running", "migrating"}:
                return beta
            await trio.sleep(0.05)


async def test_a_guest_whose_disk_does_not_take_its_writes_stays_and_runs(tmp_path: Path) -> None:
    """The other host would open the disk and not find them: the flush fails the pause, and the same code is told."""
    with small_disk(tmp_path / "small", 1024) as disk, disk.block_device(4 * MIB) as device:
        async with open_fleet(tmp_path, "alpha", "beta") as fleet:
            alpha, beta = [await fleet.start(name, allow='paths = ["/dev"]') for name in ("alpha", "beta")]
            instance = await create(alpha, _spec_with_disk(device), program=stress(2, 500, disk_io=True))
            disk.fill()
            await _wait_disk_steps(alpha, instance)

            for _ in range(2):  # a second attempt must not take the first one's silence for success
                migration = await begin(alpha, beta, instance)

                record = await wait_outcome(alpha, migration)
                assert (record["outcome"], record["error"]["code"]) == ("failed", "flush_failed"), record
                assert (await wait_outcome(beta, migration))["error"]["code"] == "flush_failed"
                assert (await alpha.instance(instance))["state"] == "running"
                await wait_heartbeats(alpha, instance)
            assert await beta.client.get("/v1/instances") == []
            await fleet.end_guests()


def _spec_with_disk(path: Path) -> dict[str, object]:
    slot = {"bus": 0, "device": 4, "function": 0}
    backend = {"path": str(path), "readonly": False, "block_size": 512, "workers": None}
    return spec_v3(
        disk={"type": "virtio_disk", "component": {"backend_id": "file", "pci_path": slot}},
        file={"type": "file_storage_backend", "component": backend},
    )


async def _wait_disk_steps(host: RunningHost, instance: str) -> None:
    with trio.fail_after(DEADLINE_S):
        while not (await host.guest(instance).status()).program["disk_steps"] > 2:
            await trio.sleep(0.01)


async def test_documents_that_fail_do_not_end_the_daemon(tmp_path: Path) -> None:
    """The guest has come and runs; that its document was not put in its place is found and done by the next start."""
    disk = DocumentsFail()
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta", fsync=disk.fsync)
        instance = await create(alpha, program=stress(2, 500))
        disk.fails = True
        refused = await migrate(alpha, beta, instance)
        assert (refused["outcome"], refused["error"]["code"]) == ("refused", "document_io")
        assert not beta.stopped.is_set()
        disk.fails = False
        migration = await begin(alpha, beta, instance, downtime_ms=1, max_rounds=20, force=True)
        await _wait_arrival(beta, migration)
        disk.fails = True

        record = await wait_outcome(alpha, migration)

        assert record["outcome"] == "moved", record
        await wait_heartbeats(beta, instance)
        assert (await wait_outcome(beta, migration))["outcome"] == "moved"
        assert not beta.stopped.is_set()
        assert (await beta.instance(instance))["state"] == "running"
        disk.fails = False
        await beta.stop()
        beta = await fleet.start("beta")
        assert (await beta.instance(instance))["state"] == "running"
        assert witnesses(fleet, instance).single


async def _wait_arrival(host: RunningHost, migration: str) -> None:
    with trio.fail_after(DEADLINE_S):
        while not list((host.config.directories.state / "arrivals").glob(f"{migration}*.json")):
            await trio.sleep(0.002)


# --------------------------------------------------------------------------- slow


async def test_nothing_is_given_away_while_the_journal_waits_for_its_disk(tmp_path: Path) -> None:
    """The source's disk stands still: the destination hears nothing, the API answers, and then all goes on."""
    disk = SlowDisk()
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha", fsync=disk.fsync), await fleet.start("beta")
        instance, bystander = await create(alpha, program=stress(2, 500)), await create(alpha)
        migration = await begin(alpha, beta, instance, downtime_ms=1, max_rounds=20, force=True)
        disk.is_slow = True
        with trio.fail_after(DEADLINE_S):
            await trio.to_thread.run_sync(disk.waiting.wait)

        await wait_heartbeats(alpha, bystander, 500)
        await wait_heartbeats(alpha, instance, 50)
        assert (await alpha.record(migration))["outcome"] is None
        assert (await beta.client.get(f"/v1/migrations/{migration}/side"))["verdict"] not in {"acquired", "started"}
        disk.is_slow = False
        disk.go_on.set()

        assert (await wait_outcome(alpha, migration))["outcome"] == "moved"
        assert witnesses(fleet, instance).single


async def test_nothing_is_promised_while_the_destinations_journal_waits_for_its_disk(tmp_path: Path) -> None:
    """No Ready before `prepared` is durable; the other guest and the API of that host go on meanwhile."""
    disk = SlowDisk()
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta", fsync=disk.fsync)
        instance, bystander = await create(alpha, program=stress(2, 500)), await create(beta)
        migration = await begin(alpha, beta, instance, downtime_ms=1, max_rounds=20, force=True)
        await _wait_arrival(beta, migration)
        disk.is_slow = True
        with trio.fail_after(DEADLINE_S):
            await trio.to_thread.run_sync(disk.waiting.wait)

        await wait_heartbeats(beta, bystander, 500)
        assert (await alpha.record(migration))["outcome"] is None
        assert (await beta.client.get(f"/v1/migrations/{migration}/side"))["verdict"] == "unknown"
        disk.is_slow = False
        disk.go_on.set()

        assert (await wait_outcome(alpha, migration))["outcome"] == "moved"
        assert witnesses(fleet, instance).single
