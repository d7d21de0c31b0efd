"""What the engine asks of a hypervisor.

The Protocols are small on purpose. Optional powers are data (`Capabilities`), asked before a migration starts and
each with its reason when absent. One conformance kit (`hypervisor/conformance.py`) runs on every adapter.

Rules that every adapter keeps (the ownership rules rest on them):

- A guest runs in a process of its own, which outlives the daemon and never changes its run state because the daemon
  vanished. It is stamped with (instance, epoch, migration) and refuses `run` with a lower epoch than it has seen.
- Only the guest's own process writes its RAM while it can run; the daemon of a source maps it read-only.
- A pause for handoff is complete when the guest stays paused even if its daemon dies.
- A guest that was `build`-ed for a migration never runs and opens nothing for writing until `open_backends` and `run`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from vmmigrate.devices.payload import DevicePayload
from vmmigrate.devices.time import Adjustment, TimeData
from vmmigrate.memory import PageBitmap, RamLayout, Runs

if TYPE_CHECKING:  # a guest process starts without what reads specs
    from vmmigrate.spec.latest import Cpuid


PciAddress = tuple[int, int, int]  # bus, device, function


class RunState(StrEnum):
    """Whether the vCPUs of a guest execute."""

    RUNNING = "running"
    PAUSED = "paused"


@dataclass(frozen=True, slots=True)
class Capability:
    """One optional power. `reason` says why it is absent, or how it is provided."""

    available: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an adapter can do on this host, probed once at start by really doing it.

    Attributes:
        facts: What `devices.opaque` calls the facts of a host.
        opaque_kinds: The payloads that only this hypervisor reads, and the versions that it reads and writes.
    """

    hypervisor: str
    version: str
    dirty_tracking: str  # "kernel" or "software"
    dirty_tracking_reason: str
    huge_pages: Capability
    throttle: Capability
    facts: Mapping[str, str] = field(default_factory=dict)
    opaque_kinds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GuestStamp:
    """Who a guest process is: found again by this after a restart of the daemon."""

    instance_id: str
    host_id: str
    epoch: tuple[int, int]
    migration_id: str | None


@dataclass(frozen=True, slots=True)
class SerialPortPlan:
    name: str
    num: str  # com1 .. com4


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """A disk of the guest and the backend behind it. `backend` is what the adapter opens (and nothing else)."""

    name: str
    model: str  # "virtio" or "nvme"
    backend_name: str
    backend_kind: str  # "crucible", "file" or "blob"
    readonly: bool
    backend: Mapping[str, Any]
    pci_path: PciAddress = (0, 0, 0)
    serial: str = ""


@dataclass(frozen=True, slots=True)
class NicPlan:
    name: str
    backend_name: str
    vnic_name: str
    pci_path: PciAddress = (0, 0, 0)
    interface_id: str = ""


@dataclass(frozen=True, slots=True)
class BoardPlan:
    """What a guest sees beside its devices. An adapter that cannot show it says so in `problems`.

    Attributes:
        boot_order: Disks by name, the first one first.
        smbios: Fields of the table of type 1: manufacturer, product_name, serial_number, version.
        cpuid: None: the adapter's own default.
        pvpanic_isa: None: there is no such device.
        bridges: PCI bridges by name, with the bus behind each.
    """

    enable_pcie: bool = False
    hv_interface: str = "bhyve"
    boot_order: Sequence[str] = ()
    smbios: Mapping[str, str] | None = None
    cpuid: Cpuid | None = None
    pvpanic_isa: bool | None = None
    bridges: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InjectorPlan:
    """The migration failure injector: fails its first exports and imports."""

    name: str
    fail_exports: int
    fail_imports: int


@dataclass(frozen=True, slots=True)
class GuestPlan:
    """Everything an adapter needs to build a guest; made from the internal Spec, never from wire bytes."""

    instance_id: str
    layout: RamLayout
    cpus: int
    serial_ports: Sequence[SerialPortPlan] = ()
    disks: Sequence[DiskPlan] = ()
    nics: Sequence[NicPlan] = ()
    injector: InjectorPlan | None = None
    program: Mapping[str, Any] = field(default_factory=lambda: {"name": "idle"})
    unmigratable: Sequence[str] = ()  # devices that no payload can carry; they keep the guest on its host
    board: BoardPlan = BoardPlan()
    like: Mapping[str, str] = field(default_factory=dict)  # facts of the guest at the source, of one that arrives


@dataclass(frozen=True, slots=True)
class GuestProcess:
    """How a guest process is found again: pid and its start time (clock ticks since boot) together are unique."""

    pid: int
    start_ticks: int
    socket_path: Path


@dataclass(frozen=True, slots=True)
class GuestStatus:
    """A frozen look at a guest.

    `heartbeats` counts 1 ms ticks since boot and travels with the guest; `last_record` is the highest journal record
    number that the daemon has told it, and `last_journal` the id of that journal; `handoff` is the migration for which
    it was paused last, until it runs again; `ran_epoch` is the epoch under which it was told to run last, (0, 0) when
    it never was; `throttle_percent` is how much of the time its processors are held.
    """

    stamp: GuestStamp
    run_state: RunState
    heartbeats: int
    last_record: int
    backends_open: bool
    program: Mapping[str, Any]
    handoff: str | None = None
    ran_epoch: tuple[int, int] = (0, 0)
    last_journal: str = ""
    throttle_percent: int = 0


@dataclass(frozen=True, slots=True)
class FoundGuest:
    """A guest process that was found by looking for it, and not by a journal: where it is, and what it says it is."""

    process: GuestProcess
    status: GuestStatus


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """The guest's own verdict on its memory: every page it wrote is as it wrote it last."""

    consistent: bool
    pages_checked: int
    first_bad_page: int | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ConsoleHistory:
    """Serial console output: the first MiB, the most recent MiB and how many bytes there were."""

    port: str
    beginning: bytes
    rolling: bytes
    total_bytes: int


@dataclass(frozen=True, slots=True)
class PayloadDescription:
    """One payload that a guest will export, known before RAM moves: the versions that can say its present state."""

    instance_name: str
    kind: str
    versions: tuple[int, ...]
    optional: bool = False


class GuestRam(Protocol):
    """A guest's RAM as the daemon maps it: one file, regions one after the other (`RamLayout`).

    Attributes:
        file: Device and inode of the file.
        is_copied: The guest's process has it for itself: here it is read after `fetch`, and is gone with the process.
    """

    layout: RamLayout
    file: tuple[int, int]
    is_copied: bool

    @property
    def view(self) -> memoryview:
        """All of RAM as bytes: read-only at a source, writable at a destination under construction.

        Whoever keeps a view, keeps the mapping.
        """

    @property
    def pages(self) -> npt.NDArray[np.uint64]:
        """The same memory, shape (layout.pages, 512)."""

    def populated(self) -> PageBitmap:
        """Pages that were ever touched, by SEEK_DATA and SEEK_HOLE: reading a hole would allocate it."""

    def fetch(self, runs: Runs) -> None:
        """Have pages be here as the guest has them now; others, that were fetched before, are no longer. Nothing, where
        RAM is not copied. Blocking: about 0.5 s for a GiB.

        Raises: HypervisorError `ram_read`.
        """

    def sample(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """A copy of some pages as the guest has them now, whatever was fetched; shape (len(numbers), 512).

        Args:
            numbers: Ascending, of pages that were touched.

        Raises: HypervisorError `ram_read`.
        """

    def populate(self, first_page: int, pages: int) -> None:
        """Make pages be there before they are written; their contents stay. Only while the guest cannot run. Blocking.

        Raises: HypervisorError `ram_populate`: not possible, or no memory; some pages may be there.
        """

    @property
    def fills(self) -> bool:
        """Whether `fill` does anything. Then it is better than to populate."""

    def fill(self, first_page: int, contents: npt.NDArray[np.uint64]) -> int:
        """Put *contents*, which lie in one piece, where no page is yet; how many pages that was, from the first one.
        The others have to be written. Only while the guest cannot run. Blocking; several threads may.
        """

    def punch(self, pages: PageBitmap) -> None:
        """Give pages back; they read as zero. Only while the guest cannot run. Blocking."""

    def make_read_only(self) -> None:
        """Give up the writable mapping: from now on only the guest's process writes. At once, however large the guest;
        views of it that somebody still holds must not be written through any more. Idempotent.
        """

    def drop_retired(self) -> None:
        """Take down what `make_read_only` gave up, with its page tables: views of it read as zero then. Blocking: about
        25 ms for a GiB. Idempotent.
        """

    def close(self) -> None:
        """Unmap: views that somebody still holds read zeros from now on. Blocks while page tables go. Idempotent."""


class Guest(Protocol):
    """One guest on this host. Every call has a deadline; a dead guest raises HypervisorError `guest_lost`."""

    plan: GuestPlan
    process: GuestProcess
    ram: GuestRam

    @property
    def facts(self) -> Mapping[str, str]:
        """What `devices.opaque` calls the facts of a guest."""

    async def status(self) -> GuestStatus: ...

    async def run(self, epoch: tuple[int, int]) -> None:
        """Start or resume the vCPUs. Refused (`stale_epoch`) when the guest has seen a higher epoch.

        Opens the backends first when they are closed, so a source that takes its guest back needs only this. A guest
        that has powered itself off stays off, and that is no error: whoever waits for it hears of it.
        """

    async def pause(self) -> None:
        """Pause as an operator would."""

    async def reboot(self) -> None:
        """Reset the machine, as its reset button does: what runs on it begins anew. It stays running, or paused.

        Refused (`guest_paused_for_handoff`) after `pause_for_handoff`: it would not arrive.
        """

    async def wait_power_off(self) -> None:
        """Return when the guest has powered itself off. Its process stays until `destroy`, holds no disk open, and
        never runs again. That the process is gone is told by `wait_exit`, and never by this.
        """

    async def pause_for_handoff(self, migration_id: str) -> None:
        """Pause so that the guest stays paused even if this daemon dies now.

        Flushes and closes the backends too, so that the destination may open them. After this call the guest cannot
        power itself off.

        Raises: HypervisorError `flush_failed`: a disk did not take what the guest wrote; `guest_powered_off`: it has
            powered itself off. The guest is then as it was.
        """

    async def open_backends(self, epoch: tuple[int, int]) -> None:
        """Open disks for writing and activate NICs. Needs the current epoch; all or nothing."""

    async def close_backends(self) -> None:
        """Flush and close; the guest must be paused. Idempotent. Raises: HypervisorError `flush_failed`, still open."""

    async def silence(self, epoch: tuple[int, int], record: int) -> None:
        """Another host has it under *epoch*: pause, close the backends, and obey nobody who offers less from now on.
        In one step, so that no `run` comes in between. *record* as in `note_record`. Idempotent.
        """

    @property
    def page_source(self) -> str:
        """Who tells which pages were written: "tracker", who knows of all at any time; "stream", who *names* them bit
        by bit in passes over RAM, all of it at first, and stops the guest by itself when hardly any are left.
        """

    @property
    def stopped_s(self) -> float | None:
        """`time.monotonic` of when a stream stopped the guest for its last pass, by itself or told to; None before."""

    @property
    def unnamed_pages(self) -> int:
        """How many a stream has still to name in this pass, about."""

    async def first_pages(self) -> PageBitmap:
        """What a migration begins with, once tracking is on: every page that was ever touched; none, of a stream."""

    async def more_pages(self) -> PageBitmap | None:
        """The next pages that a stream names. None: the pass is over (what is named next belongs to another one), or
        the guest has stopped. It is asked for more as the last ones land: a stream takes us for the link.

        Raises: HypervisorError `dirty_tracking`.
        """

    async def name_ahead(self) -> None:
        """Let a stream name what `more_pages` gives next, beside the sending of what it gave last.

        Raises: HypervisorError `dirty_tracking`.
        """

    async def fetch(self, pages: PageBitmap) -> None:
        """Have *pages* be in `ram` as the guest has them now, and no others; nothing, where RAM is mapped. For pages
        whose marks were taken before: what is written later is marked again.

        Raises: HypervisorError `ram_read`.
        """

    async def start_tracking(self) -> None:
        """From now on every write by the guest leaves a mark. Marks start clear."""

    async def take_dirty(self) -> PageBitmap:
        """Which pages were written since the last call; clears (and write-protects) before any later read.

        Raises: HypervisorError; the marks are then unknown, so offer every populated page.
        """

    async def mark_dirty(self, pages: PageBitmap) -> None:
        """Put marks back after a failed attempt into the next `take_dirty`.

        They may die with the daemon, and `start_tracking` drops them: a migration begins with all populated pages.
        """

    async def stop_tracking(self) -> None: ...

    async def export_time(self) -> TimeData: ...

    async def import_time(self, time: TimeData) -> Adjustment:
        """Adjust by this host's clocks and apply (devices/time.py has the rules and every error).

        What was set, and whether this host's clock was behind (`clamped`).
        """

    async def list_payloads(self) -> tuple[PayloadDescription, ...]:
        """What `export_devices` will give. An older version is listed only if it says the state exactly as it is now.

        Raises: HypervisorError `not_migratable`: naming every device that cannot migrate, at once.
        """

    async def export_devices(self, versions: Mapping[str, int]) -> tuple[DevicePayload, ...]:
        """The state of all devices, each kind in the version named in *versions* (its newest when not named).

        Raises: PayloadError `payload_lossy`: state has changed since it was listed; the older version cannot say it.
        """

    async def import_devices(self, payloads: Sequence[DevicePayload]) -> Sequence[tuple[str, str]]:
        """Validate all, then apply all. On PayloadError nothing was applied.

        Which optional payloads were skipped, as (device, kind).
        """

    async def rehearse_export(self, versions: Mapping[str, int]) -> int:
        """Do what `export_devices` would do, of a guest that may run, and throw it away: how many bytes it was.

        It tells what the export will cost, and nothing about whether it will succeed.
        """

    async def throttle(self, percent: int) -> None:
        """Let the guest's processors stand still for *percent* (0 to 99) of the time; 0 lets them go.

        It stays so until it is told otherwise, also when the daemon dies: who adopts a guest lets it go.

        Raises: HypervisorError `not_supported`: `Capabilities.throttle` said so.
        """

    async def console_history(self, port: str) -> ConsoleHistory: ...

    async def import_console_history(self, history: ConsoleHistory) -> None: ...

    async def console_input(self, port: str, keys: bytes) -> None:
        """Type on the serial console. Refused (`guest_paused_for_handoff`) after `pause_for_handoff`: the port may have
        been exported already, and the keys would be lost.
        """

    async def note_record(self, journal_id: str, number: int) -> None:
        """Tell the guest the newest record of the journal that decides about it, so that a shorter journal, or another
        one, is noticed later. Numbers of one journal only grow; those of another begin anew."""

    async def restamp(self, stamp: GuestStamp) -> None: ...

    async def self_check(self) -> SelfCheck:
        """Check all memory that the guest's program wrote. The guest may run; its heartbeat then goes on."""

    async def heartbeat_gaps(self) -> Mapping[str, Any]:
        """Guest-observed pauses in milliseconds, nothing subtracted: at least `heartbeats`, `largest_gap_ms`,
        `steady_p99_ms`, `steady_largest_gap_ms` and, by move, `move_gaps_ms`.
        """

    def release_ram(self) -> GuestRam | None:
        """Take RAM out of the guest: it stays mapped as it is, whatever becomes of the process, until it is closed by
        the caller. The guest is good for `destroy` only, from then on. Never of a guest that may run again.

        Returns: None: it was released before, or is being freed by `destroy`.
        """

    async def destroy(self) -> bool:
        """End the process and free RAM, sockets and files. Idempotent; never raises.

        Returns: Whether the process is gone. False after half a minute: it hangs in the kernel, and may still hold its
            disks; it runs no more, and can be asked to go again.
        """

    async def wait_exit(self) -> int:
        """Return when the process is gone, with its exit status (or -1 for an adopted process)."""

    def detach(self) -> None:
        """Let go without touching the guest: what a daemon does when it stops."""


class Hypervisor(Protocol):
    """An adapter: builds guests and finds them again."""

    capabilities: Capabilities

    def problems(self, plan: GuestPlan) -> list[str]:
        """What this adapter cannot realise of *plan*; all of it, before anything is built."""

    async def build(self, plan: GuestPlan, stamp: GuestStamp, *, for_migration: bool) -> Guest:
        """Create a guest, paused, its RAM never touched. With *for_migration* its RAM is mapped writable here
        and its program is not loaded (it arrives as a device payload).

        Raises: HypervisorError; nothing is left behind.
        """

    async def adopt(self, stamp: GuestStamp, plan: GuestPlan, process: GuestProcess) -> Guest | None:
        """Take over a guest that outlived its daemon, dirty marks intact; None when that process is gone.

        Raises: HypervisorError: a process answers, and it is not that guest.
        """

    async def adopt_foreign(self, plan: GuestPlan, stamp: GuestStamp, monitor: Path, pid: int | None) -> Guest:
        """Take over a running guest that something else started, as it is, if it is what *plan* says.

        Args:
            monitor: The socket by which it is commanded.
            pid: Its process; None: the one that made that socket.

        Raises:
            SpecCreatableError: `not_that_machine`: with all that differs; `host_refuses`. HypervisorError: `monitor`,
                `monitor_busy`, `not_supported`. The guest runs on as before, and nothing is left.
        """

    async def identity_of(self, monitor: Path) -> str | None:
        """The UUID of a guest that something else started; None when it has none. Raises: as `adopt_foreign`."""

    async def give_back(self, guest: Guest) -> None:
        """Let go of a guest of `adopt_foreign` that no journal knows of. It runs on."""

    async def find_others(self, known: Collection[Path]) -> Sequence[FoundGuest]:
        """Every guest process on this host but those at the sockets *known*. They are asked who they are and left as
        they are; what a dead one left behind is removed. Only before guests are adopted: a guest hears one daemon.
        """

    async def silence(self, process: GuestProcess, epoch: tuple[int, int], record: int) -> bool:
        """`Guest.silence` for a guest that is not adopted.

        Returns: False when that process is gone. Raises: HypervisorError: it lives and did not obey.
        """

    async def end_leftover(self, process: GuestProcess) -> bool:
        """End a guest process that nobody owns, and remove its files; whether it was still there."""
