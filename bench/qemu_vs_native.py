"""The same guest in QEMU, moved by QEMU's own migration and by ours: how long it takes, how long the guest is silent.

    python bench/qemu_vs_native.py [--json] [--mib N] [--reps N] [--workloads idle,dirty,heavy] [--downtime-ms 300,50]
    python bench/qemu_vs_native.py --modes native_tls,tracker_sealed_2,stream_sealed_2 --reps 9
    python bench/qemu_vs_native.py --aligned --populated --json | jq .ratios

Guests of the same machine and with the same work: one that QEMU's own migration moves, and one for each page source and
transport of ours. The modes take turns, and guests whose turn it is not are stopped. A guest has filled its RAM with
what nothing compresses, sends a letter each millisecond, and writes to 10 pages of 128 MiB (a quarter of RAM, when that
is less) each millisecond (dirty), to 30 (heavy), or to none (idle). QEMU's migration goes from one QEMU to another over
loopback. Ours goes between two daemons in processes of their own, told over their API.

native      QEMU's migration: one TCP connection, no limit of bandwidth, everything else as it is by default
native_tls  the same with TLS and certificates on both sides
native_multifd2, native_tls_multifd2
            the same with that many channels
tracker_sealed_1, tracker_sealed_2, tracker_tls_1, tracker_tls_2
            ours, over that bulk transport with so many streams; everything else as it is by default
stream_sealed_1, stream_sealed_2, stream_tls_1, stream_tls_2
            the same where QEMU itself has to tell what is written (no tracker in it)

Shown, medians:

total       from the command until the guest runs at the destination: for QEMU's from `migrate` to `completed` at the
            source and RESUME at the destination, for ours the record's `total_s`
bare        without what it takes to start the destination's QEMU: QEMU's is started before the command, so that its
            `total` never has it; ours is started by the command (subtracted is all that is no round and no pause)
whole       the other way about: with what it takes to start the destination's QEMU, whoever does it and when
arrived     from the command until the first letter at the destination; for ours, all requests to the API are in it
pause       the longest silence from the command until 100 letters after the first at the destination, as seen by a
            process that looks at both console files every 0.5 ms, whatever moves the guest; the longest of all in
            brackets. `told` is what QEMU or the record say; `steady` the silence that 99 of 100 are shorter than while
            nothing moves. Nothing is subtracted
handover    the silence between the last letter at the source and the first at the destination: what there is of the
            pause when the guest is not held up before, as QEMU does while it reads its dirty bitmap
CPU         seconds of both QEMUs without their virtual processors, and of both daemons, until all is done. Ours has the
            start of the destination's QEMU in it, and the hash of what stayed behind; QEMU's has neither
sent        as each tells it: pages with their headers, without TLS and without the state of devices
right       moves after which no letter was missing or came twice, and the guest found all of its memory as it had
            written it. When one of ours is not, the bench fails; QEMU's are counted. A move that ours calls off, since
            it cannot promise the pause that is wanted, is counted as not right

In `runs` of `--json` is more: the CPU seconds by process, the parts of our pause, and for how long at most the process
that looks was not run itself, by which pauses may be off (`blind_ms`).

How it could mislead. RAM of both ends is a memfd, and the destination's is cold: whoever moves the guest pays for the
first touch of each page (ours by having the kernel fill it). `--populated` adds QEMU's with RAM that was populated
before; for ours there is no such thing. TCG before QEMU 9.0 loses guest writes when RAM is a multiple of 256 KiB: so
QEMU's own migrations have 8 KiB less of it here, which costs them about 0.3 s for each GiB, and are right; `--aligned`
adds them as they are without (with `--downtime-ms 10`, 4 of 10 went wrong). The page source `stream` asks QEMU, too,
has the same RAM and pays the same; the tracker asks the kernel, and has whole MiB. Nothing is added or subtracted for
that. Ours sends pages that changed a little as what changed, by default, and this guest changes one byte of a page:
`--compression off` is without. Source, destination, both QEMUs and who watches share the processors of one machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import trio

from tools.bench_consoles import Heard, Watcher, open_watcher
from tools.bench_native import SHORT_BYTES, NativeGuest, NativeHost, NativeWay, open_native, plan_of
from tools.bench_qemu_site import NotMovedError, OurGuest, QemuPair, open_qemu_pair
from tools.faults.site import end_guests
from vmmigrate.hypervisor.dirty import probe_kernel_tracking
from vmmigrate.hypervisor.qemu import tracker
from vmmigrate.hypervisor.qemu.stress import VITALS_GPA, build_stress_guest, stress_append
from vmmigrate.memory import MIB
from vmmigrate.net.threads import open_group

NATIVE, NATIVE_TLS, BEST, STREAM = "native", "native_tls", "tracker_sealed_2", "stream_sealed_2"
OURS = tuple(f"{source}_{way}_{n}" for source in ("tracker", "stream") for way in ("sealed", "tls") for n in (1, 2))
MODES = (NATIVE, NATIVE_TLS, f"{NATIVE}_multifd2", f"{NATIVE_TLS}_multifd2", *OURS)
WORKLOADS = {"idle": 0, "dirty": 10, "heavy": 30}  # pages each millisecond
MOST_WS_MIB = 128
FREE_MIB = 4  # of RAM that is not filled
LETTERS_BEFORE, LETTERS_AFTER = 400, 100
WANTED = (
    ("total", BEST, NATIVE_TLS, 0.4),
    ("total", BEST, f"{NATIVE_TLS}_multifd2", 0.6),
    ("total", STREAM, NATIVE_TLS, 0.7),
    ("pause", BEST, NATIVE, 0.5),
    ("pause", BEST, NATIVE_TLS, 0.5),
)
FIGURES = {
    "total": "total_ms",
    "bare": "bare_ms",
    "whole": "whole_ms",
    "arrived": "arrived_ms",
    "pause": "gap_ms",
    "handover": "handover_ms",
    "CPU": "cpu_s",
}
LEAST_MIB, MOST_MIB = 16, 3000
MOST_PAUSE_MS = 60_000
QEMU = "qemu-system-x86_64"

_MODE = re.compile(
    r"native(?P<tls>_tls)?(?:_multifd(?P<channels>[1-8]))?(?P<aligned>_aligned)?(?P<populated>_populated)?"
    r"|(?P<source>tracker|stream)_(?P<transport>sealed|tls)_(?P<streams>[1-8])"
)


@dataclass(frozen=True)
class Mode:
    """A way to move a guest. `guest` names the one that is moved so: others may move it, too."""

    name: str
    native: NativeWay | None = None
    is_aligned: bool = False
    source: str = ""
    transport: str = ""
    streams: int = 0

    @property
    def pair(self) -> str:
        """Of daemons that it needs; empty for QEMU's own."""
        return f"{self.source}-{self.transport}" if self.source else ""

    @property
    def guest(self) -> str:
        return self.pair or ("native, aligned" if self.is_aligned else "native")


def mode_of(name: str) -> Mode:
    """Raises: ValueError."""
    match = _MODE.fullmatch(name)
    if match is None:
        raise ValueError(name)
    if match["transport"]:
        return Mode(name, source=match["source"], transport=match["transport"], streams=int(match["streams"]))
    way = NativeWay(bool(match["tls"]), bool(match["populated"]), int(match["channels"] or 0))
    return Mode(name, way, bool(match["aligned"]))


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    modes: Sequence[Mode]
    workloads: Sequence[str]
    mib: int
    reps: int
    downtimes_ms: Sequence[int]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ws_mib(self) -> int:
        return min(MOST_WS_MIB, self.mib // 4)

    @property
    def parts(self) -> list[tuple[str, int]]:
        """Workloads with the pause that is wanted."""
        return [(workload, downtime_ms) for workload in self.workloads for downtime_ms in self.downtimes_ms]

    def program(self, kernel: Path, workload: str) -> dict[str, Any]:
        append = stress_append(mem_mib=self.mib - FREE_MIB, ws_mib=self.ws_mib, rate=WORKLOADS[workload])
        return {"name": "kernel", "kernel": str(kernel), "append": append, "vitals_gpa": VITALS_GPA}


# --------------------------------------------------------------------------- one move


@dataclass
class Stage:
    """Where guests run: native QEMUs, and a pair of daemons for each page source and transport."""

    plan: Plan
    kernel: Path
    watcher: Watcher
    native: NativeHost
    pairs: dict[str, QemuPair]

    @property
    def facts(self) -> dict[str, Any]:
        """What is alike in all runs."""
        plan, version = self.plan, self.native.facts.version_text
        return {"mib": plan.mib, "ws_mib": plan.ws_mib, "qemu": version}

    async def boot(self, mode: Mode, workload: str) -> NativeGuest | OurGuest:
        """A guest that is ready, and stopped."""
        program = self.plan.program(self.kernel, workload)
        guest: NativeGuest | OurGuest
        if mode.native is None:
            short_bytes = SHORT_BYTES if self.native.loses_writes and mode.source == "stream" else 0
            guest = await OurGuest.boot(self.pairs[mode.pair], self.plan.mib, program, short_bytes=short_bytes)
        else:
            is_short = self.native.loses_writes and not mode.is_aligned
            guest = await NativeGuest.boot(self.native, plan_of(self.plan.mib, program), is_short=is_short)
        await guest.wait_ready()
        await guest.hold()
        return guest

    async def move(self, guest: NativeGuest | OurGuest, mode: Mode, downtime_ms: int) -> dict[str, Any]:
        """Move a guest that is stopped, so that it is stopped again; and what there is to say of it."""
        await guest.go_on()
        begun = time.monotonic()
        if isinstance(guest, NativeGuest):
            assert mode.native is not None
            await guest.prepare(mode.native)
        else:
            await guest.prepare({"streams": mode.streams, **self.plan.options})
        prepared_s = time.monotonic() - begun
        clocks = guest.clocks
        pids = [clock.pid for clock in clocks.values()]
        watch = await self.watcher.watch(guest.console, guest.destination, has_history=guest.has_history, pids=pids)
        with contextlib.closing(watch):
            await watch.wait_source(LETTERS_BEFORE)
            before_s = {name: clock.read() for name, clock in clocks.items()}
            watch.begin()
            try:
                told = await guest.move(downtime_ms=downtime_ms)
            except NotMovedError:
                await watch.give_up()
                raise
            await watch.wait_destination(LETTERS_AFTER)
            await guest.settle()
            heard, after_s = await watch.end()
        cpu_s = {name: after_s[clocks[name].pid] - seconds for name, seconds in before_s.items()}
        if "destination QEMU" not in cpu_s:
            cpu_s["destination QEMU"] = guest.clock.read()  # the move started it, so all it has taken is for the move
        wrong = "; ".join(filter(None, (heard.fault, await guest.check())))
        await guest.hold()
        told.setdefault("setup_ms", round(prepared_s * 1e3, 1))
        told |= sums(told, is_native=mode.native is not None) | spoken(heard)
        told |= {"cpu_s": round(sum(cpu_s.values()), 3), "cpu_parts_s": {k: round(s, 3) for k, s in cpu_s.items()}}
        return told | {"consistent": not wrong, "wrong": wrong}


def sums(told: dict[str, Any], *, is_native: bool) -> dict[str, float]:
    total_ms, setup_ms = told["total_ms"], told["setup_ms"]
    bare_ms, whole_ms = (total_ms, setup_ms + total_ms) if is_native else (total_ms - setup_ms, total_ms)
    return {"bare_ms": round(bare_ms, 1), "whole_ms": round(whole_ms, 1)}


def spoken(heard: Heard) -> dict[str, float]:
    return {name: value for name, value in asdict(heard).items() if name != "fault"}


async def runs_of(stage: Stage, workload: str, downtime_ms: int) -> AsyncIterator[dict[str, Any]]:
    """Every mode as often as is asked for, in turns.

    Raises: SystemExit: one of ours is not as it was.
    """
    plan, guests = stage.plan, dict[str, NativeGuest | OurGuest]()
    for rep in range(plan.reps):
        first = rep % len(plan.modes)
        for mode in (*plan.modes[first:], *plan.modes[:first]):
            if mode.guest not in guests:
                guests[mode.guest] = await stage.boot(mode, workload)
            where = {"mode": mode.name, "workload": workload, "wanted_pause_ms": downtime_ms, "rep": rep}
            try:
                run = await stage.move(guests[mode.guest], mode, downtime_ms)
            except NotMovedError as exc:
                await guests[mode.guest].hold()
                yield {**where, **stage.facts, "not_moved": str(exc)}
                continue
            yield {**where, **stage.facts, **run}
            if not run["consistent"]:
                if mode.native is None:
                    raise SystemExit(f"{mode.name}, {workload}: the guest is not as it was: {run['wrong']}")
                await guests.pop(mode.guest).end()  # it would never be right again
    for guest in guests.values():
        await guest.end()


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    """For everything; on leaving nothing runs there any more."""
    root = Path(tempfile.mkdtemp(prefix="vmm-bench-")).resolve()
    try:
        yield root
    finally:
        end_guests(root)
        shutil.rmtree(root)


@contextlib.asynccontextmanager
async def open_stage(plan: Plan, root: Path) -> AsyncIterator[Stage]:
    kernels = root / "kernels"
    kernels.mkdir()
    kernel = await trio.to_thread.run_sync(build_stress_guest, kernels)
    async with contextlib.AsyncExitStack() as stack:
        watcher = stack.enter_context(open_watcher())
        native = await stack.enter_async_context(open_native(root / "native"))
        pairs = {}
        for mode in {mode.pair: mode for mode in plan.modes if mode.pair}.values():
            pair = open_qemu_pair(root / mode.pair, kernels, mode.transport, tracks=mode.source == "tracker")
            pairs[mode.pair] = await stack.enter_async_context(pair)
        yield Stage(plan, kernel, watcher, native, pairs)


async def measure(plan: Plan, root: Path) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = []
    async with open_stage(plan, root) as stage:
        for workload, downtime_ms in plan.parts:
            async for run in runs_of(stage, workload, downtime_ms):
                runs.append(run)
                if "not_moved" in run:
                    print(
                        f"{workload}, {downtime_ms} ms, {run['mode']}, {run['rep']}: {run['not_moved']}",
                        file=sys.stderr,
                    )
                    continue
                right = "right" if run["consistent"] else run["wrong"]
                told = f"{run['total_ms']:.0f} ms, pause {run['gap_ms']:.1f} ms, {right}"
                print(f"{workload}, {downtime_ms} ms, {run['mode']}, {run['rep']}: {told}", file=sys.stderr)
    return runs


async def measure_unless_told_to_end(plan: Plan, root: Path) -> list[dict[str, Any]]:
    """Raises: SystemExit: a signal came; everything is ended in order then, too."""

    async def obey(scope: trio.CancelScope) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            async for _ in signals:
                scope.cancel()

    async with open_group() as group:
        group.start_soon(obey, group.cancel_scope)
        runs = await measure(plan, root)
        group.cancel_scope.cancel()
        return runs
    raise SystemExit("told to end")


# --------------------------------------------------------------------------- what is reported


Part = tuple[str, int]


def parts_of(runs: Sequence[dict[str, Any]]) -> list[Part]:
    return list(dict.fromkeys((run["workload"], run["wanted_pause_ms"]) for run in runs))


def chosen(runs: Sequence[dict[str, Any]], mode: str, part: Part) -> list[dict[str, Any]]:
    """Those that moved it."""
    mine = [run for run in of_part(runs, mode, part) if "not_moved" not in run]
    return sorted(mine, key=lambda run: run["rep"])


def of_part(runs: Sequence[dict[str, Any]], mode: str, part: Part) -> list[dict[str, Any]]:
    return [run for run in runs if (run["mode"], run["workload"], run["wanted_pause_ms"]) == (mode, *part)]


def ratio_of(runs: Sequence[dict[str, Any]], figure: str, mode: str, base: str, part: Part) -> float | None:
    """Median over neighbours in time."""
    theirs = {run["rep"]: run[figure] for run in chosen(runs, base, part)}
    ratios = [run[figure] / theirs[run["rep"]] for run in chosen(runs, mode, part) if run["rep"] in theirs]
    return round(statistics.median(ratios), 3) if ratios else None


def named(what: str, mode: str, base: str, part: Part) -> str:
    return f"{what} {mode} / {base}, {part[0]}, {part[1]} ms"


def ratios_of(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    modes = list(dict.fromkeys(run["mode"] for run in runs))
    found: dict[str, float] = {}
    for part in parts_of(runs):
        for mode in (mode for mode in modes if mode_of(mode).native is None):
            for base in (base for base in modes if mode_of(base).native is not None):
                for what, figure in FIGURES.items():
                    ratio = ratio_of(runs, figure, mode, base, part)
                    if ratio is not None:
                        found[named(what, mode, base, part)] = ratio
    return found


COLUMNS = {
    "total": 7,
    "/ native": 9,
    "/ native_tls": 13,
    "bare": 7,
    "whole": 7,
    "arrived": 8,
    "pause": 8,
    "": 10,
    "handover": 9,
    "told": 7,
    "steady": 7,
    "CPU s": 7,
    "sent MiB": 9,
    "rounds": 7,
    "right": 6,
}


def print_table(runs: Sequence[dict[str, Any]], plan: Plan) -> None:
    for workload, downtime_ms in plan.parts:
        writes = f"writes {WORKLOADS[workload]} pages each ms, of {plan.ws_mib} MiB"
        print(f"{workload} ({writes}; pause wanted {downtime_ms} ms)")
        print(" " * 26, *(f"{title:>{width}}" for title, width in COLUMNS.items()), sep="")
        for mode in plan.modes:
            cells = zip(cells_of(mode.name, (workload, downtime_ms), runs), COLUMNS.values(), strict=True)
            print(f"  {mode.name:24}", *(f"{cell:>{width}}" for cell, width in cells), sep="")


def cells_of(mode: str, part: Part, runs: Sequence[dict[str, Any]]) -> list[str]:
    mine, tried = chosen(runs, mode, part), len(of_part(runs, mode, part))
    if not mine:
        return ["-"] * (len(COLUMNS) - 1) + [f"0/{tried}"]

    def median(figure: str, digits: int = 0, unit: float = 1) -> str:
        return f"{statistics.median(run[figure] for run in mine) / unit:.{digits}f}"

    ratios = [ratio_of(runs, "total_ms", mode, base, part) for base in (NATIVE, NATIVE_TLS)]
    return [
        median("total_ms"),
        *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        *(median(figure) for figure in ("bare_ms", "whole_ms", "arrived_ms")),
        median("gap_ms", 1),
        f"({max(run['gap_ms'] for run in mine):.1f})",
        *(median(figure, 1) for figure in ("handover_ms", "told_pause_ms", "steady_p99_ms")),
        median("cpu_s", 2),
        median("sent_bytes", unit=MIB),
        median("rounds"),
        f"{sum(run['consistent'] for run in mine)}/{tried}",
    ]


def print_wanted(ratios: dict[str, float], parts: Sequence[Part]) -> None:
    for what, mode, base, most in WANTED:
        for part in parts:
            ratio = ratios.get(name := named(what, mode, base, part))
            if ratio is not None:
                print(f"{name}: {ratio:.2f}, wanted {most}: {'kept' if ratio <= most else 'missed'}")


def why_not() -> str:
    """Why nothing can be measured here; empty when it can."""
    if shutil.which(QEMU) is None:
        return f"{QEMU} is not installed"
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        return "there is no C compiler for the guest"
    return probe_kernel_tracking() if tracker.library() else "the tracker library was not built"


def read_plan() -> tuple[Plan, bool]:
    """From the command line; and whether JSON is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--mib", type=int, default=1024, help="RAM of the guest (1024)")
    parser.add_argument("--reps", type=int, default=3, help="moves of every mode with every workload (3)")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--modes", default=",".join(MODES), help=f"({','.join(MODES)})")
    parser.add_argument("--downtime-ms", default="300", help="the longest pause that is wanted, or several (300)")
    parser.add_argument("--compression", choices=("auto", "off"), default="auto", help="of ours, deltas included")
    parser.add_argument("--aligned", action="store_true", help="add QEMU's own as it is without the work-around")
    parser.add_argument("--populated", action="store_true", help="add QEMU's own into RAM that was populated before")
    arguments = parser.parse_args()
    names = [*arguments.modes.split(","), *(f"{name}_aligned" for name in (NATIVE, NATIVE_TLS) if arguments.aligned)]
    names += [f"{name}_populated" for name in (NATIVE, NATIVE_TLS) if arguments.populated]
    workloads = arguments.workloads.split(",")
    if unknown := set(workloads) - WORKLOADS.keys():
        parser.error(f"--workloads: {', '.join(sorted(unknown))}: allowed are {', '.join(WORKLOADS)}")
    if not LEAST_MIB <= arguments.mib <= MOST_MIB:
        parser.error(f"--mib: allowed are {LEAST_MIB} to {MOST_MIB}")
    try:
        modes = [mode_of(name) for name in dict.fromkeys(names)]
    except ValueError as exc:
        parser.error(f"--modes: {exc}: allowed are {', '.join(MODES)}, and what is told above")
    downtimes = arguments.downtime_ms.split(",")
    if not all(text.isdecimal() and 1 <= int(text) <= MOST_PAUSE_MS for text in downtimes):
        parser.error(f"--downtime-ms: allowed are 1 to {MOST_PAUSE_MS}, with commas between them")
    options = {"compression": "off", "delta_cache_mib": 0} if arguments.compression == "off" else {}
    return Plan(modes, workloads, arguments.mib, arguments.reps, list(map(int, downtimes)), options), arguments.json


def main() -> None:
    plan, wants_json = read_plan()
    if why := why_not():
        if wants_json:
            raise SystemExit(why)
        print(f"not measured: {why}")
        return
    with directory() as root:
        runs = trio.run(measure_unless_told_to_end, plan, root)
    ratios = ratios_of(runs)
    if wants_json:
        print(json.dumps({"name": "qemu_vs_native", "ratios": ratios, "runs": runs}))
    else:
        print(f"QEMU {runs[0]['qemu']}, {plan.mib} MiB, {plan.reps} moves of every mode, {os.cpu_count()} CPUs")
        print_table(runs, plan)
        print_wanted(ratios, plan.parts)


if __name__ == "__main__":
    main()
