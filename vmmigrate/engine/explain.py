"""What was offered, chosen, passed over, skipped and refused, and why: for a migration's record, on both sides.

A reader who asks "why did it cross as v2?" or "why was it refused?" finds the answer here without a log. Nothing is
decided by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from vmmigrate.engine.metrics import MigrationRecord
from vmmigrate.errors import LossyDowngradeError, VmMigrateError
from vmmigrate.spec import chain
from vmmigrate.wire import messages as m
from vmmigrate.wire.negotiate import Abilities, Need

_NOT_READ = "the destination does not read it"
_NOT_WRITTEN = "the source does not write it"


def note_offer(record: MigrationRecord, offer: m.Offer) -> None:
    """What the destination said it can do; without its ticket and secrets."""
    record.negotiation["offered"] = {
        "protocols": list(offer.protocols),
        "spec_versions": list(offer.spec_versions),
        "payloads": {kind: list(versions) for kind, versions in offer.payloads.items()},
        "ram": {topic: list(words) for topic, words in offer.ram.items()},
        "max_streams": offer.max_streams,
        "facts": dict(offer.facts),
    }


def note_needs(record: MigrationRecord, abilities: Abilities, needs: Iterable[Need]) -> None:
    """What the source can do and the guest needs; known to the source alone."""
    record.negotiation["needed"] = {
        "protocols": list(abilities.protocols),
        "spec_versions": list(abilities.spec_versions),
        "payloads": [
            {"device": need.device, "kind": need.kind, "versions": list(need.versions), "optional": need.optional}
            for need in needs
        ],
    }


def note_choice(record: MigrationRecord, select: m.Select) -> None:
    record.negotiation["chosen"] = {
        "protocol": select.protocol,
        "spec_version": select.spec_version,
        "payloads": dict(select.payloads),
        "transport": select.transport,
        "encodings": list(select.encodings),
        "digest": select.digest,
        "streams": select.streams,
    }


def note_skipped(record: MigrationRecord, skipped: Iterable[tuple[str, str]], why: str) -> None:
    """Optional payloads, as (device, kind), that stay behind; each once."""
    listed: list[dict[str, str]] = record.negotiation["skipped"]
    known = {(item["device"], item["kind"]) for item in listed}
    listed += [{"device": device, "kind": kind, "why": why} for device, kind in skipped if (device, kind) not in known]


def note_refusal(record: MigrationRecord, error: VmMigrateError) -> None:
    """Why nothing moved: the same code and reasons on both sides."""
    record.negotiation["refused"] = error.as_dict()


def note_passed_over(
    record: MigrationRecord,
    offer: m.Offer,
    select: m.Select,
    abilities: Abilities,
    needs: Sequence[Need],
    spec: chain.AnySpec,
) -> None:
    """Everything newer than what was chosen, and why it was not."""
    record.negotiation["passed_over"] = [
        {"what": what, "why": why}
        for what, why in [
            *_versions("protocol", select.protocol, abilities.protocols, offer.protocols),
            *_spec_versions(select.spec_version, abilities.spec_versions, offer.spec_versions, spec),
            *_payloads(select, offer, needs),
            *_transports(select, abilities, offer),
            *_encodings(select, abilities, offer),
        ]
    ]


def _versions(topic: str, chosen: int, ours: Iterable[int], theirs: Iterable[int]) -> Iterator[tuple[str, str]]:
    written, read = set(ours), set(theirs)
    for version in sorted(written | read, reverse=True):
        if version > chosen:
            yield f"{topic} {version}", _NOT_WRITTEN if version in read else _NOT_READ


def _spec_versions(
    chosen: str, ours: Sequence[str], theirs: Sequence[str], spec: chain.AnySpec
) -> Iterator[tuple[str, str]]:
    known = chain.CHAIN.names
    yield from ((f"spec version {name}", _NOT_WRITTEN) for name in theirs if name not in known)
    for name in reversed(known[known.index(chosen) + 1 :]):
        yield f"spec version {name}", why_not(spec, name, ours, theirs)


def why_not(spec: chain.AnySpec, name: str, ours: Sequence[str], theirs: Sequence[str]) -> str:
    """Why *spec* does not cross in version *name*; empty when it can."""
    if name not in theirs:
        return _NOT_READ
    if name not in ours:
        return _NOT_WRITTEN
    try:
        chain.convert(spec, name)
    except LossyDowngradeError as error:
        return error.text
    return ""


def _payloads(select: m.Select, offer: m.Offer, needs: Sequence[Need]) -> Iterator[tuple[str, str]]:
    for kind, chosen in select.payloads.items():
        read = offer.payloads.get(kind, ())
        written = {version for need in needs if need.kind == kind for version in need.versions}
        for version in sorted({*read, *written}, reverse=True):
            if version <= chosen:
                continue
            if version not in read:
                yield f"payload {kind} version {version}", _NOT_READ
                continue
            silent = [need.device for need in needs if need.kind == kind and version not in need.versions]
            yield f"payload {kind} version {version}", f"{_NOT_WRITTEN} for {', '.join(silent)}"


def _transports(select: m.Select, abilities: Abilities, offer: m.Offer) -> Iterator[tuple[str, str]]:
    """What one side wants more than what was chosen, and the other does not know: no fall-back is silent."""
    ours, theirs = abilities.transports, offer.ram.get("transports", ())
    wanted = (*theirs[: theirs.index(select.transport)], *ours[: ours.index(select.transport)])
    for word in dict.fromkeys(wanted):
        if not (word in ours and word in theirs):
            yield f"transport {word}", _NOT_READ if word in ours else _NOT_WRITTEN


def _encodings(select: m.Select, abilities: Abilities, offer: m.Offer) -> Iterator[tuple[str, str]]:
    for word in dict.fromkeys((*offer.ram.get("encodings", ()), *abilities.encodings)):
        if word not in select.encodings:
            yield f"encoding {word}", _NOT_READ if word in abilities.encodings else _NOT_WRITTEN
