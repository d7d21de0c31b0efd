"""What may happen to an instance or a migration: the questions that `rules.decide` answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vmmigrate.ownership import records as r
from vmmigrate.ownership.records import NO_EPOCH, Epoch
from vmmigrate.ownership.state import Outgoing


class Answer(StrEnum):
    """What a destination says of M: to the source, in messages and in answers to settle."""

    RUNNING = "running"
    STARTED = "started"
    REFUSED = "refused"
    RETURNED = "returned"
    PENDING = "pending"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Create:
    instance: str


@dataclass(frozen=True, slots=True)
class Spawn:
    spawned: r.Spawned


@dataclass(frozen=True, slots=True)
class Stop:
    instance: str


@dataclass(frozen=True, slots=True)
class Remove:
    instance: str


@dataclass(frozen=True, slots=True)
class Lose:
    """A guest process ended by itself. `guest` names it; None: whatever process the journal knows."""

    instance: str
    reason: str
    guest: r.Spawned | None = None


@dataclass(frozen=True, slots=True)
class PowerOff:
    """The guest in the process *guest* has powered itself off: it is stopped, and not lost."""

    instance: str
    guest: r.Spawned


@dataclass(frozen=True, slots=True)
class IssueTicket:
    ticket: r.TicketIssued


@dataclass(frozen=True, slots=True)
class ConsumeTicket:
    migration: str
    instance: str
    ticket_hash: str
    host: str
    now_s: int


@dataclass(frozen=True, slots=True)
class BeginPause:
    migration: str
    desired: str


@dataclass(frozen=True, slots=True)
class EndAttempt:
    """The attempt failed or was cancelled before `released`. `only_in` are the stages that the caller has seen:
    in any other nothing is written, because the attempt went on meanwhile."""

    migration: str
    code: str
    only_in: frozenset[Outgoing] | None = None


@dataclass(frozen=True, slots=True)
class Release:
    migration: str
    destination_journal: str
    destination_url: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """A statement of the destination, made after its fsync: in a message, or as an answer to settle."""

    migration: str
    answer: Answer
    journal_id: str


@dataclass(frozen=True, slots=True)
class Reserve:
    reserved: r.Reserved


@dataclass(frozen=True, slots=True)
class Prepare:
    migration: str
    epoch: Epoch
    run_state: str


@dataclass(frozen=True, slots=True)
class Acquire:
    migration: str
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Refuse:
    migration: str
    code: str


@dataclass(frozen=True, slots=True)
class Start:
    migration: str


@dataclass(frozen=True, slots=True)
class Return:
    migration: str
    code: str


@dataclass(frozen=True, slots=True)
class Settle:
    """The source (or an orchestrator on its behalf, host None) asks for the verdict on M."""

    migration: str
    host: str | None
    guest_runs: bool


@dataclass(frozen=True, slots=True)
class Supersede:
    """Another host, which had given away *since*, holds *epoch* by an operator's word; nothing older may run here."""

    instance: str
    epoch: Epoch
    since: Epoch = NO_EPOCH


@dataclass(frozen=True, slots=True)
class ResolveSource:
    """An operator gives the instance back to the source of M, which is in doubt and still has the paused guest.

    `fencing_proof` says how it is known that no other host runs the guest, and that none will before it has
    acknowledged `superseded`. It is kept in the journal.
    """

    migration: str
    fencing_proof: str


@dataclass(frozen=True, slots=True)
class ResolveDestination:
    """An operator gives the instance to the destination of M. `released` is the epoch that the source's journal says
    it gave away for M, and about which it is in doubt: the Handoff that never came, from another hand."""

    migration: str
    released: Epoch


@dataclass(frozen=True, slots=True)
class Notify:
    """The destination of M has durably acknowledged `superseded` at *epoch*."""

    migration: str
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Yield:
    """The winner runs the guest under *epoch*: the superseded guest here, kept until now, may go."""

    instance: str
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Acknowledge:
    migration: str


Event = (
    Create
    | Spawn
    | Stop
    | Remove
    | Lose
    | PowerOff
    | IssueTicket
    | ConsumeTicket
    | BeginPause
    | EndAttempt
    | Release
    | Evidence
    | Reserve
    | Prepare
    | Acquire
    | Refuse
    | Start
    | Return
    | Settle
    | Supersede
    | ResolveSource
    | ResolveDestination
    | Notify
    | Yield
    | Acknowledge
)
