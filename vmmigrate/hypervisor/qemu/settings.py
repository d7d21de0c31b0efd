"""How this host runs QEMU: what its operator says, and what the QEMU at hand can do."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vmmigrate.hypervisor.qemu.cpuid import available_features

OLDEST_VERSION: Final = (7, 2)


@dataclass(frozen=True)
class QemuSettings:
    """What the operator says.

    Attributes:
        accelerator: "tcg" or "kvm".
        machine_type: Of guests that begin here, so that hosts with an older QEMU can take them; empty: the newest.
        cpu_model: Of guests whose spec says nothing about CPUID.
        network: "tap": a NIC is the tap interface of the host that has its backend's name; "user": QEMU's own network
            behind an address translation, for tests and demonstrations; "none": nothing, of a machine that is only made
            to be looked at.
        regions: NBD addresses by the id of the Crucible volume that is served there.
        kernels: Directories in which kernels and initial RAM disks of guests may lie, links resolved.
        monitors: Directories in which the monitors of QEMUs that may be adopted lie, links resolved.
        use_tracker: False: guests are started without it, and move by QEMU's own stream.
        trust_tcg_stream: Also where QEMU is known to lose writes (`pagestream.loses_writes`).
    """

    binary: str = "qemu-system-x86_64"
    accelerator: str = "tcg"
    machine_type: str = ""
    cpu_model: str = "qemu64"
    network: str = "tap"
    regions: Mapping[str, str] = field(default_factory=dict)
    kernels: Sequence[Path] = ()
    monitors: Sequence[Path] = ()
    use_tracker: bool = True
    trust_tcg_stream: bool = False


@dataclass(frozen=True)
class QemuFacts:
    """What the QEMU at hand told when it was asked.

    Attributes:
        machine_types: Versioned pc machine types, the newest last.
        cpu_models: Names for `-cpu` of models that the accelerator can show whole.
        features: Properties of processors that the accelerator can show.
        drivers: Block drivers.
        has_sandbox: It was built with seccomp.
        outlives_bad_state: It can be told not to end when it cannot load a state, and says why (9.1 and later).
    """

    version: tuple[int, int, int]
    machine_types: Sequence[str]
    cpu_models: Sequence[str]
    features: frozenset[str]
    drivers: frozenset[str]
    has_sandbox: bool
    outlives_bad_state: bool = False

    @property
    def version_text(self) -> str:
        return version_text(self.version)


def read_version(answer: Mapping[str, Any]) -> tuple[int, int, int]:
    """From the answer to `query-version`. Raises: KeyError, TypeError: it is none."""
    version = answer["qemu"]
    major, minor, micro = (operator.index(version[word]) for word in ("major", "minor", "micro"))
    return major, minor, micro


def version_text(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))


def read_facts(answers: Mapping[str, Any], *, has_sandbox: bool) -> QemuFacts:
    """Facts from the answers of QMP commands, by command."""
    names = [machine["name"] for machine in answers["query-machines"]]
    machines = sorted((name for name in names if _pc_version(name)), key=_pc_version)
    expanded = answers["query-cpu-model-expansion"]["model"]["props"]
    schema = answers["query-qmp-schema"]
    enumerations: list[list[str]] = [entry.get("values", []) for entry in schema]
    drivers = next((values for values in enumerations if {"raw", "qcow2"} <= set(values)), [])
    return QemuFacts(
        version=read_version(answers["query-version"]),
        machine_types=[name for name in machines if _pc_version(name) >= OLDEST_VERSION],
        cpu_models=[m["name"] for m in answers["query-cpu-definitions"] if not m.get("unavailable-features")],
        features=available_features(expanded),
        drivers=frozenset(drivers),
        has_sandbox=has_sandbox,
        outlives_bad_state="exit-on-error" in _arguments_of("migrate-incoming", schema),
    )


def _arguments_of(command: str, schema: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of the arguments that *command* takes; types have no names but numbers there."""
    kinds = [entry["arg-type"] for entry in schema if entry["meta-type"] == "command" and entry["name"] == command]
    members = (entry.get("members", ()) for entry in schema if entry["name"] in kinds)
    return {member["name"] for listed in members for member in listed}


def _pc_version(machine_type: str) -> tuple[int, ...]:
    """(7, 2) of pc-i440fx-7.2; empty for everything else."""
    prefix, _, version = machine_type.rpartition("-")
    parts = version.split(".")
    return tuple(map(int, parts)) if prefix == "pc-i440fx" and all(part.isdecimal() for part in parts) else ()
