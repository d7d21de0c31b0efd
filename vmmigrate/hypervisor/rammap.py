"""A guest's RAM as the daemon maps it.

Problem: whoever holds a view keeps the mapping, and an error that is kept in a variable of a frame which it names holds
all views of that frame, until the garbage collector comes by. `mmap.close` then refuses, and the RAM of a guest that is
gone is not given back. So the mapping is made by hand: `close` puts nothing in its place at once, whoever still holds
a view, and the addresses are given back when the last view goes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor import kernel
from vmmigrate.hypervisor.base import Capability
from vmmigrate.memory import PAGE_SIZE, PageBitmap, RamLayout, Runs, runs_of_pages

HUGE_BYTES: Final = 2 << 20
_MOST_ADVISED: Final = 4096  # each may split a mapping in three, and a process may have some 65,000
_SHMEM_ENABLED: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


class MappedRam:
    """Maps the guest's memfd; owns the descriptor until `close`.

    Args:
        huge_pages: Whether to ask for them where whole ones are populated.

    Attributes:
        layout: Its regions, one after the other in the file.
        file: Device and inode of the file.
        cannot_shrink: Nobody can make it shorter. Otherwise whoever reads beyond its end is killed.
    """

    is_copied = False

    def __init__(self, fd: int, layout: RamLayout, *, writable: bool, huge_pages: bool = False) -> None:
        status = os.fstat(fd)
        if status.st_size != layout.size_bytes:
            raise HypervisorError(f"guest RAM has {status.st_size} bytes, not {layout.size_bytes}")
        self.layout = layout
        self.file = (status.st_dev, status.st_ino)
        self.cannot_shrink = kernel.is_sealed_against_shrinking(fd)
        self._fd = fd
        self._closing = threading.Lock()
        self._writable = writable
        self._huge_pages = huge_pages
        self._advised = 0
        self._retired: ctypes.Array[ctypes.c_ubyte] | None = None  # held: nobody else may be given its addresses
        self._address = kernel.map_file(fd, layout.size_bytes, writable=writable)
        self._mapping: ctypes.Array[ctypes.c_ubyte] | None = _exported(self._address, layout.size_bytes)
        self._filler: int | None = None
        if writable and not huge_pages:  # what is filled is filled in small pages
            with contextlib.suppress(OSError):  # without it pages come to be when they are written
                self._filler = kernel.open_filler(self._address, layout.size_bytes)

    @property
    def view(self) -> memoryview:
        view = memoryview(self._mapped()).cast("B")
        return view if self._writable else view.toreadonly()

    @property
    def pages(self) -> npt.NDArray[np.uint64]:
        return np.frombuffer(self.view, dtype=np.uint64).reshape(self.layout.pages, -1)

    def populated(self) -> PageBitmap:
        """Pages that were ever touched. Blocks for about 1 µs per extent: call it in a thread."""
        with self._file() as fd:
            runs = kernel.populated_runs(fd, self.layout.size_bytes)
        return PageBitmap.from_runs(self.layout.pages, runs)

    def fetch(self, runs: Runs) -> None:
        """It is mapped: nothing has to be fetched."""

    def sample(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """A copy of some pages as the guest has them now. Blocking."""
        return self.pages[numbers]

    def populate(self, first_page: int, pages: int) -> None:
        """Make pages be there, before they are written; their contents stay. Only of a guest that cannot run.

        Raises: HypervisorError `ram_populate`: not possible, or no memory; some pages may be there.
        """
        if not self._writable:
            raise HypervisorError("guest RAM is mapped read-only here, nothing is populated", code="ram_read_only")
        mapping = self._mapped()  # held: nobody else may be given its addresses meanwhile
        address, size_bytes = ctypes.addressof(mapping) + first_page * PAGE_SIZE, pages * PAGE_SIZE
        try:
            if self._huge_pages:
                self._advise_huge(address, size_bytes)
            kernel.populate(address, size_bytes)
        except OSError as exc:
            raise HypervisorError(f"cannot populate guest RAM: {exc}", code="ram_populate") from exc

    def _advise_huge(self, address: int, size_bytes: int) -> None:
        """Only whole huge pages: what was never touched stays a hole."""
        start, end = -(-address // HUGE_BYTES) * HUGE_BYTES, (address + size_bytes) // HUGE_BYTES * HUGE_BYTES
        if start < end and self._advised < _MOST_ADVISED:
            self._advised += 1
            kernel.advise_huge(start, end - start)

    @property
    def fills(self) -> bool:
        """Whether `fill` does anything."""
        return self._filler is not None and self._writable

    def fill(self, first_page: int, contents: npt.NDArray[np.uint64]) -> int:
        """Put *contents*, which lie in one piece, where no page is yet; how many pages that was, from the first one.
        The others have to be written. Only of a guest that cannot run; nobody closes meanwhile.
        """
        filler, mapping = self._filler, self._mapped()  # held: nobody else may be given its addresses meanwhile
        if filler is None or not self._writable:
            return 0
        address = ctypes.addressof(mapping) + first_page * PAGE_SIZE
        return kernel.fill(filler, address, contents.ctypes.data, contents.nbytes) // PAGE_SIZE

    def punch(self, pages: PageBitmap) -> None:
        """Give pages back; they read as zero. Blocks: call it in a thread.

        Raises:
            HypervisorError: `ram_read_only`: the guest may run; `ram_punch`: some pages may be punched.
        """
        if not self._writable:
            raise HypervisorError("guest RAM is mapped read-only here, nothing is punched", code="ram_read_only")
        try:
            with self._file() as fd:
                kernel.punch_holes(fd, pages.runs().tolist())
        except OSError as exc:
            raise HypervisorError(f"cannot give pages back: {exc.strerror}", code="ram_punch") from exc

    def make_read_only(self) -> None:
        """From now on only the guest's process writes.

        The writable mapping is not protected but replaced: to protect every page of it takes as long as a pause may
        last, and a mapping that nobody has used yet costs nothing. `drop_retired` takes the old one down.

        Raises: HypervisorError `ram_map`: there is no room for another mapping; nothing has changed.
        """
        if not self._writable:
            return
        try:
            address = kernel.map_file(self._fd, self.layout.size_bytes, writable=False)
        except OSError as exc:
            raise HypervisorError(f"cannot map guest RAM: {exc}", code="ram_map") from exc
        self._retired, self._mapping = self._mapped(), _exported(address, self.layout.size_bytes)
        self._address, self._writable = address, False

    def drop_retired(self) -> None:
        """Whoever still writes through a view of it writes to nothing, rather than to the RAM of a running guest."""
        with self._closing:
            retired, self._retired = self._retired, None
        if retired is not None:
            with contextlib.suppress(OSError):  # no memory for it: the last view unmaps
                kernel.map_nothing(ctypes.addressof(retired), self.layout.size_bytes, writable=True)
            self._close_filler()

    def close(self) -> None:
        """Unmap: views that somebody still holds read zeros from now on. Blocks while page tables go."""
        self.drop_retired()
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            with self._closing:
                os.close(self._fd)
            with contextlib.suppress(OSError):  # no memory for it: the last view unmaps
                kernel.map_nothing(self._address, self.layout.size_bytes, writable=self._writable)
        self._close_filler()

    def _close_filler(self) -> None:
        """Once its mapping is gone: to take it from a mapping would be a walk over all page tables."""
        with self._closing:
            filler, self._filler = self._filler, None
        if filler is not None:
            os.close(filler)

    @contextlib.contextmanager
    def _file(self) -> Iterator[int]:
        """The memfd for as long as a call takes, whoever closes meanwhile: its number may be another guest's then."""
        with self._closing:
            self._mapped()
            fd = os.dup(self._fd)
        try:
            yield fd
        finally:
            os.close(fd)

    def _mapped(self) -> ctypes.Array[ctypes.c_ubyte]:
        if self._mapping is None:
            raise HypervisorError("this daemon has let go of the guest", code="guest_detached")
        return self._mapping


class CopiedRam(MappedRam):
    """RAM that only its process has: pages are copied out of it when they are asked for, into memory of this daemon.

    Only what was fetched last is kept: a daemon shall not need as much memory as its guests. Whoever wants much
    of it fetches a part after the other.

    Attributes:
        pid: The process.
        address: Where RAM lies in it.
        shared: Device and inode, when it is a file, all the same.
    """

    is_copied = True

    def __init__(self, pid: int, address: int, layout: RamLayout, *, shared: tuple[int, int] | None = None) -> None:
        """Raises: OSError: that process cannot be looked at."""
        self.pid, self.address, self.shared = pid, address, shared
        self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        fd = -1
        try:
            fd = os.memfd_create("vmmigrate-copy", os.MFD_CLOEXEC)
            os.ftruncate(fd, layout.size_bytes)
            super().__init__(fd, layout, writable=True)
        except BaseException:
            os.close(self._pagemap)
            if fd >= 0:
                os.close(fd)
            raise

    def populated(self) -> PageBitmap:
        """Pages that hold anything; all of them, where the kernel cannot tell."""
        whole = np.asarray([(0, self.layout.pages)], dtype=np.int64)
        with self._closing:
            self._mapped()
            if self.shared is not None:  # what is swapped out, or not mapped, is not seen in a process' tables
                return PageBitmap.from_runs(self.layout.pages, whole)
            try:
                runs = kernel.pages_there(self._pagemap, self.address, self.layout.size_bytes)
            except OSError as exc:
                if exc.errno != errno.ENOTTY:
                    raise self._unread(exc) from exc
                runs = whole
        return PageBitmap.from_runs(self.layout.pages, runs)

    def fetch(self, runs: Runs) -> None:
        with self._file() as fd:
            kernel.punch_holes(fd, [(0, self.layout.pages)])
        mapping = self._mapped()  # held: nobody else may be given its addresses meanwhile
        self._copy(runs, ctypes.addressof(mapping))

    def sample(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """A copy of some pages, ascending, as the guest has them now; what was fetched stays."""
        self._mapped()
        copy = np.empty((len(numbers), PAGE_SIZE // 8), dtype=np.uint64)
        self._copy(runs_of_pages(numbers), copy.ctypes.data, packed=True)
        return copy

    def page_now(self, page: int) -> memoryview:
        """One page as the guest has it now; what was fetched stays."""
        buffer = (ctypes.c_ubyte * PAGE_SIZE)()
        self._copy(np.asarray([(page, 1)], dtype=np.int64), ctypes.addressof(buffer) - page * PAGE_SIZE)
        return memoryview(buffer).cast("B")

    def _copy(self, runs: Runs, target: int, *, packed: bool = False) -> None:
        try:
            kernel.read_process(self.pid, self.address, target, runs, packed=packed)
        except OSError as exc:
            raise self._unread(exc) from exc

    def _unread(self, exc: OSError) -> HypervisorError:
        error = HypervisorError(f"cannot read guest RAM of process {self.pid}: {exc.strerror or exc}", code="ram_read")
        error.__cause__ = ProcessLookupError() if exc.errno == errno.ESRCH else exc
        return error

    def close(self) -> None:
        if self._mapping is not None:
            with self._closing:
                os.close(self._pagemap)
        super().close()


def _exported(address: int, size_bytes: int) -> ctypes.Array[ctypes.c_ubyte]:
    """The mapping as something that views can be had of; unmapped when the last of them is gone."""
    exported = (ctypes.c_ubyte * size_bytes).from_address(address)
    weakref.finalize(exported, kernel.unmap, address, size_bytes).atexit = False
    return exported


def probe_huge_pages() -> Capability:
    """Whether the kernel gives huge pages to guest RAM, by populating some."""
    size_bytes = 4 * HUGE_BYTES
    try:
        fd = os.memfd_create("vmmigrate-probe", os.MFD_CLOEXEC)
        os.ftruncate(fd, size_bytes)
        ram = MappedRam(fd, RamLayout.for_size(size_bytes), writable=True, huge_pages=True)
        try:
            ram.populate(0, ram.layout.pages)
            found = kernel.huge_bytes(ctypes.addressof(ram._mapped()), size_bytes)
        finally:
            ram.close()
    except (OSError, HypervisorError) as exc:
        return Capability(False, str(exc))
    if found:
        return Capability(True, "transparent huge pages of shared memory, where whole ones were touched at the source")
    with contextlib.suppress(OSError):
        return Capability(
            False, f"the kernel gives none to shared memory ({_SHMEM_ENABLED}: {_chosen(_SHMEM_ENABLED)})"
        )
    return Capability(False, "the kernel has none for shared memory")


def _chosen(setting: Path) -> str:
    """The word in brackets: `always [never] deny`."""
    return setting.read_text().partition("[")[2].partition("]")[0]
