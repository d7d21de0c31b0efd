"""Guest RAM at the engine: hashing it whole, in a thread, without touching what was never touched."""

from __future__ import annotations

import trio

from vmmigrate.hypervisor.base import GuestRam
from vmmigrate.memory import PageBitmap, split_runs
from vmmigrate.ram.digest import RamDigest

_CHUNK_PAGES = 1024  # 4 MiB


def hash_ram(ram: GuestRam, populated: PageBitmap) -> bytes:
    """The digest of all RAM; only *populated* pages are read. Blocking."""
    digest = RamDigest(ram.layout.pages)
    pages = ram.pages
    for run in split_runs(populated.runs(), _CHUNK_PAGES):
        ram.fetch(run.reshape(1, 2))
        first, count = run.tolist()
        digest.update(first, pages[first : first + count])
    return digest.digest()


async def hash_ram_in_thread(ram: GuestRam) -> bytes:
    """The digest of all RAM of a guest that does not run."""
    return await trio.to_thread.run_sync(lambda: hash_ram(ram, ram.populated()))
