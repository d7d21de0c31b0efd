"""What a host holds on to: descriptors of its daemon by kind, and files. Nothing may be left of a migration."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Of what lies in a state directory, these stay: the journal, and what each migration's record says of it.
_KEPT = ("journal.vmmj", "journal.lock", "migrations/*.json")
_LISTENING = "0A"


@dataclass(frozen=True)
class TcpSocket:
    """One line of /proc/net/tcp."""

    local_port: int
    remote_port: int
    is_listening: bool


def descriptors(pid: int, control_ports: frozenset[int]) -> Counter[str]:
    """How many descriptors of each kind process *pid* has open.

    Args:
        control_ports: Connections to and from these are not counted: whoever looks on holds some of them.
    """
    sockets = _tcp_sockets(pid)
    kinds: Counter[str] = Counter()
    for target in _targets(pid):
        kind, _, rest = target.partition(":")
        if kind == "socket":
            found = sockets.get(rest.strip("[]"))
            if found is None:
                kinds["unix socket"] += 1
            elif found.is_listening:
                kinds["listener"] += 1
            elif not {found.local_port, found.remote_port} & control_ports:
                kinds["connection"] += 1
        elif kind == "/memfd":
            kinds["memfd"] += 1
        elif kind in {"anon_inode", "pipe"}:
            kinds[rest.strip("[]") if kind == "anon_inode" else kind] += 1
        else:
            kinds["file"] += 1
    return kinds


def _targets(pid: int) -> Iterable[str]:
    directory = Path(f"/proc/{pid}/fd")
    for entry in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):
            yield os.readlink(directory / entry)


def _tcp_sockets(pid: int) -> dict[str, TcpSocket]:
    """By inode."""
    found = {}
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
                _, local, remote, state, *rest = line.split()
                found[rest[5]] = TcpSocket(_port(local), _port(remote), state == _LISTENING)
    return found


def _port(address: str) -> int:
    return int(address.rpartition(":")[2], 16)


def more_than(now: Counter[str], before: Counter[str]) -> list[str]:
    """What there is more of, in words."""
    return [f"{now[kind] - before[kind]} {kind} more than before" for kind in sorted(now) if now[kind] > before[kind]]


def leftover_files(state: Path, runtime: Path, tombstones: Iterable[str]) -> list[str]:
    """What is left on a host that runs no guest.

    Args:
        tombstones: Ids of instances that live elsewhere; their documents stay.
    """
    kept = {path for pattern in _KEPT for path in state.glob(pattern)}
    kept |= {state / "instances" / f"{instance}.json" for instance in tombstones}
    found = [path for path in state.rglob("*") if path.is_file() and path not in kept]
    found += [path for path in runtime.rglob("*") if not path.is_dir()]
    return [f"{path.parent.name}/{path.name} is left over" for path in sorted(found)]
