"""What commands print: one JSON document, or text for people; errors as one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vmmigrate.errors import VmMigrateError


def print_json(document: Any) -> None:
    print(json.dumps(document, ensure_ascii=False, allow_nan=False), flush=True)


def print_error(error: VmMigrateError, *, as_json: bool) -> None:
    """One line on stderr; for programs one document on stdout."""
    if as_json:
        print_json({"error": error.as_dict()})
    else:
        complain(error.text)


def complain(text: str) -> None:
    """`vmmigrate: <text>` on stderr, on one line whatever a peer put into it."""
    line = " ".join(text.split())
    print(f"vmmigrate: {line}", file=sys.stderr, flush=True)


def print_fields(document: Mapping[str, Any]) -> None:
    """One line per value; nested ones by their path."""
    lines = list(_flat("", document))
    width = max((len(name) for name, _ in lines), default=0)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """The columns of each row under their names; only the heading when there is no row."""
    cells = [[column.upper() for column in columns]]
    cells += [["-" if row.get(column) is None else str(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    for line in cells:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
