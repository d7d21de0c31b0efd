"""A daemon to be killed: adopts a guest that something else started, and stops for ever before a question to QEMU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import structlog
import trio

from tests.hypervisor.qemu_hosts import QemuHosts
from tests.migration.foreign_qemu import ForeignQemu
from vmmigrate.hypervisor.base import GuestStamp
from vmmigrate.hypervisor.qemu.guest import QemuGuest

# Before which question it stops, in the order in which they come; "qom-set" comes only when all is done.
STEPS = ("query-uuid", "object-add", "set-action", "chardev-add", "chardev-change", "qom-set")


def stop_before(step: str, pid: int) -> None:
    asking = QemuGuest.ask

    async def ask(self: QemuGuest, command: str, **arguments: Any) -> Any:
        if command == step and self.process.pid == pid:
            print("there", flush=True)
            await trio.sleep_forever()
        return await asking(self, command, **arguments)

    QemuGuest.ask = ask  # type: ignore[method-assign]


async def main(root: Path, identity: str, kernel: str, pid: int, step: str) -> None:
    foreign = ForeignQemu(root)
    foreign.uuid, foreign.program["kernel"] = identity, kernel
    hypervisor = await QemuHosts(root).open(settings={"monitors": [root], "kernels": [Path(kernel).parent]})
    stop_before(step, pid)
    stamp = GuestStamp(identity, "a", (1, 1), None)
    guest = await hypervisor.adopt_foreign(foreign.plan(), stamp, foreign.monitor, None)
    await guest.note_record("journal", 1)


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # only what is said is for the test
    trio.run(main, Path(sys.argv[1]), *sys.argv[2:4], int(sys.argv[4]), sys.argv[5])
