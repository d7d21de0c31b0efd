"""Two hosts with QEMU guests for benchmarks: daemons in processes of their own, guests that move to and fro.

What a benchmark asks of them, it does over the API, as an orchestrator would. A host's bulk transport is a matter of
its configuration, so each transport has a pair of its own.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

from tools.bench_watcher import Place, ProcessorTime
from tools.faults.site import end_guests
from vmmigrate.api.client import HostClient
from vmmigrate.cli.moving import Order, start_move
from vmmigrate.demo import daemons
from vmmigrate.demo.site import DESTINATION, SOURCE, TRUST_DOMAIN, Site
from vmmigrate.hypervisor.qemu import stress
from vmmigrate.memory import MIB
from vmmigrate.net import pki
from vmmigrate.net.identity import Identity, Role

HOSTS: Final = (SOURCE, DESTINATION)
FILL_DEADLINE_S: Final = 300.0
MOVE_DEADLINE_S: Final = 300.0
GONE_DEADLINE_S: Final = 60.0
_PORT: Final = "com1"
_CONSOLE: Final = f"{_PORT}.log"
_POLL_S: Final = 0.02

_CONFIG: Final = """\
hypervisor = "qemu"

[listen]
api = "127.0.0.1:0"
migration = "127.0.0.1:0"
bulk = "127.0.0.1:0"

[tls]
ca = "pki/ca.pem"
certificate = "pki/{host}.pem"
key = "pki/{host}-key.pem"

[directories]
state = "{host}/state"
runtime = "{host}/run"

[allow]
paths = ["{kernels}"]

[bulk]
transports = ["{transport}"]

[qemu]
network = "user"
tracker = {tracker}
"""


class NotMovedError(Exception):
    """The guest is where it was."""


@dataclass
class QemuPair:
    """Two hosts that serve."""

    site: Site
    clients: Mapping[str, HostClient]
    clocks: Mapping[str, ProcessorTime]

    def directories(self, host: str) -> set[Path]:
        """Of QEMUs with a console."""
        return {console.parent for console in self.site.runtime(host).glob(f"*/{_CONSOLE}")}


@contextlib.asynccontextmanager
async def open_qemu_pair(root: Path, kernels: Path, transport: str, *, tracks: bool = True) -> AsyncIterator[QemuPair]:
    """Two daemons under *root*, which is made; on leaving they and every guest are gone.

    Args:
        kernels: The directory that guests boot from.
        transport: "sealed" or "tls".
        tracks: Whether guests get the tracker; without it QEMU has to tell what they write.
    """
    try:
        site = await trio.to_thread.run_sync(_make_site, root, kernels, transport, tracks)
        async with contextlib.AsyncExitStack() as stack:
            clients, clocks = {}, {}
            for host in HOSTS:
                process = await stack.enter_async_context(daemons.daemon_process(site, host))
                url = await daemons.wait_ready(process, site, host)
                clients[host] = await stack.enter_async_context(daemons.client_of(url, site, host))
                clocks[host] = ProcessorTime(process.pid)
            yield QemuPair(site, clients, clocks)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(end_guests, root)


def _make_site(root: Path, kernels: Path, transport: str, tracks: bool) -> Site:
    """Blocking."""
    root.mkdir()
    pki.init_authority(root / "pki", TRUST_DOMAIN, 2)
    for role, name in ((Role.HOST, SOURCE), (Role.HOST, DESTINATION), (Role.OPERATOR, "operator")):
        pki.issue(root / "pki", Identity(TRUST_DOMAIN, role, name), lifetime_days=1)
    site = Site(root)
    for host in HOSTS:
        text = _CONFIG.format(host=host, kernels=kernels, transport=transport, tracker=str(tracks).lower())
        site.config(host).write_text(text, encoding="utf-8")
    return site


@dataclass
class OurGuest:
    """A guest of a pair; `here` is the host that has it, `qemu` what runs it there."""

    pair: QemuPair
    instance: str
    here: str
    qemu: ProcessorTime
    directory: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    known: frozenset[Path] = frozenset()

    has_history = True

    @classmethod
    async def boot(cls, pair: QemuPair, mib: int, program: Mapping[str, Any], *, short_bytes: int = 0) -> OurGuest:
        """A guest with *mib* MiB, less *short_bytes*, that fills its memory from now on."""
        instance = str(uuid.uuid4())
        before = pair.directories(SOURCE)
        request = {"id": instance, "spec_version": "v3", "spec": _spec(mib), "program": dict(program), "start": True}
        request["overrides"] = {"ram_bytes": mib * MIB - short_bytes}
        await pair.clients[SOURCE].post("/v1/instances", request)
        pid = await _pid(pair.clients[SOURCE], instance)
        (directory,) = pair.directories(SOURCE) - before
        return cls(pair, instance, SOURCE, ProcessorTime(pid), directory)

    @property
    def there(self) -> str:
        return DESTINATION if self.here == SOURCE else SOURCE

    @property
    def console(self) -> Path:
        return self.directory / _CONSOLE

    @property
    def destination(self) -> Place:
        """Where the console at the destination will be: in a directory that was not there when `prepare` looked."""
        known = tuple(str(directory / _CONSOLE) for directory in self.known)
        return Place(str(self.pair.site.runtime(self.there)), f"*/{_CONSOLE}", known)

    async def wait_ready(self) -> None:
        with trio.fail_after(FILL_DEADLINE_S):
            while (await self._shown())["guest"]["program"].get("state") != stress.State.READY:  # noqa: ASYNC110
                await trio.sleep(_POLL_S)

    async def hold(self) -> None:
        await self._post("pause")

    async def go_on(self) -> None:
        await self._post("start")

    @property
    def clock(self) -> ProcessorTime:
        """Of the QEMU that has the guest."""
        return self.qemu

    @property
    def clocks(self) -> dict[str, ProcessorTime]:
        """Of all that takes part in a move and is there before it."""
        daemons_of = {"source daemon": self.here, "destination daemon": self.there}
        return {"source QEMU": self.qemu, **{name: self.pair.clocks[host] for name, host in daemons_of.items()}}

    async def prepare(self, options: Mapping[str, Any]) -> None:
        """The *options* of `migrate-out` for the next move. There is nothing to start: a move does that."""
        self.options = options
        self.known = frozenset(self.pair.directories(self.there))

    async def move(self, *, downtime_ms: int) -> dict[str, Any]:
        """Move the guest to the other host; what the record tells, once nothing is left to be done at the source.

        Raises: NotMovedError.
        """
        clients = self.pair.clients
        order = Order(instance_id=self.instance, options={"downtime_ms": downtime_ms, **self.options})
        with trio.fail_after(MOVE_DEADLINE_S):
            move = await start_move(clients[self.here], clients[self.there], order)
            record = await move.wait_outcome(lambda record: None)
        if record["outcome"] != "moved":
            raise NotMovedError(f"{record['outcome']}: {record['error']}")
        rounds_s = sum(finished["seconds"] for finished in record["ram"]["rounds"])
        return {
            "total_ms": round(record["total_s"] * 1e3, 1),
            "setup_ms": round((record["total_s"] - rounds_s - record["downtime_s"]) * 1e3, 1),
            "told_pause_ms": round(record["downtime_s"] * 1e3, 2),
            "sent_bytes": record["ram"]["sent_bytes"],
            "rounds": len(record["ram"]["rounds"]),
            "negotiated": {name: record["negotiated"][name] for name in ("transport", "streams", "page_source")},
            "parts_ms": {name: round(s * 1e3, 2) for name, s in record["downtime_parts_s"].items()},
        }

    async def settle(self) -> None:
        """Learn where the guest is now, and wait until the QEMU that it left is gone."""
        left, directory = self.qemu.pid, self.directory
        self.qemu = ProcessorTime(await _pid(self.pair.clients[self.there], self.instance))
        (self.directory,) = self.pair.directories(self.there) - self.known
        self.here = self.there
        with trio.fail_after(GONE_DEADLINE_S):
            while directory.exists() or os.path.exists(f"/proc/{left}"):  # noqa: ASYNC110, ASYNC240
                await trio.sleep(_POLL_S)

    async def check(self) -> str:
        """Have the guest look at all of its memory; it runs. What is wrong with it, or nothing."""
        found = await self._post("check")
        return "" if found["consistent"] else found["reason"] or "not consistent"

    async def end(self) -> None:
        await self.pair.clients[self.here].delete(f"/v1/instances/{self.instance}")

    async def _shown(self) -> dict[str, Any]:
        return dict(await self.pair.clients[self.here].get(f"/v1/instances/{self.instance}"))

    async def _post(self, verb: str) -> dict[str, Any]:
        return dict(await self.pair.clients[self.here].post(f"/v1/instances/{self.instance}:{verb}"))


async def _pid(client: HostClient, instance: str) -> int:
    return int((await client.get(f"/v1/instances/{instance}"))["guest"]["pid"])


def _spec(mib: int) -> dict[str, Any]:
    """The same machine as `bench_native.plan_of` plans."""
    return {
        "board": {"cpus": 1, "memory_mb": mib, "chipset": {"type": "i440_fx", "value": {"enable_pcie": False}}},
        "components": {_PORT: {"type": "serial_port", "component": {"num": _PORT}}},
        "smbios": None,
    }
