"""Who says nothing is waited for so long and no longer; then both sides and the API call it by the name in the table.

Each test makes somebody silent who lives and beats, or who does not even that, and shortens the one deadline that is to
end it. Silences that other tests provoke: `offer_s` and `handshake_s` in test_hostile_load and tests/net, `verdict_s`
and `handoff_window_s` in test_in_doubt, `resume_window_s` in test_resume, `ticket_s` in test_failures, `send_s` and
`stall_s` in tests/net.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio

from tests.migration.fleet import (
    TRUST_DOMAIN,
    Fleet,
    RunningHost,
    begin,
    create,
    fetch_from,
    files_of,
    migrate,
    open_fleet,
    stress,
    wait_filled,
    wait_heartbeats,
    wait_outcome,
)
from tests.migration.holding import PATIENCE_S, HoldingHypervisor
from tests.migration.test_resume import Link
from vmmigrate.engine.limits import ROWS
from vmmigrate.errors import HypervisorError, VmMigrateError
from vmmigrate.hypervisor.base import Guest, GuestPlan, GuestStamp
from vmmigrate.net.channel import Channel, ChannelLimits, open_channel
from vmmigrate.net.identity import Identity, Role
from vmmigrate.net.tls import TlsStream, close_tls, connect_tls, open_listeners, serve_tls, server_context
from vmmigrate.wire import messages as m
from vmmigrate.wire import phases

pytestmark = pytest.mark.slow

LOOPBACK = "127.0.0.1"
# So that a deadline of a second is not out of order.
LIVELY = "heartbeat_s = 0.1\nsilence_s = 0.9\n"
BEATS = ChannelLimits(heartbeat_s=0.1, silence_s=PATIENCE_S)

Talk = Callable[[Channel], Awaitable[None]]


# --------------------------------------------------------------------------- a silent peer that beats


async def _never_selects(channel: Channel) -> None:
    await channel.expect(m.Offer, deadline_s=PATIENCE_S)


async def _only_selects(channel: Channel) -> None:
    offer = await channel.expect(m.Offer, deadline_s=PATIENCE_S)
    await channel.send(_selection(offer, channel))


@pytest.mark.parametrize("talk", [_never_selects, _only_selects], ids=["no Select", "no Preamble"])
async def test_a_source_that_beats_and_says_nothing_is_not_awaited(tmp_path: Path, talk: Talk) -> None:
    """`answer_s`: the destination gives up, tells it, and its record says the same."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        beta = await fleet.start("beta", limits=f"{LIVELY}answer_s = 1.0")
        told: list[VmMigrateError] = []
        async with _strange_source(tmp_path, talk, told) as port:
            record = await fetch_from(port, beta)

        assert record["error"]["code"] == ROWS["answer_s"].destination == ROWS["answer_s"].api
        assert [word.code for word in told] == [ROWS["answer_s"].source]
        assert await beta.client.get("/v1/instances") == []


async def test_a_source_that_never_shakes_hands_is_not_awaited(tmp_path: Path) -> None:
    """`connect_s`: it takes connections, and that is all."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        beta = await fleet.start("beta", limits="connect_s = 1.0")
        port = await fleet.nursery.start(_take_and_say_nothing)

        record = await fetch_from(port, beta)

        assert record["error"]["code"] == ROWS["connect_s"].destination == ROWS["connect_s"].api


async def test_a_stranger_who_never_shakes_hands_is_put_out(tmp_path: Path) -> None:
    """`handshake_s`, at the two doors that have it."""
    async with open_fleet(tmp_path, "alpha") as fleet:
        alpha = await fleet.start("alpha", limits="handshake_s = 0.5")
        with structlog.testing.capture_logs() as log, trio.fail_after(PATIENCE_S):
            for port in ("migration", "api_port"):
                async with await trio.open_tcp_stream(LOOPBACK, alpha.facts[port]) as stream:
                    while await stream.receive_some():
                        pass

        codes = [entry["code"] for entry in log if entry["event"] == "tls.refused"]
        assert codes == 2 * [ROWS["handshake_s"].source]


async def _never_builds(channel: Channel) -> None:
    await channel.expect(m.Preamble, deadline_s=PATIENCE_S)


async def _never_opens_streams(channel: Channel) -> None:
    await channel.expect(m.Preamble, deadline_s=PATIENCE_S)
    await channel.send(m.PreambleOk(channel.session.digests[phases.Kind.SELECT], {}, ()))


@pytest.mark.parametrize(
    ("deadline", "talk", "limits"),
    [
        ("build_s", _never_builds, "build_s = 1.0\nguest_start_s = 0.9"),
        ("bulk_open_s", _never_opens_streams, "bulk_open_s = 1.0\nhello_s = 0.9"),
    ],
)
async def test_a_destination_that_beats_and_goes_no_further_is_not_awaited(
    tmp_path: Path, deadline: str, talk: Talk, limits: str
) -> None:
    """The source gives up and tells it; its guest never noticed."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha")
        instance = await create(alpha)
        await alpha.stop()
        alpha = await fleet.start("alpha", limits=LIVELY + limits)
        ticket = await alpha.client.post(f"/v1/instances/{instance}:migrate-out", {"destination_host": "beta"})

        told = await _come_as_beta(fleet, alpha, ticket, talk)

        record = await wait_outcome(alpha, ticket["migration_id"])
        row = ROWS[deadline]
        assert (record["error"]["code"], told.code) == (row.source, row.destination)
        assert row.api == row.source
        await wait_heartbeats(alpha, instance)


# --------------------------------------------------------------------------- a step that does not end


@pytest.mark.parametrize(
    ("deadline", "host", "step", "limits"),
    [
        ("import_s", "beta", "import_devices", {"alpha": "import_s = 1.0"}),
        ("import_s", "alpha", "export_devices", {"beta": "import_s = 1.0"}),
        ("start_s", "beta", "open_backends", {"beta": "start_s = 1.0"}),
        ("round_s", "alpha", "take_dirty", {"beta": "round_s = 1.0"}),
    ],
    ids=["the destination imports for ever", "the source exports for ever", "disks open for ever", "no round ends"],
)
async def test_a_step_of_the_other_side_that_does_not_end_has_one_name_on_both_sides(
    tmp_path: Path, deadline: str, host: str, step: str, limits: dict[str, str]
) -> None:
    """And the guest runs at the source as before."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        for name in ("alpha", "beta"):
            given = LIVELY + limits.get(name, "")
            await fleet.start(name, hypervisor_class=HoldingHypervisor, limits=given)
        alpha, beta = fleet.hosts["alpha"], fleet.hosts["beta"]
        instance = await create(alpha, program=stress(2, 500))
        hypervisor = fleet.hosts[host].hypervisor
        assert isinstance(hypervisor, HoldingHypervisor)
        hold = hypervisor.hold(step)
        migration = await begin(alpha, beta, instance)
        await hold.wait_reached()

        await _wait_over(fleet.hosts["beta" if host == "alpha" else "alpha"], migration)
        hold.go.set()
        source, destination = await wait_outcome(alpha, migration), await wait_outcome(beta, migration)

        row = ROWS[deadline]
        assert (source["error"]["code"], destination["error"]["code"]) == (row.source, row.destination)
        assert (await alpha.instance(instance))["state"] == "running"
        await wait_heartbeats(alpha, instance)
        assert await beta.client.get("/v1/instances") == []


@pytest.mark.parametrize("phase", ["pre-copy", "paused"])
async def test_a_link_that_swallows_everything_is_called_silent_by_both_sides(tmp_path: Path, phase: str) -> None:
    """`silence_s`: not cut, only deaf. While the guest runs it is waited for like a cut one, and then called lost."""
    limits = f"{LIVELY}resume_window_s = 1.0"
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha", limits=limits, hypervisor_class=HoldingHypervisor)
        beta = await fleet.start("beta", limits=limits)
        link = Link(alpha)
        await fleet.nursery.start(link.run)
        instance = await create(alpha, program=stress(16, 400_000))
        await wait_filled(alpha, instance, 16 * 256)
        if phase == "paused":
            assert isinstance(alpha.hypervisor, HoldingHypervisor)
            hold = alpha.hypervisor.hold("export_devices")
            migration = await begin(alpha, beta, instance, max_rounds=1, force=True, source_address=link.address)
            await hold.wait_reached()
            await _wait_phase(beta, migration, "ram_post_pause")  # the destination has heard of it, too
        else:
            migration = await begin(alpha, beta, instance, downtime_ms=1, max_rounds=1000, source_address=link.address)
            await link.wait_bytes(8 << 20)

        link.swallow()

        source, destination = await wait_outcome(alpha, migration), await wait_outcome(beta, migration)
        row = ROWS["silence_s" if phase == "paused" else "resume_window_s"]
        assert (source["error"]["code"], destination["error"]["code"]) == (row.source, row.destination)
        assert (await alpha.instance(instance))["state"] == "running"


async def test_a_bulk_port_that_says_nothing_has_one_name_on_both_sides(tmp_path: Path) -> None:
    """`hello_s`: the destination comes again, as after a cut, and hears that nothing can go on yet."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta", limits="hello_s = 1.0")
        link = Link(alpha)
        link.is_bulk_mute = True
        await fleet.nursery.start(link.run)
        instance = await create(alpha)

        migration = await begin(alpha, beta, instance, source_address=link.address)

        source, destination = await wait_outcome(alpha, migration), await wait_outcome(beta, migration)
        row = ROWS["hello_s"]
        assert (source["error"]["code"], destination["error"]["code"]) == (row.source, row.destination)
        assert (await alpha.instance(instance))["state"] == "running"


# --------------------------------------------------------------------------- in doubt


async def test_a_destination_whose_api_says_nothing_is_asked_again_until_it_answers(tmp_path: Path) -> None:
    """`settle_s`, and the pauses in between: nothing is decided by the silence."""
    limits = (
        f"{LIVELY}verdict_s = 0.6\nsettle_s = 0.5\nguest_request_s = 0.4\nsettle_first_s = 0.1\nsettle_most_s = 0.2"
    )
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha", limits=limits)
        beta = await fleet.start("beta", hypervisor_class=HoldingHypervisor, limits=LIVELY)
        api_port = beta.facts["api_port"]
        instance = await create(alpha)
        assert isinstance(beta.hypervisor, HoldingHypervisor)
        hold = beta.hypervisor.hold("open_backends")
        migration = await begin(alpha, beta, instance)
        await hold.wait_reached()
        await _wait_state(alpha, migration, "unknown")
        hold.go.set()
        await beta.stop()

        with structlog.testing.capture_logs() as log:
            async with trio.open_nursery() as nursery:
                await nursery.start(partial(_take_and_say_nothing, port=api_port))
                with trio.fail_after(PATIENCE_S):
                    while sum(_is_unanswered(entry) for entry in log) < 3:
                        await trio.sleep(0.01)
                nursery.cancel_scope.cancel()

        record = await alpha.record(migration)
        assert (record["outcome"], record["error"]["code"]) == ("unknown", ROWS["settle_s"].source)
        assert (await alpha.instance(instance))["guest"]["run_state"] == "paused"
        await fleet.start("beta", api_port=api_port)
        assert (await wait_outcome(alpha, migration))["outcome"] in {"moved", "failed"}


def _is_unanswered(entry: Any) -> bool:
    return entry["event"] == "settle.unanswered" and entry["code"] in {"timed_out", "handshake_timeout"}


# --------------------------------------------------------------------------- guests


class Disobeying(HoldingHypervisor):
    """A host whose guests do not run on once they were paused for a handoff."""

    async def build(self, plan: GuestPlan, stamp: GuestStamp, *, for_migration: bool) -> Guest:
        guest = await super().build(plan, stamp, for_migration=for_migration)
        really_pause = guest.pause_for_handoff

        async def pause_for_handoff(migration_id: str) -> None:
            await really_pause(migration_id)

            async def run(epoch: tuple[int, int]) -> None:
                raise HypervisorError("not now", code="guest_unresponsive")

            guest.run = run  # type: ignore[method-assign]

        guest.pause_for_handoff = pause_for_handoff  # type: ignore[method-assign]
        return guest


async def test_a_guest_that_does_not_run_on_after_a_failed_attempt_is_said_so_on_both_sides(tmp_path: Path) -> None:
    """`undo_s`; what the daemon could not undo, the next one does."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha", hypervisor_class=Disobeying, limits="undo_s = 1.0\nguest_request_s = 0.9")
        beta = await fleet.start("beta")
        instance = await create(alpha)
        assert isinstance(alpha.hypervisor, HoldingHypervisor)
        hold = alpha.hypervisor.hold("export_devices")
        migration = await begin(alpha, beta, instance)
        await hold.wait_reached()

        await alpha.client.post(f"/v1/migrations/{migration}:cancel")

        source, destination = await wait_outcome(alpha, migration), await wait_outcome(beta, migration)
        row = ROWS["undo_s"]
        assert (source["error"]["code"], destination["error"]["code"]) == (row.source, row.destination)
        hold.go.set()
        await alpha.stop()
        alpha = await fleet.start("alpha")
        assert (await alpha.instance(instance))["state"] == "running"
        assert (await migrate(alpha, beta, instance))["outcome"] == "moved"


# --------------------------------------------------------------------------- steps


@contextlib.asynccontextmanager
async def _strange_source(root: Path, talk: Talk, told: list[VmMigrateError]) -> AsyncIterator[int]:
    """A host with alpha's certificate that talks as *talk* does, and what it is told in the end."""

    async def answer(stream: TlsStream, _: Identity) -> None:
        async with open_channel(stream, phases.Role.SOURCE, BEATS) as channel:
            told.append(await _talk_to_the_end(channel, talk))

    listeners = await open_listeners(LOOPBACK, 0)
    context = server_context(files_of(root, "alpha"))
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_tls, listeners, lambda: context, answer, on_refusal=lambda *_: None))
        yield listeners[0].socket.getsockname()[1]
        with trio.fail_after(PATIENCE_S):
            while not told:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


async def _talk_to_the_end(channel: Channel, talk: Talk) -> VmMigrateError:
    """Talk, then only beat; what the peer says when it gives up."""
    try:
        await talk(channel)
        while True:
            await channel.expect(m.Preamble, m.PreambleOk, m.Refuse, deadline_s=PATIENCE_S)
    except VmMigrateError as word:
        return word


async def _come_as_beta(fleet: Fleet, alpha: RunningHost, ticket: dict[str, Any], talk: Talk) -> VmMigrateError:
    """Make a good offer in beta's name, then talk as *talk* does; what alpha says when it gives up."""
    files = files_of(fleet.root, "beta")
    expected = Identity(TRUST_DOMAIN, Role.HOST, "alpha")
    stream, _ = await connect_tls(LOOPBACK, alpha.facts["migration"], files, expected, PATIENCE_S)
    try:
        async with open_channel(stream, phases.Role.DESTINATION, BEATS) as channel:
            await channel.send(_good_offer(alpha, ticket))
            await channel.expect(m.Select, deadline_s=PATIENCE_S)
            return await _talk_to_the_end(channel, talk)
    finally:
        await close_tls(stream)


def _good_offer(alpha: RunningHost, ticket: dict[str, Any]) -> m.Offer:
    from vmmigrate.engine.abilities import of_this_release

    able = of_this_release(alpha.hypervisor.capabilities)
    return m.Offer(
        protocols=able.protocols,
        migration_id=ticket["migration_id"],
        instance_id=ticket["instance_id"],
        ticket=ticket["ticket"],
        spec_versions=able.spec_versions,
        payloads=able.payloads,
        ram={"transports": able.transports, "encodings": able.encodings, "digests": able.digests},
        max_streams=1,
        facts=able.facts,
        api_url="https://127.0.0.1:1",
        random=bytes(32),
    )


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
        offer_digest=channel.session.digests[phases.Kind.OFFER],
        random=bytes(32),
    )


async def _take_and_say_nothing(*, port: int = 0, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
    """A port that takes connections, reads, and never answers."""

    async def take(stream: trio.SocketStream) -> None:
        async with stream:
            with contextlib.suppress(trio.BrokenResourceError):
                async for _ in stream:
                    pass

    listeners = await trio.open_tcp_listeners(port, host=LOOPBACK)
    task_status.started(listeners[0].socket.getsockname()[1])
    await trio.serve_listeners(take, listeners)


async def _wait_over(host: RunningHost, migration: str) -> None:
    """Until *host* has an outcome, which may be that it is in doubt."""
    with trio.fail_after(PATIENCE_S):
        while (await host.record(migration))["outcome"] is None:
            await trio.sleep(0.01)


async def _wait_state(host: RunningHost, migration: str, outcome: str) -> None:
    with trio.fail_after(PATIENCE_S):
        while (await host.record(migration))["outcome"] != outcome:
            await trio.sleep(0.01)


async def _wait_phase(host: RunningHost, migration: str, phase: str) -> None:
    with trio.fail_after(PATIENCE_S):
        while (await host.record(migration))["state"] != phase:
            await trio.sleep(0.01)
