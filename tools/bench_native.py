"""Guests in QEMU that QEMU's own migration moves, for benchmarks: what another way of moving them is compared with.

They are launched as the adapter launches them, with the same arguments, RAM in a memfd and console in a file, so that
both ways move the same machine. What differs is what the way itself asks for: no tracker is loaded into QEMU, and the
destination starts the guest by itself (it has no `-S`), as QEMU does when nobody votes.

TCG before QEMU 9.0 loses guest writes in a live migration when RAM is a multiple of 256 KiB: the dirty bitmap is then
read a word at a time, and bits are cleared while the virtual processor still writes past them. RAM that is 8 KiB short
of that is read the slow way, which is right, and costs some 0.3 s for each GiB.

Source: QEMU, include/exec/ram_addr.h (cpu_physical_memory_sync_dirty_bitmap; mended in March 2024).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from tools.bench_watcher import Place, ProcessorTime
from vmmigrate.hypervisor import processes
from vmmigrate.hypervisor.base import GuestPlan, SerialPortPlan
from vmmigrate.hypervisor.processes import ProcessWatch
from vmmigrate.hypervisor.qemu import launch, machine, stress
from vmmigrate.hypervisor.qemu.adapter import QemuHypervisor
from vmmigrate.hypervisor.qemu.files import QemuFiles
from vmmigrate.hypervisor.qemu.qmp import Qmp
from vmmigrate.hypervisor.qemu.settings import QemuFacts, QemuSettings
from vmmigrate.memory import MIB, PAGE_SIZE, RamLayout
from vmmigrate.net import pki

SHORT_BYTES: Final = 8 * 1024
MENDED: Final = (9, 0)
MOVE_DEADLINE_S: Final = 300.0
_PORT: Final = "com1"
_NAME: Final = "localhost"
_DOMAIN: Final = "bench.example"
_UNLIMITED: Final = 1 << 40
_END_DEADLINE_S: Final = 10.0
_FILL_DEADLINE_S: Final = 300.0
_LOOK_S: Final = 0.01
_ENDPOINTS: Final = ("server", "client")
_OVER: Final = frozenset({"completed", "failed", "cancelled"})


class NativeError(Exception):
    """QEMU did not do what it was asked for."""


@dataclass
class Qemu:
    """One QEMU with the guest, or ready for it."""

    watch: ProcessWatch
    files: QemuFiles
    ram_fd: int
    qmp: Qmp
    time: ProcessorTime

    @property
    def console(self) -> Path:
        return self.files.output(_PORT)

    async def attach_console(self) -> None:
        backend = {"out": str(self.console), "in": str(self.files.keys(_PORT)), "append": True}
        await self.qmp.execute("chardev-change", id=_PORT, backend={"type": "file", "data": backend})

    def vitals(self) -> stress.Vitals | None:
        return stress.read_vitals(os.pread(self.ram_fd, PAGE_SIZE, stress.VITALS_GPA))

    def type(self, keys: bytes) -> None:
        pipe = os.open(self.files.keys(_PORT), os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(pipe, keys)
        finally:
            os.close(pipe)

    def end(self) -> None:
        """Kill it and wait until it is gone. Blocking."""
        self.watch.kill()
        select.select([self.watch.fd], [], [], _END_DEADLINE_S)
        self.watch.reap()
        self.watch.close()
        os.close(self.ram_fd)
        self.files.remove()


@dataclass
class NativeHost:
    """Where native QEMUs run; all of them end with it."""

    root: Path
    settings: QemuSettings
    facts: QemuFacts
    running: list[Qemu] = field(default_factory=list)

    @property
    def loses_writes(self) -> bool:
        """Whether RAM has to be short."""
        return self.settings.accelerator == "tcg" and self.facts.version < MENDED

    async def launch(self, plan: GuestPlan, *, incoming: bool) -> Qemu:
        """A QEMU that answers, with its console where it belongs."""

        def arguments(files: QemuFiles) -> list[str]:
            words = machine.arguments(plan, self.settings, self.facts, files, stamp="", for_migration=incoming)
            return [*(word for word in words if not (incoming and word == "-S")), *self._credentials()]

        qemu = await trio.to_thread.run_sync(_launch, self.root, plan, arguments)
        self.running.append(qemu)
        try:
            await qemu.attach_console()
            await _set_capabilities(qemu, events=True)
        except (OSError, EOFError) as exc:
            raise NativeError(f"QEMU did not start: {qemu.files.last_words() or exc}") from exc
        return qemu

    def _credentials(self) -> list[str]:
        directory = self.root / "tls"
        kinds = [f"tls-creds-x509,id=tls-{end},endpoint={end},dir={directory},verify-peer=on" for end in _ENDPOINTS]
        return [word for kind in kinds for word in ("-object", kind)]

    async def end(self, qemu: Qemu) -> None:
        self.running.remove(qemu)
        qemu.qmp.close()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(qemu.end)


@contextlib.asynccontextmanager
async def open_native(root: Path) -> AsyncIterator[NativeHost]:
    """A host for native QEMUs in the directory *root*, which is made."""
    settings = QemuSettings(network="user")
    hypervisor = await QemuHypervisor.open(root, settings)
    await trio.to_thread.run_sync(_make_credentials, root)
    host = NativeHost(root, settings, hypervisor.facts)
    try:
        yield host
    finally:
        for qemu in tuple(host.running):
            await host.end(qemu)


def _launch(root: Path, plan: GuestPlan, arguments: Callable[[QemuFiles], Sequence[str]]) -> Qemu:
    """As `launch.launch` does, but without a tracker, and on nobody's behalf. Blocking."""
    files = QemuFiles(root / secrets.token_hex(processes.TOKEN_BYTES))
    files.directory.mkdir(mode=0o700)
    files.output(_PORT).touch(mode=0o600)
    os.mkfifo(files.keys(_PORT), 0o600)
    ram_fd = os.memfd_create("bench-ram", os.MFD_CLOEXEC)
    try:
        os.ftruncate(ram_fd, plan.layout.size_bytes)
        watch = launch.start(arguments(files), files, ram_fd, [files.keys(_PORT)])
    except BaseException:
        os.close(ram_fd)
        raise
    return Qemu(watch, files, ram_fd, Qmp(files.monitor), ProcessorTime(watch.pid))


def _make_credentials(root: Path) -> None:
    """Certificates under the names that QEMU looks for. Blocking."""
    directory = root / "tls"
    directory.mkdir()
    authority = pki.make_authority(_DOMAIN, lifetime_days=1)
    (directory / "ca-cert.pem").write_bytes(authority.certificate.public_bytes(serialization.Encoding.PEM))
    for end in _ENDPOINTS:
        leaf = _leaf(authority, end)
        pki.write_leaf(leaf, directory / f"{end}-cert.pem", directory / f"{end}-key.pem")


def _leaf(authority: pki.Authority, end: str) -> pki.Leaf:
    """One of ours, but with a subject: QEMU takes no client without."""
    now = datetime.now(UTC)
    leaf = pki.make_leaf(authority, [], now - pki.BACKDATE, now + timedelta(hours=12))
    names = [x509.DNSName(_NAME), x509.IPAddress(ip_address("127.0.0.1"))]
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, end)]))
        .issuer_name(leaf.certificate.issuer)
        .public_key(leaf.key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(leaf.certificate.not_valid_before_utc)
        .not_valid_after(leaf.certificate.not_valid_after_utc)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )
    for extension in leaf.certificate.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    return pki.Leaf(builder.sign(authority.key, hashes.SHA256()), leaf.key)


def plan_of(mib: int, program: Mapping[str, Any]) -> GuestPlan:
    """A machine with one processor and a console."""
    layout = RamLayout.for_size(mib * MIB)
    return GuestPlan(str(uuid.uuid4()), layout, 1, serial_ports=(SerialPortPlan(_PORT, _PORT),), program=program)


@dataclass(frozen=True)
class NativeWay:
    """How QEMU is to move a guest.

    Attributes:
        is_populated: The destination's RAM is made ready before.
        channels: Of multifd; 0 is without it.
    """

    tls: bool = False
    is_populated: bool = False
    channels: int = 0


@dataclass
class NativeGuest:
    """A guest and the QEMU that runs it; moving it makes that another one."""

    host: NativeHost
    plan: GuestPlan
    here: Qemu
    there: Qemu | None = None
    way: NativeWay = NativeWay()

    has_history = False

    @classmethod
    async def boot(cls, host: NativeHost, plan: GuestPlan, *, is_short: bool) -> NativeGuest:
        """A guest that fills its memory from now on, which may be 8 KiB less than planned."""
        size_bytes = plan.layout.size_bytes - (SHORT_BYTES if is_short else 0)
        sized = replace(plan, layout=RamLayout.for_size(size_bytes))
        qemu = await host.launch(sized, incoming=False)
        await qemu.qmp.execute("cont")
        return cls(host, sized, qemu)

    async def wait_ready(self) -> None:
        with trio.fail_after(_FILL_DEADLINE_S):
            while (vitals := self.here.vitals()) is None or vitals.state != stress.State.READY:  # noqa: ASYNC110
                await trio.sleep(_LOOK_S)

    async def hold(self) -> None:
        await self.here.qmp.execute("stop")

    async def go_on(self) -> None:
        await self.here.qmp.execute("cont")

    @property
    def console(self) -> Path:
        return self.here.console

    @property
    def clock(self) -> ProcessorTime:
        """Of the QEMU that has the guest."""
        return self.here.time

    @property
    def clocks(self) -> dict[str, ProcessorTime]:
        """Of all that takes part in a move and is there before it; once `prepare` was called."""
        assert self.there is not None
        return {"source QEMU": self.here.time, "destination QEMU": self.there.time}

    @property
    def destination(self) -> Place:
        """Where the console at the destination is, once `prepare` was called."""
        assert self.there is not None
        return Place(str(self.there.console.parent), self.there.console.name)

    async def prepare(self, way: NativeWay) -> None:
        """Start the QEMU that takes the guest, and let it listen."""
        self.way = way
        self.there = await self.host.launch(self.plan, incoming=True)
        if way.is_populated:
            path = f"/objects/{machine.RAM_BLOCK}"
            await self.there.qmp.execute("qom-set", path=path, property="prealloc", value=True)
        await self._configure(self.there, "tls-server")
        await self.there.qmp.execute("migrate-incoming", uri="tcp:127.0.0.1:0")

    async def move(self, *, downtime_ms: int) -> dict[str, Any]:
        """Have QEMU move the guest to where `prepare` said; what QEMU tells of it.

        Raises: NativeError: it did not move.
        """
        source, destination = self.here, self.there
        assert destination is not None
        port = (await destination.qmp.execute("query-migrate"))["socket-address"][0]["port"]
        await self._configure(source, "tls-client", max_bandwidth=_UNLIMITED, downtime_limit=downtime_ms)
        seen = (source.qmp.events_seen, destination.qmp.events_seen)
        begun = time.monotonic()
        await source.qmp.execute("migrate", uri=f"tcp:127.0.0.1:{port}")
        try:
            with trio.fail_after(MOVE_DEADLINE_S):
                await _expect_completed(source, seen[0])
                await destination.qmp.wait_event("RESUME", seen[1])
        except (OSError, EOFError) as exc:
            why = destination.files.last_words() or source.files.last_words() or "no reason given"
            raise NativeError(f"QEMU ended: {why}") from exc
        total_s = time.monotonic() - begun
        told = await source.qmp.execute("query-migrate")
        return {
            "total_ms": round(total_s * 1e3, 1),
            "told_pause_ms": float(told["downtime"]),
            "sent_bytes": told["ram"]["transferred"],
            "rounds": told["ram"]["dirty-sync-count"],
        }

    async def _configure(self, qemu: Qemu, credentials: str, **parameters: Any) -> None:
        """Alike at both ends, but for what *credentials* and *parameters* say."""
        await _set_capabilities(qemu, multifd=self.way.channels > 0)
        if self.way.channels:
            parameters["multifd_channels"] = self.way.channels
        if self.way.tls:
            parameters.update(tls_creds=credentials, tls_hostname=_NAME)
        else:
            parameters.update(tls_creds="")
        await qemu.qmp.execute("migrate-set-parameters", **parameters)

    async def settle(self) -> None:
        """The guest has moved: the QEMU that it left is not needed any more."""
        assert self.there is not None
        left, self.here, self.there = self.here, self.there, None
        await self.host.end(left)

    async def check(self) -> str:
        """Have the guest look at all of its memory; it runs. What is wrong with it, or nothing."""
        before = self.here.vitals()
        assert before is not None
        self.here.type(b"v")
        with trio.fail_after(_FILL_DEADLINE_S):
            while (after := self.here.vitals()) is None or after.checks_done == before.checks_done:  # noqa: ASYNC110
                await trio.sleep(_LOOK_S)
        wrong = {"bad pages": after.bad_pages, "stale pages": after.mismatches}
        return ", ".join(f"{count} {what}" for what, count in wrong.items() if count)

    async def end(self) -> None:
        for qemu in (self.here, self.there):
            if qemu is not None:
                await self.host.end(qemu)


async def _expect_completed(source: Qemu, seen: int) -> None:
    event = await source.qmp.wait_event("MIGRATION", seen, lambda data: data.get("status") in _OVER)
    if event.data["status"] != "completed":
        told = await source.qmp.execute("query-migrate")
        raise NativeError(f"QEMU's migration {event.data['status']}: {told.get('error-desc', 'no reason given')}")


async def _set_capabilities(qemu: Qemu, **capabilities: bool) -> None:
    listed = [{"capability": name.replace("_", "-"), "state": state} for name, state in capabilities.items()]
    await qemu.qmp.execute("migrate-set-capabilities", capabilities=listed)
