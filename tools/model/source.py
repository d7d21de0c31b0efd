"""The source's end of a migration, step by step: what `engine.source` and `engine.outgoing` do between decisions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from tools.model.machine import Machine, Move, newest, process_of, run, with_process, without_processes
from tools.model.world import NEVER, VM, At, Failure, Host, Letter, Mail, Message, Task
from vmmigrate.errors import VmMigrateError
from vmmigrate.ownership import records as r
from vmmigrate.ownership import rules
from vmmigrate.ownership.rules import Answer, Decision
from vmmigrate.ownership.state import Holding, Outgoing
from vmmigrate.wire.phases import Kind, Phase, Role, next_phase

Step = Callable[[Host, Task], Iterator[Move]]

ANSWERS = {Kind.RUNNING: Answer.RUNNING, Kind.REFUSED: Answer.REFUSED, Kind.RETURNED: Answer.RETURNED}


def spoken(task: Task, *kinds: Kind) -> Task:
    """*task* after it has said *kinds*; the table must allow it."""
    phase: Phase | None = task.phase
    for kind in kinds:
        assert phase is not None
        phase = next_phase(phase, task.role, kind)
    assert phase is not None, f"{task.role} may not say {kinds} in {task.phase}"
    return replace(task, phase=phase)


class Source:
    """Steps of a source. Every method takes a host and its task, and gives the moves that are possible."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.steps: Mapping[At, Step] = {
            At.CONSUME: self._consume,
            At.BEGIN_PAUSE: self._begin_pause,
            At.PAUSE: self._pause,
            At.RELEASE: self._release,
            At.NOTE: self._note,
            At.SEND_HANDOFF: self._send_handoff,
            At.CONCLUDE: self._conclude,
            At.FREE: self._free,
            At.RESUME: self._resume,
            At.UNDO_RUN: self._undo_run,
            At.UNDO_END: self._undo_end,
            At.ASK: self._ask,
        }

    # -- up to Ready -----------------------------------------------------------------------------------------------

    def begin(self, host: Host, migration: str, destination: str) -> Iterator[Move]:
        """An operator asks for the migration; the ticket travels to the destination."""
        m = self._machine
        ticket = r.TicketIssued(migration, VM, destination, "hash", 60)

        def awaits(after: Host, _: Decision) -> Move:
            task = Task(Role.SOURCE, migration, At.AWAIT_OFFER)
            return Move("", m.put(after, task), letters=(Letter(Mail.TICKET, migration, destination),))

        yield from m.commit(host, rules.IssueTicket(ticket), f"migrate-out {migration}", awaits)

    def receive(self, host: Host, task: Task, message: Message) -> Iterator[Move]:
        """What a message that is legal now makes of *task*."""
        m = self._machine
        kind = message.kinds[-1]
        if kind in ANSWERS:
            following = replace(task, at=At.CONCLUDE, answer=ANSWERS[kind], journal=message.journal)
        elif kind is Kind.READY:
            following = replace(task, at=At.RELEASE, journal=message.journal)
        else:
            following = replace(task, at={Kind.OFFER: At.CONSUME, Kind.PREAMBLE_OK: At.BEGIN_PAUSE}[kind])
        yield Move(f"{host.name}: gets {kind.name} of {task.migration}", m.put(host, following))

    def _consume(self, host: Host, task: Task) -> Iterator[Move]:
        m = self._machine
        trip = m.scenario.trip(task.migration)
        event = rules.ConsumeTicket(task.migration, VM, "hash", trip.destination, 0)

        def selects(after: Host, _: Decision) -> Move:
            kinds = (Kind.SELECT, Kind.PREAMBLE)
            known = m.instance(after)
            epoch = known.epoch if known else NEVER
            on = replace(spoken(task, *kinds), at=At.AWAIT_BUILT)
            return Move("", m.put(after, on), sends=(Message(task.migration, Role.SOURCE, kinds, epoch),))

        def refuses(_: VmMigrateError) -> Move:
            return Move("", m.drop(host, task.migration), closes=(task.migration,))

        yield from m.commit(host, event, f"ticket of {task.migration}", selects, refuses)

    def _begin_pause(self, host: Host, task: Task) -> Iterator[Move]:
        m = self._machine

        def goes_on(after: Host, _: Decision) -> Move:
            return Move("", m.put(after, replace(task, at=At.PAUSE)))

        event = rules.BeginPause(task.migration, "running")
        yield from m.commit(host, event, "begin pause", goes_on, lambda _: self.undo(host, task))

    def _pause(self, host: Host, task: Task) -> Iterator[Move]:
        m = self._machine
        process = m.own_process(host)
        if process is None:
            yield self.undo(host, task)
            return
        process = replace(process, running=False, is_open=False, last_record=max(process.last_record, newest(host)))
        kinds = (Kind.PAUSED, Kind.TIME_DATA, Kind.STATE_END)
        on = replace(spoken(task, *kinds), at=At.AWAIT_READY)
        message = Message(task.migration, Role.SOURCE, kinds)
        yield Move(f"{host.name}: pauses for handoff", m.put(with_process(host, process), on), sends=(message,))

    # -- the handoff -----------------------------------------------------------------------------------------------

    def _release(self, host: Host, task: Task) -> Iterator[Move]:
        """The phase is IN_DOUBT before a byte of `released` is written."""
        m = self._machine
        on = spoken(task, Kind.HANDOFF)

        def released(after: Host, _: Decision) -> Move:
            following = At.NOTE if m.engine.note_before_handoff else At.SEND_HANDOFF
            return Move("", m.put(after, replace(on, at=following)))

        event = rules.Release(task.migration, task.journal, "https://d")
        yield from m.commit(host, event, "release", released, lambda _: self.undo(host, on))

    def _note(self, host: Host, task: Task) -> Iterator[Move]:
        m = self._machine
        following = At.SEND_HANDOFF if m.engine.note_before_handoff else At.AWAIT_VERDICT
        on = m.put(host, replace(task, at=following))
        process = m.own_process(on)
        if process is not None:
            on = with_process(on, replace(process, last_record=max(process.last_record, newest(on))))
        yield Move(f"{host.name}: tells the guest the number of `released`", on)

    def _send_handoff(self, host: Host, task: Task) -> Iterator[Move]:
        m = self._machine
        released = m.state(host).outgoing[task.migration].released
        assert released is not None
        message = Message(task.migration, Role.SOURCE, (Kind.HANDOFF,), released.epoch)
        following = At.AWAIT_VERDICT if m.engine.note_before_handoff else At.NOTE
        yield Move(f"{host.name}: sends HANDOFF", m.put(host, replace(task, at=following)), sends=(message,))

    def fail(self, host: Host, task: Task, why: str) -> Move:
        """The connection failed, or the peer broke the rules of the conversation."""
        m = self._machine
        if task.at is At.AWAIT_OFFER:
            return Move(why, m.put(host, replace(task, at=At.UNDO_END)), closes=(task.migration,))
        if task.phase is not Phase.IN_DOUBT and task.at is not At.AWAIT_VERDICT:
            return replace(self.undo(host, task), label=why)
        following = At.ASK if m.engine.waits_for_evidence else At.RESUME
        on = replace(task, at=following, settling=True, answer=None)
        return Move(f"{why}: in doubt", m.put(host, on), closes=(task.migration,))

    # -- undo ------------------------------------------------------------------------------------------------------

    def undo(self, host: Host, task: Task) -> Move:
        m = self._machine
        outgoing = m.state(host).outgoing.get(task.migration)
        if outgoing is None or outgoing.stage not in {Outgoing.ACTIVE, Outgoing.PAUSING}:
            return Move(f"{host.name}: the attempt is over", m.drop(host, task.migration), closes=(task.migration,))
        first = At.UNDO_RUN if m.engine.run_before_resumed else At.UNDO_END
        on = m.put(host, replace(task, at=first, settling=True))
        return Move(f"{host.name}: undoes {task.migration}", on, closes=(task.migration,))

    def _undo_run(self, host: Host, task: Task) -> Iterator[Move]:
        m = self._machine
        after = self.run_own(host)
        if not m.engine.run_before_resumed:
            yield Move(f"{host.name}: undo: runs the guest", m.drop(after or host, task.migration))
        elif after is None:
            yield from self._lose(host, task)
        else:
            yield Move(f"{host.name}: undo: runs the guest", m.put(after, replace(task, at=At.UNDO_END)))

    def _undo_end(self, host: Host, task: Task) -> Iterator[Move]:
        m = self._machine

        def ended(after: Host, _: Decision) -> Move:
            if m.engine.run_before_resumed:
                return Move("", m.drop(after, task.migration))
            return Move("", m.put(after, replace(task, at=At.UNDO_RUN)))

        def over(_: VmMigrateError) -> Move:
            return Move("", m.drop(host, task.migration))

        yield from m.commit(host, rules.EndAttempt(task.migration, "failed"), "end attempt", ended, over)

    def run_own(self, host: Host) -> Host | None:
        """The guest runs, if the journal says that it is ours; None when its process is gone or refuses."""
        m = self._machine
        known = m.instance(host)
        if known is None or not m.state(host).may_run(VM, known.epoch) or known.holding is not Holding.HELD:
            return host
        process = m.own_process(host)
        after = process and run(process, known.epoch, newest(host))
        return with_process(host, after) if after else None

    def _lose(self, host: Host, task: Task) -> Iterator[Move]:
        m = self._machine

        def lost(after: Host, _: Decision) -> Move:
            return Move("", m.drop(after, task.migration))

        yield from m.commit(host, rules.Lose(VM, "gone"), "lose", lost, lambda _: lost(host, Decision()))

    # -- evidence --------------------------------------------------------------------------------------------------

    def conclude(self, host: Host, task: Task) -> Host:
        """*host* with a task that has an answer to act upon."""
        return self._machine.put(host, replace(task, at=At.CONCLUDE))

    def _conclude(self, host: Host, task: Task) -> Iterator[Move]:
        m = self._machine
        assert task.answer is not None
        closes = () if task.settling else (task.migration,)
        known, process = m.instance(host), m.own_process(host)
        if not m.engine.reclaims_first and task.answer is Answer.REFUSED and process and known and not process.running:
            ran = run(process, known.epoch, newest(host))
            yield Move(f"{host.name}: runs, and journals it later", with_process(host, ran) if ran else host)
            return

        def acts(after: Host, decision: Decision) -> Move:
            kinds = {type(record) for record in decision.records}
            if r.Freed in kinds:
                return Move("", m.put(after, replace(task, at=At.FREE, settling=True)), closes=closes)
            if r.Reclaimed in kinds and r.Lost not in kinds:
                return Move("", m.put(after, replace(task, at=At.RESUME, settling=True)), closes=closes)
            outgoing = m.state(after).outgoing.get(task.migration)
            if not decision.records and outgoing is not None and outgoing.stage is Outgoing.RELEASED:
                return Move("", m.put(after, replace(task, at=At.ASK, settling=True)), closes=closes)
            return Move("", m.drop(after, task.migration), closes=closes)

        def stuck(error: VmMigrateError) -> Move:
            after = m.drop(host, task.migration)
            return Move("", m.mark(after, error.code) if error.code == "indeterminate" else after, closes=closes)

        event = rules.Evidence(task.migration, task.answer, task.journal)
        yield from m.commit(host, event, f"evidence `{task.answer}` of {task.migration}", acts, stuck)

    def _free(self, host: Host, task: Task) -> Iterator[Move]:
        m = self._machine
        pids = {spawned.pid for spawned in m.state(host).leftovers}
        after = without_processes(m.drop(host, task.migration), *pids)
        yield Move(f"{host.name}: destroys the guest it gave away", after)

    def _resume(self, host: Host, task: Task) -> Iterator[Move]:
        m = self._machine
        if not m.engine.waits_for_evidence and task.answer is None:
            known = m.instance(host)
            process = known and known.guest and process_of(host, known.guest.pid)
            after = process and run(process, known.epoch if known else NEVER, newest(host))
            yield Move(
                f"{host.name}: resumes on a guess",
                m.drop(with_process(host, after), task.migration) if after else m.drop(host, task.migration),
            )
            return
        ran = self.run_own(host)
        if ran is None:
            yield from self._lose(host, task)
        else:
            yield Move(f"{host.name}: runs the guest again", m.drop(ran, task.migration))

    def _ask(self, host: Host, task: Task) -> Iterator[Move]:
        """Ask the destination; an operator may take the guest back, or have the destination take over."""
        m = self._machine
        outgoing = m.state(host).outgoing.get(task.migration)
        if outgoing is None or outgoing.stage is not Outgoing.RELEASED or outgoing.released is None:
            yield Move(f"{host.name}: nothing left to settle", m.drop(host, task.migration))
            return
        to = outgoing.released.destination_host
        question = Letter(Mail.ASK, task.migration, to)
        yield Move(f"{host.name}: asks {to} about {task.migration}", host, letters=(question,))
        order = Letter(Mail.TAKE_OVER, task.migration, to, outgoing.released.epoch)
        yield Move(
            f"operator: destination shall win {task.migration}", host, letters=(order,), failure=Failure.OPERATOR
        )

        def won(after: Host, _: Decision) -> Move:
            on = replace(task, at=At.RESUME, settling=True, answer=Answer.REFUSED)
            return Move("", m.put(after, on), fences=True)

        if m.own_process(host) is not None and len(host.processes) == 1:
            event = rules.ResolveSource(task.migration, "fenced")
            for move in m.commit(host, event, "operator: source wins", won):
                yield replace(move, fences=True, failure=Failure.OPERATOR)
