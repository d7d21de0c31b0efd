"""What is written in C is built where there is a compiler, and missed nowhere: the package installs without one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.hypervisor.qemu_hosts import short_directory
from vmmigrate.hypervisor.qemu import tracker
from vmmigrate.hypervisor.qemu.adapter import QemuHypervisor

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("vmmigrate", "pyproject.toml", "README.md", "LICENSE")
SOURCES = {"vmmigrate/hypervisor/qemu/tracker.c", "vmmigrate/hypervisor/qemu/guests/stress.c", "vmmigrate/ram/native.c"}


def wheel_of(tmp_path: Path, compiler: str) -> set[str]:
    """Build the package from a copy of its sources; the names of what is in it."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in NEEDED:
        source, target = ROOT / name, copy / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, target)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    environment = {**os.environ, "CC": compiler, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run(command, cwd=copy, env=environment, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def libraries(names: set[str]) -> list[str]:
    return sorted(Path(name).name.partition(".")[0] for name in names if name.endswith(".so"))


@pytest.mark.slow
def test_the_package_installs_without_a_compiler(tmp_path: Path) -> None:
    names = wheel_of(tmp_path, "/bin/false")

    assert libraries(names) == []
    assert names >= SOURCES


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no C compiler")
def test_the_package_holds_its_sources_and_what_was_built_of_them(tmp_path: Path) -> None:
    names = wheel_of(tmp_path, "gcc")

    assert libraries(names) == ["_native", "_tracker"]
    assert names >= SOURCES


@pytest.mark.required
@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no C compiler")
def test_the_tracker_was_built_where_there_is_a_compiler() -> None:
    assert tracker.library() is not None


async def _capabilities(monkeypatch: pytest.MonkeyPatch) -> QemuHypervisor:
    monkeypatch.setattr(tracker, "library", lambda: None)
    directory = next(paths := short_directory())
    try:
        return await QemuHypervisor.open(directory)
    finally:
        next(paths, None)


@pytest.mark.required
@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed")
async def test_without_the_library_a_host_has_qemu_tell_what_guests_write_and_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hypervisor = await _capabilities(monkeypatch)

    assert hypervisor.capabilities.dirty_tracking == "stream"
    assert "no C compiler" in hypervisor.capabilities.dirty_tracking_reason
    assert "qemu.no_tracker" in capsys.readouterr().out
