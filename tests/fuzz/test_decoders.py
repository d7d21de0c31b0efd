"""Every decoder of what somebody else wrote refuses in its own words, or accepts; nothing else ever comes out of it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.fuzz.plain import fuzz, mutated
from tools.fuzz.targets import CORPUS, TARGETS, Target, corpus_of

EACH = pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
CASES = [(target, path) for target in TARGETS.values() for path in corpus_of(target)]


@EACH
def test_seeds_are_read(target: Target) -> None:
    assert target.seeds
    for seed in target.seeds:
        target.read(seed)


@EACH
@given(st.data())
def test_any_bytes_are_read_or_refused(target: Target, draw: st.DataObject) -> None:
    target.read(draw.draw(st.binary(max_size=300)))


@EACH
@given(st.integers(0, 1 << 32))
def test_damaged_inputs_are_read_or_refused(target: Target, seed: int) -> None:
    target.read(mutated(random.Random(seed), list(target.seeds))[: target.max_bytes])


@pytest.mark.parametrize(("target", "path"), CASES, ids=lambda part: getattr(part, "name", ""))
def test_what_once_found_a_defect_is_read_or_refused(target: Target, path: object) -> None:
    """The corpus; kept for good."""
    assert hasattr(path, "read_bytes")
    target.read(path.read_bytes())


def test_every_directory_of_the_corpus_is_of_a_target() -> None:
    assert {path.name for path in CORPUS.iterdir() if path.is_dir()} <= set(TARGETS)


def test_a_decoder_with_a_defect_is_found() -> None:
    """The fuzzer itself: one input in many makes this decoder fail."""

    def read(raw: bytes) -> None:
        if raw.count(b"\xff") > 2:
            raise IndexError("a defect")

    tried, found = fuzz(Target("defective", read, [b"harmless"]), 20, 1)

    assert tried > 1
    assert found is not None
    assert found.count(b"\xff") > 2
