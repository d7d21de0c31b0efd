"""The command line starts quickly, because it imports what a command needs only when that command runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("trio", "pydantic", "fastapi", "numpy", "cryptography")

PROGRAM = """
import contextlib, io, json, sys
from vmmigrate.cli.main import main
out = io.StringIO()
with contextlib.redirect_stdout(out):
    try:
        code = main(["--help"])
    except SystemExit as stop:
        code = stop.code or 0
print(json.dumps({"code": code, "help": out.getvalue(), "modules": sorted(sys.modules)}))
"""


def test_help_imports_nothing_heavy() -> None:
    """`vmmigrate --help` in at most 0.3 s: modules are counted, as seconds would tell of the machine."""
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["code"] == 0
    assert "migrate" in answer["help"]
    assert [module for module in HEAVY if module in answer["modules"]] == []


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_installed_command_answers(option: str) -> None:
    command = Path(sys.executable).with_name("vmmigrate")

    result = subprocess.run([command, option], capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr
    assert result.stdout
    assert result.stderr == ""
