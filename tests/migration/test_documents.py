"""Every golden valid document: really migrated, or refused by name, or at least carried by a preamble, exactly.

RAM and CPUs of the documents are scaled by the `overrides` of `CreateInstance` (64 MiB, 2 CPUs), which travel with the
guest. Their file backends name paths of other machines: this host's adapter maps each to a file of the test's own, so
that the document itself crosses unchanged. The counts are printed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.migration.fleet import (
    Fleet,
    ObservedHypervisor,
    RunningHost,
    check,
    create,
    migrate,
    open_fleet,
    wait_heartbeats,
    witnesses,
)
from vmmigrate.engine import preamble
from vmmigrate.errors import LossyDowngradeError, SpecCreatableError, SpecError, VmMigrateError
from vmmigrate.hypervisor.base import DiskPlan, Guest, GuestPlan, GuestStamp
from vmmigrate.memory import MIB, PageBitmap, RamLayout
from vmmigrate.spec import build, chain, document
from vmmigrate.spec.creatable import check_creatable
from vmmigrate.wire import codec
from vmmigrate.wire.messages import DeviceEntry, Preamble

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2] / "fixtures" / "specs"
FEATURES = frozenset({"failure-injection"})
OVERRIDES = {"ram_bytes": 64 * MIB, "cpus": 2}
LAYOUT = RamLayout.for_size(64 * MIB)
DOCUMENTS = sorted(ROOT.glob("v[0-9]*/*.json"))


@dataclass(frozen=True)
class Golden:
    version: str
    text: str

    @classmethod
    def read(cls, path: Path) -> Golden:
        return cls(path.parent.name, path.read_text(encoding="utf-8"))

    @property
    def spec(self) -> Any:
        return document.parse(self.version, self.text)

    def refusal(self) -> SpecError | None:
        """What the first gate says that refuses it; None when both let it pass."""
        try:
            check_creatable(build.build(chain.up(self.spec), FEATURES))
        except SpecError as error:
            return error
        return None


class MapsPaths(ObservedHypervisor):
    """A host that opens, instead of the path that a document names, a file of this test's."""

    directory: Path

    async def build(self, plan: GuestPlan, stamp: GuestStamp, *, for_migration: bool) -> Guest:
        return await super().build(replace(plan, disks=[self._with_our_file(disk) for disk in plan.disks]), stamp,
                                   for_migration=for_migration)  # fmt: skip

    def _with_our_file(self, disk: DiskPlan) -> DiskPlan:
        if disk.backend_kind != "file":
            return disk
        path = self.directory / hashlib.sha256(disk.backend["path"].encode()).hexdigest()
        path.touch()
        return replace(disk, backend={"path": str(path)})


async def two_hosts(fleet: Fleet, root: Path) -> tuple[RunningHost, RunningHost]:
    MapsPaths.directory = root / "disks"
    MapsPaths.directory.mkdir()
    allow = 'paths = ["/"]'
    return (
        await fleet.start("alpha", allow=allow, hypervisor_class=MapsPaths),
        await fleet.start("beta", allow=allow, hypervisor_class=MapsPaths),
    )


async def fate(fleet: Fleet, alpha: RunningHost, beta: RunningHost, golden: Golden) -> str:
    """What became of a document: `moved`, `cannot migrate`, or which gate refused it."""
    refusal = golden.refusal()
    if refusal is not None:
        with pytest.raises(VmMigrateError) as caught:
            await _create(alpha, golden)
        assert (caught.value.code, caught.value.text) == (refusal.code, refusal.text)
        return "refused by creatable" if isinstance(refusal, SpecCreatableError) else "refused by build"
    instance = await _create(alpha, golden)
    await wait_heartbeats(alpha, instance)
    unmigratable = alpha.guest(instance).plan.unmigratable
    if unmigratable:
        with pytest.raises(VmMigrateError) as caught:
            await migrate(alpha, beta, instance)
        assert (caught.value.code, caught.value.details["devices"]) == ("not_migratable", list(unmigratable))
        await wait_heartbeats(alpha, instance)
        await alpha.client.delete(f"/v1/instances/{instance}")
        return "cannot migrate"
    await _move(fleet, alpha, beta, instance, golden)
    return "moved"


async def _create(host: RunningHost, golden: Golden) -> str:
    return await create(host, json.loads(golden.text), spec_version=golden.version, overrides=OVERRIDES)


async def _move(fleet: Fleet, alpha: RunningHost, beta: RunningHost, instance: str, golden: Golden) -> None:
    """Migrate, and look whether all of it is there."""
    record = await migrate(alpha, beta, instance, keep=["*"], verify="full")
    while record["outcome"] != "moved":  # the failure injector of some documents fails the first attempts
        assert record["error"]["code"] == "injected_failure", record
        record = await migrate(alpha, beta, instance, keep=["*"], verify="full")
    shown = await beta.client.get(f"/v1/instances/{instance}/spec", version=golden.version)
    assert shown["spec"] == json.loads(golden.text), "the document has arrived as it was"
    assert beta.guest(instance).ram.layout == LAYOUT
    assert (await check(beta, instance))["consistent"]
    assert witnesses(fleet, instance).single
    await beta.client.delete(f"/v1/instances/{instance}")


def carried(golden: Golden) -> int:
    """In how many versions a preamble carries the document, byte for byte."""
    versions = 0
    for name in chain.CHAIN.names:
        try:
            spec = chain.convert(golden.spec, name)
        except LossyDowngradeError:
            continue
        sent = _preamble(name, spec)
        received = codec.decode(codec.encode(sent))
        assert isinstance(received, Preamble)
        assert received == sent
        assert preamble.read_spec(received, chain.CHAIN.names) == spec
        assert preamble.read_layout(received, 1 << 40) == LAYOUT
        versions += 1
    return versions


def _preamble(version: str, spec: Any) -> Preamble:
    return preamble.compose(
        spec_version=version,
        spec=spec,
        blobs={"firmware": b"\x00\xff"},
        properties={"name": "golden"},
        run_state="running",
        epoch=(1, 1),
        layout=LAYOUT,
        populated=PageBitmap(LAYOUT.pages),
        devices=[DeviceEntry("com1", "uart-16550", 2, False)],
        facts={},
    )


async def fates(root: Path, paths: Sequence[Path]) -> Counter[str]:
    counts: Counter[str] = Counter()
    async with open_fleet(root, "alpha", "beta") as fleet:
        alpha, beta = await two_hosts(fleet, root)
        for path in paths:
            golden = Golden.read(path)
            counts[await fate(fleet, alpha, beta, golden)] += 1
            assert carried(golden) >= 1
    return counts


async def test_every_golden_document_is_migrated_or_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No document is left out: what passes both gates moves or is refused for a device that it names."""
    counts = await fates(tmp_path, DOCUMENTS)

    with capsys.disabled():
        print(f"\n{len(DOCUMENTS)} golden documents:", ", ".join(f"{n} {fate}" for fate, n in sorted(counts.items())))
    assert sum(counts.values()) == len(DOCUMENTS)
    assert set(counts) == {"moved", "cannot migrate", "refused by build", "refused by creatable"}
    assert counts["moved"] >= 20


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_preamble_carries_every_golden_document_in_every_version_that_can_say_it(path: Path) -> None:
    golden = Golden.read(path)

    assert carried(golden) >= 1
