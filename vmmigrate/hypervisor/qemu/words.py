"""The words of QEMU's migration stream, all integers big-endian.

Source: QEMU, migration/savevm.c, migration/ram.c (7.2).
"""

from __future__ import annotations

import struct
from typing import Final

HEADER: Final = struct.pack(">II", 0x5145564D, 3)
EOF, START, PART, END, FULL, SUBSECTION, DESCRIPTION, CONFIGURATION, COMMAND = range(9)  # kinds of sections
FOOTER: Final = 0x7E
RAM_VERSION: Final = 4
CAPABILITIES: Final = "configuration/capabilities"

ZERO, MEM_SIZE, PAGE, EOS, CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20  # flags of a RAM record, below its offset
FLUSH: Final = 0x200  # of multifd: nothing to do where there is one channel
PAGE_BITS: Final = 12
WORD: Final = struct.Struct(">Q")


def text(name: str) -> bytes:
    """A name behind its length."""
    return bytes([len(name)]) + name.encode("ascii")


def end_of_section(section_id: int) -> bytes:
    """Of a section of RAM."""
    return WORD.pack(EOS) + bytes([FOOTER]) + struct.pack(">I", section_id)
