"""Disks that are small, full or read-only: tmpfs, mounted for one test, and block devices upon it. Needs root."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


class SmallDisk:
    """A mounted tmpfs, whose space a test can take and give back."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._ballast = root / "ballast"

    def fill(self, leave_bytes: int = 0) -> None:
        """Take all space but *leave_bytes*."""
        with open(self._ballast, "ab", buffering=0) as ballast:
            with contextlib.suppress(OSError):
                while ballast.write(bytes(4096)):
                    pass
            ballast.truncate(max(0, ballast.tell() - leave_bytes))

    def free(self) -> None:
        self._ballast.unlink()

    def remount(self, option: str) -> None:
        _run("mount", "-o", f"remount,{option}", str(self.root))

    @contextlib.contextmanager
    def block_device(self, size_bytes: int) -> Iterator[Path]:
        """A block device with nothing allocated behind it: when this is full, it takes writes and fails their flush."""
        image = self.root / "image"
        with open(image, "wb") as file:
            file.truncate(size_bytes)
        try:
            device = _run("losetup", "--find", "--show", str(image)).strip()
        except (OSError, subprocess.CalledProcessError) as exc:
            pytest.skip(f"needs root and loop devices, which a container may withhold: {exc}")
        try:
            yield Path(device)
        finally:
            _run("losetup", "--detach", device)


@contextlib.contextmanager
def small_disk(root: Path, kib: int) -> Iterator[SmallDisk]:
    """A file system of *kib* KiB at *root*. Skips where that may not be mounted."""
    root.mkdir(parents=True, exist_ok=True)
    try:
        _run("mount", "-t", "tmpfs", "-o", f"size={kib}k,mode=0700", "vmmigrate-test", str(root))
    except (OSError, subprocess.CalledProcessError) as exc:
        pytest.skip(f"needs root and mount(2), which a container may withhold: {exc}")
    try:
        yield SmallDisk(root)
    finally:
        _run("umount", "--lazy", str(root))


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
