"""Who ran a QEMU guest when, by what it wrote on its consoles; for proofs that exactly one ran.

QEMU itself appends to a console's file, whatever the daemon does; the file outlives it where a directory is set for it.
The console's history travels, so the bytes of a console are numbered through over all hosts: a process wrote those
from where its file began to be its own to its end. Of a guest that writes all the time (the stress guest: a letter each
millisecond) these pieces must follow each other without a hole and without an overlap: bytes that two processes both
wrote are two owners.

Beside the consoles of a guest lies a small JSON file that says whose they are, and one for each console that began with
the history of another host.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from vmmigrate.hypervisor.intervals import Interval
from vmmigrate.hypervisor.qemu.files import QemuFiles

PORT: Final = "com1"


def note_guest(files: QemuFiles, instance_id: str, host_id: str) -> None:
    """Say whose consoles they are. Blocking; nothing where they do not outlive the guest."""
    if files.witness_dir is not None:
        path = files.witness_dir / f"{files.directory.name}.guest"
        path.write_text(json.dumps({"instance": instance_id, "host": host_id}), encoding="utf-8")


def note_beginning(files: QemuFiles, num: str, first_byte: int) -> None:
    """Say from which byte on this process writes a console. Blocking."""
    if files.witness_dir is not None:
        (files.witness_dir / f"{files.directory.name}.{num}.first").write_text(str(first_byte), encoding="utf-8")


def read_consoles(directory: Path, instance_id: str) -> tuple[Interval, ...]:
    """What each process of an instance wrote on its first serial port, as the intervals in which it ran.

    Bytes count as beats, and stand for the clock, too: two processes that ran at once both wrote the same ones. Epochs
    are not told, and are all (0, 0).
    """
    found = []
    for path in sorted(directory.glob("*.guest")):
        told = json.loads(path.read_text(encoding="utf-8"))
        first, end = _piece(path.with_suffix(f".{PORT}.first")), path.with_suffix(f".{PORT}.log").stat().st_size
        if told["instance"] == instance_id and end > first:
            found.append(
                Interval(
                    host_id=told["host"],
                    instance_id=instance_id,
                    epoch=(0, 0),
                    first_counter=first,
                    first_ns=first,
                    last_counter=end - 1,
                    last_ns=end - 1,
                    jumps=0,
                )
            )
    return tuple(found)


def _piece(path: Path) -> int:
    return int(path.read_text(encoding="utf-8")) if path.exists() else 0
