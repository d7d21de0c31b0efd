"""Benchmarks run, and say what their contract says. How fast anything is, no test asserts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_the_ram_bench_copies_with_every_contender_and_prints_the_contract() -> None:
    """It compares the memory of both processes after every copy, and fails when they differ."""
    command = [sys.executable, "bench/ram_throughput.py", "--json", "--mib", "8", "--rounds", "1"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)

    assert ran.returncode == 0, ran.stderr
    printed = json.loads(ran.stdout)
    assert set(printed) == {"name", "ratios", "runs"}
    assert printed["name"] == "ram_throughput"
    contenders = {run["contender"] for run in printed["runs"]}
    assert contenders == {"raw", "ssl", "seal-only", "tls-1", "sealed-1", "sealed-2", "sealed-4"}
    assert {(run["content"], run["cold"]) for run in printed["runs"]} == {
        ("incompressible", False),
        ("half-zero", False),
        ("incompressible", True),
    }
    assert all(run["seconds"] > 0 and run["source_cpu_s_per_gib"] > 0 for run in printed["runs"])
    assert all(ratio > 0 for ratio in printed["ratios"].values())
    assert "sealed-1 / raw, incompressible, populated" in printed["ratios"]
