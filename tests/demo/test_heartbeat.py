"""From when how many bytes of a console were seen, to how long a guest stood still and who ran it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from vmmigrate.demo.heartbeat import NS_PER_MS, READY, Output, Sighting, joined, letters, rhythm
from vmmigrate.demo.watching import ConsoleWatch, watch_consoles

ALPHABET = b"abcdefghijklmnopqrstuvwxyz"


def said(beats: int) -> bytes:
    """All that a stress guest has said when it has beaten so often."""
    return READY + (ALPHABET * (beats // 26 + 1))[:beats]


def output(host: str, *looks: tuple[float, int], text: bytes = b"") -> Output:
    """A console that at each look, in ms, held what was said up to so many beats."""
    sightings = tuple(Sighting(int(at_ms * NS_PER_MS), len(said(beats))) for at_ms, beats in looks)
    return Output(host, sightings, text or said(looks[-1][1]))


SOURCE = output("a", (0, 1), (1, 2), (2, 3), (4, 5))
DESTINATION = output("b", (10, 5), (14, 6), (15, 7), (17, 9))


def test_the_gap_of_a_move_is_from_the_last_letter_there_to_the_first_one_here() -> None:
    """The history, which arrives in between, is nobody's beat."""
    story = joined([DESTINATION, SOURCE])
    beats, holes = letters(story.text)
    seen = rhythm(story, beats)

    assert (story.problems, holes) == ((), [])
    assert story.text == said(9)
    assert seen.heartbeats == 9
    assert seen.hosts == ("a", "b")
    assert seen.move_gaps_ms == (10.0,)
    assert seen.largest_gap_ms == 10.0
    assert seen.steady_p99_ms == 2.0  # two letters at one look: one gap, and one of nothing


def test_a_guest_that_goes_there_and_back_has_two_moves() -> None:
    back = output("a", (20, 9), (26, 10))

    story = joined([SOURCE, DESTINATION, back])
    seen = rhythm(story, letters(story.text)[0])

    assert story.problems == ()
    assert seen.hosts == ("a", "b", "a")
    assert seen.move_gaps_ms == (10.0, 9.0)


def test_a_source_that_writes_after_its_console_was_taken_over_is_a_second_owner() -> None:
    """Both write the same letters, since both have the same state: only the time tells."""
    source = output("a", (0, 1), (4, 5), (11, 6))

    story = joined([source, DESTINATION])

    assert story.problems == ("a still wrote 1 bytes when b had taken over",)
    assert letters(story.text)[1] == []


def test_a_history_that_is_not_what_the_source_wrote_is_told() -> None:
    other = output("b", (10, 5), (14, 6), text=said(6).replace(b"c", b"x"))

    assert joined([SOURCE, other]).problems == ("the history that b took over is not what a had written",)


def test_a_hole_in_the_middle_of_a_long_history_is_none_of_the_guest() -> None:
    """Of more than 2 MiB the first and the last travel, and what is said goes on after it."""
    beats, end = 3 << 20, 1 << 20
    whole = said(beats)
    history = whole[:end] + bytes(len(whole) - 2 * end) + whole[-end:]
    source = output("a", (0, 1), (4, beats))
    destination = output("b", (10, beats), (12, beats + 1), text=history + said(beats + 1)[-1:])

    story = joined([source, destination])

    assert story.problems == ()
    assert letters(story.text) == (range(len(READY), len(READY) + beats + 1), [])


def test_a_destination_that_only_took_the_history_did_not_run_the_guest() -> None:
    """A move that failed at the last moment: the source goes on."""
    source = output("a", (0, 1), (4, 5), (30, 6))

    story = joined([source, output("b", (10, 5)), Output("b", (), b"")])

    assert story.problems == ()
    assert [piece.host for piece in story.pieces] == ["a"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (said(30)[:-1], None),
        (said(4) + said(6)[-1:], "beat 5 is 'f', and should be 'e'"),
        (said(4) + said(4)[-1:], "beat 5 is 'd', and should be 'e'"),
        (b"?" + said(4), "instead of"),
        (b"", "instead of"),
    ],
)
def test_a_letter_that_is_missing_or_came_twice_is_named(text: bytes, complaint: str | None) -> None:
    holes = letters(text)[1]

    assert len(holes) == (complaint is not None)
    assert all(str(complaint) in hole for hole in holes)


def test_a_guest_that_said_nothing_has_no_rhythm() -> None:
    seen = rhythm(joined([]), [])

    assert (seen.heartbeats, seen.largest_gap_ms, seen.steady_p99_ms) == (0, 0.0, 0.0)
    assert (seen.move_gaps_ms, seen.hosts) == ((), ())


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=2, max_size=40), st.data())
def test_however_the_looks_fall_every_beat_counts_once_and_no_time_is_lost(
    steps: Sequence[tuple[int, int]], data: st.DataObject
) -> None:
    """Gaps, those of moves among them, add up to the time from the first look to the last."""
    looks, at_ms, beats = [], 0, 0
    for more_ms, more_beats in steps:
        at_ms, beats = at_ms + more_ms, beats + more_beats
        looks.append((at_ms, beats))
    cut = data.draw(st.integers(1, len(looks) - 1))
    arrival = (looks[cut - 1][0] + 0.5, looks[cut - 1][1])

    story = joined([output("a", *looks[:cut]), output("b", arrival, *looks[cut:])])
    seen = rhythm(story, letters(story.text)[0])

    assert story.problems == ()
    assert seen.heartbeats == beats
    assert seen.move_gaps_ms == (looks[cut][0] - looks[cut - 1][0],)
    assert seen.largest_gap_ms == max(later[0] - earlier[0] for earlier, later in pairwise(looks))


# -- the watcher -----------------------------------------------------------------------------------------------------


async def shown(watch: ConsoleWatch, *texts: bytes) -> list[Output]:
    """The outputs, once they are *texts*."""
    with trio.fail_after(10):
        while sorted(seen.text for seen in watch.outputs()) != sorted(texts):
            await trio.sleep(0.001)
    return watch.outputs()


async def test_watcher_sees_a_console_grow_and_keeps_it_when_its_guest_is_gone(tmp_path: Path) -> None:
    console, other = tmp_path / "a/token/com1.log", tmp_path / "b/other/com1.log"
    async with watch_consoles({"a": tmp_path / "a", "b": tmp_path / "b"}, "com1") as watch:
        assert watch.outputs() == []
        for path in (console, other):
            path.parent.mkdir(parents=True)
            path.touch()
        await shown(watch, b"", b"")
        fd = os.open(console, os.O_WRONLY | os.O_APPEND)
        os.write(fd, b"one")
        await shown(watch, b"one", b"")
        console.unlink()
        os.write(fd, b"two")
        os.close(fd)
        await shown(watch, b"onetwo", b"")
        other.write_bytes(b"onetwothree")
        seen = {output.host: output for output in await shown(watch, b"onetwo", b"onetwothree")}

    assert [sighting.size for sighting in seen["a"].sightings] == [3, 6]
    assert seen["a"].sightings[0].at_ns < seen["a"].sightings[1].at_ns < seen["b"].sightings[0].at_ns
    assert [piece.host for piece in joined(watch.outputs()).pieces] == ["a", "b"]


async def test_watcher_looks_no_longer_once_it_is_left(tmp_path: Path) -> None:
    console = tmp_path / "a/token/com1.log"
    console.parent.mkdir(parents=True)
    console.write_bytes(b"one")

    async with watch_consoles({"a": tmp_path / "a"}, "com1") as watch:
        await shown(watch, b"one")
    console.write_bytes(b"onetwo")

    assert [output.text for output in watch.outputs()] == [b"one"]
