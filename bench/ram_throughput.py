"""How fast guest RAM moves between two processes: raw TCP, the `ssl` module, and our transports, measured in turns.

    python bench/ram_throughput.py [--full] [--json] [--mib N] [--rounds N] [--contents A,B] [--contenders A,B]

Two processes with a memory file each, over loopback TCP. In each round every contender copies the same memory once, so
a ratio is taken between neighbours in time; reported is the median of these ratios. After each copy the memory of both
processes is compared, or the bench fails.

raw         blocking sockets, from mapped memory into mapped memory, nothing else; in pieces of the size that is the
            fastest of several here: the ceiling
ssl         the same through Python's `ssl` module, TLS 1.3 with certificates on both sides
seal-only   raw through the sealed transport's link, and nothing else: what sealing alone costs
tls, sealed what a migration does: real door, hello and streams, zero detection, a digest of every page at both ends,
            barriers; with 1, 2 and 4 streams
-populating
            the same, with memory populated beside the threads that receive, as a migration does it: into cold memory
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import trio

from tools.bench_copies import (
    GIB,
    HOST,
    MIB,
    Seat,
    Share,
    Stopwatch,
    Streams,
    TwoProcesses,
    median_ratio,
    seconds_of,
    send_out,
    session_of,
    take_in,
)
from vmmigrate.net.sealed import MAX_PART_BYTES, OpeningLink, PartKeys, SealingLink
from vmmigrate.net.tls import client_context, connect_blocking, server_context, tune_socket, wrap_blocking_server

PIECES = (256 << 10, 1 << 20, 4 << 20)
STALL_S = 30.0
CONTENTS = ("incompressible", "half-zero", "compressible")
PLAIN = ("raw", "ssl", "seal-only")
STREAMS = ("tls-1", "sealed-1", "sealed-2", "sealed-4")
POPULATING = "-populating"
CONTENDERS = (*PLAIN, *STREAMS, *(f"{contender}{POPULATING}" for contender in STREAMS[1:]))


@dataclass(frozen=True)
class Copy:
    """One copy of the memory. `piece_bytes` is for those of `PLAIN`."""

    contender: str
    content: str
    cold: bool
    piece_bytes: int = 1 << 20

    @property
    def transport(self) -> str:
        return self.contender if self.contender in PLAIN else self.contender.partition("-")[0]

    @property
    def streams(self) -> Streams:
        count = int(self.contender.removesuffix(POPULATING).partition("-")[2])
        return Streams(self.transport, count, populates=self.contender.endswith(POPULATING))


def copy_out(copy: Copy, seat: Seat) -> Share:
    """The source's side of a copy."""
    seat.memory.fill(copy.content)
    if copy.transport in PLAIN:
        return send_plainly(copy, seat)
    return trio.run(send_out, copy.streams, seat.memory, seat)


def copy_in(copy: Copy, seat: Seat) -> Share:
    """The destination's side."""
    seat.memory.prepare(copy.cold)
    if copy.transport in PLAIN:
        return receive_plainly(copy, seat)
    return trio.run(take_in, copy.streams, seat.memory, seat)


# --------------------------------------------------------------------------- raw and ssl


def send_plainly(copy: Copy, seat: Seat) -> Share:
    with ExitStack() as stack:
        listener = stack.enter_context(closing(socket.create_server((HOST, 0))))
        seat.line.send(listener.getsockname()[1])
        sock, _ = listener.accept()
        tune_socket(sock)
        if copy.transport == "ssl":
            sock, _ = wrap_blocking_server(sock, server_context(seat.files), 5)
        stack.enter_context(closing(sock))
        send = sock.sendall
        if copy.transport == "seal-only":
            link = stack.enter_context(closing(SealingLink(sock, PartKeys(session_of(), 0), "destination", STALL_S)))
            send = link.send
        ram = memoryview(seat.memory.mapping)
        watch = Stopwatch()
        for first in range(0, len(ram), copy.piece_bytes):
            send(ram[first : first + copy.piece_bytes])
        return watch.stop(seat.memory)


def receive_plainly(copy: Copy, seat: Seat) -> Share:
    port = seat.line.recv()
    if copy.transport == "ssl":
        sock, _ = connect_blocking(HOST, port, client_context(seat.files), None, 5)
    else:
        sock = socket.create_connection((HOST, port))
        tune_socket(sock)
    with ExitStack() as stack:
        stack.enter_context(closing(sock))
        receive_into = partial(receive_all, sock, 0 if copy.transport == "ssl" else socket.MSG_WAITALL)
        if copy.transport == "seal-only":
            link = stack.enter_context(closing(OpeningLink(sock, PartKeys(session_of(), 0), "source", STALL_S)))
            receive_into = link.receive_into
        ram = memoryview(seat.memory.mapping)
        watch = Stopwatch()
        for first in range(0, len(ram), copy.piece_bytes):
            receive_into(ram[first : first + copy.piece_bytes])
        return watch.stop(seat.memory)


def receive_all(sock: socket.socket, flags: int, target: memoryview) -> None:
    while target:
        received = sock.recv_into(target, 0, flags)
        if not received:
            raise ConnectionResetError("the source is gone")
        target = target[received:]


# --------------------------------------------------------------------------- runs


def run_of(copies: TwoProcesses, copy: Copy, mib: int) -> dict[str, Any]:
    """Copy once. Raises: SystemExit when what arrived is not what was sent."""
    source, destination = copies.run(copy)
    seconds, gib = seconds_of(source, destination), mib * MIB / GIB
    return {
        **asdict(copy),
        "seconds": round(seconds, 4),
        "gib_per_s": round(gib / seconds, 3),
        "source_cpu_s_per_gib": round(source.cpu_s / gib, 3),
        "destination_cpu_s_per_gib": round(destination.cpu_s / gib, 3),
    }


def fastest_piece(copies: TwoProcesses, mib: int) -> int:
    """The size of pieces with which plain sockets are fastest here: a peer that is compared with gets its best."""
    speeds: dict[int, list[float]] = {piece: [] for piece in PIECES}
    for _ in range(3):
        for piece in PIECES:
            speeds[piece].append(run_of(copies, Copy("raw", "incompressible", False, piece), mib)["gib_per_s"])
    return max(PIECES, key=lambda piece: statistics.median(speeds[piece]))


# --------------------------------------------------------------------------- what is reported


def kind_of(run: dict[str, Any]) -> str:
    return f"{run['content']}, {'cold' if run['cold'] else 'populated'}"


def is_of(contender: str, kind: str) -> Callable[[dict[str, Any]], bool]:
    return lambda run: run["contender"] == contender and kind_of(run) == kind


def ratios_of(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    ratios: dict[str, float] = {}
    for kind in dict.fromkeys(map(kind_of, runs)):
        for contender in CONTENDERS:
            for peer in ("raw", "ssl"):
                if contender != peer and (contender, peer) != ("raw", "ssl"):
                    ratios[f"{contender} / {peer}, {kind}"] = median_ratio(
                        runs, is_of(contender, kind), is_of(peer, kind)
                    )
    for kind in dict.fromkeys(map(kind_of, runs)):
        for contender in STREAMS:
            beside = f"{contender}{POPULATING}"
            ratios[f"{beside} / {contender}, {kind}"] = median_ratio(runs, is_of(beside, kind), is_of(contender, kind))
    for contender in STREAMS:
        full, half = is_of(contender, "incompressible, populated"), is_of(contender, "half-zero, populated")
        ratios[f"{contender}, half-zero / incompressible, populated"] = median_ratio(runs, half, full)
    return {name: ratio for name, ratio in ratios.items() if not math.isnan(ratio)}


def print_table(runs: Sequence[dict[str, Any]], ratios: dict[str, float]) -> None:
    print(f"{'':28}{'GiB/s':>8}{'/ raw':>8}{'/ ssl':>8}   CPU s per GiB: source, destination")
    for kind in dict.fromkeys(map(kind_of, runs)):
        print(kind)
        for contender in dict.fromkeys(run["contender"] for run in runs):
            mine = [run for run in runs if is_of(contender, kind)(run)]
            if not mine:
                continue
            medians = {
                name: statistics.median(run[name] for run in mine)
                for name in ("gib_per_s", "source_cpu_s_per_gib", "destination_cpu_s_per_gib")
            }
            shown = [ratios.get(f"{contender} / {peer}, {kind}") for peer in ("raw", "ssl")]
            columns = "".join(f"{'' if ratio is None else format(ratio, '.2f'):>8}" for ratio in shown)
            cpu = f"{medians['source_cpu_s_per_gib']:.2f}, {medians['destination_cpu_s_per_gib']:.2f}"
            print(f"  {contender:<26}{medians['gib_per_s']:8.2f}{columns}   {cpu}")
    for name, ratio in ratios.items():
        if "half-zero / " in name or f"{POPULATING} / sealed" in name:
            print(f"{name}: {ratio:.2f}")


def plan_of(arguments: argparse.Namespace) -> list[tuple[str, bool]]:
    """What is copied, into what."""
    contents = arguments.contents.split(",")
    if arguments.full:
        return [(content, cold) for content in contents for cold in (False, True)]
    return [(content, False) for content in contents] + [(contents[0], True)]


def is_asked(contender: str, cold: bool) -> bool:
    """Memory that is there needs no populating."""
    return cold or not contender.endswith(POPULATING)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--full", action="store_true", help="more rounds, memory, contents; else about a minute")
    parser.add_argument("--mib", type=int, default=None, help="memory to copy (256; full: 1024)")
    parser.add_argument("--rounds", type=int, default=None, help="rounds (3; full: 9)")
    parser.add_argument("--contents", default=None, help=f"of {', '.join(CONTENTS)}")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    arguments = parser.parse_args()
    arguments.contents = arguments.contents or ",".join(CONTENTS if arguments.full else CONTENTS[:2])
    mib = arguments.mib or (1024 if arguments.full else 256)
    rounds = arguments.rounds or (9 if arguments.full else 3)
    runs: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as directory,
        closing(TwoProcesses(mib, Path(directory) / "pki", copy_out, copy_in)) as copies,
    ):
        piece = fastest_piece(copies, mib)
        plan = plan_of(arguments)
        for number in range(rounds):
            for content, cold in plan:
                for contender in filter(partial(is_asked, cold=cold), arguments.contenders.split(",")):
                    size = MAX_PART_BYTES if contender == "seal-only" else piece
                    runs.append({**run_of(copies, Copy(contender, content, cold, size), mib), "round": number})
    ratios = ratios_of(runs)
    if arguments.json:
        print(json.dumps({"name": "ram_throughput", "ratios": ratios, "runs": runs}))
    else:
        print(f"{mib} MiB, {rounds} rounds, pieces of {piece >> 10} KiB for raw and ssl, {os.cpu_count()} CPUs")
        print_table(runs, ratios)


if __name__ == "__main__":
    main()
