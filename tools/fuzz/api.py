"""The live API of a daemon process under schemathesis: every route, with requests that fit its schema and that do not.

Looked for: answers with status 5xx, answers that are no JSON error of ours, connections that break. The daemon holds
no instance that anybody needs, and is ended afterwards with every guest that was started.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import trio

from tools.faults.site import Site, guest_pids, open_site

CHECKS = "not_a_server_error,negative_data_rejection,content_type_conformance"


def run(seconds: float) -> bool:
    """Whether nothing was found; prints a line, or why it was skipped."""
    if importlib.util.find_spec("schemathesis") is None:
        print("api              skipped: schemathesis is not installed (extra `fuzz`)")
        return True
    with tempfile.TemporaryDirectory() as directory:
        return trio.run(_run, Path(directory), seconds)


async def _run(root: Path, seconds: float) -> bool:
    async with open_site(root, "alpha") as site:
        alpha = await site.start("alpha")
        done = await trio.run_process(
            _command(site, alpha.url, seconds), check=False, capture_stdout=True, stderr=subprocess.STDOUT
        )
        text = done.stdout.decode(errors="replace")
        alive = alpha.process.returncode is None
    leaked = guest_pids(root)
    sound = done.returncode == 0 and alive and not leaked
    cases = [line.strip() for line in text.splitlines() if "generated" in line]
    print(f"api              {cases[-1] if cases else '-'}  {'ok' if sound else 'DEFECT'}")
    if not sound:
        print(text[-20_000:], file=sys.stderr)
        print((root / "alpha.log").read_text(errors="replace")[-10_000:], file=sys.stderr)
    return sound


def _command(site: Site, url: str, seconds: float) -> list[str]:
    files = site.operator
    return [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"),
        *("--request-cert", str(files.certificate), "--request-cert-key", str(files.key)),
        *("--tls-verify", str(files.ca)),
        *("--checks", CHECKS, "--mode", "all", "--max-time", f"{seconds:.0f}", "--no-color", "--seed", "1"),
    ]
