"""Whether every promise was kept: one owner at any time, a guest that is whole, the truth told, nothing left over."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio

from tools.faults.leaks import leftover_files, more_than
from tools.faults.pair import Pair
from tools.faults.site import HostProcess, guest_pids
from vmmigrate.errors import VmMigrateError
from vmmigrate.hypervisor.embedded.witness import read_witnesses
from vmmigrate.hypervisor.intervals import Interval, check_single_owner
from vmmigrate.hypervisor.qemu.witness import read_consoles

# What follows the last word (a process that ends, a record that is written, a connection that closes) may take a while.
AFTERMATH_S = 10.0
_POLL_S = 0.02
_BEATS = 20

# How a migration may be said to have ended, by who owns the guest now.
_OUTCOMES = {
    "source": frozenset({"refused", "failed", "cancelled", "timed_out"}),
    "destination": frozenset({"moved"}),
    None: frozenset({"guest_lost", "moved"}),
}


@dataclass(frozen=True)
class Verdict:
    """What was found. `problems` is empty when every promise was kept; `owner` is the host that runs the guest."""

    owner: str | None
    outcome: str
    problems: tuple[str, ...]


async def judge(
    pair: Pair, instance: str, migration: str, victim: str | None, *, aftermath_s: float = AFTERMATH_S
) -> Verdict:
    """Judge, then delete the guest wherever it is, and look for what is left.

    Args:
        victim: The host (by its part) whose guest process was killed on purpose: only then a guest may be lost, and
            only if it ran there last.
    """
    verdict = await judge_living(pair, instance, migration, victim, aftermath_s=aftermath_s)
    left = await clean(pair, instance, aftermath_s=aftermath_s)
    return Verdict(verdict.owner, verdict.outcome, (*verdict.problems, *left))


async def judge_living(
    pair: Pair, instance: str, migration: str, victim: str | None, *, aftermath_s: float = AFTERMATH_S
) -> Verdict:
    """Judge what can be judged while the guest lives on."""
    states = {name: await state_of(host, instance) for name, host in pair.hosts.items()}
    running = [name for name, state in states.items() if state == "running"]
    owner = running[0] if len(running) == 1 else None
    kept = pair.site.root / "witness"
    lived = check_single_owner([*read_witnesses(kept, instance), *read_consoles(kept, instance)])
    problems = [*lived.problems, *_check_owner(pair, states, running, lived.intervals, victim)]
    for name in running:
        problems += await _check_guest(pair.hosts[name], instance)
    problems += await _once(aftermath_s, lambda: _check_processes(pair, len(running)))
    problems += await _once(aftermath_s, lambda: _check_outcomes(pair, migration, owner))
    return Verdict(owner, await outcome_of(pair.hosts["source"], migration), tuple(problems))


async def clean(pair: Pair, instance: str, *, aftermath_s: float = AFTERMATH_S) -> Sequence[str]:
    """Delete the guest on every host, and say what is left."""
    for host in pair.hosts.values():
        with contextlib.suppress(VmMigrateError):
            await host.client.delete(f"/v1/instances/{instance}")
    return await _once(aftermath_s, lambda: _check_leaks(pair))


async def state_of(host: HostProcess, instance: str) -> str:
    """What the host says of the instance; `absent` when it knows none."""
    try:
        return str((await host.instance(instance))["state"])
    except VmMigrateError as exc:
        if exc.code == "unknown_instance":
            return "absent"
        raise


async def outcome_of(host: HostProcess, migration: str) -> str:
    """How the host says that the migration ended; the code of the error when it says nothing."""
    try:
        return str((await host.record(migration))["outcome"])
    except VmMigrateError as exc:
        return exc.code


async def _once(aftermath_s: float, check: Callable[[], Awaitable[Sequence[str]]]) -> Sequence[str]:
    """The problems that *check* still finds after the aftermath. A look that was begun is made to its end: one that is
    called off has found nothing, and that would pass for nothing to find."""
    until = trio.current_time() + aftermath_s
    while (problems := await check()) and trio.current_time() < until:
        await trio.sleep(_POLL_S)
    return problems


def _check_owner(
    pair: Pair, states: dict[str, str], running: Sequence[str], lived: Sequence[Interval], victim: str | None
) -> list[str]:
    may_be_lost = victim is not None and bool(lived) and lived[-1].host_id == pair.hosts[victim].name
    if len(running) == 1 and "lost" not in states.values():
        return []
    if may_be_lost and not running and states[victim or ""] == "lost":
        return []
    return [f"not exactly one owner: {states}"]


async def _check_guest(host: HostProcess, instance: str) -> list[str]:
    """Let the guest live a little, then hear its own verdict on its memory."""
    before = (await host.instance(instance))["guest"]["heartbeats"]
    with trio.move_on_after(AFTERMATH_S):
        while (await host.instance(instance))["guest"]["heartbeats"] < before + _BEATS:
            await trio.sleep(_POLL_S)
    check = await host.client.post(f"/v1/instances/{instance}:check")
    beats = (await host.instance(instance))["guest"]["heartbeats"]
    problems = [] if check["consistent"] else [f"the guest is inconsistent: {check['reason']}"]
    return problems if beats >= before + _BEATS else [*problems, "the guest's heart does not beat"]


async def _check_processes(pair: Pair, owners: int) -> list[str]:
    pids = guest_pids(pair.site.root)
    return [] if len(pids) == owners else [f"{len(pids)} guest processes for {owners} owners"]


async def _check_outcomes(pair: Pair, migration: str, owner: str | None) -> list[str]:
    """The source's record tells what is true; the destination's, if there is one, does not contradict it."""
    source = await outcome_of(pair.hosts["source"], migration)
    destination = await outcome_of(pair.hosts["destination"], migration)
    problems = [] if source in _OUTCOMES[owner] else [f"the source says {source}, the owner is {owner or 'nobody'}"]
    lost_there = (source, destination) == ("moved", "guest_lost")
    if destination != "unknown_migration" and (destination == "moved") is not (source == "moved") and not lost_there:
        problems.append(f"the source says {source}, the destination {destination}")
    return problems


async def _check_leaks(pair: Pair) -> list[str]:
    """The guest is deleted on both hosts: no process, descriptor, file or ticket of it is left."""
    problems = [f"guest process {pid} is left over" for pid in guest_pids(pair.site.root)]
    for name, host in pair.hosts.items():
        problems += [f"{name}: {text}" for text in more_than(pair.descriptors(name), pair.at_rest[name])]
        states = {shown["id"]: shown["state"] for shown in await host.client.get("/v1/instances")}
        problems += leftover_files(host.state, host.runtime, states)
        problems += [f"{name}: a {state} instance is left over" for state in states.values() if state != "elsewhere"]
        waiting = [shown for shown in await host.client.get("/v1/migrations") if shown["state"] == "awaiting_peer"]
        problems += [f"{name}: the ticket of {shown['migration_id']} is left over" for shown in waiting]
    return problems
