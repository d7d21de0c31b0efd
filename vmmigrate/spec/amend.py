"""Amend: put the destination's own backends in the place of the source's.

Replaceable are only kinds without guest-visible state: Crucible storage backends, viona network backends, and the
failure injector of test builds. A replacement overwrites the whole component. Every fault is reported at once:
unknown ids, wrong kinds, backends that were neither replaced nor kept on purpose, volumes that are not the same
volume, and a result that describes no machine.

The reference implementation stops at the first fault and compares no volumes; an unreplaced backend there silently
reuses the source's generation, which lets two hosts fight over one disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Final, TypeAlias, cast

from vmmigrate.errors import SpecAmendError, SpecBuildError, SpecParseError
from vmmigrate.spec import chain
from vmmigrate.spec.build import FAILURE_INJECTION, build
from vmmigrate.spec.chain import AnySpec
from vmmigrate.spec.decode import KeyedMap, Tagged
from vmmigrate.spec.keys import SpecKey, in_key_order
from vmmigrate.spec.latest import (
    Component,
    CrucibleStorageBackend,
    InstanceSpec,
    MigrationFailureInjector,
    VirtioNetworkBackend,
)
from vmmigrate.spec.reading import read_text
from vmmigrate.spec.volume import VolumeRequest, differences, parse_volume

Replacement: TypeAlias = MigrationFailureInjector | CrucibleStorageBackend | VirtioNetworkBackend

REPLACEMENT: Final = Tagged(
    "component",
    "spec",
    MigrationFailureInjector,
    CrucibleStorageBackend,
    VirtioNetworkBackend,
    name_of=lambda variant: variant.__name__,
)
REPLACEMENTS: Final = KeyedMap(REPLACEMENT)

KEEP_ALL: Final = "*"

_KIND_TEXTS: Final[dict[type[Component], str]] = {
    MigrationFailureInjector: "migration failure injector",
    CrucibleStorageBackend: "crucible backend",
    VirtioNetworkBackend: "viona backend",
}
_MUST_BE_REPLACED: Final = (CrucibleStorageBackend, VirtioNetworkBackend)


@dataclass(frozen=True, slots=True)
class AmendFault:
    """One reason against the amendment; `component` is None when it lies in no single one."""

    code: str
    component: SpecKey | None
    message: str


@dataclass(frozen=True, slots=True)
class Allowances:
    """What the operator allows. `allow_volume_change` switches off every check on volumes, their JSON included."""

    keep: frozenset[str] = frozenset()
    allow_same_generation: bool = False
    allow_volume_change: bool = False

    @classmethod
    def of(
        cls, keep: Iterable[str] = (), *, allow_same_generation: bool = False, allow_volume_change: bool = False
    ) -> Allowances:
        """*keep*: keys of backends to take over as they are, in canonical spelling, or "*" for all the rest."""
        return cls(frozenset(keep), allow_same_generation, allow_volume_change)


NOTHING_ALLOWED: Final = Allowances()


def parse_replacements(text: str | bytes) -> dict[SpecKey, Replacement]:
    """The replacements of a JSON object keyed by component keys, in key order.

    Raises: SpecParseError.
    """
    return cast(dict[SpecKey, Replacement], read_text(REPLACEMENTS, text))


def amend(
    spec: AnySpec,
    replacements: Mapping[SpecKey, Replacement],
    allowances: Allowances = NOTHING_ALLOWED,
    features: frozenset[str] = frozenset(),
) -> AnySpec:
    """The spec with the replacements in place, in the version that came in.

    Raises:
        SpecAmendError: with every fault in `details["errors"]`; nothing is applied.
        LossyDowngradeError: the result cannot be said in the version that came in.
    """
    before = chain.up(spec)
    faults = [
        *_replacement_faults(before, replacements, allowances, features),
        *_keep_faults(before, replacements, allowances),
    ]
    wanted = {key: part for key, part in replacements.items() if type(before.components.get(key)) is type(part)}
    after = before.model_copy(update={"components": in_key_order({**before.components, **wanted})})
    try:
        build(after, features)
    except SpecBuildError as error:
        fault = AmendFault(error.code, error.details["component"], error.text)
        if (fault.code, fault.component) not in {(other.code, other.component) for other in faults}:
            faults.append(fault)
    if faults:
        raise SpecAmendError(
            "cannot amend the spec: " + "; ".join(fault.message for fault in faults),
            details={"errors": [asdict(fault) for fault in faults]},
        )
    return chain.convert(after, chain.version_of(spec))


def _replacement_faults(
    spec: InstanceSpec, replacements: Mapping[SpecKey, Replacement], allowances: Allowances, features: frozenset[str]
) -> Iterator[AmendFault]:
    for key, after in in_key_order(replacements).items():
        before, kind = spec.components.get(key), _KIND_TEXTS[type(after)]
        if before is None:
            yield AmendFault("unknown_component", key, f"replacement component {key} not in source spec")
        elif isinstance(after, MigrationFailureInjector) and FAILURE_INJECTION not in features:
            text = f"replacing {kind} {key} is impossible because the feature is compiled out"
            yield AmendFault("feature_compiled_out", key, text)
        elif type(before) is not type(after):
            yield AmendFault("wrong_kind", key, f"component {key} is not a {kind} in the source spec")
        elif isinstance(before, CrucibleStorageBackend) and isinstance(after, CrucibleStorageBackend):
            yield from _crucible_faults(key, before, after, allowances)


def _keep_faults(
    spec: InstanceSpec, replacements: Mapping[SpecKey, Replacement], allowances: Allowances
) -> Iterator[AmendFault]:
    for key in sorted(allowances.keep - {KEEP_ALL}):
        part = spec.components.get(SpecKey(key))
        if part is None:
            yield AmendFault("unknown_component", SpecKey(key), f"component {key} to keep is not in source spec")
        elif type(part) not in _KIND_TEXTS:
            text = f"component {key} is never replaced, so there is nothing to keep"
            yield AmendFault("wrong_kind", SpecKey(key), text)
        elif key in replacements:
            yield AmendFault("kept_and_replaced", SpecKey(key), f"component {key} is both kept and replaced")
    if KEEP_ALL in allowances.keep:
        return
    for key, part in spec.components.items():
        if isinstance(part, _MUST_BE_REPLACED) and key not in replacements and key not in allowances.keep:
            text = f"{_KIND_TEXTS[type(part)]} {key} is neither replaced nor kept on purpose"
            yield AmendFault("backend_not_replaced", key, text)


# ---- volumes


def _crucible_faults(
    key: SpecKey, before: CrucibleStorageBackend, after: CrucibleStorageBackend, allowances: Allowances
) -> Iterator[AmendFault]:
    if allowances.allow_volume_change:
        return
    if before.readonly != after.readonly:
        text = f"backend {key}: readonly {_word(after.readonly)}, allowed is only {_word(before.readonly)}"
        yield AmendFault("volume_readonly_changed", key, text)
    volumes: list[VolumeRequest] = []
    for side, backend in (("source's", before), ("replacement's", after)):
        try:
            volumes.append(parse_volume(backend.request_json))
        except SpecParseError as error:
            text = f"backend {key}: the {side} volume request is none: {error.text}"
            yield AmendFault("volume_request_invalid", key, text)
    if len(volumes) == 2:
        for found in differences(*volumes, allow_same_generation=allowances.allow_same_generation):
            yield AmendFault(found.code, key, f"backend {key}: {found.text}")


def _word(flag: bool) -> str:
    return "true" if flag else "false"
