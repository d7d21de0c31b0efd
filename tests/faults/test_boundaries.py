"""The short form of `make faults`: kills and cuts at every message boundary of real migrations."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
import trio

from tools.faults.matrix import matrix
from tools.faults.relay import Side
from tools.faults.runner import Campaign
from tools.faults.trial import SHORT

DEADLINE_S = 900.0
# How many TLS records each side sends at least: handshake, Offer to Handoff and Running, goodbye. The source of the
# control run has sent 14 when it paused after its first round, and 13 were reached in trials whose conversation was one
# record shorter; small messages share a record. Each round more is another record.
LEAST_RECORDS = {Side.SOURCE: 13, Side.DESTINATION: 10}


@pytest.mark.slow
@pytest.mark.required
async def test_kills_and_cuts_at_every_message_boundary_leave_one_owner_and_nothing_else() -> None:
    """Source, destination, guest and arriving guest are killed, and the link is cut, before each record of either side.

    Judged by the guests' own witnesses; a guest is lost only with the process that ran it last, and then said to be;
    no process, memfd, socket, file or ticket is left over. (Paths of sockets are short: pytest's directories are not.)
    """
    campaign = Campaign(SHORT, jobs=3)

    with tempfile.TemporaryDirectory(prefix="vmmigrate-") as root, trio.fail_after(DEADLINE_S):
        await campaign.run(Path(root))

    assert not campaign.broken, matrix(campaign)
    assert campaign.left_out == 0
    for side, least in LEAST_RECORDS.items():
        for fault in SHORT:
            struck = {r.trial.boundary for r in campaign.results if r.reached and r.trial.fault is fault}
            assert sum(boundary is not None and boundary.side is side for boundary in struck) >= least, matrix(campaign)


@pytest.mark.slow
@pytest.mark.required
@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed")
@pytest.mark.parametrize(("hypervisor", "every"), [("qemu", 3), ("qemu-stream", 6)])
async def test_kills_and_cuts_at_sampled_message_boundaries_leave_one_owner_of_a_qemu_guest(
    hypervisor: str, every: int
) -> None:
    """The same with real QEMU guests, at sampled records: what they write on their consoles says who ran when."""
    campaign = Campaign(SHORT, every=every, jobs=3, hypervisor=hypervisor)

    with tempfile.TemporaryDirectory(prefix="vmmigrate-") as root, trio.fail_after(DEADLINE_S):
        await campaign.run(Path(root))

    assert not campaign.broken, matrix(campaign)
    assert campaign.left_out == 0
    for side, least in LEAST_RECORDS.items():
        for fault in SHORT:
            struck = {r.trial.boundary for r in campaign.results if r.reached and r.trial.fault is fault}
            assert sum(boundary is not None and boundary.side is side for boundary in struck) >= least // every, matrix(
                campaign
            )
