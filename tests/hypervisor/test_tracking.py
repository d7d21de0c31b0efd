"""Dirty tracking on its own: the probe, the kernel calls, and life without privileges."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmigrate.hypervisor import kernel
from vmmigrate.hypervisor.dirty import probe_kernel_tracking
from vmmigrate.hypervisor.embedded.guestram import GuestMemory
from vmmigrate.memory import MIB, PAGE_SIZE, PageBitmap, RamLayout, flags_of

REPOSITORY = Path(__file__).parents[2]
_UNPRIVILEGED = """
import ctypes, os
from vmmigrate.hypervisor.dirty import probe_kernel_tracking
os.setgid(65534); os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # as a process has it that began as this user: its /proc files are its own
print(probe_kernel_tracking())
"""


@pytest.mark.required
def test_the_kernel_tracks_without_privileges() -> None:
    if os.geteuid() or probe_kernel_tracking():
        pytest.skip(f"needs root to give it up, and a kernel that tracks: {probe_kernel_tracking()}")

    said = subprocess.run(
        [sys.executable, "-c", _UNPRIVILEGED], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout

    assert said == "\n", "the reason why not is empty"


@pytest.mark.required
def test_a_scan_reports_exactly_what_was_written_however_many_runs_there_are() -> None:
    """More runs than one call of PAGEMAP_SCAN can return."""
    if probe_kernel_tracking():
        pytest.skip(probe_kernel_tracking())
    pages = 40_000
    memory = GuestMemory(RamLayout.for_size(pages * PAGE_SIZE), want_kernel_tracking=True)
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        assert memory.uffd is not None
        kernel.write_protect(memory.uffd, memory.address, pages * PAGE_SIZE, on=True)
        memory.pages[::2, 0] = 1
        runs = kernel.take_written(pagemap, memory.address, pages * PAGE_SIZE)
        again = kernel.take_written(pagemap, memory.address, pages * PAGE_SIZE)
    finally:
        os.close(pagemap)
        memory.close()

    assert PageBitmap.from_runs(pages, runs).page_numbers().tolist() == list(range(0, pages, 2))
    assert len(again) == 0


def test_extents_are_found_without_filling_holes() -> None:
    memory = GuestMemory(RamLayout.for_size(8 * MIB), want_kernel_tracking=False)
    try:
        memory.pages[[0, 3, 4, 2047], 0] = 1
        runs = kernel.populated_runs(memory.fd, 8 * MIB)
        kernel.punch_holes(memory.fd, [(3, 2)])
        after = kernel.populated_runs(memory.fd, 8 * MIB)
    finally:
        memory.close()

    assert runs.tolist() == [[0, 1], [3, 2], [2047, 1]]
    assert after.tolist() == [[0, 1], [2047, 1]]


def test_nobody_can_cut_guest_ram_short() -> None:
    memory = GuestMemory(RamLayout.for_size(MIB), want_kernel_tracking=False)
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, 0)
    finally:
        memory.close()


def test_software_tracking_notes_what_was_written_since_it_was_asked_last() -> None:
    memory = GuestMemory(RamLayout.for_size(MIB), want_kernel_tracking=False)
    try:
        memory.rewrite(np.array([1]), np.ones((1, 512), dtype=np.uint64))
        memory.start_noting()
        memory.rewrite(np.array([2, 9]), np.ones((2, 512), dtype=np.uint64))
        memory.write_words(0, 4, 1, 2)
        memory.rewrite_words(np.array([200]), 8, np.ones((1, 8), dtype=np.uint64))

        assert memory.take_noted().page_numbers().tolist() == [0, 2, 9, 200]
        assert memory.take_noted().is_empty()
    finally:
        memory.close()


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_runs_and_flags_are_two_spellings_of_one_set(flags: list[bool]) -> None:
    bitmap = PageBitmap.from_flags(np.array(flags))

    assert flags_of(len(flags), bitmap.runs()).tolist() == flags
