"""Guest RAM as numbers: regions, page runs, page bitmaps. Alignment and spare bits are checked once, here.

Guest RAM is one file that holds all regions one after the other, without the holes between them. A **page number**
counts pages of that file; a **gpa** (guest physical address) is what the guest sees and what crosses the wire.
`RamLayout` turns one into the other. Everything that works on many pages is vectorised: no loop here runs per page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmmigrate.errors import UsageError

PAGE_SIZE = 4096
MIB = 1 << 20
GIB = 1 << 30

# Propolis' layout: RAM below 3 GiB, the rest from 4 GiB (the gap is for devices).
LOW_RAM_LIMIT_BYTES = 3 * GIB
HIGH_RAM_GPA = 4 * GIB
MAX_GPA = 1 << 52  # x86-64 has at most 52 physical address bits

_SPARSE_WORDS = 16  # a set with pages in fewer than one of so many words of 64 pages is a small one
_FEW_RUNS = 256
_OCTETS_OF_A_WORD = np.arange(8, dtype=np.int64)

Runs = npt.NDArray[np.int64]  # shape (n, 2): first page, number of pages; ascending, disjoint


@dataclass(frozen=True, slots=True, order=True)
class Region:
    """A piece of guest physical memory, page aligned, not empty."""

    gpa: int
    size_bytes: int

    def __post_init__(self) -> None:
        if self.gpa % PAGE_SIZE or self.size_bytes % PAGE_SIZE:
            raise UsageError(f"region {self.gpa:#x}+{self.size_bytes:#x}: not a multiple of {PAGE_SIZE} bytes")
        if self.gpa < 0 or self.size_bytes <= 0 or self.gpa + self.size_bytes > MAX_GPA:
            raise UsageError(f"region {self.gpa:#x}+{self.size_bytes:#x}: not within 0..{MAX_GPA:#x}")

    @property
    def end_gpa(self) -> int:
        return self.gpa + self.size_bytes

    @property
    def pages(self) -> int:
        return self.size_bytes // PAGE_SIZE


@dataclass(frozen=True, slots=True, order=True)
class PageRun:
    """Consecutive pages of one region, by page number."""

    first_page: int
    pages: int

    @property
    def end_page(self) -> int:
        return self.first_page + self.pages

    @property
    def offset_bytes(self) -> int:
        return self.first_page * PAGE_SIZE

    @property
    def size_bytes(self) -> int:
        return self.pages * PAGE_SIZE


class RamLayout:
    """All regions of a guest, ascending and disjoint, and the page numbers of its RAM file.

    Raises:
        UsageError: No region, or regions that overlap or are not in ascending order.
    """

    __slots__ = ("_ends", "_first_pages", "_firsts", "_starts", "pages", "regions")

    def __init__(self, regions: Iterable[Region]) -> None:
        self.regions = tuple(regions)
        if not self.regions:
            raise UsageError("guest RAM needs at least one region")
        for low, high in zip(self.regions, self.regions[1:], strict=False):
            if high.gpa < low.end_gpa:
                raise UsageError(f"regions at {low.gpa:#x} and {high.gpa:#x} overlap or are not in ascending order")
        first_pages, page = [], 0
        for region in self.regions:
            first_pages.append(page)
            page += region.pages
        self._first_pages = tuple(first_pages)
        self.pages = page
        self._firsts = np.asarray(first_pages, dtype=np.int64)
        self._starts = np.asarray([region.gpa for region in self.regions], dtype=np.int64)
        self._ends = np.asarray([region.end_gpa for region in self.regions], dtype=np.int64)

    @classmethod
    def for_size(cls, size_bytes: int) -> RamLayout:
        """The layout of a guest with *size_bytes* of RAM: below 3 GiB, the rest from 4 GiB."""
        low = min(size_bytes, LOW_RAM_LIMIT_BYTES)
        regions = [Region(0, low)]
        if size_bytes > low:
            regions.append(Region(HIGH_RAM_GPA, size_bytes - low))
        return cls(regions)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RamLayout) and self.regions == other.regions

    def __hash__(self) -> int:
        return hash(self.regions)

    @property
    def size_bytes(self) -> int:
        return self.pages * PAGE_SIZE

    def first_page(self, region: Region) -> int:
        return self._first_pages[self.regions.index(region)]

    def locate(self, gpa: int, pages: int) -> PageRun | None:
        """The run of *pages* pages at *gpa*, or None unless it is aligned and lies within one region."""
        if gpa < 0 or gpa % PAGE_SIZE or pages <= 0:
            return None
        for region, first in zip(self.regions, self._first_pages, strict=True):
            if region.gpa <= gpa and gpa + pages * PAGE_SIZE <= region.end_gpa:
                return PageRun(first + (gpa - region.gpa) // PAGE_SIZE, pages)
        return None

    def gpa_of(self, page: int) -> int:
        for region, first in zip(reversed(self.regions), reversed(self._first_pages), strict=True):
            if first <= page < self.pages:
                return region.gpa + (page - first) * PAGE_SIZE
        raise IndexError(page)

    def gpas_of(self, pages: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The addresses of many pages at once."""
        which = np.searchsorted(self._firsts, pages, side="right") - 1
        gpas: npt.NDArray[np.int64] = (pages - self._firsts[which]) * PAGE_SIZE + self._starts[which]
        return gpas

    def pages_of(self, gpas: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
        """The first page of each of many runs, or None unless every run is aligned and within one region."""
        if (gpas % PAGE_SIZE).any() or (gpas < 0).any() or (counts <= 0).any() or (counts > self.pages).any():
            return None
        which = np.searchsorted(self._starts, gpas, side="right") - 1
        if (which < 0).any() or (gpas + counts * PAGE_SIZE > self._ends[which]).any():
            return None
        pages: npt.NDArray[np.int64] = (gpas - self._starts[which]) // PAGE_SIZE + self._firsts[which]
        return pages


class PageBitmap:
    """A set of pages.

    Shape: one bit per page, the lowest page in bit 0 of byte 0; spare bits of the last byte are zero, always.
    """

    __slots__ = ("bits", "pages")

    def __init__(self, pages: int, bits: npt.NDArray[np.uint8] | None = None) -> None:
        self.pages = pages
        self.bits = np.zeros((pages + 7) // 8, dtype=np.uint8) if bits is None else bits

    @classmethod
    def full(cls, pages: int) -> PageBitmap:
        bitmap = cls(pages)
        bitmap.bits[:] = 0xFF
        bitmap._clear_spare_bits()
        return bitmap

    @classmethod
    def from_bytes(cls, pages: int, raw: bytes) -> PageBitmap:
        """Decode the bytes of a bitmap.

        Raises:
            UsageError: The length does not fit the page count, or a spare bit is set.
        """
        if len(raw) != (pages + 7) // 8:
            raise UsageError(f"a bitmap of {pages} pages has {(pages + 7) // 8} bytes, not {len(raw)}")
        if pages % 8 and raw[-1] >> (pages % 8):
            raise UsageError(f"a bitmap of {pages} pages has spare bits set")
        return cls(pages, np.frombuffer(raw, dtype=np.uint8).copy())

    @classmethod
    def from_runs(cls, pages: int, runs: Runs) -> PageBitmap:
        """The union of *runs* (which may overlap); runs must lie within the bitmap."""
        if len(runs) > _FEW_RUNS:
            return cls.from_flags(flags_of(pages, runs))
        bitmap = cls(pages)
        for first, count in runs.tolist():
            bitmap.add_run(first, count)
        return bitmap

    @classmethod
    def from_flags(cls, flags: npt.NDArray[np.bool_]) -> PageBitmap:
        return cls(len(flags), np.packbits(flags, bitorder="little"))

    def flags(self) -> npt.NDArray[np.bool_]:
        """One boolean per page (a copy)."""
        return np.unpackbits(self.bits, count=self.pages, bitorder="little").view(np.bool_)

    def to_bytes(self) -> bytes:
        return self.bits.tobytes()

    def copy(self) -> PageBitmap:
        return PageBitmap(self.pages, self.bits.copy())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PageBitmap) and self.pages == other.pages and bool((self.bits == other.bits).all())

    __hash__ = None  # type: ignore[assignment]

    def __ior__(self, other: PageBitmap) -> PageBitmap:
        self._check_same_size(other)
        self.bits |= other.bits
        return self

    def __or__(self, other: PageBitmap) -> PageBitmap:
        self._check_same_size(other)
        return PageBitmap(self.pages, self.bits | other.bits)

    def __and__(self, other: PageBitmap) -> PageBitmap:
        self._check_same_size(other)
        return PageBitmap(self.pages, self.bits & other.bits)

    def __sub__(self, other: PageBitmap) -> PageBitmap:
        self._check_same_size(other)
        return PageBitmap(self.pages, self.bits & ~other.bits)

    def __contains__(self, page: int) -> bool:
        return bool(self.bits[page >> 3] >> (page & 7) & 1)

    def add_run(self, first_page: int, pages: int) -> None:
        """Set *pages* bits from *first_page*."""
        end = first_page + pages
        if first_page < 0 or pages < 0 or end > self.pages:
            raise UsageError(f"pages {first_page}..{end} do not lie in a bitmap of {self.pages} pages")
        if pages == 0:
            return
        low, high = first_page >> 3, (end - 1) >> 3
        low_mask, high_mask = 0xFF << (first_page & 7) & 0xFF, 0xFF >> (7 - (end - 1 & 7))
        if low == high:
            self.bits[low] |= low_mask & high_mask
            return
        self.bits[low] |= low_mask
        self.bits[low + 1 : high] = 0xFF
        self.bits[high] |= high_mask

    def discard(self, page: int) -> None:
        self.bits[page >> 3] &= ~(1 << (page & 7)) & 0xFF

    def count(self) -> int:
        """How many pages are in the set."""
        return int(np.bitwise_count(self.bits).sum(dtype=np.int64))

    def is_empty(self) -> bool:
        return not self.bits.any()

    def page_numbers(self) -> npt.NDArray[np.int64]:
        """The pages of the set, ascending."""
        return np.flatnonzero(self.flags()).astype(np.int64, copy=False)

    def runs(self) -> Runs:
        """The set as maximal runs, ascending. What a small set costs follows its pages, not the size of the guest."""
        words = self.bits[: len(self.bits) // 8 * 8].view(np.uint64)
        set_words = np.flatnonzero(words)
        if len(set_words) * _SPARSE_WORDS < len(words):
            return self._sparse_runs(set_words)
        flags = np.unpackbits(self.bits, count=self.pages, bitorder="little").view(np.int8)
        edges = np.diff(flags, prepend=np.int8(0), append=np.int8(0))
        starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        return np.stack([starts, ends - starts], axis=1).astype(np.int64, copy=False)

    def _sparse_runs(self, set_words: npt.NDArray[np.int64]) -> Runs:
        tail = np.arange(len(self.bits) // 8 * 8, len(self.bits))
        octets = np.concatenate([(set_words[:, None] * 8 + _OCTETS_OF_A_WORD).ravel(), tail])
        flags = np.unpackbits(self.bits[octets], bitorder="little").view(np.bool_)
        return runs_of_pages((octets[:, None] * 8 + _OCTETS_OF_A_WORD).ravel()[flags])

    def parts(self, most: int) -> Iterator[PageBitmap]:
        """The set in parts of at most *most* pages, which is 8 at least; ascending, each but the last nearly as large
        as that. Made one by one: each takes as much memory as the set."""
        ends = np.cumsum(np.bitwise_count(self.bits), dtype=np.int64)
        begin, done = 0, 0
        while len(ends) and done < ends[-1]:
            end = int(np.searchsorted(ends, done + most, side="right"))
            part = PageBitmap(self.pages)
            part.bits[begin:end] = self.bits[begin:end]
            yield part
            begin, done = end, int(ends[end - 1])

    def __iter__(self) -> Iterator[PageRun]:
        for first, pages in self.runs().tolist():
            yield PageRun(first, pages)

    def _clear_spare_bits(self) -> None:
        if self.pages % 8:
            self.bits[-1] &= (1 << self.pages % 8) - 1

    def _check_same_size(self, other: PageBitmap) -> None:
        if self.pages != other.pages:
            raise UsageError(f"bitmaps of {self.pages} and {other.pages} pages do not belong to one guest")


def flags_of(pages: int, runs: Runs) -> npt.NDArray[np.bool_]:
    """*runs* as one boolean per page. Its cost follows the pages in them."""
    flags = np.zeros(pages, dtype=np.bool_)
    flags[pages_in(runs)] = True
    return flags


def pages_in(runs: Runs) -> npt.NDArray[np.int64]:
    """The page numbers of *runs*, one by one."""
    counts = runs[:, 1]
    starts = np.repeat(runs[:, 0] - (np.cumsum(counts) - counts), counts)
    return starts + np.arange(len(starts))


def runs_of_pages(pages: npt.NDArray[np.int64]) -> Runs:
    """Ascending page numbers as maximal runs."""
    if not len(pages):
        return np.empty((0, 2), dtype=np.int64)
    breaks = np.flatnonzero(np.diff(pages) != 1) + 1
    starts = np.concatenate([[0], breaks])
    ends = np.concatenate([breaks, [len(pages)]])
    return np.stack([pages[starts], ends - starts], axis=1)


def split_runs(runs: Runs, boundary_pages: int) -> Runs:
    """Cut *runs* wherever they cross a multiple of *boundary_pages*, so that each piece lies within one block."""
    if not len(runs):
        return runs
    first, end = runs[:, 0], runs[:, 0] + runs[:, 1]
    pieces = (end - 1) // boundary_pages - first // boundary_pages + 1
    owner = np.repeat(np.arange(len(runs)), pieces)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    block = first[owner] // boundary_pages + nth
    piece_first = np.maximum(first[owner], block * boundary_pages)
    piece_end = np.minimum(end[owner], (block + 1) * boundary_pages)
    return np.stack([piece_first, piece_end - piece_first], axis=1)
