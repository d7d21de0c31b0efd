"""Golden frames: what a released build wrote is read by every later one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import frame_fixtures
from vmmigrate.wire.codec import decode, encode
from vmmigrate.wire.framing import FrameDecoder, encode_frame
from vmmigrate.wire.phases import Kind

from .pair import SAMPLE

FILES = sorted(frame_fixtures.FRAMES.glob("v*/*.hex"))


def read(path: Path) -> bytes:
    return bytes.fromhex(path.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_golden_frame_is_one_frame_that_decodes(path: Path) -> None:
    decoder = FrameDecoder()
    decoder.receive_data(read(path))

    frame = decoder.next_frame()

    assert frame is not None
    assert frame.kind.name.lower() == path.stem
    assert not decoder.is_inside_frame
    assert decode(frame).kind is frame.kind


@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name)
def test_head_writes_and_reads_its_golden_frame_byte_for_byte(kind: Kind) -> None:
    golden = read(frame_fixtures.frame_path(frame_fixtures.HEAD, kind))
    decoder = FrameDecoder()
    decoder.receive_data(golden)

    frame = decoder.next_frame()

    assert frame is not None
    assert encode_frame(encode(SAMPLE[kind])) == golden
    assert decode(frame) == SAMPLE[kind]


def test_the_tool_refuses_to_change_a_released_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_fixtures, "FRAMES", tmp_path)
    assert frame_fixtures.main([]) == 0
    path = frame_fixtures.frame_path(frame_fixtures.HEAD, Kind.OFFER)
    wanted = path.read_text()
    path.write_text("00\n")

    assert frame_fixtures.main([]) == 1
    assert path.read_text() == "00\n"
    assert frame_fixtures.main(["--rewrite-head"]) == 0
    assert path.read_text() == wanted
    assert frame_fixtures.main(["--force"]) == 2
