"""Request bodies from files and options."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from vmmigrate import jsontext
from vmmigrate.errors import SpecParseError, UsageError


def read_text(path: Path) -> str:
    """Raises: UsageError `unreadable`."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as exc:
        raise UsageError(f"{path}: {exc.strerror}", code="unreadable") from None
    except UnicodeDecodeError as exc:
        raise UsageError(f"{path}: not UTF-8 at byte {exc.start}", code="unreadable") from None


def create_request(
    spec: Path,
    spec_version: str,
    *,
    instance_id: str | None,
    program: dict[str, Any],
    name: str = "",
    ram_bytes: int | None = None,
    **more: Any,
) -> str:
    """The body of `POST /v1/instances`, and of `:adopt`, with *more* fields of theirs.

    The spec goes into it as it is spelled: its decoder is strict about that.

    Raises: UsageError; SpecParseError: the file is no JSON document.
    """
    text = read_text(spec)
    try:
        jsontext.parse(text)  # exactly one value, or it could add members of its own to the request
    except SpecParseError as error:
        raise SpecParseError(f"{spec}: {error.text}", code=error.code, details=error.details) from None
    beside: dict[str, Any] = {
        "id": str(uuid.uuid4()) if instance_id is None else instance_id,
        "spec_version": spec_version,
        "name": name,
        "program": program,
        "overrides": {} if ram_bytes is None else {"ram_bytes": ram_bytes},
        **more,
    }
    return f'{json.dumps(beside)[:-1]}, "spec": {text}}}'


def program_of(text: str) -> dict[str, Any]:
    """A program by its name, or as a JSON object. Raises: UsageError."""
    if not text.lstrip().startswith("{"):
        return {"name": text}
    try:
        program = json.loads(text)
    except ValueError as exc:
        raise UsageError(f"--program: not JSON: {exc}") from None
    assert isinstance(program, dict)
    return program
