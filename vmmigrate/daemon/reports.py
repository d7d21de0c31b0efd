"""Records of migrations: those that are under way, and the newest of those that are over."""

from __future__ import annotations

from typing import Any, Final

import structlog
import trio

from vmmigrate.daemon.documents import DocumentStore
from vmmigrate.engine.metrics import MigrationRecord, Outcome
from vmmigrate.errors import RequestError, StorageError

log = structlog.get_logger(__name__)

RECORDS_KEPT: Final = 1000


class Reports:
    """What is known of migrations. A report is no fact: the journal has those.

    Attributes:
        records: By migration id, of those that are not over.
        past: As JSON-ready maps, of the newest `RECORDS_KEPT` of those that are; the oldest comes first.
    """

    def __init__(self, documents: DocumentStore) -> None:
        self.records: dict[str, MigrationRecord] = {}
        self.past: dict[str, dict[str, Any]] = {}
        self._documents = documents
        self._saving = trio.Lock()

    def describe(self, migration_id: str) -> dict[str, Any]:
        """The record of a migration. Raises: RequestError `unknown_migration`."""
        record = self.records.get(migration_id)
        if record is not None:
            return record.as_dict()
        if migration_id in self.past:
            return self.past[migration_id]
        raise RequestError(f"no migration {migration_id} on this host", code="unknown_migration")

    def list(self) -> list[dict[str, Any]]:
        """All of them, oldest first."""
        shown = {**self.past, **{m: record.as_dict() for m, record in self.records.items()}}
        return sorted(shown.values(), key=lambda record: float(record["created_at_s"]))

    async def save(self, record: MigrationRecord) -> None:
        """Keep the record beyond this daemon."""
        try:
            async with self._saving:  # one after the other: an older state must not be the last that is written
                await trio.to_thread.run_sync(self._documents.save_record, record.migration_id, record.as_dict())
                if record.outcome not in {None, Outcome.UNKNOWN}:
                    await self._retire(record)
        except StorageError as exc:
            log.error("migration.record_not_saved", migration=record.migration_id, text=exc.text)

    async def _retire(self, record: MigrationRecord) -> None:
        """Of one that is over the report is enough; and of those only the newest are kept."""
        self.past[record.migration_id] = record.as_dict()
        self.records.pop(record.migration_id, None)
        while len(self.past) > RECORDS_KEPT:
            oldest = self.past.pop(next(iter(self.past)))
            await trio.to_thread.run_sync(self._documents.remove_record, oldest["migration_id"], oldest["role"])
