"""What the embedded guest executes.

`idle` only beats. `echo` returns what is typed on a serial port. `stress` rewrites memory at a set rate, so that every
page tells a lost or a stale write: what each page must hold follows from its place in the working set and from the
number of steps in processor state, and from nothing else. Position p of a working set of W pages was rewritten

    generation(p) = ceil((steps - p) / W)    times (0 before its first turn)

and holds a fixed random page, XOR a 64-bit key of (page number, generation, seed): incompressible, different from every
other page and from each of its own earlier versions in every word. Page 0 belongs to the heartbeat and is never part of
the working set, so a guest with one page of RAM has an empty one. A working set is spread evenly over the regions.

With `power_keys`, `idle` and `stress` obey keys typed on their first serial port, so that a guest can do by itself what
guests do: `p` powers it off, `r` reboots it, `c` crashes it. A key that waits in the port while the guest moves is
obeyed where it arrives.

Work comes in bounded slices between heartbeats; processor state changes only after the memory it speaks of, and a
guest is paused only between slices.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Protocol

import numpy as np

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.embedded.backends import Backend
from vmmigrate.hypervisor.embedded.guestram import WORDS_PER_PAGE, GuestMemory, Numbers, Words
from vmmigrate.hypervisor.embedded.uart import Uart
from vmmigrate.memory import MIB, PAGE_SIZE, RamLayout

BATCH_PAGES: Final = 16  # about 20 µs of warm memory, 60 µs of cold
_CHECK_PAGES: Final = 64
_CREDIT_CAP_NS: Final = 20_000_000
_SPARSE_WORDS: Final = 8
_DISK_PERIOD_BEATS: Final = 50
_DISK_BLOCKS: Final = 256
_DISK_BLOCK_BASE: Final = 1 << 48  # no page number comes near
_CONSOLE_PERIOD_BEATS: Final = 1000
_ECHO_BYTES_PER_SLICE: Final = 512
_KEYS_PER_SLICE: Final = 16
PATTERNS: Final = ("full", "sparse", "compressible")

_BASE: Final[Words] = np.random.Generator(np.random.PCG64(20261120)).integers(
    0, 1 << 64, size=WORDS_PER_PAGE, dtype=np.uint64
)
_C1, _C2, _C3 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Deed(StrEnum):
    """What a guest does to its own machine."""

    POWER_OFF = "power_off"
    REBOOT = "reboot"
    CRASH = "crash"


_DEED_OF_KEY: Final = {"p": Deed.POWER_OFF, "r": Deed.REBOOT, "c": Deed.CRASH}


@dataclass(slots=True)
class Progress:
    """The part of processor state that programs own."""

    filled_pages: int = 0
    steps: int = 0
    disk_steps: int = 0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a program can reach: RAM, serial ports and the disk for self-checking I/O."""

    memory: GuestMemory
    uarts: tuple[Uart, ...]
    disk: Backend | None


class Program(Protocol):
    name: str
    parameters: Mapping[str, Any]
    progress: Progress

    def work(self, heartbeat: int, deadline_ns: int) -> Deed | None:
        """A slice of work, over by *deadline_ns* (CLOCK_MONOTONIC) or one small batch later; what the guest then does
        to its machine."""

    def stand_still(self) -> None:
        """A slice was left out: the time since the last one is not made up for."""

    def own_pages(self) -> Numbers:
        """All pages that this program writes, ascending."""

    def find_bad_pages(self) -> Iterator[int | None]:
        """Check memory in small pieces: yields after each piece, a page number when one is bad."""

    def disk_problem(self) -> str | None: ...


class Idle:
    """Beats, and says so on the first serial port once a second."""

    name = "idle"

    def __init__(self, parameters: Mapping[str, Any], around: Surroundings) -> None:
        self.parameters: Mapping[str, Any] = dict(parameters)
        self.progress = Progress()
        self._around = around

    def work(self, heartbeat: int, deadline_ns: int) -> Deed | None:
        if heartbeat % _CONSOLE_PERIOD_BEATS == 0 and self._around.uarts:
            self._around.uarts[0].guest_write(f"heartbeat {heartbeat}\r\n".encode())
        return self._obey_keys() if self.parameters.get("power_keys", False) else None

    def stand_still(self) -> None:
        """There is nothing that time adds up to."""

    def _obey_keys(self) -> Deed | None:
        """The first deed among the keys that were typed; the others are dropped."""
        for uart in self._around.uarts[:1]:
            for key in uart.guest_read(_KEYS_PER_SLICE).decode("latin-1"):
                if key in _DEED_OF_KEY:
                    return _DEED_OF_KEY[key]
        return None

    def own_pages(self) -> Numbers:
        return np.zeros(0, dtype=np.int64)

    def find_bad_pages(self) -> Iterator[int | None]:
        return iter(())

    def disk_problem(self) -> str | None:
        return None


class Echo(Idle):
    """Writes what it reads, on every serial port."""

    name = "echo"

    def work(self, heartbeat: int, deadline_ns: int) -> Deed | None:
        for uart in self._around.uarts:
            if keys := uart.guest_read(_ECHO_BYTES_PER_SLICE):
                uart.guest_write(keys)
        return None


class Stress(Idle):
    """Rewrites a working set for ever.

    Parameters: `working_set_pages` or `working_set_mib` (default 16 MiB; never more than RAM less one page),
    `rate_pages_per_s` (default 2000), `pattern` (full: whole pages; sparse: 64 bytes of each page; compressible: one
    word repeated), `seed`, `fill` (write all of the working set once at first, default true), `disk_io` (write
    self-checking blocks to the first writable disk: **destroys what the disk holds**; default false).
    """

    name = "stress"

    def __init__(self, parameters: Mapping[str, Any], around: Surroundings) -> None:
        super().__init__(parameters, around)
        self._memory = around.memory
        self._pages = working_set(around.memory.layout, _working_set_pages(parameters, around.memory.layout))
        self._rate = int(parameters.get("rate_pages_per_s", 2000))
        self._pattern = parameters.get("pattern", "full")
        self._seed = np.uint64(parameters.get("seed", 1))
        self._fill = bool(parameters.get("fill", True))
        self._disk = around.disk if parameters.get("disk_io", False) else None
        self._last_ns = 0
        self._credit = 0.0

    def work(self, heartbeat: int, deadline_ns: int) -> Deed | None:
        deed = super().work(heartbeat, deadline_ns)
        now_ns = time.monotonic_ns()
        self._credit += self._rate * min(now_ns - self._last_ns, _CREDIT_CAP_NS) / 1e9 if self._last_ns else 0.0
        self._last_ns = now_ns
        if self._fill and self.progress.filled_pages < len(self._pages):
            self._credit = 0.0
            self._fill_some(deadline_ns)
        elif len(self._pages):
            self._rewrite_some(deadline_ns)
        if self._disk is not None and heartbeat % _DISK_PERIOD_BEATS == 0:
            self._write_block(self._disk)
        return deed

    def stand_still(self) -> None:
        self._last_ns = time.monotonic_ns()

    def _fill_some(self, deadline_ns: int) -> None:
        while self.progress.filled_pages < len(self._pages) and time.monotonic_ns() < deadline_ns:
            pages = self._pages[self.progress.filled_pages : self.progress.filled_pages + BATCH_PAGES]
            self._memory.rewrite(pages, self._content(pages, np.zeros(len(pages), dtype=np.int64)))
            self.progress.filled_pages += len(pages)

    def _rewrite_some(self, deadline_ns: int) -> None:
        while self._credit >= 1 and time.monotonic_ns() < deadline_ns:
            turn, position = divmod(self.progress.steps, len(self._pages))
            batch = min(int(self._credit), BATCH_PAGES, len(self._pages) - position)
            pages = self._pages[position : position + batch]
            generations = np.full(batch, turn + 1, dtype=np.int64)
            if self._pattern == "sparse" and (self._fill or turn):
                self._memory.rewrite_words(pages, _SPARSE_WORDS, self._content(pages, generations)[:, :_SPARSE_WORDS])
            else:
                self._memory.rewrite(pages, self._content(pages, generations))
            self.progress.steps += batch
            self._credit = min(self._credit - batch, self._rate * _CREDIT_CAP_NS / 1e9)

    def own_pages(self) -> Numbers:
        return self._pages

    def find_bad_pages(self) -> Iterator[int | None]:
        populated = self._memory.populated()
        for start in range(0, len(self._pages), _CHECK_PAGES):
            positions = np.arange(start, min(start + _CHECK_PAGES, len(self._pages)))
            pages = self._pages[positions]
            generations = self._generations(positions)
            written = (generations > 0) | (self._fill & (positions < self.progress.filled_pages))
            bad = np.zeros(len(pages), dtype=np.bool_)
            expected = self._content(pages[written], generations[written])
            bad[written] = (self._memory.pages[pages[written]] != expected).any(axis=1)
            unwritten = ~written & populated[pages]  # a hole is zero, and reading it would fill it
            bad[unwritten] = self._memory.pages[pages[unwritten]].any(axis=1)
            yield int(pages[bad][0]) if bad.any() else None

    def _generations(self, positions: Numbers) -> Numbers:
        return np.maximum(-((positions - self.progress.steps) // len(self._pages)), 0)

    def _content(self, pages: Numbers, generations: Numbers) -> Words:
        keys = page_keys(pages, generations, self._seed)
        if self._pattern == "compressible":
            return np.repeat(keys[:, None], WORDS_PER_PAGE, axis=1)
        content: Words = _BASE ^ keys[:, None]
        if self._pattern == "sparse":
            content[:, _SPARSE_WORDS:] = (_BASE ^ page_keys(pages, np.zeros_like(pages), self._seed)[:, None])[
                :, _SPARSE_WORDS:
            ]
        return content

    def _write_block(self, disk: Backend) -> None:
        blocks = self._disk_blocks(disk)
        if blocks and disk.is_open:
            turn, block = divmod(self.progress.disk_steps, blocks)
            with contextlib.suppress(OSError):  # a disk that fails is tried again; it does not end the machine
                disk.write(block * PAGE_SIZE, self._block(block, turn + 1))
                self.progress.disk_steps += 1

    def _block(self, block: int, generation: int) -> bytes:
        key = page_keys(np.array([_DISK_BLOCK_BASE + block]), np.array([generation]), self._seed)
        return (_BASE ^ key).tobytes()

    @staticmethod
    def _disk_blocks(disk: Backend) -> int:
        return min(disk.size_bytes // PAGE_SIZE, _DISK_BLOCKS)

    def disk_problem(self) -> str | None:
        if self._disk is None or not self._disk.is_open or not (blocks := self._disk_blocks(self._disk)):
            return None
        turn, position = divmod(self.progress.disk_steps, blocks)
        for block in range(blocks):
            generation = turn + 1 if block < position else turn
            if generation and self._disk.read(block * PAGE_SIZE, PAGE_SIZE) != self._block(block, generation):
                return f"block {block} of the disk under test is not as it was written last"
        return None


_PROGRAMS: Final[Mapping[str, type[Idle]]] = {program.name: program for program in (Idle, Echo, Stress)}
_INTEGERS: Final = {
    "working_set_pages": (0, 1 << 40),
    "working_set_mib": (0, 1 << 28),
    "rate_pages_per_s": (0, 1 << 24),
    "seed": (0, (1 << 64) - 1),
}
_FLAGS: Final = ("fill", "disk_io", "power_keys")
_PARAMETERS: Final[Mapping[str, frozenset[str]]] = {
    "idle": frozenset({"power_keys"}),
    "echo": frozenset(),
    "stress": frozenset({*_INTEGERS, *_FLAGS, "pattern"}),
}


def program_problems(name: str, parameters: Mapping[str, Any]) -> list[str]:
    """What is wrong with a program's name and parameters; pure."""
    if name not in _PROGRAMS:
        return [f"program {name!r}: allowed are {', '.join(_PROGRAMS)}"]
    problems = []
    for key, value in parameters.items():
        if key not in _PARAMETERS[name]:
            problems.append(f"program {name}: unknown parameter {key!r}")
        elif key in _INTEGERS and (type(value) is not int or not _INTEGERS[key][0] <= value <= _INTEGERS[key][1]):
            problems.append(f"program {name}: {key} must be an integer from {_INTEGERS[key][0]} to {_INTEGERS[key][1]}")
        elif key in _FLAGS and type(value) is not bool:
            problems.append(f"program {name}: {key} must be true or false")
        elif key == "pattern" and value not in PATTERNS:
            problems.append(f"program {name}: pattern must be one of {', '.join(PATTERNS)}")
    return problems


def load_program(name: str, parameters: Mapping[str, Any], around: Surroundings) -> Program:
    """Make the program ready to run from its beginning.

    Raises:
        HypervisorError: `program_invalid`.
    """
    if problems := program_problems(name, parameters):
        raise HypervisorError("; ".join(problems), code="program_invalid")
    return _PROGRAMS[name](parameters, around)


def working_set(layout: RamLayout, wanted_pages: int) -> Numbers:
    """Page numbers of a working set: page 0 left out, as even over the regions as their sizes allow."""
    spans = [(layout.first_page(region), region.pages) for region in layout.regions]
    spans[0] = (1, spans[0][1] - 1)
    left, parts = min(wanted_pages, layout.pages - 1), []
    # Smallest regions first: what they cannot take falls to the larger ones.
    for remaining, (first, pages) in zip(range(len(spans), 0, -1), sorted(spans, key=lambda s: s[1]), strict=True):
        share = min(-(-left // remaining), pages)
        parts.append(np.arange(first, first + share, dtype=np.int64))
        left -= share
    return np.sort(np.concatenate(parts))


def page_keys(pages: Numbers, generations: Numbers, seed: np.uint64) -> Words:
    """One well-mixed 64-bit key per (page, generation): splitmix64, vectorised."""
    keys: Words = pages.astype(np.uint64) * _C1 + generations.astype(np.uint64) * _C3 + np.full(len(pages), seed)
    keys = (keys ^ (keys >> np.uint64(30))) * _C2
    keys = (keys ^ (keys >> np.uint64(27))) * _C3
    return keys ^ (keys >> np.uint64(31))


def _working_set_pages(parameters: Mapping[str, Any], layout: RamLayout) -> int:
    if "working_set_pages" in parameters:
        return int(parameters["working_set_pages"])
    return min(int(parameters.get("working_set_mib", 16)) * MIB // PAGE_SIZE, layout.pages)
