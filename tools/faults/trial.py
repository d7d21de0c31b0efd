"""One trial: a guest, a migration, one fault at one boundary, both daemons back, and a verdict by witnesses."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import trio

from tools.faults.relay import Boundary, Damage, Relay, Side
from tools.faults.site import HostProcess, Site, guest_pids, port_of
from vmmigrate.errors import VmMigrateError
from vmmigrate.hypervisor.embedded.witness import Interval, check_single_owner, read_witness

SETTLE_DEADLINE_S = 60.0
STOPPED_S = 5.0


class Fault(StrEnum):
    """What strikes. The first four hit processes, the others the wire."""

    KILL_SOURCE = "kill_source"
    KILL_DESTINATION = "kill_destination"
    KILL_GUEST = "kill_guest"
    STOP_SOURCE = "stop_source"
    CUT = "cut"
    HALF_CUT = "half_cut"
    STALL = "stall"
    DUPLICATE = "duplicate"
    TRUNCATE = "truncate"
    CORRUPT = "corrupt"


SHORT = (Fault.KILL_SOURCE, Fault.KILL_DESTINATION, Fault.KILL_GUEST, Fault.CUT)
_DAMAGE = {fault: Damage(fault.value) for fault in Fault if fault.value in set(Damage)}


@dataclass(frozen=True)
class Verdict:
    """How a trial ended. `problems` is empty when every promise was kept."""

    fault: Fault
    boundary: Boundary | None
    reached: bool
    outcome: str
    owner: str | None
    problems: tuple[str, ...] = ()


@dataclass
class Pair:
    """The two hosts of a trial, restarted as needed, so that most trials need no new processes."""

    site: Site
    hosts: dict[str, HostProcess] = field(default_factory=dict)

    async def start(self) -> None:
        for name in ("source", "destination"):
            self.hosts[name] = await self.site.start(name)

    async def restart_dead(self) -> None:
        for name, host in self.hosts.items():
            if host.process.returncode is not None:
                self.hosts[name] = await self.site.start(name)


async def run_trial(pair: Pair, fault: Fault, boundary: Boundary | None) -> tuple[Verdict, Mapping[Side, int]]:
    """Migrate a fresh guest and strike at *boundary* (None: never). Also how many records each side sent."""
    source = pair.hosts["source"]
    instance = await _create(source)
    pid = (await source.instance(instance))["guest"]["pid"]
    damage = _DAMAGE.get(fault, Damage.NONE)
    relay = Relay(port_of(source.config, "migration"), boundary, damage, lambda: _strike(pair, fault, pid))
    async with trio.open_nursery() as nursery:
        port = await nursery.start(relay.serve)
        migration = await _begin(pair, instance, port)
        with contextlib.suppress(trio.TooSlowError):
            await _wait_settled(pair, migration, instance)
        verdict = await _judge(pair, fault, boundary, relay.struck.is_set(), instance, migration)
        await _clean(pair, instance)
        nursery.cancel_scope.cancel()
    return verdict, dict(relay.records)


async def _strike(pair: Pair, fault: Fault, guest_pid: int) -> None:
    if fault is Fault.KILL_SOURCE:
        await pair.hosts["source"].kill()
    elif fault is Fault.KILL_DESTINATION:
        await pair.hosts["destination"].kill()
    elif fault is Fault.KILL_GUEST:
        with contextlib.suppress(ProcessLookupError):
            os.kill(guest_pid, signal.SIGKILL)
    elif fault is Fault.STOP_SOURCE:
        process = pair.hosts["source"].process
        process.send_signal(signal.SIGSTOP)
        await trio.sleep(STOPPED_S)
        process.send_signal(signal.SIGCONT)


async def _begin(pair: Pair, instance: str, port: int) -> str:
    """Start the migration through the relay; a host that dies before it answers is a fault like any other."""
    source, destination = pair.hosts["source"], pair.hosts["destination"]
    ticket = await source.client.post(
        f"/v1/instances/{instance}:migrate-out",
        {"destination_host": destination.name, "verify": "full", "timeout_s": 45.0},
    )
    ticket.pop("expires_at_s")
    with contextlib.suppress(VmMigrateError):
        await destination.client.post("/v1/migrations:migrate-in", {**ticket, "source_address": f"127.0.0.1:{port}"})
    return str(ticket["migration_id"])


async def _wait_settled(pair: Pair, migration: str, instance: str) -> None:
    """Until nobody is busy with the migration any more, both daemons being up.

    Raises: trio.TooSlowError: the judge then says what still is not as it must be.
    """
    with trio.fail_after(SETTLE_DEADLINE_S):
        while True:
            await pair.restart_dead()
            if await _is_settled(pair, migration, instance):
                return
            await trio.sleep(0.05)


async def _is_settled(pair: Pair, migration: str, instance: str) -> bool:
    try:
        sides = [await host.client.get(f"/v1/migrations/{migration}/side") for host in pair.hosts.values()]
        states = [await _state(host, instance) for host in pair.hosts.values()]
    except VmMigrateError:
        return False  # it died just now
    outgoing, incoming = sides[0]["outgoing"], sides[1]["incoming"]
    if outgoing == "awaiting_peer" and incoming in {None, "abandoned"}:
        # The destination never got as far as the ticket. Whoever started the migration calls it off then.
        with contextlib.suppress(VmMigrateError):
            await pair.hosts["source"].client.post(f"/v1/migrations/{migration}:cancel")
    return (
        outgoing not in {"awaiting_peer", "active", "pausing", "released"}
        and incoming not in {"reserved", "prepared", "acquired"}
        and not {"in_doubt", "migrating", "arriving", "acquired"} & set(states)
    )


async def _state(host: HostProcess, instance: str) -> str:
    """What the host says of the instance; `absent` when it knows none."""
    try:
        return str((await host.instance(instance))["state"])
    except VmMigrateError as exc:
        if exc.code == "unknown_instance":
            return "absent"
        raise


# A guest may be lost only when its own process was killed while it was the guest's only copy.
_MAY_LOSE_GUEST = frozenset({Fault.KILL_GUEST})


async def _judge(
    pair: Pair, fault: Fault, boundary: Boundary | None, reached: bool, instance: str, migration: str
) -> Verdict:
    """Whether every promise was kept: one owner, guest alive and consistent, nothing left over."""
    states = {name: await _state(host, instance) for name, host in pair.hosts.items()}
    running = [name for name, state in states.items() if state == "running"]
    problems: list[str] = []
    if len(running) != 1 and not (fault in _MAY_LOSE_GUEST and not running and "lost" in states.values()):
        problems.append(f"not exactly one owner: {states}")
    if fault not in _MAY_LOSE_GUEST and "lost" in states.values():
        problems.append(f"the guest is lost: {states}")
    for name in running:
        problems += await _check_guest(pair.hosts[name], instance)
    owners = check_single_owner(_intervals(pair.site.root, instance))
    problems += owners.problems
    pids = guest_pids(pair.site.root)
    if len(pids) != len(running):
        problems.append(f"{len(pids)} guest processes for {len(running)} owners")
    outcome = await _outcome(pair.hosts["source"], migration)
    return Verdict(fault, boundary, reached, outcome, running[0] if running else None, tuple(problems))


async def _check_guest(host: HostProcess, instance: str) -> list[str]:
    """Let the guest live a little, then hear its own verdict on its memory."""
    before = (await host.instance(instance))["guest"]["heartbeats"]
    with trio.move_on_after(5):
        while (await host.instance(instance))["guest"]["heartbeats"] < before + 20:
            await trio.sleep(0.01)
    check = await host.client.post(f"/v1/instances/{instance}:check")
    beats = (await host.instance(instance))["guest"]["heartbeats"]
    problems = [] if check["consistent"] else [f"the guest is inconsistent: {check['reason']}"]
    return problems if beats >= before + 20 else [*problems, "the guest's heart does not beat"]


def _intervals(root: Path, instance: str) -> list[Interval]:
    found = [interval for path in (root / "witness").glob("*.witness") for interval in read_witness(path)]
    return [interval for interval in found if interval.instance_id == instance]


async def _outcome(source: HostProcess, migration: str) -> str:
    try:
        return str((await source.record(migration))["outcome"])
    except VmMigrateError as exc:
        return exc.code


async def _clean(pair: Pair, instance: str) -> None:
    """Delete the guest wherever it is, so that the next trial starts with nothing."""
    for host in pair.hosts.values():
        with contextlib.suppress(VmMigrateError):
            await host.client.delete(f"/v1/instances/{instance}")


async def _create(host: HostProcess) -> str:
    """A guest that has written its working set."""
    instance = str(uuid.uuid4())
    board = {"cpus": 1, "memory_mb": 8, "chipset": {"type": "i440_fx", "value": {"enable_pcie": False}}}
    components = {"com1": {"type": "serial_port", "component": {"num": "com1"}}}
    body = {
        "id": instance,
        "spec_version": "v3",
        "spec": {"board": board, "components": components, "smbios": None},
        "program": {"name": "stress", "working_set_mib": 2, "rate_pages_per_s": 1000},
        "start": True,
    }
    await host.client.post("/v1/instances", text=json.dumps(body))
    with trio.fail_after(SETTLE_DEADLINE_S):
        while (await host.instance(instance))["guest"]["program"]["filled_pages"] < 512:
            await trio.sleep(0.01)
    return instance
