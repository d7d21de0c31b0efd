"""Payloads that belong to a hypervisor: nobody else reads their bytes, so facts decide whether they fit.

The kind of an opaque payload names its owner: `qemu/vmstate` is QEMU's. Like every kind it has versions (of its
framing). Whether the state inside can be loaded follows from facts alone: a *host* says in its Offer which hypervisor
it runs, the range of versions whose state that can load, and the machine types and processor models it has; a *guest*
says in its Preamble what it is. Both are compared before RAM moves, and everything that differs is told at once.

Facts of a host: `hypervisor`, `hypervisor_version`, `loads_versions` ("8.0..9.2", both ends included, or "7.2..", where
the newest is not the limit), `machine_types` and `cpu_models` (words). Facts of a guest: `hypervisor`,
`hypervisor_version`, `machine_type`, `cpu_model`, `device_tree` (a digest); and, where its hypervisor has such,
`cpu_features` (a digest) and `ram_blocks` (names and sizes). A fact that one side does not tell is a difference, never
a match.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

Facts = Mapping[str, str]

_UNTOLD = "not told"
_SAME_IN_BOTH_GUESTS = ("hypervisor", "machine_type", "cpu_model", "device_tree")
_SAME_IF_TOLD = ("cpu_features", "ram_blocks")
_ONE_OF_THE_HOSTS = {"machine_type": "machine_types", "cpu_model": "cpu_models"}


@dataclass(frozen=True, slots=True)
class Difference:
    """One fact in which the guest and the destination differ."""

    fact: str
    source: str
    destination: str

    def __str__(self) -> str:
        return f"{self.fact}: source {self.source}, destination {self.destination}"


def owner_of(kind: str) -> str | None:
    """The hypervisor that owns payloads of *kind*; None for a typed kind."""
    owner, slash, _ = kind.partition("/")
    return owner if slash else None


def host_differences(guest: Facts, host: Facts) -> list[Difference]:
    """Why *host* cannot load the state of *guest*, as far as an offer tells; empty when it can."""
    return [*_hypervisor(guest, host), *_version(guest, host), *_choices(guest, host)]


def guest_differences(source: Facts, destination: Facts) -> list[Difference]:
    """In what the guest that was built is another one than the guest at the source."""
    told = [fact for fact in _SAME_IF_TOLD if source.get(fact) or destination.get(fact)]
    return [
        _difference(fact, source, destination)
        for fact in (*_SAME_IN_BOTH_GUESTS, *told)
        if not source.get(fact) or source.get(fact) != destination.get(fact)
    ]


def _hypervisor(guest: Facts, host: Facts) -> Iterator[Difference]:
    if not guest.get("hypervisor") or guest.get("hypervisor") != host.get("hypervisor"):
        yield _difference("hypervisor", guest, host)


def _version(guest: Facts, host: Facts) -> Iterator[Difference]:
    version, loads = guest.get("hypervisor_version"), host.get("loads_versions")
    if not version or not loads or not is_within(version, loads):
        yield Difference("hypervisor_version", version or _UNTOLD, loads or _UNTOLD)


def _choices(guest: Facts, host: Facts) -> Iterator[Difference]:
    for fact, choices in _ONE_OF_THE_HOSTS.items():
        wanted, offered = guest.get(fact), host.get(choices)
        if not wanted or wanted not in (offered or "").split():
            yield Difference(fact, wanted or _UNTOLD, offered or _UNTOLD)


def _difference(fact: str, source: Facts, destination: Facts) -> Difference:
    return Difference(fact, source.get(fact) or _UNTOLD, destination.get(fact) or _UNTOLD)


def is_within(version: str, bounds: str) -> bool:
    """Whether a dotted version lies in a range; 9.2.1 lies in "8.0..9.2", since that names all of 9.2, and in "8.0..",
    which has no upper end."""
    low, dots, high = bounds.partition("..")
    if dots and not high:
        high = version
    numbers = [_numbers(text) for text in (version, low, high if dots else low)]
    if not all(numbers):
        return False
    have, least, most = numbers
    return least <= have and have[: len(most)] <= most


def _numbers(version: str) -> tuple[int, ...]:
    """Empty for what is no dotted version."""
    parts = version.split(".")
    return tuple(map(int, parts)) if all(part.isascii() and part.isdecimal() for part in parts) else ()


def listed(differences: Iterable[Difference]) -> str:
    return "; ".join(map(str, differences))
