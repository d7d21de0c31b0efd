"""The guest process: `python -m vmmigrate.hypervisor.embedded.guest CONFIG_FD LISTENER_FD`.

One thread does everything, because a second Python thread turns a 1 ms heartbeat into 6 to 12 ms: at each absolute
deadline a tick (heartbeat, then at most 300 µs of the program), between deadlines the socket. Requests are answered
between two ticks, so a pause takes effect within a slice. Garbage collection is frozen; nothing here makes cycles.

The process knows its daemon only as a connection. When that ends, nothing changes; when another one comes, it replaces
the old. It ends by the request `exit`, by a signal, when its guest crashes it, and in no other way: a guest that
powers itself off leaves the process, so that the daemon, or the next one, can tell that from a loss. This module and
all it imports stay free of trio and of `subprocess`: a guest is up in a fifth of a second.
"""

from __future__ import annotations

import array
import contextlib
import functools
import gc
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgpack

from vmmigrate.devices.payload import DevicePayload
from vmmigrate.devices.time import TimeData
from vmmigrate.errors import HypervisorError, VmMigrateError
from vmmigrate.hypervisor import kernel
from vmmigrate.hypervisor.base import GuestStamp
from vmmigrate.hypervisor.embedded import plans, protocol
from vmmigrate.hypervisor.embedded.guestram import GuestMemory
from vmmigrate.hypervisor.embedded.machine import Machine
from vmmigrate.hypervisor.embedded.witness import Witness

TICK_NS: Final = 1_000_000
_CHECK_SLICE_RUNNING_NS: Final = 300_000
_CHECK_SLICE_PAUSED_NS: Final = 5_000_000
_RECEIVE_BYTES: Final = 1 << 18

Args = dict[str, Any]
Check = tuple[int, Iterator[dict[str, Any] | None]]


class Operations:
    """The requests of the protocol, by name. Each gives the reply's result, or raises and has changed nothing."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.exit_requested = False

    def call(self, op: str, args: Args) -> Any:
        operation: Callable[..., Any] | None = getattr(self, f"op_{op}", None)
        if operation is None:
            raise HypervisorError(f"unknown request {op[:40]!r}", code="guest_protocol")
        try:
            return operation(**args)
        except VmMigrateError:
            raise
        except Exception as exc:
            raise HypervisorError(f"request {op}: {type(exc).__name__}: {exc}", code="guest_internal") from exc

    def op_status(self) -> Args:
        return self._machine.status()

    def op_run(self, epoch: list[int]) -> None:
        self._machine.run(_epoch(epoch))

    def op_pause(self) -> None:
        self._machine.pause()

    def op_reboot(self) -> None:
        self._machine.reboot()

    def op_pause_for_handoff(self, migration_id: str) -> None:
        self._machine.pause_for_handoff(migration_id)

    def op_open_backends(self, epoch: list[int]) -> None:
        self._machine.open_backends(_epoch(epoch))

    def op_close_backends(self) -> None:
        self._machine.close_backends()

    def op_track_start(self) -> None:
        self._machine.memory.start_noting()

    def op_track_take(self) -> Args:
        return {"bits": self._machine.memory.take_noted().to_bytes()}

    def op_track_stop(self) -> None:
        self._machine.memory.stop_noting()

    def op_export_time(self) -> dict[str, int]:
        return self._machine.export_time().to_map()

    def op_import_time(self, exported: Any) -> Args:
        return self._machine.import_time(TimeData.from_map(exported))

    def op_list_payloads(self) -> list[Any]:
        return self._machine.list_payloads()

    def op_export_devices(self, versions: dict[str, int]) -> list[list[Any]]:
        exported = self._machine.export_devices(versions)
        return [[p.instance_name, p.kind, p.version, p.body, p.optional] for p in exported]

    def op_rehearse_export(self, versions: dict[str, int]) -> list[bytes]:
        return self._machine.rehearse_export(versions)

    def op_throttle(self, percent: int) -> None:
        self._machine.throttle(percent)

    def op_import_devices(self, payloads: list[list[Any]]) -> list[list[str]]:
        return self._machine.import_devices([DevicePayload(*payload) for payload in payloads])

    def op_console_history(self, port: str) -> Args:
        return self._machine.uart(port).history.export()

    def op_import_console_history(self, port: str, beginning: bytes, rolling: bytes, total_bytes: int) -> None:
        self._machine.uart(port).history.restore(beginning, rolling, total_bytes)

    def op_console_input(self, port: str, keys: bytes) -> None:
        self._machine.type_keys(port, keys)

    def op_note_record(self, journal_id: str, number: int) -> None:
        self._machine.note_record(journal_id, number)

    def op_silence(self, epoch: list[int], record: int) -> None:
        self._machine.silence(_epoch(epoch))
        # Of the journal that it knows: the one that silences it may not be the one that explains it.
        self._machine.note_record(self._machine.last_journal, record)

    def op_restamp(self, stamp: Args) -> None:
        self._machine.restamp(plans.stamp_from_map(stamp))

    def op_heartbeat_gaps(self) -> Args:
        return self._machine.heartbeat_gaps()

    def op_exit(self) -> None:
        self.exit_requested = True


class Connection:
    """One daemon. Frames in and out, never blocking; `sock` is closed when the daemon is gone or replaced."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.greeted = False
        self._decoder = protocol.FrameDecoder()
        self._unsent = bytearray()

    @property
    def wants_write(self) -> bool:
        return bool(self._unsent)

    def receive(self) -> list[dict[str, Any]]:
        """Messages that are here now. Raises: ConnectionError, HypervisorError: the connection is over."""
        with contextlib.suppress(BlockingIOError):
            chunk = self.sock.recv(_RECEIVE_BYTES)
            if not chunk:
                raise ConnectionResetError
            self._decoder.receive(chunk)
        messages = []
        while (message := self._decoder.next_message()) is not None:
            messages.append(message)
        return messages

    def send(self, message: dict[str, Any]) -> None:
        self._unsent += protocol.encode_frame(message)
        self.flush()

    def send_with_descriptors(self, message: dict[str, Any], fds: list[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        frame = protocol.encode_frame(message)
        sent = self.sock.sendmsg([frame], rights)
        self._unsent += frame[sent:]
        self.greeted = True

    def flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                sent = self.sock.send(self._unsent)
                del self._unsent[:sent]


class Loop:
    """Ticks on time, and the socket in between."""

    def __init__(self, machine: Machine, listener: socket.socket) -> None:
        self._machine = machine
        self._operations = Operations(machine)
        self._listener = listener
        self._connection: Connection | None = None
        self._check: Check | None = None
        self._waiting_checks: list[int] = []
        self._waiting_for_off: list[int] = []
        self._deadline_ns = 0
        self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def run(self) -> None:
        machine, operations = self._machine, self._operations
        while not operations.exit_requested:
            if machine.running:
                self._maybe_tick()
            if machine.is_off and self._waiting_for_off:
                self._tell_off()
            self._poll(self._wait_s())

    def _maybe_tick(self) -> None:
        now_ns = time.monotonic_ns()
        if now_ns < self._deadline_ns:
            return
        self._machine.tick()
        if self._check is not None:
            self._go_on_checking(_CHECK_SLICE_RUNNING_NS)
        # Deadlines lie on a grid; after a stall the guest goes on with the next one instead of catching up.
        missed = max(now_ns - self._deadline_ns, 0) // TICK_NS if self._deadline_ns else 0
        self._deadline_ns = self._deadline_ns + (missed + 1) * TICK_NS if self._deadline_ns else now_ns + TICK_NS

    def _wait_s(self) -> float | None:
        if self._machine.running:
            return max(self._deadline_ns - time.monotonic_ns(), 0) / 1e9
        if self._check is not None:
            self._go_on_checking(_CHECK_SLICE_PAUSED_NS)
            return 0.0
        return None

    def _poll(self, wait_s: float | None) -> None:
        readers: list[socket.socket] = [self._listener]
        writers: list[socket.socket] = []
        if self._connection is not None:
            readers.append(self._connection.sock)
            if self._connection.wants_write:
                writers.append(self._connection.sock)
        readable, writable, _ = select.select(readers, writers, [], wait_s)
        connection = self._connection
        if connection is not None and connection.sock in writable:
            self._guarded(connection.flush)
        if connection is not None and connection.sock in readable:
            self._guarded(self._serve)
        if self._listener in readable:
            self._accept()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            if struct.unpack("3i", credentials)[1] not in (0, os.geteuid()):
                sock.close()
                return
            self._drop_connection()
            self._connection = Connection(sock)

    def _guarded(self, step: Callable[[], None]) -> None:
        """A failing connection ends; the guest does not notice."""
        try:
            step()
        except Exception as exc:  # whatever a daemon does, its guest lives on
            print(f"connection ended: {exc!r}", file=sys.stderr, flush=True)
            self._drop_connection()

    def _drop_connection(self) -> None:
        if self._connection is not None:
            self._connection.sock.close()
        self._connection = self._check = None
        self._waiting_checks.clear()
        self._waiting_for_off.clear()

    def _serve(self) -> None:
        assert self._connection is not None
        for message in self._connection.receive():
            if not self._connection.greeted:
                self._greet(message)
            elif message.get("op") == "self_check":
                self._start_check(message["id"])
            elif message.get("op") == "wait_power_off":
                self._waiting_for_off.append(message["id"])
            else:
                self._answer(message)

    def _tell_off(self) -> None:
        waiting, self._waiting_for_off = self._waiting_for_off, []
        for request_id in waiting:
            if self._connection is not None:
                self._guarded(functools.partial(self._connection.send, {"id": request_id, "result": None}))

    def _answer(self, message: dict[str, Any]) -> None:
        assert self._connection is not None
        was_running = self._machine.running
        try:
            reply = {"id": message.get("id"), "result": self._operations.call(message["op"], message["args"])}
        except VmMigrateError as error:
            reply = {"id": message.get("id"), "error": protocol.error_to_map(error)}
        if self._machine.running and not was_running:
            self._deadline_ns = 0  # the first tick comes at once
        self._connection.send(reply)

    def _greet(self, message: dict[str, Any]) -> None:
        assert self._connection is not None
        version = protocol.choose_version(message.get("hello"))
        if version is None:
            text = f"no common guest protocol version: this guest speaks {list(protocol.VERSIONS)}"
            self._connection.send({"error": protocol.error_to_map(HypervisorError(text, code="guest_protocol"))})
            raise HypervisorError(text)
        memory = self._machine.memory
        reply = {
            "version": version,
            "pid": os.getpid(),
            "address": memory.address,
            "size_bytes": memory.layout.size_bytes,
            "tracking": "software" if memory.uffd is None else "kernel",
            "tracking_reason": memory.tracking_reason,
            "status": self._machine.status(),
        }
        tracking_fds = [] if memory.uffd is None else [memory.uffd, self._pagemap]
        self._connection.send_with_descriptors(reply, [memory.fd, *tracking_fds])

    def _start_check(self, request_id: int) -> None:
        """One check at a time; a second request gets the verdict of a second check."""
        if self._check is None:
            self._check = (request_id, self._machine.self_check())
        else:
            self._waiting_checks.append(request_id)

    def _go_on_checking(self, slice_ns: int) -> None:
        assert self._check is not None
        request_id, pieces = self._check
        until_ns = time.monotonic_ns() + slice_ns
        while time.monotonic_ns() < until_ns:
            if (reply := _next_reply(pieces)) is None:
                continue
            self._check = None
            if self._connection is not None:
                self._guarded(functools.partial(self._connection.send, {"id": request_id, **reply}))
            if self._waiting_checks:
                self._start_check(self._waiting_checks.pop(0))
            return


def _next_reply(pieces: Iterator[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Do one piece of a check; the reply when it was the last."""
    try:
        verdict = next(pieces)
    except Exception as exc:
        error = HypervisorError(f"self check: {type(exc).__name__}: {exc}", code="guest_internal")
        return {"error": protocol.error_to_map(error)}
    return None if verdict is None else {"result": verdict}


def _epoch(pair: list[int]) -> tuple[int, int]:
    term, n = pair
    return term, n


def main(arguments: list[str]) -> int:
    config_fd, listener_fd = map(int, arguments)
    # The daemon may have been started with descriptors that are not its own, such as the pipe of a shell that waits
    # for all writers to end; a guest outlives it and must hold none of them.
    os.closerange(max(config_fd, listener_fd) + 1, os.sysconf("SC_OPEN_MAX"))
    with open(config_fd, "rb") as config_file:
        config = msgpack.unpackb(config_file.read())
    listener = socket.socket(fileno=listener_fd)
    listener.setblocking(False)
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    kernel.sharpen_timers()
    try:
        machine = _build(config)
    except VmMigrateError as error:
        _refuse(listener, error)
        return 1
    gc.collect()
    gc.freeze()
    gc.disable()
    Loop(machine, listener).run()
    return 0


def _build(config: dict[str, Any]) -> Machine:
    plan = plans.plan_from_map(config["plan"])
    stamp: GuestStamp = plans.stamp_from_map(config["stamp"])
    memory = GuestMemory(plan.layout, want_kernel_tracking=config["kernel_tracking"])
    witness = Witness(Path(config["witness"]), stamp.host_id, stamp.instance_id)
    return Machine(plan, stamp, memory, witness, for_migration=config["for_migration"])


def _refuse(listener: socket.socket, error: VmMigrateError) -> None:
    """Tell the daemon that waits at the other end why there is no guest."""
    listener.settimeout(10)
    with contextlib.suppress(OSError):
        sock, _ = listener.accept()
        sock.sendall(protocol.encode_frame({"error": protocol.error_to_map(error)}))
        sock.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
