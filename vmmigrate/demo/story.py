"""The demonstration from beginning to end: a guest is booted, moved while it runs, and proved to be whole."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import trio

from vmmigrate.api.client import HostClient
from vmmigrate.cli.exits import Exit, exit_of_outcome
from vmmigrate.cli.logs import configure_logs
from vmmigrate.cli.moving import Order, Record, start_move
from vmmigrate.cli.output import complain, print_json
from vmmigrate.demo import guest
from vmmigrate.demo.embedded_guest import EmbeddedGuest
from vmmigrate.demo.guests import DemoGuest, Watch
from vmmigrate.demo.qemu_guest import QemuGuest
from vmmigrate.demo.report import summary
from vmmigrate.demo.stage import open_hosts, open_site, until_signal
from vmmigrate.demo.telling import Teller, make_teller
from vmmigrate.errors import HypervisorError

_POLL_S: Final = 0.05
_FILL_DEADLINE_S: Final = 120.0
_LIFE_DEADLINE_S: Final = 10.0

_GUESTS: Final[Mapping[str, Callable[[int], DemoGuest]]] = {"embedded": EmbeddedGuest, "qemu": QemuGuest}


def tell(mib: int, *, hypervisor: str, as_json: bool) -> Exit:
    """The whole demo. Raises: VmMigrateError: what went wrong; nothing is left."""
    configure_logs("error")
    demo_guest = _GUESTS[hypervisor](mib)
    demo_guest.check_tools()
    record = trio.run(until_signal, partial(_demonstrate, demo_guest, mib, make_teller(as_json)))
    if as_json:
        print_json(record)
    else:
        print(summary(record, with_rounds=sys.stderr.isatty()), flush=True)
    proved = record["guest"] is None or (record["guest"]["consistent"] and record["guest"]["single_owner"])
    if not proved:
        complain("the guest moved, but it is not whole")
        return Exit.FAILED
    if record["error"]:
        complain(f"{record['error']['message']} [{record['error']['code']}]")
    return exit_of_outcome(record["outcome"])


async def _demonstrate(demo_guest: DemoGuest, mib: int, teller: Teller) -> Record:
    """The record of the migration, with what became of the guest."""
    async with open_site(demo_guest.setting) as site:
        await trio.to_thread.run_sync(demo_guest.prepare, site)
        async with (
            open_hosts(site, teller.say) as (source, destination),
            demo_guest.watched(site) as watch,
        ):
            rewritten = f"it rewrites {demo_guest.working_set_mib} MiB all the time"
            teller.say(f"booting a guest with {mib} MiB of RAM at {source.url}; {rewritten}")
            await source.post("/v1/instances", demo_guest.request(site))
            await _wait_at_work(source, demo_guest)
            record = await _move(demo_guest, source, destination, teller)
            if record["outcome"] != "moved":
                return {**record, "guest": None}
            teller.say("checking every page, the disk and the heartbeat of the guest where it runs now")
            return {**record, "guest": await _examine(destination, demo_guest, watch)}


async def _wait_at_work(client: HostClient, demo_guest: DemoGuest) -> None:
    with trio.move_on_after(_FILL_DEADLINE_S):
        while True:
            shown = await client.get(f"/v1/instances/{guest.INSTANCE}")
            if shown["state"] != "running" or demo_guest.is_at_work(shown["guest"]):
                break
            await trio.sleep(_POLL_S)
        if shown["state"] == "running":
            return
        raise HypervisorError(f"the guest is {shown['state']}, it should be running", code="guest_lost")
    raise HypervisorError(f"the guest did not fill its RAM within {_FILL_DEADLINE_S:g} s", code="guest_unresponsive")


async def _move(demo_guest: DemoGuest, source: HostClient, destination: HostClient, teller: Teller) -> Record:
    teller.say(f"migrating it to {destination.url} while it runs")
    options = {"downtime_ms": guest.DOWNTIME_MS, "max_rounds": guest.MAX_ROUNDS, "verify": "full", "force": True}
    order = Order(instance_id=guest.INSTANCE, replacements=demo_guest.replacements(), options=options)
    move = await start_move(source, destination, order)
    with teller.progress() as on_progress:
        return await move.wait_outcome(on_progress)


async def _examine(destination: HostClient, demo_guest: DemoGuest, watch: Watch) -> dict[str, Any]:
    """What the guest says of itself, and what was seen of it on both hosts."""
    await _wait_lived_on(destination, demo_guest)
    check = await destination.post(f"/v1/instances/{guest.INSTANCE}:check")
    said = {name: check[name] for name in ("consistent", "reason", "pages_checked")}
    return {**said, **watch.verdict(check)}


async def _wait_lived_on(client: HostClient, demo_guest: DemoGuest) -> None:
    """Until the guest has run for a while where it is now."""
    begun, first = time.monotonic(), None
    while time.monotonic() - begun < _LIFE_DEADLINE_S:
        seen = (await client.get(f"/v1/instances/{guest.INSTANCE}"))["guest"]
        first = first or seen
        if seen and demo_guest.has_lived_on(first, seen):
            return
        await trio.sleep(_POLL_S)
    raise HypervisorError(
        "the guest does not live on at the destination: no heartbeat, or its disk does not answer", code="guest_lost"
    )
