"""A QEMU that shall name pages and does not: whoever asked is told, or can go, and it is then as it was before.

What answers here is no QEMU, but does as it is told; the socket is one.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.hypervisor.qemu_hosts import short_directory
from tests.hypervisor.test_qemu_ramstream import HEAD, RAM_PAGES, page_record, ram_part
from tests.hypervisor.test_qemu_stream import EOS, RAM_ID, record
from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.qemu import pagestream, words
from vmmigrate.hypervisor.qemu.pagestream import PageStream
from vmmigrate.hypervisor.qemu.qmp import Qmp, QmpError
from vmmigrate.memory import MIB

ENDLESS_BYTES = 64 * MIB  # then the other end hangs up: more than anybody may have read in one go
IN_SOCKETS_BYTES = MIB
CHUNK_BYTES = 1 << 18
BEGIN = b"\x02" + struct.pack(">I", RAM_ID)
NOISE = {
    "records that say nothing": (BEGIN, record(words.FLUSH)),
    "sections with nothing in them": (b"", ram_part(EOS)),
    "pages that are nobody's": (BEGIN + page_record(1, 7, block="pc.bios"), page_record(1, 7)),
    "zeros that are nobody's": (BEGIN + page_record(1, None, block="pc.bios"), page_record(1, None)),
}


@pytest.fixture
def short() -> Iterator[Path]:
    yield from short_directory()


class Peer:
    """Says that it migrates, and pours *noise* into the socket.

    Attributes:
        refused: A command that it refuses, as often as `refusals` says.
        switched: Capabilities as they were chosen last.
        poured: How many bytes went into the socket.
    """

    def __init__(self, nursery: trio.Nursery, noise: tuple[bytes, bytes], remaining: int) -> None:
        self._nursery, self._noise, self._remaining = nursery, noise, remaining
        self._status = "none"
        self.refused, self.refusals = "", 0
        self.comes = True
        self.switched: dict[str, bool] = {}
        self.asked: list[str] = []
        self.poured = 0

    async def ask(self, command: str, **arguments: Any) -> Any:
        await trio.lowlevel.checkpoint()
        self.asked.append(command)
        if command == self.refused and self.refusals:
            self.refusals -= 1
            raise QmpError(f"{command}: not today")
        if command == "migrate-set-capabilities":
            self.switched |= {item["capability"]: item["state"] for item in arguments["capabilities"]}
        elif command == "migrate":
            self._status = "active"
            if self.comes:
                self._nursery.start_soon(self._pour, arguments["uri"].removeprefix("unix:"))
        elif command == "migrate_cancel":
            self._status = "cancelled"
        elif command == "query-migrate":
            return {"status": self._status, "ram": {"dirty-sync-count": 1, "remaining": self._remaining}}
        return {}

    async def _pour(self, path: str) -> None:
        before, again = self._noise
        chunk = again * (CHUNK_BYTES // len(again))
        with contextlib.suppress(OSError), trio.socket.socket(socket.AF_UNIX) as sock:
            await sock.connect(path)
            left = memoryview(HEAD + before)
            while self.poured < ENDLESS_BYTES:
                sent = await sock.send(left)
                self.poured, left = self.poured + sent, left[sent:] or memoryview(chunk)

    @property
    def saves_next(self) -> bool:
        """Its next migration is that of a pause, and waits for nobody."""
        return self.switched["x-ignore-shared"] and not self.switched["pause-before-switchover"]


async def has_run() -> bool:
    return False


@asynccontextmanager
async def opened(
    directory: Path, noise: str = "records that say nothing", remaining: int = 0
) -> AsyncIterator[tuple[PageStream, Peer]]:
    async with trio.open_nursery() as nursery:
        peer = Peer(nursery, NOISE[noise], remaining)
        stream = PageStream(peer.ask, Qmp(directory / "qmp"), directory / "pages", RAM_PAGES, has_run)
        try:
            yield stream, peer
        finally:
            stream.close()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("noise", NOISE)
async def test_there_is_an_end_to_what_names_no_pages(noise: str, short: Path) -> None:
    """A thread that reads is not given up: it has to come back by itself."""
    async with opened(short, noise) as (stream, peer):
        await stream.start()

        await stream.ahead()

        assert peer.poured < 2 * 2 * MIB + 2 * IN_SOCKETS_BYTES
        assert (await stream.take()).is_empty()


async def test_what_is_read_in_one_go_takes_so_long_at_most(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where many pages are to come, and so very much of what names none may come between."""
    monkeypatch.setattr(pagestream, "_READ_S", 0.0)
    async with opened(short, remaining=1 << 40) as (stream, peer):
        await stream.start()

        await stream.ahead()

        assert peer.poured < 2 * IN_SOCKETS_BYTES


async def test_who_waits_for_pages_that_never_come_can_be_told_to_go(short: Path) -> None:
    async with opened(short) as (stream, _):
        await stream.start()

        with trio.move_on_after(0.01) as scope:
            await stream.more()

        assert scope.cancelled_caught


async def test_a_qemu_that_does_not_connect_is_told_and_saves_as_before(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pagestream, "_ACCEPT_S", 0.01)
    async with opened(short) as (stream, peer):
        peer.comes = False

        with pytest.raises(HypervisorError, match=r"not connected within 0\.01 s") as caught:
            await stream.start()

        assert caught.value.code == "dirty_tracking"
        assert not stream.is_naming
        assert peer.saves_next


@pytest.mark.parametrize("command", ["migrate-set-parameters", "migrate", "query-migrate"])
async def test_a_qemu_that_refuses_to_begin_saves_as_before(command: str, short: Path) -> None:
    async with opened(short) as (stream, peer):
        peer.refused, peer.refusals = command, 1

        with pytest.raises(QmpError, match=command):
            await stream.start()

        assert not stream.is_naming
        assert peer.saves_next


async def test_a_socket_that_cannot_be_made_is_told_and_qemu_saves_as_before(short: Path) -> None:
    async with opened(short) as (stream, peer):
        (short / "pages").mkdir()

        with pytest.raises(HypervisorError) as caught:
            await stream.start()

        assert caught.value.code == "dirty_tracking"
        assert "migrate" not in peer.asked
        assert peer.saves_next


async def test_an_end_that_qemu_did_not_hear_is_said_again(short: Path) -> None:
    async with opened(short) as (stream, peer):
        await stream.start()
        peer.refused, peer.refusals = "migrate-set-capabilities", 1
        with pytest.raises(QmpError):
            await stream.stop()
        assert not peer.saves_next

        await stream.stop()

        assert peer.saves_next


async def test_who_has_not_begun_has_nothing_to_stop(short: Path) -> None:
    async with opened(short) as (stream, peer):
        await stream.stop()

        assert peer.asked == []
