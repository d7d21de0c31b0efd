"""Whether compressing pays on a stream, judged all the time by what sending and compressing really cost there.

A stream is a pipe of two stages: its thread, which spends processor time, and behind the socket's queue the link, which
spends time on bytes. It is as fast as its slower stage:

    as it is      max(work, wire)                                         seconds per byte of guest RAM
    compressed    max(look + packing + ratio * (work - look), ratio * wire)

A queue that holds less than a record cannot keep the link busy while the next one is made: then the faster stage counts
with what the queue does not last for.

*Work* is all that is done for pages that go as they are, of which *look* (digests, finding zeros) is done however they
go; *packing* is all that compressing takes, with the copies that are made and kept for it. They are measured as
processor time, so that waiting for the link is not taken for work. *Wire* can be
measured only while the link is the slower stage: then sending waits for room in the queue for a good part of the time
(or, where the queue is larger than a record, it does not run empty), and the wire's cost is time over bytes drained.
Otherwise that quotient is only an upper bound; it is taken as such, and creeps down, so that a link which became faster
is found out: in the end a few records go as they are, and tell. The receiver's pace is part of the wire's; waiting for
a processor is not. A limit that was set is known without being measured.

There are several ways to compress, each with a ratio and a cost of its own. While one is not in use, now and then a
sample is compressed, for the ratio; the samples of a way may cost half a hundredth of the time. What a sample costs
says little of what a way costs that has been in use: its known cost only creeps down. A few pages tell nothing.

Source: peers.md 2.2 (compression pays below about 4 Gb/s per core) and XAPI's experience that a fixed choice costs a
third of the speed on a fast link.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_NEWEST: Final = 0.3  # weight of the newest measurement
_WINDOW_BYTES: Final = 4 << 20  # sent, before the link's speed is judged anew
_FIRST_WINDOW_BYTES: Final = 1 << 20  # the first few times: what goes as it is until then is lost on a slow link
_FIRST_WINDOWS: Final = 4
_RECORD_BYTES: Final = 1 << 20  # of guest RAM, mostly
_QUEUE_IS_BUSY_BYTES: Final = 64 << 10
_WAITED_SHARE: Final = 0.25  # of the time, in sending: the link is what is waited for
_CREEP: Final = 0.96
_SAMPLE_SHARE: Final = 0.005
_TRIES: Final = 4  # the first is dearer than all after it: nothing is in a cache, no memory was touched
_TELLING_BYTES: Final = 32 << 10  # what is less costs mostly what every call costs
_FORGIVING: Final = 0.9  # of a known cost, at each sample that was cheaper
_GAIN: Final = 0.95  # what compressing has to bring the time down to before it begins,
_GAIN_IN_USE: Final = 0.98  # and to go on
_DEAR: Final = 4.0  # a link so many times slower than our own work that what is not known yet is believed to pay


@dataclass
class _Way:
    """One way to compress: compressed size over size, and processor time per byte of guest RAM."""

    ratio: float
    packing_s_per_byte: float
    is_in_use: bool = False
    tries: int = 0
    sample_s: float = 0.0
    work_at_sample_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Window:
    """Since when the link is looked at, what was sent by then, how much of that was still unsent, and for how long this
    thread had waited for a processor.
    """

    begun_s: float
    sent_bytes: int
    unsent_bytes: int
    delayed_s: float


class Worth:
    """The judge of one stream. Pure: times are handed in, in seconds.

    Attributes:
        paced_s_per_byte: What the limit that was set for the link makes of a byte; 0 without one.
        work_s_per_byte: Processor time per byte of guest RAM that is sent as it is.
        look_s_per_byte: What of that is spent before it is known how a page goes.
    """

    def __init__(self) -> None:
        self.paced_s_per_byte = 0.0
        self.work_s_per_byte = 0.0
        self.look_s_per_byte = 0.0
        self._seen_s_per_byte = 0.0
        self._is_bound = True  # nothing is known of the link but how fast it is at least
        self._ways: dict[str, _Way] = {}
        self._sent_bytes = 0
        self._newest_bytes = 0
        self._queue_bytes = 0
        self._waited_s = 0.0
        self._records = 0
        self._windows = 0
        self._window: _Window | None = None
        self._work_s = 0.0

    @property
    def wire_s_per_byte(self) -> float:
        """What the link takes for a byte; 0 until it was the slower stage."""
        return max(self._seen_s_per_byte, self.paced_s_per_byte)

    @property
    def is_slow(self) -> bool:
        """Whether the link is the slower stage: then alone compressing can pay."""
        return self.wire_s_per_byte > self.work_s_per_byte

    @property
    def is_dear(self) -> bool:
        """Whether the link is by far the slower stage: time spent on bytes that need not travel is well spent."""
        return self.wire_s_per_byte > self.work_s_per_byte * _DEAR

    def promises(self, way: str) -> bool:
        """As `pays`; a *way* that was not tried a few times in earnest is also believed to, where the link is dear."""
        known = self._ways.get(way)
        return self.pays(way) or ((known is None or known.tries < _TRIES) and self.is_dear)

    def pays(self, way: str) -> bool:
        """Whether what is sent next should be compressed in this *way*, of which something is known."""
        known = self._ways.get(way)
        if known is None:
            return False
        work, wire, look = self.work_s_per_byte, self.wire_s_per_byte, self.look_s_per_byte
        packing = look + known.packing_s_per_byte + known.ratio * max(work - look, 0.0)
        packed = self._through(packing, known.ratio * wire)
        known.is_in_use = packed < self._through(work, wire) * (_GAIN_IN_USE if known.is_in_use else _GAIN)
        return known.is_in_use

    def _through(self, work: float, wire: float) -> float:
        """Seconds for a byte through both stages: they overlap as long as the queue lasts."""
        if self._is_bound:
            return max(work, wire)
        overlap = self._queue_bytes * self.wire_s_per_byte / _RECORD_BYTES
        return work + wire - min(work, wire, overlap)

    def note_round(self) -> None:
        """A round begins: the link may have been idle since the last record."""
        self._window = None

    def note_sent(self, wire_bytes: int, waited_s: float) -> bool:
        """A record of *wire_bytes* was handed to the socket, which had no room for it for *waited_s*. Whether
        `note_queue` is due.
        """
        self._sent_bytes += wire_bytes
        self._newest_bytes = wire_bytes
        self._records += 1
        self._waited_s += waited_s
        due_bytes = _WINDOW_BYTES if self._windows >= _FIRST_WINDOWS else _FIRST_WINDOW_BYTES
        return self._window is None or self._sent_bytes - self._window.sent_bytes >= due_bytes

    def note_queue(self, now_s: float, unsent_bytes: int, delayed_s: float = 0.0) -> None:
        """The socket's queue now holds *unsent_bytes*; that is asked between two records.

        Args:
            delayed_s: For how long in all, so far, this thread could have run and had no processor.
        """
        if self._window is not None:
            self._waited_s = max(self._waited_s - (delayed_s - self._window.delayed_s), 0.0)
            self._judge_link(self._window, now_s - self._window.begun_s, unsent_bytes)
            self._windows += 1
        self._window = _Window(now_s, self._sent_bytes, unsent_bytes, delayed_s)
        self._records, self._waited_s = 0, 0.0

    def _judge_link(self, window: _Window, elapsed_s: float, unsent_bytes: int) -> None:
        drained = self._sent_bytes - window.sent_bytes - (unsent_bytes - window.unsent_bytes)
        if drained <= 0 or elapsed_s <= 0:
            return
        self._queue_bytes = max(window.unsent_bytes, unsent_bytes)
        # The record that was handed over just now waits in any queue; was there something before it?
        never_empty = min(window.unsent_bytes, unsent_bytes) - self._newest_bytes >= _QUEUE_IS_BUSY_BYTES
        if never_empty or self._waited_s >= elapsed_s * _WAITED_SHARE:
            known = 0.0 if self._is_bound else self._seen_s_per_byte
            self._seen_s_per_byte = _smoothed(known, self._busy_s(drained, elapsed_s) / drained)
            self._is_bound = False
        else:
            self._seen_s_per_byte = min(self._seen_s_per_byte * _CREEP, elapsed_s / drained)
            self._is_bound = True

    def _busy_s(self, drained: int, elapsed_s: float) -> float:
        """How long the link was busy: for as long as it was waited for, it drained all but what the queue held."""
        while_waiting = drained - self._records * self._queue_bytes
        return elapsed_s if while_waiting <= 0 else min(self._waited_s * drained / while_waiting, elapsed_s)

    def note_look(self, ram_bytes: int, cpu_s: float) -> None:
        """So much was looked at, before it was known how it is sent."""
        self.look_s_per_byte = _smoothed(self.look_s_per_byte, cpu_s / ram_bytes)

    def note_work(self, ram_bytes: int, cpu_s: float) -> None:
        """So much was sent as it is, and took that much processor time, with looking at it."""
        self.work_s_per_byte = _smoothed(self.work_s_per_byte, cpu_s / ram_bytes)
        self._work_s += cpu_s

    def note_packed(self, way: str, ram_bytes: int, packed_bytes: int, cpu_s: float) -> None:
        """So much was compressed to *packed_bytes* and sent; the processor time of that alone, without the sending."""
        if ram_bytes < _TELLING_BYTES:
            return
        known = self._ways.setdefault(way, _Way(packed_bytes / ram_bytes, cpu_s / ram_bytes))
        known.ratio = _smoothed(known.ratio, packed_bytes / ram_bytes)
        known.tries += 1
        if known.tries <= _TRIES:
            known.packing_s_per_byte = min(known.packing_s_per_byte, cpu_s / ram_bytes)
        else:
            known.packing_s_per_byte = _smoothed(known.packing_s_per_byte, cpu_s / ram_bytes)

    def note_sample(self, way: str, ram_bytes: int, packed_bytes: int, cpu_s: float) -> None:
        """So much was compressed to *packed_bytes*, to see what that would bring."""
        if ram_bytes < _TELLING_BYTES:
            return
        known = self._ways.setdefault(way, _Way(packed_bytes / ram_bytes, cpu_s / ram_bytes))
        known.ratio = _smoothed(known.ratio, packed_bytes / ram_bytes)
        known.packing_s_per_byte = max(known.packing_s_per_byte * _FORGIVING, cpu_s / ram_bytes)
        known.sample_s, known.work_at_sample_s = cpu_s, self._work_s

    def wants_sample(self, way: str) -> bool:
        """Whether enough was sent as it is since the last sample for another one to be cheap."""
        known = self._ways.get(way)
        return known is None or known.sample_s <= (self._work_s - known.work_at_sample_s) * _SAMPLE_SHARE


def _smoothed(mean: float, newest: float) -> float:
    return newest if mean == 0.0 else _NEWEST * newest + (1 - _NEWEST) * mean
