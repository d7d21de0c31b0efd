"""State that only its hypervisor reads: facts decide, before RAM moves, and every fact that differs is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.migration.fleet import ObservedHypervisor, begin, check, create, open_fleet, wait_heartbeats, wait_outcome
from vmmigrate.devices.payload import DevicePayload
from vmmigrate.hypervisor.base import PayloadDescription
from vmmigrate.hypervisor.embedded.remote import EmbeddedGuest

KIND = "test/vmstate"
HOST = {
    "hypervisor": "test",
    "hypervisor_version": "9.2",
    "loads_versions": "8.0..9.2",
    "machine_types": "q35 i440fx",
    "cpu_models": "qemu64 EPYC",
}
GUEST = {
    "hypervisor": "test",
    "hypervisor_version": "9.2",
    "machine_type": "q35",
    "cpu_model": "qemu64",
    "device_tree": "6c1f",
}


class OpaqueGuest(EmbeddedGuest):
    """An embedded guest that also has state of which only a `test` hypervisor knows what it says."""

    told: Mapping[str, str] = GUEST
    optional = False
    loaded: bytes | None = None

    @property
    def facts(self) -> Mapping[str, str]:
        return self.told

    async def list_payloads(self) -> tuple[PayloadDescription, ...]:
        listed = await super().list_payloads()
        return (*listed, PayloadDescription("machine", KIND, (1,), self.optional))

    async def export_devices(self, versions: Mapping[str, int]) -> tuple[DevicePayload, ...]:
        exported = await super().export_devices(versions)
        return (*exported, DevicePayload("machine", KIND, 1, b"\x01only we know", self.optional))

    async def import_devices(self, payloads: Sequence[DevicePayload]) -> tuple[tuple[str, str], ...]:
        skipped = await super().import_devices([p for p in payloads if p.kind != KIND])
        OpaqueGuest.loaded = next((p.body for p in payloads if p.kind == KIND), None)
        return skipped


class TestHypervisor(ObservedHypervisor):
    """A hypervisor whose guests have opaque state."""

    __test__ = False
    host: Mapping[str, str] = HOST
    told: Mapping[str, str] = GUEST
    optional = False

    @classmethod
    async def open(cls, *arguments: Any, **options: Any) -> Any:
        opened = await super().open(*arguments, **options)
        opened.capabilities = replace(opened.capabilities, facts=cls.host, opaque_kinds={KIND: (1,)})
        return opened

    def _guest(self, *arguments: Any) -> EmbeddedGuest:
        guest = super()._guest(*arguments)
        guest.__class__ = type("Guest", (OpaqueGuest,), {"told": self.told, "optional": self.optional})
        return guest


def hypervisor(**changes: Any) -> type[TestHypervisor]:
    return type("Other", (TestHypervisor,), changes)


async def test_opaque_state_crosses_unread_between_hypervisors_whose_facts_match(tmp_path: Path) -> None:
    OpaqueGuest.loaded = None
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha", hypervisor_class=TestHypervisor)
        beta = await fleet.start("beta", hypervisor_class=TestHypervisor)
        instance = await create(alpha)
        migration = await begin(alpha, beta, instance)

        ours, theirs = await wait_outcome(alpha, migration), await wait_outcome(beta, migration)

        assert ours["outcome"] == "moved", ours
        assert ours["negotiated"]["payloads"][KIND] == theirs["negotiated"]["payloads"][KIND] == 1
        assert ours["negotiation"]["offered"]["facts"] == HOST
        assert OpaqueGuest.loaded == b"\x01only we know"
        assert (await check(beta, instance))["consistent"]


@pytest.mark.parametrize(
    ("other", "code", "differing"),
    [
        pytest.param(
            hypervisor(host={**HOST, "loads_versions": "8.0..9.1", "machine_types": "i440fx", "cpu_models": "EPYC"}),
            "no_common_ground",
            ["fact hypervisor_version", "fact machine_type", "fact cpu_model"],
            marks=pytest.mark.slow,
        ),
        (hypervisor(host={"hypervisor": "xen"}), "no_common_ground", None),
        (ObservedHypervisor, "no_common_ground", None),
        (
            hypervisor(told={**GUEST, "device_tree": "77aa", "cpu_model": "EPYC"}),
            "opaque_facts",
            ["cpu_model", "device_tree"],
        ),
    ],
    ids=["an older host", "another hypervisor", "a host that does not know the kind", "another guest"],
)
async def test_facts_that_differ_are_all_told_before_ram_moves(
    tmp_path: Path, other: type[ObservedHypervisor], code: str, differing: list[str] | None
) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha", hypervisor_class=TestHypervisor)
        beta = await fleet.start("beta", hypervisor_class=other)
        instance = await create(alpha)
        migration = await begin(alpha, beta, instance)

        ours, theirs = await wait_outcome(alpha, migration), await wait_outcome(beta, migration)

        for record in (ours, theirs):
            assert (record["outcome"], record["error"]["code"]) == ("refused", code), record
            assert record["negotiation"]["refused"] == record["error"]
            assert record["ram"]["sent_bytes"] == 0
        assert ours["error"] == theirs["error"]
        told = [entry.get("topic", entry.get("fact")) for entry in ours["error"]["details"]["mismatches"]]
        if differing is not None:
            assert told == differing
        else:
            assert told[-4:] == [f"fact {f}" for f in ("hypervisor", "hypervisor_version", "machine_type", "cpu_model")]
        await wait_heartbeats(alpha, instance)
        assert await beta.client.get("/v1/instances") == []


@pytest.mark.parametrize(
    "changes",
    [pytest.param({"host": {"hypervisor": "xen"}}, marks=pytest.mark.slow), {"told": {**GUEST, "device_tree": "77aa"}}],
    ids=["another hypervisor", "another guest"],
)
async def test_optional_opaque_state_that_does_not_fit_stays_behind_and_is_reported(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    OpaqueGuest.loaded = None
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha", hypervisor_class=hypervisor(optional=True))
        beta = await fleet.start("beta", hypervisor_class=hypervisor(optional=True, **changes))
        instance = await create(alpha)
        migration = await begin(alpha, beta, instance)

        ours, theirs = await wait_outcome(alpha, migration), await wait_outcome(beta, migration)

        assert ours["outcome"] == "moved", ours
        record = ours if "host" in changes else theirs
        assert record["negotiation"]["skipped"] == [
            {"device": "machine", "kind": KIND, "why": "its hypervisor's facts differ"}
        ]
        assert OpaqueGuest.loaded is None
