"""Real daemons as processes, started and asked by the command line."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cli.conftest import Site, start_command
from vmmigrate.cli.main import main
from vmmigrate.demo.daemons import end_leftover_guests

BOARD = {"cpus": 1, "memory_mb": 16, "chipset": {"type": "i440_fx", "value": {"enable_pcie": False}}}
SERIAL = {"com1": {"type": "serial_port", "component": {"num": "com1"}}}
NIC = {
    "net0": {
        "type": "virtio_nic",
        "component": {
            "backend_id": "net0-vnic",
            "interface_id": "6f5e0c1a-9b7d-4e2f-8a3c-000200000001",
            "pci_path": {"bus": 0, "device": 8, "function": 0},
        },
    },
    "net0-vnic": {"type": "virtio_network_backend", "component": {"vnic_name": "vnic-a"}},
}
OTHER_VNIC = {"net0-vnic": {"component": "VirtioNetworkBackend", "spec": {"vnic_name": "vnic-b"}}}
# Rewrites all of its memory faster than any round, so that no pause of a millisecond is ever in sight.
RESTLESS = {"name": "stress", "working_set_mib": 16, "rate_pages_per_s": 100_000}


@dataclass(frozen=True)
class RunningHost:
    name: str
    url: str
    directory: Path
    process: subprocess.Popen[str]
    ready: dict[str, Any]

    def guest_processes(self) -> list[str]:
        """Sockets of guests of this host."""
        return [path.name for path in (self.directory / "run").glob("*.sock")]


@contextlib.contextmanager
def running_host(site: Site, name: str) -> Iterator[RunningHost]:
    """A daemon that serves; on leaving its instances are deleted and it ends by SIGTERM with exit code 0.

    Unless the test has killed it: then its guests are ended by force.
    """
    config = site.host(name)
    with (
        open(config.parent / "log", "wb") as log,
        start_command("daemon", "--config", config, "-o", "json", stderr=log) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, (config.parent / "log").read_text()
            ready = json.loads(line)
            yield RunningHost(name, ready["api_url"], config.parent, process, ready)
            if process.poll() is None:
                _delete_all(site, ready["api_url"], config.parent)
        finally:
            killed = process.poll() is not None
            process.terminate()
            code = process.wait(timeout=30)
            left = end_leftover_guests(config.parent)
    assert killed or left == []
    assert killed or code == 0


def _delete_all(site: Site, url: str, directory: Path) -> None:
    for path in (directory / "state" / "instances").glob("*.json"):
        main(["vm", "delete", path.stem, "--url", url, "--tls-dir", str(site.operator)])


def write_spec(directory: Path, *, nic: bool = False, **components: Any) -> Path:
    path = directory / "spec.json"
    parts = {**SERIAL, **(NIC if nic else {}), **components}
    path.write_text(json.dumps({"board": BOARD, "components": parts}), encoding="utf-8")
    return path
