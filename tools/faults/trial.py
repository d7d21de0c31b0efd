"""One trial: a guest, a migration, one fault at one boundary, both daemons back, and a verdict by witnesses."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import trio

from tools.faults.judge import Verdict, judge, state_of
from tools.faults.pair import Pair
from tools.faults.relay import Boundary, Damage, Relay, Side
from tools.faults.site import HostProcess, guest_pids, port_of
from vmmigrate.errors import VmMigrateError
from vmmigrate.hypervisor.qemu.stress import VITALS_GPA, stress_append
from vmmigrate.memory import MIB, PAGE_SIZE

SETTLE_DEADLINE_S = 60.0
TRIAL_DEADLINE_S = 240.0
STOPPED_S = 5.0
_POLL_S = 0.02
_WORKING_SET_MIB = 2
_EMBEDDED_PROGRAM = {"name": "stress", "working_set_mib": _WORKING_SET_MIB, "rate_pages_per_s": 1000}


class Fault(StrEnum):
    """What strikes. `kill` and `stop` (SIGSTOP for 5 s) hit processes, the others the wire.

    The guest is the one that runs at the source; the arrival is the one that the destination builds.
    """

    KILL_SOURCE = "kill_source"
    KILL_DESTINATION = "kill_destination"
    KILL_GUEST = "kill_guest"
    KILL_ARRIVAL = "kill_arrival"
    CUT = "cut"
    STOP_SOURCE = "stop_source"
    STOP_DESTINATION = "stop_destination"
    STOP_GUEST = "stop_guest"
    HALF_CUT = "half_cut"
    STALL = "stall"
    DUPLICATE = "duplicate"
    TRUNCATE = "truncate"
    CORRUPT = "corrupt"


SHORT = (Fault.KILL_SOURCE, Fault.KILL_DESTINATION, Fault.KILL_GUEST, Fault.KILL_ARRIVAL, Fault.CUT)
_DAMAGE = {fault: Damage(fault.value) for fault in Fault if fault.value in set(Damage)}
_KILLED = {Fault.KILL_SOURCE: "source", Fault.KILL_DESTINATION: "destination"}
_STOPPED = {Fault.STOP_SOURCE: "source", Fault.STOP_DESTINATION: "destination"}
_VICTIM = {Fault.KILL_GUEST: "source", Fault.KILL_ARRIVAL: "destination"}


@dataclass(frozen=True)
class Trial:
    """What is to be tried. No boundary: nothing strikes."""

    fault: Fault
    boundary: Boundary | None


@dataclass(frozen=True)
class Result:
    """How a trial ended. `verdict.problems` is empty when every promise was kept."""

    trial: Trial
    reached: bool
    verdict: Verdict
    seconds: float
    records: Mapping[Side, int]


async def run_trial(pair: Pair, trial: Trial) -> Result:
    """Migrate a fresh guest and strike; then judge, and clean up.

    Raises: trio.TooSlowError: Something does not answer at all.
    """
    with trio.fail_after(TRIAL_DEADLINE_S):
        return await _run_trial(pair, trial)


async def _run_trial(pair: Pair, trial: Trial) -> Result:
    begun = trio.current_time()
    instance = await create_guest(pair)
    migration, relay = await migrate_under_fire(pair, trial, instance)
    verdict = await judge(pair, instance, migration, victim_of(trial) if relay.struck.is_set() else None)
    return Result(trial, relay.struck.is_set(), verdict, trio.current_time() - begun, dict(relay.records))


async def migrate_under_fire(pair: Pair, trial: Trial, instance: str) -> tuple[str, Relay]:
    """Migrate the guest and strike; the migration, when all is settled or will not be."""
    source = pair.hosts["source"]
    guest = int((await source.instance(instance))["guest"]["pid"])
    async with trio.open_nursery() as nursery:
        stops = Stops(nursery)
        relay = Relay(
            port_of(source.config, "migration"),
            trial.boundary,
            _DAMAGE.get(trial.fault, Damage.NONE),
            partial(strike, pair, trial.fault, guest, stops),
        )
        port = await nursery.start(relay.serve)
        migration = await begin(pair, instance, port)
        with contextlib.suppress(trio.TooSlowError):
            await wait_settled(pair, migration, instance)
            await stops.wait_over()
            await wait_settled(pair, migration, instance)
        nursery.cancel_scope.cancel()
    return migration, relay


def victim_of(trial: Trial) -> str | None:
    """Whose guest process is killed on purpose."""
    return _VICTIM.get(trial.fault)


class Stops:
    """Processes that were stopped, and go on after a while, whatever happens."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._over: list[trio.Event] = []

    def stop(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        over = trio.Event()
        self._over.append(over)
        self._nursery.start_soon(self._go_on, pid, over)

    async def _go_on(self, pid: int, over: trio.Event) -> None:
        try:
            await trio.sleep(STOPPED_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            over.set()

    async def wait_over(self) -> None:
        for over in self._over:
            await over.wait()


async def strike(pair: Pair, fault: Fault, guest: int, stops: Stops) -> None:
    if fault in _KILLED:
        await pair.hosts[_KILLED[fault]].kill()
    elif fault in _STOPPED:
        stops.stop(pair.hosts[_STOPPED[fault]].process.pid)
    elif fault is Fault.STOP_GUEST:
        with contextlib.suppress(ProcessLookupError):
            stops.stop(guest)
    elif fault in _VICTIM:
        for pid in guest_pids(pair.site.root):
            if (pid == guest) is (fault is Fault.KILL_GUEST):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


async def begin(pair: Pair, instance: str, port: int) -> str:
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


async def wait_settled(pair: Pair, migration: str, instance: str) -> None:
    """Until nobody is busy with the migration any more, both daemons being up.

    Raises: trio.TooSlowError: the judge then says what still is not as it must be.
    """
    with trio.fail_after(SETTLE_DEADLINE_S):
        while True:
            await pair.restart_dead()
            if await _is_settled(pair, migration, instance):
                return
            await trio.sleep(_POLL_S)


async def _is_settled(pair: Pair, migration: str, instance: str) -> bool:
    try:
        sides = [await host.client.get(f"/v1/migrations/{migration}/side") for host in pair.hosts.values()]
        states = [await state_of(host, instance) for host in pair.hosts.values()]
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


async def create_guest(pair: Pair) -> str:
    """A guest that has written its working set."""
    host, instance = pair.hosts["source"], str(uuid.uuid4())
    is_qemu, ram_mib = (False, 8) if pair.site.hypervisor == "embedded" else (True, 16)
    # QEMU before 9.0 sees all that a guest under TCG writes only when RAM is not a multiple of 256 KiB.
    missing_bytes = 2 * PAGE_SIZE if pair.site.hypervisor == "qemu-stream" else 0
    board = {
        "cpus": 1,
        "memory_mb": ram_mib,
        "chipset": {"type": "i440_fx", "value": {"enable_pcie": False}},
    }
    components = {"com1": {"type": "serial_port", "component": {"num": "com1"}}}
    body = {
        "id": instance,
        "spec_version": "v3",
        "spec": {"board": board, "components": components, "smbios": None},
        "program": _qemu_program(pair.site.kernel) if is_qemu else _EMBEDDED_PROGRAM,
        "overrides": {"ram_bytes": ram_mib * MIB - missing_bytes},
        "start": True,
    }
    await host.client.post("/v1/instances", text=json.dumps(body))
    with trio.fail_after(SETTLE_DEADLINE_S):
        while await _filled_pages(host, instance) < _WORKING_SET_MIB * 256:
            await trio.sleep(_POLL_S)
    return instance


async def _filled_pages(host: HostProcess, instance: str) -> int:
    """None yet, as long as a machine boots."""
    return int((await host.instance(instance))["guest"]["program"].get("filled_pages", 0))


def _qemu_program(kernel: Path) -> Mapping[str, Any]:
    return {
        "name": "kernel",
        "kernel": str(kernel),
        "append": stress_append(mem_mib=12, ws_mib=_WORKING_SET_MIB, rate=1),
        "vitals_gpa": VITALS_GPA,
    }
