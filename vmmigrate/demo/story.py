"""The demonstration from beginning to end, and the removal of everything that it made."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from vmmigrate.api.client import HostClient
from vmmigrate.cli.exits import Exit, exit_of_outcome
from vmmigrate.cli.logs import configure_logs
from vmmigrate.cli.moving import OnProgress, Order, Record, start_move
from vmmigrate.cli.output import complain, print_json
from vmmigrate.cli.progress import line_progress, terminal_progress
from vmmigrate.demo import daemons, guest
from vmmigrate.demo.report import summary
from vmmigrate.demo.site import DESTINATION, SOURCE, Site, make_site
from vmmigrate.errors import HypervisorError, MigrationCancelled
from vmmigrate.hypervisor.embedded.witness import read_witnesses
from vmmigrate.hypervisor.intervals import check_single_owner
from vmmigrate.net.threads import open_group

_POLL_S: Final = 0.05
_FILL_DEADLINE_S: Final = 120.0
_BEAT_DEADLINE_S: Final = 10.0
_BEATS_AFTER_MOVE: Final = 200  # so that the check sees a guest that runs, not one that only arrived

Say = Callable[[str], None]


@dataclass(frozen=True)
class Teller:
    """How the story is told: `say` a line, and show progress."""

    say: Say
    progress: Callable[[], AbstractContextManager[OnProgress]]


def tell(mib: int, *, as_json: bool) -> Exit:
    """The whole demo. Raises: VmMigrateError: what went wrong; nothing is left."""
    configure_logs("error")
    record = trio.run(_until_signal, mib, _teller(as_json))
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


def _teller(as_json: bool) -> Teller:
    if as_json:
        return Teller(lambda line: None, lambda: line_progress(lambda line: None))
    say = partial(print, flush=True)
    if sys.stderr.isatty():
        return Teller(say, lambda: terminal_progress(sys.stderr))
    return Teller(say, lambda: line_progress(lambda line: say(f"  {line}")))


async def _until_signal(mib: int, teller: Teller) -> Record:
    """Raises: MigrationCancelled: by a signal; everything is removed by then."""
    record: Record | None = None
    async with open_group() as nursery:
        await nursery.start(_cancel_on_signal, nursery.cancel_scope)
        async with _site() as site, _hosts(site, teller) as (source, destination):
            record = await _demonstrate(site, source, destination, mib, teller)
        nursery.cancel_scope.cancel()
    if record is None:
        raise MigrationCancelled("interrupted; everything that was started is ended and removed")
    return record


async def _cancel_on_signal(
    scope: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            scope.cancel()


@contextlib.asynccontextmanager
async def _site() -> AsyncIterator[Site]:
    """A directory for everything, removed on leaving together with any guest that is still there."""
    root = _new_directory()
    try:
        yield await trio.to_thread.run_sync(make_site, root)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(daemons.end_leftover_guests, root)
            await trio.to_thread.run_sync(shutil.rmtree, root)


def _new_directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="vmm-demo-")).resolve()


@contextlib.asynccontextmanager
async def _hosts(site: Site, teller: Teller) -> AsyncIterator[tuple[HostClient, HostClient]]:
    """Two daemons that serve, each with a client."""
    async with daemons.daemon_process(site, SOURCE) as one, daemons.daemon_process(site, DESTINATION) as other:
        teller.say(f"starting two host daemons, {SOURCE} and {DESTINATION}, with certificates of a new CA")
        source_url = await daemons.wait_ready(one, site, SOURCE)
        destination_url = await daemons.wait_ready(other, site, DESTINATION)
        async with (
            daemons.client_of(source_url, site, SOURCE) as source,
            daemons.client_of(destination_url, site, DESTINATION) as destination,
        ):
            yield source, destination


async def _demonstrate(
    site: Site, source: HostClient, destination: HostClient, mib: int, teller: Teller
) -> dict[str, Any]:
    """The record of the migration, with what became of the guest."""
    working_set_mib = guest.working_set_pages(mib) // 256
    teller.say(f"booting a guest with {mib} MiB of RAM at {source.url}; it rewrites {working_set_mib} MiB all the time")
    await source.post("/v1/instances", guest.request(mib))
    await _wait_filled(source, guest.working_set_pages(mib))
    _keep_witnesses(site, SOURCE)
    teller.say(f"migrating it to {destination.url} while it runs")
    order = Order(
        instance_id=guest.INSTANCE,
        replacements=guest.replacements(),
        options={
            "downtime_ms": guest.DOWNTIME_MS,
            "max_rounds": guest.MAX_ROUNDS,
            "verify": "full",
            "force": True,
        },
    )
    move = await start_move(source, destination, order)
    with teller.progress() as on_progress:
        record = await move.wait_outcome(on_progress)
    if record["outcome"] != "moved":
        return {**record, "guest": None}
    teller.say("checking every page, the disk and the heartbeat of the guest where it runs now")
    return {**record, "guest": await _examine(site, destination)}


async def _wait_filled(client: HostClient, pages: int) -> None:
    with trio.move_on_after(_FILL_DEADLINE_S):
        while True:
            shown = await client.get(f"/v1/instances/{guest.INSTANCE}")
            if shown["state"] != "running" or shown["guest"]["program"]["filled_pages"] >= pages:
                break
            await trio.sleep(_POLL_S)
        if shown["state"] == "running":
            return
        raise HypervisorError(f"the guest is {shown['state']}, it should be running", code="guest_lost")
    raise HypervisorError(f"the guest did not fill its RAM within {_FILL_DEADLINE_S:g} s", code="guest_unresponsive")


async def _examine(site: Site, destination: HostClient) -> dict[str, Any]:
    """What the guest says of itself, and what the witnesses of both hosts say of it."""
    await _wait_beats(destination)
    check = await destination.post(f"/v1/instances/{guest.INSTANCE}:check")
    _keep_witnesses(site, DESTINATION)
    verdict = check_single_owner(read_witnesses(site.witnesses, guest.INSTANCE))
    heartbeat = check["heartbeat"]
    return {
        "consistent": check["consistent"],
        "reason": check["reason"],
        "pages_checked": check["pages_checked"],
        "heartbeat_gap_ms": max(heartbeat["move_gaps_ms"], default=0.0),
        "heartbeat_largest_gap_ms": heartbeat["largest_gap_ms"],
        "heartbeat_steady_p99_ms": heartbeat["steady_p99_ms"],
        "heartbeats": heartbeat["heartbeats"],
        "single_owner": verdict.single and verdict.hosts == (SOURCE, DESTINATION),
        "ran_on": list(verdict.hosts),
        "witness_problems": list(verdict.problems),
    }


async def _wait_beats(client: HostClient) -> None:
    """Until the guest has run for a while where it is now."""
    begun, wanted = time.monotonic(), None
    while time.monotonic() - begun < _BEAT_DEADLINE_S:
        shown = await client.get(f"/v1/instances/{guest.INSTANCE}")
        beats = int((shown["guest"] or {}).get("heartbeats", 0))
        wanted = wanted or beats + _BEATS_AFTER_MOVE
        if beats >= wanted:
            return
        await trio.sleep(_POLL_S)
    raise HypervisorError("the guest does not run at the destination: no heartbeat", code="guest_lost")


def _keep_witnesses(site: Site, host: str) -> None:
    """By a second name: a guest's files go with the guest, and the source's goes as soon as it has moved."""
    for path in site.runtime(host).glob("*.witness"):
        with contextlib.suppress(FileExistsError):
            os.link(path, site.witnesses / f"{host}-{path.name}")
