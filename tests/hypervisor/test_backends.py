"""Host sides of disks: what was written is on stable storage before another host may have it, or the guest stays."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.embedded.backends import Backend, CrucibleBackend, FileBackend


def _disk(path: Path, kind: str) -> Backend:
    path.write_bytes(bytes(4096))
    if kind == "file":
        return FileBackend("disk", path, readonly=False)
    return CrucibleBackend("disk", "volume", 1, path, readonly=False)


@pytest.mark.parametrize("kind", ["file", "crucible"])
def test_a_flush_that_failed_once_fails_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The kernel tells of a lost write once; a second flush that succeeds, also after a reopening, says nothing."""

    def fails(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    disk = _disk(tmp_path / "disk", kind)
    disk.open()
    disk.write(0, b"x" * 512)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fails)
        with pytest.raises(HypervisorError) as failure:
            disk.flush()
    assert failure.value.code == "flush_failed"
    assert "Input/output error" in failure.value.text

    for _ in range(2):
        with pytest.raises(HypervisorError, match="did not take"):
            disk.flush()
        disk.close()
        disk.open()


@pytest.mark.parametrize("kind", ["file", "crucible"])
def test_only_what_was_written_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    flushed = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    disk = _disk(tmp_path / "disk", kind)
    disk.open()
    disk.flush()
    assert flushed == []

    disk.write(0, b"x" * 512)
    disk.flush()
    disk.flush()
    disk.close()
    disk.flush()

    assert len(flushed) == 1
