"""How a migration is going: a bar on a terminal, or one line for every step where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from vmmigrate.cli.moving import OnProgress

_MIB = 1 << 20


@contextmanager
def terminal_progress(stream: TextIO) -> Iterator[OnProgress]:
    """A bar for the round that runs, rewritten in place; nothing when *stream* is no terminal."""
    if not stream.isatty():
        yield lambda record: None
        return
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[line]}"),
    )
    with Progress(*columns, console=Console(file=stream), transient=True) as progress:
        yield _Bar(progress).show


@contextmanager
def line_progress(say: Callable[[str], None]) -> Iterator[OnProgress]:
    """Where nothing can be rewritten: one line for each new phase, and one for each round that ended."""
    yield _Lines(say).show


class _Bar:
    """Maps a record to the bar: full when every page of the round is sent."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID = progress.add_task("connecting", total=None, line="")
        self._round = 0
        self._pages = 1

    def show(self, record: Mapping[str, Any]) -> None:
        counters = record["progress"]
        left, number = counters.get("pages_left", 0), counters.get("round", 0)
        if number != self._round:
            self._round, self._pages = number, max(left, 1)
        self._pages = max(self._pages, left)
        self._progress.update(
            self._task,
            description=record["state"],
            total=self._pages if number else None,
            completed=self._pages - left,
            line=describe(record),
        )


class _Lines:
    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._state = ""
        self._rounds = 0

    def show(self, record: Mapping[str, Any]) -> None:
        rounds = record["ram"]["rounds"]
        for number, finished in enumerate(rounds[self._rounds :], start=self._rounds + 1):
            self._say(describe_round(number, finished))
        self._rounds = len(rounds)
        if record["state"] != self._state:
            self._state = record["state"]
            self._say(f"phase {self._state}")


def describe(record: Mapping[str, Any]) -> str:
    """Round, bytes, rate and dirty pages of a record, for people."""
    counters = record["progress"]
    if not counters.get("round"):
        return ""
    rate = counters.get("rate_bytes_per_s", 0) / _MIB
    return (
        f"round {counters['round']}  {record['ram']['sent_bytes'] / _MIB:8.1f} MiB  {rate:7.1f} MiB/s"
        f"  {counters.get('dirty_pages', 0):>7} dirty pages"
    )


def describe_round(number: int, finished: Mapping[str, Any]) -> str:
    seconds = max(finished["seconds"], 1e-9)
    return (
        f"round {number}: {finished['pages']} pages, {finished['bytes'] / _MIB:.1f} MiB in {seconds * 1000:.0f} ms"
        f" ({finished['bytes'] / _MIB / seconds:.0f} MiB/s), {finished['dirty_pages']} pages dirty again"
    )
