"""The witnesses' verdict: every way in which two owners, a lost or a repeated beat can show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.embedded.witness import CAPACITY, Witness, read_witness
from vmmigrate.hypervisor.intervals import Interval, check_single_owner

FIRST = Interval("a", "i", (1, 1), first_counter=1, first_ns=100, last_counter=50, last_ns=200, jumps=0)
SECOND = Interval("b", "i", (1, 2), first_counter=51, first_ns=300, last_counter=90, last_ns=400, jumps=0)


def test_disjoint_intervals_with_a_gapless_counter_have_one_owner_in_any_order() -> None:
    for intervals in ([FIRST, SECOND], [SECOND, FIRST]):
        verdict = check_single_owner(intervals)

        assert verdict.single
        assert verdict.hosts == ("a", "b")
        assert verdict.beats == 90
    assert check_single_owner([]).single


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (replace(SECOND, first_ns=150), "ran at the same time"),
        (replace(SECOND, first_ns=200), "ran at the same time"),
        (replace(SECOND, first_counter=53), "2 beats are missing"),
        (replace(SECOND, first_counter=50), "both counted 50"),
        (replace(SECOND, jumps=1), "jumped 1 times"),
        (replace(SECOND, epoch=(0, 9)), "the epoch went back"),
        (replace(SECOND, instance_id="j"), "more than one instance"),
    ],
)
def test_each_fault_is_found(second: Interval, says: str) -> None:
    verdict = check_single_owner([FIRST, second])

    assert not verdict.single
    assert any(says in problem for problem in verdict.problems)


def test_what_was_written_is_read_and_an_interval_without_a_beat_is_none(tmp_path: Path) -> None:
    path = tmp_path / "w"
    witness = Witness(path, "a", "i")
    witness.begin((1, 1))
    witness.begin((1, 2))
    witness.beat(7, 100)
    witness.beat(8, 200)
    witness.begin((2, 1))
    witness.beat(9, 300)
    witness.beat(11, 400)
    witness.begin((3, 1))

    assert read_witness(path) == (
        Interval("a", "i", (1, 2), 7, 100, 8, 200, jumps=0),
        Interval("a", "i", (2, 1), 9, 300, 11, 400, jumps=1),
    )


def test_a_full_witness_says_so_and_proves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "w"
    witness = Witness(path, "a", "i")
    for n in range(CAPACITY):
        witness.begin((1, n))
        witness.beat(n, n)
    assert len(read_witness(path)) == CAPACITY

    witness.begin((2, 1))
    witness.beat(CAPACITY, CAPACITY)

    with pytest.raises(HypervisorError, match="the rest is lost"):
        read_witness(path)


@pytest.mark.parametrize("content", [b"", b"VMMWIT01", bytes(200_000)])
def test_another_file_is_not_a_witness(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w").write_bytes(content)

    with pytest.raises(HypervisorError, match="not a witness file"):
        read_witness(tmp_path / "w")
    with pytest.raises(HypervisorError, match="No such file"):
        read_witness(tmp_path / "none")
