"""Looks at files that grow and at processes that work, in a process of its own: whoever asks may be busy.

    python -m tools.bench_watcher

It reads a line of JSON, an `Order`, and looks until it reads another line, which is empty; then it writes what it saw,
a `Sight`, and waits for the next order. It goes before all other processes where it may ask for that, and is asleep
nearly always. Times are those of the monotonic clock, which all processes share.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

LOOK_S: Final = 0.0005
CLOCKS_S: Final = 0.01
BLIND_S: Final = 0.001


@dataclass(frozen=True)
class Place:
    """Where a file is going to be: the first of that *pattern* in a directory that is not among the *known* ones."""

    directory: str
    pattern: str
    known: tuple[str, ...] = ()

    def find(self) -> Path | None:
        for path in Path(self.directory).glob(self.pattern):
            if str(path) not in self.known:
                return path
        return None


@dataclass(frozen=True)
class Order:
    """What is to be looked at. `pids` are processes whose time is read now and then, as they may end."""

    source: str
    destination: Place
    pids: tuple[int, ...]


@dataclass
class Sight:
    """What was seen.

    Attributes:
        source, destination: When each file was seen to have become how long.
        blind: When nobody had looked for more than a millisecond, and for how long.
        processors_s: By pid, as text: what `ProcessorTime` told last.
    """

    source: list[tuple[float, int]] = field(default_factory=list)
    destination: list[tuple[float, int]] = field(default_factory=list)
    blind: list[tuple[float, float]] = field(default_factory=list)
    processors_s: dict[str, float] = field(default_factory=dict)


class ProcessorTime:
    """CPU seconds of a process without those of its virtual processors; what was read last once it has gone."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._clock = ~pid << 3 | 2  # as linux/posix-timers.h spells the clock of a process; ended threads count, too
        self._virtual: list[Path] = []
        self._last_s = 0.0

    def read(self) -> float:
        with contextlib.suppress(OSError):
            self._last_s = time.clock_gettime(self._clock) - self._virtual_s()
        return self._last_s

    def _virtual_s(self) -> float:
        if not self._virtual:
            tasks = Path(f"/proc/{self.pid}/task").iterdir()
            self._virtual = [task / "schedstat" for task in tasks if (task / "comm").read_bytes().startswith(b"CPU ")]
        return sum(int(path.read_bytes().split()[0]) for path in self._virtual) / 1e9


def watch(order: Order) -> Sight:
    """Look until there is something to read on standard input."""
    sight, files = Sight(), dict[int, list[tuple[float, int]]]()
    clocks = [ProcessorTime(pid) for pid in order.pids]
    with contextlib.ExitStack() as stack:
        files[_opened(stack, Path(order.source))] = sight.source
        print("{}", flush=True)
        looked_s, next_clocks_s = time.monotonic(), 0.0
        while not select.select([sys.stdin], [], [], LOOK_S)[0]:
            now_s = time.monotonic()
            if now_s - looked_s > BLIND_S:
                sight.blind.append((now_s, now_s - looked_s))
            looked_s = now_s
            _look(files)
            if len(files) == 1 and (path := order.destination.find()) is not None:
                files[_opened(stack, path)] = sight.destination
            if now_s >= next_clocks_s:
                sight.processors_s = {str(clock.pid): clock.read() for clock in clocks}
                next_clocks_s = now_s + CLOCKS_S
    return sight


def _look(files: dict[int, list[tuple[float, int]]]) -> None:
    for fd, seen in files.items():
        size = os.fstat(fd).st_size
        if size != (seen[-1][1] if seen else 0):
            seen.append((time.monotonic(), size))


def _opened(stack: contextlib.ExitStack, path: Path) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # it may be removed before we are done with it
    stack.callback(os.close, fd)
    return fd


def order_of(words: dict[str, Any]) -> Order:
    return Order(words["source"], Place(**words["destination"]), tuple(words["pids"]))


def _ask_for_precedence() -> None:
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


def main() -> None:
    _ask_for_precedence()
    with open(0, "rb", buffering=0) as lines:  # what is read ahead, `select` would not see
        while line := lines.readline():
            sight = watch(order_of(json.loads(line)))
            lines.readline()
            print(json.dumps(asdict(sight)), flush=True)


if __name__ == "__main__":
    main()
