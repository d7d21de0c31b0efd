"""One guest in QEMU, as its daemon sees it.

What changes its run state or its images goes one at a time. The device state of a guest that stands still since it was
saved, or loaded, lies in a file: QEMU cannot save it twice without having run in between, and need not.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import trio

from vmmigrate.devices.payload import DevicePayload
from vmmigrate.devices.time import NS_PER_S, Adjustment, TimeData, adjust, since_boot
from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.base import (
    ConsoleHistory,
    GuestPlan,
    GuestProcess,
    GuestStamp,
    GuestStatus,
    PayloadDescription,
    RunState,
    SelfCheck,
)
from vmmigrate.hypervisor.processes import ProcessWatch
from vmmigrate.hypervisor.processguest import ProcessGuest
from vmmigrate.hypervisor.qemu import belongings, images, machine, payloads, saving, stress, witness
from vmmigrate.hypervisor.qemu import files as consoles
from vmmigrate.hypervisor.qemu.files import QemuFiles
from vmmigrate.hypervisor.qemu.machine import STAMP_OBJECT
from vmmigrate.hypervisor.qemu.pagestream import PageStream
from vmmigrate.hypervisor.qemu.qmp import Qmp, QmpError, text_of
from vmmigrate.hypervisor.qemu.remembered import Epoch, Remembered, from_text
from vmmigrate.hypervisor.qemu.stream import DeviceStream
from vmmigrate.hypervisor.qemu.tracker import RamIdentity, foreign_writers
from vmmigrate.hypervisor.rammap import CopiedRam
from vmmigrate.memory import GIB, PAGE_SIZE, PageBitmap

T = TypeVar("T")

_ASK_AGAIN_S: Final = 1.0
_LOOK_AGAIN_S: Final = 0.005
_READ_AT_LEAST_BYTES_PER_S: Final = 100 << 20  # what QEMU writes into our socket
_SELF_CHECK_S_PER_GIB: Final = 120.0
_PASSING: Final = frozenset({"finish-migrate", "save-vm"})  # QEMU leaves them by itself
_ANNOUNCEMENT: Final = {"initial": 50, "max": 550, "rounds": 5, "step": 100}  # milliseconds; QEMU's own defaults


class QemuGuest(ProcessGuest):
    """Implements `base.Guest`.

    Attributes:
        pages: QEMU itself, where it has to tell what the guest writes; None where the tracker does.
        no_moving: Why nobody can tell what the guest writes; empty when it can be moved.
    """

    def __init__(
        self,
        *,
        plan: GuestPlan,
        process: GuestProcess,
        watch: ProcessWatch,
        files: QemuFiles,
        locked: Mapping[int, Path],
        request_deadline_s: float,
    ) -> None:
        super().__init__(plan, process, watch)
        self.no_moving = ""
        self.qmp = Qmp(files.monitor)
        self._files = files
        self._locked = locked
        self._request_deadline_s = request_deadline_s
        self._facts: Mapping[str, str] = {}
        self._memory: Remembered | None = None
        self._booted_ns: int | None = None
        self._saved: DeviceStream | None = None  # what the file `state` holds, once it was written from here
        self.pages: PageStream | None = None
        self._acts = trio.Lock()

    @property
    def facts(self) -> Mapping[str, str]:
        return self._facts

    def learn(self, facts: Mapping[str, str]) -> None:
        """What QEMU told of the machine that it made."""
        self._facts = facts

    # -- what QEMU remembers ---------------------------------------------------------------------------------------

    async def recall(self) -> Remembered:
        """What the process remembers. Only this daemon writes it: it is read once."""
        if self._memory is None:
            text = await self.ask("qom-get", path=f"/objects/{STAMP_OBJECT}", property="identity")
            self._memory = from_text(text)
        return self._memory

    async def _remember(self, memory: Remembered) -> None:
        # Unknown until QEMU has answered: a call that is given up may have been heard.
        self._memory = None
        await self.ask("qom-set", path=f"/objects/{STAMP_OBJECT}", property="identity", value=memory.to_text())
        self._memory = memory

    # -- running ---------------------------------------------------------------------------------------------------

    async def status(self) -> GuestStatus:
        memory, state, vitals = await self.recall(), await self._run_state(), self._vitals()
        for port in self.plan.serial_ports:
            consoles.trim_output(self._files.output(port.num))
        return GuestStatus(
            stamp=memory.stamp,
            run_state=RunState.RUNNING if state == "running" else RunState.PAUSED,
            heartbeats=0 if vitals is None else vitals.heartbeats,
            last_record=memory.last_record,
            last_journal=memory.last_journal,
            backends_open=memory.is_open,
            program={**self.plan.program, **({} if vitals is None else asdict(vitals))},
            handoff=memory.handoff if state == "postmigrate" else None,
            ran_epoch=memory.ran,
        )

    async def run(self, epoch: Epoch) -> None:
        async with self._acts:
            memory = (await self.recall()).claimed(epoch)
            self._check_imported(memory)
            if await self._run_state() in {"running", "shutdown"}:
                return
            if not memory.is_open:
                await self._activate_all()
            if memory.is_deaf:
                await self._listen(True)
            self._saved = None
            ran = replace(memory, ran=epoch, handoff=None, is_open=True, has_loaded=False, is_deaf=False)
            ran = replace(ran, announces=False)
            await self._remember(ran)
            await self._continue()
            if memory.announces and self.plan.nics:
                with contextlib.suppress(HypervisorError):  # it runs: whatever else is wrong is found out by others
                    await self.ask("announce-self", **_ANNOUNCEMENT)

    def _check_imported(self, memory: Remembered) -> None:
        if memory.is_arriving:
            text = f"guest {self.plan.instance_id}: its devices have not been imported"
            raise HypervisorError(text, code="not_imported")

    async def _continue(self) -> None:
        try:
            await self.ask("cont")
        except QmpError as exc:
            raise HypervisorError(f"guest {self.plan.instance_id}: {exc.text}", code="not_resumed") from exc

    async def pause(self) -> None:
        async with self._acts:
            await self.ask("stop")

    async def reboot(self) -> None:
        async with self._acts:
            await self._check_not_given_away()
            self._saved = None
            await self._remember(replace(await self.recall(), has_loaded=False))
            await self.ask("system_reset")

    async def wait_power_off(self) -> None:
        while not self._gone:
            # Another command may break the connection off, and the process may end: `wait_exit` tells that.
            with contextlib.suppress(OSError, EOFError, HypervisorError):
                seen = self.qmp.events_seen
                if await self._run_state() == "shutdown":
                    return
                await self.qmp.wait_event("SHUTDOWN", seen)
                continue
            await trio.sleep(_ASK_AGAIN_S)
        await trio.sleep_forever()

    async def pause_for_handoff(self, migration_id: str) -> None:
        async with self._acts:
            state = await self._run_state()
            if state == "shutdown":
                text = f"guest {self.plan.instance_id} has powered itself off"
                raise HypervisorError(text, code="guest_powered_off")
            await self._save(replace(await self.recall(), handoff=migration_id), state)

    async def silence(self, epoch: Epoch, record: int) -> None:
        async with self._acts:
            memory = await self.recall()
            silenced = replace(memory, seen=max(memory.seen, epoch), last_record=max(memory.last_record, record))
            await self._remember(silenced)  # before anything that may fail
            try:
                await self._name_no_more()
            finally:
                await self.ask("stop")
            await self._save(silenced, await self._run_state())

    async def _check_not_given_away(self) -> None:
        memory = await self.recall()
        if memory.handoff is not None and await self._run_state() == "postmigrate":
            text = f"guest {self.plan.instance_id} is paused for migration {memory.handoff}"
            raise HypervisorError(text, code="guest_paused_for_handoff")

    async def note_record(self, journal_id: str, number: int) -> None:
        async with self._acts:  # what is remembered is read and written as a whole
            memory = await self.recall()
            newest = max(number, memory.last_record) if journal_id == memory.last_journal else number
            await self._remember(replace(memory, last_journal=journal_id, last_record=newest))

    async def restamp(self, stamp: GuestStamp) -> None:
        async with self._acts:
            memory = (await self.recall()).claimed(stamp.epoch)
            await self._remember(replace(memory, stamp=stamp))

    # -- pages that QEMU names -------------------------------------------------------------------------------------

    @property
    def page_source(self) -> str:
        return "tracker" if self.pages is None else "stream"

    @property
    def stopped_s(self) -> float | None:
        return None if self.pages is None else self.pages.stopped_s

    @property
    def unnamed_pages(self) -> int:
        return self.pages.unnamed if self.pages is not None and self.pages.is_naming else 0

    async def first_pages(self) -> PageBitmap:
        if self.pages is not None and self.pages.is_naming:
            return PageBitmap(self.plan.layout.pages)
        return await super().first_pages()

    async def more_pages(self) -> PageBitmap | None:
        if self.pages is None or not self.pages.is_naming:
            return None
        return await self._tracked(self.pages.more)

    async def name_ahead(self) -> None:
        if self.pages is not None and self.pages.is_naming:
            await self._tracked(self.pages.ahead)

    def page_stream(self) -> PageStream:
        """QEMU, to be asked for what the guest writes."""
        return PageStream(self.ask, self.qmp, self._files.outgoing, self._ram_bytes // PAGE_SIZE, self._has_stood)

    async def _has_stood(self) -> bool:
        return (await self.recall()).stands(await self._run_state())

    # -- images ----------------------------------------------------------------------------------------------------

    async def open_backends(self, epoch: Epoch) -> None:
        async with self._acts:
            memory = (await self.recall()).claimed(epoch)
            self._check_imported(memory)
            if not memory.is_open:
                await self._activate_all()
            opened = replace(memory, is_open=True)
            if opened != await self.recall():
                await self._remember(opened)

    async def close_backends(self) -> None:
        async with self._acts:
            await self._check_still()
            memory = await self.recall()
            if memory.is_open:
                await self._name_no_more()
                await self._save(memory, await self._run_state())

    async def _name_no_more(self) -> None:
        """Only a pause for handoff is the end of what QEMU names."""
        if self.pages is not None:
            await self.pages.stop()

    async def _activate_all(self) -> None:
        """Make all images active; what is active stays so.

        Raises: HypervisorError `backend_busy`, `backend_unavailable`: some images may be active then, and are locked.
        """
        failure = None
        try:
            for number in range(len(self.plan.disks)):
                await images.activate(self.ask, number, self._node(number))
        except HypervisorError as exc:
            if exc.code != "backend_unavailable":
                raise
            failure = exc
        busy = await self.in_thread(images.not_held, self._locked, self.process.pid) if self._locked else []
        if failure is not None and not busy:
            raise failure
        if busy:
            names = ", ".join(self.plan.disks[number].backend_name for number in busy)
            raise HypervisorError(f"backend {names}: open for writing elsewhere", code="backend_busy") from failure

    async def _save(self, memory: Remembered, state: str) -> None:
        """The file `state` is the guest's state, images are inactive, and *memory* is remembered; or all is as it was.

        Not given up half-way. Images are said to be closed before they are: what is open and said to be closed can be
        opened once more, but QEMU aborts when it shall make an image inactive that is.

        Raises: HypervisorError `pause_failed`, `flush_failed`, `backend_busy`.
        """
        before = await self.recall()
        with trio.CancelScope(shield=True):
            stands = memory.stands(state)
            await self._remember(replace(memory, is_open=False, is_deaf=memory.is_deaf or not stands))
            try:
                if not stands:
                    await self._listen(False)
                    if not memory.is_open:
                        await self._activate_all()
                    await self._save_now(was_running=state == "running")
                elif memory.is_open:
                    await self._activate_all()  # all of them, for certain
                    await images.deactivate(self.ask)
            except HypervisorError:
                await self._remember(before)
                if not before.is_deaf:
                    await self._listen(True)
                raise

    async def _listen(self, listens: bool) -> None:
        """Whether QEMU reads what is typed. What it writes goes on being appended to the same file."""
        for port in self.plan.serial_ports:
            files: dict[str, Any] = {"out": str(self._files.output(port.num)), "append": True}
            if listens:
                files["in"] = str(self._files.keys(port.num))
            await self.ask("chardev-change", id=self._port(port.num), backend={"type": "file", "data": files})

    async def _save_now(self, *, was_running: bool) -> None:
        async def note(stream: DeviceStream) -> None:
            self._saved = stream
            await self._with_files(self._files.keep_state, stream.joined())

        if self.pages is not None and self.pages.is_naming:
            rest_s = self._ram_bytes / _READ_AT_LEAST_BYTES_PER_S
            await self._in_time(partial(self.pages.finish, note), "save", self._request_deadline_s + rest_s)
            return
        save = partial(saving.save, self.ask, self.qmp, self._files.outgoing, note, was_running=was_running)
        await self._in_time(save, "save")

    @property
    def _ram_bytes(self) -> int:
        return self.plan.layout.size_bytes

    # -- moving ----------------------------------------------------------------------------------------------------

    async def export_time(self) -> TimeData:
        """Guest clocks travel in QEMU's own state; this says how long the guest has been up, and what time it is here.
        Its counter counts nanoseconds since it booted."""
        await self._check_still()
        return since_boot((await self.recall()).booted_ns, time.monotonic_ns(), time.time_ns())

    async def import_time(self, time_data: TimeData) -> Adjustment:
        wall_ns = time.time_ns()
        adjusted = adjust(time_data, time.monotonic_ns(), wall_ns // NS_PER_S, wall_ns % NS_PER_S)
        self._booted_ns = adjusted.time.boot_hrtime  # remembered with the devices, which follow
        return adjusted

    async def list_payloads(self) -> tuple[PayloadDescription, ...]:
        unfit = [*self.plan.unmigratable]
        unfit += [
            f"{disk.name} (nvme_disk: QEMU cannot save its NVMe controller)" for disk in belongings.unsaved(self.plan)
        ]
        if self.no_moving:
            unfit.append(f"guest RAM ({self.no_moving})")
        writers = await self._foreign_writers()
        unfit += [f"guest RAM (process {pid} may write to it unseen)" for pid in writers]
        if unfit:
            text = f"guest {self.plan.instance_id} cannot be moved: {', '.join(unfit)}"
            raise HypervisorError(text, code="not_migratable", details={"devices": unfit})
        known = await self.in_thread(belongings.known_devices, self._files)
        return (
            *payloads.describe_keys([port.name for port in self.plan.serial_ports]),
            *payloads.describe(known["labels"], list(belongings.blobs_of(self.plan))),
        )

    async def _foreign_writers(self) -> Sequence[int]:
        return await self.in_thread(foreign_writers, self.process.pid, RamIdentity(*self.ram.file))

    async def export_devices(self, versions: Mapping[str, int]) -> tuple[DevicePayload, ...]:
        async with self._acts:
            state, memory = await self._run_state(), await self.recall()
            self._check_stopped(state)
            if not memory.stands(state):
                await self._save(memory, state)
            return await self._with_files(belongings.collect, self.plan, self._files, self._saved)

    async def rehearse_export(self, versions: Mapping[str, int]) -> int:
        """Only a guest that stands still can be saved: what it was the last time is the best that can be told."""
        return int((await self.in_thread(belongings.known_devices, self._files))["bytes"])

    async def throttle(self, percent: int) -> None:
        if percent:
            raise HypervisorError("QEMU holds processors back only in its own migration", code="not_supported")

    async def import_devices(self, received: Sequence[DevicePayload]) -> tuple[tuple[str, str], ...]:
        async with self._acts:
            self.check_alive()
            memory = await self.recall()
            if not memory.is_arriving:
                text = f"guest {self.plan.instance_id} does not wait for device state"
                raise HypervisorError(text, code="not_arriving")
            stream, skipped = await self._with_files(belongings.take_in, self.plan, self._files, received)
            await self._load(stream)
            arrived = replace(memory, is_arriving=False, has_loaded=True, announces=True)
            await self._remember(replace(arrived, booted_ns=self._booted_ns or memory.booted_ns))
        return skipped

    async def _load(self, stream: bytes) -> None:
        try:
            await self._in_time(partial(saving.load, self.qmp, self._files.incoming, stream), "load")
        except HypervisorError as exc:
            words = self.last_words()
            # A QEMU that cannot load a state ends, if it could not be told to stay, and has said why.
            if words and (exc.code == "guest_lost" or exc.text.endswith(saving.NO_REASON)):
                text = f"QEMU did not load the device state: {words}"
                raise HypervisorError(text, code="device_load_failed") from exc
            raise

    async def console_history(self, port: str) -> ConsoleHistory:
        return await self._with_files(consoles.read_history, self._files.output(self._num(port)), port)

    async def import_console_history(self, history: ConsoleHistory) -> None:
        num = self._num(history.port)
        consoles.check_history(history)
        await self.in_thread(witness.note_beginning, self._files, num, history.total_bytes)
        await self.in_thread(consoles.write_history, self._files.output(num), history)

    async def console_input(self, port: str, keys: bytes) -> None:
        await self._check_not_given_away()
        await self.in_thread(consoles.type_keys, self._files.keys(self._num(port)), keys)

    # -- looking ---------------------------------------------------------------------------------------------------

    async def self_check(self) -> SelfCheck:
        """Have the guest's program check itself, if it shows its vital signs (`stress`)."""
        before = self._vitals()
        if before is None:
            text = f"guest {self.plan.instance_id} runs no program that checks itself"
            raise HypervisorError(text, code="not_supported")
        if await self._run_state() != "running":
            text = f"guest {self.plan.instance_id} is paused, and checks itself only while it runs"
            raise HypervisorError(text, code="guest_paused")
        await self.console_input(self.plan.serial_ports[0].name, b"v")
        deadline_s = self._request_deadline_s + _SELF_CHECK_S_PER_GIB * self.plan.layout.size_bytes / GIB
        with trio.move_on_after(deadline_s):
            while True:
                await trio.sleep(_LOOK_AGAIN_S)
                self.check_alive()
                after = self._vitals()
                if after is not None and after.checks_done > before.checks_done:
                    return stress.verdict(after)
        raise HypervisorError(f"no verdict within {deadline_s:g} s", code="guest_unresponsive")

    async def heartbeat_gaps(self) -> Mapping[str, Any]:
        raise HypervisorError(
            "a QEMU guest's heartbeat is seen on its console, by whoever watches it; it keeps no count of its own gaps",
            code="not_supported",
        )

    def _vitals(self) -> stress.Vitals | None:
        gpa = self.plan.program.get("vitals_gpa")
        run = None if gpa is None else self.plan.layout.locate(gpa, 1)
        if run is None:
            return None
        if isinstance(self.ram, CopiedRam):
            return stress.read_vitals(self.ram.page_now(run.first_page))
        start = run.first_page * PAGE_SIZE
        return stress.read_vitals(self.ram.view[start : start + PAGE_SIZE])

    # -- seams -----------------------------------------------------------------------------------------------------

    async def ask(self, command: str, **arguments: Any) -> Any:
        """One command to QEMU.

        Raises: QmpError; HypervisorError `guest_lost`, `guest_unresponsive`, `guest_taken_over`.
        """
        return await self._in_time(partial(self.qmp.execute, command, **arguments), command)

    async def _in_time(self, call: Any, what: str, deadline_s: float | None = None) -> Any:
        deadline_s = deadline_s or self._request_deadline_s
        with trio.move_on_after(deadline_s):
            try:
                return await call()
            except (OSError, EOFError) as exc:
                raise await self.explain_cut(exc) from exc
        self.check_alive()
        text = f"guest {self.plan.instance_id}: no answer to {what} within {deadline_s:g} s"
        raise HypervisorError(text, code="guest_unresponsive")

    async def _with_files(self, call: Callable[..., T], *args: Any) -> T:
        """In a thread. Raises: HypervisorError `guest_files`: its directory does not take, or give, what it should."""
        try:
            return await self.in_thread(call, *args)
        except OSError as exc:
            text = f"guest {self.plan.instance_id}: {exc.filename or self._files.directory}: {exc.strerror}"
            raise HypervisorError(text, code="guest_files") from exc

    def _node(self, number: int) -> str:
        """What QEMU calls the image of a disk."""
        return machine.node_of(number)

    def _port(self, num: str) -> str:
        """What QEMU calls the character device of a serial port."""
        return num

    async def _run_state(self) -> str:
        return text_of(await self.ask("query-status"), "status")

    async def _check_still(self) -> None:
        self._check_stopped(await self._run_state())

    def _check_stopped(self, state: str) -> None:
        if state == "running":
            raise HypervisorError(f"guest {self.plan.instance_id} is running", code="guest_running")

    def _num(self, port: str) -> str:
        for known in self.plan.serial_ports:
            if known.name == port:
                return known.num
        listed = ", ".join(known.name for known in self.plan.serial_ports) or "none"
        raise HypervisorError(f"no serial port {port} (there are: {listed})", code="no_such_port")

    async def resume_care(self) -> None:
        """Complete a guest that was adopted: what its last daemon was about to note is noted.

        Raises: HypervisorError.
        """
        await saving.settle(self.ask)
        while (state := await self._run_state()) in _PASSING:  # noqa: ASYNC110 (another process' state)
            await trio.sleep(_LOOK_AGAIN_S)
        memory = await self.recall()
        held = bool(self._locked) and not await self.in_thread(images.not_held, self._locked, self.process.pid)
        if state == "running" and memory.is_deaf:
            await self._listen(True)
            memory = replace(memory, is_deaf=False)
        is_open = memory.is_open or state == "running" or held
        if (cared := replace(memory, is_open=is_open)) != await self.recall():
            await self._remember(cared)

    async def begin(self, memory: Remembered, *, keeps_images: bool, outlives_bad_state: bool) -> None:
        """Complete a guest that was just built: consoles, and images that are inactive until they are asked for.

        Args:
            keeps_images: It has a device that QEMU cannot save: its images stay open, and it stays here.
            outlives_bad_state: As in `QemuFacts`.
        """
        self._memory = memory
        await self._listen(False)
        await saving.prepare(self.ask)
        await images.prepare(self.ask, self._files)
        if memory.is_arriving:
            await saving.prepare_loading(self.ask, self._files.incoming, outlives_failure=outlives_bad_state)
        elif keeps_images:
            await self._remember(replace(memory, is_open=True))
        else:
            await self._save(memory, "prelaunch")
            await self.in_thread(belongings.note_devices, self._files)

    def hang_up(self) -> None:
        self.qmp.close()

    def remove_files(self) -> None:
        self._files.remove()

    def last_words(self) -> str:
        return self._files.last_words()
