"""RAM that is made ready before it is written: only what was touched, nothing that landed lost, nothing left over."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from vmmigrate.engine.populating import CHUNK_PAGES, Populating
from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.rammap import MappedRam
from vmmigrate.memory import PAGE_SIZE, PageBitmap, RamLayout

PAGES = 2 * CHUNK_PAGES
PLENTY = 1 << 40


class Arriving:
    """RAM of an arriving guest, and what is noted of it."""

    def __init__(self, extents: PageBitmap, available_bytes: Callable[[], int] = lambda: PLENTY) -> None:
        fd = os.memfd_create("vmmigrate-test-of-populating")
        os.ftruncate(fd, PAGES * PAGE_SIZE)
        self.ram = MappedRam(fd, RamLayout.for_size(PAGES * PAGE_SIZE), writable=True)
        self.written = np.zeros(PAGES, dtype=np.bool_)
        self.populating = Populating(self.ram, extents, self.written, available_bytes)

    def land(self, page: int) -> None:
        self.written[page] = True
        self.ram.pages[page] = page + 1


@pytest.fixture
def arriving() -> Iterator[Callable[..., Arriving]]:
    opened: list[Arriving] = []

    def open_arriving(extents: PageBitmap, **options: Callable[[], int]) -> Arriving:
        opened.append(Arriving(extents, **options))
        return opened[-1]

    yield open_arriving
    for one in opened:
        one.ram.close()


def some_pages(*pages: int) -> PageBitmap:
    bitmap = PageBitmap(PAGES)
    for page in pages:
        bitmap.add_run(page, 1)
    return bitmap


sets_of_pages = st.frozensets(st.integers(0, PAGES - 1), max_size=20)


@given(touched=sets_of_pages, before=sets_of_pages, after=sets_of_pages)
def test_in_the_end_what_landed_is_there_and_nothing_else_is(
    touched: frozenset[int], before: frozenset[int], after: frozenset[int]
) -> None:
    one = Arriving(some_pages(*touched))
    try:
        for page in before:
            one.land(page)
        trio.run(one.populating.run)
        assert (some_pages(*touched) - one.ram.populated()).is_empty()
        for page in after:
            one.land(page)

        trio.run(one.populating.settle)

        landed = before | after
        assert one.ram.populated() == some_pages(*landed)
        assert all((one.ram.pages[page] == page + 1).all() for page in landed)
    finally:
        one.ram.close()


async def test_settling_makes_an_end_of_populating_and_needs_to_be_done_only_once(
    arriving: Callable[..., Arriving],
) -> None:
    one = arriving(PageBitmap.full(PAGES))

    await one.populating.settle()
    await one.populating.run()
    await one.populating.settle()

    assert one.ram.populated().is_empty()


async def test_after_a_cut_link_it_goes_on_with_the_next_chunk(arriving: Callable[..., Arriving]) -> None:
    asked: list[int] = []
    scope = trio.CancelScope()

    def cancel_at_the_first() -> int:
        asked.append(1)
        trio.from_thread.run_sync(scope.cancel)
        return PLENTY

    one = arriving(PageBitmap.full(PAGES), available_bytes=cancel_at_the_first)
    with scope:
        await one.populating.run()
    assert one.ram.populated().count() == CHUNK_PAGES  # what was begun is finished

    await one.populating.run()

    assert one.ram.populated() == PageBitmap.full(PAGES)
    assert len(asked) == 2


async def test_a_host_with_little_memory_left_populates_no_more(arriving: Callable[..., Arriving]) -> None:
    answers = iter([PLENTY, 130 << 20])
    one = arriving(PageBitmap.full(PAGES), available_bytes=partial(next, answers))

    await one.populating.run()

    assert one.ram.populated().count() == CHUNK_PAGES


async def test_memory_that_cannot_be_populated_is_no_failure_and_what_is_there_is_given_back(
    arriving: Callable[..., Arriving], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel before 5.14 knows no such request."""
    one = arriving(PageBitmap.full(PAGES))
    really = one.ram.populate

    def half(first: int, count: int) -> None:
        really(first, count // 2)
        raise HypervisorError("cannot populate guest RAM", code="ram_populate")

    monkeypatch.setattr(one.ram, "populate", half)

    await one.populating.run()
    await one.populating.settle()

    assert one.ram.populated().is_empty()


async def test_what_has_landed_whole_is_not_asked_for_again(arriving: Callable[..., Arriving]) -> None:
    def never() -> int:
        raise AssertionError("nothing was to be populated")

    one = arriving(PageBitmap.full(PAGES), available_bytes=never)
    one.written[:] = True

    await one.populating.run()
