"""Kinds with two versions: up is total, down is exact or refused, and the refusal names what cannot be said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.devices.test_kinds import RTC, SAMPLE, UART, VIRTIO
from tests.devices.test_registry import states
from vmmigrate.devices import chipset, kinds
from vmmigrate.devices.payload import DevicePayload
from vmmigrate.devices.registry import KINDS, decode, encode, exact_versions
from vmmigrate.errors import PayloadError

TWO_VERSIONS = ("uart-16550", "bhyve-rtc", "pci-virtio")
PLAIN_QUEUES = tuple(
    replace(queue, enabled=queue.live, is_control=n == 2, notify_data=n) for n, queue in enumerate(VIRTIO.queues.queues)
)
PLAIN_VIRTIO = kinds.PciVirtioV2(VIRTIO.device, kinds.VirtioQueues(3, 3, PLAIN_QUEUES))
PLAIN_RTC = replace(RTC, last_period=0)


def test_three_kinds_have_two_versions() -> None:
    assert {name for name, kind in KINDS.items() if len(kind.shapes) > 1} == set(TWO_VERSIONS)


@pytest.mark.parametrize("name", TWO_VERSIONS)
@given(source=st.data())
def test_every_old_state_has_a_new_form(name: str, source: st.DataObject) -> None:
    kind = KINDS[name]
    old = source.draw(states(kind.shapes[1]))

    assert isinstance(kind.up[1](old), kind.shapes[2])


@pytest.mark.parametrize("name", TWO_VERSIONS)
@given(source=st.data())
def test_what_version_1_says_read_back_is_the_very_state_or_it_is_not_said(name: str, source: st.DataObject) -> None:
    """The heart of it: for any state, an older payload is exact or there is none."""
    kind = KINDS[name]
    state = source.draw(states(kind.shapes[2]) | states(kind.shapes[1]).map(kind.up[1]))

    exact = exact_versions(name, state)

    assert exact[0] == 2
    if 1 in exact:
        payload = encode("device", name, state, version=1)
        assert payload.version == 1
        if not list(kind.check(state)):
            assert decode(payload) == state
    else:
        with pytest.raises(PayloadError) as caught:
            encode("device", name, state, version=1)
        assert caught.value.code == "payload_lossy"


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("uart-16550", replace(UART, pending_input=b"")),
        ("bhyve-rtc", PLAIN_RTC),
        ("pci-virtio", PLAIN_VIRTIO),
    ],
)
def test_an_ordinary_device_can_be_said_in_both_versions(name: str, state: Any) -> None:
    assert exact_versions(name, state) == (2, 1)
    assert decode(encode("device", name, state, version=1)) == state


@pytest.mark.parametrize(
    ("name", "state", "lost"),
    [
        ("uart-16550", UART, "pending_input"),
        ("bhyve-rtc", replace(PLAIN_RTC, last_period=5), "last_period"),
        ("bhyve-rtc", replace(PLAIN_RTC, cmos=bytes(128)), "no time of day"),
        ("bhyve-rtc", replace(PLAIN_RTC, base_clock=-(1 << 63)), "time_base: is -9223372036854775808"),
        ("bhyve-rtc", replace(PLAIN_RTC, cmos=PLAIN_RTC.cmos[:6] + b"\x01" + PLAIN_RTC.cmos[7:]), "cmos"),
        ("pci-virtio", replace(PLAIN_VIRTIO, queues=replace(PLAIN_VIRTIO.queues, peak=9)), "queues.peak"),
        ("pci-virtio", VIRTIO, "queues.queues[0].notify_data"),
    ],
)
def test_what_version_1_cannot_say_is_named(name: str, state: Any, lost: str) -> None:
    with pytest.raises(PayloadError) as caught:
        encode("com1", name, state, version=1)

    assert caught.value.code == "payload_lossy"
    assert caught.value.details == {"device": "com1", "kind": name, "version": 1}
    assert f"device com1, payload {name} version 1: cannot say" in caught.value.text
    assert lost in caught.value.text
    assert exact_versions(name, state) == (2,)


def test_an_old_clock_goes_on_from_the_time_that_was_told_beside_its_registers() -> None:
    old: kinds.BhyveRtcV1 = SAMPLE["bhyve-rtc", 1]

    new = decode(encode("rtc", "bhyve-rtc", chipset.rtc_from_v1(old)))

    assert chipset.read_time(new.cmos) == old.time_sec
    assert new.base_clock == old.time_base - old.time_nsec


def test_the_control_queue_of_an_old_device_is_the_last_of_an_odd_number() -> None:
    queues = SAMPLE["pci-virtio", 1].queues

    def controls(count: int) -> list[bool]:
        state = KINDS["pci-virtio"].up[1](replace(SAMPLE["pci-virtio", 1], queues=(queues * 2)[:count]))
        return [queue.is_control for queue in state.queues.queues]

    assert controls(1) == [False]
    assert controls(2) == [False, False]
    assert controls(3) == [False, False, True]


def test_an_old_payload_is_checked_as_the_state_that_it_becomes() -> None:
    old = replace(SAMPLE["pci-virtio", 1], queues=(replace(SAMPLE["pci-virtio", 1].queues[0], size=3),))
    body = encode("disk", "pci-virtio", KINDS["pci-virtio"].up[1](old), version=1).body

    with pytest.raises(PayloadError, match=r"queues\[0\].size is 3") as caught:
        decode(DevicePayload("disk", "pci-virtio", 1, body))
    assert caught.value.code == "payload_value"
