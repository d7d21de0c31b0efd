"""Private copies of pages that were sent, so that the next time only what changed in them has to be.

A delta is new XOR old. The destination applies it to what landed before, so *old* must be exactly what was sent last:
the copy that was sent is what is kept, never another look at live memory, and a page that is sent in any other way is
dropped. A delta names the digest of its base, which the destination compares with that of its own page.

The cache is bounded and belongs to one stream, which always carries the same pages. A page has one place, by its number
within the stream, so that neighbours do not compete. Who is there stays as long as it keeps being written: under a
working set larger than the cache, a cache that always took in the newest would never be hit at all.

Source: Svärd et al., "Evaluation of delta compression techniques for efficient live migration of large virtual
machines" (VEE 2011); QEMU's XBZRLE ages its pages for the same reason.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from vmmigrate.memory import PAGE_SIZE
from vmmigrate.ram.records import STRIPE_PAGES

Pages = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_NOBODY: Final = -1
SAMPLE_PAGES: Final = 16
TELLING_PAGES: Final = 8  # of a sample, at least
_KEPT_ROUNDS: Final = 2  # a page that was not written for so many rounds makes room


class DeltaCache:
    """The copies of one stream.

    Args:
        size_bytes: For the pages themselves; what they take is only touched when it is needed.
        streams: Of the migration: every n-th stripe belongs to this one.

    Attributes:
        held: How many copies there are.
    """

    def __init__(self, size_bytes: int, streams: int) -> None:
        self._slots = size_bytes // PAGE_SIZE
        self._streams = streams
        self._pages: Pages = np.empty((self._slots, PAGE_SIZE // 8), dtype=np.uint64)
        self._holder: Numbers = np.full(self._slots, _NOBODY, dtype=np.int64)
        self._round = np.zeros(self._slots, dtype=np.int32)
        self.held = 0

    def holds(self, numbers: Numbers) -> Flags:
        """Which of the pages *numbers* there is a copy of."""
        if not self.held:
            return np.zeros(len(numbers), dtype=np.bool_)
        return np.asarray(self._holder[self._slots_of(numbers)] == numbers)

    def xor(self, numbers: Numbers, pages: Pages) -> None:
        """Turn *pages*, the new content of *numbers*, all of which are held, into what changed in them."""
        pages ^= self._pages[self._slots_of(numbers)]

    def keep(self, numbers: Numbers, pages: Pages, round_number: int) -> None:
        """The pages *numbers* were sent as *pages*: keep copies where there is room, forget what they replace."""
        if not self._slots or not len(numbers):
            return
        slots = self._slots_of(numbers)
        holders = self._holder[slots]
        free = (holders == numbers) | (holders == _NOBODY) | (self._round[slots] < round_number - _KEPT_ROUNDS)
        # Two of them may want one place: the first one gets it.
        chosen = np.flatnonzero(free)[np.unique(slots[free], return_index=True)[1]]
        self.held += int((holders[chosen] == _NOBODY).sum())
        self._holder[slots[chosen]] = numbers[chosen]
        self._round[slots[chosen]] = round_number
        self._pages[slots[chosen]] = pages[chosen]

    def drop(self, numbers: Numbers) -> None:
        """The pages *numbers* were sent in another way: copies of them are worth nothing."""
        slots = self._slots_of(numbers)
        stale = np.unique(slots[self._holder[slots] == numbers])
        self._holder[stale] = _NOBODY
        self.held -= len(stale)

    def _slots_of(self, numbers: Numbers) -> Numbers:
        within = numbers // (STRIPE_PAGES * self._streams) * STRIPE_PAGES + numbers % STRIPE_PAGES
        return np.asarray(within % self._slots)


class DeltaSample:
    """A few pages as they were when they were sent, to see what deltas would bring before copies of all are kept.

    Nothing is sent of it, so it may be of live memory.
    """

    def __init__(self) -> None:
        self._pages: Pages = np.empty((SAMPLE_PAGES, PAGE_SIZE // 8), dtype=np.uint64)
        self._numbers: Numbers = np.empty(0, dtype=np.int64)
        self._round = 0

    def is_wanted(self, round_number: int) -> bool:
        """Whether there is none, or none of whose pages has been written for a while."""
        return not len(self._numbers) or self._round < round_number - _KEPT_ROUNDS

    def may_be_in(self, first: int, last: int, round_number: int) -> bool:
        """Whether pages of it, of an earlier round, may be among those from *first* to *last*."""
        return (
            bool(len(self._numbers))
            and self._round < round_number
            and first <= self._numbers[-1]
            and (last >= self._numbers[0])
        )

    def take(self, numbers: Numbers, pages: Pages, round_number: int) -> None:
        """Remember the first few of the pages *numbers*, ascending, sent as *pages* in this round."""
        self._numbers, self._round = numbers[:SAMPLE_PAGES], round_number
        self._pages[: len(self._numbers)] = pages[: len(self._numbers)]

    def changes(self, numbers: Numbers, pages: Pages) -> Pages | None:
        """What has changed in the pages of the sample that are among *numbers*, now *pages*; it is used up then. None:
        hardly any of them are, and it goes on waiting.
        """
        _, now, before = np.intersect1d(numbers, self._numbers, assume_unique=True, return_indices=True)
        if len(now) < TELLING_PAGES:
            return None
        self._numbers = self._numbers[:0]
        return pages[now] ^ self._pages[before]
