"""Every deliberate bug is found, and is what was found: without it the same hunt finds nothing."""

from __future__ import annotations

import pytest

from tools.model.mutations import MUTATIONS, Mutation
from vmmigrate.ownership import rules

EACH = pytest.mark.parametrize("mutation", list(MUTATIONS), ids=[mutation.name for mutation in MUTATIONS])


@EACH
def test_the_model_finds(mutation: Mutation) -> None:
    """About three seconds for the longest; the bound is for a machine that is busy with something else."""
    report = mutation.hunt(seconds=30)

    assert report.violation is not None, str(report)
    assert report.violation.promise in mutation.shows_as
    assert report.violation.trace


@pytest.mark.slow
@EACH
def test_nothing_is_found_where_the_bug_is_not(mutation: Mutation) -> None:
    report = mutation.without(seconds=120)

    assert report.complete
    assert report.violation is None, str(report)


def test_each_rule_that_a_model_checker_had_found_is_broken_by_some_mutation() -> None:
    """Rules of design 4.2 that carry an (x)."""
    assert {"1", "2", "3", "4", "5", "6", "7", "8"} <= {mutation.rule for mutation in MUTATIONS}
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


def test_a_mutation_leaves_the_real_functions_as_they_were() -> None:
    before = dict(rules._DECIDE)

    for mutation in MUTATIONS:
        if mutation.depth <= 1 and mutation.chain == "ab":
            mutation.hunt(seconds=5)

    assert dict(rules._DECIDE) == before
