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
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import trio

import vmmigrate
from tools.faults.forks import DaemonProcess, Forks
from vmmigrate.api.client import HostClient, open_client
from vmmigrate.hypervisor.qemu.stress import build_stress_guest
from vmmigrate.net import pki
from vmmigrate.net.identity import Identity, Role
from vmmigrate.net.tls import TlsFiles

TRUST_DOMAIN = "test.example"
READY_DEADLINE_S = 30.0
END_DEADLINE_S = 10.0


@dataclass
class HostProcess:
    """One daemon process; its ports stay the same over restarts."""

    name: str
    config: Path
    process: DaemonProcess
    url: str
    client: HostClient
    stack: contextlib.AsyncExitStack

    async def kill(self) -> None:
        """SIGKILL: no chance to clean up."""
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()

    async def aclose(self) -> None:
        """End the daemon, if it still runs, and our connections to it. Idempotent."""
        await self.stack.aclose()

    async def record(self, migration_id: str) -> dict[str, Any]:
        return dict(await self.client.get(f"/v1/migrations/{migration_id}"))

    async def instance(self, instance_id: str) -> dict[str, Any]:
        return dict(await self.client.get(f"/v1/instances/{instance_id}"))

    @property
    def state(self) -> Path:
        return self.config.parent / f"state-{self.name}"

    @property
    def runtime(self) -> Path:
        return self.config.parent / f"run-{self.name}"


@dataclass
class Site:
    """Hosts that trust each other.

    Attributes:
        forks: Who starts the daemons; None: each is executed, and takes its time.
        hypervisor: "embedded", "qemu", or "qemu-stream": QEMU that has to tell itself what guests write.
    """

    root: Path
    stack: contextlib.AsyncExitStack
    operator: TlsFiles
    forks: Forks | None = None
    hypervisor: str = "embedded"

    @property
    def kernel(self) -> Path:
        """What QEMU guests boot."""
        return self.root / "stress.elf"

    async def start(self, name: str) -> HostProcess:
        """Start the daemon of host *name*, or start it again."""
        config = self.root / f"{name}.toml"
        if not config.exists():
            _write_config(self.root, config, name, self.hypervisor)
        stack = contextlib.AsyncExitStack()
        self.stack.push_async_callback(stack.aclose)
        arguments = ["daemon", "--config", str(config), "-o", "json"]
        start = _execute if self.forks is None else self.forks.start
        reading, writing = os.pipe()
        stdout = await stack.enter_async_context(trio.lowlevel.FdStream(reading))
        with _opened(writing) as ready, _log(self.root, name) as log:
            process = await start(arguments, ready.fileno(), log.fileno())
        stack.push_async_callback(_end, process)
        facts = await _ready(stdout, name)
        client = await stack.enter_async_context(open_client(facts["api_url"], self.operator))
        return HostProcess(name, config, process, facts["api_url"], client, stack)


async def _execute(arguments: Sequence[str], stdout: int, stderr: int) -> DaemonProcess:
    return await trio.lowlevel.open_process(
        [sys.executable, "-m", "vmmigrate", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env={**os.environ, "PYTHONPATH": str(Path(vmmigrate.__file__).parent.parent)},
        start_new_session=True,
    )


@contextlib.asynccontextmanager
async def open_site(
    root: Path, *names: str, forks: Forks | None = None, hypervisor: str = "embedded"
) -> AsyncIterator[Site]:
    """Certificates, and everything ended on leaving: daemons, and every guest process that runs under *root*."""
    authority = root / "pki"
    authority.mkdir(parents=True)
    pki.init_authority(authority, TRUST_DOMAIN)
    for name in names:
        pki.issue(authority, Identity(TRUST_DOMAIN, Role.HOST, name), ip_addresses=["127.0.0.1"])
    files = pki.issue(authority, Identity(TRUST_DOMAIN, Role.OPERATOR, "tester"))
    if hypervisor != "embedded":
        await trio.to_thread.run_sync(build_stress_guest, root)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(end_guests, root)
        yield Site(root, stack, TlsFiles(files.ca, files.certificate, files.key), forks, hypervisor)


def port_of(config: Path, interface: str) -> int:
    """The port that a host's configuration gives to *interface*."""
    listen = tomllib.loads(config.read_text())["listen"]
    return int(listen[interface].rpartition(":")[2])


def guest_pids(root: Path) -> list[int]:
    """Every guest process under *root*: embedded ones map their witness there, a QEMU has its pid file there."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                has_pid_file = f"\0-pidfile\0{root}/" in (entry / "cmdline").read_text(errors="replace")
                if has_pid_file or str(root) in (entry / "maps").read_text():
                    found.append(int(entry.name))
    return found


def end_guests(root: Path) -> None:
    for pid in guest_pids(root):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _log(root: Path, name: str) -> BinaryIO:
    return open(root / f"{name}.log", "ab")


def _opened(fd: int) -> BinaryIO:
    return open(fd, "wb")


async def _ready(stdout: trio.lowlevel.FdStream, name: str) -> dict[str, Any]:
    line = b""
    with trio.fail_after(READY_DEADLINE_S):
        while not line.endswith(b"\n"):
            chunk = await stdout.receive_some()
            assert chunk, f"daemon {name} ended before it was ready: see its log"
            line += chunk
    facts = dict(json.loads(line))
    assert facts.get("ready"), f"daemon {name} did not start: {facts}"
    return facts


async def _end(process: DaemonProcess) -> None:
    with trio.CancelScope(shield=True):
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            with trio.move_on_after(END_DEADLINE_S):
                await process.wait()
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
        await process.wait()


def _write_config(root: Path, path: Path, name: str, hypervisor: str) -> None:
    """Windows are short, so that a process which is stopped for a while misses them; journals are compacted early."""
    api, migration, bulk = _free_ports(3)
    path.write_text(
        f"""
hypervisor = "{hypervisor.partition("-")[0]}"
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
handoff_window_s = 3
verdict_s = 3
resume_window_s = 3
[journal]
compact_bytes = 8192
[allow]
paths = ["{root}"]
[qemu]
tracker = {"false" if hypervisor == "qemu-stream" else "true"}
"""
    )


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago; they must outlive a restart, so 0 will not do."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
