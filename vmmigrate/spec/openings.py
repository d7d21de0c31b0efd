"""What a host would open to run a spec, and whether its allow-lists let it.

A peer's spec is not trusted: its file paths, URLs, addresses and interface names become system calls of this host. The
lists are the host's, and empty ones refuse everything. Paths are compared after resolving links, which only the host
can do; it passes its resolver in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from ipaddress import ip_address, ip_network
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from vmmigrate.errors import SpecParseError
from vmmigrate.spec import chain
from vmmigrate.spec.chain import AnySpec
from vmmigrate.spec.keys import SpecKey
from vmmigrate.spec.latest import (
    CrucibleStorageBackend,
    DlpiNetworkBackend,
    FileStorageBackend,
    P9fs,
    VirtioNetworkBackend,
)
from vmmigrate.spec.volume import File, Region, Url, Volume, VolumeRequest, parse_volume

PATH = "path"
HOST = "host"
INTERFACE = "interface"
VOLUME = "volume"


@dataclass(frozen=True, slots=True)
class Opening:
    """One thing that would be opened. `what` is `path`, `host` (of a URL or of a downstairs), `interface`, or `volume`
    (a volume request that cannot be read, so nobody knows)."""

    component: SpecKey
    what: str
    value: str


@dataclass(frozen=True, slots=True)
class AllowLists:
    """Directories (resolved), host names, addresses or networks (`fd00:1122:3344::/48`), and patterns of interfaces."""

    path_roots: Sequence[str] = ()
    hosts: Sequence[str] = ()
    interfaces: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """One opening that no list allows."""

    opening: Opening
    message: str


def openings(spec: AnySpec) -> list[Opening]:
    """Everything that the spec's backends would open, in key order."""
    components = chain.up(spec).components.items()
    return [opening for key, part in components for opening in _openings(key, part)]


def refusals(spec: AnySpec, allowed: AllowLists, resolve: Callable[[str], str]) -> list[Refusal]:
    """Every opening that the lists do not allow; empty when the host may open all of it.

    Args:
        resolve: The absolute path behind a path, links followed.
    """
    return [
        Refusal(opening, message)
        for opening in openings(spec)
        if (message := _reason_against(opening, allowed, resolve)) is not None
    ]


def _openings(key: SpecKey, part: object) -> Iterator[Opening]:
    match part:
        case FileStorageBackend():
            yield Opening(key, PATH, part.path)
        case P9fs():
            yield Opening(key, PATH, part.source)
        case VirtioNetworkBackend() | DlpiNetworkBackend():
            yield Opening(key, INTERFACE, part.vnic_name)
        case CrucibleStorageBackend():
            try:
                yield from _volume_openings(key, parse_volume(part.request_json))
            except SpecParseError:
                yield Opening(key, VOLUME, "a volume request that cannot be read")


def _volume_openings(key: SpecKey, request: VolumeRequest) -> Iterator[Opening]:
    match request:
        case File():
            yield Opening(key, PATH, request.path)
        case Url():
            yield Opening(key, HOST, _host_of_url(request.url))
        case Region():
            addresses = [*request.opts.target, *filter(None, [request.opts.control])]
            yield from (Opening(key, HOST, _host_of_address(address)) for address in addresses)
        case Volume():
            for child in (*request.sub_volumes, *filter(None, [request.read_only_parent])):
                yield from _volume_openings(key, child)


def _host_of_url(url: str) -> str:
    """Empty for a URL without a host, which no list allows."""
    try:
        parts = urlsplit(url)
        return parts.hostname or "" if parts.scheme in ("http", "https") else ""
    except ValueError:
        return ""


def _host_of_address(address: str) -> str:
    return address.rpartition(":")[0].removeprefix("[").removesuffix("]")


def _reason_against(opening: Opening, allowed: AllowLists, resolve: Callable[[str], str]) -> str | None:
    value = opening.value
    if opening.what == PATH and not _is_under(value, allowed.path_roots, resolve):
        return f"path {value} is not under an allowed directory ({_listed(allowed.path_roots)})"
    if opening.what == HOST and not any(_is_host_of(value, name) for name in allowed.hosts):
        return f"host {value or 'of a URL without one'} is not allowed ({_listed(allowed.hosts)})"
    if opening.what == INTERFACE and not any(fnmatchcase(value, pattern) for pattern in allowed.interfaces):
        return f"interface {value} is not allowed ({_listed(allowed.interfaces)})"
    return value if opening.what == VOLUME else None


def _is_host_of(host: str, allowed: str) -> bool:
    """Whether *host* is the allowed name or address, or an address in the allowed network."""
    try:
        return ip_address(host) in ip_network(allowed)
    except ValueError:  # one of them is a name
        return host != "" and host == allowed


def _is_under(path: str, roots: Sequence[str], resolve: Callable[[str], str]) -> bool:
    if not PurePosixPath(path).is_absolute() or "\0" in path:
        return False
    resolved = PurePosixPath(resolve(path))
    return any(resolved.is_relative_to(root) for root in roots)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
