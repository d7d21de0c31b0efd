"""A process with memory of its own, as a QEMU has it that something else started; and how RAM is copied out of it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from vmmigrate.hypervisor.rammap import CopiedRam
from vmmigrate.memory import PAGE_SIZE, RamLayout

READ_ONLY_PAGES = 8
# Every other page is filled with its number; the last ones were only read. Each line that it is told, a number, adds
# one to that page, and is answered.
_PROGRAM = f"""
import ctypes, mmap, sys
pages = int(sys.argv[1])
memory = mmap.mmap(-1, pages * {PAGE_SIZE}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(0, pages - {READ_ONLY_PAGES}, 2):
    memory[page * {PAGE_SIZE}:(page + 1) * {PAGE_SIZE}] = page.to_bytes(8, "little") * {PAGE_SIZE // 8}
assert not any(memory[page * {PAGE_SIZE}] for page in range(pages - {READ_ONLY_PAGES}, pages))
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
for line in sys.stdin:
    memory[int(line) * {PAGE_SIZE}] += 1
    print("written", flush=True)
"""


@dataclass
class Owner:
    process: subprocess.Popen[bytes]
    pages: int
    address: int

    def open(self, address: int | None = None) -> CopiedRam:
        place = self.address if address is None else address
        return CopiedRam(self.process.pid, place, RamLayout.for_size(self.pages * PAGE_SIZE))

    def write(self, page: int) -> None:
        """Let it write to a page."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"%d\n" % page)
        self.process.stdin.flush()
        assert self.process.stdout.readline() == b"written\n"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def open_owner(pages: int) -> Iterator[Owner]:
    command = [sys.executable, "-c", _PROGRAM, str(pages)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield Owner(process, pages, int(process.stdout.readline()))
        finally:
            process.kill()


def held_pages(ram: CopiedRam) -> int:
    """How many pages this process has of it."""
    return os.fstat(ram._fd).st_blocks * 512 // PAGE_SIZE
