"""What must hold in every world, and how a world that is at rest is called.

Two owners are two guests that execute. The other invariants say earlier, and more exactly, that something is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from tools.model.hosts import Hosts
from tools.model.machine import Unreadable
from tools.model.world import VM, At, Class, Host, Task, World
from vmmigrate.errors import JournalError
from vmmigrate.ownership import records as r
from vmmigrate.ownership import rules
from vmmigrate.ownership.records import Epoch
from vmmigrate.ownership.rules import Answer
from vmmigrate.ownership.state import OPEN_INCOMING, OPEN_OUTGOING, Holding, Ownership
from vmmigrate.wire.phases import Role

# The one reason that needs no lost journal: disks did not open, or the guest died, while the daemon restarted.
STEP_FAILED = "a step failed at the restart"


class Promise(StrEnum):
    """What a violation violates."""

    ONE_RUNS = "two guests execute"
    ONE_OPENS = "two guests have disks open"
    ONE_OWNS = "two journals make their hosts the owner"
    OWNER_RUNS = "a guest executes where the durable journal does not make its host the owner"
    NO_FORK = "the source took back a guest that had executed at the destination"
    LOSS_EXCUSED = "a guest was lost, and nothing that excuses it has happened"
    ENDS = "no way leads to a resolved or indeterminate end any more"


# Harm done, for everybody to see; the others are its early signs.
HARM = frozenset({Promise.ONE_RUNS, Promise.NO_FORK, Promise.LOSS_EXCUSED, Promise.ENDS})


_JOURNAL, _GUEST = int(Class.JOURNAL), int(Class.GUEST)


class Outcome(StrEnum):
    RESOLVED = "resolved"
    LOST = "guest_lost"
    INDETERMINATE = "indeterminate"


@dataclass(frozen=True, slots=True)
class Facts:
    """What the promises need to know of one host."""

    executing: int
    opened: int
    owns: bool
    owns_what_runs: bool
    lost: bool
    ran: frozenset[Epoch]
    taken_back: frozenset[Epoch]  # epochs of destinations that these reclaims say never ran


class Promises:
    """Judges worlds; what it found about a host it remembers."""

    def __init__(self, hosts: Hosts, kept: frozenset[Promise] = frozenset(Promise)) -> None:
        self._hosts = hosts
        self._kept = kept
        self._facts: dict[Host, Facts] = {}

    def facts(self, host: Host) -> Facts:
        facts = self._facts.get(host)
        if facts is None:
            facts = self._facts[host] = self._look(host)
        return facts

    def _look(self, host: Host) -> Facts:
        executing = [process for process in host.processes if process.running]
        durable = self._durable(host)
        known = durable.instances.get(VM)
        owns = known is not None and known.holding is Holding.HELD and known.guest is not None
        good = all(
            owns and known and known.guest and known.guest.pid == process.pid and known.epoch == process.ran
            for process in executing
        )
        back = [record.epoch for record in host.disk.durable if isinstance(record, r.Reclaimed)]
        return Facts(
            len(executing),
            sum(process.is_open for process in host.processes),
            known is not None and durable.may_run(VM, known.epoch),
            good,
            known is not None and known.holding is Holding.LOST and not durable.is_superseded(VM, known.epoch),
            frozenset(host.ran),
            frozenset(Epoch(epoch.term, epoch.n - 1) for epoch in back),
        )

    def _durable(self, host: Host) -> Ownership:
        try:
            return self._hosts.machine.fold(host.disk.durable)
        except JournalError:
            return Ownership()

    def broken(self, facts: list[Facts], classes: int, fenced: int) -> Promise | None:
        """The promise that a world breaks; *fenced* hosts are cut off from the world and do not count."""
        return next((promise for promise in _broken(facts, classes, fenced) if promise in self._kept), None)

    # -- rest ------------------------------------------------------------------------------------------------------

    def outcome(self, world: World) -> tuple[Outcome, str] | None:
        """How *world* ended, or None while something is under way, or when it ended in no way that is allowed."""
        if any(self._works(world, host) for host in world.hosts):
            return None
        facts = [self.facts(host) for host in world.hosts]
        running = sum(fact.executing for fact in facts)
        reasons = self._reasons(world)
        if not reasons and not self._is_open(world):
            processes = sum(len(host.processes) for host in world.hosts)
            if running == 1 and processes == 1:
                return Outcome.RESOLVED, ""
            if running == 0 and processes == 0 and any(fact.lost for fact in facts):
                return Outcome.LOST, ""
        excuse = Class.JOURNAL if reasons - {STEP_FAILED} else Class.JOURNAL | Class.START | Class.GUEST
        if reasons and world.classes & excuse:
            return Outcome.INDETERMINATE, "; ".join(sorted(reasons))
        return None

    def _works(self, world: World, host: Host) -> bool:
        """Whether the daemon still has something to do that it can do."""
        if host.daemon is None:
            return not self._is_unreadable(host)
        if host.daemon.todo:
            return True
        return any(not self._polls_in_vain(world, task) for task in host.daemon.tasks)

    def _is_unreadable(self, host: Host) -> bool:
        try:
            self._hosts.machine.read(host.disk)
        except Unreadable:
            return True
        return False

    def _polls_in_vain(self, world: World, task: Task) -> bool:
        """In doubt, and the destination has lost what it knew, or an operator must look at it."""
        if task.at is not At.ASK:
            return False
        trip = self._hosts.scenario.trip(task.migration)
        destination = next(host for host in world.hosts if host.name == trip.destination)
        if destination.daemon is None:
            return self._is_unreadable(destination)
        if destination.daemon.marks:
            return True
        unknown = rules.verdict(self._hosts.machine.state(destination), task.migration) is Answer.UNKNOWN
        return unknown and all(letter.answer in {None, Answer.UNKNOWN} for letter in world.letters)

    def _reasons(self, world: World) -> set[str]:
        """Why somebody has to look; each is named by the daemon."""
        reasons: set[str] = set()
        for host in world.hosts:
            if host.daemon is None:
                reasons.add("journal unreadable")
                continue
            reasons.update(host.daemon.marks)
            if "'" in host.disk.journal:
                reasons.add("journal lost or restored")
            if any(task.role is Role.SOURCE for task in host.daemon.tasks):
                reasons.add("unknown to the destination")
        return reasons

    def _is_open(self, world: World) -> bool:
        """Whether a journal knows of a migration that is not over, or of a guest that it must still give up."""
        for host in world.hosts:
            state = self._hosts.machine.state(host)
            if any(out.stage in OPEN_OUTGOING for out in state.outgoing.values()):
                return True
            if any(incoming.stage in OPEN_INCOMING for incoming in state.incoming.values()):
                return True
        return False


def _broken(facts: list[Facts], classes: int, fenced: int) -> Iterator[Promise]:
    free = [fact for at, fact in enumerate(facts) if not fenced >> at & 1] if fenced else facts
    if sum(fact.executing for fact in free) > 1:
        yield Promise.ONE_RUNS
    if sum(fact.opened for fact in free) > 1:
        yield Promise.ONE_OPENS
    if classes & _JOURNAL:
        return
    if any(fact.taken_back & other.ran for fact in facts if fact.taken_back for other in facts):
        yield Promise.NO_FORK
    if not classes & _GUEST and any(fact.lost for fact in facts):
        yield Promise.LOSS_EXCUSED
    if sum(fact.owns for fact in free) > 1:
        yield Promise.ONE_OWNS
    if not all(fact.owns_what_runs for fact in free):
        yield Promise.OWNER_RUNS
