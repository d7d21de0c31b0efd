"""What the preamble says of RAM, from the source's bitmap to the destination's and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmigrate.engine import preamble
from vmmigrate.errors import RemoteProtocolError
from vmmigrate.memory import PAGE_SIZE, PageBitmap, RamLayout, Region
from vmmigrate.spec import document
from vmmigrate.wire.messages import Preamble

LAYOUT = RamLayout([Region(0, 64 * PAGE_SIZE), Region(1 << 32, 64 * PAGE_SIZE)])
TOP = (1 << 32) + 64 * PAGE_SIZE


def composed(layout: RamLayout, populated: PageBitmap) -> Preamble:
    spec = document.parse("v1", (SPEC).encode())
    return preamble.compose(
        spec_version="v1",
        spec=spec,
        blobs={},
        properties={},
        run_state="running",
        epoch=(1, 1),
        layout=layout,
        populated=populated,
        devices=(),
        facts={},
    )


SPEC = '{"board":{"cpus":1,"memory_mb":1,"chipset":{"type":"i440_fx","value":{"enable_pcie":false}}},"components":{}}'


@given(st.binary(min_size=16, max_size=16))
def test_what_was_touched_is_read_as_it_was_written_also_across_the_hole_between_regions(bits: bytes) -> None:
    populated = PageBitmap.from_bytes(128, bits)

    assert preamble.read_extents(composed(LAYOUT, populated), LAYOUT) == populated


def test_a_fragmented_map_is_told_coarser_and_never_leaves_a_page_out() -> None:
    pages = 1 << 18
    layout = RamLayout.for_size(pages * PAGE_SIZE)
    scattered = PageBitmap.from_flags(np.arange(pages) % 3 == 0)

    told = composed(layout, scattered)

    assert len(told.populated) == 1
    assert (scattered - preamble.read_extents(told, layout)).is_empty()


@pytest.mark.parametrize(
    "extent",
    [(64 * PAGE_SIZE, 1), (1, 1), (TOP, 1), (TOP - PAGE_SIZE, 2), (0, 129), (1 << 63, 1), (0, (1 << 64) - 1)],
    ids=["in the hole", "not aligned", "above all", "beyond the end", "too long", "huge address", "huge length"],
)
def test_an_extent_outside_guest_ram_is_refused(extent: tuple[int, int]) -> None:
    hostile: Any = replace(composed(LAYOUT, PageBitmap(128)), populated=((0, 1), extent))

    with pytest.raises(RemoteProtocolError) as caught:
        preamble.read_extents(hostile, LAYOUT)
    assert caught.value.code == "bad_regions"
