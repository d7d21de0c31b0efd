"""What one migration may take: options of the one who starts it, and deadlines wherever somebody may say nothing.

`Deadlines` is the one table of them. Each row says who may be silent, for how long, and what it is then called at both
ends and in the API. `ORDER` is what the rows must keep among each other, for two reasons only: that a healthy migration
is not ended by them, and that a silence has one name on both sides. Safety rests on none of them (ownership rule 8):
whatever they are set to, no timer decides who owns a guest. docs/configuration.md shows both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class MigrationOptions:
    """Chosen by whoever starts the migration.

    Attributes:
        downtime_ms: Pause the guest only when the forecast of the pause is at most this.
        timeout_s: For everything up to the handoff.
        on_timeout: Then `cancel`, and the source goes on as before; or `force` the pause, however long it will be.
        streams: Bulk streams wanted; the destination may allow fewer.
        verify: `digest` compares one digest per page as sent and as landed; `full` also hashes all of RAM on both
            sides while the guest is paused.
        max_rounds: After so many rounds without a prospect of a short pause, stop trying; counted anew whenever the
            guest was throttled.
        force: Then pause anyway, instead of giving up.
        auto_converge: Throttle the guest's processors, step by step, when it writes faster than RAM is sent.
        compression: `auto` compresses where that pays, judged all the time; `off` never does.
        delta_cache_mib: For copies of pages that were sent, so that only what changed in them is sent again; 0 is off.
        bandwidth_mib_s: All bulk streams together send no more than this, in MiB per second; 0 is no limit.
        plan_only: Measure and forecast, and then call it off: the guest is never paused.
    """

    downtime_ms: int = 300
    timeout_s: float = 3600.0
    on_timeout: str = "cancel"
    streams: int = 2
    verify: str = "digest"
    max_rounds: int = 30
    force: bool = False
    auto_converge: bool = False
    compression: str = "auto"
    delta_cache_mib: int = 32
    bandwidth_mib_s: int = 0
    plan_only: bool = False


# What may be changed while a migration runs.
ADJUSTABLE: Final = frozenset(
    {"downtime_ms", "timeout_s", "on_timeout", "max_rounds", "force", "auto_converge", "bandwidth_mib_s"}
)


@dataclass(frozen=True, slots=True)
class Silence:
    """One row: somebody who may say nothing.

    Attributes:
        least_s, most_s: What may be configured.
        awaits: Who waits for what.
        source, destination, api: The code at the source, at the destination, and in the API's reply or record; empty
            where nobody is told, or nothing ends.
    """

    awaits: str
    source: str = ""
    destination: str = ""
    api: str = ""
    least_s: float = 0.05
    most_s: float = 3600.0


def _seconds(default_s: float, row: Silence) -> float:
    return field(default=default_s, metadata={"row": row})


def _both(awaits: str, code: str, **bounds: float) -> Silence:
    """Both ends tell each other, and the record of each is what the API shows."""
    return Silence(awaits, code, code, code, **bounds)


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds. In the order in which a migration comes to them; names are those of `[limits]` in the configuration."""

    # -- at the doors
    handshake_s: float = _seconds(
        5.0, Silence("the doors of API and migration port: a TLS handshake", "handshake_timeout")
    )
    connect_s: float = _seconds(
        10.0,
        Silence(
            "the destination: a connection to the source with its handshake",
            destination="handshake_timeout",
            api="handshake_timeout",
        ),
    )
    offer_s: float = _seconds(
        10.0, Silence("the source: Offer or Resume of whoever connected", "timed_out", "timed_out")
    )
    # -- the conversation
    heartbeat_s: float = _seconds(
        1.0, Silence("the other end: a sign of life, so often; alike on all hosts", most_s=60.0)
    )
    silence_s: float = _seconds(10.0, _both("both ends: anything at all from the other", "peer_silent"))
    send_s: float = _seconds(30.0, _both("both ends: that the other takes what is said", "stalled"))
    goodbye_s: float = _seconds(
        2.0,
        Silence("who gives up: that the other takes the reason; and half of it, for the other's reason", most_s=60.0),
    )
    answer_s: float = _seconds(
        15.0, _both("the destination: Select, Preamble, Resumed; the source: Applied. No work is in them", "timed_out")
    )
    build_s: float = _seconds(120.0, _both("the source: PreambleOk, once the guest is built", "timed_out"))
    # -- RAM
    hello_s: float = _seconds(5.0, _both("both ends of a bulk stream: handshake and proof", "link_lost"))
    bulk_open_s: float = _seconds(15.0, _both("the source: all bulk streams", "bulk_timeout"))
    stall_s: float = _seconds(30.0, _both("both ends of a bulk stream: the rest of a record", "stalled"))
    round_s: float = _seconds(
        300.0, _both("the source: RoundApplied; the destination: any bulk data at all", "timed_out", most_s=86_400.0)
    )
    resume_window_s: float = _seconds(
        60.0,
        _both(
            "both ends: that a cut link comes back while the guest runs; 0: it is not waited for",
            "link_lost",
            least_s=0.0,
        ),
    )
    # -- the pause
    import_s: float = _seconds(
        300.0, _both("the destination: the state of the devices; the source: Ready", "timed_out", most_s=86_400.0)
    )
    handoff_window_s: float = _seconds(30.0, _both("the destination: Handoff, once it is ready", "timed_out"))
    verdict_s: float = _seconds(
        30.0, Silence("the source: the answer to its handoff; then it asks", "in_doubt", api="in_doubt")
    )
    start_s: float = _seconds(30.0, _both("the destination: that disks and NICs open", "start_deadline"))
    # -- in doubt
    settle_s: float = _seconds(
        15.0, Silence("the source: one answer to settle; then it asks again", "in_doubt", api="in_doubt")
    )
    settle_first_s: float = _seconds(0.2, Silence("the source: pause before it asks again, doubled each time"))
    settle_most_s: float = _seconds(15.0, Silence("the source: the longest of these pauses"))
    supersede_s: float = _seconds(
        15.0, Silence("the winner of a resolve: that a host acknowledges; then it tells again")
    )
    resolve_s: float = _seconds(
        60.0, Silence("an operator's resolve: the verdict of this host; then it answers what it knows")
    )
    # -- guests
    undo_s: float = _seconds(30.0, _both("the source: that its guest runs again after a failed attempt", "not_resumed"))
    guest_request_s: float = _seconds(10.0, _both("a daemon: one answer of a guest process", "guest_unresponsive"))
    guest_start_s: float = _seconds(30.0, _both("a daemon: that a new guest process answers", "guest_unresponsive"))
    # -- the API
    ticket_s: float = _seconds(
        60.0,
        Silence(
            "the source: a destination with the ticket", "ticket_expired", "ticket_used", "ticket_expired", least_s=1.0
        ),
    )
    api_body_s: float = _seconds(30.0, Silence("the API: the body of a request", api="HTTP 408"))
    api_idle_s: float = _seconds(15.0, Silence("the API: the next request on a connection, which it then closes"))
    api_send_s: float = _seconds(10.0, Silence("the API: that a client takes its reply; then it closes the connection"))


ROWS: Final[Mapping[str, Silence]] = {each.name: each.metadata["row"] for each in fields(Deadlines)}


@dataclass(frozen=True, slots=True)
class Before:
    """*shorter* × *times* must be less than *longer*."""

    shorter: str
    longer: str
    why: str
    times: int = 1

    def holds(self, deadlines: Deadlines) -> bool:
        return float(getattr(deadlines, self.shorter)) * self.times < float(getattr(deadlines, self.longer))


_ONE_NAME = "else a dead link is called by two names"
ORDER: Final = (
    Before("heartbeat_s", "silence_s", "else a peer that lives is called silent", times=2),
    Before("silence_s", "answer_s", _ONE_NAME),
    Before("silence_s", "build_s", _ONE_NAME),
    Before("silence_s", "round_s", _ONE_NAME),
    Before("silence_s", "import_s", _ONE_NAME),
    Before("silence_s", "send_s", _ONE_NAME),
    Before("silence_s", "stall_s", _ONE_NAME),
    Before("hello_s", "bulk_open_s", "else the source gives up on streams that come in time"),
    Before("guest_start_s", "build_s", "else the source gives up before the destination can say why"),
    Before("guest_request_s", "undo_s", "else a slow guest stays paused although it would obey"),
    Before("guest_request_s", "settle_s", "else a source in doubt gives up before the destination has looked"),
    Before("settle_first_s", "settle_most_s", "else the pauses do not grow"),
)


def read_deadlines(settings: Mapping[str, Any]) -> Deadlines:
    """The deadlines that *settings* say, by name; others have their defaults.

    Raises: ValueError: one line: which, what it is, what is allowed.
    """
    for name, value in settings.items():
        row = ROWS[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not row.least_s <= value <= row.most_s:
            raise ValueError(f"{name}: {value!r}, allowed are numbers from {row.least_s:g} to {row.most_s:g} (seconds)")
    deadlines = Deadlines(**{name: float(value) for name, value in settings.items()})
    for each in ORDER:
        if not each.holds(deadlines):
            shorter, longer = float(getattr(deadlines, each.shorter)), float(getattr(deadlines, each.longer))
            needed = f"{each.times} * {each.shorter}" if each.times > 1 else each.shorter
            raise ValueError(
                f"{each.shorter} is {shorter:g} and {each.longer} is {longer:g}: needed is {needed} < {each.longer},"
                f" {each.why}"
            )
    return deadlines
