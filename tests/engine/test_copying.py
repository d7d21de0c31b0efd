"""What is still to be sent, from round to round."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vmmigrate.engine.copying import Copy
from vmmigrate.memory import PageBitmap
from vmmigrate.ram.convergence import Convergence
from vmmigrate.ram.digest import Condenser, PageHash

PAGES = 64

sets_of_pages = st.binary(min_size=PAGES // 8, max_size=PAGES // 8).map(lambda raw: PageBitmap.from_bytes(PAGES, raw))


def copy_of(pending: PageBitmap) -> Copy:
    """A copy whose first round is of the pages *pending*."""
    table = np.zeros(PAGES, dtype=np.uint64)
    condenser = Condenser(table, "multilinear-64-tree")
    return Copy(PageHash(b"a secret"), table, condenser, Convergence(0.0), pending=pending)


@given(sets_of_pages, sets_of_pages)
def test_what_a_round_ended_without_is_in_the_next_one_once(unsent: PageBitmap, written: PageBitmap) -> None:
    copy = copy_of(PageBitmap.full(PAGES))
    copy.unsent = unsent.copy()

    copy.next_round(written.copy())

    assert (copy.number, copy.pending) == (2, written | unsent)
    copy.next_round(PageBitmap(PAGES))
    assert (copy.number, copy.pending) == (3, PageBitmap(PAGES))
