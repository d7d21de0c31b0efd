"""What every adapter must do, as plain async functions that take a `Lab` and raise AssertionError.

An adapter's tests make a lab (two hosts, a program that writes memory, a disk) and run `CHECKS`. The kit knows only the
Protocols of `base.py`. It sleeps in one place only: that nothing happens can be seen in no other way.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import trio

from vmmigrate.devices.payload import DevicePayload
from vmmigrate.errors import HypervisorError, PayloadError, VmMigrateError
from vmmigrate.hypervisor.base import Guest, GuestPlan, GuestStamp, GuestStatus, Hypervisor, RunState
from vmmigrate.memory import PageBitmap

_DEADLINE_S: Final = 20.0
_QUIET_S: Final = 0.03
_MIGRATION: Final = "migration-under-test"


@dataclass(slots=True)
class Lab:
    """Where checks are made.

    Attributes:
        open_host: The adapter of a host by name; asked again for the same name, it answers as a restarted daemon would.
        plan: A guest with a program that writes memory, a serial port, and a disk that both hosts could open.
        exact_marks: Every write of the program changes its page, so that marks and changes must be equal.
        loaded_pages: How many pages a machine may put into RAM before it runs, of a program that is not on a disk.
        shows_state: The state of a guest under construction can be looked at, and a paused one checks itself.
    """

    open_host: Callable[[str], Awaitable[Hypervisor]]
    plan: GuestPlan
    exact_marks: bool = True
    loaded_pages: int = 0
    shows_state: bool = True
    guests: list[Guest] = field(default_factory=list)

    def stamp(self, host: str, epoch: tuple[int, int] = (1, 1)) -> GuestStamp:
        return GuestStamp(self.plan.instance_id, host, epoch, _MIGRATION)

    async def build(self, host: str = "a", *, epoch: tuple[int, int] = (1, 1), for_migration: bool = False) -> Guest:
        hypervisor = await self.open_host(host)
        guest = await hypervisor.build(self.plan, self.stamp(host, epoch), for_migration=for_migration)
        self.guests.append(guest)
        return guest

    async def adopt(self, guest: Guest, host: str = "a", *, instance_id: str | None = None) -> Guest | None:
        hypervisor = await self.open_host(host)
        stamp = self.stamp(host)
        if instance_id is not None:
            stamp = replace(stamp, instance_id=instance_id)
        adopted = await hypervisor.adopt(stamp, self.plan, guest.process)
        if adopted is not None:
            self.guests.append(adopted)
        return adopted

    async def close(self) -> None:
        """End every guest of this lab."""
        with trio.CancelScope(shield=True):
            for guest in reversed(self.guests):
                await guest.destroy()


Check = Callable[[Lab], Awaitable[None]]


async def a_built_guest_is_paused_and_its_ram_untouched(lab: Lab) -> None:
    guest = await lab.build()

    status = await guest.status()

    assert status.run_state is RunState.PAUSED
    assert status.heartbeats == 0
    assert status.stamp == lab.stamp("a")
    assert guest.ram.populated().count() <= lab.loaded_pages
    arriving = await lab.build("b", for_migration=True)
    assert arriving.ram.populated().is_empty()


async def a_guest_runs_pauses_and_runs_again(lab: Lab) -> None:
    guest = await lab.build()
    await guest.run((1, 1))
    first = await wait_heartbeats(guest, 20)

    await guest.pause()
    await assert_still(guest)
    await guest.run((1, 1))

    assert (await wait_heartbeats(guest, first.heartbeats + 20)).run_state is RunState.RUNNING


async def a_lower_epoch_runs_nothing_and_opens_nothing(lab: Lab) -> None:
    guest = await lab.build(epoch=(2, 5))

    for stale in ((2, 4), (1, 9)):
        await expect_error("stale_epoch", guest.run(stale))
        await expect_error("stale_epoch", guest.open_backends(stale))
        await expect_error("stale_epoch", guest.restamp(lab.stamp("a", stale)))

    status = await guest.status()
    assert status.run_state is RunState.PAUSED
    assert not status.backends_open
    await guest.run((2, 6))
    await expect_error("stale_epoch", guest.run((2, 5)))


async def a_silenced_guest_obeys_nobody_below_that_epoch(lab: Lab) -> None:
    guest = await _running(lab)

    for _ in range(2):
        await guest.silence((3, 0), 7)

    await assert_still(guest)
    status = await guest.status()
    assert (status.backends_open, status.last_record) == (False, 7)
    await expect_error("stale_epoch", guest.run((2, 9)))
    await expect_error("stale_epoch", guest.open_backends((2, 9)))
    await guest.run((3, 0))


async def take_dirty_reports_every_write_once(lab: Lab) -> None:
    guest = await _running(lab)
    await guest.pause()
    await guest.start_tracking()
    before = guest.ram.pages.copy()
    assert (await guest.take_dirty()).is_empty()

    for _ in range(3):
        await _run_for(guest, 30)
        taken = await guest.take_dirty()
        changed = _changed(before, guest)
        assert (changed - taken).is_empty(), "a write was not reported"
        assert not lab.exact_marks or (taken - changed).is_empty(), "a page that nobody wrote was reported"
        assert (await guest.take_dirty()).is_empty(), "a write was reported twice"
        before = guest.ram.pages.copy()


async def marks_that_were_put_back_come_again_once(lab: Lab) -> None:
    guest = await _running(lab)
    await guest.pause()
    await guest.start_tracking()
    await _run_for(guest, 10)
    taken = await guest.take_dirty()
    assert not taken.is_empty()

    await guest.mark_dirty(taken)

    assert await guest.take_dirty() == taken
    assert (await guest.take_dirty()).is_empty()


async def tracking_starts_clear_each_time(lab: Lab) -> None:
    guest = await lab.build()
    for _ in range(2):
        await _run_for(guest, 20)
        await guest.start_tracking()
        assert (await guest.take_dirty()).is_empty()
        await _run_for(guest, 20)
        assert not (await guest.take_dirty()).is_empty()
        await guest.mark_dirty(guest.ram.populated())
        await guest.stop_tracking()
    await expect_error("not_tracking", guest.take_dirty())


async def what_is_read_once_it_is_known_of_is_all_of_ram(lab: Lab) -> None:
    """The law that a migration of a running guest rests on, whoever tells which pages were written."""
    guest = await _running(lab)
    copy = np.zeros_like(guest.ram.pages)

    def read(pages: PageBitmap) -> None:
        numbers = pages.page_numbers()
        copy[numbers] = guest.ram.pages[numbers]

    await guest.start_tracking()
    read(await guest.first_pages())
    for _ in range(3):
        while (more := await guest.more_pages()) is not None:
            read(more)
        read(await guest.take_dirty())
    await guest.pause_for_handoff(_MIGRATION)
    read(await guest.take_dirty())

    assert np.array_equal(copy, guest.ram.pages)
    assert (guest.stopped_s is None) == (guest.page_source == "tracker")
    beats = (await guest.status()).heartbeats
    await guest.run((1, 3))
    await wait_heartbeats(guest, beats + 20)


async def a_source_goes_on_when_the_move_is_undone(lab: Lab) -> None:
    source = await _running(lab)
    await source.pause_for_handoff(_MIGRATION)
    destination = await lab.build("b", epoch=(1, 2), for_migration=True)
    await move(source, destination)
    await destination.open_backends((1, 2))
    await destination.close_backends()
    await destination.destroy()
    before = await source.status()

    await source.run((1, 3))

    await wait_heartbeats(source, before.heartbeats + 20)
    assert (await source.self_check()).consistent


async def a_guest_moves_with_memory_time_devices_and_console(lab: Lab) -> None:
    source = await _running(lab)
    await guest_types(source)
    await source.pause_for_handoff(_MIGRATION)
    status = await source.status()

    destination = await lab.build("b", epoch=(1, 2), for_migration=True)
    await move(source, destination)
    await destination.open_backends((1, 2))
    assert (await destination.status()).run_state is RunState.PAUSED
    await destination.run((1, 2))

    assert destination.ram.populated().count() <= source.ram.populated().count() + 1
    await wait_heartbeats(destination, status.heartbeats + 20)
    assert (await destination.self_check()).consistent
    port = lab.plan.serial_ports[0].name
    histories = [await guest.console_history(port) for guest in (source, destination)]
    assert histories[1].beginning.startswith(histories[0].beginning)
    assert histories[1].total_bytes >= histories[0].total_bytes


async def a_faulty_device_list_is_refused_whole_and_a_good_one_taken_after_it(lab: Lab) -> None:
    source = await _running(lab)
    await source.pause()
    good = list(await source.export_devices({}))
    destination = await lab.build("b", epoch=(1, 2), for_migration=True)
    copy_ram(source, destination)
    before = await destination.export_devices({}) if lab.shows_state else ()

    for faulty, code in _faulty_lists(good):
        await expect_error(code, destination.import_devices(faulty))
        if lab.shows_state:
            assert await destination.export_devices({}) == before, "part of a refused list was applied"

    await expect_error("not_imported", destination.run((1, 2)))
    stranger = DevicePayload("nobody", "no-such-kind", 1, b"", optional=True)
    assert await destination.import_devices([*good, stranger]) == (("nobody", "no-such-kind"),)
    if not lab.shows_state:
        await source.destroy()
        await destination.run((1, 2))
    assert (await destination.self_check()).consistent


async def exported_devices_are_those_that_were_listed(lab: Lab) -> None:
    guest = await lab.build()

    listed = await guest.list_payloads()
    exported = await guest.export_devices({item.kind: min(item.versions) for item in listed})

    assert [(p.instance_name, p.kind) for p in exported] == [(item.instance_name, item.kind) for item in listed]
    assert all(p.version == min(item.versions) for p, item in zip(exported, listed, strict=True))


async def a_running_guest_exports_nothing(lab: Lab) -> None:
    guest = await _running(lab)

    await expect_error("guest_running", guest.export_devices({}))
    await expect_error("guest_running", guest.export_time())
    await expect_error("guest_running", guest.close_backends())


async def a_pause_for_handoff_holds_without_its_daemon_and_lets_go_of_the_disks(lab: Lab) -> None:
    guest = await _running(lab)

    await guest.pause_for_handoff(_MIGRATION)
    guest.detach()
    adopted = await lab.adopt(guest)

    assert adopted is not None
    await assert_still(adopted)
    status = await adopted.status()
    assert (status.run_state, status.handoff, status.backends_open) == (RunState.PAUSED, _MIGRATION, False)
    await adopted.run((1, 1))
    assert (await wait_heartbeats(adopted, status.heartbeats + 5)).handoff is None


async def backends_are_open_on_one_host_at_a_time(lab: Lab) -> None:
    source = await _running(lab)
    await source.pause_for_handoff(_MIGRATION)
    other = await lab.build("b", epoch=(1, 2), for_migration=True)
    await move(source, other)
    await source.run((1, 1))

    await expect_error("backend_busy", other.open_backends((1, 2)))
    assert not (await other.status()).backends_open
    await source.pause_for_handoff(_MIGRATION)
    await other.open_backends((1, 2))

    await expect_error("backend_busy", source.run((1, 1)))
    assert (await source.status()).run_state is RunState.PAUSED


async def a_restarted_daemon_adopts_a_running_guest_with_its_marks(lab: Lab) -> None:
    guest = await _running(lab)
    await guest.note_record("another", 90)
    await guest.note_record("journal", 41)
    await guest.note_record("journal", 7)
    await guest.start_tracking()
    await guest.take_dirty()
    before = await guest.status()
    guest.detach()

    adopted = await lab.adopt(guest)

    assert adopted is not None
    status = await wait_heartbeats(adopted, before.heartbeats + 20)
    assert (status.run_state, status.last_journal, status.last_record) == (RunState.RUNNING, "journal", 41)
    assert not (await adopted.take_dirty()).is_empty()
    assert (await adopted.self_check()).consistent


async def a_guest_that_nobody_names_is_found_and_can_be_silenced(lab: Lab) -> None:
    guest = await _running(lab)
    hypervisor = await lab.open_host("a")
    assert await hypervisor.find_others({guest.process.socket_path}) == []
    guest.detach()

    (found,) = await hypervisor.find_others(())
    assert (found.process, found.status.stamp) == (guest.process, lab.stamp("a"))
    assert found.status.run_state is RunState.RUNNING
    assert await hypervisor.silence(found.process, (3, 0), 7)

    adopted = await lab.adopt(guest)
    assert adopted is not None
    await assert_still(adopted)
    assert (await adopted.status()).last_record == 7
    await expect_error("stale_epoch", adopted.run((1, 1)))
    await adopted.destroy()
    assert not await hypervisor.silence(found.process, (3, 0), 7)
    assert await hypervisor.find_others(()) == []


async def a_process_that_is_gone_is_not_adopted(lab: Lab) -> None:
    guest = await lab.build()
    await guest.destroy()

    assert await lab.adopt(guest) is None


async def a_process_that_is_another_guest_is_not_adopted(lab: Lab) -> None:
    guest = await lab.build()
    guest.detach()

    await expect_error("wrong_guest", lab.adopt(guest, instance_id="another"))

    assert (await lab.adopt(guest)) is not None, "the refused adoption harmed the guest"


async def a_killed_guest_is_reported_lost(lab: Lab) -> None:
    guest = await _running(lab)

    os.kill(guest.process.pid, signal.SIGKILL)
    with trio.fail_after(_DEADLINE_S):
        exit_status = await guest.wait_exit()

    assert exit_status in (-1, -signal.SIGKILL)
    await expect_error("guest_lost", guest.status())
    await guest.destroy()


async def ram_is_made_ready_and_given_back_page_by_page(lab: Lab) -> None:
    guest = await lab.build("b", for_migration=True)
    ram = guest.ram
    ram.pages[3] = 7

    await trio.to_thread.run_sync(ram.populate, 0, 8)
    assert (PageBitmap.from_runs(ram.layout.pages, np.array([[0, 8]])) - ram.populated()).is_empty()
    assert (ram.pages[3] == 7).all(), "populating changed what was there"
    assert not ram.pages[4:8].any()
    await trio.to_thread.run_sync(ram.punch, PageBitmap.from_runs(ram.layout.pages, np.array([[0, 3], [4, 4]])))

    assert ram.populated().page_numbers().tolist() == [3]
    assert (ram.pages[3] == 7).all()


async def a_throttled_guest_keeps_its_heartbeat_until_whoever_adopts_it_lets_go(lab: Lab) -> None:
    guest = await _running(lab)
    if not (await lab.open_host("a")).capabilities.throttle.available:
        await expect_error("not_supported", guest.throttle(90))
        return
    await guest.throttle(90)
    before = await guest.status()
    guest.detach()

    adopted = await lab.adopt(guest)

    assert adopted is not None
    status = await wait_heartbeats(adopted, before.heartbeats + 20)
    assert (status.run_state, status.throttle_percent) == (RunState.RUNNING, 90)
    await adopted.throttle(0)
    assert (await adopted.status()).throttle_percent == 0
    assert (await adopted.self_check()).consistent


async def a_rehearsed_export_disturbs_nothing(lab: Lab) -> None:
    guest = await _running(lab)
    before = await guest.status()

    size_bytes = await guest.rehearse_export({})

    after = await wait_heartbeats(guest, before.heartbeats + 5)
    assert (after.run_state, after.backends_open, after.handoff) == (RunState.RUNNING, True, None)
    await guest.pause()
    exported = await guest.export_devices({})
    assert size_bytes > 0
    assert exported
    await guest.run((1, 1))
    assert (await guest.self_check()).consistent


async def ram_that_was_released_outlives_the_process(lab: Lab) -> None:
    guest = await _running(lab)
    await guest.pause_for_handoff(_MIGRATION)
    before = guest.ram.pages.copy()

    ram = guest.release_ram()
    assert ram is not None
    assert guest.release_ram() is None
    await guest.destroy()

    assert (ram.pages == before).all()
    assert not ram.populated().is_empty()
    ram.close()
    await expect_error("guest_detached", trio.to_thread.run_sync(ram.populated))


async def ram_of_a_guest_that_was_destroyed_is_not_released(lab: Lab) -> None:
    guest = await _running(lab)

    await guest.destroy()

    assert guest.release_ram() is None


async def destroy_is_idempotent_and_ends_the_process(lab: Lab) -> None:
    guest = await _running(lab)

    await guest.destroy()
    await guest.destroy()

    try:
        os.kill(guest.process.pid, 0)
    except ProcessLookupError:
        pass
    else:
        raise AssertionError("the process outlived destroy")
    assert not guest.process.socket_path.exists()


CHECKS: Final[Sequence[Check]] = (
    a_built_guest_is_paused_and_its_ram_untouched,
    a_guest_runs_pauses_and_runs_again,
    a_lower_epoch_runs_nothing_and_opens_nothing,
    a_silenced_guest_obeys_nobody_below_that_epoch,
    take_dirty_reports_every_write_once,
    marks_that_were_put_back_come_again_once,
    tracking_starts_clear_each_time,
    what_is_read_once_it_is_known_of_is_all_of_ram,
    a_source_goes_on_when_the_move_is_undone,
    a_guest_moves_with_memory_time_devices_and_console,
    a_faulty_device_list_is_refused_whole_and_a_good_one_taken_after_it,
    exported_devices_are_those_that_were_listed,
    a_running_guest_exports_nothing,
    a_pause_for_handoff_holds_without_its_daemon_and_lets_go_of_the_disks,
    backends_are_open_on_one_host_at_a_time,
    a_restarted_daemon_adopts_a_running_guest_with_its_marks,
    a_guest_that_nobody_names_is_found_and_can_be_silenced,
    a_process_that_is_gone_is_not_adopted,
    a_process_that_is_another_guest_is_not_adopted,
    a_killed_guest_is_reported_lost,
    ram_is_made_ready_and_given_back_page_by_page,
    a_throttled_guest_keeps_its_heartbeat_until_whoever_adopts_it_lets_go,
    a_rehearsed_export_disturbs_nothing,
    ram_that_was_released_outlives_the_process,
    ram_of_a_guest_that_was_destroyed_is_not_released,
    destroy_is_idempotent_and_ends_the_process,
)


# -- steps that adapters' own tests use too ------------------------------------------------------------------------


async def wait_heartbeats(guest: Guest, at_least: int) -> GuestStatus:
    """Wait until the guest has counted *at_least* heartbeats."""
    with trio.fail_after(_DEADLINE_S):
        while (status := await guest.status()).heartbeats < at_least:  # noqa: ASYNC110 (another process' counter)
            await trio.sleep(0.001)
    return status


async def assert_still(guest: Guest) -> None:
    """The guest does not run: its counter stands."""
    before = (await guest.status()).heartbeats
    await trio.sleep(_QUIET_S)
    assert (await guest.status()).heartbeats == before, "a paused guest went on"


async def expect_error(code: str, call: Awaitable[object]) -> VmMigrateError:
    """*call* must fail with *code*."""
    try:
        await call
    except (HypervisorError, PayloadError) as error:
        if error.code != code:
            raise AssertionError(f"expected {code}, got {error.code}: {error}") from error
        return error
    raise AssertionError(f"expected {code}, got no error")


def copy_ram(source: Guest, destination: Guest) -> None:
    """All populated pages, as a migration of a paused guest would carry them."""
    pages = source.ram.populated().page_numbers()
    destination.ram.pages[pages] = source.ram.pages[pages]


async def move(source: Guest, destination: Guest) -> None:
    """Carry a paused guest over: RAM, time, devices, console histories. The destination stays paused."""
    copy_ram(source, destination)
    destination.ram.make_read_only()
    await destination.import_time(await source.export_time())
    await destination.import_devices(await source.export_devices({}))
    for port in source.plan.serial_ports:
        await destination.import_console_history(await source.console_history(port.name))


async def guest_types(guest: Guest) -> None:
    """Put something on every console that the guest may or may not read, and that no program takes for an order."""
    for port in guest.plan.serial_ports:
        await guest.console_input(port.name, b"hello, me\r\n")


async def _running(lab: Lab) -> Guest:
    guest = await lab.build()
    await guest.run((1, 1))
    await wait_heartbeats(guest, 50)
    return guest


async def _run_for(guest: Guest, beats: int) -> None:
    before = await guest.status()
    await guest.run((1, 1))
    await wait_heartbeats(guest, before.heartbeats + beats)
    await guest.pause()


def _changed(before: np.ndarray[tuple[int, ...], np.dtype[np.uint64]], guest: Guest) -> PageBitmap:
    return PageBitmap.from_flags((before != guest.ram.pages).any(axis=1))


def _faulty_lists(good: list[DevicePayload]) -> list[tuple[list[DevicePayload], str]]:
    torn = replace(good[-1], body=good[-1].body[:-1] + b"\xc1")
    return [
        (good[1:], "payload_missing"),
        ([*good, good[0]], "payload_duplicate"),
        ([*good, DevicePayload("nobody", good[0].kind, good[0].version, good[0].body)], "payload_unconsumed"),
        ([*good, DevicePayload("nobody", "no-such-kind", 1, b"")], "payload_kind"),
        ([*good[:-1], replace(good[-1], version=77)], "payload_version"),
        ([*good[:-1], torn], "payload_body"),
        ([], "payload_missing"),
    ]
