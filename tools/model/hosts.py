"""One host's moves: what its daemon may do next, what a message or letter makes of it, and what may befall it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tools.model.destination import Destination
from tools.model.machine import Engine, Machine, Move, Unreadable, without_processes
from tools.model.restart import Restart
from tools.model.source import Source
from tools.model.world import (
    VM,
    WAITING,
    At,
    Class,
    Daemon,
    Damage,
    Disk,
    Failure,
    Host,
    Letter,
    Mail,
    Message,
    Process,
    Scenario,
    Task,
)
from vmmigrate.errors import VmMigrateError
from vmmigrate.ownership import records as r
from vmmigrate.ownership import rules
from vmmigrate.ownership.records import FIRST_EPOCH
from vmmigrate.ownership.rules import Decision
from vmmigrate.ownership.state import OPEN_OUTGOING, Holding
from vmmigrate.wire.phases import Role, next_phase

BORN = (r.Created(VM, FIRST_EPOCH), r.Spawned(VM, None, 1, 1, "/run/1.sock"))


class Hosts:
    """The local half of the model; what happens between hosts is `explore`."""

    def __init__(self, scenario: Scenario, engine: Engine) -> None:
        self.machine = Machine(scenario, engine)
        self.scenario = scenario
        self._source = Source(self.machine)
        self._destination = Destination(self.machine)
        self._restart = Restart(self.machine)

    def first(self, name: str) -> Host:
        """*name* before anything happens; the first of the scenario has the guest."""
        if name != self.scenario.hosts[0]:
            return Host(name, Disk(name, (), ()), daemon=Daemon(()))
        process = Process(1, None, True, True, FIRST_EPOCH, FIRST_EPOCH, len(BORN))
        return Host(name, Disk(name, BORN, BORN), (process,), Daemon(BORN), (FIRST_EPOCH,))

    # -- what it does ----------------------------------------------------------------------------------------------

    def moves(self, host: Host) -> Iterator[Move]:
        """Everything that this host may do by itself, and everything that may befall it."""
        if host.daemon is None:
            yield from self._restart.begin(host)
        elif host.daemon.todo:
            yield from self._restart.moves(host)
        else:
            yield from self._working(host, host.daemon)
        yield from self._breaks(host)

    def _working(self, host: Host, daemon: Daemon) -> Iterator[Move]:
        for task in daemon.tasks:
            steps = self._source.steps if task.role is Role.SOURCE else self._destination.steps
            step = steps.get(task.at)
            if step is not None:
                yield from step(host, task)
        if not daemon.marks:
            yield from self._begin(host)
            yield from self._watch(host)
        yield from self._tell(host)
        yield from self._restart.give_way(host)

    def _begin(self, host: Host) -> Iterator[Move]:
        """The next migration of the scenario that begins here, once the guest runs here and the one before is over."""
        m = self.machine
        state, known, process = m.state(host), m.instance(host), m.own_process(host)
        if known is None or known.holding is not Holding.HELD or process is None or not process.running:
            return
        if "'" in host.disk.journal:
            return  # a migration's id is never used again, and this journal has forgotten which ones were
        for trip in self.scenario.trips:
            if trip.source != host.name:
                continue
            outgoing = state.outgoing.get(trip.migration)
            if outgoing is None:
                yield from self._source.begin(host, trip.migration, trip.destination)
            if outgoing is None or outgoing.stage in OPEN_OUTGOING:
                return

    def _watch(self, host: Host) -> Iterator[Move]:
        """The process of the instance ended by itself."""
        m = self.machine
        known = m.instance(host)
        if known is None or known.guest is None or m.own_process(host) is not None:
            return
        if known.holding not in {Holding.HELD, Holding.RELEASED}:
            return

        def lost(after: Host, _: Decision) -> Move:
            assert after.daemon is not None
            over = [
                task.migration
                for task in after.daemon.tasks
                if task.role is Role.SOURCE
                and not task.settling
                and m.state(after).outgoing[task.migration].stage not in OPEN_OUTGOING
            ]
            for migration in over:
                after = m.drop(after, migration)
            return Move("", after, closes=tuple(over))

        yield from m.commit(host, rules.Lose(VM, "gone", known.guest), "notices a dead guest", lost)

    def _tell(self, host: Host) -> Iterator[Move]:
        """A winner that runs, or a superseded host that gave the guest away, passes the word on."""
        m = self.machine
        for notice in rules.notices(m.state(host)):
            process, known = m.own_process(host), m.instance(host)
            owner = known is not None and known.holding is Holding.HELD and m.state(host).may_run(VM, known.epoch)
            if owner and (process is None or not process.running):
                continue
            letter = Letter(Mail.SUPERSEDED, notice.migration, notice.host, notice.epoch, since=notice.since)
            yield Move(f"{host.name}: tells {notice.host} that it is superseded", host, letters=(letter,))

    # -- what reaches it -------------------------------------------------------------------------------------------

    def serves(self, host: Host) -> bool:
        return host.daemon is not None and not host.daemon.todo

    def task(self, host: Host, migration: str) -> Task | None:
        tasks = host.daemon.tasks if host.daemon else ()
        return next((task for task in tasks if task.migration == migration), None)

    def receive(self, host: Host, message: Message) -> Iterator[Move]:
        """The next message of a connection. Nothing yet when its task is busy."""
        task = self.task(host, message.migration)
        if task is None or task.settling:
            yield Move(f"{host.name}: drops {message.kinds[-1].name}", host, closes=(message.migration,))
            return
        if task.at not in WAITING:
            return
        phase = task.phase
        for kind in message.kinds:
            following = next_phase(phase, message.speaker, kind)
            if following is None:
                why = f"{host.name}: {kind.name} is illegal in {phase}"
                yield self._fail(host, task, why)
                return
            phase = following
        end = self._source if task.role is Role.SOURCE else self._destination
        yield from end.receive(host, replace(task, phase=phase), message)

    def end_of_stream(self, host: Host, migration: str, why: str) -> Iterator[Move]:
        """The connection is gone, or this side gives up waiting."""
        task = self.task(host, migration)
        if task is None:
            yield Move(f"{host.name}: {why}", host, closes=(migration,))
        elif task.at in WAITING:
            yield self._fail(host, task, f"{host.name}: {why}")

    def _fail(self, host: Host, task: Task, why: str) -> Move:
        end = self._source if task.role is Role.SOURCE else self._destination
        return end.fail(host, task, why)

    def open_letter(self, host: Host, letter: Letter) -> Iterator[Move]:
        """A request or answer outside the connection."""
        m = self.machine
        if letter.mail is Mail.TICKET and self.task(host, letter.migration) is not None:
            yield Move(f"{host.name}: migrate-in {letter.migration} again: migration_exists", host)
        elif letter.mail is Mail.TICKET and host.daemon is not None and host.daemon.marks:
            # Rule 12, for the doubt that no journal record tells of.
            yield Move(f"{host.name}: refuses migrate-in {letter.migration}: indeterminate", host)
        elif letter.mail is Mail.TICKET:
            yield from self._destination.arrive(host, letter.migration)
        elif letter.mail is Mail.ASK:
            yield from self._decide(host, letter)
        elif letter.mail is Mail.ANSWER:
            yield self._answered(host, letter)
        elif letter.mail is Mail.SUPERSEDED:
            yield from self._restart.superseded(host, letter)
        elif letter.mail is Mail.ACKNOWLEDGED:
            event = rules.Notify(letter.migration, letter.epoch)
            yield from m.commit(host, event, "acknowledged", lambda after, _: Move("", after))
        else:
            task = self.task(host, letter.migration)
            after = host
            if task is not None and task.at is At.AWAIT_HANDOFF:
                after = m.put(host, replace(task, at=At.ACQUIRE, epoch=letter.epoch, settling=True))
            yield Move(f"{host.name}: an operator has it take over {letter.migration}", after)

    def _answered(self, host: Host, letter: Letter) -> Move:
        """Also an answer that comes late, to a daemon that does not ask any more."""
        label = f"{host.name}: gets `{letter.answer}` about {letter.migration}"
        task = self.task(host, letter.migration)
        if task is not None and task.at is not At.ASK:
            return Move(label, host)
        asking = Task(Role.SOURCE, letter.migration, At.CONCLUDE, settling=True)
        return Move(label, self._source.conclude(host, replace(asking, answer=letter.answer, journal=letter.journal)))

    def _decide(self, host: Host, letter: Letter) -> Iterator[Move]:
        """Settle: what is answered is durable."""
        m = self.machine
        trip = self.scenario.trip(letter.migration)

        def answers(after: Host, decision: Decision) -> Move:
            task = self.task(after, letter.migration)
            if decision.records and task is not None and task.at in WAITING:
                after = m.put(after, replace(task, at=At.GIVE_UP))
            answer = Letter(
                Mail.ANSWER, letter.migration, trip.source, journal=host.disk.journal, answer=decision.answer
            )
            return Move(f"answers `{decision.answer}`", after, letters=(answer,))

        def refuses(error: VmMigrateError) -> Move:
            return Move("", m.mark(host, error.code))

        event = rules.Settle(letter.migration, trip.source, self._guest_runs(host, letter.migration))
        yield from m.commit(host, event, f"settle {letter.migration}", answers, refuses)

    def _guest_runs(self, host: Host, migration: str) -> bool:
        if not self.machine.engine.sees_guests and self.task(host, migration) is None:
            return False
        process = self.machine.arriving(host, migration)
        return process is not None and process.running

    # -- what befalls it -------------------------------------------------------------------------------------------

    def _breaks(self, host: Host) -> Iterator[Move]:
        name = host.name
        if host.daemon is not None and not self._is_restart_nothing(host):
            yield self.machine.dies(host, f"{name}: DAEMON CRASH", Failure.DAEMON_CRASH)
        for process in host.processes:
            after = without_processes(host, process.pid)
            excuse = Class.GUEST if self._matters(host, process) else Class.NONE
            yield Move(f"{name}: GUEST CRASH", after, failure=Failure.GUEST_CRASH, classes=excuse)
        yield from self._host_crashes(host)
        yield from self._journal_breaks(host)

    def _is_restart_nothing(self, host: Host) -> bool:
        """Whether a crash and a restart would leave *host* as it is: no more than a delay, and delays are free."""
        if host.daemon is None or host.daemon.tasks or host.daemon.todo or host.daemon.marks:
            return False
        crashed = self.machine.dies(host, "", None).host
        return any(move.host == host for move in self._restart.begin(crashed))

    def _matters(self, host: Host, process: Process) -> bool:
        """Whether the death of *process* may lose the instance: not that of a half-built or refused one."""
        try:
            known = self.machine.fold(host.disk.cached).instances.get(VM)
        except VmMigrateError:
            return True
        owned = known is not None and known.guest is not None and known.guest.pid == process.pid
        return process.is_open or (owned and known is not None and known.holding is not Holding.ACQUIRED)

    def _host_crashes(self, host: Host) -> Iterator[Move]:
        """RAM is gone; of what was not durable, any beginning may be there."""
        gone = self.machine.dies(host, f"{host.name}: HOST CRASH", Failure.HOST_CRASH)
        if not host.processes and host.disk.durable == host.disk.cached:
            return  # nothing that a crash of the daemon would not take as well
        matters = any(self._matters(host, process) for process in host.processes)
        gone = replace(gone, classes=Class.GUEST if matters else Class.NONE)
        for count in range(len(host.disk.durable), len(host.disk.cached) + 1):
            kept = host.disk.cached[:count]
            torn = Damage.TORN if count < len(host.disk.cached) else host.disk.damage
            disk = Disk(host.disk.journal, kept, kept, torn)
            yield replace(gone, host=replace(gone.host, processes=(), disk=disk))

    def _journal_breaks(self, host: Host) -> Iterator[Move]:
        """Once per host. Restored by copying the file, its id stays; by the book, it changes."""
        disk = host.disk
        if "'" in disk.journal or disk.damage is not Damage.NONE or not disk.cached:
            return
        gone = self.machine.dies(host, f"{host.name}: JOURNAL LOST", Failure.JOURNAL_LOST)
        gone = replace(gone, classes=Class.JOURNAL)
        yield replace(gone, host=replace(gone.host, disk=Disk(disk.journal + "'", (), ())))
        for count in range(1, len(disk.cached)):
            kept = disk.cached[:count]
            text = f"{host.name}: JOURNAL RESTORED up to {type(kept[-1]).__name__.lower()}"
            for journal, failure in (
                (disk.journal + "'", Failure.JOURNAL_RESTORED),
                (disk.journal, Failure.JOURNAL_COPIED),
            ):
                back = replace(gone.host, disk=Disk(journal, kept, kept))
                yield replace(gone, label=text, host=back, failure=failure)
        for at in range(len(disk.cached)):
            yield replace(
                gone,
                label=f"{host.name}: JOURNAL DAMAGED at {type(disk.cached[at]).__name__.lower()}",
                host=replace(gone.host, disk=self._damaged(disk, at)),
                failure=Failure.JOURNAL_DAMAGED,
            )

    def _damaged(self, disk: Disk, at: int) -> Disk:
        """What the real decoder makes of *disk* with a flipped byte in record number *at*: nothing, one hopes."""
        try:
            records = self.machine.read(replace(disk, damage=Damage.FLIPPED, damaged=at))
        except Unreadable:
            return Disk(disk.journal, (), (), Damage.UNREADABLE)
        return Disk(disk.journal, records, records)
