"""The real rules under an adversary: no promise breaks, within the bounds of each tier."""

from __future__ import annotations

import pytest

from tools.model import __main__ as command
from tools.model.explore import Explorer
from tools.model.machine import Engine
from tools.model.promises import Promise
from tools.model.world import COVERED, SCENARIOS, Failure


@pytest.mark.parametrize("chain", list(SCENARIOS))
def test_no_promise_breaks_one_failure_deep(chain: str) -> None:
    report = Explorer(SCENARIOS[chain], 1).run()

    assert report.violation is None, str(report)
    assert report.complete
    assert any(name.startswith("resolved") for name in report.outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("chain", ["ab", "aba", "abc"])
def test_no_promise_breaks_two_failures_deep(chain: str) -> None:
    """`make model` explores all chains, `python -m tools.model --failures 3` goes deeper."""
    report = Explorer(SCENARIOS[chain], 2, seconds=600).run()

    print(report)
    assert report.violation is None, str(report)
    assert report.complete


def test_without_failures_every_migration_of_every_chain_arrives() -> None:
    for chain, scenario in SCENARIOS.items():
        report = Explorer(scenario, 0).run()

        assert set(report.outcomes) == {"resolved"}, chain
        assert report.transitions >= report.states - 1


def test_daemon_crash_and_link_loss_and_a_failed_fsync_never_lose_the_guest() -> None:
    """Nor do they need an operator: whatever happens, the end is one running guest."""
    harmless = frozenset({Failure.DAEMON_CRASH, Failure.FSYNC, Failure.CUT, Failure.SILENCE, Failure.LETTER_LOST})

    report = Explorer(SCENARIOS["ab"], 2, allowed=harmless).run()

    assert report.violation is None, str(report)
    assert set(report.outcomes) == {"resolved"}


@pytest.mark.slow
def test_a_journal_that_is_copied_back_with_its_id_lets_two_run_in_a_chain() -> None:
    """Why restoring has to change the id: the promise ends here, and the model knows where."""
    report = Explorer(SCENARIOS["abc"], 1, allowed=COVERED | {Failure.JOURNAL_COPIED}).run(liveness=False)

    assert report.violation is not None
    assert report.violation.promise in {Promise.ONE_RUNS, Promise.ONE_OPENS}
    assert any(Failure.JOURNAL_COPIED in step for step in report.violation.trace)


def test_a_counterexample_tells_the_way_step_by_step_and_the_world_at_its_end() -> None:
    report = Explorer(SCENARIOS["ab"], 1, engine=Engine(waits_for_evidence=False)).run()

    text = str(report)

    assert "VIOLATION: " in text
    assert "  1. A: migrate-out m1: ticketissued" in text
    assert "<-- failure: " in text
    assert "  A: journal A " in text


def test_an_exploration_that_runs_out_of_time_does_not_pass_for_complete() -> None:
    report = Explorer(SCENARIOS["ab"], 2, seconds=0).run()

    assert not report.complete
    assert "INCOMPLETE" in str(report)


def test_the_command_prints_the_number_of_states_and_of_transitions(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--chain", "aba", "--failures", "0"]) == 0

    printed = capsys.readouterr().out
    assert "aba, 0 failures: " in printed
    assert " states, " in printed
    assert " transitions, " in printed
    assert command.main(["--failures", "1", "--seconds", "0"]) == 1
