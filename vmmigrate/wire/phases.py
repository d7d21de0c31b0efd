"""The phase table: who may say what, when, and what follows. Legality lives here and nowhere else.

`TRANSITIONS` maps (phase, speaker, message) to the next phase. `Session` applies it in both directions, so that an
illegal message is refused before it is acted upon, whoever sent it. The diagram in ARCHITECTURE.md is drawn from this
table (`python -m tools.phase_diagram`), and a test fails when it is stale.

Every live phase also accepts what `IN_EVERY_LIVE_PHASE` lists. A phase without rows is terminal.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, StrEnum


class Role(StrEnum):
    """The two ends of a migration, named by what they are to the guest."""

    SOURCE = "source"
    DESTINATION = "destination"

    @property
    def peer(self) -> Role:
        return Role.DESTINATION if self is Role.SOURCE else Role.SOURCE


class Kind(IntEnum):
    """Message tags. They cross the wire: never renumber, never re-use; zero is never a tag."""

    OFFER = 1
    SELECT = 2
    REFUSE = 3
    PREAMBLE = 4
    PREAMBLE_OK = 5
    ROUND_END = 6
    ROUND_APPLIED = 7
    PAUSED = 8
    TIME_DATA = 9
    DEVICE_STATE = 10
    CONSOLE_HISTORY = 11
    STATE_END = 12
    READY = 13
    HANDOFF = 14
    RUNNING = 15
    REFUSED = 16
    RETURNED = 17
    PROGRESS = 18
    HEARTBEAT = 19
    CANCEL = 20
    FAILED = 21
    RESUME = 22
    RESUMED = 23
    APPLIED = 24


class Phase(StrEnum):
    """Where a migration stands, the same word on both sides, in the API, the CLI, logs and metrics."""

    NEGOTIATE = "negotiate"
    OFFERED = "offered"
    RESUMING = "resuming"
    CATCHING_UP = "catching_up"
    SYNC = "sync"
    VALIDATE = "validate"
    RAM_PRE_PAUSE = "ram_pre_pause"
    RAM_POST_PAUSE = "ram_post_pause"
    DEVICE_STATE = "device_state"
    IMPORT = "import"
    READY = "ready"
    IN_DOUBT = "in_doubt"
    DONE = "done"
    FAILED = "failed"


class MayRun(StrEnum):
    """Who may run the guest while a phase lasts."""

    SOURCE = "source"
    NEITHER = "neither (paused)"
    UNKNOWN = "unknown to the source"
    DESTINATION = "destination"
    AS_BEFORE = "as in the phase that failed"


MAY_RUN: Mapping[Phase, MayRun] = {
    Phase.NEGOTIATE: MayRun.SOURCE,
    Phase.OFFERED: MayRun.SOURCE,
    Phase.RESUMING: MayRun.SOURCE,
    Phase.CATCHING_UP: MayRun.SOURCE,
    Phase.SYNC: MayRun.SOURCE,
    Phase.VALIDATE: MayRun.SOURCE,
    Phase.RAM_PRE_PAUSE: MayRun.SOURCE,
    Phase.RAM_POST_PAUSE: MayRun.NEITHER,
    Phase.DEVICE_STATE: MayRun.NEITHER,
    Phase.IMPORT: MayRun.NEITHER,
    Phase.READY: MayRun.NEITHER,
    Phase.IN_DOUBT: MayRun.UNKNOWN,
    Phase.DONE: MayRun.DESTINATION,
    Phase.FAILED: MayRun.AS_BEFORE,
}

IF_IT_BREAKS: Mapping[Phase, str] = {
    Phase.NEGOTIATE: "source never noticed; destination discards",
    Phase.OFFERED: "source never noticed; destination discards",
    Phase.RESUMING: "source keeps running, dirty bits put back; a new session may continue",
    Phase.CATCHING_UP: "source keeps running, dirty bits put back; a new session may continue",
    Phase.SYNC: "source never noticed; destination discards",
    Phase.VALIDATE: "source never noticed; destination discards",
    Phase.RAM_PRE_PAUSE: "source keeps running, dirty bits put back; a new session may continue",
    Phase.RAM_POST_PAUSE: "source resumes",
    Phase.DEVICE_STATE: "source resumes",
    Phase.IMPORT: "source resumes",
    Phase.READY: "source resumes",
    Phase.IN_DOUBT: "source stays paused and asks; it never resumes on its own guess",
    Phase.DONE: "source holds a tombstone",
    Phase.FAILED: "typed reason on both sides, same code",
}

_S, _D = Role.SOURCE, Role.DESTINATION

TRANSITIONS: Mapping[tuple[Phase, Role, Kind], Phase] = {
    (Phase.NEGOTIATE, _D, Kind.OFFER): Phase.OFFERED,
    (Phase.NEGOTIATE, _D, Kind.RESUME): Phase.RESUMING,
    (Phase.RESUMING, _S, Kind.RESUMED): Phase.CATCHING_UP,
    (Phase.RESUMING, _S, Kind.REFUSE): Phase.FAILED,
    (Phase.CATCHING_UP, _D, Kind.APPLIED): Phase.RAM_PRE_PAUSE,
    (Phase.OFFERED, _S, Kind.SELECT): Phase.SYNC,
    (Phase.OFFERED, _S, Kind.REFUSE): Phase.FAILED,
    (Phase.SYNC, _S, Kind.PREAMBLE): Phase.VALIDATE,
    (Phase.SYNC, _S, Kind.REFUSE): Phase.FAILED,
    (Phase.VALIDATE, _D, Kind.PREAMBLE_OK): Phase.RAM_PRE_PAUSE,
    (Phase.VALIDATE, _D, Kind.REFUSE): Phase.FAILED,
    (Phase.RAM_PRE_PAUSE, _S, Kind.ROUND_END): Phase.RAM_PRE_PAUSE,
    (Phase.RAM_PRE_PAUSE, _D, Kind.ROUND_APPLIED): Phase.RAM_PRE_PAUSE,
    (Phase.RAM_PRE_PAUSE, _S, Kind.PAUSED): Phase.RAM_POST_PAUSE,
    (Phase.RAM_POST_PAUSE, _S, Kind.ROUND_END): Phase.RAM_POST_PAUSE,
    (Phase.RAM_POST_PAUSE, _D, Kind.ROUND_APPLIED): Phase.RAM_POST_PAUSE,
    (Phase.RAM_POST_PAUSE, _S, Kind.TIME_DATA): Phase.DEVICE_STATE,
    (Phase.DEVICE_STATE, _D, Kind.ROUND_APPLIED): Phase.DEVICE_STATE,
    (Phase.DEVICE_STATE, _S, Kind.DEVICE_STATE): Phase.DEVICE_STATE,
    (Phase.DEVICE_STATE, _S, Kind.CONSOLE_HISTORY): Phase.DEVICE_STATE,
    (Phase.DEVICE_STATE, _S, Kind.STATE_END): Phase.IMPORT,
    (Phase.IMPORT, _D, Kind.ROUND_APPLIED): Phase.IMPORT,
    (Phase.IMPORT, _D, Kind.READY): Phase.READY,
    (Phase.READY, _S, Kind.HANDOFF): Phase.IN_DOUBT,
    (Phase.READY, _D, Kind.REFUSED): Phase.FAILED,
    (Phase.IN_DOUBT, _D, Kind.RUNNING): Phase.DONE,
    (Phase.IN_DOUBT, _D, Kind.REFUSED): Phase.FAILED,
    (Phase.IN_DOUBT, _D, Kind.RETURNED): Phase.FAILED,
}

TERMINAL = frozenset({Phase.DONE, Phase.FAILED})

# FAILED is a report; in IN_DOUBT it ends the session and decides nothing (ownership rule 5).
IN_EVERY_LIVE_PHASE: Mapping[Kind, Phase | None] = {
    Kind.HEARTBEAT: None,
    Kind.PROGRESS: None,
    Kind.FAILED: Phase.FAILED,
    Kind.CANCEL: Phase.FAILED,
}

# Ownership rule 11. In doubt nobody can call the guest back by asking; and a destination that has said Ready makes
# `refused` durable first and then says Refused, so that no source resumes on a word that the destination may forget.
NO_CANCEL: frozenset[tuple[Phase, Role]] = frozenset(
    {(Phase.IN_DOUBT, Role.SOURCE), (Phase.IN_DOUBT, Role.DESTINATION), (Phase.READY, Role.DESTINATION)}
)


def next_phase(phase: Phase, speaker: Role, kind: Kind) -> Phase | None:
    """The phase that follows when *speaker* says *kind* in *phase*; None when that is illegal."""
    if phase in TERMINAL:
        return None
    if kind in IN_EVERY_LIVE_PHASE:
        if kind is Kind.CANCEL and (phase, speaker) in NO_CANCEL:
            return None
        return IN_EVERY_LIVE_PHASE[kind] or phase
    return TRANSITIONS.get((phase, speaker, kind))


def expected(phase: Phase, speaker: Role) -> frozenset[Kind]:
    """Everything that *speaker* may say in *phase*."""
    return frozenset(kind for kind in Kind if next_phase(phase, speaker, kind) is not None)
