"""The conformance kit on the QEMU adapter: real QEMU processes, a guest that writes memory and a disk all the time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.hypervisor.qemu_hosts import QemuHosts, odd, plan_with_devices, requires_qemu, short_directory
from vmmigrate.hypervisor import conformance
from vmmigrate.hypervisor.conformance import CHECKS, Check, Lab

pytestmark = requires_qemu


@pytest.fixture
def short() -> Iterator[Path]:
    yield from short_directory()


@pytest.fixture
async def qemu_lab(short: Path) -> AsyncIterator[Lab]:
    hosts = QemuHosts(short)
    lab = Lab(hosts.open, plan_with_devices(short), exact_marks=False, loaded_pages=16, shows_state=False)
    yield lab
    await lab.close()


@pytest.fixture
async def stream_lab(short: Path) -> AsyncIterator[Lab]:
    hosts = QemuHosts(short)
    hosts.settings = replace(hosts.settings, use_tracker=False)
    lab = Lab(hosts.open, odd(plan_with_devices(short)), exact_marks=False, loaded_pages=16, shows_state=False)
    yield lab
    await lab.close()


# Of each promise one in `make test`, all in `make check`.
QUICK = {
    conformance.a_guest_moves_with_memory_time_devices_and_console,
    conformance.take_dirty_reports_every_write_once,
    conformance.backends_are_open_on_one_host_at_a_time,
    conformance.a_restarted_daemon_adopts_a_running_guest_with_its_marks,
}


@pytest.mark.parametrize(
    "check",
    [pytest.param(check, marks=[] if check in QUICK else pytest.mark.slow, id=check.__name__) for check in CHECKS],
)
async def test_the_qemu_adapter_conforms(check: Check, qemu_lab: Lab) -> None:
    await check(qemu_lab)


async def test_the_qemu_adapter_conforms_where_qemu_has_to_tell_what_is_written(stream_lab: Lab) -> None:
    """In all else there is no difference to a guest with the tracker."""
    await conformance.what_is_read_once_it_is_known_of_is_all_of_ram(stream_lab)
