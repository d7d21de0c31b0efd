"""`vmmigrate pki`: what it writes is what daemons and clients read."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.conftest import Commands
from vmmigrate.cli.connect import tls_files
from vmmigrate.cli.exits import Exit
from vmmigrate.cli.options import ClientTls
from vmmigrate.errors import IdentityError
from vmmigrate.net.tls import TlsFiles, load_identity


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


def test_revoked_certificate_is_on_the_list_that_a_daemon_reads(run: Commands, tmp_path: Path) -> None:
    ca = tmp_path / "ca"
    run("pki", "init", ca, "--trust-domain", "site.example")
    for name in ("host-a", "host-b"):
        run("pki", "issue", ca, "--host", name, "--out", tmp_path / name)

    done = run("pki", "revoke", ca, tmp_path / "host-a" / "host-a.pem", "--days", "3", "-o", "json")

    assert done.code == 0
    assert (done.document["crl"], done.document["revoked"]) == (str(ca / "crl.pem"), 1)
    directory = tmp_path / "host-b"
    files = TlsFiles(directory / "ca.pem", directory / "host-b.pem", directory / "host-b-key.pem", ca / "crl.pem")
    assert load_identity(files).name == "host-b"
    with pytest.raises(IdentityError, match="revoked by"):
        load_identity(
            replace(files, certificate=tmp_path / "host-a/host-a.pem", key=tmp_path / "host-a/host-a-key.pem")
        )


def test_renewed_list_keeps_its_entries(run: Commands, tmp_path: Path) -> None:
    run("pki", "init", tmp_path, "--trust-domain", "site.example")
    run("pki", "issue", tmp_path, "--host", "host-a")

    first = run("pki", "crl", tmp_path, "-o", "json")
    run("pki", "revoke", tmp_path, tmp_path / "host-a.pem")
    renewed = run("pki", "crl", tmp_path, "--days", "300", "-o", "json")

    assert (first.document["revoked"], renewed.document["revoked"]) == (0, 1)
    assert renewed.document["next_update"] > first.document["next_update"]


def test_what_cannot_be_revoked_is_named(run: Commands, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run("pki", "init", tmp_path / name, "--trust-domain", "site.example")
    run("pki", "issue", tmp_path / "two", "--host", "h")

    foreign = run("pki", "revoke", tmp_path / "one", tmp_path / "two" / "h.pem")
    no_certificate = run("pki", "revoke", tmp_path / "one", tmp_path / "two" / "h-key.pem")

    assert (foreign.code, no_certificate.code) == (Exit.REFUSED, Exit.USAGE)
    assert "not issued by the CA" in foreign.complaint
    assert "not a certificate" in no_certificate.complaint
    assert not (tmp_path / "one" / "crl.pem").exists()
