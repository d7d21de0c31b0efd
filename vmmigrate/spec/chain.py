"""The chain of spec versions: up (total), down (exact or refused), negotiate.

Adding a spec version, say v6:

1. `cp vmmigrate/spec/v3.py vmmigrate/spec/v6.py`, and keep in it only what changes: new or changed structs (a changed
   one inherits the old one), `COMPONENT = v3.COMPONENT.and_also(...)`, and `InstanceSpec`.
2. In it, write `from_v3` (total: every older spec has a newer form) and `to_v3` (what the older version can say, and a
   `Loss` for every component or field that it cannot say; never drop anything without a `Loss`).
3. Below, add it to `AnySpec`, and its row to `CHAIN`:  Version("v6", v6.InstanceSpec, up=v6.from_v3, down=v6.to_v3),
4. In `latest.py`, take the new types from `v6` in place of the older ones; in `requests.py`, add its API types. Then
   follow mypy and the tests: `machine`, `build` and its way back, where a component is new.
5. Write `schemas/v6.full.json` by hand: every component, every field filled. Documents that the real types of the
   version wrote go to `fixtures/specs/v6/`, once there are any.
6. `python -m tools.spec_schemas` writes `schemas/v6.json`. While the version is being made, name its files in
   `UNRELEASED` of `tools/check_frozen.py`; after a change, `python -m tools.spec_schemas v6`.
7. One sentence in CHANGELOG.md. With the release: out of `UNRELEASED`, and `python -m tools.check_frozen --record`.

Conversions live in the newer module and reach one step back, so a version module never knows its successors. A
chain with a gap, or a version without its schema or full document, is refused when this module is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, TypeAlias

from vmmigrate.errors import LossyDowngradeError, NegotiationError, SpecParseError
from vmmigrate.spec import latest, v1, v2, v3
from vmmigrate.spec.decode import Struct, listed
from vmmigrate.spec.loss import Loss

AnySpec: TypeAlias = v1.InstanceSpec | v2.InstanceSpec | v3.InstanceSpec


@dataclass(frozen=True, slots=True)
class Version:
    """One version: its name, the model of its documents, and one step from and to the version before it."""

    name: str
    model: type[Struct]
    up: Callable[[Any], Any] | None = None
    down: Callable[[Any], tuple[Any, list[Loss]]] | None = None


class Chain:
    """Versions from the oldest to the newest, each with its converters.

    Raises: ValueError: a name or model twice, or a converter missing (the oldest version has none).
    """

    def __init__(self, versions: Sequence[Version]) -> None:
        for position, version in enumerate(versions):
            if (version.up is None or version.down is None) != (position == 0):
                raise ValueError(f"spec version {version.name} lacks a converter, or has one and nothing before it")
        self.versions = tuple(versions)
        self._index = {version.name: position for position, version in enumerate(versions)}
        self._index_of_model = {version.model: position for position, version in enumerate(versions)}
        if not len(self.versions) == len(self._index) == len(self._index_of_model):
            raise ValueError("a spec version stands in the chain twice")

    @property
    def names(self) -> tuple[str, ...]:
        """Oldest first."""
        return tuple(version.name for version in self.versions)

    def version(self, name: str) -> Version:
        """Raises: SpecParseError `unsupported_spec_version`, naming what is accepted."""
        position = self._index.get(name)
        if position is None:
            accepted = "{" + ", ".join(self.names) + "}"
            raise SpecParseError(
                f"unsupported spec version {name[:40]}, I accept {accepted}",
                code="unsupported_spec_version",
                details={"path": "", "accepted": list(self.names)},
            )
        return self.versions[position]

    def version_of(self, spec: Struct) -> str:
        """The name of the version that the document is of."""
        return self.versions[self._index_of_model[type(spec)]].name

    def up(self, spec: Struct) -> Any:
        """The same spec in the newest version. Total."""
        for version in self.versions[self._index_of_model[type(spec)] + 1 :]:
            assert version.up is not None, "checked when the chain was made"
            spec = version.up(spec)
        return spec

    def convert(self, spec: Struct, to: str) -> Any:
        """The same spec in version *to*, older or newer.

        Raises: LossyDowngradeError: *to* cannot say all of it; `details["lost"]` names every component and field.
        """
        target = self._index[self.version(to).name]
        spec, losses = self.up(spec), list[Loss]()
        for version in reversed(self.versions[target + 1 :]):
            assert version.down is not None, "checked when the chain was made"
            spec, lost = version.down(spec)
            losses += lost
        if losses:
            raise LossyDowngradeError(
                f"version {to} cannot say: {', '.join(map(str, losses))}",
                details={"version": to, "lost": [{"component": x.component, "what": x.what} for x in losses]},
            )
        return spec

    def negotiate(self, spec: Struct, accepted: Iterable[str]) -> tuple[str, Any]:
        """Version and document for a destination that accepts these versions: the newest that is exact.

        Versions that are unknown here are skipped, as the offer of a newer destination names them.

        Raises: NegotiationError `no_common_spec_version`; `details["reasons"]` has every version's reason.
        """
        accepted, reasons = frozenset(accepted), {}
        for name in reversed(self.names):
            if name not in accepted:
                reasons[name] = "the destination does not accept it"
                continue
            try:
                return name, self.convert(spec, name)
            except LossyDowngradeError as error:
                reasons[name] = error.text
        raise NegotiationError(
            f"no common spec version: {'; '.join(f'{name}: {text}' for name, text in reasons.items())}",
            code="no_common_spec_version",
            details={"reasons": reasons, "accepted": sorted(accepted)},
        )


CHAIN = Chain(
    [
        Version("v1", v1.InstanceSpec),
        Version("v2", v2.InstanceSpec, up=v2.from_v1, down=v2.to_v1),
        Version("v3", v3.InstanceSpec, up=v3.from_v2, down=v3.to_v2),
    ]
)

LATEST = CHAIN.names[-1]

if CHAIN.version(LATEST).model is not latest.InstanceSpec:
    raise ImportError(f"latest.py does not name the types of {LATEST}; allowed chain: {listed(CHAIN.names)}")


def missing_files(versions: Iterable[str]) -> list[str]:
    """What a version has to have beside its module, and does not."""
    schemas = files(__package__).joinpath("schemas")
    names = [f"{version}{kind}.json" for version in versions for kind in ("", ".full")]
    return [name for name in names if not schemas.joinpath(name).is_file()]


if _missing := missing_files(CHAIN.names):
    raise ImportError(f"spec versions lack {listed(_missing)} in schemas/; `python -m tools.spec_schemas` writes them")


def version_of(spec: AnySpec) -> str:
    """The name of the version that the document is of."""
    return CHAIN.version_of(spec)


def up(spec: AnySpec) -> latest.InstanceSpec:
    """The same spec in the newest version. Total."""
    result: latest.InstanceSpec = CHAIN.up(spec)
    return result


def convert(spec: AnySpec, to: str) -> AnySpec:
    """The same spec in version *to*; exact, or LossyDowngradeError."""
    result: AnySpec = CHAIN.convert(spec, to)
    return result


def negotiate(spec: AnySpec, accepted: Iterable[str]) -> tuple[str, AnySpec]:
    """The newest version that the destination accepts and that can say all of the spec; or NegotiationError."""
    return CHAIN.negotiate(spec, accepted)
