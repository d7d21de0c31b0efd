"""What both sides can do: newest common version, first common word. Pure; the spec version is chosen by spec/chain.

Unknown words and versions in an offer are skipped, never fatal: a newer peer may offer more than we know. When a topic
has nothing in common, *all* such topics are reported at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vmmigrate.errors import NegotiationError
from vmmigrate.wire.messages import Offer

PROTOCOL_VERSIONS: tuple[int, ...] = (1,)
TRANSPORTS: tuple[str, ...] = ("sealed", "tls")
ENCODINGS: tuple[str, ...] = ("raw", "zero", "zstd", "delta")
DIGESTS: tuple[str, ...] = ("multilinear-64-tree", "multilinear-64")
MAX_STREAMS = 16


@dataclass(frozen=True, slots=True)
class Abilities:
    """What one host can do, best first; what it offers as a destination, and chooses among as a source.

    Attributes:
        payloads: Device payload kind to the versions that this host reads and writes.
        facts: Of the hypervisor; matched for opaque payloads.
    """

    protocols: tuple[int, ...] = PROTOCOL_VERSIONS
    transports: tuple[str, ...] = TRANSPORTS
    encodings: tuple[str, ...] = ENCODINGS
    digests: tuple[str, ...] = DIGESTS
    max_streams: int = MAX_STREAMS
    spec_versions: tuple[str, ...] = ()
    payloads: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Need:
    """One payload of the guest, and the versions in which its present state can be written."""

    device: str
    kind: str
    versions: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """What will be spoken. `skipped`: optional payloads, as (device, kind), that the destination does not read."""

    protocol: int
    transport: str
    encodings: tuple[str, ...]
    digest: str
    streams: int
    payloads: Mapping[str, int]
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One topic in which the sides have nothing in common; for a payload also whose and which."""

    topic: str
    source: tuple[str, ...]
    destination: tuple[str, ...]
    device: str = ""
    kind: str = ""

    def __str__(self) -> str:
        return f"{self.topic}: source {_words(self.source)}, destination {_words(self.destination)}"


def newest_common(ours: Iterable[int], theirs: Iterable[int]) -> int | None:
    """The highest version that both know, or None."""
    return max(set(ours) & set(theirs), default=None)


def first_common(ours: Iterable[str], theirs: Iterable[str]) -> str | None:
    """Our most wanted word that the peer knows too, or None."""
    known = set(theirs)
    return next((word for word in ours if word in known), None)


def choose(
    offer: Offer,
    source: Abilities,
    wanted_streams: int,
    needs: Sequence[Need] = (),
    found: Iterable[Mismatch] = (),
) -> Choice:
    """What the source selects from *offer*.

    Args:
        found: Mismatches that were found elsewhere, to be told together with those found here.

    Raises:
        NegotiationError: `no_common_ground` when some topic has nothing in common; details list every such topic.
    """
    mismatches: list[Mismatch] = []
    protocol = newest_common(source.protocols, offer.protocols)
    if protocol is None:
        mismatches.append(Mismatch("protocol", _texts(source.protocols), _texts(offer.protocols)))
    transport = _choose_word("transports", source.transports, offer, mismatches)
    digest = _choose_word("digests", source.digests, offer, mismatches)
    known = set(offer.ram.get("encodings", ()))
    encodings = tuple(word for word in source.encodings if word in known)
    if "raw" not in encodings:
        mismatches.append(Mismatch("encodings", source.encodings, offer.ram.get("encodings", ())))
    payloads, skipped = _choose_payloads(needs, offer, mismatches)
    mismatches += found
    if mismatches or protocol is None or transport is None or digest is None:
        raise _refusal(mismatches)
    streams = max(1, min(wanted_streams, offer.max_streams, source.max_streams))
    return Choice(protocol, transport, encodings, digest, streams, payloads, tuple(skipped))


def _choose_word(topic: str, ours: tuple[str, ...], offer: Offer, mismatches: list[Mismatch]) -> str | None:
    theirs = offer.ram.get(topic, ())
    word = first_common(ours, theirs)
    if word is None:
        mismatches.append(Mismatch(topic, ours, theirs))
    return word


def _choose_payloads(
    needs: Sequence[Need], offer: Offer, mismatches: list[Mismatch]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """One version per kind, for all devices that have it; and what is left out because it may be."""
    chosen: dict[str, int] = {}
    skipped: list[tuple[str, str]] = []
    for kind in dict.fromkeys(need.kind for need in needs):
        group = [need for need in needs if need.kind == kind]
        mandatory = [need for need in group if not need.optional]
        readable = offer.payloads.get(kind, ())
        version = _for_all(group, readable) or (_for_all(mandatory, readable) if mandatory else None)
        if version is not None:
            chosen[kind] = version
            skipped += [(need.device, kind) for need in group if version not in need.versions]
        elif mandatory:
            mismatches += _mismatches(mandatory, readable)
        else:
            skipped += [(need.device, kind) for need in group]
    return chosen, skipped


def _for_all(needs: Sequence[Need], readable: Iterable[int]) -> int | None:
    """The newest version that every device can write and the peer reads."""
    return max(set(readable).intersection(*(need.versions for need in needs)), default=None)


def _mismatches(needs: Sequence[Need], readable: tuple[int, ...]) -> list[Mismatch]:
    """The devices that cannot be said; all of them when each could, but not in one version."""
    apart = [need for need in needs if not set(need.versions) & set(readable)] or needs
    return [
        Mismatch(
            f"payload {need.kind} of device {need.device}",
            _texts(need.versions),
            _texts(readable),
            need.device,
            need.kind,
        )
        for need in apart
    ]


def _refusal(mismatches: list[Mismatch]) -> NegotiationError:
    details = [_as_dict(mismatch) for mismatch in mismatches]
    return NegotiationError(
        "nothing in common: " + "; ".join(map(str, mismatches)),
        code="no_common_ground",
        details={"mismatches": details},
    )


def _as_dict(mismatch: Mismatch) -> dict[str, object]:
    told: dict[str, object] = {
        "topic": mismatch.topic,
        "source": list(mismatch.source),
        "destination": list(mismatch.destination),
    }
    return told | ({"device": mismatch.device, "kind": mismatch.kind} if mismatch.kind else {})


def _texts(values: Iterable[object]) -> tuple[str, ...]:
    return tuple(str(value) for value in values)


def _words(values: tuple[str, ...]) -> str:
    return "{" + ", ".join(values) + "}"
