"""A site of real daemon processes, killed and started again at will."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import trio

import vmmigrate
from vmmigrate.api.client import HostClient, open_client
from vmmigrate.net import pki
from vmmigrate.net.identity import Identity, Role
from vmmigrate.net.tls import TlsFiles

TRUST_DOMAIN = "test.example"
READY_DEADLINE_S = 30.0


@dataclass
class HostProcess:
    """One daemon process; its ports stay the same over restarts."""

    name: str
    config: Path
    process: trio.Process
    url: str
    client: HostClient

    async def kill(self) -> None:
        """SIGKILL: no chance to clean up."""
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()

    async def record(self, migration_id: str) -> dict[str, Any]:
        return dict(await self.client.get(f"/v1/migrations/{migration_id}"))

    async def instance(self, instance_id: str) -> dict[str, Any]:
        return dict(await self.client.get(f"/v1/instances/{instance_id}"))


@dataclass
class Site:
    root: Path
    stack: contextlib.AsyncExitStack
    operator: TlsFiles

    async def start(self, name: str) -> HostProcess:
        """Start the daemon of host *name*, or start it again."""
        config = self.root / f"{name}.toml"
        if not config.exists():
            _write_config(self.root, config, name)
        with _log(self.root, name) as log:
            process = await trio.lowlevel.open_process(
                [sys.executable, "-m", "vmmigrate", "daemon", "--config", str(config), "-o", "json"],
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(Path(vmmigrate.__file__).parent.parent)},
                start_new_session=True,
            )
        self.stack.push_async_callback(_end, process)
        facts = await _ready(process, name)
        client = await self.stack.enter_async_context(open_client(facts["api_url"], self.operator))
        return HostProcess(name, config, process, facts["api_url"], client)


@contextlib.asynccontextmanager
async def open_site(root: Path, *names: str) -> AsyncIterator[Site]:
    """Certificates, and everything ended on leaving: daemons, and every guest process that runs under *root*."""
    authority = root / "pki"
    authority.mkdir()
    pki.init_authority(authority, TRUST_DOMAIN)
    for name in names:
        pki.issue(authority, Identity(TRUST_DOMAIN, Role.HOST, name), ip_addresses=["127.0.0.1"])
    files = pki.issue(authority, Identity(TRUST_DOMAIN, Role.OPERATOR, "tester"))
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(end_guests, root)
        yield Site(root, stack, TlsFiles(files.ca, files.certificate, files.key))


def port_of(config: Path, interface: str) -> int:
    """The port that a host's configuration gives to *interface*."""
    listen = tomllib.loads(config.read_text())["listen"]
    return int(listen[interface].rpartition(":")[2])


def guest_pids(root: Path) -> list[int]:
    """Every process that maps a file under *root*: guests map their witness there."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if str(root) in (entry / "maps").read_text():
                    found.append(int(entry.name))
    return found


def end_guests(root: Path) -> None:
    for pid in guest_pids(root):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _log(root: Path, name: str) -> BinaryIO:
    return open(root / f"{name}.log", "ab")


async def _ready(process: trio.Process, name: str) -> dict[str, Any]:
    assert process.stdout is not None
    line = b""
    with trio.fail_after(READY_DEADLINE_S):
        while not line.endswith(b"\n"):
            chunk = await process.stdout.receive_some()
            assert chunk, f"daemon {name} ended before it was ready: see its log"
            line += chunk
    return dict(json.loads(line))


async def _end(process: trio.Process) -> None:
    with trio.CancelScope(shield=True):
        if process.returncode is None:
            process.terminate()
            with trio.move_on_after(10):
                await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()
        if process.stdout is not None:
            await process.stdout.aclose()


def _write_config(root: Path, path: Path, name: str) -> None:
    api, migration, bulk = _free_ports(3)
    path.write_text(
        f"""
[listen]
api = "127.0.0.1:{api}"
migration = "127.0.0.1:{migration}"
bulk = "127.0.0.1:{bulk}"
[tls]
ca = "pki/ca.pem"
certificate = "pki/{name}.pem"
key = "pki/{name}-key.pem"
[directories]
state = "state-{name}"
runtime = "run-{name}"
witness = "witness"
[limits]
resume_window_s = 3
"""
    )


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago; they must outlive a restart, so 0 will not do."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
