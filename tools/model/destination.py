"""The destination's end of a migration, step by step: what `engine.destination` does between decisions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from tools.model.machine import Machine, Move, newest, opened, run, with_process, without_processes
from tools.model.source import Step, spoken
from tools.model.world import VM, At, Class, Failure, Host, Message, Process, Task
from vmmigrate.errors import VmMigrateError
from vmmigrate.ownership import records as r
from vmmigrate.ownership import rules
from vmmigrate.ownership.records import Epoch
from vmmigrate.ownership.rules import Decision, Event
from vmmigrate.ownership.state import Incoming
from vmmigrate.wire.phases import Kind, Phase, Role


class Destination:
    """Steps of a destination."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.steps: Mapping[At, Step] = {
            At.RESERVE: self._reserve,
            At.BUILD: self._build,
            At.PREPARE: self._prepare,
            At.ACQUIRE: self._acquire,
            At.OPEN: self._open,
            At.START: self._start,
            At.RUN: self._run,
            At.TELL_RUNNING: self._tell_running,
            At.CLOSE: self._close,
            At.RETURN: self._return,
            At.LATE_START: self._late_start,
            At.GIVE_UP: self._give_up,
            At.DESTROY: self._destroy,
        }

    def arrive(self, host: Host, migration: str) -> Iterator[Move]:
        """An operator brings the ticket."""
        yield Move(
            f"{host.name}: migrate-in {migration}",
            self._machine.put(host, Task(Role.DESTINATION, migration, At.RESERVE)),
        )

    def receive(self, host: Host, task: Task, message: Message) -> Iterator[Move]:
        kind = message.kinds[-1]
        at = {Kind.PREAMBLE: At.BUILD, Kind.STATE_END: At.PREPARE, Kind.HANDOFF: At.ACQUIRE}[kind]
        epoch = task.epoch if kind is Kind.STATE_END else message.epoch
        following = replace(task, at=at, epoch=epoch)
        yield Move(f"{host.name}: gets {kind.name} of {task.migration}", self._machine.put(host, following))

    def fail(self, host: Host, task: Task, why: str) -> Move:
        return Move(why, self._machine.put(host, replace(task, at=At.GIVE_UP)))

    # -- up to Ready -----------------------------------------------------------------------------------------------

    def _reserve(self, host: Host, task: Task) -> Iterator[Move]:
        m = self._machine
        source = m.scenario.trip(task.migration).source

        def connects(after: Host, _: Decision) -> Move:
            on = replace(spoken(task, Kind.OFFER), at=At.AWAIT_PREAMBLE)
            message = Message(task.migration, Role.DESTINATION, (Kind.OFFER,))
            return Move("connects", m.put(after, on), sends=(message,))

        event = rules.Reserve(r.Reserved(task.migration, VM, source, "https://s"))
        yield from m.commit(host, event, "reserve", connects, lambda _: Move("", m.drop(host, task.migration)))

    def _build(self, host: Host, task: Task) -> Iterator[Move]:
        m = self._machine
        pid = 10 + [trip.migration for trip in m.scenario.trips].index(task.migration)
        spawned = r.Spawned(VM, task.migration, pid, 1, f"/run/{pid}.sock")
        process = Process(pid, task.migration, seen=task.epoch)

        def built(after: Host, _: Decision) -> Move:
            on = replace(spoken(task, Kind.PREAMBLE_OK), at=At.AWAIT_STATE)
            after = with_process(m.put(after, on), replace(process, last_record=newest(after)))
            return Move("", after, sends=(Message(task.migration, Role.DESTINATION, (Kind.PREAMBLE_OK,)),))

        def over(_: VmMigrateError) -> Move:
            return Move("", m.put(host, replace(task, at=At.GIVE_UP)))

        yield from m.commit(host, rules.Spawn(spawned), "build the guest", built, over)

    def _prepare(self, host: Host, task: Task) -> Iterator[Move]:
        m = self._machine
        if m.arriving(host, task.migration) is None:
            yield self.fail(host, task, f"{host.name}: cannot import, the guest is gone")
            return

        def ready(after: Host, _: Decision) -> Move:
            on = replace(spoken(task, Kind.READY), at=At.AWAIT_HANDOFF)
            message = Message(task.migration, Role.DESTINATION, (Kind.READY,), journal=host.disk.journal)
            return Move("", m.put(after, on), sends=(message,))

        event = rules.Prepare(task.migration, task.epoch, "running")
        why = f"{host.name}: may not prepare"
        yield from m.commit(host, event, "prepare", ready, lambda _: self.fail(host, task, why))

    # -- the verdict -----------------------------------------------------------------------------------------------

    def _acquire(self, host: Host, task: Task) -> Iterator[Move]:
        m = self._machine
        following = At.OPEN if m.engine.open_first else At.START

        def acquired(after: Host, _: Decision) -> Move:
            return Move("", m.put(after, replace(task, at=following, settling=False)))

        # `settling` here: an operator's word, not the source's Handoff, brought the task to this step.
        event: Event = rules.Acquire(task.migration, task.epoch)
        if task.settling:
            event = rules.ResolveDestination(task.migration, task.epoch)
        back = replace(task, settling=False)
        yield from m.commit(host, event, "acquire", acquired, lambda _: self.fail(host, back, "the handoff loses"))

    def _epoch(self, host: Host, task: Task) -> Epoch | None:
        """The epoch under which M may open and run here, by the journal of this moment: it may have been superseded."""
        state = self._machine.state(host)
        prepared = state.incoming[task.migration].prepared
        epoch = prepared.epoch.handed_over() if prepared else None
        return epoch if epoch is not None and state.may_run(VM, epoch) else None

    def _open(self, host: Host, task: Task) -> Iterator[Move]:
        m = self._machine
        process, epoch = m.arriving(host, task.migration), self._epoch(host, task)
        ready = opened(process, epoch) if process and epoch else None
        closing = m.put(host, replace(task, at=At.CLOSE))
        if ready is None:
            yield Move(f"{host.name}: cannot open, the guest is gone", closing)
            return
        if not m.engine.run_after_started:
            ready = run(ready, ready.seen, newest(host)) or ready
        following = At.START if m.engine.open_first else At.RUN
        yield Move(f"{host.name}: opens disks", m.put(with_process(host, ready), replace(task, at=following)))
        yield Move(f"{host.name}: disks do not open", closing, failure=Failure.START, classes=Class.START)

    def _start(self, host: Host, task: Task) -> Iterator[Move]:
        m = self._machine
        following = At.RUN if m.engine.open_first else At.OPEN

        def started(after: Host, _: Decision) -> Move:
            return Move("", m.put(after, replace(task, at=following)))

        def over(_: VmMigrateError) -> Move:
            return Move("", m.put(host, replace(task, at=At.CLOSE)))

        yield from m.commit(host, rules.Start(task.migration), "start", started, over)

    def _run(self, host: Host, task: Task) -> Iterator[Move]:
        m = self._machine
        on = m.put(host, replace(task, at=At.TELL_RUNNING))
        process, epoch = m.arriving(host, task.migration), self._epoch(host, task)
        if epoch is None:
            yield Move(f"{host.name}: does not run what was superseded", on)
            return
        ran = run(process, epoch, newest(host)) if process else None
        if ran is not None:
            yield Move(f"{host.name}: runs the guest", with_process(on, ran))
            return

        def lost(after: Host, _: Decision) -> Move:
            return Move("", m.put(after, replace(task, at=At.TELL_RUNNING)))

        yield from m.commit(host, rules.Lose(VM, "gone"), "lose", lost, lambda _: Move("", on))

    def _tell_running(self, host: Host, task: Task) -> Iterator[Move]:
        m = self._machine
        known = m.instance(host)
        message = self._word(host, task, Kind.RUNNING, known.epoch if known else task.epoch)
        after = m.drop(host, task.migration)
        yield Move(f"{host.name}: sends RUNNING", after, sends=(message,), closes=(task.migration,))

    @staticmethod
    def _word(host: Host, task: Task, kind: Kind, epoch: Epoch) -> Message:
        return Message(task.migration, Role.DESTINATION, (kind,), epoch, host.disk.journal)

    def _close(self, host: Host, task: Task) -> Iterator[Move]:
        m = self._machine
        process = m.arriving(host, task.migration)
        after = m.put(host, replace(task, at=At.RETURN))
        yield Move(f"{host.name}: destroys the guest", without_processes(after, process.pid) if process else after)

    def _return(self, host: Host, task: Task) -> Iterator[Move]:
        m = self._machine

        def returned(after: Host, _: Decision) -> Move:
            message = self._word(host, task, Kind.RETURNED, task.epoch)
            on = m.put(after, replace(task, at=At.LATE_START))
            return Move("", on, sends=(message,), closes=(task.migration,))

        def over(_: VmMigrateError) -> Move:
            return Move("", m.drop(host, task.migration), closes=(task.migration,))

        yield from m.commit(host, rules.Return(task.migration, "start"), "return", returned, over)

    def _late_start(self, host: Host, task: Task) -> Iterator[Move]:
        """The deadline won, and the opener finishes after all: it must find that it lost."""
        m = self._machine

        def done(after: Host, _: Decision) -> Move:
            return Move("", m.drop(after, task.migration))

        event = rules.Start(task.migration)
        yield from m.commit(host, event, "late start", done, lambda _: done(host, Decision()))

    def _give_up(self, host: Host, task: Task) -> Iterator[Move]:
        m = self._machine
        on = m.put(host, replace(task, at=At.DESTROY))

        def refused(after: Host, _: Decision) -> Move:
            incoming = m.state(after).incoming.get(task.migration)
            sends: tuple[Message, ...] = ()
            if incoming and incoming.stage is Incoming.REFUSED and task.phase in {Phase.READY, Phase.IN_DOUBT}:
                sends = (self._word(host, task, Kind.REFUSED, task.epoch),)
            after = m.put(after, replace(task, at=At.DESTROY))
            return Move("", after, sends=sends, closes=(task.migration,))

        event = rules.Refuse(task.migration, "failed")
        yield from m.commit(host, event, "refuse", refused, lambda _: Move("", on, closes=(task.migration,)))

    def _destroy(self, host: Host, task: Task) -> Iterator[Move]:
        m = self._machine
        after = m.drop(host, task.migration)
        process = m.arriving(host, task.migration)
        incoming = m.state(host).incoming.get(task.migration)
        if process is not None and incoming is not None and incoming.stage is not Incoming.STARTED:
            after = without_processes(after, process.pid)
        yield Move(f"{host.name}: destroys the half-built guest", after)
