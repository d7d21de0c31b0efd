"""A daemon to be killed: builds a guest, brings it to a step, says how to find it, and waits for its end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import trio

from tests.hypervisor.hosts import Hosts, plan_of
from vmmigrate.hypervisor.conformance import wait_heartbeats
from vmmigrate.hypervisor.embedded.remote import EmbeddedGuest


async def main(root: Path, step: str) -> None:
    guest = await Hosts(root).build(plan_of())
    await guest.run((1, 1))
    status = await wait_heartbeats(guest, 30)
    if step == "tracking":
        await guest.start_tracking()
    if step in ("paused", "handoff_resumed"):
        await guest.pause_for_handoff("m")
        status = await guest.status()
    if step == "handoff_resumed":
        await guest.run((1, 1))
    found_by = [guest.process.pid, guest.process.start_ticks, str(guest.process.socket_path), status.heartbeats]
    print(json.dumps(found_by), flush=True)
    if step == "in_request":
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(_ask_for_ever, guest)
    await trio.sleep_forever()


async def _ask_for_ever(guest: EmbeddedGuest) -> None:
    while True:
        await guest.self_check()


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), sys.argv[2])
