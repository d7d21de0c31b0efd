"""Watches the consoles of all QEMUs of two hosts grow, from outside: nothing is asked of the guest or its daemon.

A thread of its own looks some thousand times a second: it is told of each byte as late as one look takes. A file that
was found stays open, and can be read when its guest is gone and its name removed.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from vmmigrate.demo.heartbeat import Output, Sighting
from vmmigrate.net.threads import open_group, run_joined

_LOOK_S: Final = 0.0005
_LOOKS_PER_SEARCH: Final = 20  # new files: they are there long before a guest writes to them
_READ_BYTES: Final = 1 << 20


class _Growing:
    """One file, as it grows. Read by another thread: what a sighting counts is in the text before it."""

    def __init__(self, host: str, path: Path) -> None:
        self._host = host
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._text = bytearray()
        self._sightings: list[Sighting] = []

    def look(self) -> None:
        while chunk := os.pread(self._fd, _READ_BYTES, len(self._text)):
            seen_ns = time.monotonic_ns()
            self._text += chunk
            self._sightings.append(Sighting(seen_ns, len(self._text)))

    def output(self) -> Output:
        sightings = tuple(self._sightings)
        return Output(self._host, sightings, bytes(self._text[: sightings[-1].size if sightings else 0]))

    def close(self) -> None:
        os.close(self._fd)


class ConsoleWatch:
    """What the consoles have shown so far. Made by `watch_consoles`."""

    def __init__(self, runtimes: Mapping[str, Path], port: str) -> None:
        self._runtimes = runtimes
        self._pattern = f"*/{port}.log"
        self._files: dict[Path, _Growing] = {}
        self._ended = threading.Event()

    def outputs(self) -> list[Output]:
        return [file.output() for file in list(self._files.values())]

    def run(self) -> None:
        """Look until `end`. Blocking."""
        looks = 0
        try:
            while not self._ended.is_set():
                if looks % _LOOKS_PER_SEARCH == 0:
                    self._search()
                for file in self._files.values():
                    file.look()
                looks += 1
                time.sleep(_LOOK_S)
        finally:
            for file in self._files.values():
                file.close()

    def end(self) -> None:
        self._ended.set()

    def _search(self) -> None:
        for host, runtime in self._runtimes.items():
            for path in runtime.glob(self._pattern):
                if path not in self._files:
                    with contextlib.suppress(FileNotFoundError):  # it went while we looked
                        self._files[path] = _Growing(host, path)


@contextlib.asynccontextmanager
async def watch_consoles(runtimes: Mapping[str, Path], port: str) -> AsyncIterator[ConsoleWatch]:
    """Watch a serial port of every guest on every host, by the hosts' runtime directories, until left."""
    watch = ConsoleWatch(runtimes, port)
    async with open_group() as group:
        group.start_soon(partial(run_joined, watch.run, end=watch.end))
        yield watch
        group.cancel_scope.cancel()
