"""How `vmmigrate spec` shows things to people: tables, with whatever a document holds made harmless."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vmmigrate.cli.output import print_table


def print_findings(file: str, report: Mapping[str, Any]) -> None:
    """One block for each finding, as compilers print them."""
    console = _console()
    if report["ok"]:
        console.print(_line((f"{file}: ", ""), ("a machine that a host could create", "green")))
        return
    for finding in report["findings"]:
        where = f"{file}:{finding['line']}:{finding['column']}: "
        console.print(_line((where, "bold"), (_TITLES[finding["gate"]], "red"), (f": {finding['message']}", "")))
        about = [("component", finding["component"]), ("at", finding["path"]), ("allowed", finding["allowed"])]
        for name, value in about:
            if value:
                console.print(_line((f"    {name:<10}", "dim"), (value, "")))
    console.print(_line((f"{len(report['findings'])} found", "bold")))


_TITLES: Final = {
    "document": "not a document of this version",
    "machine": "not a machine",
    "host": "no host could create it",
}


def print_overview(report: Mapping[str, Any]) -> None:
    console, board = _console(), report["board"]
    interface = board.get("guest_hv_interface", {"type": "bhyve"})["type"]
    cpuid = f"{len(board['cpuid']['entries'])} entries" if board.get("cpuid") else "the host's"
    facts = [
        ("version", report["spec_version"]),
        ("board", f"{board['cpus']} CPUs, {board['memory_mb']} MiB, {board['chipset']['type']}"),
        ("guest sees", f"{interface}, CPUID {cpuid}"),
    ]
    if report["smbios"]:
        facts.append(("smbios", ", ".join(f"{name} {value}" for name, value in report["smbios"].items())))
    facts.append(("can be said", ", ".join(_version(name, lost) for name, lost in report["versions"].items())))
    for name, value in facts:
        console.print(_line((f"{name:<12}", "dim"), (value, "")))
    _print_table(report["components"], ("key", "type", "pci_path", "details"))


def print_differences(rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        _console().print("no difference")
    else:
        _print_table(rows, ("where", "field", "before", "after"))


def print_plan(report: Mapping[str, Any]) -> None:
    if report["ok"]:
        print_differences(report["differences"])
        return
    _print_table(report["errors"], ("code", "component", "message"))
    _console().print(_line((f"{len(report['errors'])} against it; nothing would be changed", "bold")))


def _version(name: str, lost: Sequence[Mapping[str, Any]]) -> str:
    """A version, with what it cannot say."""
    missing = [" ".join(filter(None, [part["what"], part["component"]])) for part in lost]
    return f"{name} without {' and '.join(missing)}" if missing else f"{name} exactly"


def _print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Cells fold on a terminal; a pipe gets one line for each row."""
    cells = [{column: _harmless("-" if row[column] is None else row[column]) for column in columns} for row in rows]
    if not sys.stdout.isatty():
        print_table(cells, columns)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.upper(), overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row.values()))
    _console().print(table)


def _line(*parts: tuple[str, str]) -> Text:
    return Text.assemble(*((_harmless(text), style) for text, style in parts))


def _harmless(text: Any) -> str:
    """The text without anything that a terminal would obey."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in str(text)
    )


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)
