"""QEMUs that nobody of ours started, with the stress guest in them: what `vm adopt` is for."""

from __future__ import annotations

import contextlib
import json
import subprocess
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import trio

from tests.hypervisor.qemu_hosts import ACCELERATOR, QEMU, stress_kernel
from tests.migration.fleet import RunningHost
from tests.migration.qemu_fleet import machine
from vmmigrate.hypervisor.base import GuestPlan, NicPlan
from vmmigrate.hypervisor.plan import guest_plan
from vmmigrate.hypervisor.qemu.machine import STAMP_OBJECT, mac_of
from vmmigrate.hypervisor.qemu.qmp import Qmp
from vmmigrate.hypervisor.qemu.stress import VITALS_GPA, stress_append
from vmmigrate.memory import MIB, PAGE_SIZE, RamLayout
from vmmigrate.spec.build import build
from vmmigrate.spec.document import parse

# Two pages less than 64 MiB: QEMU before 9.0 then sees all that a guest under TCG writes.
RAM_BYTES = 64 * MIB - 2 * PAGE_SIZE
MEMORY: Mapping[str, Sequence[str]] = {
    "private": (),
    "memfd": ("-object", f"memory-backend-memfd,id=pc.ram,size={RAM_BYTES},share=on"),
    "file": ("-object", f"memory-backend-file,id=pc.ram,size={RAM_BYTES},share=on,mem-path=/dev/shm"),
}


class ForeignQemu:
    """The machine of `qemu_fleet.machine`, as somebody's script would start it."""

    def __init__(self, root: Path, binary: str = QEMU) -> None:
        self.binary = binary
        self.spec = machine(root)
        self.root = root
        self.monitor = root / "foreign.qmp"
        self.uuid = str(uuid.uuid4())
        self.serial = root / "foreign.serial"
        append = stress_append(mem_mib=56, ws_mib=8, rate=10, disk=True)
        self.program: dict[str, Any] = {
            "name": "kernel",
            "kernel": str(stress_kernel()),
            "append": append,
            "vitals_gpa": VITALS_GPA,
        }

    def start(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def arguments(self, memory: str, replaced: Mapping[str, Sequence[str]], more: Sequence[str]) -> list[str]:
        """*replaced*: options by name, with their values; an empty list leaves one out."""
        told = self.spec["components"]["nic0"]["component"]
        nic = NicPlan("nic0", "vnic0", "vnic0", (0, 8, 0), told["interface_id"])
        backend = ",memory-backend=pc.ram" if memory != "private" else ""
        options: dict[str, Sequence[str]] = {
            "-machine": [f"pc-i440fx-7.2{backend}"],
            "-accel": [ACCELERATOR],
            "-cpu": ["qemu64"],
            "-smp": ["2,sockets=2,cores=1,threads=1"],
            "-m": [f"{RAM_BYTES // 1024}K"],
            "-uuid": [self.uuid],
            "-kernel": [self.program["kernel"]],
            "-append": [self.program["append"]],
            "-serial": [f"file:{self.serial}"],
            "-blockdev": [json.dumps({"driver": "raw", "node-name": "root", "file": self._image()})],
            "-netdev": ["user,id=lan"],
            "-device": [
                "virtio-blk-pci,drive=root,addr=4",
                f"virtio-net-pci,netdev=lan,addr=8,romfile=,mac={mac_of(nic)}",
            ],
            "-qmp": [f"unix:{self.monitor},server=on,wait=off"],
        }
        options |= replaced
        spelled = [word for option, values in options.items() for value in values for word in (option, value)]
        plain = ("-nodefaults", "-no-user-config", "-display", "none", "-vga", "none")
        return [self.binary, *plain, *MEMORY[memory], *spelled, *more]

    def _image(self) -> dict[str, Any]:
        return {"driver": "file", "filename": str(self.root / "disk.img"), "locking": "on"}

    def body(self, **fields: Any) -> str:
        """Of the request to adopt it."""
        chosen = {
            "monitor": str(self.monitor),
            "spec_version": "v3",
            "spec": self.spec,
            "program": self.program,
            "overrides": {"ram_bytes": RAM_BYTES},
            **fields,
        }
        return json.dumps(chosen)

    def plan(self) -> GuestPlan:
        """Of the same machine."""
        return guest_plan(
            self.uuid, build(parse("v3", json.dumps(self.spec))), RamLayout.for_size(RAM_BYTES), program=self.program
        )

    async def adopt(self, host: RunningHost, **fields: Any) -> dict[str, Any]:
        return dict(await host.client.post("/v1/instances:adopt", text=self.body(**fields)))

    async def ask(self, command: str, **arguments: Any) -> Any:
        """A question of a client of its own, that comes and goes."""
        with contextlib.closing(Qmp(self.monitor)) as qmp, trio.fail_after(10):
            return await qmp.execute(command, **arguments)

    async def wait_beating(self) -> None:
        """Until the guest writes letters, all of its memory filled."""
        with trio.fail_after(30):
            while not self.serial.exists() or self.serial.stat().st_size < 200:
                await trio.sleep(0.01)

    async def settings(self) -> dict[str, Any]:
        """Of QEMU's own migrations, and what else an adoption changes."""
        parameters = await self.ask("query-migrate-parameters")
        objects = [entry["name"] for entry in await self.ask("qom-list", path="/objects")]
        devices = [device["label"] for device in await self.ask("query-chardev")]
        return {
            "capabilities": [c["capability"] for c in await self.ask("query-migrate-capabilities") if c["state"]],
            "parameters": {name: parameters.get(name) for name in ("tls-creds", "max-bandwidth", "downtime-limit")},
            "objects": sorted(objects),
            "devices": sorted(devices),
        }

    async def is_untouched(self) -> None:
        """It runs, its letters come, its monitor is free, and nobody has left anything in it."""
        with trio.fail_after(10):
            assert (await self.ask("query-status"))["status"] == "running"
            found = await self.settings()
            assert found["capabilities"] == []
            assert not [name for name in (*found["objects"], *found["devices"]) if name.startswith(STAMP_OBJECT)]
            if not self.serial.exists():
                return  # it was started without
            before = self.serial.stat().st_size
            while self.serial.stat().st_size <= before:
                await trio.sleep(0.01)


@contextlib.asynccontextmanager
async def open_foreign(
    root: Path,
    memory: str = "private",
    *,
    replaced: Mapping[str, Sequence[str]] | None = None,
    more: Sequence[str] = (),
    beats: bool = True,
    binary: str = QEMU,
) -> AsyncIterator[ForeignQemu]:
    """A guest that runs; ended by force when the block is left."""
    qemu = ForeignQemu(root, binary)
    qemu.start(qemu.arguments(memory, replaced or {}, more))
    try:
        if beats:
            await qemu.wait_beating()
        else:
            with trio.fail_after(10):
                while not qemu.monitor.exists():
                    await trio.sleep(0.01)
        yield qemu
    finally:
        qemu.end()
