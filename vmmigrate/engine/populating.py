"""RAM of an arriving guest, made ready in the background before it is written.

The first write to a page of new memory costs more than receiving it: the kernel finds a page, zeroes it and maps it,
4 KiB at a time. Populating does that for ranges, beside the threads that receive, and in huge pages where the kernel
gives them. Only what the source says was ever touched is populated, and only as long as this host has the memory.
Where pages can be filled (`GuestRam.fill`) that is cheaper than both, and nothing is populated.

A page that was populated and then not sent (it holds zeros at the source) is given back, so that what is sparse stays
sparse. That is done when a round has landed and before the source is told so: between the two nothing lands.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
import structlog
import trio

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor import headroom
from vmmigrate.hypervisor.base import GuestRam
from vmmigrate.memory import MIB, PAGE_SIZE, PageBitmap, split_runs

log = structlog.get_logger(__name__)

CHUNK_PAGES: Final = 16 * MIB // PAGE_SIZE  # a cancelled migration waits for no more than that, some ten milliseconds


class Populating:
    """What of a guest's RAM is populated; it outlives a cut link.

    Args:
        ram: Of a guest that cannot run.
        extents: What the source says was touched: a hint.
        written: Which pages have landed here, if only in part; written by others meanwhile.
        available_bytes: What this host can still give.
    """

    def __init__(
        self,
        ram: GuestRam,
        extents: PageBitmap,
        written: npt.NDArray[np.bool_],
        available_bytes: Callable[[], int] = headroom.available_bytes,
    ) -> None:
        self._ram = ram
        self._written = written
        self._available_bytes = available_bytes
        self._left: deque[list[int]] = deque(split_runs(extents.runs(), CHUNK_PAGES).tolist())
        self._populated = np.zeros(extents.pages, dtype=np.bool_)
        self._is_over = False
        self._populate_lock = trio.Lock()  # held by whoever populates, or makes an end of it

    async def run(self) -> None:
        """Populate chunk by chunk until all is done, `settle` is called, or memory gets short.

        Cancelled, it stops after the chunk; called again it goes on.
        """
        while self._left:
            async with self._populate_lock:
                if self._is_over:
                    return
                first, count = self._left[0]
                try:
                    await trio.to_thread.run_sync(self._populate, first, count)
                except HypervisorError as error:
                    # A help, no need: pages come to be when they are written.
                    log.info("ram.not_populated", text=error.text)
                    self._is_over = True
                self._left.popleft()

    async def settle(self) -> None:
        """The first round has landed: make an end of populating, and give back what was not sent. Idempotent.

        Nothing may land meanwhile.

        Raises: HypervisorError `ram_punch`.
        """
        self._is_over = True
        async with self._populate_lock:
            populated, self._populated = self._populated, self._populated[:0]
            if len(populated):
                await trio.to_thread.run_sync(self._give_back, populated)

    def _populate(self, first: int, count: int) -> None:
        pages = slice(first, first + count)
        if self._written[pages].all():
            return
        if self._available_bytes() < count * PAGE_SIZE + headroom.RESERVE_BYTES:
            raise HypervisorError("this host has little memory left", code="ram_populate")
        self._populated[pages] = True
        self._ram.populate(first, count)

    def _give_back(self, populated: npt.NDArray[np.bool_]) -> None:
        self._ram.punch(PageBitmap.from_flags(populated & ~self._written))
