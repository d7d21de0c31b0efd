"""What no committed file may hold: addresses of package registries and paths of one machine.

    python -m tools.check_tree

Both make a tree that works only where it was written. A line that must hold one anyway ends with the words
`tree: allowed`. Lock files hold no address of any kind: where packages come from is the business of whoever installs.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = "tree: allowed"

# Spelled so that no pattern matches its own line.
ANY_ADDRESS = re.compile(r"[a-z]+:/{2}")
REGISTRY = re.compile(
    r"https?:/{2}[^/\s\"'<>]*\b(?:pypi|pythonhosted|npmjs|crates|debian|golang|mirrors?)\b", re.IGNORECASE
)
MACHINE_PATH = re.compile(r"(?<![\w.{}$<>/-])/(?:root|work|Users/\w+|home/\w+)/(?=\w|\.)")

# Documents that other programs produced; their paths are facts about guests, not about this machine.
FOREIGN = ("fixtures/",)


def tracked_files(root: Path) -> list[Path]:
    """What a commit of everything would hold; in a tree without git, every file."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        check=False,
    )
    if listing.returncode:
        return [path for path in root.rglob("*") if path.is_file()]
    names = listing.stdout.decode().split("\0")
    return [root / name for name in names if name and (root / name).is_file()]


def problems_in(name: str, text: str) -> Iterator[str]:
    """One line per fault: file, line number, what is wrong."""
    for number, line in enumerate(text.splitlines(), start=1):
        if ALLOWED in line:
            continue
        if name.endswith(".lock") and ANY_ADDRESS.search(line):
            yield f"{name}:{number}: an address in a lock file; `make lock` writes none"
        elif REGISTRY.search(line):
            yield f"{name}:{number}: the address of a package registry"
        if not name.startswith(FOREIGN) and MACHINE_PATH.search(line):
            yield f"{name}:{number}: an absolute path of one machine"


def check(root: Path) -> list[str]:
    problems: list[str] = []
    for path in tracked_files(root):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not text
        problems += problems_in(path.relative_to(root).as_posix(), text)
    return problems


def main() -> int:
    problems = check(ROOT)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
