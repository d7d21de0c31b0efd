"""Guest processes that no daemon of today has built: looked for by their sockets, asked who they are.

A lost journal names no process, and a daemon may die between the start of a process and its record. What is found here
explains itself by its stamp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import structlog
import trio

from vmmigrate.errors import HypervisorError, VmMigrateError
from vmmigrate.hypervisor import kernel, processes
from vmmigrate.hypervisor.base import FoundGuest, GuestProcess
from vmmigrate.hypervisor.embedded import plans
from vmmigrate.hypervisor.embedded.link import GuestLink, close_all

log = structlog.get_logger(__name__)


async def greet(socket: Path, deadline_s: float) -> FoundGuest | None:
    """Who listens at *socket*; None when it says nothing sensible in time, which is logged.

    Raises: ConnectionRefusedError: no process has that socket any more.
    """
    link = GuestLink(socket)
    try:
        with trio.fail_after(deadline_s):
            return _found(socket, await _greeting(link))
    except ConnectionRefusedError:
        raise
    except (OSError, EOFError, KeyError, TypeError, ValueError, trio.TooSlowError, VmMigrateError) as exc:
        log.error("guest.unidentified", socket=str(socket), why=str(exc) or type(exc).__name__)
        return None
    finally:
        link.close()


async def silence(process: GuestProcess, epoch: tuple[int, int], record: int, deadline_s: float) -> bool:
    """As `base.Hypervisor.silence`."""
    watch = processes.find(process.pid, process.start_ticks)
    if watch is None:
        return False
    link = GuestLink(process.socket_path)
    try:
        with trio.fail_after(deadline_s):
            await _greeting(link)
            await link.request("silence", epoch=list(epoch), record=record)
        return True
    except (OSError, EOFError, trio.TooSlowError) as exc:
        if not watch.is_alive():
            return False
        text = f"process {process.pid} cannot be paused: {exc or type(exc).__name__}"
        raise HypervisorError(text, code="guest_unresponsive") from exc
    finally:
        link.close()
        watch.close()


async def _greeting(link: GuestLink) -> dict[str, Any]:
    answer, descriptors = await link.open()
    close_all(descriptors)
    return answer


def _found(socket: Path, answer: dict[str, Any]) -> FoundGuest | None:
    started = kernel.start_ticks_of(answer["pid"])
    if started is None:
        return None
    return FoundGuest(GuestProcess(answer["pid"], started, socket), plans.status_from_map(answer["status"]))
