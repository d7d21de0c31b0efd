"""The tree as a whole: lock files, the README's first screen, sizes, the generated diagram, the make targets."""

from __future__ import annotations

import ast
import itertools
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from importlib.metadata import version as installed_version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import vmmigrate
from tools import check_tree, phase_diagram

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = ("requirements.lock", "requirements-dev.lock", "requirements-fuzz.lock")
TARGETS = (
    "setup demo demo-qemu test lint type contracts check check-long model compat fixtures bench".split()  # noqa: SIM905
    + "faults fuzz docs lock fmt clean help".split()  # noqa: SIM905
)
SOURCES = sorted([*(ROOT / "vmmigrate").rglob("*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "bench").glob("*.py")])


def pins(lock: str) -> dict[str, set[str]]:
    """Package name to versions; a universal lock may hold one per Python version."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([a-z0-9._-]+)==(\S+)", (ROOT / lock).read_text(), re.MULTILINE):
        found.setdefault(name, set()).add(version)
    return found


# -- lock files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_holds_no_address_and_a_hash_for_every_pin(lock: str) -> None:
    text = (ROOT / lock).read_text()

    assert "://" not in text
    assert "--index" not in text
    assert "--find-links" not in text
    assert len(re.findall(r"==\S+[^\n]*\\\n    --hash=sha256:", text)) == sum(map(len, pins(lock).values()))


def test_each_smaller_lock_is_part_of_the_larger_one() -> None:
    """`make demo` fills .venv from the smallest, `make test` and `make fuzz` add: nothing may change its version."""
    for small, large in itertools.pairwise(map(pins, LOCKS)):
        assert {name: large.get(name) for name in small} == small


@pytest.mark.parametrize(
    ("lock", "extras"), list(zip(LOCKS, [(), ("test", "dev"), ("test", "dev", "fuzz")], strict=True)), ids=LOCKS
)
def test_lock_satisfies_pyproject(lock: str, extras: tuple[str, ...]) -> None:
    project = PYPROJECT["project"]
    wanted = [*project["dependencies"], *PYPROJECT["dependency-groups"]["build"]]
    wanted += [line for extra in extras for line in project["optional-dependencies"][extra]]
    locked = pins(lock)

    for requirement in map(Requirement, wanted):
        versions = locked.get(requirement.name.lower())
        assert versions, f"{requirement.name} is not in {lock}; run 'make lock'"
        assert all(requirement.specifier.contains(version) for version in versions), f"{requirement}: run 'make lock'"


def test_build_needs_the_same_setuptools_with_and_without_isolation() -> None:
    assert PYPROJECT["build-system"]["requires"] == PYPROJECT["dependency-groups"]["build"]


def test_version_is_told_alike_everywhere() -> None:
    assert vmmigrate.__version__ == PYPROJECT["project"]["version"] == installed_version("vmmigrate")


# -- what a newcomer sees --------------------------------------------------------------------------------------------


def test_readme_shows_both_commands_on_its_first_screen() -> None:
    first_screen = (ROOT / "README.md").read_text().splitlines()[:30]

    assert any("make demo" in line for line in first_screen)
    assert any("make test" in line for line in first_screen)


def test_make_alone_lists_every_target() -> None:
    listing = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    listed = re.findall(r"^  make (\S+) +\S", listing, re.MULTILINE)
    assert sorted(listed) == sorted(TARGETS)


@pytest.mark.parametrize("script", [".ci/run", "tools/venv", "tools/other_qemu", "tools/hooks/pre-commit"])
def test_script_is_executable_and_has_no_syntax_error(script: str) -> None:
    path = ROOT / script

    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", path], check=True)


def test_a_second_qemu_that_cannot_be_fetched_is_told_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """CI goes on without it, and the tests that need it skip."""
    tools = tmp_path / "tools"
    tools.mkdir()
    shutil.copy(ROOT / "tools/other_qemu", tools)
    for program in ("bash", "dirname", "awk"):
        (tmp_path / program).symlink_to(str(shutil.which(program)))

    done = subprocess.run(
        [str(shutil.which("bash")), tools / "other_qemu"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "no QEMU from bookworm-backports: apt-get is not there\n"
    assert not (tmp_path / ".cache").exists()


# -- what is generated -----------------------------------------------------------------------------------------------


def test_phase_diagram_in_architecture_is_fresh() -> None:
    document = (ROOT / "ARCHITECTURE.md").read_text()

    assert phase_diagram.redrawn(document) == document, "run 'make docs'"


def test_stale_phase_diagram_is_redrawn() -> None:
    document = (ROOT / "ARCHITECTURE.md").read_text()
    stale = document.replace("in_doubt", "in_dout")

    assert stale != document
    assert phase_diagram.redrawn(stale).count("stateDiagram-v2") == 1
    assert phase_diagram.section() in phase_diagram.redrawn(stale)


def test_document_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="exactly one line"):
        phase_diagram.redrawn("# Architecture\n")


# -- what no file holds ----------------------------------------------------------------------------------------------


def test_tree_holds_no_registry_address_and_no_path_of_one_machine() -> None:
    assert check_tree.check(ROOT) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("requirements.lock", "--index-url https" + "://example.org/simple"),
        ("docs/x.md", "see https" + "://pypi.example/simple/trio"),
        ("docs/x.md", "cd /ro" + "ot/project"),
        ("tools/x.py", 'ROOT = "/ho' + 'me/somebody/vmmigrate"'),
    ],
)
def test_check_tree_finds(name: str, line: str) -> None:
    assert len(list(check_tree.problems_in(name, f"first\n{line}\n"))) == 1


@pytest.mark.parametrize("line", ["https" + "://www.example.org/", "under <root>/wo" + "rk/x", "vmmigrate/wo" + "rk/"])
def test_check_tree_lets_pass(line: str) -> None:
    assert list(check_tree.problems_in("docs/x.md", line)) == []


# -- sizes -----------------------------------------------------------------------------------------------------------


def functions() -> Iterator[tuple[str, int]]:
    """(where, lines) of every function, its docstring included, its decorators not."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                where = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                yield where, (node.end_lineno or node.lineno) - node.lineno + 1


def test_no_function_is_longer_than_60_lines_and_nine_in_ten_not_than_35() -> None:
    sizes = list(functions())

    assert [f"{where}: {lines} lines" for where, lines in sizes if lines > 60] == []
    assert sum(lines <= 35 for _, lines in sizes) >= 0.9 * len(sizes)


def test_no_module_is_longer_than_600_lines() -> None:
    sizes = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in SOURCES}

    assert {str(path): lines for path, lines in sizes.items() if lines > 600} == {}
