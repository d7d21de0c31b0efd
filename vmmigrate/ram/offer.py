"""What to send in a round: a bitmap becomes, per stream, groups of page runs of at most one record each.

All of it is vectorised over runs; the only loop is per record (up to 1 MiB).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vmmigrate.memory import PageBitmap, Runs, split_runs
from vmmigrate.ram.records import MAX_RECORD_PAGES, STRIPE_PAGES


def runs_per_stream(pages: PageBitmap, streams: int) -> tuple[Runs, ...]:
    """The runs of each stream: cut at record boundaries, dealt out by stripe. Every page falls to one stream, always.

    Regions need no thought here: region boundaries that matter (holes between regions) are cut by `cut_at`.
    """
    runs = split_runs(pages.runs(), MAX_RECORD_PAGES)
    stream_of = runs[:, 0] // STRIPE_PAGES % streams
    return tuple(runs[stream_of == stream] for stream in range(streams))


def cut_at(runs: Runs, boundaries: tuple[int, ...]) -> Runs:
    """Cut runs at page numbers where one region ends and the next begins: a run never spans two regions."""
    for boundary in boundaries:
        crossing = (runs[:, 0] < boundary) & (runs[:, 0] + runs[:, 1] > boundary)
        if not crossing.any():
            continue
        low, high = runs[crossing].copy(), runs[crossing].copy()
        low[:, 1] = boundary - low[:, 0]
        high[:, 1] -= low[:, 1]
        high[:, 0] = boundary
        merged = np.concatenate([runs[~crossing], low, high])
        runs = merged[np.argsort(merged[:, 0], kind="stable")]
    return runs


def groups(runs: Runs, max_pages: int = MAX_RECORD_PAGES) -> Iterator[Runs]:
    """Consecutive runs that together fit one record. Every run must itself fit."""
    ends = np.cumsum(runs[:, 1])
    start, sent = 0, 0
    while start < len(runs):
        end = int(np.searchsorted(ends, sent + max_pages, side="right"))
        if end == start:
            raise ValueError(f"a run of {runs[start, 1]} pages, a record holds {max_pages}")
        yield runs[start:end]
        sent = int(ends[end - 1])
        start = end
