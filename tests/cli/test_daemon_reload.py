"""SIGHUP: a daemon process reads certificates and revocation list again, and stops trusting who is on it."""

from __future__ import annotations

import json
import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import CONFIG, Commands, Site
from tests.cli.hosts import RunningHost, running_host
from tests.net.test_revocation import sign_list
from vmmigrate.cli.exits import Exit
from vmmigrate.net import pki

WITH_LIST = CONFIG.replace('ca = "ca.pem"', 'ca = "ca.pem"\ncrl = "crl.pem"')
DEADLINE_S = 10.0


@pytest.fixture
def own_site(tmp_path: Path) -> Site:
    """A CA of this test's own: what it revokes is nobody else's business."""
    return Site(tmp_path)


def prepare(site: Site, run: Commands, *options: str) -> Path:
    """Host `host-a` with the CA's first list; its directory."""
    directory = site.host("host-a", WITH_LIST).parent
    assert run("pki", "crl", site.root / "ca", *options).code == 0
    shutil.copy(site.root / "ca" / "crl.pem", directory / "crl.pem")
    return directory


def wait_event(host: RunningHost, event: str) -> dict[str, Any]:
    """The last entry of this kind in the daemon's log, which comes soon."""
    ends = time.monotonic() + DEADLINE_S
    while time.monotonic() < ends:
        lines = (host.directory / "log").read_text().splitlines()
        entries = [json.loads(line) for line in lines if line.startswith("{")]
        if found := [entry for entry in entries if entry["event"] == event]:
            return dict(found[-1])
        time.sleep(0.02)  # another process writes it: there is nothing to wait for but the file
    raise AssertionError(f"no {event} in {(host.directory / 'log').read_text()}")


def test_a_hangup_makes_the_daemon_read_the_new_list(run: Commands, own_site: Site) -> None:
    """Before it the operator is let in, after it not; the daemon goes on, and its log says both."""
    directory = prepare(own_site, run)
    config = Reusing(own_site, directory)
    with running_host(config, "host-a") as host:
        ask = ("vm", "list", "--url", host.url, "--tls-dir", own_site.operator)
        assert run(*ask).code == 0
        run("pki", "revoke", own_site.root / "ca", own_site.operator / "alice.pem")
        shutil.copy(own_site.root / "ca" / "crl.pem", directory / "crl.pem")
        assert run(*ask).code == 0, "nothing counts before the signal"

        host.process.send_signal(signal.SIGHUP)

        assert wait_event(host, "tls.reloaded")["identity"] == "spiffe://site.example/host/host-a"
        refused = run(*ask)
        assert refused.code == Exit.REFUSED, refused
        assert "revoked" in refused.complaint
        assert wait_event(host, "tls.refused")["code"] == "certificate_revoked"


def test_a_bad_list_at_a_hangup_changes_nothing_and_is_logged(run: Commands, own_site: Site) -> None:
    directory = prepare(own_site, run)
    with running_host(Reusing(own_site, directory), "host-a") as host:
        (directory / "crl.pem").write_text("nothing of the kind")

        host.process.send_signal(signal.SIGHUP)

        entry = wait_event(host, "tls.not_reloaded")
        assert (entry["code"], entry["level"]) == ("tls_file_malformed", "error")
        assert "crl.pem" in entry["text"]
        assert run("vm", "list", "--url", host.url, "--tls-dir", own_site.operator).code == 0


@pytest.mark.slow
def test_a_list_that_ends_soon_is_warned_of_at_the_start(run: Commands, own_site: Site) -> None:
    """Expired, it lets nobody in."""
    directory = prepare(own_site, run)
    _write_short_list(own_site, directory)
    with running_host(Reusing(own_site, directory), "host-a") as host:
        entry = wait_event(host, "tls.revocation_list_ends")

    assert entry["level"] == "warning"
    assert 0 < entry["left_s"] <= 3600
    assert "SIGHUP" in entry["text"]


class Reusing(Site):
    """A site whose host was made already."""

    def __init__(self, site: Site, directory: Path) -> None:
        self.root, self.operator = site.root, site.operator
        self._directory = directory

    def host(self, name: str, config: str = CONFIG) -> Path:
        return self._directory / "host.toml"


def _write_short_list(site: Site, directory: Path) -> None:
    hour = timedelta(hours=1)
    sign_list(pki.load_authority(site.root / "ca"), directory / "crl.pem", begins_in=-9 * hour, ends_in=hour)
