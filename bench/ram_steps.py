"""Where the time of a sealed stream goes, step by step, at both ends: what bounds bench/ram_throughput.py.

    python bench/ram_steps.py [--json] [--mib N] [--rounds N] [--contents A,B] [--streams N]

The copies are those of `ram_throughput.py` for `sealed`, into populated memory. Two clocks, of the thread and of the
wall, stand around each step of the threads that send and receive; reported are seconds per GiB of guest RAM, medians of
all rounds. `waiting` is wall time of a step less its processor time: for the other end, or for a processor.

look        digests of pages, and which of them are zero
seal, open  AES-256-GCM, from and into guest RAM, and copies to and from buffers
send, take  what the kernel does with sockets, among it a copy of every byte
digest      of pages as they landed
all else    tables of runs, page numbers, bookkeeping of what pays and of what landed: Python and NumPy

How it could mislead: a clock of a thread takes half a microsecond to read, some ten times per MiB; both ends share this
machine's processors and its memory's bandwidth, so that a step takes longer beside the other end than it would alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import trio

from tools.bench_copies import GIB, MIB, Seat, Share, Streams, TwoProcesses, seconds_of, send_out, take_in
from vmmigrate.net.receiving import StreamReceiver
from vmmigrate.net.sealed import OpeningLink, SealingLink
from vmmigrate.net.sending import StreamSender
from vmmigrate.ram.digest import PageHash

CONTENTS = ("incompressible", "half-zero", "compressible")
ELSE = "all else"

# Step by method; a step inside another one is not counted there. The outermost is what no other step accounts for.
SOURCE = {
    (StreamSender, "send_round"): ELSE,
    (PageHash, "look"): "look",
    (SealingLink, "send"): "seal",
    (SealingLink, "_flush"): "send",
}
DESTINATION = {
    (StreamReceiver, "receive_round"): ELSE,
    (OpeningLink, "_open_into"): "open",
    (OpeningLink, "_receive"): "take",
    (StreamReceiver, "_digests_at"): "digest",
}


@dataclass(frozen=True)
class Copy:
    content: str
    streams: int


@dataclass(frozen=True)
class Spent:
    """Seconds in a step, over all threads: of processors, and by the clock on the wall."""

    cpu_s: float = 0.0
    wall_s: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.cpu_s + other.cpu_s, self.wall_s + other.wall_s)

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.cpu_s - other.cpu_s, self.wall_s - other.wall_s)


class Steps:
    """Clocks around methods of this process."""

    def __init__(self) -> None:
        self.spent: dict[str, Spent] = defaultdict(Spent)
        self._lock = threading.Lock()
        self._inside = threading.local()

    @contextmanager
    def clocked(self, methods: dict[tuple[type, str], str]) -> Iterator[None]:
        plain = {method: getattr(*method) for method in methods}
        try:
            for (owner, name), step in methods.items():
                setattr(owner, name, self._around(plain[owner, name], step))
            yield
        finally:
            for (owner, name), function in plain.items():
                setattr(owner, name, function)

    def _around(self, function: Callable[..., Any], step: str) -> Callable[..., Any]:
        def clocked(*args: Any, **named: Any) -> Any:
            outer: Spent | None = getattr(self._inside, "spent", None)
            if outer is None and step != ELSE:
                return function(*args, **named)  # not in a thread that sends or receives
            self._inside.spent = Spent()
            cpu_s, wall_s = time.thread_time(), time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                whole = Spent(time.thread_time() - cpu_s, time.perf_counter() - wall_s)
                own = whole - self._inside.spent
                self._inside.spent = None if outer is None else outer + whole
                with self._lock:
                    self.spent[step] += own

        return clocked


@dataclass(frozen=True)
class SteppedShare(Share):
    """What one side says about a copy, with its steps."""

    steps: tuple[tuple[str, Spent], ...] = ()


def streams_of(copy: Copy) -> Streams:
    return Streams("sealed", copy.streams)


def copy_out(copy: Copy, seat: Seat) -> Share:
    """The source's side of a copy."""
    seat.memory.fill(copy.content)
    steps = Steps()
    with steps.clocked(SOURCE):
        share = trio.run(send_out, streams_of(copy), seat.memory, seat)
    return with_steps(share, steps)


def copy_in(copy: Copy, seat: Seat) -> Share:
    """The destination's side."""
    seat.memory.prepare(cold=False)
    steps = Steps()
    with steps.clocked(DESTINATION):
        share = trio.run(take_in, streams_of(copy), seat.memory, seat)
    return with_steps(share, steps)


def with_steps(share: Share, steps: Steps) -> SteppedShare:
    return SteppedShare(**vars(share), steps=tuple(steps.spent.items()))


def run_of(copies: TwoProcesses, copy: Copy, mib: int) -> dict[str, Any]:
    """Copy once. Raises: SystemExit when what arrived is not what was sent."""
    gib = mib * MIB / GIB
    source, destination = copies.run(copy)
    run = {**asdict(copy), "s_per_gib": seconds_of(source, destination) / gib}
    for side, share in (("source", source), ("destination", destination)):
        assert isinstance(share, SteppedShare)
        run[f"{side}_cpu_s_per_gib"] = share.cpu_s / gib
        run[side] = {
            step: {"cpu_s_per_gib": spent.cpu_s / gib, "waiting_s_per_gib": (spent.wall_s - spent.cpu_s) / gib}
            for step, spent in share.steps
        }
    return run


# --------------------------------------------------------------------------- what is reported


def medians_of(runs: Sequence[dict[str, Any]], side: str) -> dict[str, tuple[float, float]]:
    """By step: processor time and waiting."""
    return {
        step: (
            statistics.median(run[side][step]["cpu_s_per_gib"] for run in runs),
            statistics.median(run[side][step]["waiting_s_per_gib"] for run in runs),
        )
        for step in runs[0][side]
    }


def ratios_of(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The part of each step in the processor time of both ends' threads."""
    ratios: dict[str, float] = {}
    for content in dict.fromkeys(run["content"] for run in runs):
        mine = [run for run in runs if run["content"] == content]
        steps = {
            f"{side}: {step}": cpu_s
            for side in ("source", "destination")
            for step, (cpu_s, _) in medians_of(mine, side).items()
        }
        whole = sum(steps.values())
        ratios |= {f"{step} / both ends, {content}": round(cpu_s / whole, 3) for step, cpu_s in steps.items()}
    return ratios


def print_table(runs: Sequence[dict[str, Any]]) -> None:
    for content in dict.fromkeys(run["content"] for run in runs):
        mine = [run for run in runs if run["content"] == content]
        print(f"{content}: {statistics.median(run['s_per_gib'] for run in mine):.3f} s per GiB")
        for side in ("source", "destination"):
            whole = statistics.median(run[f"{side}_cpu_s_per_gib"] for run in mine)
            print(f"  {side:<14}{'CPU s per GiB':>16}{'waiting':>10}   (the whole process: {whole:.3f})")
            for step, (cpu_s, waiting_s) in medians_of(mine, side).items():
                print(f"    {step:<12}{cpu_s:16.3f}{waiting_s:10.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--mib", type=int, default=256, help="memory to copy (256)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (5)")
    parser.add_argument("--contents", default=",".join(CONTENTS[:2]), help=f"of {', '.join(CONTENTS)}")
    parser.add_argument("--streams", type=int, default=1, help="1: nobody but the other end to wait for")
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as directory,
        closing(TwoProcesses(arguments.mib, Path(directory) / "pki", copy_out, copy_in)) as copies,
    ):
        for number in range(arguments.rounds):
            for content in arguments.contents.split(","):
                run = run_of(copies, Copy(content, arguments.streams), arguments.mib)
                runs.append({**run, "round": number})
    if arguments.json:
        print(json.dumps({"name": "ram_steps", "ratios": ratios_of(runs), "runs": runs}))
    else:
        print(f"{arguments.mib} MiB, {arguments.rounds} rounds, streams: {arguments.streams}, {os.cpu_count()} CPUs")
        print_table(runs)


if __name__ == "__main__":
    main()
