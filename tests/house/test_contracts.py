"""The import contracts of pyproject.toml: this tree keeps them, and each of them notices when it is broken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")

LAYERS = "layers: a module imports from below, never sideways"
PURE = "the pure planes know no event loop, not even indirectly"
CRYPTO = "TLS and cryptography live in net"
PROCESSES = "processes are started by hypervisor and demo only"


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    """Run the linter on the package and the contracts that lie in *tree*."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [LINT_IMPORTS, "--no-cache", "--no-logo"],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "vmmigrate", tmp_path / "vmmigrate", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_this_tree_keeps_every_contract() -> None:
    result = lint_imports(ROOT)

    assert result.returncode == 0, result.stdout + result.stderr
    for contract in (LAYERS, PURE, CRYPTO, PROCESSES):
        assert f"{contract} KEPT" in result.stdout


# What is planted: the text of new modules by path. They hang together only where the import is meant to be indirect.
VIOLATIONS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "trio in a pure plane": (PURE, {"wire/planted.py": "import trio\n"}),
    "trio two hops below wire": (
        PURE,
        {
            "wire/planted.py": "from vmmigrate.wire import planted_hop\n",
            "wire/planted_hop.py": "import vmmigrate.net.planted_end\n",
            "net/planted_end.py": "import trio\n",
        },
    ),
    "trio inside a function": (PURE, {"ram/planted.py": "def later() -> None:\n    import trio\n"}),
    "upwards": (LAYERS, {"wire/planted.py": "import vmmigrate.engine\n"}),
    "sideways between pure planes": (LAYERS, {"ram/planted.py": "import vmmigrate.wire.phases\n"}),
    "sideways between hypervisor and net": (LAYERS, {"hypervisor/planted.py": "import vmmigrate.net.identity\n"}),
    "sideways between engine and api": (LAYERS, {"engine/planted.py": "import vmmigrate.api\n"}),
    "a package without a place": (LAYERS, {"newcomer/__init__.py": '"""Nobody gave it a layer."""\n'}),
    "ssl in engine": (CRYPTO, {"engine/planted.py": "import ssl\n"}),
    "cryptography in daemon": (CRYPTO, {"daemon/planted.py": "from cryptography import x509\n"}),
    "subprocess in daemon": (PROCESSES, {"daemon/planted.py": "import subprocess\n"}),
}


@pytest.mark.parametrize("name", list(VIOLATIONS))
def test_a_planted_violation_is_named(copy: Path, name: str) -> None:
    contract, modules = VIOLATIONS[name]
    for path, text in modules.items():
        planted = copy / "vmmigrate" / path
        planted.parent.mkdir(exist_ok=True)
        planted.write_text(text)

    result = lint_imports(copy)

    assert result.returncode != 0
    assert f"{contract} BROKEN" in result.stdout, result.stdout + result.stderr


def test_what_is_allowed_stays_allowed(copy: Path) -> None:
    """So that the violations above fail for their own reason."""
    (copy / "vmmigrate/net/planted.py").write_text("import ssl\nimport trio\n")
    (copy / "vmmigrate/hypervisor/planted.py").write_text("import subprocess\n")
    (copy / "vmmigrate/demo/planted.py").write_text("import subprocess\nimport vmmigrate.daemon\n")
    orchestrator = copy / "vmmigrate/orchestrator"
    orchestrator.mkdir(exist_ok=True)
    (orchestrator / "__init__.py").write_text("import vmmigrate.api\n")

    result = lint_imports(copy)

    assert result.returncode == 0, result.stdout + result.stderr
