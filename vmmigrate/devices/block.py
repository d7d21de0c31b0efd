"""Block devices and backends that have state of their own: NVMe, disks in memory, the failure injector.

Source: propolis.md 5.2 (in Propolis inconsistent NVMe queues hit assertions; here they are errors before the import).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from vmmigrate.devices.fields import U16, U32, U64, Flag, ListOf, Octets, Struct
from vmmigrate.devices.payload import MAX_PAYLOAD_BYTES

MAX_NVME_QUEUES = 64
LARGEST_NVME_QUEUE = 1 << 16
_ENABLED = 1

BlobContents = Annotated[bytes, Octets(0, MAX_PAYLOAD_BYTES - 64)]


@dataclass(frozen=True, slots=True)
class NvmeCompletionQueue:
    id: U16
    size: U32
    head: U16
    tail: U16
    avail: U16
    phase: Flag
    base: U64
    iv: U16


@dataclass(frozen=True, slots=True)
class NvmeSubmissionQueue:
    id: U16
    size: U32
    head: U16
    tail: U16
    base: U64
    cq_id: U16


@dataclass(frozen=True, slots=True)
class NvmeCtrlV1:
    cap: U64
    cc: U32
    csts: U32
    aqa: U32
    acq_base: U64
    asq_base: U64
    dbbuf_shadow: U64
    dbbuf_evtidx: U64
    cqs: Annotated[tuple[NvmeCompletionQueue, ...], ListOf(Struct(NvmeCompletionQueue), 0, MAX_NVME_QUEUES)]
    sqs: Annotated[tuple[NvmeSubmissionQueue, ...], ListOf(Struct(NvmeSubmissionQueue), 0, MAX_NVME_QUEUES)]


def nvme_problems(state: NvmeCtrlV1) -> Iterator[str]:
    """What no controller can have."""
    completion = {queue.id for queue in state.cqs}
    for name, ids in (("cqs", [q.id for q in state.cqs]), ("sqs", [q.id for q in state.sqs])):
        yield from (f"{name}: queue {queue} stands there {n} times" for queue, n in Counter(ids).items() if n > 1)
    queues: list[NvmeCompletionQueue | NvmeSubmissionQueue] = [*state.cqs, *state.sqs]
    for queue in queues:
        if not 2 <= queue.size <= LARGEST_NVME_QUEUE:
            yield f"queue {queue.id}: size {queue.size}, allowed are 2 to {LARGEST_NVME_QUEUE}"
        elif queue.head >= queue.size or queue.tail >= queue.size:
            yield f"queue {queue.id}: head or tail beyond its {queue.size} entries"
    for submission in state.sqs:
        if submission.cq_id not in completion:
            yield f"queue {submission.id}: no completion queue {submission.cq_id}"
    if queues and not state.cc & _ENABLED:
        yield "queues of a controller that is not enabled"


def nvme_differences(new: NvmeCtrlV1, own: NvmeCtrlV1) -> Iterator[str]:
    if new.cap != own.cap:
        yield f"nvme-ctrl cap {new.cap:#x}: this controller has {own.cap:#x}"


@dataclass(frozen=True, slots=True)
class InMemoryBlockBackendV1:
    """A blob disk as it is now, not as the spec made it. The cap leaves room for the map around it."""

    bytes: BlobContents


@dataclass(frozen=True, slots=True)
class MigrationFailureV1:
    """Nothing: the device is there only to fail."""
