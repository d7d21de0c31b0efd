"""What the consoles of a guest that moves tell: its letters, and how long it was silent. For benchmarks.

Whoever moves the guest, each of its two QEMUs writes the console to a file, and a process of its own looks at the sizes
of both every half a millisecond (`bench_watcher`). So gaps are seen by the same means, whatever moves the guest; they
are those that anybody outside would see.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import trio

from tools.bench_watcher import Order, Place, Sight

WAIT_S: Final = 60.0
_LOOK_S: Final = 0.005
_READY: Final = b"<READY>\n"
_LETTERS: Final = bytes(range(ord("a"), ord("z") + 1))
_ROOT: Final = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Heard:
    """What was heard of one move. Times in milliseconds.

    Attributes:
        gap_ms: The longest silence from the command until the guest was heard at the destination for a while.
        handover_ms: The silence between its last letter at the source and its first one at the destination.
        arrived_ms: From the command to that first letter.
        blind_ms: The longest time, after the command, in which nobody looked: gaps may be off by that.
        fault: Which letter is missing or comes twice; empty when they go on as they should.
    """

    steady_p50_ms: float
    steady_p99_ms: float
    gap_ms: float
    handover_ms: float
    arrived_ms: float
    blind_ms: float
    fault: str


class Watcher:
    """The process that looks; made by `open_watcher`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    async def watch(self, source: Path, destination: Place, *, has_history: bool, pids: Sequence[int]) -> Watch:
        """Begin to look; one guest at a time."""
        watch = Watch(self, source, destination, has_history=has_history)
        await self.ask(asdict(Order(str(source), destination, tuple(pids))))
        return watch

    async def ask(self, order: Mapping[str, Any] | None) -> dict[str, Any]:
        """Begin with *order*, or end (None): what is answered."""
        line = b"\n" if order is None else json.dumps(order).encode() + b"\n"
        return dict(await trio.to_thread.run_sync(self._ask, line))

    def _ask(self, line: bytes) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextlib.contextmanager
def open_watcher() -> Iterator[Watcher]:
    """A process that looks, until the block ends."""
    command = [sys.executable, "-m", "tools.bench_watcher"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=_ROOT, stdin=pipe, stdout=pipe, start_new_session=True) as process:
        try:
            yield Watcher(process)
        finally:
            process.kill()


class Watch:
    """A guest that is about to move; made by `Watcher.watch`, and to be closed.

    Args:
        has_history: The console at the destination begins with all that there was at the source.
    """

    def __init__(self, watcher: Watcher, source: Path, destination: Place, *, has_history: bool) -> None:
        self.has_history = has_history
        self.begun_s = 0.0
        self._watcher = watcher
        self._place = destination
        self._source = os.open(source, os.O_RDONLY | os.O_CLOEXEC)  # it may be removed before we are done with it
        self._destination = -1

    def begin(self) -> None:
        """Now the command is given: what was heard until now is the steady state."""
        self.begun_s = time.monotonic()

    async def wait_source(self, letters: int) -> None:
        """Until so many more were heard at the source. Raises: trio.TooSlowError."""
        wanted = _size(self._source) + letters
        with trio.fail_after(WAIT_S):
            while _size(self._source) < wanted:  # noqa: ASYNC110 (another process writes it)
                await trio.sleep(_LOOK_S)

    async def wait_destination(self, letters: int) -> None:
        """Until so many were heard at the destination; the source is silent. Raises: trio.TooSlowError."""
        with trio.fail_after(WAIT_S):
            while (path := self._place.find()) is None:  # noqa: ASYNC110 (another process makes it)
                await trio.sleep(_LOOK_S)
            self._destination = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            while _size(self._destination) < self._before + letters:  # noqa: ASYNC110
                await trio.sleep(_LOOK_S)

    async def end(self) -> tuple[Heard, Mapping[int, float]]:
        """What was heard; and what the processes that were named had taken when they were looked at last."""
        sight = Sight(**await self._watcher.ask(None))
        return self._heard(sight), {int(pid): seconds for pid, seconds in sight.processors_s.items()}

    async def give_up(self) -> None:
        """It does not move after all."""
        await self._watcher.ask(None)

    def _heard(self, sight: Sight) -> Heard:
        here = [moment for moment, _ in sight.source]
        there = [moment for moment, size in sight.destination if size > self._before]
        gaps = [(later, later - earlier) for earlier, later in itertools.pairwise(here + there)]
        steady = sorted(gap for later, gap in gaps if later < self.begun_s)
        return Heard(
            steady_p50_ms=_ms(steady[len(steady) // 2]),
            steady_p99_ms=_ms(steady[int(len(steady) * 0.99)]),
            gap_ms=_ms(max(gap for later, gap in gaps if later >= self.begun_s)),
            handover_ms=_ms(there[0] - here[-1]),
            arrived_ms=_ms(there[0] - self.begun_s),
            blind_ms=_ms(max((blind for later, blind in sight.blind if later >= self.begun_s), default=0.0)),
            fault=self._fault(),
        )

    def close(self) -> None:
        for fd in (self._source, self._destination):
            if fd >= 0:
                os.close(fd)

    @property
    def _before(self) -> int:
        """Bytes at the destination that the guest did not write there."""
        return _size(self._source) if self.has_history else 0

    def _fault(self) -> str:
        here, there = (os.pread(fd, _size(fd), 0) for fd in (self._source, self._destination))
        if self.has_history and not there.startswith(here):
            return "the console at the destination does not begin with what was written at the source"
        return fault_of(here + there[self._before :])


def fault_of(text: bytes) -> str:
    """Where the letters of a stress guest do not go on from a to z and from a again; empty: nowhere."""
    letters = text[text.find(_READY) + len(_READY) if _READY in text else 0 :]
    if not letters:
        return "there are no letters"
    first = letters[0] - _LETTERS[0]
    expected = (_LETTERS * (len(letters) // len(_LETTERS) + 2))[first % len(_LETTERS) :][: len(letters)]
    if letters == expected:
        return ""
    at = next(place for place, (got, wanted) in enumerate(zip(letters, expected, strict=True)) if got != wanted)
    shown = re.sub(rb"[^ -~]", b"?", letters[max(0, at - 10) : at + 10]).decode()
    return f"letter {at} of {len(letters)} is wrong: {shown}"


def _size(fd: int) -> int:
    return os.fstat(fd).st_size


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)
