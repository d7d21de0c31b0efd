"""A daemon that cannot start says why in one line, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import resource
import socket
from pathlib import Path

import pytest

from tests.cli.conftest import CONFIG, Commands, Site, run_command
from tests.cli.hosts import running_host
from vmmigrate.cli.exits import Exit


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (CONFIG + "[limits\n", "not TOML"),
        (CONFIG + "[limits]\nhandoff_windows = 3\n", "limits.handoff_windows: no such setting"),
        (CONFIG + '[limits]\nticket_s = "soon"\n', "limits.ticket_s"),
        (CONFIG.replace('api = "127.0.0.1:0"', 'api = "127.0.0.1"'), "HOST:PORT"),
        (CONFIG.replace("[directories]", "[folders]"), "directories"),
        (CONFIG.replace("{name}-key.pem", "nowhere.pem"), "nowhere.pem: no such private key file"),
        (CONFIG.replace('ca = "ca.pem"', 'ca = "unreadable"'), "unreadable: CA certificate cannot be read"),
        (CONFIG.replace('ca = "ca.pem"', 'ca = "host.toml"'), "not a CA certificate"),
        (CONFIG.replace("{name}-key.pem", "{name}.pem"), "not a private key"),
        (CONFIG.replace('ca = "ca.pem"', 'ca = "ca.pem"\ncrl = "nowhere.pem"'), "nowhere.pem: no such revocation list"),
        (CONFIG.replace('ca = "ca.pem"', 'ca = "ca.pem"\ncrl = "ca.pem"'), "ca.pem: not a revocation list"),
    ],
)
def test_malformed_settings_and_files_are_named(
    run: Commands, site: Site, request: pytest.FixtureRequest, config: str, told: str
) -> None:
    path = site.host(f"bad-{abs(hash(request.node.name))}", config)
    (path.parent / "unreadable").mkdir()
    before = sorted(path.parent.rglob("*"))

    done = run("daemon", "--config", path)

    assert done.code == Exit.USAGE
    assert told in done.complaint
    assert done.out == ""
    assert sorted(path.parent.rglob("*")) == before


def test_missing_config_is_named(run: Commands, tmp_path: Path) -> None:
    done = run("daemon", "--config", tmp_path / "nowhere.toml")

    assert done.code == Exit.USAGE
    assert "nowhere.toml" in done.complaint


def test_certificate_of_an_operator_is_no_host(run: Commands, site: Site) -> None:
    path = site.host("no-host")
    config = path.read_text().replace("no-host.pem", str(site.operator / "alice.pem"))
    path.write_text(config.replace("no-host-key.pem", str(site.operator / "alice-key.pem")))

    done = run("daemon", "--config", path)

    assert done.code == Exit.USAGE
    assert "operator/alice is no host" in done.complaint


@pytest.mark.parametrize(
    "port", ["api", *(pytest.param(port, marks=pytest.mark.slow) for port in ("migration", "bulk"))]
)
def test_port_in_use_ends_the_process_with_one_line(site: Site, port: str) -> None:
    """As a process of its own, because that it ends and leaves no socket is the promise."""
    path = site.host(f"port-{port}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        path.write_text(path.read_text().replace(f'{port} = "127.0.0.1:0"', f'{port} = "{address}"'))

        done = run_command("daemon", "--config", path)

    assert done.code == Exit.USAGE
    assert done.complaint == f"cannot listen on {address}: address already in use"
    assert done.out == ""
    assert list((path.parent / "run").glob("*")) == []


def test_state_directory_that_is_a_file_is_named(run: Commands, site: Site) -> None:
    path = site.host("state-file")
    (path.parent / "state").touch()

    done = run("daemon", "--config", path)

    assert done.code == Exit.USAGE
    assert str(path.parent / "state") in done.complaint


def test_runtime_directory_that_others_may_read_is_refused(run: Commands, site: Site) -> None:
    path = site.host("open-runtime")
    (path.parent / "run").mkdir()
    os.chmod(path.parent / "run", 0o755)

    done = run("daemon", "--config", path)

    assert done.code == Exit.FAILED
    assert "0700" in done.complaint


def test_a_daemon_may_have_as_many_descriptors_as_its_hard_limit_allows(site: Site) -> None:
    """A shell often allows 1024, and a migration takes some dozens."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 2 if hard <= 1024 else 512, hard))
    try:
        with running_host(site, "many") as host:
            of_daemon = resource.prlimit(host.process.pid, resource.RLIMIT_NOFILE)
            told = [json.loads(line) for line in (host.directory / "log").read_text().splitlines()]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert of_daemon == (hard, hard)
    assert [line["descriptors"] for line in told if line["event"] == "daemon.ready"] == [hard]
