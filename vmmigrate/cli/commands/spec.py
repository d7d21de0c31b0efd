"""`vmmigrate spec … --jsonl`: one JSON object per line in, one answer per line out. The work is in `cli.spec`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Annotated

from cyclopts import App, Parameter

from vmmigrate.cli.options import Switch
from vmmigrate.errors import UsageError

app = App(name="spec", help="Instance specs, many at a time: JSON lines in, JSON lines out (docs/contracts).")

Jsonl = Annotated[bool, Switch, Parameter(help="Read and write JSON lines; needed, there is no other form yet.")]
Features = Annotated[str, Parameter(help="Build features, by commas: falcon, failure-injection.")]


@app.command
def check(*, jsonl: Jsonl = False) -> int:
    """Say whether each document is one of its version, and how it is written.

    Lines: {"id", "spec_version", "input": "<JSON text>"}

    For example: vmmigrate spec check --jsonl < questions.jsonl
    """
    _need_lines(jsonl)
    from vmmigrate.cli import spec

    spec.spec_check(sys.stdin.buffer, sys.stdout.buffer)
    return 0


@app.command
def convert(*, to: Annotated[str, Parameter(help="v1, v2 or v3.")], jsonl: Jsonl = False) -> int:
    """Convert each document to a version, exactly or not at all.

    Lines: {"id", "spec_version", "input": {...}}

    For example: vmmigrate spec convert --to v1 --jsonl < questions.jsonl
    """
    _need_lines(jsonl)
    from vmmigrate.cli import spec

    spec.spec_convert(sys.stdin.buffer, sys.stdout.buffer, to)
    return 0


@app.command
def build(*, features: Features = "", jsonl: Jsonl = False) -> int:
    """Build the machine that each document describes, and write it in the newest version.

    Lines: {"id", "spec_version", "input": {...}}

    For example: vmmigrate spec build --features failure-injection --jsonl < questions.jsonl
    """
    _need_lines(jsonl)
    from vmmigrate.cli import spec

    spec.spec_build(sys.stdin.buffer, sys.stdout.buffer, frozenset(_listed(features)))
    return 0


@app.command
def negotiate(
    *, accept: Annotated[str, Parameter(help="What the destination accepts, by commas: v1,v2.")], jsonl: Jsonl = False
) -> int:
    """Choose the newest accepted version that can say all of each document.

    Lines: {"id", "spec_version", "input": {...}}

    For example: vmmigrate spec negotiate --accept v1,v2 --jsonl < questions.jsonl
    """
    _need_lines(jsonl)
    from vmmigrate.cli import spec

    spec.spec_negotiate(sys.stdin.buffer, sys.stdout.buffer, tuple(_listed(accept)))
    return 0


@app.command
def amend(*, features: Features = "", jsonl: Jsonl = False) -> int:
    """Put a destination's own backends into each document.

    Lines: {"id", "spec_version", "source_spec", "replacements": "<JSON text>", "keep", "allow_same_generation",
    "allow_volume_change"}

    For example: vmmigrate spec amend --jsonl < questions.jsonl
    """
    _need_lines(jsonl)
    from vmmigrate.cli import spec

    spec.spec_amend(sys.stdin.buffer, sys.stdout.buffer, frozenset(_listed(features)))
    return 0


def _need_lines(jsonl: bool) -> None:
    if not jsonl:
        raise UsageError("needed is --jsonl: one JSON object per line on stdin")


def _listed(text: str) -> Iterable[str]:
    return (part.strip() for part in text.split(",") if part.strip())
