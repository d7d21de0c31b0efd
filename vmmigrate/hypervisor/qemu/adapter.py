"""The QEMU adapter: builds guests in stock QEMU and finds them again.

A build that fails or is cancelled leaves nothing: no process, descriptor or file.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import structlog
import trio

from vmmigrate.devices.time import NS_PER_S
from vmmigrate.errors import HypervisorError, VmMigrateError
from vmmigrate.hypervisor import kernel, processes
from vmmigrate.hypervisor.base import (
    Capabilities,
    Capability,
    FoundGuest,
    Guest,
    GuestPlan,
    GuestProcess,
    GuestStamp,
)
from vmmigrate.hypervisor.dirty import DirtyTracker, probe_kernel_tracking
from vmmigrate.hypervisor.qemu import (
    anatomy,
    belongings,
    foreign,
    inspecting,
    launch,
    machine,
    payloads,
    probing,
    survey,
    takeover,
    tracker,
)
from vmmigrate.hypervisor.qemu.files import QemuFiles
from vmmigrate.hypervisor.qemu.foreignguest import ForeignGuest
from vmmigrate.hypervisor.qemu.guest import QemuGuest
from vmmigrate.hypervisor.qemu.pagestream import PageStream, loses_writes
from vmmigrate.hypervisor.qemu.qmp import Qmp, text_of
from vmmigrate.hypervisor.qemu.remembered import Remembered
from vmmigrate.hypervisor.qemu.settings import OLDEST_VERSION, QemuFacts, QemuSettings
from vmmigrate.hypervisor.rammap import MappedRam
from vmmigrate.memory import MIB, RamLayout

log = structlog.get_logger(__name__)

REQUEST_DEADLINE_S: Final = 10.0
START_DEADLINE_S: Final = 30.0
_LONGEST_SOCKET: Final = f"{processes.ANY_TOKEN}/qmp"
WrapTracker = Callable[[DirtyTracker], DirtyTracker]


class QemuHypervisor:
    """Implements `base.Hypervisor`. Made by `open`.

    Attributes:
        runtime_dir: A directory for each guest; mode 0700.
        wrap_tracker: A fault to inject: what it returns is asked for dirty pages instead of the real tracker.
    """

    def __init__(
        self,
        runtime_dir: Path,
        settings: QemuSettings,
        facts: QemuFacts,
        no_tracking: str,
        *,
        witness_dir: Path | None = None,
        wrap_tracker: WrapTracker | None = None,
        request_deadline_s: float = REQUEST_DEADLINE_S,
        start_deadline_s: float = START_DEADLINE_S,
    ) -> None:
        self.runtime_dir = runtime_dir
        self.settings = settings
        self.facts = facts
        self.capabilities = _capabilities(facts, no_tracking)
        self.wrap_tracker = wrap_tracker
        self._witness_dir = witness_dir
        self._no_tracking = no_tracking
        self._request_deadline_s = request_deadline_s
        self._start_deadline_s = start_deadline_s
        self._threads = trio.CapacityLimiter(4)

    @classmethod
    async def open(cls, runtime_dir: Path, settings: QemuSettings | None = None, **options: Any) -> Self:
        """Prepare *runtime_dir* and ask the QEMU of this host what it can do.

        Args:
            options: `witness_dir` (console output is written there and outlives its guests), `wrap_tracker`,
                `request_deadline_s`, `start_deadline_s`.

        Raises:
            HypervisorError: `runtime_dir`, `qemu_missing`, `qemu_too_old`; `accelerator`: QEMU does not start with it;
                `machine_type`: it has not the one that the operator chose.
        """
        settings = settings or QemuSettings()
        await trio.to_thread.run_sync(processes.prepare_runtime_dir, runtime_dir, _LONGEST_SOCKET)
        await trio.to_thread.run_sync(probing.end_old_probes, runtime_dir)
        facts = await probing.ask_facts(runtime_dir, settings, options.get("start_deadline_s", START_DEADLINE_S))
        if facts.version[:2] < OLDEST_VERSION or not facts.machine_types:
            oldest = ".".join(map(str, OLDEST_VERSION))
            text = f"{settings.binary} is QEMU {facts.version_text}, needed is {oldest} or later"
            raise HypervisorError(text, code="qemu_too_old")
        if settings.machine_type and settings.machine_type not in facts.machine_types:
            text = f"{settings.binary} has no machine type {settings.machine_type}, allowed are"
            raise HypervisorError(f"{text} {', '.join(facts.machine_types)}", code="machine_type")
        if options.get("witness_dir") is not None:
            await trio.Path(options["witness_dir"]).mkdir(parents=True, exist_ok=True)
        no_tracking = await trio.to_thread.run_sync(_why_no_tracking, settings)
        if no_tracking:
            log.warning("qemu.no_tracker", why=no_tracking, text="guests of this host move by QEMU's own stream")
        return cls(runtime_dir, settings, facts, no_tracking, **options)

    def problems(self, plan: GuestPlan) -> list[str]:
        return machine.problems(plan, self.settings, self.facts)

    async def build(self, plan: GuestPlan, stamp: GuestStamp, *, for_migration: bool) -> Guest:
        if plan.instance_id != stamp.instance_id:
            text = f"the plan is for instance {plan.instance_id}, the stamp for {stamp.instance_id}"
            raise HypervisorError(text, code="wrong_guest")
        memory = Remembered(stamp, stamp.epoch, is_arriving=for_migration, is_deaf=True, booted_ns=time.monotonic_ns())

        def arguments(files: QemuFiles) -> list[str]:
            return machine.arguments(
                plan, self.settings, self.facts, files, stamp=memory.to_text(), for_migration=for_migration
            )

        library = None if self._no_tracking else tracker.library()
        launched = await trio.to_thread.run_sync(
            launch.launch, self.runtime_dir, self._witness_dir, plan, stamp, arguments, library, limiter=self._threads
        )
        guest = self._guest(plan, launched.watch, launched.files)
        try:
            ram = await _mapped(guest, launched.ram_fd, for_migration)
            with self._in_time(plan.instance_id):
                await self._attach(guest, ram, adopted=False)
                await guest.begin(
                    memory,
                    keeps_images=bool(belongings.unsaved(plan)),
                    outlives_bad_state=self.facts.outlives_bad_state,
                )
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
        if await self._is_given_back(process):
            watch.close()
            return None
        guest = self._guest(plan, watch, files, await self._known_foreign(files))
        try:
            ram = await guest.in_thread(_ram_of, guest)
            with self._in_time(plan.instance_id):
                await self._attach(guest, ram, adopted=True)
                found = (await guest.recall()).stamp
            if (found.instance_id, found.host_id) != (stamp.instance_id, stamp.host_id):
                text = f"process {process.pid} is instance {found.instance_id} of host {found.host_id}"
                raise HypervisorError(f"{text}, not {stamp.instance_id} of {stamp.host_id}", code="wrong_guest")
            with self._in_time(plan.instance_id):
                await guest.resume_care()
        except BaseException:
            guest.detach()
            raise
        return guest

    async def adopt_foreign(self, plan: GuestPlan, stamp: GuestStamp, monitor: Path, pid: int | None) -> Guest:
        guest = await self._claimed(plan, stamp, monitor, pid)
        try:
            with self._in_time(plan.instance_id):
                files = self._files(guest.process.socket_path)
                guest.foreign = await self._recognise(guest, stamp, monitor)
                await guest.in_thread(takeover.make_files, plan, files, stamp)
                await self._attach(guest, await guest.in_thread(_ram_of, guest), adopted=False)
                await guest.take_over()
        except BaseException:
            await guest.give_back()
            raise
        return guest

    async def _claimed(self, plan: GuestPlan, stamp: GuestStamp, monitor: Path, pid: int | None) -> ForeignGuest:
        """The guest at a monitor, with nobody else's claim to it. Raises: HypervisorError, SpecCreatableError."""
        await survey.check_allowed(monitor, self.settings.monitors)
        files = self._files(self.runtime_dir / secrets.token_hex(processes.TOKEN_BYTES) / "qmp")
        await trio.to_thread.run_sync(takeover.link_monitor, files, monitor, limiter=self._threads)
        qmp = Qmp(files.monitor)
        try:
            listening = await self._open_monitor(qmp, monitor)
            watch = await trio.to_thread.run_sync(_process_of, pid or listening, limiter=self._threads)
        except BaseException:
            qmp.close()
            await trio.to_thread.run_sync(files.remove, limiter=self._threads)
            raise
        owner = [stamp.instance_id, stamp.host_id]
        known = foreign.Foreign(watch.pid, watch.start_ticks, owner, ram_bytes=plan.layout.size_bytes)
        guest = self._guest(plan, watch, files, known)
        assert isinstance(guest, ForeignGuest)
        guest.qmp = qmp
        booted_ns = watch.start_ticks * NS_PER_S // os.sysconf("SC_CLK_TCK")
        try:
            memory = Remembered(stamp, stamp.epoch, ran=stamp.epoch, is_open=True, booted_ns=booted_ns)
            with self._in_time(plan.instance_id):
                await guest.claim(memory)
        except BaseException:
            await guest.give_back()
            raise
        return guest

    async def _open_monitor(self, qmp: Qmp, monitor: Path) -> int:
        """Which process is behind a monitor. Raises: HypervisorError `monitor`, `monitor_busy`."""
        with trio.move_on_after(self._request_deadline_s):
            try:
                await qmp.open()
                return qmp.peer_pid
            except (OSError, EOFError) as exc:
                raise HypervisorError(f"monitor {monitor}: {exc or 'it hangs up'}", code="monitor") from exc
        raise survey.busy(monitor)

    async def _recognise(self, guest: ForeignGuest, stamp: GuestStamp, monitor: Path) -> foreign.Foreign:
        """Whether the machine there is that of the plan, and where its parts are.

        Raises: SpecCreatableError `not_that_machine`: all that differs.
        """
        version = await inspecting.version(guest.ask)
        found = await survey.survey(guest.ask, guest.plan, self.settings, guest.process.pid)
        is_ours = version == self.facts.version_text
        there = await anatomy.anatomy(guest.ask, with_board=is_ours)
        files = self._files(guest.process.socket_path)
        made, differences = await self._compare(guest.plan, stamp, there, files, same_version=is_ours)
        survey.refuse(monitor, [*found.wrong, *differences])
        return replace(
            guest.foreign,
            ram_address=found.ram_address,
            ram_fd=found.ram_fd,
            nodes=found.nodes,
            ports=found.ports,
            facts={**made, "hypervisor_version": version},
        )

    async def _compare(
        self, plan: GuestPlan, stamp: GuestStamp, there: anatomy.Anatomy, files: QemuFiles, *, same_version: bool
    ) -> tuple[Mapping[str, str], list[str]]:
        """Make the machine of *plan* here, with nothing behind its devices, and end it again.

        Returns: Its facts, and what is not so *there*. Which devices are saved is noted in *files*.
        """
        like = {"hypervisor": "qemu", "machine_type": there["machine type"], "cpu_model": there["processor"]}
        if kept := belongings.unsaved(plan):
            return {}, [f"{disk.name}: QEMU cannot save its NVMe controller" for disk in kept]
        pattern = survey.bare(replace(plan, like=like))
        settings = replace(self.settings, network="none", use_tracker=False)
        if unfit := machine.problems(pattern, settings, self.facts):
            return {}, unfit
        here = QemuHypervisor(
            self.runtime_dir,
            settings,
            self.facts,
            "it is only looked at",
            request_deadline_s=self._request_deadline_s,
            start_deadline_s=self._start_deadline_s,
        )
        # Under the stamp of the instance: a daemon that dies now finds a guest that was never run, and ends it.
        made = await here.build(pattern, stamp, for_migration=False)
        try:
            assert isinstance(made, QemuGuest)
            pattern_files = self._files(made.process.socket_path)
            await made.in_thread(shutil.copyfile, pattern_files.devices, files.devices)
            return made.facts, anatomy.differences(
                there, await anatomy.anatomy(made.ask, with_board=same_version), same_version=same_version
            )
        finally:
            await made.destroy()

    async def identity_of(self, monitor: Path) -> str | None:
        await survey.check_allowed(monitor, self.settings.monitors)
        with contextlib.closing(Qmp(monitor)) as qmp:
            await self._open_monitor(qmp, monitor)
            with trio.move_on_after(self._request_deadline_s):
                try:
                    told = uuid.UUID(text_of(await qmp.execute("query-uuid"), "UUID"))
                except (OSError, EOFError) as exc:
                    raise HypervisorError(f"monitor {monitor}: {exc or 'it hangs up'}", code="monitor") from exc
                except ValueError as exc:
                    raise HypervisorError(f"monitor {monitor}: no UUID: {exc}", code="qemu_protocol") from exc
                return str(told) if told.int else None
        raise survey.busy(monitor)

    async def give_back(self, guest: Guest) -> None:
        assert isinstance(guest, ForeignGuest)
        await guest.give_back()

    async def find_others(self, known: Collection[Path]) -> Sequence[FoundGuest]:
        found: list[FoundGuest] = []

        async def look_at(monitor: Path) -> None:
            try:
                guest = await trio.to_thread.run_sync(self._unknown, monitor, limiter=self._threads)
            except VmMigrateError as exc:
                log.error("guest.unidentified", socket=str(monitor), code=exc.code, why=exc.text)
                return
            if guest is None:
                return
            try:
                if isinstance(guest, ForeignGuest) and not await self._stays(guest):
                    log.warning("guest.given_back", socket=str(monitor), pid=guest.process.pid)
                    await guest.give_back()
                    return
                found.append(FoundGuest(guest.process, await guest.status()))
            except VmMigrateError as exc:
                log.error("guest.unidentified", socket=str(monitor), code=exc.code, why=exc.text)
            finally:
                guest.detach()

        async with trio.open_nursery() as nursery:
            for monitor in sorted(self.runtime_dir.glob("*/qmp")):
                if monitor not in known:
                    nursery.start_soon(look_at, monitor)
        return found

    async def _stays(self, guest: ForeignGuest) -> bool:
        """Whether a guest of a QEMU that something else started is ours."""
        given_back = self._files(guest.process.socket_path).given_back
        return not await trio.Path(given_back).exists() and await guest.is_in_a_journal()

    def _unknown(self, monitor: Path) -> QemuGuest | None:
        """A guest of which only the directory is known; what a dead one left behind is removed. Blocking."""
        files = self._files(monitor)
        pid = probing.pid_of(files)
        started = None if pid is None else kernel.start_ticks_of(pid)
        watch = None if pid is None or started is None else processes.find(pid, started)
        if watch is None:
            files.remove()
            return None
        return self._guest(_NO_PLAN, watch, files, foreign.load(files))

    async def silence(self, process: GuestProcess, epoch: tuple[int, int], record: int) -> bool:
        files = self._files(process.socket_path)
        known = await self._known_foreign(files)
        watch = await trio.to_thread.run_sync(processes.find, process.pid, process.start_ticks, limiter=self._threads)
        if watch is None:
            return False
        guest = self._guest(_NO_PLAN, watch, files, known)
        try:
            await guest.silence(epoch, record)
            return True
        except HypervisorError as exc:
            if exc.code == "guest_lost":
                return False
            raise HypervisorError(f"process {process.pid} cannot be paused: {exc}", code="guest_unresponsive") from exc
        finally:
            guest.detach()

    async def end_leftover(self, process: GuestProcess) -> bool:
        if await self._is_given_back(process):
            return False
        was_there = await trio.to_thread.run_sync(processes.end_process, process, limiter=self._threads)
        files = self._files(process.socket_path)
        if files.directory.parent == self.runtime_dir:
            await trio.to_thread.run_sync(files.remove, limiter=self._threads)
        return was_there

    async def _is_given_back(self, process: GuestProcess) -> bool:
        """Whether that process is none of ours any more; what was left undone of that is done."""
        files = self._files(process.socket_path)
        if not await trio.Path(files.given_back).exists():
            return await trio.to_thread.run_sync(_was_never_ours, process.pid, files, limiter=self._threads)
        guest = await trio.to_thread.run_sync(self._unknown, process.socket_path, limiter=self._threads)
        if isinstance(guest, ForeignGuest):
            await guest.give_back()
        return True

    def _files(self, monitor: Path) -> QemuFiles:
        return QemuFiles(monitor.parent, self._witness_dir)

    async def _known_foreign(self, files: QemuFiles) -> foreign.Foreign | None:
        return await trio.to_thread.run_sync(foreign.load, files, limiter=self._threads)

    def _guest(
        self, plan: GuestPlan, watch: processes.ProcessWatch, files: QemuFiles, known: foreign.Foreign | None = None
    ) -> QemuGuest:
        kind = QemuGuest if known is None else partial(ForeignGuest, known)
        return kind(
            plan=plan,
            process=GuestProcess(watch.pid, watch.start_ticks, files.monitor),
            watch=watch,
            files=files,
            locked=machine.locked_files(plan, self.settings, files),
            request_deadline_s=self._request_deadline_s,
        )

    async def _attach(self, guest: QemuGuest, ram: MappedRam, *, adopted: bool) -> None:
        """Wait until QEMU answers, see what machine it made, and begin to watch what it writes.

        Raises: HypervisorError: also `guest_start`: QEMU ended, with its reason.
        """
        guest.attach_ram(ram, tracker.NoTracker("QEMU has not started"), tracks=False)
        try:
            if not isinstance(guest, ForeignGuest):
                facts = await inspecting.guest_facts(guest.ask, guest.plan)
                digest = await guest.in_thread(inspecting.kernel_digest, guest.plan)
                facts["device_tree"] = f"{facts['device_tree']}-{digest[:16]}"
                guest.learn(facts)
            else:
                guest.learn(guest.foreign.facts)
        except HypervisorError as exc:
            if exc.code == "guest_lost" and not adopted:
                raise HypervisorError(
                    f"QEMU did not start: {guest.last_words() or exc.text}", code="guest_start"
                ) from exc
            raise
        marks = await guest.in_thread(self._tracker, guest, guest.plan.layout)
        if isinstance(marks, PageStream):
            guest.pages = marks
            is_tcg = not (await guest.ask("query-kvm")).get("enabled")
            if is_tcg and not self.settings.trust_tcg_stream:
                guest.no_moving = loses_writes(guest.facts["hypervisor_version"], guest.plan.layout.size_bytes)
        guest.attach_ram(ram, self.wrap_tracker(marks) if self.wrap_tracker else marks, tracks=adopted)

    def _tracker(self, guest: QemuGuest, layout: RamLayout) -> DirtyTracker:
        """The tracker where there is one; else QEMU's own stream."""
        try:
            if not self._no_tracking and not guest.ram.is_copied:
                return tracker.QemuTracker(guest.process.pid, tracker.RamIdentity(*guest.ram.file), layout.pages)
        except HypervisorError as exc:
            log.info("guest.not_tracked", instance=guest.plan.instance_id, why=exc.text)
        except OSError as exc:
            guest.check_alive()
            is_dying = isinstance(exc, (FileNotFoundError, ProcessLookupError))  # its memory goes before it does
            code = "guest_lost" if is_dying else "dirty_tracking"
            raise HypervisorError(f"process {guest.process.pid}: {exc}", code=code) from exc
        return guest.page_stream()

    @contextlib.contextmanager
    def _in_time(self, name: str) -> Any:
        with trio.move_on_after(self._start_deadline_s) as limit:
            yield
        if limit.cancelled_caught:
            text = f"guest {name} did not answer within {self._start_deadline_s:g} s"
            raise HypervisorError(text, code="guest_unresponsive")


_NO_PLAN: Final = GuestPlan("unknown", RamLayout.for_size(MIB), 1)


async def _mapped(guest: QemuGuest, ram_fd: int, writable: bool) -> MappedRam:
    """Guest RAM; the descriptor belongs to it, and is closed when there is none."""
    try:
        return await guest.in_thread(partial(MappedRam, ram_fd, guest.plan.layout, writable=writable))
    except BaseException as exc:
        os.close(ram_fd)
        if isinstance(exc, (OSError, ValueError, HypervisorError)):
            raise HypervisorError(f"cannot map guest RAM: {exc}", code="ram_map") from exc
        raise


def _ram_of(guest: QemuGuest) -> MappedRam:
    """That of a guest that was found. Blocking. Raises: HypervisorError `ram_map`, `guest_lost`."""
    try:
        if isinstance(guest, ForeignGuest):
            return guest.foreign.map_ram(guest.plan.layout)
        return foreign.map_shared(guest.process.pid, machine.RAM_FD, guest.plan.layout)
    except (OSError, ValueError, HypervisorError) as exc:
        guest.check_alive()
        text = f"cannot map the RAM of process {guest.process.pid}: {exc}"
        raise HypervisorError(text, code="ram_map") from exc


def _process_of(pid: int) -> processes.ProcessWatch:
    """Blocking. Raises: HypervisorError `guest_lost`."""
    started = kernel.start_ticks_of(pid)
    watch = None if started is None else processes.find(pid, started)
    if watch is None:
        raise HypervisorError(f"there is no process {pid}", code="guest_lost", details={"pid": pid})
    return watch


def _why_no_tracking(settings: QemuSettings) -> str:
    """Empty when guests can be tracked."""
    if not settings.use_tracker:
        return "this host's configuration does without it"
    if tracker.library() is None:
        return "the tracker library was not built: there was no C compiler when vmmigrate was installed"
    return probe_kernel_tracking()


def _capabilities(facts: QemuFacts, no_tracking: str) -> Capabilities:
    return Capabilities(
        hypervisor="qemu",
        version=facts.version_text,
        dirty_tracking="stream" if no_tracking else "kernel",
        dirty_tracking_reason=f"QEMU's own migration stream: {no_tracking}"
        if no_tracking
        else "userfaultfd write-protect in QEMU (tracker library), and PAGEMAP_SCAN",
        huge_pages=Capability(False, "QEMU maps guest RAM in small pages here"),
        throttle=Capability(False, "QEMU holds processors back only in its own migration"),
        facts={
            "hypervisor": "qemu",
            "hypervisor_version": facts.version_text,
            # What QEMU promises is a machine type: every version that has it writes, and reads, the same state.
            "loads_versions": f"{'.'.join(map(str, OLDEST_VERSION))}..",
            "machine_types": " ".join(facts.machine_types),
            "cpu_models": " ".join(facts.cpu_models),
        },
        opaque_kinds=payloads.KINDS,
    )


def _was_never_ours(pid: int, files: QemuFiles) -> bool:
    """Whether a process of which no directory is left was not started from here: it was given back. Blocking."""
    return not files.directory.exists() and not probing.is_started_with(pid, files)
