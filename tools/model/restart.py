"""A daemon's restart: read the journal, find the guests, and do what the real `recovery.plan` says, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from tools.model.machine import Machine, Move, Unreadable, newest, opened, paused, run, with_process, without_processes
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
    Mail,
    Process,
    Task,
    Todo,
)
from vmmigrate.errors import VmMigrateError
from vmmigrate.ownership import recovery, rules
from vmmigrate.ownership.records import Epoch
from vmmigrate.ownership.recovery import SeenGuest, Step
from vmmigrate.ownership.rules import Decision, Event
from vmmigrate.ownership.state import Holding, Incoming, Ownership
from vmmigrate.wire.phases import Role

# What the daemon does for one step of the plan, part by part; a crash may come between any two.
PARTS: Mapping[Step, tuple[str, ...]] = {
    Step.PAUSE: ("pause",),
    Step.KEEP: (),
    Step.UNDO_PAUSE: ("run", "end"),
    Step.END_ATTEMPT: ("end",),
    Step.SETTLE: ("settle",),
    Step.FINISH_START: ("open", "start", "run"),
    Step.RUN: ("run",),
    Step.RETURN: ("destroy", "return"),
    Step.REFUSE: ("refuse", "destroy"),
    Step.DESTROY: ("destroy",),
    Step.LOST: ("lose",),
    Step.INDETERMINATE: ("mark",),
}


class Restart:
    """What a daemon does before it serves anybody."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._acts: Mapping[str, Callable[[Host, Todo], Iterator[Move]]] = {
            "pause": self._pause,
            "run": self._run,
            "end": self._end,
            "settle": self._settle,
            "open": self._open,
            "start": self._start,
            "destroy": self._destroy,
            "return": self._return,
            "refuse": self._refuse,
            "lose": self._lose,
            "mark": self._mark,
            "hush": self._hush,
            "acknowledge": self._acknowledge,
        }

    def begin(self, host: Host) -> Iterator[Move]:
        """Open the journal, end leftovers, plan. Nothing when the journal cannot be read: the daemon does not start."""
        m = self._machine
        try:
            records = m.read(host.disk)
        except Unreadable:
            return
        state = m.fold(records)
        durable = records if m.engine.rewrite else host.disk.durable
        left = {spawned.pid for spawned in state.leftovers}
        host = replace(
            without_processes(host, *left),
            disk=Disk(host.disk.journal, durable, records, Damage.NONE),
            daemon=Daemon(records),
        )
        steps = recovery.plan(state, _find_guests(host, state), len(records))
        todo = tuple(Todo(part, step.migration or "", step.reason) for step in steps for part in PARTS[step.step])
        assert host.daemon is not None
        names = ", ".join(step.step.value for step in steps) or "nothing to do"
        yield Move(f"{host.name}: restarts: {names}", replace(host, daemon=replace(host.daemon, todo=todo)))

    def moves(self, host: Host) -> Iterator[Move]:
        """The next part of what is to do."""
        assert host.daemon is not None
        first, *rest = host.daemon.todo
        yield from self._acts[first.act](replace(host, daemon=replace(host.daemon, todo=tuple(rest))), first)

    # -- parts -----------------------------------------------------------------------------------------------------

    def _guest(self, host: Host, migration: str) -> Process | None:
        m = self._machine
        return m.own_process(host) or m.arriving(host, migration)

    def _pause(self, host: Host, todo: Todo) -> Iterator[Move]:
        process = _main_process(host, self._machine.state(host))
        yield Move(f"{host.name}: pauses the guest", with_process(host, paused(process)) if process else host)

    def _run(self, host: Host, todo: Todo) -> Iterator[Move]:
        m = self._machine
        process, known = m.own_process(host), m.instance(host)
        ran = run(process, known.epoch, newest(host)) if process and known else None
        if ran is None:
            yield self._fails(host, f"{host.name}: the guest cannot be run", None)
            return
        yield Move(f"{host.name}: runs the guest", with_process(host, ran))
        if process is not None and not process.is_open:
            yield self._fails(host, f"{host.name}: disks do not open", Failure.START)

    def _fails(self, host: Host, label: str, failure: Failure | None) -> Move:
        """A step that fails leaves the instance to an operator, and what was still to do with it."""
        assert host.daemon is not None
        marked = self._machine.mark(host, "a step failed at the restart")
        assert marked.daemon is not None
        classes = Class.START if failure is Failure.START else Class.NONE
        after = replace(marked, daemon=replace(marked.daemon, todo=()))
        return Move(label, after, failure=failure, classes=classes)

    def _commit(self, host: Host, event: Event, label: str) -> Iterator[Move]:
        """Append, and go on; a refusal of the rules fails the step."""
        m = self._machine
        yield from m.commit(
            host,
            event,
            label,
            lambda after, _: Move("", after),
            lambda _: self._fails(host, f"{host.name}: {label}: refused", None),
        )

    def _end(self, host: Host, todo: Todo) -> Iterator[Move]:
        yield from self._commit(host, rules.EndAttempt(todo.migration, todo.reason), "end attempt")

    def _settle(self, host: Host, todo: Todo) -> Iterator[Move]:
        m = self._machine
        on = m.put(host, Task(Role.SOURCE, todo.migration, At.ASK, settling=True))
        process = m.own_process(host)
        if process is None:
            yield from m.commit(on, rules.Lose(VM, "gone"), "in doubt without a guest", lambda a, _: Move("", a))
        else:
            # The last daemon may have died before it told: what the guest knows must not be older than `released`.
            knows = newest(host) if m.engine.notes_at_restart else process.last_record
            on = with_process(on, replace(process, last_record=max(process.last_record, knows)))
            yield Move(f"{host.name}: in doubt about {todo.migration}", on)

    def _open(self, host: Host, todo: Todo) -> Iterator[Move]:
        m = self._machine
        process, known = m.own_process(host), m.instance(host)
        ready = opened(process, known.epoch) if process and known else None
        assert host.daemon is not None
        back = (Todo("destroy", todo.migration), Todo("return", todo.migration, "start"))
        rest = tuple(part for part in host.daemon.todo if part.migration != todo.migration)
        returning = replace(host, daemon=replace(host.daemon, todo=(*back, *rest)))
        if ready is None:
            yield Move(f"{host.name}: cannot open, the guest is gone", returning)
            return
        yield Move(f"{host.name}: opens disks", with_process(host, ready))
        yield Move(f"{host.name}: disks do not open", returning, failure=Failure.START, classes=Class.START)

    def _start(self, host: Host, todo: Todo) -> Iterator[Move]:
        yield from self._commit(host, rules.Start(todo.migration), "start")

    def _destroy(self, host: Host, todo: Todo) -> Iterator[Move]:
        process = self._guest(host, todo.migration) or _main_process(host, self._machine.state(host))
        after = without_processes(host, process.pid) if process else host
        yield Move(f"{host.name}: destroys the guest", after)

    def _return(self, host: Host, todo: Todo) -> Iterator[Move]:
        yield from self._commit(host, rules.Return(todo.migration, todo.reason), "return")

    def _refuse(self, host: Host, todo: Todo) -> Iterator[Move]:
        yield from self._commit(host, rules.Refuse(todo.migration, todo.reason), "refuse")

    def _lose(self, host: Host, todo: Todo) -> Iterator[Move]:
        yield from self._commit(host, rules.Lose(VM, todo.reason), "lose")

    def _mark(self, host: Host, todo: Todo) -> Iterator[Move]:
        yield Move(f"{host.name}: indeterminate: {todo.reason}", self._machine.mark(host, todo.reason))

    # -- superseded ------------------------------------------------------------------------------------------------

    def superseded(self, host: Host, letter: Letter) -> Iterator[Move]:
        """The word of the winner: durable, then the guest is paused, then it is acknowledged."""
        m = self._machine
        parts = ("hush", "acknowledge") if m.engine.pauses_superseded else ("acknowledge",)

        def heard(after: Host, _: Decision) -> Move:
            assert after.daemon is not None
            todo = tuple(Todo(part, letter.migration, str(letter.epoch.term)) for part in parts)
            base = after if m.engine.writes_superseded else host
            assert base.daemon is not None
            return Move("", replace(base, daemon=replace(base.daemon, todo=todo)))

        def newer(_: VmMigrateError) -> Move:
            return Move("", m.mark(host, "superseded by an older epoch"))

        yield from m.commit(host, rules.Supersede(VM, letter.epoch, letter.since), "superseded", heard, newer)

    def _hush(self, host: Host, todo: Todo) -> Iterator[Move]:
        m = self._machine
        # Every process of the instance, also one that a lost journal does not explain.
        own = m.own_process(host) if m.may_run(host) else None
        for process in host.processes:
            if own is None or process.pid != own.pid:
                knows = max(process.last_record, newest(host))
                host = with_process(host, replace(process, running=False, is_open=False, last_record=knows))
        yield Move(f"{host.name}: keeps its superseded guest paused, its disks closed", host)

    def give_way(self, host: Host) -> Iterator[Move]:
        """A superseded owner lets its guest go: the winner ran before it told anybody."""
        m = self._machine
        known, limit = m.instance(host), m.state(host).superseded.get(VM, NEVER)
        if known is None or known.holding is not Holding.HELD or known.epoch >= limit:
            return

        def gone(after: Host, _: Decision) -> Move:
            pids = {spawned.pid for spawned in m.state(after).leftovers}
            return Move("", without_processes(after, *pids))

        yield from m.commit(host, rules.Yield(VM, limit), "yields", gone)

    def _acknowledge(self, host: Host, todo: Todo) -> Iterator[Move]:
        m = self._machine
        to = m.scenario.trip(todo.migration).source
        limit = Epoch(int(todo.reason), 0)
        letter = Letter(Mail.ACKNOWLEDGED, todo.migration, to, limit)
        yield Move(f"{host.name}: acknowledges superseded", host, letters=(letter,), unfences=True)


def _main_process(host: Host, state: Ownership) -> Process | None:
    """The process that stands for the instance after a restart: the journal's, else any that is there."""
    known = state.instances.get(VM)
    pids = [known.guest.pid] if known and known.guest else []
    for incoming in state.incoming.values():
        if incoming.guest is not None and incoming.stage in {Incoming.RESERVED, Incoming.PREPARED}:
            pids.append(incoming.guest.pid)
    pids += [process.pid for process in host.processes]
    return next((process for pid in pids for process in host.processes if process.pid == pid), None)


def _find_guests(host: Host, state: Ownership) -> dict[str, SeenGuest]:
    process = _main_process(host, state)
    if process is None:
        return {}
    return {VM: SeenGuest(process.running, process.ran, process.last_record)}
