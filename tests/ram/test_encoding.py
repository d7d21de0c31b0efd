"""Packing: what comes out is what went in, and what a peer packed badly does no harm."""

from __future__ import annotations

import contextlib

import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from vmmigrate.errors import RemoteProtocolError
from vmmigrate.memory import PAGE_SIZE
from vmmigrate.ram.delta import DeltaCache
from vmmigrate.ram.encoding import DELTA, RAW, WORDS, ZERO, ZSTD, Encoded, Packer, Tally, Unpacker
from vmmigrate.ram.records import MAX_RECORD_PAGES, RecordKind
from vmmigrate.ram.worth import Worth

PAGE_WORDS = PAGE_SIZE // 8
Pages = npt.NDArray[np.uint64]


class Always(Worth):
    """A judge to whom everything pays."""

    is_dear = True

    def pays(self, way: str) -> bool:
        return True


class Never(Worth):
    is_dear = False

    def pays(self, way: str) -> bool:
        return False


def noise(pages: int, seed: int = 1) -> Pages:
    return np.random.default_rng(seed).integers(1, 1 << 63, (pages, PAGE_WORDS), dtype=np.uint64)


def text(pages: int, seed: int = 1) -> Pages:
    words = noise(pages, seed)
    words[:, 8:] = 0x2020202020202020
    return words


def numbers_of(pages: int) -> npt.NDArray[np.int64]:
    return np.arange(10, 10 + pages)


def packer(worth: Worth | None = None, encodings: tuple[str, ...] = WORDS, cache_pages: int = 512) -> Packer:
    return Packer(encodings, DeltaCache(cache_pages * PAGE_SIZE, 1), worth or Always())


def encode(packing: Packer, pages: Pages, round_number: int = 2) -> list[Encoded]:
    bases = np.arange(len(pages), dtype=np.uint64)
    return list(packing.encode(numbers_of(len(pages)), pages, bases, round_number))


def unpacked(encoded: Encoded) -> Pages:
    pages = np.empty((len(encoded.numbers), PAGE_WORDS), dtype=np.uint64)
    Unpacker().unpack_into(memoryview(encoded.parts[-1]), pages.data.cast("B"))
    return pages


# --------------------------------------------------------------------------- there and back


@given(st.integers(1, MAX_RECORD_PAGES), st.integers(0, 1 << 32))
def test_compressed_pages_are_read_back_as_they_were(count: int, seed: int) -> None:
    pages = text(count, seed)

    (encoded,) = encode(packer(), pages)

    assert encoded.kind is RecordKind.ZSTD
    assert len(encoded.parts[0]) < pages.nbytes / 10
    assert (unpacked(encoded) == pages).all()


def test_what_does_not_compress_goes_as_it_is() -> None:
    pages = noise(7)

    (encoded,) = encode(packer(), pages)

    assert encoded.kind is RecordKind.PAGES
    assert encoded.parts == (pages.data.cast("B"),)


def test_a_page_that_is_sent_again_goes_as_what_changed_in_it_and_names_its_base() -> None:
    packing, pages = packer(), noise(20)
    encode(packing, pages)
    changed = pages.copy()
    changed[:, 9] += np.uint64(1)

    (encoded,) = encode(packing, changed, 3)

    assert encoded.kind is RecordKind.DELTA
    assert sum(map(len, encoded.parts)) < pages.nbytes / 20
    assert np.frombuffer(encoded.parts[0], dtype=">u8").tolist() == list(range(20))
    assert (unpacked(encoded) ^ pages == changed).all()


def test_pages_with_and_without_a_copy_go_in_records_of_their_own() -> None:
    packing, pages = packer(), noise(20)
    list(packing.encode(numbers_of(20)[:6], pages[:6].copy(), np.zeros(6, dtype=np.uint64), 2))
    changed = pages.copy()
    changed[:, 9] += np.uint64(1)

    delta, plain = encode(packing, changed, 3)

    assert (delta.kind, delta.numbers.tolist()) == (RecordKind.DELTA, numbers_of(6).tolist())
    assert (plain.kind, plain.numbers.tolist()) == (RecordKind.PAGES, numbers_of(20)[6:].tolist())


def test_a_page_that_is_another_one_altogether_goes_whole() -> None:
    packing = packer()
    encode(packing, noise(5, 1))

    (encoded,) = encode(packing, text(5, 2), 3)

    assert encoded.kind is RecordKind.ZSTD


def test_the_first_round_is_not_remembered() -> None:
    """It goes through all of RAM: what comes again is not known yet."""
    packing, pages = packer(), noise(5)
    encode(packing, pages, 1)

    (encoded,) = encode(packing, pages.copy(), 2)

    assert encoded.kind is RecordKind.PAGES


def test_a_page_that_was_sent_from_live_memory_is_no_base() -> None:
    packing, pages = packer(), noise(5)
    encode(packing, pages)
    packing.forget(slice(10, 12))
    packing.forget(np.array([14]))

    kinds = {encoded.kind: encoded.numbers.tolist() for encoded in encode(packing, pages.copy(), 3)}

    assert kinds == {RecordKind.DELTA: [12, 13], RecordKind.PAGES: [10, 11, 14]}


@pytest.mark.parametrize(
    ("encodings", "first", "again"),
    [
        ((RAW, ZERO), RecordKind.PAGES, RecordKind.PAGES),
        ((RAW, ZERO, ZSTD), RecordKind.ZSTD, RecordKind.ZSTD),
        ((RAW, ZERO, DELTA), RecordKind.PAGES, RecordKind.DELTA),
        (WORDS, RecordKind.ZSTD, RecordKind.DELTA),
    ],
)
def test_nothing_is_sent_that_was_not_agreed_upon(
    encodings: tuple[str, ...], first: RecordKind, again: RecordKind
) -> None:
    packing, pages = packer(encodings=encodings), text(5)

    kinds = [encode(packing, pages.copy(), number)[0].kind for number in (2, 3)]

    assert kinds == [first, again]


# --------------------------------------------------------------------------- when


@pytest.mark.parametrize(
    ("worth", "encodings", "round_number", "wanted"),
    [
        (Always(), WORDS, 1, True),
        (Always(), (RAW, ZERO, DELTA), 1, False),
        (Always(), (RAW, ZERO, DELTA), 2, True),
        (Always(), (RAW, ZERO), 2, False),
        (Never(), WORDS, 2, False),
    ],
)
def test_a_copy_is_made_only_where_it_pays(
    worth: Worth, encodings: tuple[str, ...], round_number: int, wanted: bool
) -> None:
    assert packer(worth, encodings).wants_copy(round_number) is wanted


def test_a_copy_is_of_the_pages_that_are_asked_for_and_stays_as_it_was() -> None:
    packing, ram = packer(), noise(600)

    for index in (slice(3, 9), np.array([599, 0, 7])):
        copy = packing.copy_of(ram, index)
        assert (copy == ram[index]).all()
        assert not np.shares_memory(copy, ram)


def test_samples_tell_what_compressing_would_bring() -> None:
    ticks = iter(range(1000))
    packing = Packer(WORDS, None, Worth(), cpu_clock=lambda: next(ticks) / 1e6)

    packing.maybe_sample(np.arange(200), text(200), 1)
    packing.maybe_sample(np.arange(200), noise(200), 1)  # not due yet

    (way,) = packing.worth._ways.values()
    assert 0 < way.ratio < 0.1
    assert way.packing_s_per_byte > 0


class Slow(Worth):
    """A judge of a link that is slower than we are, so that it depends on what is known whether anything pays."""

    def __init__(self) -> None:
        super().__init__()
        self.note_work(1 << 20, 1.0)
        self.paced_s_per_byte = 1.5 * self.work_s_per_byte


def ticking(worth: Worth, encodings: tuple[str, ...] = (RAW, ZERO, DELTA)) -> Packer:
    """A packer whose clock advances by a millisecond each time that it is looked at."""
    ticks = iter(range(100_000))
    return Packer(encodings, DeltaCache(4096 * PAGE_SIZE, 1), worth, cpu_clock=lambda: next(ticks) / 1e3)


def test_a_sample_tells_what_deltas_would_bring_before_any_copy_is_kept() -> None:
    packing, pages, numbers = ticking(Slow()), noise(256), np.arange(256)
    assert not packing.wants_copy(2)

    packing.maybe_sample(numbers, pages, 2)
    pages[:, 9] += np.uint64(1)
    packing.maybe_sample(numbers[100:], pages[100:], 3)  # others
    assert not packing.worth._ways
    packing.maybe_sample(numbers, pages, 3)

    way = packing.worth._ways[DELTA]
    assert 0 < way.ratio < 0.1
    assert packing.wants_copy(4)


def test_pages_that_changed_altogether_make_no_deltas_worth_while() -> None:
    packing, numbers = ticking(Slow()), np.arange(256)

    packing.maybe_sample(numbers, noise(256, 1), 2)
    packing.maybe_sample(numbers, noise(256, 2), 3)

    assert packing.worth._ways[DELTA].ratio > 0.9
    assert not packing.wants_copy(4)


@pytest.mark.parametrize(
    ("worth", "round_number"), [(Slow(), 1), (Worth(), 2)], ids=["the first round", "a link that is not waited for"]
)
def test_deltas_are_sampled_only_where_they_could_pay(worth: Worth, round_number: int) -> None:
    packing, numbers, pages = ticking(worth), np.arange(256), noise(256)

    packing.maybe_sample(numbers, pages, round_number)
    packing.maybe_sample(numbers, pages, round_number + 1)

    assert not packing.worth._ways


def test_a_delta_pays_for_its_own_copies_and_not_for_all_that_were_only_kept_before() -> None:
    """A whole round of copies charged to the first delta would make deltas look dear where they are cheap."""
    packing, ram = ticking(Always()), noise(16 * 64)
    groups = [np.arange(first, first + 16) for first in range(0, len(ram), 16)]
    for round_number, numbers in [*((2, group) for group in groups), (3, groups[0])]:
        copy = packing.copy_of(ram, slice(int(numbers[0]), int(numbers[-1]) + 1))
        list(packing.encode(numbers, copy, np.zeros(16, dtype=np.uint64), round_number))

    way = packing.worth._ways[DELTA]
    assert way.packing_s_per_byte * 16 * PAGE_SIZE < 0.010  # each step is seen to take 1 or 2 ms


def test_a_group_of_which_few_pages_are_held_does_not_make_deltas_dear() -> None:
    """Each page pays for its own copy, and a handful of pages tells nothing at all."""
    packing, ram = ticking(Always()), noise(256)
    for held, round_number in (([0], 2), (range(256), 3)):
        numbers = np.array(held)
        copy = packing.copy_of(ram, numbers)
        list(packing.encode(numbers, copy, np.zeros(len(numbers), dtype=np.uint64), round_number))
    assert DELTA not in packing.worth._ways

    for number in (4, 5):
        copy = packing.copy_of(ram, np.arange(256))
        list(packing.encode(np.arange(256), copy, np.zeros(256, dtype=np.uint64), number))
    packing.copy_of(ram, np.arange(256))
    known = packing.worth._ways[DELTA].packing_s_per_byte
    packing._pack(DELTA, ram[:16])
    assert packing.worth._ways[DELTA].packing_s_per_byte < known * 8  # a call of its own, but no copy of 256 pages


def test_deltas_are_sampled_beside_compressed_pages() -> None:
    """Pages that compress may change so little that deltas are better still."""
    worth = Slow()
    worth.note_packed(ZSTD, 1 << 20, 1 << 18, worth.work_s_per_byte * (1 << 17))
    worth.note_packed(ZSTD, 1 << 20, 1 << 18, worth.work_s_per_byte * (1 << 17))
    packing, pages, numbers = ticking(worth, WORDS), text(256), np.arange(256)
    assert worth.pays(ZSTD)

    for round_number in (2, 3):
        list(packing.encode(numbers, pages, np.zeros(256, dtype=np.uint64), round_number))
        pages[:, 9] += np.uint64(1)

    assert DELTA in packing.worth._ways


def test_a_group_of_zero_pages_only_is_no_record() -> None:
    assert encode(packer(), noise(0)) == []


def test_what_is_sent_while_deltas_do_not_pay_is_no_base() -> None:
    worth = Always()
    packing, pages = packer(worth, (RAW, ZERO, DELTA)), noise(20)
    encode(packing, pages, 2)
    packing.worth = Never()
    encode(packing, noise(20, 2), 3)
    packing.worth = worth

    (encoded,) = encode(packing, pages.copy(), 4)

    assert encoded.kind is RecordKind.PAGES


def test_nothing_is_sampled_that_cannot_be_sent() -> None:
    packing = Packer((RAW, ZERO), None, Worth())

    packing.maybe_sample(np.arange(200), text(200), 1)

    assert not packing.worth._ways


# --------------------------------------------------------------------------- what a peer may have packed


def frame_of(size_bytes: int, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(level=1, **options).compress(bytes(size_bytes))


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"no frame at all", id="no frame"),
        pytest.param(frame_of(PAGE_SIZE), id="too short"),
        pytest.param(frame_of(3 * PAGE_SIZE), id="too long"),
        pytest.param(frame_of(1 << 28), id="a bomb"),
        pytest.param(frame_of(2 * PAGE_SIZE, write_content_size=False), id="of unknown length"),
        pytest.param(frame_of(2 * PAGE_SIZE)[:-3], id="cut"),
        pytest.param(frame_of(2 * PAGE_SIZE)[:9] + b"\xff" * 20, id="damaged"),
    ],
)
def test_a_frame_that_does_not_give_exactly_the_pages_is_refused(frame: bytes) -> None:
    target = memoryview(bytearray(2 * PAGE_SIZE))

    with pytest.raises(RemoteProtocolError) as caught:
        Unpacker().unpack_into(memoryview(frame), target)

    assert caught.value.code == "bad_record"


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_or_fill_the_pages(frame: bytes) -> None:
    unpacker = Unpacker()
    with contextlib.suppress(RemoteProtocolError):
        unpacker.unpack_into(memoryview(frame), memoryview(bytearray(PAGE_SIZE)))
    good = memoryview(bytearray(PAGE_SIZE))
    unpacker.unpack_into(memoryview(frame_of(PAGE_SIZE)), good)  # and it is none the worse for it


def test_tallies_add_up() -> None:
    one, other = Tally.empty(), Tally.empty()
    one.add(RAW, 2, 8192)
    other.add(RAW, 1, 4096)
    other.add(ZSTD, 5, 100)

    both = one + other

    assert both.pages == {RAW: 3, ZERO: 0, ZSTD: 5, DELTA: 0}
    assert both.bytes == {RAW: 12288, ZERO: 0, ZSTD: 100, DELTA: 0}
