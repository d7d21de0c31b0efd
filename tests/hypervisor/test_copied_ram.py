"""RAM that only another process has: copied out of it when it is asked for, and not kept for longer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hypervisor.ram_owner import READ_ONLY_PAGES, Owner, held_pages, open_owner
from vmmigrate.errors import HypervisorError
from vmmigrate.memory import PageBitmap

PAGES = 4096


@pytest.fixture(scope="module")
def owner() -> Iterator[Owner]:
    with open_owner(PAGES) as owner:
        yield owner


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
                filled = page % 2 == 0 and page < PAGES - READ_ONLY_PAGES
                assert (ram.pages[page] == (page if filled else 0)).all()
    finally:
        ram.close()


def test_all_of_it_at_once_is_fetched_in_pieces(owner: Owner) -> None:
    ram = owner.open()
    try:
        ram.fetch(np.asarray([(0, PAGES)], dtype=np.int64))

        assert ram.pages[2::2][: (PAGES - READ_ONLY_PAGES - 2) // 2, 0].tolist() == list(
            range(2, PAGES - READ_ONLY_PAGES, 2)
        )
    finally:
        ram.close()


def test_pages_that_were_written_are_there_and_pages_that_were_only_read_are_not(owner: Owner) -> None:
    ram = owner.open()
    try:
        assert ram.populated().page_numbers().tolist() == list(range(0, PAGES - READ_ONLY_PAGES, 2))
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


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, PAGES - 1), max_size=2000))
def test_a_sample_is_as_its_process_has_it_now_beside_what_was_fetched(owner: Owner, wanted: set[int]) -> None:
    ram = owner.open()
    numbers = np.asarray(sorted(wanted), dtype=np.int64)
    try:
        ram.fetch(np.asarray([(4, 1)], dtype=np.int64))

        sampled = ram.sample(numbers)

        assert sampled.shape == (len(numbers), 512)
        filled = (numbers % 2 == 0) & (numbers < PAGES - READ_ONLY_PAGES)
        assert (sampled == np.where(filled, numbers, 0).astype(np.uint64)[:, None]).all()
        assert held_pages(ram) == 1
    finally:
        ram.close()


def test_a_process_that_has_ended_or_maps_less_is_told() -> None:
    with open_owner(PAGES) as owner:
        one = np.asarray([(0, 1)], dtype=np.int64)
        nowhere, ram = owner.open(1 << 46), owner.open()
        with pytest.raises(HypervisorError, match="cannot read guest RAM of process") as refused:
            nowhere.fetch(one)
        assert refused.value.code == "ram_read"
        owner.end()

        with pytest.raises(HypervisorError, match="cannot read guest RAM of process"):
            ram.fetch(one)
        with pytest.raises(HypervisorError, match="cannot read guest RAM of process"):
            ram.sample(one[0])

        ram.close()
        ram.close()
        nowhere.close()
        with pytest.raises(HypervisorError, match="let go"):
            ram.fetch(one)
        with pytest.raises(HypervisorError, match="let go"):
            ram.sample(one[0])
