"""After Ready: a destination no longer cancels, it refuses; and a source hears that before its handoff."""

from __future__ import annotations

import pytest

from tests.net.test_channel import Ends, ends
from vmmigrate.errors import MigrationCancelled, PeerError
from vmmigrate.wire import messages as m
from vmmigrate.wire.phases import Phase

__all__ = ["ends"]  # the fixture


async def test_a_refusal_after_ready_ends_what_the_source_is_doing_with_its_code(ends: Ends) -> None:
    """Nobody waits for it there: without this the source would only find that it may not hand off any more."""
    async with ends.pair(Phase.READY) as pair:
        await pair.destination.send(m.Refused("journal", "cancelled", "asked for by operator/ann"))

        with pytest.raises(PeerError, match="asked for by operator/ann") as caught:
            await pair.source.expect(m.Running, deadline_s=5)

        assert caught.value.code == "cancelled"
        assert pair.source.session.failed_in is Phase.READY


async def test_a_goodbye_after_ready_is_never_a_cancel(ends: Ends) -> None:
    async with ends.pair(Phase.READY) as pair:
        await pair.destination.say_goodbye(MigrationCancelled("enough"))

        with pytest.raises(PeerError) as caught:
            await pair.source.expect(m.Running, deadline_s=5)

        assert (caught.value.code, caught.value.text) == ("cancelled", "enough")
