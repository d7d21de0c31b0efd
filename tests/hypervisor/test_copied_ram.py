"""RAM that only another process has: copied out of it when it is asked for, and not kept for longer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.rammap import CopiedRam
from vmmigrate.memory import PAGE_SIZE, PageBitmap, RamLayout

PAGES = 4096
# A process with private memory, of which every other page is filled with its number; the last pages were only read.
OWNER = f"""
import ctypes, mmap, sys
memory = mmap.mmap(-1, {PAGES} * {PAGE_SIZE}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(0, {PAGES} - 8, 2):
    memory[page * {PAGE_SIZE}:(page + 1) * {PAGE_SIZE}] = page.to_bytes(8, "little") * {PAGE_SIZE // 8}
assert not any(memory[page * {PAGE_SIZE}] for page in range({PAGES} - 8, {PAGES}))
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
sys.stdin.read()
"""


@dataclass
class Owner:
    process: subprocess.Popen[bytes]
    address: int

    def open(self) -> CopiedRam:
        return CopiedRam(self.process.pid, self.address, RamLayout.for_size(PAGES * PAGE_SIZE))


@pytest.fixture(scope="module")
def owner() -> Iterator[Owner]:
    command = [sys.executable, "-c", OWNER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield Owner(process, int(process.stdout.readline()))
        finally:
            process.kill()


def held_pages(ram: CopiedRam) -> int:
    return os.fstat(ram._fd).st_blocks * 512 // PAGE_SIZE


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sets(st.integers(0, PAGES - 1), max_size=200), min_size=1, max_size=3))
def test_what_was_fetched_last_is_as_its_process_has_it_and_nothing_else_is_kept(
    owner: Owner, fetches: list[set[int]]
) -> None:
    ram = owner.open()
    try:
        for wanted in fetches:
            numbers = sorted(wanted)
            flags = np.zeros(PAGES, dtype=np.bool_)
            flags[numbers] = True

            ram.fetch(PageBitmap.from_flags(flags).runs())

            assert held_pages(ram) == len(numbers)
            for page in numbers:
                filled = page % 2 == 0 and page < PAGES - 8
                assert (ram.pages[page] == (page if filled else 0)).all()
    finally:
        ram.close()


def test_all_of_it_at_once_is_fetched_in_pieces(owner: Owner) -> None:
    ram = owner.open()
    try:
        ram.fetch(np.asarray([(0, PAGES)], dtype=np.int64))

        assert ram.pages[2::2][: (PAGES - 10) // 2, 0].tolist() == list(range(2, PAGES - 8, 2))
    finally:
        ram.close()


def test_pages_that_were_written_are_there_and_pages_that_were_only_read_are_not(owner: Owner) -> None:
    ram = owner.open()
    try:
        assert ram.populated().page_numbers().tolist() == list(range(0, PAGES - 8, 2))
        assert held_pages(ram) == 0
    finally:
        ram.close()


def test_one_page_is_read_beside_what_was_fetched(owner: Owner) -> None:
    ram = owner.open()
    try:
        ram.fetch(np.asarray([(4, 1)], dtype=np.int64))

        assert ram.page_now(6)[:8] == (6).to_bytes(8, "little")
        assert held_pages(ram) == 1
        assert (ram.pages[4] == 4).all()
    finally:
        ram.close()


def test_a_process_that_has_ended_or_maps_less_is_told() -> None:
    command = [sys.executable, "-c", OWNER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        address = int(process.stdout.readline())
        one = np.asarray([(0, 1)], dtype=np.int64)
        nowhere = CopiedRam(process.pid, 1 << 46, RamLayout.for_size(PAGES * PAGE_SIZE))
        ram = CopiedRam(process.pid, address, RamLayout.for_size(PAGES * PAGE_SIZE))
        with pytest.raises(HypervisorError, match="cannot read guest RAM of process") as refused:
            nowhere.fetch(one)
        assert refused.value.code == "ram_read"
        process.kill()
        process.wait()

        with pytest.raises(HypervisorError, match="cannot read guest RAM of process"):
            ram.fetch(one)

        ram.close()
        ram.close()
        nowhere.close()
        with pytest.raises(HypervisorError, match="let go"):
            ram.fetch(one)
