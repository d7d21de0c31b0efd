"""What comes out of QEMU's migration stream with RAM (`ramstream`). Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from vmmigrate.hypervisor.qemu import words
from vmmigrate.hypervisor.qemu.stream import DeviceSection, RamBlock
from vmmigrate.memory import Runs, runs_of_pages

Numbers = npt.NDArray[np.int64]
PageBytes = npt.NDArray[np.uint8]  # shape (n, 4096)


class SectionKind(IntEnum):
    """Of a section of RAM."""

    START = words.START
    PART = words.PART
    END = words.END


@dataclass(frozen=True, slots=True)
class Started:
    """What is to be moved: nothing of RAM has come yet.

    Attributes:
        configuration: The stream up to its first command or section, as it came.
        section_id: That of RAM.
    """

    machine_type: str
    blocks: tuple[RamBlock, ...]
    configuration: bytes
    section_id: int


@dataclass(frozen=True, slots=True, eq=False)
class PageRuns:
    """Pages of a block of guest RAM, ascending.

    Attributes:
        numbers: Within the block.
        pages: Shape (n, 4096), read only: a view of what was received, and void when more is received. Rows are
            contiguous, the whole is not.
    """

    block: str
    numbers: Numbers
    pages: PageBytes

    @property
    def runs(self) -> Runs:
        return runs_of_pages(self.numbers)


@dataclass(frozen=True, slots=True, eq=False)
class ZeroPages:
    """Pages of zeros of a block of guest RAM, ascending; numbers are those within the block."""

    block: str
    numbers: Numbers

    @property
    def runs(self) -> Runs:
        return runs_of_pages(self.numbers)


@dataclass(frozen=True, slots=True)
class SectionEnded:
    """A section of RAM is over. After START all is set up; after END no page follows."""

    kind: SectionKind


@dataclass(frozen=True, slots=True, eq=False)
class SmallBlock:
    """What was last said of the pages of a block that is not guest RAM. Page numbers ascend.

    Attributes:
        pages: Shape (len(numbers), 4096).
        zeros: Pages that are zeros.
    """

    name: str
    numbers: Numbers
    pages: PageBytes
    zeros: Numbers


@dataclass(frozen=True, slots=True, eq=False)
class Ended:
    """The stream is whole.

    Attributes:
        tail: The end mark and the description.
    """

    small_blocks: tuple[SmallBlock, ...]
    devices: tuple[DeviceSection, ...]
    tail: bytes


Event = Started | PageRuns | ZeroPages | SectionEnded | Ended
