"""What `make` says on a machine where something is missing: one line that names the apt command."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Stands in for an interpreter: `fails` is a part of the check that this one does not pass.
STAND_IN = """#!/bin/sh
case "$*" in
    *{fails}*) echo noise >&2; exit 1 ;;
    --version) echo Python 3.9.2 ;;
esac
"""


def run_venv(tmp_path: Path, python: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": python, "VENV": str(tmp_path / "venv")}
    return subprocess.run(
        [ROOT / "tools/venv", "base"], env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )


def stand_in(tmp_path: Path, fails: str) -> str:
    path = tmp_path / "python-stand-in"
    path.write_text(STAND_IN.format(fails=fails))
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("fails", "says"), [("version_info", "Python 3.9.2 is too old"), ("ensurepip", "cannot make virtual environments")]
)
def test_unfit_python_gets_one_line(tmp_path: Path, fails: str, says: str) -> None:
    result = run_venv(tmp_path, stand_in(tmp_path, fails))

    assert result.returncode != 0
    assert len(result.stderr.splitlines()) == 1
    assert says in result.stderr
    assert "python3-venv" in result.stderr
    assert "apt-get install" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_missing_python_gets_one_line(tmp_path: Path) -> None:
    result = run_venv(tmp_path, "python-that-is-not-there")

    assert result.returncode != 0
    assert result.stderr.splitlines() == [
        "vmmigrate: python-that-is-not-there is missing; "
        "'apt-get install python3 python3-venv', then the same command again"
    ]


def test_an_environment_grows_from_what_runs_to_what_tests(tmp_path: Path) -> None:
    """`make demo`, then `make test`: the second installs what the first did not need, once."""
    bin_directory = tmp_path / "venv" / "bin"
    bin_directory.mkdir(parents=True)
    (bin_directory / "pip").touch(mode=0o755)
    calls = tmp_path / "calls"
    python = bin_directory / "python"
    python.write_text(f'#!/bin/sh\necho "$*" >> {calls}\n')
    python.chmod(0o755)
    environment = {**os.environ, "VENV": str(tmp_path / "venv")}
    locks = []
    for want in ("base", "base", "dev", "dev", "base"):
        calls.write_text("")
        subprocess.run([ROOT / "tools/venv", want], env=environment, capture_output=True, check=True)
        locks.append([word for word in calls.read_text().split() if word.endswith(".lock")])

    assert locks == [["requirements.lock"], [], ["requirements-dev.lock"], [], []]
