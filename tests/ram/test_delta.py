"""The cache of sent pages: what it holds is what was sent last, it stays within its size, and hot pages stay in it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vmmigrate.memory import PAGE_SIZE
from vmmigrate.ram.delta import SAMPLE_PAGES, DeltaCache, DeltaSample
from vmmigrate.ram.records import STRIPE_PAGES

SLOTS = 8
PAGES = 6 * STRIPE_PAGES
WORDS = PAGE_SIZE // 8


def content(numbers: list[int], version: int) -> npt.NDArray[np.uint64]:
    words = np.zeros((len(numbers), WORDS), dtype=np.uint64)
    words[:, 0] = numbers
    words[:, -1] = version
    return words


def array(numbers: list[int]) -> npt.NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)


# Few pages that compete for few places, and some far away that want the same ones.
NUMBERS = st.lists(
    st.integers(0, 2 * SLOTS) | st.integers(STRIPE_PAGES, STRIPE_PAGES + 4), unique=True, max_size=12
).map(sorted)


class CacheMachine(RuleBasedStateMachine):
    """Against a plain dictionary of what was sent last."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = DeltaCache(SLOTS * PAGE_SIZE, 1)
        self.sent: dict[int, int] = {}
        self.round = 2
        self.version = 0

    @rule(numbers=NUMBERS)
    def send_from_a_copy(self, numbers: list[int]) -> None:
        self.version += 1
        self.cache.keep(array(numbers), content(numbers, self.version), self.round)
        self.sent.update(dict.fromkeys(numbers, self.version))

    @rule(numbers=NUMBERS)
    def send_from_live_memory(self, numbers: list[int]) -> None:
        self.cache.drop(array(numbers))
        for number in numbers:
            self.sent.pop(number, None)

    @rule(rounds=st.integers(1, 3))
    def begin_a_round(self, rounds: int) -> None:
        self.round += rounds

    @invariant()
    def what_is_held_is_what_was_sent_last(self) -> None:
        everything = array(list(range(STRIPE_PAGES + 8)))
        held = everything[self.cache.holds(everything)].tolist()
        change = content(held, 0)
        self.cache.xor(array(held), change)
        for number, words in zip(held, change, strict=True):
            assert words[0] == 0, f"page {number} has the copy of another"
            assert words[-1] == self.sent[number], f"page {number}"
        assert len(held) == self.cache.held <= SLOTS


TestCache = CacheMachine.TestCase


def test_a_page_that_was_sent_again_is_known_by_what_changed_in_it() -> None:
    cache = DeltaCache(SLOTS * PAGE_SIZE, 1)
    numbers = array([3, 5])
    cache.keep(numbers, content([3, 5], 7), 2)
    new = content([3, 5], 7)
    new[1, 100] = 9

    cache.xor(numbers, new)

    assert np.flatnonzero(new).tolist() == [WORDS + 100]


def test_a_working_set_larger_than_the_cache_is_hit_all_the_same() -> None:
    """A cache of the newest would be emptied by every turn just before it is asked."""
    cache, hits = DeltaCache(SLOTS * PAGE_SIZE, 1), []
    numbers = list(range(3 * SLOTS))
    for round_number in range(2, 8):
        for start in range(0, len(numbers), 4):
            piece = numbers[start : start + 4]
            hits.append(int(cache.holds(array(piece)).sum()))
            cache.keep(array(piece), content(piece, round_number), round_number)

    assert sum(hits[6:]) == 5 * SLOTS  # from the second turn on, the same eight pages


def test_pages_that_are_written_no_more_make_room() -> None:
    cache = DeltaCache(SLOTS * PAGE_SIZE, 1)
    cold, hot = list(range(SLOTS)), list(range(SLOTS, 2 * SLOTS))
    cache.keep(array(cold), content(cold, 1), 2)

    for round_number in range(3, 7):
        cache.keep(array(hot), content(hot, round_number), round_number)

    assert cache.holds(array(hot)).all()
    assert not cache.holds(array(cold)).any()


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_neighbours_of_one_stream_do_not_compete(streams: int) -> None:
    """Also over the stripes of the other streams, which it never sees."""
    slots = STRIPE_PAGES + 100
    cache = DeltaCache(slots * PAGE_SIZE, streams)
    own = [*range(STRIPE_PAGES), *range(streams * STRIPE_PAGES, streams * STRIPE_PAGES + 100)]

    cache.keep(array(own), content(own, 1), 2)

    assert cache.holds(array(own)).all()


@given(st.integers(0, PAGE_SIZE - 1))
def test_a_cache_too_small_for_a_page_holds_none(size_bytes: int) -> None:
    cache = DeltaCache(size_bytes, 1)

    cache.keep(array([1]), content([1], 1), 2)

    assert not cache.holds(array([1])).any()


def test_a_sample_finds_what_changed_in_its_pages_wherever_they_come_again() -> None:
    sample, numbers = DeltaSample(), list(range(10, 60, 2))
    sample.take(array(numbers), content(numbers, 1), 2)
    again = [9, *range(12, 34)]

    assert not sample.may_be_in(11, 58, 2)
    assert sample.may_be_in(11, 58, 3)
    assert not sample.may_be_in(100, 200, 3)
    assert sample.changes(array([10, 11, 12]), content([10, 11, 12], 3)) is None  # too few to tell
    changed = sample.changes(array(again), content(again, 3))

    assert changed is not None
    common = list(range(12, 34, 2))
    assert changed.tolist() == (content(common, 3) ^ content(common, 1)).tolist()
    assert not sample.may_be_in(11, 58, 3)
    assert sample.is_wanted(3)


def test_a_sample_makes_room_when_its_pages_are_not_written_any_more() -> None:
    sample, numbers = DeltaSample(), list(range(SAMPLE_PAGES * 2))
    assert sample.is_wanted(2)

    sample.take(array(numbers), content(numbers, 1), 2)

    assert [sample.is_wanted(number) for number in (2, 3, 4, 5)] == [False, False, False, True]
