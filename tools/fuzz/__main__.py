"""`python -m tools.fuzz [TARGET ...]`: each decoder for a bounded time, by atheris where it is installed.

FUZZ_SECONDS (60) is the time for each target, FUZZ_SEED the seed of the plain fuzzer. What finds a defect is put under
tests/corpus/, from where every `make test` replays it; fix the defect, keep the file. `api` is the live API, by
schemathesis. Exit code 1: something was found.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from tools.fuzz import api
from tools.fuzz.plain import fuzz
from tools.fuzz.targets import CORPUS, TARGETS, Target

API = "api"


def why_unguided() -> str:
    """Why coverage does not guide the fuzzer here; empty when it does."""
    if importlib.util.find_spec("atheris") is not None:
        return ""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"atheris is not installed (this is Python {version}; it has a wheel for 3.11 only)"


def run(target: Target, seconds: float, seed: int) -> bool:
    """Fuzz one target and print a line. Whether nothing was found."""
    begun = time.monotonic()
    tried, found = fuzz(target, seconds, seed) if why_unguided() else _run_guided(target, seconds)
    verdict = "ok" if found is None else f"DEFECT: {_keep(target, found)}"
    print(f"{target.name:16} {tried:>10} inputs  {time.monotonic() - begun:6.1f} s  {verdict}", flush=True)
    return found is None


def _run_guided(target: Target, seconds: float) -> tuple[int, bytes | None]:
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "tools.fuzz.guided", target.name, f"{seconds:.0f}", directory]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        tried = re.findall(r"stat::number_of_executed_units: (\d+)", done.stderr)
        crashes = [path for path in Path(directory).iterdir() if path.is_file()]
        if done.returncode == 0 and not crashes:
            return int(tried[-1]) if tried else 0, None
        print(done.stderr[-6000:], file=sys.stderr)
        return int(tried[-1]) if tried else 0, crashes[0].read_bytes() if crashes else b""


def _keep(target: Target, raw: bytes) -> Path:
    path = CORPUS / target.name / sha256(raw).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return path


def main(names: Sequence[str]) -> int:
    unknown = set(names) - {*TARGETS, API}
    if unknown:
        print(f"no target {min(unknown)}; there are: {', '.join([*TARGETS, API])}", file=sys.stderr)
        return 2
    seconds, seed = float(os.environ.get("FUZZ_SECONDS", "60")), int(os.environ.get("FUZZ_SEED", "1"))
    if why_unguided():
        print(f"skipped: guidance by coverage: {why_unguided()}; inputs are mutated blindly")
    sound = [run(TARGETS[name], seconds, seed) for name in names or TARGETS if name != API]
    if not names or API in names:
        sound.append(api.run(seconds))
    return 0 if all(sound) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
