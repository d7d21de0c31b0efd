"""Guest RAM in the daemon: it is given back when the guest goes, whoever still looks at it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor import kernel
from vmmigrate.hypervisor.rammap import HUGE_BYTES, MappedRam, probe_huge_pages
from vmmigrate.memory import PAGE_SIZE, PageBitmap, RamLayout

PAGES = 16
NAME = "vmmigrate-test-of-rammap"


@pytest.fixture
def memory() -> Iterator[int]:
    """A memfd of 16 pages, all of ones, and a second descriptor of it to close."""
    fd = os.memfd_create(NAME)
    os.write(fd, b"\xff" * PAGES * PAGE_SIZE)
    yield os.dup(fd)
    os.close(fd)


def is_mapped() -> bool:
    return NAME in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("writable", [False, True])
def test_a_view_that_somebody_still_holds_does_not_keep_the_ram_of_a_guest_that_is_gone(
    memory: int, writable: bool
) -> None:
    """An error that was raised while pages were sent holds such a view until the garbage collector comes by."""
    ram = MappedRam(memory, RamLayout.for_size(PAGES * PAGE_SIZE), writable=writable)
    held, pages = ram.view, ram.pages
    assert held[0] == 0xFF
    assert is_mapped()

    ram.close()

    assert not is_mapped()
    assert bytes(held) == bytes(PAGES * PAGE_SIZE)
    assert not pages.any()
    with pytest.raises(HypervisorError, match="let go"):
        _ = ram.pages


def test_what_was_handed_out_before_does_not_write_the_ram_of_a_guest_that_runs(memory: int) -> None:
    """Nobody should; whoever does all the same, writes to nothing."""
    ram = MappedRam(memory, RamLayout.for_size(PAGES * PAGE_SIZE), writable=True)
    held, pages = ram.view, ram.pages

    ram.make_read_only()
    ram.make_read_only()
    assert ram.pages.all()
    ram.drop_retired()
    ram.drop_retired()
    held[:4] = b"abcd"
    pages[3] = 7

    assert os.pread(memory, PAGES * PAGE_SIZE, 0) == b"\xff" * PAGES * PAGE_SIZE
    assert ram.pages.all()
    ram.close()
    assert not is_mapped()


def test_a_retired_mapping_goes_with_the_others(memory: int) -> None:
    ram = MappedRam(memory, RamLayout.for_size(PAGES * PAGE_SIZE), writable=True)
    held = ram.view
    ram.make_read_only()

    ram.close()

    assert not is_mapped()
    assert not any(held)


def test_ram_is_written_and_read_through_its_views_until_it_is_made_read_only(memory: int) -> None:
    ram = MappedRam(memory, RamLayout.for_size(PAGES * PAGE_SIZE), writable=True)
    ram.view[:4] = b"abcd"

    ram.make_read_only()

    assert os.pread(memory, 4, 0) == b"abcd"
    with pytest.raises(TypeError):
        ram.view[:4] = b"efgh"
    ram.close()
    ram.close()


def test_populating_keeps_what_is_there(memory: int) -> None:
    ram = MappedRam(memory, RamLayout.for_size(PAGES * PAGE_SIZE), writable=True)
    ram.punch(PageBitmap.from_runs(PAGES, np.array([[4, 8]])))
    assert ram.populated().count() == PAGES - 8

    ram.populate(2, 6)

    assert ram.populated().page_numbers().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15]
    assert ram.pages[:4].all()
    assert not ram.pages[4:8].any()
    ram.close()


def test_ram_of_a_guest_that_runs_is_neither_populated_nor_punched(memory: int) -> None:
    ram = MappedRam(memory, RamLayout.for_size(PAGES * PAGE_SIZE), writable=True)
    ram.make_read_only()

    for change in (lambda: ram.populate(0, 1), lambda: ram.punch(PageBitmap.full(PAGES))):
        with pytest.raises(HypervisorError) as refusal:
            change()
        assert refusal.value.code == "ram_read_only"

    assert ram.pages.all()
    ram.close()


def test_what_is_asked_of_the_file_after_closing_is_refused(memory: int) -> None:
    """Its number may be another guest's by then."""
    ram = MappedRam(memory, RamLayout.for_size(PAGES * PAGE_SIZE), writable=True)
    ram.close()

    for use in (ram.populated, lambda: ram.populate(0, 1), lambda: ram.punch(PageBitmap.full(PAGES))):
        with pytest.raises(HypervisorError) as refusal:
            use()
        assert refusal.value.code == "guest_detached"


def filling(memory: int) -> MappedRam:
    """RAM of which pages 4 to 11 are not there."""
    ram = MappedRam(memory, RamLayout.for_size(PAGES * PAGE_SIZE), writable=True)
    if not ram.fills:
        pytest.skip("the kernel fills no pages of shared memory")
    ram.punch(PageBitmap.from_runs(PAGES, np.array([[4, 8]])))
    return ram


def contents_of(pages: int) -> npt.NDArray[np.uint64]:
    return np.arange(1, pages * PAGE_SIZE // 8 + 1, dtype=np.uint64).reshape(pages, -1)


def test_pages_that_are_not_there_are_filled(memory: int) -> None:
    ram, contents = filling(memory), contents_of(5)

    assert ram.fill(5, contents) == 5

    assert ram.populated().page_numbers().tolist() == [0, 1, 2, 3, *range(5, 10), 12, 13, 14, 15]
    assert (ram.pages[5:10] == contents).all()
    assert os.pread(memory, contents.nbytes, 5 * PAGE_SIZE) == contents.tobytes()
    assert not ram.pages[4].any()
    ram.close()


@pytest.mark.parametrize(("first", "done"), [(9, 3), (0, 0), (13, 0)])
def test_filling_ends_at_a_page_that_is_there_and_leaves_it_as_it_is(memory: int, first: int, done: int) -> None:
    """Whoever fills has to write the rest; also what lies beyond the end is not touched."""
    ram, contents = filling(memory), contents_of(6)

    assert ram.fill(first, contents) == done

    assert (ram.pages[first : first + done] == contents[:done]).all()
    assert ram.pages[12:].all()
    assert ram.pages[:4].all()
    ram.close()


def test_a_page_that_was_filled_is_written_and_a_hole_read_as_ever(memory: int) -> None:
    """What fills catches no fault: nobody would answer it."""
    ram = filling(memory)
    ram.fill(4, contents_of(2))

    ram.pages[4] = 3
    ram.pages[8] = 4

    assert (ram.pages[4] == 3).all()
    assert (ram.pages[8] == 4).all()
    assert not ram.pages[9].any()
    ram.close()


def test_ram_of_a_guest_that_runs_is_not_filled_and_what_filled_it_is_closed(memory: int) -> None:
    before = set(os.listdir("/proc/self/fd"))
    ram = filling(memory)

    ram.make_read_only()

    assert not ram.fills
    assert ram.fill(5, contents_of(1)) == 0
    assert 5 not in ram.populated().page_numbers()
    ram.drop_retired()
    assert set(os.listdir("/proc/self/fd")) <= before
    ram.close()


def test_where_the_kernel_fills_nothing_ram_is_mapped_all_the_same(
    memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container may forbid userfaultfd."""

    def forbidden(address: int, size_bytes: int) -> int:
        raise PermissionError(errno.EPERM, "userfaultfd")

    monkeypatch.setattr(kernel, "open_filler", forbidden)
    ram = MappedRam(memory, RamLayout.for_size(PAGES * PAGE_SIZE), writable=True)

    assert not ram.fills
    assert ram.fill(0, contents_of(1)) == 0
    ram.close()


def test_huge_pages_are_mapped_where_the_kernel_gives_them() -> None:
    """What Capabilities say is what happens: asked for, and seen in the page tables."""
    found = probe_huge_pages()
    if not found.available:
        pytest.skip(found.reason)
    size_bytes = 4 * HUGE_BYTES
    fd = os.memfd_create(NAME)
    os.ftruncate(fd, size_bytes)
    ram = MappedRam(fd, RamLayout.for_size(size_bytes), writable=True, huge_pages=True)

    ram.populate(0, ram.layout.pages)

    assert kernel.huge_bytes(ram.pages.ctypes.data, size_bytes) > 0
    ram.close()


def test_a_kernel_without_huge_pages_is_named_with_its_reason() -> None:
    found = probe_huge_pages()

    assert found.available or "shmem_enabled" in found.reason or "kernel" in found.reason
