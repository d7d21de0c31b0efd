"""`vmmigrate pki`: what it writes is what daemons and clients read."""

from __future__ import annotations

import stat
from pathlib import Path

from tests.cli.conftest import Commands
from vmmigrate.cli.connect import tls_files
from vmmigrate.cli.exits import Exit
from vmmigrate.cli.options import ClientTls
from vmmigrate.net.tls import load_identity


def test_issued_directory_is_a_tls_directory(run: Commands, tmp_path: Path) -> None:
    run("pki", "init", tmp_path / "ca", "--trust-domain", "site.example")

    done = run("pki", "issue", tmp_path / "ca", "--operator", "alice", "--out", tmp_path / "alice")

    assert done.code == 0
    files = tls_files(ClientTls(tls_dir=tmp_path / "alice"))
    assert load_identity(files).uri == "spiffe://site.example/operator/alice"
    assert stat.S_IMODE(files.key.stat().st_mode) == 0o600
    assert sorted(path.name for path in (tmp_path / "alice").iterdir()) == ["alice-key.pem", "alice.pem", "ca.pem"]


def test_issue_says_in_json_where_everything_lies(run: Commands, tmp_path: Path) -> None:
    run("pki", "init", tmp_path, "--trust-domain", "site.example")

    names = ("--dns", "a.example", "--dns", "b.example", "--ip", "::1")
    done = run("pki", "issue", tmp_path, "--host", "host-a", *names, "-o", "json")

    assert done.document == {
        "identity": "spiffe://site.example/host/host-a",
        "ca": str(tmp_path / "ca.pem"),
        "certificate": str(tmp_path / "host-a.pem"),
        "key": str(tmp_path / "host-a-key.pem"),
    }


def test_nothing_is_overwritten(run: Commands, tmp_path: Path) -> None:
    run("pki", "init", tmp_path, "--trust-domain", "site.example")
    before = (tmp_path / "ca-key.pem").read_bytes()

    done = run("pki", "init", tmp_path, "--trust-domain", "site.example")

    assert done.code == Exit.USAGE
    assert "exists already" in done.complaint
    assert (tmp_path / "ca-key.pem").read_bytes() == before


def test_refused_issue_leaves_no_directory(run: Commands, tmp_path: Path) -> None:
    run("pki", "init", tmp_path / "ca", "--trust-domain", "site.example")

    done = run("pki", "issue", tmp_path / "ca", "--host", "h", "--ip", "nonsense", "--out", tmp_path / "h")

    assert done.code == Exit.USAGE
    assert "nonsense" in done.complaint
    assert not (tmp_path / "h").exists()


def test_directory_of_another_authority_is_left_alone(run: Commands, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run("pki", "init", tmp_path / name, "--trust-domain", "site.example")
    run("pki", "issue", tmp_path / "one", "--operator", "alice", "--out", tmp_path / "out")

    done = run("pki", "issue", tmp_path / "two", "--operator", "bob", "--out", tmp_path / "out")

    assert done.code == Exit.USAGE
    assert "another CA" in done.complaint
    assert not (tmp_path / "out" / "bob.pem").exists()


def test_directory_without_an_authority_is_named(run: Commands, tmp_path: Path) -> None:
    done = run("pki", "issue", tmp_path, "--host", "h")

    assert done.code == Exit.USAGE
    assert "pki init" in done.complaint


def test_malformed_name_is_refused(run: Commands, tmp_path: Path) -> None:
    run("pki", "init", tmp_path, "--trust-domain", "site.example")

    assert run("pki", "issue", tmp_path, "--host", "a/b").code == Exit.REFUSED
    assert run("pki", "init", tmp_path / "x", "--trust-domain", "UPPER").code == Exit.REFUSED
