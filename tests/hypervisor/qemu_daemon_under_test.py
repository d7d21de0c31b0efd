"""A daemon to be killed: runs a guest in QEMU, pauses it for a handoff, and stops for ever at a step of that."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
import trio

from tests.hypervisor.qemu_hosts import QemuHosts, odd, plan_with_devices
from vmmigrate.hypervisor.conformance import wait_heartbeats
from vmmigrate.hypervisor.qemu import saving
from vmmigrate.hypervisor.qemu.files import QemuFiles
from vmmigrate.hypervisor.qemu.pagestream import PageStream

# Where the daemon stops: before that call of the pause, in the order in which they come.
STEPS = ("running", "tracking", "receiving", "noting", "told", "standing", "paused")
# The same for a guest whose QEMU has to tell what it writes.
STREAM_STEPS = ("naming", "stopped", "noting", "told", "standing", "paused")


def stop_at(step: str, say: Any) -> None:
    """Replace one call of the pause by a wait without end; *say* tells that it was reached."""

    async def for_ever(*_: Any, **__: Any) -> Any:
        say()
        await trio.sleep_forever()

    def for_ever_in_thread(*_: Any, **__: Any) -> Any:
        say()
        while True:
            trio.from_thread.run(trio.sleep, 3600)

    if step == "receiving":
        saving._receive = for_ever
    elif step == "stopped":
        PageStream._take_the_rest = for_ever  # type: ignore[method-assign]
    elif step == "noting":
        QemuFiles.keep_state = for_ever_in_thread  # type: ignore[method-assign]
    elif step == "told":
        saving.expect_end = for_ever
    elif step == "standing":
        saving.wait_run_state = for_ever


async def main(root: Path, step: str, source: str) -> None:
    hosts, plan = QemuHosts(root), plan_with_devices(root)
    if source == "stream":
        hosts.settings, plan = replace(hosts.settings, use_tracker=False), odd(plan)
    guest = await hosts.build(plan, request_deadline_s=600)
    await guest.run((1, 1))
    status = await wait_heartbeats(guest, 100)

    def say() -> None:
        found_by = [guest.process.pid, guest.process.start_ticks, str(guest.process.socket_path), status.heartbeats]
        print(json.dumps(found_by), flush=True)

    if step == "tracking" or source == "stream":
        await guest.start_tracking()
        await guest.more_pages()
    if step in ("running", "tracking", "naming"):
        say()
        await trio.sleep_forever()
    stop_at(step, say)
    await guest.pause_for_handoff("m")
    say()
    await trio.sleep_forever()


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # only what is said is for the test
    trio.run(main, Path(sys.argv[1]), *sys.argv[2:])
