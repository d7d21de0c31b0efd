"""Hosts for tests: real daemons inside this process, on loopback, with real TLS, journals and guest processes."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import trio

from tools.faults.site import end_guests
from vmmigrate.api.client import HostClient, open_client
from vmmigrate.daemon.config import Config, read_config
from vmmigrate.daemon.server import guest_deadlines, qemu_settings, run_daemon
from vmmigrate.engine.abilities import of_this_release
from vmmigrate.errors import JournalError, VmMigrateError
from vmmigrate.hypervisor.base import Guest, GuestPlan, GuestProcess, GuestStamp
from vmmigrate.hypervisor.embedded.adapter import EmbeddedHypervisor
from vmmigrate.hypervisor.embedded.witness import read_witnesses
from vmmigrate.hypervisor.intervals import Verdict, check_single_owner
from vmmigrate.hypervisor.qemu.adapter import QemuHypervisor
from vmmigrate.hypervisor.qemu.witness import read_consoles
from vmmigrate.net import pki
from vmmigrate.net.identity import Identity, Role
from vmmigrate.net.threads import open_group
from vmmigrate.net.tls import TlsFiles
from vmmigrate.wire.negotiate import Abilities

CRUCIBLE: Final = "7d1a3f7e-0000-4000-8000-000000000001"
TRUST_DOMAIN = "test.example"
DEADLINE_S = 20.0


class ObservedHypervisor(EmbeddedHypervisor):
    """The embedded hypervisor, whose guests a test can look at."""

    seen: dict[str, Guest]

    async def build(self, plan: GuestPlan, stamp: GuestStamp, *, for_migration: bool) -> Guest:
        return self._noted(await super().build(plan, stamp, for_migration=for_migration))

    async def adopt(self, stamp: GuestStamp, plan: GuestPlan, process: GuestProcess) -> Guest | None:
        guest = await super().adopt(stamp, plan, process)
        return None if guest is None else self._noted(guest)

    def _noted(self, guest: Guest) -> Guest:
        self.__dict__.setdefault("seen", {})[guest.plan.instance_id] = guest
        return guest


class ObservedQemu(QemuHypervisor):
    """The same of the QEMU adapter."""

    seen: dict[str, Guest]

    async def build(self, plan: GuestPlan, stamp: GuestStamp, *, for_migration: bool) -> Guest:
        return self._noted(await super().build(plan, stamp, for_migration=for_migration))

    async def adopt(self, stamp: GuestStamp, plan: GuestPlan, process: GuestProcess) -> Guest | None:
        guest = await super().adopt(stamp, plan, process)
        return None if guest is None else self._noted(guest)

    async def adopt_foreign(self, plan: GuestPlan, stamp: GuestStamp, monitor: Path, pid: int | None) -> Guest:
        return self._noted(await super().adopt_foreign(plan, stamp, monitor, pid))

    def _noted(self, guest: Guest) -> Guest:
        self.__dict__.setdefault("seen", {})[guest.plan.instance_id] = guest
        return guest


@dataclass
class RunningHost:
    """One daemon under test. `cut()` stops it the hard way: its guests stay."""

    name: str
    config: Config
    url: str
    client: HostClient
    facts: Mapping[str, Any]
    scope: trio.CancelScope
    stopped: trio.Event
    failures: list[JournalError]
    hypervisor: ObservedHypervisor | ObservedQemu
    hangups: trio.MemorySendChannel[None]

    async def instance(self, instance_id: str) -> dict[str, Any]:
        return dict(await self.client.get(f"/v1/instances/{instance_id}"))

    async def record(self, migration_id: str) -> dict[str, Any]:
        return dict(await self.client.get(f"/v1/migrations/{migration_id}"))

    def guest(self, instance_id: str) -> Guest:
        """The adapter's view of a guest that runs here."""
        return self.hypervisor.seen[instance_id]

    async def reload(self) -> None:
        """What SIGHUP does to a daemon of its own. The second is taken only when the first was obeyed."""
        await self.hangups.send(None)
        await self.hangups.send(None)

    async def stop(self) -> None:
        self.scope.cancel()
        await self.stopped.wait()


class Host(Protocol):
    """What the steps of a test need of a host, in this process or in one of its own."""

    name: str
    client: HostClient

    async def record(self, migration_id: str) -> dict[str, Any]: ...


@dataclass
class Fleet:
    """Some hosts, an operator, and everything that has to be cleared away."""

    root: Path
    nursery: trio.Nursery
    stack: contextlib.AsyncExitStack
    operator: TlsFiles
    hosts: dict[str, RunningHost] = field(default_factory=dict)

    async def start(
        self,
        name: str,
        *,
        allow: str = "",
        limits: str = "",
        tls: str = "",
        api_port: int = 0,
        hypervisor_class: type[ObservedHypervisor] = ObservedHypervisor,
        qemu: str | None = None,
        fsync: Callable[[int], None] = os.fsync,
        compat: str = "",
        abilities: Callable[[Abilities], Abilities] | None = None,
        **options: Any,
    ) -> RunningHost:
        """Start (or restart) the daemon of host *name*.

        Args:
            qemu: Run guests in QEMU; what stands in the section `[qemu]`.
            compat: What stands in the section `[compat]` of its configuration.
            abilities: What the host can do instead of all that this release can: for peers of other releases.
        """
        directory = self.root / name
        config = read_config(_write_config(self.root, directory, name, allow, limits, tls, api_port, compat, qemu))
        options = {"witness_dir": self.root / "witness", **guest_deadlines(config), **options}
        hypervisor: ObservedHypervisor | ObservedQemu
        if qemu is None:
            hypervisor = await hypervisor_class.open(config.directories.runtime, **options)
        else:
            hypervisor = await ObservedQemu.open(config.directories.runtime, qemu_settings(config), **options)
        scope, stopped, failures = trio.CancelScope(), trio.Event(), list[JournalError]()
        hangups, reloads = trio.open_memory_channel[None](0)
        able = abilities(of_this_release(hypervisor.capabilities)) if abilities else None
        run = partial(run_daemon, config, hypervisor=hypervisor, fsync=fsync, reloads=reloads, abilities=able)
        facts: Mapping[str, Any] = await self.nursery.start(_run, run, scope, stopped, failures)
        client = await self.stack.enter_async_context(open_client(facts["api_url"], self.operator))
        host = RunningHost(name, config, facts["api_url"], client, facts, scope, stopped, failures, hypervisor, hangups)
        self.hosts[name] = host
        return host

    async def end_guests(self) -> None:
        """End every guest by id, wherever the journal says it is; what is left is a leak that the fixture reports."""
        for host in self.hosts.values():
            if host.stopped.is_set():
                continue
            for instance in await host.client.get("/v1/instances"):
                with contextlib.suppress(Exception):
                    await host.client.delete(f"/v1/instances/{instance['id']}")


def files_of(root: Path, name: str) -> TlsFiles:
    """What the party *name* shows, as `open_fleet` issued it."""
    authority = root / "pki"
    return TlsFiles(authority / "ca.pem", authority / f"{name}.pem", authority / f"{name}-key.pem")


async def _run(
    run: Callable[..., Awaitable[None]],
    scope: trio.CancelScope,
    stopped: trio.Event,
    failures: list[JournalError],
    task_status: trio.TaskStatus[Mapping[str, Any]],
) -> None:
    try:
        with scope:
            await run(on_ready=task_status.started)
    except JournalError as failure:
        failures.append(failure)
    finally:
        stopped.set()


def crucible_backend(generation: int, target: str = "127.0.0.1:3810") -> dict[str, object]:
    """A Crucible backend of one region, under *generation*."""
    options = {"id": CRUCIBLE, "target": [target], "lossy": False, "read_only": False}
    region = {
        "type": "region",
        "block_size": 512,
        "blocks_per_extent": 8,
        "extent_count": 4,
        "opts": options,
        "gen": generation,
    }
    volume = {
        "type": "volume",
        "id": CRUCIBLE,
        "block_size": 512,
        "sub_volumes": [region],
        "read_only_parent": None,
    }
    return {"request_json": json.dumps(volume), "readonly": False}


def _write_config(
    root: Path,
    directory: Path,
    name: str,
    allow: str,
    limits: str,
    tls: str,
    api_port: int,
    compat: str,
    qemu: str | None,
) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / "daemon.toml"
    path.write_text(
        f"""
hypervisor = "{"embedded" if qemu is None else "qemu"}"
[listen]
api = "127.0.0.1:{api_port}"
migration = "127.0.0.1:0"
bulk = "127.0.0.1:0"
[tls]
ca = "{root}/pki/ca.pem"
certificate = "{root}/pki/{name}.pem"
key = "{root}/pki/{name}-key.pem"
{tls}
[directories]
state = "state"
runtime = "{root}/run-{name}"
[allow]
hosts = ["127.0.0.1", "fd00:1122:3344::/48"]
interfaces = ["vnic*", "opte*"]
features = ["failure-injection"]
{allow}
[limits]
{limits}
[compat]
{compat}
[qemu]
{qemu or ""}
"""
    )
    return path


@contextlib.asynccontextmanager
async def open_fleet(root: Path, *names: str) -> AsyncIterator[Fleet]:
    """Certificates for the hosts *names* and an operator; daemons are started by `Fleet.start`."""
    authority = root / "pki"
    authority.mkdir()
    (root / "witness").mkdir()
    pki.init_authority(authority, TRUST_DOMAIN)
    for name in names:
        pki.issue(authority, Identity(TRUST_DOMAIN, Role.HOST, name), ip_addresses=["127.0.0.1"])
    files = pki.issue(authority, Identity(TRUST_DOMAIN, Role.OPERATOR, "tester"))
    operator = TlsFiles(files.ca, files.certificate, files.key)
    async with open_group() as nursery, contextlib.AsyncExitStack() as stack:
        fleet = Fleet(root, nursery, stack, operator)
        try:
            yield fleet
        finally:
            stack.callback(end_guests, root)
            with trio.CancelScope(shield=True), trio.move_on_after(10), contextlib.suppress(VmMigrateError):
                await fleet.end_guests()
            nursery.cancel_scope.cancel()


# --------------------------------------------------------------------------- guests


def spec_v3(**components: Any) -> dict[str, Any]:
    """A small machine: two vCPUs, COM1, and what is given."""
    return {
        "board": {"cpus": 2, "memory_mb": 64, "chipset": {"type": "i440_fx", "value": {"enable_pcie": False}}},
        "components": {"com1": {"type": "serial_port", "component": {"num": "com1"}}, **components},
        "smbios": None,
    }


async def create(host: Host, spec: Mapping[str, Any] | None = None, *, spec_version: str = "v3", **request: Any) -> str:
    """Create and start an instance; its id."""
    instance_id = str(uuid.uuid4())
    body = {"id": instance_id, "spec_version": spec_version, "spec": spec or spec_v3(), "start": True, **request}
    await host.client.post("/v1/instances", text=json.dumps(body))
    return instance_id


async def begin(source: Host, destination: Host, instance_id: str, **request: Any) -> str:
    """Start a migration; its id."""
    ours = ("replacements", "keep", "source_address")
    arrival = {name: request.pop(name) for name in ours if name in request}
    ticket = await source.client.post(
        f"/v1/instances/{instance_id}:migrate-out", {"destination_host": destination.name, **request}
    )
    ticket.pop("expires_at_s")
    await destination.client.post("/v1/migrations:migrate-in", {**ticket, **arrival})
    return str(ticket["migration_id"])


async def wait_outcome(host: Host, migration_id: str) -> dict[str, Any]:
    """The record of a migration once it has an outcome that is not `unknown`."""
    with trio.fail_after(DEADLINE_S):
        while True:
            record = await host.record(migration_id)
            if record["outcome"] not in {None, "unknown"}:
                return record
            await trio.sleep(0.02)


async def wait_in_doubt(source: Host, migration_id: str) -> None:
    """Wait until the source has given its guest away, and has no answer."""
    with trio.fail_after(DEADLINE_S):
        while (await source.record(migration_id))["outcome"] != "unknown":
            await trio.sleep(0.02)


async def fetch_from(port: int, destination: Host) -> dict[str, Any]:
    """The record of a destination that was told to fetch a guest from host alpha at *port*, whoever that is."""
    migration = str(uuid.uuid4())
    body = {
        "migration_id": migration,
        "instance_id": str(uuid.uuid4()),
        "source_host": "alpha",
        "source_address": f"127.0.0.1:{port}",
        "source_url": "https://127.0.0.1:1",
        "ticket": "0" * 64,
    }
    await destination.client.post("/v1/migrations:migrate-in", body)
    return await wait_outcome(destination, migration)


async def migrate(source: Host, destination: Host, instance_id: str, **request: Any) -> dict[str, Any]:
    """Migrate and wait; the source's record."""
    migration_id = await begin(source, destination, instance_id, **request)
    await wait_outcome(destination, migration_id)
    return await wait_outcome(source, migration_id)


async def check(host: Host, instance_id: str) -> dict[str, Any]:
    """The guest's own verdict on its memory and its heartbeat."""
    return dict(await host.client.post(f"/v1/instances/{instance_id}:check"))


def witnesses(fleet: Fleet, instance_id: str) -> Verdict:
    """What the guest processes themselves say about who ran when."""
    directory = fleet.root / "witness"
    return check_single_owner([*read_witnesses(directory, instance_id), *read_consoles(directory, instance_id)])


async def wait_heartbeats(host: RunningHost, instance_id: str, more: int = 50) -> None:
    """Let the guest live for *more* of its milliseconds."""
    with trio.fail_after(DEADLINE_S):
        first = (await host.guest(instance_id).status()).heartbeats
        while (await host.guest(instance_id).status()).heartbeats < first + more:
            await trio.sleep(0.005)


async def wait_filled(host: RunningHost, instance_id: str, pages: int) -> None:
    """Until a stress program has written *pages* pages of its working set."""
    with trio.fail_after(DEADLINE_S):
        while (await host.guest(instance_id).status()).program["filled_pages"] < pages:
            await trio.sleep(0.005)


def stress(working_set_mib: int = 16, rate_pages_per_s: int = 2000, **parameters: Any) -> dict[str, Any]:
    return {
        "name": "stress",
        "working_set_mib": working_set_mib,
        "rate_pages_per_s": rate_pages_per_s,
        **parameters,
    }
