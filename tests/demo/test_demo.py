"""The demo as a user runs it: a process, real daemons, a real migration, and nothing left of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import start_command
from tests.cli.schema import contract, misfits
from vmmigrate.demo import daemons, guest
from vmmigrate.spec import amend, build, creatable, document

MIB = 48


@pytest.fixture
def own_tmp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the demo makes its directory: ours alone, to see what is left; not `tmp_path`, whose paths are too long
    for sockets.
    """
    with tempfile.TemporaryDirectory(prefix="demo-") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        yield Path(directory)


def leftovers(directory: Path) -> list[str]:
    """Files under *directory*, and processes that name it or map a file in it."""
    found = [str(path) for path in directory.rglob("*")]
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                seen = (entry / "cmdline").read_bytes() + (entry / "maps").read_bytes()
            except OSError:
                continue
            found += [f"process {entry.name}"] if os.fsencode(directory) in seen else []
    return found


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
    assert len(record["ram"]["rounds"]) >= 3
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


def test_demo_for_people_ends_with_a_summary(own_tmp: Path) -> None:
    with start_command("demo", "--mib", "16", stderr=subprocess.STDOUT) as process:
        out, _ = process.communicate(timeout=120)

    assert process.returncode == 0, out
    for word in ("  phase ", "round 1:", "dirty", "outcome     moved", "pause", "negotiated", "consistent"):
        assert word in out
    assert leftovers(own_tmp) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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
        assert process.stdout is not None
        process.stdout.readline()

        ended = daemons.end_leftover_guests(tmp_path)

        assert ended == [process.pid]
        assert process.wait(timeout=10) == -signal.SIGKILL


def start_sleeper(program: str, witness: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", program, str(witness)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def test_spec_of_the_demo_is_one_that_a_host_creates_and_a_destination_amends() -> None:
    spec = document.parse("v3", json.dumps(guest.spec(256)))

    after = amend.amend(spec, amend.parse_replacements(guest.replacements()))

    for either in (spec, after):
        creatable.check_creatable(build.build(either, frozenset()))
    assert after != spec
