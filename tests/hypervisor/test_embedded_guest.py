"""The embedded guest beyond the conformance kit: sizes of RAM, what it detects, what it survives."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trio

from tests.hypervisor.faults import ForgetfulTracker, WatchesItsGuestDie
from tests.hypervisor.hosts import STRESS, Hosts, plan_of, plan_with_every_device
from vmmigrate.devices.payload import DevicePayload
from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.base import DiskPlan, Guest, GuestProcess, GuestStamp, InjectorPlan, RunState
from vmmigrate.hypervisor.conformance import assert_still, copy_ram, expect_error, move, wait_heartbeats
from vmmigrate.hypervisor.embedded import protocol
from vmmigrate.hypervisor.embedded.adapter import EmbeddedHypervisor
from vmmigrate.hypervisor.embedded.remote import EmbeddedGuest
from vmmigrate.hypervisor.processes import ProcessWatch
from vmmigrate.memory import GIB, MIB, PAGE_SIZE, PageBitmap, RamLayout, Region

REPOSITORY = Path(__file__).parents[2]


async def _running(hosts: Hosts, beats: int = 60, **options: object) -> EmbeddedGuest:
    guest = await hosts.build(plan_of(), **options)  # type: ignore[arg-type]
    await guest.run((1, 1))
    await wait_heartbeats(guest, beats)
    return guest


@pytest.mark.parametrize(
    "pages",
    [1, *(pytest.param(pages, marks=pytest.mark.slow) for pages in (2, 127 * 256, 128 * 256)), 129 * 256],
)
async def test_ram_of_any_size_moves_and_stays_sparse(hosts: Hosts, pages: int) -> None:
    plan = plan_of(ram_bytes=pages * PAGE_SIZE)
    source = await hosts.build(plan)
    await source.run((1, 1))
    await wait_heartbeats(source, 60)
    await source.pause_for_handoff("m")

    destination = await hosts.build(plan, "b", epoch=(1, 2), for_migration=True)
    await move(source, destination)
    await destination.run((1, 2))
    await wait_heartbeats(destination, 120)

    check = await destination.self_check()
    assert check.consistent
    assert check.pages_checked == min(pages, 401)
    assert destination.ram.populated().count() <= 401
    assert hosts.verdict().single


async def test_ram_above_three_gib_in_two_regions_fills_no_memory(hosts: Hosts) -> None:
    layout = RamLayout.for_size(3 * GIB + 8 * MIB)
    guest = await hosts.build(plan_of(layout=layout))
    await guest.start_tracking()
    await guest.run((1, 1))
    await wait_heartbeats(guest, 60)
    await guest.pause()

    dirty = await guest.take_dirty()
    high = layout.first_page(layout.regions[1])

    assert dirty.count() == 401
    assert dirty == guest.ram.populated()
    assert (dirty.page_numbers() >= high).sum() == 200, "the working set is spread over both regions"
    assert (await guest.self_check()).consistent


async def test_a_working_set_reaches_every_small_region(hosts: Hosts) -> None:
    layout = RamLayout([Region(0, PAGE_SIZE), Region(MIB, PAGE_SIZE), Region(GIB, MIB)])
    guest = await hosts.build(plan_of(layout=layout))
    await guest.run((1, 1))
    await wait_heartbeats(guest, 60)

    assert (await guest.self_check()).pages_checked == layout.pages
    assert guest.ram.populated().count() == layout.pages


async def test_a_guest_moves_around_four_hosts_and_exactly_one_runs_at_any_time(hosts: Hosts) -> None:
    guest = await _running(hosts)
    for n, host in enumerate("bca", start=2):
        await guest.pause_for_handoff(f"m{n}")
        arrived = await hosts.build(plan_of(), host, epoch=(1, n), for_migration=True)
        await move(guest, arrived)
        before = await guest.status()
        await guest.destroy()
        await arrived.run((1, n))
        await wait_heartbeats(arrived, before.heartbeats + 20)
        guest = arrived

    status = await guest.status()
    gaps = await guest.heartbeat_gaps()
    verdict = hosts.verdict()
    assert verdict.single, verdict.problems
    assert verdict.hosts == ("a", "b", "c", "a")
    assert verdict.beats >= status.heartbeats
    assert status.program["moves"] == len(gaps["move_gaps_ms"]) == 3
    assert gaps["largest_gap_ms"] == max(gaps["move_gaps_ms"] + [gaps["steady_largest_gap_ms"]])
    assert (await guest.self_check()).consistent
    assert guest.ram.populated().count() == 401


@pytest.mark.parametrize(
    "pattern", ["full", *(pytest.param(pattern, marks=pytest.mark.slow) for pattern in ("sparse", "compressible"))]
)
@pytest.mark.parametrize("fault", ["stale", "lost", "stray", "heartbeat"])
async def test_self_check_names_the_page_that_was_not_carried_over(hosts: Hosts, pattern: str, fault: str) -> None:
    plan = plan_of({**STRESS, "pattern": pattern})
    source = await hosts.build(plan)
    await source.run((1, 1))
    await wait_heartbeats(source, 60)
    await source.pause()
    old = source.ram.pages[[0, 7]].copy()
    beats = (await source.status()).heartbeats
    await source.run((1, 1))
    await wait_heartbeats(source, beats + 60)
    await source.pause()
    destination = await hosts.build(plan, "b", epoch=(1, 2), for_migration=True)
    copy_ram(source, destination)
    assert (old[1] != source.ram.pages[7]).any(), "the program came round to the page once more"

    page = {"stale": 7, "lost": 7, "stray": 1000, "heartbeat": 0}[fault]
    content = {"stale": old[1], "lost": np.zeros(512), "stray": np.ones(512), "heartbeat": old[0]}[fault]
    destination.ram.pages[page] = content
    await destination.import_devices(await source.export_devices({}))

    check = await destination.self_check()
    assert not check.consistent
    assert check.first_bad_page == page


async def test_self_check_runs_beside_the_guest(hosts: Hosts) -> None:
    """It takes many slices; the heartbeat goes on between them, and other requests are answered."""
    guest = await hosts.build(plan_of({**STRESS, "working_set_pages": 16000}, ram_bytes=64 * MIB))
    await guest.run((1, 1))
    before = await wait_heartbeats(guest, 150)

    verdicts = []
    answered = 0

    async def check() -> None:
        verdicts.append(await guest.self_check())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(check)
        nursery.start_soon(check)
        while len(verdicts) < 2:
            await guest.status()
            answered += 1

    assert all(verdict.consistent and verdict.pages_checked == 16001 for verdict in verdicts)
    assert answered > 5
    assert (await guest.status()).heartbeats > before.heartbeats + 20


async def test_a_page_forgotten_by_the_kernel_tracker_is_not_reported(hosts: Hosts) -> None:
    """The fault itself, so that tests which rely on it do not pass for another reason."""
    guest = await _running(hosts)
    await guest.start_tracking()
    await wait_heartbeats(guest, (await guest.status()).heartbeats + 60)
    await guest.pause()

    guest.tracker.forget(5, 1)  # type: ignore[attr-defined]

    taken = await guest.take_dirty()
    assert 5 not in taken
    assert 4 in taken


async def test_a_forgetful_tracker_makes_a_migration_lose_a_page(hosts: Hosts) -> None:
    guest = await _running(hosts, wrap_tracker=lambda tracker: ForgetfulTracker(tracker, [5]))
    await guest.start_tracking()
    first = guest.ram.pages.copy()
    await wait_heartbeats(guest, (await guest.status()).heartbeats + 60)
    await guest.pause()
    dirty = (await guest.take_dirty()).page_numbers()

    destination = await hosts.build(plan_of(), "b", epoch=(1, 2), for_migration=True)
    first[dirty] = guest.ram.pages[dirty]
    destination.ram.pages[:] = first
    await destination.import_devices(await guest.export_devices({}))

    assert (await destination.self_check()).first_bad_page == 5


@pytest.mark.parametrize(
    ("step", "run_state"),
    [
        pytest.param("running", RunState.RUNNING, marks=pytest.mark.slow),
        ("tracking", RunState.RUNNING),
        pytest.param("in_request", RunState.RUNNING, marks=pytest.mark.slow),
        ("paused", RunState.PAUSED),
        ("handoff_resumed", RunState.RUNNING),
    ],
)
async def test_a_guest_outlives_its_daemon_in_the_state_it_was_in(root: Path, step: str, run_state: RunState) -> None:
    arguments = [sys.executable, "-m", "tests.hypervisor.daemon_under_test", str(root), step]
    daemon = await trio.to_thread.run_sync(lambda: subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=REPOSITORY))
    try:
        line = await trio.to_thread.run_sync(daemon.stdout.readline)  # type: ignore[union-attr]
        pid, start_ticks, path, beats = json.loads(line)
    finally:
        daemon.kill()
        await trio.to_thread.run_sync(daemon.communicate)

    hosts = Hosts(root)
    hypervisor = await hosts.open()
    process = GuestProcess(pid, start_ticks, Path(path))
    guest = await hypervisor.adopt(GuestStamp(plan_of().instance_id, "a", (1, 1), None), plan_of(), process)

    assert guest is not None
    hosts.guests.append(guest)
    try:
        assert (await guest.status()).run_state is run_state
        if run_state is RunState.PAUSED:
            await assert_still(guest)
            assert (await guest.status()).heartbeats == beats
        else:
            await wait_heartbeats(guest, beats + 20)
        if step == "tracking":
            assert (await guest.take_dirty()).count() > 1, "marks set before and after the daemon's end"
        assert (await guest.self_check()).consistent
    finally:
        await guest.destroy()
    assert await guest.wait_exit() == -1


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"program": {"name": "no-such-program"}}, "program_invalid"),
        ({"program": {"name": "stress", "rate_pages_per_s": -1, "colour": "red"}}, "program_invalid"),
        ({"disks": (DiskPlan("d", "virtio", "b", "tape", False, {}),)}, "backend_invalid"),
        ({"disks": (DiskPlan("d", "virtio", "b", "file", False, {}),)}, "backend_invalid"),
    ],
)
async def test_a_build_that_fails_leaves_nothing(hosts: Hosts, change: dict[str, object], code: str) -> None:
    hypervisor = await hosts.open()
    plan = plan_of(change.get("program"), disks=change.get("disks", ()))  # type: ignore[arg-type]
    before, children = _open_descriptors(), _children()

    error = await expect_error(
        code, hypervisor.build(plan, GuestStamp(plan.instance_id, "a", (1, 1), None), for_migration=False)
    )

    assert "\n" not in error.text
    assert list(hypervisor.runtime_dir.iterdir()) == []
    assert _open_descriptors() == before
    assert _children() <= children


async def test_a_cancelled_build_leaves_nothing(hosts: Hosts) -> None:
    hypervisor = await hosts.open()
    before, children = _open_descriptors(), _children()

    with trio.move_on_after(0.05) as scope:
        await hypervisor.build(plan_of(), GuestStamp(plan_of().instance_id, "a", (1, 1), None), for_migration=False)

    assert scope.cancelled_caught
    assert list(hypervisor.runtime_dir.iterdir()) == []
    assert _open_descriptors() == before
    assert _children() <= children


async def test_a_process_that_hangs_is_not_said_to_be_gone(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = await _running(hosts)
    assert isinstance(guest, EmbeddedGuest)
    guest.end_deadline_s = 0.05
    with monkeypatch.context() as patched:
        patched.setattr(ProcessWatch, "kill", lambda _: None)  # as for one that hangs in the kernel
        assert not await guest.destroy()
    assert guest.process.socket_path.exists()

    assert await guest.destroy()
    assert await guest.destroy()
    assert not guest.process.socket_path.exists()


async def test_destroy_frees_every_descriptor_and_file(hosts: Hosts) -> None:
    hypervisor = await hosts.open()
    before = _open_descriptors()
    guest = await _running(hosts)

    await guest.destroy()

    assert _open_descriptors() == before
    assert list(hypervisor.runtime_dir.iterdir()) == []
    assert await guest.wait_exit() == -signal.SIGKILL


async def test_a_guest_holds_no_descriptor_of_its_daemon(hosts: Hosts) -> None:
    """Else `make demo | tee log` would wait for a guest that outlives the demo."""
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    try:
        guest = await hosts.build(plan_of())
    finally:
        os.close(writing)
    try:
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(reading)
        assert os.read(reading, 1) == b""
        assert (await guest.status()).run_state is RunState.PAUSED
    finally:
        os.close(reading)


async def test_a_daemon_that_talks_nonsense_does_not_harm_its_guest(hosts: Hosts) -> None:
    guest = await _running(hosts)
    hello = protocol.encode_frame({"hello": [1]})

    for nonsense in (
        b"\xff" * 8,
        hello + protocol.encode_frame({"no": "op"}),
        hello + protocol.encode_frame({"op": 1}),
    ):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            sock.connect(str(guest.process.socket_path))
            sock.sendall(nonsense)
            with contextlib.suppress(ConnectionResetError):
                while await trio.to_thread.run_sync(sock.recv, 1 << 16):
                    pass
    for op, args in (("run", {"epoch": "x"}), ("no_such_request", {}), ("note_record", {"number": "x"})):
        with pytest.raises(HypervisorError):
            await guest.request(op, **args)

    adopted = await (await hosts.open()).adopt(
        GuestStamp(guest.plan.instance_id, "a", (1, 1), None), guest.plan, guest.process
    )
    assert adopted is not None
    hosts.guests.append(adopted)  # type: ignore[arg-type]
    assert (await adopted.self_check()).consistent
    assert (await adopted.status()).run_state is RunState.RUNNING


async def test_a_runtime_dir_that_others_can_enter_or_that_is_too_long_is_refused(root: Path) -> None:
    open_dir = root / "open"
    open_dir.mkdir(mode=0o755)

    for path in (open_dir, root / ("long" * 30)):
        await expect_error("runtime_dir", EmbeddedHypervisor.open(path))


async def test_a_frozen_guest_process_is_unresponsive_and_answers_when_it_goes_on(hosts: Hosts) -> None:
    guest = await _running(hosts, request_deadline_s=0.2)

    os.kill(guest.process.pid, signal.SIGSTOP)
    await expect_error("guest_unresponsive", guest.status())
    os.kill(guest.process.pid, signal.SIGCONT)

    assert (await guest.status()).run_state is RunState.RUNNING


async def test_a_cancelled_request_harms_no_later_one(hosts: Hosts) -> None:
    guest = await hosts.build(plan_with_every_device(hosts.root))

    for _ in range(5):
        with trio.move_on_after(0):
            await guest.status()
        with trio.CancelScope() as scope:
            scope.cancel()
            await guest.export_devices({})
        assert (await guest.status()).run_state is RunState.PAUSED


async def test_a_new_daemon_connection_replaces_the_old_one(hosts: Hosts) -> None:
    old = await _running(hosts)

    new = await (await hosts.open()).adopt(GuestStamp(old.plan.instance_id, "a", (1, 1), None), old.plan, old.process)

    assert new is not None
    try:
        await expect_error("guest_taken_over", old.status())
        assert (await new.status()).run_state is RunState.RUNNING
    finally:
        new.detach()


async def test_a_source_maps_ram_read_only_and_a_destination_until_it_is_complete(hosts: Hosts) -> None:
    source = await hosts.build(plan_of())
    destination = await hosts.build(plan_of(), "b", for_migration=True)
    view = destination.ram.view
    view[PAGE_SIZE] = 1
    destination.ram.punch(PageBitmap.full(destination.ram.layout.pages))
    assert view[PAGE_SIZE] == 0

    destination.ram.make_read_only()

    for guest in (source, destination):
        assert guest.ram.view.readonly
        assert not guest.ram.pages.flags.writeable
    with pytest.raises(HypervisorError, match="read-only"):
        destination.ram.punch(PageBitmap(destination.ram.layout.pages))


async def test_typed_keys_are_echoed_and_those_not_yet_read_move_along(hosts: Hosts) -> None:
    plan = plan_of({"name": "echo"})
    source = await hosts.build(plan)
    await source.console_input("console", b"before the guest runs ")
    await source.run((1, 1))
    await wait_heartbeats(source, 5)
    await source.pause()
    await source.console_input("com1", b"and just before it moves")
    await source.pause_for_handoff("m")
    destination = await hosts.build(plan, "b", epoch=(1, 2), for_migration=True)
    await move(source, destination)
    await destination.run((1, 2))
    await wait_heartbeats(destination, 10)

    history = await destination.console_history("console")

    assert history.beginning == b"before the guest runs and just before it moves"
    assert (history.total_bytes, history.rolling) == (len(history.beginning), b"")
    await expect_error("unknown_port", destination.console_input("com4", b"x"))
    await expect_error("console_full", destination.console_input("com1", bytes(1 << 20)))


async def test_nothing_is_typed_or_reset_that_would_not_arrive(hosts: Hosts) -> None:
    """Between the pause for the handoff and the return of its disks; also when it was paused before."""
    guest = await hosts.build(plan_of({"name": "echo"}))
    await guest.run((1, 1))
    await guest.pause()
    await guest.pause_for_handoff("m")

    await expect_error("guest_paused_for_handoff", guest.console_input("com1", b"lost"))
    await expect_error("guest_paused_for_handoff", guest.reboot())

    await guest.open_backends((1, 1))
    await guest.console_input("com1", b"kept")
    await guest.run((1, 1))
    await wait_heartbeats(guest, 20)
    assert (await guest.console_history("com1")).beginning == b"kept"


async def test_a_guest_that_reboots_begins_anew_and_every_page_it_cleared_is_marked(hosts: Hosts) -> None:
    """By its own deed, and by the reset button; its memory is consistent at once, and moves whole."""
    guest = await hosts.build(plan_of({**STRESS, "power_keys": True}))
    await guest.run((1, 1))
    await _wait_filled(guest, 400)
    await guest.start_tracking()
    await guest.console_input("com1", b"xr")
    await _wait_console(guest, b"reboot\r\n")
    marked = await guest.take_dirty()

    assert marked.count() >= 400
    await _wait_filled(guest, 400)
    assert (await guest.self_check()).consistent
    heartbeats = (await guest.status()).heartbeats
    await guest.pause()
    await guest.reboot()
    status = await guest.status()
    assert (status.run_state, status.program["filled_pages"]) == (RunState.PAUSED, 0)
    assert status.heartbeats >= heartbeats
    assert (await guest.self_check()).consistent
    await guest.run((1, 1))
    await _wait_filled(guest, 400)
    assert (await guest.self_check()).consistent
    assert hosts.verdict().single


async def test_a_guest_that_powers_itself_off_is_off_and_not_lost(hosts: Hosts) -> None:
    """Whoever waits is told, also a daemon that comes later; it never runs again, and holds no disk open."""
    guest = await hosts.build(plan_of({"name": "idle", "power_keys": True}))
    await guest.run((1, 1))
    await guest.console_input("com1", b"p")
    with trio.fail_after(20):
        await guest.wait_power_off()

    await guest.run((1, 1))
    status = await guest.status()
    assert (status.run_state, status.backends_open) == (RunState.PAUSED, False)
    await expect_error("guest_powered_off", guest.pause_for_handoff("m"))
    guest.detach()
    stamp = GuestStamp(guest.plan.instance_id, "a", (1, 1), None)
    again = await (await hosts.open()).adopt(stamp, guest.plan, guest.process)
    assert isinstance(again, EmbeddedGuest)
    hosts.guests.append(again)
    with trio.fail_after(20):
        await again.wait_power_off()


async def test_requests_and_broken_connections_do_not_disturb_who_waits_for_the_end(hosts: Hosts) -> None:
    """A request that is given up half sent ends the connection; who waits for the power-off asks again."""
    guest = await hosts.build(plan_of({"name": "idle", "power_keys": True}))
    await guest.run((1, 1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest.wait_power_off)
        with trio.move_on_after(0.05):  # more than the socket takes while nobody reads it
            os.kill(guest.process.pid, signal.SIGSTOP)
            try:
                await guest.import_devices([DevicePayload("x", "y", 1, bytes(64 * MIB), True)])
            finally:
                os.kill(guest.process.pid, signal.SIGCONT)
        assert (await guest.status()).heartbeats
        await guest.console_input("com1", b"p")


async def test_a_guest_that_crashes_its_machine_is_lost(hosts: Hosts) -> None:
    guest = await hosts.build(plan_of({"name": "idle", "power_keys": True}))
    await guest.run((1, 1))

    await guest.console_input("com1", b"c")
    with trio.fail_after(20):
        await guest.wait_exit()

    error = await expect_error("guest_lost", guest.status())
    assert "the guest crashed its machine" in error.text


async def _wait_filled(guest: Guest, pages: int) -> None:
    with trio.fail_after(20):
        while (await guest.status()).program["filled_pages"] < pages:
            await trio.sleep(0.005)


async def _wait_console(guest: Guest, text: bytes) -> None:
    with trio.fail_after(20):
        while text not in (await guest.console_history("com1")).beginning:
            await trio.sleep(0.005)


@pytest.mark.parametrize("kind", ["file", pytest.param("blob", marks=pytest.mark.slow), "crucible"])
async def test_disk_contents_move_with_the_guest_and_are_checked_by_it(hosts: Hosts, kind: str) -> None:
    volume = hosts.root / "volume"
    volume.write_bytes(bytes(64 * PAGE_SIZE))
    fields = {
        "file": {"path": str(volume)},
        "blob": {"contents": bytes(64 * PAGE_SIZE)},
        "crucible": {"volume_id": "v", "generation": 1, "path": str(volume)},
    }[kind]
    plan = plan_of(
        {**STRESS, "disk_io": True}, disks=(DiskPlan("disk", "virtio", "disk-backend", kind, False, fields),)
    )
    source = await hosts.build(plan)
    await source.run((1, 1))
    await wait_heartbeats(source, 210)
    await source.pause_for_handoff("m")
    destination = await hosts.build(plan, "b", epoch=(1, 2), for_migration=True)
    await move(source, destination)
    await destination.run((1, 2))
    await wait_heartbeats(destination, 330)
    await destination.pause()

    assert (await destination.status()).program["disk_steps"] >= 5
    assert (await destination.self_check()).consistent
    if kind != "blob":
        volume.write_bytes(bytes(64 * PAGE_SIZE))
        assert "disk" in (await destination.self_check()).reason


async def test_a_crucible_volume_refuses_an_older_generation(hosts: Hosts) -> None:
    volume = hosts.root / "volume"
    volume.write_bytes(bytes(PAGE_SIZE))

    async def opened(generation: int, host: str) -> Guest:
        fields = {"volume_id": "v", "generation": generation, "path": str(volume)}
        guest = await hosts.build(plan_of(disks=(DiskPlan("d", "virtio", "b", "crucible", False, fields),)), host)
        await guest.open_backends((1, 1))
        return guest

    first = await opened(4, "a")
    await first.close_backends()
    second = await opened(5, "b")
    await second.close_backends()

    await expect_error("stale_generation", first.open_backends((1, 1)))


async def test_the_injector_fails_the_first_export_and_import_and_leaves_the_guest_whole(hosts: Hosts) -> None:
    plan = plan_of(injector=InjectorPlan("injector", 1, 1))
    source = await hosts.build(plan)
    await source.run((1, 1))
    await wait_heartbeats(source, 30)
    await source.pause()
    await expect_error("injected_failure", source.export_devices({}))
    payloads = await source.export_devices({})
    destination = await hosts.build(plan, "b", epoch=(1, 2), for_migration=True)
    copy_ram(source, destination)
    before = await destination.status()

    await expect_error("injected_failure", destination.import_devices(payloads))

    assert await destination.status() == before
    await destination.import_devices(payloads)
    assert (await destination.self_check()).consistent


async def test_devices_that_cannot_migrate_are_all_named_before_anything_moves(hosts: Hosts) -> None:
    guest = await hosts.build(plan_of(unmigratable=("vsock (virtio_socket)", "p9fs")))

    error = await expect_error("not_migratable", guest.list_payloads())

    assert error.details["devices"] == ["vsock (virtio_socket)", "p9fs"]
    await guest.run((1, 1))
    await wait_heartbeats(guest, 5)


async def test_nothing_is_imported_by_a_guest_that_was_not_built_for_it(hosts: Hosts) -> None:
    guest = await _running(hosts)
    await guest.pause()

    await expect_error("not_importable", guest.import_devices(await guest.export_devices({})))
    await expect_error("not_importable", guest.import_time(await guest.export_time()))


async def test_a_witness_can_be_read_after_the_guest_was_killed(hosts: Hosts) -> None:
    guest = await _running(hosts)
    beats = (await guest.status()).heartbeats

    os.kill(guest.process.pid, signal.SIGKILL)
    await guest.wait_exit()

    verdict = hosts.verdict()
    assert verdict.single
    assert verdict.beats >= beats


def test_a_guest_process_imports_neither_an_event_loop_nor_cryptography() -> None:
    """It starts in a fifth of a second, and stays a single thread."""
    program = "import sys, vmmigrate.hypervisor.embedded.guest; print(*sys.modules)"

    modules = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split()

    assert not {"trio", "asyncio", "ssl", "cryptography", "pydantic", "subprocess"} & set(modules)


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _children() -> set[int]:
    """Also those of tests before: a guest that outlives the daemon that started it is nobody's to wait for."""
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


async def test_a_guest_that_dies_in_the_middle_of_a_scan_is_lost_and_not_badly_tracked(hosts: Hosts) -> None:
    """Its memory goes before its process does, so that the scan fails first."""
    pids: list[int] = []
    guest = await _running(hosts, wrap_tracker=lambda tracker: WatchesItsGuestDie(tracker, lambda: pids[0]))
    pids.append(guest.process.pid)
    await guest.start_tracking()

    await expect_error("guest_lost", guest.take_dirty())
