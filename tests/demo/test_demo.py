"""The demo as a user runs it: a process, real daemons, a real migration, and nothing left of it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import start_command
from tests.cli.schema import contract, misfits
from tests.demo.conftest import leftovers
from vmmigrate.demo import daemons, guest
from vmmigrate.spec import amend, build, creatable, document

MIB = 48


def test_demo_moves_a_guest_and_proves_it(own_tmp: Path) -> None:
    with start_command("demo", "--mib", str(MIB), "-o", "json") as process:
        out, err = process.communicate(timeout=120)

    assert process.returncode == 0, err
    assert err == ""
    record = json.loads(out)
    assert list(misfits(contract("migration-record", "demo"), record)) == []
    assert record["outcome"] == "moved"
    assert record["ram"]["total_bytes"] == MIB << 20
    assert record["ram"]["hole_bytes"] > 0
    assert len(record["ram"]["rounds"]) >= 2  # one at least while it ran, and that of the pause
    assert abs(sum(record["downtime_parts_s"].values()) - record["downtime_s"]) < 0.001
    assert record["digest"]["source"] == record["digest"]["destination"] != ""
    assert record["negotiated"]["spec_version"] == "v3"
    assert record["negotiated"]["transport"] == "sealed"
    assert sorted(record["negotiated"]["amended"]) == ["boot-volume", "net0-vnic"]
    assert record["guest"]["consistent"]
    assert record["guest"]["single_owner"]
    assert record["guest"]["ran_on"] == ["source", "destination"]
    assert 0 < record["guest"]["heartbeat_gap_ms"] < record["total_s"] * 1000
    assert leftovers(own_tmp) == []


@pytest.mark.slow
def test_demo_for_people_ends_with_a_summary(own_tmp: Path) -> None:
    with start_command("demo", "--mib", "16", stderr=subprocess.STDOUT) as process:
        out, _ = process.communicate(timeout=120)

    assert process.returncode == 0, out
    for word in ("  phase ", "round 1:", "dirty", "outcome     moved", "pause", "negotiated", "consistent"):
        assert word in out
    assert leftovers(own_tmp) == []


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_interrupted_demo_removes_everything(own_tmp: Path, number: signal.Signals) -> None:
    """In the middle: the guest runs, the migration has begun."""
    with start_command("demo", "--mib", "64") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "migrating" in line:
                break
        process.send_signal(number)
        _, err = process.communicate(timeout=60)

    assert process.returncode == 5
    assert err == "vmmigrate: interrupted; everything that was started is ended and removed\n"
    assert leftovers(own_tmp) == []


def test_demo_that_cannot_start_its_daemons_says_why(own_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets have short paths; a temporary directory that is too deep is found by the daemon."""
    deep = own_tmp / ("d" * 100)
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))

    with start_command("demo", "--mib", "16", "-o", "json") as process:
        out, err = process.communicate(timeout=60)

    assert process.returncode == 4
    assert "the source daemon did not start" in json.loads(out)["error"]["message"]
    assert err == ""
    assert leftovers(deep) == []


def test_leftover_guest_is_found_by_the_file_it_maps(tmp_path: Path) -> None:
    """The last resort, tried on a process that maps a file as a guest does its witness."""
    witness = tmp_path / "x.witness"
    witness.write_bytes(bytes(4096))
    program = (
        "import mmap, sys; file = open(sys.argv[1], 'r+b'); mapped = mmap.mmap(file.fileno(), 4096);"
        " print('on', flush=True); sys.stdin.read()"
    )
    with start_sleeper(program, witness) as process:
        ended = daemons.end_leftover_guests(tmp_path)

        assert ended == [process.pid]
        assert process.wait(timeout=10) == -signal.SIGKILL


def test_leftover_qemu_is_found_by_the_pid_file_it_names(tmp_path: Path) -> None:
    """Its RAM has no name. A pid file elsewhere is that of somebody else's."""
    program = "import sys; print('on', flush=True); sys.stdin.read()"
    elsewhere = Path(f"{tmp_path}-elsewhere/pid")
    with (
        start_sleeper(program, "-pidfile", tmp_path / "run/pid") as process,
        start_sleeper(program, "-pidfile", elsewhere) as other,
    ):
        ended = daemons.end_leftover_guests(tmp_path)

        assert ended == [process.pid]
        assert process.wait(timeout=10) == -signal.SIGKILL
        assert other.poll() is None


def start_sleeper(program: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
    """A process that runs *program*, which has said that it is there."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_spec_of_the_demo_is_one_that_a_host_creates_and_a_destination_amends() -> None:
    spec = document.parse("v3", json.dumps(guest.spec(256)))

    after = amend.amend(spec, amend.parse_replacements(guest.replacements()))

    for either in (spec, after):
        creatable.check_creatable(build.build(either, frozenset()))
    assert after != spec
