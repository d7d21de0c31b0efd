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

GiB/s count all memory, zeros too. CPU seconds per GiB are of the whole process, user and system.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import trio

from vmmigrate.memory import PAGE_SIZE, PageBitmap, RamLayout, Region
from vmmigrate.net import pki
from vmmigrate.net.door import BulkDoor, open_streams
from vmmigrate.net.identity import Identity, Role
from vmmigrate.net.receiving import BulkDestination
from vmmigrate.net.sealed import MAX_PART_BYTES, OpeningLink, PartKeys, SealingLink
from vmmigrate.net.secrets import SessionContext, SessionSecrets
from vmmigrate.net.sending import BulkSource
from vmmigrate.net.threads import open_group
from vmmigrate.net.tls import (
    ServerCredentials,
    TlsFiles,
    bound_port,
    client_context,
    connect_blocking,
    open_listeners,
    server_context,
    tune_socket,
    wrap_blocking_server,
)
from vmmigrate.ram.digest import PageHash

HOST = "127.0.0.1"
DOMAIN = "bench.example"
HASH = PageHash(b"bench")
PIECES = (256 << 10, 1 << 20, 4 << 20)
GIB = 1 << 30
STALL_S = 30.0
CONTENTS = ("incompressible", "half-zero", "compressible")
PLAIN = ("raw", "ssl", "seal-only")
CONTENDERS = (*PLAIN, "tls-1", "sealed-1", "sealed-2", "sealed-4")


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
    def streams(self) -> int:
        return 1 if self.contender in PLAIN else int(self.contender.partition("-")[2])


@dataclass(frozen=True)
class Share:
    """What one side says about a copy: when it began and ended (one clock for both), what it cost, what it holds."""

    begun: float
    ended: float
    cpu_s: float
    checksum: int


class Memory:
    """A guest's RAM as both sides map it."""

    def __init__(self, mib: int) -> None:
        size = mib << 20
        fd = os.memfd_create("ram")
        os.ftruncate(fd, size)
        self.mapping = mmap.mmap(fd, size)
        os.close(fd)
        self.pages = np.frombuffer(self.mapping, dtype=np.uint64).reshape(-1, PAGE_SIZE // 8)
        self.layout = RamLayout([Region(0, size)])

    def fill(self, content: str) -> None:
        """Pages of which none is zero by chance, and no two are alike but for the zero ones."""
        random = np.random.default_rng(7)
        for first in range(0, len(self.pages), 256):
            step = self.pages[first : first + 256]
            step[:] = random.integers(1, 1 << 63, step.shape, dtype=np.uint64)
            if content == "half-zero":  # in runs of 64 KiB
                step.reshape(-1, 16, step.shape[1])[::2] = 0
            if content == "compressible":  # about 3 to 1
                step.reshape(len(step), -1, 8)[:, :, 3:] = 0x2020202020202020

    def prepare(self, cold: bool) -> None:
        """As a destination finds it: nothing there; or all of it populated, with zeros."""
        self.mapping.madvise(mmap.MADV_REMOVE)
        if not cold:
            self.pages[:] = 0

    def checksum(self) -> int:
        """Of all pages and their places."""
        digests = HASH.of(self.pages)
        return int((digests * np.arange(1, 1 + len(digests), dtype=np.uint64)).sum())


@contextmanager
def measured(memory: Memory) -> Iterator[list[Share]]:
    """Yields where the share will be, after the block."""
    shares: list[Share] = []
    cpu, begun = time.process_time(), time.monotonic()
    yield shares
    ended, spent = time.monotonic(), time.process_time() - cpu
    shares.append(Share(begun, ended, spent, memory.checksum()))


# --------------------------------------------------------------------------- raw and ssl


def copy_out(copy: Copy, memory: Memory, files: TlsFiles, say: Callable[[Any], None]) -> Share:
    """The source's side of a copy by plain sockets; *say* tells the port."""
    with ExitStack() as stack:
        listener = stack.enter_context(closing(socket.create_server((HOST, 0))))
        say(listener.getsockname()[1])
        sock, _ = listener.accept()
        tune_socket(sock)
        if copy.transport == "ssl":
            sock, _ = wrap_blocking_server(sock, server_context(files), 5)
        stack.enter_context(closing(sock))
        send = sock.sendall
        if copy.transport == "seal-only":
            link = stack.enter_context(closing(SealingLink(sock, PartKeys(session_of(), 0), "destination", STALL_S)))
            send = link.send
        ram = memoryview(memory.mapping)
        with measured(memory) as shares:
            for first in range(0, len(ram), copy.piece_bytes):
                send(ram[first : first + copy.piece_bytes])
    return shares[0]


def copy_in(copy: Copy, memory: Memory, files: TlsFiles, port: int) -> Share:
    """The destination's side."""
    memory.prepare(copy.cold)
    if copy.transport == "ssl":
        sock, _ = connect_blocking(HOST, port, client_context(files), None, 5)
    else:
        sock = socket.create_connection((HOST, port))
        tune_socket(sock)
    with ExitStack() as stack:
        stack.enter_context(closing(sock))
        receive_into = partial(receive_all, sock, 0 if copy.transport == "ssl" else socket.MSG_WAITALL)
        if copy.transport == "seal-only":
            link = stack.enter_context(closing(OpeningLink(sock, PartKeys(session_of(), 0), "source", STALL_S)))
            receive_into = link.receive_into
        ram = memoryview(memory.mapping)
        with measured(memory) as shares:
            for first in range(0, len(ram), copy.piece_bytes):
                receive_into(ram[first : first + copy.piece_bytes])
    return shares[0]


def receive_all(sock: socket.socket, flags: int, target: memoryview) -> None:
    while target:
        received = sock.recv_into(target, 0, flags)
        if not received:
            raise ConnectionResetError("the source is gone")
        target = target[received:]


# --------------------------------------------------------------------------- what a migration does


def session_of() -> SessionSecrets:
    context = SessionContext(1, "3dd63c0a-1599-48bd-a84f-2e419b205049", "bench", "source", "destination", 1)
    return SessionSecrets(context, bytes(32), bytes(range(32)))


def party(name: str) -> Identity:
    return Identity(DOMAIN, Role.HOST, name)


async def send_out(copy: Copy, memory: Memory, files: TlsFiles, say: Callable[[Any], None]) -> Share:
    door = BulkDoor(ServerCredentials(files).current)
    listeners = await open_listeners(HOST, 0)
    async with open_group() as nursery:
        nursery.start_soon(door.serve, listeners)
        with door.expect(session_of(), party("destination"), copy.streams, copy.transport) as appointment:
            say(bound_port(listeners))
            links = await door.collect(appointment)
        source = BulkSource(links, memory.layout, memory.pages, HASH)
        try:
            with measured(memory) as shares:
                sent = await source.send_round(PageBitmap.full(memory.layout.pages), 1, last=True)
        finally:
            source.close()
        assert sent.pages == memory.layout.pages
        nursery.cancel_scope.cancel()
    return shares[0]


async def take_in(copy: Copy, memory: Memory, files: TlsFiles, port: int) -> Share:
    memory.prepare(copy.cold)
    context = client_context(files)
    links = await open_streams(HOST, port, context, party("source"), session_of(), copy.streams, copy.transport)
    bulk = BulkDestination(links, memory.layout, memory.pages, HASH)
    try:
        with measured(memory) as shares:
            await bulk.receive_forever()
    finally:
        bulk.close()
    return shares[0]


# --------------------------------------------------------------------------- two processes


def source_process(orders: Connection, mib: int, files: TlsFiles) -> None:
    memory, filled = Memory(mib), ""
    while (copy := orders.recv()) is not None:
        if copy.content != filled:
            memory.fill(copy.content)
            filled = copy.content
        if copy.transport in PLAIN:
            orders.send(copy_out(copy, memory, files, orders.send))
        else:
            orders.send(trio.run(send_out, copy, memory, files, orders.send))


def destination_process(orders: Connection, mib: int, files: TlsFiles) -> None:
    memory = Memory(mib)
    while (order := orders.recv()) is not None:
        copy, port = order
        if copy.transport in PLAIN:
            orders.send(copy_in(copy, memory, files, port))
        else:
            orders.send(trio.run(take_in, copy, memory, files, port))


class Site:
    """Both processes, and what they show each other."""

    def __init__(self, mib: int, directory: Path) -> None:
        self._gib = (mib << 20) / GIB
        pki.init_authority(directory, DOMAIN)
        spawn = multiprocessing.get_context("spawn")
        self._orders: list[Connection] = []
        self._processes = []
        for name, target in (("source", source_process), ("destination", destination_process)):
            issued = pki.issue(directory, party(name), ip_addresses=[HOST])
            ours, theirs = spawn.Pipe()
            files = TlsFiles(issued.ca, issued.certificate, issued.key)
            process = spawn.Process(target=target, args=(theirs, mib, files))
            process.start()
            theirs.close()
            self._orders.append(ours)
            self._processes.append(process)

    def run(self, copy: Copy) -> dict[str, Any]:
        """Copy once. Raises: SystemExit when what arrived is not what was sent."""
        source, destination = self._orders
        source.send(copy)
        destination.send((copy, source.recv()))
        there, here = destination.recv(), source.recv()
        if here.checksum != there.checksum:
            raise SystemExit(f"{copy}: what arrived is not what was sent")
        seconds = there.ended - max(here.begun, there.begun)
        return {
            **asdict(copy),
            "seconds": round(seconds, 4),
            "gib_per_s": round(self._gib / seconds, 3),
            "source_cpu_s_per_gib": round(here.cpu_s / self._gib, 3),
            "destination_cpu_s_per_gib": round(there.cpu_s / self._gib, 3),
        }

    def close(self) -> None:
        for orders, process in zip(self._orders, self._processes, strict=True):
            orders.send(None)
            process.join(10)
            orders.close()


def fastest_piece(site: Site) -> int:
    """The size of pieces with which plain sockets are fastest here: a peer that is compared with gets its best."""
    speeds: dict[int, list[float]] = {piece: [] for piece in PIECES}
    for _ in range(3):
        for piece in PIECES:
            speeds[piece].append(site.run(Copy("raw", "incompressible", False, piece))["gib_per_s"])
    return max(PIECES, key=lambda piece: statistics.median(speeds[piece]))


# --------------------------------------------------------------------------- what is reported


def kind_of(run: dict[str, Any]) -> str:
    return f"{run['content']}, {'cold' if run['cold'] else 'populated'}"


def median_ratio(runs: Sequence[dict[str, Any]], one: Callable[[Any], bool], other: Callable[[Any], bool]) -> float:
    """The median, over rounds, of how much faster *one* is than *other* in the same round."""
    ours = {run["round"]: run["gib_per_s"] for run in runs if one(run)}
    theirs = {run["round"]: run["gib_per_s"] for run in runs if other(run)}
    both = sorted(ours.keys() & theirs.keys())
    return round(statistics.median(ours[n] / theirs[n] for n in both), 3) if both else math.nan


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
    for contender in CONTENDERS[len(PLAIN) :]:
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
        if "half-zero / " in name:
            print(f"{name}: {ratio:.2f}")


def plan_of(arguments: argparse.Namespace) -> list[tuple[str, bool]]:
    """What is copied, into what."""
    contents = arguments.contents.split(",")
    if arguments.full:
        return [(content, cold) for content in contents for cold in (False, True)]
    return [(content, False) for content in contents] + [(contents[0], True)]


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
    with tempfile.TemporaryDirectory() as directory, closing(Site(mib, Path(directory) / "pki")) as site:
        piece = fastest_piece(site)
        plan = plan_of(arguments)
        for number in range(rounds):
            for content, cold in plan:
                for contender in arguments.contenders.split(","):
                    size = MAX_PART_BYTES if contender == "seal-only" else piece
                    runs.append({**site.run(Copy(contender, content, cold, size)), "round": number})
    ratios = ratios_of(runs)
    if arguments.json:
        print(json.dumps({"name": "ram_throughput", "ratios": ratios, "runs": runs}))
    else:
        print(f"{mib} MiB, {rounds} rounds, pieces of {piece >> 10} KiB for raw and ssl, {os.cpu_count()} CPUs")
        print_table(runs, ratios)


if __name__ == "__main__":
    main()
