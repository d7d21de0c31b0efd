"""How pages become records and records pages again: as they are, compressed, or as what changed since the last time.

A page of zeros travels by name only. Everything else goes as it is (PAGES), or, where that pays (`worth`), compressed:
whole (ZSTD), or, if a copy of what was sent last is at hand (`delta`), as the compressed difference to that (DELTA).

Compressing looks at pages more than once, and guest memory changes meanwhile. So it works on one private copy, and what
is hashed, compressed and remembered as the base of later deltas is that copy, never a second look.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import zstandard

from vmmigrate.errors import RemoteProtocolError
from vmmigrate.memory import PAGE_SIZE
from vmmigrate.ram.delta import DeltaCache
from vmmigrate.ram.digest import Digests
from vmmigrate.ram.records import MAX_RECORD_PAGES, RecordKind
from vmmigrate.ram.worth import Worth

RAW, ZERO, ZSTD, DELTA = "raw", "zero", "zstd", "delta"  # words of the negotiation

LEVEL: Final = 1
_SAMPLE_PAGES: Final = 8
_DELTAS_ARE_TRIED_EVERY: Final = 16
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
        self._groups = 0
        self._unpaid_s = 0.0  # processor time for copies, which belongs to what is made of them

    def wants_copy(self, round_number: int) -> bool:
        """Whether the next pages should be encoded; else they are sent straight from where they lie."""
        if self._may_compress and self.worth.pays(ZSTD):
            return True
        return self._cache is not None and round_number > _FIRST_ROUND and self.worth.is_dear

    def copy_of(self, ram: Pages, index: slice | Numbers) -> Pages:
        """A private copy of at most one record's pages, good until the next call."""
        with self._on_account():
            if isinstance(index, slice):
                copy = self._copy[: index.stop - index.start]
                copy[:] = ram[index]
            else:
                copy = self._copy[: len(index)]
                np.take(ram, index, axis=0, out=copy, mode="clip")  # every other mode makes a copy on the way
        return copy

    @contextlib.contextmanager
    def _on_account(self) -> Iterator[None]:
        """What is done inside is paid for by the next that is packed."""
        begun = self._clock()
        yield
        self._unpaid_s += self._clock() - begun

    def encode(self, numbers: Numbers, pages: Pages, bases: Digests, round_number: int) -> Iterator[Encoded]:
        """Records that carry *pages*, a private copy of the pages *numbers*; to be taken all.

        Args:
            bases: The digest of each page as it was sent last.
        """
        self._groups += 1
        held = self._held(numbers)
        if held.any():
            yield from self._delta(numbers[held], pages[held], bases[held])
        if not held.all():
            yield from self._whole(numbers[~held], pages[~held] if held.any() else pages)
        if self._cache is not None and round_number > _FIRST_ROUND:
            with self._on_account():
                self._cache.keep(numbers, pages, round_number)

    def forget(self, index: slice | Numbers) -> None:
        """The pages at *index* were sent straight from live memory: nobody knows as what."""
        if self._cache is not None and self._cache.held:
            self._cache.drop(np.arange(index.start, index.stop) if isinstance(index, slice) else index)

    def maybe_sample(self, pages: Pages) -> None:
        """Find out how *pages* would compress, if that is due."""
        if self._may_compress and len(pages) and self.worth.wants_sample():
            unpaid_s, self._unpaid_s = self._unpaid_s, 0.0
            self._pack(ZSTD, pages[:: max(len(pages) // _SAMPLE_PAGES, 1)][:_SAMPLE_PAGES])
            self._unpaid_s = unpaid_s

    def _held(self, numbers: Numbers) -> npt.NDArray[np.bool_]:
        """Of which pages a delta should be tried. What did not pay is tried again from time to time."""
        due = self.worth.pays(DELTA) or self._groups % _DELTAS_ARE_TRIED_EVERY == 1
        if self._cache is None or not due:
            return np.zeros(len(numbers), dtype=np.bool_)
        return self._cache.holds(numbers)

    def _delta(self, numbers: Numbers, pages: Pages, bases: Digests) -> Iterator[Encoded]:
        assert self._cache is not None
        with self._on_account():
            changed = pages.copy()
            self._cache.xor(numbers, changed)
        frame = self._pack(DELTA, changed)
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
            self.maybe_sample(pages)
        yield Encoded(RecordKind.PAGES, numbers, (pages.data.cast("B"),))

    def _pack(self, way: str, pages: Pages) -> bytes:
        begun = self._clock()
        frame = self._compressor.compress(np.ascontiguousarray(pages).data.cast("B"))
        self.worth.note_packed(way, pages.nbytes, len(frame), self._clock() - begun + self._unpaid_s)
        self._unpaid_s = 0.0
        return frame


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
