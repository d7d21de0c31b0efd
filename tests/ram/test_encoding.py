"""Zero pages are found, whatever the one word is that makes a page none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmigrate.ram.encoding import nonzero

WORDS = 512


@pytest.mark.parametrize("word", range(WORDS))
def test_every_single_word_makes_a_page_nonzero(word: int) -> None:
    """Also when every page has but one, so that a look at some words shows nothing."""
    pages = np.zeros((3, WORDS), dtype=np.uint64)
    pages[1, word] = 1 << 63

    assert nonzero(pages).tolist() == [False, True, False]
    assert nonzero(pages[1:2]).tolist() == [True]


@given(st.lists(st.one_of(st.none(), st.integers(0, WORDS - 1)), max_size=300))
def test_pages_are_judged_one_by_one(words: list[int | None]) -> None:
    pages = np.zeros((len(words), WORDS), dtype=np.uint64)
    for page, word in enumerate(words):
        if word is not None:
            pages[page, word] = 7

    assert nonzero(pages).tolist() == [word is not None for word in words]
