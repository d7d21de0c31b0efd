"""The README's walk-through, run as it is written."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import ROOT, start_command
from vmmigrate.demo.daemons import end_leftover_guests

README = (ROOT / "README.md").read_text(encoding="utf-8")


def walk_through() -> list[str]:
    """The blocks of commands under the heading of the walk-through, on ports that are free now."""
    section = README.partition("## Two hosts, step by step\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    a, b = free_ports(2)
    for port, free in (("7441", f"{a}"), ("7451", f"{b}"), ("s/744/745/", f"s/{a}/{b}/")):
        blocks = [block.replace(port, free) for block in blocks]
    # The other ports are told to the peer, so that the kernel may choose them.
    return [re.sub(r'"127\.0\.0\.1:744[23]"', '"127.0.0.1:0"', block) for block in blocks]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short, because sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="walk-") as name:
        yield Path(name)


def test_walk_through_of_the_readme_works(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prelude = f'set -e\nvmmigrate() {{ "{sys.executable}" -m vmmigrate "$@"; }}\nexport VMM_TLS_DIR=alice\n'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = ""
    with contextlib.ExitStack() as stack:
        stack.callback(end_leftover_guests, directory)
        for block in walk_through():
            if block.startswith("vmmigrate daemon"):
                for line in block.splitlines():
                    stack.enter_context(daemon(line.split()[1:], directory))
                continue
            done = subprocess.run(
                ["bash", "-c", prelude + block],
                cwd=directory,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            said += done.stdout

    assert "moved web-1 to spiffe://site.example/host/host-b" in said
    assert "consistent" in said


@contextlib.contextmanager
def daemon(arguments: list[str], directory: Path) -> Iterator[None]:
    with start_command(*arguments, cwd=directory, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("ready: host ")
            yield
        finally:
            process.terminate()


def test_readme_links_to_files_that_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)

    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_every_setting_is_documented() -> None:
    from pydantic import BaseModel

    from vmmigrate.daemon.config import Config

    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    missing = []
    for section, field in Config.model_fields.items():
        model = field.annotation
        if not isinstance(model, type) or not issubclass(model, BaseModel):
            missing += [section] if f"`{section}`" not in text else []
            continue
        names = [f"{section}.{name}" for name in model.model_fields if name != "deadlines"]  # they have a table
        missing += [name for name in names if f"`{name}`" not in text and f"`[{name}]`" not in text]

    assert missing == []


def test_every_endpoint_is_documented() -> None:
    source = (ROOT / "vmmigrate" / "daemon" / "app.py").read_text(encoding="utf-8")
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    endpoints = re.findall(r'@app\.(get|post|delete)\("([^"]+)"', source)

    assert endpoints
    paths = [
        (method.upper(), path.replace("{instance_id}", "{id}").replace("{migration_id}", "{M}"))
        for method, path in endpoints
    ]
    assert [path for method, path in paths if f"`{method} {path}" not in text] == []
