"""The handoff: given away and unanswered, refused, returned. The source never guesses; evidence resolves it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import trio

from tests.migration.fleet import (
    ObservedHypervisor,
    RunningHost,
    begin,
    check,
    create,
    migrate,
    open_fleet,
    stress,
    wait_heartbeats,
    wait_in_doubt,
    wait_outcome,
    witnesses,
)
from vmmigrate.devices.payload import DevicePayload
from vmmigrate.errors import HypervisorError, VmMigrateError
from vmmigrate.hypervisor.base import Guest, GuestPlan, GuestStamp


class SlowToOpen(ObservedHypervisor):
    """A host whose disks and NICs open only when the test lets them."""

    may_open = trio.Event()
    is_opening = trio.Event()

    async def build(self, plan: GuestPlan, stamp: GuestStamp, *, for_migration: bool) -> Guest:
        guest = await super().build(plan, stamp, for_migration=for_migration)
        really_open = guest.open_backends

        async def open_backends(epoch: tuple[int, int]) -> None:
            self.is_opening.set()
            await self.may_open.wait()
            await really_open(epoch)

        guest.open_backends = open_backends  # type: ignore[method-assign]
        return guest


class UnableToOpen(ObservedHypervisor):
    """A host that can build the guest and then cannot open its disks."""

    async def build(self, plan: GuestPlan, stamp: GuestStamp, *, for_migration: bool) -> Guest:
        guest = await super().build(plan, stamp, for_migration=for_migration)

        async def open_backends(epoch: tuple[int, int]) -> None:
            raise HypervisorError("no disk will open here", code="backend_unavailable")

        guest.open_backends = open_backends  # type: ignore[method-assign]
        return guest


class HangsInTheKernel(UnableToOpen):
    """And whose guest's process cannot be ended for a while, as one that waits for a dead disk."""

    may_end = trio.Event()

    async def build(self, plan: GuestPlan, stamp: GuestStamp, *, for_migration: bool) -> Guest:
        guest = await super().build(plan, stamp, for_migration=for_migration)
        really_destroy = guest.destroy

        async def destroy() -> bool:
            with trio.move_on_after(0.05):
                await self.may_end.wait()
                return await really_destroy()
            return False

        guest.destroy = destroy  # type: ignore[method-assign]
        return guest


class TellsWhenImported(ObservedHypervisor):
    """A host that calls back once the source has sent all but the handoff."""

    on_import: Callable[[], None] = staticmethod(lambda: None)

    async def build(self, plan: GuestPlan, stamp: GuestStamp, *, for_migration: bool) -> Guest:
        guest = await super().build(plan, stamp, for_migration=for_migration)
        really_import = guest.import_devices

        async def import_devices(payloads: Sequence[DevicePayload]) -> Sequence[tuple[str, str]]:
            self.on_import()
            return await really_import(payloads)

        guest.import_devices = import_devices  # type: ignore[method-assign]
        return guest


class Wire:
    """A TCP relay to the migration port of a source, which can be made to swallow what the sides say."""

    def __init__(self, port: int, deaf_sides: str) -> None:
        self._port = port
        self._deaf_sides = deaf_sides
        self.swallows = False
        self.swallows_ready = False
        self._ready_passed = False

    async def run(self, task_status: trio.TaskStatus[int]) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        task_status.started(listeners[0].socket.getsockname()[1])
        await trio.serve_listeners(self._relay, listeners)

    async def _relay(self, destination: trio.SocketStream) -> None:
        source = await trio.open_tcp_stream("127.0.0.1", self._port)
        async with source, trio.open_nursery() as nursery:
            nursery.start_soon(self._copy, destination, source, self._swallows_destination)
            nursery.start_soon(self._copy, source, destination, lambda: self.swallows)

    def _swallows_destination(self) -> bool:
        """From Ready on, which is the one thing that the destination says between its import and the end."""
        if not (self.swallows and self._deaf_sides == "both"):
            return False
        ready_passed, self._ready_passed = self._ready_passed, True
        return ready_passed or self.swallows_ready

    async def _copy(self, source: trio.SocketStream, sink: trio.SocketStream, swallows: Callable[[], bool]) -> None:
        try:
            async for chunk in source:
                if not swallows():
                    await sink.send_all(chunk)
            await sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # an end went away, which is what the tests are about


async def test_a_source_without_an_answer_stays_paused_asks_and_learns_that_the_guest_runs(tmp_path: Path) -> None:
    """In doubt: nothing may be done with the guest, nobody can cancel; `started` at the destination resolves it."""
    SlowToOpen.may_open, SlowToOpen.is_opening = trio.Event(), trio.Event()
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha", limits="verdict_s = 0.5")
        beta = await fleet.start("beta", hypervisor_class=SlowToOpen)
        instance = await create(alpha, program=stress(2, 500))
        migration = await begin(alpha, beta, instance)

        with trio.fail_after(30):
            await SlowToOpen.is_opening.wait()
        await wait_in_doubt(alpha, migration)

        shown = await alpha.instance(instance)
        assert (shown["state"], shown["guest"]["run_state"]) == ("in_doubt", "paused")
        assert await _codes_of_everything_forbidden(alpha, instance, migration) == {"in_doubt"}
        assert await _refusal(beta, f"/v1/migrations/{migration}:cancel") == "verdict_given"
        SlowToOpen.may_open.set()

        assert (await wait_outcome(alpha, migration))["outcome"] == "moved"
        assert (await wait_outcome(beta, migration))["outcome"] == "moved"
        await wait_heartbeats(beta, instance)
        assert (await alpha.instance(instance))["state"] == "elsewhere"
        owners = witnesses(fleet, instance)
        assert (owners.single, owners.hosts) == (True, ("alpha", "beta")), owners.problems


@pytest.mark.parametrize("deaf_sides", [pytest.param("destination", marks=pytest.mark.slow), "both"])
async def test_a_handoff_that_never_arrives_is_refused_and_the_source_takes_the_guest_back(
    tmp_path: Path, deaf_sides: str
) -> None:
    """The destination refuses itself after its window, durably; only then the source resumes, at epoch N+2.

    The source hears of it at once when the link still carries the refusal, and else by asking.
    """
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha", limits="verdict_s = 1.5")
        beta = await fleet.start("beta", hypervisor_class=TellsWhenImported, limits="handoff_window_s = 0.5")
        instance = await create(alpha, program=stress(2, 500))
        wire = Wire(alpha.facts["migration"], deaf_sides)
        port = await fleet.nursery.start(wire.run)
        TellsWhenImported.on_import = staticmethod(lambda: setattr(wire, "swallows", True))

        record = await migrate(alpha, beta, instance, source_address=f"127.0.0.1:{port}")

        assert (record["outcome"], record["error"]["code"]) == ("failed", "timed_out"), record
        shown = await alpha.instance(instance)
        assert (shown["state"], shown["epoch"]) == ("running", [1, 3])
        assert shown["guest"]["backends_open"]
        await wait_heartbeats(alpha, instance)
        assert await beta.client.get("/v1/instances") == []
        assert (await check(alpha, instance))["consistent"]
        owners = witnesses(fleet, instance)
        assert (owners.single, owners.hosts) == (True, ("alpha",)), owners.problems
        TellsWhenImported.on_import = staticmethod(lambda: None)
        assert (await migrate(alpha, beta, instance))["outcome"] == "moved"


async def test_a_destination_that_cannot_open_the_disks_returns_the_guest(tmp_path: Path) -> None:
    """Acquired, never started, returned durably: the source runs it again and a later attempt elsewhere succeeds."""
    async with open_fleet(tmp_path, "alpha", "beta", "gamma") as fleet:
        alpha, gamma = await fleet.start("alpha"), await fleet.start("gamma")
        beta = await fleet.start("beta", hypervisor_class=UnableToOpen)
        instance = await create(alpha, program=stress(2, 500))

        record = await migrate(alpha, beta, instance)

        assert (record["outcome"], record["error"]["code"]) == ("failed", "backend_unavailable"), record
        shown = await alpha.instance(instance)
        assert (shown["state"], shown["epoch"]) == ("running", [1, 3])
        await wait_heartbeats(alpha, instance)
        moved = await migrate(alpha, gamma, instance, verify="full")
        assert moved["outcome"] == "moved", moved
        assert (await check(gamma, instance))["consistent"]
        owners = witnesses(fleet, instance)
        assert (owners.single, owners.hosts) == (True, ("alpha", "gamma")), owners.problems


async def test_a_guest_is_not_returned_before_its_process_is_gone(tmp_path: Path) -> None:
    """It may still write to the disks: until then the source hears `pending`, and its guest stays paused."""
    HangsInTheKernel.may_end = trio.Event()
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha", limits="verdict_s = 0.3")
        beta = await fleet.start("beta", hypervisor_class=HangsInTheKernel)
        instance = await create(alpha, program=stress(2, 500))
        migration = await begin(alpha, beta, instance)
        await wait_in_doubt(alpha, migration)

        assert (await beta.client.get(f"/v1/migrations/{migration}/side"))["verdict"] == "pending"
        assert (await alpha.instance(instance))["guest"]["run_state"] == "paused"
        HangsInTheKernel.may_end.set()

        assert (await wait_outcome(alpha, migration))["error"]["code"] == "backend_unavailable"
        await wait_heartbeats(alpha, instance)


async def test_a_source_restarted_in_doubt_stays_paused_until_it_has_asked(tmp_path: Path) -> None:
    """The daemon goes between `released` and the answer; the next one settles before it touches the guest."""
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
        alpha = await fleet.start("alpha")

        assert (await alpha.instance(instance))["state"] == "in_doubt"
        assert (await alpha.instance(instance))["guest"]["run_state"] == "paused"
        SlowToOpen.may_open.set()
        assert (await wait_outcome(alpha, migration))["outcome"] == "moved"
        await wait_heartbeats(beta, instance)
        owners = witnesses(fleet, instance)
        assert (owners.single, owners.hosts) == (True, ("alpha", "beta")), owners.problems


async def _codes_of_everything_forbidden(host: RunningHost, instance: str, migration: str) -> set[str]:
    path = f"/v1/instances/{instance}"
    return {
        await _refusal(host, f"{path}:start"),
        await _refusal(host, f"{path}:stop"),
        await _refusal(host, f"{path}:pause"),
        await _refusal(host, f"{path}:migrate-out", {"destination_host": "beta"}),
        await _refusal(host, f"/v1/migrations/{migration}:cancel"),
    }


async def _refusal(host: RunningHost, path: str, body: dict[str, object] | None = None) -> str:
    with pytest.raises(VmMigrateError) as refusal:
        await host.client.post(path, body)
    return refusal.value.code
