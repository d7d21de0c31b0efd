"""A guest in a QEMU that something else started becomes an instance, as it is, and moves."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.hypervisor.qemu_hosts import QemuHosts, requires_qemu, short_directory
from tests.hypervisor.test_qemu_guest import first_line, started
from tests.migration.adopter_under_test import STEPS
from tests.migration.fleet import RunningHost, check, migrate, open_fleet, wait_heartbeats, witnesses
from tests.migration.foreign_qemu import MEMORY, RAM_BYTES, ForeignQemu, open_foreign
from tests.migration.qemu_fleet import VNIC, start
from vmmigrate.errors import HypervisorError, VmMigrateError
from vmmigrate.hypervisor.base import GuestStamp, RunState
from vmmigrate.hypervisor.qemu.files import QemuFiles
from vmmigrate.hypervisor.qemu.images import not_held
from vmmigrate.memory import GIB, MIB, PAGE_SIZE

pytestmark = [*requires_qemu, pytest.mark.slow]

root = pytest.fixture(short_directory)


@pytest.mark.parametrize("memory", list(MEMORY))
async def test_a_guest_that_was_adopted_runs_on_and_moves_whole(root: Path, memory: str) -> None:
    """Its RAM may be its own (an ordinary `-m`), or a file that is shared."""
    async with open_fleet(root, "alpha", "beta") as fleet, open_foreign(root, memory) as foreign:
        alpha, beta = await start(fleet, "alpha"), await start(fleet, "beta")

        told = await foreign.adopt(alpha)

        instance = told["id"]
        assert (instance, told["state"]) == (foreign.uuid, "running")
        await wait_heartbeats(alpha, instance)
        assert (await check(alpha, instance))["consistent"]

        record = await migrate(alpha, beta, instance, replacements=VNIC, verify="full")

        assert record["outcome"] == "moved", record["error"]
        assert record["negotiated"]["page_source"] == "stream"
        assert record["digest"]["source"] == record["digest"]["destination"] != ""
        await wait_heartbeats(beta, instance, 300)
        verdict = await check(beta, instance)
        assert verdict["consistent"], verdict
        owners = witnesses(fleet, instance)
        assert owners.single, owners.problems
        assert owners.hosts == ("alpha", "beta")
        assert foreign.has_ended()


async def test_ram_that_was_qemus_own_is_not_hashed_once_more_and_the_record_says_why(root: Path) -> None:
    async with open_fleet(root, "alpha", "beta") as fleet, open_foreign(root) as foreign:
        alpha, beta = await start(fleet, "alpha"), await start(fleet, "beta")
        instance = (await foreign.adopt(alpha))["id"]
        ram = alpha.guest(instance).ram

        record = await migrate(alpha, beta, instance, replacements=VNIC, downtime_ms=2000)

        assert record["outcome"] == "moved", record["error"]
        assert ram.is_copied
        assert record["integrity"] == {
            "rehash": "not_done",
            "reason": "guest RAM was its process's own, and ended with it",
        }


async def test_a_restarted_daemon_finds_a_guest_that_it_adopted_and_moves_it(root: Path) -> None:
    async with open_fleet(root, "alpha", "beta") as fleet, open_foreign(root) as foreign:
        alpha, beta = await start(fleet, "alpha"), await start(fleet, "beta")
        instance = (await foreign.adopt(alpha))["id"]
        await alpha.stop()

        alpha = await start(fleet, "alpha")

        assert (await alpha.instance(instance))["state"] == "running"
        await wait_heartbeats(alpha, instance)
        record = await migrate(alpha, beta, instance, replacements=VNIC, downtime_ms=2000)
        assert record["outcome"] == "moved", record["error"]
        await wait_heartbeats(beta, instance, 100)
        assert (await check(beta, instance)).get("reason") == ""


async def test_a_paused_guest_is_adopted_paused_and_arrives_paused(root: Path) -> None:
    async with open_fleet(root, "alpha", "beta") as fleet, open_foreign(root) as foreign:
        alpha, beta = await start(fleet, "alpha"), await start(fleet, "beta")
        await foreign.ask("stop")

        instance = (await foreign.adopt(alpha))["id"]

        assert (await alpha.instance(instance))["state"] == "paused"
        record = await migrate(alpha, beta, instance, replacements=VNIC, downtime_ms=2000)
        assert record["outcome"] == "moved", record["error"]
        assert (await beta.guest(instance).status()).run_state is RunState.PAUSED
        await beta.client.post(f"/v1/instances/{instance}:start")
        await wait_heartbeats(beta, instance, 100)
        assert (await check(beta, instance)).get("reason") == ""


async def test_what_its_owner_chose_for_qemus_own_migrations_does_not_count_any_more(root: Path) -> None:
    async with open_fleet(root, "alpha", "beta") as fleet, open_foreign(root) as foreign:
        alpha, beta = await start(fleet, "alpha"), await start(fleet, "beta")
        on = [{"capability": name, "state": True} for name in ("multifd", "auto-converge", "xbzrle")]
        await foreign.ask("migrate-set-capabilities", capabilities=on)

        instance = (await foreign.adopt(alpha))["id"]

        record = await migrate(alpha, beta, instance, replacements=VNIC, downtime_ms=2000)
        assert record["outcome"] == "moved", record["error"]
        await wait_heartbeats(beta, instance, 100)
        assert (await check(beta, instance)).get("reason") == ""


@pytest.mark.parametrize("below", ["", ",max-ram-below-4g=3G"], ids=["QEMU's own", "the spec's"])
async def test_memory_beyond_3_gib_has_to_lie_where_the_spec_has_it(root: Path, below: str) -> None:
    """QEMU itself puts 3.5 GiB of it below 4 GiB. (Hardly any of it is ever touched.)"""
    size_bytes = 4 * GIB - 2 * PAGE_SIZE
    replaced = {"-m": [f"{size_bytes // 1024}K"], "-machine": [f"pc-i440fx-7.2{below}"]}
    async with open_fleet(root, "alpha") as fleet, open_foreign(root, replaced=replaced) as foreign:
        alpha = await start(fleet, "alpha")
        if below:
            instance = (await foreign.adopt(alpha, overrides={"ram_bytes": size_bytes}))["id"]
            assert (await check(alpha, instance))["reason"] == ""
            return

        with pytest.raises(VmMigrateError, match=f"memory below 4 GiB: 3758096384 bytes, .* {3 * GIB} bytes"):
            await foreign.adopt(alpha, overrides={"ram_bytes": size_bytes})
        await is_not_ours(alpha, foreign)


async def test_a_guest_whose_qemu_has_no_uuid_is_given_a_name_of_its_own(root: Path) -> None:
    async with open_fleet(root, "alpha") as fleet, open_foreign(root, replaced={"-uuid": []}) as foreign:
        alpha = await start(fleet, "alpha")
        assert (await foreign.adopt(alpha))["id"].startswith("adopted-")


def blockdev(root: Path, name: str = "disk.img", **fields: Any) -> str:
    image = {"driver": "file", "filename": str(root / name), "locking": "on"}
    return json.dumps({"driver": "raw", "node-name": "root", "file": image, **fields})


NIC = "virtio-net-pci,netdev=lan,addr=8,romfile=,mac=02:00:00:00:00:01"
DISK = "virtio-blk-pci,drive=root,addr=4"
# What somebody started it with instead, by option, and a piece of how that is refused.
DIFFERENT: Mapping[str, tuple[Mapping[str, list[str]], str]] = {
    "chipset": (
        {"-machine": ["pc-q35-7.2"]},
        "machine_type pc-q35-7.2 is not among those of this QEMU",
    ),
    "processors": (
        {"-smp": ["1,sockets=1"]},
        "processors: 1 cpus, 1 maxcpus, 1 sockets, 1 dies, 1 cores, 1 threads, in the machine of the spec 2 cpus,",
    ),
    "topology": ({"-smp": ["2,sockets=1,cores=2"]}, "1 sockets, 1 dies, 2 cores"),
    "features": ({"-cpu": ["qemu64,+avx"]}, "features of the processor: "),
    "memory": ({"-m": ["48M"]}, f"memory: 50331648 bytes, in the machine of the spec {RAM_BYTES} bytes"),
    "firmware tables": (
        {"-machine": ["pc-i440fx-7.2,hpet=off"]},
        "machine, hpet: false, in the machine of",
    ),
    "kernel": ({"-append": ["mem=8"]}, 'machine, append: "mem=8", in the machine of the spec "mem=56'),
    "smbios": (
        {"-smbios": ["type=1,product=x"]},
        "it was started with -smbios type=1,product=x, the spec",
    ),
    "ports": ({"-serial": []}, "isa-serial at port 0x3f8: missing"),
    "another device": (
        {"-device": [DISK, NIC, "virtio-rng-pci"]},
        "virtio-rng-pci at 0.2.0: there is none in",
    ),
    "mac": ({"-device": [DISK, NIC]}, 'virtio-net-pci at 0.8.0, mac: "02:00:00:00:00:01", in the machine of the spec'),
    "place": ({"-device": ["virtio-blk-pci,drive=root,addr=5", NIC]}, "virtio-blk-pci at 0.4.0: missing"),
    "queues": ({"-device": [f"{DISK},num-queues=4", NIC]}, "virtio-blk-pci at 0.4.0, num-queues: 4, in the machine of"),
    "network": ({"-netdev": ["hubport,id=lan,hubid=0"]}, "nic0: behind it is "),
    "monitor of the port": ({"-serial": ["mon:null"]}, "com1: com1 shares its character device with a monitor"),
}


@pytest.mark.parametrize("difference", list(DIFFERENT))
async def test_a_machine_that_is_not_that_of_the_spec_is_refused_by_name_and_runs_on(
    root: Path, difference: str
) -> None:
    replaced, told = DIFFERENT[difference]
    async with open_fleet(root, "alpha") as fleet, open_foreign(root, replaced=replaced, beats=False) as foreign:
        alpha = await start(fleet, "alpha")

        with pytest.raises(VmMigrateError) as refused:
            await foreign.adopt(alpha)

        assert refused.value.code == "not_that_machine", refused.value.text
        assert told in refused.value.text
        await is_not_ours(alpha, foreign)


@pytest.mark.parametrize(
    ("image", "told"),
    [
        ({"name": "other.img"}, "disk0: its image is "),
        ({"read-only": True}, "disk0: it is read-only"),
        ({"offset": 4096}, "disk0: its image is json:"),
    ],
    ids=["another file", "read-only", "a part of the file"],
)
async def test_a_disk_that_is_not_that_of_the_spec_is_refused(root: Path, image: dict[str, Any], told: str) -> None:
    (root / "other.img").write_bytes(bytes(16 * MIB))
    replaced = {"-blockdev": [blockdev(root, **image)]}
    async with open_fleet(root, "alpha") as fleet, open_foreign(root, replaced=replaced, beats=False) as foreign:
        alpha = await start(fleet, "alpha")

        with pytest.raises(VmMigrateError) as refused:
            await foreign.adopt(alpha)

        assert refused.value.code == "not_that_machine"
        assert told in refused.value.text
        await is_not_ours(alpha, foreign)


async def test_a_file_that_qemu_did_not_lock_is_refused(root: Path) -> None:
    """Without the lock nobody would notice when two QEMUs write to it."""
    image = {"driver": "file", "filename": str(root / "disk.img"), "locking": "off"}
    replaced = {"-blockdev": [json.dumps({"driver": "raw", "node-name": "root", "file": image})]}
    async with open_fleet(root, "alpha") as fleet, open_foreign(root, replaced=replaced) as foreign:
        alpha = await start(fleet, "alpha")

        with pytest.raises(VmMigrateError, match="disk0: QEMU holds no lock of ") as refused:
            await foreign.adopt(alpha)

        assert refused.value.code == "not_that_machine"
        await is_not_ours(alpha, foreign)


async def test_memory_under_another_name_is_refused(root: Path) -> None:
    """Whoever loads the guest's state finds blocks of memory by their names."""
    memory = ("-object", f"memory-backend-memfd,id=ram0,size={RAM_BYTES},share=on")
    replaced = {"-machine": ["pc-i440fx-7.2,memory-backend=ram0"]}
    async with open_fleet(root, "alpha") as fleet, open_foreign(root, replaced=replaced, more=memory) as foreign:
        alpha = await start(fleet, "alpha")

        with pytest.raises(VmMigrateError, match="guest RAM is the memory backend 'ram0', allowed is"):
            await foreign.adopt(alpha)

        await is_not_ours(alpha, foreign)


async def test_another_guest_than_the_one_that_was_named_is_refused(root: Path) -> None:
    other = "6f5e0c1a-9b7d-4e2f-8a3c-00000000000a"
    async with open_fleet(root, "alpha") as fleet, open_foreign(root) as foreign:
        alpha = await start(fleet, "alpha")

        with pytest.raises(VmMigrateError, match=f"its UUID is {foreign.uuid}, that of instance {other} is {other}"):
            await foreign.adopt(alpha, id=other)

        with pytest.raises(VmMigrateError, match="has no guest RAM of"):
            await foreign.adopt(alpha, pid=os.getpid())
        await is_not_ours(alpha, foreign)


async def test_a_drive_that_is_no_disk_of_the_spec_is_refused(root: Path) -> None:
    (root / "cd.iso").write_bytes(bytes(MIB))
    more = ("-drive", f"if=ide,media=cdrom,format=raw,file={root}/cd.iso")
    async with open_fleet(root, "alpha") as fleet, open_foreign(root, more=more) as foreign:
        alpha = await start(fleet, "alpha")

        with pytest.raises(VmMigrateError, match=r"image .*/cd\.iso: behind no PCI device") as refused:
            await foreign.adopt(alpha)

        assert refused.value.code == "not_that_machine"
        await is_not_ours(alpha, foreign)


async def test_an_image_that_no_device_uses_is_refused(root: Path) -> None:
    """QEMU ends when it makes images inactive and one of them is so already."""
    (root / "spare.img").write_bytes(bytes(MIB))
    more = ("-blockdev", json.dumps({"driver": "file", "node-name": "spare", "filename": str(root / "spare.img")}))
    async with open_fleet(root, "alpha") as fleet, open_foreign(root, more=more) as foreign:
        alpha = await start(fleet, "alpha")

        with pytest.raises(VmMigrateError, match=r"block node spare \(.*/spare\.img\) is no disk's"):
            await foreign.adopt(alpha)

        await is_not_ours(alpha, foreign)


async def is_not_ours(host: RunningHost, foreign: ForeignQemu) -> None:
    """Nothing is left of the attempt: no instance, no process, no file; and the guest runs."""
    assert await host.client.get("/v1/instances") == []
    assert list(host.config.directories.runtime.glob("*/qmp")) == []
    await foreign.is_untouched()


async def test_a_guest_is_adopted_once(root: Path) -> None:
    async with open_fleet(root, "alpha", "beta") as fleet, open_foreign(root) as foreign:
        alpha, beta = (
            await start(fleet, "alpha", limits="guest_request_s = 1"),
            await start(fleet, "beta", limits="guest_request_s = 1"),
        )
        instance = (await foreign.adopt(alpha))["id"]

        with pytest.raises(VmMigrateError, match="no answer; somebody else may be connected to it") as refused:
            await foreign.adopt(beta, id=instance)

        assert refused.value.code == "monitor_busy"
        await wait_heartbeats(alpha, instance)


async def test_a_guest_with_two_monitors_is_adopted_once_all_the_same(root: Path) -> None:
    """The second daemon is refused, and undoes nothing of what the first has done."""
    more = ("-qmp", f"unix:{root}/second.qmp,server=on,wait=off")
    async with open_fleet(root, "alpha", "beta") as fleet, open_foreign(root, more=more) as foreign:
        alpha, beta = await start(fleet, "alpha"), await start(fleet, "beta")
        instance = (await foreign.adopt(alpha))["id"]
        foreign.monitor = root / "second.qmp"
        before = await foreign.settings()

        with pytest.raises(VmMigrateError, match="a host daemon has this QEMU already") as refused:
            await foreign.adopt(beta, id=instance)

        assert refused.value.code == "not_that_machine"
        assert await beta.client.get("/v1/instances") == []
        assert await foreign.settings() == before
        assert "vmmigrate" in before["objects"]
        await wait_heartbeats(alpha, instance)
        assert (await check(alpha, instance))["consistent"]
        record = await migrate(alpha, beta, instance, replacements=VNIC, downtime_ms=2000)
        assert record["outcome"] == "moved", record["error"]


async def test_a_guest_that_is_being_adopted_cannot_be_started_beside(root: Path) -> None:
    """Who waited to start it finds that it was not adopted: its guest runs elsewhere, and there would be two."""
    async with open_fleet(root, "alpha") as fleet, open_foreign(root) as foreign:
        alpha = await start(fleet, "alpha")
        looked_at, said = trio.Event(), []

        async def refuses(*arguments: Any) -> Any:
            looked_at.set()
            await trio.testing.wait_all_tasks_blocked(0.2)
            raise HypervisorError("it is not that machine", code="guest_lost")

        alpha.hypervisor.adopt_foreign = refuses  # type: ignore[method-assign]

        async def start_it() -> None:
            await looked_at.wait()
            with pytest.raises(VmMigrateError) as refused:
                await alpha.client.post(f"/v1/instances/{foreign.uuid}:start")
            said.append(refused.value.code)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(start_it)
            with pytest.raises(VmMigrateError, match="it is not that machine"):
                await foreign.adopt(alpha)

        assert said[0] in {"adoption_unfinished", "unknown_instance", "removed"}, said
        await is_not_ours(alpha, foreign)


async def test_an_adoption_that_a_daemon_did_not_finish_leaves_no_instance_that_could_be_started(root: Path) -> None:
    async with open_fleet(root, "alpha") as fleet, open_foreign(root) as foreign:
        alpha = await start(fleet, "alpha")
        body = json.loads(foreign.body(id=foreign.uuid))
        del body["monitor"]
        await alpha.client.post("/v1/instances", text=json.dumps(body))
        await alpha.stop()
        (kept,) = alpha.config.directories.state.glob(f"instances/{foreign.uuid}.json")
        kept.write_text(json.dumps({**json.loads(kept.read_text()), "is_adopting": True}))

        alpha = await start(fleet, "alpha")

        await is_not_ours(alpha, foreign)
        assert (await foreign.adopt(alpha))["state"] == "running"


async def test_what_was_given_back_and_did_not_hear_it_is_not_ended_by_the_next_daemon(root: Path) -> None:
    async with open_foreign(root) as foreign:
        hypervisor = await QemuHosts(root).open(settings={"monitors": [root]})
        before = await foreign.settings()
        stamp = GuestStamp(foreign.uuid, "a", (1, 1), None)
        guest = await hypervisor.adopt_foreign(foreign.plan(), stamp, foreign.monitor, None)
        await guest.note_record("journal", 1)
        process = guest.process
        QemuFiles(process.socket_path.parent).given_back.touch()
        guest.detach()

        assert not await hypervisor.end_leftover(process)
        assert await hypervisor.adopt(stamp, foreign.plan(), process) is None

        assert (await foreign.ask("query-status"))["status"] == "running"
        assert await foreign.settings() == before
        assert not process.socket_path.parent.exists()


@pytest.mark.parametrize("memory", list(MEMORY))
async def test_a_guest_that_was_adopted_can_be_silenced_by_a_daemon_that_has_not_adopted_it(
    root: Path, memory: str
) -> None:
    """It is paused, and its disk can be opened by somebody else; also when its RAM would be a part of what is saved."""
    async with open_foreign(root, memory) as foreign:
        hypervisor = await QemuHosts(root).open(settings={"monitors": [root]})
        stamp = GuestStamp(foreign.uuid, "a", (1, 1), None)
        guest = await hypervisor.adopt_foreign(foreign.plan(), stamp, foreign.monitor, None)
        await guest.note_record("journal", 1)
        guest.detach()

        assert await hypervisor.silence(guest.process, (2, 1), 2)

        assert (await foreign.ask("query-status"))["status"] == "postmigrate"
        assert not_held({0: root / "disk.img"}, foreign.process.pid) == [0]
        assert await hypervisor.end_leftover(guest.process)


@pytest.mark.parametrize(("memory", "is_copied"), [("private", True), ("memfd", False), ("file", True)])
async def test_ram_that_somebody_could_cut_short_is_not_mapped(root: Path, memory: str, is_copied: bool) -> None:
    """The kernel ends whoever reads a file beyond its end: a memfd of QEMU's is sealed, a file is not."""
    async with open_foreign(root, memory) as foreign:
        hypervisor = await QemuHosts(root).open(settings={"monitors": [root]})
        stamp = GuestStamp(foreign.uuid, "a", (1, 1), None)
        guest = await hypervisor.adopt_foreign(foreign.plan(), stamp, foreign.monitor, None)

        assert guest.ram.is_copied is is_copied

        await hypervisor.give_back(guest)


async def test_a_monitor_that_lies_about_its_uuid_is_refused(root: Path) -> None:
    """It names an instance, and that a file."""
    async with open_fleet(root, "alpha") as fleet, trio.open_nursery() as nursery:
        alpha = await start(fleet, "alpha")
        foreign = ForeignQemu(root)
        listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        await listener.bind(str(foreign.monitor))
        listener.listen(1)

        async def answer() -> None:
            connection, _ = await listener.accept()
            with connection:
                await talk(connection)

        async def talk(connection: trio.socket.SocketType) -> None:
            await connection.send(b'{"QMP": {}}\n')
            while line := await connection.recv(65536):
                told = {"return": {"UUID": "../instances/other"} if b"query-uuid" in line else {}}
                identity = json.loads(line).get("id")
                await connection.send(json.dumps({**told, **({} if identity is None else {"id": identity})}).encode())
                await connection.send(b"\n")

        nursery.start_soon(answer)
        with pytest.raises(VmMigrateError, match="no UUID") as refused:
            await foreign.adopt(alpha)

        assert refused.value.code == "qemu_protocol"
        assert await alpha.client.get("/v1/instances") == []
        nursery.cancel_scope.cancel()
        listener.close()


async def test_a_monitor_that_is_none_is_told(root: Path) -> None:
    (root / "file").touch()
    async with open_fleet(root, "alpha") as fleet:
        alpha, foreign = await start(fleet, "alpha"), ForeignQemu(root)
        for path, code in (("/nowhere/qmp", "host_refuses"), (root / "none", "monitor"), (root / "file", "monitor")):
            for more in ({}, {"pid": os.getpid()}):
                with pytest.raises(VmMigrateError) as refused:
                    await foreign.adopt(alpha, monitor=str(path), id=foreign.uuid, **more)
                assert (refused.value.code, str(path) in refused.value.text) == (code, True)
        assert await alpha.client.get("/v1/instances") == []


async def test_only_qemu_guests_can_be_adopted(root: Path) -> None:
    async with open_fleet(root, "alpha") as fleet:
        alpha, foreign = (
            await fleet.start("alpha", allow=f'paths = ["{root}"]'),
            ForeignQemu(root),
        )

        with pytest.raises(VmMigrateError, match='only a host with hypervisor = "qemu"') as refused:
            await foreign.adopt(alpha, program={"name": "idle"})

        assert refused.value.code == "not_supported"
        assert await alpha.client.get("/v1/instances") == []


async def test_a_journal_that_does_not_take_it_leaves_the_guest_to_whoever_started_it(root: Path) -> None:
    async with open_fleet(root, "alpha") as fleet, open_foreign(root) as foreign:
        alpha = await start(fleet, "alpha")
        guests = []
        on = [{"capability": name, "state": True} for name in ("multifd", "auto-converge")]
        await foreign.ask("migrate-set-capabilities", capabilities=on)
        before = await foreign.settings()

        async def refuses(journal_id: str, number: int) -> None:
            raise HypervisorError("it does not hear", code="guest_unresponsive")

        adopting = alpha.hypervisor.adopt_foreign

        async def adopt_foreign(*arguments: Any) -> Any:
            guest = await adopting(*arguments)
            guest.note_record = refuses  # type: ignore[method-assign]
            guests.append(guest)
            return guest

        alpha.hypervisor.adopt_foreign = adopt_foreign  # type: ignore[method-assign]

        with pytest.raises(VmMigrateError, match="it does not hear"):
            await foreign.adopt(alpha)

        assert len(guests) == 1
        assert await alpha.client.get("/v1/instances") == []
        assert list(alpha.config.directories.runtime.glob("*/qmp")) == []
        assert (await foreign.ask("query-status"))["status"] == "running"
        assert await foreign.settings() == before


async def test_a_disk_that_does_not_take_that_it_is_adopted_leaves_the_guest_to_whoever_started_it(root: Path) -> None:
    """The journal knew of it by then; it is not ended for that."""
    is_failing = False

    def fsync(fd: int) -> None:
        if is_failing and "/instances" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        os.fsync(fd)

    async with open_fleet(root, "alpha") as fleet, open_foreign(root) as foreign:
        alpha = await start(fleet, "alpha", fsync=fsync)
        before = await foreign.settings()
        adopting = alpha.hypervisor.adopt_foreign

        async def adopt_foreign(*arguments: Any) -> Any:
            nonlocal is_failing
            guest = await adopting(*arguments)
            is_failing = True
            return guest

        alpha.hypervisor.adopt_foreign = adopt_foreign  # type: ignore[method-assign]

        with pytest.raises(VmMigrateError, match="Input/output error"):
            await foreign.adopt(alpha)

        assert await alpha.client.get("/v1/instances") == []
        assert (await foreign.ask("query-status"))["status"] == "running"
        assert await foreign.settings() == before


async def test_a_daemon_that_died_when_the_journal_knew_of_it_has_adopted_it(root: Path) -> None:
    async with open_fleet(root, "alpha") as fleet, open_foreign(root) as foreign:
        alpha = await start(fleet, "alpha")
        instance = (await foreign.adopt(alpha))["id"]
        await alpha.stop()
        (kept,) = alpha.config.directories.state.glob(f"instances/{instance}.json")
        adopted = kept.read_text()
        kept.write_text(json.dumps({**json.loads(adopted), "is_adopting": True}))

        alpha = await start(fleet, "alpha")

        assert (await alpha.instance(instance))["state"] == "running"
        assert json.loads(kept.read_text()) == json.loads(adopted)
        await wait_heartbeats(alpha, instance)


@pytest.mark.parametrize("step", STEPS)
async def test_a_daemon_that_dies_while_it_adopts_leaves_a_guest_that_can_be_adopted(root: Path, step: str) -> None:
    """Its journal knows of nothing, so the next daemon gives it back."""
    async with open_foreign(root) as foreign:
        before = await foreign.settings()
        arguments = [str(root), foreign.uuid, foreign.program["kernel"], str(foreign.process.pid), step]
        daemon = started([sys.executable, "-m", "tests.migration.adopter_under_test", *arguments])
        try:
            assert await first_line(daemon) == b"there\n"
        finally:
            daemon.kill()
            await trio.to_thread.run_sync(daemon.communicate)

        hypervisor = await QemuHosts(root).open(settings={"monitors": [root]})

        assert await hypervisor.find_others(set()) == []
        assert list(hypervisor.runtime_dir.glob("*/qmp")) == []
        assert (await foreign.ask("query-status"))["status"] == "running"
        assert await foreign.settings() == before


async def test_the_command_adopts_and_tells_what_differs(root: Path) -> None:
    async with open_fleet(root, "alpha") as fleet, open_foreign(root) as foreign:
        alpha = await start(fleet, "alpha")
        (root / "spec.json").write_text(json.dumps(foreign.spec))

        async def adopt(*more: str) -> subprocess.CompletedProcess[bytes]:
            command = ["vm", "adopt", "--qmp", str(foreign.monitor), "--spec", str(root / "spec.json"), *more]
            tls = ["--ca", fleet.operator.ca, "--cert", fleet.operator.certificate, "--key", fleet.operator.key]
            words = [*command, "--program", json.dumps(foreign.program), "--url", alpha.url, *map(str, tls)]
            return await trio.run_process(
                [sys.executable, "-m", "vmmigrate", *words], capture_stdout=True, capture_stderr=True, check=False
            )

        refused = await adopt()
        assert refused.returncode == 3, refused.stderr
        assert b"memory: 67100672 bytes, in the machine of the spec 67108864 bytes" in refused.stderr

        adopted = await adopt("--ram-bytes", str(RAM_BYTES), "-o", "json")
        assert adopted.returncode == 0, adopted.stderr
        assert json.loads(adopted.stdout)["id"] == foreign.uuid
        await wait_heartbeats(alpha, foreign.uuid)
