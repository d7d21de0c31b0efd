"""What a guest writes, seen by comparing some of its pages with what they were."""

from __future__ import annotations

import os

import numpy as np

from tests.hypervisor.ram_owner import held_pages, open_owner
from vmmigrate.engine.planning import Sample
from vmmigrate.hypervisor.rammap import MappedRam
from vmmigrate.memory import PAGE_SIZE, PageBitmap, RamLayout
from vmmigrate.ram.digest import PageHash

PAGES = 512
HASH = PageHash(b"a secret of one migration")


async def test_what_a_guest_writes_is_seen_where_its_ram_is_its_own() -> None:
    """Whatever of it was fetched to be sent; and what is looked at is not kept."""
    with open_owner(PAGES) as owner:
        ram = owner.open()
        sample = Sample(ram, HASH, ram.populated())
        await sample.look()

        for page in (2, 4, 300):
            owner.write(page)
        ram.fetch(np.asarray([(2, 1)], dtype=np.int64))
        await sample.look()
        await sample.look()

        assert [sample.pages_in(taken) for taken in sample.intervals[1:]] == [3, 0]
        assert held_pages(ram) == 1
        ram.close()


async def test_what_a_guest_writes_is_seen_where_its_ram_is_mapped() -> None:
    fd = os.memfd_create("vmmigrate-test-of-planning")
    os.ftruncate(fd, PAGES * PAGE_SIZE)
    ram = MappedRam(fd, RamLayout.for_size(PAGES * PAGE_SIZE), writable=True)
    ram.pages[::2] = 1
    sample = Sample(ram, HASH, PageBitmap.from_flags(ram.pages[:, 0] != 0))
    await sample.look()

    ram.pages[[2, 4, 300]] = 2
    await sample.look()
    await sample.look()

    assert [sample.pages_in(taken) for taken in sample.intervals[1:]] == [3, 0]
    ram.close()
