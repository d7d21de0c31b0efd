"""RAM that was given away, at the source: hashed once more, in the background, before it is freed.

Both ends compare what was sent with what landed. A page that dirty tracking missed was sent and landed alike, and is
old at both: only the source, whose memory stands still since the pause, can still tell. The guest runs elsewhere by
then, so all that is left is to raise an alarm; without it nobody would ever know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import structlog
import trio

from vmmigrate.engine.metrics import MigrationRecord
from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.base import GuestRam
from vmmigrate.memory import PAGE_SIZE, PageBitmap, split_runs
from vmmigrate.ram.digest import Digests, PageHash

log = structlog.get_logger(__name__)

_CHUNK_PAGES: Final = 1 << 15  # 128 MiB for one way into a thread and back


@dataclass
class Frozen:
    """The RAM of a guest that has moved, and the digest of each page as it was sent last.

    Attributes:
        ram: Set once the guest was given away; closed by `check`.
    """

    page_hash: PageHash
    table: Digests
    ram: GuestRam | None = None

    async def check(self) -> Integrity:
        """Hash all of it, and let go of it.

        Raises: HypervisorError: it cannot be read.
        """
        assert self.ram is not None
        try:
            different: list[int] = []
            checked = 0
            populated = await trio.to_thread.run_sync(self.ram.populated)
            # A page with a digest that is a hole now was something else when it was sent.
            looked_at = populated | PageBitmap.from_flags(self.table != 0)
            for first, count in split_runs(looked_at.runs(), _CHUNK_PAGES).tolist():
                different += await trio.to_thread.run_sync(self._differing, populated, first, count)
                checked += count
            return Integrity(checked, tuple(different), self.ram.layout.gpa_of(different[0]) if different else None)
        finally:
            # It may be the last that holds the guest's memory: to free that takes the kernel 0.15 s for a GiB.
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self.ram.close)

    def _differing(self, populated: PageBitmap, first: int, count: int) -> list[int]:
        """Which of *count* pages from *first* are not as they were sent. Blocking; holes are not touched."""
        assert self.ram is not None
        digests = np.zeros(count, dtype=np.uint64)
        there = np.flatnonzero(populated.flags()[first : first + count])
        digests[there] = self.page_hash.of(self.ram.pages, first + there)
        wrong = np.flatnonzero(digests != self.table[first : first + count])
        return [first + int(page) for page in wrong]


@dataclass(frozen=True)
class Integrity:
    """What hashing once more has found. `first_gpa`: of the first page that differs."""

    pages_checked: int
    different_pages: tuple[int, ...]
    first_gpa: int | None

    @property
    def is_sound(self) -> bool:
        return not self.different_pages

    def as_dict(self) -> dict[str, Any]:
        return {
            "rehash": "equal" if self.is_sound else "different",
            "pages_checked": self.pages_checked,
            "different_pages": len(self.different_pages),
            "first_gpa": self.first_gpa,
        }

    def alarm(self) -> str:
        """One line for whoever has to look at the guest now."""
        assert self.first_gpa is not None
        return (
            f"ALARM: {len(self.different_pages)} pages ({len(self.different_pages) * PAGE_SIZE} bytes, the first at"
            f" {self.first_gpa:#x}) changed at the source without a mark: the guest runs with old copies of them"
        )


PENDING: Final[dict[str, Any]] = {"rehash": "pending"}


def not_hashed(reason: str) -> dict[str, Any]:
    """Nobody knows; no alarm."""
    return {"rehash": "not_done", "reason": reason}


async def note_integrity(record: MigrationRecord, frozen: Frozen) -> None:
    """Hash once more, and tell the record what was found; an alarm is a note of it as well, and an error in the log."""
    try:
        found = await frozen.check()
    except HypervisorError as error:
        record.integrity = not_hashed(error.text)
        log.warning("migration.not_hashed_again", migration=record.migration_id, text=error.text)
        return
    record.integrity = found.as_dict()
    if found.is_sound:
        log.info("migration.hashed_again", migration=record.migration_id, pages=found.pages_checked)
    else:
        record.notes.append(found.alarm())
        log.error("migration.integrity_alarm", migration=record.migration_id, text=found.alarm())
