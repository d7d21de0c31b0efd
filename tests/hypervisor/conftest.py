"""Fixtures of hypervisor tests. Every guest is ended, also on failure."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.hypervisor.hosts import Hosts, plan_with_every_device
from vmmigrate.hypervisor.conformance import Lab
from vmmigrate.hypervisor.embedded import protocol
from vmmigrate.hypervisor.embedded.adapter import EmbeddedHypervisor


@pytest.fixture
def root() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="vmm-"))
    yield path
    for listening in path.glob("*/*.sock"):
        _end(listening)
    shutil.rmtree(path)


def _end(listening: Path) -> None:
    """Ask whatever guest still listens there to exit, without needing its daemon or its pid."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(str(listening))
        sock.sendall(protocol.encode_frame({"hello": list(protocol.VERSIONS)}))
        sock.recv(1 << 16)
        sock.sendall(protocol.encode_frame({"id": 1, "op": "exit", "args": {}}))
        while sock.recv(1 << 16):
            pass


@pytest.fixture
async def hosts(root: Path) -> AsyncIterator[Hosts]:
    hosts = Hosts(root)
    yield hosts
    for guest in hosts.guests:
        await guest.destroy()


@pytest.fixture
async def lab(hosts: Hosts) -> AsyncIterator[Lab]:
    lab = Lab(hosts.open, plan_with_every_device(hosts.root))
    yield lab
    await lab.close()


@pytest.fixture
async def software_lab(hosts: Hosts) -> AsyncIterator[Lab]:
    async def open_host(name: str) -> EmbeddedHypervisor:
        return await hosts.open(name, dirty_tracking="software")

    lab = Lab(open_host, plan_with_every_device(hosts.root))
    yield lab
    await lab.close()
