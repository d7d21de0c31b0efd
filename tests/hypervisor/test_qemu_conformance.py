"""The conformance kit on the QEMU adapter: real QEMU processes, a guest that writes memory and a disk all the time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.hypervisor.qemu_hosts import QemuHosts, plan_with_devices, requires_qemu, short_directory
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


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_the_qemu_adapter_conforms(check: Check, qemu_lab: Lab) -> None:
    await check(qemu_lab)
