"""Exit codes say what is true now. For `migrate` the source was asked; other commands use the same words."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Final

from vmmigrate.errors import (
    ConvergenceError,
    HandoffInDoubt,
    HypervisorError,
    JournalError,
    MigrationCancelled,
    PeerError,
    StorageError,
    TransportError,
    UsageError,
    VmMigrateError,
)


class Exit(IntEnum):
    OK = 0
    DEFECT = 1  # a bug of ours; nothing is known
    USAGE = 2
    REFUSED = 3  # nothing was touched
    FAILED = 4  # the source is as before
    CANCELLED = 5  # the source is as before
    TIMED_OUT = 6  # the source is as before
    UNKNOWN = 7  # the guest was given away and nobody could say what became of it
    GUEST_LOST = 8


# By `outcome` of a migration record.
_OF_OUTCOME: Final[Mapping[str, Exit]] = {
    "moved": Exit.OK,
    "refused": Exit.REFUSED,
    "failed": Exit.FAILED,
    "cancelled": Exit.CANCELLED,
    "timed_out": Exit.TIMED_OUT,
    "unknown": Exit.UNKNOWN,
    "guest_lost": Exit.GUEST_LOST,
}

_OF_CODE: Final[Mapping[str, Exit]] = {"timed_out": Exit.TIMED_OUT, "guest_lost": Exit.GUEST_LOST}

_OF_ERROR: Final[tuple[tuple[type[VmMigrateError], Exit], ...]] = (
    (UsageError, Exit.USAGE),
    (MigrationCancelled, Exit.CANCELLED),
    (HandoffInDoubt, Exit.UNKNOWN),
    (TransportError, Exit.FAILED),
    (HypervisorError, Exit.FAILED),
    (JournalError, Exit.FAILED),
    (StorageError, Exit.FAILED),
    (ConvergenceError, Exit.FAILED),
    (PeerError, Exit.FAILED),
)


def exit_of_outcome(outcome: str | None) -> Exit:
    """An outcome that is not there yet is not known."""
    return _OF_OUTCOME.get(outcome or "unknown", Exit.UNKNOWN)


def exit_of_error(error: VmMigrateError) -> Exit:
    """Whatever has no line in the tables is a refusal: unknown, forbidden, in conflict, not possible here."""
    named = _OF_CODE.get(error.code)
    return named or next((code for kind, code in _OF_ERROR if isinstance(error, kind)), Exit.REFUSED)
