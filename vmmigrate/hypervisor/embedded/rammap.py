"""A guest's RAM as the daemon maps it."""

from __future__ import annotations

import contextlib
import mmap
import os

import numpy as np
import numpy.typing as npt

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor import kernel
from vmmigrate.memory import PageBitmap, RamLayout


class MappedRam:
    """Maps the guest's memfd; owns the descriptor until `close`.

    Attributes:
        layout: Its regions, one after the other in the file.
        fd: The memfd, for extents and populating.
    """

    def __init__(self, fd: int, layout: RamLayout, *, writable: bool) -> None:
        if os.fstat(fd).st_size != layout.size_bytes:
            raise HypervisorError(f"guest RAM has {os.fstat(fd).st_size} bytes, not {layout.size_bytes}")
        self.layout = layout
        self.fd = fd
        self._writable = writable
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._mapping: mmap.mmap | None = mmap.mmap(fd, layout.size_bytes, prot=protection)

    @property
    def view(self) -> memoryview:
        view = memoryview(self._mapped())
        return view if self._writable else view.toreadonly()

    @property
    def pages(self) -> npt.NDArray[np.uint64]:
        return np.frombuffer(self.view, dtype=np.uint64).reshape(self.layout.pages, -1)

    def populated(self) -> PageBitmap:
        """Pages that were ever touched. Blocks for about 1 µs per extent: call it in a thread."""
        runs = kernel.populated_runs(self.fd, self.layout.size_bytes)
        return PageBitmap.from_flags(kernel.flags_of(self.layout.pages, runs))

    def punch(self, pages: PageBitmap) -> None:
        """Give pages back; they read as zero. Blocks: call it in a thread.

        Raises:
            HypervisorError: `ram_read_only`: the guest may run; `ram_punch`: some pages may be punched.
        """
        if not self._writable:
            raise HypervisorError("guest RAM is mapped read-only here, nothing is punched", code="ram_read_only")
        try:
            kernel.punch_holes(self.fd, pages.runs().tolist())
        except OSError as exc:
            raise HypervisorError(f"cannot give pages back: {exc.strerror}", code="ram_punch") from exc

    def make_read_only(self) -> None:
        """From now on only the guest's process writes. Views handed out before lose their permission in the kernel
        too: whoever still writes through one faults, rather than changing the RAM of a running guest. Idempotent.
        """
        if self._writable:
            address = np.frombuffer(self._mapped(), dtype=np.uint8).ctypes.data
            kernel.protect_read_only(address, self.layout.size_bytes)
            self._writable = False

    def close(self) -> None:
        """Unmap, unless somebody still holds a view; then the last one does. Blocks while page tables go."""
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            os.close(self.fd)
            with contextlib.suppress(BufferError):
                mapping.close()

    def _mapped(self) -> mmap.mmap:
        if self._mapping is None:
            raise HypervisorError("this daemon has let go of the guest", code="guest_detached")
        return self._mapping
