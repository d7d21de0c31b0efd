"""The conformance kit on the embedded adapter, with kernel and with software dirty tracking."""

from __future__ import annotations

import pytest

from vmmigrate.hypervisor import conformance
from vmmigrate.hypervisor.conformance import CHECKS, Check, Lab


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_the_embedded_adapter_conforms(check: Check, lab: Lab) -> None:
    await check(lab)


@pytest.mark.parametrize(
    "check",
    [
        conformance.take_dirty_reports_every_write_once,
        pytest.param(conformance.marks_that_were_put_back_come_again_once, marks=pytest.mark.slow),
        pytest.param(conformance.tracking_starts_clear_each_time, marks=pytest.mark.slow),
        pytest.param(conformance.a_restarted_daemon_adopts_a_running_guest_with_its_marks, marks=pytest.mark.slow),
        conformance.a_guest_moves_with_memory_time_devices_and_console,
    ],
    ids=lambda check: check.__name__,
)
async def test_the_embedded_adapter_conforms_with_software_tracking(check: Check, software_lab: Lab) -> None:
    await check(software_lab)
