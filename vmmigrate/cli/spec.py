"""`vmmigrate spec … --jsonl`: one JSON object per line in, one answer per line out, in the same order.

Lines are split on the line feed only and are UTF-8 whatever the locale says. No line stops the run: one that is no
question is answered with `bad_line`. Specs inside of lines are held to the same strictness as documents of their
own (duplicate keys, spellings of numbers, lone surrogates), so lines are read by `jsontext` and their sub-trees
handed on.

The contracts are docs/contracts/spec-*.json.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, BinaryIO, TypeAlias

from vmmigrate import jsontext
from vmmigrate.errors import (
    LossyDowngradeError,
    NegotiationError,
    SpecAmendError,
    SpecBuildError,
    SpecParseError,
    UsageError,
)
from vmmigrate.jsontext import Flaw, Json
from vmmigrate.spec import amend, build, captured, chain, document, machine
from vmmigrate.spec.keys import spec_key

Members: TypeAlias = dict[str, Json]
Answer: TypeAlias = dict[str, Any]


class _BadLineError(Exception):
    """A line that is no question; the answer says why."""


def spec_check(stdin: BinaryIO, stdout: BinaryIO) -> None:
    """Say of each document whether it is one of its version, and how it is written."""

    def answer(line: Members) -> Answer:
        version, text = _text(line, "spec_version"), _text(line, "input")
        try:
            spec = document.parse(version, text)
        except SpecParseError as error:
            return {"accepted": False, "error": _parse_error(error)}
        return {"accepted": True, "normalized": document.to_json(spec)}

    _answer_lines(stdin, stdout, answer)


def spec_convert(stdin: BinaryIO, stdout: BinaryIO, to: str) -> None:
    """Convert each document to version *to*, exactly or not at all. Raises: UsageError: unknown version."""
    _check_version(to)

    def answer(line: Members) -> Answer:
        try:
            spec = _spec(line, "input")
            return {"ok": True, "document": document.to_json(chain.convert(spec, to))}
        except LossyDowngradeError as error:
            return {"ok": False, "error": {"code": error.code, "message": error.text, "lost": error.details["lost"]}}
        except SpecParseError as error:
            return {"ok": False, "error": _parse_error(error)}

    _answer_lines(stdin, stdout, answer)


def spec_build(stdin: BinaryIO, stdout: BinaryIO, features: frozenset[str]) -> None:
    """Build each document's machine and write it in the newest version. Raises: UsageError: unknown feature."""
    check_features(features)

    def answer(line: Members) -> Answer:
        try:
            spec = build.build(_spec(line, "input"), features)
            return {"ok": True, "latest": document.to_json(machine.to_latest(spec))}
        except SpecBuildError as error:
            culprit = error.details["component"]
            return {"ok": False, "error": {"code": error.code, "component": culprit, "message": error.text}}
        except SpecParseError as error:
            return {"ok": False, "error": {"component": None, **_parse_error(error)}}

    _answer_lines(stdin, stdout, answer)


def spec_from_ron(stdin: BinaryIO, stdout: BinaryIO, kind: str) -> None:
    """Read messages of Propolis' protocol version 0, one RON text per line. Raises: UsageError: unknown kind."""
    check_kind(kind)

    def answer(line: Members) -> Answer:
        try:
            return {"accepted": True, "value": captured.from_ron(_text(line, "input"), kind)}
        except SpecParseError as error:
            place = {name: error.details[name] for name in ("line", "column", "reported")}
            return {"accepted": False, "error": {"code": error.code, "message": error.text, **place}}

    _answer_lines(stdin, stdout, answer)


def spec_to_ron(stdin: BinaryIO, stdout: BinaryIO, kind: str) -> None:
    """Write messages of Propolis' protocol version 0, one JSON value per line. Raises: UsageError: unknown kind."""
    check_kind(kind)

    def answer(line: Members) -> Answer:
        if "input" not in line:
            raise _BadLineError("'input' is missing")
        try:
            value = document.read_tree(captured.codec_of(kind), line["input"])
            return {"ok": True, "ron": captured.to_ron(value, kind)}
        except SpecParseError as error:
            return {"ok": False, "error": _parse_error(error)}

    _answer_lines(stdin, stdout, answer)


def spec_negotiate(stdin: BinaryIO, stdout: BinaryIO, accept: tuple[str, ...]) -> None:
    """Choose, for a destination that accepts these versions, the newest that can say all of each document."""

    def answer(line: Members) -> Answer:
        try:
            version, spec = chain.negotiate(_spec(line, "input"), accept)
            return {"ok": True, "version": version, "document": document.to_json(spec)}
        except NegotiationError as error:
            reasons = error.details["reasons"]
            return {"ok": False, "error": {"code": error.code, "message": error.text, "reasons": reasons}}
        except SpecParseError as error:
            return {"ok": False, "error": _parse_error(error)}

    _answer_lines(stdin, stdout, answer)


def spec_amend(stdin: BinaryIO, stdout: BinaryIO, features: frozenset[str]) -> None:
    """Put replacement backends into each document. Raises: UsageError: unknown feature."""
    check_features(features)

    def answer(line: Members) -> Answer:
        allowances = amend.Allowances.of(
            _keep_list(line),
            allow_same_generation=_flag(line, "allow_same_generation"),
            allow_volume_change=_flag(line, "allow_volume_change"),
        )
        replacements = _text(line, "replacements")
        try:
            spec = _spec(line, "source_spec")
            after = amend.amend(spec, amend.parse_replacements(replacements), allowances, features)
            return {"ok": True, "document": document.to_json(after)}
        except SpecAmendError as error:
            return {"ok": False, "errors": error.details["errors"]}
        except (SpecParseError, LossyDowngradeError) as error:
            return {"ok": False, "errors": [{"code": error.code, "component": None, "message": error.text}]}

    _answer_lines(stdin, stdout, answer)


# ---- lines


def _answer_lines(stdin: BinaryIO, stdout: BinaryIO, answer: Callable[[Members], Answer]) -> None:
    """Flushes after each line: a program may wait for one answer before it asks the next question."""
    for raw in stdin:
        identity = "null"
        try:
            line = _members(raw)
            identity = _identity(line)
            text = jsontext.compact(answer(line))
        except _BadLineError as error:
            text = jsontext.compact({"ok": False, "error": {"code": "bad_line", "message": str(error)}})
        stdout.write(f'{{"id":{identity},{text[1:]}\n'.encode())
        stdout.flush()


def _members(raw: bytes) -> Members:
    try:
        tree = jsontext.parse(raw)
    except SpecParseError as error:
        raise _BadLineError(error.text) from None
    if not isinstance(tree, tuple):
        raise _BadLineError("a line is one JSON object")
    members = dict(tree)
    if len(members) != len(tree):
        raise _BadLineError("a key occurs twice")
    return members


def _identity(line: Members) -> str:
    """The caller's id as it was spelled; any JSON value."""
    if "id" not in line or jsontext.find_flaw(line["id"]):
        raise _BadLineError("'id' is missing, or no value")
    return jsontext.unparse(line["id"])


def _text(line: Members, name: str) -> str:
    value = line.get(name)
    if not isinstance(value, str):
        raise _BadLineError(f"'{name}' is missing, or not a text")
    return value


def _flag(line: Members, name: str) -> bool:
    value = line.get(name, False)
    if not isinstance(value, bool):
        raise _BadLineError(f"'{name}' is neither true nor false")
    return value


def _keep_list(line: Members) -> list[str]:
    value = line.get("keep", [])
    if not isinstance(value, list):
        raise _BadLineError("'keep' is not an array of component keys")
    return [_kept_key(item) for item in value]


def _kept_key(item: Json) -> str:
    if not isinstance(item, str):
        raise _BadLineError("'keep' is not an array of component keys")
    return spec_key(item)


def _spec(line: Members, name: str) -> chain.AnySpec:
    if name not in line:
        raise _BadLineError(f"'{name}' is missing")
    version, tree = _text(line, "spec_version"), line[name]
    if isinstance(tree, Flaw):
        raise _BadLineError(f"'{name}': {tree.text}")
    return document.from_tree(version, tree)


# ---- parts of answers, and arguments


def _parse_error(error: SpecParseError) -> dict[str, Any]:
    return {"code": error.code, "message": error.text, "path": error.details.get("path", "")}


def _check_version(version: str) -> None:
    if version not in chain.CHAIN.names:
        raise UsageError(f"spec version '{version}', allowed: {', '.join(chain.CHAIN.names)}")


def check_kind(kind: str) -> None:
    """Raises: UsageError."""
    if kind not in captured.KINDS:
        raise UsageError(f"kind '{kind}', allowed: {', '.join(captured.KINDS)}")


def check_features(features: frozenset[str]) -> None:
    unknown = sorted(features - build.FEATURES)
    if unknown:
        raise UsageError(f"feature '{unknown[0]}', allowed: {', '.join(sorted(build.FEATURES))}")
