"""The frozen documents and corpora, and strategies that make specs."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from vmmigrate.spec import chain, latest
from vmmigrate.spec.decode import (
    BoolCodec,
    Bytes,
    Codec,
    Enumeration,
    Integer,
    KeyCodec,
    KeyedMap,
    ListOf,
    Nullable,
    SetOf,
    StructCodec,
    Tagged,
    UuidCodec,
)
from vmmigrate.spec.keys import SpecKey, in_key_order, spec_key

FIXTURES = Path(__file__).parents[2] / "fixtures" / "specs"
SCHEMAS = Path(__file__).parents[2] / "vmmigrate" / "spec" / "schemas"
VERSIONS = chain.CHAIN.names

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""For laws: the machine that runs them may be busy."""


def rows(name: str) -> Iterator[dict[str, Any]]:
    """The rows of one conformance corpus."""
    with (FIXTURES / "conformance" / f"{name}.jsonl").open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            yield json.loads(line)


def documents() -> list[tuple[str, Path]]:
    """Every frozen document with its version: those that real types wrote, and the full one."""
    full = [(version, SCHEMAS / f"{version}.full.json") for version in VERSIONS]
    return full + [(version, path) for version in VERSIONS for path in sorted((FIXTURES / version).glob("*.json"))]


@cache
def deviations() -> Sequence[dict[str, Any]]:
    return tomllib.loads((FIXTURES / "deviations.toml").read_text())["deviation"]


def deviation_for(code: str, message: str) -> str | None:
    """The rule under which a refusal of something that the real types accept is meant."""
    for rule in deviations():
        if re.fullmatch(rule["code"], code) and re.search(rule["pattern"], message):
            return rule["rule"]
    return None


# ---- strategies, made from the field tables: what a new version adds is drawn without a word here

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
UUIDS = st.uuids().map(str)
KEYS = (UUIDS | TEXT).map(spec_key)


@cache
def values_of(codec: Codec) -> st.SearchStrategy[Any]:
    """Any value that the codec reads and writes."""
    match codec:
        case BoolCodec():
            return st.booleans()
        case Integer():
            return st.integers(codec.minimum, codec.maximum)
        case KeyCodec():
            return KEYS
        case UuidCodec():
            return UUIDS
        case Enumeration():
            return st.sampled_from(list(codec.type))
        case Bytes():
            return st.binary(min_size=codec.length, max_size=codec.length)
        case Nullable():
            return st.none() | values_of(codec.item)
        case SetOf():
            return st.sets(values_of(codec.item)).map(lambda values: tuple(sorted(values)))
        case ListOf():
            return st.lists(values_of(codec.item), max_size=3).map(tuple)
        case KeyedMap():
            return st.dictionaries(KEYS, values_of(codec.item), max_size=6).map(in_key_order)
        case Tagged():
            return st.one_of([values_of(model.table) for model in codec.variants.values()])
        case StructCodec():
            return st.builds(codec.model, **{field.name: values_of(field.codec) for field in codec.fields})
        case _:
            return TEXT


def specs(version: str = chain.LATEST) -> st.SearchStrategy[Any]:
    """Any document of the version, whether or not it describes a machine."""
    return values_of(chain.CHAIN.version(version).model.table)


BACKENDS = st.one_of(
    values_of(latest.CrucibleStorageBackend.table),
    values_of(latest.FileStorageBackend.table),
    values_of(latest.BlobStorageBackend.table),
)
DISKS = values_of(latest.VirtioDisk.table) | values_of(latest.NvmeDisk.table)


def _with_sound_cpuid(board: latest.Board) -> latest.Board:
    """Leaves that the builder accepts, in the order in which it writes them."""
    if board.cpuid is None:
        return board
    entries = {(entry.leaf & 0x8000_FFFF, None): entry for entry in board.cpuid.entries}
    sound = tuple(entries[at].model_copy(update={"leaf": at[0], "subleaf": None}) for at in sorted(entries))
    return board.model_copy(update={"cpuid": board.cpuid.model_copy(update={"entries": sound})})


@st.composite
def machines(draw: st.DrawFn) -> latest.InstanceSpec:
    """A document that describes one machine: devices with backends of their own, PCI paths that nobody else has."""
    paths = iter(draw(st.lists(values_of(latest.PciPath.table), min_size=8, max_size=8, unique=True)))
    parts: dict[SpecKey, latest.Component] = {}

    def add(key: str, made: st.SearchStrategy[Any], **fixed: Any) -> None:
        parts[spec_key(key)] = draw(made).model_copy(update=fixed)

    disks = draw(st.integers(0, 3))
    for index in range(disks):
        add(f"disk{index}-be", BACKENDS)
        add(f"disk{index}", DISKS, backend_id=spec_key(f"disk{index}-be"), pci_path=next(paths))
    if draw(st.booleans()):
        add("nic-be", values_of(latest.VirtioNetworkBackend.table))
        add("nic", values_of(latest.VirtioNic.table), backend_id=spec_key("nic-be"), pci_path=next(paths))
    if draw(st.booleans()):
        add(draw(UUIDS), values_of(latest.VirtioSocket.table), pci_path=next(paths))
    if draw(st.booleans()):
        add("bridge", values_of(latest.PciPciBridge.table), pci_path=next(paths))
    for number in draw(st.sets(st.sampled_from(latest.SerialPortNumber))):
        parts[spec_key(number)] = latest.SerialPort(num=number)
    if draw(st.booleans()):
        order = tuple(latest.BootOrderEntry(id=spec_key(f"disk{index}")) for index in reversed(range(disks)))
        parts[spec_key("boot")] = latest.BootSettings(order=order)
    spec: latest.InstanceSpec = draw(specs())
    return spec.model_copy(update={"board": _with_sound_cpuid(spec.board), "components": in_key_order(parts)})
