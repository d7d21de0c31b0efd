"""What to send: every page once, on its own stream, in pieces that fit a record."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmigrate.memory import PageBitmap, Runs, pages_in, runs_of_pages
from vmmigrate.ram.offer import cut_at, groups, runs_per_stream
from vmmigrate.ram.records import MAX_RECORD_PAGES, STRIPE_PAGES

PAGES = 5 * STRIPE_PAGES + 100


def as_runs(*runs: tuple[int, int]) -> Runs:
    return np.array(runs, dtype=np.int64).reshape(-1, 2)


@st.composite
def bitmaps(draw: st.DrawFn) -> PageBitmap:
    bitmap = PageBitmap(PAGES)
    for first in draw(st.lists(st.integers(0, PAGES - 1), max_size=8)):
        bitmap.add_run(first, draw(st.integers(1, min(PAGES - first, 3 * STRIPE_PAGES))))
    return bitmap


@given(bitmaps(), st.integers(1, 7))
def test_the_runs_of_all_streams_are_exactly_the_pages_each_once(bitmap: PageBitmap, streams: int) -> None:
    shares = runs_per_stream(bitmap, streams)

    sent = Counter(page for runs in shares for page in pages_in(runs).tolist())
    assert len(shares) == streams
    assert set(sent) == set(bitmap.page_numbers().tolist())
    assert set(sent.values()) <= {1}


@given(bitmaps(), st.integers(1, 7))
def test_each_run_lies_within_one_stripe_of_its_stream_and_fits_a_record(bitmap: PageBitmap, streams: int) -> None:
    for stream, runs in enumerate(runs_per_stream(bitmap, streams)):
        last = runs[:, 0] + runs[:, 1] - 1
        assert (runs[:, 0] // STRIPE_PAGES == last // STRIPE_PAGES).all()
        assert (runs[:, 0] // STRIPE_PAGES % streams == stream).all()
        assert (runs[:, 1] <= MAX_RECORD_PAGES).all()
        assert (runs[1:, 0] > last[:-1]).all()


@given(bitmaps(), bitmaps(), st.integers(1, 7))
def test_a_page_falls_to_the_same_stream_in_every_round(first: PageBitmap, second: PageBitmap, streams: int) -> None:
    """So that a later copy never loses to an earlier one."""
    stream_of: dict[int, int] = {}
    for bitmap in (first, second):
        for stream, runs in enumerate(runs_per_stream(bitmap, streams)):
            for page in pages_in(runs).tolist():
                assert stream_of.setdefault(page, stream) == stream


def test_nothing_dirty_is_nothing_to_send() -> None:
    assert [len(runs) for runs in runs_per_stream(PageBitmap(PAGES), 3)] == [0, 0, 0]


@given(bitmaps(), st.integers(MAX_RECORD_PAGES, 2 * MAX_RECORD_PAGES))
def test_groups_hold_at_most_a_record_and_keep_all_runs_in_order(bitmap: PageBitmap, max_pages: int) -> None:
    (runs,) = runs_per_stream(bitmap, 1)

    found = list(groups(runs, max_pages))

    assert all(len(group) for group in found)
    assert all(group[:, 1].sum() <= max_pages for group in found)
    assert [run for group in found for run in group.tolist()] == runs.tolist()
    for group, following in itertools.pairwise(found):
        assert group[:, 1].sum() + following[0, 1] > max_pages, "no group could have taken one run more"


def test_a_group_is_a_full_record_by_default() -> None:
    runs = as_runs((0, 200), (300, 56), (400, 1), (600, 256))

    assert [len(group) for group in groups(runs)] == [2, 1, 1]


def test_no_runs_make_no_groups() -> None:
    assert list(groups(as_runs())) == []


@pytest.mark.parametrize("runs", [as_runs((0, 257)), as_runs((0, 1), (512, 300), (1024, 1))])
def test_a_run_longer_than_a_record_is_our_own_mistake(runs: Runs) -> None:
    with pytest.raises(ValueError, match="a record holds 256"):
        list(groups(runs))


@given(bitmaps(), st.lists(st.integers(0, PAGES), max_size=4))
def test_cut_at_cuts_at_the_boundaries_and_nowhere_else(bitmap: PageBitmap, boundaries: list[int]) -> None:
    runs = bitmap.runs()

    pieces = cut_at(runs, tuple(boundaries))

    assert pages_in(pieces).tolist() == bitmap.page_numbers().tolist()
    assert (pieces[:, 1] > 0).all()
    assert set(pieces[:, 0].tolist()) - set(runs[:, 0].tolist()) <= set(boundaries)
    for boundary in boundaries:
        assert not ((pieces[:, 0] < boundary) & (pieces[:, 0] + pieces[:, 1] > boundary)).any()


def test_cut_at_leaves_its_input_alone() -> None:
    runs = as_runs((0, 10))

    assert cut_at(runs, (4,)).tolist() == [[0, 4], [4, 6]]
    assert runs.tolist() == [[0, 10]]


def test_runs_of_no_pages_are_no_runs() -> None:
    assert runs_of_pages(np.empty(0, dtype=np.int64)).shape == (0, 2)
