"""Blocking work always comes home, and many failures are told as one."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import closing

import pytest
import trio

from vmmigrate.errors import MigrationCancelled, RemoteProtocolError, TransportError
from vmmigrate.net.threads import open_group, run_all_joined, run_joined

WAIT_S = 5


class Work:
    """Blocking work that returns only when it is told to."""

    def __init__(self, result: Callable[[], int] = lambda: 7) -> None:
        self.begun = threading.Event()
        self.told = threading.Event()
        self.has_returned = False
        self.ends = 0
        self._result = result

    def run(self) -> int:
        self.begun.set()
        if not self.told.wait(WAIT_S):
            raise TimeoutError("nobody ended the work")
        self.has_returned = True
        return self._result()

    def end(self) -> None:
        self.ends += 1
        self.told.set()


def fail(error: BaseException) -> int:
    raise error


async def test_the_result_of_the_work_is_returned() -> None:
    assert await run_joined(lambda: 7, end=lambda: None) == 7


async def test_an_error_of_the_work_is_raised_as_it_is() -> None:
    error = TransportError("cut")

    with pytest.raises(TransportError) as caught:
        await run_joined(lambda: fail(error), end=lambda: None)

    assert caught.value is error


async def test_cancel_ends_the_work_once_and_waits_until_it_has_returned() -> None:
    work = Work()
    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                with pytest.raises(trio.Cancelled):
                    await run_joined(work.run, end=work.end)
                assert work.has_returned

            nursery.start_soon(run)
            await trio.to_thread.run_sync(work.begun.wait)
            nursery.cancel_scope.cancel()

    assert work.has_returned
    assert work.ends == 1


async def test_work_that_is_cancelled_before_it_begins_is_ended_and_joined_too() -> None:
    """It may own a socket which only it closes."""
    work = Work()
    with trio.CancelScope() as scope:
        scope.cancel()
        await run_joined(work.run, end=work.end)

    assert scope.cancelled_caught
    assert work.has_returned
    assert work.ends == 1


async def test_an_error_of_work_that_was_ended_does_not_hide_the_cancellation() -> None:
    """A socket that is shut down under a thread makes it fail: that is how it ends, not what went wrong."""
    work = Work(lambda: fail(TransportError("shut down")))
    with trio.CancelScope() as scope:
        scope.cancel()
        await run_joined(work.run, end=work.end)

    assert scope.cancelled_caught
    assert work.has_returned


async def test_shutdown_ends_a_thread_that_reads_a_socket() -> None:
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs), trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            work = Work()

            def read() -> bytes:
                work.begun.set()
                return ours.recv(1)

            async def run() -> None:
                await run_joined(read, end=lambda: ours.shutdown(socket.SHUT_RDWR))

            nursery.start_soon(run)
            await trio.to_thread.run_sync(work.begun.wait)
            nursery.cancel_scope.cancel()


async def test_a_limiter_of_ones_own_is_used() -> None:
    """The default one starves: threads of a migration live long."""
    limiter = trio.CapacityLimiter(1)
    borrowed = []

    await run_joined(lambda: borrowed.append(limiter.borrowed_tokens), end=lambda: None, limiter=limiter)

    assert borrowed == [1]
    assert limiter.borrowed_tokens == 0


# --------------------------------------------------------------------------- several at once


async def test_several_works_run_at_once_and_give_their_results_in_order() -> None:
    first, second = Work(lambda: 1), Work(lambda: 2)

    async def let_go() -> None:
        for work in (second, first):
            await trio.to_thread.run_sync(work.begun.wait)
        second.end()
        first.end()

    async with open_group() as nursery:
        nursery.start_soon(let_go)
        with trio.fail_after(WAIT_S):
            results = await run_all_joined([first.run, second.run], end=lambda: None)

    assert results == [1, 2]


async def test_nothing_to_run_gives_nothing() -> None:
    assert await run_all_joined([], end=lambda: None) == []


async def test_one_work_that_fails_ends_the_others_and_its_error_is_raised() -> None:
    other = Work()

    def cut() -> int:
        other.begun.wait(WAIT_S)
        return fail(TransportError("cut"))

    with pytest.raises(TransportError, match="cut"), trio.fail_after(WAIT_S):
        await run_all_joined([other.run, cut], end=other.end)

    assert other.has_returned


async def test_cancel_ends_all_works_and_waits_until_they_have_returned() -> None:
    """Also when they fail because they are ended: that does not hide the cancellation."""
    works = [Work(), Work(lambda: fail(TransportError("shut down")))]

    def end() -> None:
        for work in works:
            work.end()

    with trio.fail_after(WAIT_S), trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def cancel() -> None:
                for work in works:
                    await trio.to_thread.run_sync(work.begun.wait)
                scope.cancel()

            nursery.start_soon(cancel)
            await run_all_joined([work.run for work in works], end=end)

    assert scope.cancelled_caught
    assert all(work.has_returned for work in works)


async def test_works_that_are_over_are_not_ended() -> None:
    work = Work()
    work.told.set()

    await run_all_joined([work.run], end=work.end)

    assert work.ends == 0


# --------------------------------------------------------------------------- groups


async def raise_later(error: BaseException) -> None:
    await trio.lowlevel.cancel_shielded_checkpoint()  # so that no failure cancels another one
    raise error


async def fail_together(*errors: BaseException) -> None:
    """Let all of them happen in one turn of the loop."""
    async with open_group() as nursery:
        for error in errors:
            nursery.start_soon(raise_later, error)


async def test_one_error_comes_out_of_many() -> None:
    errors = [TransportError(str(number)) for number in range(3)]

    with pytest.raises(TransportError) as caught:
        await fail_together(*errors)

    assert caught.value in errors


@pytest.mark.parametrize("order", [1, -1])
async def test_a_defect_goes_before_an_error_of_ours(order: int) -> None:
    """A cut link must not hide that something is broken here."""
    errors = [TransportError("cut"), ZeroDivisionError(), RemoteProtocolError("odd")]

    with pytest.raises(ZeroDivisionError):
        await fail_together(*errors[::order])


async def test_an_error_in_a_group_in_a_group_comes_out_alone() -> None:
    async def nested() -> None:
        async with open_group() as outer:
            outer.start_soon(fail_together, TransportError("a"), TransportError("b"))
            outer.start_soon(raise_later, TransportError("c"))

    with pytest.raises(TransportError):
        await nested()


async def test_an_error_of_the_block_itself_comes_out_alone() -> None:
    async def block() -> None:
        async with open_group() as nursery:
            nursery.start_soon(trio.sleep_forever)
            raise MigrationCancelled("asked for")

    with pytest.raises(MigrationCancelled):
        await block()


async def test_cancellation_passes() -> None:
    with trio.CancelScope() as scope:
        async with open_group() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(trio.sleep_forever)
            scope.cancel()

    assert scope.cancelled_caught


async def test_an_error_while_a_cancellation_unwinds_is_not_lost() -> None:
    async def clean_up_badly() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise TransportError("cut")

    async def block() -> None:
        with trio.CancelScope() as scope:
            async with open_group() as nursery:
                nursery.start_soon(clean_up_badly)
                nursery.start_soon(trio.sleep_forever)
                await trio.lowlevel.checkpoint()
                scope.cancel()

    with pytest.raises(TransportError):
        await block()


async def test_a_group_without_errors_lets_all_its_tasks_finish() -> None:
    done = []

    async def work(number: int) -> None:
        await trio.lowlevel.checkpoint()
        done.append(number)

    async with open_group() as nursery:
        for number in range(3):
            nursery.start_soon(work, number)

    assert sorted(done) == [0, 1, 2]
