"""Draw tables of the code into documents, each between its two markers.

    python -m tools.document_tables           rewrite what lies between the markers
    python -m tools.document_tables --check   change nothing; fail when a table is stale

What the code decides by a table is shown from that table. One kept by hand would drift from it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmmigrate.engine.limits import ORDER, ROWS, Deadlines
from vmmigrate.ownership.requests import DONE, REFUSALS, Request

DOCS = Path(__file__).resolve().parent.parent / "docs"


def request_table() -> Iterator[str]:
    """A row per standing of an instance, a column per request; what is done is not repeated."""
    yield f"| the instance is | {' | '.join(f'`{request}`' for request in Request)} |"
    yield f"| --- |{' --- |' * len(Request)}"
    for found, row in REFUSALS.items():
        cells = ("done" if row[request] == DONE else f"`{row[request]}`" for request in Request)
        yield f"| {found} | {' | '.join(cells)} |"


def deadline_table() -> Iterator[str]:
    """A row per wait: its setting, default, bounds, who waits for what, and what it is then called."""
    yield "| `limits.` | default | allowed | who waits for what | at the source | at the destination | in the API |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    defaults = Deadlines()
    for name, row in ROWS.items():
        codes = " | ".join(f"`{code}`" if code else "" for code in (row.source, row.destination, row.api))
        bounds = f"{row.least_s:g} to {row.most_s:g}"
        yield f"| `{name}` | {getattr(defaults, name):g} | {bounds} | {row.awaits} | {codes} |"


def order_table() -> Iterator[str]:
    """What the deadlines must keep among each other, and what goes wrong else."""
    yield "| needed | because |"
    yield "| --- | --- |"
    for each in ORDER:
        times = f"{each.times} × " if each.times > 1 else ""
        yield f"| {times}`{each.shorter}` < `{each.longer}` | {each.why} |"


@dataclass(frozen=True)
class Drawn:
    """One table: where it stands, and what draws it."""

    document: str
    source: str
    draw: Callable[[], Iterator[str]]


TABLES: Mapping[str, Drawn] = {
    "requests": Drawn("api.md", "vmmigrate/ownership/requests.py", request_table),
    "deadlines": Drawn("configuration.md", "vmmigrate/engine/limits.py", deadline_table),
    "order": Drawn("configuration.md", "vmmigrate/engine/limits.py", order_table),
}


def redrawn(name: str, document: str) -> str:
    """*document* with its table *name* as the code now has it.

    Raises: ValueError: the markers are not there exactly once each, in order.
    """
    table = TABLES[name]
    begin = f"<!-- {name}: drawn by `make docs` from {table.source}; do not edit -->"
    end = f"<!-- {name}: end -->"
    before, found_begin, rest = document.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end) or begin in rest or end in after:
        raise ValueError(f"need exactly one line {begin!r} and after it one line {end!r}")
    return "\n".join([f"{before}{begin}", "", *table.draw(), "", f"{end}{after}"])


def main(arguments: Sequence[str], docs: Path = DOCS) -> int:
    if set(arguments) - {"--check"}:
        print(__doc__, file=sys.stderr)
        return 2
    stale = False
    for name, table in TABLES.items():
        path = docs / table.document
        document = path.read_text(encoding="utf-8")
        wanted = redrawn(name, document)
        if document == wanted:
            continue
        if "--check" in arguments:
            print(f"docs/{table.document}: the table of {name} is stale; run 'make docs'", file=sys.stderr)
            stale = True
        else:
            path.write_text(wanted, encoding="utf-8")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
