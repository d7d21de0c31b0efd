"""The few kernel calls that Python does not wrap, or not whole: userfaultfd, PAGEMAP_SCAN, hole punching, mappings; and
one of the C library.

Knows neither guests nor the event loop; the guest process imports it too, so it stays small. Every call blocks its
thread until the kernel is done and releases the GIL meanwhile.

Source: linux/userfaultfd.h, linux/fs.h (Linux 6.7 and later); reference/dependencies.md 7.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import struct
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from vmmigrate.errors import HypervisorError
from vmmigrate.memory import PAGE_SIZE, Runs, split_runs

# Numbers of userfaultfd(2) by machine.
_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_UFFD_USER_MODE_ONLY = 1
_UFFD_API = 0xAA
_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
_FEATURE_WP_UNPOPULATED = 1 << 13
_FEATURE_WP_ASYNC = 1 << 15
_FEATURES = _FEATURE_PAGEFAULT_FLAG_WP | _FEATURE_WP_HUGETLBFS_SHMEM | _FEATURE_WP_UNPOPULATED | _FEATURE_WP_ASYNC
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_WRITEPROTECT = 0xC018AA06
_UFFDIO_COPY = 0xC028AA03
_COPY_ARGUMENT = struct.Struct("4Qq")
_FILLING = _FEATURE_PAGEFAULT_FLAG_WP | _FEATURE_WP_HUGETLBFS_SHMEM
_REGISTER_MODE_WP = 2
_WRITEPROTECT_MODE_WP = 1

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE_BLOCK_BYTES = 4 << 20

_PAGEMAP_SCAN = 0xC0606610
_PM_SCAN_WP_MATCHING = 1
_PM_SCAN_CHECK_WPASYNC = 2
_PAGE_IS_WRITTEN, _PAGE_IS_PRESENT, _PAGE_IS_SWAPPED, _PAGE_IS_PFNZERO = 1 << 1, 1 << 3, 1 << 4, 1 << 5
_SCAN_ARGUMENT = struct.Struct("12Q")
_SCAN_VECTOR_REGIONS = 8192
_MOST_VECTORS = 1024  # IOV_MAX
_PIECE_PAGES = 256

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_F_SEAL_SHRINK, _F_SEAL_GROW = 2, 4
_PROT_READ, _PROT_WRITE = 1, 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value
_PR_SET_TIMERSLACK = 29
_SPLICE_F_NONBLOCK = 2
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
_libc.tee.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint]
_libc.tee.restype = ctypes.c_ssize_t
_libc.syscall.restype = ctypes.c_long
_libc.process_vm_readv.argtypes = [
    ctypes.c_int,
    *(ctypes.c_void_p, ctypes.c_ulong) * 2,
    ctypes.c_ulong,
]
_libc.process_vm_readv.restype = ctypes.c_ssize_t


def open_write_tracker(address: int, size_bytes: int) -> int:
    """A userfaultfd that can track writes of this process to [address, address + size); no mark is set yet.

    User-mode faults only, always: it then needs no privilege.

    Raises:
        OSError: The kernel cannot; nothing is registered.
    """
    return _userfaultfd(address, size_bytes, _FEATURES)


def open_filler(address: int, size_bytes: int) -> int:
    """A userfaultfd by which pages of a shared mapping can be filled (`fill`); it catches no fault.

    It is registered for write-protection, and nothing is ever protected by it: to be registered is all that filling
    asks for. As long as it is open, reading a page by the mapping does not map its neighbours, too.

    Raises: OSError: The kernel cannot; nothing is registered.
    """
    return _userfaultfd(address, size_bytes, _FILLING)


def fill(uffd: int, address: int, contents: int, size_bytes: int) -> int:
    """Put *size_bytes* from address *contents* into pages that are not there, from *address* on.

    Unlike a first write, this neither traps for each page nor zeroes what is about to be overwritten.

    Returns: How many bytes it did: all, or those before a page that is there already, or that could not be had.
    """
    argument = bytearray(_COPY_ARGUMENT.pack(address, contents, size_bytes, 0, 0))
    with contextlib.suppress(OSError):  # what it did counts, and why there was no more is of no use to anybody
        fcntl.ioctl(uffd, _UFFDIO_COPY, argument)
    return max(int(_COPY_ARGUMENT.unpack(argument)[4]), 0)


def _userfaultfd(address: int, size_bytes: int, features: int) -> int:
    number = _USERFAULTFD.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"no userfaultfd number known for {platform.machine()}")
    fd = int(_libc.syscall(ctypes.c_long(number), ctypes.c_int(os.O_CLOEXEC | os.O_NONBLOCK | _UFFD_USER_MODE_ONLY)))
    if fd < 0:
        raise _os_error("userfaultfd")
    try:
        fcntl.ioctl(fd, _UFFDIO_API, bytearray(struct.pack("3Q", _UFFD_API, features, 0)))
        fcntl.ioctl(fd, _UFFDIO_REGISTER, bytearray(struct.pack("4Q", address, size_bytes, _REGISTER_MODE_WP, 0)))
    except OSError:
        os.close(fd)
        raise
    return fd


def write_protect(uffd: int, address: int, size_bytes: int, *, on: bool) -> None:
    """Protect pages so that the next write to each leaves a mark (this clears marks), or stop protecting them."""
    mode = _WRITEPROTECT_MODE_WP if on else 0
    fcntl.ioctl(uffd, _UFFDIO_WRITEPROTECT, bytearray(struct.pack("3Q", address, size_bytes, mode)))


def take_written(pagemap: int, address: int, size_bytes: int) -> Runs:
    """Which pages were written since they were last protected; protects exactly those again, atomically per page.

    Shape: runs counted in pages from *address*, ascending.

    Raises:
        OSError: Some of the marks may be gone.
    """
    return _scan(pagemap, address, size_bytes, _TAKING, _WRITTEN)


def _scan(pagemap: int, address: int, size_bytes: int, flags: int, masks: tuple[int, int, int, int]) -> Runs:
    vector = np.empty((_SCAN_VECTOR_REGIONS, 3), dtype=np.uint64)
    found: list[Runs] = []
    start, end = address, address + size_bytes
    while start < end:
        argument = bytearray(_scan_argument(start, end, vector, flags, masks))
        count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument)
        edges = vector[:count, :2].astype(np.int64)
        found.append(np.stack([edges[:, 0] - address, edges[:, 1] - edges[:, 0]], axis=1) // PAGE_SIZE)
        walked_to = _SCAN_ARGUMENT.unpack(argument)[4]
        if walked_to <= start:
            raise OSError(errno.EIO, f"PAGEMAP_SCAN made no progress at {start:#x}")
        start = walked_to
    return np.concatenate(found)


def check_tracked(pagemap: int, address: int, size_bytes: int) -> None:
    """Whether writes leave marks; changes none. Raises: OSError: EPERM: they do not."""
    vector = np.empty((1, 3), dtype=np.uint64)
    argument = bytearray(_scan_argument(address, address + size_bytes, vector, flags=_PM_SCAN_CHECK_WPASYNC))
    fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument)


_TAKING = _PM_SCAN_WP_MATCHING | _PM_SCAN_CHECK_WPASYNC
_WRITTEN = (0, _PAGE_IS_WRITTEN, 0, _PAGE_IS_WRITTEN)  # inverted, all of, any of, return
# Not the page of zeros that stands where something was read and never written.
_THERE = (_PAGE_IS_PFNZERO, _PAGE_IS_PFNZERO, _PAGE_IS_PRESENT | _PAGE_IS_SWAPPED, _PAGE_IS_PRESENT)


def _scan_argument(
    start: int,
    end: int,
    vector: npt.NDArray[np.uint64],
    flags: int = _TAKING,
    masks: tuple[int, int, int, int] = _WRITTEN,
) -> bytes:
    return _SCAN_ARGUMENT.pack(_SCAN_ARGUMENT.size, flags, start, end, 0, vector.ctypes.data, len(vector), 0, *masks)


def pages_there(pagemap: int, address: int, size_bytes: int) -> Runs:
    """Which pages of a private mapping hold anything, in memory or swapped out; as `take_written`, without its effect.

    Raises: OSError: ENOTTY: the kernel is older than 6.7.
    """
    return _scan(pagemap, address, size_bytes, 0, _THERE)


def read_process(pid: int, source: int, target: int, runs: Runs, *, packed: bool = False) -> None:
    """Copy pages, by their numbers in runs, out of another process' memory at *source* to ours at *target*: to where
    their numbers say, or, *packed*, one after the other.

    Raises: OSError: EFAULT: less is mapped there; ESRCH: it is gone; EPERM. Some pages may have been copied.

    Source: process_vm_readv(2).
    """
    # In pieces: the kernel copies less than 2 GiB at once.
    places = split_runs(runs, _PIECE_PAGES).astype(np.uint64) * PAGE_SIZE
    ours = places.copy()
    if packed:
        ours[:, 0] = np.cumsum(places[:, 1]) - places[:, 1]
    for begin in range(0, len(places), _MOST_VECTORS):
        there, here = (each[begin : begin + _MOST_VECTORS].copy() for each in (places, ours))
        there[:, 0] += np.uint64(source)
        here[:, 0] += np.uint64(target)
        wanted = int(there[:, 1].sum())
        got = _libc.process_vm_readv(pid, here.ctypes.data, len(here), there.ctypes.data, len(there), 0)
        if got < 0:
            raise _os_error("process_vm_readv")
        if got != wanted:
            raise OSError(errno.EFAULT, f"process_vm_readv: {got} bytes of {wanted}")


def is_sealed_against_shrinking(fd: int) -> bool:
    """Whether a file is a memfd that can never become shorter."""
    try:
        return bool(fcntl.fcntl(fd, _F_GET_SEALS) & _F_SEAL_SHRINK)
    except OSError:
        return False


def seal_size(fd: int) -> None:
    """Let a memfd (made with MFD_ALLOW_SEALING) neither grow nor shrink any more."""
    fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)


def punch_holes(fd: int, runs: Iterable[tuple[int, int]]) -> None:
    """Give the pages of *runs* (first page, pages) of a file back; they read as zero."""
    for first, pages in runs:
        mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
        if _libc.fallocate(fd, mode, first * PAGE_SIZE, pages * PAGE_SIZE) != 0:
            raise _os_error("fallocate")


def map_file(fd: int, size_bytes: int, *, writable: bool) -> int:
    """Map a file from its beginning, shared; the address. The descriptor is not needed for it any more."""
    return _map(None, size_bytes, _protection(writable), _MAP_SHARED, fd)


def map_nothing(address: int, size_bytes: int, *, writable: bool) -> None:
    """Put private memory that reads as zero in the place of a mapping, which is gone then."""
    flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
    _map(address, size_bytes, _protection(writable), flags, -1)


def unmap(address: int, size_bytes: int) -> None:
    if _libc.munmap(address, size_bytes) != 0:
        raise _os_error("munmap")


def populate(address: int, size_bytes: int) -> None:
    """Make the pages of a shared mapping be there, writable, as the first write to each would. (`mmap.madvise` would
    hold the GIL meanwhile.)

    Raises: OSError: EINVAL: the kernel is older than 5.14; ENOMEM. Some pages may be there.
    """
    if _libc.madvise(address, size_bytes, _MADV_POPULATE_WRITE) != 0:
        raise _os_error("madvise(MADV_POPULATE_WRITE)")


def huge_bytes(address: int, size_bytes: int) -> int:
    """How much of a mapping of shared memory is mapped in huge pages. Reads all mappings of this process."""
    found, inside = 0, False
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as smaps:
        for line in smaps:
            name = line.partition(" ")[0]
            if not name.endswith(":"):
                start, _, end = name.partition("-")
                inside = int(start, 16) < address + size_bytes and int(end, 16) > address
            elif inside and name == "ShmemPmdMapped:":
                found += int(line.split()[1]) * 1024
    return found


def advise_huge(address: int, size_bytes: int) -> None:
    """Ask for huge pages in a part of a mapping. Raises: OSError: EINVAL: the kernel has none."""
    if _libc.madvise(address, size_bytes, _MADV_HUGEPAGE) != 0:
        raise _os_error("madvise(MADV_HUGEPAGE)")


def _protection(writable: bool) -> int:
    return _PROT_READ | (_PROT_WRITE if writable else 0)


def _map(address: int | None, size_bytes: int, protection: int, flags: int, fd: int) -> int:
    mapped = _libc.mmap(address, size_bytes, protection, flags, fd, 0)
    if mapped == _MAP_FAILED or mapped is None:
        raise _os_error("mmap")
    return int(mapped)


def sharpen_timers() -> None:
    """Let this thread's timed waits end on time (1 ns slack instead of 50 µs)."""
    _libc.prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


def give_large_blocks_back() -> None:
    """From now on a block of 4 MiB or more that this process frees is the kernel's again at once.

    Otherwise glibc lets its threshold follow the blocks that are freed, up to 32 MiB: the second cache, or table, of a
    migration would then come from a heap, and stay there. Setting one of these two turns following off for both, so
    the other is set, too: blocks of a record's size are not to be given back and asked for again all the time.

    Source: mallopt(3). Nothing happens where the C library has no such thing.
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE_BLOCK_BYTES)


def peek_pipe(fd: int) -> bytes:
    """What waits in a pipe, which it stays in; nothing when there is nothing."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ))
        size = _libc.tee(fd, writing, 1 << 30, _SPLICE_F_NONBLOCK)
        if size < 0 and ctypes.get_errno() != errno.EAGAIN:
            raise _os_error("tee")
        return os.read(reading, size) if size > 0 else b""
    finally:
        os.close(reading)
        os.close(writing)


def start_ticks_of(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when there is none.

    Raises: HypervisorError `guest_unresponsive`: this host cannot tell just now, such as one without descriptors left.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return int(stat.read().rpartition(b")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return None
    except OSError as exc:
        raise HypervisorError(f"cannot look at process {pid}: {exc.strerror}", code="guest_unresponsive") from exc


def populated_runs(fd: int, size_bytes: int) -> Runs:
    """The data extents of a file as page runs, without reading (a read would allocate a hole)."""
    runs: list[tuple[int, int]] = []
    offset = 0
    while offset < size_bytes:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # nothing but a hole up to the end
                break
            raise HypervisorError(f"cannot seek in guest RAM: {exc.strerror}") from exc
        offset = os.lseek(fd, start, os.SEEK_HOLE)
        runs.append((start // PAGE_SIZE, -(-offset // PAGE_SIZE) - start // PAGE_SIZE))
    return np.asarray(runs, dtype=np.int64).reshape(-1, 2)


def _os_error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")
