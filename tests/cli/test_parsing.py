"""What the command line says to those who ask wrongly, or for help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vmmigrate
from tests.cli.conftest import Commands, run_command
from vmmigrate.cli.exits import Exit, exit_of_error, exit_of_outcome
from vmmigrate.cli.output import complain
from vmmigrate.errors import (
    HandoffInDoubt,
    HypervisorError,
    IdentityError,
    MigrationCancelled,
    RequestError,
    SpecParseError,
    TransportError,
    UsageError,
    VmMigrateError,
)

COMMANDS = [
    "daemon",
    "demo",
    "migrate",
    "plan",
    *(f"migration {name}" for name in ("list", "show", "cancel", "adjust", "side", "resolve")),
    *(f"journal {name}" for name in ("show", "check")),
    *(f"pki {name}" for name in ("init", "issue")),
    *(f"spec {name}" for name in ("check", "convert", "build", "negotiate", "amend")),
    *(f"vm {name}" for name in ("create", "list", "show", "start", "stop", "pause", "delete", "spec", "console")),
    *(f"vm {name}" for name in ("check", "type")),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_an_example(run: Commands, command: str) -> None:
    done = run(*command.split(), "--help")

    assert done.code == 0
    assert f"For example: vmmigrate {command}" in " ".join(done.out.split())


def test_version_is_one_line(run: Commands) -> None:
    assert run("--version") == (done := run("--version"))
    assert done.out == f"{vmmigrate.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("bogus", "bogus"),
        ("vm bogus", "bogus"),
        ("vm show", "INSTANCE"),
        ("vm show web-1", "--url"),
        ("vm show web-1 --url https://h:1 --bogus", "--bogus"),
        ("vm show web-1 web-2 --url https://h:1", "web-2"),
        ("vm list --url https://h:1 -o yaml", "yaml"),
        ("vm create x.json --url https://h:1 --ram-mib many", "many"),
        ("migrate web-1 --from https://h:1", "--to"),
        ("migrate web-1 --from https://h:1 --to https://h:2 --verify sometimes", "sometimes"),
        ("journal show", "FILE"),
        ("journal check /nowhere/journal.vmmj", "No such file"),
        ("migration resolve M --url https://h:1", "--winner"),
        ("migration resolve M --url https://h:1 --winner me", "me"),
        ("migration resolve M --url https://h:1 --winner source", "--fencing-proof"),
        ("migration resolve M --url https://h:1 --winner destination", "--from or --released"),
        ("migration resolve M --url https://h:1 --winner destination --released 1", "TERM.N"),
        ("migration resolve M --url https://h:1 --winner destination --released 1.1 --from https://h:2", "either"),
        ("pki issue ca", "--operator"),
        ("pki issue ca --host a --operator b", "exactly one"),
        ("spec check", "--jsonl"),
        ("demo --mib 1", "--mib"),
        ("demo --hypervisor bochs", "bochs"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(run: Commands, arguments: str, told: str) -> None:
    done = run(*arguments.split())

    assert done.code == Exit.USAGE
    assert told in done.complaint
    assert done.out == ""


def test_wrong_usage_with_json_is_one_document(run: Commands) -> None:
    done = run("vm", "list", "-o", "json")

    assert done.code == Exit.USAGE
    assert done.document["error"]["code"] == "usage"
    assert done.err == ""


@pytest.mark.parametrize("spelling", [["-o", "json"], ["-o=json"], ["--output", "json"], ["--output=json"]])
def test_every_spelling_of_json_output_reaches_errors(run: Commands, spelling: list[str]) -> None:
    assert "error" in run("vm", "list", "--url", "http://not-https", *spelling).document


def test_every_outcome_has_an_exit_code_of_its_own() -> None:
    words = ["moved", "refused", "failed", "cancelled", "timed_out", "unknown", "guest_lost"]

    assert [exit_of_outcome(word) for word in words] == [0, 3, 4, 5, 6, 7, 8]
    assert exit_of_outcome(None) == Exit.UNKNOWN


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), 2),
        (RequestError("x", code="unknown_instance"), 3),
        (SpecParseError("x"), 3),
        (IdentityError("x"), 3),
        (TransportError("x"), 4),
        (HypervisorError("x"), 4),
        (MigrationCancelled("x"), 5),
        (TransportError("x", code="timed_out"), 6),
        (HandoffInDoubt("x"), 7),
        (HypervisorError("x", code="guest_lost"), 8),
        (VmMigrateError("x"), 3),
    ],
)
def test_errors_have_exit_codes_that_say_what_is_true(error: VmMigrateError, code: int) -> None:
    assert exit_of_error(error) == code


def test_complaints_are_one_line_whatever_a_peer_wrote(capsys: pytest.CaptureFixture[str]) -> None:
    complain("first\nsecond\r\n\tthird")

    assert capsys.readouterr().err == "vmmigrate: first second third\n"


def test_defect_is_one_line_without_a_traceback(run: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something that we did not think of: here a stdin that has no bytes."""
    monkeypatch.delenv("VMM_DEBUG", raising=False)
    monkeypatch.setattr("sys.stdin", None)

    done = run("spec", "check", "--jsonl")

    assert done.code == Exit.DEFECT
    assert "defect" in done.complaint


# -- TLS options -----------------------------------------------------------------------------------------------------


def test_who_we_are_must_be_said(run: Commands) -> None:
    done = run("vm", "list", "--url", "https://127.0.0.1:1")

    assert done.code == Exit.USAGE
    assert "--tls-dir" in done.complaint


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ((), "there are: none"),
        (("ca-key.pem",), "there are: none"),
        (("a-key.pem", "b-key.pem"), "there are: a, b"),
    ],
)
def test_tls_directory_needs_one_certificate(run: Commands, tmp_path: Path, files: tuple[str, ...], told: str) -> None:
    for name in files:
        (tmp_path / name).touch()

    done = run("vm", "list", "--url", "https://127.0.0.1:1", "--tls-dir", tmp_path)

    assert done.code == Exit.USAGE
    assert told in done.complaint


def test_tls_directory_that_is_missing_is_named(run: Commands, tmp_path: Path) -> None:
    done = run("vm", "list", "--url", "https://127.0.0.1:1", "--tls-dir", tmp_path / "nowhere")

    assert done.code == Exit.USAGE
    assert "nowhere" in done.complaint


def test_client_pem_is_taken_where_there_are_several(run: Commands, tmp_path: Path) -> None:
    for name in ("alice", "client"):
        (tmp_path / f"{name}-key.pem").touch()

    done = run("vm", "list", "--url", "https://127.0.0.1:1", "--tls-dir", tmp_path)

    assert f"{tmp_path / 'ca.pem'}: no such CA certificate" in done.complaint


# -- spec ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "field"),
    [
        (["check"], "input"),
        (["convert", "--to", "v1"], "input"),
        (["build", "--features", "falcon,failure-injection"], "input"),
        (["negotiate", "--accept", "v1,v2"], "input"),
        (["amend"], "source_spec"),
    ],
)
def test_spec_commands_answer_every_line(
    run: Commands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str], field: str
) -> None:
    board = {"cpus": 1, "memory_mb": 1, "chipset": {"type": "i440_fx", "value": {"enable_pcie": False}}}
    spec = {"board": board, "components": {}}
    value = json.dumps(spec) if command == ["check"] else spec
    line = {"id": "ü", "spec_version": "v3", field: value, "replacements": "{}"}
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps(line) + "\nnonsense\n", encoding="utf-8")

    with questions.open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        done = run("spec", *command, "--jsonl")

    good, bad = (json.loads(line) for line in done.out.splitlines())
    assert done.code == 0
    assert good["id"] == "ü"
    assert good.get("ok", good.get("accepted")) is True
    assert bad["error"]["code"] == "bad_line"


def test_unknown_spec_version_is_wrong_usage(run: Commands) -> None:
    done = run("spec", "convert", "--to", "v9", "--jsonl")

    assert done.code == Exit.USAGE
    assert "v1, v2, v3" in done.complaint


def test_reader_that_leaves_early_sees_no_traceback() -> None:
    """`vmmigrate --help | head -0`: the pipe is closed when we write."""
    import os

    from tests.cli.conftest import start_command

    reading, writing = os.pipe()
    os.close(reading)
    with start_command("pki", "--help", stdout=writing) as process:
        os.close(writing)
        _, err = process.communicate(timeout=30)

    assert "Traceback" not in err


def test_module_runs_like_the_installed_command() -> None:
    done = run_command("vm", "show")

    assert done.code == Exit.USAGE
    assert "INSTANCE" in done.complaint
