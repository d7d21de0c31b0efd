r"""A small Linux guest for QEMU that watches itself: a distribution's kernel and an initramfs of busybox.

    python -m tools.linux_guest --output DIR [--cache DIR]

A migration test needs a guest that would notice. A page lost, a disk block stale or a clock that ran backwards rarely
stops a kernel; so the guest keeps sums of what it has in memory, remembers in RAM what it wrote to disk, and counts.
The kernel's command line is `console=ttyS0 quiet panic=-1` and, each at will:

    vmm.ws=MIB    a file of random bytes in tmpfs; its sum is checked again and again
    vmm.disk=1    on /dev/vda or /dev/nvme0n1, numbered blocks of 64 KiB are written, flushed, read back past the cache.
                  At most 64 places, spread evenly over the disk; WHATEVER IS ON THE DISK IS LOST
    vmm.ping=1    ping 10.0.2.2 once a second (QEMU's user network; the guest is 10.0.2.15)

The guest says on ttyS0, lines ended by a bare \n and each of them written in one piece:

    FAULT <why>   it could not be set up as ordered; no READY will follow
    READY         once, before the first HB
    HB n          about every 10 ms; n = 1, 2, 3, …
    STATUS hb=N disk_ok=N disk_fail=N ping_ok=N ping_fail=N sum_ok=N sum_fail=N     about every second

and obeys, from READY or FAULT on, one command per line, in order: `check` (answer: `CHECK ok` or `CHECK bad <why>`; the
memory file and every block the disk must still hold, read anew), `poweroff`, `reboot`; to another, `UNKNOWN <command>`.
The heartbeat stops while nobody reads the serial port, as any guest's console output does.

Nothing is installed: the kernel is what the system has in /boot, or else what `apt-get download` brings.
Packages ship no modules.dep (depmod writes it upon installation), so each module is asked itself what it depends on.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

KERNEL_PACKAGE: Final = "linux-image-cloud-amd64"
BUSYBOX_PACKAGE: Final = "busybox-static"
INSTALL_HINT: Final = f"install {KERNEL_PACKAGE} and {BUSYBOX_PACKAGE} (Debian), or have apt-get fetch them"
FLAVOUR: Final = "cloud-amd64"
SYSTEM: Final = Path("/")

MODULES: Final = ("virtio_pci", "virtio_blk", "virtio_net", "nvme")
# What INIT calls and the shell has not built in.
APPLETS: Final = "sh blockdev cat cmp dd dmesg insmod ip md5sum mkdir mkfifo mount ping poweroff reboot renice stty"

KERNEL: Final = "vmlinuz"
INITRD: Final = "initrd.cpio.gz"
STAMP: Final = "stamp.json"

_COMMAND_TIMEOUT_S: Final = 300.0

# Traps: a line on the console must be one write(), which busybox's `echo` does. A heartbeat must fork nothing, so it
# naps by reading, until time is up, a fifo that nobody writes; read like that, half a line is lost. $$ in a background
# loop is process 1. A file of counts may be found empty (just truncated), never half written; the last values stand
# then. A tmpfs that takes the last page panics the kernel instead of filling up, hence the look at what is available.
INIT: Final = r"""#!/bin/sh
export PATH=/bin

nap() { read -t "$1" -u 9 _; }
renice_self() { read -r pid _ </proc/self/stat; renice -n "$1" -p "$pid" >/dev/null 2>&1; }
fault() { faults=1; echo "FAULT $*"; }

# -- setting up ---------------------------------------------------------------------------------------------------

set_up_system() {
    mount -t proc proc /proc
    mount -t sysfs sys /sys
    mount -t devtmpfs dev /dev
    mount -t tmpfs -o size=16m run /run
    dmesg -n 1  # the kernel does not wait for the end of our lines
    stty -F /dev/ttyS0 -echo -opost -isig -ixon -hupcl clocal icanon icrnl
    exec </dev/ttyS0 >/dev/ttyS0 2>&1
    mkdir /run/slots && : >/run/asked
    mkfifo /run/nap /run/answer
    exec 9<>/run/nap 7<>/run/answer
    for name in disk ping sum; do echo "${name}_ok=0 ${name}_fail=0" >/run/$name; done
    status >/dev/null  # so that there are last values
    for module in /modules/*.ko; do [ ! -e "$module" ] || insmod "$module" || fault "insmod $module"; done
}

read_parameters() {
    ws=0 disk= ping=
    for word in $(cat /proc/cmdline); do
        case $word in vmm.ws=*) ws=${word#*=} ;; vmm.disk=1) disk=wanted ;; vmm.ping=1) ping=wanted ;; esac
    done
}

set_up_memory() {
    [ "$ws" -gt 0 ] || return
    while read -r name available _ && [ "$name" != MemAvailable: ]; do :; done </proc/meminfo
    [ $((ws + 32)) -le $((available / 1024)) ] || { fault "$ws MiB do not fit into $available KiB"; return; }
    mount -t tmpfs -o size=$((ws + 1))m ws /ws
    dd if=/dev/urandom of=/ws/file bs=1M count="$ws" 2>/dev/null || fault "no room for $ws MiB"
    sum=$(md5sum </ws/file)
}

find_disk() {
    for disk in /dev/vda /dev/nvme0n1; do [ ! -b $disk ] || return 0; done
    return 1
}
set_up_disk() {
    [ -n "$disk" ] || return
    tries=25
    until find_disk; do
        [ $tries -gt 0 ] || { fault "no disk"; return; }
        tries=$((tries - 1))
        nap 0.2
    done
    blocks=$(($(blockdev --getsize64 $disk) / 65536))
    slots=$((blocks < 64 ? blocks : 64))
    [ $slots -gt 0 ] || { fault "$disk is smaller than 64 KiB"; return; }
    stride=$((blocks / slots))
}

set_up_network() {
    nic=
    ip link set lo up
    for path in /sys/class/net/*; do [ "${path##*/}" = lo ] || nic=${path##*/}; done
    [ -n "$nic" ] || { [ -z "$ping" ] || fault "no network interface"; return; }
    ip link set "$nic" up && ip addr add 10.0.2.15/24 dev "$nic" && ip route add default via 10.0.2.2 || fault "$nic"
}

# -- loops, each a process of its own -----------------------------------------------------------------------------

beat() {
    renice_self -10
    beats=0 second=0
    while :; do
        nap 0.01
        beats=$((beats + 1))
        echo "HB $beats"
        [ $((beats % 10)) = 0 ] || continue
        read -r now _ </proc/uptime
        [ "${now%.*}" = "$second" ] && continue
        second=${now%.*}
        status
    done
}

status() {
    read -r counts </run/disk && disk_counts=$counts
    read -r counts </run/ping && ping_counts=$counts
    read -r counts </run/sum && sum_counts=$counts
    echo "STATUS hb=$beats $disk_counts $ping_counts $sum_counts"
}

# count NAME COMMAND...: runs the command and counts how it ended. Variables are the loop's own: it is a process.
count() {
    name=$1
    shift
    if "$@"; then ok=$((ok + 1)); else fail=$((fail + 1)); fi
    echo "${name}_ok=$ok ${name}_fail=$fail" >/run/$name
}

memory_is_whole() { [ "$(md5sum </ws/file)" = "$sum" ]; }

# Takes a fifth of a processor at most, however large the file.
sum_loop() {
    renice_self 10
    while :; do
        read -r began _ </proc/uptime
        count sum memory_is_whole
        read -r ended _ </proc/uptime
        nap $(((${ended%.*} - ${began%.*}) * 4 + 5))
    done
}

ping_loop() {
    while :; do
        count ping ping -q -c 1 -W 1 10.0.2.2 >/dev/null 2>&1
        nap 1
    done
}

# pattern NUMBER: 64 KiB of it, 16 bytes at a time.
pattern() {
    text="vmm$((100000000000 + $1))
"
    for _ in 1 2 3 4 5 6 7 8 9 10 11 12; do text=$text$text; done
    echo -n "$text"
}

# holds SLOT NUMBER: whether the disk does.
holds() {
    pattern "$2" >/run/wanted
    dd if=$disk bs=64k count=1 skip=$(($1 * stride)) iflag=direct 2>/dev/null | cmp -s - /run/wanted
}

# write_slot SLOT NUMBER. Nothing is expected of a slot from before the write until after the flush.
write_slot() {
    : >/run/slots/$1
    pattern "$2" >/run/pattern
    dd if=/run/pattern of=$disk bs=64k count=1 seek=$(($1 * stride)) oflag=direct conv=notrunc,fsync 2>/dev/null &&
        echo "$2" >/run/slots/$1 &&
        holds "$1" "$2"
}

# Prints SLOT=NUMBER of what the disk should hold and does not.
lost_slots() {
    for slot in /run/slots/*; do
        read -r number <"$slot" || continue
        slot=${slot##*/}
        holds "$slot" "$number" || echo -n "$slot=$number "
    done
}

# The only process that touches the disk, so that a check meets no write under way.
disk_loop() {
    while :; do
        number=$((number + 1))
        count disk write_slot $((number % slots)) $number
        nap 0.1
        read -r ask </run/asked && [ "$ask" != "$heard" ] && heard=$ask && echo "$ask $(lost_slots)" >&7
    done
}

# -- commands -----------------------------------------------------------------------------------------------------

check_disk() {
    asks=$((asks + 1))
    echo $asks >/run/asked
    until [ "$answered" = $asks ]; do
        read -r -t 120 -u 7 answered lost || { lost="no answer"; return; }
    done
}

check() {
    bad= lost=
    [ -z "$faults" ] || { echo "CHECK bad not set up"; return; }
    [ "$ws" -eq 0 ] || memory_is_whole || bad=" memory"
    [ -z "$disk" ] || check_disk
    [ -z "$lost" ] || bad="$bad disk: $lost"
    if [ -z "$bad" ]; then echo "CHECK ok"; else echo "CHECK bad$bad"; fi
}

obey() {
    while :; do
        read -r command || { nap 1; continue; }
        case $command in
            "") ;;
            check) check ;;
            poweroff) poweroff -f ;;
            reboot) reboot -f ;;
            *) echo "UNKNOWN $command" ;;
        esac
    done
}

faults= asks=0 answered=0 heard= number=0 ok=0 fail=0
set_up_system
read_parameters
set_up_memory
set_up_disk
set_up_network
if [ -z "$faults" ]; then
    echo READY
    beat &
    [ "$ws" -eq 0 ] || sum_loop &
    [ -z "$disk" ] || disk_loop &
    [ -z "$ping" ] || ping_loop &
fi
obey
"""


class LinuxGuestError(Exception):
    """The guest cannot be built here; the text says what is missing, in one line."""


@dataclass(frozen=True)
class Guest:
    """*release* as `uname -r` has it; *reused*: nothing was built, the folder was complete."""

    kernel: Path
    initrd: Path
    release: str
    reused: bool


# -- the archive -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One file of a cpio archive. *mode* holds the type too, as in `st_mode`; a link's content is its target."""

    name: str
    mode: int
    content: bytes = field(default=b"", repr=False)


def _padded(part: bytes) -> bytes:
    return part + bytes(-len(part) % 4)


def _record(entry: Entry, inode: int) -> bytes:
    """Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst."""
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    numbers = (inode, entry.mode, 0, 0, links, 0, len(entry.content), 0, 0, 0, 0, len(name), 0)
    return _padded(b"070701" + b"".join(b"%08X" % number for number in numbers) + name) + _padded(entry.content)


def cpio_archive(entries: Iterable[Entry]) -> bytes:
    """The entries in their order, in cpio's "newc" format, owned by root and of no date: same input, same bytes.

    Raises: ValueError: an entry whose folder does not stand before it; the kernel would skip it without a word.
    """
    folders = {""}
    records = []
    for inode, entry in enumerate(entries, start=1):
        if entry.name.rpartition("/")[0] not in folders:
            raise ValueError(f"no folder for {entry.name}")
        if stat.S_ISDIR(entry.mode):
            folders.add(entry.name)
        records.append(_record(entry, inode))
    return b"".join([*records, _record(Entry("TRAILER!!!", 0), 0)])


def guest_entries(busybox: bytes, modules: Sequence[tuple[str, bytes]]) -> Iterator[Entry]:
    """The root file system. Modules are named so that their order is that of a shell's `*`."""
    for folder in ("bin", "dev", "modules", "proc", "run", "sys", "ws"):
        yield Entry(folder, stat.S_IFDIR | 0o755)
    yield Entry("init", stat.S_IFREG | 0o755, INIT.encode())
    yield Entry("bin/busybox", stat.S_IFREG | 0o755, busybox)
    for applet in APPLETS.split():
        yield Entry(f"bin/{applet}", stat.S_IFLNK | 0o777, b"busybox")
    for number, (name, content) in enumerate(modules):
        yield Entry(f"modules/{number:02}-{name}.ko", stat.S_IFREG | 0o644, content)


# -- modules ---------------------------------------------------------------------------------------------------------


def module_name(path: str) -> str:
    """`kernel/fs/a-b.ko.xz` is the module a_b: the kernel takes - and _ for the same."""
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def depends_of(module: bytes) -> tuple[str, ...]:
    """What a module says it needs. Raises: LinuxGuestError: it is no module."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    if not module.startswith(b"\x7fELF") or found is None:
        raise LinuxGuestError("a kernel module that does not say what it depends on")
    return tuple(name.replace("-", "_") for name in found[1].decode().split(",") if name)


def module_order(wanted: Iterable[str], depends: Callable[[str], Iterable[str]], builtin: Collection[str]) -> list[str]:
    """*wanted* and what they need, each after what it needs, each once, without what is in the kernel already.

    Raises: LinuxGuestError: modules that need each other.
    """
    order: list[str] = []

    def place(name: str, needed_by: tuple[str, ...]) -> None:
        if name in builtin or name in order:
            return
        if name in needed_by:
            raise LinuxGuestError(f"kernel modules that need each other: {', '.join(needed_by)}")
        for other in depends(name):
            place(other, (*needed_by, name))
        order.append(name)

    for name in wanted:
        place(name, ())
    return order


def module_content(path: Path) -> bytes:
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix != ".ko":
        raise LinuxGuestError(f"{path}: neither plain nor packed with xz")
    return path.read_bytes()


def ordered_modules(root: Path, wanted: Iterable[str]) -> list[tuple[str, bytes]]:
    """Name and content of what has to be loaded for *wanted*, in that order, from a folder /lib/modules/RELEASE.

    Raises: LinuxGuestError: a module is not there, or in no known form.
    """
    paths = {module_name(path.name): path for path in root.glob("kernel/**/*.ko*")}
    contents: dict[str, bytes] = {}

    def depends(name: str) -> tuple[str, ...]:
        if name not in paths:
            raise LinuxGuestError(f"no kernel module {name} in {root}")
        contents[name] = module_content(paths[name])
        return depends_of(contents[name])

    builtin = frozenset(map(module_name, (root / "modules.builtin").read_text().splitlines()))
    return [(name, contents[name]) for name in module_order(wanted, depends, builtin)]


# -- where kernel and busybox come from ------------------------------------------------------------------------------


def version_key(name: str) -> list[tuple[int, str]]:
    """Sorts 6.1.0-9 before 6.1.0-50."""
    return [(int(number or 0), text) for number, text in re.findall(r"(\d+)|(\D+)", name)]


def is_static(program: Path) -> bool:
    """Whether an ELF program needs no dynamic linker: it names no interpreter (program header type 3)."""
    try:
        head = program.read_bytes()[:4096]
    except OSError:
        return False
    if head[:5] != b"\x7fELF\x02":
        return False
    first, size, count = (int.from_bytes(head[at : at + width], "little") for at, width in ((32, 8), (54, 2), (56, 2)))
    types = [head[first + size * index : first + size * index + 4] for index in range(count)]
    return (3).to_bytes(4, "little") not in types


def _run(*command: str, cwd: Path | None = None) -> str:
    """What *command* printed, in English. Raises: LinuxGuestError: it is not there, failed, or took too long."""
    env = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=_COMMAND_TIMEOUT_S
        )
    except FileNotFoundError:
        raise LinuxGuestError(f"no kernel or busybox for a guest, and no {command[0]}; {INSTALL_HINT}") from None
    except subprocess.TimeoutExpired as exc:
        raise LinuxGuestError(f"{exc}; {INSTALL_HINT}") from None
    if done.returncode:
        said = (done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1]
        raise LinuxGuestError(f"{' '.join(command)}: {said}; {INSTALL_HINT}")
    return done.stdout


def kernel_package() -> str:
    """The versioned package that KERNEL_PACKAGE stands for."""
    listing = _run("apt-cache", "depends", KERNEL_PACKAGE)
    found = re.search(rf"Depends: (linux-image-\S+-{FLAVOUR})$", listing, re.MULTILINE)
    if found is None:
        raise LinuxGuestError(f"apt knows no {KERNEL_PACKAGE}; {INSTALL_HINT}")
    return found[1]


def _download(package: Callable[[], str], cache: Path) -> Path:
    """apt writes a file under its final name at once, so it works in a folder of its own."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".apt-") as folder:
        _run("apt-get", "download", package(), cwd=Path(folder))
        (path,) = Path(folder).glob("*.deb")
        return path.replace(cache / path.name)


def _newest(paths: Iterable[Path]) -> Path | None:
    return max(paths, key=lambda path: version_key(path.name), default=None)


def fetch_package(pattern: str, package: Callable[[], str], cache: Path) -> Path:
    """The newest file in *cache* like *pattern*; if there is none, apt downloads what *package* names."""
    if (found := _newest(cache.glob(pattern))) is not None:
        return found
    try:
        return _download(package, cache)
    except LinuxGuestError:
        if os.geteuid() != 0:
            raise
    _run("apt-get", "update")  # no lists yet, or they name files that are gone
    return _download(package, cache)


def modules_of(kernel: Path) -> Path:
    """The modules' folder below the same root; packages of systems without /lib have it in usr."""
    release = kernel.name.removeprefix("vmlinuz-")
    folders = [kernel.parents[1] / lib / "modules" / release for lib in ("lib", "usr/lib")]
    return next(filter(Path.is_dir, folders), folders[0])


def kernel_below(root: Path) -> Path | None:
    """The newest kernel that can be read and has its modules."""
    found = (path for path in root.glob(f"boot/vmlinuz-*-{FLAVOUR}") if os.access(path, os.R_OK))
    return _newest(path for path in found if (modules_of(path) / "modules.builtin").is_file())


def busybox_below(root: Path) -> Path | None:
    return next(filter(is_static, (root / "bin/busybox", root / "usr/bin/busybox")), None)


def _unpacked(package: Path, scratch: Path) -> Path:
    root = scratch / package.name.partition("_")[0]
    _run("dpkg-deb", "-x", str(package), str(root))
    return root


def find_source(cache: Path, scratch: Path) -> tuple[Path, Path, list[Path]]:
    """Kernel and busybox of this system; what it lacks, from a package, unpacked below *scratch*.

    The third part is the files they came from. Raises: LinuxGuestError: neither files nor apt are there.
    """
    kernel, busybox = kernel_below(SYSTEM), busybox_below(SYSTEM)
    inputs = [path for path in (kernel, busybox) if path is not None]
    if kernel is None:
        inputs.append(fetch_package(f"linux-image-*-{FLAVOUR}_*.deb", kernel_package, cache))
        kernel = kernel_below(_unpacked(inputs[-1], scratch))
    if busybox is None:
        inputs.append(fetch_package(f"{BUSYBOX_PACKAGE}_*.deb", lambda: BUSYBOX_PACKAGE, cache))
        busybox = busybox_below(_unpacked(inputs[-1], scratch))
    if kernel is None or busybox is None:
        raise LinuxGuestError(f"no kernel or no busybox in {', '.join(path.name for path in inputs)}")
    return kernel, busybox, inputs


# -- the output ------------------------------------------------------------------------------------------------------


def _recipe() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _state(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns]


def _write(path: Path, content: bytes) -> str:
    """Replaces *path* whole; gives the digest."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as folder:
        new = Path(folder) / path.name
        new.write_bytes(content)
        new.replace(path)
    return hashlib.sha256(content).hexdigest()


def complete_guest(output: Path) -> Guest | None:
    """The guest in *output*, if what lies there is whole and would come out the same.

    An input that is gone (a cache was cleared) is no reason to build again; one that changed is.
    """
    try:
        stamp: dict[str, Any] = json.loads((output / STAMP).read_text())
        outputs = {name: hashlib.sha256((output / name).read_bytes()).hexdigest() for name in (KERNEL, INITRD)}
        changed = any(Path(name).exists() and _state(Path(name)) != state for name, state in stamp["inputs"].items())
        if stamp["recipe"] != _recipe() or stamp["outputs"] != outputs or changed:
            return None
        return Guest(output / KERNEL, output / INITRD, stamp["release"], reused=True)
    except (OSError, ValueError, KeyError):
        return None


def build_guest(output: Path, cache: Path | None = None) -> Guest:
    """The guest in *output*, built there unless it is complete.

    Args:
        cache: Where downloaded packages stay; by default *output*.

    Raises:
        LinuxGuestError: There is no kernel or no static busybox and no way to get them.
        OSError: *output* cannot be written.
    """
    if (guest := complete_guest(output)) is not None:
        return guest
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="linux-guest-") as scratch:
        kernel, busybox, inputs = find_source((cache or output).resolve(), Path(scratch))
        modules = modules_of(kernel)
        archive = cpio_archive(guest_entries(busybox.read_bytes(), ordered_modules(modules, MODULES)))
        contents = {KERNEL: kernel.read_bytes(), INITRD: gzip.compress(archive, compresslevel=1, mtime=0)}
    stamp = {
        "recipe": _recipe(),
        "release": modules.name,
        "inputs": {str(path): _state(path) for path in inputs},
        "outputs": {name: _write(output / name, content) for name, content in contents.items()},
    }
    _write(output / STAMP, json.dumps(stamp, indent=2).encode())
    return Guest(output / KERNEL, output / INITRD, modules.name, reused=False)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.linux_guest", description="Build a Linux guest for QEMU.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help=f"for {KERNEL} and {INITRD}")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="for downloaded packages (default: the output)")
    chosen = parser.parse_args(arguments)
    try:
        guest = build_guest(chosen.output, chosen.cache)
    except (LinuxGuestError, OSError) as exc:
        print(f"linux_guest: {exc}", file=sys.stderr)
        return 1
    print(f"{guest.kernel} and {guest.initrd}, Linux {guest.release}{' (as it was)' if guest.reused else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
