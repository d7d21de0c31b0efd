"""What every demo must leave as it was: the directory that it works in, and the processes of this machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog


@pytest.fixture
def own_tmp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the demo makes its directory: ours alone, to see what is left; not `tmp_path`, whose paths are too long
    for sockets.
    """
    with tempfile.TemporaryDirectory(prefix="demo-") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        yield Path(directory)


def leftovers(directory: Path) -> list[str]:
    """Files under *directory*, and processes that name it, map a file in it, or write to one."""
    found = [str(path) for path in directory.rglob("*")]
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                opened = b" ".join(os.fsencode(os.readlink(link)) for link in (entry / "fd").iterdir())
                seen = (entry / "cmdline").read_bytes() + (entry / "maps").read_bytes() + opened
            except OSError:
                continue
            found += [f"process {entry.name}"] if os.fsencode(directory) in seen else []
    return found


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A command that was run in this process has set them for all of it."""
    yield
    structlog.reset_defaults()
