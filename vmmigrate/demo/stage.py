"""Where a demonstration takes place: a directory and two daemons, of which nothing is left however it ends."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import trio

from vmmigrate.api.client import HostClient
from vmmigrate.demo import daemons
from vmmigrate.demo.site import DESTINATION, SOURCE, Setting, Site, make_site
from vmmigrate.errors import MigrationCancelled
from vmmigrate.net.threads import open_group

T = TypeVar("T")
Say = Callable[[str], None]


async def until_signal(work: Callable[[], Awaitable[T]]) -> T:
    """What *work* gives. Raises: MigrationCancelled: by a signal; *work* has cleared away by then."""
    results: list[T] = []
    async with open_group() as nursery:
        await nursery.start(_cancel_on_signal, nursery.cancel_scope)
        results.append(await work())
        nursery.cancel_scope.cancel()
    if not results:
        raise MigrationCancelled("interrupted; everything that was started is ended and removed")
    return results[0]


async def _cancel_on_signal(
    scope: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            scope.cancel()


@contextlib.asynccontextmanager
async def open_site(setting: Setting) -> AsyncIterator[Site]:
    """A directory for everything, removed on leaving together with any guest that is still there."""
    root = _new_directory()
    try:
        yield await trio.to_thread.run_sync(make_site, root, setting)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(daemons.end_leftover_guests, root)
            await trio.to_thread.run_sync(shutil.rmtree, root)


def _new_directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="vmm-demo-")).resolve()


@contextlib.asynccontextmanager
async def open_hosts(site: Site, say: Say) -> AsyncIterator[tuple[HostClient, HostClient]]:
    """Two daemons that serve, each with a client."""
    async with daemons.daemon_process(site, SOURCE) as one, daemons.daemon_process(site, DESTINATION) as other:
        say(f"starting two host daemons, {SOURCE} and {DESTINATION}, with certificates of a new CA")
        source_url = await daemons.wait_ready(one, site, SOURCE)
        destination_url = await daemons.wait_ready(other, site, DESTINATION)
        async with (
            daemons.client_of(source_url, site, SOURCE) as source,
            daemons.client_of(destination_url, site, DESTINATION) as destination,
        ):
            yield source, destination
