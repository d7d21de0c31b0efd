"""Two releases in one fleet: every pair moves with the versions it should, and nothing lost, or refuses beforehand.

Hosts of other releases are daemons of this one with other abilities: fewer, by `[compat]` or by hand, or more, with
versions and words that nobody knows yet. Guests are paused, so that all of their state can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import pytest

from tests.migration.fleet import (
    ObservedHypervisor,
    RunningHost,
    begin,
    check,
    create,
    migrate,
    open_fleet,
    spec_v3,
    stress,
    wait_heartbeats,
    wait_outcome,
    witnesses,
)
from vmmigrate.devices import kinds, registry
from vmmigrate.devices.payload import DevicePayload
from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.base import Guest, GuestPlan, GuestStamp, PayloadDescription
from vmmigrate.wire.negotiate import Abilities

pytestmark = pytest.mark.slow

SMBIOS = {"manufacturer": "Oxide", "product_name": "ox", "serial_number": "1", "version": 2}
OLDEST = {"uart-16550": (1,), "bhyve-rtc": (1,), "pci-virtio": (1,)}
NEWEST = {"uart-16550": 2, "bhyve-rtc": 2, "pci-virtio": 2}
TYPED = "more keys than a FIFO of sixteen bytes holds"


def only(**changes: Any) -> Callable[[Abilities], Abilities]:
    """A host that can do what this release can, but for *changes*; payload kinds not named keep their versions."""

    def narrow(everything: Abilities) -> Abilities:
        payloads = {**everything.payloads, **changes.get("payloads", {})}
        return replace(everything, **{**changes, "payloads": {k: v for k, v in payloads.items() if v}})

    return narrow


def from_the_future(everything: Abilities) -> Abilities:
    """A host of a later release: it can do all of this one's, and what this one has never heard of."""
    return replace(
        everything,
        protocols=(9, *everything.protocols),
        spec_versions=("v9", *everything.spec_versions),
        transports=("quantum", *everything.transports),
        encodings=("lz9", *everything.encodings),
        digests=("sha9", *everything.digests),
        payloads={**{k: (99, *v) for k, v in everything.payloads.items()}, "hologram": (1,)},
        facts={**everything.facts, "mood": "hopeful"},
    )


EVERY_ENCODING = ["raw", "zero", "zstd", "delta"]
RELEASES: Mapping[str, Callable[[Abilities], Abilities]] = {
    "first": only(spec_versions=("v1",), payloads=OLDEST, encodings=("raw", "zero"), digests=("multilinear-64",)),
    "second": only(spec_versions=("v1", "v2"), payloads={"uart-16550": (1,), "bhyve-rtc": (2, 1)}, encodings=("raw",)),
    "third": only(),
    "future": from_the_future,
}


def machine(**more: Any) -> dict[str, Any]:
    """A serial port, a disk in memory behind virtio, a NIC."""
    slot = {"bus": 0, "device": 4, "function": 0}
    return (
        spec_v3(
            disk={"type": "virtio_disk", "component": {"backend_id": "memory", "pci_path": slot}},
            memory={"type": "blob_storage_backend", "component": {"base64": "Y29udGVudHM=", "readonly": False}},
        )
        | more
    )


@dataclass(frozen=True)
class Seen:
    """All that can be compared of a paused guest: the state of its devices, and what it is."""

    devices: Mapping[tuple[str, str], Any]
    spec: Any

    @classmethod
    async def at(cls, host: RunningHost, instance: str) -> Seen:
        payloads = await host.guest(instance).export_devices({})
        states = {(p.instance_name, p.kind): registry.decode(p) for p in payloads}
        states["vcpu-0", "embedded-vcpu"] = replace(states["vcpu-0", "embedded-vcpu"], moves=0)
        return cls(states, (await host.client.get(f"/v1/instances/{instance}/spec"))["spec"])


async def paused(host: RunningHost, spec: Mapping[str, Any], *, keys: str = "") -> str:
    instance = await create(host, spec)
    await wait_heartbeats(host, instance)
    await host.client.post(f"/v1/instances/{instance}:pause")
    if keys:
        await host.client.post(f"/v1/instances/{instance}/console", {"port": "com1", "text": keys})
    return instance


async def both_records(source: RunningHost, destination: RunningHost, instance: str) -> tuple[Any, Any]:
    migration = await begin(source, destination, instance)
    return await wait_outcome(source, migration), await wait_outcome(destination, migration)


def assert_refused_alike(ours: Any, theirs: Any, code: str) -> None:
    """Refused, before any RAM, with the same code, words and details on both sides, also in `negotiation`."""
    for record in (ours, theirs):
        assert (record["outcome"], record["error"]["code"]) == ("refused", code), record
        assert record["negotiation"]["refused"] == record["error"]
        assert (record["ram"]["sent_bytes"], record["ram"]["rounds"]) == (0, [])
    assert ours["error"] == theirs["error"]
    assert ours["negotiation"]["offered"] == theirs["negotiation"]["offered"]


@pytest.mark.parametrize(
    ("release", "spec_version", "payloads", "encodings"),
    [
        ("first", "v1", {"uart-16550": 1, "bhyve-rtc": 1, "pci-virtio": 1}, ["raw", "zero"]),
        ("second", "v2", {"uart-16550": 1, "bhyve-rtc": 2, "pci-virtio": 2}, ["raw"]),
        ("third", "v3", NEWEST, EVERY_ENCODING),
        ("future", "v3", NEWEST, EVERY_ENCODING),
    ],
)
async def test_a_guest_goes_to_another_release_and_back_and_nothing_of_it_is_lost(
    tmp_path: Path, release: str, spec_version: str, payloads: dict[str, int], encodings: list[str]
) -> None:
    """New to old and old to new: the newest versions that both know, in both directions, exactly."""
    async with open_fleet(tmp_path, "alpha", release) as fleet:
        alpha = await fleet.start("alpha")
        other = await fleet.start(release, abilities=RELEASES[release])
        instance = await paused(alpha, machine())
        before = await Seen.at(alpha, instance)

        there = await migrate(alpha, other, instance)
        at_the_other = await Seen.at(other, instance)
        back = await migrate(other, alpha, instance, verify="full")

        for record in (there, back):
            assert record["outcome"] == "moved", record
            negotiated = record["negotiated"]
            assert (negotiated["protocol"], negotiated["spec_version"]) == (1, spec_version)
            assert {kind: negotiated["payloads"][kind] for kind in payloads} == payloads
            assert negotiated["encodings"] == encodings
            assert record["negotiation"]["chosen"].items() <= negotiated.items()
        assert at_the_other == before
        assert await Seen.at(alpha, instance) == before
        await alpha.client.post(f"/v1/instances/{instance}:start")
        assert (await check(alpha, instance))["consistent"]
        assert witnesses(fleet, instance).single


async def test_the_record_says_what_was_passed_over_and_why(tmp_path: Path) -> None:
    """`why did it cross as v2?`: the answer stands in the record of the source."""
    async with open_fleet(tmp_path, "alpha", "beta", "gamma") as fleet:
        alpha = await fleet.start("alpha")
        beta = await fleet.start("beta", abilities=RELEASES["second"])
        gamma = await fleet.start("gamma", abilities=RELEASES["future"])
        instance = await paused(alpha, machine())

        to_beta = (await migrate(alpha, beta, instance))["negotiation"]
        to_gamma = (await migrate(beta, gamma, instance))["negotiation"]

        assert {entry["what"]: entry["why"] for entry in to_beta["passed_over"]} == {
            "spec version v3": "the destination does not read it",
            "payload uart-16550 version 2": "the destination does not read it",
            "encoding zero": "the destination does not read it",
            "encoding zstd": "the destination does not read it",
            "encoding delta": "the destination does not read it",
        }
        assert to_beta["offered"]["spec_versions"] == ["v1", "v2"]
        assert {"device": "com1", "kind": "uart-16550", "versions": [2, 1], "optional": False} in (
            to_beta["needed"]["payloads"]
        )
        passed = {entry["what"]: entry["why"] for entry in to_gamma["passed_over"]}
        assert (
            passed["spec version v9"]
            == passed["protocol 9"]
            == passed["encoding lz9"]
            == passed["transport quantum"]
            == ("the source does not write it")
        )
        assert passed["spec version v3"] == "the source does not write it", "beta is narrowed as a source, too"
        assert passed["payload uart-16550 version 2"] == "the source does not write it for com1"
        assert to_gamma["refused"] is None


async def test_a_spec_that_the_other_release_cannot_say_is_refused_and_goes_where_it_can_be_said(
    tmp_path: Path,
) -> None:
    async with open_fleet(tmp_path, "alpha", "beta", "gamma") as fleet:
        alpha = await fleet.start("alpha")
        beta = await fleet.start("beta", compat='spec_versions = ["v1"]')
        gamma = await fleet.start("gamma", compat='spec_versions = ["v1", "v2"]')
        instance = await paused(alpha, machine(smbios=SMBIOS))
        before = await Seen.at(alpha, instance)

        ours, theirs = await both_records(alpha, beta, instance)

        assert_refused_alike(ours, theirs, "no_common_spec_version")
        reasons = ours["error"]["details"]["reasons"]
        assert reasons["v3"] == reasons["v2"] == "the destination does not read it"
        assert "smbios" in reasons["v1"]
        assert await Seen.at(alpha, instance) == before
        moved = await migrate(alpha, gamma, instance)
        assert (moved["outcome"], moved["negotiated"]["spec_version"]) == ("moved", "v2")
        assert await Seen.at(gamma, instance) == before


async def test_a_device_whose_present_state_the_older_version_cannot_say_is_refused_by_name(tmp_path: Path) -> None:
    """Keys wait behind a full FIFO: `uart-16550` version 1 cannot say them, so it is not an option just now."""
    async with open_fleet(tmp_path, "alpha", "beta", "gamma") as fleet:
        alpha = await fleet.start("alpha")
        beta = await fleet.start("beta", compat="payloads = {uart-16550 = [1], bhyve-rtc = [1]}")
        gamma = await fleet.start("gamma")
        instance = await paused(alpha, machine(), keys=TYPED)
        before = await Seen.at(alpha, instance)

        ours, theirs = await both_records(alpha, beta, instance)

        assert_refused_alike(ours, theirs, "no_common_ground")
        assert ours["error"]["details"]["mismatches"] == [
            {
                "topic": "payload uart-16550 of device com1",
                "source": ["2"],
                "destination": ["1"],
                "device": "com1",
                "kind": "uart-16550",
            }
        ]
        assert (await migrate(alpha, gamma, instance))["outcome"] == "moved"
        assert await Seen.at(gamma, instance) == before
        assert before.devices["com1", "uart-16550"].pending_input == TYPED[16:].encode()


REFUSALS: Mapping[str, tuple[Callable[[Abilities], Abilities], list[tuple[str, list[str], list[str]]]]] = {
    "a protocol of the future": (only(protocols=(9,)), [("protocol", ["1"], ["9"])]),
    "encodings of the future": (only(encodings=("lz9",)), [("encodings", EVERY_ENCODING, ["lz9"])]),
    "a transport of the future": (only(transports=("quantum",)), [("transports", ["sealed", "tls"], ["quantum"])]),
    "no common digest": (only(digests=("sha9",)), [("digests", ["multilinear-64-tree", "multilinear-64"], ["sha9"])]),
    "kinds that it does not know": (
        only(payloads={"uart-16550": (), "pci-virtio": (9,)}),
        [
            ("payload uart-16550 of device com1", ["2", "1"], []),
            ("payload pci-virtio of device disk", ["2", "1"], ["9"]),
        ],
    ),
}


@pytest.mark.parametrize("why", list(REFUSALS))
async def test_releases_without_common_ground_refuse_before_ram_moves_and_the_guest_goes_on(
    tmp_path: Path, why: str
) -> None:
    abilities, mismatches = REFUSALS[why]
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha")
        beta = await fleet.start("beta", abilities=abilities)
        instance = await create(alpha, machine(), program=stress(2, 500))

        ours, theirs = await both_records(alpha, beta, instance)

        assert_refused_alike(ours, theirs, "no_common_ground")
        told = [(m["topic"], m["source"], m["destination"]) for m in ours["error"]["details"]["mismatches"]]
        assert sorted(told) == sorted(mismatches)
        await wait_heartbeats(alpha, instance)
        assert await beta.client.get("/v1/instances") == []


async def test_everything_that_stands_in_the_way_is_told_at_once(tmp_path: Path) -> None:
    """Spec, protocol and payloads in one refusal: nobody repairs one thing only to hear of the next."""
    stranger = only(protocols=(9,), spec_versions=("v9",), payloads={"uart-16550": ()})
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta", abilities=stranger)
        instance = await create(alpha, machine())

        ours, theirs = await both_records(alpha, beta, instance)

        assert_refused_alike(ours, theirs, "no_common_ground")
        spec, rest = sorted(ours["error"]["details"]["refusals"], key=lambda refusal: refusal["code"], reverse=True)
        assert set(spec["details"]["reasons"].values()) == {"the destination does not read it"}
        assert [m["topic"] for m in rest["details"]["mismatches"]] == ["protocol", "payload uart-16550 of device com1"]


# --------------------------------------------------------------------------- guests with payloads of their own


class Alters(ObservedHypervisor):
    """A host whose guests list, export and import what a test makes of it."""

    before_pause: Callable[[Guest], Any] | None = None
    listed: Callable[[tuple[PayloadDescription, ...]], tuple[PayloadDescription, ...]] = staticmethod(lambda it: it)
    exported: Callable[[tuple[DevicePayload, ...]], tuple[DevicePayload, ...]] = staticmethod(lambda it: it)

    async def build(self, plan: GuestPlan, stamp: GuestStamp, *, for_migration: bool) -> Guest:
        guest = await super().build(plan, stamp, for_migration=for_migration)
        really_list, really_export = guest.list_payloads, guest.export_devices
        really_pause = guest.pause_for_handoff

        async def list_payloads() -> tuple[PayloadDescription, ...]:
            return type(self).listed(await really_list())

        async def export_devices(versions: Mapping[str, int]) -> tuple[DevicePayload, ...]:
            return type(self).exported(await really_export(versions))

        async def pause_for_handoff(migration_id: str) -> None:
            if type(self).before_pause is not None:
                await type(self).before_pause(guest)
            await really_pause(migration_id)

        guest.list_payloads, guest.export_devices = list_payloads, export_devices  # type: ignore[method-assign]
        guest.pause_for_handoff = pause_for_handoff  # type: ignore[method-assign]
        return guest


async def test_state_that_turns_lossy_during_the_copy_fails_the_export_and_the_source_goes_on(tmp_path: Path) -> None:
    """Exact when it was agreed, not any more at the pause: refused by name then, never cut down."""

    class TypesBeforeThePause(Alters):
        @staticmethod
        async def before_pause(guest: Guest) -> None:
            await guest.console_input("com1", TYPED.encode())

    async with open_fleet(tmp_path, "alpha", "beta", "gamma") as fleet:
        alpha = await fleet.start("alpha", hypervisor_class=TypesBeforeThePause)
        beta = await fleet.start("beta", compat="payloads = {uart-16550 = [1]}")
        gamma = await fleet.start("gamma")
        instance = await create(alpha, machine(), program=stress(2, 500))

        ours, theirs = await both_records(alpha, beta, instance)

        for record in (ours, theirs):
            assert (record["outcome"], record["error"]["code"]) == ("failed", "payload_lossy"), record
            assert "device com1, payload uart-16550 version 1: cannot say pending_input" in record["error"]["message"]
        await wait_heartbeats(alpha, instance)
        assert (await check(alpha, instance))["consistent"]
        TypesBeforeThePause.before_pause = None  # type: ignore[assignment,method-assign]
        assert (await migrate(alpha, gamma, instance))["outcome"] == "moved"
        assert witnesses(fleet, instance).single


PMU = registry.encode("vcpu-0", "bhyve-x86-pmu-amd", kinds.VcpuPmuAmdV1((1,) * 6, (2,) * 6), optional=True)


class HasCounters(Alters):
    """A guest with an optional payload that no embedded machine takes."""

    listed = staticmethod(lambda it: (*it, PayloadDescription("vcpu-0", "bhyve-x86-pmu-amd", (1,), True)))
    exported = staticmethod(lambda it: (*it, PMU))


@pytest.mark.parametrize(
    ("abilities", "why"),
    [
        (only(payloads={"bhyve-x86-pmu-amd": ()}), "the destination does not read it"),
        (only(payloads={"bhyve-x86-pmu-amd": (7,)}), "the destination does not read it"),
        (only(), "no device here takes it"),
    ],
    ids=["kind unknown", "version unknown", "machine without it"],
)
async def test_an_optional_payload_that_the_other_side_does_not_take_is_skipped_and_reported(
    tmp_path: Path, abilities: Callable[[Abilities], Abilities], why: str
) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha", hypervisor_class=HasCounters)
        beta = await fleet.start("beta", abilities=abilities)
        instance = await create(alpha)

        ours, theirs = await both_records(alpha, beta, instance)

        assert ours["outcome"] == theirs["outcome"] == "moved", ours
        skipped = {"device": "vcpu-0", "kind": "bhyve-x86-pmu-amd", "why": why}
        assert theirs["negotiation"]["skipped"] == [skipped]
        if why == "the destination does not read it":
            assert ours["negotiation"]["skipped"] == [skipped]


async def test_a_guest_that_gets_an_unmigratable_device_after_its_ticket_is_refused_by_name(tmp_path: Path) -> None:
    """The API says so at once; what changes until the destination comes is said in the refusal, before RAM."""

    class GrowsADevice(Alters):
        asked = 0

        @staticmethod
        def listed(it: tuple[PayloadDescription, ...]) -> tuple[PayloadDescription, ...]:
            GrowsADevice.asked += 1
            if GrowsADevice.asked > 1:
                details = {"devices": ["vsock (virtio_socket)"]}
                raise HypervisorError(
                    "devices that cannot migrate: vsock (virtio_socket)", code="not_migratable", details=details
                )
            return it

    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha", hypervisor_class=GrowsADevice), await fleet.start("beta")
        instance = await create(alpha)

        ours, theirs = await both_records(alpha, beta, instance)

        assert_refused_alike(ours, theirs, "not_migratable")
        assert ours["error"]["details"]["devices"] == ["vsock (virtio_socket)"]
        await wait_heartbeats(alpha, instance)


# --------------------------------------------------------------------------- imports that are refused


async def test_a_device_of_which_the_source_does_not_even_know_is_missed_by_the_destination(tmp_path: Path) -> None:
    """An older source may not know that a device has state; Propolis would start the guest without it."""

    class Forgets(Alters):
        listed = staticmethod(lambda it: tuple(item for item in it if item.kind != "bhyve-rtc"))
        exported = staticmethod(lambda it: tuple(item for item in it if item.kind != "bhyve-rtc"))

    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha", hypervisor_class=Forgets), await fleet.start("beta")
        instance = await create(alpha)

        ours, theirs = await both_records(alpha, beta, instance)

        assert ours["error"]["code"] == theirs["error"]["code"] == "payload_missing"
        assert "device pci-piix3-lpc: no payload of kind bhyve-rtc" in ours["error"]["message"]
        await wait_heartbeats(alpha, instance)


def _changed(index: int, **changes: Any) -> Callable[[tuple[DevicePayload, ...]], tuple[DevicePayload, ...]]:
    return lambda it: tuple(replace(p, **changes) if n == index else p for n, p in enumerate(it))


def _index_of(kind: str, payloads: Sequence[DevicePayload]) -> int:
    return next(n for n, payload in enumerate(payloads) if payload.kind == kind)


def tampered(kind: str, **changes: Any) -> Callable[[tuple[DevicePayload, ...]], tuple[DevicePayload, ...]]:
    return lambda it: _changed(_index_of(kind, it), **changes)(it)


def _out_of_range(it: tuple[DevicePayload, ...]) -> tuple[DevicePayload, ...]:
    index = _index_of("pci-virtio", it)
    tree = msgpack.unpackb(it[index].body)
    tree["queues"]["queues"][0]["avail_gpa"] = 1 << 40
    tree["queues"]["queues"][0]["mapping_valid"] = True
    return _changed(index, body=msgpack.packb(tree))(it)


def _elsewhere(it: tuple[DevicePayload, ...], device: str) -> DevicePayload:
    return replace(it[_index_of("uart-16550", it)], instance_name=device)


STRANGER = DevicePayload("com9", "no-such-kind", 1, b"?")
BAD_LISTS: Sequence[tuple[str, str, Callable[[tuple[DevicePayload, ...]], tuple[DevicePayload, ...]]]] = (
    ("payload_missing", "device com1", lambda it: tuple(p for p in it if p.kind != "uart-16550")),
    ("payload_duplicate", "device com1: 2 payloads", lambda it: (*it, it[_index_of("uart-16550", it)])),
    ("payload_unconsumed", "device com7: this machine has no such device", lambda it: (*it, _elsewhere(it, "com7"))),
    ("payload_unconsumed", "device disk: nothing here takes", lambda it: (*it, replace(it[0], instance_name="disk"))),
    ("payload_kind", "device com9: unknown kind no-such-kind, and it is not optional", lambda it: (*it, STRANGER)),
    ("payload_too_large", "device com1", tampered("uart-16550", body=bytes(300_000))),
    ("payload_body", "device pci-piix3-lpc", tampered("bhyve-rtc", body=b"\x80")),
    ("payload_version", "device com1", tampered("uart-16550", version=9)),
    ("payload_value", "device disk: pci-virtio queues[0].avail_gpa 0x10000000000 does not lie in RAM", _out_of_range),
)


async def test_a_bad_list_of_payloads_is_refused_with_the_device_and_the_source_goes_on(tmp_path: Path) -> None:
    """One guest survives every bad list there is, unharmed, and then moves: nothing was applied, nothing was lost."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha", hypervisor_class=Alters), await fleet.start("beta")
        instance = await create(alpha, machine(), program=stress(2, 500))

        for code, says, tamper in BAD_LISTS:
            Alters.exported = staticmethod(tamper)
            ours, theirs = await both_records(alpha, beta, instance)
            for record in (ours, theirs):
                assert (record["outcome"], record["error"]["code"]) == ("failed", code), record
                assert says in record["error"]["message"], record["error"]
            assert ours["error"] == theirs["error"]
            await wait_heartbeats(alpha, instance)
            assert await beta.client.get("/v1/instances") == []

        Alters.exported = staticmethod(lambda it: it)
        assert (await migrate(alpha, beta, instance, verify="full"))["outcome"] == "moved"
        assert (await check(beta, instance))["consistent"]
        owners = witnesses(fleet, instance)
        assert (owners.single, owners.hosts) == (True, ("alpha", "beta")), owners.problems
