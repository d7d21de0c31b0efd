"""What both sides can do: newest common version, first common word. Pure; the spec version is chosen by spec/chain.

Unknown words and versions in an offer are skipped, never fatal: a newer peer may offer more than we know. When a topic
has nothing in common, *all* such topics are reported at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vmmigrate.errors import NegotiationError
from vmmigrate.wire.messages import Offer

PROTOCOL_VERSIONS: tuple[int, ...] = (1,)
TRANSPORTS: tuple[str, ...] = ("tls",)
ENCODINGS: tuple[str, ...] = ("raw", "zero")
DIGESTS: tuple[str, ...] = ("multilinear-64",)
MAX_STREAMS = 16


@dataclass(frozen=True, slots=True)
class Abilities:
    """What one side can do, best first.

    `payloads` maps each kind that this guest needs to (the device that needs it, versions that we can write).
    """

    protocols: tuple[int, ...] = PROTOCOL_VERSIONS
    transports: tuple[str, ...] = TRANSPORTS
    encodings: tuple[str, ...] = ENCODINGS
    digests: tuple[str, ...] = DIGESTS
    max_streams: int = MAX_STREAMS
    payloads: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Choice:
    """What will be spoken."""

    protocol: int
    transport: str
    encodings: tuple[str, ...]
    digest: str
    streams: int
    payloads: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One topic in which the sides have nothing in common."""

    topic: str
    source: tuple[str, ...]
    destination: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.topic}: source {_words(self.source)}, destination {_words(self.destination)}"


def newest_common(ours: Iterable[int], theirs: Iterable[int]) -> int | None:
    """The highest version that both know, or None."""
    return max(set(ours) & set(theirs), default=None)


def first_common(ours: Iterable[str], theirs: Iterable[str]) -> str | None:
    """Our most wanted word that the peer knows too, or None."""
    known = set(theirs)
    return next((word for word in ours if word in known), None)


def choose(offer: Offer, source: Abilities, wanted_streams: int) -> Choice:
    """What the source selects from *offer*.

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
    payloads = _choose_payloads(source, offer, mismatches)
    if mismatches or protocol is None or transport is None or digest is None:
        raise _refusal(mismatches)
    streams = max(1, min(wanted_streams, offer.max_streams, source.max_streams))
    return Choice(protocol, transport, encodings, digest, streams, payloads)


def _choose_word(topic: str, ours: tuple[str, ...], offer: Offer, mismatches: list[Mismatch]) -> str | None:
    theirs = offer.ram.get(topic, ())
    word = first_common(ours, theirs)
    if word is None:
        mismatches.append(Mismatch(topic, ours, theirs))
    return word


def _choose_payloads(source: Abilities, offer: Offer, mismatches: list[Mismatch]) -> dict[str, int]:
    chosen: dict[str, int] = {}
    for kind, (device, versions) in source.payloads.items():
        readable = offer.payloads.get(kind, ())
        version = newest_common(versions, readable)
        if version is None:
            mismatches.append(Mismatch(f"payload {kind} of device {device}", _texts(versions), _texts(readable)))
        else:
            chosen[kind] = version
    return chosen


def _refusal(mismatches: list[Mismatch]) -> NegotiationError:
    details = [{"topic": x.topic, "source": list(x.source), "destination": list(x.destination)} for x in mismatches]
    return NegotiationError(
        "nothing in common: " + "; ".join(map(str, mismatches)),
        code="no_common_ground",
        details={"mismatches": details},
    )


def _texts(values: Iterable[object]) -> tuple[str, ...]:
    return tuple(str(value) for value in values)


def _words(values: tuple[str, ...]) -> str:
    return "{" + ", ".join(values) + "}"
