"""The watch over a guest goes on whatever happens in it, and the daemon with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio

from tests.migration.fleet import ObservedHypervisor, RunningHost, create, open_fleet, stress, wait_heartbeats
from vmmigrate.daemon import watching
from vmmigrate.hypervisor.base import Guest, GuestPlan, GuestStamp


class Stumbles(ObservedHypervisor):
    """A hypervisor with a defect: at one step of a guest it trips over itself, twice; when it ends one, afterwards."""

    step = ""

    async def build(self, plan: GuestPlan, stamp: GuestStamp, *, for_migration: bool) -> Guest:
        guest = await super().build(plan, stamp, for_migration=for_migration)
        really: Callable[[], Awaitable[Any]] = getattr(guest, self.step)
        left = 2

        async def stumble() -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                return await really()
            if self.step == "destroy":
                await really()
            raise OverflowError("integer division result too large for a float")

        setattr(guest, self.step, stumble)
        return guest


async def power_off(host: RunningHost, instance: str) -> None:
    await host.guest(instance).console_input("com1", b"p")


async def kill(host: RunningHost, instance: str) -> None:
    os.kill(host.guest(instance).process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("step", "end", "state"),
    [
        ("wait_power_off", power_off, "stopped"),
        ("wait_power_off", kill, "lost"),
        ("wait_exit", power_off, "stopped"),
        ("wait_exit", kill, "lost"),
        ("destroy", kill, "lost"),
    ],
)
async def test_a_defect_in_the_watch_over_one_guest_costs_neither_it_nor_the_others(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    end: Callable[[RunningHost, str], Awaitable[None]],
    state: str,
) -> None:
    """It is logged once, and how the guest ends is noticed all the same."""
    monkeypatch.setattr(Stumbles, "step", step)
    monkeypatch.setattr(watching, "AGAIN_S", 0.01)
    with structlog.testing.capture_logs() as log:
        async with open_fleet(tmp_path, "alpha") as fleet:
            alpha = await fleet.start("alpha", hypervisor_class=Stumbles)
            ends, other = [await create(alpha, program=stress(2, 500, power_keys=True)) for _ in range(2)]
            await wait_heartbeats(alpha, ends)

            await end(alpha, ends)

            with trio.fail_after(10):
                while (await alpha.instance(ends))["state"] != state:
                    await trio.sleep(0.01)
            await wait_heartbeats(alpha, other)
            told = [entry for entry in log if entry["event"] == "guest.watch_failed" and entry["instance"] == ends]
            assert len(told) == 1
            assert told[0]["exc_info"]
