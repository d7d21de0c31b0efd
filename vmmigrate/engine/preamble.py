"""The preamble: what the guest is, from spec to wire bytes and back. No other module turns a spec into wire bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from vmmigrate.errors import RemoteProtocolError, SpecParseError, UsageError
from vmmigrate.memory import PageBitmap, RamLayout, Region
from vmmigrate.spec import document
from vmmigrate.spec.chain import AnySpec
from vmmigrate.wire.codec import MAX_EXTENTS
from vmmigrate.wire.messages import DeviceEntry, Preamble

# Populated extents are a hint, so a fragmented map is sent coarser rather than longer.
_WANTED_EXTENTS = 65_536
_COARSE_PAGES = 512


def compose(
    *,
    spec_version: str,
    spec: AnySpec,
    blobs: Mapping[str, bytes],
    properties: Mapping[str, str],
    run_state: str,
    epoch: tuple[int, int],
    layout: RamLayout,
    populated: PageBitmap,
    devices: Sequence[DeviceEntry],
    facts: Mapping[str, str],
) -> Preamble:
    """The preamble of a guest; *spec* is already in *spec_version*."""
    return Preamble(
        spec_version=spec_version,
        spec=document.serialise(spec).encode(),
        blobs=dict(blobs),
        properties=dict(properties),
        run_state=run_state,
        epoch=epoch,
        regions=tuple((region.gpa, region.size_bytes) for region in layout.regions),
        populated=_extents(layout, populated),
        devices=tuple(devices),
        facts=dict(facts),
    )


def read_spec(preamble: Preamble, accepted: Sequence[str]) -> AnySpec:
    """The source's spec.

    Raises:
        SpecParseError: `unsupported_spec_version`, naming what we accept; or the document is none of its version.
    """
    if preamble.spec_version not in accepted:
        listed = ", ".join(accepted)
        raise SpecParseError(
            f"unsupported spec version {preamble.spec_version}, I accept {{{listed}}}",
            code="unsupported_spec_version",
        )
    return document.parse(preamble.spec_version, preamble.spec)


def read_layout(preamble: Preamble, max_bytes: int) -> RamLayout:
    """The guest's regions, checked.

    Raises:
        RemoteProtocolError: `bad_regions`: misaligned, overlapping, descending, or more than *max_bytes* in all.
    """
    try:
        layout = RamLayout(Region(gpa, size) for gpa, size in preamble.regions)
    except UsageError as exc:
        raise RemoteProtocolError(f"preamble: {exc.text}", code="bad_regions") from None
    if layout.size_bytes > max_bytes:
        raise RemoteProtocolError(
            f"preamble: {layout.size_bytes} bytes of RAM, this host takes at most {max_bytes}", code="bad_regions"
        )
    return layout


def digest_blobs(blobs: Mapping[str, bytes]) -> dict[str, bytes]:
    """SHA-256 by name: what both sides compare; contents are never logged."""
    return {name: hashlib.sha256(blob).digest() for name, blob in blobs.items()}


def _extents(layout: RamLayout, populated: PageBitmap) -> tuple[tuple[int, int], ...]:
    runs = populated.runs()
    if len(runs) > _WANTED_EXTENTS:
        blocks = PageBitmap(-(-populated.pages // _COARSE_PAGES))
        touched = populated.page_numbers() // _COARSE_PAGES
        flags = blocks.flags()
        flags[touched] = True
        runs = PageBitmap.from_flags(flags).runs() * _COARSE_PAGES
        runs[:, 1] = (runs[:, 0] + runs[:, 1]).clip(max=populated.pages) - runs[:, 0]
    gpas = layout.gpas_of(runs[:, 0]).tolist()
    return tuple(zip(gpas, runs[:, 1].tolist(), strict=True))[:MAX_EXTENTS]


def read_extents(preamble: Preamble, layout: RamLayout) -> PageBitmap:
    """What of RAM was ever touched, as the source says.

    An extent is counted on from its first page through the regions, as pages are numbered.

    Raises: RemoteProtocolError `bad_regions`: an extent that begins outside of the regions, or goes on beyond them.
    """
    extents = np.asarray(preamble.populated, dtype=np.uint64).reshape(-1, 2)
    first = None
    if not (extents >= np.uint64(1 << 62)).any():
        gpas, counts = extents.astype(np.int64).T
        first = layout.pages_of(gpas, np.ones_like(counts))
    if first is None or (first + counts > layout.pages).any():
        raise RemoteProtocolError("preamble: a populated extent outside guest RAM", code="bad_regions")
    return PageBitmap.from_runs(layout.pages, np.stack([first, counts], axis=1))
