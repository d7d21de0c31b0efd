"""`vmmigrate migration adjust` with two real daemons: what a migration is told while it runs.

It is held back by a bandwidth at which it would take far longer than any deadline here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.cli.conftest import Commands, Done, Site
from tests.cli.hosts import RunningHost, running_host, write_spec
from tests.cli.schema import contract, misfits
from tests.cli.test_hosts import DEADLINE_S, Fleet
from vmmigrate.cli.exits import Exit

pytestmark = pytest.mark.slow

RECORD: Final = contract("migration-record", "record")
MIB: Final = 48
CALM: Final = json.dumps({"name": "stress", "working_set_mib": MIB, "rate_pages_per_s": 0})
NO_LONGER_HELD_BACK: Final = ("--bandwidth-mib-s", "0")


class Held:
    """A migration at a MiB per second."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        done = fleet.migrate(name, "--no-watch", "--bandwidth-mib-s", "1", "--downtime-ms", "5000")
        assert done.code == Exit.OK, done.out
        self.id = str(done.document["migration_id"])
        self._fleet = fleet

    def adjust(self, *options: str, at: RunningHost | None = None, as_json: bool = True) -> Done:
        return self._fleet("migration", "adjust", self.id, *options, at=at or self._fleet.a, as_json=as_json)

    @property
    def record(self) -> dict[str, Any]:
        return dict(self._fleet("migration", "show", self.id, at=self._fleet.a, as_json=True).document)

    def end(self) -> dict[str, Any]:
        """Call it off, if it still runs; its record."""
        self._fleet("migration", "cancel", self.id, at=self._fleet.a)
        return self.wait_outcome()

    def wait_outcome(self) -> dict[str, Any]:
        deadline = time.monotonic() + DEADLINE_S
        while (record := self.record)["outcome"] is None:
            assert time.monotonic() < deadline, record
        return record


@pytest.fixture(scope="module")
def hosts(site: Site) -> Iterator[tuple[RunningHost, RunningHost]]:
    with running_host(site, "adjust-a") as a, running_host(site, "adjust-b") as b:
        yield a, b


@pytest.fixture
def fleet(hosts: tuple[RunningHost, RunningHost], site: Site, run: Commands) -> Iterator[Fleet]:
    fleet = Fleet(*hosts, site, run)
    yield fleet
    for name in fleet.created:
        for host in hosts:
            fleet("vm", "delete", name, at=host)
    assert [host.guest_processes() for host in hosts] == [[], []]


@pytest.fixture
def held(fleet: Fleet, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Held]:
    name = request.node.name.removeprefix("test_")[:60]
    fleet.create(name, write_spec(tmp_path), "--ram-mib", "64", "--program", CALM)
    assert DEADLINE_S < MIB / 1
    deadline = time.monotonic() + DEADLINE_S
    while _program(fleet, name)["filled_pages"] < MIB * 256:
        assert time.monotonic() < deadline
    held = Held(fleet, name)
    yield held
    held.end()


def _program(fleet: Fleet, name: str) -> dict[str, Any]:
    return dict(fleet("vm", "show", name, at=fleet.a, as_json=True).document["guest"]["program"])


def test_a_limit_that_is_lifted_lets_the_migration_end(held: Held) -> None:
    done = held.adjust(*NO_LONGER_HELD_BACK)

    assert done.code == Exit.OK, done.out
    assert done.err == ""
    assert list(misfits(RECORD, done.document)) == []
    assert (done.document["migration_id"], done.document["outcome"]) == (held.id, None)
    assert done.document["options"]["bandwidth_mib_s"] == 0
    record = held.wait_outcome()
    assert record["outcome"] == "moved", record
    assert record["options"]["bandwidth_mib_s"] == 0


def test_every_limit_has_an_option_and_what_is_not_named_stays(held: Held) -> None:
    before = held.record["options"]
    timing = ("--downtime-ms", "700", "--timeout-s", "900", "--on-timeout", "force", "--max-rounds", "50")
    wanted = {"downtime_ms": 700, "timeout_s": 900.0, "on_timeout": "force", "max_rounds": 50}
    switches = {"auto_converge": True, "force": True, "bandwidth_mib_s": 2}

    timed = held.adjust(*timing)
    switched = held.adjust("--auto-converge", "--force", "--bandwidth-mib-s", "2")
    switched_back = held.adjust("--no-auto-converge", "--no-force")

    assert [done.code for done in (timed, switched, switched_back)] == [Exit.OK] * 3
    assert timed.document["options"] == {**before, **wanted}
    assert switched.document["options"] == {**before, **wanted, **switches}
    off = {"auto_converge": False, "force": False}
    assert switched_back.document["options"] == held.record["options"] == {**before, **wanted, **switches, **off}


def test_people_are_told_what_is_in_force(held: Held) -> None:
    done = held.adjust("--downtime-ms", "700", as_json=False)

    assert (done.code, done.err) == (Exit.OK, "")
    told = dict(line.split(maxsplit=1) for line in done.out.splitlines() if line.startswith("options."))
    assert told["options.downtime_ms"] == "700"
    assert told["options.bandwidth_mib_s"] == "1"


def test_what_makes_no_sense_is_wrong_usage_and_changes_nothing(held: Held) -> None:
    """Exit code 2, in one line that says what there is."""
    before = held.record["options"]

    nothing = held.adjust(as_json=False)
    wrong = [
        held.adjust("--max-rounds", "50", *more, as_json=False)
        for more in (
            ("--downtime-ms", "0"),
            ("--bandwidth-mib-s", "-1"),
            ("--timeout-s", "soon"),
            ("--on-timeout", "pray"),
            ("--streams", "4"),
        )
    ]

    assert nothing.code == Exit.USAGE
    assert "--downtime-ms, --timeout-s, --on-timeout, --max-rounds, --force, --auto-converge" in nothing.complaint
    assert [(done.code, done.out) for done in wrong] == [(Exit.USAGE, "")] * 5
    named = ("downtime", "bandwidth", "soon", "pray", "--streams")
    assert all(word in done.complaint for word, done in zip(named, wrong, strict=True))
    assert held.record["options"] == before
    assert held.record["outcome"] is None


def test_a_migration_is_adjusted_at_its_source_while_it_lasts(held: Held, fleet: Fleet) -> None:
    """Exit code 3 at the destination, for one that nobody knows, and for one that is over; nothing is changed."""
    before = held.record["options"]
    at_destination = held.adjust(*NO_LONGER_HELD_BACK, at=fleet.b, as_json=False)
    unknown = fleet("migration", "adjust", "no-such", *NO_LONGER_HELD_BACK, at=fleet.a, as_json=True)
    ended = held.end()
    over = held.adjust(*NO_LONGER_HELD_BACK)

    assert at_destination.code == Exit.REFUSED
    assert "adjusted at its source" in at_destination.complaint
    assert (unknown.code, unknown.document["error"]["code"]) == (Exit.REFUSED, "unknown_migration")
    assert (ended["outcome"], ended["options"]) == ("cancelled", before)
    assert (over.code, over.document["error"]["code"]) == (Exit.REFUSED, "migration_over")
