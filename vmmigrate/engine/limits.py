"""What one migration may take: options of the one who starts it, and deadlines on everything the peer does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MigrationOptions:
    """Chosen by whoever starts the migration.

    Attributes:
        downtime_ms: Pause the guest only when the forecast of the pause is at most this.
        timeout_s: For everything up to the handoff; then the source goes on as before.
        streams: Bulk streams wanted; the destination may allow fewer.
        verify: `digest` compares one digest per page as sent and as landed; `full` also hashes all of RAM on both
            sides while the guest is paused.
        max_rounds: After so many rounds without a prospect of a short pause, stop trying.
        force: Then pause anyway, instead of giving up.
    """

    downtime_ms: int = 300
    timeout_s: float = 3600.0
    streams: int = 2
    verify: str = "digest"
    max_rounds: int = 30
    force: bool = False


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that a silent or slow peer is given, step by step.

    Order that must hold: a peer that works says heartbeats, so `answer_s` is for steps that need no work,
    `build_s` and `import_s` for those that do; `handoff_window_s` at the destination must exceed what the source needs
    to journal `released` (its fsync), or a handoff comes too late and is refused. Within `start_s` of `acquired` the
    destination has opened everything, or returns the guest. `resume_s` is how long a link may be cut while the guest
    still runs at the source; until then both ends keep what they have.
    """

    answer_s: float = 15.0
    build_s: float = 120.0
    round_s: float = 300.0
    import_s: float = 300.0
    handoff_window_s: float = 30.0
    verdict_s: float = 30.0
    start_s: float = 30.0
    resume_s: float = 60.0
    undo_s: float = 30.0
    settle_first_s: float = 0.2
    settle_most_s: float = 15.0
