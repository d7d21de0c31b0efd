"""Plan a migration: everything up to the first rounds is done for real, measured, and then called off.

Both hosts negotiate, the destination builds the guest, and a part of RAM travels, so whatever would be refused is
refused, and what is measured is what a migration would meet. The guest is never paused. Meanwhile its marks are taken
at short intervals: unions of neighbouring ones tell how many different pages it writes within times of many lengths.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import numpy as np
import structlog
import trio

from vmmigrate.engine.agreement import Agreed
from vmmigrate.engine.copying import Copy, begin_copy, is_last_part, land_named, run_round
from vmmigrate.engine.limits import MigrationOptions
from vmmigrate.engine.outgoing import SourceMigration
from vmmigrate.errors import HypervisorError, MigrationCancelled
from vmmigrate.hypervisor.base import Guest, GuestRam
from vmmigrate.memory import PAGE_SIZE, PageBitmap
from vmmigrate.net.channel import Channel
from vmmigrate.net.sending import BulkSource
from vmmigrate.net.threads import open_group
from vmmigrate.ram.convergence import Convergence, Estimate, Limits, PauseForecast
from vmmigrate.ram.digest import PageHash
from vmmigrate.ram.forecast import DirtyCurve, MigrationForecast, simulate

log = structlog.get_logger(__name__)

_PROBE_S: Final = 1.0  # for RAM to travel
_INTERVAL_S: Final = 0.05
_INTERVALS: Final = 32
_EMPTY_ROUNDS: Final = 3
_SAMPLED_PAGES: Final = 1 << 13
_SAMPLED_IN_PARTS: Final = 8  # a MiB or two at a time
_STEADY: Final = 0.2  # measurements that differ by less
_UNSTEADY: Final = 0.5
_AMPLE: Final = 1.5  # of the time that is forecast
_AMPLE_PAUSE: Final = 1.2


async def plan_out(channel: Channel, bulk: BulkSource, agreed: Agreed, copy: Copy, migration: SourceMigration) -> None:
    """Measure, forecast, put it into the record, and call the migration off.

    Raises: MigrationCancelled, always.
    """
    await begin_copy(agreed, copy, migration)
    populated = await trio.to_thread.run_sync(migration.live.ram.populated)
    watched: Watched = Marks(migration.live)
    probe = _probe
    if migration.live.page_source == "stream":
        watched, probe = Sample(migration.live.ram, copy.page_hash, populated), _probe_named
    async with open_group() as beside:
        beside.start_soon(_watch, watched)
        zero_share = await probe(channel, bulk, copy, migration)
    with contextlib.suppress(HypervisorError):
        await migration.live.stop_tracking()
    measured = _Measured(
        first_pages=populated.count(),
        zero_share=zero_share,
        curve=DirtyCurve(_windows(watched), migration.live.ram.layout.pages),
        judge=copy.judge,
        dirty_pages=[watched.pages_in(taken) for taken in watched.intervals],
    )
    migration.record.plan = _plan_of(measured, migration.steering.limits, migration.steering.options)
    log.info("migration.planned", migration=migration.migration_id)
    raise MigrationCancelled("it was to be planned, and nothing was to move")


@dataclass(frozen=True)
class _Measured:
    """What was seen. `dirty_pages`: how many in each interval; `zero_share`: of the pages that travelled."""

    first_pages: int
    zero_share: float
    curve: DirtyCurve
    judge: Convergence
    dirty_pages: Sequence[int]

    def forecast(self, limits: Limits) -> MigrationForecast:
        judge = Convergence(self.judge.fixed_s, replace(self.judge.rate), replace(self.judge.overhead_s))
        zeros = int(self.first_pages * self.zero_share)
        return simulate(self.first_pages, self.curve, judge, limits, zero_pages=zeros)


async def _watch(watched: Watched) -> None:
    await watched.look()
    watched.intervals.clear()
    for _ in range(_INTERVALS):
        await trio.sleep(_INTERVAL_S)
        await watched.look()


async def _probe(channel: Channel, bulk: BulkSource, copy: Copy, migration: SourceMigration) -> float:
    """Send RAM for a while, then some empty rounds; the share of zero pages."""

    async def break_off() -> None:
        await trio.sleep(_PROBE_S)
        bulk.break_off()

    async with open_group() as timer:
        timer.start_soon(break_off)
        sent = await run_round(channel, bulk, copy, migration)
        timer.cancel_scope.cancel()
    await _probe_empty(channel, bulk, copy, migration)
    return sent.zero_pages / max(sent.pages, 1)


async def _probe_named(channel: Channel, bulk: BulkSource, copy: Copy, migration: SourceMigration) -> float:
    """The same with pages as a stream names them; never to the end of its pass, where it would stop the guest."""
    guest, until = migration.live, trio.current_time() + _PROBE_S
    sent = await land_named(
        channel, bulk, copy, migration, goes_on=lambda: trio.current_time() < until and not is_last_part(guest)
    )
    await guest.stop_tracking()
    await _probe_empty(channel, bulk, copy, migration)
    return sent.zero_pages / max(sent.pages, 1)


async def _probe_empty(channel: Channel, bulk: BulkSource, copy: Copy, migration: SourceMigration) -> None:
    for _ in range(_EMPTY_ROUNDS):
        copy.pending = PageBitmap(migration.live.ram.layout.pages)
        await run_round(channel, bulk, copy, migration)


class Watched(Protocol):
    """What the guest writes, interval by interval."""

    intervals: list[PageBitmap]

    async def look(self) -> None:
        """An interval is over."""

    def pages_in(self, written: PageBitmap) -> int:
        """How many pages of all RAM *written* stands for."""


class Marks:
    """Asks whoever knows at any time which pages were written."""

    def __init__(self, guest: Guest) -> None:
        self.intervals: list[PageBitmap] = []
        self._guest = guest

    async def look(self) -> None:
        self.intervals.append(await self._guest.take_dirty())

    def pages_in(self, written: PageBitmap) -> int:
        return written.count()


class Sample:
    """Compares some pages with what they were, for page sources that could not be asked without stopping the guest."""

    def __init__(self, ram: GuestRam, page_hash: PageHash, populated: PageBitmap) -> None:
        numbers = populated.page_numbers()
        self.intervals: list[PageBitmap] = []
        self._numbers = numbers[:: max(len(numbers) // _SAMPLED_PAGES, 1)]
        self._share = len(self._numbers) / max(len(numbers), 1)
        self._ram, self._hash = ram, page_hash
        self._digests = np.zeros(len(self._numbers), dtype=np.uint64)

    async def look(self) -> None:
        await trio.to_thread.run_sync(self._compare)

    def pages_in(self, written: PageBitmap) -> int:
        return round(written.count() / self._share) if self._share else 0

    def _compare(self) -> None:
        digests = np.concatenate(
            [self._hash.of(self._ram.sample(part)) for part in np.array_split(self._numbers, _SAMPLED_IN_PARTS)]
        )
        self.intervals.append(PageBitmap.from_flags(digests != self._digests))
        self._digests = digests


def _windows(watched: Watched) -> list[tuple[float, int]]:
    """How many different pages were written within one interval, two, four, ...: (seconds, pages)."""
    samples, unions, seconds = list[tuple[float, int]](), list(watched.intervals), _INTERVAL_S
    while unions:
        samples.append((seconds, round(float(np.mean([watched.pages_in(union) for union in unions])))))
        unions = [unions[i] | unions[i + 1] for i in range(0, len(unions) - 1, 2)]
        seconds *= 2
    return samples


# --------------------------------------------------------------------------- what is told


def _plan_of(measured: _Measured, limits: Limits, chosen: MigrationOptions) -> dict[str, Any]:
    """The plan as programs get it (docs/contracts/plan.json)."""
    forecast, judge = measured.forecast(limits), measured.judge
    in_time = forecast.total_s <= chosen.timeout_s
    interval_dirty = float(np.mean(measured.dirty_pages)) * PAGE_SIZE / _INTERVAL_S
    return {
        "converges": forecast.converges,
        "in_time": in_time,
        "rounds": len(forecast.rounds),
        "ram_bytes": forecast.ram_bytes,
        "total_s": forecast.total_s,
        "pause_s": forecast.pause.total_s,
        "pause_parts_s": {
            "fixed": forecast.pause.fixed_s,
            "overhead": forecast.pause.overhead_s,
            "pages": forecast.pause.pages_s,
        },
        "limit_s": limits.downtime_s,
        "rate_bytes_per_s": int(judge.rate.mean),
        "dirty_rate_bytes_per_s": int(interval_dirty),
        "working_set_bytes": measured.curve.pages(_INTERVAL_S * _INTERVALS) * PAGE_SIZE,
        "confidence": _confidence(measured),
        "would_help": _remedies(measured, limits, forecast, in_time, forced=chosen.force),
    }


def _confidence(measured: _Measured) -> dict[str, Any]:
    """How steady what was measured was; a guest that changes its ways cannot be foretold."""
    dirty = _spread(measured.dirty_pages)
    rate: Estimate = measured.judge.rate
    link = rate.deviation / rate.mean if rate.mean else math.inf
    worst = max(dirty, link)
    word = "high" if worst < _STEADY else "medium" if worst < _UNSTEADY else "low"
    return {"word": word, "dirty_rate_spread": round(dirty, 3), "link_spread": round(min(link, 1e6), 3)}


def _spread(values: Sequence[int]) -> float:
    """How far eighths of the time differ from the whole, as a part of it; 0 when hardly anything was written."""
    if len(values) < 8 or sum(values) <= 8 * len(values):
        return 0.0
    means = np.asarray(values[: len(values) // 8 * 8], dtype=np.float64).reshape(8, -1).mean(axis=1)
    return float(means.std() / means.mean())


def _remedies(
    measured: _Measured, limits: Limits, forecast: MigrationForecast, in_time: bool, *, forced: bool
) -> list[dict[str, Any]]:
    """Options with which it would converge, or end, and what it would then be like; none if none is needed.

    Args:
        forced: That was chosen already.
    """
    found = list[dict[str, Any]]()

    def would_end(options: dict[str, Any], would: MigrationForecast, pause: PauseForecast | None = None) -> None:
        pause_s = (pause or would.pause).total_s
        found.append({"options": options, "total_s": would.total_s - would.pause.total_s + pause_s, "pause_s": pause_s})

    if not in_time:
        would_end({"timeout_s": math.ceil(forecast.total_s * _AMPLE)}, forecast)
    if forecast.converges:
        return found
    longer_ms = math.ceil(forecast.pause.total_s * _AMPLE_PAUSE * 1000)
    tried: list[tuple[dict[str, Any], Limits]] = [
        ({"auto_converge": True}, replace(limits, auto_converge=True)),
        ({"downtime_ms": longer_ms}, replace(limits, downtime_s=longer_ms / 1000)),
    ]
    for options, changed in tried:
        would = measured.forecast(changed)
        if would.converges:
            would_end(options, would)
    if not forced:
        # After the last round, whatever was at its best before.
        would_end({"force": True}, forecast, measured.judge.forecast(forecast.rounds[-1].dirty_pages))
    return found
