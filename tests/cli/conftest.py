"""A site made by the command line itself: CA, two hosts, an operator; and a way to run commands and look at them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog

from vmmigrate.cli.main import main

ROOT = Path(__file__).parents[2]
CONFIG = """
[listen]
api = "127.0.0.1:0"
migration = "127.0.0.1:0"
bulk = "127.0.0.1:0"
[tls]
ca = "ca.pem"
certificate = "{name}.pem"
key = "{name}-key.pem"
[directories]
state = "state"
runtime = "run"
[allow]
interfaces = ["vnic*"]
"""


@dataclass(frozen=True)
class Done:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)

    @property
    def complaint(self) -> str:
        """The one line on stderr."""
        (line,) = self.err.splitlines()
        assert line.startswith("vmmigrate: ")
        return line.removeprefix("vmmigrate: ")


class Commands:
    """Runs `vmmigrate` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> Done:
        self._capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = self._capsys.readouterr()
        return Done(code, captured.out, captured.err)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Commands]:
    for name in ("VMM_TLS_DIR", "VMM_URL"):
        monkeypatch.delenv(name, raising=False)
    yield Commands(capsys)
    structlog.reset_defaults()


def start_command(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """A real `vmmigrate` process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vmmigrate", *map(str, arguments)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **{**pipes, **options})


def run_command(*arguments: str | Path) -> Done:
    with start_command(*arguments) as process:
        out, err = process.communicate(timeout=60)
    return Done(process.returncode, out, err)


class Site:
    """Directories with certificates: `ca`, one for each host, `operator`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.operator = root / "operator"
        assert main(["pki", "init", str(root / "ca"), "--trust-domain", "site.example"]) == 0
        assert main(["pki", "issue", str(root / "ca"), "--operator", "alice", "--out", str(self.operator)]) == 0

    def host(self, name: str, config: str = CONFIG) -> Path:
        """A new host's configuration file, its certificates beside it."""
        directory = self.root / name
        assert main(["pki", "issue", str(self.root / "ca"), "--host", name, "--out", str(directory)]) == 0
        path = directory / "host.toml"
        path.write_text(config.format(name=name), encoding="utf-8")
        return path


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"))
