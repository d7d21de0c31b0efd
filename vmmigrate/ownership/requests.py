"""Which request an instance may be given, by what it is to this host: the one table that `rules` asks.

Every request has one outcome in every standing: it is done, or refused with a code and nothing was touched. None is
queued until a migration is over: by then the guest may be somewhere else. docs/api.md shows the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from vmmigrate.ownership.state import Holding, InstanceState, Outgoing, Ownership


class Request(StrEnum):
    """What may be asked of an instance on one host."""

    START = "start"
    STOP = "stop"
    REBOOT = "reboot"
    PAUSE = "pause"
    TYPE = "type"
    DELETE = "delete"
    MIGRATE_OUT = "migrate-out"
    MIGRATE_IN = "migrate-in"


class Standing(StrEnum):
    """What an instance is to this host, as far as requests are concerned."""

    FREE = "free"  # ours, and no migration
    AWAITING_PEER = "awaiting_peer"  # a ticket is out, nobody has come
    COPYING = "copying"  # the guest runs here, its RAM is being sent
    PAUSED = "paused"  # for the handoff
    IN_DOUBT = "in_doubt"  # given away, no evidence yet
    ARRIVING = "arriving"  # another host's still
    TAKING_OVER = "taking_over"  # ours, not started yet
    ELSEWHERE = "elsewhere"
    LOST = "lost"
    SUPERSEDED = "superseded"  # an operator gave it to another host
    UNKNOWN = "unknown"


DONE: Final = ""  # what stands in the table where a request is not refused

_OTHERS: Final = frozenset(Request) - {Request.MIGRATE_IN}


def _all(code: str, **others: str) -> Mapping[Request, str]:
    """*code* for every request on an instance of this host, but for those named."""
    named = {Request(name.replace("_", "-")): other for name, other in others.items()}
    return {**dict.fromkeys(_OTHERS, code), **named}


REFUSALS: Final[Mapping[Standing, Mapping[Request, str]]] = {
    Standing.FREE: _all(DONE, migrate_in="instance_exists"),
    # A newer ticket takes the place of one that nobody used.
    Standing.AWAITING_PEER: _all("migrating", type=DONE, migrate_out=DONE, migrate_in="instance_exists"),
    Standing.COPYING: _all("migrating", type=DONE, migrate_out="already_migrating", migrate_in="instance_exists"),
    # A key typed now would come after the serial port was saved, and be lost.
    Standing.PAUSED: _all("migrating", migrate_out="already_migrating", migrate_in="instance_exists"),
    Standing.IN_DOUBT: _all("in_doubt", migrate_in="in_doubt"),
    Standing.ARRIVING: _all("arriving", migrate_in="already_migrating"),
    Standing.TAKING_OVER: _all("arriving", migrate_in="instance_exists"),
    Standing.ELSEWHERE: _all("not_owner", migrate_in=DONE),
    Standing.LOST: _all("not_owner", delete=DONE, migrate_in=DONE),
    Standing.SUPERSEDED: _all("superseded", migrate_in="instance_exists"),
    Standing.UNKNOWN: _all("unknown_instance", migrate_in=DONE),
}

_OF_HOLDING: Final[Mapping[Holding, Standing]] = {
    Holding.RELEASED: Standing.IN_DOUBT,
    Holding.ACQUIRED: Standing.TAKING_OVER,
    Holding.ELSEWHERE: Standing.ELSEWHERE,
    Holding.LOST: Standing.LOST,
    Holding.REMOVED: Standing.UNKNOWN,
}
_OF_STAGE: Final[Mapping[Outgoing, Standing]] = {
    Outgoing.AWAITING_PEER: Standing.AWAITING_PEER,
    Outgoing.ACTIVE: Standing.COPYING,
    Outgoing.PAUSING: Standing.PAUSED,
}


def standing(state: Ownership, instance: str) -> Standing:
    """What *instance* is to the host of this journal."""
    known = state.instances.get(instance)
    if known is not None and known.holding is Holding.HELD:
        return _of_held(state, known)
    found = Standing.UNKNOWN if known is None else _OF_HOLDING[known.holding]
    away = found in {Standing.ELSEWHERE, Standing.LOST, Standing.UNKNOWN}
    return Standing.ARRIVING if away and state.open_incoming(instance) is not None else found


def _of_held(state: Ownership, known: InstanceState) -> Standing:
    if state.is_superseded(known.instance, known.epoch):
        return Standing.SUPERSEDED
    migration = state.open_outgoing(known.instance)
    return Standing.FREE if migration is None else _OF_STAGE[state.outgoing[migration].stage]


def refusal(state: Ownership, instance: str, request: Request) -> tuple[str, str]:
    """The code with which *request* is refused, and why, in words; two empty texts when it is not."""
    found = standing(state, instance)
    code = REFUSALS[found][request]
    return code, "" if code == DONE else f"instance {instance} {_words(state, instance, code)}"


def _words(state: Ownership, instance: str, code: str) -> str:
    known, out = state.instances.get(instance), state.open_outgoing(instance)
    last = known.last_migration if known else None
    words: Mapping[str, str] = {
        "migrating": f"is migrating as {out}: cancel that first",
        "already_migrating": f"is migrating as {out or state.open_incoming(instance)} already",
        "in_doubt": f"was given away by migration {last}, which is in doubt: wait until it is settled",
        "arriving": f"is arriving as {state.open_incoming(instance)}: ask again when it is here",
        "not_owner": f"is {known.holding if known else 'unknown'} on this host"
        + (f" since migration {last}" if last else ""),
        "superseded": "was given to another host by an operator",
        "instance_exists": "is owned by this very host",
        "unknown_instance": "is not known on this host",
    }
    return words[code]
