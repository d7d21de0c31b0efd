"""What the sealed transport promises: only what the source sealed, all of it, in its order, is ever taken for RAM."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import sealed_vectors
from vmmigrate.errors import LocalProtocolError, RemoteProtocolError, TransportError, VmMigrateError
from vmmigrate.memory import PAGE_SIZE
from vmmigrate.net.receiving import Landing, StreamReceiver
from vmmigrate.net.sealed import MAX_PART_BYTES, RATCHET_BYTES, TAG_BYTES, OpeningLink, PartKeys, SealingLink
from vmmigrate.net.secrets import SessionContext, SessionSecrets
from vmmigrate.net.sending import StreamSender
from vmmigrate.ram.encoding import RAW, ZERO, Packer
from vmmigrate.ram.records import HEADER, RUN_DTYPE, STRIPE_PAGES

from .bulk_pair import CONTEXT, PAGE_HASH, WAIT_S, Ram, content, layout_of, session_pair

VECTORS = [json.loads(path.read_text()) for path in sorted(sealed_vectors.SEALED.glob("v*/vectors.json"))]
LAYOUT = layout_of(4 * STRIPE_PAGES)


# --------------------------------------------------------------------------- known answers


def secrets_of(vectors: dict[str, Any]) -> SessionSecrets:
    randoms = (bytes.fromhex(vectors[f"{side}_random"]) for side in ("destination", "source"))
    return SessionSecrets(SessionContext(**vectors["context"]), *randoms)


def test_there_are_known_answers() -> None:
    assert len(VECTORS) >= 1


def test_the_tool_still_writes_the_known_answers_of_its_version() -> None:
    assert VECTORS[-1] == sealed_vectors.vectors()


@pytest.mark.parametrize("vectors", VECTORS)
def test_keys_are_the_known_ones(vectors: dict[str, Any]) -> None:
    for known in vectors["keys"]:
        purpose = (str(known["stream"]), vectors["direction"], str(known["number"]))
        assert secrets_of(vectors).key(vectors["label"], *purpose).hex() == known["key"]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("vectors", VECTORS)
def test_parts_are_sealed_and_opened_as_the_known_ones(vectors: dict[str, Any], which: int) -> None:
    """Over the ratchet, too."""
    known = vectors["streams"][which]
    plain = [bytes.fromhex(part["plain"]) for part in known["parts"]]

    def keys() -> PartKeys:
        return PartKeys(secrets_of(vectors), known["stream"], ratchet_bytes=known["ratchet_bytes"])

    wire = sealed_bytes(keys(), plain)

    assert wire.hex() == "".join(part["sealed"] for part in known["parts"])
    assert opened(keys(), wire, [len(part) for part in plain]) == plain


# --------------------------------------------------------------------------- the ends of a stream


def unix_pair() -> tuple[socket.socket, socket.socket]:
    one, other = socket.socketpair()
    for sock in (one, other):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
    return one, other


def sealed_bytes(keys: PartKeys, parts: Sequence[bytes]) -> bytes:
    """What a source puts on the wire for *parts*, which fit into the buffers of a socket."""
    ours, theirs = unix_pair()
    with closing(theirs), closing(SealingLink(ours, keys, "destination", WAIT_S)) as link:
        link.send(*parts)
        link.shutdown()
        return received(theirs)


def received(sock: socket.socket) -> bytes:
    sock.settimeout(WAIT_S)
    chunks = []
    while chunk := sock.recv(1 << 16):
        chunks.append(chunk)
    return b"".join(chunks)


@contextmanager
def opening(keys: PartKeys, wire: bytes) -> Iterator[OpeningLink]:
    """The destination's end of a link on which *wire* came, and then its end."""
    ours, theirs = unix_pair()
    with closing(OpeningLink(ours, keys, "source", WAIT_S)) as link:
        with closing(theirs):
            theirs.settimeout(WAIT_S)
            theirs.sendall(wire)
        yield link


def opened(keys: PartKeys, wire: bytes, sizes: Sequence[int]) -> list[bytes]:
    plain = [bytearray(size) for size in sizes]
    with opening(keys, wire) as link:
        for target in plain:
            link.receive_into(memoryview(target))
    return [bytes(target) for target in plain]


# --------------------------------------------------------------------------- a recorded stream


class Noting(SealingLink):
    """A source's end that writes down what it was given to seal."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.plain: list[bytes] = []

    def send(self, *parts: memoryview | bytes) -> None:
        self.plain += [bytes(part) for part in parts]
        super().send(*parts)


class Recording:
    """A stream as a real source sealed it: two rounds of pages and zeros, END.

    Attributes:
        parts: What crossed the wire, part by part.
        landed: By number of parts received: the pages that have landed by then.
    """

    def __init__(self, secrets: SessionSecrets, stream: int = 0) -> None:
        first = stream * STRIPE_PAGES
        ours, theirs = unix_pair()
        link = Noting(ours, PartKeys(secrets, stream), "destination", WAIT_S)
        with closing(Ram(LAYOUT)) as ram, closing(theirs), closing(link):
            table = np.zeros(LAYOUT.pages, dtype=np.uint64)
            sender = StreamSender(link, LAYOUT, ram.pages, PAGE_HASH, table, Packer((RAW, ZERO)))
            ram.pages[first + 3] = content(1, 1)
            ram.pages[first + 8] = content(1, 2)
            sender.send_round(np.array([(first + 3, 1), (first + 8, 1), (first + 21, 1)]), 1, last=False)
            ram.pages[first + 3] = content(1, 3)
            sender.send_round(np.array([(first + 3, 1)]), 2, last=True)
            link.shutdown()
            wire = received(theirs)
            self.pages = {page: ram.pages[page].copy() for page in (first + 3, first + 8)}
        self.parts: list[bytes] = []
        for part in link.plain:
            self.parts.append(wire[: len(part) + TAG_BYTES])
            wire = wire[len(part) + TAG_BYTES :]
        assert not wire
        both = {first + 3, first + 8}
        # Header, table, pages; header, table (zeros); barrier; header, table, page; barrier; END.
        self.landed = [set(), set(), set(), both, both, *[both | {first + 21}] * 7]
        assert len(self.landed) == len(self.parts) + 1


class Arrived:
    """What became of a wire at a destination."""

    def __init__(self, secrets: SessionSecrets, wire: bytes, stream: int = 0) -> None:
        self.error: VmMigrateError | None = None
        self.rounds: list[int] = []
        self.landing = Landing(LAYOUT.pages)
        with closing(Ram(LAYOUT)) as ram:
            with opening(PartKeys(secrets, stream), wire) as link:
                receiver = StreamReceiver(link, stream, 4, LAYOUT, ram.pages, PAGE_HASH, self.landing)
                with suppress(VmMigrateError):
                    self._receive(receiver)
            self.populated = ram.populated()
            self.pages = {page: ram.pages[page].copy() for page in self.populated}

    def _receive(self, receiver: StreamReceiver) -> None:
        try:
            while (number := receiver.receive_round()) is not None:
                self.rounds.append(number)
        except VmMigrateError as error:
            self.error = error
            raise

    @property
    def landed(self) -> set[int]:
        return set(np.flatnonzero(self.landing.fresh).tolist())

    def check_breach(self, recording: Recording, good_parts: int) -> None:
        """A forgery, noticed as such, and nothing that came with it or after it counts."""
        assert isinstance(self.error, RemoteProtocolError), self.error
        assert self.error.code == "seal_broken"
        assert self.landing.breach is self.error
        assert self.landed == recording.landed[good_parts]
        assert np.flatnonzero(self.landing.table).tolist() == sorted(self.landed & set(recording.pages))

    def check_cut(self, recording: Recording, good_parts: int) -> None:
        """A lost link: what came whole counts, and of the rest not a byte has reached RAM."""
        assert isinstance(self.error, TransportError), self.error
        assert self.error.code == "link_lost"
        assert self.landing.breach is None
        assert self.landed == recording.landed[good_parts]
        assert self.populated == recording.landed[good_parts] & set(recording.pages)


def test_a_recorded_stream_arrives_as_it_was_sealed() -> None:
    """So that the tests below fail for what they changed and for nothing else."""
    ours, theirs = session_pair()
    recording = Recording(ours)

    arrived = Arrived(theirs, b"".join(recording.parts))

    assert arrived.error is None
    assert arrived.rounds == [1, 2]
    assert arrived.landed == recording.landed[-1]
    assert arrived.populated == set(recording.pages)
    assert all(np.array_equal(arrived.pages[page], recording.pages[page]) for page in recording.pages)


def test_page_contents_do_not_cross_the_wire() -> None:
    recording = Recording(session_pair()[0])
    wire = b"".join(recording.parts)

    for page in recording.pages.values():
        for at in range(0, PAGE_SIZE, 64):
            assert page.tobytes()[at : at + 64] not in wire


# --------------------------------------------------------------------------- changed, dropped, doubled, swapped


def flip(part: bytes, at: int) -> bytes:
    return part[:at] + bytes([part[at] ^ 1 << at % 8]) + part[at + 1 :]


@pytest.mark.parametrize("every", [61, pytest.param(1, marks=pytest.mark.slow)])
def test_every_changed_byte_is_noticed_and_nothing_of_its_part_counts(every: int) -> None:
    """Of all parts: headers, tables (a redirected page), pages, and tags; wherever it is, no other page is touched."""
    ours, _ = randoms = session_pair()
    recording = Recording(ours)
    for number, part in enumerate(recording.parts):
        for at in range(0, len(part), every if len(part) > 100 else 1):
            changed = [*recording.parts[:number], flip(part, at), *recording.parts[number + 1 :]]

            arrived = Arrived(copy_of(randoms[1]), b"".join(changed))

            arrived.check_breach(recording, number)
            assert arrived.populated <= set(recording.pages)


def copy_of(secrets: SessionSecrets) -> SessionSecrets:
    """The same secrets, of which nothing is claimed: another run of the same session."""
    salt = secrets._salt
    return SessionSecrets(secrets.context, salt[:32], salt[32:])


def test_a_page_that_is_redirected_is_refused_before_any_ram_is_touched() -> None:
    """GCM is a stream cipher: who flips a bit of the address on the wire flips it in the table. Only the tag tells,
    and it is asked before the table is looked at."""
    ours, theirs = session_pair()
    recording = Recording(ours)
    table = bytearray(recording.parts[1])
    table[6] ^= 0x10  # gpa 0x3000 -> 0x2000 and the like

    arrived = Arrived(theirs, b"".join([recording.parts[0], bytes(table), *recording.parts[2:]]))

    arrived.check_breach(recording, 1)
    assert arrived.populated == set()


EVERY_PART = range(12 - 1)


@pytest.mark.parametrize("number", EVERY_PART)
def test_a_part_that_is_dropped_is_noticed(number: int) -> None:
    """The last one is END: without it the stream is cut, not ended."""
    ours, theirs = session_pair()
    recording = Recording(ours)
    rest = [*recording.parts[:number], *recording.parts[number + 1 :]]

    arrived = Arrived(theirs, b"".join(rest))

    if number in TOO_LITTLE_FOLLOWS:
        arrived.check_cut(recording, number)
    else:
        arrived.check_breach(recording, number)


# Dropped, what follows is shorter than they were: the link is cut in what is taken for them, and nothing is opened.
TOO_LITTLE_FOLLOWS = {2, 8, 10}


@pytest.mark.parametrize("number", range(len(EVERY_PART) - 1))
def test_a_part_that_comes_twice_is_noticed(number: int) -> None:
    ours, theirs = session_pair()
    recording = Recording(ours)
    doubled = [*recording.parts[: number + 1], *recording.parts[number:]]

    Arrived(theirs, b"".join(doubled)).check_breach(recording, number + 1)


@pytest.mark.parametrize("one", EVERY_PART)
def test_any_two_parts_that_change_places_are_noticed(one: int) -> None:
    ours, theirs = session_pair()
    recording = Recording(ours)
    for other in range(one + 1, len(recording.parts)):
        swapped = list(recording.parts)
        swapped[one], swapped[other] = swapped[other], swapped[one]

        arrived = Arrived(copy_of(theirs), b"".join(swapped))

        arrived.check_breach(recording, one)


RECORDS = [slice(0, 3), slice(3, 5), slice(5, 6), slice(6, 9), slice(9, 10), slice(10, 11)]


@pytest.mark.parametrize("edit", ["drop", "double", "swap with the next", "replay at the end"])
@pytest.mark.parametrize("which", range(len(RECORDS) - 1))
def test_whole_records_that_are_dropped_doubled_swapped_or_replayed_are_noticed(which: int, edit: str) -> None:
    ours, theirs = session_pair()
    recording = Recording(ours)
    records = [recording.parts[record] for record in RECORDS]
    edited, good_records = {
        "drop": ([*records[:which], *records[which + 1 :]], which),
        "double": ([*records[: which + 1], *records[which:]], which + 1),
        "swap with the next": ([*records[:which], records[which + 1], records[which], *records[which + 2 :]], which),
        "replay at the end": ([*records[:-1], records[which]], len(records) - 1),
    }[edit]

    arrived = Arrived(theirs, b"".join(part for record in edited for part in record))

    arrived.check_breach(recording, RECORDS[good_records].start)


# --------------------------------------------------------------------------- spliced


SAME_RANDOMS = {
    "another session number": replace(CONTEXT, session_number=CONTEXT.session_number + 1),
    "another migration": replace(CONTEXT, migration_id="00000000-1599-48bd-a84f-2e419b205049"),
    "another instance": replace(CONTEXT, instance_id="another"),
    "another source": replace(CONTEXT, source_host="another"),
    "another destination": replace(CONTEXT, destination_host="another"),
    "another protocol": replace(CONTEXT, protocol=CONTEXT.protocol + 1),
}


@pytest.mark.parametrize("number", EVERY_PART)
@pytest.mark.parametrize("foreign", ["another stream", "other randoms", *SAME_RANDOMS])
def test_a_part_of_another_stream_session_or_migration_is_noticed(foreign: str, number: int) -> None:
    """Spliced in at its own place, so that number and length fit."""
    ours, theirs = session_pair()
    recording = Recording(ours)
    if foreign == "another stream":
        other = Recording(ours, stream=1)
    elif foreign == "other randoms":
        other = Recording(session_pair()[0])
    else:
        other = Recording(SessionSecrets(SAME_RANDOMS[foreign], ours._salt[:32], ours._salt[32:]))
    spliced = [*recording.parts[:number], other.parts[number], *recording.parts[number + 1 :]]

    Arrived(theirs, b"".join(spliced)).check_breach(recording, number)


def test_a_whole_stream_is_worth_nothing_in_another_session() -> None:
    """Replay of what was recorded, to the same destination, in the session after a reconnect."""
    recording = Recording(session_pair()[0])
    _, next_session = session_pair(replace(CONTEXT, session_number=2))

    Arrived(next_session, b"".join(recording.parts)).check_breach(recording, 0)


def test_two_directions_have_keys_of_their_own() -> None:
    ours, theirs = session_pair()
    recording = Recording(ours)
    keys = PartKeys(theirs, 0, "to source")

    with pytest.raises(RemoteProtocolError):
        opened(keys, b"".join(recording.parts), [HEADER.size])


# --------------------------------------------------------------------------- cut


@pytest.mark.parametrize("number", range(len(EVERY_PART)))
def test_a_stream_that_is_cut_counts_what_came_whole_and_touches_nothing_else(number: int) -> None:
    """At each part, and in it: after its first byte, in the middle, before its last one."""
    ours, theirs = session_pair()
    recording = Recording(ours)
    before, part = b"".join(recording.parts[:number]), recording.parts[number]
    for size in (0, 1, len(part) // 2, len(part) - 1):
        arrived = Arrived(copy_of(theirs), before + part[:size])

        arrived.check_cut(recording, number)


def test_a_cut_that_looks_like_the_end_is_no_end() -> None:
    """END is authenticated like everything else."""
    ours, theirs = session_pair()
    recording = Recording(ours)

    arrived = Arrived(theirs, b"".join(recording.parts[:-1]))

    assert arrived.rounds == [1, 2]
    arrived.check_cut(recording, len(recording.parts) - 1)


@settings(max_examples=100)
@given(st.binary(max_size=4096))
def test_noise_is_a_breach_or_a_cut_and_never_ram(noise: bytes) -> None:
    arrived = Arrived(session_pair()[1], noise)

    assert arrived.error is not None
    assert (arrived.landing.breach is None) == (len(noise) < HEADER.size + TAG_BYTES)
    assert arrived.populated == set()
    assert not arrived.landed


# --------------------------------------------------------------------------- keys


def test_a_stream_of_a_session_gets_its_keys_once() -> None:
    """Two who seal under the same keys would both begin with nonce 0."""
    ours, _ = session_pair()
    PartKeys(ours, 0)

    PartKeys(ours, 1)
    with pytest.raises(LocalProtocolError) as caught:
        PartKeys(ours, 0)

    assert caught.value.code == "already_claimed"


@settings(max_examples=50)
@given(st.lists(st.integers(0, 200), max_size=60), st.integers(216, 1000))
def test_no_nonce_is_given_twice_under_a_key_and_no_key_wears_out(sizes: list[int], ratchet_bytes: int) -> None:
    keys = PartKeys(session_pair()[0], 0, ratchet_bytes=ratchet_bytes)
    given_out: list[tuple[int, bytes]] = []
    ciphers: list[Any] = []  # kept, so that no two have the same id
    sealed_by: dict[int, int] = {}
    for size in sizes:
        cipher, nonce = keys.next(size)
        ciphers.append(cipher)
        given_out.append((id(cipher), nonce))
        sealed_by[id(cipher)] = sealed_by.get(id(cipher), 0) + size + TAG_BYTES

    assert len(set(given_out)) == len(given_out)
    assert all(used <= ratchet_bytes for used in sealed_by.values())


def test_the_ratchet_is_what_the_description_says() -> None:
    assert RATCHET_BYTES == 64 * 1024**3


@settings(max_examples=25)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=40), st.integers(316, 900))
def test_both_ends_turn_to_the_next_key_at_the_same_part(sizes: list[int], ratchet_bytes: int) -> None:
    ours, theirs = session_pair()
    plain = [bytes([number % 256]) * size for number, size in enumerate(sizes)]

    wire = sealed_bytes(PartKeys(ours, 0, ratchet_bytes=ratchet_bytes), plain)

    assert opened(PartKeys(theirs, 0, ratchet_bytes=ratchet_bytes), wire, sizes) == plain


def test_a_part_that_is_too_large_is_refused_before_it_is_sealed_or_awaited() -> None:
    ours, theirs = session_pair()
    one, other = unix_pair()
    with (
        closing(SealingLink(one, PartKeys(ours, 0), "destination", WAIT_S)) as source,
        closing(OpeningLink(other, PartKeys(theirs, 0), "source", WAIT_S)) as destination,
    ):
        with pytest.raises(LocalProtocolError):
            source.send(bytes(MAX_PART_BYTES + 1))
        with pytest.raises(LocalProtocolError):
            destination.receive_into(memoryview(bytearray(MAX_PART_BYTES + 1)))


def test_a_table_of_a_full_record_fits_beside_its_pages() -> None:
    """One send, one call of the kernel."""
    assert HEADER.size + 256 * RUN_DTYPE.itemsize + 3 * TAG_BYTES <= 1 << 16
