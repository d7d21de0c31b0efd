"""The sealed transport between two daemons: the default, replaceable by TLS; a forgery ends the migration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

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
# How long the pause is, is not what is asked here: on a busy machine no pause that hashes all of RAM is short.
LONG_PAUSE: Final[Mapping[str, Any]] = {"downtime_ms": 10_000}


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


@pytest.mark.parametrize("who", ["alpha", *(pytest.param(who, marks=pytest.mark.slow) for who in ("beta", "both"))])
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
    """A link on which one bit of a bulk stream is changed, once, after so many bytes.

    Args:
        cuts: Nothing follows the forged byte: the link is cut, and can be had again at once.
        hushes: Of what the destination says from then on, the source hears nothing.
    """

    def __init__(self, source: RunningHost, after_bytes: int, *, cuts: bool = False, hushes: bool = False) -> None:
        super().__init__(source)
        self._after_bytes = after_bytes
        self._cuts = cuts
        self._hushes = hushes
        self.forged = False

    async def _pass_on(self, chunk: bytes | bytearray, sink: trio.SocketStream, counts: bool) -> None:
        # What comes over the control connection then is small: heartbeats, ends of rounds.
        if counts and not self.forged and self.passed_bytes >= self._after_bytes and len(chunk) >= 8192:
            await self._forge(chunk, sink)
        elif counts or not (self._hushes and self.forged):
            await super()._pass_on(chunk, sink, counts)

    async def _forge(self, chunk: bytes | bytearray, sink: trio.SocketStream) -> None:
        self.forged = True
        middle = len(chunk) // 2
        await super()._pass_on(chunk[:middle] + bytes([chunk[middle] ^ 1]), sink, True)
        if self._cuts:
            self.cut()
            self.mend()
            await trio.lowlevel.checkpoint()  # this connection, too, is cut
        await super()._pass_on(chunk[middle + 1 :], sink, True)


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
        assert (await migrate(alpha, beta, instance, verify="full", **LONG_PAUSE))["outcome"] == "moved"
        assert (await check(beta, instance))["consistent"]
        assert witnesses(fleet, instance).single


async def test_who_forges_and_cuts_the_link_before_it_is_read_brings_nothing_into_the_guest(tmp_path: Path) -> None:
    """A part is looked at when its tag has come. The forged one goes down with the link, and what was not confirmed is
    sent again, under new keys."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        forger = Forger(alpha, after_bytes=16 << 20, cuts=True)
        await fleet.nursery.start(forger.run)
        instance = await create(alpha, program=stress(56, 500))
        await wait_filled(alpha, instance, 56 * 256)

        migration = await begin(alpha, beta, instance, source_address=forger.address, verify="full", **LONG_PAUSE)

        ours, theirs = await wait_outcome(alpha, migration), await wait_outcome(beta, migration)
        assert forger.forged
        for record in (ours, theirs):
            assert (record["outcome"], record["error"], record["negotiated"]["sessions"]) == ("moved", None, 2)
        assert ours["digest"]["source"] == ours["digest"]["destination"]
        assert (await check(beta, instance))["consistent"]
        assert witnesses(fleet, instance).single


async def test_who_forges_and_cuts_the_link_once_it_is_read_brings_nothing_into_the_guest(tmp_path: Path) -> None:
    """The destination knows, and does not come again, though it could. The source, which was kept from hearing why,
    sees a link that does not come back; the guest goes on there."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha", limits="resume_window_s = 0.5"), await fleet.start("beta")
        forger = Forger(alpha, after_bytes=16 << 20, hushes=True)
        await fleet.nursery.start(forger.run)
        instance = await create(alpha, program=stress(56, 500))
        await wait_filled(alpha, instance, 56 * 256)
        migration = await begin(alpha, beta, instance, source_address=forger.address, verify="full", **LONG_PAUSE)
        theirs = await wait_outcome(beta, migration)

        forger.cut()
        forger.mend()

        ours = await wait_outcome(alpha, migration)
        assert forger.forged
        assert (theirs["outcome"], theirs["error"]["code"]) == ("failed", "seal_broken")
        assert (ours["outcome"], ours["error"]["code"]) == ("failed", "link_lost")
        assert "sessions" not in ours["negotiated"], "there was a second session"
        assert await beta.client.get("/v1/instances") == []
        assert (await check(alpha, instance))["consistent"]
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
