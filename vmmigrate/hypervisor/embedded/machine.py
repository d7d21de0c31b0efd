"""The embedded machine: everything of a guest except the loop that drives it and the socket it is driven by.

Run state, ownership stamp, backends, devices, clock and program of one guest. All calls are short, synchronous and made
between two ticks, so each sees the guest as a whole. On an error nothing has changed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Final

import numpy as np

from vmmigrate.devices import registry
from vmmigrate.devices.kinds import EmbeddedVcpuV1
from vmmigrate.devices.payload import DevicePayload
from vmmigrate.devices.plan import ExpectedDevice, check_import
from vmmigrate.devices.time import NS_PER_S, TimeData, adjust
from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.base import GuestPlan, GuestStamp, RunState
from vmmigrate.hypervisor.embedded import devices as machine_devices
from vmmigrate.hypervisor.embedded.backends import VionaBackend, make_backend
from vmmigrate.hypervisor.embedded.guestram import GuestMemory
from vmmigrate.hypervisor.embedded.heartbeat import HEARTBEAT_PAGE, Heartbeat
from vmmigrate.hypervisor.embedded.programs import (
    Deed,
    Program,
    Progress,
    Surroundings,
    load_program,
    program_problems,
)
from vmmigrate.hypervisor.embedded.uart import Uart
from vmmigrate.hypervisor.embedded.witness import Witness

VCPU_NAME: Final = "vcpu-0"  # one processor state, however many processors the plan names
GUEST_FREQ_HZ: Final = 1_000_000_000
SLICE_NS: Final = 300_000
MAX_THROTTLE_PERCENT: Final = 99
_STRAY_CHECK_PAGES: Final = 128


class Machine:
    """One guest, paused when it is made.

    Attributes:
        running: Whether the vCPU executes.
        throttle_percent: How much of the time it is held although it runs.
        is_off: The guest has powered itself off: it never runs again, and holds no disk open.
        last_record: The highest record number of journal `last_journal` that a daemon told.
    """

    def __init__(
        self, plan: GuestPlan, stamp: GuestStamp, memory: GuestMemory, witness: Witness, *, for_migration: bool
    ) -> None:
        self.plan, self.stamp, self.memory = plan, stamp, memory
        self.running = False
        self.is_off = False
        self.last_record, self.last_journal = 0, ""
        self._witness = witness
        self._epoch_seen = stamp.epoch
        self._epoch_run = (0, 0)
        self._handoff: str | None = None
        self._boot_hrtime, self._tsc_hrtime, self._tsc = time.monotonic_ns(), time.monotonic_ns(), 0
        self._moves = 0
        self._disk_backends = [make_backend(disk) for disk in plan.disks]
        self._uarts = tuple(Uart(port.name, port.num) for port in plan.serial_ports)
        self._devices = self._make_devices()
        self._backends_open = False
        self._around = Surroundings(memory, self._uarts, self._writable_disk())
        self._heartbeat = Heartbeat(memory)
        self._program = load_program(*_program_of(plan), self._around)
        self._awaits_import = for_migration
        self._has_run = False
        self.throttle_percent = 0
        self._throttled_ticks = 0
        if for_migration:
            self._rehearse_import()

    def _rehearse_import(self) -> None:
        """Check a list of devices that is applied to nothing. What code does for the first time takes several times as
        long, and the next time is within the pause of a guest."""
        devices = self._devices_to_rehearse()
        check_import(self._expected(devices), self._exported({}, devices))

    def _make_devices(self) -> list[machine_devices.Device]:
        layout = self.memory.layout
        made: list[machine_devices.Device] = [machine_devices.Rtc(), *self._uarts]
        for disk, backend in zip(self.plan.disks, self._disk_backends, strict=True):
            kind = machine_devices.NvmeDisk if disk.model == "nvme" else machine_devices.Disk
            made.append(kind(disk, layout))
            if blob := machine_devices.blob_device(backend):
                made.append(blob)
        made += [machine_devices.Nic(nic, layout) for nic in self.plan.nics]
        if self.plan.injector is not None:
            made.append(machine_devices.FailureInjector(self.plan.injector))
        return made

    def _writable_disk(self) -> Any:
        return next((backend for backend in self._disk_backends if not backend.readonly), None)

    # -- running ---------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """One heartbeat and one slice of work. Only while running."""
        now_ns = time.monotonic_ns()
        self._heartbeat.beat(now_ns)
        self._witness.beat(self._heartbeat.counter, now_ns)
        self._throttled_ticks += self.throttle_percent
        if self._throttled_ticks >= 100:
            self._throttled_ticks -= 100
            self._program.stand_still()
            return
        deed = self._program.work(self._heartbeat.counter, now_ns + SLICE_NS)
        if deed is not None:
            self._do(deed)

    def _do(self, deed: Deed) -> None:
        """What the guest does to its own machine."""
        if deed is Deed.POWER_OFF:
            self.running, self.is_off = False, True
            self.close_backends()
        elif deed is Deed.REBOOT:
            self.reboot()
        else:
            raise RuntimeError("the guest crashed its machine")  # and with it this process

    def reboot(self) -> None:
        """Start the program from its beginning, in cleared memory. Running or paused: it stays that.

        The heartbeat counts on: it belongs to the machine, not to what runs on it.

        Raises: HypervisorError `guest_paused_for_handoff`, `not_imported`.
        """
        self._check_not_handed_off()
        if self._awaits_import:
            raise HypervisorError("built for a migration, and its devices have not come yet", code="not_imported")
        self.memory.clear(keep_page=HEARTBEAT_PAGE)
        for uart in self._uarts:
            uart.reset()
            uart.history.append(b"reboot\r\n")
        self._program = load_program(self._program.name, self._program.parameters, self._around)

    def type_keys(self, port: str, keys: bytes) -> None:
        """Raises: HypervisorError `guest_paused_for_handoff`: the port's state may have been exported already;
        `unknown_port`, `console_full`."""
        uart = self.uart(port)
        self._check_not_handed_off()
        uart.type_keys(keys)

    def _check_not_handed_off(self) -> None:
        if self._handoff is not None and not self._backends_open:
            text = f"paused for migration {self._handoff}: what is done to it now would not arrive"
            raise HypervisorError(text, code="guest_paused_for_handoff")

    def run(self, epoch: tuple[int, int]) -> None:
        """Start or resume; opens the backends when they are closed. Running already: only the epoch counts.

        A guest that has powered itself off stays off: this call came first, and then it did that.

        Raises:
            HypervisorError: `stale_epoch`, `not_imported`, or what a backend says. The guest stays as it was.
        """
        self._check_epoch(epoch)
        if self._awaits_import:
            raise HypervisorError("built for a migration, and its devices have not come yet", code="not_imported")
        if not self.is_off:
            self.open_backends(epoch)
        self._handoff = None
        self._epoch_run = epoch
        if not self.running and not self.is_off:
            self._witness.begin(self.stamp.epoch)
            self._heartbeat.resume()
            self.running = self._has_run = True

    def pause(self) -> None:
        self.running = False

    def throttle(self, percent: int) -> None:
        """Leave out so many of a hundred slices of work, evenly spread. The heartbeat goes on.

        Raises: HypervisorError `bad_throttle`.
        """
        if not 0 <= percent <= MAX_THROTTLE_PERCENT:
            text = f"a throttle of {percent} %, allowed are 0 to {MAX_THROTTLE_PERCENT}"
            raise HypervisorError(text, code="bad_throttle")
        self.throttle_percent = percent

    def pause_for_handoff(self, migration_id: str) -> None:
        """Pause, and let go of disks and NICs so that another host may open them.

        Raises: HypervisorError `guest_powered_off`: there is nothing to hand off any more; `flush_failed`: the guest
            goes on; another host would not find what it wrote.
        """
        if self.is_off:
            raise HypervisorError("the guest has powered itself off", code="guest_powered_off")
        self._flush_backends()  # a single thread: the guest writes nothing between this and the pause
        self.running = False
        self._handoff = migration_id
        self.close_backends()

    def silence(self, epoch: tuple[int, int]) -> None:
        """Pause and close everything; an epoch below *epoch* is refused from now on.

        Nothing is flushed: the disks are another host's, and a disk that fails must not keep them open.
        """
        self.running = False
        self._epoch_seen = max(self._epoch_seen, epoch)
        self._let_go_of_backends()

    def open_backends(self, epoch: tuple[int, int]) -> None:
        """Open all backends or none. Raises: HypervisorError `stale_epoch`, or what a backend says."""
        self._check_epoch(epoch)
        opened = []
        try:
            for backend in self._all_backends():
                if not backend.is_open:
                    backend.open()
                    opened.append(backend)
        except HypervisorError:
            for backend in opened:
                backend.close()
            raise
        self._backends_open = True
        if epoch != self.stamp.epoch:
            self._see_epoch(epoch)

    def close_backends(self) -> None:
        """Raises: HypervisorError `guest_running`: a running guest needs its disks; `flush_failed`: all stay open."""
        if self.running:
            raise HypervisorError("backends of a running guest stay open: pause it first", code="guest_running")
        self._flush_backends()
        self._let_go_of_backends()

    def _let_go_of_backends(self) -> None:
        for backend in self._all_backends():
            backend.close()
        self._backends_open = False

    def _flush_backends(self) -> None:
        for backend in self._disk_backends:
            backend.flush()

    def _all_backends(self) -> list[Any]:
        nics = [device.backend for device in self._devices if isinstance(device, machine_devices.Nic)]
        return [*self._disk_backends, *nics]

    def _check_epoch(self, epoch: tuple[int, int]) -> None:
        if epoch < self._epoch_seen:
            seen, offered = (f"{term}.{n}" for term, n in (self._epoch_seen, epoch))
            raise HypervisorError(f"epoch {offered} is older than {seen}, seen by this guest", code="stale_epoch")

    def _see_epoch(self, epoch: tuple[int, int]) -> None:
        self._epoch_seen = epoch
        self.stamp = replace(self.stamp, epoch=epoch)
        if self.running:
            self._witness.begin(epoch)

    def restamp(self, stamp: GuestStamp) -> None:
        """Raises: HypervisorError `wrong_guest`: another instance or host; `stale_epoch`."""
        if (stamp.instance_id, stamp.host_id) != (self.stamp.instance_id, self.stamp.host_id):
            text = f"this is instance {self.stamp.instance_id} on {self.stamp.host_id}, not {stamp.instance_id}"
            raise HypervisorError(f"{text} on {stamp.host_id}", code="wrong_guest")
        self._check_epoch(stamp.epoch)
        changed = stamp.epoch != self.stamp.epoch
        self.stamp = stamp
        if changed:
            self._see_epoch(stamp.epoch)

    def note_record(self, journal_id: str, number: int) -> None:
        known = self.last_record if journal_id == self.last_journal else 0
        self.last_journal, self.last_record = journal_id, max(known, number)

    # -- looking ---------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        progress = asdict(self._program.progress)
        announcements = {b.name: b.announcements for b in self._all_backends() if isinstance(b, VionaBackend)}
        program = {"name": self._program.name, **self._program.parameters, **progress}
        return {
            "stamp": asdict(self.stamp),
            "run_state": (RunState.RUNNING if self.running else RunState.PAUSED).value,
            "heartbeats": self._heartbeat.counter,
            "last_record": self.last_record,
            "last_journal": self.last_journal,
            "ran_epoch": list(self._epoch_run),
            "backends_open": self._backends_open,
            "handoff": self._handoff,
            "throttle_percent": self.throttle_percent,
            "program": {**program, "moves": self._moves, "announcements": announcements},
        }

    def heartbeat_gaps(self) -> dict[str, Any]:
        return self._heartbeat.gaps()

    def self_check(self) -> Iterator[dict[str, Any] | None]:
        """Check RAM and the disk under test in small pieces: yields None after each, a verdict at the end.

        Between two pieces the guest may go on: every piece is judged by processor state as it is then. When it reboots
        meanwhile, the check begins again.
        """
        while True:
            program = self._program
            for verdict in self._check(program):
                if self._program is not program:
                    break
                yield verdict
            else:
                return

    def _check(self, program: Program) -> Iterator[dict[str, Any] | None]:
        checked = 1 if self._heartbeat.counter else 0
        if reason := self._heartbeat.ring_problem() or program.disk_problem():
            yield _bad(checked, HEARTBEAT_PAGE if "heartbeat" in reason else None, reason)
            return
        yield None
        for bad_page in program.find_bad_pages():
            if bad_page is not None:
                yield _bad(checked, bad_page, "a page of the working set is not as it was written last")
                return
            yield None
        own = program.own_pages()
        for bad_page in self._stray_pages(own):
            if bad_page is not None:
                yield _bad(checked, bad_page, "a page that nothing writes is not zero")
                return
            yield None
        yield {"consistent": True, "pages_checked": checked + len(own), "first_bad_page": None, "reason": ""}

    def _stray_pages(self, own: Any) -> Iterator[int | None]:
        populated = self.memory.populated()
        populated[own] = False
        populated[HEARTBEAT_PAGE] = False
        pages = np.flatnonzero(populated)
        for start in range(0, len(pages), _STRAY_CHECK_PAGES):
            piece = pages[start : start + _STRAY_CHECK_PAGES]
            stray = self.memory.pages[piece].any(axis=1)
            yield int(piece[stray][0]) if stray.any() else None

    # -- moving ----------------------------------------------------------------------------------------------------

    def export_time(self) -> TimeData:
        self._check_paused("time")
        now_ns, wall_ns = time.monotonic_ns(), time.time_ns()
        tsc = self._tsc + (now_ns - self._tsc_hrtime) * GUEST_FREQ_HZ // NS_PER_S
        return TimeData(
            guest_freq=GUEST_FREQ_HZ,
            guest_tsc=tsc & ((1 << 64) - 1),
            hrtime=now_ns,
            hres_sec=wall_ns // NS_PER_S,
            hres_ns=wall_ns % NS_PER_S,
            boot_hrtime=self._boot_hrtime,
        )

    def import_time(self, exported: TimeData) -> dict[str, Any]:
        """Adjust by this host's clocks and apply. Raises: PayloadError; the guest's clocks stay as they were."""
        self._check_importable()
        now_ns, wall_ns = time.monotonic_ns(), time.time_ns()
        adjustment = adjust(exported, now_ns, wall_ns // NS_PER_S, wall_ns % NS_PER_S)
        self._boot_hrtime = adjustment.time.boot_hrtime
        self._tsc_hrtime, self._tsc = now_ns, adjustment.time.guest_tsc
        return {
            "time": adjustment.time.to_map(),
            "clamped": adjustment.clamped,
            "delta_ns": adjustment.delta_ns,
        }

    def list_payloads(self) -> list[tuple[str, str, tuple[int, ...], bool]]:
        """(device, kind, versions that can say its present state, optional) of all that `export_devices` gives.

        State goes on changing: a version that is exact now may be lossy at the export, which then fails.

        Raises:
            HypervisorError: `not_migratable`, naming every device that cannot move.
        """
        self._check_migratable()
        listed = [(VCPU_NAME, "embedded-vcpu", registry.KINDS["embedded-vcpu"].writable, False)]
        for device in self._devices:
            kinds = device.expected().kinds
            if all(len(registry.KINDS[kind].writable) == 1 for kind in kinds):  # nothing to find out, nothing to copy
                listed += [(device.name, kind, registry.KINDS[kind].writable, False) for kind in kinds]
            else:
                exact = {kind: registry.exact_versions(kind, state) for kind, state in device.export().items()}
                listed += [(device.name, kind, exact[kind], False) for kind in kinds]
        return listed

    def export_devices(self, versions: Mapping[str, int]) -> list[DevicePayload]:
        """Each kind in the version of *versions*, its newest when it is not named."""
        self._check_migratable()
        self._check_paused("devices")
        return self._exported(versions, self._devices)

    def rehearse_export(self, versions: Mapping[str, int]) -> list[bytes]:
        """What an export would give just now; the guest may run."""
        return [payload.body for payload in self._exported(versions, self._devices_to_rehearse())]

    def _devices_to_rehearse(self) -> list[machine_devices.Device]:
        """All but the one that counts how often it is asked."""
        return [device for device in self._devices if not isinstance(device, machine_devices.FailureInjector)]

    def _exported(self, versions: Mapping[str, int], devices: Sequence[machine_devices.Device]) -> list[DevicePayload]:
        exported = [(device.name, kind, state) for device in devices for kind, state in device.export().items()]
        everything = [(VCPU_NAME, "embedded-vcpu", self._vcpu()), *exported]
        return [registry.encode(name, kind, state, version=versions.get(kind)) for name, kind, state in everything]

    def _expected(self, devices: Sequence[machine_devices.Device]) -> list[ExpectedDevice]:
        vcpu = ExpectedDevice(VCPU_NAME, ("embedded-vcpu",), check=self._vcpu_problems)
        return [vcpu, *(device.expected() for device in devices)]

    def _vcpu(self) -> EmbeddedVcpuV1:
        progress = self._program.progress
        bins, noted = self._heartbeat.export()
        return EmbeddedVcpuV1(
            program=self._program.name,
            parameters=self._program.parameters,
            filled_pages=progress.filled_pages,
            steps=progress.steps,
            disk_steps=progress.disk_steps,
            heartbeats=self._heartbeat.counter,
            last_beat_ns=self._heartbeat.last_ns,
            moves=self._moves,
            gap_bins=bins,
            noted_gaps=noted,
        )

    def import_devices(self, payloads: Sequence[DevicePayload]) -> list[list[str]]:
        """Validate all, then apply all. Gives back which optional ones were skipped, as (device, kind).

        Raises:
            PayloadError: With every problem; nothing was applied.
        """
        self._check_importable()
        plan = check_import(self._expected(self._devices), payloads)
        for device in self._devices:
            if isinstance(device, machine_devices.FailureInjector):
                device.maybe_fail_import()
        for device in self._devices:
            device.apply({kind: state for (name, kind), state in plan.states.items() if name == device.name})
        self._apply_vcpu(plan.states[VCPU_NAME, "embedded-vcpu"])
        self._awaits_import = False
        return [list(key) for key in plan.skipped]

    def _vcpu_problems(self, states: Mapping[str, Any]) -> Sequence[str]:
        vcpu: EmbeddedVcpuV1 = states["embedded-vcpu"]
        problems = program_problems(vcpu.program, vcpu.parameters)
        if not problems:
            own = self._program_for(vcpu).own_pages()
            if vcpu.filled_pages > len(own):
                problems.append(f"embedded-vcpu filled_pages {vcpu.filled_pages}, allowed are {len(own)}")
            if vcpu.steps and not len(own):
                problems.append(f"embedded-vcpu steps {vcpu.steps} without a working set")
        if vcpu.last_beat_ns and not vcpu.heartbeats:
            problems.append("embedded-vcpu last_beat_ns without a heartbeat")
        return problems

    def _apply_vcpu(self, vcpu: EmbeddedVcpuV1) -> None:
        self._program = self._program_for(vcpu)
        self._program.progress = Progress(vcpu.filled_pages, vcpu.steps, vcpu.disk_steps)
        self._heartbeat.restore(vcpu.heartbeats, vcpu.last_beat_ns, vcpu.gap_bins, vcpu.noted_gaps)
        self._moves = vcpu.moves + 1

    def _program_for(self, vcpu: EmbeddedVcpuV1) -> Program:
        """Mostly the one that this machine was built with, and has not run: the guest waits, and to make another takes
        time with the size of its working set.
        """
        if (vcpu.program, vcpu.parameters) == (self._program.name, self._program.parameters):
            return self._program
        return load_program(vcpu.program, vcpu.parameters, self._around)

    def _check_migratable(self) -> None:
        if self.plan.unmigratable:
            named = ", ".join(self.plan.unmigratable)
            details = {"devices": list(self.plan.unmigratable)}
            raise HypervisorError(f"devices that cannot migrate: {named}", code="not_migratable", details=details)

    def _check_paused(self, what: str) -> None:
        if self.running:
            raise HypervisorError(f"{what} of a running guest cannot be exported: pause it first", code="guest_running")

    def _check_importable(self) -> None:
        if self._has_run or not (self._awaits_import or self._moves):
            raise HypervisorError("this guest was not built for a migration, or has run already", code="not_importable")

    # -- console ---------------------------------------------------------------------------------------------------

    def uart(self, port: str) -> Uart:
        """By the device's name or by its number (com1 .. com4). Raises: HypervisorError `unknown_port`."""
        for uart in self._uarts:
            if port in (uart.name, uart.num):
                return uart
        names = ", ".join(uart.name for uart in self._uarts) or "none"
        raise HypervisorError(f"no serial port {port}; there are: {names}", code="unknown_port")


def _program_of(plan: GuestPlan) -> tuple[str, dict[str, Any]]:
    parameters = dict(plan.program)
    return str(parameters.pop("name", "idle")), parameters


def _bad(checked: int, page: int | None, reason: str) -> dict[str, Any]:
    return {"consistent": False, "pages_checked": checked, "first_bad_page": page, "reason": reason}
