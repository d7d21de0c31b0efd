"""Many tasks on one monitor: each gets its own, and whatever QEMU sends, or however it ends, nobody waits for ever.

Against a real QEMU, and against a peer that does as it is told. A deadline that passes fails the test: nothing here
waits for one.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.hypervisor.qemu_hosts import QEMU, requires_qemu, short_directory
from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.processes import ProcessWatch
from vmmigrate.hypervisor.qemu import launch, qmp
from vmmigrate.hypervisor.qemu.files import QemuFiles
from vmmigrate.hypervisor.qemu.machine import MONITOR_FD
from vmmigrate.hypervisor.qemu.qmp import Qmp, QmpError

DEADLINE_S = 20
HUNG_S = 5  # on a machine that has other things to do, what does not hang takes a tenth of it
GREETING = b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}}, "capabilities": ["oob"]}}\r\n'
AGREED = b'{"return": {}}\r\n'
CUT = (OSError, EOFError)
MANY = 40


@pytest.fixture
def short() -> Iterator[Path]:
    yield from short_directory()


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """What takes longer hangs."""
    with trio.fail_after(HUNG_S):
        yield


async def ended(call: Callable[[], Awaitable[Any]]) -> BaseException | Any:
    """What *call* gives, or what it raises: only what is promised, and soon."""
    try:
        with in_time():
            return await call()
    except (HypervisorError, *CUT) as exc:
        return exc


async def all_ended(*calls: Callable[[], Awaitable[Any]]) -> list[BaseException | Any]:
    """The same of all of them at once, in their order."""
    found: dict[int, Any] = {}

    async def end(number: int, call: Callable[[], Awaitable[Any]]) -> None:
        found[number] = await ended(call)

    async with trio.open_nursery() as nursery:
        for number, call in enumerate(calls):
            nursery.start_soon(end, number, call)
            await wait_all_tasks_blocked()
    return [found[number] for number in range(len(calls))]


# ---- a real QEMU


class RealQemu:
    def __init__(self, watch: ProcessWatch, files: QemuFiles) -> None:
        self.watch = watch
        self.files = files
        self.qmp = Qmp(files.monitor)

    async def remember(self, number: int) -> None:
        await self.qmp.execute("object-add", qom_type="authz-simple", id=f"object-{number}", identity=f"text {number}")

    async def recall(self, number: int) -> str:
        return str(await self.qmp.execute("qom-get", path=f"/objects/object-{number}", property="identity"))


@pytest.fixture
async def qemu(short: Path) -> AsyncIterator[RealQemu]:
    """A QEMU without a machine: it has nothing but its monitor."""
    files = QemuFiles(short)
    arguments = [
        *(QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "none", "-S"),
        *("-chardev", f"socket,id=monitor,fd={MONITOR_FD},server=on,wait=on", "-mon", "chardev=monitor,mode=control"),
    ]
    watch = await trio.to_thread.run_sync(launch.start, arguments, files)
    started = RealQemu(watch, files)
    try:
        with trio.fail_after(DEADLINE_S):
            yield started
    finally:
        started.qmp.close()
        watch.kill()
        watch.reap()
        watch.close()


class TestWithQemu:
    pytestmark = requires_qemu

    async def test_many_commands_at_once_get_their_own_answers(self, qemu: RealQemu) -> None:
        for number in range(MANY):
            await qemu.remember(number)

        answers = await all_ended(*(functools.partial(qemu.recall, number) for number in range(MANY)))

        assert answers == [f"text {number}" for number in range(MANY)]

    async def test_the_first_commands_may_all_come_at_once(self, qemu: RealQemu) -> None:
        """One of them connects for all."""
        answers = await all_ended(*[functools.partial(qemu.qmp.execute, "query-version")] * 10)

        assert all(answer["qemu"]["major"] >= 7 for answer in answers)

    async def test_answers_longer_than_what_is_read_at_once_arrive_whole(self, qemu: RealQemu) -> None:
        schemas = await all_ended(*[functools.partial(qemu.qmp.execute, "query-qmp-schema")] * 3)

        assert all(1 << 16 < len(json.dumps(schema)) < qmp.MAX_LINE_BYTES >> 3 for schema in schemas)
        assert schemas[0] == schemas[1] == schemas[2]

    async def test_an_error_of_qemu_names_the_command_and_its_class(self, qemu: RealQemu) -> None:
        with pytest.raises(QmpError, match="no-such-command") as caught:
            await qemu.qmp.execute("no-such-command")

        assert caught.value.code == "qemu_refused"
        assert caught.value.details == {"command": "no-such-command", "class": "CommandNotFound"}
        assert await qemu.qmp.execute("query-name") == {}

    async def test_an_error_reaches_the_one_whose_command_it_was(self, qemu: RealQemu) -> None:
        await qemu.remember(1)

        calls = [functools.partial(qemu.recall, number) for number in (1, 2, 1, 3)]
        answers = await all_ended(*calls)

        assert [answers[0], answers[2]] == ["text 1", "text 1"]
        assert all(isinstance(answer, QmpError) and "object-" in answer.text for answer in (answers[1], answers[3]))

    async def test_hyphens_of_qmp_are_underscores_here(self, qemu: RealQemu) -> None:
        text = await qemu.qmp.execute("human-monitor-command", command_line="info version")

        assert text.startswith("7.") or text[0].isdecimal()

    async def test_an_event_is_seen_by_all_who_wait_for_it(self, qemu: RealQemu) -> None:
        await qemu.qmp.open()
        seen = qemu.qmp.events_seen

        async def tell() -> None:
            await qemu.qmp.execute("cont")

        waiters = [functools.partial(qemu.qmp.wait_event, "RESUME", seen)] * 5
        *events, _ = await all_ended(*waiters, tell)

        assert {event.name for event in events} == {"RESUME"}
        assert len({event.number for event in events}) == 1

    async def test_an_event_that_came_with_an_answer_is_not_lost(self, qemu: RealQemu) -> None:
        await qemu.qmp.execute("query-name")
        seen = qemu.qmp.events_seen
        for command in ("cont", "stop"):
            await qemu.qmp.execute(command)

        resumed = await qemu.qmp.wait_event("RESUME", seen)
        stopped = await qemu.qmp.wait_event("STOP", resumed.number)

        assert resumed.number < stopped.number
        assert await ended(lambda: qemu.qmp.wait_event("RESUME", seen, lambda data: True)) == resumed

    async def test_a_command_that_is_given_up_leaves_the_others_their_answers(self, qemu: RealQemu) -> None:
        """At whatever moment, and whether it was the one that reads for all or not."""
        await qemu.remember(1)

        async def give_up(checkpoints: int) -> None:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:

                    async def cancel() -> None:
                        for _ in range(checkpoints):
                            await trio.lowlevel.checkpoint()
                        scope.cancel()

                    nursery.start_soon(cancel)
                    await qemu.qmp.execute("query-qmp-schema")

        for checkpoints in range(6):
            calls = [functools.partial(give_up, checkpoints), functools.partial(qemu.recall, 1)]
            for order in itertools.permutations(calls):
                answers = await all_ended(*order)
                assert "text 1" in answers

        assert await qemu.recall(1) == "text 1"

    async def test_a_command_that_is_given_up_half_sent_costs_the_connection_and_no_more(self, qemu: RealQemu) -> None:
        """A QEMU that stands still reads no more than the socket holds."""
        await qemu.remember(1)
        os.kill(qemu.watch.pid, signal.SIGSTOP)
        try:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(functools.partial(qemu.qmp.execute, "query-name", text="x" * (16 << 20)))
                    await wait_all_tasks_blocked()
                    scope.cancel()
        finally:
            os.kill(qemu.watch.pid, signal.SIGCONT)

        with in_time():
            assert await qemu.recall(1) == "text 1"

    async def test_a_killed_qemu_ends_the_waiting_of_all(self, qemu: RealQemu) -> None:
        await qemu.qmp.execute("query-name")
        os.kill(qemu.watch.pid, signal.SIGSTOP)

        async def kill() -> None:
            qemu.watch.kill()

        commands = [functools.partial(qemu.qmp.execute, "query-version")] * 3
        events = [functools.partial(qemu.qmp.wait_event, "RESUME", 0)] * 3
        *outcomes, _ = await all_ended(*commands, *events, kill)

        assert all(isinstance(outcome, CUT) for outcome in outcomes)

    async def test_of_a_killed_qemu_the_next_command_learns_at_once(self, qemu: RealQemu) -> None:
        await qemu.qmp.execute("query-name")
        qemu.watch.kill()
        qemu.watch.reap()

        for _ in range(3):
            assert isinstance(await ended(lambda: qemu.qmp.execute("query-name")), CUT)

    async def test_a_qemu_that_quits_answers_before(self, qemu: RealQemu) -> None:
        assert await qemu.qmp.execute("quit") == {}

        shutdown = await ended(lambda: qemu.qmp.wait_event("SHUTDOWN", 0))
        assert not isinstance(shutdown, BaseException)
        assert shutdown.data["reason"] == "host-qmp-quit"

    async def test_the_next_client_is_served_when_the_last_has_gone(self, qemu: RealQemu) -> None:
        await qemu.remember(1)
        qemu.qmp.close()

        qemu.qmp = Qmp(qemu.files.monitor)
        assert await qemu.recall(1) == "text 1"

    async def test_a_client_that_was_closed_says_so_and_connects_no_more(self, qemu: RealQemu) -> None:
        await qemu.qmp.execute("query-name")
        qemu.qmp.close()
        qemu.qmp.close()

        for _ in range(2):
            outcome = await ended(lambda: qemu.qmp.execute("query-name"))
            assert isinstance(outcome, HypervisorError)
            assert outcome.code == "guest_detached"


# ---- a peer that does as it is told


class Peer:
    """The other end of one connection."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock
        self._heard = bytearray()

    async def hear(self, lines: int = 1) -> list[dict[str, Any]]:
        """The next *lines*, as what they say."""
        while self._heard.count(b"\n") < lines:
            chunk = await self._sock.recv(1 << 16)
            if not chunk:
                raise EOFError
            self._heard += chunk
        *whole, rest = self._heard.split(b"\n", lines)
        self._heard = bytearray(rest)
        return [json.loads(line) for line in whole]

    async def say(self, words: bytes) -> None:
        left = memoryview(words)
        while left:
            left = left[await self._sock.send(left) :]

    async def answer(self, request: dict[str, Any], **answer: Any) -> None:
        await self.say(json.dumps({"id": request["id"], **answer}).encode() + b"\r\n")

    async def agree(self) -> None:
        await self.say(GREETING)
        await self.hear()
        await self.say(AGREED)

    def hang_up(self) -> None:
        self._sock.close()

    async def be_hung_up_on(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                await self.hear()


class Listening:
    """A monitor of which each connection is one `Peer`."""

    def __init__(self, path: Path) -> None:
        self.qmp = Qmp(path)
        self._listener = trio.socket.socket(socket.AF_UNIX)
        self._path = path
        self._stack = contextlib.ExitStack()

    async def __aenter__(self) -> Listening:
        self._stack.enter_context(self._listener)
        self._stack.callback(self.qmp.close)
        await self._listener.bind(str(self._path))
        self._listener.listen(4)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stack.close()

    async def accept(self) -> Peer:
        sock, _ = await self._listener.accept()
        self._stack.enter_context(sock)
        return Peer(sock)

    async def agreed(self) -> Peer:
        """The peer of a client that is connected."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.qmp.open)
            peer = await self.accept()
            await peer.agree()
        return peer


@pytest.fixture
async def listening(short: Path) -> AsyncIterator[Listening]:
    async with Listening(short / "qmp") as monitor:
        yield monitor


DEEP = b"[" * 200_000 + b"\n"
NOT_QMP = {
    "garbage": b"\xff\xfe garbage \x00\n",
    "an array": b'["QMP"]\n',
    "a number": b"5\n",
    "null": b"null\n",
    "an empty line": b"\n",
    "half an object": b'{"QMP": \n',
    "two objects": b'{"QMP": {}} {"return": {}}\n',
    "a bad escape": b'{"QMP": "\\u12"}\n',
    "a number of very many digits": b'{"id": ' + b"9" * 5000 + b"}\n",
    "a deep array": DEEP,
    "a deep object": b'{"return":' * 100_000 + b"1" + b"}" * 100_000 + b"\n",
}


@pytest.mark.parametrize("noise", NOT_QMP)
async def test_what_greets_otherwise_is_no_monitor(noise: str, listening: Listening) -> None:
    async def greet() -> None:
        peer = await listening.accept()
        await peer.say(NOT_QMP[noise])
        await peer.be_hung_up_on()

    outcome, _ = await all_ended(lambda: listening.qmp.execute("query-name"), greet)

    assert isinstance(outcome, HypervisorError)
    assert outcome.code == "qemu_protocol"


@pytest.mark.parametrize(
    "greeting", [b"{}\n", b'{"return": {}}\n', b'{"error": {"desc": "no"}}\n', b'{"event": "X"}\n']
)
async def test_an_object_that_is_no_greeting_is_refused(greeting: bytes, listening: Listening) -> None:
    async def greet() -> None:
        peer = await listening.accept()
        await peer.say(greeting)
        await peer.be_hung_up_on()

    outcome, _ = await all_ended(lambda: listening.qmp.execute("query-name"), greet)

    assert isinstance(outcome, HypervisorError)
    assert outcome.code == "qemu_protocol"


@pytest.mark.parametrize("words", [b"", b'{"QMP"', GREETING[:-1], GREETING, GREETING + b'{"return": '])
async def test_a_peer_that_goes_while_it_greets_is_gone_for_the_caller(words: bytes, listening: Listening) -> None:
    async def greet() -> None:
        peer = await listening.accept()
        await peer.say(words)
        peer.hang_up()

    outcome, _ = await all_ended(lambda: listening.qmp.execute("query-name"), greet)

    assert isinstance(outcome, CUT)


async def test_capabilities_that_are_refused_end_the_attempt(listening: Listening) -> None:
    """A peer that says no will say nothing more."""

    async def refuse() -> None:
        peer = await listening.accept()
        await peer.say(GREETING)
        await peer.hear()
        await peer.say(b'{"error": {"class": "GenericError", "desc": "no capabilities today"}}\n')
        await peer.be_hung_up_on()

    async def attempt() -> Any:
        outcome = await ended(lambda: listening.qmp.execute("query-name"))
        listening.qmp.close()
        return outcome

    outcome, _ = await all_ended(attempt, refuse)

    assert isinstance(outcome, HypervisorError)


async def test_events_before_the_capabilities_are_kept(listening: Listening) -> None:
    async def greet() -> None:
        peer = await listening.accept()
        await peer.say(GREETING + b'{"event": "EARLY", "data": {"n": 1}}\n')
        await peer.hear()
        await peer.say(b'{"event": "LATER"}\n' + AGREED)
        [request] = await peer.hear()
        await peer.answer(request, **{"return": 7})

    answer, _ = await all_ended(lambda: listening.qmp.execute("query-name"), greet)

    assert answer == 7
    assert (await listening.qmp.wait_event("EARLY", 0)).data == {"n": 1}
    assert (await listening.qmp.wait_event("LATER", 0)).number == 2


async def test_a_monitor_that_misses_its_first_client_is_called_again(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "GREETING_S", 0.01)

    async def wake_up_late() -> None:
        silent = await listening.accept()
        await silent.be_hung_up_on()
        monkeypatch.setattr(qmp, "GREETING_S", DEADLINE_S)
        # Whoever was called again meanwhile may have been given up as well.
        while True:
            peer = await listening.accept()
            with contextlib.suppress(OSError, EOFError):
                await peer.agree()
                [request] = await peer.hear()
                await peer.answer(request, **{"return": "awake"})
                return

    answer, _ = await all_ended(lambda: listening.qmp.execute("query-name"), wake_up_late)

    assert answer == "awake"


@pytest.mark.parametrize("noise", NOT_QMP)
async def test_garbage_ends_the_waiting_of_all_and_the_next_command_connects_anew(
    noise: str, listening: Listening
) -> None:
    peer = await listening.agreed()

    async def say() -> None:
        await peer.hear(2)
        await peer.say(NOT_QMP[noise])

    commands = [lambda: listening.qmp.execute("query-name"), lambda: listening.qmp.execute("query-status")]
    *outcomes, _ = await all_ended(*commands, lambda: listening.qmp.wait_event("STOP", 0), say)

    assert all(isinstance(outcome, (HypervisorError, *CUT)) for outcome in outcomes)
    assert [outcome.code for outcome in outcomes if isinstance(outcome, HypervisorError)] == ["qemu_protocol"]

    async def serve() -> None:
        fresh = await listening.accept()
        await fresh.agree()
        [request] = await fresh.hear()
        await fresh.answer(request, **{"return": "again"})

    answer, _ = await all_ended(lambda: listening.qmp.execute("query-name"), serve)
    assert answer == "again"


ODD_ANSWERS = {
    "neither answer nor error": {},
    "an error that is a text": {"error": "no"},
    "an error that is null": {"error": None},
    "an error without a description": {"error": {}},
    "an error of numbers": {"error": {"class": 1, "desc": 2}},
}


@pytest.mark.parametrize("odd", ODD_ANSWERS)
async def test_an_answer_that_says_nothing_is_an_error_of_the_peer(odd: str, listening: Listening) -> None:
    peer = await listening.agreed()

    async def answer() -> None:
        [request] = await peer.hear()
        await peer.answer(request, **ODD_ANSWERS[odd])

    outcome, _ = await all_ended(lambda: listening.qmp.execute("query-name"), answer)

    assert isinstance(outcome, HypervisorError)


@pytest.mark.parametrize(
    "noise",
    [
        b'{"id": [], "return": {}}\n',
        b'{"id": {}, "return": {}}\n',
        b'{"id": null, "return": {}}\n',
        b'{"id": -1, "return": {}}\n',
        b'{"id": "1", "return": {}}\n',
        b'{"return": {}}\n',
        b'{"error": {}}\n',
        b"{}\n",
        b'{"event": "STOP"}\n',
        b'{"event": "STOP", "data": null}\n',
        b'{"event": "STOP", "data": []}\n',
        b'{"event": ["STOP"], "data": 5}\n',
        b'{"event": null}\n',
        b'{"timestamp": {}, "event": "' + b"x" * 100_000 + b'"}\n',
    ],
    ids=lambda noise: noise[:40].decode().strip(),
)
async def test_an_answer_arrives_whatever_else_is_said(noise: bytes, listening: Listening) -> None:
    """Or the connection is over; but nobody stumbles over the words of a peer."""
    peer = await listening.agreed()

    async def say() -> None:
        [request] = await peer.hear()
        await peer.say(noise * 3)
        await peer.answer(request, **{"return": "mine"})

    def is_done(told: Any) -> bool:
        return bool(told.get("status") == "done")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ended, lambda: listening.qmp.wait_event("STOP", 0, is_done))
        await wait_all_tasks_blocked()
        answer, _ = await all_ended(lambda: listening.qmp.execute("query-name"), say)
        nursery.cancel_scope.cancel()

    assert answer == "mine" or isinstance(answer, (HypervisorError, *CUT))


async def test_a_line_without_an_end_is_refused(listening: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "MAX_LINE_BYTES", 1 << 18)
    peer = await listening.agreed()

    async def go_on_and_on() -> None:
        await peer.hear()
        with contextlib.suppress(OSError):
            while True:
                await peer.say(b"x" * 4096)

    outcome, _ = await all_ended(lambda: listening.qmp.execute("query-name"), go_on_and_on)

    assert isinstance(outcome, HypervisorError)
    assert outcome.code == "qemu_protocol"


async def test_a_line_of_the_longest_length_is_read(listening: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces that are a line together, with an end that comes alone."""
    monkeypatch.setattr(qmp, "MAX_LINE_BYTES", 1 << 18)
    peer = await listening.agreed()

    async def answer() -> None:
        [request] = await peer.hear()
        line = json.dumps({"id": request["id"], "return": ""}).encode()
        long = line[:-2] + b"x" * ((1 << 18) - len(line)) + line[-2:]
        for piece in (long[: 1 << 17], long[1 << 17 :], b"\n"):
            await peer.say(piece)
            await wait_all_tasks_blocked()

    found, _ = await all_ended(lambda: listening.qmp.execute("query-name"), answer)

    assert set(found) == {"x"}


@pytest.mark.parametrize("words", [b"", b"{", b'{"return": {}, "id": 1', b'{"event": "STOP"}\n{"return'])
async def test_a_peer_that_goes_in_the_middle_of_a_line_is_gone_for_all(words: bytes, listening: Listening) -> None:
    peer = await listening.agreed()

    async def go() -> None:
        await peer.hear(3)
        await peer.say(words)
        peer.hang_up()

    commands = [lambda: listening.qmp.execute("query-name")] * 3
    *outcomes, _ = await all_ended(*commands, lambda: listening.qmp.wait_event("RESUME", 0), go)

    assert all(isinstance(outcome, CUT) for outcome in outcomes)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
async def test_answers_in_any_order_and_in_any_pieces_reach_their_own(
    order: tuple[int, ...], listening: Listening
) -> None:
    peer = await listening.agreed()

    async def answer() -> None:
        requests = await peer.hear(3)
        words = b"".join(
            json.dumps({"id": requests[n]["id"], "return": requests[n]["execute"]}).encode() + b"\r\n" for n in order
        )
        for at in range(0, len(words), 7):
            await peer.say(words[at : at + 7])
            await wait_all_tasks_blocked()

    names = ["query-name", "query-status", "query-version"]
    *answers, _ = await all_ended(*(functools.partial(listening.qmp.execute, name) for name in names), answer)

    assert answers == names


async def test_an_answer_to_a_command_that_was_given_up_reaches_nobody(listening: Listening) -> None:
    peer = await listening.agreed()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listening.qmp.execute, "given-up")
        [given_up] = await peer.hear()
        nursery.cancel_scope.cancel()

    async def answer() -> None:
        [request] = await peer.hear()
        await peer.answer(given_up, **{"return": "late"})
        await peer.answer(request, **{"return": "mine"})

    outcome, _ = await all_ended(lambda: listening.qmp.execute("kept"), answer)

    assert outcome == "mine"


async def test_a_sender_whose_connection_another_drops_learns_that_it_is_over(listening: Listening) -> None:
    """It is in the middle of a long line when the peer says something impossible to those who read."""
    peer = await listening.agreed()

    async def spoil() -> None:
        await wait_all_tasks_blocked()
        await peer.say(b"garbage\n")

    outcomes = await all_ended(
        lambda: listening.qmp.wait_event("STOP", 0),
        lambda: listening.qmp.execute("long", text="x" * (8 << 20)),
        spoil,
    )

    assert all(isinstance(outcome, (HypervisorError, *CUT)) for outcome in outcomes[:2])


async def test_a_sender_whose_client_is_closed_learns_that_it_is_over(listening: Listening) -> None:
    await listening.agreed()

    async def close() -> None:
        await wait_all_tasks_blocked()
        listening.qmp.close()

    outcome, _ = await all_ended(lambda: listening.qmp.execute("long", text="x" * (8 << 20)), close)

    assert isinstance(outcome, (HypervisorError, *CUT))


async def test_whoever_waits_when_the_client_is_closed_learns_that_it_is_over(listening: Listening) -> None:
    peer = await listening.agreed()

    async def close() -> None:
        await peer.hear(2)
        listening.qmp.close()

    commands = [lambda: listening.qmp.execute("query-name")] * 2
    *outcomes, _ = await all_ended(*commands, lambda: listening.qmp.wait_event("STOP", 0), close)

    assert all(isinstance(outcome, CUT) for outcome in outcomes)


@pytest.mark.parametrize("checkpoints", range(8))
async def test_a_client_that_is_closed_while_it_connects_holds_no_connection(
    checkpoints: int, listening: Listening
) -> None:
    """A monitor has one client at a time: the daemon that comes next would wait for this one for ever."""
    connected, gone = [], trio.Event()

    async def serve() -> None:
        peer = await listening.accept()
        connected.append(peer)
        with contextlib.suppress(*CUT):
            await peer.agree()
            while True:
                [request] = await peer.hear()
                await peer.answer(request, **{"return": "answered before"})
        gone.set()

    async def close() -> None:
        for _ in range(checkpoints):
            await trio.lowlevel.checkpoint()
        listening.qmp.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        await wait_all_tasks_blocked()
        nursery.start_soon(close)
        outcome = await ended(lambda: listening.qmp.execute("query-name"))
        await wait_all_tasks_blocked()
        if connected:
            with in_time():
                await gone.wait()
        nursery.cancel_scope.cancel()

    assert outcome == "answered before" or isinstance(outcome, (HypervisorError, *CUT))


@pytest.mark.parametrize("attempt", range(10))
async def test_those_who_waited_on_a_lost_connection_do_not_wait_on_the_next(
    attempt: int, listening: Listening
) -> None:
    """Their answers were lost with it. One gives up half-sent, the next in line connects anew at that very moment."""
    lost = await listening.agreed()
    half_sent = trio.CancelScope()

    async def give_up() -> None:
        with half_sent:
            await listening.qmp.execute("long", text="x" * (8 << 20))

    async def lose_and_serve() -> None:
        await lost.hear(3)
        half_sent.cancel()
        fresh = await listening.accept()
        await fresh.agree()
        [request] = await fresh.hear()
        assert request["execute"] == "next"
        await fresh.answer(request, **{"return": "mine"})

    waiting = [lambda: listening.qmp.execute("asked-before")] * 3
    outcomes = await all_ended(*waiting, give_up, lambda: listening.qmp.execute("next"), lose_and_serve)

    assert outcomes[4] == "mine"
    assert all(isinstance(outcome, CUT) for outcome in outcomes[:3])


async def test_a_monitor_where_nobody_listens_is_an_error_of_the_system(short: Path) -> None:
    outcome = await ended(lambda: Qmp(short / "nobody").execute("query-name"))

    assert isinstance(outcome, OSError)


async def test_events_are_numbered_and_the_oldest_are_forgotten(listening: Listening) -> None:
    """Whoever waits for nothing costs nothing."""
    peer = await listening.agreed()

    async def say() -> None:
        [request] = await peer.hear()
        for n in range(3000):
            await peer.say(b'{"event": "TICK", "data": {"n": %d}}\n' % n)
        await peer.answer(request, **{"return": "done"})

    answer, _ = await all_ended(lambda: listening.qmp.execute("query-name"), say)

    assert answer == "done"
    assert listening.qmp.events_seen == 3000
    first = await listening.qmp.wait_event("TICK", 0)
    assert first.number == first.data["n"] + 1
    assert first.number > 1000
    last = await listening.qmp.wait_event("TICK", 0, lambda told: told["n"] == 2999)
    assert last.number == 3000


@pytest.mark.parametrize(
    "timestamp",
    [
        '{"seconds": %s, "microseconds": 5}' % ("9" * 400),
        '{"seconds": 5, "microseconds": %s}' % ("9" * 400),
        '{"seconds": 5, "microseconds": -%s}' % ("9" * 400),
        '{"seconds": -1, "microseconds": -1}',
        '{"seconds": 1e308, "microseconds": 1e308}',
        '{"seconds": NaN, "microseconds": Infinity}',
        '{"seconds": true, "microseconds": []}',
        "[]",
        "null",
    ],
    ids=lambda timestamp: timestamp[:40],
)
async def test_an_event_of_an_impossible_time_is_one_of_now(timestamp: str, listening: Listening) -> None:
    """Nobody stumbles over what a monitor takes for the time."""
    peer = await listening.agreed()
    before = time.time()

    async def say() -> None:
        await peer.say(b'{"event": "STOP", "timestamp": %s}\n' % timestamp.encode())

    event, _ = await all_ended(lambda: listening.qmp.wait_event("STOP", 0), say)

    assert before <= event.at_s <= time.time()


async def test_of_an_event_that_is_too_long_nothing_is_kept_but_its_name(listening: Listening) -> None:
    """A thousand are kept, and there is no end to what somebody at the other end could put into them."""
    peer = await listening.agreed()

    async def say() -> None:
        for size in (qmp.MAX_EVENT_BYTES // 2, qmp.MAX_EVENT_BYTES):
            await peer.say(b'{"event": "TICK", "data": {"status": "%s"}}\n' % (b"x" * size))
        await peer.say(b'{"event": "%s"}\n{"event": "STOP"}\n' % (b"x" * qmp.MAX_EVENT_BYTES))

    stop, _ = await all_ended(lambda: listening.qmp.wait_event("STOP", 0), say)

    assert stop.number == 4
    assert [len(event.data) for event in listening.qmp.events("TICK", 0)] == [1, 0]
    assert len(listening.qmp.events("x" * 64, 0)) == 1


async def test_an_event_is_of_the_time_that_it_says(listening: Listening) -> None:
    peer = await listening.agreed()

    async def say() -> None:
        await peer.say(b'{"event": "STOP", "timestamp": {"seconds": 1700000000, "microseconds": 250000}}\n')

    event, _ = await all_ended(lambda: listening.qmp.wait_event("STOP", 0), say)

    assert event.at_s == 1_700_000_000.25
