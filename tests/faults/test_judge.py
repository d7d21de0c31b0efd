"""The judge of `make faults` finds what is broken, and the relay breaks what it says."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio
import trio.testing

from tools.faults.judge import judge
from tools.faults.leaks import descriptors, leftover_files, more_than
from tools.faults.pair import NAMES, Pair
from tools.faults.relay import Boundary, Damage, Relay, Side
from tools.faults.site import open_site
from tools.faults.trial import create_guest

RECORD = b"\x17\x03\x03\x00\x04abcd"


@pytest.mark.slow
async def test_a_guest_that_is_lost_without_leave_and_what_it_leaves_behind_are_found(tmp_path: Path) -> None:
    """Nothing struck the guest as far as the judge knows: it is dead all the same, and a file lies around."""
    async with open_site(tmp_path, *NAMES) as site:
        pair = Pair(site)
        await pair.start()
        source = pair.hosts["source"]
        instance = await create_guest(pair)
        os.kill((await source.instance(instance))["guest"]["pid"], signal.SIGKILL)
        with trio.fail_after(10):
            while (await source.instance(instance))["state"] != "lost":
                await trio.sleep(0.01)
        (source.runtime / "forgotten.sock").touch()

        verdict = await judge(pair, instance, "00000000-0000-0000-0000-000000000000", None, aftermath_s=0.1)

    assert verdict.owner is None
    assert [text.partition(":")[0] for text in verdict.problems] == [
        "not exactly one owner",
        "the source says unknown_migration, the owner is nobody",
        "run-source/forgotten.sock is left over",
    ]


def test_a_descriptor_more_than_before_is_found_by_its_kind(tmp_path: Path) -> None:
    before = descriptors(os.getpid(), frozenset())
    memory, reading, writing = os.memfd_create("leaked"), *os.pipe()

    found = more_than(descriptors(os.getpid(), frozenset()), before)

    assert found == ["1 memfd more than before", "2 pipe more than before"]
    for fd in (memory, reading, writing):
        os.close(fd)


def test_connections_are_told_from_listeners_and_from_those_of_the_onlooker(tmp_path: Path) -> None:
    async def look() -> tuple[list[str], list[str]]:
        before = descriptors(os.getpid(), frozenset())
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        async with listeners[0], await trio.open_tcp_stream("127.0.0.1", port):
            ours = descriptors(os.getpid(), frozenset({port}))
            return more_than(descriptors(os.getpid(), frozenset()), before), more_than(ours, before)

    everything, without_ours = trio.run(look)

    assert "1 connection more than before" in everything
    assert "1 listener more than before" in everything
    assert not [text for text in without_ours if "connection" in text]


def test_files_are_left_over_unless_they_are_the_journal_a_record_or_a_tombstone(tmp_path: Path) -> None:
    state, runtime = tmp_path / "state", tmp_path / "run"
    for name in ("state/instances/moved.json", "state/instances/lost.json", "state/arrivals/m.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("state/journal.vmmj", "state/journal.lock", "state/migrations/m.source.json", "run/abc.sock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    assert leftover_files(state, runtime, ["moved"]) == [
        "run/abc.sock is left over",
        "arrivals/m.json is left over",
        "instances/lost.json is left over",
    ]


@pytest.mark.parametrize(
    ("damage", "arrives"),
    [
        (Damage.NONE, [RECORD, RECORD]),
        (Damage.CUT, [RECORD]),
        (Damage.HALF_CUT, [RECORD]),
        (Damage.STALL, [RECORD]),
        (Damage.DUPLICATE, [RECORD, RECORD, RECORD]),
        (Damage.TRUNCATE, [RECORD, RECORD[:4]]),
        (Damage.CORRUPT, [RECORD, RECORD[:-1] + b"e"]),
    ],
)
async def test_the_relay_does_to_the_record_at_the_boundary_what_it_says(damage: Damage, arrives: list[bytes]) -> None:
    """Before the second record that the destination sends."""
    strikes = 0

    async def strike() -> None:
        nonlocal strikes
        strikes += 1

    heard = bytearray()
    over = trio.Event()

    async def listen(stream: trio.SocketStream) -> None:
        with trio.move_on_after(10):
            async for chunk in stream:
                heard.extend(chunk)
        over.set()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, listen, 0)
        relay = Relay(listeners[0].socket.getsockname()[1], Boundary(Side.DESTINATION, 1), damage, strike)
        port = await nursery.start(relay.serve)
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        await stream.send_all(RECORD + RECORD)
        with trio.fail_after(10):
            await relay.struck.wait()
        if damage in {Damage.HALF_CUT, Damage.STALL}:
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not over.is_set(), "it is silent, and not closed"
        else:
            if damage not in {Damage.CUT, Damage.TRUNCATE}:
                await stream.send_eof()
            await over.wait()
        await trio.aclose_forcefully(stream)
        nursery.cancel_scope.cancel()

    assert bytes(heard) == b"".join(arrives)
    assert strikes == 1
