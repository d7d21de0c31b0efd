"""Recorded conversations: every later build accepts, frame by frame, what a release said, and says it the same way."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.record_transcript import RECORDINGS, TRANSCRIPTS, path_of, read
from vmmigrate.wire import codec
from vmmigrate.wire.framing import encode_frame
from vmmigrate.wire.phases import Phase, Role
from vmmigrate.wire.session import Session

FILES = sorted(TRANSCRIPTS.glob("*/*.txt"))
ENDS = {"moved": Phase.DONE, "refused": Phase.FAILED, "failed": Phase.FAILED}
EVERY = pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")


def test_this_release_has_recorded_all_its_conversations() -> None:
    assert {path_of(name) for name in RECORDINGS} <= set(FILES)


@EVERY
@pytest.mark.parametrize("role", list(Role))
def test_a_golden_conversation_is_legal_and_readable_for_either_end(path: Path, role: Role) -> None:
    """The replayed end hears its peer's frames and says its own: all of them legal, byte for byte, to the same end."""
    session = Session(role)

    for speaker, frame in read(path).frames:
        if speaker is role:
            assert session.send(codec.decode(frame)) == encode_frame(frame)
        else:
            session.receive_data(encode_frame(frame))
            message = session.next_message()
            assert message is not None
            assert codec.encode(message) == frame

    assert session.phase is ENDS[path.stem]


@EVERY
def test_a_golden_transcript_is_written_as_it_was_read(path: Path) -> None:
    assert read(path).text() == path.read_text()
