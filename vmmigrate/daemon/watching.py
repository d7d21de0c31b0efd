"""The watch over a guest that runs: how it ends, if nobody ends it.

Somebody watches every guest for as long as the daemon lives, and a guest may have taken its process over. What nobody
expected of one of them is a defect; but the end of the daemon, and of its care for all the others, it must not be.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import structlog
import trio

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.base import Guest
from vmmigrate.net.threads import open_group

log = structlog.get_logger(__name__)

AGAIN_S: Final = 1.0


async def how_it_ends(guest: Guest) -> HypervisorError:
    """Wait until *guest* has powered itself off, or its process is gone; which of both."""
    error = HypervisorError("the guest process ended by itself", code="guest_lost")
    async with open_group() as group:

        async def wait_power_off() -> None:
            nonlocal error
            await untiringly(guest.wait_power_off, guest)
            error = HypervisorError("the guest powered itself off", code="guest_powered_off")
            group.cancel_scope.cancel()

        group.start_soon(wait_power_off)
        await untiringly(guest.wait_exit, guest)
        group.cancel_scope.cancel()
    return error


async def untiringly(watch: Callable[[], Awaitable[object]], guest: Guest) -> None:
    """Call *watch* until it returns; that it fails is logged once."""
    is_told = False
    while True:
        try:
            await watch()
            return
        except Exception:
            if not is_told:
                log.exception("guest.watch_failed", instance=guest.plan.instance_id, pid=guest.process.pid)
            is_told = True
            await trio.sleep(AGAIN_S)
