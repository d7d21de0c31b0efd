"""What the QEMU adapter promises beyond the conformance kit: daemons that die at any step, locks, refusals, power."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.disks.small import small_disk
from tests.hypervisor.faults import out_of_descriptors
from tests.hypervisor.qemu_daemon_under_test import STEPS, STREAM_STEPS
from tests.hypervisor.qemu_hosts import (
    ACCELERATOR,
    INSTANCE,
    QEMU,
    QemuHosts,
    odd,
    plan_of,
    plan_with_devices,
    requires_qemu,
    short_directory,
    stress_program,
)
from vmmigrate.devices import registry
from vmmigrate.devices.kinds import InMemoryBlockBackendV1
from vmmigrate.devices.payload import DevicePayload
from vmmigrate.hypervisor import kernel, processes
from vmmigrate.hypervisor.base import DiskPlan, GuestPlan, GuestProcess, GuestStamp, RunState
from vmmigrate.hypervisor.conformance import assert_still, copy_ram, expect_error, move, wait_heartbeats
from vmmigrate.hypervisor.qemu import pagestream, probing
from vmmigrate.hypervisor.qemu.files import QemuFiles
from vmmigrate.hypervisor.qemu.guest import QemuGuest
from vmmigrate.hypervisor.qemu.machine import problems
from vmmigrate.hypervisor.qemu.pagestream import loses_writes
from vmmigrate.hypervisor.qemu.payloads import BLOB_KIND
from vmmigrate.hypervisor.qemu.settings import QemuFacts, QemuSettings
from vmmigrate.hypervisor.qemu.stream import parse_stream
from vmmigrate.hypervisor.qemu.tracker import QemuTracker
from vmmigrate.memory import MIB, PAGE_SIZE

pytestmark = [*requires_qemu, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
RESUMES_BY_ITSELF = {"running", "tracking", "receiving", "noting", "naming", "stopped"}
NO_TRACKER = {"use_tracker": False}


@pytest.fixture
def root() -> Iterator[Path]:
    yield from short_directory()


@pytest.fixture
async def hosts(root: Path) -> AsyncIterator[QemuHosts]:
    hosts = QemuHosts(root)
    yield hosts
    await hosts.close()


def started(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY)


async def first_line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    with trio.fail_after(30):
        return await trio.to_thread.run_sync(process.stdout.readline, abandon_on_cancel=True)


async def running(hosts: QemuHosts, plan: GuestPlan | None = None) -> QemuGuest:
    guest = await hosts.build(plan or plan_of())
    await guest.run((1, 1))
    await wait_heartbeats(guest, 50)
    return guest


# --------------------------------------------------------------------------- a daemon that dies


@pytest.mark.parametrize(
    ("source", "step"), [*(("tracker", step) for step in STEPS), *(("stream", step) for step in STREAM_STEPS)]
)
async def test_a_guest_outlives_a_daemon_that_dies_at_any_step_of_the_pause(
    hosts: QemuHosts, source: str, step: str
) -> None:
    """Before QEMU stands still by itself it goes on when its daemon dies; from then on it stays paused, and what was
    saved is there: it can be moved, and it can be undone."""
    arguments = [sys.executable, "-m", "tests.hypervisor.qemu_daemon_under_test", str(hosts.root), step, source]
    daemon = started(arguments)
    try:
        line = await first_line(daemon)
        pid, start_ticks, path, beats = json.loads(line)
    finally:
        daemon.kill()
        await trio.to_thread.run_sync(daemon.communicate)

    hypervisor = await hosts.open()
    plan = odd(plan_with_devices(hosts.root)) if source == "stream" else plan_with_devices(hosts.root)
    process = GuestProcess(pid, start_ticks, Path(path))
    guest = await hypervisor.adopt(GuestStamp(INSTANCE, "a", (1, 1), None), plan, process)

    assert isinstance(guest, QemuGuest)
    hosts.guests.append(guest)
    if step in RESUMES_BY_ITSELF:
        status = await wait_heartbeats(guest, beats + 50)
        assert (status.run_state, status.backends_open, status.handoff) == (RunState.RUNNING, True, None)
        await guest.pause_for_handoff("again")
    await assert_still(guest)
    status = await guest.status()
    assert (status.run_state, status.backends_open) == (RunState.PAUSED, False)
    assert status.handoff == ("again" if step in RESUMES_BY_ITSELF else "m")
    other = await hosts.build(plan, "b", epoch=(1, 2), for_migration=True)
    await move(guest, other)
    await other.destroy()
    await guest.run((1, 3))
    await wait_heartbeats(guest, status.heartbeats + 50)
    assert (await guest.self_check()).consistent


async def test_a_paused_guest_is_saved_once_and_can_be_moved_again_and_again(hosts: QemuHosts) -> None:
    """QEMU itself refuses to save a machine twice that has not run in between."""
    guest = await running(hosts, plan_with_devices(hosts.root))
    await guest.pause()

    for migration in ("one", "two"):
        await guest.pause_for_handoff(migration)
        first = await guest.export_devices({})
        await guest.open_backends((1, 1))
        assert (await guest.status()).backends_open
        assert await guest.export_devices({}) == first

    await guest.run((1, 1))
    await wait_heartbeats(guest, (await guest.status()).heartbeats + 20)
    await guest.pause_for_handoff("three")
    assert await guest.export_devices({}) != first


# --------------------------------------------------------------------------- a state that does not fit


async def test_a_qemu_that_cannot_load_the_state_says_why_and_the_source_goes_on(hosts: QemuHosts) -> None:
    source = await running(hosts)
    await source.pause_for_handoff("m")
    payloads = list(await source.export_devices({}))
    cpu = next(n for n, payload in enumerate(payloads) if payload.instance_name == "cpu")
    body = payloads[cpu].body
    payloads[cpu] = DevicePayload("cpu", payloads[cpu].kind, 1, body[:60] + bytes(8) + body[68:-500] + body[-492:])
    destination = await hosts.build(source.plan, "b", epoch=(1, 2), for_migration=True)
    copy_ram(source, destination)

    error = await expect_error("device_load_failed", destination.import_devices(payloads))

    assert "load" in error.text
    with trio.fail_after(10):
        await destination.wait_exit()
    await source.run((1, 3))
    await wait_heartbeats(source, (await source.status()).heartbeats + 20)


async def test_what_is_told_of_a_guest_is_what_qemu_made(hosts: QemuHosts) -> None:
    """Facts differ where machines differ: processors, devices, RAM, and the files that it boots from."""
    plan = plan_with_devices(hosts.root)
    guest = await hosts.build(plan)
    same = await hosts.build(plan, "b", for_migration=True)
    moved_disk = replace(plan.disks[0], pci_path=(0, 9, 0))
    others = {
        "device_tree": replace(plan, disks=(moved_disk, plan.disks[1])),
        "cpu_features": replace(
            plan, like={"hypervisor": "qemu", "cpu_model": "Nehalem", "machine_type": "pc-i440fx-7.2"}
        ),
        "ram_blocks": replace(plan_of(ram_mib=40), disks=plan.disks, nics=plan.nics, serial_ports=plan.serial_ports),
    }

    assert same.facts == guest.facts
    for fact, other in others.items():
        built = await hosts.build(other, "b", for_migration=True)
        assert built.facts[fact] != guest.facts[fact]


# --------------------------------------------------------------------------- who may write


async def test_a_guest_whose_ram_another_process_may_write_is_not_moved(hosts: QemuHosts) -> None:
    """Writes through another mapping leave no marks: what cannot be tracked is refused by the writer's number."""
    guest = await running(hosts)
    script = (
        "import mmap, os, sys; f = os.open(sys.argv[1], os.O_RDWR); m = mmap.mmap(f, 4096); print(flush=True); input()"
    )
    writer = started([sys.executable, "-c", script, f"/proc/{guest.process.pid}/fd/10"])
    try:
        await first_line(writer)
        error = await expect_error("not_migratable", guest.list_payloads())
        assert str(writer.pid) in error.text
    finally:
        writer.kill()
        await trio.to_thread.run_sync(writer.communicate)
    assert await guest.list_payloads()


async def test_a_disk_that_is_open_elsewhere_is_not_opened_and_nothing_else_is(hosts: QemuHosts) -> None:
    plan = plan_with_devices(hosts.root)
    second = hosts.root / "second"
    second.write_bytes(bytes(1 << 20))
    disks = (
        *plan.disks,
        DiskPlan("disk-2", "virtio", "disk-2-backend", "file", False, {"path": str(second)}, (0, 6, 0)),
    )
    guest = await hosts.build(replace(plan, disks=disks))
    holder = started(["qemu-io", "-f", "raw", str(second)])
    try:
        assert holder.stdin is not None
        holder.stdin.write(b"write 0 512\n")
        holder.stdin.flush()
        await first_line(holder)
        error = await expect_error("backend_busy", guest.run((1, 1)))
        assert "disk-2-backend" in error.text
        assert not (await guest.status()).backends_open
    finally:
        holder.kill()
        await trio.to_thread.run_sync(holder.communicate)

    await guest.run((1, 1))
    await wait_heartbeats(guest, 20)


async def test_a_host_without_the_tracker_has_qemu_tell_what_guests_write_and_says_why(hosts: QemuHosts) -> None:
    hypervisor = await hosts.open("c", settings=NO_TRACKER)
    assert hypervisor.capabilities.dirty_tracking == "stream"
    assert "without it" in hypervisor.capabilities.dirty_tracking_reason

    guest = await hosts.build(odd(plan_of()), "c", settings=NO_TRACKER)

    assert guest.page_source == "stream"
    await guest.list_payloads()


async def test_a_guest_whose_qemu_did_not_come_to_name_pages_is_paused_and_goes_on_as_before(
    hosts: QemuHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait in the middle of the pause for a word that nobody says."""
    guest = await hosts.build(odd(plan_of()), settings=NO_TRACKER)
    await guest.run((1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(pagestream, "_ACCEPT_S", 0.0)
        await expect_error("dirty_tracking", guest.start_tracking())

    await guest.pause_for_handoff("m")

    await assert_still(guest)
    await guest.run((1, 1))
    await wait_heartbeats(guest, 50)


@pytest.mark.skipif(ACCELERATOR != "tcg", reason="with KVM QEMU loses nothing")
async def test_a_guest_whose_writes_its_qemu_would_lose_stays_unless_the_operator_says_so(hosts: QemuHosts) -> None:
    """QEMU before 9.0 under TCG, and RAM of whole words of its dirty bitmap."""
    careless = NO_TRACKER | {"trust_tcg_stream": True}
    guest = await hosts.build(plan_of(), "c", settings=NO_TRACKER)
    trusted = await hosts.build(plan_of(), "d", settings=careless)

    if (await hosts.open("c")).facts.version < (9, 0, 0):
        error = await expect_error("not_migratable", guest.list_payloads())
        assert "loses writes when its RAM is a multiple of 256 KiB" in error.text
        assert "trust_tcg_stream = true" in error.text
    await trusted.list_payloads()
    assert not loses_writes("9.0.0", 32 * MIB)
    assert not loses_writes("10.0.2", 32 * MIB)
    assert loses_writes("8.2.10", 32 * MIB)
    assert not loses_writes("7.2.22", 32 * MIB - PAGE_SIZE)


async def test_a_guest_is_of_the_qemu_that_runs_it_whatever_the_host_would_start_now(hosts: QemuHosts) -> None:
    """A host's QEMU is upgraded under running guests: what the old one cannot do, they cannot."""
    guest = await hosts.build(plan_of(), settings=NO_TRACKER)
    guest.detach()
    upgraded = await hosts.open(settings=NO_TRACKER)
    upgraded.facts = replace(upgraded.facts, version=(99, 0, 0))

    adopted = await upgraded.adopt(GuestStamp(INSTANCE, "a", (1, 1), None), guest.plan, guest.process)

    assert isinstance(adopted, QemuGuest)
    hosts.guests.append(adopted)
    assert adopted.facts == guest.facts
    assert adopted.no_moving == guest.no_moving


async def test_a_qemu_that_was_started_without_the_tracker_is_noticed_when_it_is_adopted(hosts: QemuHosts) -> None:
    guest = await hosts.build(plan_of(), "a", settings={"use_tracker": False})
    guest.detach()

    adopted = await (await hosts.open("a")).adopt(GuestStamp(INSTANCE, "a", (1, 1), None), guest.plan, guest.process)

    assert isinstance(adopted, QemuGuest)
    hosts.guests.append(adopted)
    assert adopted.page_source == "stream"


# --------------------------------------------------------------------------- power


async def test_a_guest_that_powers_itself_off_is_told_and_its_process_stays(hosts: QemuHosts) -> None:
    guest = await running(hosts)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest.wait_power_off)
        await guest.console_input("console", b"p")
        with trio.fail_after(10):
            while guest_runs := (await guest.status()).run_state is RunState.RUNNING:
                await trio.sleep(0.01)
    assert not guest_runs

    await expect_error("guest_powered_off", guest.pause_for_handoff("m"))
    await guest.run((1, 1))  # stays off, and that is no error
    assert (await guest.status()).run_state is RunState.PAUSED
    os.kill(guest.process.pid, 0)


async def wait_begun_anew(guest: QemuGuest, beats: int) -> None:
    """Until the machine has booted again and beats; before the reset it had beaten *beats* times."""
    with trio.fail_after(10):
        while (await guest.status()).heartbeats >= beats:
            await trio.sleep(0.005)
    await wait_heartbeats(guest, 50)


async def test_a_reboot_begins_anew_and_is_refused_once_the_guest_is_given_away(hosts: QemuHosts) -> None:
    guest = await running(hosts)
    before = await wait_heartbeats(guest, 300)

    await guest.reboot()

    await wait_begun_anew(guest, before.heartbeats)
    await guest.pause_for_handoff("m")
    await expect_error("guest_paused_for_handoff", guest.reboot())
    await expect_error("guest_paused_for_handoff", guest.console_input("console", b"v"))


async def test_a_check_that_finds_a_changed_page_names_it(hosts: QemuHosts) -> None:
    guest = await running(hosts)
    await guest.console_input("console", b"d")

    verdict = await guest.self_check()

    assert not verdict.consistent
    assert verdict.first_bad_page is not None


# --------------------------------------------------------------------------- what is left


async def test_a_build_that_fails_says_what_qemu_said_and_leaves_nothing(hosts: QemuHosts) -> None:
    gone = DiskPlan("disk-0", "virtio", "b", "file", False, {"path": str(hosts.root / "no-such-file")}, (0, 4, 0))
    hypervisor = await hosts.open()
    before = set(os.listdir("/proc/self/fd"))

    error = await expect_error(
        "guest_start",
        hypervisor.build(
            replace(plan_of(), disks=(gone,)), GuestStamp(INSTANCE, "a", (1, 1), None), for_migration=False
        ),
    )

    assert "no-such-file" in error.text
    assert list(hypervisor.runtime_dir.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == len(before)


async def test_a_cancelled_build_leaves_nothing_whenever_it_comes(hosts: QemuHosts) -> None:
    hypervisor = await hosts.open()
    before, children = len(os.listdir("/proc/self/fd")), _children()

    for milliseconds in (0, 1, 5, 15, 30, 60):
        with trio.move_on_after(milliseconds / 1000):
            guest = await hypervisor.build(plan_of(), GuestStamp(INSTANCE, "a", (1, 1), None), for_migration=False)
            await guest.destroy()
        assert list(hypervisor.runtime_dir.iterdir()) == []
        assert len(os.listdir("/proc/self/fd")) == before
        assert _children() <= children


def _children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


async def test_a_daemons_own_descriptors_are_not_inherited(hosts: QemuHosts) -> None:
    """A shell that waits for all writers of a pipe to end must not wait for a guest."""
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    try:
        guest = await hosts.build(plan_of())
        pipe = os.readlink(f"/proc/self/fd/{writing}")
        held = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{guest.process.pid}/fd")]
        assert pipe not in held
    finally:
        os.close(reading)
        os.close(writing)


async def test_a_killed_qemu_leaves_files_that_are_cleared_away_when_they_are_found(hosts: QemuHosts) -> None:
    guest = await hosts.build(plan_of())
    guest.detach()
    os.kill(guest.process.pid, signal.SIGKILL)
    await trio.to_thread.run_sync(os.waitpid, guest.process.pid, 0)
    hypervisor = await hosts.open()
    assert list(hypervisor.runtime_dir.iterdir())

    assert await hypervisor.find_others(()) == []

    assert list(hypervisor.runtime_dir.iterdir()) == []


async def test_saved_state_is_cut_into_the_devices_of_the_machine(hosts: QemuHosts) -> None:
    guest = await running(hosts, plan_with_devices(hosts.root))
    listed = {item.instance_name for item in await guest.list_payloads()}
    assert {"cpu", "0000:00:04.0/virtio-blk", "0000:00:05.0/virtio-blk", "0000:00:08.0/virtio-net"} <= listed

    await guest.pause_for_handoff("m")

    stream = parse_stream(guest._files.state.read_bytes())
    assert stream.machine_type == guest.facts["machine_type"]
    assert {device.label for device in stream.devices} < listed
    assert [block.size_bytes for block in stream.blocks if block.name == "pc.ram"] == [guest.plan.layout.size_bytes]


def test_stress_programs_name_a_kernel_that_is_there() -> None:
    assert Path(str(stress_program()["kernel"])).exists()


def pretending(root: Path, script: str) -> str:
    """A program that stands in the place of QEMU, as an older build or another program might."""
    program = root / "qemu-under-test"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return str(program)


async def test_a_qemu_without_a_sandbox_is_used_without_it(hosts: QemuHosts) -> None:
    script = 'case "$*" in *-sandbox*) echo "-sandbox: invalid option" >&2; exit 1;; esac; exec QEMU "$@"'
    settings = {"binary": pretending(hosts.root, script.replace("QEMU", QEMU))}

    guest = await hosts.build(plan_of(), settings=settings)

    await guest.run((1, 1))
    await wait_heartbeats(guest, 20)


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({"binary": "no-such-qemu"}, "qemu_missing", "apt-get install qemu-system-x86"),
        ({"accelerator": "no-such-accelerator"}, "accelerator", "no-such-accelerator"),
        ({"binary": "/bin/true"}, "accelerator", "/bin/true does not start"),
        ({"machine_type": "pc-i440fx-6.2"}, "machine_type", "no machine type pc-i440fx-6.2, allowed are pc-i440fx-7.2"),
    ],
)
async def test_a_qemu_that_cannot_be_used_is_told_in_one_line(
    hosts: QemuHosts, settings: dict[str, str], code: str, words: str
) -> None:
    error = await expect_error(code, hosts.open("d", settings=settings))

    assert words in error.text
    assert "\n" not in error.text
    assert list((hosts.root / "d").iterdir()) == []


async def test_a_runtime_directory_that_others_can_reach_into_is_refused(hosts: QemuHosts) -> None:
    (hosts.root / "e").mkdir(mode=0o755)

    await expect_error("runtime_dir", hosts.open("e"))


async def test_a_qemu_that_nobody_wrote_down_is_found_without_its_pid_file(hosts: QemuHosts) -> None:
    """A daemon can die before QEMU has written it."""
    guest = await hosts.build(plan_of())
    guest.detach()
    (guest.process.socket_path.parent / "pid").unlink()
    hypervisor = await hosts.open()

    (found,) = await hypervisor.find_others(())

    assert found.process == guest.process
    assert await hypervisor.end_leftover(found.process)
    assert list(hypervisor.runtime_dir.iterdir()) == []


async def test_a_guest_that_was_reset_while_it_stood_still_is_saved_anew(hosts: QemuHosts) -> None:
    """What was saved before the reset is not its state any more."""
    guest = await running(hosts, plan_with_devices(hosts.root))
    await guest.pause_for_handoff("m")
    before = await guest.export_devices({})
    await guest.run((1, 1))
    await wait_heartbeats(guest, 500)
    await guest.pause()
    beats = (await guest.status()).heartbeats
    await guest.reboot()

    after = await guest.export_devices({})

    assert after != before
    await guest.run((1, 1))
    await wait_begun_anew(guest, beats)
    assert (await guest.self_check()).consistent


async def test_more_keys_than_a_console_takes_are_refused_whole(hosts: QemuHosts) -> None:
    guest = await hosts.build(plan_of())

    await guest.console_input("console", b"k" * 40_000)
    await expect_error("console_input", guest.console_input("console", b"k" * 40_000))
    await expect_error("no_such_port", guest.console_input("nowhere", b"k"))


async def _text_if_there(path: Path) -> str:
    """Empty before the file is, and before anything was written to it."""
    with contextlib.suppress(FileNotFoundError):
        return await trio.Path(path).read_text()
    return ""


async def test_a_probe_of_a_daemon_that_was_killed_is_ended_by_the_next(hosts: QemuHosts) -> None:
    runtime = hosts.root / "a"
    script = f"""
import trio
from pathlib import Path
from vmmigrate.hypervisor.qemu import inspecting
from vmmigrate.hypervisor.qemu.adapter import QemuHypervisor
async def for_ever(*_, **__):
    print("asking", flush=True)
    await trio.sleep_forever()
inspecting.abilities = for_ever
trio.run(QemuHypervisor.open, Path({str(runtime)!r}))
"""
    daemon = started([sys.executable, "-c", script])
    await first_line(daemon)
    daemon.kill()
    await trio.to_thread.run_sync(daemon.communicate)
    (left,) = runtime.iterdir()
    with trio.fail_after(10):
        while not (text := await _text_if_there(left / "pid")):
            await trio.sleep(0.01)
    pid = int(text)
    begun = kernel.start_ticks_of(pid)
    assert begun is not None

    await hosts.open("a")

    assert list(runtime.iterdir()) == []
    assert processes.find(pid, begun) is None


async def test_a_guest_is_left_alone_by_a_daemon_that_has_no_descriptor_for_its_tracker(
    hosts: QemuHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = await running(hosts)
    stamp, process = GuestStamp(INSTANCE, "a", (1, 1), None), guest.process
    guest.detach()
    hypervisor = await hosts.open()
    really_track = QemuTracker.__init__

    def track(*args: Any) -> None:
        with out_of_descriptors():
            really_track(*args)

    with monkeypatch.context() as patch:
        patch.setattr(QemuTracker, "__init__", track)
        error = await expect_error("dirty_tracking", hypervisor.adopt(stamp, guest.plan, process))

    assert "Too many open files" in error.text
    adopted = await hypervisor.adopt(stamp, guest.plan, process)
    assert isinstance(adopted, QemuGuest)
    hosts.guests.append(adopted)
    await wait_heartbeats(adopted, 50)


async def test_a_qemu_that_nobody_wrote_down_is_kept_by_a_daemon_that_cannot_look_for_it(
    hosts: QemuHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are its files taken for those of a dead one."""
    guest = await running(hosts)
    hypervisor = await hosts.open()
    really_look = probing.pid_of

    def look(files: QemuFiles) -> int | None:
        with out_of_descriptors():
            return really_look(files)

    with monkeypatch.context() as patch:
        patch.setattr(probing, "pid_of", look)
        assert await hypervisor.find_others([]) == []

    assert guest.process.socket_path.exists()
    assert (await guest.status()).run_state is RunState.RUNNING


@pytest.mark.parametrize("ends", ["there", "here"], ids=["moved", "undone"])
async def test_what_was_typed_and_not_read_is_read_where_the_guest_goes_on(hosts: QemuHosts, ends: str) -> None:
    """A paused guest reads nothing: sixteen letters wait in its UART, the others in the pipe behind it."""
    plan = plan_of(stress_program(mem_mib=8, ws_mib=1, rate=1))
    guest = await running(hosts, plan)
    await guest.pause()
    await guest.console_input("console", b"v" * 40)
    await guest.pause_for_handoff("m")
    goes_on = guest
    if ends == "there":
        goes_on = await hosts.build(plan, "b", epoch=(1, 2), for_migration=True)
        await move(guest, goes_on)

    await goes_on.run((1, 3))

    with trio.fail_after(20):
        while (await goes_on.status()).program["checks_done"] < 40:
            await trio.sleep(0.01)
    await wait_heartbeats(goes_on, (await goes_on.status()).heartbeats + 100)
    assert (await goes_on.status()).program["checks_started"] == 40, "none was read twice"


async def test_a_blob_of_another_size_is_refused_before_anything_is_written(hosts: QemuHosts) -> None:
    """QEMU has the disk open, and knows how long it is."""
    plan = plan_with_devices(hosts.root)
    guest = await running(hosts, plan)
    await guest.pause_for_handoff("m")
    payloads = [
        registry.encode("disk-1-backend", BLOB_KIND, InMemoryBlockBackendV1(b"short")) if p.kind == BLOB_KIND else p
        for p in await guest.export_devices({})
    ]
    other = await hosts.build(plan, "b", epoch=(1, 2), for_migration=True)

    error = await expect_error("payload_value", other.import_devices(payloads))

    assert "disk-1-backend" in error.text
    assert other._files.blob(1).read_bytes() == b"blob" * 2048


def test_a_serial_number_that_qemu_cannot_take_is_a_problem(root: Path) -> None:
    disk = DiskPlan("disk-0", "nvme", "b", "file", False, {"path": "/x"}, (0, 4, 0), serial="\u00e4")
    facts = QemuFacts((7, 2, 0), ["pc-i440fx-7.2"], ["qemu64"], frozenset(), frozenset(), has_sandbox=True)

    assert "ASCII" in problems(replace(plan_of(), disks=(disk,)), QemuSettings(kernels=[Path("/")]), facts)[0]


async def test_a_guest_keeps_its_machine_and_processor_when_it_is_adopted(hosts: QemuHosts) -> None:
    """What came from a host with older machines is not what this host would make today."""
    older = replace(plan_of(), like={"hypervisor": "qemu", "cpu_model": "Nehalem", "machine_type": "pc-i440fx-7.2"})
    guest = await hosts.build(older)
    told = guest.facts
    guest.detach()

    adopted = await (await hosts.open()).adopt(GuestStamp(INSTANCE, "a", (1, 1), None), plan_of(), guest.process)

    assert isinstance(adopted, QemuGuest)
    hosts.guests.append(adopted)
    assert adopted.facts == told
    assert (told["machine_type"], told["cpu_model"]) == ("pc-i440fx-7.2", "Nehalem")


async def test_what_is_noted_while_a_guest_is_told_something_else_is_not_lost(hosts: QemuHosts) -> None:
    guest = await running(hosts)

    async with trio.open_nursery() as nursery:
        for number in range(1, 9):
            nursery.start_soon(guest.note_record, "journal", number)
            nursery.start_soon(guest.run, (1, number))

    status = await guest.status()
    assert status.last_record == 8
    await expect_error("stale_epoch", guest.run((1, 0)))


async def test_a_full_disk_fails_the_pause_and_the_guest_goes_on(hosts: QemuHosts) -> None:
    with small_disk(hosts.root / "a", 2048) as disk:
        guest = await running(hosts)
        disk.fill()

        error = await expect_error("guest_files", guest.pause_for_handoff("m"))

        assert "No space left" in error.text
        status = await wait_heartbeats(guest, (await guest.status()).heartbeats + 20)
        assert (status.run_state, status.backends_open) == (RunState.RUNNING, True)
        disk.free()
        await guest.pause_for_handoff("m")
        await guest.destroy()
