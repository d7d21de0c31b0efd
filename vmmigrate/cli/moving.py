"""One migration, seen from the command line: ask both hosts, start it, watch until the truth is known.

The truth is the *source's*: its journal says whether the guest was given away. So the source's record is watched, and
a destination that fails first only leads to a question to the source. A migration that nobody came for is cancelled
there, so that nothing is left that could still start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote

import trio

from vmmigrate.api.client import HostClient
from vmmigrate.errors import HandoffInDoubt, RequestError, TransportError, VmMigrateError

Record = dict[str, Any]
OnProgress = Callable[[Mapping[str, Any]], None]

POLL_S: Final = 0.1
# How long a source may be away (its daemon restarts) or in doubt before we say that the outcome is unknown.
PATIENCE_S: Final = 30.0
HASH_PATIENCE_S: Final = 10.0
_GIVEN_AWAY: Final = frozenset({"in_doubt", "verdict_given"})


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to move, and how. `options` are those of `migrate-out` (docs/api.md)."""

    instance_id: str
    replacements: str = "{}"
    keep: Sequence[str] = ()
    allow_same_generation: bool = False
    allow_volume_change: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


class Move:
    """A migration that was started.

    Attributes:
        migration_id: Its id on both hosts.
        note: Something that the one who watches should be told, if anything.
    """

    def __init__(self, source: HostClient, destination: HostClient, migration_id: str) -> None:
        self.migration_id = migration_id
        self.note = ""
        self._source = source
        self._destination = destination
        self._path = f"/v1/migrations/{migration_id}"
        self._refusal: VmMigrateError | None = None

    async def wait_outcome(self, on_progress: OnProgress) -> Record:
        """The source's record with its outcome, and what the destination adds to it.

        Raises: HandoffInDoubt: the source cannot be asked.
        """
        doubtful_since: float | None = None
        while True:
            record = await self._ask_source()
            on_progress(record)
            outcome = record["outcome"]
            if outcome == "unknown":
                doubtful_since = doubtful_since or time.monotonic()
            if outcome not in {None, "unknown"} or _is_long_ago(doubtful_since):
                return await self._completed(record)
            if record["state"] == "awaiting_peer":
                await self._notice_destination()
            await trio.sleep(POLL_S)

    async def cancel(self, reason: str) -> None:
        """Ask the source to stop. The outcome tells whether it could."""
        try:
            await self._source.post(f"{self._path}:cancel", {"reason": reason})
        except VmMigrateError as error:
            too_late = error.code in _GIVEN_AWAY
            self.note = "too late to cancel: the guest was given away" if too_late else f"cancel: {error.text}"

    async def refuse(self, error: VmMigrateError) -> None:
        """The destination will not come: end it at the source, where nothing was touched."""
        self._refusal = error
        await self.cancel(f"the destination refused: {error.text}"[:1000])

    async def _ask_source(self) -> Record:
        begun = time.monotonic()
        while True:
            try:
                record: Record = await self._source.get(self._path)
                return record
            except TransportError as error:
                if _is_long_ago(begun):
                    raise HandoffInDoubt(
                        f"the source cannot be asked what became of migration {self.migration_id}: {error.text}",
                        code="source_unreachable",
                        details={"migration_id": self.migration_id},
                    ) from error
            except RequestError as error:
                if error.code != "unknown_migration":
                    raise
                raise HandoffInDoubt(
                    f"the source was restarted and kept no record of migration {self.migration_id};"
                    " `vmmigrate vm show` at the source says who owns the guest",
                    code="record_lost",
                    details={"migration_id": self.migration_id},
                ) from error
            await trio.sleep(POLL_S)

    async def _notice_destination(self) -> None:
        """A destination that failed before it reached the source: nobody else would tell the source."""
        if self._refusal is not None:
            return
        record = await self._ask_destination()
        error = record.get("error")
        if record.get("outcome") not in {None, "moved"} and error:
            await self.refuse(VmMigrateError(error["message"], code=error["code"], details=error["details"]))

    async def _hashed_again(self, record: Record) -> Record:
        """The guest has moved; the source still hashes its RAM once more. An alarm is worth a short wait."""
        begun = time.monotonic()
        while record.get("integrity", {}).get("rehash") == "pending" and time.monotonic() - begun < HASH_PATIENCE_S:
            await trio.sleep(POLL_S)
            record = await self._ask_source()
        return record

    async def _ask_destination(self) -> Record:
        try:
            record: Record = await self._destination.get(self._path)
        except VmMigrateError:
            return {}
        return record

    async def _completed(self, record: Record) -> Record:
        record = await self._hashed_again(record)
        theirs = await self._ask_destination()
        merged = dict(record)
        merged["digest"] = {**theirs.get("digest", {}), **record["digest"]}
        merged["notes"] = list(dict.fromkeys([*record["notes"], *theirs.get("notes", [])]))
        if theirs.get("downtime_parts_s"):
            merged["destination_parts_s"] = theirs["downtime_parts_s"]
        if self._refusal is not None and record["outcome"] == "cancelled":
            merged["outcome"], merged["error"] = "refused", self._refusal.as_dict()
        return merged


async def start_move(source: HostClient, destination: HostClient, order: Order) -> Move:
    """Ask both hosts who they are, get a ticket from the source, and send the destination to fetch the guest.

    Raises: VmMigrateError: what the source or the destination says; nothing is under way then, unless it is a
        TransportError of the destination: then the source was asked to cancel.
    """
    source_facts, destination_facts = await source.get("/v1/host"), await destination.get("/v1/host")
    body = {"destination_host": destination_facts["host"], **order.options}
    ticket = await source.post(f"/v1/instances/{quote(order.instance_id, safe='')}:migrate-out", body)
    move = Move(source, destination, ticket["migration_id"])
    request = {
        "migration_id": ticket["migration_id"],
        "instance_id": order.instance_id,
        "source_host": source_facts["host"],
        "source_address": ticket["source_address"],
        "source_url": ticket["source_url"],
        "ticket": ticket["ticket"],
        "replacements": order.replacements,
        "keep": list(order.keep),
        "allow_same_generation": order.allow_same_generation,
        "allow_volume_change": order.allow_volume_change,
    }
    try:
        await destination.post("/v1/migrations:migrate-in", request)
    except VmMigrateError as error:
        await move.refuse(error)
        if isinstance(error, TransportError):
            return move  # it may have heard us all the same; the source's record will tell
        raise
    except trio.Cancelled:
        with trio.move_on_after(5, shield=True):
            await move.cancel("interrupted")
        raise
    return move


def _is_long_ago(moment: float | None) -> bool:
    return moment is not None and time.monotonic() - moment > PATIENCE_S
