"""Two sessions back to back: what one sends, the other receives, when the test says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tools.frame_fixtures import SAMPLES
from vmmigrate.wire.messages import Message
from vmmigrate.wire.phases import TERMINAL, TRANSITIONS, Kind, Phase, Role
from vmmigrate.wire.session import Session

SAMPLE: Mapping[Kind, Message] = {sample.kind: sample for sample in SAMPLES}


class SessionPair:
    """A source and a destination with nothing between them but bytes that have not been delivered yet."""

    def __init__(self) -> None:
        self.ends: dict[Role, Session] = {role: Session(role) for role in Role}
        self.in_flight: dict[Role, list[bytes]] = {role: [] for role in Role}  # by speaker

    @property
    def source(self) -> Session:
        return self.ends[Role.SOURCE]

    @property
    def destination(self) -> Session:
        return self.ends[Role.DESTINATION]

    @property
    def phases(self) -> tuple[Phase, Phase]:
        return self.source.phase, self.destination.phase

    def say(self, speaker: Role, message: Message) -> None:
        """Send, and leave the bytes in flight."""
        self.in_flight[speaker].append(self.ends[speaker].send(message))

    def deliver(self, speaker: Role) -> Message | None:
        """Let the oldest bytes in flight from *speaker* arrive at the other end."""
        listener = self.ends[speaker.peer]
        listener.receive_data(self.in_flight[speaker].pop(0))
        return listener.next_message()

    def pass_on(self, speaker: Role, kind: Kind) -> Message | None:
        """Send the sample of *kind* and let it arrive."""
        self.say(speaker, SAMPLE[kind])
        return self.deliver(speaker)


def pair_in(phase: Phase) -> SessionPair:
    """A pair of which both ends have reached *phase* by legal messages alone."""
    pair = SessionPair()
    for speaker, kind in path_to(phase):
        pair.pass_on(speaker, kind)
    assert pair.phases == (phase, phase)
    return pair


def path_to(target: Phase) -> Iterable[tuple[Role, Kind]]:
    """The shortest legal conversation from NEGOTIATE to *target*, by the table alone."""
    paths: dict[Phase, list[tuple[Role, Kind]]] = {Phase.NEGOTIATE: []}
    frontier = [Phase.NEGOTIATE]
    while frontier:
        phase = frontier.pop(0)
        for (before, speaker, kind), after in TRANSITIONS.items():
            if before is phase and after not in paths:
                paths[after] = [*paths[phase], (speaker, kind)]
                frontier.append(after)
    return paths[target]


LIVE = tuple(phase for phase in Phase if phase not in TERMINAL)
