"""The stream for a QEMU whose guest RAM is there already, from the one that another QEMU wrote. Pure."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from vmmigrate.hypervisor.qemu import words
from vmmigrate.hypervisor.qemu.ramevents import Ended, Numbers, PageBytes, Started
from vmmigrate.hypervisor.qemu.stream import DeviceStream, RamBlock

_WORD_BYTES = words.WORD.size


def crafted(started: Started, ended: Ended, *, shared: Mapping[str, int] | None = None) -> DeviceStream:
    """The stream for a QEMU whose guest RAM is there already: small blocks and devices.

    Args:
        shared: As `opening` takes it.
    """
    parts = [opening(started, shared=shared), bytes([words.END]), struct.pack(">I", started.section_id)]
    for block in ended.small_blocks:
        parts.append(_records(block.name, words.PAGE, block.numbers, block.pages))
        parts.append(_records(block.name, words.ZERO, block.zeros, np.zeros((len(block.zeros), 1), np.uint8)))
    head = b"".join([*parts, words.end_of_section(started.section_id)])
    return DeviceStream(started.machine_type, _blocks_of(started, shared), head, ended.devices, ended.tail)


def opening(started: Started, *, shared: Mapping[str, int] | None = None) -> bytes:
    """How that stream begins: a QEMU that is given this tells whether machine and blocks are its own, before the end.

    Args:
        shared: Where blocks of guest RAM begin in guest memory, as `x-ignore-shared` wants to know it: then the stream
            is one for a QEMU with that capability. Without it, one for a QEMU that has it not.
    """
    parts = [started.configuration]
    if shared is not None:
        parts.append(
            bytes([words.SUBSECTION])
            + words.text(words.CAPABILITIES)
            + struct.pack(">II", 1, 1)
            + words.text("x-ignore-shared")
        )
    parts.append(bytes([words.START]) + struct.pack(">I", started.section_id) + words.text("ram"))
    parts.append(struct.pack(">II", 0, words.RAM_VERSION))
    blocks = _blocks_of(started, shared)
    parts.append(words.WORD.pack(sum(block.size_bytes for block in blocks) | words.MEM_SIZE))
    for block in blocks:
        parts.append(words.text(block.name) + words.WORD.pack(block.size_bytes))
        parts.append(b"" if block.gpa is None else words.WORD.pack(block.gpa))
    return b"".join([*parts, words.end_of_section(started.section_id)])


def _blocks_of(started: Started, shared: Mapping[str, int] | None) -> Sequence[RamBlock]:
    """With addresses, if they are to be told; QEMU looks at those of shared blocks only."""
    if shared is None:
        return started.blocks
    return tuple(replace(block, gpa=shared.get(block.name, 0)) for block in started.blocks)


def _records(name: str, flags: int, numbers: Numbers, contents: PageBytes) -> bytes:
    if not len(numbers):
        return b""
    said = (numbers << words.PAGE_BITS | flags | words.CONTINUE).astype(">u8")
    joined = np.hstack([said.view(np.uint8).reshape(-1, _WORD_BYTES), contents]).tobytes()
    return words.WORD.pack(int(said[0]) & ~words.CONTINUE) + words.text(name) + joined[_WORD_BYTES:]
