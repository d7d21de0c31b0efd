"""The daemon's protocol to guest processes, and the pure parts of the embedded machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hypervisor.hosts import plan_with_every_device
from vmmigrate.errors import HypervisorError, PayloadError
from vmmigrate.hypervisor.base import GuestStamp
from vmmigrate.hypervisor.embedded import plans, protocol
from vmmigrate.hypervisor.embedded.heartbeat import bin_of, upper_edge_ns
from vmmigrate.hypervisor.embedded.programs import working_set
from vmmigrate.hypervisor.embedded.uart import HISTORY_BYTES, History
from vmmigrate.memory import PAGE_SIZE, RamLayout, Region


@given(st.lists(st.dictionaries(st.text(max_size=5), st.binary(max_size=50)), max_size=5), st.integers(1, 20))
def test_messages_come_out_as_they_went_in_however_they_are_cut(messages: list[dict[str, bytes]], size: int) -> None:
    stream = b"".join(map(protocol.encode_frame, messages))
    decoder, received = protocol.FrameDecoder(), []

    for start in range(0, len(stream), size):
        decoder.receive(stream[start : start + size])
        while (message := decoder.next_message()) is not None:
            received.append(message)

    assert received == messages


@pytest.mark.parametrize("stream", [b"\xff\xff\xff\xff", b"\1\0\0\0\xc1", b"\1\0\0\0\x01"])
def test_a_stream_that_is_not_ours_is_refused(stream: bytes) -> None:
    decoder = protocol.FrameDecoder()
    decoder.receive(stream)

    with pytest.raises(HypervisorError) as caught:
        decoder.next_message()
    assert caught.value.code == "guest_protocol"


def test_the_newest_common_version_is_chosen_and_unknown_ones_are_skipped() -> None:
    assert protocol.choose_version([1, 99]) == 1
    assert protocol.choose_version([99]) is None
    assert protocol.choose_version("nonsense") is None


def test_errors_keep_class_code_and_details_across_the_socket() -> None:
    for error in (HypervisorError("a", code="b", details={"c": 1}), PayloadError("d")):
        again = protocol.error_from_map(protocol.error_to_map(error))
        assert (type(again), again.as_dict()) == (type(error), error.as_dict())


def test_plans_and_stamps_survive_the_way_to_the_guest(tmp_path: object) -> None:
    plan = replace(plan_with_every_device(tmp_path), unmigratable=("p9fs",))  # type: ignore[arg-type]
    stamp = GuestStamp("i", "h", (3, 4), "m")

    assert plans.plan_from_map(plans.plan_to_map(plan)) == plan
    assert plans.stamp_from_map(plans.stamp_to_map(stamp)) == stamp


@given(st.integers(0, 1 << 53))
def test_a_gap_lies_below_the_edge_of_its_bin_and_within_four_percent_of_it(gap_ns: int) -> None:
    edge = upper_edge_ns(bin_of(gap_ns))

    assert gap_ns < edge <= max(gap_ns * 1.04, gap_ns + 1024)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 300))
def test_a_working_set_has_the_wanted_size_and_never_page_zero(sizes: list[int], wanted: int) -> None:
    layout = RamLayout(Region(n << 30, pages * PAGE_SIZE) for n, pages in enumerate(sizes))

    pages = working_set(layout, wanted)

    assert len(set(pages.tolist())) == len(pages) == min(wanted, layout.pages - 1)
    assert all(0 < page < layout.pages for page in pages.tolist())


def test_history_keeps_the_first_and_the_most_recent_mib() -> None:
    history = History()
    for n in range(50):
        history.append(bytes([n]) * (HISTORY_BYTES // 10))

    kept = history.export()

    assert len(kept["beginning"]) == len(kept["rolling"]) == HISTORY_BYTES
    assert kept["beginning"].startswith(b"\0\0")
    assert kept["rolling"].endswith(bytes([49]))
    assert kept["total_bytes"] == 50 * (HISTORY_BYTES // 10)
    other = History()
    other.restore(**kept)
    assert other.export() == kept


@pytest.mark.parametrize(("beginning", "rolling", "total"), [(b"ab", b"", 3), (b"ab", b"c", 3), (b"", b"c", 1)])
def test_a_history_that_cannot_be_is_refused(beginning: bytes, rolling: bytes, total: int) -> None:
    with pytest.raises(PayloadError) as caught:
        History().restore(beginning, rolling, total)

    assert caught.value.code == "console_history"
