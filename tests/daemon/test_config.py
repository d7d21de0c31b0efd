"""The daemon's configuration: what is wrong is said in one line, before anything is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.daemon.settings import NEEDED
from vmmigrate.daemon.config import read_config
from vmmigrate.errors import UsageError


def test_hosts_are_names_addresses_and_networks(tmp_path: Path) -> None:
    hosts = ["images.example", "10.0.0.1", "::1", "fd00:1122:3344::/48"]
    path = tmp_path / "daemon.toml"
    path.write_text(f"{NEEDED}[allow]\nhosts = {hosts}\n")

    assert read_config(path).allow.hosts == hosts


@pytest.mark.parametrize("host", ["", "fd00::1/48", "images.example/8", "a..b"])
def test_a_host_that_could_match_nothing_is_a_mistake(host: str, tmp_path: Path) -> None:
    path = tmp_path / "daemon.toml"
    path.write_text(f"{NEEDED}[allow]\nhosts = ['{host}']\n")

    with pytest.raises(UsageError, match=r"allow\.hosts\.0: ") as caught:
        read_config(path)

    assert caught.value.code == "bad_config"
    assert "\n" not in str(caught.value)


def test_bulk_transports_are_sealed_first_and_in_the_order_in_which_they_are_named(tmp_path: Path) -> None:
    path = tmp_path / "daemon.toml"
    path.write_text(NEEDED)
    assert read_config(path).bulk.transports == ["sealed", "tls"]

    path.write_text(f'{NEEDED}[bulk]\ntransports = ["tls"]\n')
    assert read_config(path).bulk.transports == ["tls"]


@pytest.mark.parametrize("transports", ['["plain"]', "[]", '["tls", "tls"]', '"tls"'])
def test_a_transport_that_is_none_is_a_mistake(transports: str, tmp_path: Path) -> None:
    """Above all there is none without encryption."""
    path = tmp_path / "daemon.toml"
    path.write_text(f"{NEEDED}[bulk]\ntransports = {transports}\n")

    with pytest.raises(UsageError, match=r"bulk\.transports") as caught:
        read_config(path)

    assert caught.value.code == "bad_config"
