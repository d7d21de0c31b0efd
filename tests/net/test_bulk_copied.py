"""RAM that is copied out of its process while it is sent: little of it at once, whatever a round is of."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field

import numpy as np
import pytest
import trio

from tests.hypervisor.ram_owner import READ_ONLY_PAGES, Owner, held_pages, open_owner
from tests.net.bulk_pair import PAGE_HASH, WAIT_S, Contexts, Ram, bitmap_of, link_pair
from vmmigrate.hypervisor.rammap import CopiedRam
from vmmigrate.memory import PageBitmap
from vmmigrate.net.receiving import BulkDestination
from vmmigrate.net.sending import FETCHED_AT_ONCE_PAGES, BulkSource, RoundSent
from vmmigrate.net.threads import open_group
from vmmigrate.net.tls import TlsFiles, client_context, server_context

PAGES = 2 * FETCHED_AT_ONCE_PAGES + 1000
STREAMS = 3


@dataclass
class Fetcher:
    """Copies pages out of their process, and notes how many this process had of them each time."""

    ram: CopiedRam
    before: Callable[[int], None] = lambda number: None
    held: list[int] = field(default_factory=list)

    async def fetch(self, pages: PageBitmap) -> None:
        self.before(len(self.held) + 1)
        await trio.to_thread.run_sync(self.ram.fetch, pages.runs())
        self.held.append(held_pages(self.ram))


@dataclass
class Copying:
    """Both ends of bulk streams, the source's RAM being another process's."""

    source: BulkSource
    destination: BulkDestination
    fetcher: Fetcher
    landed: Ram

    async def run_round(self, pages: PageBitmap, number: int, *, last: bool = False) -> RoundSent:
        """Send *pages* and wait until they have landed."""
        sent = await self.source.send_round(pages, number, last=last, fetch=self.fetcher.fetch)
        await self.destination.wait_round(number, sent.records)
        return sent

    def has_landed(self, pages: PageBitmap) -> bool:
        """Each of *pages* as its process has it, and equal digests of all."""
        numbers = pages.page_numbers()
        filled = (numbers % 2 == 0) & (numbers < PAGES - READ_ONLY_PAGES)
        expected = np.where(filled, numbers, 0).astype(np.uint64)
        arrived = all((self.landed.pages[numbers, word] == expected).all() for word in (0, 1, 511))
        return arrived and bool((self.source.table == self.destination.table).all())


@pytest.fixture(scope="module")
def owner() -> Iterator[Owner]:
    with open_owner(PAGES) as owner:
        yield owner


@pytest.fixture(scope="module")
def contexts(source_files: TlsFiles, destination_files: TlsFiles) -> Contexts:
    return Contexts(server_context(source_files), client_context(destination_files))


@asynccontextmanager
async def open_copying(owner: Owner, contexts: Contexts) -> AsyncIterator[Copying]:
    links = [link_pair(contexts) for _ in range(STREAMS)]
    with closing(owner.open()) as ram, closing(Ram(ram.layout)) as landed:
        source = BulkSource([link for link, _ in links], ram.layout, ram.pages, PAGE_HASH)
        destination = BulkDestination([link for _, link in links], ram.layout, landed.pages, PAGE_HASH)
        with closing(source), closing(destination), trio.fail_after(4 * WAIT_S):
            async with open_group() as nursery:
                nursery.start_soon(destination.receive_forever)
                yield Copying(source, destination, Fetcher(ram), landed)
                nursery.cancel_scope.cancel()


@pytest.mark.parametrize("last", [False, True])
async def test_all_of_ram_arrives_in_one_round_and_little_of_it_is_held_at_once(
    owner: Owner, contexts: Contexts, last: bool
) -> None:
    async with open_copying(owner, contexts) as copying:
        everything = bitmap_of(copying.fetcher.ram.layout, range(100, PAGES))

        sent = await copying.run_round(everything, 1, last=last)

        assert (sent.pages, sent.unsent) == (PAGES - 100, None)
        assert copying.has_landed(everything)
        assert len(copying.fetcher.held) == 3
        assert max(copying.fetcher.held) <= FETCHED_AT_ONCE_PAGES


async def test_a_round_of_little_is_fetched_whole_wherever_it_lies(owner: Owner, contexts: Contexts) -> None:
    async with open_copying(owner, contexts) as copying:
        for number, pages in enumerate((range(0, PAGES, 50), range(0), range(PAGES - 1, PAGES)), 1):
            some = bitmap_of(copying.fetcher.ram.layout, pages)

            sent = await copying.run_round(some, number)

            assert copying.has_landed(some)
            assert sent.pages == copying.fetcher.held[-1] == len(pages)
            assert len(copying.fetcher.held) == number


async def test_a_round_that_is_broken_off_while_it_is_fetched_tells_what_it_has_not_sent(
    owner: Owner, contexts: Contexts
) -> None:
    """And fetches no more of it; it all goes with the next one."""
    async with open_copying(owner, contexts) as copying:
        everything = PageBitmap.full(PAGES)

        def break_off(number: int) -> None:
            if number == 2:
                copying.source.break_off()

        copying.fetcher.before = break_off
        first = await copying.run_round(everything, 1)

        assert first.unsent == everything - bitmap_of(copying.fetcher.ram.layout, range(FETCHED_AT_ONCE_PAGES))
        assert len(copying.fetcher.held) == 2
        assert copying.has_landed(everything - first.unsent)
        second = await copying.run_round(first.unsent, 2)
        assert second.unsent is None
        assert copying.has_landed(everything)


async def test_the_last_round_is_not_broken_off_while_it_is_fetched(owner: Owner, contexts: Contexts) -> None:
    async with open_copying(owner, contexts) as copying:
        copying.fetcher.before = lambda number: copying.source.break_off()

        sent = await copying.run_round(PageBitmap.full(PAGES), 1, last=True)

        assert (sent.pages, sent.unsent) == (PAGES, None)
        assert copying.has_landed(PageBitmap.full(PAGES))
