"""The one hierarchy of errors.

Errors group by what the *caller* can do about them:

    VmMigrateError
    +-- UsageError                the command line, a configuration file, a request body
    +-- RequestError              the request is well formed, but not possible now (unknown, conflict)
    +-- ProtocolError             the migration protocol was broken
    |   +-- LocalProtocolError        ... by us: a defect
    |   +-- RemoteProtocolError       ... by the peer
    +-- NegotiationError          both sides speak well, and have nothing in common
    +-- SpecError                 an instance spec
    |   +-- SpecParseError            is not a document of that version
    |   +-- SpecBuildError            does not describe one machine
    |   +-- SpecCreatableError        describes a machine that no host could create
    |   +-- LossyDowngradeError       cannot be said in the older version
    |   +-- SpecAmendError            cannot take these replacements
    +-- PayloadError              a device payload cannot be exported or imported
    +-- HypervisorError           the guest or its process
    +-- IdentityError             a certificate, a role, a ticket
    +-- TransportError            the link: cut, timed out, refused
    +-- JournalError              the ownership journal; nothing may be acted upon
    +-- StorageError              a file beside the journal; what was asked for was not done
    +-- ConvergenceError          the guest writes faster than it can be moved, or the time is up
    +-- PeerError                 the other daemon reported its own error; `code` is its code
    +-- MigrationCancelled        somebody asked for it
    +-- HandoffInDoubt            the guest was given away and no answer came

Every class has a stable `code`, words joined by underscores; an instance may carry a finer one. Codes, not texts,
cross the wire, the API and the command line, and are the same on both sides of a migration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class VmMigrateError(Exception):
    """Something that vmmigrate can name.

    Attributes:
        code: Stable identifier, the same on source, destination, API and command line.
        text: One line: what, where, and what is allowed. Names that a peer chose may stand in it, so what could end the
            line, or command a terminal, is escaped.
        details: JSON values for programs; never page contents, keys, tickets or blobs.
    """

    default_code: ClassVar[str] = "internal"

    def __init__(self, text: str, *, code: str | None = None, details: Mapping[str, Any] | None = None) -> None:
        text = _one_line(text)
        super().__init__(text)
        self.code = code or self.default_code
        self.text = text
        self.details: dict[str, Any] = dict(details or {})

    def __str__(self) -> str:
        return self.text

    def as_dict(self) -> dict[str, Any]:
        """The error as it stands in API replies, migration records and refusals."""
        return {"code": self.code, "message": self.text, "details": self.details}


def _one_line(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class UsageError(VmMigrateError):
    default_code = "usage"


class RequestError(VmMigrateError):
    default_code = "conflict"


class ProtocolError(VmMigrateError):
    default_code = "protocol"


class LocalProtocolError(ProtocolError):
    default_code = "protocol_local"


class RemoteProtocolError(ProtocolError):
    default_code = "protocol_remote"


class NegotiationError(VmMigrateError):
    default_code = "negotiation_failed"


class SpecError(VmMigrateError):
    default_code = "spec_invalid"


class SpecParseError(SpecError):
    default_code = "spec_parse"


class SpecBuildError(SpecError):
    default_code = "spec_build"


class SpecCreatableError(SpecError):
    default_code = "spec_not_creatable"


class LossyDowngradeError(SpecError):
    default_code = "lossy_downgrade"


class SpecAmendError(SpecError):
    default_code = "spec_amend"


class PayloadError(VmMigrateError):
    default_code = "device_payload"


class HypervisorError(VmMigrateError):
    default_code = "hypervisor"


class IdentityError(VmMigrateError):
    default_code = "identity"


class TransportError(VmMigrateError):
    default_code = "transport"


class JournalError(VmMigrateError):
    default_code = "journal"


class ConvergenceError(VmMigrateError):
    default_code = "will_not_converge"


class StorageError(VmMigrateError):
    default_code = "storage"


class PeerError(VmMigrateError):
    default_code = "peer"


class MigrationCancelled(VmMigrateError):  # noqa: N818  (an outcome that somebody wanted, not a fault)
    default_code = "cancelled"


class HandoffInDoubt(VmMigrateError):  # noqa: N818  (a state of knowledge, not a fault)
    default_code = "in_doubt"
