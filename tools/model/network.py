"""Worlds and their successors: hosts side by side, connections and letters between them, and the adversary there.

A world is a tuple of small numbers: every host, connection and set of letters that was ever met has one, and what a
host can do is worked out once. Two worlds are the same if and only if their numbers are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Generic, NamedTuple, TypeVar

from tools.model.hosts import Hosts
from tools.model.machine import Engine, Move
from tools.model.world import (
    CLOSED,
    WAITING,
    At,
    Class,
    Failure,
    Host,
    Letter,
    Link,
    Mail,
    Message,
    Scenario,
    World,
)
from vmmigrate.wire.phases import Role

T = TypeVar("T")
Key = tuple[int, ...]


class Table(Generic[T]):
    """Numbers for values: equal values have the same."""

    def __init__(self) -> None:
        self.values: list[T] = []
        self._numbers: dict[T, int] = {}

    def number(self, value: T) -> int:
        number = self._numbers.get(value)
        if number is None:
            number = self._numbers[value] = len(self.values)
            self.values.append(value)
        return number


class Step(NamedTuple):
    """A host's move, with its host as a number."""

    move: Move
    host: int
    is_plain: bool  # nothing leaves the host


class Edge(NamedTuple):
    key: Key
    failure: Failure | None
    label: str


# A request of this kind is made anew only when none, and no answer to it, is under way.
QUIET = {
    Mail.ASK: frozenset({Mail.ASK, Mail.ANSWER}),
    Mail.SUPERSEDED: frozenset({Mail.SUPERSEDED, Mail.ACKNOWLEDGED}),
    Mail.TAKE_OVER: frozenset({Mail.TAKE_OVER}),
}


class Network:
    """All that may happen next, from any world."""

    def __init__(self, scenario: Scenario, engine: Engine, failures: frozenset[Failure]) -> None:
        self.scenario = scenario
        self.hosts = Hosts(scenario, engine)
        self._allowed = failures
        self._host_table: Table[Host] = Table()
        self._link_table: Table[Link] = Table()
        self._letter_table: Table[frozenset[Letter]] = Table()
        self._moves: dict[int, list[Step]] = {}
        self._received: dict[tuple[int, Message | Letter | tuple[str, str]], list[Step]] = {}
        self._count = len(scenario.hosts)
        self._trips = len(scenario.trips)
        self._place = {name: place for place, name in enumerate(scenario.hosts)}
        self._ends = {
            (at, role): self._place[scenario.host_of(trip.migration, role)]
            for at, trip in enumerate(scenario.trips)
            for role in Role
        }
        self._link_of = {trip.migration: at for at, trip in enumerate(scenario.trips)}

    # -- numbers ---------------------------------------------------------------------------------------------------

    def first(self) -> Key:
        hosts = [self._host_table.number(self.hosts.first(name)) for name in self.scenario.hosts]
        links = [self._link_table.number(Link()) for _ in self.scenario.trips]
        return (*hosts, *links, self._letter_table.number(frozenset()), 0, 0)

    def world(self, key: Key) -> World:
        links = key[self._count : self._count + self._trips]
        fenced = frozenset(name for at, name in enumerate(self.scenario.hosts) if key[-1] >> at & 1)
        return World(
            tuple(self._host_table.values[at] for at in key[: self._count]),
            tuple(self._link_table.values[at] for at in links),
            self._letter_table.values[key[-3]],
            Class(key[-2]),
            fenced,
        )

    def host(self, number: int) -> Host:
        return self._host_table.values[number]

    @property
    def sizes(self) -> tuple[int, int, int]:
        return len(self._host_table.values), len(self._link_table.values), len(self._letter_table.values)

    def _steps(self, moves: Iterator[Move]) -> list[Step]:
        steps = []
        for move in moves:
            if move.failure is None or move.failure in self._allowed:
                plain = not (move.sends or move.letters or move.closes or move.fences or move.unfences)
                steps.append(Step(move, self._host_table.number(move.host), plain))
        return steps

    # -- successors ------------------------------------------------------------------------------------------------

    def successors(self, key: Key, *, failures: bool) -> Iterator[Edge]:
        """Every world that one step leads to. Without *failures*: only steps that nobody pays for."""
        for place in range(self._count):
            number = key[place]
            steps = self._moves.get(number)
            if steps is None:
                steps = self._moves[number] = self._steps(self.hosts.moves(self._host_table.values[number]))
            for step in steps:
                if failures or step.move.failure is None:
                    yield from self._apply(key, place, step)
        for at in range(self._trips):
            yield from self._on_link(key, at, failures)
        letters = self._letter_table.values[key[-3]]
        for letter in letters:
            yield from self._on_letter(key, letters, letter, failures)

    def _apply(self, key: Key, place: int, step: Step) -> Iterator[Edge]:
        """The world after *step* of the host at *place*."""
        move = step.move
        following = list(key)
        following[place] = step.host
        if move.classes:
            following[-2] |= int(move.classes)
        if not step.is_plain and not self._effects(key, following, place, move):
            return
        yield Edge(tuple(following), move.failure, move.label)

    def _effects(self, key: Key, following: list[int], place: int, move: Move) -> bool:
        """What leaves the host. False: not now."""
        if move.letters and not self._post(following, move.letters):
            return False
        for message in move.sends:
            at = self._count + self._link_of[message.migration]
            following[at] = self._link_table.number(_sent(self._link_table.values[following[at]], message))
        for migration in move.closes:
            at = self._link_of[migration]
            role = Role.SOURCE if self._ends[at, Role.SOURCE] == place else Role.DESTINATION
            link = _left(self._link_table.values[following[self._count + at]], role)
            following[self._count + at] = self._link_table.number(link)
        if move.fences:
            if key[-1]:
                return False
            following[-1] = (1 << self._count) - 1 - (1 << place)
        if move.unfences:
            following[-1] &= ~(1 << place)
        return True

    def _post(self, following: list[int], letters: tuple[Letter, ...]) -> bool:
        under_way = self._letter_table.values[following[-3]]
        for letter in letters:
            blocked = QUIET.get(letter.mail, frozenset())
            if any(other.migration == letter.migration and other.mail in blocked for other in under_way):
                return False
        following[-3] = self._letter_table.number(under_way | frozenset(letters))
        return True

    def _reach(self, number: int, what: Message | Letter | tuple[str, str]) -> list[Step]:
        steps = self._received.get((number, what))
        if steps is None:
            host = self._host_table.values[number]
            if isinstance(what, Message):
                moves = self.hosts.receive(host, what)
            elif isinstance(what, Letter):
                moves = self.hosts.open_letter(host, what)
            else:
                moves = self.hosts.end_of_stream(host, *what)
            steps = self._received[number, what] = self._steps(moves)
        return steps

    # -- connections -----------------------------------------------------------------------------------------------

    def _on_link(self, key: Key, at: int, failures: bool) -> Iterator[Edge]:
        link = self._link_table.values[key[self._count + at]]
        if link == CLOSED:
            return
        for role in Role:
            if not link.gone(role):
                yield from self._at_end(key, at, link, role, failures)
        if failures:
            yield from self._torn(key, at, link)

    def _at_end(self, key: Key, at: int, link: Link, role: Role, failures: bool) -> Iterator[Edge]:
        """What reaches the side of *role*: a message, the end of the stream, or nothing for too long."""
        place = self._ends[at, role]
        host = self._host_table.values[key[place]]
        if not self.hosts.serves(host):
            return
        migration = self.scenario.trips[at].migration
        inbound, task = link.inbound(role), self.hosts.task(host, migration)
        peer_down = self._host_table.values[key[self._ends[at, role.peer]]].daemon is None
        if inbound:
            for step in self._reach(key[place], inbound[0]):
                if failures or step.move.failure is None:
                    yield from self._apply(self._with_link(key, at, _read(link, role)), place, step)
        elif task is not None and (link.cut or link.gone(role.peer) or (peer_down and role is Role.DESTINATION)):
            for step in self._reach(key[place], (migration, "the connection is lost")):
                yield from self._apply(key, place, step)
        if task is None or task.at not in WAITING:
            return
        if task.at is At.AWAIT_OFFER and self._nobody_comes(key, at, link):
            for step in self._reach(key[place], (migration, "the ticket expires")):
                yield from self._apply(key, place, step)
        elif failures and Failure.SILENCE in self._allowed:
            for step in self._reach(key[place], (migration, "GIVES UP WAITING")):
                for edge in self._apply(key, place, step):
                    yield edge._replace(failure=Failure.SILENCE)

    def _nobody_comes(self, key: Key, at: int, link: Link) -> bool:
        migration = self.scenario.trips[at].migration
        destination = self._host_table.values[key[self._ends[at, Role.DESTINATION]]]
        letters = self._letter_table.values[key[-3]]
        tickets = any(letter.mail is Mail.TICKET and letter.migration == migration for letter in letters)
        tickets = tickets and destination.daemon is not None
        return not tickets and not link.to_source and self.hosts.task(destination, migration) is None

    def _with_link(self, key: Key, at: int, link: Link) -> Key:
        following = list(key)
        following[self._count + at] = self._link_table.number(link)
        return tuple(following)

    def _torn(self, key: Key, at: int, link: Link) -> Iterator[Edge]:
        """Cut, each direction with or without what was under way; or a message comes twice."""
        migration = self.scenario.trips[at].migration
        ends = [self._host_table.values[key[self._ends[at, role]]] for role in Role]
        used = any(self.hosts.task(host, migration) is not None for host in ends)
        if Failure.CUT in self._allowed and not link.cut and used:
            for keep_out, keep_back in product(*({True, not queue} for queue in (link.to_destination, link.to_source))):
                cut = replace(
                    link,
                    cut=True,
                    to_destination=link.to_destination if keep_out else (),
                    to_source=link.to_source if keep_back else (),
                )
                label = f"LINK CUT of {migration}" + ("" if keep_out and keep_back else ", messages lost")
                yield Edge(self._with_link(key, at, cut), Failure.CUT, label)
        if Failure.DUPLICATE in self._allowed:
            for role in Role:
                inbound = link.inbound(role)
                if inbound and (len(inbound) < 2 or inbound[0] != inbound[1]):
                    twice = _with_inbound(link, role, (inbound[0], *inbound))
                    label = f"{inbound[0].kinds[-1].name} COMES TWICE"
                    yield Edge(self._with_link(key, at, twice), Failure.DUPLICATE, label)

    # -- letters ---------------------------------------------------------------------------------------------------

    def _on_letter(self, key: Key, letters: frozenset[Letter], letter: Letter, failures: bool) -> Iterator[Edge]:
        place = self._place[letter.to]
        without = list(key)
        without[-3] = self._letter_table.number(letters - {letter})
        opened = tuple(without)
        duplicates = failures and Failure.DUPLICATE in self._allowed and letter.mail is not Mail.TICKET
        if self.hosts.serves(self._host_table.values[key[place]]):
            for step in self._reach(key[place], letter):
                if failures or step.move.failure is None:
                    yield from self._apply(opened, place, step)
                if duplicates and step.move.failure is None:
                    for edge in self._apply(key, place, step):
                        label = f"{edge.label} (THE REQUEST STAYS UNDER WAY)"
                        yield Edge(edge.key, Failure.DUPLICATE, label)
        if failures and letter.mail is not Mail.TICKET and Failure.LETTER_LOST in self._allowed:
            yield Edge(opened, Failure.LETTER_LOST, f"`{letter.mail}` to {letter.to} LOST")


def _sent(link: Link, message: Message) -> Link:
    """What a dead connection is given, vanishes."""
    peer = message.speaker.peer
    if link.cut or link.gone(peer) or link.gone(message.speaker):
        return link
    return _with_inbound(link, peer, (*link.inbound(peer), message))


def _with_inbound(link: Link, role: Role, queue: tuple[Message, ...]) -> Link:
    return replace(link, to_source=queue) if role is Role.SOURCE else replace(link, to_destination=queue)


def _read(link: Link, role: Role) -> Link:
    return _with_inbound(link, role, link.inbound(role)[1:])


def _left(link: Link, role: Role) -> Link:
    """The side of *role* reads no more."""
    if role is Role.SOURCE:
        left = replace(link, to_source=(), source_gone=True)
    else:
        left = replace(link, to_destination=(), destination_gone=True)
    return CLOSED if left.source_gone and left.destination_gone else left
