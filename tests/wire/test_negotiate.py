"""Choosing from an offer: newest, best first, and all mismatches at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmigrate.errors import NegotiationError
from vmmigrate.wire.messages import Offer, Refuse
from vmmigrate.wire.negotiate import (
    DIGESTS,
    ENCODINGS,
    MAX_STREAMS,
    PROTOCOL_VERSIONS,
    TRANSPORTS,
    Abilities,
    Mismatch,
    Need,
    choose,
    first_common,
    newest_common,
)
from vmmigrate.wire.phases import Kind

from .pair import SAMPLE

_SAMPLE = SAMPLE[Kind.OFFER]
assert isinstance(_SAMPLE, Offer)
OFFER: Offer = replace(
    _SAMPLE,
    protocols=PROTOCOL_VERSIONS,
    payloads={"rtc": (1, 2)},
    ram={"transports": TRANSPORTS, "encodings": ENCODINGS, "digests": DIGESTS},
)
CLOCK, PORT = {"device": "clock0", "kind": "rtc"}, {"device": "com1", "kind": "uart"}
VERSIONS = st.lists(st.integers(1, 9), max_size=5).map(tuple)


@given(VERSIONS, VERSIONS)
def test_the_newest_common_version_is_chosen(ours: tuple[int, ...], theirs: tuple[int, ...]) -> None:
    common = sorted(set(ours) & set(theirs))

    assert newest_common(ours, theirs) == (common[-1] if common else None)


@given(st.permutations("abcdef"), st.sets(st.sampled_from("defxyz")))
def test_our_best_common_word_is_chosen_whatever_the_peers_order(ours: list[str], theirs: set[str]) -> None:
    word = first_common(ours, sorted(theirs))

    if word is None:
        assert not set(ours) & theirs
    else:
        assert word in theirs
        assert not set(ours[: ours.index(word)]) & theirs


def test_what_both_sides_know_is_chosen() -> None:
    choice = choose(OFFER, Abilities(), wanted_streams=4, needs=[Need("clock0", "rtc", (1, 2))])

    assert (choice.protocol, choice.transport, choice.digest) == (1, "sealed", "multilinear-64-tree")
    assert choice.encodings == ("raw", "zero", "zstd", "delta")
    assert (choice.streams, choice.payloads) == (4, {"rtc": 2})


def test_unknown_words_and_versions_are_skipped() -> None:
    """A newer peer offers more than we know; that is no reason to refuse it."""
    newer = replace(
        OFFER,
        protocols=(0, 1, 7, 4_000_000_000),
        payloads={"rtc": (1, 99), "hologram": (1,)},
        ram={
            "transports": ("quantum", "sealed", "tls"),
            "encodings": ("delta", "lz9", "zero", "raw", "zstd"),
            "digests": ("sha9", "multilinear-64", "multilinear-64-tree"),
            "colours": ("red",),
        },
    )

    choice = choose(newer, Abilities(), 1, [Need("clock0", "rtc", (1, 2))])

    assert choice == choose(replace(OFFER, payloads={"rtc": (1,)}), Abilities(), 1, [Need("clock0", "rtc", (1, 2))])
    assert choice.encodings == ("raw", "zero", "zstd", "delta"), "in our order"


def test_an_encoding_besides_raw_is_optional() -> None:
    choice = choose(replace(OFFER, ram={**OFFER.ram, "encodings": ("raw",)}), Abilities(), wanted_streams=1)

    assert choice.encodings == ("raw",)


def test_all_mismatches_are_reported_at_once() -> None:
    stranger = replace(OFFER, protocols=(2,), payloads={}, ram={"transports": ("quantum",), "encodings": ("zero",)})
    needs = [Need("clock0", "rtc", (1,)), Need("com1", "uart", (3, 4)), Need("screen", "ramfb", (1,), optional=True)]
    fact = Mismatch("fact cpu_model", ("qemu64",), ("EPYC",))

    with pytest.raises(NegotiationError) as caught:
        choose(stranger, Abilities(), 1, needs, [fact])

    assert caught.value.code == "no_common_ground"
    assert caught.value.details["mismatches"] == [
        {"topic": "protocol", "source": ["1"], "destination": ["2"]},
        {"topic": "transports", "source": ["sealed", "tls"], "destination": ["quantum"]},
        {"topic": "digests", "source": ["multilinear-64-tree", "multilinear-64"], "destination": []},
        {"topic": "encodings", "source": ["raw", "zero", "zstd", "delta"], "destination": ["zero"]},
        {"topic": "payload rtc of device clock0", "source": ["1"], "destination": [], **CLOCK},
        {"topic": "payload uart of device com1", "source": ["3", "4"], "destination": [], **PORT},
        {"topic": "fact cpu_model", "source": ["qemu64"], "destination": ["EPYC"]},
    ]
    for part in ("protocol: source {1}, destination {2}", "device com1: source {3, 4}, destination {}"):
        assert part in caught.value.text
    assert Refuse(caught.value.code, caught.value.text, caught.value.details).kind is Kind.REFUSE


@pytest.mark.parametrize("topic", ["transports", "encodings", "digests"])
def test_a_topic_that_the_offer_does_not_name_is_a_mismatch(topic: str) -> None:
    silent = replace(OFFER, ram={name: words for name, words in OFFER.ram.items() if name != topic})

    with pytest.raises(NegotiationError) as caught:
        choose(silent, Abilities(), wanted_streams=1)

    assert [x["topic"] for x in caught.value.details["mismatches"]] == [topic]


@pytest.mark.parametrize(
    ("wanted", "offered", "ours", "streams"),
    [(2, 16, 16, 2), (99, 16, 16, 16), (99, 3, 16, 3), (99, 1024, 5, 5), (0, 16, 16, 1), (-1, 16, 16, 1)],
)
def test_the_stream_count_is_the_least_that_anybody_allows_and_at_least_one(
    wanted: int, offered: int, ours: int, streams: int
) -> None:
    choice = choose(replace(OFFER, max_streams=offered), Abilities(max_streams=ours), wanted)

    assert choice.streams == streams


def test_a_default_source_allows_the_released_number_of_streams() -> None:
    assert choose(replace(OFFER, max_streams=1024), Abilities(), 1024).streams == MAX_STREAMS


def test_one_version_serves_all_devices_of_a_kind() -> None:
    """`Select` names one version per kind: the newest that every such device can write and the peer reads."""
    offer = replace(OFFER, payloads={"uart": (1, 2, 3)})

    choice = choose(offer, Abilities(), 1, [Need("com1", "uart", (3, 2, 1)), Need("com2", "uart", (2, 1))])

    assert choice.payloads == {"uart": 2}


def test_a_refusal_names_the_device_whose_state_cannot_be_said_and_not_its_neighbour() -> None:
    offer = replace(OFFER, payloads={"uart": (1,)})

    with pytest.raises(NegotiationError) as caught:
        choose(offer, Abilities(), 1, [Need("com1", "uart", (2, 1)), Need("com2", "uart", (2,))])

    assert [x["device"] for x in caught.value.details["mismatches"]] == ["com2"]


def test_devices_that_have_no_version_in_common_with_each_other_are_all_named() -> None:
    offer = replace(OFFER, payloads={"uart": (1, 2)})

    with pytest.raises(NegotiationError) as caught:
        choose(offer, Abilities(), 1, [Need("com1", "uart", (1,)), Need("com2", "uart", (2,))])

    assert [x["device"] for x in caught.value.details["mismatches"]] == ["com1", "com2"]


@pytest.mark.parametrize(
    ("readable", "chosen", "skipped"),
    [
        ({}, {}, (("cpu0", "pmu"), ("cpu1", "pmu"))),
        ({"pmu": (9,)}, {}, (("cpu0", "pmu"), ("cpu1", "pmu"))),
        ({"pmu": (1,)}, {"pmu": 1}, ()),
    ],
)
def test_an_optional_payload_that_the_destination_does_not_read_is_skipped_and_told(
    readable: dict[str, tuple[int, ...]], chosen: dict[str, int], skipped: tuple[tuple[str, str], ...]
) -> None:
    needs = [Need("cpu0", "pmu", (1,), optional=True), Need("cpu1", "pmu", (1,), optional=True)]

    choice = choose(replace(OFFER, payloads=readable), Abilities(), 1, needs)

    assert (choice.payloads, choice.skipped) == (chosen, skipped)


def test_an_optional_device_does_not_hold_up_a_mandatory_one_of_its_kind() -> None:
    needs = [Need("a", "uart", (1,)), Need("b", "uart", (2,), optional=True)]

    choice = choose(replace(OFFER, payloads={"uart": (1, 2)}), Abilities(), 1, needs)

    assert (choice.payloads, choice.skipped) == ({"uart": 1}, (("b", "uart"),))
