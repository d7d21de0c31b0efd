"""QEMU's device state, out of one QEMU and into another, by QEMU's own migration with `x-ignore-shared`.

Guest RAM is shared memory and is not in the stream. Saving stops the guest and ends in the run state `postmigrate`: it
stands still then, its images are inactive, and nothing but a command makes it go on. Until then it goes on by itself
when the connection breaks, which is what a daemon that dies leaves behind. Not so where guest RAM is in the stream, too
(`pagestream`): QEMU stops the guest before the end, and waits for the word to go on (`pre-switchover`) without looking
at the connection. A daemon that dies then leaves a guest that is paused until the next one calls it off (`settle`).

The stream is given to the other QEMU as it is; that one is good for one try: if it cannot load the state it ends, and
says why on its standard error; later ones stay until they were asked.

Source: QEMU, migration/migration.c (7.2).
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import trio

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.qemu.qmp import Qmp, QmpError, text_of
from vmmigrate.hypervisor.qemu.stream import MAX_STREAM_BYTES, DeviceStream, whole_stream

_CHUNK_BYTES: Final = 1 << 18
_UNLIMITED: Final = 1 << 40
LOADED: Final = bytes.fromhex("0001 0004 00000000")  # return path: message 1 (shut), four bytes, all is well
_UNDER_WAY: Final = frozenset({"setup", "active", "pre-switchover", "device", "cancelling"})
_OVER: Final = frozenset({"completed", "failed", "cancelled"})
_LOOK_AGAIN_S: Final = 0.0005
_CALL_OFF_S: Final = 5.0
NO_REASON: Final = "no reason given"

Ask = Callable[..., Awaitable[Any]]
Note = Callable[[DeviceStream], Awaitable[None]]


async def save(ask: Ask, qmp: Qmp, path: Path, note: Note, *, was_running: bool) -> None:
    """Stop the guest, and save the state of all that is not shared memory. The caller sets the deadline, and shields.

    Afterwards the run state is `postmigrate`.

    Args:
        note: Given the stream before QEMU is told that it was taken: from then on there is no other copy of it.

    Raises: HypervisorError `pause_failed`, or what *ask* raises, or cancelled: the guest is as it was, or the process
        is gone.
    """
    with contextlib.closing(trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as listener:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # of the last time; microseconds
        await listener.bind(str(path))
        listener.listen(1)
        seen = qmp.events_seen
        try:
            await ask("migrate", uri=f"unix:{path}")
            connection, _ = await listener.accept()
            with contextlib.closing(connection):
                await note(await _receive(connection))
                await connection.send(LOADED)
                await expect_end(ask, qmp, seen)
                await wait_run_state(ask, "postmigrate")
        except BaseException:
            with trio.CancelScope(shield=True):
                await call_off(ask, was_running)
            raise


async def prepare(ask: Ask) -> None:
    """Once for each QEMU, so that nothing of it is part of a pause."""
    await choose(ask, names_ram=False)
    await ask("migrate-set-parameters", max_bandwidth=_UNLIMITED)


_ALWAYS: Final = ("events", "return-path", "late-block-activate")
CAPABILITIES: Final = (*_ALWAYS, "x-ignore-shared", "pause-before-switchover")  # those that are ours to choose


async def choose(ask: Ask, *, names_ram: bool) -> None:
    """What QEMU's next migration is for: guest RAM too (`pagestream`), or all but that."""
    capabilities = {
        **dict.fromkeys(_ALWAYS, True),
        "x-ignore-shared": not names_ram,
        "pause-before-switchover": names_ram,
    }
    listed = [{"capability": name, "state": state} for name, state in capabilities.items()]
    await ask("migrate-set-capabilities", capabilities=listed)


async def _receive(connection: trio.socket.SocketType) -> DeviceStream:
    stream = bytearray()
    while (whole := whole_stream(stream)) is None:
        chunk = await connection.recv(_CHUNK_BYTES)
        stream += chunk
        if not chunk or len(stream) > MAX_STREAM_BYTES:
            why = "it breaks off" if not chunk else f"it has more than {MAX_STREAM_BYTES} bytes"
            raise HypervisorError(f"QEMU's device state cannot be saved: {why}", code="pause_failed")
    return whole


async def expect_end(ask: Ask, qmp: Qmp, seen: int) -> None:
    """Wait until QEMU has taken its migration for done, as an event beyond number *seen* tells.

    Raises: HypervisorError `pause_failed`.
    """
    event = await qmp.wait_event("MIGRATION", seen, lambda data: data.get("status") in _OVER)
    if event.data["status"] != "completed":
        raise HypervisorError(f"QEMU did not save its state: {await _reason(ask)}", code="pause_failed")


async def _reason(ask: Ask) -> str:
    with contextlib.suppress(HypervisorError):
        return text_of(await ask("query-migrate"), "error-desc")
    return NO_REASON


async def wait_run_state(ask: Ask, wanted: str) -> None:
    """QEMU tells that a migration is over just before it sets the run state that follows from it."""
    while text_of(await ask("query-status"), "status") != wanted:  # noqa: ASYNC110 (another process' state)
        await trio.sleep(_LOOK_AGAIN_S)


async def call_off(ask: Ask, was_running: bool) -> None:
    """End QEMU's migration; a guest that ran goes on by itself, or is told to."""
    with contextlib.suppress(HypervisorError), trio.move_on_after(_CALL_OFF_S):
        with contextlib.suppress(QmpError):
            await ask("migrate_cancel")
        while text_of(await ask("query-migrate"), "status") in _UNDER_WAY:  # noqa: ASYNC110 (another process' state)
            await trio.sleep(_LOOK_AGAIN_S)
        if was_running and text_of(await ask("query-status"), "status") != "running":
            await ask("cont")


async def settle(ask: Ask) -> None:
    """Make an end of what a daemon that died had QEMU migrate: what nobody reads fails by itself, but one that waits
    for the word to go on is called off. A guest that QEMU stopped goes on. The caller sets the deadline."""
    while (status := (await ask("query-migrate") or {}).get("status")) in _UNDER_WAY:
        if status == "pre-switchover":
            with contextlib.suppress(QmpError):
                await ask("migrate_cancel")
        await trio.sleep(_LOOK_AGAIN_S)
    await choose(ask, names_ram=False)


async def prepare_loading(ask: Ask, path: Path, *, outlives_failure: bool = False) -> None:
    """Let a QEMU that was started with `-incoming defer` wait for its state at the socket *path*.

    Args:
        outlives_failure: It shall not end when it cannot load the state, but say why. Only later ones know that.
    """
    await ask("migrate-incoming", uri=f"unix:{path}", **({"exit-on-error": False} if outlives_failure else {}))


async def load(qmp: Qmp, path: Path, stream: bytes) -> None:
    """Give the state to a QEMU that waits for it: it is stopped then, its images still inactive.

    Raises: HypervisorError `device_load_failed`, OSError, EOFError: that QEMU is of no use any more.
    """
    seen = qmp.events_seen
    with contextlib.closing(trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as connection:
        await connection.connect(str(path))
        left = memoryview(stream)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has seen enough; why, it tells by itself
            while left:
                left = left[await connection.send(left) :]
            connection.shutdown(socket.SHUT_WR)  # a stream that lacks something fails now, instead of being waited for
        event = await qmp.wait_event("MIGRATION", seen, lambda data: data.get("status") in _OVER)
        if event.data["status"] != "completed":
            why = await _reason(qmp.execute)
            with contextlib.suppress(OSError, EOFError, HypervisorError):
                await qmp.execute("quit")
            raise HypervisorError(f"QEMU did not load the device state: {why}", code="device_load_failed")
