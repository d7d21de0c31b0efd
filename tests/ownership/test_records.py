"""Records: read back as written, and nothing unknown is ever skipped."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmigrate.errors import JournalError
from vmmigrate.ownership import records as r
from vmmigrate.ownership.records import RECORD_NAMES, RECORD_TYPES, Epoch, Record, from_plain, to_plain

U64 = st.integers(0, (1 << 64) - 1)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "str": st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    "int": U64,
    "Epoch": st.builds(Epoch, U64, U64),
    "str | None": st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
}
VALUES["bool"] = st.booleans()
VALUES["Epoch | None"] = st.none() | VALUES["Epoch"]
for _cls in (r.Spawned, r.TicketIssued, r.Released, r.Resolved, r.Reserved, r.Prepared):
    VALUES[_cls.__name__] = st.builds(_cls, **{field.name: VALUES[str(field.type)] for field in fields(_cls)})
    VALUES[f"{_cls.__name__} | None"] = st.none() | VALUES[_cls.__name__]
# What a declared type must not be read from.
WRONG: dict[str, list[Any]] = {
    "str": [None, 1, b"x", ["x"]],
    "int": [None, True, "1", 1.0],
    "Epoch": [None, 1, [1], [1, 2, 3], [1, "2"], [True, 1], {"term": 1, "n": 1}],
    "str | None": [1, b"x", False],
}
WRONG["bool"] = [None, 0, 1, "true"]
WRONG["Epoch | None"] = [0, [1], {}]
SAMPLES: dict[str, Any] = {"str": "x", "int": 1, "bool": True, "Epoch": Epoch(1, 2), "str | None": None}
SAMPLES["Epoch | None"] = None
for _cls in (r.Spawned, r.TicketIssued, r.Released, r.Resolved, r.Reserved, r.Prepared):
    SAMPLES[_cls.__name__] = _cls(**{field.name: SAMPLES[str(field.type)] for field in fields(_cls)})
    SAMPLES[f"{_cls.__name__} | None"] = SAMPLES[_cls.__name__]
    # Another record, one that is no map, and one within one within one.
    WRONG[f"{_cls.__name__} | None"] = [1, [], "x", {}, {"record": "removed", "instance": "a", "reason": "b"}]
    WRONG[_cls.__name__] = [None, *WRONG[f"{_cls.__name__} | None"]]
NAMED = pytest.mark.parametrize("name", list(RECORD_TYPES))


def records() -> st.SearchStrategy[Record]:
    builders = [
        st.builds(cls, **{field.name: VALUES[str(field.type)] for field in fields(cls)})
        for cls in RECORD_TYPES.values()
    ]
    return st.one_of(builders)


def sample(name: str) -> Record:
    cls = RECORD_TYPES[name]
    return cls(**{field.name: SAMPLES[str(field.type)] for field in fields(cls)})


@given(records())
def test_every_record_is_read_back_as_it_was_written(record: Record) -> None:
    raw = msgpack.packb(to_plain(record), use_bin_type=True)

    assert from_plain(msgpack.unpackb(raw)) == record


def test_names_in_journals_never_change() -> None:
    """A line is only ever added."""
    assert list(RECORD_TYPES) == [
        "created",
        "spawned",
        "stopped",
        "removed",
        "lost",
        "superseded",
        "ticket_issued",
        "ticket_consumed",
        "pausing",
        "resumed",
        "ended",
        "released",
        "reclaimed",
        "freed",
        "reserved",
        "abandoned",
        "prepared",
        "acquired",
        "refused",
        "started",
        "returned",
        "acknowledged",
        "resolved",
        "notified",
        "yielded",
        "kept_instance",
        "kept_outgoing",
        "kept_incoming",
        "kept_leftover",
    ]
    assert {RECORD_NAMES[cls]: cls for cls in RECORD_NAMES} == RECORD_TYPES


@pytest.mark.parametrize("name", ["divorced", None, 7, ""])
def test_an_unknown_record_is_refused_never_skipped(name: Any) -> None:
    """It may be a verdict of a newer release."""
    with pytest.raises(JournalError, match="written by a newer release") as caught:
        from_plain({"record": name, "instance": "vm1"})

    assert caught.value.code == "unknown_record"


@NAMED
def test_missing_and_unknown_fields_are_refused(name: str) -> None:
    plain = to_plain(sample(name))
    missing = [{key: value for key, value in plain.items() if key != left} for left in plain if left != "record"]

    for damaged in [*missing, {**plain, "novelty": 1}]:
        with pytest.raises(JournalError) as caught:
            from_plain(damaged)
        assert caught.value.code == "bad_record"


@NAMED
def test_a_field_of_another_type_is_refused_by_name(name: str) -> None:
    for field in fields(RECORD_TYPES[name]):
        for value in WRONG[str(field.type)]:
            with pytest.raises(JournalError, match=f"record {name}: field {field.name} is") as caught:
                from_plain({**to_plain(sample(name)), field.name: value})
            assert caught.value.code == "bad_record"


def test_epochs_are_compared_by_term_first() -> None:
    epoch = Epoch(1, 5)

    assert Epoch(1, 4) < epoch < Epoch(1, 6) < Epoch(2, 0)
    assert epoch.handed_over() == (1, 6)
    assert epoch.taken_back() == (1, 7)
    assert epoch.next_term() == (2, 0)


@given(st.builds(Epoch, U64, U64))
def test_an_epoch_taken_back_is_never_one_that_was_handed_over(epoch: Epoch) -> None:
    assert epoch < epoch.handed_over() < epoch.taken_back() < epoch.next_term()
