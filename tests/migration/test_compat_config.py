"""`[compat]`: what a host is narrowed to is checked when the daemon starts, against what this release knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.daemon.settings import NEEDED
from vmmigrate.daemon.config import read_config
from vmmigrate.engine.abilities import narrowed, of_this_release
from vmmigrate.errors import UsageError


def test_versions_that_are_not_named_are_neither_offered_nor_sent(tmp_path: Path) -> None:
    path = tmp_path / "daemon.toml"
    path.write_text(NEEDED + '[compat]\nspec_versions = ["v2", "v1"]\npayloads = {uart-16550 = [1], bhyve-hpet = []}')
    compat = read_config(path).compat

    able = narrowed(of_this_release(), compat.spec_versions, compat.payloads)

    assert able.spec_versions == ("v1", "v2")
    assert able.payloads["uart-16550"] == (1,)
    assert able.payloads["pci-virtio"] == (2, 1)
    assert "bhyve-hpet" not in able.payloads


def test_without_the_section_a_host_can_do_all_that_the_release_can(tmp_path: Path) -> None:
    path = tmp_path / "daemon.toml"
    path.write_text(f"{NEEDED}[compat]\n")
    compat = read_config(path).compat

    assert narrowed(of_this_release(), compat.spec_versions, compat.payloads) == of_this_release()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ('spec_versions = ["v9"]', "compat.spec_versions.0: 'v9' is no spec version, allowed are v1, v2, v3"),
        ("spec_versions = []", "compat.spec_versions: List should have at least 1 item"),
        ("payloads = {uart = [1]}", "compat.payloads: 'uart' is no payload kind"),
        ("payloads = {uart-16550 = [3]}", "compat.payloads: uart-16550 has the versions 1, 2"),
        ("protocols = [1]", "compat.protocols: no such setting"),
    ],
)
def test_what_this_release_does_not_know_is_refused_when_the_daemon_starts(
    tmp_path: Path, setting: str, says: str
) -> None:
    path = tmp_path / "daemon.toml"
    path.write_text(f"{NEEDED}[compat]\n{setting}")

    with pytest.raises(UsageError) as caught:
        read_config(path)

    assert caught.value.code == "bad_config"
    assert says in caught.value.text
