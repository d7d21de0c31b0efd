"""Guest RAM as numbers: bitmaps obey the laws of sets, and addresses and page numbers agree."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmigrate.errors import UsageError
from vmmigrate.memory import (
    GIB,
    HIGH_RAM_GPA,
    LOW_RAM_LIMIT_BYTES,
    MAX_GPA,
    MIB,
    PAGE_SIZE,
    PageBitmap,
    PageRun,
    RamLayout,
    Region,
    Runs,
    split_runs,
)

MAX_PAGES = 70


@st.composite
def page_sets(draw: st.DrawFn, count: int = 1) -> tuple[int, list[set[int]]]:
    """A number of pages, and some sets of them."""
    pages = draw(st.integers(0, MAX_PAGES))
    numbers = st.integers(0, pages - 1) if pages else st.nothing()
    return pages, [draw(st.sets(numbers)) for _ in range(count)]


def bitmap_of(pages: int, numbers: set[int]) -> PageBitmap:
    bitmap = PageBitmap(pages)
    for number in numbers:
        bitmap.add_run(number, 1)
    return bitmap


def numbers_of(bitmap: PageBitmap) -> set[int]:
    return set(bitmap.page_numbers().tolist())


def as_runs(*runs: tuple[int, int]) -> Runs:
    return np.array(runs, dtype=np.int64).reshape(-1, 2)


# --------------------------------------------------------------------------- bitmaps


@given(page_sets())
def test_a_bitmap_is_the_set_of_its_pages(given_set: tuple[int, list[set[int]]]) -> None:
    pages, (numbers,) = given_set
    bitmap = bitmap_of(pages, numbers)

    assert numbers_of(bitmap) == numbers
    assert {page for page in range(pages) if page in bitmap} == numbers
    assert bitmap.count() == len(numbers)
    assert bitmap.is_empty() == (not numbers)
    assert bitmap.flags().tolist() == [page in numbers for page in range(pages)]
    assert PageBitmap.from_flags(bitmap.flags()) == bitmap


@given(page_sets(), st.integers(8, 40))
def test_the_parts_of_a_bitmap_are_all_of_it_in_order_and_none_is_larger_than_wanted(
    given_set: tuple[int, list[set[int]]], most: int
) -> None:
    pages, (numbers,) = given_set

    parts = list(bitmap_of(pages, numbers).parts(most))

    assert [page for part in parts for page in part.page_numbers()] == sorted(numbers)
    assert all(most - 8 < part.count() <= most for part in parts[:-1])
    assert all(0 < part.count() <= most for part in parts)


@given(page_sets(2))
def test_union_difference_and_intersection_are_those_of_sets(given_sets: tuple[int, list[set[int]]]) -> None:
    pages, (one, other) = given_sets
    a, b = bitmap_of(pages, one), bitmap_of(pages, other)

    assert numbers_of(a | b) == one | other
    assert numbers_of(a - b) == one - other
    assert numbers_of(a & b) == one & other
    assert (a == b) == (one == other)
    assert (numbers_of(a), numbers_of(b)) == (one, other), "the operands are as they were"

    a |= b
    assert numbers_of(a) == one | other


@given(page_sets())
def test_no_operation_sets_a_spare_bit(given_set: tuple[int, list[set[int]]]) -> None:
    """A spare bit would be a page that does not exist; what we send with one, the peer refuses."""
    pages, (numbers,) = given_set
    bitmap = bitmap_of(pages, numbers)
    everything = PageBitmap.full(pages)

    for result in (bitmap, everything, everything - bitmap, everything | bitmap, everything & bitmap):
        assert PageBitmap.from_bytes(pages, result.to_bytes()) == result
        assert result.count() <= pages
    assert numbers_of(everything) == set(range(pages))


@given(st.integers(0, MAX_PAGES), st.data())
def test_add_run_sets_exactly_its_pages(pages: int, draw: st.DataObject) -> None:
    first = draw.draw(st.integers(0, pages))
    length = draw.draw(st.integers(0, pages - first))
    before = draw.draw(st.sets(st.integers(0, pages - 1))) if pages else set()
    bitmap = bitmap_of(pages, before)

    bitmap.add_run(first, length)

    assert numbers_of(bitmap) == before | set(range(first, first + length))


@pytest.mark.parametrize(("first", "length"), [(-1, 1), (0, 10), (9, 1), (8, 2), (3, -1), (1 << 40, 1)])
def test_a_run_outside_the_bitmap_is_refused_and_changes_nothing(first: int, length: int) -> None:
    bitmap = bitmap_of(9, {2})

    with pytest.raises(UsageError, match="do not lie in a bitmap of 9 pages"):
        bitmap.add_run(first, length)

    assert numbers_of(bitmap) == {2}


@given(page_sets())
def test_runs_are_maximal_ascending_and_give_the_set_back(given_set: tuple[int, list[set[int]]]) -> None:
    pages, (numbers,) = given_set
    bitmap = bitmap_of(pages, numbers)

    runs = bitmap.runs()

    assert runs.dtype == np.int64
    assert (runs[:, 1] > 0).all()
    assert (runs[1:, 0] > runs[:-1, 0] + runs[:-1, 1]).all(), "a gap parts any two"
    assert PageBitmap.from_runs(pages, runs) == bitmap
    assert list(bitmap) == [PageRun(first, length) for first, length in runs.tolist()]


@given(st.integers(1, MAX_PAGES), st.data())
def test_from_runs_is_the_union_of_runs_that_may_overlap(pages: int, draw: st.DataObject) -> None:
    firsts = draw.draw(st.lists(st.integers(0, pages - 1), max_size=5))
    runs = [(first, draw.draw(st.integers(0, pages - first))) for first in firsts]

    bitmap = PageBitmap.from_runs(pages, as_runs(*runs))

    assert numbers_of(bitmap) == {page for first, length in runs for page in range(first, first + length)}


@given(page_sets())
def test_bytes_hold_the_lowest_page_in_bit_zero_of_byte_zero(given_set: tuple[int, list[set[int]]]) -> None:
    pages, (numbers,) = given_set

    raw = bitmap_of(pages, numbers).to_bytes()

    assert len(raw) == -(-pages // 8)
    assert int.from_bytes(raw, "little") == sum(1 << number for number in numbers)
    assert numbers_of(PageBitmap.from_bytes(pages, raw)) == numbers


@pytest.mark.parametrize("pages", [1, 7, 9, 15])
def test_every_spare_bit_is_refused(pages: int) -> None:
    size = -(-pages // 8)
    for bit in range(pages, size * 8):
        with pytest.raises(UsageError, match="spare bits"):
            PageBitmap.from_bytes(pages, (1 << bit).to_bytes(size, "little"))


@pytest.mark.parametrize(("pages", "size"), [(0, 1), (1, 0), (8, 2), (9, 1), (9, 3)])
def test_a_length_that_does_not_fit_is_refused(pages: int, size: int) -> None:
    with pytest.raises(UsageError, match=f"a bitmap of {pages} pages has"):
        PageBitmap.from_bytes(pages, bytes(size))


def test_a_bitmap_of_whole_bytes_has_no_spare_bits() -> None:
    assert PageBitmap.from_bytes(16, b"\xff\xff") == PageBitmap.full(16)


def test_decoded_and_copied_bitmaps_share_nothing() -> None:
    raw = bytes(2)
    bitmap = PageBitmap.from_bytes(16, raw)
    copied = bitmap.copy()

    bitmap.add_run(3, 1)

    assert raw == bytes(2)
    assert copied.is_empty()


@given(page_sets())
def test_discard_takes_one_page_out(given_set: tuple[int, list[set[int]]]) -> None:
    pages, (numbers,) = given_set
    for page in range(pages):
        bitmap = bitmap_of(pages, numbers)
        bitmap.discard(page)
        assert numbers_of(bitmap) == numbers - {page}


@pytest.mark.parametrize(
    "combine",
    [lambda a, b: a | b, lambda a, b: a & b, lambda a, b: a - b, lambda a, b: a.__ior__(b)],
    ids=["or", "and", "sub", "ior"],
)
def test_bitmaps_of_different_guests_do_not_mix(combine: Callable[[PageBitmap, PageBitmap], object]) -> None:
    """8 and 9 pages differ in bytes, 9 and 10 do not: both are refused."""
    for one, other in ((8, 9), (9, 10)):
        with pytest.raises(UsageError, match="do not belong to one guest"):
            combine(PageBitmap(one), PageBitmap(other))
        assert PageBitmap(one) != PageBitmap(other)


def test_a_large_bitmap_is_handled_whole() -> None:
    """64 GiB of RAM: every operation in well under a second, none of them page by page."""
    pages = 64 * GIB // PAGE_SIZE
    bitmap = PageBitmap(pages)
    bitmap.add_run(1, pages - 2)

    assert bitmap.count() == pages - 2
    assert bitmap.runs().tolist() == [[1, pages - 2]]
    assert (PageBitmap.full(pages) - bitmap).page_numbers().tolist() == [0, pages - 1]


@given(st.sets(st.integers(0, 99_999), max_size=40), st.integers(1, 70), st.integers(0, 20))
def test_a_few_pages_of_a_large_guest_are_the_same_runs(starts: set[int], longest: int, spare: int) -> None:
    """There is a way of its own for them; a part of a word, and runs over several words, are no exception."""
    pages = 100_000 + longest + spare
    flags = np.zeros(pages, dtype=np.bool_)
    for start in starts:
        flags[start : start + longest] = True

    runs = PageBitmap.from_flags(flags).runs()

    found = np.zeros(pages, dtype=np.bool_)
    for first, count in runs.tolist():
        found[first : first + count] = True
    assert (found == flags).all()
    assert (runs[1:, 0] > runs[:-1, 0] + runs[:-1, 1]).all(), "ascending and maximal"


# --------------------------------------------------------------------------- split_runs


@given(page_sets(), st.integers(1, 20))
def test_split_runs_cuts_at_every_boundary_and_nowhere_else(
    given_set: tuple[int, list[set[int]]], boundary: int
) -> None:
    pages, (numbers,) = given_set
    runs = bitmap_of(pages, numbers).runs()

    pieces = split_runs(runs, boundary)

    assert PageBitmap.from_runs(pages, pieces) == bitmap_of(pages, numbers)
    assert int(pieces[:, 1].sum()) == len(numbers), "no page twice"
    assert (pieces[:, 1] > 0).all()
    assert (pieces[:, 0] // boundary == (pieces[:, 0] + pieces[:, 1] - 1) // boundary).all()
    cuts = set(pieces[:, 0].tolist()) - set(runs[:, 0].tolist())
    assert all(cut % boundary == 0 for cut in cuts)
    assert (np.diff(pieces[:, 0]) > 0).all()


def test_split_runs_of_nothing_is_nothing() -> None:
    assert len(split_runs(as_runs(), 256)) == 0


# --------------------------------------------------------------------------- regions and layouts


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (1, PAGE_SIZE),
        (0, 1),
        (0, 0),
        (-PAGE_SIZE, PAGE_SIZE),
        (0, -PAGE_SIZE),
        (MAX_GPA, PAGE_SIZE),
        (MAX_GPA - PAGE_SIZE, 2 * PAGE_SIZE),
        ((1 << 64) - PAGE_SIZE, PAGE_SIZE),
        (0, 1 << 64),
    ],
)
def test_a_region_that_cannot_be_is_refused(gpa: int, size: int) -> None:
    with pytest.raises(UsageError, match=r"^region "):
        Region(gpa, size)


def test_the_last_page_of_the_address_space_is_a_region() -> None:
    region = Region(MAX_GPA - PAGE_SIZE, PAGE_SIZE)

    assert (region.pages, region.end_gpa) == (1, MAX_GPA)


@pytest.mark.parametrize(
    "regions",
    [
        [],
        [Region(4096, 4096), Region(0, 4096)],
        [Region(0, 8192), Region(4096, 4096)],
        [Region(0, 4096), Region(0, 4096)],
    ],
)
def test_no_regions_or_regions_that_overlap_or_descend_are_refused(regions: list[Region]) -> None:
    with pytest.raises(UsageError):
        RamLayout(regions)


@pytest.mark.parametrize(
    ("size", "regions"),
    [
        (PAGE_SIZE, [(0, PAGE_SIZE)]),
        (127 * MIB, [(0, 127 * MIB)]),
        (128 * MIB, [(0, 128 * MIB)]),
        (129 * MIB, [(0, 129 * MIB)]),
        (3 * GIB, [(0, 3 * GIB)]),
        (3 * GIB + PAGE_SIZE, [(0, 3 * GIB), (4 * GIB, PAGE_SIZE)]),
        (5 * GIB, [(0, 3 * GIB), (4 * GIB, 2 * GIB)]),
    ],
)
def test_ram_lies_below_3_gib_and_the_rest_from_4_gib(size: int, regions: list[tuple[int, int]]) -> None:
    layout = RamLayout.for_size(size)

    assert [(region.gpa, region.size_bytes) for region in layout.regions] == regions
    assert layout.size_bytes == size
    assert layout.pages == size // PAGE_SIZE
    for region in layout.regions:
        first, last = layout.first_page(region), layout.first_page(region) + region.pages - 1
        assert layout.gpa_of(first) == region.gpa
        assert layout.gpa_of(last) == region.end_gpa - PAGE_SIZE
        assert layout.locate(region.gpa, region.pages) == PageRun(first, region.pages)


@pytest.mark.parametrize("size", [0, -PAGE_SIZE, 1, PAGE_SIZE + 1, LOW_RAM_LIMIT_BYTES + 1])
def test_a_ram_size_that_is_no_whole_number_of_pages_is_refused(size: int) -> None:
    with pytest.raises(UsageError):
        RamLayout.for_size(size)


# Two regions that touch, then a hole, then one more.
TOUCHING = RamLayout(
    [Region(0, 4 * PAGE_SIZE), Region(4 * PAGE_SIZE, 3 * PAGE_SIZE), Region(HIGH_RAM_GPA, 2 * PAGE_SIZE)]
)


def model_pages(layout: RamLayout) -> dict[int, tuple[int, int]]:
    """By address: page number and region index, one page at a time."""
    pages: dict[int, tuple[int, int]] = {}
    for index, region in enumerate(layout.regions):
        for gpa in range(region.gpa, region.end_gpa, PAGE_SIZE):
            pages[gpa] = (len(pages), index)
    return pages


@given(st.sampled_from([*range(-1, 11), *range((4 << 18) - 1, (4 << 18) + 4)]), st.integers(-1, 10), st.integers(0, 1))
def test_locate_never_crosses_a_region(page: int, count: int, offset: int) -> None:
    """Neither into a hole nor from one region into the next that touches it: their files may differ."""
    gpa = page * PAGE_SIZE + offset
    model = model_pages(TOUCHING)
    wanted = [model.get(gpa + i * PAGE_SIZE) for i in range(count)]
    fits = bool(wanted) and all(wanted) and len({entry[1] for entry in wanted if entry}) == 1

    run = TOUCHING.locate(gpa, count)
    many = TOUCHING.pages_of(np.array([gpa], dtype=np.int64), np.array([count], dtype=np.int64))

    if fits:
        assert wanted[0] is not None
        assert run == PageRun(wanted[0][0], count)
        assert many is not None
        assert many.tolist() == [wanted[0][0]]
    else:
        assert run is None
        assert many is None


def test_every_page_has_one_address_and_every_address_its_page() -> None:
    model = model_pages(TOUCHING)
    numbers = np.arange(TOUCHING.pages)
    gpas = TOUCHING.gpas_of(numbers)

    assert gpas.tolist() == list(model)
    assert [TOUCHING.gpa_of(page) for page in range(TOUCHING.pages)] == list(model)
    pages = TOUCHING.pages_of(gpas, np.ones_like(gpas))
    assert pages is not None
    assert pages.tolist() == numbers.tolist()


@pytest.mark.parametrize("page", [-1, TOUCHING.pages, 1 << 40])
def test_a_page_that_does_not_exist_has_no_address(page: int) -> None:
    with pytest.raises(IndexError):
        TOUCHING.gpa_of(page)


@pytest.mark.parametrize(
    ("gpa", "count"),
    [((1 << 62) - PAGE_SIZE, 1), (0, (1 << 32) - 1), ((1 << 63) - PAGE_SIZE, (1 << 32) - 1), (-PAGE_SIZE, 1)],
)
def test_huge_addresses_and_counts_do_not_wrap_around(gpa: int, count: int) -> None:
    assert TOUCHING.pages_of(np.array([gpa], dtype=np.int64), np.array([count], dtype=np.int64)) is None
    assert TOUCHING.locate(gpa, count) is None


def test_layouts_are_equal_by_their_regions() -> None:
    assert RamLayout.for_size(MIB) == RamLayout([Region(0, MIB)])
    assert hash(RamLayout.for_size(MIB)) == hash(RamLayout([Region(0, MIB)]))
    assert RamLayout.for_size(MIB) != RamLayout.for_size(2 * MIB)
    assert RamLayout.for_size(MIB) != "a layout"


def test_a_run_knows_where_it_lies_in_the_ram_file() -> None:
    run = PageRun(3, 2)

    assert (run.end_page, run.offset_bytes, run.size_bytes) == (5, 3 * PAGE_SIZE, 2 * PAGE_SIZE)
