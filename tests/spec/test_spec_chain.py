"""Laws of the chain of versions: up is total, down is exact or says what is lost, nothing changes silently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.spec.spec_corpus import UNHURRIED, VERSIONS, specs
from vmmigrate.errors import LossyDowngradeError, NegotiationError
from vmmigrate.jsontext import compact
from vmmigrate.spec import chain, latest, v1, v2, v3
from vmmigrate.spec.chain import Chain, Version
from vmmigrate.spec.decode import Flag, KeyedMap, Nullable, Struct
from vmmigrate.spec.diff import diff
from vmmigrate.spec.document import read_text
from vmmigrate.spec.keys import SpecKey, spec_key
from vmmigrate.spec.loss import Loss


def losses_of(spec: latest.InstanceSpec, version: str) -> set[str]:
    """Where the spec changes when it goes down to the version by force, and up again; worked out by the diff alone."""
    forced = spec
    for newer in reversed(chain.CHAIN.versions[VERSIONS.index(version) + 1 :]):
        assert newer.down is not None
        forced, _ = newer.down(forced)
    return {row.where for row in diff(spec, chain.up(forced))}


@UNHURRIED
@given(specs(), st.sampled_from(VERSIONS))
def test_down_then_up_is_the_identity_or_a_refusal_that_names_all_that_is_lost(
    spec: latest.InstanceSpec, version: str
) -> None:
    lost = losses_of(spec, version)

    if lost:
        with pytest.raises(LossyDowngradeError) as caught:
            chain.convert(spec, version)
        named = {
            part["what"] if part["component"] is None else part["component"] for part in caught.value.details["lost"]
        }
        assert (caught.value.details["version"], named) == (version, lost)
    else:
        older = chain.convert(spec, version)
        assert chain.version_of(older) == version
        assert chain.up(older) == spec


@UNHURRIED
@given(st.data(), st.sampled_from(VERSIONS))
def test_up_then_down_is_the_identity(data: st.DataObject, version: str) -> None:
    old = data.draw(specs(version))

    assert chain.convert(chain.up(old), version) == old


@UNHURRIED
@given(specs(), st.sets(st.sampled_from([*VERSIONS, "v99", ""])))
def test_negotiation_takes_the_newest_accepted_version_that_is_exact(
    spec: latest.InstanceSpec, accepted: set[str]
) -> None:
    possible = [name for name in VERSIONS if name in accepted and not losses_of(spec, name)]

    if possible:
        name, chosen = chain.negotiate(spec, accepted)
        assert name == possible[-1]
        assert chain.up(chosen) == spec
    else:
        with pytest.raises(NegotiationError) as caught:
            chain.negotiate(spec, accepted)
        assert caught.value.code == "no_common_spec_version"
        assert list(caught.value.details["reasons"]) == list(reversed(VERSIONS))


def test_what_v2_and_v1_cannot_say_is_named_in_key_order() -> None:
    """The law above finds losses by a diff; this one says which words they have."""
    path = latest.PciPath(bus=0, device=4, function=0)
    socket = latest.VirtioSocket(guest_cid=3, pci_path=path)
    smbios = latest.SmbiosType1Input(manufacturer="", product_name="", serial_number="", version=0)
    board = latest.Board(cpus=1, memory_mb=1, chipset=latest.I440Fx(enable_pcie=False))
    spec = latest.InstanceSpec(board=board, components={spec_key(key): socket for key in "ab"}, smbios=smbios)

    with pytest.raises(LossyDowngradeError) as caught:
        chain.convert(spec, "v1")

    assert caught.value.details["lost"] == [
        {"component": "a", "what": "virtio_socket"},
        {"component": "b", "what": "virtio_socket"},
        {"component": None, "what": "smbios"},
    ]


def test_a_refused_negotiation_gives_each_version_its_own_reason() -> None:
    board = latest.Board(cpus=1, memory_mb=1, chipset=latest.I440Fx(enable_pcie=False))
    smbios = latest.SmbiosType1Input(manufacturer="", product_name="", serial_number="", version=0)

    with pytest.raises(NegotiationError) as caught:
        chain.negotiate(latest.InstanceSpec(board=board, components={}, smbios=smbios), ["v1"])

    reasons = caught.value.details["reasons"]
    assert reasons["v3"] == "the destination does not accept it"
    assert reasons["v1"] == "version v1 cannot say: smbios"


V1, V2 = Version("v1", v1.InstanceSpec), Version("v2", v2.InstanceSpec, v2.from_v1, v2.to_v1)


@pytest.mark.parametrize(
    "versions",
    [
        [V1, Version("v2", v2.InstanceSpec)],
        [V1, Version("v2", v2.InstanceSpec, up=v2.from_v1)],
        [V1, Version("v2", v2.InstanceSpec, down=v2.to_v1)],
        [V2],
        [V1, Version("v1", v2.InstanceSpec, v2.from_v1, v2.to_v1)],
        [V1, Version("v2", v1.InstanceSpec, v2.from_v1, v2.to_v1)],
    ],
)
def test_a_chain_with_a_gap_or_a_repetition_is_refused_when_it_is_made(versions: Sequence[Version]) -> None:
    with pytest.raises(ValueError, match="spec version"):
        Chain(versions)


def test_the_newest_types_are_those_of_the_newest_version() -> None:
    assert chain.LATEST == chain.CHAIN.names[-1] == latest.NAME


def test_a_version_without_its_schema_or_full_document_is_named() -> None:
    """What this finds stops the import of the chain."""
    assert chain.missing_files(VERSIONS) == []
    assert chain.missing_files(["v1", "v99"]) == ["v99.json", "v99.full.json"]


# ---- the recipe, tried on a field that a later API version adds to a component


class NvmeDiskV6(v1.NvmeDisk):
    has_write_cache: Flag


class InstanceSpecV6(Struct):
    unknown_fields: ClassVar[str] = "ignore"
    board: v1.Board
    components: Annotated[Mapping[SpecKey, v1.Component], KeyedMap(v3.COMPONENT.and_also(NvmeDiskV6))]
    smbios: Annotated[v2.SmbiosType1Input | None, Nullable(v2.SmbiosType1Input.table)] = None


def from_v3(spec: v3.InstanceSpec) -> InstanceSpecV6:
    def newer(part: v1.Component) -> v1.Component:
        return NvmeDiskV6(**part.__dict__, has_write_cache=True) if isinstance(part, v1.NvmeDisk) else part

    components = {key: newer(part) for key, part in spec.components.items()}
    return InstanceSpecV6(board=spec.board, components=components, smbios=spec.smbios)


def to_v3(spec: InstanceSpecV6) -> tuple[v3.InstanceSpec, list[Loss]]:
    losses, components = [], dict(spec.components)
    for key, part in spec.components.items():
        if isinstance(part, NvmeDiskV6):
            if not part.has_write_cache:
                losses.append(Loss(key, "nvme_disk.has_write_cache"))
            components[key] = v1.NvmeDisk(**{name: part.__dict__[name] for name in v1.NvmeDisk.model_fields})
    return v3.InstanceSpec(board=spec.board, components=components, smbios=spec.smbios), losses


CHAIN_V6 = Chain(
    [V1, V2, Version("v3", v3.InstanceSpec, v3.from_v2, v3.to_v2), Version("v6", InstanceSpecV6, from_v3, to_v3)]
)


@UNHURRIED
@given(specs("v3"))
def test_a_version_made_by_the_recipe_keeps_the_laws_without_touching_older_modules(spec: v3.InstanceSpec) -> None:
    newer = CHAIN_V6.up(spec)
    text = compact(newer.table.write(newer))

    assert CHAIN_V6.convert(newer, "v3") == spec
    assert read_text(InstanceSpecV6.table, text) == newer
    assert text.count('"has_write_cache":true') == text.count('"type":"nvme_disk"')


def test_a_field_that_older_versions_lack_is_named_with_its_component() -> None:
    path = latest.PciPath(bus=0, device=4, function=0)
    disk = NvmeDiskV6(backend_id=spec_key("b"), pci_path=path, serial_number=bytes(20), has_write_cache=False)
    board = latest.Board(cpus=1, memory_mb=1, chipset=latest.I440Fx(enable_pcie=False))

    with pytest.raises(LossyDowngradeError) as caught:
        CHAIN_V6.convert(InstanceSpecV6(board=board, components={spec_key("d"): disk}), "v1")

    assert caught.value.details["lost"] == [{"component": "d", "what": "nvme_disk.has_write_cache"}]
