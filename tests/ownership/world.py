"""Hosts that consist of nothing but a journal in memory: for tests of the rules."""

from __future__ import annotations

from collections.abc import Collection

from vmmigrate.ownership import records as r
from vmmigrate.ownership import rules
from vmmigrate.ownership.compaction import compacted, snapshot
from vmmigrate.ownership.records import Epoch, Record
from vmmigrate.ownership.rules import Answer, Decision, Event, decide
from vmmigrate.ownership.state import Ownership, apply

VM = "vm1"


def fold(records: list[Record]) -> Ownership:
    state = Ownership()
    for record in records:
        state = apply(state, record)
    return state


class Host:
    """One host: its journal, and what it decides."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.journal_id = f"journal-of-{name}"
        self.records: list[Record] = []
        self.forgotten = 0
        self.state = Ownership()

    @property
    def newest(self) -> int:
        """The number of the last record; a compaction does not change it."""
        return self.forgotten + len(self.records)

    def commit(self, event: Event) -> Decision:
        decision = decide(self.state, event)
        for record in decision.records:
            self.state = apply(self.state, record)
        self.records.extend(decision.records)
        return decision

    def compact(self, gone: Collection[r.Spawned] = ()) -> None:
        """Forget what no rule asks for."""
        newest, wanted = self.newest, compacted(self.state, gone=gone)
        self.records = list(snapshot(wanted))
        self.forgotten = newest - len(self.records)
        self.state = fold(self.records)
        assert self.state == wanted
        assert self.forgotten >= 0, "more records than there were"

    def crash(self, kept: int | None = None) -> None:
        """Read the journal again; *kept* records of it survived."""
        self.forgotten = self.forgotten if kept is None else 0
        del self.records[len(self.records) if kept is None else kept :]
        self.state = fold(self.records)

    def epoch(self, instance: str = VM) -> Epoch:
        return self.state.instances[instance].epoch

    def may_run(self, instance: str = VM) -> bool:
        known = self.state.instances.get(instance)
        return known is not None and self.state.may_run(instance, known.epoch)


def spawned(instance: str = VM, migration: str | None = None, pid: int = 7) -> r.Spawned:
    return r.Spawned(instance, migration, pid, 1, f"/run/{pid}.sock")


def ticket(migration: str, destination: str, instance: str = VM) -> r.TicketIssued:
    return r.TicketIssued(migration, instance, destination, f"hash-{migration}", expires_at_s=60)


def present(migration: str, host: str, instance: str = VM, now_s: int = 0) -> rules.ConsumeTicket:
    """The destination shows the right ticket in time."""
    return rules.ConsumeTicket(migration, instance, f"hash-{migration}", host, now_s)


def boot(name: str = "a") -> Host:
    """A host that holds and runs one instance."""
    host = Host(name)
    host.commit(rules.Create(VM))
    host.commit(rules.Spawn(spawned()))
    return host


def reach_ready(source: Host, destination: Host, migration: str = "m1") -> None:
    """Everything up to Ready: the source paused, the destination prepared."""
    epoch = source.epoch()
    source.commit(rules.IssueTicket(ticket(migration, destination.name)))
    destination.commit(rules.Reserve(r.Reserved(migration, VM, source.name, "https://s")))
    source.commit(present(migration, destination.name))
    destination.commit(rules.Spawn(spawned(migration=migration)))
    source.commit(rules.BeginPause(migration, "running"))
    destination.commit(rules.Prepare(migration, epoch, "running"))


def release(source: Host, destination: Host, migration: str = "m1") -> Epoch:
    """The source gives the guest away; the epoch that its Handoff names."""
    epoch = source.epoch()
    source.commit(rules.Release(migration, destination.journal_id, "https://d"))
    return epoch


def hand_over(source: Host, destination: Host, migration: str = "m1") -> None:
    """A whole migration without a failure."""
    reach_ready(source, destination, migration)
    epoch = release(source, destination, migration)
    destination.commit(rules.Acquire(migration, epoch))
    destination.commit(rules.Start(migration))
    source.commit(rules.Evidence(migration, Answer.RUNNING, destination.journal_id))
