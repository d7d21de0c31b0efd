"""200 migrations in a row between two daemon processes, under random faults: what a daemon takes up stays level."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

import pytest
import trio

from tools.faults.soak import Sample, Soak

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("VMM_LONG"), reason="a quarter of an hour: belongs to `make check-long`"),
]

DEADLINE_S = 3600.0
# In the second half, from its tenth migration to its last.
MORE_PRIVATE_KIB = 8 * 1024
IDLE_THREADS = 4
# Without compaction it has some 600 for each migration. With it: the migrations whose verdict was not acknowledged yet
# (sources are asked every minute), and of each guest that ever was its epoch and its last migrations.
JOURNAL_BYTES, JOURNAL_BYTES_PER_GUEST = 16 * 1024, 2 * 1024


@pytest.fixture(scope="module")
def soak() -> Soak:
    """Its seed is printed and can be given by VMM_SOAK_SEED."""
    seed = int(os.environ.get("VMM_SOAK_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"VMM_SOAK_SEED={seed}")
    soaked = Soak(seed, on_migration=lambda number, line: print(f"{number:4} {line}", flush=True))
    with tempfile.TemporaryDirectory(prefix="vmmigrate-") as root:
        trio.run(_run, soaked, Path(root))
    return soaked


async def _run(soaked: Soak, root: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        await soaked.run(root)


def by_host(samples: list[Sample]) -> dict[str, list[Sample]]:
    return {host: [s for s in samples if s.host == host] for host in sorted({s.host for s in samples})}


def test_no_promise_breaks_and_no_descriptor_file_process_or_ticket_is_left(soak: Soak) -> None:
    assert soak.problems == []
    assert sum(soak.outcomes.values()) == soak.migrations
    assert soak.outcomes["moved"] > soak.migrations // 5, soak.outcomes


def test_the_memory_of_a_daemon_stays_level(soak: Soak) -> None:
    for host, samples in by_host(soak.samples).items():
        settled = samples[10:]
        assert len(settled) > 1, soak.problems
        grown_kib = settled[-1].private_kib - settled[0].private_kib
        assert grown_kib < MORE_PRIVATE_KIB, f"{host}: {[s.private_kib for s in settled[::10]]}"


def test_the_threads_of_a_daemon_end(soak: Soak) -> None:
    for sample in soak.rested:
        assert sample.threads <= IDLE_THREADS, sample


def test_the_journal_forgets_what_is_over(soak: Soak) -> None:
    """A daemon compacts at its start, when nothing is recent any more."""
    for sample in soak.restarted:
        assert sample.journal_bytes <= JOURNAL_BYTES + soak.guests * JOURNAL_BYTES_PER_GUEST, sample
