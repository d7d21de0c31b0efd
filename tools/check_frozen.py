"""What was released never changes: spec documents and schemas, golden frames and sealed vectors, of every version.

    python -m tools.check_frozen            compare; says every file that changed, vanished or is not recorded
    python -m tools.check_frozen --record   add files that are new to the list; changes none of its lines

Two witnesses, since each alone can be missing or be edited along: the list of hashes in the tree
(`fixtures/specs/frozen.sha256`), and the files as they are at the merge base with the main branch, list included: so a
released file cannot be declared unreleased. A clone without that history (shallow, or no git at all) has only the list,
and says so.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = "fixtures/specs/frozen.sha256"
FROZEN = ("fixtures/specs/v*/*", "fixtures/frames/v*/*", "fixtures/sealed/v*/*", "vmmigrate/spec/schemas/*.json")
# Versions that are still being made. The release takes their lines out and runs --record.
UNRELEASED = ("fixtures/frames/v1/*", "fixtures/sealed/v1/*")
MAIN_BRANCHES = ("origin/main", "main")


def frozen_files(root: Path) -> dict[str, str]:
    """Hash by path of every file that is frozen, or will be with the release."""
    paths = sorted(path for pattern in FROZEN for path in root.glob(pattern) if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def is_unreleased(path: str) -> bool:
    return any(Path(path).match(pattern) for pattern in UNRELEASED)


def recorded(text: str) -> dict[str, str]:
    """Hash by path of a list; lines are as `sha256sum` writes them."""
    lines = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    return {path.strip(): digest for digest, path in lines}


def to_text(hashes: Mapping[str, str]) -> str:
    return "".join(f"{digest}  {path}\n" for path, digest in sorted(hashes.items()))


def against_list(files: Mapping[str, str], listed: Mapping[str, str]) -> Iterator[str]:
    for path, digest in listed.items():
        if path not in files:
            yield f"{path}: is gone, and was released"
        elif files[path] != digest:
            yield f"{path}: changed, and was released"
    for path in files.keys() - listed.keys():
        if is_unreleased(path):
            continue
        yield f"{path}: is not in {LIST}; `python -m tools.check_frozen --record` adds it"


def against_base(root: Path, base: str, files: Mapping[str, str], listed: Mapping[str, str]) -> Iterator[str]:
    """Against the files at a commit, and against the list there: a line of it may not change either."""
    for path in _files_at(root, base):
        if is_unreleased(path):
            continue
        digest = hashlib.sha256(_git(root, "cat-file", "blob", f"{base}:{path}") or b"").hexdigest()
        if files.get(path) != digest:
            yield f"{path}: differs from the merge base {base[:12]}"
    before = _git(root, "cat-file", "blob", f"{base}:{LIST}")
    for path, digest in recorded((before or b"").decode()).items():
        if listed.get(path) != digest:
            yield f"{LIST}: the line of {path} differs from the merge base {base[:12]}"


def merge_base(root: Path) -> str | None:
    """Where this branch left the main one; None without git, without a main branch, or in a shallow clone."""
    for branch in MAIN_BRANCHES:
        found = _git(root, "merge-base", "HEAD", branch)
        if found:
            return found.decode().strip()
    return None


def check(root: Path) -> tuple[list[str], str | None]:
    """Every fault, and the merge base that was compared with, if there is one."""
    files, base = frozen_files(root), merge_base(root)
    listed = recorded((root / LIST).read_text()) if (root / LIST).exists() else {}
    faults = {*against_list(files, listed)}
    if base is not None:
        faults |= {*against_base(root, base, files, listed)}
    return sorted(faults), base


def record(root: Path) -> list[str]:
    """Add what is not in the list yet; the paths that were added."""
    listed = recorded((root / LIST).read_text()) if (root / LIST).exists() else {}
    new = {path: digest for path, digest in frozen_files(root).items() if not (path in listed or is_unreleased(path))}
    (root / LIST).parent.mkdir(parents=True, exist_ok=True)
    (root / LIST).write_text(to_text({**listed, **new}))
    return sorted(new)


def _files_at(root: Path, commit: str) -> list[str]:
    listing = _git(root, "ls-tree", "-r", "-z", "--name-only", commit, "fixtures/", "vmmigrate/spec/") or b""
    names = [name for name in listing.decode().split("\0") if name]
    return [name for name in names if any(Path(name).match(pattern) for pattern in FROZEN)]


def _git(root: Path, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def main(arguments: Sequence[str]) -> int:
    if set(arguments) - {"--record"}:
        print(__doc__, file=sys.stderr)
        return 2
    if arguments:
        for path in record(ROOT):
            print(f"recorded {path}")
    faults, base = check(ROOT)
    for fault in faults:
        print(fault, file=sys.stderr)
    if base is None:
        print(f"no merge base with {' or '.join(MAIN_BRANCHES)}: compared with {LIST} only", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
