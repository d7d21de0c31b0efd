"""RON, the text form in which Propolis' migration protocol, version 0, sends specs, errors and device states.

`read` and `write` take the codecs of `spec.wire_v0`. They accept, reject, report and write what ron 0.8.1 with
the types of that protocol does; JSON is not involved, so nothing of it is coerced or lost on the way.

    scan     tokens and positions
    source   values as they are asked for: `live` from the text, `kept` from before the type was known
    shapes   what is asked for, type by type
    write    the way back
"""

from __future__ import annotations

from typing import Any

from vmmigrate.errors import SpecParseError
from vmmigrate.jsontext import decode_utf8
from vmmigrate.spec.decode import Codec
from vmmigrate.spec.ron.faults import RonError
from vmmigrate.spec.ron.live import Live
from vmmigrate.spec.ron.scan import Scanner
from vmmigrate.spec.ron.shapes import reader_of
from vmmigrate.spec.ron.write import write

__all__ = ["read", "write"]


def read(codec: Codec, text: str | bytes) -> Any:
    """The value that a RON text holds.

    Raises: SpecParseError; details hold line and column (in bytes, as theirs), and `reported`, the text that the
        reference implementation reports to its peer.
    """
    scanner = Scanner(decode_utf8(text))
    source = Live(scanner)
    try:
        scanner.read_head()
        value = reader_of(codec)(source)
        source.end()
    except RonError as error:
        line, column = scanner.position()
        raise SpecParseError(
            f"{error.text} (line {line}, column {column})",
            code=error.code,
            details={"path": "", "line": line, "column": column, "reported": error.text},
        ) from None
    return value
