"""The record of one migration: what people and programs see of it, while it lasts and after."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from vmmigrate.errors import VmMigrateError
from vmmigrate.memory import PAGE_SIZE
from vmmigrate.ram.encoding import WORDS, ZERO, Tally
from vmmigrate.wire.phases import Phase, Role
from vmmigrate.wire.session import Session


class Outcome(StrEnum):
    """How a migration ended; every word says what is true now."""

    MOVED = "moved"
    REFUSED = "refused"  # nothing was touched
    FAILED = "failed"  # the source is as before
    CANCELLED = "cancelled"  # the source is as before
    TIMED_OUT = "timed_out"  # the source is as before
    UNKNOWN = "unknown"  # in doubt
    GUEST_LOST = "guest_lost"


class Laps:
    """A stopwatch whose parts add up: each lap ends where the next begins."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: float | None = None
        self.parts: dict[str, float] = {}

    def start(self, at: float | None = None) -> None:
        """Now, or when it was *at* by the clock."""
        self._last = self._clock() if at is None else at
        self.parts.clear()

    def lap(self, name: str) -> None:
        """Book the time since the last lap to *name*; nothing before `start`."""
        if self._last is None:
            return
        now = self._clock()
        self.parts[name] = self.parts.get(name, 0.0) + now - self._last
        self._last = now

    @property
    def total_s(self) -> float:
        return sum(self.parts.values())


@dataclass
class RamCounters:
    """Bytes by kind. `sent_bytes` is what crossed the wire for pages, headers included.

    Attributes:
        encodings: By encoding, how many pages travelled so, and in how many bytes.
    """

    total_bytes: int = 0
    sent_bytes: int = 0
    zero_bytes: int = 0
    hole_bytes: int = 0
    rounds: list[dict[str, Any]] = field(default_factory=list)
    encodings: dict[str, dict[str, int]] = field(default_factory=dict)

    def note_tally(self, tally: Tally) -> None:
        """All that was sent until now."""
        self.zero_bytes = tally.pages[ZERO] * PAGE_SIZE
        self.encodings = {
            word: {"pages": tally.pages[word], "bytes": tally.bytes[word]} for word in WORDS if tally.pages[word]
        }

    def as_dict(self) -> dict[str, Any]:
        return {
            "total_bytes": self.total_bytes,
            "sent_bytes": self.sent_bytes,
            "zero_bytes": self.zero_bytes,
            "hole_bytes": self.hole_bytes,
            "rounds": list(self.rounds),
            "encodings": {word: dict(counts) for word, counts in self.encodings.items()},
        }


def _before_the_offer() -> dict[str, Any]:
    return {"offered": None, "needed": None, "chosen": None, "passed_over": [], "skipped": [], "refused": None}


@dataclass
class MigrationRecord:
    """What is known of one migration on one host.

    Attributes:
        negotiation: What was offered, chosen, passed over, skipped and refused, and why; see `explain`.
        progress: Counters of the round that runs: `round`, `bytes`, `rate_bytes_per_s`, `dirty_pages`, `pages_left`.
        forecast: Of the pause when it was decided upon, and how far it was off; known once the guest has moved. With
            `planned` when it had been planned before.
        plan: What `plan` asked for: a forecast, of a migration that was then called off.
        options: What it is run with, as it is now.
        integrity: At the source, once the guest has moved: what hashing its RAM once more has found.
        outcome: None while it lasts.
        error: Code, message and details when it did not end as `moved`.
    """

    migration_id: str
    instance_id: str
    role: Role
    peers: dict[str, str]
    negotiated: dict[str, Any] = field(default_factory=dict)
    negotiation: dict[str, Any] = field(default_factory=_before_the_offer)
    ram: RamCounters = field(default_factory=RamCounters)
    laps: Laps = field(default_factory=Laps)
    digest: dict[str, str] = field(default_factory=dict)
    progress: dict[str, int] = field(default_factory=dict)
    forecast: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    integrity: dict[str, Any] = field(default_factory=dict)
    options: Callable[[], dict[str, Any]] = dict
    created_at_s: float = field(default_factory=time.time)
    begun_s: float | None = None
    ended_s: float | None = None
    awaiting_peer: bool = True
    outcome: Outcome | None = None
    error: dict[str, Any] | None = None
    session: Session | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def phase(self) -> Phase:
        """One word for API, CLI, logs and metrics, derived from the phase table."""
        if self.outcome is Outcome.MOVED:
            return Phase.DONE
        if self.outcome is Outcome.UNKNOWN:
            return Phase.IN_DOUBT
        if self.outcome is not None:
            return Phase.FAILED
        return Phase.NEGOTIATE if self.session is None else self.session.phase

    @property
    def total_s(self) -> float:
        return 0.0 if self.begun_s is None else (self.ended_s or time.monotonic()) - self.begun_s

    def begin(self, session: Session) -> None:
        self.session = session
        self.awaiting_peer = False
        self.begun_s = time.monotonic()

    def finish(self, outcome: Outcome, error: VmMigrateError | None = None) -> None:
        """The outcome; `unknown` may be followed by another one when it is settled."""
        if self.outcome not in {None, Outcome.UNKNOWN}:
            return
        self.outcome = outcome
        self.error = None if error is None else error.as_dict()
        self.ended_s = time.monotonic()

    def as_dict(self) -> dict[str, Any]:
        """The record as programs get it: design section 6."""
        return {
            "migration_id": self.migration_id,
            "instance_id": self.instance_id,
            "role": self.role.value,
            "state": "awaiting_peer" if self.awaiting_peer and self.outcome is None else self.phase.value,
            "outcome": self.outcome.value if self.outcome else None,
            "error": self.error,
            "peers": dict(self.peers),
            "negotiated": dict(self.negotiated),
            "negotiation": dict(self.negotiation),
            "ram": self.ram.as_dict(),
            "progress": dict(self.progress),
            "forecast": dict(self.forecast),
            "plan": self.plan,
            "options": self.options(),
            "integrity": dict(self.integrity),
            "created_at_s": self.created_at_s,
            "total_s": self.total_s,
            "downtime_s": self.laps.total_s,
            "downtime_parts_s": dict(self.laps.parts),
            "digest": dict(self.digest),
            "notes": list(self.notes),
        }


_OUTCOME_BY_CODE = {
    "cancelled": Outcome.CANCELLED,
    "timed_out_total": Outcome.TIMED_OUT,
    "guest_lost": Outcome.GUEST_LOST,
    "guest_powered_off": Outcome.FAILED,
}


def outcome_of(error: VmMigrateError, failed_in: Phase | None) -> Outcome:
    """How an attempt ended that failed with *error* before the guest was given away."""
    named = _OUTCOME_BY_CODE.get(error.code)
    if named is not None:
        return named
    before_ram = failed_in in {None, Phase.NEGOTIATE, Phase.OFFERED, Phase.SYNC, Phase.VALIDATE}
    return Outcome.REFUSED if before_ram else Outcome.FAILED
