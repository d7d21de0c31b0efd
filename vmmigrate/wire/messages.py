"""The messages of the control channel, as frozen dataclasses. What they look like as bytes is codec.py's.

Adding a message

1. Give it the next free tag in `Kind` (phases.py); never re-use one.
2. Add its row(s) to `TRANSITIONS`: in which phase, by whom, and what follows.
3. Add the dataclass here, to the union `Message`, and its field table and cap to `CODEC` (codec.py).
4. `make compat-fixtures` writes its golden frame; released frames never change.
5. Raise `PROTOCOL_VERSIONS` (negotiate.py) when a released peer would refuse it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vmmigrate.wire.phases import Kind

# The line to copy: class Example(_Message): kind = Kind.EXAMPLE; number: int


@dataclass(frozen=True, slots=True)
class Offer:
    """What the destination can do. Speaks first, so that the source can choose.

    Attributes:
        protocols: Protocol versions, any order.
        ticket: One-time secret that the source issued for this migration.
        spec_versions: Instance-spec versions that the destination reads.
        payloads: Device payload kind to the versions that it reads.
        ram: Lists of words by topic (`transports`, `encodings`, `digests`), best first, and `max_streams`.
        facts: Hypervisor kind, version and the like; matched for opaque payloads.
        api_url: Where the source asks `side:settle` when in doubt.
        random: 32 bytes; half of the secrets of this session.
    """

    kind: ClassVar[Kind] = Kind.OFFER
    protocols: tuple[int, ...]
    migration_id: str
    instance_id: str
    ticket: str
    spec_versions: tuple[str, ...]
    payloads: Mapping[str, tuple[int, ...]]
    ram: Mapping[str, tuple[str, ...]]
    max_streams: int
    facts: Mapping[str, str]
    api_url: str
    random: bytes


@dataclass(frozen=True, slots=True)
class Select:
    """What the source chose from the offer. `offer_digest` (SHA-256 of the offer as received) proves that
    both saw the same offer; `session_number` grows by one with each control connection of a migration."""

    kind: ClassVar[Kind] = Kind.SELECT
    protocol: int
    spec_version: str
    payloads: Mapping[str, int]
    transport: str
    encodings: tuple[str, ...]
    digest: str
    streams: int
    bulk_port: int
    session_number: int
    verify: str
    offer_digest: bytes
    random: bytes


@dataclass(frozen=True, slots=True)
class Refuse:
    """No, and nothing was touched: the code, and every reason at once."""

    kind: ClassVar[Kind] = Kind.REFUSE
    code: str
    text: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DeviceEntry:
    """One payload that the source will send, announced before RAM moves."""

    instance_name: str
    payload_kind: str
    version: int
    optional: bool


@dataclass(frozen=True, slots=True)
class Preamble:
    """What the guest is.

    Attributes:
        spec: The document in `spec_version`, UTF-8 JSON text.
        blobs: Named byte strings, carried unread and compared by digest.
        properties: Name and description of the instance; not compared.
        run_state: What the guest shall do after the move: `running` or `paused`.
        epoch: (term, n) under which the source holds the guest.
        regions: (gpa, bytes), ascending.
        populated: (gpa, pages) extents that were ever touched; a hint for populating, not a promise.
        facts: What the guest is to its hypervisor; matched for opaque payloads.
    """

    kind: ClassVar[Kind] = Kind.PREAMBLE
    spec_version: str
    spec: bytes
    blobs: Mapping[str, bytes]
    properties: Mapping[str, str]
    run_state: str
    epoch: tuple[int, int]
    regions: tuple[tuple[int, int], ...]
    populated: tuple[tuple[int, int], ...]
    devices: tuple[DeviceEntry, ...]
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PreambleOk:
    """The guest is built, stopped. `amended` names the replaced components; `blob_digests` proves the blobs."""

    kind: ClassVar[Kind] = Kind.PREAMBLE_OK
    select_digest: bytes
    blob_digests: Mapping[str, bytes]
    amended: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RoundEnd:
    """A barrier: all records of `round_number` were sent, so many per stream since the streams opened."""

    kind: ClassVar[Kind] = Kind.ROUND_END
    round_number: int
    records: tuple[int, ...]
    pages: int
    dirty_pages: int


@dataclass(frozen=True, slots=True)
class RoundApplied:
    """The destination holds everything up to the barrier of `round_number`."""

    kind: ClassVar[Kind] = Kind.ROUND_APPLIED
    round_number: int
    bytes_received: int


@dataclass(frozen=True, slots=True)
class Paused:
    """The guest is paused for handoff; the next round is the last."""

    kind: ClassVar[Kind] = Kind.PAUSED
    round_number: int


@dataclass(frozen=True, slots=True)
class TimeDataMessage:
    """Guest and host clocks at the source, as devices/time.py encodes them."""

    kind: ClassVar[Kind] = Kind.TIME_DATA
    values: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class PayloadItem:
    """One device payload on the wire."""

    instance_name: str
    payload_kind: str
    version: int
    optional: bool
    body: bytes


@dataclass(frozen=True, slots=True)
class DeviceState:
    """Device payloads; as many messages as they need."""

    kind: ClassVar[Kind] = Kind.DEVICE_STATE
    payloads: tuple[PayloadItem, ...]


@dataclass(frozen=True, slots=True)
class ConsoleHistoryMessage:
    """Console output of one serial port: the first MiB, the latest MiB, and how many bytes there were."""

    kind: ClassVar[Kind] = Kind.CONSOLE_HISTORY
    port: str
    beginning: bytes
    rolling: bytes
    total_bytes: int


@dataclass(frozen=True, slots=True)
class StateEnd:
    """Everything was sent. `page_digest` condenses the source's table of page digests (holes count as zero)."""

    kind: ClassVar[Kind] = Kind.STATE_END
    page_digest: bytes
    payloads: int


@dataclass(frozen=True, slots=True)
class Ready:
    """Everything is imported, digests agree, `prepared` is durable in the journal named `journal_id`.

    `ram_digest` is the SHA-256 of the whole final RAM when the selection says `verify = full`, else empty.
    """

    kind: ClassVar[Kind] = Kind.READY
    journal_id: str
    page_digest: bytes
    ram_digest: bytes


@dataclass(frozen=True, slots=True)
class Handoff:
    """The guest is yours. `epoch` is the source's; the destination acquires n + 1."""

    kind: ClassVar[Kind] = Kind.HANDOFF
    run_state: str
    epoch: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Running:
    """`started` is durable and the guest runs (or is paused on purpose) at the destination."""

    kind: ClassVar[Kind] = Kind.RUNNING
    journal_id: str
    epoch: tuple[int, int]
    import_s: float
    resume_s: float


@dataclass(frozen=True, slots=True)
class Refused:
    """`refused` is durable: this destination will never run the guest for this migration."""

    kind: ClassVar[Kind] = Kind.REFUSED
    journal_id: str
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Returned:
    """`returned` is durable: acquired, closed again, never started."""

    kind: ClassVar[Kind] = Kind.RETURNED
    journal_id: str
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Progress:
    """Counters for people: never decided upon."""

    kind: ClassVar[Kind] = Kind.PROGRESS
    counters: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The speaker lives."""

    kind: ClassVar[Kind] = Kind.HEARTBEAT


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop, somebody asked for it."""

    kind: ClassVar[Kind] = Kind.CANCEL
    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The speaker gave up; the same code stands in both sides' records."""

    kind: ClassVar[Kind] = Kind.FAILED
    code: str
    text: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Resume:
    """In the place of Offer: the link of a migration was cut while the guest ran, and this goes on with it.

    Attributes:
        session_number: Of the session that was cut.
        random: 32 bytes; half of the secrets of the new session.
        proof: HMAC over `random` by a key of the session that was cut: only its two ends have it.
    """

    kind: ClassVar[Kind] = Kind.RESUME
    migration_id: str
    session_number: int
    random: bytes
    proof: bytes


@dataclass(frozen=True, slots=True)
class Resumed:
    """The source goes on, too, in a session with a number of its own; proves itself as the destination did."""

    kind: ClassVar[Kind] = Kind.RESUMED
    session_number: int
    bulk_port: int
    random: bytes
    proof: bytes


@dataclass(frozen=True, slots=True)
class Applied:
    """What the destination holds of the round that was cut: all of rounds up to `round_number`, and these pages since.

    Shape: one bit per page, the lowest page in bit 0 of byte 0; deflated (zlib).
    """

    kind: ClassVar[Kind] = Kind.APPLIED
    round_number: int
    pages: bytes


Message = (
    Offer
    | Resume
    | Resumed
    | Applied
    | Select
    | Refuse
    | Preamble
    | PreambleOk
    | RoundEnd
    | RoundApplied
    | Paused
    | TimeDataMessage
    | DeviceState
    | ConsoleHistoryMessage
    | StateEnd
    | Ready
    | Handoff
    | Running
    | Refused
    | Returned
    | Progress
    | Heartbeat
    | Cancel
    | Failed
)
