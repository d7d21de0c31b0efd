"""Two real daemons, driven by the command line: what it prints, and what its exit codes promise."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Commands, Done, Site, start_command
from tests.cli.hosts import OTHER_VNIC, RESTLESS, RunningHost, running_host, write_spec
from tests.cli.schema import contract, misfits
from vmmigrate.cli.exits import Exit

DEADLINE_S = 30


class Fleet:
    """Two hosts, and commands that know their way."""

    def __init__(self, a: RunningHost, b: RunningHost, site: Site, run: Commands) -> None:
        self.a, self.b, self.site = a, b, site
        self._run = run
        self.created: list[str] = []

    def __call__(self, *arguments: str | Path, at: RunningHost | None = None, as_json: bool = False) -> Done:
        where = [] if at is None else ["--url", at.url]
        return self._run(*arguments, *where, "--tls-dir", self.site.operator, *(["-o", "json"] if as_json else []))

    def create(self, name: str, spec: Path, *more: str) -> None:
        done = self("vm", "create", spec, "--id", name, "--start", *more, at=self.a)
        assert done.code == 0, done.err
        self.created.append(name)

    def migrate(self, name: str, *more: str | Path, as_json: bool = True) -> Done:
        return self("migrate", name, "--from", self.a.url, "--to", self.b.url, *more, as_json=as_json)

    def state(self, name: str, host: RunningHost) -> str:
        done = self("vm", "show", name, at=host, as_json=True)
        return str(done.document["state"]) if done.code == 0 else "absent"

    def records(self, host: RunningHost) -> list[dict[str, Any]]:
        return list(self("migration", "list", at=host, as_json=True).document)


@pytest.fixture(scope="module")
def hosts(site: Site) -> Iterator[tuple[RunningHost, RunningHost]]:
    with running_host(site, "host-a") as a, running_host(site, "host-b") as b:
        yield a, b


@pytest.fixture
def fleet(hosts: tuple[RunningHost, RunningHost], site: Site, run: Commands) -> Iterator[Fleet]:
    fleet = Fleet(*hosts, site, run)
    yield fleet
    for name in fleet.created:
        for host in hosts:
            fleet("vm", "delete", name, at=host)
    assert [host.guest_processes() for host in hosts] == [[], []]


def test_daemon_says_in_one_line_where_it_serves(hosts: tuple[RunningHost, RunningHost]) -> None:
    ready = hosts[0].ready

    assert set(ready) == {"ready", "host", "api_url", "api_port", "migration", "bulk"}
    assert ready["host"] == "host-a"
    assert ready["api_url"] == f"https://127.0.0.1:{ready['api_port']}"


def test_instance_is_made_looked_at_typed_on_and_forgotten(fleet: Fleet, tmp_path: Path) -> None:
    fleet.create("life", write_spec(tmp_path), "--program", "echo", "--ram-mib", "8")

    assert "life" in fleet("vm", "list", at=fleet.a).out
    assert fleet("vm", "show", "life", at=fleet.a, as_json=True).document["ram_bytes"] == 8 << 20
    assert fleet("vm", "type", "life", "hello", "--enter", at=fleet.a).code == 0
    assert _eventually(lambda: fleet("vm", "console", "life", at=fleet.a).out == "hello\r")
    assert fleet("vm", "check", "life", at=fleet.a, as_json=True).document["consistent"]
    assert fleet("vm", "pause", "life", at=fleet.a, as_json=True).document["state"] == "paused"
    assert fleet("vm", "start", "life", at=fleet.a, as_json=True).document["state"] == "running"
    assert fleet("vm", "stop", "life", at=fleet.a, as_json=True).document["state"] == "stopped"
    assert fleet("vm", "delete", "life", at=fleet.a).code == 0
    assert fleet.state("life", fleet.a) == "absent"
    assert fleet.a.guest_processes() == []


def test_spec_comes_back_as_it_went_in(fleet: Fleet, tmp_path: Path) -> None:
    path = write_spec(tmp_path, nic=True)
    assert fleet("vm", "create", path, "--id", "spec", at=fleet.a).code == 0

    shown = fleet("vm", "spec", "spec", "--spec-version", "v1", at=fleet.a)

    assert shown.document == json.loads(path.read_text())
    fleet("vm", "delete", "spec", at=fleet.a)


# -- bad input -------------------------------------------------------------------------------------------------------


def test_unknown_instance_is_refused_in_one_line(fleet: Fleet) -> None:
    done = fleet("vm", "show", "nobody", at=fleet.a)

    assert done.code == Exit.REFUSED
    assert "no instance nobody on this host" in done.complaint


def test_unknown_instance_does_not_migrate(fleet: Fleet) -> None:
    done = fleet.migrate("nobody")

    assert done.code == Exit.REFUSED
    assert done.document["error"]["code"] == "unknown_instance"
    assert list(misfits(contract("migration-record", "failure"), done.document)) == []


def test_spec_with_an_unknown_component_is_refused_and_nothing_is_left(fleet: Fleet, tmp_path: Path) -> None:
    path = write_spec(tmp_path, tape={"type": "tape_drive", "component": {}})

    done = fleet("vm", "create", path, "--id", "tape", "--start", at=fleet.a)

    assert done.code == Exit.REFUSED
    assert "tape_drive" in done.complaint
    assert fleet.state("tape", fleet.a) == "absent"
    assert fleet.a.guest_processes() == []


@pytest.mark.parametrize("text", ["{", "{}, {}", '{"board": {}} , "start": true'])
def test_spec_file_must_be_one_json_document(fleet: Fleet, tmp_path: Path, text: str) -> None:
    """Also so that a file cannot add members of its own to the request."""
    path = tmp_path / "spec.json"
    path.write_text(text)

    done = fleet("vm", "create", path, "--id", "broken", at=fleet.a)

    assert done.code == Exit.REFUSED
    assert str(path) in done.complaint
    assert fleet.state("broken", fleet.a) == "absent"


@pytest.mark.parametrize(
    ("program", "told"), [("juggle", "juggle"), ('{"name": "stress", "speed": 3}', "speed"), ("{nonsense", "not JSON")]
)
def test_unknown_program_is_named(fleet: Fleet, tmp_path: Path, program: str, told: str) -> None:
    done = fleet("vm", "create", write_spec(tmp_path), "--program", program, "--start", at=fleet.a)

    assert done.code in {Exit.USAGE, Exit.REFUSED, Exit.FAILED}
    assert told in done.complaint
    assert fleet.a.guest_processes() == []


def test_daemon_that_is_not_there_is_named(fleet: Fleet) -> None:
    done = fleet("vm", "list", "--url", "https://127.0.0.1:1")

    assert done.code == Exit.FAILED
    assert "https://127.0.0.1:1" in done.complaint


def test_host_may_not_command_a_host(fleet: Fleet) -> None:
    files = ("--ca", "ca.pem", "--cert", "host-b.pem", "--key", "host-b-key.pem")
    arguments = [name if name.startswith("--") else fleet.b.directory / name for name in files]

    done = fleet("vm", "list", *arguments, at=fleet.a)

    assert done.code == Exit.REFUSED
    assert "host/host-b" in done.complaint


# -- migrate ---------------------------------------------------------------------------------------------------------


def test_migrate_moves_the_guest_and_prints_one_record(fleet: Fleet, tmp_path: Path) -> None:
    fleet.create("mover", write_spec(tmp_path, nic=True), "--program", json.dumps({"name": "stress"}))
    replacements = tmp_path / "replacements.json"
    replacements.write_text(json.dumps(OTHER_VNIC))

    done = fleet.migrate("mover", "--replace", replacements, "--verify", "full")

    assert done.code == Exit.OK, done.out
    record = done.document
    assert list(misfits(contract("migration-record", "record"), record)) == []
    assert record["outcome"] == "moved"
    assert record["digest"]["source"] == record["digest"]["destination"]
    assert abs(sum(record["downtime_parts_s"].values()) - record["downtime_s"]) < 0.001
    assert done.err == ""
    assert fleet.state("mover", fleet.b) == "running"
    assert fleet.state("mover", fleet.a) != "running"
    assert fleet.a.guest_processes() == []
    side = fleet("migration", "side", record["migration_id"], at=fleet.a, as_json=True).document
    assert side["outgoing"] is not None
    assert fleet("migration", "cancel", record["migration_id"], at=fleet.a).code == Exit.REFUSED


def test_migrate_says_to_people_what_became_of_the_guest(fleet: Fleet, tmp_path: Path) -> None:
    fleet.create("teller", write_spec(tmp_path))

    done = fleet.migrate("teller", as_json=False)

    assert done.code == Exit.OK
    assert done.out.startswith("moved teller to spiffe://site.example/host/host-b in ")
    assert "paused " in done.out
    assert done.err == ""


def test_what_is_not_in_doubt_cannot_be_resolved(fleet: Fleet, tmp_path: Path) -> None:
    fleet.create("settled", write_spec(tmp_path))
    migration = fleet.migrate("settled").document["migration_id"]
    resolve = ("migration", "resolve", migration, "--winner")

    by_source = fleet(*resolve, "source", "--fencing-proof", "none at all", at=fleet.a)
    by_destination = fleet(*resolve, "destination", "--from", fleet.a.url, at=fleet.b)
    too_late = fleet(*resolve, "destination", "--released", "1.1", at=fleet.b, as_json=True)

    assert (by_source.code, by_destination.code) == (Exit.REFUSED, Exit.REFUSED)
    assert "not in doubt" in by_source.complaint
    assert "not in doubt" in by_destination.complaint
    assert (too_late.code, too_late.document["verdict"]) == (Exit.OK, "started")


def test_migrate_that_does_not_watch_prints_the_id(fleet: Fleet, tmp_path: Path) -> None:
    fleet.create("unwatched", write_spec(tmp_path))

    done = fleet.migrate("unwatched", "--no-watch")

    assert done.code == Exit.OK
    migration_id = done.document["migration_id"]
    assert _eventually(
        lambda: fleet("migration", "show", migration_id, at=fleet.a, as_json=True).document["outcome"] == "moved"
    )


def test_backend_that_is_not_replaced_is_refused_and_the_guest_runs_on(fleet: Fleet, tmp_path: Path) -> None:
    fleet.create("refused", write_spec(tmp_path, nic=True))

    done = fleet.migrate("refused")

    assert done.code == Exit.REFUSED
    assert done.document["outcome"] == "refused"
    assert "net0-vnic" in done.document["error"]["message"]
    assert list(misfits(contract("migration-record", "record"), done.document)) == []
    assert fleet.state("refused", fleet.a) == "running"
    assert fleet.state("refused", fleet.b) == "absent"


def test_malformed_replacements_are_refused_and_the_ticket_is_given_back(fleet: Fleet, tmp_path: Path) -> None:
    fleet.create("ticket", write_spec(tmp_path))
    replacements = tmp_path / "replacements.json"
    replacements.write_text("{nonsense")

    done = fleet.migrate("ticket", "--replace", replacements, as_json=False)

    assert done.code == Exit.REFUSED
    assert fleet.records(fleet.a)[-1]["outcome"] == "cancelled"
    assert fleet.state("ticket", fleet.a) == "running"
    assert fleet.migrate("ticket").code == Exit.OK


def test_guest_that_does_not_converge_fails_and_runs_on(fleet: Fleet, tmp_path: Path) -> None:
    fleet.create("restless-1", write_spec(tmp_path), "--program", json.dumps(RESTLESS))

    done = fleet.migrate("restless-1", "--downtime-ms", "1", "--max-rounds", "1", as_json=False)

    assert done.code == Exit.FAILED
    assert "will_not_converge" in done.complaint
    assert "at the source as before" in done.complaint
    assert fleet.state("restless-1", fleet.a) == "running"


def test_migration_that_takes_too_long_times_out(fleet: Fleet, tmp_path: Path) -> None:
    fleet.create("restless-2", write_spec(tmp_path), "--program", json.dumps(RESTLESS))

    done = fleet.migrate("restless-2", "--downtime-ms", "1", "--max-rounds", "1000", "--timeout-s", "0.05")

    assert done.code == Exit.TIMED_OUT
    assert done.document["outcome"] == "timed_out"
    assert fleet.state("restless-2", fleet.a) == "running"


def test_ctrl_c_cancels_and_waits_until_it_is_undone(fleet: Fleet, tmp_path: Path) -> None:
    name = "restless-3"
    fleet.create(name, write_spec(tmp_path), "--program", json.dumps(RESTLESS))
    arguments = ("migrate", name, "--from", fleet.a.url, "--to", fleet.b.url, "--tls-dir", fleet.site.operator)
    options = ("--downtime-ms", "1", "--max-rounds", "1000", "-o", "json")

    with start_command(*arguments, *options) as process:
        assert _eventually(lambda: any(_is_copying(record, name) for record in fleet.records(fleet.a)))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE_S)

    assert process.returncode == Exit.CANCELLED, (out, err)
    assert json.loads(out)["outcome"] == "cancelled"
    assert err == ""
    assert fleet.state(name, fleet.a) == "running"
    assert fleet.state(name, fleet.b) == "absent"


def test_destination_that_is_not_there_leaves_nothing_under_way(fleet: Fleet, tmp_path: Path) -> None:
    fleet.create("lonely", write_spec(tmp_path))

    arguments = ("migrate", "lonely", "--from", fleet.a.url, "--to", "https://127.0.0.1:1")
    done = fleet(*arguments)

    assert done.code == Exit.FAILED
    assert "https://127.0.0.1:1" in done.complaint
    assert fleet.state("lonely", fleet.a) == "running"


@pytest.mark.slow
def test_source_that_dies_leaves_the_outcome_unknown(
    site: Site, run: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unreachable is no evidence: nobody else may say that the guest is still there."""
    monkeypatch.setattr("vmmigrate.cli.moving.PATIENCE_S", 0.5)
    with running_host(site, "host-c") as source, running_host(site, "host-d") as destination:
        fleet = Fleet(source, destination, site, run)
        fleet.create("orphan", write_spec(tmp_path), "--program", json.dumps(RESTLESS))
        killer = threading.Thread(target=_kill_when_it_copies, args=(source, destination))
        killer.start()

        done = fleet.migrate("orphan", "--downtime-ms", "1", "--max-rounds", "1000")

        killer.join()
    assert done.code == Exit.UNKNOWN
    assert done.document["error"]["code"] == "source_unreachable"


def _kill_when_it_copies(source: RunningHost, destination: RunningHost) -> None:
    """By the destination's files, because a second command of ours could not run in this process at the same time."""
    assert _eventually(lambda: bool(destination.guest_processes()))
    source.process.kill()
    source.process.wait()


def _is_copying(record: dict[str, Any], instance_id: str) -> bool:
    return record["instance_id"] == instance_id and len(record["ram"]["rounds"]) >= 2


def _eventually(holds: Any) -> bool:
    """Each look takes a whole request, so this is no busy loop."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if holds():
            return True
    return False
