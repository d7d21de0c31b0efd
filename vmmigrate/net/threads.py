"""Tasks and threads of one migration: several at once with one error, and blocking work that is always joined."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

import trio

from vmmigrate.errors import VmMigrateError

T = TypeVar("T")


async def run_all_joined(
    works: Sequence[Callable[[], T]], *, end: Callable[[], None], limiter: trio.CapacityLimiter | None = None
) -> list[T]:
    """Run *works* at once, each in a thread; their results, in order.

    When cancelled, or when one of them fails, call *end*, perhaps more than once, which must make all of them return,
    and wait until they have: as `run_joined`, with fewer tasks.
    """
    results: dict[int, T] = {}
    is_over = False

    async def end_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            if not is_over:
                end()

    async def run(index: int) -> None:
        try:
            results[index] = await trio.to_thread.run_sync(works[index], limiter=limiter)
        except BaseException:
            end()
            raise

    async with open_group() as watch:
        watch.start_soon(end_when_cancelled)
        try:
            with trio.CancelScope(shield=True):
                async with open_group() as group:
                    for index in range(len(works)):
                        group.start_soon(run, index)
        except VmMigrateError:
            # Work that was ended fails: that is how it ends, not what went wrong.
            await trio.lowlevel.checkpoint_if_cancelled()
            raise
        finally:
            is_over = True
        watch.cancel_scope.cancel()
    return [results[index] for index in range(len(works))]


async def run_joined(
    work: Callable[[], T], *, end: Callable[[], None], limiter: trio.CapacityLimiter | None = None
) -> T:
    """Run *work* in a thread. When cancelled, call *end*, which must make *work* return, and wait until it has.

    A thread that still reads a socket or writes guest RAM must not outlive its migration: whoever closes the socket
    under it hands its number to the next connection.
    """
    finished = trio.Event()
    results: list[T] = []
    errors: list[BaseException] = []

    async def run() -> None:
        with trio.CancelScope(shield=True):
            try:
                results.append(await trio.to_thread.run_sync(work, limiter=limiter))
            except BaseException as exc:
                errors.append(exc)
            finally:
                finished.set()

    async with open_group() as nursery:
        nursery.start_soon(run)
        try:
            await finished.wait()
        except trio.Cancelled:
            end()
            raise
    if errors:
        raise errors[0]
    return results[0]


@contextlib.asynccontextmanager
async def open_group() -> AsyncIterator[trio.Nursery]:
    """A nursery that raises one error, not a group: when a link is cut, every stream on it fails in its own words.

    A defect (anything that is not ours and not a cancellation) goes before an error of ours.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        raise min(_leaves(group), key=_rank) from None


def _rank(error: BaseException) -> int:
    """A defect first, then an error of ours; a cancellation only when there is nothing else."""
    if isinstance(error, trio.Cancelled | GeneratorExit):
        return 2
    return 1 if isinstance(error, VmMigrateError) else 0


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    leaves: list[BaseException] = []
    for exc in group.exceptions:
        leaves.extend(_leaves(exc) if isinstance(exc, BaseExceptionGroup) else [exc])
    return leaves


def run_delay_s() -> float:
    """For how long in all this thread could have run and had no processor; 0 where the kernel does not tell.

    Source: Linux, scheduler/sched-stats (/proc/<pid>/schedstat, second field). Some 10 µs.
    """
    try:
        with open("/proc/thread-self/schedstat", "rb", buffering=0) as schedstat:
            return int(schedstat.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0
