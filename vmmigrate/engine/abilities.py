"""What this release can do on a host, and what of it the host may use.

A destination offers it, a source chooses among it.

A fleet is not upgraded at once. A host that must be able to send its guests back to an older one is narrowed by its
configuration (`[compat]`) to what the older one knows; everything else follows from negotiation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vmmigrate.devices import registry
from vmmigrate.hypervisor.base import Capabilities, PayloadDescription
from vmmigrate.spec import chain
from vmmigrate.wire.negotiate import Abilities, Need


def of_this_release(capabilities: Capabilities | None = None) -> Abilities:
    """Everything, newest first; with the opaque payloads and the facts of the hypervisor when it is given."""
    payloads = {name: kind.readable for name, kind in registry.KINDS.items()}
    abilities = Abilities(spec_versions=chain.CHAIN.names, payloads=payloads)
    if capabilities is None:
        return abilities
    return replace(abilities, payloads={**payloads, **capabilities.opaque_kinds}, facts=dict(capabilities.facts))


def narrowed(
    abilities: Abilities,
    spec_versions: Sequence[str] | None,
    payloads: Mapping[str, Sequence[int]],
    transports: Sequence[str] | None = None,
) -> Abilities:
    """*abilities* without the spec versions, and without the versions of the kinds in *payloads*, that are not named.

    Args:
        spec_versions: None leaves all.
        payloads: By kind; a kind that is not in it keeps all its versions, one with no version is not used at all.
        transports: Of bulk streams, most wanted first; None leaves all.
    """
    kept = {
        kind: tuple(version for version in versions if version in payloads.get(kind, versions))
        for kind, versions in abilities.payloads.items()
    }
    specs = abilities.spec_versions
    return replace(
        abilities,
        spec_versions=specs if spec_versions is None else tuple(name for name in specs if name in spec_versions),
        payloads={kind: versions for kind, versions in kept.items() if versions},
        transports=abilities.transports if transports is None else tuple(transports),
    )


def needs_of(payloads: Sequence[PayloadDescription], abilities: Abilities) -> list[Need]:
    """What has to cross: each payload in the versions that say its present state and that this host may write."""
    return [
        Need(
            item.instance_name,
            item.kind,
            tuple(version for version in item.versions if version in abilities.payloads.get(item.kind, ())),
            item.optional,
        )
        for item in payloads
    ]
