"""QEMU's state leaves as payloads and comes together again as it was; what is faulty in a list is refused by name."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hypervisor.test_qemu_stream import (
    BEGIN,
    LABELS,
    NAMES,
    RAM,
    SOON_S,
    Device,
    composed,
    described,
    devices_,
    recorded,
    sections,
    tail_of,
)
from vmmigrate.devices import registry
from vmmigrate.devices.kinds import InMemoryBlockBackendV1
from vmmigrate.devices.payload import MAX_PAYLOADS, DevicePayload
from vmmigrate.errors import PayloadError
from vmmigrate.hypervisor.qemu.payloads import (
    BLOB_KIND,
    DEVICE_KIND,
    FRAME_KIND,
    HEAD,
    TAIL,
    describe,
    from_stream,
    to_stream,
)
from vmmigrate.hypervisor.qemu.stream import parse_stream

BLOBS = {"cloud-init": b"contents" * 512, "empty": b""}
THREE = (Device("apic"), Device("hpet", body=b"other state"), Device("apic", instance=1))
Payloads = list[DevicePayload]


def exported(stream: bytes | None = None, blobs: dict[str, bytes] | None = None) -> Payloads:
    """What a source exports, of a machine with three devices and two blobs if nothing else is said."""
    return list(from_stream(parse_stream(stream or composed(THREE)), BLOBS if blobs is None else blobs))


def refusal(payloads: Sequence[DevicePayload], blobs: Sequence[str] = tuple(BLOBS)) -> PayloadError:
    began = time.thread_time()
    with pytest.raises(PayloadError) as caught:
        to_stream(payloads, blobs)
    assert time.thread_time() - began < SOON_S
    return caught.value


def problems_of(error: PayloadError) -> set[tuple[str, str]]:
    """Code and device of each."""
    return {(problem["code"], problem["device"]) for problem in error.details["problems"]}


def amended(name: str, kind: str = DEVICE_KIND, **fields: Any) -> Payloads:
    """The export, with one payload that is otherwise."""
    return [replace(p, **fields) if (p.instance_name, p.kind) == (name, kind) else p for p in exported()]


def with_tail(body: bytes) -> Payloads:
    return amended(TAIL, FRAME_KIND, body=body)


def without(name: str) -> Payloads:
    return [payload for payload in exported() if payload.instance_name != name]


# ---- there and back


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_stream_comes_back_byte_for_byte(name: str) -> None:
    payloads = exported(recorded(name))

    stream, blobs, skipped = to_stream(payloads, list(BLOBS))

    assert stream == parse_stream(recorded(name))
    assert stream.joined() == recorded(name)
    assert (blobs, skipped) == (BLOBS, ())


@given(devices=devices_, blobs=st.dictionaries(st.text(max_size=8), st.binary(max_size=64), max_size=3))
def test_whatever_is_exported_comes_back(devices: list[Device], blobs: dict[str, bytes]) -> None:
    stream, contents, skipped = to_stream(exported(composed(devices), blobs), list(blobs))

    assert (stream.joined(), contents, skipped) == (composed(devices), blobs, ())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_described_is_what_is_exported(name: str) -> None:
    told = describe(LABELS[name], list(BLOBS))

    payloads = exported(recorded(name))
    assert [(d.instance_name, d.kind) for d in told] == [(p.instance_name, p.kind) for p in payloads]
    assert all(p.version in d.versions and not p.optional for d, p in zip(told, payloads, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_payload_of_a_recorded_stream_has_a_name_of_its_own(name: str) -> None:
    keys = [(payload.instance_name, payload.kind) for payload in exported(recorded(name))]

    assert len(set(keys)) == len(keys)


@given(order=st.permutations(range(7)))
def test_payloads_may_come_in_any_order(order: list[int]) -> None:
    """The end tells the order of the devices; the wire promises none."""
    payloads = exported()

    stream, blobs, _ = to_stream([payloads[n] for n in order], list(BLOBS))

    assert (stream.joined(), blobs) == (composed(THREE), BLOBS)


def test_a_blob_may_have_the_name_of_a_device() -> None:
    blobs = {"apic": b"1", HEAD: b"2", TAIL: b"3"}

    stream, contents, _ = to_stream(exported(blobs=blobs), list(blobs))

    assert (stream.joined(), contents) == (composed(THREE), blobs)


def test_an_optional_payload_that_nobody_knows_is_skipped_and_told() -> None:
    strange = DevicePayload("apic", "qemu/unheard-of", 1, b"", optional=True)

    stream, _, skipped = to_stream([*exported(), strange], list(BLOBS))

    assert stream.joined() == composed(THREE)
    assert skipped == (("apic", "qemu/unheard-of"),)


# ---- lists that are not what they should be


@pytest.mark.parametrize("name", [HEAD, "apic", "hpet", "apic#1", "cloud-init", "empty"])
def test_a_missing_payload_is_named(name: str) -> None:
    error = refusal(without(name))

    assert error.code == "payload_missing"
    assert problems_of(error) == {("payload_missing", name)}
    assert name in error.text


def test_a_missing_end_is_named_and_no_device_is_blamed_for_it() -> None:
    error = refusal(without(TAIL))

    assert problems_of(error) == {("payload_missing", TAIL)}
    assert error.code == "payload_missing"


@pytest.mark.parametrize("name", [HEAD, TAIL, "apic", "apic#1", "cloud-init"])
def test_a_payload_that_is_there_twice_is_named(name: str) -> None:
    again = next(payload for payload in exported() if payload.instance_name == name)

    error = refusal([*exported(), again])

    assert problems_of(error) == {("payload_duplicate", name)}
    assert error.code == "payload_duplicate"
    assert name in error.text


def test_two_ends_that_differ_are_refused() -> None:
    """Neither of them is believed."""
    other = DevicePayload(TAIL, FRAME_KIND, 1, tail_of(described([])))

    for payloads in ([*exported(), other], [other, *exported()]):
        assert ("payload_duplicate", TAIL) in problems_of(refusal(payloads))


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (DevicePayload("vga", DEVICE_KIND, 1, b""), "payload_unconsumed"),
        (DevicePayload("vga", FRAME_KIND, 1, b""), "payload_unconsumed"),
        (DevicePayload("apic", FRAME_KIND, 1, b""), "payload_unconsumed"),
        (DevicePayload(HEAD, DEVICE_KIND, 1, b""), "payload_unconsumed"),
        (DevicePayload("apic", "bhyve/vmstate", 1, b""), "payload_unconsumed"),
        (DevicePayload("apic", "nonsense", 1, b""), "payload_kind"),
        (registry.encode("disk-9", BLOB_KIND, InMemoryBlockBackendV1(b"")), "payload_unconsumed"),
    ],
    ids=lambda value: f"{value.instance_name} {value.kind}" if isinstance(value, DevicePayload) else "",
)
def test_a_payload_that_nobody_takes_is_named(payload: DevicePayload, code: str) -> None:
    error = refusal([*exported(), payload])

    assert problems_of(error) == {(code, payload.instance_name)}
    assert error.code == code


@pytest.mark.parametrize("version", [0, 2, 255])
@pytest.mark.parametrize(
    ("name", "kind"), [("apic", DEVICE_KIND), (HEAD, FRAME_KIND), (TAIL, FRAME_KIND), ("cloud-init", BLOB_KIND)]
)
@pytest.mark.parametrize("optional", [False, True], ids=["needed", "optional"])
def test_a_version_that_is_not_read_is_named(name: str, kind: str, version: int, optional: bool) -> None:
    """Even if the peer says that it could do without: we could not."""
    error = refusal(amended(name, kind, version=version, optional=optional))

    assert error.code in {"payload_version", "payload_missing"}
    assert name in error.text


def test_all_that_is_wrong_is_told_at_once() -> None:
    payloads = [payload for payload in exported() if payload.instance_name not in {"hpet", "cloud-init"}]

    error = refusal([*payloads, DevicePayload("vga", DEVICE_KIND, 1, b"")])

    assert problems_of(error) == {
        ("payload_missing", "hpet"),
        ("payload_missing", "cloud-init"),
        ("payload_unconsumed", "vga"),
    }
    assert error.code == "device_payload"


def test_more_payloads_than_a_guest_has_are_refused() -> None:
    many = [DevicePayload(f"vga#{n}", DEVICE_KIND, 1, b"") for n in range(MAX_PAYLOADS)]

    assert refusal([*exported(), *many]).code == "payload_count"


def test_no_payloads_at_all_are_refused() -> None:
    assert problems_of(refusal([], [])) == {("payload_missing", HEAD), ("payload_missing", TAIL)}


# ---- bodies that are not what they should be


@pytest.mark.parametrize("name", ["apic", "hpet", "apic#1"])
@pytest.mark.parametrize(
    "change",
    [lambda body: body[:-1], lambda body: body[1:], lambda body: b"", lambda body: body + b"\0"],
    ids=["without its last byte", "without its first byte", "empty", "longer"],
)
def test_torn_state_of_a_device_is_refused_and_named(name: str, change: Callable[[bytes], bytes]) -> None:
    body = next(payload.body for payload in exported() if payload.instance_name == name)

    error = refusal(amended(name, body=change(body)))

    assert error.code == "payload_body"
    assert f"device {name}" in error.text


def test_state_that_stands_under_the_name_of_another_device_is_refused() -> None:
    bodies = {payload.instance_name: payload.body for payload in exported()}

    swapped = [
        replace(
            payload, body=bodies[{"apic": "hpet", "hpet": "apic"}.get(payload.instance_name, payload.instance_name)]
        )
        for payload in exported()
    ]

    assert refusal(swapped).code == "payload_body"


@pytest.mark.parametrize(("one", "next_"), [(HEAD, "apic"), ("apic", "hpet"), ("hpet", "apic#1"), ("apic#1", TAIL)])
@pytest.mark.parametrize("by", [-3, -1, 1, 3])
def test_a_seam_that_is_elsewhere_is_refused_even_if_the_whole_is_right(one: str, next_: str, by: int) -> None:
    """What a payload says of a device must be the state of that device, and nothing beside."""
    bodies = {payload.instance_name: payload.body for payload in exported()}
    joined, seam = bodies[one] + bodies[next_], len(bodies[one]) + by
    moved = {one: joined[:seam], next_: joined[seam:]}

    error = refusal([replace(p, body=moved.get(p.instance_name, p.body)) for p in exported()])

    assert error.code == "payload_body"


def test_a_head_without_its_header_is_refused_and_named() -> None:
    error = refusal(amended(HEAD, FRAME_KIND, body=RAM))

    assert (error.code, error.details["device"]) == ("payload_body", HEAD)


def test_a_head_that_holds_a_device_is_refused() -> None:
    body = BEGIN + RAM + sections([Device("vga")])[0]

    assert refusal(amended(HEAD, FRAME_KIND, body=body)).code == "payload_body"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00\x06",
        b"\x00\x06\x00\x00\x00\x02{}",
        tail_of([]),
        tail_of(None),
        tail_of({"devices": None}),
        tail_of({"devices": {}}),
        tail_of({"devices": {"name": 1}}),
        tail_of({"devices": 5}),
        tail_of({"devices": "apic"}),
        tail_of({"devices": [None]}),
        tail_of({"devices": [[]]}),
        tail_of({"devices": [{}]}),
        tail_of({"devices": [{"name": "apic"}]}),
        tail_of(b'{"devices": ['),
        tail_of(b'{"devices": [], \xff}'),
        tail_of('{"devices": []}'.encode("utf-16")),
        tail_of('{"devices": []}'.encode("utf-32-be")),
        tail_of(b"\xef\xbb\xbf" + b'{"devices": []}'),
        tail_of(b'{"devices": [' + b"9" * 5000 + b"]}"),
        tail_of(b'{"devices": [' + b"[" * 200_000 + b"]" * 200_000 + b"]}"),
        tail_of(described(THREE))[:-1],
        tail_of(described(THREE)) + b" ",
        b"\x00\x07" + tail_of(described(THREE))[2:],
        b"\x00" * 6 + tail_of(described(THREE))[6:],
    ],
    ids=lambda body: repr(body[:30]),
)
def test_an_end_that_is_no_description_is_refused(body: bytes) -> None:
    error = refusal(with_tail(body))

    assert error.code in {"payload_body", "payload_unconsumed", "device_payload"}


@pytest.mark.parametrize(
    "number",
    [b"Infinity", b"-Infinity", b"NaN", b"1e400", b"-1", b"4294967296", b"true", b"null", b'"0"', b"0.5", b"[]"],
)
def test_an_end_with_an_impossible_instance_is_refused(number: bytes) -> None:
    entry = b'{"name": "apic", "instance_id": %b, "version": 1}' % number

    error = refusal(with_tail(tail_of(b'{"devices": [%b]}' % entry)))

    assert error.code in {"payload_body", "payload_unconsumed", "device_payload"}


def test_an_end_that_lists_a_device_twice_is_refused_and_the_device_named() -> None:
    """One payload would be loaded twice: what was sent is not what would be done."""
    twice = [THREE[0], *THREE]

    error = refusal(with_tail(tail_of(described(twice))))

    assert "apic" in error.text


def test_an_end_that_lists_very_many_devices_is_refused_soon_and_in_few_words() -> None:
    """The error crosses the wire."""
    entry = Device("vga").entry()
    payloads = with_tail(tail_of({"devices": [{**entry, "instance_id": n} for n in range(100_000)]}))
    strangers = [DevicePayload(f"stranger-{n}", DEVICE_KIND, 1, b"") for n in range(200)]

    error = refusal([*payloads, *strangers])

    assert len(json.dumps(error.as_dict())) < 1 << 20


def test_an_end_that_leaves_out_a_device_leaves_its_payload_to_nobody() -> None:
    error = refusal(with_tail(tail_of(described(THREE[:2]))))

    assert problems_of(error) == {("payload_unconsumed", "apic#1")}


def test_devices_are_joined_in_the_order_that_the_end_tells() -> None:
    stream, _, _ = to_stream(with_tail(tail_of(described(THREE[::-1]))), list(BLOBS))

    assert [device.raw for device in stream.devices] == sections(THREE)[::-1]


values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just("apic"))
entries = st.one_of(
    values, st.lists(values, max_size=2), st.dictionaries(st.sampled_from(["name", "instance_id", "version"]), values)
)


@given(listed=st.one_of(st.lists(entries, max_size=4), entries))
def test_an_end_that_lists_anything_is_refused_or_true(listed: Any) -> None:
    payloads = with_tail(tail_of({"devices": listed}))

    try:
        stream, _, _ = to_stream(payloads, list(BLOBS))
    except PayloadError:
        return
    assert [device.raw for device in stream.devices] == sections(THREE)


@st.composite
def lists_with_faults(draw: st.DrawFn) -> Payloads:
    payloads = exported()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(payloads) - 1))
        one, other = payloads[at], draw(st.sampled_from(exported()))
        cut = draw(st.integers(0, len(one.body)))
        payloads[at : at + 1] = draw(
            st.sampled_from(
                [
                    [],
                    [one, one],
                    [other, one],
                    [replace(one, instance_name=other.instance_name)],
                    [replace(one, kind=other.kind)],
                    [replace(one, version=one.version + 1)],
                    [replace(one, optional=True)],
                    [replace(one, body=other.body)],
                    [replace(one, body=one.body[:cut])],
                    [replace(one, body=one.body[:cut] + draw(st.binary(max_size=4)) + one.body[cut:])],
                ]
            )
        )
        if not payloads:
            break
    return payloads


@given(payloads=lists_with_faults())
def test_a_list_with_faults_is_refused_or_comes_back_as_it_is(payloads: Payloads) -> None:
    """Nothing that was sent is lost unsaid, and nothing is taken from elsewhere."""
    try:
        stream, blobs, skipped = to_stream(payloads, list(BLOBS))
    except PayloadError:
        return

    sent = {(p.instance_name, p.kind): p.body for p in payloads if (p.instance_name, p.kind) not in skipped}
    assert (stream.head, stream.tail) == (sent.pop((HEAD, FRAME_KIND)), sent.pop((TAIL, FRAME_KIND)))
    for name, contents in blobs.items():
        body = registry.encode(name, BLOB_KIND, InMemoryBlockBackendV1(contents)).body
        assert sent.pop((name, BLOB_KIND)) == body
    assert {(device.label, DEVICE_KIND): device.raw for device in stream.devices} == sent


# ---- blobs


@pytest.mark.parametrize("body", [b"", b"\x80", b"\x81\xa5bytes\xa1x", b"\xc1", b"\x81\xa5bytes\xc4\xff", b"\x93" * 9])
def test_a_blob_whose_payload_is_none_is_refused_and_named(body: bytes) -> None:
    error = refusal(amended("cloud-init", BLOB_KIND, body=body))

    assert (error.code, problems_of(error)) == ("payload_body", {("payload_body", "cloud-init")})


def test_the_contents_of_a_blob_are_no_part_of_a_refusal() -> None:
    secret = b"secret" * 8
    payloads = [payload for payload in exported(blobs={"cloud-init": secret}) if payload.instance_name != "apic"]

    error = refusal(payloads, ["cloud-init"])

    assert "secret" not in json.dumps(error.as_dict())
