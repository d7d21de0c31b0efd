"""Two hosts, many migrations, and everything that goes wrong between them: never two owners, never a lost guest.

The machine uses the real rules, the real fold and the real recovery plan. Modelled around them: guest processes, which
outlive their daemon; messages, which may be lost, late, or come more than once; and crashes at any point, also
between a record and its effect and within the records of one decision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vmmigrate.errors import VmMigrateError
from vmmigrate.ownership import records as r
from vmmigrate.ownership import rules
from vmmigrate.ownership.records import Epoch
from vmmigrate.ownership.recovery import RecoveryStep, SeenGuest, Step, plan
from vmmigrate.ownership.rules import Answer, Decision, Event, decide
from vmmigrate.ownership.state import OPEN_INCOMING, OPEN_OUTGOING, Holding, Incoming, Outgoing, apply

from .world import VM, Host, fold, present, spawned, ticket

# The last word of the destination on M, as its message says it.
WORDS = {
    Incoming.STARTED: Answer.RUNNING,
    Incoming.REFUSED: Answer.REFUSED,
    Incoming.RETURNED: Answer.RETURNED,
}


# A crash in one of six commits, after so many durable records of it. Most often the newest migration is meant.
CUT = st.sampled_from([None, None, None, None, None, 0, 1, 2])
NUMBER = st.sampled_from([0, 0, 0, 0, 1, 2])


@dataclass
class Process:
    """A guest process; it outlives its daemon and never changes its run state by itself."""

    running: bool
    epoch: Epoch
    last_record: int


class Machine(Host):
    """A host with a guest process."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.process: Process | None = None

    def run(self) -> None:
        """Run the guest, as the daemon does: only under the current epoch."""
        if self.process is not None and self.may_run():
            self.process.running = True
            self.process.epoch = self.epoch()
            self.process.last_record = self.newest

    def pause(self) -> None:
        if self.process is not None:
            self.process.running = False

    def destroy(self) -> None:
        self.process = None

    def torn(self, event: Event, kept: int) -> None:
        """The daemon dies while it writes: only *kept* records of the decision are durable."""
        for record in decide(self.state, event).records[:kept]:
            self.state = apply(self.state, record)
            self.records.append(record)
        self.crash()


@dataclass(frozen=True)
class Move:
    """One migration: who gives, who takes."""

    migration: str
    source: Machine
    destination: Machine


class TwoHosts(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.hosts = (Machine("a"), Machine("b"))
        self.moves: list[Move] = []
        self.handoffs: dict[str, Epoch] = {}  # sent at least once; may arrive at any time, any number of times
        self.readies: dict[str, str] = {}  # journal id in Ready
        self.words: list[tuple[Move, rules.Evidence]] = []
        self.has_lost_a_journal = False

    @initialize()
    def boot(self) -> None:
        owner = self.hosts[0]
        owner.commit(rules.Create(VM))
        owner.commit(rules.Spawn(spawned()))
        owner.process = Process(False, owner.epoch(), 0)
        owner.run()

    # ----------------------------------------------------------------- what may happen to a commit

    def attempt(self, host: Machine, event: Event, effect: Callable[[Decision], None], cut: int | None) -> None:
        """Commit *event* and do its *effect*, unless the rules refuse, or the daemon dies on the way.

        cut: None for no crash; 0.. for a crash after so many durable records, before any effect.
        """
        try:
            decide(host.state, event)
        except VmMigrateError:
            return
        if cut is not None:
            host.torn(event, cut)
            self.recover(host, start=cut % 2 == 0)
            return
        effect(host.commit(event))

    def pick(self, number: int) -> Move:
        return self.moves[-1 - number % min(len(self.moves), 3)]

    # ----------------------------------------------------------------- the way it should go

    @rule(steps=st.sampled_from([0, 4, 5, 5, 6, 7, 8]), cut=CUT)
    def begin(self, steps: int, cut: int | None) -> None:
        """A new migration away from the owner, a part of the way at once; else no random walk would ever arrive."""
        source, destination = self.hosts if self.hosts[0].may_run() else self.hosts[::-1]
        move = Move(f"m{source.newest}-{destination.newest}", source, destination)
        event = rules.IssueTicket(ticket(move.migration, destination.name))
        before = len(self.moves)
        self.attempt(source, event, lambda _: self.moves.append(move), cut if steps == 0 else None)
        if len(self.moves) > before:
            self.go_on(steps, cut)

    @precondition(lambda self: self.moves)
    @rule(steps=st.integers(1, 8), cut=CUT)
    def go_on(self, steps: int, cut: int | None) -> None:
        """Steps of the straight way for the newest migration, and perhaps a crash at the last of them."""
        way = (self.connect, self.build, self.pause, self.prepare, self.release, self.handoff_arrives, self.start)
        for at, step in enumerate(way[:steps], start=1):
            step(0, cut if at == steps else None)
        if steps > len(way):
            self.destination_speaks(0)

    def connect(self, number: int, cut: int | None) -> None:
        move = self.pick(number)

        def reserved(_: Decision) -> None:
            self.attempt(move.source, present(move.migration, move.destination.name), lambda _: None, cut)

        wanted = r.Reserved(move.migration, VM, move.source.name, "https://s")
        self.attempt(move.destination, rules.Reserve(wanted), reserved, None)

    def build(self, number: int, cut: int | None) -> None:
        move = self.pick(number)
        host = move.destination
        if host.process is not None:
            return  # one socket per instance

        def built(_: Decision) -> None:
            host.process = Process(False, Epoch(0, 0), host.newest)

        self.attempt(host, rules.Spawn(spawned(migration=move.migration)), built, cut)

    def pause(self, number: int, cut: int | None) -> None:
        source = self.pick(number).source
        event = rules.BeginPause(self.pick(number).migration, "running")
        self.attempt(source, event, lambda _: source.pause(), cut)

    def prepare(self, number: int, cut: int | None) -> None:
        move = self.pick(number)
        known = move.source.state.instances.get(VM)
        outgoing = move.source.state.outgoing.get(move.migration)
        if known is None or move.destination.process is None or outgoing is None:
            return

        def ready(_: Decision) -> None:
            self.readies[move.migration] = move.destination.journal_id

        if outgoing.stage is Outgoing.PAUSING:
            self.attempt(move.destination, rules.Prepare(move.migration, known.epoch, "running"), ready, cut)

    def release(self, number: int, cut: int | None) -> None:
        move = self.pick(number)
        if move.migration not in self.readies:
            return

        def hand_off(decision: Decision) -> None:
            (released,) = decision.records
            assert isinstance(released, r.Released)
            self.handoffs[move.migration] = released.epoch

        event = rules.Release(move.migration, self.readies[move.migration], "https://d")
        self.attempt(move.source, event, hand_off, cut)

    @precondition(lambda self: self.handoffs)
    @rule(number=NUMBER, cut=CUT)
    def handoff_arrives(self, number: int, cut: int | None) -> None:
        """Now, late, or once more."""
        move = self.pick(number)
        if move.migration in self.handoffs:
            event = rules.Acquire(move.migration, self.handoffs[move.migration])
            self.attempt(move.destination, event, lambda _: None, cut)

    @precondition(lambda self: self.handoffs)
    @rule(number=NUMBER, cut=CUT)
    def start(self, number: int, cut: int | None) -> None:
        move = self.pick(number)
        self.attempt(move.destination, rules.Start(move.migration), lambda _: move.destination.run(), cut)

    # ----------------------------------------------------------------- verdicts, words, evidence

    @precondition(lambda self: self.moves)
    @rule(number=NUMBER, returns=st.booleans(), cut=CUT)
    def destination_gives_up(self, number: int, returns: bool, cut: int | None) -> None:
        move = self.pick(number)
        incoming = move.destination.state.incoming.get(move.migration)
        if incoming is None or incoming.prepared is None:
            return  # abandoned: nothing was promised; crashes do that often enough
        event = rules.Return(move.migration, "x") if returns else rules.Refuse(move.migration, "x")

        def destroy(decision: Decision) -> None:
            if decision.records:
                move.destination.destroy()

        self.attempt(move.destination, event, destroy, cut)

    @precondition(lambda self: self.moves)
    @rule(number=NUMBER, cut=CUT)
    def source_gives_up(self, number: int, cut: int | None) -> None:
        self.resume(self.pick(number).source, self.pick(number).migration, cut)

    def resume(self, source: Machine, migration: str, cut: int | None = None) -> None:
        """Run first, then `resumed`: the other way round, a crash in between leaves the guest paused for ever."""
        outgoing = source.state.outgoing.get(migration)
        if outgoing is not None and outgoing.stage is Outgoing.PAUSING:
            source.run()
        self.attempt(source, rules.EndAttempt(migration, "x"), lambda _: None, cut)

    @precondition(lambda self: self.moves)
    @rule(number=NUMBER)
    def destination_speaks(self, number: int) -> None:
        """A word about M, after its fsync; it stays under way for ever."""
        move = self.pick(number)
        incoming = move.destination.state.incoming.get(move.migration)
        if incoming is not None and incoming.stage in WORDS:
            evidence = rules.Evidence(move.migration, WORDS[incoming.stage], move.destination.journal_id)
            self.words.append((move, evidence))

    @precondition(lambda self: self.moves)
    @rule(number=NUMBER, cut=CUT, arrives=st.booleans())
    def source_asks(self, number: int, cut: int | None, arrives: bool) -> None:
        move = self.pick(number)
        outgoing = move.source.state.outgoing.get(move.migration)
        if outgoing is None or outgoing.stage is not Outgoing.RELEASED:
            return
        process = move.destination.process
        event = rules.Settle(move.migration, move.source.name, process is not None and process.running)

        def answer(decision: Decision) -> None:
            if decision.records:
                move.destination.destroy()
            assert decision.answer is not None
            evidence = rules.Evidence(move.migration, decision.answer, move.destination.journal_id)
            self.words.append((move, evidence))

        self.attempt(move.destination, event, answer, cut)
        if arrives and cut is None and self.words:
            self.word_arrives(0, None)

    @precondition(lambda self: self.words)
    @rule(number=st.integers(0, 5), cut=CUT)
    def word_arrives(self, number: int, cut: int | None) -> None:
        """Any word ever said, in any order, any number of times."""
        move, evidence = self.words[-1 - number % len(self.words)]

        def act(decision: Decision) -> None:
            for record in decision.records:
                if isinstance(record, r.Freed):
                    move.source.destroy()
                if isinstance(record, r.Reclaimed):
                    move.source.run()

        self.attempt(move.source, evidence, act, cut)

    # ----------------------------------------------------------------- compaction

    @precondition(lambda self: self.moves)
    @rule(number=NUMBER)
    def source_is_known_to_know(self, number: int) -> None:
        """The destination has seen what its source's journal says, and need not keep the verdict for it."""
        move = self.pick(number)
        outgoing = move.source.state.outgoing.get(move.migration)
        if outgoing is not None and outgoing.stage in {Outgoing.FREED, Outgoing.RECLAIMED}:
            self.attempt(move.destination, rules.Acknowledge(move.migration), lambda _: None, None)

    @rule(who=st.integers(0, 1))
    def journal_is_compacted(self, who: int) -> None:
        """At any moment; everything else that is said of the two hosts must stay true."""
        host = self.hosts[who]
        host.compact(host.state.leftovers if host.process is None else ())

    # ----------------------------------------------------------------- crashes

    @rule(who=st.integers(0, 1), start=st.booleans())
    def daemon_crashes(self, who: int, start: bool) -> None:
        self.hosts[who].crash()
        self.recover(self.hosts[who], start)

    def recover(self, host: Machine, start: bool) -> None:
        """A restart takes the steps of the plan; *start*: whether an acquired guest can be opened."""
        seen = {}
        if host.process is not None:
            seen[VM] = SeenGuest(host.process.running, host.process.epoch, host.process.last_record)
        for step in plan(host.state, seen, host.newest):
            self.take(host, step, start)

    def take(self, host: Machine, step: RecoveryStep, start: bool) -> None:
        migration = step.migration or ""
        match step.step:
            case Step.PAUSE:
                host.pause()
            case Step.UNDO_PAUSE:
                self.resume(host, migration)
            case Step.END_ATTEMPT:
                host.commit(rules.EndAttempt(migration, "restart"))
            case Step.FINISH_START if start:
                host.commit(rules.Start(migration))
                host.run()
            case Step.FINISH_START | Step.RETURN:
                host.commit(rules.Return(migration, "restart"))
                host.destroy()
            case Step.RUN:
                host.run()
            case Step.REFUSE:
                host.commit(rules.Refuse(migration, "restart"))
                host.destroy()
            case Step.DESTROY:
                host.destroy()
            case Step.LOST:
                host.commit(rules.Lose(step.instance, "gone"))
            case Step.KEEP | Step.SETTLE | Step.INDETERMINATE:
                pass

    # ----------------------------------------------------------------- promises

    @invariant()
    def never_two_owners(self) -> None:
        assert sum(host.may_run() for host in self.hosts) <= 1

    @invariant()
    def never_two_running_guests(self) -> None:
        assert sum(host.process is not None and host.process.running for host in self.hosts) <= 1

    @invariant()
    def nobody_runs_without_being_the_owner(self) -> None:
        for host in self.hosts:
            if host.process is not None and host.process.running and not self.has_lost_a_journal:
                assert host.state.instances[VM].holding is Holding.HELD
                assert host.process.epoch == host.epoch()

    @invariant()
    def a_journal_says_what_its_records_add_up_to(self) -> None:
        for host in self.hosts:
            assert fold(host.records) == host.state

    @invariant()
    def never_lost(self) -> None:
        """From every state, a restart of both and an answer to every open question lead to one owner with a guest."""
        if self.has_lost_a_journal or not any(host.records for host in self.hosts):
            return
        for start in (True, False):
            twins = {host.name: self.twin(host) for host in self.hosts}
            for twin in twins.values():
                self.recover(twin, start)
            for move in self.moves:
                self.settle(twins[move.source.name], twins[move.destination.name], move.migration)
            owners = [twin for twin in twins.values() if twin.may_run()]
            assert len(owners) == 1
            assert owners[0].state.instances[VM].holding is Holding.HELD
            assert owners[0].process is not None
            assert owners[0].process.running
            for twin in twins.values():
                assert not any(x.stage in OPEN_OUTGOING for x in twin.state.outgoing.values())
                assert not any(x.stage in OPEN_INCOMING for x in twin.state.incoming.values())

    @staticmethod
    def twin(host: Machine) -> Machine:
        twin = Machine(host.name)
        twin.records, twin.forgotten = list(host.records), host.forgotten
        twin.state = fold(twin.records)
        twin.process = host.process and Process(**vars(host.process))
        return twin

    @staticmethod
    def settle(source: Machine, destination: Machine, migration: str) -> None:
        """What the source's daemon does with a migration in doubt, when the destination answers."""
        outgoing = source.state.outgoing.get(migration)
        if outgoing is None or outgoing.stage is not Outgoing.RELEASED:
            return
        answer = destination.commit(rules.Settle(migration, source.name, guest_runs=False)).answer
        assert answer is not None
        source.commit(rules.Evidence(migration, answer, destination.journal_id))
        if source.may_run():
            source.run()
        else:
            source.destroy()


class TwoHostsWithLostJournals(TwoHosts):
    """Journal loss ends in `indeterminate`, never in a second guest."""

    @precondition(lambda self: not self.has_lost_a_journal and self.hosts[0].newest > 3)
    @rule(who=st.integers(0, 1))
    def journal_is_lost(self, who: int) -> None:
        self.has_lost_a_journal = True
        host = self.hosts[who]
        host.journal_id += "-new"
        host.crash(0)
        self.recover(host, start=True)


STEPS = settings(max_examples=100, stateful_step_count=50)
TestTwoHosts = TwoHosts.TestCase
TestTwoHosts.settings = STEPS
TestTwoHostsWithLostJournals = TwoHostsWithLostJournals.TestCase
TestTwoHostsWithLostJournals.settings = STEPS
