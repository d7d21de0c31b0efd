"""Whether compressing pays on a stream, judged all the time by what sending and compressing really cost there.

A stream is a pipe of two stages: its thread, which spends processor time, and behind the socket's queue the link, which
spends time on bytes. It is as fast as its slower stage:

    as it is      max(work, wire)                          seconds per byte of guest RAM
    compressed    max(packing + ratio * work, ratio * wire)

*Work* and *packing* are measured as processor time, so that waiting for the link is not taken for work. *Wire* can be
measured only while the link is the slower stage, that is while the queue does not run empty: then it is time over bytes
drained. While the queue runs empty that quotient is only an upper bound; it is taken as such, and creeps down, so that
a link which became faster is found out: in the end a few records go as they are, and the queue tells. The receiver's
pace is part of the wire's.

There are several ways to compress, each with a ratio and a cost of its own. While none is in use, now and then a sample
is compressed, for the ratio; samples may cost a hundredth of the time.

Source: peers.md 2.2 (compression pays below about 4 Gb/s per core) and XAPI's experience that a fixed choice costs a
third of the speed on a fast link.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_NEWEST: Final = 0.3  # weight of the newest measurement
_WINDOW_BYTES: Final = 4 << 20  # sent, before the link's speed is judged anew
_QUEUE_IS_BUSY_BYTES: Final = 64 << 10
_CREEP: Final = 0.96
_SAMPLE_SHARE: Final = 0.01
_GAIN: Final = 0.95  # what compressing has to bring the time down to before it begins,
_GAIN_IN_USE: Final = 0.98  # and to go on
_DEAR: Final = 2.0  # a link so many times slower than our own work


@dataclass
class _Way:
    """One way to compress: compressed size over size, and processor time per byte of guest RAM."""

    ratio: float
    packing_s_per_byte: float
    is_in_use: bool = False


class Worth:
    """The judge of one stream. Pure: times are handed in, in seconds.

    Attributes:
        wire_s_per_byte: What the link takes for a byte; 0 until it was the slower stage.
        work_s_per_byte: Processor time per byte of guest RAM that is sent as it is.
    """

    def __init__(self) -> None:
        self.wire_s_per_byte = 0.0
        self.work_s_per_byte = 0.0
        self._is_bound = True  # nothing is known of the link but how fast it is at least
        self._ways: dict[str, _Way] = {}
        self._sent_bytes = 0
        self._newest_bytes = 0
        self._window: tuple[float, int, int] | None = None  # when it began, bytes sent by then, and still unsent
        self._work_since_sample_s = 0.0
        self._sample_s = 0.0

    @property
    def is_dear(self) -> bool:
        """Whether the link is by far the slower stage: time spent on bytes that need not travel is well spent."""
        return self.wire_s_per_byte > self.work_s_per_byte * _DEAR

    def pays(self, way: str) -> bool:
        """Whether what is sent next should be compressed in this *way*, of which something is known."""
        known = self._ways.get(way)
        if known is None:
            return False
        work, wire = self.work_s_per_byte, self.wire_s_per_byte
        packed = max(known.packing_s_per_byte + known.ratio * work, known.ratio * wire)
        known.is_in_use = packed < max(work, wire) * (_GAIN_IN_USE if known.is_in_use else _GAIN)
        return known.is_in_use

    def note_round(self) -> None:
        """A round begins: the link may have been idle since the last record."""
        self._window = None

    def note_sent(self, wire_bytes: int) -> bool:
        """A record of *wire_bytes* was handed to the socket; whether `note_queue` is due."""
        self._sent_bytes += wire_bytes
        self._newest_bytes = wire_bytes
        return self._window is None or self._sent_bytes - self._window[1] >= _WINDOW_BYTES

    def note_queue(self, now_s: float, unsent_bytes: int) -> None:
        """The socket's queue now holds *unsent_bytes*; that is asked between two records."""
        if self._window is not None:
            begun_s, sent_before, unsent_before = self._window
            drained = self._sent_bytes - sent_before - (unsent_bytes - unsent_before)
            if drained > 0:
                # The record that was handed over just now waits in any queue; was there something before it?
                self._judge_link((now_s - begun_s) / drained, min(unsent_before, unsent_bytes) - self._newest_bytes)
        self._window = (now_s, self._sent_bytes, unsent_bytes)

    def _judge_link(self, seen_s_per_byte: float, queued_bytes: int) -> None:
        if queued_bytes < _QUEUE_IS_BUSY_BYTES:
            self.wire_s_per_byte = min(self.wire_s_per_byte * _CREEP, seen_s_per_byte)
            self._is_bound = True
        else:
            known = 0.0 if self._is_bound else self.wire_s_per_byte
            self.wire_s_per_byte = _smoothed(known, seen_s_per_byte)
            self._is_bound = False

    def note_work(self, ram_bytes: int, cpu_s: float) -> None:
        """So much was sent as it is, and took that much processor time."""
        self.work_s_per_byte = _smoothed(self.work_s_per_byte, cpu_s / ram_bytes)
        self._work_since_sample_s += cpu_s

    def note_packed(self, way: str, ram_bytes: int, packed_bytes: int, cpu_s: float) -> None:
        """So much was compressed to *packed_bytes*; the processor time of that alone."""
        known = self._ways.setdefault(way, _Way(packed_bytes / ram_bytes, cpu_s / ram_bytes))
        known.ratio = _smoothed(known.ratio, packed_bytes / ram_bytes)
        known.packing_s_per_byte = _smoothed(known.packing_s_per_byte, cpu_s / ram_bytes)
        self._sample_s = cpu_s
        self._work_since_sample_s = 0.0

    def wants_sample(self) -> bool:
        """Whether enough was sent as it is since the last sample for another one to be cheap."""
        return self._sample_s <= self._work_since_sample_s * _SAMPLE_SHARE


def _smoothed(mean: float, newest: float) -> float:
    return newest if mean == 0.0 else _NEWEST * newest + (1 - _NEWEST) * mean
