"""Peers of a release, replayed against the daemons of this build: both roles, to the same end as they came to then."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.compat.peers import Recorded, RecordedDestination, RecordedSource
from tests.migration.fleet import Fleet, RunningHost, create, open_fleet, wait_heartbeats, wait_outcome
from tools.record_transcript import SPEC, TRANSCRIPTS
from vmmigrate.devices import registry
from vmmigrate.devices.payload import DevicePayload
from vmmigrate.wire import messages as m
from vmmigrate.wire.phases import Role

RELEASES = sorted(path.name for path in TRANSCRIPTS.iterdir() if (path / "moved.txt").exists())
EVERY_RELEASE = pytest.mark.parametrize("release", RELEASES)


def recorded(release: str, name: str) -> Recorded:
    return Recorded.read(TRANSCRIPTS / release / f"{name}.txt")


async def arrive(fleet: Fleet, beta: RunningHost, source: RecordedSource) -> tuple[str, Any]:
    """Let *beta* fetch a guest from *source*; the instance and the record."""
    port = await fleet.nursery.start(source.run)
    instance, migration = str(uuid.uuid4()), str(uuid.uuid4())
    body = {
        "migration_id": migration,
        "instance_id": instance,
        "source_host": "alpha",
        "source_address": f"127.0.0.1:{port}",
        "source_url": "https://127.0.0.1:1",
        "ticket": "recorded",
        "keep": ["*"],
    }
    await beta.client.post("/v1/migrations:migrate-in", body)
    return instance, await wait_outcome(beta, migration)


@EVERY_RELEASE
async def test_a_guest_of_a_golden_source_arrives_and_runs(tmp_path: Path, release: str) -> None:
    """Selection, preamble, device states, console and time of that release, up to `Running`."""
    said = recorded(release, "moved")
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        beta = await fleet.start("beta")
        source = RecordedSource(fleet, said)

        instance, record = await arrive(fleet, beta, source)

        assert record["outcome"] == "moved", record
        assert record["negotiated"]["payloads"] == dict(said.of(m.Select).payloads)
        expected = [type(x) for x in said.said[Role.DESTINATION]]
        with trio.fail_after(20):
            while len(source.heard) < len(expected):  # the last word comes after the outcome
                await trio.sleep(0.01)
        assert [type(message) for message in source.heard] == expected
        await wait_heartbeats(beta, instance)
        assert (await beta.guest(instance).status()).heartbeats > _heartbeats(said)


@EVERY_RELEASE
async def test_what_a_golden_release_reads_is_still_offered(tmp_path: Path, release: str) -> None:
    """Versions are never withdrawn in silence: a source of that release finds what it found then."""
    said = recorded(release, "moved")
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        beta = await fleet.start("beta")
        source = RecordedSource(fleet, said)

        await arrive(fleet, beta, source)

        then, now = said.of(m.Offer), source.heard[0]
        assert isinstance(now, m.Offer)
        assert set(then.protocols) <= set(now.protocols)
        assert set(then.spec_versions) <= set(now.spec_versions)
        assert [kind for kind in then.payloads if not set(then.payloads[kind]) <= set(now.payloads[kind])] == []
        assert all(set(words) <= set(now.ram[topic]) for topic, words in then.ram.items())


@EVERY_RELEASE
async def test_a_golden_refusal_is_understood(tmp_path: Path, release: str) -> None:
    said = recorded(release, "refused")
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        beta = await fleet.start("beta")

        _, record = await arrive(fleet, beta, RecordedSource(fleet, said))

        refusal = said.of(m.Refuse)
        assert record["outcome"] == "refused"
        assert record["error"] == {"code": refusal.code, "message": refusal.text, "details": dict(refusal.details)}


@EVERY_RELEASE
async def test_a_golden_source_that_announces_another_version_than_it_selected_is_refused(
    tmp_path: Path, release: str
) -> None:
    """No silent change of what was agreed: the preamble is held against the selection."""
    said = recorded(release, "moved")
    preamble = said.of(m.Preamble)
    devices = tuple(
        replace(entry, version=1) if entry.payload_kind == "uart-16550" else entry for entry in preamble.devices
    )
    changed = [replace(preamble, devices=devices) if x is preamble else x for x in said.said[Role.SOURCE]]
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        beta = await fleet.start("beta")

        source = RecordedSource(fleet, Recorded({**said.said, Role.SOURCE: changed}))
        _, record = await arrive(fleet, beta, source)

        assert record["outcome"] == "refused"
        assert "device com1: announced is uart-16550 version 1, selected was 2" in record["error"]["message"]
        assert await beta.client.get("/v1/instances") == []


async def _depart(fleet: Fleet, alpha: RunningHost, said: Recorded) -> tuple[str, RecordedDestination, Any]:
    """Let a recorded destination fetch a guest from *alpha*; the instance, what it heard, and alpha's record."""
    instance = await create(alpha, SPEC, name="recorded", blobs={"firmware": "AAEC"})
    await wait_heartbeats(alpha, instance)
    ticket = await alpha.client.post(f"/v1/instances/{instance}:migrate-out", {"destination_host": "beta"})
    destination = RecordedDestination(fleet, said)
    await destination.fetch(alpha, ticket)
    return instance, destination, await wait_outcome(alpha, ticket["migration_id"])


@EVERY_RELEASE
async def test_a_guest_goes_to_a_golden_destination_in_the_versions_it_reads(tmp_path: Path, release: str) -> None:
    """The same offer gets the same selection, and devices in the very kinds and versions as then."""
    said = recorded(release, "moved")
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha")

        instance, destination, record = await _depart(fleet, alpha, said)

        assert record["outcome"] == "moved", record
        then, now = said.of(m.Select), next(x for x in destination.heard if isinstance(x, m.Select))
        for choice in ("protocol", "spec_version", "payloads", "transport", "encodings", "digest"):
            assert getattr(now, choice) == getattr(then, choice)
        sent = next(x for x in destination.heard if isinstance(x, m.DeviceState))
        assert _kinds(sent) == _kinds(said.of(m.DeviceState))
        assert (await alpha.instance(instance))["state"] == "elsewhere"


@EVERY_RELEASE
async def test_a_golden_destination_without_common_ground_gets_the_golden_refusal(tmp_path: Path, release: str) -> None:
    said = recorded(release, "refused")
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha")

        instance, destination, record = await _depart(fleet, alpha, said)

        assert destination.heard == [said.of(m.Refuse)]
        assert record["error"]["code"] == said.of(m.Refuse).code
        await wait_heartbeats(alpha, instance)


@EVERY_RELEASE
async def test_a_guest_goes_on_when_a_golden_destination_fails(tmp_path: Path, release: str) -> None:
    said = recorded(release, "failed")
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha")

        instance, _, record = await _depart(fleet, alpha, said)

        assert (record["outcome"], record["error"]["code"]) == ("failed", said.of(m.Failed).code)
        await wait_heartbeats(alpha, instance)


def _kinds(state: m.DeviceState) -> list[tuple[str, str, int]]:
    return [(item.instance_name, item.payload_kind, item.version) for item in state.payloads]


def _heartbeats(said: Recorded) -> int:
    vcpu = next(item for item in said.of(m.DeviceState).payloads if item.payload_kind == "embedded-vcpu")
    payload = DevicePayload(vcpu.instance_name, vcpu.payload_kind, vcpu.version, vcpu.body)
    count: int = registry.decode(payload).heartbeats
    return count
