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

from vmmigrate.spec import latest
from vmmigrate.spec.keys import SpecKey, in_key_order, spec_key

FIXTURES = Path(__file__).parents[2] / "fixtures" / "specs"
VERSIONS = ("v1", "v2", "v3")

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""For laws: the machine that runs them may be busy."""


def rows(name: str) -> Iterator[dict[str, Any]]:
    """The rows of one conformance corpus."""
    with (FIXTURES / "conformance" / f"{name}.jsonl").open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            yield json.loads(line)


def documents() -> list[tuple[str, Path]]:
    """Every frozen document with its version."""
    return [(version, path) for version in VERSIONS for path in sorted((FIXTURES / version).glob("*.json"))]


@cache
def deviations() -> Sequence[dict[str, Any]]:
    return tomllib.loads((FIXTURES / "deviations.toml").read_text())["deviation"]


def deviation_for(code: str, message: str) -> str | None:
    """The rule under which a refusal of something that the real types accept is meant."""
    for rule in deviations():
        if re.fullmatch(rule["code"], code) and re.search(rule["pattern"], message):
            return rule["rule"]
    return None


# ---- strategies

U8 = st.integers(0, 2**8 - 1)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
UUIDS = st.uuids().map(str)
KEYS = (UUIDS | TEXT).map(spec_key)
PATHS = st.builds(latest.PciPath, bus=U8, device=st.integers(0, 31), function=st.integers(0, 7))

BACKENDS = st.one_of(
    st.builds(latest.CrucibleStorageBackend, request_json=TEXT, readonly=st.booleans()),
    st.builds(
        latest.FileStorageBackend,
        path=TEXT,
        readonly=st.booleans(),
        block_size=U32,
        workers=st.none() | st.integers(1, 2**64 - 1),
    ),
    st.builds(latest.BlobStorageBackend, base64=TEXT, readonly=st.booleans()),
)
VIONA = st.builds(latest.VirtioNetworkBackend, vnic_name=TEXT)
SOCKETS = st.builds(latest.VirtioSocket, guest_cid=U64, pci_path=PATHS)
V1_COMPONENTS = st.one_of(
    st.builds(latest.VirtioDisk, backend_id=KEYS, pci_path=PATHS),
    st.builds(latest.NvmeDisk, backend_id=KEYS, pci_path=PATHS, serial_number=st.binary(min_size=20, max_size=20)),
    st.builds(latest.VirtioNic, backend_id=KEYS, interface_id=UUIDS, pci_path=PATHS),
    st.builds(latest.SerialPort, num=st.sampled_from(latest.SerialPortNumber)),
    st.builds(latest.PciPciBridge, downstream_bus=U8, pci_path=PATHS),
    st.builds(latest.QemuPvpanic, enable_isa=st.booleans()),
    st.builds(
        latest.BootSettings,
        order=st.lists(st.builds(latest.BootOrderEntry, id=KEYS), max_size=3).map(tuple),
    ),
    st.builds(latest.SoftNpuPciPort, pci_path=PATHS),
    st.builds(latest.SoftNpuPort, link_name=TEXT, backend_id=KEYS),
    st.builds(latest.SoftNpuP9, pci_path=PATHS),
    st.builds(latest.P9fs, source=TEXT, target=TEXT, chunk_size=U32, pci_path=PATHS),
    st.builds(latest.MigrationFailureInjector, fail_exports=U32, fail_imports=U32),
    BACKENDS,
    VIONA,
    st.builds(latest.DlpiNetworkBackend, vnic_name=TEXT),
)
CPUID_ENTRIES = st.builds(latest.CpuidEntry, leaf=U32, subleaf=st.none() | U32, eax=U32, ebx=U32, ecx=U32, edx=U32)
BOARDS = st.builds(
    latest.Board,
    cpus=U8,
    memory_mb=U64,
    chipset=st.builds(latest.I440Fx, enable_pcie=st.booleans()),
    guest_hv_interface=st.sampled_from(
        [latest.Bhyve(), latest.HyperV(features=()), latest.HyperV(features=(latest.HyperVFeature.REFERENCE_TSC,))]
    ),
    cpuid=st.none()
    | st.builds(
        latest.Cpuid,
        entries=st.lists(CPUID_ENTRIES, max_size=3).map(tuple),
        vendor=st.sampled_from(latest.CpuidVendor),
    ),
)
SMBIOS = st.builds(latest.SmbiosType1Input, manufacturer=TEXT, product_name=TEXT, serial_number=TEXT, version=U64)


def specs() -> st.SearchStrategy[latest.InstanceSpec]:
    """Any document of the newest version, whether or not it describes a machine."""
    components = st.dictionaries(KEYS, V1_COMPONENTS | SOCKETS, max_size=6).map(in_key_order)
    return st.builds(latest.InstanceSpec, board=BOARDS, components=components, smbios=st.none() | SMBIOS)


@st.composite
def machines(draw: st.DrawFn) -> latest.InstanceSpec:
    """A document that describes one machine: devices with backends of their own, PCI paths that nobody else has."""
    paths = iter(draw(st.lists(PATHS, min_size=8, max_size=8, unique=True)))
    parts: dict[SpecKey, latest.Component] = {}
    disks = draw(st.integers(0, 3))
    for index in range(disks):
        backend, key = spec_key(f"disk{index}-be"), spec_key(f"disk{index}")
        parts[backend] = draw(BACKENDS)
        if draw(st.booleans()):
            parts[key] = latest.VirtioDisk(backend_id=backend, pci_path=next(paths))
        else:
            parts[key] = latest.NvmeDisk(backend_id=backend, pci_path=next(paths), serial_number=bytes(20))
    if draw(st.booleans()):
        parts[spec_key("nic-be")] = draw(VIONA)
        parts[spec_key("nic")] = latest.VirtioNic(
            backend_id=spec_key("nic-be"), interface_id=draw(UUIDS), pci_path=next(paths)
        )
    if draw(st.booleans()):
        parts[spec_key(draw(UUIDS))] = latest.VirtioSocket(guest_cid=draw(U64), pci_path=next(paths))
    if draw(st.booleans()):
        parts[spec_key("bridge")] = latest.PciPciBridge(downstream_bus=draw(U8), pci_path=next(paths))
    for number in draw(st.sets(st.sampled_from(latest.SerialPortNumber))):
        parts[spec_key(number)] = latest.SerialPort(num=number)
    if draw(st.booleans()):
        order = tuple(latest.BootOrderEntry(id=spec_key(f"disk{index}")) for index in reversed(range(disks)))
        parts[spec_key("boot")] = latest.BootSettings(order=order)
    board = draw(BOARDS).model_copy(update={"cpuid": None})
    return latest.InstanceSpec(board=board, components=in_key_order(parts), smbios=draw(st.none() | SMBIOS))
