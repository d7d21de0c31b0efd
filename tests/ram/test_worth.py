"""Compressing is judged by what it brings: over simulated links, in simulated time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from vmmigrate.memory import MIB, PAGE_SIZE
from vmmigrate.ram.worth import Worth

RECORD_BYTES = 1 << 20
QUEUE_BYTES = 4 << 20
WORK_S_PER_BYTE = 0.9 / (1 << 30)
GBIT_S_PER_BYTE = 8e-9


@dataclass
class Stream:
    """A sender with a clock of its own, and behind a queue a link.

    Attributes:
        wire_s_per_byte: What the link takes for a byte; may be changed at any time.
        packing_s_per_byte, ratio: Of the data that there is to send.
        sample_bytes: How much is compressed to see what it would bring.
    """

    wire_s_per_byte: float
    packing_s_per_byte: float
    ratio: float
    sample_bytes: int = 32 << 10
    queue_bytes: int = QUEUE_BYTES
    worth: Worth = field(default_factory=Worth)
    now_s: float = 0.0
    unsent_bytes: float = 0.0

    def run(self, records: int) -> float:
        """Send so many records; the seconds that it took until they were through, after those before."""
        begun_s = self.now_s + self.unsent_bytes * self.wire_s_per_byte
        for _ in range(records):
            self._send_one()
        return self.now_s + self.unsent_bytes * self.wire_s_per_byte - begun_s

    def _send_one(self) -> None:
        if self.worth.pays("zstd"):
            packed = int(RECORD_BYTES * self.ratio)
            self._work(RECORD_BYTES * self.packing_s_per_byte)
            self.worth.note_packed("zstd", RECORD_BYTES, packed, RECORD_BYTES * self.packing_s_per_byte)
            self._work(packed * WORK_S_PER_BYTE)
            self._hand_over(packed)
            return
        if self.worth.wants_sample("zstd"):
            spent_s = self.sample_bytes * self.packing_s_per_byte
            self._work(spent_s)
            self.worth.note_sample("zstd", self.sample_bytes, int(self.sample_bytes * self.ratio), spent_s)
        self._work(RECORD_BYTES * WORK_S_PER_BYTE)
        self._hand_over(RECORD_BYTES)
        self.worth.note_work(RECORD_BYTES, RECORD_BYTES * WORK_S_PER_BYTE)

    def _work(self, seconds: float) -> None:
        self.now_s += seconds
        self.unsent_bytes = max(self.unsent_bytes - seconds / self.wire_s_per_byte, 0.0)

    def _hand_over(self, wire_bytes: int) -> None:
        """Wait until the queue has room, as a blocking socket does."""
        self.unsent_bytes += wire_bytes
        waited_s = max(self.unsent_bytes - self.queue_bytes, 0.0) * self.wire_s_per_byte
        self.now_s += waited_s
        self.unsent_bytes = min(self.unsent_bytes, self.queue_bytes)
        if self.worth.note_sent(wire_bytes, waited_s):
            self.worth.note_queue(self.now_s, int(self.unsent_bytes))


class Decided(Worth):
    """One who has decided once and for all."""

    def __init__(self, compresses: bool) -> None:
        super().__init__()
        self._compresses = compresses

    def pays(self, way: str) -> bool:
        return self._compresses

    def wants_sample(self, way: str) -> bool:
        return False


def best_s(stream: Stream, records: int) -> float:
    """What the better of always and never takes."""
    return min(replace(stream, worth=Decided(always), now_s=0.0).run(records) for always in (False, True))


@pytest.mark.parametrize("gigabit_per_s", [0.1, 0.3, 1, 3, 10, 40, 400])
@pytest.mark.parametrize("ratio", [0.02, 0.33, 0.7, 1.0])
@pytest.mark.parametrize("packing_s_per_gib", [0.2, 2.0, 5.0])
@pytest.mark.parametrize("queue_bytes", [QUEUE_BYTES, 128 << 10])
def test_it_costs_little_more_than_the_better_of_always_and_never(
    gigabit_per_s: float, ratio: float, packing_s_per_gib: float, queue_bytes: int
) -> None:
    """Also with a queue that holds less than a record, as the kernel's does on a link of little delay."""
    stream = Stream(GBIT_S_PER_BYTE / gigabit_per_s, packing_s_per_gib / (1 << 30), ratio, queue_bytes=queue_bytes)

    stream.run(100)  # what the first records teach
    took_s = stream.run(1000)

    assert took_s <= best_s(stream, 1000) * 1.06


def test_a_fast_link_is_hardly_slowed_down_by_samples() -> None:
    stream = Stream(GBIT_S_PER_BYTE / 400, 5.0 / (1 << 30), 1.0)

    took_s = stream.run(1000)

    assert took_s <= 1000 * RECORD_BYTES * WORK_S_PER_BYTE * 1.03


@pytest.mark.parametrize("queue_bytes", [QUEUE_BYTES, 128 << 10])
def test_a_slow_link_is_found_out_within_a_few_windows(queue_bytes: int) -> None:
    stream = Stream(GBIT_S_PER_BYTE, 2.0 / (1 << 30), 0.33, queue_bytes=queue_bytes)

    stream.run(16)

    assert stream.worth.is_dear
    assert stream.worth.pays("zstd")


@pytest.mark.parametrize(("before", "after"), [(1, 40), (40, 1), (0.1, 40)])
@pytest.mark.parametrize("queue_bytes", [QUEUE_BYTES, 128 << 10])
def test_a_link_that_changes_its_speed_is_found_out(before: float, after: float, queue_bytes: int) -> None:
    """Also one that became faster, although the queue runs empty all the time and tells only a bound."""
    stream = Stream(GBIT_S_PER_BYTE / before, 4.0 / (1 << 30), 0.33, queue_bytes=queue_bytes)
    stream.run(200)

    stream.wire_s_per_byte = GBIT_S_PER_BYTE / after
    stream.run(1500)
    took_s = stream.run(200)

    assert took_s <= best_s(stream, 200) * 1.1
    assert stream.worth.pays("zstd") is (after == 1)


def test_data_that_stops_compressing_is_sent_as_it_is() -> None:
    stream = Stream(GBIT_S_PER_BYTE, 2.0 / (1 << 30), 0.33)
    stream.run(50)
    assert stream.worth.pays("zstd")

    stream.ratio = 1.0
    stream.run(50)

    assert not stream.worth.pays("zstd")


def test_waiting_for_a_processor_is_not_waiting_for_the_link() -> None:
    """Half of the time, in sending: a busy host with a fast link."""
    worth, now_s, delayed_s = Worth(), 0.0, 0.0
    for _ in range(64):
        worth.note_work(RECORD_BYTES, 0.001)
        now_s, delayed_s = now_s + 0.002, delayed_s + 0.001
        if worth.note_sent(RECORD_BYTES, 0.001):
            worth.note_queue(now_s, 0, delayed_s)

    assert not worth.is_dear


def test_a_limit_is_known_before_anything_was_measured_and_forgotten_when_it_is_lifted() -> None:
    stream = Stream(GBIT_S_PER_BYTE / 400, 2.0 / (1 << 30), 0.33)
    stream.run(1)

    stream.worth.paced_s_per_byte = GBIT_S_PER_BYTE
    assert stream.worth.is_dear
    assert stream.worth.pays("zstd")

    stream.worth.paced_s_per_byte = 0.0
    assert not stream.worth.is_dear
    assert not stream.worth.pays("zstd")


def test_nothing_pays_of_which_nothing_is_known() -> None:
    worth = Worth()

    assert not worth.pays("zstd")
    assert not worth.is_dear
    assert worth.wants_sample("zstd")


def test_what_is_done_however_pages_go_is_no_gain_of_compressing() -> None:
    """A link of which a MiB takes 1.5 s where all of our own work takes 1, and packing 0.5: compressing to nothing
    leaves what looking takes."""

    def judged(look_s: float) -> Worth:
        worth = Worth()
        worth.note_look(MIB, look_s)
        worth.note_work(MIB, 1.0)
        worth.note_packed("zstd", MIB, 0, 0.5)
        worth.paced_s_per_byte = 1.5 / MIB
        return worth

    assert judged(0.5).pays("zstd")
    assert not judged(1.0).pays("zstd")


def test_what_is_not_known_is_believed_to_pay_only_where_the_link_is_by_far_the_slower_stage() -> None:
    worth = Worth()
    worth.note_work(MIB, 1.0)

    worth.paced_s_per_byte = 2.0 / MIB
    assert worth.is_slow
    assert not worth.promises("delta")
    worth.paced_s_per_byte = 8.0 / MIB
    assert worth.promises("delta")

    for _ in range(4):
        assert worth.promises("delta")
        worth.note_packed("delta", MIB, MIB, 1.0)
    assert not worth.promises("delta")


def test_one_dear_first_time_does_not_condemn_a_way() -> None:
    worth = Worth()
    worth.note_work(MIB, 1.0)
    worth.paced_s_per_byte = 8.0 / MIB

    worth.note_packed("delta", MIB, 0, 20.0)
    assert worth.promises("delta")
    worth.note_packed("delta", MIB, 0, 1.0)

    assert worth.pays("delta")


def test_a_cheap_sample_does_not_make_a_way_cheap_that_was_dear_in_use() -> None:
    """Its cost creeps down, so that it is tried again one day; what is dearer counts at once."""
    worth = Worth()
    worth.note_work(MIB, 1.0)
    worth.paced_s_per_byte = 4.0 / MIB
    worth.note_packed("delta", MIB, 0, 8.0)

    tried = 0
    while not worth.pays("delta") and tried < 100:
        worth.note_sample("delta", MIB, 0, 0.1)
        tried += 1
    assert 4 < tried < 100

    worth.note_sample("delta", MIB, 0, 9.0)
    assert not worth.pays("delta")


def test_a_few_pages_tell_nothing_of_what_a_way_costs() -> None:
    worth = Worth()

    worth.note_packed("delta", 4 * PAGE_SIZE, 10, 1.0)
    worth.note_sample("delta", 4 * PAGE_SIZE, 10, 1.0)

    assert worth.wants_sample("delta")


def test_an_idle_time_between_rounds_is_not_taken_for_a_slow_link() -> None:
    stream = Stream(GBIT_S_PER_BYTE / 40, 5.0 / (1 << 30), 0.33)
    stream.run(40)

    stream.now_s += 60.0
    stream.unsent_bytes = 0
    stream.worth.note_round()
    stream.run(40)

    assert not stream.worth.is_dear
    assert not stream.worth.pays("zstd")
