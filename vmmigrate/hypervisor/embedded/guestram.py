"""Guest RAM inside the guest process: the one place that writes it, and that can therefore note every write."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os

import numpy as np
import numpy.typing as npt

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor import kernel
from vmmigrate.memory import PAGE_SIZE, PageBitmap, RamLayout, flags_of

WORDS_PER_PAGE = PAGE_SIZE // 8
_CLEAR_PAGES = 1024
_F_ADD_SEALS = 1033
_SEAL_SHRINK, _SEAL_GROW = 2, 4

Words = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]


class GuestMemory:
    """RAM as a sealed memfd: sparse, only touched pages take memory.

    Its size is sealed, so that nobody who holds the descriptor can truncate it and kill the guest by SIGBUS.

    Attributes:
        pages: Shape (pages of the layout, 512).
        uffd: The write tracker's descriptor, or None; `tracking_reason` then says why.
    """

    def __init__(self, layout: RamLayout, *, want_kernel_tracking: bool) -> None:
        self.layout = layout
        self.fd = os.memfd_create("vmmigrate-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, layout.size_bytes)
            fcntl.fcntl(self.fd, _F_ADD_SEALS, _SEAL_SHRINK | _SEAL_GROW)
            mapping = mmap.mmap(self.fd, layout.size_bytes)
        except (OSError, ValueError) as exc:
            raise HypervisorError(f"cannot reserve {layout.size_bytes} bytes of guest RAM: {exc}") from exc
        self.pages: Words = np.frombuffer(mapping, dtype=np.uint64).reshape(layout.pages, WORDS_PER_PAGE)
        self.address = self.pages.ctypes.data
        self._noted: npt.NDArray[np.bool_] | None = None
        self.uffd: int | None = None
        self.tracking_reason = "software tracking was asked for"
        if want_kernel_tracking:
            self._open_tracker()

    def _open_tracker(self) -> None:
        try:
            self.uffd = kernel.open_write_tracker(self.address, self.layout.size_bytes)
            self.tracking_reason = ""
        except OSError as exc:
            self.tracking_reason = f"userfaultfd: {exc.strerror or exc}"

    def rewrite(self, pages: Numbers, content: Words) -> None:
        """Replace whole *pages*."""
        self.pages[pages] = content
        if self._noted is not None:
            self._noted[pages] = True

    def rewrite_words(self, pages: Numbers, words: int, content: Words) -> None:
        """Replace the first *words* words of *pages*."""
        self.pages[pages, :words] = content
        if self._noted is not None:
            self._noted[pages] = True

    def write_words(self, page: int, word: int, first: int, second: int) -> None:
        """Write two neighbouring words of one page."""
        row = self.pages[page]
        row[word] = first
        row[word + 1] = second
        if self._noted is not None:
            self._noted[page] = True

    def clear(self, keep_page: int) -> None:
        """Write zeros to every page that was ever touched, but for *keep_page*. Written and not given back: holes are
        invisible to the tracker."""
        populated = self.populated()
        populated[keep_page] = False
        pages = np.flatnonzero(populated)
        for start in range(0, len(pages), _CLEAR_PAGES):
            piece = pages[start : start + _CLEAR_PAGES]
            self.rewrite(piece, np.zeros((len(piece), WORDS_PER_PAGE), dtype=np.uint64))

    def start_noting(self) -> None:
        """Software tracking: from now on note every write; nothing is noted yet."""
        self._noted = np.zeros(self.layout.pages, dtype=np.bool_)

    def take_noted(self) -> PageBitmap:
        """Which pages were written since the last call.

        Raises:
            HypervisorError: `not_tracking`.
        """
        if self._noted is None:
            raise HypervisorError("dirty tracking is not on", code="not_tracking")
        taken = PageBitmap.from_flags(self._noted)
        self._noted[:] = False
        return taken

    def stop_noting(self) -> None:
        self._noted = None

    def populated(self) -> npt.NDArray[np.bool_]:
        """One boolean per page: was it ever touched."""
        return flags_of(self.layout.pages, kernel.populated_runs(self.fd, self.layout.size_bytes))

    def close(self) -> None:
        for fd in (self.fd, self.uffd):
            if fd is not None:
                with contextlib.suppress(OSError):
                    os.close(fd)
