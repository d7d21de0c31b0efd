"""Two hosts for benchmarks: daemons in processes of their own, guests that move to and fro between them.

Guests are those of the demo, with another program; every pause is told by the guest's own heartbeat. What a benchmark
asks of it, it does over the API, as an orchestrator would.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

from vmmigrate.api.client import HostClient
from vmmigrate.cli.moving import Move, Order, start_move
from vmmigrate.demo import daemons, guest
from vmmigrate.demo.site import DESTINATION, SOURCE, Site, make_site

FILL_DEADLINE_S: Final = 600.0
MOVE_DEADLINE_S: Final = 900.0
_POLL_S: Final = 0.02


@dataclass
class Pair:
    """Two hosts; `here` is the one that has the guest.

    Attributes:
        pids: Of the daemons, by host.
    """

    site: Site
    clients: dict[str, HostClient]
    pids: dict[str, int]
    here: str = SOURCE
    generation: int = 1
    moves: list[dict[str, Any]] = field(default_factory=list)

    @property
    def there(self) -> str:
        return DESTINATION if self.here == SOURCE else SOURCE

    async def boot(self, mib: int, program: Mapping[str, Any]) -> None:
        """A guest with *mib* MiB of RAM, which has touched what its program touches."""
        client = self.clients[self.here]
        request = {**guest.request(mib), "program": dict(program)}
        await client.post("/v1/instances", request)
        wanted = int(program.get("working_set_pages", int(program.get("working_set_mib", 0)) * 256))
        wanted = 0 if program.get("fill", True) is False else min(wanted, mib * 256 - 1)
        with trio.fail_after(FILL_DEADLINE_S):
            while (await self.shown())["guest"]["program"].get("filled_pages", 0) < wanted:  # noqa: ASYNC110
                await trio.sleep(_POLL_S)

    async def shown(self) -> dict[str, Any]:
        return dict(await self.clients[self.here].get(f"/v1/instances/{guest.INSTANCE}"))

    async def checked(self) -> dict[str, Any]:
        """What the guest says of its memory and its heartbeat."""
        return dict(await self.clients[self.here].post(f"/v1/instances/{guest.INSTANCE}:check"))

    async def start(self, **options: Any) -> Move:
        """Begin to move the guest to the other host."""
        self.generation += 1
        order = Order(instance_id=guest.INSTANCE, replacements=guest.replacements(self.generation), options=options)
        return await start_move(self.clients[self.here], self.clients[self.there], order)

    async def move(self, **options: Any) -> dict[str, Any]:
        """Move the guest to the other host; the record, whatever became of it."""
        move = await self.start(**options)
        with trio.fail_after(MOVE_DEADLINE_S):
            record = await move.wait_outcome(lambda record: None)
        if record["outcome"] == "moved":
            self.here = self.there
        return dict(record)

    async def wait_beats(self, more: int) -> None:
        """Until the guest has run for so many milliseconds more."""
        wanted = int((await self.shown())["guest"]["heartbeats"]) + more
        with trio.fail_after(FILL_DEADLINE_S):
            while int((await self.shown())["guest"]["heartbeats"]) < wanted:  # noqa: ASYNC110
                await trio.sleep(_POLL_S)

    async def delete(self) -> None:
        """End the guest; the next one needs a pair of its own, for there is one of a name."""
        await self.clients[self.here].delete(f"/v1/instances/{guest.INSTANCE}")


def _new_directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="vmm-bench-")).resolve()


@contextlib.asynccontextmanager
async def open_pair() -> AsyncIterator[Pair]:
    """Two daemons that serve; on leaving they and every guest are gone."""
    root = await trio.to_thread.run_sync(_new_directory)
    try:
        site = await trio.to_thread.run_sync(make_site, root)
        async with contextlib.AsyncExitStack() as stack:
            clients, pids = {}, {}
            for host in (SOURCE, DESTINATION):
                process = await stack.enter_async_context(daemons.daemon_process(site, host))
                url = await daemons.wait_ready(process, site, host)
                clients[host] = await stack.enter_async_context(daemons.client_of(url, site, host))
                pids[host] = process.pid
            yield Pair(site, clients, pids)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(daemons.end_leftover_guests, root)
            await trio.to_thread.run_sync(shutil.rmtree, root)
