"""Payload kinds: what is written is read, nothing else is, and every problem is named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmigrate.devices import fields, kinds, registry
from vmmigrate.devices.fields import U8, FieldType, fields_of
from vmmigrate.devices.payload import DevicePayload
from vmmigrate.devices.registry import KINDS, Kind, decode, encode
from vmmigrate.errors import PayloadError


def values(kind: FieldType) -> st.SearchStrategy[Any]:
    """Everything that a field type allows."""
    if isinstance(kind, fields.Integer):
        return st.integers(kind.low, kind.high)
    if isinstance(kind, fields.Bits):
        return st.integers(0, kind.allowed).map(lambda value: value & kind.allowed)
    if isinstance(kind, fields.Boolean):
        return st.booleans()
    if isinstance(kind, fields.Octets):
        return st.binary(min_size=kind.shortest, max_size=min(kind.longest, max(kind.shortest, 64)))
    if isinstance(kind, fields.Text):
        return st.sampled_from(kind.allowed) if kind.allowed else st.text(max_size=kind.longest)
    if isinstance(kind, fields.ListOf):
        items = st.lists(values(kind.item), min_size=kind.shortest, max_size=min(kind.longest, max(kind.shortest, 3)))
        return items.map(tuple)
    if isinstance(kind, fields.Maybe):
        return st.none() | values(kind.item)
    if isinstance(kind, fields.Scalars):
        scalars = st.integers(-(1 << 63), 1 << 63) | st.booleans() | st.text(max_size=8)
        return st.dictionaries(st.text(max_size=8), scalars, max_size=kind.most)
    assert isinstance(kind, fields.Struct)
    return states(kind.shape)


def states(shape: type[Any]) -> st.SearchStrategy[Any]:
    return st.builds(shape, **{name: values(kind) for name, kind in fields_of(shape).items()})


@pytest.mark.parametrize("name", list(KINDS))
@given(source=st.data())
def test_every_state_of_every_kind_round_trips_or_is_refused_for_what_no_device_can_have(
    name: str, source: st.DataObject
) -> None:
    kind = KINDS[name]
    state = source.draw(states(kind.shapes[kind.newest]))

    payload = encode("device", name, state)

    assert payload.version == kind.newest
    if list(kind.check(state)):
        with pytest.raises(PayloadError) as caught:
            decode(payload)
        assert caught.value.code == "payload_value"
    else:
        assert decode(payload) == state


@given(st.binary(max_size=300), st.sampled_from(list(KINDS)))
def test_any_bytes_are_read_or_refused_with_the_device_named(body: bytes, name: str) -> None:
    refusal = None
    try:
        decode(DevicePayload("disk-7", name, KINDS[name].newest, body))
    except PayloadError as error:
        refusal = error

    if refusal is not None:
        assert refusal.code in {"payload_body", "payload_value"}
        assert "disk-7" in refusal.text
        assert refusal.details == {"device": "disk-7", "kind": name, "version": KINDS[name].newest}


UART = kinds.Uart16550V2(1, 2, 3, 0x61, 5, 6, 7, 8, 9, True, b"in", b"out", b"")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"line_ctrl": 256}, "line_ctrl: is 256, allowed is an integer from 0 to 255"),
        ({"line_ctrl": True}, "line_ctrl: is True"),
        ({"intr_enable": 0x10}, "intr_enable: is 16, which has unknown bits; allowed are those of 0xf"),
        ({"intr_enable": -1}, "intr_enable: is -1, which has unknown bits"),
        ({"thre_state": 1}, "thre_state: is 1, allowed is true or false"),
        ({"rx_fifo": bytes(17)}, "rx_fifo: is bytes of length 17, allowed are 0 to 16 bytes"),
        ({"rx_fifo": "text"}, "rx_fifo: is str of length 4"),
        ({"colour": 1}, "colour: unknown field"),
        ({"scratch": None}, "scratch: is None"),
    ],
)
def test_a_field_out_of_range_is_named_with_what_is_allowed(change: dict[str, Any], says: str) -> None:
    tree = {**msgpack.unpackb(encode("com1", "uart-16550", UART).body), **change}

    with pytest.raises(PayloadError, match="device com1, payload uart-16550 version 2") as caught:
        decode(DevicePayload("com1", "uart-16550", 2, msgpack.packb(tree)))

    assert says in caught.value.text


def test_all_faulty_fields_are_reported_at_once_and_no_contents_are_shown() -> None:
    tree = msgpack.unpackb(encode("com1", "uart-16550", UART).body)
    del tree["div_low"]
    tree |= {"line_ctrl": -1, "rx_fifo": b"secret-secret-secret"}

    with pytest.raises(PayloadError) as caught:
        decode(DevicePayload("com1", "uart-16550", 2, msgpack.packb(tree)))

    assert all(part in caught.value.text for part in ("div_low: missing", "line_ctrl: is -1", "rx_fifo: is bytes"))
    assert "secret" not in caught.value.text


def test_nested_faults_have_a_path() -> None:
    bar = kinds.PciBar("Empty", 0, 0)
    state = kinds.PciDeviceV1(0, 0, (bar,) * 6, None)
    tree = msgpack.unpackb(encode("disk", "pci-device", state).body)
    tree["bars"][4]["kind"] = "Tape"

    with pytest.raises(PayloadError, match=r"bars\[4\]\.kind: is str of length 4, allowed is one of Empty, Pio"):
        decode(DevicePayload("disk", "pci-device", 1, msgpack.packb(tree)))


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (DevicePayload("d", "no-such-kind", 1, b""), "payload_kind"),
        (DevicePayload("d", "qemu-fwcfg", 1, b""), "payload_version"),
        (DevicePayload("d", "bhyve-rtc", 3, b""), "payload_version"),
        (DevicePayload("d", "bhyve-rtc", 0, b""), "payload_version"),
        (DevicePayload("d", "bhyve-rtc", 2, bytes(300_000)), "payload_too_large"),
        (DevicePayload("d", "bhyve-rtc", 2, b"\x01"), "payload_body"),
    ],
)
def test_a_payload_that_cannot_be_read_has_its_own_code(payload: DevicePayload, code: str) -> None:
    with pytest.raises(PayloadError) as caught:
        decode(payload)

    assert caught.value.code == code


@dataclass(frozen=True, slots=True)
class LampV1:
    brightness: U8


@dataclass(frozen=True, slots=True)
class LampV2:
    brightness: U8
    hue: U8


def _lamp_to_v1(lamp: LampV2) -> LampV1:
    return LampV1(lamp.brightness)


LAMP = Kind("lamp", {1: LampV1, 2: LampV2}, up={1: lambda old: LampV2(old.brightness, 0)}, down={2: _lamp_to_v1})


def test_an_older_version_is_written_exactly_or_refused_and_read_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "KINDS", {"lamp": LAMP})

    written = encode("l", "lamp", LampV2(5, 0), version=1)

    assert msgpack.unpackb(written.body) == {"brightness": 5}
    assert decode(written) == LampV2(5, 0)
    with pytest.raises(PayloadError, match="device l, payload lamp version 1: cannot say hue") as caught:
        encode("l", "lamp", LampV2(5, 9), version=1)
    assert caught.value.code == "payload_lossy"
    assert registry.exact_versions("lamp", LampV2(5, 9)) == (2,)
    assert registry.exact_versions("lamp", LampV2(5, 0)) == (2, 1)
    with pytest.raises(PayloadError, match="can write only 2, 1"):
        encode("l", "lamp", LampV2(5, 9), version=3)


def test_a_version_without_its_conversions_is_found_when_the_registry_is_made() -> None:
    with pytest.raises(TypeError, match="conversion each way"):
        Kind("lamp", {1: LampV1, 2: LampV2}, up=LAMP.up)
    with pytest.raises(TypeError, match="begin before 1"):
        Kind("lamp", {0: LampV1})
    with pytest.raises(TypeError, match="gap"):
        Kind("lamp", {1: LampV1, 3: LampV2}, up=LAMP.up, down={3: _lamp_to_v1})


def test_a_changed_shape_changes_the_schema_hash() -> None:
    changed = replace(LAMP, shapes={1: LampV1, 2: LampV1})

    assert LAMP.schema_hash(1) == changed.schema_hash(1)
    assert LAMP.schema_hash(2) != changed.schema_hash(2)
