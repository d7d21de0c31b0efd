"""The pulse of a guest from outside: when how many bytes of its console were seen, on which host. Pure.

A guest that says something all the time shows by it when it ran, and where. QEMU appends what the guest says to a file
of its own, which at a destination begins with what the guest had said before: so the bytes of a console are numbered
through over all hosts, and what a QEMU wrote itself begins where the file of the one before it ended. When a byte was
seen is known as well as the files were looked at often; what was seen at one look is taken to be of that moment.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Final

NS_PER_MS: Final = 1_000_000
_COMPARED_BYTES: Final = 1 << 20  # of a longer history the first and the last so many travel

READY: Final = b"<READY>\n"
_LETTERS: Final = 26


@dataclass(frozen=True, slots=True)
class Sighting:
    """At *at_ns* (CLOCK_MONOTONIC) a console's file was first seen to have *size* bytes."""

    at_ns: int
    size: int


@dataclass(frozen=True, slots=True)
class Output:
    """The console's file of one QEMU, as it was seen to grow. *text* is what it held at the last sighting."""

    host: str
    sightings: tuple[Sighting, ...]
    text: bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """What one QEMU wrote itself: from byte *first* on, of all that the guest has said."""

    host: str
    first: int
    sightings: tuple[Sighting, ...]


@dataclass(frozen=True, slots=True)
class Story:
    """All that a guest said, and which host wrote what of it, in order.

    Attributes:
        problems: What cannot be if exactly one host at a time ran the guest.
    """

    text: bytes
    pieces: tuple[Piece, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rhythm:
    """Silences between beats in milliseconds, nothing subtracted.

    Attributes:
        move_gaps_ms: One for each change of host: from the last beat seen there to the first one seen here.
        steady_p99_ms: Of the gaps on one host, 99 % are at most this long.
        hosts: Where it beat, in order.
    """

    heartbeats: int
    largest_gap_ms: float
    steady_p99_ms: float
    move_gaps_ms: tuple[float, ...]
    hosts: tuple[str, ...]


def joined(outputs: Sequence[Output]) -> Story:
    """The files of all QEMUs of one guest as one story. A file that never grew beyond a history is no part of it."""
    there = sorted((output for output in outputs if output.sightings), key=lambda output: output.sightings[0].at_ns)
    ran: list[Output] = []
    pieces: list[Piece] = []
    problems: list[str] = []
    for output in there:
        first = len(ran[-1].text) if ran else 0
        own = tuple(sighting for sighting in output.sightings if sighting.size > first)
        if not own:
            continue
        if ran:
            problems += _problems_between(ran[-1], output)
        ran.append(output)
        pieces.append(Piece(output.host, first, own))
    text = b"".join(output.text[piece.first :] for output, piece in zip(ran, pieces, strict=True))
    return Story(text, tuple(pieces), tuple(problems))


def _problems_between(before: Output, after: Output) -> Iterator[str]:
    """Histories arrive while the guest stands still: from then on, nothing comes from where it was."""
    arrived = after.sightings[0].at_ns
    late = before.sightings[-1].size - max((s.size for s in before.sightings if s.at_ns < arrived), default=0)
    if late:
        yield f"{before.host} still wrote {late} bytes when {after.host} had taken over"
    told = after.text[: len(before.text)]
    ends = (slice(None, _COMPARED_BYTES), slice(-_COMPARED_BYTES, None))
    if any(told[end] != before.text[end] for end in ends):
        yield f"the history that {after.host} took over is not what {before.host} had written"


def rhythm(story: Story, beats: Sequence[int]) -> Rhythm:
    """How regularly a guest beat.

    Args:
        beats: Which bytes of the story each complete a beat; ascending.
    """
    seen = [_seen(story.pieces, beat) for beat in beats]
    steady, moves = list[float](), list[float]()
    hosts = [story.pieces[seen[0][0]].host] if seen else []
    for (piece, at_ns), (next_piece, next_ns) in pairwise(seen):
        gaps = steady if piece == next_piece else moves
        gaps.append((next_ns - at_ns) / NS_PER_MS)
        if piece != next_piece:
            hosts.append(story.pieces[next_piece].host)
    return Rhythm(
        heartbeats=len(beats),
        largest_gap_ms=max([*steady, *moves], default=0.0),
        steady_p99_ms=sorted(steady)[len(steady) * 99 // 100] if steady else 0.0,
        move_gaps_ms=tuple(moves),
        hosts=tuple(hosts),
    )


def _seen(pieces: Sequence[Piece], byte: int) -> tuple[int, int]:
    """In which piece a byte was written, and when it was seen."""
    number = bisect_right(pieces, byte, key=attrgetter("first")) - 1
    sightings = pieces[number].sightings
    return number, sightings[bisect_right(sightings, byte, key=attrgetter("size"))].at_ns


def letters(text: bytes) -> tuple[range, list[str]]:
    """The beats of the stress guest, a letter of a..z after the other, and what is wrong with them."""
    if not text.startswith(READY):
        return range(0), [f"the console begins with {text[: len(READY)]!r} instead of {READY!r}"]
    beats, sent = range(len(READY), len(text)), text[len(READY) :]
    alphabet = bytes(range(ord("a"), ord("a") + _LETTERS))
    if sent == (alphabet * (len(sent) // _LETTERS + 1))[: len(sent)]:
        return beats, []
    wrong = next(n for n, letter in enumerate(sent) if letter != alphabet[n % _LETTERS])
    found, wanted = chr(sent[wrong]), chr(alphabet[wrong % _LETTERS])
    return beats, [f"beat {wrong + 1} is {found!r}, and should be {wanted!r}: some are missing, or came twice"]
