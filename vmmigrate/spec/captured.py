"""Messages of captured streams of Propolis' migration protocol, version 0: RON on the wire, JSON in tools."""

from __future__ import annotations

from typing import Any, Final

from vmmigrate.spec import ron, v1
from vmmigrate.spec.decode import Codec
from vmmigrate.spec.wire_v0 import DEVICES, ERROR, Preamble

SPEC: Final = "spec"
_PREAMBLE: Final = Preamble.table
_CODECS: Final[dict[str, Codec]] = {
    "preamble": _PREAMBLE,
    SPEC: v1.InstanceSpec.table,
    "error": ERROR,
    "devices": DEVICES,
}

KINDS: Final = tuple(_CODECS)
"""What a message can be. As `spec` the RON is a preamble, too, and the JSON only the v1 spec in it."""


def codec_of(kind: str) -> Codec:
    """What reads and writes the JSON form."""
    return _CODECS[kind]


def from_ron(text: str | bytes, kind: str) -> Any:
    """The message's JSON form. Raises: SpecParseError."""
    if kind == SPEC:
        preamble: Preamble = ron.read(_PREAMBLE, text)
        return codec_of(kind).write(preamble.instance_spec.spec)
    return codec_of(kind).write(ron.read(codec_of(kind), text))


def to_ron(value: Any, kind: str) -> str:
    """The message as it stands on the wire; *value* is what `codec_of(kind)` read."""
    if kind == SPEC:
        return ron.write(_PREAMBLE, Preamble.of(value))
    return ron.write(codec_of(kind), value)
