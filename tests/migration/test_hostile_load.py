"""What a hostile peer can use up: memory, connections, time. Others are served meanwhile."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import pytest
import structlog
import trio

from tests.migration.fleet import (
    TRUST_DOMAIN,
    RunningHost,
    begin,
    check,
    create,
    fetch_from,
    files_of,
    open_fleet,
    stress,
    wait_filled,
    wait_outcome,
    witnesses,
)
from tools.faults.site import HostProcess, open_site, port_of
from vmmigrate.errors import VmMigrateError
from vmmigrate.net.channel import Channel, open_channel
from vmmigrate.net.identity import Identity, Role
from vmmigrate.net.tls import TlsStream, close_tls, connect_tls, open_listeners, serve_tls, server_context
from vmmigrate.wire import messages as m
from vmmigrate.wire import phases
from vmmigrate.wire.codec import MAX_SPEC_BYTES
from vmmigrate.wire.framing import HEADER, MAX_BODY_BYTES
from vmmigrate.wire.phases import Kind

pytestmark = pytest.mark.slow

LOOPBACK = "127.0.0.1"
DEADLINE_S = 30.0
MIB = 1 << 20
ALPHA = Identity(TRUST_DOMAIN, Role.HOST, "alpha")

# As much as fits a frame, of what grows most when it is unpacked.
FILLINGS = {"lists": b"\x90", "maps": b"\x80", "texts": b"\xa2ab"}


def swollen(kind: Kind, filling: bytes) -> bytes:
    """The largest frame of *kind* whose body is an array of as many *filling* as fit."""
    count = (MAX_BODY_BYTES[kind] - 16) // len(filling)
    body = b"\x81\xa1x\xdd" + count.to_bytes(4, "big") + filling * count
    return HEADER.pack(len(body), kind, 0) + body


# --------------------------------------------------------------------------- memory


async def test_offers_of_the_largest_size_cost_a_source_little_memory(tmp_path: Path) -> None:
    """A host without a ticket sends sixty of them at once, as swollen as they can be."""
    async with open_site(tmp_path, "alpha", "gamma") as site:
        alpha = await site.start("alpha")
        port = port_of(alpha.config, "migration")
        await _offer_once(tmp_path, port, swollen(Kind.OFFER, b"\x90"))  # what is allocated once is not counted
        for name, filling in FILLINGS.items():
            before = _begin_peak(alpha)

            async with trio.open_nursery() as nursery:
                for _ in range(60):
                    nursery.start_soon(_offer_once, tmp_path, port, swollen(Kind.OFFER, filling))

            assert _peak(alpha) - before < 64 * MIB, name
        assert await alpha.client.get("/v1/instances") == []


async def _offer_once(root: Path, port: int, frame: bytes) -> None:
    stream, _ = await connect_tls(LOOPBACK, port, files_of(root, "gamma"), ALPHA, DEADLINE_S)
    with contextlib.suppress(trio.BrokenResourceError), trio.fail_after(DEADLINE_S):
        await stream.send_all(frame)
        while await stream.receive_some():
            pass
    await trio.aclose_forcefully(stream)


async def test_preambles_of_the_largest_size_cost_a_destination_little_memory(tmp_path: Path) -> None:
    """Unpacked they would be gigabytes. The frame itself, received and copied, is allowed for."""
    async with open_site(tmp_path, "alpha", "beta") as site:
        beta = await site.start("beta")
        for name, filling in FILLINGS.items():
            before = _begin_peak(beta)

            record = await _fetch_from(tmp_path, beta, swollen(Kind.PREAMBLE, filling))

            assert record["error"]["code"] == "bad_message"
            assert _peak(beta) - before < 4 * MAX_BODY_BYTES[Kind.PREAMBLE], name


async def test_specs_of_the_largest_size_cost_a_destination_little_memory(tmp_path: Path) -> None:
    """A spec is text of which the source chooses every byte."""
    async with open_site(tmp_path, "alpha", "beta") as site:
        beta = await site.start("beta")
        for item in (b"[]", b"{}", b"1e9", b'"a"'):
            text = b"[" + b",".join([item] * (MAX_SPEC_BYTES // (len(item) + 1) - 2)) + b"]"
            body = msgpack.packb({**_preamble_body(), "spec": text})
            before = _begin_peak(beta)

            record = await _fetch_from(tmp_path, beta, HEADER.pack(len(body), Kind.PREAMBLE, 0) + body)

            assert record["error"]["code"] not in {"internal", "peer_silent", "bad_message"}
            assert _peak(beta) - before < 192 * MIB, item


def _preamble_body() -> dict[str, Any]:
    return {
        "spec_version": "v3",
        "spec": b"",
        "blobs": {},
        "properties": {},
        "run_state": "running",
        "epoch": [0, 0],
        "regions": [[0, 64 * MIB]],
        "populated": [],
        "devices": [],
        "facts": {},
    }


async def _fetch_from(root: Path, beta: HostProcess, preamble: bytes) -> Mapping[str, Any]:
    """Beta's record after it was told to fetch a guest from a source that sends this instead of a preamble."""
    async with _hostile_source(root, preamble) as port:
        return await fetch_from(port, beta)


@contextlib.asynccontextmanager
async def _hostile_source(root: Path, preamble: bytes) -> AsyncIterator[int]:
    """A host with a good certificate that is named as the source, and its port."""

    async def answer(stream: TlsStream, _: Identity) -> None:
        with contextlib.suppress(VmMigrateError):
            async with open_channel(stream, phases.Role.SOURCE) as channel:
                await channel.send(_selection(await channel.expect(m.Offer, deadline_s=DEADLINE_S), channel))
                await channel.send_bytes(preamble)
                await channel.expect(m.PreambleOk, deadline_s=DEADLINE_S)

    listeners = await open_listeners(LOOPBACK, 0)
    context = server_context(files_of(root, "alpha"))
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_tls, listeners, lambda: context, answer, on_refusal=lambda *_: None))
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


def _selection(offer: m.Offer, channel: Channel) -> m.Select:
    return m.Select(
        protocol=1,
        spec_version="v3",
        payloads={},
        transport=offer.ram["transports"][0],
        encodings=offer.ram["encodings"],
        digest=offer.ram["digests"][0],
        streams=1,
        bulk_port=1,
        session_number=1,
        verify="digest",
        offer_digest=channel.session.digests[Kind.OFFER],
        random=bytes(32),
    )


def _begin_peak(host: HostProcess) -> int:
    """Forget the peak so far; what the process holds now."""
    Path(f"/proc/{host.process.pid}/clear_refs").write_text("5")
    return _peak(host)


def _peak(host: HostProcess) -> int:
    for line in Path(f"/proc/{host.process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM in /proc")


# --------------------------------------------------------------------------- time


async def test_a_peer_that_never_makes_its_offer_is_put_out(tmp_path: Path) -> None:
    """It lives, says so every second, and wants nothing: heartbeats do not extend the time for an offer."""
    with structlog.testing.capture_logs() as log:
        async with open_fleet(tmp_path, "alpha", "beta") as fleet:
            alpha = await fleet.start("alpha", limits="offer_s = 1.5")
            stream, _ = await connect_tls(
                LOOPBACK, alpha.facts["migration"], files_of(tmp_path, "beta"), ALPHA, DEADLINE_S
            )
            async with open_channel(stream, phases.Role.DESTINATION) as channel:
                with pytest.raises(VmMigrateError) as told:
                    await channel.expect(m.Select, deadline_s=DEADLINE_S)
            await close_tls(stream)

    assert told.value.code == "timed_out"
    refusals = [entry for entry in log if entry["event"] in {"migration.refused", "tls.refused"}]
    assert [entry["code"] for entry in refusals] == ["timed_out"]


async def test_a_flood_of_stalled_connections_does_not_disturb_a_running_migration(tmp_path: Path) -> None:
    """Eighty at a time on each of the source's ports: more than may stand at a door, so they push each other out."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=stress(16, 4000))
        await wait_filled(alpha, instance, 16 * 256)
        migration = await begin(alpha, beta, instance, downtime_ms=1, max_rounds=30, force=True)
        await _wait_rounds(alpha, migration, 1)
        came, before = [0], len(os.listdir("/proc/self/fd"))
        async with trio.open_nursery() as flood:
            for port in ("api_port", "migration", "bulk"):
                for _ in range(80):
                    flood.start_soon(_stall_for_ever, alpha.facts[port], came)
            with trio.fail_after(DEADLINE_S):
                while came[0] < 600:
                    await trio.sleep(0.01)

            record = await wait_outcome(beta, migration)
            flood.cancel_scope.cancel()

        assert record["outcome"] == "moved", record
        assert (await wait_outcome(alpha, migration))["outcome"] == "moved"
        assert (await check(beta, instance))["consistent"]
        assert witnesses(fleet, instance).single
        with trio.fail_after(DEADLINE_S):
            while len(os.listdir("/proc/self/fd")) > before:
                await trio.sleep(0.05)  # what was shed is closed


async def _stall_for_ever(port: int, came: list[int]) -> None:
    """Connect, say half a record, wait to be put out; again."""
    while True:
        with contextlib.suppress(OSError, trio.BrokenResourceError):
            async with await trio.open_tcp_stream(LOOPBACK, port) as stream:
                await stream.send_all(b"\x16\x03\x01\x02\x00")
                came[0] += 1
                await stream.receive_some(1)


async def _wait_rounds(host: RunningHost, migration: str, rounds: int) -> None:
    with trio.fail_after(DEADLINE_S):
        while len((await host.record(migration))["ram"]["rounds"]) < rounds:
            await trio.sleep(0.01)
