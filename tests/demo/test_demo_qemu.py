"""The demo with a guest in real QEMU, as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import start_command
from tests.cli.schema import contract, misfits
from tests.demo.conftest import leftovers
from tests.hypervisor.qemu_hosts import requires_qemu
from vmmigrate.api.client import HostClient
from vmmigrate.cli.main import main
from vmmigrate.demo import guest as shared
from vmmigrate.demo import qemu_guest, story
from vmmigrate.demo.guests import DemoGuest
from vmmigrate.demo.qemu_guest import QemuGuest
from vmmigrate.demo.site import Site
from vmmigrate.spec import amend, build, creatable, document

pytestmark = requires_qemu

MIB = 48


def test_demo_moves_a_qemu_guest_and_proves_it(own_tmp: Path) -> None:
    with start_command("demo", "--hypervisor", "qemu", "--mib", str(MIB), "-o", "json") as process:
        out, err = process.communicate(timeout=120)

    assert process.returncode == 0, err
    assert err == ""
    record = json.loads(out)
    assert list(misfits(contract("migration-record", "demo"), record)) == []
    assert record["outcome"] == "moved"
    assert record["ram"]["total_bytes"] == MIB << 20
    assert len(record["ram"]["rounds"]) >= 2
    assert abs(sum(record["downtime_parts_s"].values()) - record["downtime_s"]) < 0.001
    assert record["digest"]["source"] == record["digest"]["destination"] != ""
    assert record["negotiated"]["page_source"] == "tracker"
    assert record["negotiated"]["amended"] == ["net0-vnic"]
    guest = record["guest"]
    assert guest["consistent"], guest
    assert guest["single_owner"], guest
    assert guest["ran_on"] == ["source", "destination"]
    assert guest["witness_problems"] == []
    assert guest["heartbeats"] > 1000
    assert 0 < guest["heartbeat_steady_p99_ms"] < guest["heartbeat_gap_ms"] < record["total_s"] * 1000
    assert leftovers(own_tmp) == []


@pytest.mark.slow
def test_demo_of_qemu_for_people_ends_with_a_summary(own_tmp: Path) -> None:
    with start_command("demo", "--hypervisor", "qemu", "--mib", "16", stderr=subprocess.STDOUT) as process:
        out, _ = process.communicate(timeout=120)

    assert process.returncode == 0, out
    for word in ("  phase ", "round 1:", "outcome     moved", "page source tracker", "consistent", "one at a time"):
        assert word in out
    assert leftovers(own_tmp) == []


@pytest.mark.slow
def test_interrupted_demo_of_qemu_removes_everything(own_tmp: Path) -> None:
    """In the middle: the guest runs, the migration has begun."""
    with start_command("demo", "--hypervisor", "qemu", "--mib", "64") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "migrating" in line:
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)

    assert process.returncode == 5
    assert err == "vmmigrate: interrupted; everything that was started is ended and removed\n"
    assert leftovers(own_tmp) == []


@pytest.mark.slow
def test_demo_of_a_guest_that_is_not_whole_fails_and_says_why(
    own_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page is damaged where the guest runs now, as if it had been lost on the way."""
    wait_lived_on = story._wait_lived_on

    async def damage(client: HostClient, demo_guest: DemoGuest) -> None:
        await client.post(f"/v1/instances/{shared.INSTANCE}/console", {"port": "com1", "text": "d"})
        await wait_lived_on(client, demo_guest)

    monkeypatch.setattr(story, "_wait_lived_on", damage)

    code = main(["demo", "--hypervisor", "qemu", "--mib", "16", "-o", "json"])

    said = capsys.readouterr()
    guest = json.loads(said.out)["guest"]
    assert code == 4
    assert said.err == "vmmigrate: the guest moved, but it is not whole\n"
    assert (guest["consistent"], guest["reason"]) == (False, "1 pages are not as they were written")
    assert guest["single_owner"], guest
    assert leftovers(own_tmp) == []


@pytest.mark.parametrize(
    ("there", "code", "advice"),
    [
        ([], "qemu_missing", "apt-get install qemu-system-x86"),
        (["qemu-system-x86_64"], "no_compiler", "apt-get install gcc"),
    ],
)
def test_what_is_missing_is_named_with_what_to_install_and_nothing_is_begun(
    own_tmp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: list[str], code: str, advice: str
) -> None:
    for name in there:
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    monkeypatch.setenv("PATH", str(tmp_path))

    with start_command("demo", "--hypervisor", "qemu", "-o", "json") as process:
        out, err = process.communicate(timeout=60)

    assert process.returncode == 4
    assert err == ""
    error = json.loads(out)["error"]
    assert error["code"] == code
    assert advice in error["message"]
    assert leftovers(own_tmp) == []


def test_spec_of_the_qemu_demo_is_one_that_a_host_creates_and_a_destination_amends() -> None:
    guest = QemuGuest(256)
    spec = document.parse("v3", json.dumps(guest.request(Site(Path(os.sep)))["spec"]))

    after = amend.amend(spec, amend.parse_replacements(guest.replacements()))

    for either in (spec, after):
        creatable.check_creatable(build.build(either, frozenset()))
    assert after != spec
    assert amend.amend(after, amend.parse_replacements(qemu_guest.nic_of("source"))) == spec
