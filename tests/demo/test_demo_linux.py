"""A Linux guest in QEMU moves there and back; and how its console is read and judged."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.demo.conftest import leftovers
from tools import demo_linux
from tools.demo_linux import BUILT, Leg, read_console
from tools.linux_guest import LinuxGuestError, build_guest
from vmmigrate.demo.heartbeat import Output, Rhythm, Sighting, joined
from vmmigrate.demo.qemu_guest import check_qemu
from vmmigrate.demo.telling import make_teller
from vmmigrate.errors import HypervisorError

ROOT = Path(__file__).parents[2]
MIB, WORKING_SET_MIB = 256, 32


@pytest.fixture
def linux() -> None:
    """Skips where QEMU or its tracker is missing, or a kernel that can neither be found nor fetched."""
    try:
        check_qemu()
        build_guest(BUILT)
    except (HypervisorError, LinuxGuestError) as exc:
        pytest.skip(str(exc))


@pytest.mark.slow
@pytest.mark.required
@pytest.mark.usefixtures("linux")
def test_linux_moves_there_and_back_and_notices_nothing_but_the_pause(own_tmp: Path) -> None:
    command = [sys.executable, "-m", "tools.demo_linux", "--json", "--mib", str(MIB)]

    done = subprocess.run(
        [*command, "--working-set-mib", str(WORKING_SET_MIB)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        cwd=ROOT,
    )

    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    outcome = json.loads(done.stdout)
    assert outcome["ok"]
    assert outcome["problems"] == []
    assert outcome["ran_on"] == ["source", "destination", "source"]
    assert [(move["from"], move["to"]) for move in outcome["moves"]] == [
        ("source", "destination"),
        ("destination", "source"),
    ]
    for move in outcome["moves"]:
        assert move["record"]["outcome"] == "moved"
        assert move["check"] == "CHECK ok"
        assert move["heartbeat_gap_ms"] > 0
        for work in ("disk", "ping"):
            assert move["after"][f"{work}_ok"] > move["before"][f"{work}_ok"] > 0
    assert all(outcome["counters"][f"{work}_fail"] == 0 for work in demo_linux.WORK)
    assert outcome["heartbeats"] > 500
    assert leftovers(own_tmp) == []


def test_without_qemu_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    code = demo_linux.main(["--json"])

    error = json.loads(capsys.readouterr().out)["error"]
    assert (code, error["code"]) == (4, "qemu_missing")
    assert "apt-get install qemu-system-x86" in error["message"]


def test_root_installs_qemu_and_hears_when_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apt = tmp_path / "apt-get"
    apt.write_text('#!/bin/sh\necho "E: $*" >&2\nexit 100\n')
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    said: list[str] = []

    with pytest.raises(HypervisorError, match="E: install -y --no-install-recommends qemu-system-x86"):
        demo_linux.install_qemu(replace(make_teller(True), say=said.append))

    assert said == ["installing qemu-system-x86"]


@pytest.mark.parametrize("arguments", [["--mib", "64"], ["--mib", "256", "--working-set-mib", "200"]])
def test_a_guest_that_could_not_boot_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        demo_linux.parse(arguments)


# -- reading ---------------------------------------------------------------------------------------------------------

CONSOLE = b"early words\nREADY\nHB 1\nSTATUS hb=1 disk_ok=2 disk_fail=0\nHB 2\nCHECK ok\nHB 3\nHB 4"


def test_console_tells_beats_counters_and_answers_and_leaves_half_a_line_for_later() -> None:
    said = read_console(CONSOLE)

    assert said.is_ready
    assert [CONSOLE[: beat + 1].split(b"\n")[-2] for beat in said.beats] == [b"HB 1", b"HB 2", b"HB 3"]
    assert said.status == {"hb": 1, "disk_ok": 2, "disk_fail": 0}
    assert said.checks == ["CHECK ok"]
    assert said.problems == []
    assert len(read_console(CONSOLE + b"\n").beats) == 4


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (b"\nHB 6\n", "heartbeat 6 came where 5 should have"),
        (b"\nHB 4\n", "heartbeat 4 came where 5 should have"),
        (b"\nHB\n", "the guest said 'HB'"),
        (b"\nKernel panic\n", "the guest said 'Kernel panic'"),
        (b"\nREADY\n", "the guest said 'READY'"),
        (b"\nFAULT no disk\n", "FAULT no disk"),
    ],
)
def test_what_no_healthy_guest_says_is_a_problem(more: bytes, problem: str) -> None:
    assert read_console(CONSOLE + more).problems == [problem]


def test_a_fault_is_heard_before_ready() -> None:
    assert read_console(b"FAULT insmod x\n").problems == ["FAULT insmod x"]


# -- judging ---------------------------------------------------------------------------------------------------------


def counters(ok: int, **fail: int) -> dict[str, int]:
    return {
        f"{work}_{how}": ok if how == "ok" else fail.get(work, 0) for work in demo_linux.WORK for how in ("ok", "fail")
    }


def leg(**fields: Any) -> Leg:
    whole = {"record": {"outcome": "moved"}, "before": counters(1), "after": counters(2), "check": "CHECK ok"}
    return Leg("a", "b", **{**whole, **fields})


@pytest.mark.parametrize(
    ("fields", "problems"),
    [
        ({}, []),
        ({"check": "CHECK bad memory"}, ["a to b: CHECK bad memory"]),
        ({"after": counters(1)}, ["a to b: disk stands still", "a to b: ping stands still"]),
        ({"after": counters(2, ping=1, sum=1)}, ["a to b: ping failed", "a to b: sum failed"]),
        ({"record": {"outcome": "refused", "error": {"message": "no room"}}}, ["a to b: refused: no room"]),
    ],
)
def test_each_fault_around_a_move_is_told(fields: dict[str, Any], problems: list[str]) -> None:
    assert list(leg(**fields).problems()) == problems


def test_a_guest_that_did_not_run_where_it_should_is_not_whole() -> None:
    story = joined([Output("source", (Sighting(1, len(CONSOLE)),), CONSOLE)])
    said = read_console(story.text)
    said.status = counters(2)

    there, back = (Rhythm(1, 1, 1, (), hosts) for hosts in (("source", "destination"), demo_linux.ROUTE))
    legs = [replace(leg(), origin=origin, target=target) for origin, target in itertools.pairwise(demo_linux.ROUTE)]

    assert demo_linux.judged(legs, story, said, there) == ["it ran on source, destination"]
    assert demo_linux.judged(legs, story, said, back) == []
    assert demo_linux.judged(legs[:1], story, said, there) == []
    said.status = counters(1)
    assert demo_linux.judged(legs, story, said, back) == ["sum stands still"]
