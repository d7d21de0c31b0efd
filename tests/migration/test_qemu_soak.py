"""Many moves in a row of the same guest in QEMU: nothing adds up, nothing gets lost."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import trio

from tests.hypervisor.qemu_hosts import uses_qemu
from tests.migration.fleet import check, migrate, open_fleet, wait_heartbeats, witnesses
from tests.migration.qemu_fleet import VNIC, create_ready, machine, start_both

pytestmark = [
    *uses_qemu,
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("VMM_LONG"), reason="some minutes: belongs to `make check-long`"),
]

MOVES, LINUX_MOVES = 50, 20


@pytest.mark.parametrize("source", ["tracker", "stream"])
async def test_fifty_moves_of_the_stress_guest_are_each_right(tmp_path: Path, source: str) -> None:
    """It writes to its disk and its memory all the time, and reads all of both after every move."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        hosts = await start_both(fleet, source)
        instance = await create_ready(hosts[0], machine(tmp_path), disk=True)
        owners = ["alpha"]
        turns = itertools.cycle((hosts, hosts[::-1]))
        for number, (here, there) in zip(range(MOVES), turns, strict=False):
            record = await migrate(here, there, instance, replacements=VNIC, downtime_ms=1000)

            assert record["outcome"] == "moved", (number, record["error"])
            assert record["negotiated"]["page_source"] == source
            await wait_heartbeats(there, instance, 50)
            verdict = await check(there, instance)
            assert verdict["consistent"], (number, verdict)
            seen = (await there.guest(instance).status()).program
            assert (seen["disk_read_backs"] > 0, seen["disk_failures"], seen["mismatches"]) == (True, 0, 0), number
            owners.append(there.name)
        found = witnesses(fleet, instance)
        assert found.single, found.problems
        assert found.hosts == tuple(owners)


@pytest.mark.parametrize("source", ["tracker", "stream"])
async def test_twenty_moves_of_linux_under_disk_and_network_load_lose_nothing(source: str) -> None:
    command = [sys.executable, "-m", "tools.demo_linux", "--json", "--mib", "256", "--working-set-mib", "48"]
    command += ["--moves", str(LINUX_MOVES), "--page-source", source]

    done = await trio.run_process(command, capture_stdout=True, check=False)

    outcome = json.loads(done.stdout)
    assert outcome["problems"] == []
    assert done.returncode == 0
    assert [move["check"] for move in outcome["moves"]] == ["CHECK ok"] * LINUX_MOVES
    assert {move["record"]["negotiated"]["page_source"] for move in outcome["moves"]} == {source}
    assert all(outcome["counters"][f"{work}_fail"] == 0 for work in ("disk", "ping", "sum"))
