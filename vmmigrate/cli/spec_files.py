"""`vmmigrate spec` for people: one document at a time, from files or stdin. Every function returns what is printed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from vmmigrate.cli.requests import read_text
from vmmigrate.cli.spec import check_features, check_kind
from vmmigrate.errors import LossyDowngradeError, SpecAmendError, SpecParseError
from vmmigrate.jsontext import decode_utf8
from vmmigrate.spec import amend, captured, diff, document
from vmmigrate.spec.chain import AnySpec
from vmmigrate.spec.keys import spec_key
from vmmigrate.spec.overview import overview
from vmmigrate.spec.validate import validate

STDIN: Final = "-"


def spec_validate(file: Path, version: str, features: frozenset[str]) -> dict[str, Any]:
    """Whether a host could create the machine, and everything against it."""
    check_features(features)
    findings = validate(version, _text(file), features)
    return {"ok": not findings, "spec_version": version, "findings": [asdict(finding) for finding in findings]}


def spec_show(file: Path, version: str) -> dict[str, Any]:
    """The document at a glance, without its secrets."""
    return overview(_spec(file, version))


def spec_diff(before: Path, after: Path, version: str) -> dict[str, Any]:
    """Every difference between two documents. Generations and names are shown, keys and blobs are not."""
    return {"differences": [asdict(row) for row in diff.diff(_spec(before, version), _spec(after, version))]}


def spec_plan_amend(
    file: Path, replacements: Path, version: str, features: frozenset[str], allowances: amend.Allowances
) -> dict[str, Any]:
    """What an amendment would change, or everything against it."""
    check_features(features)
    spec, wanted = _spec(file, version), _replacements(replacements)
    plan: dict[str, Any] = {"ok": True, "spec_version": version, "differences": [], "errors": []}
    try:
        after = amend.amend(spec, wanted, allowances, features)
        return {**plan, "differences": [asdict(row) for row in diff.diff(spec, after)]}
    except SpecAmendError as error:
        return {**plan, "ok": False, "errors": error.details["errors"]}
    except LossyDowngradeError as error:
        fault = {"code": error.code, "component": None, "message": error.text}
        return {**plan, "ok": False, "errors": [fault]}


def allowances_of(keep: Iterable[str], *, allow_same_generation: bool, allow_volume_change: bool) -> amend.Allowances:
    """Component keys may be given in any spelling."""
    return amend.Allowances.of(
        [spec_key(key) for key in keep],
        allow_same_generation=allow_same_generation,
        allow_volume_change=allow_volume_change,
    )


def spec_from_ron(file: Path, kind: str) -> Any:
    """A message of Propolis' protocol version 0 as JSON. Raises: SpecParseError."""
    check_kind(kind)
    return _named(file, lambda: captured.from_ron(_text(file), kind))


def spec_to_ron(file: Path, kind: str) -> str:
    """A message of Propolis' protocol version 0 as it stands on the wire. Raises: SpecParseError."""
    check_kind(kind)
    codec = captured.codec_of(kind)
    return captured.to_ron(_named(file, lambda: document.read_text(codec, _text(file))), kind)


# ---- files


def _text(file: Path) -> str:
    """Raises: UsageError: the file cannot be read; SpecParseError: stdin is not UTF-8."""
    return decode_utf8(sys.stdin.buffer.read()) if str(file) == STDIN else read_text(file)


def _spec(file: Path, version: str) -> AnySpec:
    return _named(file, lambda: document.parse(version, _text(file)))  # type: ignore[no-any-return]


def _replacements(file: Path) -> Any:
    return _named(file, lambda: amend.parse_replacements(_text(file)))


def _named(file: Path, read: Any) -> Any:
    """An error about one of several files says which."""
    try:
        return read()
    except SpecParseError as error:
        raise SpecParseError(f"{file}: {error.text}", code=error.code, details=error.details) from None
