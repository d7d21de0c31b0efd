"""Guests move between hosts with different versions of QEMU, there and back, as long as both have the machine type.

The other QEMU is the one that `VMM_OTHER_QEMU` names; which of the two is the older one is found out by asking them.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.hypervisor.qemu_hosts import OTHER_QEMU, QEMU, uses_qemu
from tests.migration.fleet import Fleet, RunningHost, check, migrate, open_fleet, spec_v3, wait_heartbeats, witnesses
from tests.migration.foreign_qemu import open_foreign
from tests.migration.qemu_fleet import QEMU_SETTINGS, VNIC, create_ready, machine, moves_whole, start, wait_hashed_again

pytestmark = [  # no machine has to have a second QEMU
    *uses_qemu,
    pytest.mark.skipif(
        not OTHER_QEMU or shutil.which(OTHER_QEMU) is None,
        reason="there is no second QEMU: VMM_OTHER_QEMU names none (tools/other_qemu fetches one)",
    ),
]


async def start_versions(fleet: Fleet, source: str = "tracker", **options: Any) -> tuple[RunningHost, RunningHost]:
    """The host with the older QEMU, and the one with the newer."""
    alpha = await start(fleet, "alpha", source, binary=QEMU, **options)
    beta = await start(fleet, "beta", source, binary=OTHER_QEMU, **options)
    older, newer = sorted((alpha, beta), key=version)
    if version(older)[:2] == version(newer)[:2]:
        pytest.skip(f"both QEMUs are of version {older.hypervisor.capabilities.version}")
    return older, newer


def version(host: RunningHost) -> Sequence[int]:
    return [int(part) for part in host.hypervisor.capabilities.version.split(".")]


@pytest.mark.parametrize("source", ["tracker", "stream"])
async def test_a_guest_moves_to_a_newer_qemu_and_back_and_is_as_it_was(tmp_path: Path, source: str) -> None:
    """With a disk, a NIC and a console: whatever it was saved by, it keeps its machine type, and goes on."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        older, newer = await start_versions(fleet, source)
        instance = await create_ready(older, machine(tmp_path), disk=True)
        kind = older.guest(instance).facts["machine_type"]

        for here, there in ((older, newer), (newer, older), (older, newer)):
            record = await moves_whole(here, there, instance, source)
            facts = there.guest(instance).facts
            assert (facts["machine_type"], facts["hypervisor_version"]) == (kind, there.hypervisor.capabilities.version)
        owners = witnesses(fleet, instance)
        assert owners.single, owners.problems
        await wait_hashed_again(older, record["migration_id"])


@pytest.mark.slow
async def test_a_machine_type_that_the_other_qemu_lacks_is_refused_by_its_name_before_ram_moves(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        older, newer = await start_versions(fleet)
        instance = await create_ready(newer, spec_v3())
        kind = newer.guest(instance).facts["machine_type"]

        record = await migrate(newer, older, instance)

        assert (record["outcome"], record["error"]["code"]) == ("refused", "no_common_ground"), record
        assert [mismatch["topic"] for mismatch in record["error"]["details"]["mismatches"]] == ["fact machine_type"]
        assert kind in record["error"]["message"]
        assert record["ram"]["sent_bytes"] == 0
        await wait_heartbeats(newer, instance, 100)


@pytest.mark.slow
async def test_a_newer_host_makes_machines_that_an_older_one_takes_when_it_is_told_to(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        older, newer = await start_versions(fleet)
        kind = older.hypervisor.capabilities.facts["machine_types"].split()[-1]
        await newer.stop()
        qemu = f'{QEMU_SETTINGS}\nmachine_type = "{kind}"'
        binary = QEMU if newer.name == "alpha" else OTHER_QEMU
        newer = await start(fleet, newer.name, binary=binary, qemu=qemu)
        instance = await create_ready(newer, spec_v3())

        record = await migrate(newer, older, instance, verify="full", downtime_ms=2000)

        assert record["outcome"] == "moved", record
        assert older.guest(instance).facts["machine_type"] == kind
        await wait_heartbeats(older, instance, 100)
        assert (await check(older, instance))["consistent"]


@pytest.mark.parametrize("runs_in", ["older", "newer"])
async def test_a_guest_in_another_version_of_qemu_is_adopted_and_moves(tmp_path: Path, runs_in: str) -> None:
    """The host's QEMU was upgraded since somebody started it, or has not been yet."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        older, newer = await start_versions(fleet)
        host, other = (newer, older) if runs_in == "older" else (older, newer)
        async with open_foreign(tmp_path, binary=other.config.qemu.binary) as foreign:
            instance = (await foreign.adopt(host))["id"]
            assert host.guest(instance).facts["hypervisor_version"] == other.hypervisor.capabilities.version

            record = await migrate(host, other, instance, replacements=VNIC, downtime_ms=2000)

            assert record["outcome"] == "moved", record
            await wait_heartbeats(other, instance, 300)
            assert (await check(other, instance))["reason"] == ""
