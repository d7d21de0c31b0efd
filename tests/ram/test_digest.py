"""Page digests: what must be zero, what must be seen, and what must not be guessed."""

from __future__ import annotations

import hashlib
import itertools
import shutil

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmmigrate.ram import native
from vmmigrate.ram.digest import BLOCK_PAGES, TREE, WHOLE, WORDS_PER_PAGE, Condenser, PageHash, RamDigest, condense

SECRET = b"secret of one migration"
HASH = PageHash(SECRET)
TOP_BIT = np.uint64(1 << 63)

Words = npt.NDArray[np.uint64]


def page_of(seed: int) -> Words:
    return np.random.default_rng(seed).integers(0, 1 << 64, (1, WORDS_PER_PAGE), dtype=np.uint64)


PAGE = page_of(1)


def model(secret: bytes, page: Words) -> int:
    """The rule of the module's docstring, in plain integers."""
    stream = hashlib.shake_256(b"vmmigrate page digest v1" + secret).digest(8192)
    weights = [int.from_bytes(stream[at : at + 8], "little") for at in range(0, 8192, 8)]
    low = sum(x * a for x, a in zip(page.tolist(), weights[:512], strict=True))
    high = sum((x >> 32) * b for x, b in zip(page.tolist(), weights[512:], strict=True))
    return (low + high) % (1 << 64)


def test_a_zero_page_has_digest_zero() -> None:
    """Holes are never read; their digest is zero without looking."""
    assert HASH.of(np.zeros((3, WORDS_PER_PAGE), dtype=np.uint64)).tolist() == [0, 0, 0]


def test_no_pages_have_no_digests() -> None:
    digests = HASH.of(np.empty((0, WORDS_PER_PAGE), dtype=np.uint64))

    assert (digests.shape, digests.dtype) == ((0,), np.uint64)


@given(st.binary(max_size=40), st.integers(0, 1 << 32))
def test_digests_follow_the_documented_rule(secret: bytes, seed: int) -> None:
    page = page_of(seed)

    assert PageHash(secret).of(page).tolist() == [model(secret, page[0])]


@pytest.mark.parametrize("count", [1, 63, 64, 65, 256])
def test_the_digest_of_a_page_does_not_depend_on_its_neighbours(count: int) -> None:
    pages = np.concatenate([page_of(seed) for seed in range(count)])

    together = HASH.of(pages)

    assert together.tolist() == [int(HASH.of(pages[i : i + 1])[0]) for i in range(count)]


def test_a_single_changed_bit_in_any_word_is_seen() -> None:
    whole = int(HASH.of(PAGE)[0])
    for bit in (0, 1, 31, 32, 62, 63):
        flipped = np.repeat(PAGE, WORDS_PER_PAGE, axis=0)
        flipped[np.arange(WORDS_PER_PAGE), np.arange(WORDS_PER_PAGE)] ^= np.uint64(1 << bit)
        assert not (HASH.of(flipped) == whole).any(), f"bit {bit}"


def test_two_flipped_top_bits_are_seen_in_every_pair_of_words() -> None:
    """The plain sum is blind to half of these: 2^63 * a keeps only the lowest bit of a, and two cancel."""
    whole = int(HASH.of(PAGE)[0])
    for first in range(0, WORDS_PER_PAGE, 61):
        others = np.array([word for word in range(WORDS_PER_PAGE) if word != first])
        flipped = np.repeat(PAGE, len(others), axis=0)
        flipped[:, first] ^= TOP_BIT
        flipped[np.arange(len(others)), others] ^= TOP_BIT
        assert not (HASH.of(flipped) == whole).any()


def test_two_swapped_words_are_seen() -> None:
    swapped = PAGE.copy()
    swapped[0, [3, 400]] = swapped[0, [400, 3]]

    assert HASH.of(swapped)[0] != HASH.of(PAGE)[0]


def test_digests_agree_for_one_secret_and_differ_for_another() -> None:
    assert PageHash(b"secret of one migration").of(PAGE) == HASH.of(PAGE)
    assert PageHash(b"secret of another").of(PAGE) != HASH.of(PAGE)


def test_hashing_leaves_the_pages_alone_and_reads_read_only_memory() -> None:
    page = PAGE.copy()
    page.flags.writeable = False

    HASH.of(page)

    assert (page == PAGE).all()


def test_a_condensed_table_tells_every_entry_and_its_place() -> None:
    table = np.array([1, 2, 3], dtype=np.uint64)

    assert condense(table) == condense(table.copy()) == hashlib.sha256(table.astype("<u8").tobytes()).digest()
    assert condense(np.array([2, 1, 3], dtype=np.uint64)) != condense(table)
    assert condense(np.concatenate([table, table])[::2]) != condense(table)
    assert len(condense(np.empty(0, dtype=np.uint64))) == 32


# --------------------------------------------------------------------------- condensed


def tree_of(table: Words) -> bytes:
    """The rule of the docstring, over the whole table at once."""
    blocks = [table[start : start + BLOCK_PAGES] for start in range(0, len(table), BLOCK_PAGES)]
    return hashlib.sha256(b"".join(condense(block) for block in blocks)).digest()


@given(
    st.integers(1, 3 * BLOCK_PAGES),
    st.lists(st.sets(st.integers(0, 3 * BLOCK_PAGES - 1), max_size=5), max_size=5),
)
@settings(max_examples=30)
def test_what_was_told_of_changes_is_as_good_as_a_look_at_everything(entries: int, rounds: list[set[int]]) -> None:
    table = np.zeros(entries, dtype=np.uint64)
    tree, whole = Condenser(table, TREE), Condenser(table, WHOLE)
    for number, changes in enumerate(rounds, start=1):
        touched = np.zeros(entries, dtype=np.bool_)
        touched[[change % entries for change in changes]] = True
        table[touched] = number
        tree.refresh(touched)
        whole.refresh(touched)

    assert tree.digest() == tree_of(table)
    assert whole.digest() == condense(table)


def test_a_change_that_was_not_told_is_not_in_the_digest() -> None:
    """Whoever forgets to tell has two ends that differ, and a migration that fails: never one that passes."""
    table = np.zeros(10, dtype=np.uint64)
    ours, theirs = Condenser(table, TREE), Condenser(np.zeros(10, dtype=np.uint64), TREE)

    table[3] = 7

    assert ours.digest() == theirs.digest() != tree_of(table)


# --------------------------------------------------------------------------- machine code and NumPy


@pytest.fixture(params=["native", "numpy"])
def either(request: pytest.FixtureRequest) -> PageHash:
    """The hash function in machine code, where a C compiler was there at the installation, and in NumPy."""
    if request.param == "native" and not native.IS_THERE:
        pytest.skip("no machine code: there was no C compiler when the package was installed")
    return PageHash(SECRET, use_native=request.param == "native")


@pytest.mark.required
def test_machine_code_was_built_where_there_is_a_compiler() -> None:
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("no C compiler here")

    assert native.IS_THERE


@given(st.binary(max_size=40), st.integers(0, 1 << 32), st.integers(1, 70))
def test_machine_code_and_numpy_say_the_same(secret: bytes, seed: int, count: int) -> None:
    if not native.IS_THERE:
        pytest.skip("no machine code: there was no C compiler when the package was installed")
    pages = np.random.default_rng(seed).integers(0, 1 << 64, (count, WORDS_PER_PAGE), dtype=np.uint64)
    pages[::3] &= np.uint64(0xFFFF_FFFF_0000_0001)  # halves that are all ones or all zeros carry the most
    pages[1::3] |= np.uint64(0x0000_0000_FFFF_FFFF)
    pages[5::7] = 0
    ours, theirs = PageHash(secret), PageHash(secret, use_native=False)

    for found, expected in zip(ours.look(pages), theirs.look(pages), strict=True):
        assert found.tolist() == expected.tolist()


def test_the_extremes_are_added_up_without_a_slip(either: PageHash) -> None:
    """All ones, in every word or in one half of it: where a carry would be lost."""
    for word in ((1 << 64) - 1, (1 << 32) - 1, (1 << 64) - (1 << 32), 1, 1 << 63):
        page = np.full((1, WORDS_PER_PAGE), word, dtype=np.uint64)

        assert either.of(page).tolist() == [model(SECRET, page[0])]


@given(st.lists(st.integers(0, 39), max_size=60))
def test_chosen_pages_have_the_digests_that_they_have_alone(numbers: list[int]) -> None:
    pages = np.concatenate([page_of(seed) for seed in range(40)])
    pages[7] = 0
    chosen = np.array(numbers, dtype=np.int64)
    for page_hash in (HASH, PageHash(SECRET, use_native=False)):
        digests, nonzero = page_hash.look(pages, chosen)

        assert digests.tolist() == page_hash.of(pages)[chosen].tolist()
        assert nonzero.tolist() == [number != 7 for number in numbers]


@pytest.mark.parametrize("number", [-1, 4])
def test_no_page_outside_is_looked_at(either: PageHash, number: int) -> None:
    with pytest.raises(IndexError):
        either.look(np.zeros((4, WORDS_PER_PAGE), dtype=np.uint64), np.array([0, number]))


def test_pages_that_do_not_lie_in_one_piece_have_the_same_digests(either: PageHash) -> None:
    pages = np.concatenate([page_of(seed) for seed in range(8)])

    assert either.of(pages[::2]).tolist() == either.of(pages[::2].copy()).tolist()


@pytest.mark.parametrize("word", range(WORDS_PER_PAGE))
def test_every_single_word_makes_a_page_nonzero(either: PageHash, word: int) -> None:
    pages = np.zeros((3, WORDS_PER_PAGE), dtype=np.uint64)
    pages[1, word] = 1 << 63

    assert either.look(pages)[1].tolist() == [False, True, False]


def test_a_page_with_digest_zero_is_not_taken_for_zeros() -> None:
    """Rare, but a page of a guest must not vanish for it. With weights of zero every page is such a page."""
    nothing = np.zeros(WORDS_PER_PAGE, dtype=np.uint64)
    numpy_hash = PageHash(SECRET, use_native=False)
    numpy_hash._low[:], numpy_hash._high[:] = 0, 0
    looks = [numpy_hash.look(PAGE)]
    if native.IS_THERE:
        looks.append(native.NativeHash(nothing, nothing).look(PAGE, None))

    for digests, nonzero in looks:
        assert (digests.tolist(), nonzero.tolist()) == ([0], [True])


def ram_digest(ram: Words, *cuts: int) -> bytes:
    """The digest of *ram*, taken in pieces; pieces of zeros are skipped as holes are."""
    digest = RamDigest(len(ram))
    for begin, end in itertools.pairwise([0, *cuts, len(ram)]):
        if ram[begin:end].any():
            digest.update(begin, ram[begin:end])
    return digest.digest()


@given(st.lists(st.sampled_from([0, 0, 1, 2]), min_size=1, max_size=20), st.data())
def test_the_digest_of_ram_does_not_depend_on_pieces_or_on_what_is_a_hole(
    seeds: list[int], draw: st.DataObject
) -> None:
    ram = np.concatenate([page_of(seed) if seed else np.zeros_like(PAGE) for seed in seeds])
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(ram)), max_size=4)))
    whole = RamDigest(len(ram))
    whole.update(0, ram)

    assert ram_digest(ram, *cuts) == whole.digest()


def test_the_digest_of_ram_that_is_all_zero_is_that_of_a_hole() -> None:
    untouched, zeroed = RamDigest(3), RamDigest(3)
    zeroed.update(0, np.zeros((2, WORDS_PER_PAGE), dtype=np.uint64))
    zeroed.update(2, np.empty((0, WORDS_PER_PAGE), dtype=np.uint64))

    assert zeroed.digest() == untouched.digest()


def test_the_digest_of_ram_sees_a_moved_page_and_a_changed_bit() -> None:
    """A page that landed one place off has the same content in the same order; only the bitmap tells."""
    ram = np.concatenate([PAGE, np.zeros_like(PAGE), page_of(2)])
    moved = np.concatenate([np.zeros_like(PAGE), PAGE, page_of(2)])
    changed = ram.copy()
    changed[2, 511] ^= TOP_BIT

    assert len({ram_digest(ram), ram_digest(moved), ram_digest(changed), ram_digest(np.zeros_like(ram))}) == 4
