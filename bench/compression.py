"""Whether compressing pays on links of several speeds, and what deltas save when pages are sent again.

    python bench/compression.py [--full] [--json] [--links 1,0] [--contents structs,resent] [--rounds N] [--mib N]
    python bench/compression.py --links 0.1,1,10 --contents structs --rounds 3
    python bench/compression.py --json | jq .ratios

Two processes with a memory file each and what a migration does between them: real door and hello, sealed transport, two
streams, digests, barriers. The speed of the link is the kernel's: SO_MAX_PACING_RATE on the sockets that send, half of
it for each stream, inherited from the listener, so nothing of ours knows of it. That it was kept is checked in every
run. In each round every contender copies the same memory once, so a ratio is taken between neighbours in time; reported
is the median of these ratios. After each copy the memory of both processes is compared, or the bench fails.

off         raw pages and runs of zeros only (`--compression off`)
on          zstd and deltas without asking whether they pay: what `auto` has to be as good as where that is better
auto, no cache
            zstd where it pays, decided by the product (`--compression auto --delta-cache-mib 0`)
auto        the same with a delta cache of 32 MiB, of which each stream has half: the default

incompressible
            random words: compressing is in vain
structs     of each 64 bytes 20 random, 44 the same everywhere: 3.1 to 1, quick to compress
text        made-up words, their frequency by Zipf's law: 3.1 to 1, slow to compress
resent      incompressible pages, sent once; then 64 bytes of each change (as in the embedded guest's pattern `sparse`)
            and all are sent again, 8 times, which is what is measured. The first of the 8 fills the cache.
resent-large
            the same with three times the pages that the cache holds

MiB/s count memory; `on the wire` is memory over what was sent for it. CPU seconds per GiB are of the whole process.

How it could mislead: both ends share this machine's processors, so that what is gained by compressing ends where they
are busy, sooner than on two hosts; the link has no delay and loses nothing; a stream cannot use what the other one
leaves of the link; "unlimited" is loopback, which is memory speed less what both ends compute. `auto` begins without
compressing until it knows the link (some 5 MiB per stream), which is a tenth of what is copied over the slowest link
here, and next to nothing of a large guest; `raw` tells how much. For 3:1 data the gain cannot be more than what `on the
wire` says. A few rounds on a busy machine do not tell 3 %: the span of all rounds stands beside each verdict, and CPU
seconds tell more than MiB/s.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import trio

from tools.bench_copies import (
    GIB,
    MIB,
    Seat,
    Share,
    Streams,
    TwoProcesses,
    median_ratio,
    ratios_by_round,
    seconds_of,
    send_out,
    take_in,
)
from vmmigrate.engine.limits import MigrationOptions
from vmmigrate.ram.encoding import RAW, WORDS, ZERO, ZSTD
from vmmigrate.ram.worth import Worth

DEFAULTS = MigrationOptions()
CACHE_BYTES = DEFAULTS.delta_cache_mib * MIB
CHANGES = 8
RESENT_MIB = 24  # fits the cache; a stream's share is enough to know the link by
PACING_SLACK = 1.1  # what a link may be faster than it was set,
BURST_BYTES = 256 << 10  # and what the kernel lets pass before it begins to hold two streams back
FAST_GBIT_S = 10.0


class Always(Worth):
    """Never asks whether it pays."""

    @property
    def is_dear(self) -> bool:
        return True

    def pays(self, way: str) -> bool:
        return True


@dataclass(frozen=True)
class Link:
    """An emulated link, and how much memory is copied over it, so that a copy takes some seconds at most.

    Attributes:
        gbit_s: 0: as fast as it can.
        rounds: With --full.
    """

    gbit_s: float
    mib: int
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.gbit_s:g} Gb/s" if self.gbit_s else "unlimited"

    @property
    def is_fast(self) -> bool:
        return self.gbit_s == 0 or self.gbit_s >= FAST_GBIT_S

    @property
    def bytes_per_s(self) -> int:
        return int(self.gbit_s * 1e9 / 8)


LINKS = (
    Link(0.1, 96, 2),
    Link(0.3, 192, 2),
    Link(1, 512, 3),
    Link(3, 512, 5),
    Link(10, 512, 9),
    Link(0, 512, 9),
)
SHORT_LINKS = (Link(1, 128, 3), Link(0, 256, 3))
SHORT_CONTENTS = ("incompressible", "structs", "resent")

PLAIN_CONTENTS = ("incompressible", "structs", "text")
RESENT_CONTENTS = ("resent", "resent-large")
CONTENTS = (*PLAIN_CONTENTS, *RESENT_CONTENTS)
OFF, ON, NO_CACHE, AUTO = "off", "on", "auto, no cache", "auto"

WAYS: dict[str, Callable[..., Streams]] = {
    OFF: partial(Streams, encodings=(RAW, ZERO)),
    ON: partial(Streams, encodings=WORDS, delta_cache_bytes=CACHE_BYTES, judge=Always),
    NO_CACHE: partial(Streams, encodings=(RAW, ZERO, ZSTD)),
    AUTO: partial(Streams, encodings=WORDS, delta_cache_bytes=CACHE_BYTES),
}


@dataclass(frozen=True)
class Copy:
    contender: str
    content: str
    link: Link
    mib: int

    @property
    def is_resent(self) -> bool:
        return self.content in RESENT_CONTENTS

    @property
    def streams(self) -> Streams:
        return WAYS[self.contender](
            transport="sealed",
            count=DEFAULTS.streams,
            link_bytes_per_s=self.link.bytes_per_s,
            changes=CHANGES if self.is_resent else 0,
        )


def copy_out(copy: Copy, seat: Seat) -> Share:
    """The source's side of a copy."""
    seat.memory.fill("incompressible" if copy.is_resent else copy.content)
    return trio.run(send_out, copy.streams, seat.memory.first(copy.mib), seat)


def copy_in(copy: Copy, seat: Seat) -> Share:
    """The destination's side."""
    memory = seat.memory.first(copy.mib)
    memory.prepare(cold=False)
    return trio.run(take_in, copy.streams, memory, seat)


def run_of(copies: TwoProcesses, copy: Copy) -> dict[str, Any]:
    """Copy once. Raises: SystemExit: what arrived is not what was sent, or the link was faster than it should be."""
    source, destination = copies.run(copy)
    seconds = seconds_of(source, destination)
    ram_bytes = copy.mib * MIB * max(copy.streams.changes, 1)
    most_bytes = copy.link.bytes_per_s * PACING_SLACK * seconds + BURST_BYTES
    if copy.link.bytes_per_s and source.sent_bytes > most_bytes:
        rate = source.sent_bytes * 8 / seconds / 1e9
        raise SystemExit(f"{copy}: this kernel did not hold the link to its speed: {rate:.2f} Gb/s")
    return {
        "contender": copy.contender,
        "content": copy.content,
        "link": copy.link.name,
        "mib": copy.mib,
        "seconds": round(seconds, 4),
        "mib_per_s": round(ram_bytes / MIB / seconds, 2),
        "link_mib_per_s": round(copy.link.bytes_per_s / MIB, 2),
        "wire_mib": round(source.sent_bytes / MIB, 3),
        "memory_per_wire": round(ram_bytes / source.sent_bytes, 3),
        "pages": source.pages,
        "source_cpu_s_per_gib": round(source.cpu_s / ram_bytes * GIB, 3),
        "destination_cpu_s_per_gib": round(destination.cpu_s / ram_bytes * GIB, 3),
    }


# --------------------------------------------------------------------------- what is measured


def contenders_for(content: str) -> tuple[str, ...]:
    return (OFF, ON, NO_CACHE, AUTO) if content in RESENT_CONTENTS else (OFF, ON, AUTO)


def size_of(content: str, link: Link, most: int) -> int:
    """MiB to copy."""
    wanted = {"resent": RESENT_MIB, "resent-large": 3 * DEFAULTS.delta_cache_mib}.get(content, link.mib)
    return min(wanted, most)


def measure(
    copies: TwoProcesses, links: Sequence[Link], contents: Sequence[str], rounds: int | None, most_mib: int
) -> Iterator[dict[str, Any]]:
    """Every other round goes the other way about, so that nobody is always the first."""
    for content in contents:
        for link in links:
            if content == "resent-large" and link.gbit_s not in (0, 1):
                continue  # minutes, to say what `resent` says
            for number in range(rounds or link.rounds):
                for contender in contenders_for(content)[:: -1 if number % 2 else 1]:
                    copy = Copy(contender, content, link, size_of(content, link, most_mib))
                    yield {**run_of(copies, copy), "round": number}


# --------------------------------------------------------------------------- what is reported


def is_of(contender: str, content: str, link: str) -> Callable[[dict[str, Any]], bool]:
    return lambda run: (run["contender"], run["content"], run["link"]) == (contender, content, link)


def median_of(runs: Sequence[dict[str, Any]], chosen: Callable[[dict[str, Any]], bool], what: str) -> float:
    return float(statistics.median(run[what] for run in runs if chosen(run)))


def places_of(runs: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Content and link of all runs."""
    return list(dict.fromkeys((run["content"], run["link"]) for run in runs))


def comparisons_of(runs: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Every ratio, round by round."""
    found: dict[str, list[float]] = {}
    for content, link in places_of(runs):
        off, on, no_cache, auto = (is_of(name, content, link) for name in (OFF, ON, NO_CACHE, AUTO))
        where, speeds = f"{content}, {link}", partial(ratios_by_round, runs, what="mib_per_s")
        better = max((off, on), key=lambda one: median_of(runs, one, "mib_per_s"))
        found[f"auto / off, {where}"] = speeds(auto, off)
        found[f"on / off, {where}"] = speeds(on, off)
        found[f"auto / better of off and on, {where}"] = speeds(auto, better)
        found[f"auto / auto, no cache, {where}"] = speeds(auto, no_cache)
        found[f"memory / wire, auto, {where}"] = [run["memory_per_wire"] for run in runs if auto(run)]
        found[f"off / link, {where}"] = [
            run["mib_per_s"] / run["link_mib_per_s"] for run in runs if off(run) and run["link_mib_per_s"]
        ]
        found[f"cpu, auto / off, {where}"] = ratios_by_round(runs, auto, off, "source_cpu_s_per_gib")
    return {name: ratios for name, ratios in found.items() if ratios}


def ratios_of(comparisons: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.median(ratios), 3) for name, ratios in comparisons.items()}


def wanted_of(name: str) -> float | None:
    """What a ratio should be at least."""
    fast = name.endswith(("10 Gb/s", "unlimited"))
    if name in ("auto / off, structs, 1 Gb/s", "auto / off, text, 1 Gb/s"):
        return 3.0
    if name.startswith("auto / better of") or (fast and name.startswith("auto / off, incompressible")):
        return 0.97
    if name.startswith("memory / wire, auto, resent, ") and not fast:
        return 5.0
    return None


def print_table(runs: Sequence[dict[str, Any]]) -> None:
    print(f"{'':28}{'MiB/s':>8}{'/ off':>8}{'on the wire':>13}{'raw':>7}   CPU s per GiB: source, destination")
    for content, link in places_of(runs):
        mine = [run for run in runs if (run["content"], run["link"]) == (content, link)]
        speed = f" ({mine[0]['link_mib_per_s']:.0f} MiB/s)" if mine[0]["link_mib_per_s"] else ""
        print(f"{content}, {mine[0]['mib']} MiB, {link}{speed}, {1 + max(run['round'] for run in mine)} rounds")
        for contender in contenders_for(content):
            chosen = is_of(contender, content, link)
            of = partial(median_of, mine, chosen)
            against = median_ratio(mine, chosen, is_of(OFF, content, link), "mib_per_s")
            raw = statistics.median(run["pages"]["raw"] / sum(run["pages"].values()) for run in mine if chosen(run))
            print(
                f"  {contender:<26}{of('mib_per_s'):8.0f}{against:8.2f}{of('memory_per_wire'):13.2f}{raw:7.0%}", end=""
            )
            print(f"   {of('source_cpu_s_per_gib'):.2f}, {of('destination_cpu_s_per_gib'):.2f}")


def print_verdicts(comparisons: dict[str, list[float]]) -> None:
    """What is wanted, beside what is, and how far its rounds are apart."""
    ratios = ratios_of(comparisons)
    for name, ratio in ratios.items():
        if (wanted := wanted_of(name)) is not None:
            verdict = "kept" if ratio >= wanted else "missed"
            span = f"{min(comparisons[name]):.3f} to {max(comparisons[name]):.3f}"
            print(f"{name:60}{ratio:7.3f} ({span})  wanted {wanted:4.2f}  {verdict}")


def link_of(text: str) -> Link:
    """Of one that is not in the table, the short one of 1 Gb/s tells how much is copied. Raises: ValueError."""
    speed = float(text)
    if not 0 <= speed < math.inf:
        raise ValueError(text)
    return next((link for link in LINKS if link.gbit_s == speed), replace(SHORT_LINKS[0], gbit_s=speed))


def links_of(text: str | None, full: bool) -> list[Link]:
    if text is None:
        return list(LINKS if full else SHORT_LINKS)
    return [link_of(speed) for speed in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--full", action="store_true", help="every link and content, a quarter of an hour")
    parser.add_argument("--links", default=None, help="Gb/s, 0 for unlimited (1,0; full: 0.1,0.3,1,3,10,0)")
    parser.add_argument("--contents", default=None, help=f"of {', '.join(CONTENTS)}")
    parser.add_argument("--rounds", type=int, default=None, help="rounds (3; full: 3 to 9)")
    parser.add_argument("--mib", type=int, default=512, help="memory to copy at most")
    arguments = parser.parse_args()
    contents = (arguments.contents or ",".join(CONTENTS if arguments.full else SHORT_CONTENTS)).split(",")
    if unknown := set(contents) - set(CONTENTS):
        parser.error(f"--contents: {', '.join(sorted(unknown))}: allowed are {', '.join(CONTENTS)}")
    try:
        links = links_of(arguments.links, arguments.full)
    except ValueError:
        parser.error(f"--links: {arguments.links}: wanted are numbers, Gb/s, with commas; 0 is unlimited")
    largest = max(size_of(content, link, arguments.mib) for content in contents for link in links)
    runs: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as directory,
        closing(TwoProcesses(largest, Path(directory) / "pki", copy_out, copy_in)) as copies,
    ):
        for run in measure(copies, links, contents, arguments.rounds, arguments.mib):
            runs.append(run)
            print(f"{run['content']}, {run['link']}, {run['contender']}: {run['seconds']} s", file=sys.stderr)
    comparisons = comparisons_of(runs)
    if arguments.json:
        print(json.dumps({"name": "compression", "ratios": ratios_of(comparisons), "runs": runs}))
    else:
        print(f"{DEFAULTS.streams} streams, {os.cpu_count()} CPUs")
        print_table(runs)
        print_verdicts(comparisons)


if __name__ == "__main__":
    main()
