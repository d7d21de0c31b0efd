"""Page digests: what must be zero, what must be seen, and what must not be guessed."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmigrate.ram.digest import WORDS_PER_PAGE, PageHash, RamDigest, condense
from vmmigrate.ram.encoding import nonzero

HASH = PageHash(b"secret of one migration")
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


def test_a_page_is_zero_only_when_every_bit_of_it_is() -> None:
    pages = np.zeros((4, WORDS_PER_PAGE), dtype=np.uint64)
    pages[1, 0], pages[2, -1], pages[3, 255] = 1, 1, TOP_BIT

    assert nonzero(pages).tolist() == [False, True, True, True]


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
