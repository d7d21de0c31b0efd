"""One 64-bit digest per page, with secret weights per migration: finds pages that arrived wrong or not at all.

Problem: hashing all of RAM with a cryptographic hash costs more than encrypting it. What has to be found here is not a
forger (the transport authenticates) but a lost, stale or misplaced page, in RAM that a *guest* may have written with
intent. A universal hash with weights that the guest cannot know is enough, and runs at memory speed in NumPy.

Rule: digest = sum(x[i] * a[i]) + sum((x[i] >> 32) * b[i]) mod 2^64 over the 512 words of a page. The plain sum alone
would be blind to differences in the top bits only (2^63 * a keeps just the lowest bit of a: two flipped sign bits
cancel with probability 1/2); the second sum brings the upper half down, so that any change is missed with probability
at most about 2^-32. A zero page, and so a hole, has digest zero.

`native.c` computes the same in a third of the time, where it could be built; NumPy is the reference.

Source: multilinear hashing, Lemire & Kaser, "Strongly universal string hashing is fast" (2014).
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from vmmigrate.memory import PAGE_SIZE
from vmmigrate.ram import native

WORDS_PER_PAGE = PAGE_SIZE // 8

# 64 pages are 256 KiB: the second sum finds the words still in the second-level cache.
_PAGES_PER_STEP = 64
_HALF = np.uint64(32)

Pages = npt.NDArray[np.uint64]  # shape (pages, 512)
Digests = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


class PageHash:
    """The hash function of one migration.

    Args:
        secret: Known to source and destination of this migration only; any length.
        use_native: Machine code where there is some; the results are the same.
    """

    def __init__(self, secret: bytes, *, use_native: bool = True) -> None:
        stream = hashlib.shake_256(b"vmmigrate page digest v1" + secret).digest(2 * PAGE_SIZE)
        weights = np.frombuffer(stream, dtype="<u8").astype(np.uint64)
        self._low, self._high = weights[:WORDS_PER_PAGE], weights[WORDS_PER_PAGE:]
        self._native = native.NativeHash(self._low, self._high) if native.IS_THERE and use_native else None

    def of(self, pages: Pages, numbers: Numbers | None = None) -> Digests:
        """The digests of *pages*, shape (n, 512), or of those of them that have *numbers*, in that order."""
        return self.look(pages, numbers)[0]

    def look(self, pages: Pages, numbers: Numbers | None = None) -> tuple[Digests, Flags]:
        """The digests as `of` gives them, and for each page whether it holds anything but zeros.

        *pages* may be written meanwhile: a page is judged as it was at one moment or another.
        """
        if numbers is not None and len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(pages):
            raise IndexError(f"pages {numbers.min()}..{numbers.max()} of {len(pages)}")
        if self._native is not None and pages.flags.c_contiguous:
            return self._native.look(pages, numbers)
        chosen = pages if numbers is None else pages[numbers]
        digests = self._by_numpy(chosen)
        # A page of zeros has digest zero; hardly any other has.
        flags = digests != 0
        flags[~flags] = chosen[~flags].any(axis=1)
        return digests, flags

    def _by_numpy(self, pages: Pages) -> Digests:
        digests = np.empty(len(pages), dtype=np.uint64)
        # One place for all upper halves: fresh memory for each step would push out of the cache what is hashed next.
        halves = np.empty((min(len(pages), _PAGES_PER_STEP), WORDS_PER_PAGE), dtype=np.uint64)
        for start in range(0, len(pages), _PAGES_PER_STEP):
            step = pages[start : start + _PAGES_PER_STEP]
            upper = np.right_shift(step, _HALF, out=halves[: len(step)])
            of_step = digests[start : start + len(step)]
            np.einsum("ij,j->i", step, self._low, out=of_step)
            of_step += np.einsum("ij,j->i", upper, self._high)
        return digests


def condense(table: Digests) -> bytes:
    """32 bytes for a whole table of page digests."""
    return hashlib.sha256(np.ascontiguousarray(table, dtype="<u8").data).digest()


WHOLE, TREE = "multilinear-64", "multilinear-64-tree"  # words of the negotiation
BLOCK_PAGES = 4096


class Condenser:
    """What the two sides compare at Ready: 32 bytes for a whole table of page digests, which goes on changing.

    Rule: for `multilinear-64`, `condense(table)`. For `multilinear-64-tree`, SHA-256 over the SHA-256 of each block of
    4096 entries (the last one may be shorter): then only blocks that changed have to be looked at again, and what is
    left for the pause does not grow with the guest.

    Args:
        table: Is looked at again by `refresh` and, for `multilinear-64`, by `digest`.
        word: What was negotiated.
    """

    def __init__(self, table: Digests, word: str) -> None:
        self._table = table
        self._is_tree = word == TREE
        self._starts = np.arange(0, len(table), BLOCK_PAGES)
        zeros = condense(np.zeros(min(BLOCK_PAGES, len(table)), dtype=np.uint64))
        self._blocks = [zeros] * len(self._starts)
        if len(table) % BLOCK_PAGES:
            self._blocks[-1:] = [condense(np.zeros(len(table) % BLOCK_PAGES, dtype=np.uint64))]

    def refresh(self, touched: Flags) -> None:
        """Entries changed where *touched*, one flag for each, says so. About 2 ms for a GiB of guest RAM, all of it.

        Entries that change meanwhile have to be told again, afterwards.
        """
        if not self._is_tree or not len(touched):
            return
        for block in np.flatnonzero(np.logical_or.reduceat(touched, self._starts)).tolist():
            start = block * BLOCK_PAGES
            self._blocks[block] = condense(self._table[start : start + BLOCK_PAGES])

    def digest(self) -> bytes:
        """Of the table as it was last told; at the beginning it is all zero."""
        return hashlib.sha256(b"".join(self._blocks)).digest() if self._is_tree else condense(self._table)


class RamDigest:
    """SHA-256 of a guest's whole RAM: what `--verify full` compares, and what records show.

    Rule: SHA-256(SHA-256(all pages that are not zero, ascending) + bitmap of those pages). A page of zeros and a page
    that was never touched are the same memory, so they give the same digest, and holes need not be read (reading a
    hole of a shared mapping would allocate it).
    """

    def __init__(self, pages: int) -> None:
        self._content = hashlib.sha256()
        self._flags = np.zeros(pages, dtype=np.bool_)

    def update(self, first_page: int, pages: npt.NDArray[np.uint64]) -> None:
        """Take note of *pages*, shape (n, 512); pages must come in ascending order, and skipped ones count as zero."""
        kept = pages.max(axis=1) != 0
        self._flags[first_page : first_page + len(pages)] = kept
        if kept.any():  # a view of nothing cannot be cast
            self._content.update(np.ascontiguousarray(pages if kept.all() else pages[kept]).data.cast("B"))

    def digest(self) -> bytes:
        bitmap = np.packbits(self._flags, bitorder="little").tobytes()
        return hashlib.sha256(self._content.digest() + bitmap).digest()
