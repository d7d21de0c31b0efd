"""`vmmigrate spec` for people: what it says to them, and the documents that programs get."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cli.conftest import ROOT, Commands, Done
from tests.cli.schema import contract, misfits
from vmmigrate.cli.exits import Exit

SPECS = ROOT / "fixtures" / "specs"
WHOLE = SPECS / "v3" / "every_component_v3.json"
TWO_DISKS = SPECS / "v3" / "omicron_two_crucible_disks.json"
KEY = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
BAD = """{
  "board": {"cpus": 0, "memory_mb": 512, "chipset": {"type": "i440_fx", "value": {"enable_pcie": false}}},
  "components": {
    "com1": {"type": "serial_port", "component": {"num": "com1"}},
    "\\u001b[31mdisk": {"type": "virtio_disk", "component": {
      "backend_id": "b", "pci_path": {"bus": 9, "device": 4, "function": 0}}},
    "b": {"type": "blob_storage_backend", "component": {"base64": "?", "readonly": true}}
  }
}
"""


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    path = tmp_path / "bad.json"
    path.write_text(BAD)
    return path


def fits(done: Done, name: str) -> Any:
    document = done.document
    assert list(misfits(contract(name, "document"), document)) == []
    return document


@pytest.mark.parametrize("command", ["validate", "show", "diff", "plan-amend", "from-ron", "to-ron"])
def test_help_has_an_example(run: Commands, command: str) -> None:
    done = run("spec", command, "--help")

    assert done.code == 0
    assert f"For example: vmmigrate spec {command}" in " ".join(done.out.split())


def test_help_of_the_group_imports_no_pydantic() -> None:
    program = "import sys; from vmmigrate.cli.main import main; main(['spec', '--help']); print(*sys.modules)"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)

    assert {"pydantic", "trio", "rich"} & set(done.stdout.splitlines()[-1].split()) <= {"rich"}


# ---- validate


def test_validate_points_at_every_problem_with_line_column_path_and_what_is_allowed(run: Commands, bad: Path) -> None:
    done = run("spec", "validate", bad)

    assert done.code == Exit.REFUSED
    blocks = [line for line in done.out.splitlines() if not line.startswith(" ")]
    assert blocks == [
        f"{bad}:2:21: no host could create it: no CPU",
        f"{bad}:6:38: no host could create it: no bridge leads to bus 9",
        f"{bad}:7:67: no host could create it: not base64",
        "3 found",
    ]
    assert "    at        /board/cpus" in done.out
    assert "    allowed   1..255 CPUs" in done.out
    assert "\x1b" not in done.out, "a key of a document must not command the terminal"


def test_validate_gives_programs_one_document(run: Commands, bad: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("[]")

    refused, rejected = run("spec", "validate", bad, "-o", "json"), run("spec", "validate", broken, "-o", "json")

    assert [finding["code"] for finding in fits(refused, "spec-validate")["findings"]] == [
        "cpus_zero", "pci_bus_without_bridge", "base64",
    ]  # fmt: skip
    assert fits(rejected, "spec-validate")["findings"][0]["gate"] == "document"
    assert refused.code == rejected.code == Exit.REFUSED


def test_validate_passes_a_machine_and_needs_its_features(run: Commands) -> None:
    good = run("spec", "validate", SPECS / "v2" / "phd_nvme_file.json", "--spec-version", "v2", "-o", "json")
    injector = SPECS / "v1" / "phd_migration_failure.json"
    without, with_it = (
        run("spec", "validate", injector, "--spec-version", "v1", "-o", "json", *more)
        for more in ((), ("--features", "failure-injection"))
    )

    assert fits(good, "spec-validate")["ok"] is True
    assert fits(without, "spec-validate")["findings"][0]["code"] == "feature_compiled_out"
    assert all(finding["gate"] == "host" for finding in fits(with_it, "spec-validate")["findings"])


def test_validate_says_so_when_all_is_well(run: Commands) -> None:
    done = run("spec", "validate", SPECS / "v2" / "phd_nvme_file.json")

    assert (done.code, done.out.endswith(": a machine that a host could create\n")) == (Exit.OK, True)


@pytest.mark.parametrize(
    ("arguments", "told", "code"),
    [
        (["validate", "missing.json"], "missing.json: No such file or directory", Exit.USAGE),
        (["validate", str(WHOLE), "--spec-version", "v99"], "unsupported spec version v99, I accept", Exit.REFUSED),
        (["validate", str(WHOLE), "--features", "x"], "feature 'x', allowed: failure-injection, falcon", Exit.USAGE),
        (["to-ron", str(WHOLE), "--kind", "x"], "kind 'x', allowed: preamble, spec, error, devices", Exit.USAGE),
        (["from-ron", str(WHOLE), "--kind", "x"], "kind 'x', allowed: preamble, spec, error, devices", Exit.USAGE),
        (["show", str(ROOT / "README.md")], "README.md: not JSON", Exit.REFUSED),
        (["from-ron", str(WHOLE)], "Expected opening `(` for struct `Preamble` (line 1, column 1)", Exit.REFUSED),
    ],
)
def test_a_wrong_question_gets_one_line(run: Commands, arguments: list[str], told: str, code: int) -> None:
    done = run("spec", *arguments)

    assert told in done.complaint
    assert done.code == code


# ---- show, diff, plan-amend


def test_show_is_a_table_without_secrets(run: Commands) -> None:
    done = run("spec", "show", WHOLE)
    wanted = fits(run("spec", "show", WHOLE, "-o", "json"), "spec-show")

    assert done.code == 0
    assert "board       4 CPUs, 8192 MiB, i440_fx" in done.out
    assert "v1 without smbios, v2 exactly" in done.out
    for part in wanted["components"]:
        assert part["key"] in done.out
    assert KEY not in done.out + json.dumps(wanted)


def test_show_tells_which_version_cannot_say_it(run: Commands) -> None:
    document = fits(run("spec", "show", SPECS / "v3" / "vsock_only.json", "-o", "json"), "spec-show")
    done = run("spec", "show", SPECS / "v3" / "vsock_only.json")

    (lost,) = document["versions"]["v2"]
    assert lost["what"] == "virtio_socket"
    assert f"v2 without virtio_socket {lost['component']}" in done.out


def test_diff_lists_what_differs_and_says_when_nothing_does(run: Commands) -> None:
    other = SPECS / "v3" / "phd_vsock.json"

    done, same = run("spec", "diff", WHOLE, other), run("spec", "diff", WHOLE, WHOLE)
    rows = fits(run("spec", "diff", WHOLE, other, "-o", "json"), "spec-diff")["differences"]

    assert {row["field"] for row in rows} >= {"cpus", "chipset.value.enable_pcie"}
    assert done.out.splitlines()[0].split() == ["WHERE", "FIELD", "BEFORE", "AFTER"]
    assert len(rows) == len(done.out.splitlines()) - 1
    assert same.out == "no difference\n"
    assert fits(run("spec", "diff", WHOLE, WHOLE, "-o", "json"), "spec-diff") == {"differences": []}


def replacements(tmp_path: Path, generation: int) -> Path:
    """Both disks of the document again, with another generation; the NIC moves too."""
    components = json.loads(TWO_DISKS.read_text())["components"]
    wanted: dict[str, Any] = {}
    for key, part in components.items():
        if part["type"] == "crucible_storage_backend":
            request = json.loads(part["component"]["request_json"])
            for region in request["sub_volumes"]:
                region["gen"] = generation
            fields = {**part["component"], "request_json": json.dumps(request)}
            wanted[key] = {"component": "CrucibleStorageBackend", "spec": fields}
        if part["type"] == "virtio_network_backend":
            wanted[key] = {"component": "VirtioNetworkBackend", "spec": {"vnic_name": "vnic-there"}}
    path = tmp_path / "replacements.json"
    path.write_text(json.dumps(wanted))
    return path


def test_plan_amend_shows_what_would_change(run: Commands, tmp_path: Path) -> None:
    wanted = replacements(tmp_path, 9)

    done = run("spec", "plan-amend", TWO_DISKS, wanted)
    plan = fits(run("spec", "plan-amend", TWO_DISKS, wanted, "-o", "json"), "spec-plan-amend")

    assert (done.code, plan["ok"], plan["errors"]) == (0, True, [])
    assert {(row["field"], row["after"]) for row in plan["differences"]} >= {
        ("region 0 generation", "9"), ("vnic_name", "vnic-there"),
    }  # fmt: skip
    assert "vnic-there" in done.out


def test_plan_amend_names_everything_against_it_and_what_may_be_allowed(run: Commands, tmp_path: Path) -> None:
    stale, empty = replacements(tmp_path, 0), tmp_path / "empty.json"
    empty.write_text("{}")

    done = run("spec", "plan-amend", TWO_DISKS, stale)
    plan = fits(run("spec", "plan-amend", TWO_DISKS, stale, "-o", "json"), "spec-plan-amend")
    unreplaced = fits(run("spec", "plan-amend", TWO_DISKS, empty, "-o", "json"), "spec-plan-amend")

    assert done.code == Exit.REFUSED
    assert {error["code"] for error in plan["errors"]} == {"generation_not_larger"}
    assert f"{len(plan['errors'])} against it; nothing would be changed" in done.out
    assert {error["code"] for error in unreplaced["errors"]} == {"backend_not_replaced"}
    allowed = run("spec", "plan-amend", TWO_DISKS, stale, "--allow-volume-change")
    kept = [error["component"].upper() for error in unreplaced["errors"]]
    every = [argument for key in kept for argument in ("--keep", key)]
    assert (allowed.code, run("spec", "plan-amend", TWO_DISKS, empty, *every).out) == (0, "no difference\n")
    assert run("spec", "plan-amend", TWO_DISKS, empty, "--keep", "*").code == 0


def test_plan_amend_says_which_file_is_wrong(run: Commands, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text("[]")

    assert run("spec", "plan-amend", TWO_DISKS, wrong).complaint.startswith(f"{wrong}: document: an array")
    assert run("spec", "plan-amend", wrong, wrong).complaint.startswith(f"{wrong}: document: an array")


# ---- RON


def test_a_spec_goes_into_a_preamble_and_comes_back(run: Commands, tmp_path: Path) -> None:
    source, captured, back = SPECS / "v1" / "phd_hyperv.json", tmp_path / "preamble.ron", tmp_path / "back.json"

    captured.write_text(run("spec", "to-ron", source, "--kind", "spec").out)
    back.write_text(run("spec", "from-ron", captured, "--kind", "spec").out)
    whole = run("spec", "from-ron", captured, "-o", "json").document

    assert json.loads(back.read_text()) == json.loads(source.read_text())
    assert whole == {"instance_spec": {"version": "V0", "spec": json.loads(source.read_text())}, "blobs": []}
    assert run("spec", "diff", source, back).out == "no difference\n"


def test_errors_and_devices_are_messages_too(run: Commands, tmp_path: Path) -> None:
    error, devices = tmp_path / "error.json", tmp_path / "devices.ron"
    error.write_text('{"RemoteError": ["Source", "it\'s"]}')
    devices.write_text('[(instance_name:"a",payload:[])]')

    written = run("spec", "to-ron", error, "--kind", "error", "-o", "json").document

    assert written == {"ron": 'RemoteError(Source,"it\\\'s")'}
    assert run("spec", "from-ron", devices, "--kind", "devices").document == [{"instance_name": "a", "payload": []}]


def test_documents_come_from_stdin_when_the_file_is_a_hyphen(run: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    def stdin(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))

    stdin("Phase")
    assert run("spec", "from-ron", "--kind", "error").document == "Phase"
    stdin(BAD)
    assert run("spec", "validate", "-").out.startswith("-:2:21: ")


def test_lines_of_ron_are_answered_one_by_one(run: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(command: str, *lines: Any) -> list[Any]:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
        done = run("spec", command, "--kind", "error", "--jsonl")
        assert done.code == 0
        return [json.loads(line) for line in done.out.splitlines()]

    read = ask("from-ron", {"id": 1, "input": "Phase"}, {"id": 2, "input": "Bogus"}, {"id": 3})
    written = ask("to-ron", {"id": 1, "input": {"Codec": "x"}}, {"id": 2, "input": 1}, {"id": 3})

    assert [answer.get("value") for answer in read] == ["Phase", None, None]
    assert (read[1]["error"]["column"], read[2]["error"]["code"]) == (6, "bad_line")
    assert [answer.get("ron") for answer in written] == ['Codec("x")', None, None]
    assert [answer["error"]["code"] for answer in written[1:]] == ["invalid_type", "bad_line"]
