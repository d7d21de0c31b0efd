"""The log of those who were not let in: one line each, but a flood of strangers fills no disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import structlog

from vmmigrate.errors import VmMigrateError

log = structlog.get_logger(__name__)

MOST: Final = 100
WINDOW_S: Final = 60.0


class RefusalLog:
    """Says every refusal under *event*, at most `MOST` within `WINDOW_S`, and then how many it did not say."""

    def __init__(self, event: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._event = event
        self._clock = clock
        self._since = clock()
        self._said = 0
        self._unsaid = 0

    def __call__(self, peer: str, error: VmMigrateError) -> None:
        """One refusal: the peer's address, and why."""
        if self._clock() - self._since >= WINDOW_S:
            self._begin_window()
        if self._said < MOST:
            self._said += 1
            log.info(self._event, peer=peer, code=error.code, text=error.text)
        else:
            self._unsaid += 1

    def _begin_window(self) -> None:
        if self._unsaid:
            log.warning(
                "refusals.unsaid", of=self._event, number=self._unsaid, seconds=round(self._clock() - self._since)
            )
        self._since, self._said, self._unsaid = self._clock(), 0, 0
