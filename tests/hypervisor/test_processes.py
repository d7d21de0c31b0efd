"""Guest processes found again and ended; one that this process cannot look at is never taken for one that is gone."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hypervisor.faults import out_of_descriptors
from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor import kernel, processes
from vmmigrate.hypervisor.base import GuestProcess
from vmmigrate.hypervisor.qemu.tracker import RamIdentity, foreign_writers


@pytest.fixture
def child() -> Iterator[GuestProcess]:
    """A process that does nothing until it is ended."""
    with subprocess.Popen(["sleep", "infinity"]) as process:
        started = kernel.start_ticks_of(process.pid)
        assert started is not None
        yield GuestProcess(process.pid, started, Path("/nowhere"))
        process.kill()


def lives(process: GuestProcess) -> bool:
    with contextlib.suppress(ChildProcessError):
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    return False


QUESTIONS: dict[str, Callable[[GuestProcess], object]] = {
    "when it started": lambda process: kernel.start_ticks_of(process.pid),
    "find": lambda process: processes.find(process.pid, process.start_ticks),
    "end": processes.end_process,
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_process_is_not_gone_because_this_one_has_no_descriptor_left(question: str, child: GuestProcess) -> None:
    with out_of_descriptors(), pytest.raises(HypervisorError, match="Too many open files") as caught:
        QUESTIONS[question](child)

    assert caught.value.code == "guest_unresponsive"
    assert lives(child)
    watch = processes.find(child.pid, child.start_ticks)
    assert watch is not None
    watch.close()


def test_a_child_that_cannot_be_watched_is_ended(child: GuestProcess) -> None:
    with out_of_descriptors(), pytest.raises(HypervisorError, match="Too many open files"):
        processes.watch_child(child.pid)

    assert kernel.start_ticks_of(child.pid) is None


def test_a_process_that_has_ended_is_gone(child: GuestProcess) -> None:
    """Also before anybody has waited for it."""
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert processes.find(child.pid, child.start_ticks) is None

    os.waitpid(child.pid, 0)
    assert processes.find(child.pid, child.start_ticks) is None
    assert kernel.start_ticks_of(child.pid) is None
    assert not processes.end_process(child)


def test_a_process_of_another_time_is_another_one(child: GuestProcess) -> None:
    assert processes.find(child.pid, child.start_ticks + 1) is None


def test_a_number_that_is_now_that_of_a_thread_is_no_process() -> None:
    """Numbers of processes are given to threads, too."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        assert thread.native_id is not None
        started = kernel.start_ticks_of(thread.native_id)
        assert started is not None

        assert processes.find(thread.native_id, started) is None
    finally:
        end.set()
        thread.join()


def test_a_process_is_ended_also_by_a_daemon_with_thousands_of_descriptors(child: GuestProcess) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip(f"this process may have {hard} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        fd = -1
        while fd < 1023:  # select(2) knows none beyond
            fd = os.open("/dev/null", os.O_RDONLY)
            stack.callback(os.close, fd)

        assert processes.end_process(child)

    assert not lives(child)


def test_processes_that_cannot_be_looked_at_are_not_taken_for_ones_that_do_not_write_guest_ram() -> None:
    with out_of_descriptors(), pytest.raises(HypervisorError, match="cannot be told: Too many open files"):
        foreign_writers(0, RamIdentity(1, 2))
    assert foreign_writers(0, RamIdentity(1, 2)) == []
