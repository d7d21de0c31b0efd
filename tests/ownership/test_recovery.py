"""What a restarted daemon does: by what its journal says, and by the guests it finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from vmmigrate.ownership import records as r
from vmmigrate.ownership import rules
from vmmigrate.ownership.records import NO_EPOCH, Epoch
from vmmigrate.ownership.recovery import RecoveryStep, SeenGuest, Step, Stray, is_half_built, is_older_copy, plan
from vmmigrate.ownership.state import Holding

from .world import VM, Host, boot, hand_over, present, reach_ready, release, spawned, ticket

N = Epoch(1, 1)
PAUSED, RUNNING = "paused", "running"
SEEN = pytest.mark.parametrize("seen", [None, PAUSED, RUNNING])


def steps(host: Host, seen: str | None, epoch: Epoch | None = None, last_record: int | None = None) -> list[Step]:
    return [step.step for step in plan_of(host, seen, epoch, last_record)]


def plan_of(
    host: Host, seen: str | None, epoch: Epoch | None = None, last_record: int | None = None
) -> tuple[RecoveryStep, ...]:
    """The plan of *host* after a restart that found its guest *seen*, stamped with the newest epoch known here."""
    host.crash()
    newest = len(host.records)
    known = host.state.instances.get(VM)
    stamp = epoch or (known.epoch if known else N)
    guest = SeenGuest(seen == RUNNING, stamp, newest if last_record is None else last_record)
    return plan(host.state, {VM: guest} if seen else {}, newest)


def stopped() -> Host:
    host = boot()
    host.commit(rules.Stop(VM))
    return host


def lost() -> Host:
    host = boot()
    host.commit(rules.Lose(VM, "killed"))
    return host


def removed() -> Host:
    host = boot()
    host.commit(rules.Remove(VM))
    return host


def awaiting() -> Host:
    host = boot()
    host.commit(rules.IssueTicket(ticket("m1", "b")))
    return host


def active() -> Host:
    host = awaiting()
    host.commit(present("m1", "b"))
    return host


def pausing() -> Host:
    source = boot()
    reach_ready(source, Host("b"))
    return source


def released() -> Host:
    source, destination = boot(), Host("b")
    reach_ready(source, destination)
    release(source, destination)
    return source


def freed() -> Host:
    source = boot()
    hand_over(source, Host("b"))
    return source


def reclaimed() -> Host:
    source = released()
    source.commit(rules.Evidence("m1", rules.Answer.REFUSED, "journal-of-b"))
    return source


def reserved() -> Host:
    host = Host("b")
    host.commit(rules.Reserve(r.Reserved("m1", VM, "a", "https://a")))
    host.commit(rules.Spawn(spawned(migration="m1")))
    return host


def prepared() -> Host:
    destination = Host("b")
    reach_ready(boot(), destination)
    return destination


def after(*events: rules.Event) -> Host:
    host = prepared()
    for event in events:
        host.commit(event)
    return host


def acquired() -> Host:
    return after(rules.Acquire("m1", N))


def started() -> Host:
    return after(rules.Acquire("m1", N), rules.Start("m1"))


def returned() -> Host:
    return after(rules.Acquire("m1", N), rules.Return("m1", "disk_busy"))


def refused() -> Host:
    return after(rules.Refuse("m1", "settled"))


def abandoned() -> Host:
    host = reserved()
    host.commit(rules.Refuse("m1", "cancelled"))
    return host


def coming_back(stage: str = "prepared") -> Host:
    """A host with a tombstone, to which the instance is on its way again."""
    a, b = boot("a"), Host("b")
    hand_over(a, b, "m0")
    if stage == "prepared":
        reach_ready(b, a, "m1")
    else:
        a.commit(rules.Reserve(r.Reserved("m1", VM, "b", "https://b")))
    return a


HISTORIES = {
    made.__name__: made
    for made in (
        boot,
        stopped,
        lost,
        removed,
        awaiting,
        active,
        pausing,
        released,
        freed,
        reclaimed,
        reserved,
        prepared,
        acquired,
        started,
        returned,
        refused,
        abandoned,
        coming_back,
    )
}

# By history: what is done when no guest is found, a paused one, a running one. The guest was told the newest epoch.
TABLE: Mapping[str, tuple[list[Step], list[Step], list[Step]]] = {
    "boot": ([Step.LOST], [Step.KEEP], [Step.KEEP]),
    "stopped": ([], [Step.DESTROY], [Step.DESTROY]),
    "lost": ([], [Step.DESTROY], [Step.PAUSE, Step.DESTROY]),
    "removed": ([], [Step.DESTROY], [Step.PAUSE, Step.DESTROY]),
    "awaiting": ([Step.LOST], [Step.END_ATTEMPT, Step.KEEP], [Step.END_ATTEMPT, Step.KEEP]),
    "active": ([Step.LOST], [Step.END_ATTEMPT, Step.KEEP], [Step.END_ATTEMPT, Step.KEEP]),
    "pausing": ([Step.LOST], [Step.UNDO_PAUSE], [Step.UNDO_PAUSE]),
    "released": ([Step.SETTLE], [Step.SETTLE], [Step.PAUSE, Step.SETTLE]),
    "freed": ([], [Step.DESTROY], [Step.PAUSE, Step.DESTROY]),
    "reclaimed": ([Step.LOST], [Step.KEEP], [Step.KEEP]),
    "reserved": ([Step.REFUSE], [Step.REFUSE], [Step.PAUSE, Step.INDETERMINATE]),
    "prepared": ([Step.REFUSE], [Step.REFUSE], [Step.PAUSE, Step.INDETERMINATE]),
    "acquired": ([Step.RETURN], [Step.FINISH_START], [Step.PAUSE, Step.FINISH_START]),
    "started": ([Step.LOST], [Step.KEEP], [Step.KEEP]),
    "returned": ([], [Step.DESTROY], [Step.PAUSE, Step.DESTROY]),
    "refused": ([], [Step.DESTROY], [Step.PAUSE, Step.DESTROY]),
    "abandoned": ([], [Step.DESTROY], [Step.PAUSE, Step.DESTROY]),
    "coming_back": ([Step.REFUSE], [Step.REFUSE], [Step.PAUSE, Step.INDETERMINATE]),
}


@SEEN
@pytest.mark.parametrize("history", list(HISTORIES))
def test_every_history_has_its_plan(history: str, seen: str | None) -> None:
    expected = TABLE[history][[None, PAUSED, RUNNING].index(seen)]

    assert steps(HISTORIES[history](), seen) == expected


def test_the_table_covers_every_holding() -> None:
    holdings = {known.holding for made in HISTORIES.values() for known in made().state.instances.values()}

    assert set(TABLE) == set(HISTORIES)
    assert holdings == set(Holding)


@pytest.mark.parametrize("history", list(HISTORIES))
def test_a_guest_runs_on_only_where_the_journal_makes_this_host_the_owner(history: str) -> None:
    """Rule 7. `acquired` is no leave to run either: no vCPU before `started`."""
    host = HISTORIES[history]()
    known = host.state.instances.get(VM)
    owner = known is not None and known.holding is Holding.HELD

    assert (Step.PAUSE in steps(host, RUNNING)) == (not owner)


@pytest.mark.parametrize("history", list(HISTORIES))
def test_a_guest_that_remembers_a_later_record_proves_the_journal_old(history: str) -> None:
    host = HISTORIES[history]()

    for seen in (PAUSED, RUNNING):
        found = plan_of(host, seen, last_record=len(host.records) + 1)
        assert [step.step for step in found] == [Step.INDETERMINATE]
        assert "shorter" in found[0].reason


@SEEN
def test_an_empty_journal_leaves_the_guest_as_it_is(seen: str | None) -> None:
    """The journal may be the thing that was lost; its records would have numbers the guest remembers, or not."""
    assert steps(Host("b"), seen, last_record=0) == ([Step.INDETERMINATE] if seen else [])
    assert steps(Host("b"), seen, last_record=9) == ([Step.INDETERMINATE] if seen else [])


def test_an_owner_whose_guest_was_never_told_its_epoch_runs_it() -> None:
    """The daemon died between `started` (or `reclaimed`) and `run`."""
    assert steps(started(), PAUSED, epoch=N) == [Step.RUN]
    assert steps(reclaimed(), PAUSED, epoch=N) == [Step.RUN]
    assert [step.migration for step in plan_of(started(), PAUSED, epoch=N)] == ["m1"]


def test_a_superseded_owner_keeps_its_guest_paused_and_undoes_nothing() -> None:
    """Rule 8: a guest that another host may run already must not be run, resumed, or told a newer epoch."""
    for made, ended in ((boot, False), (reclaimed, False), (pausing, True), (active, True)):
        host = made()
        host.commit(rules.Supersede(VM, Epoch(2, 0)))
        wanted = [Step.END_ATTEMPT, Step.KEEP] if ended else [Step.KEEP]

        assert steps(host, PAUSED, epoch=N) == wanted
        assert steps(host, RUNNING, epoch=N) == [Step.PAUSE, *wanted]


def test_a_superseded_host_that_acquired_can_only_return() -> None:
    host = acquired()
    host.commit(rules.Supersede(VM, Epoch(2, 0)))

    assert steps(host, PAUSED) == [Step.RETURN]
    assert steps(host, RUNNING) == [Step.PAUSE, Step.RETURN]


def test_pauses_come_before_everything_else() -> None:
    """A guest that must not run is stopped first, whatever else there is to do, and whichever instance comes first."""
    host = Host("a")
    for name in ("x", "y", "z"):
        host.commit(rules.Create(name))
        host.commit(rules.Spawn(spawned(name)))
    host.commit(rules.IssueTicket(ticket("mx", "b", "x")))
    host.commit(rules.Supersede("y", Epoch(2, 0)))
    host.commit(rules.Lose("z", "killed"))
    guests = {name: SeenGuest(True, N, 1) for name in ("x", "y", "z", "stranger")}

    found = plan(host.state, guests, len(host.records))

    assert [(step.step, step.instance) for step in found[:2]] == [(Step.PAUSE, "y"), (Step.PAUSE, "z")]
    assert Step.PAUSE not in {step.step for step in found[2:]}
    assert {(step.step, step.instance) for step in found[2:]} == {
        (Step.END_ATTEMPT, "x"),
        (Step.KEEP, "x"),
        (Step.KEEP, "y"),
        (Step.DESTROY, "z"),
        (Step.INDETERMINATE, "stranger"),
    }


def test_a_plan_names_the_migration_it_is_about() -> None:
    for made in (awaiting, pausing, released, reserved, acquired):
        assert {step.migration for step in plan_of(made(), PAUSED) if step.step is not Step.KEEP} == {"m1"}


def test_a_reservation_without_a_process_is_refused_too() -> None:
    assert steps(coming_back("reserved"), None) == [Step.REFUSE]


NEVER_RAN = SeenGuest(running=False, epoch=NO_EPOCH, last_record=0)


@pytest.mark.parametrize(
    ("history", "migration"), [("stopped", None), ("removed", None), ("reserved", "m1"), ("abandoned", "m1")]
)
def test_a_process_that_died_with_its_daemon_before_its_record_is_nobodys(history: str, migration: str | None) -> None:
    assert is_half_built(HISTORIES[history]().state, Stray(VM, migration, NEVER_RAN))


@pytest.mark.parametrize("history", list(HISTORIES))
@pytest.mark.parametrize("migration", [None, "m1", "m9"])
@pytest.mark.parametrize(
    "seen",
    [SeenGuest(True, N, 1), SeenGuest(False, N, 0), SeenGuest(False, NO_EPOCH, 1), SeenGuest(True, NO_EPOCH, 0)],
)
def test_a_process_that_ran_or_was_told_a_record_is_never_taken_for_half_built(
    history: str, migration: str | None, seen: SeenGuest
) -> None:
    """It outlived the record that the journal should have of it: the journal may be the thing that was lost."""
    assert not is_half_built(HISTORIES[history]().state, Stray(VM, migration, seen))


@pytest.mark.parametrize("history", ["prepared", "acquired", "started", "returned", "refused", "coming_back"])
def test_a_process_of_a_migration_that_got_further_is_not_half_built(history: str) -> None:
    migration = {"coming_back": "m0"}.get(history, "m1")

    assert not is_half_built(HISTORIES[history]().state, Stray(VM, migration, NEVER_RAN))


def test_a_process_of_an_instance_or_a_migration_that_the_journal_does_not_know_is_left_alone() -> None:
    assert not is_half_built(Host("a").state, Stray(VM, None, NEVER_RAN))
    assert not is_half_built(boot().state, Stray("other", None, NEVER_RAN))
    assert not is_half_built(boot().state, Stray(VM, "m9", NEVER_RAN))


# --------------------------------------------------------------------------- another journal


@SEEN
@pytest.mark.parametrize("make", [boot, stopped, lost, awaiting])
def test_a_guest_that_remembers_another_journal_is_left_as_it_is(make: Callable[[], Host], seen: str | None) -> None:
    """However long the journal has become: an older copy that was put back took another id, and grew."""
    if seen is None:
        return
    host = make()
    guest = SeenGuest(seen == RUNNING, N, 1, "the-one-that-was")

    (step,) = plan(host.state, {VM: guest}, host.newest + 100, journal_id="this-one")

    assert (step.step, step.reason) == (Step.INDETERMINATE, "the guest remembers another journal")


@pytest.mark.parametrize("told", ["", "this-one"])
def test_a_guest_that_was_told_of_this_journal_or_of_none_is_kept(told: str) -> None:
    host = boot()

    (step,) = plan(host.state, {VM: SeenGuest(True, N, 2, told)}, host.newest, journal_id="this-one")

    assert step.step is Step.KEEP


@pytest.mark.parametrize(
    ("journal", "record", "older"), [("this", 3, False), ("this", 4, True), ("that", 4, False), ("", 4, False)]
)
def test_only_a_guest_of_this_very_journal_proves_that_it_is_an_older_copy(
    journal: str, record: int, older: bool
) -> None:
    assert is_older_copy([SeenGuest(True, N, 1, "this"), SeenGuest(True, N, record, journal)], 3, "this") is older
