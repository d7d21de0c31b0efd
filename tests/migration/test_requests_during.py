"""What is asked of a guest while it moves, and what it does by itself: one outcome each, the same on both sides."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.migration.fleet import (
    Fleet,
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
from tests.migration.holding import PATIENCE_S, HoldingHypervisor
from vmmigrate.daemon.documents import DocumentStore
from vmmigrate.errors import HypervisorError, RequestError, VmMigrateError
from vmmigrate.hypervisor.base import GuestRam
from vmmigrate.hypervisor.embedded.link import GuestLink, close_all
from vmmigrate.ownership.requests import DONE, REFUSALS, Request, Standing
from vmmigrate.ownership.state import Holding, Outgoing

pytestmark = pytest.mark.slow

OBEYS_KEYS: dict[str, Any] = {"power_keys": True}


# --------------------------------------------------------------------------- positions


@dataclass(frozen=True)
class Position:
    """A moment of a migration from alpha to beta that a test can hold still.

    Attributes:
        asked: The host that is asked then; `standing`: what the instance is to it.
        holder, step: Where it is held: at which host, at which call of its hypervisor. None: no peer has come.
    """

    asked: str
    standing: Standing
    holder: str | None = None
    step: str = ""


POSITIONS = {
    "awaiting its peer": Position("alpha", Standing.AWAITING_PEER),
    "before pre-copy": Position("alpha", Standing.COPYING, "beta", "build"),
    "about to pause": Position("alpha", Standing.PAUSED, "alpha", "pause_for_handoff"),
    "paused": Position("alpha", Standing.PAUSED, "alpha", "export_devices"),
    "in doubt": Position("alpha", Standing.IN_DOUBT, "beta", "open_backends"),
    "arriving": Position("beta", Standing.ARRIVING, "alpha", "export_devices"),
    "taken over": Position("beta", Standing.TAKING_OVER, "beta", "open_backends"),
}


@dataclass
class Moment:
    """A migration that is held still. `go` lets it go on."""

    fleet: Fleet
    instance: str
    migration: str
    ticket: dict[str, Any] | None
    go: Callable[[], None]

    async def outcomes(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Both records, once the migration is over on both sides."""
        alpha, beta = self.fleet.hosts["alpha"], self.fleet.hosts["beta"]
        if self.ticket is not None:
            await beta.client.post("/v1/migrations:migrate-in", self.ticket)
        self.go()
        return await wait_outcome(alpha, self.migration), await wait_outcome(beta, self.migration)


@contextlib.asynccontextmanager
async def held_at(root: Path, position: Position, program: dict[str, Any] | None = None) -> AsyncIterator[Moment]:
    async with open_fleet(root, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha", hypervisor_class=HoldingHypervisor, limits="verdict_s = 0.3")
        beta = await fleet.start("beta", hypervisor_class=HoldingHypervisor)
        instance = await create(alpha, program=program or stress(2, 500, **OBEYS_KEYS))
        if position.holder is None:
            ticket = await alpha.client.post(f"/v1/instances/{instance}:migrate-out", {"destination_host": "beta"})
            del ticket["expires_at_s"]
            yield Moment(fleet, instance, ticket["migration_id"], ticket, lambda: None)
            return
        hypervisor = fleet.hosts[position.holder].hypervisor
        assert isinstance(hypervisor, HoldingHypervisor)
        hold = hypervisor.hold(position.step)
        migration = await begin(alpha, beta, instance)
        await hold.wait_reached()
        if position.standing is Standing.IN_DOUBT:
            await _wait_state(alpha, instance, "in_doubt")
        yield Moment(fleet, instance, migration, None, hold.go.set)


# --------------------------------------------------------------------------- requests


@pytest.mark.parametrize("position", POSITIONS)
async def test_every_request_has_the_outcome_of_the_table_and_the_migration_goes_on(
    tmp_path: Path, position: str
) -> None:
    """What is refused touches nothing: the guest moves all the same, whole, and runs once."""
    where = POSITIONS[position]
    async with held_at(tmp_path, where) as moment:
        host = moment.fleet.hosts[where.asked]
        for request in Request:
            expected = REFUSALS[where.standing][request]
            if expected != DONE or request is Request.TYPE:
                assert await ask(host, moment.instance, request) == expected, request

        source, destination = await moment.outcomes()

        assert (source["outcome"], destination["outcome"]) == ("moved", "moved"), source
        beta = moment.fleet.hosts["beta"]
        await wait_heartbeats(beta, moment.instance)
        assert (await check(beta, moment.instance))["consistent"]
        assert witnesses(moment.fleet, moment.instance).single
        assert await ask(moment.fleet.hosts["alpha"], moment.instance, Request.START) == "not_owner"


async def test_the_same_request_has_the_same_outcome_all_through_pre_copy(tmp_path: Path) -> None:
    """Rounds go on for as long as the guest writes; what is typed reaches it and travels along."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=stress(16, 400_000, **OBEYS_KEYS))
        await wait_filled(alpha, instance, 16 * 256)
        migration = await begin(alpha, beta, instance, downtime_ms=1, max_rounds=1000)
        await _wait_rounds(alpha, migration, 1)

        for request in Request:
            assert await ask(alpha, instance, request) == REFUSALS[Standing.COPYING][request], request
            assert await ask(beta, instance, request) == REFUSALS[Standing.ARRIVING][request], request

        assert (await alpha.record(migration))["outcome"] is None
        await alpha.client.post(f"/v1/migrations/{migration}:cancel")
        assert (await wait_outcome(alpha, migration))["outcome"] == "cancelled"


def test_the_table_knows_every_request_in_every_standing() -> None:
    for found, row in REFUSALS.items():
        assert set(row) == set(Request), found
    assert set(REFUSALS) == set(Standing)


def test_every_holding_and_every_open_stage_is_a_standing() -> None:
    """Nothing that a journal can say leaves a request without an outcome."""
    from vmmigrate.ownership import requests

    assert set(requests._OF_HOLDING) | {Holding.HELD} == set(Holding)
    assert set(requests._OF_STAGE) == {Outgoing.AWAITING_PEER, Outgoing.ACTIVE, Outgoing.PAUSING}


async def test_a_request_that_was_first_is_done_before_a_migration_begins(tmp_path: Path) -> None:
    """A pause on its way to the guest and a migrate-out: the guest arrives paused, whatever the timing."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha", hypervisor_class=HoldingHypervisor)
        beta = await fleet.start("beta")
        instance = await create(alpha)
        assert isinstance(alpha.hypervisor, HoldingHypervisor)
        hold = alpha.hypervisor.hold("pause")
        migrations: list[str] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, alpha, instance, Request.PAUSE)
            await hold.wait_reached()

            async def move() -> None:
                migrations.append(await begin(alpha, beta, instance))

            nursery.start_soon(move)
            hold.go.set()

        assert (await wait_outcome(alpha, migrations[0]))["outcome"] == "moved"
        await wait_outcome(beta, migrations[0])
        assert (await beta.instance(instance))["state"] == "paused"


async def test_a_guest_is_rebooted_by_its_reset_button(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha") as fleet:
        alpha = await fleet.start("alpha")
        instance = await create(alpha, program=stress(2, 500))
        await wait_filled(alpha, instance, 2 * 256)

        shown = await alpha.client.post(f"/v1/instances/{instance}:reboot")

        assert (shown["state"], shown["guest"]["pid"]) == ("running", alpha.guest(instance).process.pid)
        assert "reboot" in await _console(alpha, instance)
        assert (await check(alpha, instance))["consistent"]
        assert await ask(alpha, str(uuid.uuid4()), Request.REBOOT) == "unknown_instance"
        await alpha.client.post(f"/v1/instances/{instance}:stop")
        assert await ask(alpha, instance, Request.REBOOT) == "not_running"


async def test_whoever_reads_moved_finds_the_instance_at_the_destination(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slow its disk is: the instance is there, and only who wants to change it waits for its document."""
    reached, go = threading.Event(), threading.Event()
    promote = DocumentStore.promote_arrival

    def held(store: DocumentStore, migration_id: str, instance_id: str) -> None:
        reached.set()
        assert go.wait(PATIENCE_S)
        promote(store, migration_id, instance_id)

    monkeypatch.setattr(DocumentStore, "promote_arrival", held)
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=stress(2, 500))
        migration = await begin(alpha, beta, instance)

        assert (await wait_outcome(alpha, migration))["outcome"] == "moved"
        assert await trio.to_thread.run_sync(reached.wait, PATIENCE_S)
        assert (await check(beta, instance))["consistent"]
        assert (await beta.instance(instance))["state"] == "running"
        async with trio.open_nursery() as nursery:
            deleted = trio.Event()
            nursery.start_soon(_delete, beta, instance, deleted)
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert not deleted.is_set()
            go.set()

        assert await beta.client.get("/v1/instances") == []
        left = [path.name for path in (tmp_path / "beta").rglob(f"{instance}*") if path.suffix == ".json"]
        assert left == []


async def _delete(host: RunningHost, instance: str, deleted: trio.Event) -> None:
    await host.client.delete(f"/v1/instances/{instance}")
    deleted.set()


async def test_a_guest_that_was_started_this_moment_is_arriving_until_it_runs(tmp_path: Path) -> None:
    """Also for a source that has waited long enough and asks: that it moved, it hears when the instance is there."""
    async with held_at(tmp_path, Position("beta", Standing.FREE, "beta", "run")) as moment:
        alpha, beta = moment.fleet.hosts["alpha"], moment.fleet.hosts["beta"]

        with trio.fail_after(PATIENCE_S):
            while (await alpha.record(moment.migration))["outcome"] != "unknown":
                await trio.testing.wait_all_tasks_blocked(0.01)
        await trio.testing.wait_all_tasks_blocked(0.3)  # it asks several times meanwhile
        outcomes = [(await host.record(moment.migration))["outcome"] for host in (alpha, beta)]
        answers = [await ask(beta, moment.instance, request) for request in (Request.PAUSE, Request.DELETE)]
        with pytest.raises(RequestError, match="is arriving"):
            await beta.instance(moment.instance)

        assert outcomes == ["unknown", None]
        assert answers == ["arriving", "arriving"]
        source, destination = await moment.outcomes()
        assert (source["outcome"], destination["outcome"]) == ("moved", "moved")
        assert (await check(beta, moment.instance))["consistent"]


async def test_a_name_is_free_again_when_all_of_the_deleted_instance_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or its document would be removed after that of the new one was written in its place."""
    reached, go = threading.Event(), threading.Event()
    remove = DocumentStore.remove_instance

    def held(store: DocumentStore, instance_id: str) -> None:
        reached.set()
        assert go.wait(PATIENCE_S)
        remove(store, instance_id)

    monkeypatch.setattr(DocumentStore, "remove_instance", held)
    async with open_fleet(tmp_path, "alpha") as fleet:
        alpha = await fleet.start("alpha")
        instance = await create(alpha, program=stress(2, 500))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_delete, alpha, instance, trio.Event())
            assert await trio.to_thread.run_sync(reached.wait, PATIENCE_S)

            with pytest.raises(VmMigrateError) as caught:
                await create(alpha, id=instance, program=stress(2, 500))
            assert caught.value.code == "instance_exists"
            go.set()

        await create(alpha, id=instance, program=stress(2, 500))
        assert (await alpha.instance(instance))["state"] == "running"
        assert [path.name for path in (tmp_path / "alpha").rglob(f"{instance}.json")]


async def ask(host: RunningHost, instance: str, request: Request) -> str:
    """Ask *host*; the code of its refusal, or `DONE`."""
    path = f"/v1/instances/{instance}"
    try:
        if request is Request.DELETE:
            await host.client.delete(path)
        elif request is Request.TYPE:
            await host.client.post(f"{path}/console", {"port": "com1", "text": "x"})
        elif request is Request.MIGRATE_OUT:
            await host.client.post(f"{path}:migrate-out", {"destination_host": "gamma"})
        elif request is Request.MIGRATE_IN:
            await host.client.post("/v1/migrations:migrate-in", _arrival_of(instance))
        else:
            await host.client.post(f"{path}:{request}")
    except VmMigrateError as refusal:
        return refusal.code
    return DONE


def _arrival_of(instance: str) -> dict[str, Any]:
    return {
        "migration_id": str(uuid.uuid4()),
        "instance_id": instance,
        "source_host": "gamma",
        "source_address": "127.0.0.1:1",
        "source_url": "https://127.0.0.1:1",
        "ticket": "0" * 64,
    }


# --------------------------------------------------------------------------- the guest's own deeds

RUNNING_HERE = ["awaiting its peer", "before pre-copy", "about to pause"]


@pytest.mark.parametrize("position", RUNNING_HERE)
async def test_a_guest_that_powers_itself_off_is_stopped_and_does_not_move(tmp_path: Path, position: str) -> None:
    """Both sides say `guest_powered_off`; it is stopped, not lost, and can be started again at its host."""
    async with held_at(tmp_path, POSITIONS[position]) as moment:
        alpha, beta = moment.fleet.hosts["alpha"], moment.fleet.hosts["beta"]

        await _press(alpha, moment.instance, "p")
        await _wait_state(alpha, moment.instance, "stopped")
        source, destination = await moment.outcomes()

        assert (source["outcome"], source["error"]["code"]) == ("failed", "guest_powered_off")
        if position == "awaiting its peer":  # it came when all was over
            assert destination["error"]["code"] == "ticket_used"
        else:
            assert (destination["outcome"], destination["error"]["code"]) == ("failed", "guest_powered_off")
        assert await beta.client.get("/v1/instances") == []
        await alpha.client.post(f"/v1/instances/{moment.instance}:start")
        assert (await alpha.instance(moment.instance))["state"] == "running"


@pytest.mark.parametrize("position", RUNNING_HERE)
async def test_a_guest_that_reboots_while_it_moves_arrives_as_it_is(tmp_path: Path, position: str) -> None:
    """A reboot is a change of memory and devices like any other: the migration goes on."""
    async with held_at(tmp_path, POSITIONS[position]) as moment:
        alpha, beta = moment.fleet.hosts["alpha"], moment.fleet.hosts["beta"]
        await wait_filled(alpha, moment.instance, 2 * 256)

        await _press(alpha, moment.instance, "r")
        await _wait_console(alpha, moment.instance, "reboot")
        source, destination = await moment.outcomes()

        assert (source["outcome"], destination["outcome"]) == ("moved", "moved"), source
        assert "reboot" in await _console(beta, moment.instance)
        await wait_filled(beta, moment.instance, 2 * 256)
        assert (await check(beta, moment.instance))["consistent"]
        assert witnesses(moment.fleet, moment.instance).single


async def test_a_guest_that_reboots_between_rounds_arrives_whole(tmp_path: Path) -> None:
    """All its memory is cleared and filled again while rounds are sent; both hosts hash all of it at the end."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=stress(16, 40_000, **OBEYS_KEYS))
        await wait_filled(alpha, instance, 16 * 256)
        options = {"downtime_ms": 1, "max_rounds": 12, "force": True, "verify": "full"}
        migration = await begin(alpha, beta, instance, **options)
        await _wait_rounds(alpha, migration, 2)

        await _press(alpha, instance, "r")

        source, destination = await wait_outcome(alpha, migration), await wait_outcome(beta, migration)
        assert (source["outcome"], destination["outcome"]) == ("moved", "moved"), source
        assert "reboot" in await _console(beta, instance)
        await wait_filled(beta, instance, 16 * 256)
        assert (await check(beta, instance))["consistent"]


@pytest.mark.parametrize(
    ("position", "end"),
    [(position, "crash") for position in RUNNING_HERE] + [(position, "kill") for position in [*RUNNING_HERE, "paused"]],
)
async def test_a_guest_that_dies_at_its_source_is_lost_and_both_sides_say_so(
    tmp_path: Path, position: str, end: str
) -> None:
    """Crashed by what runs in it (which a paused guest cannot), or its process killed: the same outcome."""
    async with held_at(tmp_path, POSITIONS[position]) as moment:
        alpha, beta = moment.fleet.hosts["alpha"], moment.fleet.hosts["beta"]

        await _end(alpha, moment.instance, end)
        await _wait_state(alpha, moment.instance, "lost")
        source, destination = await moment.outcomes()

        assert (source["outcome"], source["error"]["code"]) == ("guest_lost", "guest_lost")
        if position == "awaiting its peer":
            assert destination["error"]["code"] == "ticket_used"
        else:
            assert (destination["outcome"], destination["error"]["code"]) == ("guest_lost", "guest_lost")
        assert await beta.client.get("/v1/instances") == []


@pytest.mark.parametrize(("position", "step"), [("arriving", "import_devices"), ("taken over", "open_backends")])
async def test_a_guest_that_dies_where_it_arrives_is_no_loss(tmp_path: Path, position: str, step: str) -> None:
    """Before `started` the guest is the one at the source: it goes on there, and both sides say what died."""
    where = Position("beta", POSITIONS[position].standing, "beta", step)
    async with held_at(tmp_path, where) as moment:
        alpha, beta = moment.fleet.hosts["alpha"], moment.fleet.hosts["beta"]

        await _kill(beta, moment.instance)
        source, destination = await moment.outcomes()

        assert (source["outcome"], destination["outcome"]) == ("failed", "failed")
        assert source["error"]["code"] == destination["error"]["code"] == "arriving_guest_lost"
        assert (await alpha.instance(moment.instance))["state"] == "running"
        assert await beta.client.get("/v1/instances") == []
        await wait_heartbeats(alpha, moment.instance)
        assert (await migrate(alpha, beta, moment.instance))["outcome"] == "moved"
        assert witnesses(moment.fleet, moment.instance).single


async def test_a_source_that_loses_its_copy_in_doubt_still_lets_the_guest_move(tmp_path: Path) -> None:
    """The one at the destination is the guest by then."""
    async with held_at(tmp_path, POSITIONS["in doubt"]) as moment:
        alpha = moment.fleet.hosts["alpha"]
        ram = alpha.guest(moment.instance).ram
        await _kill(alpha, moment.instance)
        await _wait_freed(ram)

        source, destination = await moment.outcomes()

        assert (source["outcome"], destination["outcome"]) == ("moved", "moved")
        assert source["integrity"] == {"rehash": "not_done", "reason": "the guest process had ended"}
        await wait_heartbeats(moment.fleet.hosts["beta"], moment.instance)
        assert (await moment.fleet.hosts["alpha"].instance(moment.instance))["state"] == "elsewhere"


async def test_a_key_that_nobody_has_read_yet_is_obeyed_where_the_guest_arrives(tmp_path: Path) -> None:
    """A paused guest does nothing; it moves with what was typed, and powers itself off when it runs on. It moved."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program={"name": "idle", **OBEYS_KEYS})
        await alpha.client.post(f"/v1/instances/{instance}:pause")
        await _press(alpha, instance, "p")

        record = await migrate(alpha, beta, instance)
        assert (record["outcome"], (await beta.instance(instance))["state"]) == ("moved", "paused")
        await beta.client.post(f"/v1/instances/{instance}:start")

        await _wait_state(beta, instance, "stopped")
        assert (await alpha.instance(instance))["state"] == "elsewhere"


@pytest.mark.parametrize(("key", "state"), [("p", "stopped"), ("c", "lost")])
async def test_what_a_guest_did_while_there_was_no_daemon_is_found_at_the_restart(
    tmp_path: Path, key: str, state: str
) -> None:
    async with open_fleet(tmp_path, "alpha") as fleet:
        alpha = await fleet.start("alpha")
        instance = await create(alpha, program={"name": "idle", **OBEYS_KEYS})
        guest = alpha.guest(instance)
        await alpha.stop()
        link = GuestLink(guest.process.socket_path)
        _, fds = await link.open()
        close_all(fds)
        await link.request("console_input", port="com1", keys=key.encode())
        link.close()
        if state == "lost":
            await _wait_gone(guest.process.pid)

        alpha = await fleet.start("alpha")

        await _wait_state(alpha, instance, state)


# --------------------------------------------------------------------------- steps


async def _end(host: RunningHost, instance: str, how: str) -> None:
    if how == "kill":
        await _kill(host, instance)
    else:
        await _press(host, instance, "c")


async def _wait_freed(ram: GuestRam) -> None:
    with trio.fail_after(PATIENCE_S):
        while True:
            try:
                ram.populated()
            except HypervisorError:
                return
            await trio.sleep(0.01)


async def _kill(host: RunningHost, instance: str) -> None:
    os.kill(host.guest(instance).process.pid, signal.SIGKILL)


async def _press(host: RunningHost, instance: str, key: str) -> None:
    """At the guest itself: "about to pause" the daemon lets nobody type any more, and the guest runs still."""
    await host.guest(instance).console_input("com1", key.encode())


async def _console(host: RunningHost, instance: str) -> str:
    history = await host.client.get(f"/v1/instances/{instance}/console", port="com1")
    return str(history["beginning"])


async def _wait_console(host: RunningHost, instance: str, text: str) -> None:
    with trio.fail_after(PATIENCE_S):
        while text not in await _console(host, instance):
            await trio.sleep(0.01)


async def _wait_state(host: RunningHost, instance: str, state: str) -> None:
    with trio.fail_after(PATIENCE_S):
        while (await host.instance(instance))["state"] != state:
            await trio.sleep(0.01)


async def _wait_rounds(host: RunningHost, migration: str, rounds: int) -> None:
    with trio.fail_after(PATIENCE_S):
        while len((await host.record(migration))["ram"]["rounds"]) < rounds:
            await trio.sleep(0.01)


async def _wait_gone(pid: int) -> None:
    watched = os.pidfd_open(pid)
    try:
        with trio.fail_after(PATIENCE_S):
            await trio.lowlevel.wait_readable(watched)
    finally:
        os.close(watched)
