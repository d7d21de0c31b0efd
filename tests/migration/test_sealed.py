"""The sealed transport between two daemons: the default, replaceable by TLS; a forgery ends the migration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import trio

from tests.migration.fleet import (
    RunningHost,
    begin,
    check,
    create,
    migrate,
    open_fleet,
    stress,
    wait_filled,
    wait_heartbeats,
    wait_outcome,
    witnesses,
)
from tests.migration.test_resume import Link
from vmmigrate.engine import destination
from vmmigrate.engine.landing import Arriving
from vmmigrate.errors import RemoteProtocolError, TransportError
from vmmigrate.net.receiving import Landing
from vmmigrate.ram.digest import WHOLE, Condenser, PageHash

TLS_ONLY = '\n[bulk]\ntransports = ["tls"]'
SEALED_ONLY = '\n[bulk]\ntransports = ["sealed"]'


async def test_bulk_streams_are_sealed_when_both_hosts_can(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=stress(16, 200))
        await wait_filled(alpha, instance, 16 * 256)

        record = await migrate(alpha, beta, instance, verify="full", streams=3)

        assert record["outcome"] == "moved", record
        assert record["negotiated"]["transport"] == "sealed"
        assert record["negotiated"]["streams"] == 3
        assert record["digest"]["source"] == record["digest"]["destination"]
        assert (await check(beta, instance))["consistent"]


@pytest.mark.parametrize("who", ["alpha", "beta", "both"])
async def test_a_host_that_allows_only_tls_gets_tls_and_the_record_says_so(tmp_path: Path, who: str) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha", compat=TLS_ONLY if who != "beta" else "")
        beta = await fleet.start("beta", compat=TLS_ONLY if who != "alpha" else "")
        instance = await create(alpha, program=stress(8, 100))
        await wait_filled(alpha, instance, 8 * 256)

        record = await migrate(alpha, beta, instance, verify="full")

        assert record["outcome"] == "moved", record
        assert record["negotiated"]["transport"] == "tls"
        assert record["digest"]["source"] == record["digest"]["destination"]
        passed_over = {entry["what"]: entry["why"] for entry in record["negotiation"]["passed_over"]}
        assert passed_over.get("transport sealed") == {
            "alpha": "the source does not write it",
            "beta": "the destination does not read it",
        }.get(who)


async def test_hosts_without_a_common_transport_refuse_and_the_guest_goes_on(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha", compat=TLS_ONLY), await fleet.start("beta", compat=SEALED_ONLY)
        instance = await create(alpha)

        record = await migrate(alpha, beta, instance)

        assert (record["outcome"], record["error"]["code"]) == ("refused", "no_common_ground")
        assert record["error"]["details"]["mismatches"] == [
            {"topic": "transports", "source": ["tls"], "destination": ["sealed"]}
        ]
        await wait_heartbeats(alpha, instance)


class Forger(Link):
    """A link on which one bit of a bulk stream is changed, once, after so many bytes; and which then may be cut, so
    that the destination comes again."""

    def __init__(self, source: RunningHost, after_bytes: int, *, then_cut: bool = False) -> None:
        super().__init__(source)
        self._after_bytes = after_bytes
        self.forged = False
        self.then_cut = then_cut

    async def _copy(self, origin: trio.SocketStream, sink: trio.SocketStream, counts: bool) -> None:
        await super()._copy(_Forged(origin, self) if counts else origin, sink, counts)  # type: ignore[arg-type]

    def pass_on(self, chunk: bytes) -> bytes:
        # What comes over the control connection then is small: heartbeats, ends of rounds.
        if self.forged or self.passed_bytes < self._after_bytes or len(chunk) < 8192:
            return chunk
        self.forged = True
        middle = len(chunk) // 2
        return chunk[:middle] + bytes([chunk[middle] ^ 1]) + chunk[middle + 1 :]


class _Forged:
    """What comes from *origin*, as the forger passes it on."""

    def __init__(self, origin: trio.SocketStream, forger: Forger) -> None:
        self._origin = origin
        self._forger = forger

    def __aiter__(self) -> _Forged:
        return self

    async def __anext__(self) -> bytes:
        if self._forger.forged and self._forger.then_cut:
            self._forger.then_cut = False
            self._forger.cut()
            self._forger.mend()
        return self._forger.pass_on(bytes(await self._origin.__anext__()))


async def test_a_forged_byte_ends_the_migration_on_both_sides_and_the_guest_goes_on_at_the_source(
    tmp_path: Path,
) -> None:
    """It is not waited out as a lost link would be, and the destination keeps nothing; the next attempt moves."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        forger = Forger(alpha, after_bytes=16 << 20)
        await fleet.nursery.start(forger.run)
        instance = await create(alpha, program=stress(56, 500))
        await wait_filled(alpha, instance, 56 * 256)

        migration = await begin(alpha, beta, instance, source_address=forger.address)

        ours, theirs = await wait_outcome(alpha, migration), await wait_outcome(beta, migration)
        assert forger.forged
        assert (theirs["outcome"], theirs["error"]["code"]) == ("failed", "seal_broken")
        assert (ours["outcome"], ours["error"]["code"]) == ("failed", "seal_broken")
        assert await beta.client.get("/v1/instances") == []
        assert (await check(alpha, instance))["consistent"]
        assert (await migrate(alpha, beta, instance, verify="full"))["outcome"] == "moved"
        assert (await check(beta, instance))["consistent"]
        assert witnesses(fleet, instance).single


async def test_who_forges_and_then_cuts_the_link_to_be_resumed_brings_nothing_into_the_guest(tmp_path: Path) -> None:
    """The forged part may have been read before the cut was seen: then it is the end. Or it went down with the link:
    then both go on, and send what was not confirmed again. The guest has never anything of it."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        forger = Forger(alpha, after_bytes=16 << 20, then_cut=True)
        await fleet.nursery.start(forger.run)
        instance = await create(alpha, program=stress(56, 500))
        await wait_filled(alpha, instance, 56 * 256)

        migration = await begin(alpha, beta, instance, source_address=forger.address, verify="full")

        ours, theirs = await wait_outcome(alpha, migration), await wait_outcome(beta, migration)
        assert forger.forged
        assert not forger.then_cut, "the link was never cut"
        ended = {(record["outcome"], (record["error"] or {}).get("code")) for record in (ours, theirs)}
        assert ended in ({("failed", "seal_broken")}, {("moved", None)})
        where = beta if ours["outcome"] == "moved" else alpha
        assert (await check(where, instance))["consistent"]
        assert witnesses(fleet, instance).single


async def test_a_lost_link_beside_a_forgery_is_no_lost_link() -> None:
    """Who can forge a record can cut the control connection with it, and come as a reconnect. Of several errors at
    once one is raised; that of the landing counts before all of them, and nobody is asked or connected to."""
    landing = Landing(1)
    landing.breach = RemoteProtocolError("what came is not what the source sealed", code="seal_broken")
    nobody = cast(Any, None)
    arriving = Arriving(PageHash(b""), landing, Condenser(landing.table, WHOLE), nobody)

    with pytest.raises(RemoteProtocolError) as caught:
        await destination._resume(nobody, nobody, arriving, nobody, TransportError("cut", code="link_lost"))

    assert caught.value is landing.breach
