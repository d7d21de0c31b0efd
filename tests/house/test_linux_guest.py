"""The parts of tools/linux_guest.py that need neither network nor QEMU: archive, order of modules, what is reused."""

from __future__ import annotations

import gzip
import lzma
import os
import random
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools import linux_guest
from tools.linux_guest import Entry, LinuxGuestError

RELEASE = "6.1.0-9-cloud-amd64"


def parsed(archive: bytes) -> Iterator[Entry]:
    """A reader of "newc" archives that shares nothing with the writer."""
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        numbers = [int(archive[at + 6 + 8 * field : at + 14 + 8 * field], 16) for field in range(13)]
        mode, size, name_size = numbers[1], numbers[6], numbers[11]
        name = archive[at + 110 : at + 110 + name_size]
        at += (110 + name_size + 3) // 4 * 4
        assert name[-1] == 0
        if name == b"TRAILER!!!\0":
            assert at == len(archive)
            return
        yield Entry(name[:-1].decode(), mode, archive[at : at + size])
        at += (size + 3) // 4 * 4


def module(depends: str) -> bytes:
    return b"\x7fELF\x02 code \0license=GPL\0depends=" + depends.encode() + b"\0retpoline=Y\0"


def program(*header_types: int) -> bytes:
    """An ELF file that is nothing but its header and its program headers."""
    head = bytearray(b"\x7fELF\x02".ljust(64, b"\0"))
    head[32:40] = (64).to_bytes(8, "little")
    head[54:56] = (56).to_bytes(2, "little")
    head[56:58] = len(header_types).to_bytes(2, "little")
    return bytes(head) + b"".join(kind.to_bytes(4, "little").ljust(56, b"\0") for kind in header_types)


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """A root with a kernel, its modules and a busybox; which of the modules need which is as in Debian 12."""
    root = tmp_path / "system"
    modules = root / "lib/modules" / RELEASE
    depends = {
        "virtio/virtio": "",
        "virtio/virtio_ring": "",
        "virtio/virtio_pci": "virtio_ring,virtio",
        "block/virtio_blk": "virtio,virtio_ring",
        "net/net-failover": "failover",
        "net/failover": "",
        "net/virtio_net": "net_failover,virtio",
        "net/e1000": "",
    }
    for name, needed in depends.items():
        path = modules / "kernel" / f"{name}.ko"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(module(needed))
    (modules / "modules.builtin").write_text(
        "kernel/drivers/nvme/host/nvme-core.ko\nkernel/drivers/nvme/host/nvme.ko\n"
    )
    (root / "boot").mkdir()
    (root / f"boot/vmlinuz-{RELEASE}").write_bytes(b"kernel")
    (root / "bin").mkdir()
    (root / "bin/busybox").write_bytes(program(1, 1))
    return root


@pytest.fixture
def built(system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a build from *system*."""
    monkeypatch.setattr(linux_guest, "SYSTEM", system)
    linux_guest.build_guest(tmp_path / "output")
    return tmp_path / "output"


# -- the archive -----------------------------------------------------------------------------------------------------


@given(
    st.dictionaries(
        st.text("abc.-é", min_size=1, max_size=9),
        st.tuples(st.sampled_from([stat.S_IFREG | 0o644, stat.S_IFREG | 0o755, stat.S_IFLNK | 0o777]), st.binary()),
    )
)
def test_archive_gives_back_every_entry_in_order_whatever_the_lengths(files: dict[str, tuple[int, bytes]]) -> None:
    entries = [Entry(name, mode, content) for name, (mode, content) in files.items()]

    assert list(parsed(linux_guest.cpio_archive(entries))) == entries


def test_archive_of_one_file_is_this_to_the_byte() -> None:
    """The layout itself, so that writer and reader cannot be wrong together."""
    archive = linux_guest.cpio_archive([Entry("init", stat.S_IFREG | 0o755, b"hello")])

    head = "00000001 000081ED 00000000 00000000 00000001 00000000 00000005" + " 00000000" * 4 + " 00000005 00000000"
    tail = "00000000 00000000 00000000 00000000 00000001 00000000 00000000" + " 00000000" * 4 + " 0000000B 00000000"
    assert archive == b"".join(
        [
            *(b"070701", head.replace(" ", "").encode(), b"init\0", b"\0", b"hello", b"\0\0\0"),
            *(b"070701", tail.replace(" ", "").encode(), b"TRAILER!!!\0", b"\0\0\0"),
        ]
    )


def test_archive_refuses_a_file_whose_folder_comes_later() -> None:
    """The kernel unpacks in order and skips what it has no folder for, without a word."""
    folder = Entry("bin", stat.S_IFDIR | 0o755)
    file = Entry("bin/busybox", stat.S_IFREG | 0o755)

    assert list(parsed(linux_guest.cpio_archive([folder, file]))) == [folder, file]
    with pytest.raises(ValueError, match="bin/busybox"):
        linux_guest.cpio_archive([file, folder])


def test_modules_stand_in_the_archive_so_that_a_shell_lists_them_in_loading_order() -> None:
    modules = [(name, b"") for name in ("virtio", "failover", "a", "z", "nvme", *"bcdefgh")]

    names = [entry.name for entry in linux_guest.guest_entries(b"", modules) if entry.name.startswith("modules/")]

    assert names == sorted(names)
    assert [name.partition("-")[2] for name in names] == [f"{name}.ko" for name, _ in modules]


def test_every_program_that_init_calls_is_linked_or_built_into_the_shell() -> None:
    """A missing link shows only in a booted guest, as a count that never grows."""
    words = set(linux_guest.INIT.replace("$(", " ").replace("(", " ").split())

    assert set(linux_guest.APPLETS.split()) - {"sh"} <= words
    assert {"sleep", "usleep", "head", "seq", "sed", "grep", "awk", "cut", "rm", "mv", "cp", "printf"} & words == set()


def test_init_is_a_shell_script_without_faults_of_syntax() -> None:
    checked = subprocess.run(["sh", "-n"], input=linux_guest.INIT, text=True, capture_output=True, check=False)

    assert (checked.returncode, checked.stderr) == (0, "")


# -- modules ---------------------------------------------------------------------------------------------------------


@given(st.randoms(use_true_random=False), st.integers(1, 12))
def test_each_module_comes_once_and_after_all_it_needs(chance: random.Random, count: int) -> None:
    names = [f"m{number}" for number in range(count)]
    depends = {name: chance.sample(names[:number], chance.randint(0, number)) for number, name in enumerate(names)}
    builtin = set(chance.sample(names, count // 3))
    wanted = chance.sample(names, chance.randint(0, count))

    order = linux_guest.module_order(wanted, depends.__getitem__, builtin)

    assert len(order) == len(set(order))
    assert set(wanted) - builtin <= set(order)
    assert builtin.isdisjoint(order)
    for name in order:
        assert set(depends[name]) - builtin <= set(order[: order.index(name)])


def test_nothing_is_asked_of_a_module_that_is_in_the_kernel() -> None:
    """There is no file of it to ask."""
    asked: list[str] = []

    def depends(name: str) -> list[str]:
        asked.append(name)
        return ["nvme_core"]

    assert linux_guest.module_order(["nvme"], depends, {"nvme_core"}) == ["nvme"]
    assert asked == ["nvme"]


def test_modules_that_need_each_other_are_refused_by_name() -> None:
    depends = {"a": ["b"], "b": ["c"], "c": ["a"]}

    with pytest.raises(LinuxGuestError, match="a, b, c"):
        linux_guest.module_order(["a"], depends.__getitem__, ())


def test_a_module_is_asked_itself_what_it_needs() -> None:
    assert linux_guest.depends_of(module("")) == ()
    assert linux_guest.depends_of(module("t10-pi,nvme-core")) == ("t10_pi", "nvme_core")
    with pytest.raises(LinuxGuestError):
        linux_guest.depends_of(b"\x7fELF without")
    with pytest.raises(LinuxGuestError):
        linux_guest.depends_of(b"\0depends=x\0")


def test_modules_are_found_whether_plain_or_packed_and_however_their_name_is_spelled(system: Path) -> None:
    root = system / "lib/modules" / RELEASE
    packed = root / "kernel/net/net-failover.ko"
    packed.with_suffix(".ko.xz").write_bytes(lzma.compress(packed.read_bytes()))
    packed.unlink()

    modules = linux_guest.ordered_modules(root, linux_guest.MODULES)

    assert [name for name, _ in modules] == [
        *("virtio_ring", "virtio", "virtio_pci", "virtio_blk", "failover", "net_failover", "virtio_net"),
    ]
    assert dict(modules)["net_failover"] == module("failover")


def test_a_missing_module_is_named(system: Path) -> None:
    (system / "lib/modules" / RELEASE / "kernel/net/failover.ko").unlink()

    with pytest.raises(LinuxGuestError, match="failover"):
        linux_guest.ordered_modules(system / "lib/modules" / RELEASE, linux_guest.MODULES)


# -- where kernel and busybox come from ------------------------------------------------------------------------------


def test_the_newest_kernel_that_has_its_modules_is_taken(system: Path) -> None:
    """Ten is newer than nine; a kernel whose modules are gone is none."""
    shutil.copytree(system / "lib/modules" / RELEASE, system / "lib/modules/6.1.0-10-cloud-amd64")
    for release in ("6.1.0-10-cloud-amd64", "6.1.0-11-cloud-amd64", "6.1.0-12-amd64"):
        (system / f"boot/vmlinuz-{release}").touch()

    assert linux_guest.kernel_below(system) == system / "boot/vmlinuz-6.1.0-10-cloud-amd64"


def test_a_busybox_that_needs_libraries_is_not_taken(system: Path) -> None:
    assert linux_guest.busybox_below(system) == system / "bin/busybox"

    (system / "bin/busybox").write_bytes(program(6, 3, 1))

    assert linux_guest.busybox_below(system) is None


def test_without_files_and_apt_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(linux_guest, "SYSTEM", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))

    code = linux_guest.main(["--output", str(tmp_path / "output")])

    said = capsys.readouterr()
    assert (code, said.out, said.err.count("\n")) == (1, "", 1)
    assert "linux-image-cloud-amd64 and busybox-static" in said.err


# -- what is built, and when -----------------------------------------------------------------------------------------


def test_a_built_guest_is_whole_and_used_again(built: Path) -> None:
    entries = {entry.name: entry for entry in parsed(gzip.decompress((built / linux_guest.INITRD).read_bytes()))}

    assert (built / linux_guest.KERNEL).read_bytes() == b"kernel"
    assert entries["init"].content.decode() == linux_guest.INIT
    assert entries["bin/sh"] == Entry("bin/sh", stat.S_IFLNK | 0o777, b"busybox")
    assert "modules/00-virtio_ring.ko" in entries
    assert not any("e1000" in name for name in entries)
    assert sorted(path.name for path in built.iterdir()) == ["initrd.cpio.gz", "stamp.json", "vmlinuz"]
    again = linux_guest.build_guest(built)
    assert (again.reused, again.release, again.kernel) == (True, RELEASE, built / "vmlinuz")


@pytest.mark.parametrize("name", ["vmlinuz", "initrd.cpio.gz", "stamp.json"])
def test_a_damaged_or_missing_file_is_built_again(built: Path, name: str) -> None:
    whole = (built / name).read_bytes()

    (built / name).write_bytes(whole[:-1])
    assert not linux_guest.build_guest(built).reused
    (built / name).unlink()
    assert not linux_guest.build_guest(built).reused
    assert (built / name).read_bytes() == whole


def test_a_changed_kernel_is_built_again_and_one_that_is_gone_is_not(built: Path, system: Path) -> None:
    kernel = system / f"boot/vmlinuz-{RELEASE}"
    kernel.write_bytes(b"another kernel")
    assert not linux_guest.build_guest(built).reused

    kernel.unlink()

    assert linux_guest.build_guest(built).reused
    assert (built / "vmlinuz").read_bytes() == b"another kernel"


def test_a_guest_of_another_recipe_is_built_again(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux_guest, "_recipe", lambda: "another")

    assert not linux_guest.build_guest(built).reused


def test_a_cached_package_is_used_without_asking_apt(tmp_path: Path) -> None:
    for version in (9, 50):
        (tmp_path / f"linux-image-6.1.0-{version}-cloud-amd64_6.1_amd64.deb").touch()

    def package() -> str:
        raise AssertionError("asked")

    found = linux_guest.fetch_package("linux-image-*-cloud-amd64_*.deb", package, tmp_path)

    assert found.name == "linux-image-6.1.0-50-cloud-amd64_6.1_amd64.deb"


def test_a_download_that_fails_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """apt writes under the final name; a cut one would be taken for a package ever after."""
    programs = tmp_path / "bin"
    programs.mkdir()
    apt = programs / "apt-get"
    apt.write_text(
        "#!/bin/sh\n[ $1 = update ] || echo cut >busybox-static_1_amd64.deb\necho 'E: no route' >&2\nexit 100\n"
    )
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    cache = tmp_path / "cache"

    with pytest.raises(LinuxGuestError, match="no route"):
        linux_guest.fetch_package("busybox-static_*.deb", lambda: "busybox-static", cache)

    assert list(cache.iterdir()) == []
