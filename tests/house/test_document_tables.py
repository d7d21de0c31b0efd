"""Tables in documents are those of the code."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tools.document_tables import DOCS, TABLES, main, redrawn


@pytest.mark.parametrize("name", TABLES)
def test_a_table_in_a_document_is_the_one_of_the_code(name: str) -> None:
    document = (DOCS / TABLES[name].document).read_text(encoding="utf-8")

    assert redrawn(name, document) == document, "run 'make docs'"


@pytest.mark.parametrize("name", TABLES)
def test_a_stale_table_is_noticed_and_redrawn(tmp_path: Path, name: str) -> None:
    for table in TABLES.values():
        shutil.copy(DOCS / table.document, tmp_path)
    path = tmp_path / TABLES[name].document
    right = path.read_text(encoding="utf-8")
    row = next(line for line in TABLES[name].draw() if "---" not in line)
    path.write_text(right.replace(row, row + " by hand |", 1), encoding="utf-8")

    assert main(["--check"], tmp_path) == 1
    assert main([], tmp_path) == 0
    assert path.read_text(encoding="utf-8") == right
    assert main(["--check"], tmp_path) == 0


@pytest.mark.parametrize("name", TABLES)
def test_a_document_without_its_markers_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="exactly one line"):
        redrawn(name, "no markers")


def test_an_unknown_argument_is_answered_with_what_there_is() -> None:
    assert main(["--redraw"]) == 2
