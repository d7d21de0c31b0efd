"""`vmmigrate journal`: what a daemon's journal says, from its file. Nothing is written, and no daemon is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from vmmigrate.cli.options import OutputOption

app = App(name="journal", help="The ownership journal of a daemon, also while the daemon uses it. Reads only.")

JournalFile = Annotated[Path, Parameter(name="FILE", help="journal.vmmj in the daemon's state directory.")]


@app.command
def show(file: JournalFile, /, *, output: OutputOption = "text") -> int:
    """What the records add up to, and the records; of a damaged journal what stands before the damage (4).

    For example: vmmigrate journal show /var/lib/vmmigrate/journal.vmmj
    """
    from vmmigrate.cli.exits import Exit
    from vmmigrate.cli.journal_file import journal_show
    from vmmigrate.cli.output import print_json

    shown = journal_show(file)
    if output == "json":
        print_json(shown)
    else:
        _print(shown)
    return Exit.OK if shown["ok"] else Exit.FAILED


@app.command
def check(file: JournalFile, /, *, output: OutputOption = "text") -> int:
    """Whether a daemon could start with this journal (0) or not (4), and why not.

    For example: vmmigrate journal check /var/lib/vmmigrate/journal.vmmj
    """
    from vmmigrate.cli.exits import Exit
    from vmmigrate.cli.journal_file import journal_check
    from vmmigrate.cli.output import print_fields, print_json

    checked = journal_check(file)
    (print_json if output == "json" else print_fields)(checked)
    return Exit.OK if checked["ok"] else Exit.FAILED


def _print(shown: dict[str, Any]) -> None:
    from vmmigrate.cli.output import complain, print_fields, print_table

    print_fields({name: value for name, value in shown.items() if not isinstance(value, list)})
    for name, columns in (
        ("instances", ("instance", "holding", "epoch", "last_migration", "pid")),
        ("migrations", ("migration", "instance", "role", "peer", "stage", "acknowledged")),
        ("superseded", ("instance", "epoch")),
        ("leftovers", ("instance", "pid", "socket")),
        ("records", ("number", "record", "says")),
    ):
        if shown[name]:
            print(f"\n{name}")
            print_table([_line(row) for row in shown[name]], columns)
    if shown["problem"]:
        complain(shown["problem"]["message"])


def _line(row: dict[str, Any]) -> dict[str, Any]:
    """Epochs as people say them; the fields of a record as one text; nothing in it commands a terminal."""
    line = {name: ".".join(map(str, value)) if name == "epoch" else value for name, value in row.items()}
    if "fields" in row:
        line["says"] = " ".join(f"{name}={value}" for name, value in row["fields"].items())
    return {name: _printable(value) for name, value in line.items()}


def _printable(value: Any) -> Any:
    if not isinstance(value, str) or value.isprintable():
        return value
    return value.encode("unicode_escape").decode()
