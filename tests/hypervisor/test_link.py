"""Several requests at once on the one connection to a guest process."""

from __future__ import annotations

import itertools
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from vmmigrate.hypervisor.embedded import protocol
from vmmigrate.hypervisor.embedded.link import GuestLink

ORDERS = list(itertools.permutations(["first", "second", "never"]))


class Peer:
    """The other end: hears requests, and answers when and in what chunks it is told to."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock
        self._decoder = protocol.FrameDecoder()
        self._numbers: dict[str, int] = {}

    async def hear(self, requests: int) -> None:
        while len(self._numbers) < requests:
            self._decoder.receive(await self._sock.recv(1 << 16))
            while (message := self._decoder.next_message()) is not None:
                self._numbers[message["op"]] = message["id"]

    async def answer(self, *ops: str) -> None:
        frames = [protocol.encode_frame({"id": self._numbers[op], "result": op}) for op in ops]
        await self._sock.send(b"".join(frames))


@asynccontextmanager
async def connected(tmp_path: Path) -> AsyncIterator[tuple[GuestLink, Peer]]:
    path = tmp_path / "guest.sock"
    listener = trio.socket.socket(socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen()
    link = GuestLink(path)
    with listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.open)
            sock, _ = await listener.accept()
            await sock.recv(1 << 16)
            await sock.send(protocol.encode_frame({"version": 1}))
        with sock:
            yield link, Peer(sock)
            link.close()


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
async def test_replies_that_come_together_reach_everyone_whoever_reads_and_whoever_goes_on_waiting(
    tmp_path: Path, order: tuple[str, ...]
) -> None:
    answered: list[str] = []

    async def ask(link: GuestLink, op: str) -> None:
        answered.append(await link.request(op))

    async with connected(tmp_path) as (link, peer), trio.open_nursery() as nursery:
        for op in order:
            nursery.start_soon(ask, link, op)
            await wait_all_tasks_blocked()
        await peer.hear(3)
        await peer.answer("first", "second")

        with trio.fail_after(5):
            while len(answered) < 2:
                await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.cancel_scope.cancel()

    assert sorted(answered) == ["first", "second"]


async def test_when_the_one_who_reads_gives_up_another_goes_on_reading(tmp_path: Path) -> None:
    async with connected(tmp_path) as (link, peer), trio.open_nursery() as nursery:
        reader = trio.CancelScope()

        async def give_up() -> None:
            with reader:
                await link.request("given up")

        nursery.start_soon(give_up)
        await wait_all_tasks_blocked()

        async def cancel_and_answer() -> None:
            await peer.hear(2)
            await wait_all_tasks_blocked()
            reader.cancel()
            await peer.answer("given up", "kept")

        nursery.start_soon(cancel_and_answer)
        with trio.fail_after(5):
            assert await link.request("kept") == "kept"
