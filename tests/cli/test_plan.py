"""`vmmigrate plan` with two real daemons: what it prints, what its exit codes promise, and that nothing moves."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.cli.conftest import Commands, Done, Site, start_command
from tests.cli.hosts import RunningHost, running_host, write_spec
from tests.cli.schema import contract, misfits
from tests.cli.test_hosts import DEADLINE_S, Fleet
from vmmigrate.cli.exits import Exit

pytestmark = pytest.mark.slow

DOCUMENT: Final = contract("plan", "document")
CALM: Final = json.dumps({"name": "stress", "working_set_mib": 2, "rate_pages_per_s": 500})
RESTLESS: Final = json.dumps({"name": "stress", "working_set_mib": 4, "rate_pages_per_s": 4000})
AMPLE: Final = ("--downtime-ms", "5000")  # on a busy machine, too
# All that the guest writes takes more than half a second, in which it writes all of it again.
HOPELESS: Final = ("--bandwidth-mib-s", "6", "--downtime-ms", "500")
NOT_ALLOWED: Final = {"net0-vnic": {"component": "VirtioNetworkBackend", "spec": {"vnic_name": "tap0"}}}


@pytest.fixture(scope="module")
def hosts(site: Site) -> Iterator[tuple[RunningHost, RunningHost]]:
    with running_host(site, "plan-a") as a, running_host(site, "plan-b") as b:
        yield a, b


@pytest.fixture
def fleet(hosts: tuple[RunningHost, RunningHost], site: Site, run: Commands) -> Iterator[Fleet]:
    fleet = Fleet(*hosts, site, run)
    yield fleet
    for name in fleet.created:
        fleet("vm", "delete", name, at=fleet.a)
    assert [host.guest_processes() for host in hosts] == [[], []]


def _plan(fleet: Fleet, name: str, *more: str | Path, as_json: bool = False) -> Done:
    return fleet("plan", name, "--from", fleet.a.url, "--to", fleet.b.url, *more, as_json=as_json)


def _stayed(fleet: Fleet, name: str) -> bool:
    return (fleet.state(name, fleet.a), fleet.state(name, fleet.b)) == ("running", "absent")


def test_plan_says_to_people_what_a_migration_would_be_like(fleet: Fleet, tmp_path: Path) -> None:
    fleet.create("plain", write_spec(tmp_path), "--program", CALM)

    done = _plan(fleet, "plain", *AMPLE)

    assert done.code == Exit.OK, done.err
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "converges:",
        "pause",
        "guest",
        "pages",
        "link",
        "confidence",
        "nothing",
    ]
    assert lines[1].endswith("; allowed are 5000")
    assert lines[-1] == "nothing was moved"
    assert done.err == ""
    assert _stayed(fleet, "plain")


def test_plan_prints_one_document_for_programs(fleet: Fleet, tmp_path: Path) -> None:
    """The migration that it names is known to both hosts as one that was called off."""
    fleet.create("document", write_spec(tmp_path), "--program", CALM)

    done = _plan(fleet, "document", *AMPLE, as_json=True)

    assert done.code == Exit.OK, done.out
    document = done.document
    assert list(misfits(DOCUMENT, document)) == []
    assert document["instance_id"] == "document"
    assert document["error"] is None
    assert document["plan"]["converges"]
    assert done.err == ""
    shown = [
        fleet("migration", "show", document["migration_id"], at=host, as_json=True).document
        for host in (fleet.a, fleet.b)
    ]
    assert [record["outcome"] for record in shown] == ["cancelled", "cancelled"]
    assert shown[0]["plan"] == document["plan"]
    assert _stayed(fleet, "document")


def test_plan_says_that_it_will_not_converge_and_with_which_options_it_would_end(fleet: Fleet, tmp_path: Path) -> None:
    """That is a plan, too: exit code 0."""
    fleet.create("hopeless", write_spec(tmp_path), "--program", RESTLESS)

    done = _plan(fleet, "hopeless", *HOPELESS)

    assert done.code == Exit.OK, done.err
    lines = done.out.splitlines()
    assert lines[0].startswith("will not converge: ")
    remedies = [line.removeprefix("would end  with ") for line in lines if line.startswith("would end")]
    assert [remedy.split()[0].rstrip(":") for remedy in remedies] == ["--auto-converge", "--downtime-ms", "--force"]
    assert all(" s, pause " in remedy for remedy in remedies)
    assert lines[-1] == "nothing was moved"
    assert _stayed(fleet, "hopeless")


def test_plan_without_a_word_about_backends_does_not_look_at_them(fleet: Fleet, tmp_path: Path) -> None:
    """`migrate` with the same words is refused: it has to know what the guest shall use."""
    fleet.create("backends", write_spec(tmp_path, nic=True), "--program", CALM)

    planned, refused = _plan(fleet, "backends", *AMPLE, as_json=True), fleet.migrate("backends", *AMPLE)

    assert (planned.code, refused.code) == (Exit.OK, Exit.REFUSED)
    assert planned.document["plan"]["converges"]


def test_plan_is_refused_for_what_migrate_would_be_refused_for(fleet: Fleet, tmp_path: Path) -> None:
    """Exit code 3 and the same reason, whether the destination finds it or the source."""
    fleet.create("refused", write_spec(tmp_path, nic=True), "--program", CALM)
    replacements = tmp_path / "replacements.json"
    replacements.write_text(json.dumps(NOT_ALLOWED))

    for name, more in (("refused", ("--replace", replacements)), ("nobody", ())):
        planned, migrated = _plan(fleet, name, *more, as_json=True), fleet.migrate(name, *more)

        assert (planned.code, migrated.code) == (Exit.REFUSED, Exit.REFUSED)
        assert planned.document["error"]["code"] == migrated.document["error"]["code"]
        if "plan" in planned.document:
            assert list(misfits(DOCUMENT, planned.document)) == []
            assert planned.document["plan"] is None
    told = _plan(fleet, "refused", "--replace", replacements)
    assert (told.code, told.out) == (Exit.REFUSED, "")
    assert "nothing was planned, and nothing moved" in told.complaint
    assert _stayed(fleet, "refused")


def test_ctrl_c_calls_a_plan_off(fleet: Fleet, tmp_path: Path) -> None:
    fleet.create("impatient", write_spec(tmp_path), "--program", CALM)
    arguments = ("plan", "impatient", "--from", fleet.a.url, "--to", fleet.b.url, "--tls-dir", fleet.site.operator)

    with start_command(*arguments, "-o", "json") as process:
        while not any(_is_measured(record) for record in fleet.records(fleet.a)):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE_S)

    assert process.returncode == Exit.CANCELLED, (out, err)
    assert list(misfits(DOCUMENT, json.loads(out))) == []
    assert json.loads(out)["plan"] is None
    assert json.loads(out)["error"]["code"] == "cancelled"
    assert _stayed(fleet, "impatient")


def _is_measured(record: dict[str, Any]) -> bool:
    under_way = record["instance_id"] == "impatient" and record["outcome"] is None
    return under_way and record["ram"]["sent_bytes"] > 0
