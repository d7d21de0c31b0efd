"""Import plan: everything that is wrong with a device list, found before anything is applied.

A destination knows which devices it built and which payload kinds each of them must get. Propolis finds a missing
device not at all and the others one by one, after the pause; here one error lists all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vmmigrate.devices import opaque, registry
from vmmigrate.devices.payload import MAX_PAYLOAD_BYTES, MAX_PAYLOADS, DevicePayload
from vmmigrate.errors import PayloadError

Key = tuple[str, str]  # instance name, kind


@dataclass(frozen=True, slots=True)
class ExpectedDevice:
    """A device of this machine: the kinds it must get, and those it can take when they come (typed or opaque).

    `check` tells what is wrong with the decoded states of this device (by kind), beyond their shapes.
    """

    instance_name: str
    kinds: tuple[str, ...]
    optional_kinds: tuple[str, ...] = ()
    check: Callable[[Mapping[str, Any]], Sequence[str]] | None = None


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """States by (instance name, kind), all of the newest version, and what was skipped because it is optional."""

    states: Mapping[Key, Any]
    skipped: tuple[Key, ...]


def check_import(devices: Sequence[ExpectedDevice], payloads: Sequence[DevicePayload]) -> ImportPlan:
    """Decode all *payloads* and match them with *devices*; pure, nothing is applied.

    Raises:
        PayloadError: With every problem in `details["problems"]`; its code is theirs when they share one
            (`payload_missing`, `payload_duplicate`, `payload_unconsumed`, `payload_kind`, `payload_version`,
            `payload_too_large`, `payload_body`, `payload_value`, `payload_count`), otherwise `device_payload`.
    """
    if len(payloads) > MAX_PAYLOADS:
        raise PayloadError(f"{len(payloads)} device payloads, allowed are {MAX_PAYLOADS}", code="payload_count")
    needed = {(d.instance_name, kind) for d in devices for kind in d.kinds}
    wanted = needed | {(d.instance_name, kind) for d in devices for kind in d.optional_kinds}
    problems = _duplicates(payloads)
    states: dict[Key, Any] = {}
    skipped: list[Key] = []
    for payload in payloads:
        key = (payload.instance_name, payload.kind)
        if key not in wanted:
            if payload.optional:
                skipped.append(key)
            else:
                problems.append(_stranger(payload, devices))
            continue
        try:
            states[key] = _state(payload)
        except PayloadError as exc:
            if payload.optional and exc.code == "payload_version" and key not in needed:
                skipped.append(key)
                continue
            problems.append(_problem(exc.code, payload.instance_name, payload.kind, exc.text))
    problems += _missing(devices, payloads) + _checked(devices, states)
    if problems:
        raise _all_at_once(problems)
    return ImportPlan(states, tuple(skipped))


def _state(payload: DevicePayload) -> Any:
    """The decoded state; of an opaque payload its bytes, which only its hypervisor reads.

    Raises: PayloadError: what `registry.decode` raises.
    """
    if opaque.owner_of(payload.kind) is None:
        return registry.decode(payload)
    if len(payload.body) > MAX_PAYLOAD_BYTES:
        text = f"device {payload.instance_name}, payload {payload.kind}: {len(payload.body)} bytes"
        raise PayloadError(f"{text}, allowed are {MAX_PAYLOAD_BYTES}", code="payload_too_large")
    return payload.body


def _duplicates(payloads: Sequence[DevicePayload]) -> list[dict[str, str]]:
    counts = Counter((p.instance_name, p.kind) for p in payloads)
    return [
        _problem("payload_duplicate", device, kind, f"device {device}: {count} payloads of kind {kind}, allowed is one")
        for (device, kind), count in counts.items()
        if count > 1
    ]


def _stranger(payload: DevicePayload, devices: Sequence[ExpectedDevice]) -> dict[str, str]:
    device, kind = payload.instance_name, payload.kind
    if kind not in registry.KINDS and opaque.owner_of(kind) is None:
        return _problem("payload_kind", device, kind, f"device {device}: unknown kind {kind}, and it is not optional")
    if all(device != expected.instance_name for expected in devices):
        return _problem("payload_unconsumed", device, kind, f"device {device}: this machine has no such device")
    return _problem("payload_unconsumed", device, kind, f"device {device}: nothing here takes a payload of kind {kind}")


def _missing(devices: Sequence[ExpectedDevice], payloads: Sequence[DevicePayload]) -> list[dict[str, str]]:
    present = {(p.instance_name, p.kind) for p in payloads}
    return [
        _problem("payload_missing", d.instance_name, kind, f"device {d.instance_name}: no payload of kind {kind}")
        for d in devices
        for kind in d.kinds
        if (d.instance_name, kind) not in present
    ]


def _checked(devices: Sequence[ExpectedDevice], states: Mapping[Key, Any]) -> list[dict[str, str]]:
    problems: list[dict[str, str]] = []
    for device in devices:
        own = {kind: state for (name, kind), state in states.items() if name == device.instance_name}
        if device.check is None or not set(device.kinds) <= set(own):
            continue
        name = device.instance_name
        problems += [_problem("payload_value", name, "", f"device {name}: {text}") for text in device.check(own)]
    return problems


def _problem(code: str, device: str, kind: str, text: str) -> dict[str, str]:
    return {"code": code, "device": device, "kind": kind, "message": text}


def _all_at_once(problems: Sequence[Mapping[str, str]]) -> PayloadError:
    codes = {problem["code"] for problem in problems}
    text = "; ".join(problem["message"] for problem in problems[:20])
    if len(problems) > 20:
        text += f"; and {len(problems) - 20} more"
    code = codes.pop() if len(codes) == 1 else None
    return PayloadError(text, code=code, details={"problems": [dict(problem) for problem in problems]})
