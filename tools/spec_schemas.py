"""Schemas of the spec versions, as package data beside the version modules.

    python -m tools.spec_schemas          write what is missing; refuse to change what is there
    python -m tools.spec_schemas v6       also rewrite the one of a version that is not released yet

`vmmigrate/spec/schemas/<version>.json` is made from the field tables of `vmmigrate/spec/<version>.py`. The full
document beside it, `<version>.full.json` (every component, every field filled), is written by hand; this only spells it
as documents are written. The chain refuses to be imported while either is missing, so this does not import it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from tools.check_frozen import LIST, recorded
from vmmigrate.jsontext import compact
from vmmigrate.spec.reading import read_text
from vmmigrate.spec.schema import schema_of

ROOT = Path(__file__).resolve().parent.parent


def versions(root: Path) -> list[str]:
    """Every version that has a module."""
    return sorted(path.stem for path in (root / "vmmigrate" / "spec").glob("v[0-9]*.py"))


def wanted(root: Path, version: str) -> Iterator[tuple[Path, str]]:
    """The version's files and what has to be in them.

    Raises: SpecParseError: the full document is none; FileNotFoundError: it was not written yet.
    """
    model = import_module(f"vmmigrate.spec.{version}").InstanceSpec
    schemas = root / "vmmigrate" / "spec" / "schemas"
    yield schemas / f"{version}.json", json.dumps(schema_of(version, model), indent=2) + "\n"
    full = schemas / f"{version}.full.json"
    document = read_text(model.table, full.read_bytes())
    yield full, compact(model.table.write(document)) + "\n"


def write(root: Path, rewrite: Sequence[str]) -> list[Path]:
    """Write the files of every version; those that differ and were left alone."""
    released = recorded((root / LIST).read_text()) if (root / LIST).exists() else {}
    refused = []
    for version in versions(root):
        for path, text in wanted(root, version):
            name = path.relative_to(root).as_posix()
            differs = path.exists() and path.read_text(encoding="utf-8") != text
            if differs and (version not in rewrite or name in released):
                refused.append(path)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return refused


def main(arguments: Sequence[str]) -> int:
    if set(arguments) - set(versions(ROOT)):
        print(__doc__, file=sys.stderr)
        return 2
    refused = write(ROOT, arguments)
    for path in refused:
        print(f"{path}: differs from what this build writes; a released version never changes", file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
