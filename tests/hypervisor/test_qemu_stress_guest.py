"""The stress guest: it beats, it checks itself, and its checks can fail. Every QEMU is killed, also on failure."""

from __future__ import annotations

import contextlib
import json
import mmap
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import pytest

from tests.hypervisor.qemu_hosts import QEMU
from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.qemu.stress import (
    FIRST_FILLED_GPA,
    VITALS_GPA,
    State,
    Vitals,
    build_stress_guest,
    read_vitals,
    stress_append,
)
from vmmigrate.memory import MIB, PAGE_SIZE

RAM_MIB = 32
FILLED_MIB = 24
FIRST_PAGE = FIRST_FILLED_GPA // PAGE_SIZE
END_PAGE = FILLED_MIB * MIB // PAGE_SIZE
DEADLINE_S = 20


class Machine:
    """A QEMU that runs the stress guest: its console, its vitals, and its RAM as a file."""

    def __init__(self, directory: Path, elf: Path, append: str, *more: str) -> None:
        self._ram = directory / "ram"
        self._console_path = directory / "console.sock"
        self._monitor_path = directory / "qmp.sock"
        self._log = (directory / "log").open("w+")
        memory = f"memory-backend-file,id=pc.ram,size={RAM_MIB}M,mem-path={self._ram},share=on"
        self.process = subprocess.Popen(
            [
                *(QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-accel", "tcg"),
                *("-machine", "pc-i440fx-7.2,memory-backend=pc.ram", "-m", f"{RAM_MIB}M", "-object", memory),
                *("-chardev", f"socket,id=console,path={self._console_path},server=on,wait=on"),
                *("-serial", "chardev:console", "-qmp", f"unix:{self._monitor_path},server=on,wait=off"),
                *("-kernel", str(elf), "-append", append, *more),
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self._console: socket.socket | None = None
        self._mapping: mmap.mmap | None = None
        self.letters = b""

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        for opened in (self._console, self._mapping, self._log):
            if opened:
                opened.close()

    def boot(self) -> None:
        """Attach the console, for which QEMU waits, and return when the guest beats."""
        self._console = self._connected(self._console_path)
        said = self._until(b"<READY>\n")
        self.letters = said.partition(b"<READY>\n")[2]
        with self._ram.open("r+b") as ram:
            self._mapping = mmap.mmap(ram.fileno(), RAM_MIB * MIB)

    def monitor(self) -> socket.socket:
        return self._connected(self._monitor_path)

    def send(self, letters: bytes) -> None:
        assert self._console
        self._console.sendall(letters)

    def vitals(self) -> Vitals:
        assert self._mapping
        vitals = read_vitals(memoryview(self._mapping)[VITALS_GPA : VITALS_GPA + PAGE_SIZE])
        assert vitals is not None
        return vitals

    def wait_vitals(self, fits: Callable[[Vitals], bool]) -> Vitals:
        """Keep reading letters, so that the guest is never held up, until its vitals fit."""
        end = time.monotonic() + DEADLINE_S
        while not fits(vitals := self.vitals()):
            assert time.monotonic() < end, vitals
            self.letters += self._received()
        return vitals

    def checked(self) -> Vitals:
        wanted = self.vitals().checks_started + 1
        self.send(b"v")
        return self.wait_vitals(lambda vitals: vitals.checks_done == wanted)

    def write(self, gpa: int, octet: int) -> None:
        assert self._mapping
        self._mapping[gpa] = octet

    def _connected(self, path: Path) -> socket.socket:
        end = time.monotonic() + DEADLINE_S
        while True:
            sock = socket.socket(socket.AF_UNIX)
            with contextlib.suppress(OSError):
                sock.connect(str(path))
                sock.settimeout(DEADLINE_S)
                return sock
            sock.close()
            assert self.process.poll() is None, self._said()
            assert time.monotonic() < end, self._said()

    def _until(self, text: bytes) -> bytes:
        said = b""
        while text not in said:
            said += self._received()
        return said

    def _received(self) -> bytes:
        assert self._console
        received = self._console.recv(1 << 16)
        assert received, self._said()
        return received

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read()


# -- the vitals page and the command line ----------------------------------------------------------------------------


def page_of(*fields: int, magic: bytes = b"VMMSTRS1") -> bytes:
    return (magic + struct.pack("<12Q", *fields)).ljust(PAGE_SIZE, b"\0")


def test_vitals_are_read_in_the_order_in_which_the_guest_lays_them_out() -> None:
    vitals = read_vitals(memoryview(page_of(*range(1, 13))))

    assert vitals == Vitals(
        heartbeats=1,
        checks_started=2,
        checks_done=3,
        bad_pages=4,
        first_bad_page=5,
        mismatches=6,
        filled_pages=7,
        passes=8,
        state=9,
        disk_writes=10,
        disk_read_backs=11,
        disk_failures=12,
    )


def test_no_bad_page_is_none() -> None:
    vitals = read_vitals(page_of(0, 0, 0, 0, (1 << 64) - 1, 0, 0, 0, 0, 0, 0, 0))

    assert vitals is not None
    assert vitals.first_bad_page is None


@pytest.mark.parametrize(
    "page", [b"", bytes(PAGE_SIZE), page_of(*range(12), magic=b"VMMSTRS0"), page_of(*range(12))[:103]]
)
def test_a_page_that_no_stress_guest_wrote_has_no_vitals(page: bytes) -> None:
    assert read_vitals(page) is None


def test_the_command_line_says_everything() -> None:
    assert stress_append(mem_mib=48, ws_mib=16, rate=10) == "mem=48 ws=16 rate=10 zero=0 disk=0"
    assert stress_append(mem_mib=48, ws_mib=0, rate=0, zero_percent=30, disk=True).endswith("zero=30 disk=1")


@pytest.mark.parametrize(
    ("mem_mib", "ws_mib", "rate", "zero_percent"),
    [(4, 1, 1, 0), (4096, 1, 1, 0), (48, 49, 1, 0), (48, 16, -1, 0), (48, 16, 1, 101)],
)
def test_what_the_guest_cannot_do_is_not_asked_of_it(mem_mib: int, ws_mib: int, rate: int, zero_percent: int) -> None:
    with pytest.raises(HypervisorError) as caught:
        stress_append(mem_mib=mem_mib, ws_mib=ws_mib, rate=rate, zero_percent=zero_percent)

    assert caught.value.code == "guest_arguments"


# -- building --------------------------------------------------------------------------------------------------------


def test_without_a_compiler_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(HypervisorError, match="no-such-compiler") as caught:
        build_stress_guest(tmp_path, compiler="no-such-compiler")

    assert caught.value.code == "no_compiler"


def test_a_compiler_that_fails_has_the_last_word(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho warming up\necho no such target >&2\nexit 1\n")
    compiler.chmod(0o755)

    with pytest.raises(HypervisorError, match="no such target") as caught:
        build_stress_guest(tmp_path, compiler=str(compiler))

    assert caught.value.code == "guest_build"


# -- the guest itself ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elf() -> Iterator[Path]:
    if not (shutil.which("gcc") and shutil.which(QEMU)):
        pytest.skip(f"needs gcc and {QEMU}")
    with tempfile.TemporaryDirectory(prefix="vmm-") as directory:
        yield build_stress_guest(Path(directory))


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short enough for the path of a socket, and in memory where that is possible: the guest's RAM is a file here."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="vmm-", dir=shared if shared.is_dir() else None) as path:
        yield Path(path)


@pytest.mark.required
def test_it_beats_without_a_hole_while_it_checks_and_writes_and_finds_nothing_amiss(elf: Path, directory: Path) -> None:
    append = stress_append(mem_mib=FILLED_MIB, ws_mib=4, rate=20, zero_percent=30)
    with Machine(directory, elf, append) as machine:
        machine.boot()
        machine.wait_vitals(lambda vitals: vitals.passes >= 2)

        vitals = machine.checked()
        beats_at_check = len(machine.letters)
        machine.wait_vitals(lambda _: len(machine.letters) > beats_at_check + 26)

    assert (vitals.bad_pages, vitals.first_bad_page, vitals.mismatches) == (0, None, 0)
    assert (vitals.state, vitals.filled_pages) == (State.READY, END_PAGE - FIRST_PAGE)
    assert machine.letters.startswith(b"abcdefghijklmnopqrstuvwxyzabc")
    assert all(after - before in (1, -25) for before, after in pairwise(machine.letters))


@pytest.mark.required
def test_a_corrupted_page_is_found_and_named(elf: Path, directory: Path) -> None:
    """The one that `d` corrupts, and before it one of zeros that somebody else writes to."""
    with Machine(directory, elf, stress_append(mem_mib=FILLED_MIB, ws_mib=4, rate=5, zero_percent=100)) as machine:
        machine.boot()

        machine.send(b"d")
        by_itself = machine.checked()
        machine.write((END_PAGE - 2) * PAGE_SIZE + 100, 0x80)
        by_others = machine.checked()

    assert (by_itself.bad_pages, by_itself.first_bad_page) == (1, END_PAGE - 1)
    assert (by_others.bad_pages, by_others.first_bad_page) == (2, END_PAGE - 2)


@pytest.mark.required
def test_a_page_that_comes_back_older_is_a_mismatch_when_it_is_written_next(elf: Path, directory: Path) -> None:
    with Machine(directory, elf, stress_append(mem_mib=FILLED_MIB, ws_mib=4, rate=20)) as machine:
        machine.boot()
        machine.wait_vitals(lambda vitals: vitals.passes >= 1)

        machine.write(FIRST_FILLED_GPA + 500 * PAGE_SIZE, 0)
        vitals = machine.wait_vitals(lambda vitals: vitals.mismatches > 0)
        checked = machine.checked()

    assert vitals.mismatches == 1
    assert checked.first_bad_page == FIRST_PAGE + 500, "the damage stays to be seen"


@pytest.mark.required
def test_it_powers_off_on_request(elf: Path, directory: Path) -> None:
    with Machine(directory, elf, stress_append(mem_mib=FILLED_MIB, ws_mib=4, rate=5)) as machine:
        machine.boot()
        with machine.monitor() as monitor, monitor.makefile("rwb") as lines:
            lines.readline()
            lines.write(b'{"execute": "qmp_capabilities"}\n')
            lines.flush()
            lines.readline()

            machine.send(b"p")
            event = json.loads(lines.readline())

        assert machine.process.wait(DEADLINE_S) == 0

    assert (event["event"], event["data"]["reason"]) == ("SHUTDOWN", "guest-shutdown")


@pytest.mark.required
def test_a_reset_begins_its_life_anew(elf: Path, directory: Path) -> None:
    with Machine(directory, elf, stress_append(mem_mib=FILLED_MIB, ws_mib=4, rate=5, zero_percent=30)) as machine:
        machine.boot()
        machine.send(b"d")
        machine.wait_vitals(lambda vitals: vitals.heartbeats > 50)

        machine.send(b"r")
        machine.wait_vitals(lambda _: b"<READY>\nabc" in machine.letters)
        vitals = machine.checked()

    assert (vitals.checks_done, vitals.bad_pages) == (1, 0)


# -- its disk --------------------------------------------------------------------------------------------------------


def disk_of(directory: Path, size_bytes: int) -> tuple[Path, tuple[str, ...]]:
    image = directory / "disk.raw"
    image.touch()
    with image.open("r+b") as file:
        file.truncate(size_bytes)
    drive = f"file={image},format=raw,if=none,id=disk"
    return image, ("-drive", drive, "-device", "virtio-blk-pci,drive=disk")


@pytest.mark.required
def test_disk_read_backs_agree_and_blocks_tell_their_number_and_generation(elf: Path, directory: Path) -> None:
    image, arguments = disk_of(directory, 8 * MIB)  # 2048 blocks, of which every eighth is written
    append = stress_append(mem_mib=FILLED_MIB, ws_mib=4, rate=5, disk=True)
    with Machine(directory, elf, append, *arguments) as machine:
        machine.boot()
        vitals = machine.wait_vitals(lambda vitals: vitals.disk_writes > 270)

    assert vitals.disk_failures == 0
    assert vitals.disk_read_backs >= vitals.disk_writes, "after the first round, blocks are read before as well"
    content = image.read_bytes()
    headers = [struct.unpack_from("<4s2I", content, number * PAGE_SIZE) for number in range(0, 2048, 8)]
    assert [(magic, number) for magic, number, _ in headers] == [(b"VMMB", n) for n in range(0, 2048, 8)]
    assert headers[0][2] == 2
    assert headers[-1][2] == 1


@pytest.mark.required
def test_a_block_that_others_change_is_noticed_when_its_turn_comes(elf: Path, directory: Path) -> None:
    """As a write that a move lost would be: the block holds an older generation than was acknowledged."""
    image, arguments = disk_of(directory, 2 * MIB)
    with Machine(directory, elf, stress_append(mem_mib=FILLED_MIB, ws_mib=4, rate=5, disk=True), *arguments) as machine:
        machine.boot()
        machine.wait_vitals(lambda vitals: vitals.disk_read_backs > 10)

        with image.open("r+b") as file:
            file.write(bytes(PAGE_SIZE))
        vitals = machine.wait_vitals(lambda vitals: vitals.disk_failures > 0)

    assert vitals.disk_writes in range(256, 260), "it was noticed in the next round"


@pytest.mark.required
def test_a_disk_that_is_not_there_is_a_failure(elf: Path, directory: Path) -> None:
    with Machine(directory, elf, stress_append(mem_mib=FILLED_MIB, ws_mib=4, rate=5, disk=True)) as machine:
        machine.boot()

        assert machine.vitals().disk_failures == 1
