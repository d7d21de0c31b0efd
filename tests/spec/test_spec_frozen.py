"""Frozen means frozen: schemas and documents of released versions, and the check that watches over them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from tests.spec.schema_fit import misfits
from tests.spec.spec_corpus import VERSIONS, documents, rows, specs
from tools import check_frozen, spec_schemas
from vmmigrate.jsontext import compact
from vmmigrate.spec import chain, document

ROOT = Path(__file__).parents[2]
DOCUMENT = "fixtures/specs/v1/a.json"
SCHEMA = "vmmigrate/spec/schemas/v1.json"
FRAME = "fixtures/frames/v1/a.hex"


def git(root: Path, *arguments: str) -> None:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True)


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two released files and one that is still being made, recorded, outside of git."""
    for name in (DOCUMENT, SCHEMA, FRAME):
        write(tmp_path, name, "{}\n")
    check_frozen.record(tmp_path)
    return tmp_path


@pytest.fixture
def branch(tree: Path) -> Path:
    """The same on a branch that left `main` one commit ago."""
    git(tree, "init", "-q", "-b", "main")
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "release")
    git(tree, "checkout", "-qb", "change")
    return tree


def faults(root: Path) -> list[str]:
    return check_frozen.check(root)[0]


def test_frozen_files_of_this_tree_are_as_they_were_released() -> None:
    assert faults(ROOT) == []


def test_every_file_that_will_be_frozen_is_recorded_or_named_as_unreleased() -> None:
    listed = check_frozen.recorded((ROOT / check_frozen.LIST).read_text())

    for path in check_frozen.frozen_files(ROOT):
        assert (path in listed) != check_frozen.is_unreleased(path), path


def test_without_git_the_list_alone_finds_what_changed_vanished_or_is_new(tree: Path) -> None:
    write(tree, DOCUMENT, "[]\n")
    (tree / SCHEMA).unlink()
    write(tree, "fixtures/specs/v2/new.json", "{}\n")

    found, base = check_frozen.check(tree)

    assert base is None
    assert [fault.partition(": ")[0] for fault in found] == [DOCUMENT, "fixtures/specs/v2/new.json", SCHEMA]


def test_recording_adds_what_is_new_and_forgives_nothing(tree: Path) -> None:
    write(tree, DOCUMENT, "[]\n")
    write(tree, "fixtures/specs/v2/new.json", "{}\n")

    assert check_frozen.record(tree) == ["fixtures/specs/v2/new.json"]
    assert faults(tree) == [f"{DOCUMENT}: changed, and was released"]


@pytest.mark.parametrize("name", [DOCUMENT, SCHEMA])
def test_a_planted_change_is_found_even_when_the_list_was_edited_along(branch: Path, name: str) -> None:
    assert faults(branch) == []
    write(branch, name, "[]\n")
    (branch / check_frozen.LIST).unlink()
    check_frozen.record(branch)
    git(branch, "commit", "-qam", "sly")

    found = faults(branch)

    assert [fault for fault in found if fault.startswith(f"{name}: differs from the merge base")]
    assert [fault for fault in found if fault.startswith(f"{check_frozen.LIST}: the line of {name} differs")]


def test_a_removed_file_is_found_even_when_the_list_was_edited_along(branch: Path) -> None:
    (branch / DOCUMENT).unlink()
    (branch / check_frozen.LIST).unlink()
    check_frozen.record(branch)

    assert any(fault.startswith(f"{DOCUMENT}: differs") for fault in faults(branch))


def test_a_released_file_cannot_be_declared_unreleased(branch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(branch, DOCUMENT, "[]\n")
    (branch / check_frozen.LIST).unlink()
    monkeypatch.setattr(check_frozen, "UNRELEASED", (DOCUMENT,))
    check_frozen.record(branch)

    assert [fault.partition(": ")[0] for fault in faults(branch)] == [check_frozen.LIST]


def test_new_files_and_unreleased_ones_may_change(branch: Path) -> None:
    write(branch, "fixtures/specs/v2/new.json", "{}\n")
    write(branch, FRAME, "00\n")
    check_frozen.record(branch)

    assert faults(branch) == []


def test_a_shallow_clone_without_the_merge_base_compares_with_the_list(branch: Path, tmp_path: Path) -> None:
    write(branch, "other", "1")
    git(branch, "add", "-A")
    git(branch, "commit", "-qm", "more")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", "--depth", "1", "--branch", "change", branch.as_uri(), str(clone))
    write(clone, DOCUMENT, "[]\n")

    assert check_frozen.check(clone) == ([f"{DOCUMENT}: changed, and was released"], None)


def test_a_machine_without_git_has_no_merge_base(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")

    assert check_frozen.check(tree) == ([], None)


def test_the_command_says_what_it_could_not_compare(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_frozen, "ROOT", tree)
    write(tree, "fixtures/specs/v2/new.json", "{}\n")

    codes = [check_frozen.main(arguments) for arguments in ([], ["--record"], [], ["--bogus"])]

    assert codes == [1, 0, 0, 2]
    out, err = capsys.readouterr()
    assert "recorded fixtures/specs/v2/new.json" in out
    assert "no merge base with origin/main or main" in err


# ---- schemas


def schema(version: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "vmmigrate/spec/schemas" / f"{version}.json").read_text())
    return loaded


def test_frozen_schemas_and_full_documents_are_what_the_field_tables_say() -> None:
    assert spec_schemas.versions(ROOT) == list(VERSIONS)
    for version in VERSIONS:
        for path, text in spec_schemas.wanted(ROOT, version):
            assert path.read_text(encoding="utf-8") == text, path


@pytest.mark.parametrize(("version", "path"), documents())
def test_every_frozen_document_fits_its_schema(version: str, path: Path) -> None:
    whole = schema(version)

    assert list(misfits(whole, json.loads(path.read_bytes()), whole)) == []


@given(specs())
def test_any_document_that_is_written_fits_its_schema(spec: chain.AnySpec) -> None:
    whole = schema(chain.LATEST)

    assert list(misfits(whole, document.to_json(spec), whole)) == []


def test_what_the_real_types_write_fits_the_schemas() -> None:
    schemas = {version: schema(version) for version in VERSIONS}

    for row in rows("cases"):
        if row["accepted"]:
            whole = schemas[row["spec_version"]]
            assert list(misfits(whole, row["normalized"], whole)) == [], row["id"]


def test_a_full_document_fills_every_field_of_every_component() -> None:
    for version in VERSIONS:
        full = json.loads((ROOT / "vmmigrate/spec/schemas" / f"{version}.full.json").read_text())
        whole = schema(version)
        for name, definition in whole["$defs"].items():
            assert set(definition["required"]) <= set(definition["properties"]), name
        tags = {part["type"] for part in full["components"].values()}
        (envelope,) = [whole["$defs"]["InstanceSpec"]["properties"]["components"]["additionalProperties"]]
        assert tags == {variant["properties"]["type"]["const"] for variant in envelope["oneOf"]}, version
        assert None not in full.values()
        assert set(full["board"]) == set(whole["$defs"]["Board"]["properties"])
        for field in ("subleaf", "workers"):
            assert any(f'"{field}":{digit}' in compact(full) for digit in "0123456789"), (version, field)


def test_the_tool_writes_what_is_missing_and_changes_nothing_released(tmp_path: Path) -> None:
    (tmp_path / "vmmigrate" / "spec").mkdir(parents=True)
    (tmp_path / "vmmigrate" / "spec" / "v1.py").touch()
    write(tmp_path, "vmmigrate/spec/schemas/v1.full.json", (ROOT / "vmmigrate/spec/schemas/v1.full.json").read_text())

    assert spec_schemas.write(tmp_path, []) == []
    made = tmp_path / SCHEMA
    assert made.read_text() == (ROOT / SCHEMA).read_text()
    made.write_text("{}\n")
    assert spec_schemas.write(tmp_path, []) == [made]
    assert spec_schemas.write(tmp_path, ["v1"]) == []
    made.write_text("{}\n")
    check_frozen.record(tmp_path)
    assert spec_schemas.write(tmp_path, ["v1"]) == [made]
    assert spec_schemas.main(["v99"]) == 2
