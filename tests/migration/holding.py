"""Hosts whose steps a test can hold up: a call to the hypervisor, or a write of the journal."""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import trio

from tests.migration.fleet import ObservedHypervisor
from vmmigrate.hypervisor.base import Guest, GuestPlan, GuestStamp

PATIENCE_S: Final = 20.0
STEPS: Final = (
    "pause",
    "pause_for_handoff",
    "take_dirty",
    "export_devices",
    "import_devices",
    "open_backends",
    "run",
)


@dataclass
class Hold:
    """A step that waits. `reached` is set when somebody comes to it; `go` lets everybody pass."""

    reached: trio.Event = field(default_factory=trio.Event)
    go: trio.Event = field(default_factory=trio.Event)

    async def wait_reached(self) -> None:
        with trio.fail_after(PATIENCE_S):
            await self.reached.wait()

    async def stop_here(self) -> None:
        self.reached.set()
        await self.go.wait()


class HoldingHypervisor(ObservedHypervisor):
    """An embedded hypervisor in which building a guest, and the `STEPS` of every guest, can be held up."""

    def hold(self, step: str) -> Hold:
        """From now on the first who comes to *step*, and whoever comes after, waits."""
        hold = self._holds[step] = Hold()
        return hold

    @property
    def _holds(self) -> dict[str, Hold]:
        holds: dict[str, Hold] = self.__dict__.setdefault("holds", {})
        return holds

    async def build(self, plan: GuestPlan, stamp: GuestStamp, *, for_migration: bool) -> Guest:
        if "build" in self._holds:
            await self._holds["build"].stop_here()
        guest = await super().build(plan, stamp, for_migration=for_migration)
        for step in STEPS:
            setattr(guest, step, partial(self._held, step, getattr(guest, step)))
        return guest

    async def _held(self, step: str, really: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        if step in self._holds:
            await self._holds[step].stop_here()
        return await really(*args)


class HeldFsync:
    """The `fsync` of a host; the test decides which call of it waits, and how long. A disk that is slow just then."""

    def __init__(self) -> None:
        self._reached, self._go = threading.Event(), threading.Event()
        self._let_pass: int | None = None

    def hold(self, let_pass: int = 0) -> None:
        """Hold up the call after the next *let_pass* ones."""
        self._let_pass = let_pass

    def go(self) -> None:
        self._go.set()

    async def wait_reached(self) -> None:
        assert await trio.to_thread.run_sync(self._reached.wait, PATIENCE_S)

    def __call__(self, fd: int) -> None:
        left = self._let_pass
        if left is not None:
            self._let_pass = left - 1 if left else None
        if left == 0:
            self._reached.set()
            assert self._go.wait(PATIENCE_S)
        os.fsync(fd)
