"""The import plan: all that is wrong with a device list, at once, before anything is applied."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vmmigrate.devices import kinds
from vmmigrate.devices.payload import MAX_PAYLOAD_BYTES, MAX_PAYLOADS, DevicePayload
from vmmigrate.devices.plan import ExpectedDevice, check_import
from vmmigrate.devices.registry import encode
from vmmigrate.errors import PayloadError

BLOB = ExpectedDevice("blob", ("in-memory-block-backend",))
INJECTOR = ExpectedDevice("injector", ("testdev-migration-failure",), optional_kinds=("qemu-ramfb", "qemu/vmstate"))
DEVICES = (BLOB, INJECTOR)
GOOD = (
    encode("blob", "in-memory-block-backend", kinds.InMemoryBlockBackendV1(b"abc")),
    encode("injector", "testdev-migration-failure", kinds.MigrationFailureV1()),
)
SCREEN = kinds.QemuRamFbV1(0, 0, 0, 80, 25, 0)
SCREEN_OF_BLOB = encode("blob", "qemu-ramfb", SCREEN)
SCREEN_OF_NOBODY = encode("nobody", "qemu-ramfb", SCREEN)
STRANGER = DevicePayload("blob", "no-such-kind", 1, b"?")


def test_a_good_list_is_decoded_by_device_and_kind() -> None:
    plan = check_import(DEVICES, GOOD)

    assert plan.states["blob", "in-memory-block-backend"].bytes == b"abc"
    assert plan.skipped == ()


def test_an_optional_kind_is_taken_when_it_comes_and_an_unknown_optional_one_is_skipped_and_reported() -> None:
    screen = encode("injector", "qemu-ramfb", SCREEN)
    unknown = DevicePayload("blob", "no-such-kind", 9, b"?", optional=True)

    plan = check_import(DEVICES, [*GOOD, screen, unknown])

    assert plan.states["injector", "qemu-ramfb"] == SCREEN
    assert plan.skipped == (("blob", "no-such-kind"),)


def test_an_optional_payload_in_a_version_that_nobody_reads_is_skipped_and_reported() -> None:
    newer = DevicePayload("injector", "qemu-ramfb", 9, b"?", optional=True)

    assert check_import(DEVICES, [*GOOD, newer]).skipped == (("injector", "qemu-ramfb"),)
    with pytest.raises(PayloadError, match="can read only 1"):
        check_import(DEVICES, [*GOOD, replace(newer, optional=False)])


def test_an_opaque_payload_is_handed_on_unread_when_the_machine_takes_it() -> None:
    state = DevicePayload("injector", "qemu/vmstate", 1, b"\x00anything")

    assert check_import(DEVICES, [*GOOD, state]).states["injector", "qemu/vmstate"] == b"\x00anything"
    with pytest.raises(PayloadError, match="nothing here takes a payload of kind xen/state"):
        check_import(DEVICES, [*GOOD, replace(state, kind="xen/state")])
    with pytest.raises(PayloadError, match="allowed are") as caught:
        check_import(DEVICES, [*GOOD, replace(state, body=bytes(MAX_PAYLOAD_BYTES + 1))])
    assert caught.value.code == "payload_too_large"


@pytest.mark.parametrize(
    ("payloads", "code", "says"),
    [
        (GOOD[:1], "payload_missing", "device injector: no payload of kind testdev-migration-failure"),
        ((*GOOD, GOOD[0]), "payload_duplicate", "device blob: 2 payloads"),
        ((*GOOD, STRANGER), "payload_kind", "unknown kind no-such-kind"),
        ((*GOOD, SCREEN_OF_NOBODY), "payload_unconsumed", "no such device"),
        ((*GOOD, SCREEN_OF_BLOB), "payload_unconsumed", "nothing here"),
        ((DevicePayload("blob", "in-memory-block-backend", 5, b""), GOOD[1]), "payload_version", "can read only 1"),
        ((GOOD[0], DevicePayload("injector", "testdev-migration-failure", 1, b"")), "payload_body", "MessagePack"),
        ((GOOD[0],) * (MAX_PAYLOADS + 1), "payload_count", "allowed are"),
    ],
)
def test_each_problem_has_its_code_and_names_the_device(
    payloads: tuple[DevicePayload, ...], code: str, says: str
) -> None:
    with pytest.raises(PayloadError) as caught:
        check_import(DEVICES, payloads)

    assert caught.value.code == code
    assert says in caught.value.text


def test_all_problems_come_in_one_error() -> None:
    with pytest.raises(PayloadError) as caught:
        check_import(DEVICES, [GOOD[0], GOOD[0], STRANGER])

    problems = caught.value.details["problems"]
    assert caught.value.code == "device_payload"
    assert {(p["code"], p["device"]) for p in problems} == {
        ("payload_duplicate", "blob"),
        ("payload_kind", "blob"),
        ("payload_missing", "injector"),
    }


def test_a_device_judges_its_states_together_and_only_when_all_are_there() -> None:
    device = ExpectedDevice("blob", BLOB.kinds, check=lambda states: [f"holds {len(states)} states"])

    with pytest.raises(PayloadError, match="device blob: holds 1 states") as caught:
        check_import([device, INJECTOR], GOOD)
    assert caught.value.code == "payload_value"

    with pytest.raises(PayloadError) as caught:
        check_import([device, INJECTOR], GOOD[1:])
    assert caught.value.code == "payload_missing"
