"""What there is: disks, guest processes, daemons, connections, letters. Frozen values; a step makes new ones."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag, StrEnum

from vmmigrate.ownership.records import Epoch, Record
from vmmigrate.ownership.rules import Answer
from vmmigrate.wire.phases import Kind, Phase, Role

VM = "vm1"
NEVER = Epoch(0, 0)


class Failure(StrEnum):
    """What the adversary pays for, one of its budget each."""

    DAEMON_CRASH = "daemon crash"
    FSYNC = "fsync fails, or the daemon dies before it returns"
    GUEST_CRASH = "guest crash"
    HOST_CRASH = "host crash"
    START = "backends do not open"
    CUT = "link cut"
    SILENCE = "one side gives up waiting"
    DUPLICATE = "a message comes twice"
    LETTER_LOST = "a settle request or answer is lost"
    JOURNAL_LOST = "journal lost"
    JOURNAL_RESTORED = "journal restored from an older copy"
    JOURNAL_DAMAGED = "journal damaged"
    OPERATOR = "an operator resolves"
    JOURNAL_COPIED = "an older copy of a journal put back as it was, id and all"


# What the promise covers. A journal that is put back by copying the file is outside: restoring has to change its id.
COVERED = frozenset(Failure) - {Failure.JOURNAL_COPIED}


class Class(IntFlag):
    """Classes of failures that excuse an outcome; once set they stay."""

    NONE = 0
    GUEST = 1  # a guest process died: it may be lost, and somebody says so
    JOURNAL = 2  # a journal was lost, restored or damaged: `indeterminate` is an answer
    START = 4  # disks did not open: a restart may need an operator


class Damage(StrEnum):
    """What a crash or time did to the end of a journal's file."""

    NONE = "none"
    TORN = "torn"  # an incomplete record follows
    FLIPPED = "flipped"  # a byte of a record is not what was written
    UNREADABLE = "unreadable"  # the real decoder has said so


@dataclass(frozen=True, slots=True)
class Disk:
    """A journal's file: what the disk has, and what a reader sees (the page cache may have more)."""

    journal: str
    durable: tuple[Record, ...]
    cached: tuple[Record, ...]
    damage: Damage = Damage.NONE
    damaged: int = 0  # the record with the flipped byte


@dataclass(frozen=True, slots=True)
class Process:
    """A guest process: it outlives its daemon and remembers what it was told."""

    pid: int
    migration: str | None
    running: bool = False
    is_open: bool = False  # disks for writing, NICs
    seen: Epoch = NEVER
    ran: Epoch = NEVER
    last_record: int = 0


class At(StrEnum):
    """Where a task of a daemon stands: before the step that has this name."""

    # source
    AWAIT_OFFER = "await offer"
    CONSUME = "consume ticket"
    AWAIT_BUILT = "await preamble ok"
    BEGIN_PAUSE = "journal pausing"
    PAUSE = "pause for handoff"
    AWAIT_READY = "await ready"
    RELEASE = "journal released"
    NOTE = "note record"
    SEND_HANDOFF = "send handoff"
    AWAIT_VERDICT = "await verdict"
    CONCLUDE = "journal the evidence"
    FREE = "destroy the given guest"
    RESUME = "run the guest taken back"
    UNDO_RUN = "undo: run"
    UNDO_END = "undo: end attempt"
    ASK = "ask to settle"
    # destination
    RESERVE = "journal reserved"
    AWAIT_PREAMBLE = "await preamble"
    BUILD = "build guest"
    AWAIT_STATE = "await state"
    PREPARE = "journal prepared"
    AWAIT_HANDOFF = "await handoff"
    ACQUIRE = "journal acquired"
    OPEN = "open backends"
    START = "journal started"
    RUN = "run"
    TELL_RUNNING = "send running"
    CLOSE = "destroy before returned"
    RETURN = "journal returned"
    LATE_START = "a late opener asks to start"
    GIVE_UP = "journal refused"
    DESTROY = "destroy the refused guest"


WAITING = frozenset(
    {
        At.AWAIT_OFFER,
        At.AWAIT_BUILT,
        At.AWAIT_READY,
        At.AWAIT_VERDICT,
        At.AWAIT_PREAMBLE,
        At.AWAIT_STATE,
        At.AWAIT_HANDOFF,
    }
)


@dataclass(frozen=True, slots=True)
class Task:
    """One end of a migration within a daemon; volatile."""

    role: Role
    migration: str
    at: At
    phase: Phase = Phase.NEGOTIATE
    epoch: Epoch = NEVER  # as the peer said it
    journal: str = ""  # of the peer: from Ready, or with an answer
    answer: Answer | None = None
    settling: bool = False  # the connection is gone; the source asks


@dataclass(frozen=True, slots=True)
class Todo:
    """A part of a recovery step that is still to do."""

    act: str
    migration: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Daemon:
    """What a daemon knows; it dies with it. Serves nobody before `todo` is empty."""

    known: tuple[Record, ...]
    todo: tuple[Todo, ...] = ()
    tasks: tuple[Task, ...] = ()
    marks: tuple[str, ...] = ()  # why the instance is indeterminate here


@dataclass(frozen=True, slots=True)
class Host:
    """One host. `ran` remembers every epoch under which a guest executed here: nobody else may ask for it."""

    name: str
    disk: Disk
    processes: tuple[Process, ...] = ()
    daemon: Daemon | None = None
    ran: tuple[Epoch, ...] = ()


@dataclass(frozen=True, slots=True)
class Message:
    """What goes over the control connection; several messages of the protocol that are sent in one go are one here."""

    migration: str
    speaker: Role
    kinds: tuple[Kind, ...]
    epoch: Epoch = NEVER
    journal: str = ""


@dataclass(frozen=True, slots=True)
class Link:
    """The connection of one migration: two queues. A side that is gone reads and writes no more."""

    to_destination: tuple[Message, ...] = ()
    to_source: tuple[Message, ...] = ()
    source_gone: bool = False
    destination_gone: bool = False
    cut: bool = False

    def gone(self, role: Role) -> bool:
        return self.source_gone if role is Role.SOURCE else self.destination_gone

    def inbound(self, role: Role) -> tuple[Message, ...]:
        return self.to_source if role is Role.SOURCE else self.to_destination


CLOSED = Link(source_gone=True, destination_gone=True)


class Mail(StrEnum):
    TICKET = "ticket"
    ASK = "settle?"
    ANSWER = "settle!"
    SUPERSEDED = "superseded"
    ACKNOWLEDGED = "acknowledged"
    TAKE_OVER = "resolve: destination"


@dataclass(frozen=True, slots=True)
class Letter:
    """A request or answer outside the connection: in any order, any delay."""

    mail: Mail
    migration: str
    to: str
    epoch: Epoch = NEVER
    journal: str = ""
    answer: Answer | None = None
    since: Epoch = NEVER  # of a supersession: what the winner had given away


@dataclass(frozen=True, slots=True)
class World:
    """Everything, at one moment. `fenced` hosts are cut off by an operator until they know that they lost."""

    hosts: tuple[Host, ...]
    links: tuple[Link, ...]
    letters: frozenset[Letter]
    classes: Class = Class.NONE
    fenced: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Trip:
    """One migration of a scenario."""

    migration: str
    source: str
    destination: str


@dataclass(frozen=True, slots=True)
class Scenario:
    """Who migrates where."""

    name: str
    hosts: tuple[str, ...]
    trips: tuple[Trip, ...]

    def trip(self, migration: str) -> Trip:
        return next(trip for trip in self.trips if trip.migration == migration)

    def host_of(self, migration: str, role: Role) -> str:
        trip = self.trip(migration)
        return trip.source if role is Role.SOURCE else trip.destination


SCENARIOS = {
    "ab": Scenario("ab", ("A", "B"), (Trip("m1", "A", "B"),)),
    "abc": Scenario("abc", ("A", "B", "C"), (Trip("m1", "A", "B"), Trip("m2", "B", "C"))),
    "aba": Scenario("aba", ("A", "B"), (Trip("m1", "A", "B"), Trip("m2", "B", "A"))),
    "again": Scenario("again", ("A", "B"), (Trip("m1", "A", "B"), Trip("m2", "A", "B"))),
}
