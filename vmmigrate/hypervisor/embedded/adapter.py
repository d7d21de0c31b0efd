"""The embedded adapter: builds embedded guests and finds them again.

Socket work goes through trio; spawning, mapping, scanning and freeing happen in worker threads with limiters of their
own. A build that fails or is cancelled leaves nothing: no process, descriptor, socket or file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Self

import trio

import vmmigrate
from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor import processes
from vmmigrate.hypervisor.base import (
    Capabilities,
    Capability,
    FoundGuest,
    Guest,
    GuestPlan,
    GuestProcess,
    GuestStamp,
)
from vmmigrate.hypervisor.dirty import DirtyTracker, KernelTracker, SoftwareTracker, probe_kernel_tracking
from vmmigrate.hypervisor.embedded import finding, plans, spawn
from vmmigrate.hypervisor.embedded.link import GuestLink, close_all
from vmmigrate.hypervisor.embedded.programs import program_problems
from vmmigrate.hypervisor.embedded.remote import EmbeddedGuest
from vmmigrate.hypervisor.rammap import MappedRam, probe_huge_pages

TrackingChoice = Literal["auto", "kernel", "software"]
WrapTracker = Callable[[DirtyTracker], DirtyTracker]

REQUEST_DEADLINE_S: Final = 10.0
START_DEADLINE_S: Final = 30.0

_NO_FOREIGNERS: Final = 'only a host with hypervisor = "qemu" can adopt what something else started'


class EmbeddedHypervisor:
    """Implements `base.Hypervisor`. Made by `open`.

    Attributes:
        runtime_dir: Sockets, logs and witnesses of running guests; mode 0700.
        wrap_tracker: A fault to inject: what it returns is asked for dirty pages instead of the real tracker.
    """

    def __init__(
        self,
        runtime_dir: Path,
        capabilities: Capabilities,
        *,
        witness_dir: Path | None = None,
        wrap_tracker: WrapTracker | None = None,
        request_deadline_s: float = REQUEST_DEADLINE_S,
        start_deadline_s: float = START_DEADLINE_S,
    ) -> None:
        self.runtime_dir = runtime_dir
        self.capabilities = capabilities
        self.wrap_tracker = wrap_tracker
        self._witness_dir = witness_dir
        self._request_deadline_s = request_deadline_s
        self._start_deadline_s = start_deadline_s
        self._threads = trio.CapacityLimiter(4)

    @classmethod
    async def open(
        cls,
        runtime_dir: Path,
        *,
        dirty_tracking: TrackingChoice = "auto",
        witness_dir: Path | None = None,
        **options: Any,
    ) -> Self:
        """Prepare *runtime_dir* and probe this host.

        Args:
            dirty_tracking: "auto" takes the kernel's when it works.
            witness_dir: Witnesses are written there and outlive their guests; by default they lie in *runtime_dir*
                and go with them.
            options: `wrap_tracker`, `request_deadline_s`, `start_deadline_s`.

        Raises:
            HypervisorError: `runtime_dir`; `dirty_tracking`: "kernel" was asked for and does not work here.
        """
        await trio.to_thread.run_sync(
            processes.prepare_runtime_dir, runtime_dir, "0" * 2 * processes.TOKEN_BYTES + ".sock"
        )
        if witness_dir is not None:
            await trio.Path(witness_dir).mkdir(parents=True, exist_ok=True)
        reason = "asked for"
        if dirty_tracking != "software":
            reason = await trio.to_thread.run_sync(probe_kernel_tracking)
        if dirty_tracking == "kernel" and reason:
            raise HypervisorError(f"kernel dirty tracking does not work here: {reason}", code="dirty_tracking")
        huge_pages = await trio.to_thread.run_sync(probe_huge_pages)
        return cls(runtime_dir, _capabilities(reason, huge_pages), witness_dir=witness_dir, **options)

    def problems(self, plan: GuestPlan) -> list[str]:
        parameters = dict(plan.program)
        return program_problems(str(parameters.pop("name", "idle")), parameters)

    async def build(self, plan: GuestPlan, stamp: GuestStamp, *, for_migration: bool) -> Guest:
        if plan.instance_id != stamp.instance_id:
            text = f"the plan is for instance {plan.instance_id}, the stamp for {stamp.instance_id}"
            raise HypervisorError(text, code="wrong_guest")
        config = {
            "plan": plans.plan_to_map(plan),
            "stamp": plans.stamp_to_map(stamp),
            "for_migration": for_migration,
            "kernel_tracking": self.capabilities.dirty_tracking == "kernel",
        }
        watch, files = await trio.to_thread.run_sync(
            spawn.spawn, self.runtime_dir, self._witness_dir, config, limiter=self._threads
        )
        guest = self._guest(plan, watch, files)
        try:
            await self._attach(guest, writable=for_migration, adopted=False)
        except BaseException:
            await guest.destroy()
            raise
        return guest

    async def adopt(self, stamp: GuestStamp, plan: GuestPlan, process: GuestProcess) -> Guest | None:
        files = self._files(process.socket_path)
        watch = await trio.to_thread.run_sync(processes.find, process.pid, process.start_ticks, limiter=self._threads)
        if watch is None:
            await trio.to_thread.run_sync(files.remove, limiter=self._threads)
            return None
        guest = self._guest(plan, watch, files)
        try:
            answer = await self._attach(guest, writable=False, adopted=True)
            found = plans.stamp_from_map(answer["status"]["stamp"])
            if (found.instance_id, found.host_id) != (stamp.instance_id, stamp.host_id):
                text = f"process {process.pid} is instance {found.instance_id} of host {found.host_id}"
                raise HypervisorError(f"{text}, not {stamp.instance_id} of {stamp.host_id}", code="wrong_guest")
        except BaseException:
            guest.detach()
            raise
        return guest

    async def adopt_foreign(self, plan: GuestPlan, stamp: GuestStamp, monitor: Path, pid: int | None) -> Guest:
        raise HypervisorError(_NO_FOREIGNERS, code="not_supported")

    async def identity_of(self, monitor: Path) -> str | None:
        raise HypervisorError(_NO_FOREIGNERS, code="not_supported")

    async def give_back(self, guest: Guest) -> None:
        """There is none that could be given back."""

    async def find_others(self, known: Collection[Path]) -> Sequence[FoundGuest]:
        found: list[FoundGuest] = []

        async def look_at(socket: Path) -> None:
            try:
                guest = await finding.greet(socket, self._request_deadline_s)
            except ConnectionRefusedError:
                await trio.to_thread.run_sync(self._files(socket).remove, limiter=self._threads)
                return
            if guest is not None:
                found.append(guest)

        async with trio.open_nursery() as nursery:
            for socket in sorted(self.runtime_dir.glob("*.sock")):
                if socket not in known:
                    nursery.start_soon(look_at, socket)
        return found

    async def silence(self, process: GuestProcess, epoch: tuple[int, int], record: int) -> bool:
        return await finding.silence(process, epoch, record, self._request_deadline_s)

    async def end_leftover(self, process: GuestProcess) -> bool:
        files = self._files(process.socket_path)
        return await trio.to_thread.run_sync(_end_process, process, files, limiter=self._threads)

    def _files(self, socket: Path) -> spawn.GuestFiles:
        return spawn.GuestFiles.in_directory(socket.parent, socket.stem, self._witness_dir)

    def _guest(self, plan: GuestPlan, watch: processes.ProcessWatch, files: spawn.GuestFiles) -> EmbeddedGuest:
        process = GuestProcess(watch.pid, watch.start_ticks, files.socket)
        return EmbeddedGuest(
            plan=plan,
            process=process,
            watch=watch,
            files=files,
            link=GuestLink(files.socket),
            request_deadline_s=self._request_deadline_s,
        )

    async def _attach(self, guest: EmbeddedGuest, *, writable: bool, adopted: bool) -> dict[str, Any]:
        """Shake hands, map RAM and take over the tracker's descriptors.

        Raises:
            HypervisorError: What the guest says, `guest_lost`, `guest_unresponsive`, `guest_unreachable`.
        """
        with trio.move_on_after(self._start_deadline_s):
            answer, fds = await guest.shake_hands()
            memory, *tracking_fds = fds
            ram = await self._mapped(guest, memory, tracking_fds, writable)
            tracker: DirtyTracker = SoftwareTracker(guest.request, guest.plan.layout.pages)
            if tracking_fds:
                uffd, pagemap = tracking_fds
                tracker = KernelTracker(uffd, pagemap, answer["address"], guest.plan.layout.pages)
            wrapped = self.wrap_tracker(tracker) if self.wrap_tracker else tracker
            guest.attach(ram, wrapped, answer["tracking_reason"], tracks=adopted)
            return answer
        text = f"guest {guest.plan.instance_id} did not answer within {self._start_deadline_s:g} s"
        raise HypervisorError(text, code="guest_unresponsive")

    async def _mapped(self, guest: EmbeddedGuest, memory: int, tracking_fds: list[int], writable: bool) -> MappedRam:
        huge = self.capabilities.huge_pages.available
        try:
            return await guest.in_thread(
                lambda: MappedRam(memory, guest.plan.layout, writable=writable, huge_pages=huge)
            )
        except BaseException as exc:
            close_all([memory, *tracking_fds])
            if isinstance(exc, (OSError, ValueError, HypervisorError)):
                raise HypervisorError(f"cannot map guest RAM: {exc}", code="ram_map") from exc
            raise


def _capabilities(no_kernel_tracking: str, huge_pages: Capability) -> Capabilities:
    return Capabilities(
        hypervisor="embedded",
        version=vmmigrate.__version__,
        dirty_tracking="software" if no_kernel_tracking else "kernel",
        dirty_tracking_reason=no_kernel_tracking or "userfaultfd write-protect and PAGEMAP_SCAN work here",
        huge_pages=huge_pages,
        throttle=Capability(True, "slices of the program's work are left out; the heartbeat goes on"),
        facts={
            "hypervisor": "embedded",
            "hypervisor_version": vmmigrate.__version__,
            "loads_versions": vmmigrate.__version__,
            "machine_types": "embedded",
            "cpu_models": "embedded",
        },
    )


def _end_process(process: GuestProcess, files: spawn.GuestFiles) -> bool:
    """End it, if it is still there, and remove its files. Raises: HypervisorError `guest_unresponsive`."""
    was_there = processes.end_process(process)
    files.remove()
    return was_there
