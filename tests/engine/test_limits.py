"""Deadlines: one table, the order it must keep, and what is said of settings that do not."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.daemon.settings import NEEDED
from vmmigrate.daemon.config import read_config
from vmmigrate.engine.limits import ORDER, ROWS, Before, Deadlines, read_deadlines
from vmmigrate.errors import UsageError


def _read(tmp_path: Path, limits: str) -> Deadlines:
    path = tmp_path / "daemon.toml"
    path.write_text(f"{NEEDED}[limits]\n{limits}\n")
    return read_config(path).limits.deadlines


def test_the_defaults_keep_their_order_and_their_own_bounds() -> None:
    assert read_deadlines({each.name: each.default for each in fields(Deadlines)}) == Deadlines()
    assert all(each.holds(Deadlines()) for each in ORDER)


@pytest.mark.parametrize("name", ROWS)
def test_every_deadline_is_a_setting_of_its_own_name(tmp_path: Path, name: str) -> None:
    value = getattr(Deadlines(), name)

    assert getattr(_read(tmp_path, f"{name} = {value * 1.01}"), name) == pytest.approx(value * 1.01)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("value", ["-1", "1e9", "nan", "inf", "true", '"10"', "[1]"])
def test_what_is_no_number_of_seconds_within_bounds_is_refused_by_name(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(UsageError, match=rf"limits\.{name}: .*allowed are numbers from") as refusal:
        _read(tmp_path, f"{name} = {value}")

    assert refusal.value.code == "bad_config"
    assert "\n" not in refusal.value.text


@pytest.mark.parametrize("each", ORDER, ids=lambda each: f"{each.shorter}<{each.longer}")
def test_settings_out_of_order_are_refused_in_one_line_that_says_why(tmp_path: Path, each: Before) -> None:
    longer = getattr(Deadlines(), each.longer)

    with pytest.raises(UsageError) as refusal:
        _read(tmp_path, f"{each.shorter} = {longer}")

    assert refusal.value.code == "bad_config"
    assert "\n" not in refusal.value.text
    assert "needed is" in refusal.value.text
    assert any(one.why in refusal.value.text for one in ORDER)


def test_a_mistaken_name_is_no_deadline(tmp_path: Path) -> None:
    for name in ("verdict_ms", "deadlines"):
        with pytest.raises(UsageError, match="no such setting"):
            _read(tmp_path, f"{name} = 1")


@given(st.dictionaries(st.sampled_from(sorted(ROWS)), st.floats(0.05, 60.0)))
def test_what_is_accepted_keeps_every_bound_and_the_whole_order(settings: dict[str, float]) -> None:
    try:
        deadlines = read_deadlines(settings)
    except ValueError:
        return
    assert all(each.holds(deadlines) for each in ORDER)
    assert all(row.least_s <= getattr(deadlines, name) <= row.most_s for name, row in ROWS.items())
