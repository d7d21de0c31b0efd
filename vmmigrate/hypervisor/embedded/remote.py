"""One embedded guest, as its daemon sees it.

Foreign errors are mapped here: a guest process that is gone is `guest_lost`, one that does not answer within the
deadline is `guest_unresponsive`, one that talks to another daemon now is `guest_taken_over`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import trio

import vmmigrate
from vmmigrate.devices.payload import DevicePayload
from vmmigrate.devices.time import Adjustment, TimeData
from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.base import (
    ConsoleHistory,
    GuestPlan,
    GuestProcess,
    GuestRam,
    GuestStamp,
    GuestStatus,
    PayloadDescription,
    SelfCheck,
)
from vmmigrate.hypervisor.dirty import DirtyTracker
from vmmigrate.hypervisor.embedded import plans
from vmmigrate.hypervisor.embedded.link import GuestLink
from vmmigrate.hypervisor.embedded.spawn import GuestFiles
from vmmigrate.hypervisor.processes import END_DEADLINE_S, ProcessWatch
from vmmigrate.hypervisor.rammap import MappedRam
from vmmigrate.memory import GIB, PageBitmap

T = TypeVar("T")

_ASK_AGAIN_S: Final = 1.0
_DYING_S: Final = 1.0  # how long after a cut connection a process may take to be seen dead
_SELF_CHECK_S_PER_GIB: Final = 60.0


class EmbeddedGuest:
    """Implements `base.Guest`.

    Attributes:
        plan: What it was built from.
        process: How it is found again.
        ram: Read-only, or writable while it is under construction.
        tracker: Where dirty marks come from.
        tracking_reason: Why it is software, if it is.
        witness_path: The guest process' own record of when it ran.
    """

    def __init__(
        self,
        *,
        plan: GuestPlan,
        process: GuestProcess,
        watch: ProcessWatch,
        files: GuestFiles,
        link: GuestLink,
        request_deadline_s: float,
    ) -> None:
        self.plan = plan
        self.process = process
        self.witness_path = files.witness
        self.end_deadline_s = END_DEADLINE_S
        self.tracking_reason = ""
        self._watch, self._files, self._link = watch, files, link
        self._request_deadline_s = request_deadline_s
        self._put_back: PageBitmap | None = None
        self._mapped: MappedRam | None = None
        self._tracker: DirtyTracker | None = None
        self._gone = False
        self._threads = trio.CapacityLimiter(2)

    @property
    def facts(self) -> Mapping[str, str]:
        """What it is to this hypervisor."""
        return {
            "hypervisor": "embedded",
            "hypervisor_version": vmmigrate.__version__,
            "machine_type": "embedded",
            "cpu_model": "embedded",
            "device_tree": plans.device_tree(self.plan),
        }

    def attach(self, ram: MappedRam, tracker: DirtyTracker, tracking_reason: str, *, tracks: bool) -> None:
        """Complete the guest after the handshake. *tracks*: marks may be on already (an adopted guest)."""
        self.ram: GuestRam = ram
        self._mapped = ram
        self.tracker = self._tracker = tracker
        self.tracking_reason = tracking_reason
        self._tracks = tracks

    # -- running ---------------------------------------------------------------------------------------------------

    async def status(self) -> GuestStatus:
        return plans.status_from_map(await self.request("status"))

    async def run(self, epoch: tuple[int, int]) -> None:
        await self.request("run", epoch=list(epoch))

    async def pause(self) -> None:
        await self.request("pause")

    async def reboot(self) -> None:
        await self.request("reboot")

    async def wait_power_off(self) -> None:
        while not self._gone:
            with contextlib.suppress(OSError, EOFError, HypervisorError):
                await self._link.request("wait_power_off")
                return
            # Another request broke the connection off, or the process is ending: `wait_exit` tells that.
            await trio.sleep(_ASK_AGAIN_S)
        await trio.sleep_forever()

    async def pause_for_handoff(self, migration_id: str) -> None:
        await self.request("pause_for_handoff", migration_id=migration_id)

    async def open_backends(self, epoch: tuple[int, int]) -> None:
        await self.request("open_backends", epoch=list(epoch))

    async def close_backends(self) -> None:
        await self.request("close_backends")

    async def note_record(self, journal_id: str, number: int) -> None:
        await self.request("note_record", journal_id=journal_id, number=number)

    async def silence(self, epoch: tuple[int, int], record: int) -> None:
        await self.request("silence", epoch=list(epoch), record=record)

    async def restamp(self, stamp: GuestStamp) -> None:
        await self.request("restamp", stamp=plans.stamp_to_map(stamp))

    # -- dirty pages -----------------------------------------------------------------------------------------------

    async def start_tracking(self) -> None:
        """Marks start clear, also those put back: what follows is a migration, and it sends all populated pages."""
        self._put_back = None
        await self._tracked(self.tracker.start)
        self._check_alive()
        self._tracks = True

    async def take_dirty(self) -> PageBitmap:
        if not self._tracks:
            raise HypervisorError("dirty tracking is not on", code="not_tracking")
        # To the end, once begun: marks that were cleared and whose answer nobody heard would be lost writes.
        with trio.CancelScope(shield=True):
            taken = await self._tracked(self.tracker.take)
        self._check_alive()
        if self._put_back is not None:
            taken |= self._put_back
            self._put_back = None
        return taken

    async def _tracked(self, call: Callable[[], Awaitable[T]]) -> T:
        """What the tracker says. Raises: HypervisorError: `guest_lost` goes before what the tracker made of it."""
        try:
            return await call()
        except HypervisorError as exc:
            if isinstance(exc.__cause__, ProcessLookupError):
                # The memory of a dying process goes before the process does.
                with trio.move_on_after(_DYING_S):
                    await self._wait_gone()
            self._check_alive()
            raise

    async def mark_dirty(self, pages: PageBitmap) -> None:
        """Put marks back into the next `take_dirty`.

        They are kept in this daemon, not in the kernel, and die with it; `start_tracking` drops them too. Both are
        safe because a migration begins with all populated pages.
        """
        self._put_back = pages.copy() if self._put_back is None else self._put_back | pages

    async def stop_tracking(self) -> None:
        self._tracks = False
        self._put_back = None
        await self._tracked(self.tracker.stop)

    # -- moving ----------------------------------------------------------------------------------------------------

    async def export_time(self) -> TimeData:
        return TimeData.from_map(await self.request("export_time"))

    async def import_time(self, time: TimeData) -> Adjustment:
        adjusted = await self.request("import_time", exported=time.to_map())
        return Adjustment(TimeData.from_map(adjusted["time"]), adjusted["clamped"], adjusted["delta_ns"])

    async def list_payloads(self) -> tuple[PayloadDescription, ...]:
        listed = await self.request("list_payloads")
        return tuple(PayloadDescription(name, kind, tuple(vs), optional) for name, kind, vs, optional in listed)

    async def export_devices(self, versions: Mapping[str, int]) -> tuple[DevicePayload, ...]:
        exported = await self.request("export_devices", versions=dict(versions))
        return tuple(DevicePayload(*payload) for payload in exported)

    async def rehearse_export(self, versions: Mapping[str, int]) -> int:
        exported = await self.request("rehearse_export", versions=dict(versions))
        return sum(len(body) for body in exported)

    async def throttle(self, percent: int) -> None:
        await self.request("throttle", percent=percent)

    async def import_devices(self, payloads: Sequence[DevicePayload]) -> tuple[tuple[str, str], ...]:
        """Gives back the optional payloads that were skipped, as (device, kind)."""
        listed = [[p.instance_name, p.kind, p.version, p.body, p.optional] for p in payloads]
        skipped = await self.request("import_devices", payloads=listed)
        return tuple((name, kind) for name, kind in skipped)

    async def console_history(self, port: str) -> ConsoleHistory:
        return ConsoleHistory(port, **await self.request("console_history", port=port))

    async def import_console_history(self, history: ConsoleHistory) -> None:
        await self.request(
            "import_console_history",
            port=history.port,
            beginning=history.beginning,
            rolling=history.rolling,
            total_bytes=history.total_bytes,
        )

    async def console_input(self, port: str, keys: bytes) -> None:
        await self.request("console_input", port=port, keys=keys)

    # -- looking ---------------------------------------------------------------------------------------------------

    async def self_check(self) -> SelfCheck:
        """Check all memory in slices between ticks: the guest need not be paused, and its heartbeat does not stop."""
        deadline_s = self._request_deadline_s + _SELF_CHECK_S_PER_GIB * self.plan.layout.size_bytes / GIB
        return SelfCheck(**await self.request("self_check", deadline_s=deadline_s))

    async def heartbeat_gaps(self) -> Mapping[str, Any]:
        gaps: dict[str, Any] = await self.request("heartbeat_gaps")
        return gaps

    # -- ending ----------------------------------------------------------------------------------------------------

    def release_ram(self) -> GuestRam | None:
        released, self._mapped = self._mapped, None
        return released

    async def destroy(self) -> bool:
        """Kill the process, wait until it is gone, free what belonged to it. Runs to its end even when cancelled."""
        if self._gone:
            return True
        with trio.CancelScope(shield=True):
            self._link.close()
            self._watch.kill()
            with trio.move_on_after(self.end_deadline_s):
                await self._wait_gone()
            gone_already, self._gone = self._gone, not self._is_alive()
            if self._gone and not gone_already:
                await self.in_thread(self._free, self.release_ram())
        return self._gone

    async def wait_exit(self) -> int:
        await self._wait_gone()
        return self._watch.reap()

    def detach(self) -> None:
        if not self._gone:
            self._gone = True
            self._link.close()
            self._let_go(self.release_ram())

    def _free(self, ram: GuestRam | None) -> None:
        if not self._watch.is_alive():
            self._watch.reap()
        self._let_go(ram)
        self._files.remove()

    def _let_go(self, ram: GuestRam | None) -> None:
        if self._tracker is not None:
            self._tracker.close()
        if ram is not None:
            ram.close()
        self._watch.close()

    async def _wait_gone(self) -> None:
        if self._watch.fd < 0:
            return
        watched = os.dup(self._watch.fd)  # two tasks may wait, and trio lets only one wait on a descriptor
        try:
            await trio.lowlevel.wait_readable(watched)
        finally:
            trio.lowlevel.notify_closing(watched)
            os.close(watched)

    # -- seams -----------------------------------------------------------------------------------------------------

    async def shake_hands(self) -> tuple[dict[str, Any], list[int]]:
        """Connect: the guest's answer and its descriptors, which belong to the caller.

        Raises:
            HypervisorError: What the guest says, `guest_lost`, or `guest_unreachable`.
        """
        try:
            return await self._link.open()
        except (OSError, EOFError) as exc:
            error = await self.explain_cut(exc)
            raise error if error.code == "guest_lost" else self._unreachable(exc) from exc

    async def request(self, op: str, *, deadline_s: float | None = None, **args: Any) -> Any:
        """One request to the guest process.

        Raises:
            VmMigrateError: What the guest answered, or `guest_lost`, `guest_unresponsive`, `guest_taken_over`.
        """
        allowed_s = self._request_deadline_s if deadline_s is None else deadline_s
        with trio.move_on_after(allowed_s):
            try:
                return await self._link.request(op, **args)
            except (OSError, EOFError) as exc:
                raise await self.explain_cut(exc) from exc
        self._check_alive()
        text = f"guest {self._name}: no answer to {op} within {allowed_s:g} s"
        raise HypervisorError(text, code="guest_unresponsive")

    async def explain_cut(self, cause: BaseException) -> HypervisorError:
        """What it means that the connection is over: mostly that the process is dead or dying."""
        with trio.move_on_after(_DYING_S):
            await self._wait_gone()
        if not self._is_alive():
            return self._lost()
        text = f"guest {self._name}: the connection is over and the process lives ({cause or type(cause).__name__})"
        return HypervisorError(text, code="guest_taken_over")

    def _check_alive(self) -> None:
        if not self._is_alive():
            raise self._lost()

    def _is_alive(self) -> bool:
        return self._watch.fd >= 0 and self._watch.is_alive()

    def _lost(self) -> HypervisorError:
        last_words = self._files.log_tail()
        text = f"guest {self._name}: its process {self.process.pid} is gone"
        text += f" ({last_words})" if last_words else ""
        return HypervisorError(text, code="guest_lost", details={"pid": self.process.pid})

    def _unreachable(self, cause: BaseException) -> HypervisorError:
        text = f"guest {self._name}: process {self.process.pid} lives, its socket {self.process.socket_path} does not"
        return HypervisorError(f"{text} ({cause or type(cause).__name__})", code="guest_unreachable")

    @property
    def _name(self) -> str:
        return self.plan.instance_id

    async def in_thread(self, call: Callable[..., T], *args: Any) -> T:
        return await trio.to_thread.run_sync(call, *args, limiter=self._threads)
