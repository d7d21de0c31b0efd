"""What a migration promises when something fails: the source is as before, both sides say why, the next try works."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest
import trio

from tests.hypervisor.faults import ForgetfulTracker
from tests.migration.fleet import (
    Fleet,
    ObservedHypervisor,
    RunningHost,
    begin,
    check,
    create,
    crucible_backend,
    migrate,
    open_fleet,
    spec_v3,
    stress,
    wait_filled,
    wait_heartbeats,
    wait_outcome,
    witnesses,
)
from vmmigrate.api.client import open_client
from vmmigrate.errors import VmMigrateError
from vmmigrate.hypervisor.base import Guest, GuestPlan, GuestStamp, RunState
from vmmigrate.hypervisor.conformance import wait_heartbeats as wait_beats
from vmmigrate.memory import PageBitmap
from vmmigrate.net.channel import open_channel
from vmmigrate.net.identity import Identity, Role
from vmmigrate.net.tls import TlsFiles, close_tls, connect_tls
from vmmigrate.wire import messages as m
from vmmigrate.wire import phases

INJECTOR = "injector"


@pytest.mark.parametrize("direction", ["fail_imports", pytest.param("fail_exports", marks=pytest.mark.slow)])
async def test_after_a_failed_attempt_the_source_runs_and_the_next_one_succeeds(tmp_path: Path, direction: str) -> None:
    """The first import (or export) fails on order; marks are put back, disks are open again, memory is equal later."""
    failing = {"fail_imports": 0, "fail_exports": 0, direction: 1}
    spec = spec_v3(**{INJECTOR: {"type": "migration_failure_injector", "component": failing}})
    tame = {
        INJECTOR: {"component": "MigrationFailureInjector", "spec": {"fail_imports": 0, "fail_exports": 0}},
    }
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, spec, program=stress(8, 2000))
        await wait_filled(alpha, instance, 8 * 256)

        first = await begin(alpha, beta, instance)
        source, destination = await wait_outcome(alpha, first), await wait_outcome(beta, first)

        assert (source["outcome"], destination["outcome"]) == ("failed", "failed")
        assert source["error"]["code"] == destination["error"]["code"] == "injected_failure"
        assert (await alpha.instance(instance))["state"] == "running"
        assert (await alpha.instance(instance))["guest"]["backends_open"]
        assert [shown["id"] for shown in await beta.client.get("/v1/instances")] == []
        await wait_heartbeats(alpha, instance)

        second = await migrate(alpha, beta, instance, verify="full", replacements=json.dumps(tame))

        assert second["outcome"] == "moved", second
        assert second["ram"]["rounds"][0]["pages"] <= source["ram"]["rounds"][0]["pages"] + 2
        assert (await check(beta, instance))["consistent"]
        owners = witnesses(fleet, instance)
        assert owners.single, owners.problems


async def test_dirty_marks_of_a_failed_attempt_are_put_back(tmp_path: Path) -> None:
    """Everything that was offered is dirty again: a later attempt that trusted the marks would miss nothing."""
    failing = {"type": "migration_failure_injector", "component": {"fail_imports": 1, "fail_exports": 0}}
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, spec_v3(injector=failing), program=stress(4, 500))
        await wait_filled(alpha, instance, 4 * 256)

        record = await migrate(alpha, beta, instance)

        assert record["outcome"] == "failed"
        guest = alpha.guest(instance)
        dirty = await guest.take_dirty()
        assert (guest.ram.populated() - dirty).is_empty()


async def test_a_page_that_dirty_tracking_missed_makes_verification_fail(tmp_path: Path) -> None:
    """One page's mark is lost behind the tracker's back; a digest finds it, and the source goes on.

    Page 0 holds the heartbeat, so it is surely written between the first round and the pause. Either digest may find
    it: that of the pages as sent (when the guest wrote while the page was being sent), or that of all RAM at the end.
    """
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha", wrap_tracker=lambda tracker: ForgetfulTracker(tracker, [0]))
        beta = await fleet.start("beta")
        instance = await create(alpha, program=stress(2, 500))
        await wait_filled(alpha, instance, 2 * 256)

        record = await migrate(alpha, beta, instance, verify="full")

        assert (record["outcome"], record["error"]["code"]) == ("failed", "digest_mismatch"), record
        assert (await alpha.instance(instance))["state"] == "running"
        await wait_heartbeats(alpha, instance)
        assert (await check(alpha, instance))["consistent"]


async def test_a_device_that_cannot_migrate_is_refused_before_anything_moves(tmp_path: Path) -> None:
    """Named, with no ticket issued: vsock is in most specs of the newest version."""
    vsock = {
        "type": "virtio_socket",
        "component": {"guest_cid": 42, "pci_path": {"bus": 0, "device": 9, "function": 0}},
    }
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, spec_v3(vsock=vsock))

        with pytest.raises(VmMigrateError, match="vsock") as refusal:
            await migrate(alpha, beta, instance)

        assert refusal.value.code == "not_migratable"
        assert (await alpha.instance(instance))["state"] == "running"


async def test_a_destination_refuses_what_it_may_not_open_and_names_it_all(tmp_path: Path) -> None:
    """Paths, hosts and interfaces of a peer's spec are not trusted; both sides name the same code."""
    disk = tmp_path / "disks" / "a.raw"
    disk.parent.mkdir()
    disk.write_bytes(bytes(4096))
    slot = {"bus": 0, "device": 4, "function": 0}
    nic_slot = {"bus": 0, "device": 8, "function": 0}
    boot_slot = {"bus": 0, "device": 5, "function": 0}
    backend = {"path": str(disk), "readonly": False, "block_size": 512, "workers": None}
    interface = "5e0f6c1e-0000-4000-8000-000000000001"
    spec = spec_v3(
        disk={"type": "virtio_disk", "component": {"backend_id": "file", "pci_path": slot}},
        file={"type": "file_storage_backend", "component": backend},
        net={
            "type": "virtio_nic",
            "component": {"backend_id": "wire", "interface_id": interface, "pci_path": nic_slot},
        },
        wire={"type": "virtio_network_backend", "component": {"vnic_name": "vnic0"}},
        boot={
            "type": "nvme_disk",
            "component": {"backend_id": "volume", "pci_path": boot_slot, "serial_number": [0] * 20},
        },
        volume={"type": "crucible_storage_backend", "component": crucible_backend(1)},
    )
    elsewhere = {
        "wire": {"component": "VirtioNetworkBackend", "spec": {"vnic_name": "eth0"}},
        "volume": {"component": "CrucibleStorageBackend", "spec": crucible_backend(2, "203.0.113.9:3810")},
    }
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha = await fleet.start("alpha", allow=f'paths = ["{disk.parent}"]')
        beta = await fleet.start("beta")
        instance = await create(alpha, spec)

        migration = await begin(alpha, beta, instance, replacements=json.dumps(elsewhere))
        source, destination = await wait_outcome(alpha, migration), await wait_outcome(beta, migration)

        assert (source["outcome"], destination["outcome"]) == ("refused", "refused")
        assert source["error"]["code"] == destination["error"]["code"] == "host_refuses"
        problems = source["error"]["details"]["problems"]
        assert [problem.partition(":")[0] for problem in problems] == ["file", "volume", "wire"]
        assert source["ram"]["sent_bytes"] == 0
        assert (await alpha.instance(instance))["state"] == "running"


async def test_backends_that_are_neither_replaced_nor_kept_are_refused(tmp_path: Path) -> None:
    wire = {"type": "virtio_network_backend", "component": {"vnic_name": "vnic0"}}
    nic = {
        "backend_id": "wire",
        "interface_id": "5e0f6c1e-0000-4000-8000-000000000001",
        "pci_path": {"bus": 0, "device": 8, "function": 0},
    }
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, spec_v3(net={"type": "virtio_nic", "component": nic}, wire=wire))

        refused = await migrate(alpha, beta, instance)
        kept = await migrate(alpha, beta, instance, keep=["wire"])

        assert (refused["outcome"], refused["error"]["code"]) == ("refused", "spec_amend")
        assert kept["outcome"] == "moved", kept


# --------------------------------------------------------------------------- time and cancel


@pytest.mark.parametrize("side", ["source", pytest.param("destination", marks=pytest.mark.slow)])
async def test_a_migration_is_cancelled_from_either_side(tmp_path: Path, side: str) -> None:
    """Both records say cancelled; the guest runs where it was; the destination keeps nothing."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=stress(16, 40_000))
        await wait_filled(alpha, instance, 16 * 256)
        migration = await begin(alpha, beta, instance, downtime_ms=1, max_rounds=1000)
        await _wait_rounds(fleet, migration, 2)

        canceller = alpha if side == "source" else beta
        await canceller.client.post(f"/v1/migrations/{migration}:cancel", {"reason": "enough"})

        source, destination = await wait_outcome(alpha, migration), await wait_outcome(beta, migration)
        assert (source["outcome"], destination["outcome"]) == ("cancelled", "cancelled")
        assert (await alpha.instance(instance))["state"] == "running"
        assert await beta.client.get("/v1/instances") == []
        await wait_heartbeats(alpha, instance)
        assert witnesses(fleet, instance).hosts == ("alpha",)


class GuestsGetTheirTurn(ObservedHypervisor):
    """A host whose guests write between two looks at what they wrote, however busy the machine is."""

    async def build(self, plan: GuestPlan, stamp: GuestStamp, *, for_migration: bool) -> Guest:
        guest = await super().build(plan, stamp, for_migration=for_migration)
        really_take = guest.take_dirty

        async def take_dirty() -> PageBitmap:
            status = await guest.status()
            if status.run_state is RunState.RUNNING:
                await wait_beats(guest, status.heartbeats + 20)
            return await really_take()

        guest.take_dirty = take_dirty  # type: ignore[method-assign]
        return guest


async def test_a_guest_that_will_not_converge_stays_where_it_is(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha", hypervisor_class=GuestsGetTheirTurn), await fleet.start("beta")
        instance = await create(alpha, program=stress(16, 40_000))
        await wait_filled(alpha, instance, 16 * 256)

        gave_up = await migrate(alpha, beta, instance, downtime_ms=1, max_rounds=3)
        forced = await migrate(alpha, beta, instance, downtime_ms=1, max_rounds=3, force=True)

        assert (gave_up["outcome"], gave_up["error"]["code"]) == ("failed", "will_not_converge")
        assert forced["outcome"] == "moved", forced
        assert (await check(beta, instance))["consistent"]


async def test_a_migration_that_takes_too_long_ends_as_timed_out(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=stress(16, 40_000))
        await wait_filled(alpha, instance, 16 * 256)

        record = await migrate(alpha, beta, instance, timeout_s=0.01)

        assert record["outcome"] == "timed_out", record
        assert (await alpha.instance(instance))["state"] == "running"


async def test_what_an_operator_may_not_do_to_a_migrating_guest_is_refused(tmp_path: Path) -> None:
    """Stop, delete, pause and a second migration: 409 with a code; the migration goes on."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=stress(16, 40_000))
        await wait_filled(alpha, instance, 16 * 256)
        migration = await begin(alpha, beta, instance, downtime_ms=1, max_rounds=1000)
        await _wait_rounds(fleet, migration, 1)

        for attempt, code in {
            "stop": "migrating",
            "pause": "migrating",
            "migrate-out": "already_migrating",
        }.items():
            body = {"destination_host": "beta"} if attempt == "migrate-out" else {}
            with pytest.raises(VmMigrateError) as refusal:
                await alpha.client.post(f"/v1/instances/{instance}:{attempt}", body)
            assert refusal.value.code == code
        with pytest.raises(VmMigrateError) as refusal:
            await alpha.client.delete(f"/v1/instances/{instance}")
        assert refusal.value.code == "migrating"

        assert (await alpha.record(migration))["outcome"] is None
        await alpha.client.post(f"/v1/migrations/{migration}:cancel")
        assert (await wait_outcome(alpha, migration))["outcome"] == "cancelled"


# --------------------------------------------------------------------------- tickets


async def test_a_ticket_works_once_for_its_migration_instance_and_host(tmp_path: Path) -> None:
    """Wrong, foreign, used: each is refused with its own code, and the source's guest never notices."""
    async with open_fleet(tmp_path, "alpha", "beta", "gamma") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha)
        ticket = await alpha.client.post(f"/v1/instances/{instance}:migrate-out", {"destination_host": "beta"})
        good = (ticket["migration_id"], instance, ticket["ticket"])

        assert await _offer(fleet, "gamma", *good) == "wrong_host"
        assert await _offer(fleet, "beta", good[0], instance, "0" * 64) == "ticket_wrong"
        assert await _offer(fleet, "beta", good[0], str(uuid.uuid4()), good[2]) == "ticket_wrong"
        assert await _offer(fleet, "beta", str(uuid.uuid4()), instance, good[2]) == "ticket_unknown"
        # Nothing of this has used it up; an offer without anything in common does.
        assert await _offer(fleet, "beta", *good) == "no_common_ground"
        assert await _offer(fleet, "beta", *good) == "ticket_used"
        assert (await alpha.instance(instance))["state"] == "running"
        assert (await migrate(alpha, beta, instance))["outcome"] == "moved"


@pytest.mark.slow
async def test_a_newer_ticket_takes_the_place_of_one_that_nobody_used(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, _ = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha)
        old = await alpha.client.post(f"/v1/instances/{instance}:migrate-out", {"destination_host": "beta"})

        await alpha.client.post(f"/v1/instances/{instance}:migrate-out", {"destination_host": "beta"})

        assert await _offer(fleet, "beta", old["migration_id"], instance, old["ticket"]) == "ticket_used"
        assert (await alpha.record(old["migration_id"]))["error"]["code"] == "superseded"


async def test_a_ticket_expires(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha", limits="ticket_s = 1"), await fleet.start("beta")
        instance = await create(alpha)
        ticket = await alpha.client.post(f"/v1/instances/{instance}:migrate-out", {"destination_host": "beta"})

        record = await wait_outcome(alpha, ticket["migration_id"])

        assert record["error"]["code"] == "ticket_expired"
        assert await _offer(fleet, "beta", ticket["migration_id"], instance, ticket["ticket"]) == "ticket_used"
        alpha = await _restarted(fleet, "alpha")
        assert (await migrate(alpha, beta, instance))["outcome"] == "moved"


async def test_only_the_source_host_of_a_migration_may_settle_it(tmp_path: Path) -> None:
    """A third host is refused; an operator, too: settling makes a host decide."""
    async with open_fleet(tmp_path, "alpha", "beta", "gamma") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        gamma = await fleet.start("gamma")
        instance = await create(alpha)
        record = await migrate(alpha, beta, instance)
        path = f"/v1/migrations/{record['migration_id']}/side"

        for asking, code in ((gamma.config.tls_files(), "forbidden"), (fleet.operator, "forbidden")):
            async with open_client(beta.url, asking) as client:
                with pytest.raises(VmMigrateError) as refusal:
                    await client.post(f"{path}:settle")
            assert refusal.value.code == code
        async with open_client(beta.url, alpha.config.tls_files()) as client:
            assert (await client.post(f"{path}:settle"))["answer"] == "started"


# --------------------------------------------------------------------------- restarts


async def test_a_restarted_source_adopts_its_guest_and_can_migrate_it(tmp_path: Path) -> None:
    """The daemon goes while rounds are under way; the guest never stops; the next daemon takes it over."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=stress(16, 40_000))
        await wait_filled(alpha, instance, 16 * 256)
        migration = await begin(alpha, beta, instance, downtime_ms=1, max_rounds=1000)
        await _wait_rounds(fleet, migration, 1)
        pid = (await alpha.instance(instance))["guest"]["pid"]

        alpha = await _restarted(fleet, "alpha")

        shown = await alpha.instance(instance)
        assert (shown["state"], shown["guest"]["pid"]) == ("running", pid)
        assert (await wait_outcome(beta, migration))["error"]["code"] == "daemon_stopping"
        record = await migrate(alpha, beta, instance, verify="full")
        assert record["outcome"] == "moved", record
        assert (await check(beta, instance))["consistent"]
        assert witnesses(fleet, instance).single


async def test_a_restarted_destination_keeps_nothing_of_what_was_half_built(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha, program=stress(16, 40_000))
        await wait_filled(alpha, instance, 16 * 256)
        migration = await begin(alpha, beta, instance, downtime_ms=1, max_rounds=1000)
        await _wait_rounds(fleet, migration, 1)

        beta = await _restarted(fleet, "beta")

        assert (await wait_outcome(alpha, migration))["error"]["code"] == "daemon_stopping"
        assert await beta.client.get("/v1/instances") == []
        assert list((tmp_path / "run-beta").glob("*.sock")) == []
        assert (await migrate(alpha, beta, instance))["outcome"] == "moved"


async def _restarted(fleet: Fleet, name: str) -> RunningHost:
    await fleet.hosts[name].stop()
    return await fleet.start(name)


async def _wait_rounds(fleet: Fleet, migration: str, rounds: int) -> None:
    with trio.fail_after(30):
        while len((await fleet.hosts["alpha"].record(migration))["ram"]["rounds"]) < rounds:
            await trio.sleep(0.01)


async def _offer(fleet: Fleet, host: str, migration: str, instance: str, ticket: str) -> str:
    """Come to alpha as *host* with an offer that has no transport in common; the code of its refusal."""
    pki = fleet.root / "pki"
    files = TlsFiles(pki / "ca.pem", pki / f"{host}.pem", pki / f"{host}-key.pem")
    alpha = fleet.hosts["alpha"]
    expected = Identity("test.example", Role.HOST, "alpha")
    stream, _ = await connect_tls("127.0.0.1", alpha.facts["migration"], files, expected, 5)
    try:
        async with open_channel(stream, phases.Role.DESTINATION) as channel:
            await channel.send(
                m.Offer(
                    protocols=(1,),
                    migration_id=migration,
                    instance_id=instance,
                    ticket=ticket,
                    spec_versions=("v1", "v2", "v3"),
                    payloads={},
                    ram={"transports": ("pigeon",), "encodings": ("raw",), "digests": ("multilinear-64",)},
                    max_streams=1,
                    facts={},
                    api_url="https://127.0.0.1:1",
                    random=bytes(32),
                )
            )
            return (await channel.expect(m.Refuse, deadline_s=5)).code
    finally:
        await close_tls(stream)
