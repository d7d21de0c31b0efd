"""How long 10,000 questions about specs take, command by command, against Python's own JSON on the same lines.

    python bench/spec_lines.py [--json]

The contract (docs/contracts/spec-*.json) is 10,000 lines in at most 5 s. A ratio against `json.loads` and `json.dumps`
of each line, measured in turns in one process, is what can be compared between machines.
"""

from __future__ import annotations

import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vmmigrate.cli import spec  # noqa: E402

CORPUS = ROOT / "fixtures" / "specs" / "conformance"
LINES = 10_000
ROUNDS = 3
ALLOWANCES = {"keep": ["*"], "allow_same_generation": True, "allow_volume_change": True}


def rows(name: str) -> list[dict[str, Any]]:
    with (CORPUS / f"{name}.jsonl").open(encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


def questions(name: str) -> list[dict[str, Any]]:
    """One line of a command for each row of a corpus that fits it."""
    if name == "check":
        return [{key: row[key] for key in ("id", "spec_version", "input")} for row in rows("cases")]
    if name == "amend":
        return [
            {"id": row["id"], "spec_version": "v1", "source_spec": row["source_spec"], **ALLOWANCES}
            | {"replacements": row["replacements_text"]}
            for row in rows("amend")
        ]
    if name == "from-ron":
        return [{"id": row["id"], "input": row["input"]} for row in rows("ron_cases")]
    if name == "to-ron":
        return [{"id": row["id"], "input": row["value"]} for row in rows("ron_cases") if row["accepted"]]
    corpus = rows("spec_build") if name == "build" else rows("conversions")
    return [
        {"id": row["id"], "spec_version": row.get("spec_version", row.get("from")), "input": row["input"]}
        for row in corpus
    ]


COMMANDS: dict[str, Callable[[io.BytesIO, io.BytesIO], None]] = {
    "check": spec.spec_check,
    "convert": partial(spec.spec_convert, to="v2"),
    "build": partial(spec.spec_build, features=frozenset()),
    "negotiate": partial(spec.spec_negotiate, accept=("v1", "v2")),
    "amend": partial(spec.spec_amend, features=frozenset()),
    "from-ron": partial(spec.spec_from_ron, kind="preamble"),
    "to-ron": partial(spec.spec_to_ron, kind="preamble"),
}


def seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def plain_json(lines: list[bytes]) -> None:
    for line in lines:
        json.dumps(json.loads(line), ensure_ascii=False, separators=(",", ":"))


def run(name: str) -> dict[str, Any]:
    corpus = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in questions(name)]
    lines = (corpus * (LINES // len(corpus) + 1))[:LINES]
    ours, plain = [], []
    for _ in range(ROUNDS):
        out = io.BytesIO()
        ours.append(seconds(lambda: COMMANDS[name](io.BytesIO(b"".join(lines)), out)))  # noqa: B023
        assert out.getvalue().count(b"\n") == LINES
        plain.append(seconds(lambda: plain_json(lines)))
    return {"command": name, "lines": LINES, "seconds": ours, "plain_json_seconds": plain}


def main() -> None:
    runs = [run(name) for name in COMMANDS]
    medians = {each["command"]: statistics.median(each["seconds"]) for each in runs}
    ratios = {
        f"{each['command']} / plain JSON": round(
            statistics.median(a / b for a, b in zip(each["seconds"], each["plain_json_seconds"], strict=True)), 2
        )
        for each in runs
    }
    if "--json" in sys.argv[1:]:
        print(json.dumps({"name": "spec_lines", "ratios": ratios, "runs": runs}))
        return
    for name, median in medians.items():
        print(f"{name:<10} {median:6.2f} s for {LINES} lines, {ratios[f'{name} / plain JSON']:5.1f} x plain JSON")


if __name__ == "__main__":
    main()
