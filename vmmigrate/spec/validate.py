"""Everything that is wrong with a document, each with its place in the text.

Three gates one after the other, since a gate needs what the one before it made: is it a document of its version (first
fault), does it describe one machine (first fault), could a host create that machine (all faults).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from vmmigrate import jsontext
from vmmigrate.errors import SpecBuildError, SpecParseError
from vmmigrate.jsontext import Json, Path
from vmmigrate.spec import document
from vmmigrate.spec.build import build
from vmmigrate.spec.chain import AnySpec
from vmmigrate.spec.creatable import Problem, problems
from vmmigrate.spec.keys import SpecKey, spec_key
from vmmigrate.spec.latest import BootSettings

DOCUMENT: Final = "document"
MACHINE: Final = "machine"
HOST: Final = "host"

# How messages about a value name what would be right.
_ALLOWED: Final = re.compile(r", (?:expected|allowed(?: is one of| is| are|:)?) (.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault: which gate, a code, where (JSON Pointer, line, column), what, and what is allowed ('' if unsaid)."""

    gate: str
    code: str
    path: str
    line: int
    column: int
    component: SpecKey | None
    message: str
    allowed: str


def validate(version: str, text: str | bytes, features: frozenset[str] = frozenset()) -> list[Finding]:
    """Every finding; empty when a host built with *features* could create the machine.

    Raises: SpecParseError `unsupported_spec_version`.
    """
    try:
        spec = document.parse(version, text)
    except SpecParseError as error:
        if error.code == "unsupported_spec_version":
            raise
        return [_document_finding(error)]
    tree = jsontext.parse(text)
    try:
        machine = build(spec, features)
    except SpecBuildError as error:
        culprit: SpecKey | None = error.details["component"]
        path = _culprit_path(spec, tree, culprit)
        return [_located(text, MACHINE, error.code, path, culprit, error.text, "")]
    return [_host_finding(text, tree, problem) for problem in problems(machine)]


def _document_finding(error: SpecParseError) -> Finding:
    details = error.details
    reason = details.get("reason", error.text)
    allowed = _ALLOWED.search(reason)
    return Finding(
        DOCUMENT,
        error.code,
        details["path"],
        details.get("line", 1),
        details.get("column", 1),
        None,
        reason,
        allowed.group(1) if allowed else "",
    )


def _host_finding(text: str | bytes, tree: Json, problem: Problem) -> Finding:
    path: Path = problem.field
    if problem.component is not None:
        component = _component_path(tree, problem.component)
        path = (*component, "component", *problem.field) if len(component) == 2 else component
    return _located(text, HOST, problem.rule, path, problem.component, problem.text, problem.allowed)


def _located(
    text: str | bytes, gate: str, code: str, path: Path, component: SpecKey | None, message: str, allowed: str
) -> Finding:
    at = jsontext.locate(text, path)
    return Finding(gate, code, jsontext.pointer(path), at.line, at.column, component, message, allowed)


def _component_path(tree: Json, key: SpecKey) -> Path:
    """Where the component stands under the spelling that the text has; generated components have no place."""
    spelled = [name for name, _ in _members(tree, "components") if spec_key(name) == key]
    return ("components", spelled[-1]) if spelled else ("components",)


def _culprit_path(spec: AnySpec, tree: Json, culprit: SpecKey | None) -> Path:
    if culprit is None:
        return ("board", "cpuid")
    if culprit in spec.components:
        return _component_path(tree, culprit)
    for key, part in spec.components.items():
        if isinstance(part, BootSettings):
            for index, entry in enumerate(part.order):
                if entry.id == culprit:
                    return (*_component_path(tree, key), "component", "order", index)
    return ("components",)


def _members(tree: Json, name: str) -> Iterator[tuple[str, Json]]:
    assert isinstance(tree, tuple), "a document is an object"
    for key, value in tree:
        if key == name and isinstance(value, tuple):
            yield from value
