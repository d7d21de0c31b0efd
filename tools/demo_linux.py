"""A small Linux in QEMU under load is moved there and back, live, and tells whether it noticed.

    python -m tools.demo_linux [--json] [--mib N] [--working-set-mib N] [--moves N] [--page-source tracker|stream]

The guest (`tools.linux_guest`) writes to its disk and reads back, pings, sums up a large file in memory, and says a
number every 10 ms. Two daemons on this machine move it from one to the other and back. After each move it reads
everything anew (`check`); at the end every number must have come once, and no disk request, ping or sum have failed.

Exit status: 0 all of that holds; otherwise as that of `vmmigrate demo`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from tools.linux_guest import Guest, LinuxGuestError, build_guest
from vmmigrate.api.client import HostClient
from vmmigrate.cli.exits import Exit, exit_of_error, exit_of_outcome
from vmmigrate.cli.logs import configure_logs
from vmmigrate.cli.moving import Order, Record, start_move
from vmmigrate.cli.output import complain, print_error, print_json
from vmmigrate.demo import guest as shared
from vmmigrate.demo.heartbeat import Rhythm, Story, joined, rhythm
from vmmigrate.demo.qemu_guest import QEMU, check_qemu, machine, nic_of
from vmmigrate.demo.report import summary
from vmmigrate.demo.site import DESTINATION, SOURCE, Setting, Site
from vmmigrate.demo.stage import open_hosts, open_site, until_signal
from vmmigrate.demo.telling import Teller, make_teller
from vmmigrate.demo.watching import ConsoleWatch, watch_consoles
from vmmigrate.errors import HypervisorError, VmMigrateError
from vmmigrate.memory import MIB, PAGE_SIZE

BUILT: Final = Path(__file__).resolve().parent.parent / "build" / "linux-guest"
ROUTE: Final = (SOURCE, DESTINATION, SOURCE)
MOST_MOVES: Final = 1000
MOST_MIB, LEAST_MIB = 1024, 192
DISK_BYTES: Final = 64 * MIB
WORK: Final = ("disk", "ping", "sum")
_PACKAGE: Final = "qemu-system-x86"
_READY_DEADLINE_S: Final = 300.0
_LINE_DEADLINE_S: Final = 180.0
_POLL_S: Final = 0.1


# -- what the guest says -----------------------------------------------------------------------------------------------


@dataclass
class Said:
    """What a console holds, from READY on (the format is told in `tools.linux_guest`).

    Attributes:
        beats: The bytes that each complete a heartbeat's line.
        status: The counters that were told last.
        checks: The answers to `check`.
        problems: Numbers that are missing or came twice, and lines that no healthy guest says.
    """

    is_ready: bool = False
    beats: list[int] = field(default_factory=list)
    status: dict[str, int] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


_LINE: Final = re.compile(rb"[^\n]*\n")


def read_console(text: bytes) -> Said:
    """A line that is not whole yet is left for later."""
    said = Said()
    for match in _LINE.finditer(text):
        _hear(said, match[0].decode("ascii", "replace").rstrip("\r\n"), match.end() - 1)
    return said


def _hear(said: Said, line: str, last_byte: int) -> None:
    word, _, rest = line.partition(" ")
    if word == "FAULT":
        said.problems.append(line)
    elif not said.is_ready:
        said.is_ready = line == "READY"
    elif word == "HB" and rest.isdecimal():
        if int(rest) != len(said.beats) + 1 and not said.problems:
            said.problems.append(f"heartbeat {rest} came where {len(said.beats) + 1} should have")
        said.beats.append(last_byte)
    elif word == "STATUS":
        said.status = {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", rest)}
    elif word == "CHECK":
        said.checks.append(line)
    else:
        said.problems.append(f"the guest said {line!r}")


# -- what is looked at -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leg:
    """One move: its record, the guest's counters around it, and its answer to `check` afterwards."""

    origin: str
    target: str
    record: Record
    before: Mapping[str, int]
    after: Mapping[str, int]
    check: str

    def problems(self) -> Iterator[str]:
        named = f"{self.origin} to {self.target}"
        if self.record["outcome"] != "moved":
            error = self.record["error"] or {"message": "no reason is known"}
            yield f"{named}: {self.record['outcome']}: {error['message']}"
            return
        if self.check != "CHECK ok":
            yield f"{named}: {self.check}"
        for name in ("disk", "ping"):
            if self.after[f"{name}_ok"] <= self.before[f"{name}_ok"]:
                yield f"{named}: {name} stands still"
        yield from (f"{named}: {name} failed" for name in WORK if self.after[f"{name}_fail"])


def judged(legs: Sequence[Leg], story: Story, said: Said, seen: Rhythm) -> list[str]:
    """Everything that is not as it should be."""
    problems = [problem for leg in legs for problem in leg.problems()]
    problems += [*story.problems, *said.problems]
    if not problems and seen.hosts != (legs[0].origin, *(leg.target for leg in legs)):
        problems.append(f"it ran on {', '.join(seen.hosts)}")
    if not problems and said.status["sum_ok"] <= legs[0].before["sum_ok"]:
        problems.append("sum stands still")
    return problems


def document(size: Size, release: str, legs: Sequence[Leg], story: Story) -> dict[str, Any]:
    """The outcome, for programs."""
    said = read_console(story.text)
    seen = rhythm(story, said.beats)
    problems = judged(legs, story, said, seen)
    gaps = itertools.chain(seen.move_gaps_ms, itertools.repeat(0.0))
    return {
        "ok": not problems,
        "problems": problems,
        "kernel": release,
        "mib": size.mib,
        "working_set_mib": size.working_set_mib,
        "moves": [_leg_document(leg, gap) for leg, gap in zip(legs, gaps, strict=False)],
        "heartbeats": seen.heartbeats,
        "heartbeat_largest_gap_ms": seen.largest_gap_ms,
        "heartbeat_steady_p99_ms": seen.steady_p99_ms,
        "ran_on": list(seen.hosts),
        "counters": said.status,
    }


def _leg_document(leg: Leg, gap_ms: float) -> dict[str, Any]:
    return {
        "from": leg.origin,
        "to": leg.target,
        "heartbeat_gap_ms": gap_ms,
        "check": leg.check,
        "before": dict(leg.before),
        "after": dict(leg.after),
        "record": leg.record,
    }


def describe(outcome: Mapping[str, Any]) -> Iterator[str]:
    """The outcome, for people."""
    for move in outcome["moves"]:
        yield f"{move['from']} to {move['to']}"
        yield from (f"  {line}" for line in summary({**move["record"], "guest": None}, with_rounds=False).splitlines())
        yield f"  heartbeat   still for {move['heartbeat_gap_ms']:.1f} ms"
        for when in ("before", "after") if move["after"] else ():
            told = move[when]
            yield f"  {when:<11} " + ", ".join(f"{name} {told[f'{name}_ok']} right" for name in WORK)
        yield f"  {move['check'] or 'not checked'}"
    yield (
        f"heartbeat: {outcome['heartbeats']} numbers on {', then '.join(outcome['ran_on'])}, in steady state 99 % at"
        f" most {outcome['heartbeat_steady_p99_ms']:.1f} ms apart"
    )
    told = outcome["counters"]
    yield "in all: " + ", ".join(f"{name} {told[f'{name}_ok']} right, {told[f'{name}_fail']} failed" for name in WORK)
    if outcome["ok"]:
        yield "no number is missing or came twice, and nothing failed: the guest is whole"


# -- the demonstration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Of the guest: RAM, and the file in it of which the sum is checked again and again; and of the demonstration.

    Attributes:
        moves: There, back, there, …
        page_source: Who tells what the guest writes; `stream`: QEMU itself.
    """

    mib: int
    working_set_mib: int
    moves: int = 2
    page_source: str = "tracker"

    @property
    def ram_bytes(self) -> int:
        """QEMU before 9.0 sees all that a guest under TCG writes only when RAM is not a multiple of 256 KiB."""
        return self.mib * MIB - (2 * PAGE_SIZE if self.page_source == "stream" else 0)

    @property
    def route(self) -> tuple[str, ...]:
        return tuple(itertools.islice(itertools.cycle((SOURCE, DESTINATION)), self.moves + 1))


@dataclass(frozen=True)
class Stage:
    """A guest that runs, and who can be asked about it."""

    clients: Mapping[str, HostClient]
    console: ConsoleWatch
    teller: Teller

    def said(self) -> Said:
        return read_console(joined(self.console.outputs()).text)

    async def wait(self, what: str, holds: Callable[[Said], bool], deadline_s: float = _LINE_DEADLINE_S) -> Said:
        """What was said, once *holds* is true of it. Raises: HypervisorError `guest_unresponsive`, `guest_faulty`."""
        with trio.move_on_after(deadline_s):
            while True:
                said = self.said()
                if said.problems:
                    raise HypervisorError(f"waiting for {what}: {said.problems[0]}", code="guest_faulty")
                if holds(said):
                    return said
                await trio.sleep(_POLL_S)
        raise HypervisorError(f"no {what} within {deadline_s:g} s", code="guest_unresponsive")

    async def check(self, host: str) -> str:
        """The guest's answer: all of its file and of its disk, read anew."""
        asked = len(self.said().checks)
        await self.clients[host].post(f"/v1/instances/{shared.INSTANCE}/console", {"port": "com1", "text": "check\n"})
        return (await self.wait("answer to check", lambda said: len(said.checks) > asked)).checks[asked]


async def demonstrate(size: Size, linux: Guest, teller: Teller) -> dict[str, Any]:
    """There and back; the outcome."""
    paths = json.dumps(["guest", str(linux.kernel.parent.resolve())])
    tracker = f"tracker = {str(size.page_source == 'tracker').lower()}"
    setting = Setting(QEMU.hypervisor, allow=f"paths = {paths}", sections=f"{QEMU.sections}\n{tracker}")
    legs: list[Leg] = []
    async with open_site(setting) as site, open_hosts(site, teller.say) as (source, destination):
        await trio.to_thread.run_sync(_make_disk, site)
        runtimes = {host: site.runtime(host) for host in (SOURCE, DESTINATION)}
        async with watch_consoles(runtimes, "com1") as console:
            stage = Stage({SOURCE: source, DESTINATION: destination}, console, teller)
            teller.say(f"booting Linux {linux.release} with {size.mib} MiB of RAM at {source.url}")
            await source.post("/v1/instances", _request(size, linux, site))
            await stage.wait("READY", lambda said: said.is_ready, _READY_DEADLINE_S)
            teller.say(f"it is up; waiting until disk, ping and a sum of {size.working_set_mib} MiB went well once")
            await stage.wait("work", lambda said: all(said.status.get(f"{name}_ok") for name in WORK))
            for origin, target in itertools.pairwise(size.route):
                legs.append(await _move(stage, origin, target))
                if legs[-1].record["outcome"] != "moved":
                    return document(size, linux.release, legs, joined(console.outputs()))
            summed = legs[0].before["sum_ok"]
            await stage.wait("sum after the moves", lambda said: said.status["sum_ok"] > summed)
            return document(size, linux.release, legs, joined(console.outputs()))


async def _move(stage: Stage, origin: str, target: str) -> Leg:
    stage.teller.say(f"moving it from {origin} to {target} while it runs")
    before = stage.said().status
    order = Order(instance_id=shared.INSTANCE, replacements=nic_of(target))
    move = await start_move(stage.clients[origin], stage.clients[target], order)
    with stage.teller.progress() as on_progress:
        record = await move.wait_outcome(on_progress)
    if record["outcome"] != "moved":
        return Leg(origin, target, record, before, {}, "")
    stage.teller.say("letting it work there, then check itself")
    arrived = stage.said().status
    await stage.wait("work", lambda said: all(said.status[f"{n}_ok"] >= arrived[f"{n}_ok"] + 3 for n in WORK[:2]))
    answer = await stage.check(target)
    told = stage.said().status["hb"]
    after = await stage.wait("counters", lambda said: said.status["hb"] > told)
    return Leg(origin, target, record, before, after.status, answer)


def _request(size: Size, linux: Guest, site: Site) -> dict[str, Any]:
    program = {
        "name": "kernel",
        "kernel": str(linux.kernel.resolve()),
        "initrd": str(linux.initrd.resolve()),
        "append": f"console=ttyS0 quiet panic=-1 vmm.ws={size.working_set_mib} vmm.disk=1 vmm.ping=1",
    }
    return {
        "id": shared.INSTANCE,
        "name": "linux",
        "spec_version": "v3",
        "spec": machine(size.mib, str(_disk(site))),
        "program": program,
        "overrides": {"ram_bytes": size.ram_bytes},
        "start": True,
    }


def _disk(site: Site) -> Path:
    return site.guest / "disk.img"


def _make_disk(site: Site) -> None:
    with open(_disk(site), "wb") as disk:
        disk.truncate(DISK_BYTES)


# -- getting ready -----------------------------------------------------------------------------------------------------


def install_qemu(teller: Teller) -> None:
    """Through apt, as root. Raises: HypervisorError: what is missing and what would help."""
    try:
        check_qemu()
    except HypervisorError as exc:
        if exc.code != "qemu_missing" or os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise
        teller.say(f"installing {_PACKAGE}")
        command = ["apt-get", "install", "-y", "--no-install-recommends", _PACKAGE]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1]
            raise HypervisorError(f"{exc.text}, which failed: {said}", code=exc.code) from None
        check_qemu()


def built(output: Path) -> Guest:
    """The guest's kernel and files. Raises: HypervisorError: they are neither here nor can be fetched."""
    try:
        return build_guest(output)
    except (LinuxGuestError, OSError) as exc:
        raise HypervisorError(str(exc), code="no_linux_guest") from exc


def default_mib() -> int:
    """A quarter of what the host has left: two QEMUs have the guest's RAM at a time, and the host has other work."""
    left = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return max(LEAST_MIB, min(MOST_MIB, int(left[1]) // 1024 // 4 if left else MOST_MIB))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_linux", description="Move a Linux guest and back.")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, and nothing else")
    parser.add_argument("--mib", type=int, help=f"RAM of the guest (default: {MOST_MIB}, less on a small host)")
    parser.add_argument("--working-set-mib", type=int, metavar="MIB", help="of it, summed up (default: a quarter)")
    parser.add_argument("--moves", type=int, default=len(ROUTE) - 1, help="there, back, there, … (default: 2)")
    parser.add_argument(
        "--page-source", choices=["tracker", "stream"], default="tracker", help="stream: QEMU tells what is written"
    )
    parser.add_argument("--output", type=Path, default=BUILT, metavar="DIR", help="where kernel and initrd are kept")
    chosen = parser.parse_args(arguments)
    chosen.mib = chosen.mib or default_mib()
    chosen.working_set_mib = chosen.working_set_mib or chosen.mib // 4
    if chosen.mib < LEAST_MIB or not 0 < chosen.working_set_mib <= chosen.mib - 128:
        parser.error(f"--mib is at least {LEAST_MIB}, and the working set at least 128 smaller")
    if not 1 <= chosen.moves <= MOST_MOVES:
        parser.error(f"--moves: allowed are 1 to {MOST_MOVES}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    configure_logs("error")
    teller = make_teller(chosen.json)
    try:
        install_qemu(teller)
        linux = built(chosen.output)
        size = Size(chosen.mib, chosen.working_set_mib, chosen.moves, chosen.page_source)
        outcome = trio.run(until_signal, partial(demonstrate, size, linux, teller))
    except VmMigrateError as error:
        print_error(error, as_json=chosen.json)
        return exit_of_error(error)
    if chosen.json:
        print_json(outcome)
    else:
        print(*describe(outcome), sep="\n", flush=True)
    return _exit_of(outcome)


def _exit_of(outcome: Mapping[str, Any]) -> int:
    if outcome["ok"]:
        return Exit.OK
    complain("; ".join(outcome["problems"]))
    return exit_of_outcome(outcome["moves"][-1]["record"]["outcome"]) or Exit.FAILED


if __name__ == "__main__":
    sys.exit(main())
