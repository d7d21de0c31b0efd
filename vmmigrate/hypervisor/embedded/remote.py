"""One embedded guest, as its daemon sees it.

Foreign errors are mapped here and in `processguest`: a guest process that does not answer within the deadline is
`guest_unresponsive`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import trio

import vmmigrate
from vmmigrate.devices.payload import DevicePayload
from vmmigrate.devices.time import Adjustment, TimeData
from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.base import (
    ConsoleHistory,
    GuestPlan,
    GuestProcess,
    GuestStamp,
    GuestStatus,
    PayloadDescription,
    SelfCheck,
)
from vmmigrate.hypervisor.dirty import DirtyTracker
from vmmigrate.hypervisor.embedded import plans
from vmmigrate.hypervisor.embedded.link import GuestLink
from vmmigrate.hypervisor.embedded.spawn import GuestFiles
from vmmigrate.hypervisor.processes import ProcessWatch
from vmmigrate.hypervisor.processguest import ProcessGuest
from vmmigrate.hypervisor.rammap import MappedRam
from vmmigrate.memory import GIB

_ASK_AGAIN_S: Final = 1.0
_SELF_CHECK_S_PER_GIB: Final = 60.0


class EmbeddedGuest(ProcessGuest):
    """Implements `base.Guest`.

    Attributes:
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
        super().__init__(plan, process, watch)
        self.witness_path = files.witness
        self.tracking_reason = ""
        self._files, self._link = files, link
        self._request_deadline_s = request_deadline_s

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
        self.attach_ram(ram, tracker, tracks=tracks)
        self.tracking_reason = tracking_reason

    def hang_up(self) -> None:
        self._link.close()

    def remove_files(self) -> None:
        self._files.remove()

    def last_words(self) -> str:
        return self._files.log_tail()

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
        self.check_alive()
        text = f"guest {self.plan.instance_id}: no answer to {op} within {allowed_s:g} s"
        raise HypervisorError(text, code="guest_unresponsive")

    def _unreachable(self, cause: BaseException) -> HypervisorError:
        process = self.process
        text = f"guest {self.plan.instance_id}: process {process.pid} lives, its socket {process.socket_path} does not"
        return HypervisorError(f"{text} ({cause or type(cause).__name__})", code="guest_unreachable")
