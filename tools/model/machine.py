"""What every part of a modelled daemon rests on: the journal's conditional append, and effects on guest processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from tools.model.world import (
    NEVER,
    VM,
    At,
    Class,
    Daemon,
    Damage,
    Disk,
    Failure,
    Host,
    Letter,
    Message,
    Process,
    Scenario,
    Task,
)
from vmmigrate.engine import journal_format
from vmmigrate.errors import JournalError, VmMigrateError
from vmmigrate.ownership import rules, state
from vmmigrate.ownership.records import Epoch, Record
from vmmigrate.ownership.rules import Decision, Event
from vmmigrate.ownership.state import InstanceState, Ownership


@dataclass(frozen=True, slots=True)
class Engine:
    """What the daemons do outside of the pure functions. Every default is what the design asks for; `mutations` turns
    one of them at a time.

    Attributes:
        fsync: Append makes durable before it returns.
        poison: After a failed write or fsync the daemon exits.
        rewrite: An opened journal is made durable before it is acted upon.
        pause_survives: A guest paused for handoff stays paused when its daemon dies.
        note_before_handoff: The guest remembers the number of `released` before the Handoff leaves.
        notes_at_restart: A restarted source in doubt tells its guest again how long the journal is.
        sees_guests: Settle looks for the guest process of M itself, not for what this daemon built.
        open_first: Disks and NICs are open before `started` is written.
        run_after_started: No vCPU runs before `started` is durable.
        run_before_resumed: Undo runs the guest first, and then journals that the attempt is over.
        reclaims_first: `reclaimed` is durable before the guest that was taken back runs.
        waits_for_evidence: A source in doubt whose connection fails stays paused and asks.
        pauses_superseded: A superseded guest is paused before the supersession is acknowledged.
        writes_superseded: A supersession is a journal record, not a note in memory.
    """

    fsync: bool = True
    poison: bool = True
    rewrite: bool = True
    pause_survives: bool = True
    note_before_handoff: bool = True
    notes_at_restart: bool = True
    sees_guests: bool = True
    open_first: bool = True
    run_after_started: bool = True
    run_before_resumed: bool = True
    reclaims_first: bool = True
    waits_for_evidence: bool = True
    pauses_superseded: bool = True
    writes_superseded: bool = True


@dataclass(frozen=True, slots=True)
class Move:
    """One step of one host, and what leaves it. `closes`: connections of which this host's side is gone now."""

    label: str
    host: Host
    sends: tuple[Message, ...] = ()
    letters: tuple[Letter, ...] = ()
    closes: tuple[str, ...] = ()
    failure: Failure | None = None
    classes: Class = Class.NONE
    fences: bool = False
    unfences: bool = False


class Unreadable(Exception):  # noqa: N818
    """A journal from which nothing may be decided; the daemon does not start."""


class Machine:
    """The fold of journals, remembered, and the conditional append."""

    def __init__(self, scenario: Scenario, engine: Engine) -> None:
        self.scenario = scenario
        self.engine = engine
        self._folds: dict[tuple[Record, ...], Ownership | JournalError] = {(): Ownership()}

    # -- journal ---------------------------------------------------------------------------------------------------

    def fold(self, records: tuple[Record, ...]) -> Ownership:
        """What *records* add up to. Raises: JournalError: the rules can never have written them."""
        folded = self._folds.get(records)
        if folded is None:
            before = self.fold(records[:-1])
            try:
                folded = state.apply(before, records[-1])
            except JournalError as error:
                folded = error
            self._folds[records] = folded
        if isinstance(folded, JournalError):
            raise folded
        return folded

    def state(self, host: Host) -> Ownership:
        assert host.daemon is not None
        return self.fold(host.daemon.known)

    def instance(self, host: Host) -> InstanceState | None:
        return self.state(host).instances.get(VM)

    def commit(
        self,
        host: Host,
        event: Event,
        label: str,
        then: Callable[[Host, Decision], Move],
        refused: Callable[[VmMigrateError], Move] | None = None,
    ) -> Iterator[Move]:
        """One conditional append: *then* what follows its fsync, or *refused*; and every way in which it breaks."""
        assert host.daemon is not None
        try:
            decision = rules.decide(self.state(host), event)
        except VmMigrateError as error:
            if refused is not None:
                move = refused(error)
                yield replace(move, label=f"{host.name}: {label}: refused ({error.code}); {move.label}")
            return
        move = then(self._written(host, decision.records), decision)
        names = ", ".join(type(record).__name__.lower() for record in decision.records) or "nothing"
        yield replace(move, label=f"{host.name}: {label}: {names} {move.label}".rstrip())
        for count in range(1, len(decision.records) + 1):
            seen = replace(host.disk, cached=host.disk.cached + decision.records[:count])
            text = f"{host.name}: {label}: {count} of {names} written, no fsync"
            if self.engine.poison:
                yield self.dies(replace(host, disk=seen), text, Failure.FSYNC)
            elif refused is not None:
                move = refused(JournalError("an fsync failed", code="journal_poisoned"))
                on = replace(move.host, disk=seen)
                yield replace(move, host=on, label=text + ", and on it goes", failure=Failure.FSYNC)

    def _written(self, host: Host, records: tuple[Record, ...]) -> Host:
        """*host* after a whole append."""
        if not records:
            return host
        assert host.daemon is not None
        cached = host.disk.cached + records
        durable = cached if self.engine.fsync else host.disk.durable
        daemon = replace(host.daemon, known=host.daemon.known + records)
        return replace(host, disk=replace(host.disk, durable=durable, cached=cached), daemon=daemon)

    def read(self, disk: Disk) -> tuple[Record, ...]:
        """What a reader of the file gets, by the real decoder. Raises: Unreadable."""
        if disk.damage is Damage.UNREADABLE:
            raise Unreadable("journal_corrupt")
        if disk.damage is not Damage.NONE:
            raw = _bytes_of(disk)
            try:
                records = journal_format.read_contents(raw, disk.journal).records
            except JournalError as error:
                raise Unreadable(error.code) from error
        else:
            records = disk.cached
        try:
            self.fold(records)
        except JournalError as error:
            raise Unreadable(error.code) from error
        return records

    # -- daemons ---------------------------------------------------------------------------------------------------

    def dies(self, host: Host, label: str, failure: Failure | None) -> Move:
        """The daemon is gone; guests stay as they are, and so does what it had sent."""
        processes = host.processes
        if not self.engine.pause_survives:
            processes = tuple(_wakes(process) if not process.is_open else process for process in processes)
        gone = replace(host, daemon=None, processes=processes)
        return Move(label, gone, closes=_connections(host.daemon), failure=failure)

    def put(self, host: Host, task: Task) -> Host:
        """*host* with *task* in the place of what it did for that migration."""
        assert host.daemon is not None
        others = [other for other in host.daemon.tasks if other.migration != task.migration]
        return self._with_tasks(host, [*others, task])

    def drop(self, host: Host, migration: str) -> Host:
        assert host.daemon is not None
        return self._with_tasks(host, [task for task in host.daemon.tasks if task.migration != migration])

    @staticmethod
    def _with_tasks(host: Host, tasks: list[Task]) -> Host:
        assert host.daemon is not None
        in_order = tuple(sorted(tasks, key=lambda task: task.migration))
        return replace(host, daemon=replace(host.daemon, tasks=in_order))

    def mark(self, host: Host, reason: str) -> Host:
        assert host.daemon is not None
        if reason in host.daemon.marks:
            return host
        return replace(host, daemon=replace(host.daemon, marks=(*host.daemon.marks, reason)))

    def may_run(self, host: Host) -> bool:
        """Whether disks may open and vCPUs run here, by the journal of this moment."""
        known = self.instance(host)
        return known is not None and self.state(host).may_run(VM, known.epoch)

    # -- guests ----------------------------------------------------------------------------------------------------

    def own_process(self, host: Host) -> Process | None:
        """The process of the instance that the journal knows, if it is alive."""
        known = self.instance(host)
        return None if known is None or known.guest is None else process_of(host, known.guest.pid)

    def arriving(self, host: Host, migration: str) -> Process | None:
        """The process that is built for *migration*, or was, if it is alive."""
        return next((process for process in host.processes if process.migration == migration), None)


def process_of(host: Host, pid: int) -> Process | None:
    return next((process for process in host.processes if process.pid == pid), None)


def with_process(host: Host, process: Process) -> Host:
    others = tuple(other for other in host.processes if other.pid != process.pid)
    ran = host.ran
    if process.running and process.ran not in ran:
        ran = tuple(sorted((*ran, process.ran)))
    return replace(host, processes=tuple(sorted((*others, process), key=lambda other: other.pid)), ran=ran)


def without_processes(host: Host, *pids: int) -> Host:
    return replace(host, processes=tuple(process for process in host.processes if process.pid not in pids))


def opened(process: Process, epoch: Epoch) -> Process | None:
    """Disks open under *epoch*; None when the process has seen a newer one (`stale_epoch`)."""
    return None if epoch < process.seen else replace(process, is_open=True, seen=epoch)


def run(process: Process, epoch: Epoch, newest_record: int) -> Process | None:
    """Running under *epoch*, and told how long the journal is; None when it refuses."""
    ready = opened(process, epoch)
    return ready and replace(ready, running=True, ran=epoch, last_record=max(process.last_record, newest_record))


def paused(process: Process) -> Process:
    """As an operator pauses: disks stay open."""
    return replace(process, running=False)


def newest(host: Host) -> int:
    assert host.daemon is not None
    return len(host.daemon.known)


def _wakes(process: Process) -> Process:
    """For a mutation: a pause that was only as good as its daemon."""
    return replace(process, running=process.ran != NEVER, is_open=process.ran != NEVER)


_UNCONNECTED = frozenset({At.AWAIT_OFFER, At.RESERVE})


def _connections(daemon: Daemon | None) -> tuple[str, ...]:
    tasks = () if daemon is None else daemon.tasks
    return tuple(task.migration for task in tasks if task.at not in _UNCONNECTED and not task.settling)


def _bytes_of(disk: Disk) -> bytes:
    """The file, as the real journal writes it, with its damage."""
    raw = journal_format.encode(disk.journal, 0, disk.cached)
    if disk.damage is Damage.FLIPPED:
        end = len(journal_format.encode(disk.journal, 0, disk.cached[: disk.damaged + 1]))
        return raw[: end - 1] + bytes([raw[end - 1] ^ 1]) + raw[end:]
    return raw + journal_format.frame({"torn": True}, len(disk.cached) + 1)[:-1]
