"""`vmmigrate spec`: documents for people, one at a time (`cli.spec_files`), and for programs, by lines (`cli.spec`)."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from vmmigrate.cli.options import OutputOption, Repeated, Switch
from vmmigrate.errors import UsageError

app = App(name="spec", help="Instance specs: one at a time for people, by JSON lines for programs (docs/contracts).")

Jsonl = Annotated[bool, Switch, Parameter(help="Read and write JSON lines; this command has no other form.")]
Lines = Annotated[bool, Switch, Parameter(help="Read and write JSON lines instead of one document.")]
Features = Annotated[str, Parameter(help="Build features, by commas: falcon, failure-injection.")]
Version = Annotated[str, Parameter(help="Which version the documents are written in.")]
Kind = Annotated[str, Parameter(help="preamble, error, devices, or spec: a preamble, of which only the spec is JSON.")]

_FILE = "A document; - means stdin."

# As in `vm create`. Stays when newer versions come: what a file means must not change with a release of ours.
DEFAULT_VERSION = "v3"
_STDIN = Path("-")


# ---- one at a time


@app.command
def validate(
    file: Annotated[Path, Parameter(name="FILE", help=_FILE, allow_leading_hyphen=True)],
    /,
    *,
    spec_version: Version = DEFAULT_VERSION,
    features: Features = "",
    output: OutputOption = "text",
) -> int:
    """Say everything that is wrong with a document, where (line, column, path), and what is allowed.

    The exit code is 3 when anything is.

    What depends on one host (its memory, CPUs and allow-lists) is checked by that host's daemon.

    For example: vmmigrate spec validate web-1.json --spec-version v2
    """
    from vmmigrate.cli.exits import Exit
    from vmmigrate.cli.spec_files import spec_validate

    report = spec_validate(file, spec_version, frozenset(_listed(features)))
    if output == "json":
        _print_json(report)
    else:
        from vmmigrate.cli.spec_text import print_findings

        print_findings(str(file), report)
    return Exit.OK if report["ok"] else Exit.REFUSED


@app.command
def show(
    file: Annotated[Path, Parameter(name="FILE", help=_FILE, allow_leading_hyphen=True)],
    /,
    *,
    spec_version: Version = DEFAULT_VERSION,
    output: OutputOption = "text",
) -> int:
    """Show a document at a glance, without its secrets, and which versions can say all of it.

    For example: vmmigrate spec show web-1.json
    """
    from vmmigrate.cli.spec_files import spec_show

    report = spec_show(file, spec_version)
    if output == "json":
        _print_json(report)
    else:
        from vmmigrate.cli.spec_text import print_overview

        print_overview(report)
    return 0


@app.command
def diff(
    before: Annotated[Path, Parameter(name="A", help=_FILE, allow_leading_hyphen=True)],
    after: Annotated[Path, Parameter(name="B", help=_FILE, allow_leading_hyphen=True)],
    /,
    *,
    spec_version: Version = DEFAULT_VERSION,
    output: OutputOption = "text",
) -> int:
    """Show what differs between two documents; keys and blobs are compared, never shown.

    For example: vmmigrate spec diff at-host-a.json at-host-b.json
    """
    from vmmigrate.cli.spec_files import spec_diff

    report = spec_diff(before, after, spec_version)
    if output == "json":
        _print_json(report)
    else:
        from vmmigrate.cli.spec_text import print_differences

        print_differences(report["differences"])
    return 0


@app.command
def plan_amend(
    file: Annotated[Path, Parameter(name="SPEC", help=_FILE, allow_leading_hyphen=True)],
    replacements: Annotated[
        Path, Parameter(name="REPLACEMENTS", help="The destination's own backends, as for migrate.")
    ],
    /,
    *,
    keep: Annotated[list[str] | None, Repeated, Parameter(help="A backend to take over; * for all the rest.")] = None,
    allow_same_generation: Annotated[bool, Switch, Parameter(help="Accept generations that do not grow.")] = False,
    allow_volume_change: Annotated[bool, Switch, Parameter(help="Do not compare Crucible volumes at all.")] = False,
    spec_version: Version = DEFAULT_VERSION,
    features: Features = "",
    output: OutputOption = "text",
) -> int:
    """Show what a migration with these replacements would change, or everything against it (exit code 3).

    For example: vmmigrate spec plan-amend web-1.json at-host-b.json --keep nic0-backend
    """
    from vmmigrate.cli.exits import Exit
    from vmmigrate.cli.spec_files import allowances_of, spec_plan_amend

    allowances = allowances_of(
        keep or (), allow_same_generation=allow_same_generation, allow_volume_change=allow_volume_change
    )
    report = spec_plan_amend(file, replacements, spec_version, frozenset(_listed(features)), allowances)
    if output == "json":
        _print_json(report)
    else:
        from vmmigrate.cli.spec_text import print_plan

        print_plan(report)
    return Exit.OK if report["ok"] else Exit.REFUSED


@app.command
def from_ron(
    file: Annotated[Path, Parameter(name="FILE", help="RON text; - means stdin.", allow_leading_hyphen=True)] = _STDIN,
    /,
    *,
    kind: Kind = "preamble",
    jsonl: Lines = False,
    output: OutputOption = "text",
) -> int:
    """Turn a message of a captured stream (Propolis' migration protocol, version 0) into JSON.

    Lines: {"id", "input": "<RON text>"}

    For example: vmmigrate spec from-ron preamble.ron --kind spec > web-1.json
    """
    if jsonl:
        from vmmigrate.cli import spec

        spec.spec_from_ron(sys.stdin.buffer, sys.stdout.buffer, kind)
        return 0
    from vmmigrate.cli.spec_files import spec_from_ron

    _print_json(spec_from_ron(file, kind), pretty=output == "text")
    return 0


@app.command
def to_ron(
    file: Annotated[
        Path, Parameter(name="FILE", help="A JSON document; - means stdin.", allow_leading_hyphen=True)
    ] = _STDIN,
    /,
    *,
    kind: Kind = "preamble",
    jsonl: Lines = False,
    output: OutputOption = "text",
) -> int:
    """Turn JSON into a message of Propolis' migration protocol, version 0, exactly as a server writes it.

    Lines: {"id", "input": {...}}

    For example: vmmigrate spec to-ron web-1.json --kind spec
    """
    if jsonl:
        from vmmigrate.cli import spec

        spec.spec_to_ron(sys.stdin.buffer, sys.stdout.buffer, kind)
        return 0
    from vmmigrate.cli.spec_files import spec_to_ron

    text = spec_to_ron(file, kind)
    if output == "json":
        _print_json({"ron": text})
    else:
        sys.stdout.buffer.write(text.encode() + b"\n")
        sys.stdout.buffer.flush()
    return 0


def _print_json(document: Any, *, pretty: bool = False) -> None:
    """UTF-8 whatever the locale says, as in the line contracts."""
    import json

    text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=2 if pretty else None)
    sys.stdout.buffer.write(text.encode() + b"\n")
    sys.stdout.buffer.flush()


# ---- many at a time


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
def convert(*, to: Annotated[str, Parameter(help="v1, v2, ...")], jsonl: Jsonl = False) -> int:
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
