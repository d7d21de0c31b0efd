"""How pages become records and records pages again: as they are, compressed, or as what changed since the last time.

A page of zeros travels by name only. Everything else goes as it is (PAGES), or, where that pays (`worth`), compressed:
whole (ZSTD), or, if a copy of what was sent last is at hand (`delta`), as the compressed difference to that (DELTA).

Compressing looks at pages more than once, and guest memory changes meanwhile. So it works on one private copy, and what
is hashed, compressed and remembered as the base of later deltas is that copy, never a second look.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import zstandard

from vmmigrate.errors import RemoteProtocolError
from vmmigrate.memory import PAGE_SIZE
from vmmigrate.ram.delta import SAMPLE_PAGES, DeltaCache, DeltaSample
from vmmigrate.ram.digest import Digests
from vmmigrate.ram.records import MAX_RECORD_PAGES, RecordKind
from vmmigrate.ram.worth import Worth

RAW, ZERO, ZSTD, DELTA = "raw", "zero", "zstd", "delta"  # words of the negotiation

LEVEL: Final = 1
_SAMPLE_PAGES: Final = 8
_WORTH_A_RECORD: Final = 0.9  # what does not get smaller than this goes as it is
_FIRST_ROUND: Final = 1

Pages = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Encoded:
    """The contents of one record: the pages *numbers*, and the parts that follow the table of their runs."""

    kind: RecordKind
    numbers: Numbers
    parts: tuple[memoryview | bytes, ...]


@dataclass
class Tally:
    """Pages and bytes by encoding; bytes without headers and tables. Running totals; other threads may look at them."""

    pages: dict[str, int]
    bytes: dict[str, int]

    @classmethod
    def empty(cls) -> Tally:
        return cls(dict.fromkeys(WORDS, 0), dict.fromkeys(WORDS, 0))

    def add(self, word: str, pages: int, size_bytes: int) -> None:
        self.pages[word] += pages
        self.bytes[word] += size_bytes

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            {word: self.pages[word] + other.pages[word] for word in WORDS},
            {word: self.bytes[word] + other.bytes[word] for word in WORDS},
        )


WORDS: Final = (RAW, ZERO, ZSTD, DELTA)
WORD_OF: Final = {
    RecordKind.PAGES: RAW,
    RecordKind.ZERO: ZERO,
    RecordKind.ZSTD: ZSTD,
    RecordKind.DELTA: DELTA,
}


class Packer:
    """Compresses for one stream, in its thread.

    Args:
        encodings: What both sides agreed upon.
        cache: Copies of what was sent, if deltas are wanted.
        worth: The judge of this stream.
        cpu_clock: Processor time of the calling thread, in seconds.
    """

    def __init__(
        self,
        encodings: Collection[str],
        cache: DeltaCache | None = None,
        worth: Worth | None = None,
        *,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self.worth = worth or Worth()
        self._may_compress = ZSTD in encodings
        self._cache = cache if DELTA in encodings else None
        self._clock = cpu_clock
        self._compressor = zstandard.ZstdCompressor(level=LEVEL)
        self._copy: Pages = np.empty((MAX_RECORD_PAGES, PAGE_SIZE // 8), dtype=np.uint64)
        self._sample = DeltaSample()
        self._taking_s = 0.0  # processor time for a page: to copy it into the sample,
        self._copying_s = 0.0  # to make the private copy of it,
        self._keeping_s = 0.0  # and to keep it

    def wants_copy(self, round_number: int) -> bool:
        """Whether the next pages should be encoded; else they are sent straight from where they lie."""
        return (self._may_compress and self.worth.pays(ZSTD)) or self._follows(round_number)

    def _follows(self, round_number: int) -> bool:
        """Whether copies of what is sent are kept, and deltas to them are made."""
        return self._cache is not None and round_number > _FIRST_ROUND and self.worth.promises(DELTA)

    def copy_of(self, ram: Pages, index: slice | Numbers) -> Pages:
        """A private copy of at most one record's pages, good until the next call."""
        begun = self._clock()
        if isinstance(index, slice):
            copy = self._copy[: index.stop - index.start]
            copy[:] = ram[index]
        else:
            copy = self._copy[: len(index)]
            np.take(ram, index, axis=0, out=copy, mode="clip")  # every other mode makes a copy on the way
        self._copying_s = (self._clock() - begun) / len(copy)
        return copy

    def encode(self, numbers: Numbers, pages: Pages, bases: Digests, round_number: int) -> Iterator[Encoded]:
        """Records that carry *pages*, a private copy of the pages *numbers*; to be taken all.

        Args:
            bases: The digest of each page as it was sent last.
        """
        if not len(numbers):
            return
        cache = self._cache if self._follows(round_number) else None
        held = cache.holds(numbers) if cache else np.zeros(len(numbers), dtype=np.bool_)
        if held.any():
            yield from self._delta(numbers[held], pages[held], bases[held])
        if not held.all():
            yield from self._whole(numbers[~held], pages[~held] if held.any() else pages)
        begun = self._clock()
        if cache:
            cache.keep(numbers, pages, round_number)
        else:
            self.forget(numbers)
            self._maybe_sample_delta(numbers, pages, round_number)
        self._keeping_s = (self._clock() - begun) / len(numbers) if cache else 0.0

    def forget(self, index: slice | Numbers) -> None:
        """The pages at *index* were sent straight from live memory: nobody knows as what."""
        if self._cache is not None and self._cache.held:
            self._cache.drop(np.arange(index.start, index.stop) if isinstance(index, slice) else index)

    def maybe_sample(self, numbers: Numbers, pages: Pages, round_number: int) -> None:
        """Find out how the pages *numbers*, sent as *pages*, would compress, if that is due."""
        if not len(pages):
            return
        self._maybe_sample_whole(pages)
        self._maybe_sample_delta(numbers, pages, round_number)

    def _maybe_sample_whole(self, pages: Pages) -> None:
        if self._may_compress and self.worth.wants_sample(ZSTD):
            self._try(ZSTD, pages[:: max(len(pages) // _SAMPLE_PAGES, 1)][:_SAMPLE_PAGES])

    def _maybe_sample_delta(self, numbers: Numbers, pages: Pages, round_number: int) -> None:
        """A few pages are remembered; when they come again, it is seen how little has changed."""
        if self._cache is None or round_number == _FIRST_ROUND or not self.worth.is_slow:
            return
        begun = self._clock()
        if self._sample.may_be_in(int(numbers[0]), int(numbers[-1]), round_number):
            changed = self._sample.changes(numbers, pages)
            if changed is not None:
                # In earnest a page is copied twice: to be packed, and to be kept.
                self._try(DELTA, changed, self._clock() - begun + 2 * self._taking_s * len(changed))
        elif self._sample.is_wanted(round_number) and self.worth.wants_sample(DELTA):
            self._sample.take(numbers, pages, round_number)
            self._taking_s = (self._clock() - begun) / min(len(numbers), SAMPLE_PAGES)

    def _delta(self, numbers: Numbers, pages: Pages, bases: Digests) -> Iterator[Encoded]:
        assert self._cache is not None
        begun = self._clock()
        changed = pages.copy()
        self._cache.xor(numbers, changed)
        frame = self._pack(DELTA, changed, self._clock() - begun)
        if len(frame) + bases.nbytes < pages.nbytes * _WORTH_A_RECORD:
            yield Encoded(RecordKind.DELTA, numbers, (bases.astype(">u8").tobytes(), frame))
        else:
            yield from self._whole(numbers, pages)

    def _whole(self, numbers: Numbers, pages: Pages) -> Iterator[Encoded]:
        if self._may_compress and self.worth.pays(ZSTD):
            frame = self._pack(ZSTD, pages)
            if len(frame) < pages.nbytes * _WORTH_A_RECORD:
                yield Encoded(RecordKind.ZSTD, numbers, (frame,))
                return
        else:
            self._maybe_sample_whole(pages)
        yield Encoded(RecordKind.PAGES, numbers, (pages.data.cast("B"),))

    def _pack(self, way: str, pages: Pages, before_s: float = 0.0) -> bytes:
        """Compressed, and charged with *before_s* and with the copies of these pages.

        Keeping comes after packing: what it took the last time stands for this time.
        """
        begun = self._clock()
        frame = self._compressed(pages)
        copies_s = (self._copying_s + self._keeping_s) * len(pages)
        self.worth.note_packed(way, pages.nbytes, len(frame), self._clock() - begun + before_s + copies_s)
        return frame

    def _try(self, way: str, pages: Pages, before_s: float = 0.0) -> None:
        """What compressing *pages* would bring; *before_s* is what it took to get them."""
        begun = self._clock()
        frame = self._compressed(pages)
        self.worth.note_sample(way, pages.nbytes, len(frame), self._clock() - begun + before_s)

    def _compressed(self, pages: Pages) -> bytes:
        return self._compressor.compress(np.ascontiguousarray(pages).data.cast("B"))


class Unpacker:
    """Undoes what a `Packer` did, for one stream, in its thread."""

    def __init__(self) -> None:
        # A frame never needs to look further back than a record is long: more would be a peer's wish for our memory.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_RECORD_PAGES * PAGE_SIZE)

    def unpack_into(self, frame: memoryview, target: memoryview) -> None:
        """Decompress *frame*, which must give exactly what fills *target*.

        Raises: RemoteProtocolError `bad_record`; *target* then holds anything.
        """
        try:
            if zstandard.frame_content_size(frame) != len(target):
                raise RemoteProtocolError("bulk record: its pages are not as long as they should be", code="bad_record")
            with self._decompressor.stream_reader(frame) as reader:
                filled = 0
                while filled < len(target) and (count := reader.readinto(target[filled:])):
                    filled += count
        except zstandard.ZstdError as exc:
            raise RemoteProtocolError(f"bulk record: its pages do not decompress: {exc}", code="bad_record") from None
        if filled != len(target):
            raise RemoteProtocolError("bulk record: its pages end too early", code="bad_record")
