"""Two daemons as processes of their own, and how everything is ended again.

Order at the end: guests by the API, daemons by SIGTERM and, when they do not listen, by SIGKILL; then whatever guest
process is still there. Guests outlive their daemons on purpose, so a guest that nobody deleted must be found: an
embedded one maps its witness file, a QEMU names its pid file, and no process of anybody else does that with a file
under our directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import BinaryIO, Final

import trio

import vmmigrate
from vmmigrate.api.client import HostClient, open_client
from vmmigrate.demo.site import TRUST_DOMAIN, Site
from vmmigrate.errors import HypervisorError, VmMigrateError
from vmmigrate.net.identity import Identity, Role

_READY_DEADLINE_S: Final = 30.0
_API_END_DEADLINE_S: Final = 10.0
_TERMINATE_DEADLINE_S: Final = 5.0
_READY_LINE_BYTES: Final = 64 * 1024


@contextlib.asynccontextmanager
async def daemon_process(site: Site, host: str) -> AsyncIterator[trio.Process]:
    """The process of a daemon that is about to serve, ended on leaving."""
    with _created(site.log(host)) as log:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "vmmigrate", "daemon", "--config", str(site.config(host)), "-o", "json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "PYTHONPATH": _package_root()},
            start_new_session=True,  # Ctrl-C is for us; the daemons must live until their guests are deleted
        )
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            await _end_process(process)


async def wait_ready(process: trio.Process, site: Site, host: str) -> str:
    """The API URL of a daemon that serves.

    Raises: HypervisorError `daemon_start`: with what the daemon said last.
    """
    assert process.stdout is not None
    line = b""
    with trio.move_on_after(_READY_DEADLINE_S):
        while not line.endswith(b"\n"):
            chunk = await process.stdout.receive_some(_READY_LINE_BYTES)
            if not chunk:
                break
            line += chunk
    try:
        facts = json.loads(line)
    except ValueError:
        facts = {}
    if "api_url" not in facts:
        said = facts.get("error", {}).get("message") or _last_line(site.log(host)) or "no reason was given"
        raise HypervisorError(f"the {host} daemon did not start: {said}", code="daemon_start")
    return str(facts["api_url"])


@contextlib.asynccontextmanager
async def client_of(url: str, site: Site, host: str) -> AsyncIterator[HostClient]:
    """A client of a host's daemon, which on leaving deletes every instance there."""
    async with open_client(url, site.operator, Identity(TRUST_DOMAIN, Role.HOST, host)) as client:
        try:
            yield client
        finally:
            with trio.move_on_after(_API_END_DEADLINE_S, shield=True):
                await _delete_instances(client)


def end_leftover_guests(root: Path) -> list[int]:
    """Kill every guest process whose files lie under *root*; their pids. None is left when all went well."""
    ended = []
    for pid in _guests_under(root):
        with contextlib.suppress(OSError):
            watch = os.pidfd_open(pid)
            try:
                if _is_guest_under(pid, root):  # still the one that was seen
                    signal.pidfd_send_signal(watch, signal.SIGKILL)
                    ended.append(pid)
            finally:
                os.close(watch)
    return ended


async def _delete_instances(client: HostClient) -> None:
    """Best effort: what cannot be deleted is found and killed later."""
    with contextlib.suppress(VmMigrateError):
        for migration in await client.get("/v1/migrations"):
            if migration["outcome"] is None:
                with contextlib.suppress(VmMigrateError):
                    await client.post(f"/v1/migrations/{migration['migration_id']}:cancel")
        for instance in await client.get("/v1/instances"):
            with contextlib.suppress(VmMigrateError):
                await client.delete(f"/v1/instances/{instance['id']}")


async def _end_process(process: trio.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    with trio.move_on_after(_TERMINATE_DEADLINE_S):
        await process.wait()
        return
    process.kill()
    await process.wait()


def _guests_under(root: Path) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid() and _is_guest_under(int(entry.name), root):
            yield int(entry.name)


def _is_guest_under(pid: int, root: Path) -> bool:
    there = os.fsencode(root) + b"/"
    try:
        named = b"\0-pidfile\0" + there in Path(f"/proc/{pid}/cmdline").read_bytes()
        return named or b" " + there in Path(f"/proc/{pid}/maps").read_bytes()
    except OSError:
        return False  # gone, or somebody else's


def _created(log: Path) -> BinaryIO:
    return open(log, "wb")


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _package_root() -> str:
    """Where this very vmmigrate lies, before anything else that the user has on the path."""
    own = str(Path(vmmigrate.__file__).resolve().parent.parent)
    others = os.environ.get("PYTHONPATH", "")
    return f"{own}{os.pathsep}{others}" if others else own
