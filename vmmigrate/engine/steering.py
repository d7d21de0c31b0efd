"""What of an outgoing migration can be changed while it runs, and who has to hear of it at once.

Options are read where they are needed, each time; only two things cannot wait until then: a new limit on the speed of a
round that is being sent, and the end of the time for the whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import trio

from vmmigrate.engine.limits import ADJUSTABLE, MigrationOptions
from vmmigrate.errors import ConvergenceError
from vmmigrate.memory import MIB
from vmmigrate.net.sending import BulkSource
from vmmigrate.ram.convergence import Limits


class Steering:
    """The options of one migration in force.

    Attributes:
        options: They may be others the next time that they are read.
        is_forced: The guest is to be paused now, whatever is left to send.
    """

    def __init__(self, options: MigrationOptions) -> None:
        self.options = options
        self.is_forced = False
        self._bulk: BulkSource | None = None
        self._changed = trio.Event()

    @property
    def limits(self) -> Limits:
        """What the judge of the rounds has to know."""
        options = self.options
        return Limits(options.downtime_ms / 1000, options.max_rounds, options.auto_converge)

    def change(self, changes: Mapping[str, Any]) -> None:
        """Take other values for some of `ADJUSTABLE`; checked by whoever took the request."""
        assert set(changes) <= ADJUSTABLE, changes
        self.options = replace(self.options, **changes)
        if self._bulk is not None:
            self._bulk.pace(self.options.bandwidth_mib_s * MIB)
        self._changed.set()
        self._changed = trio.Event()

    @contextlib.contextmanager
    def over(self, bulk: BulkSource) -> Iterator[None]:
        """While inside, the streams of *bulk* keep to the limits."""
        self._bulk = bulk
        bulk.pace(self.options.bandwidth_mib_s * MIB)
        try:
            yield
        finally:
            self._bulk = None

    def force_now(self) -> None:
        """Pause the guest as soon as may be: also the round that is being sent ends early."""
        self.is_forced = True
        if self._bulk is not None:
            self._bulk.break_off()

    async def watch_the_time(self) -> None:
        """Do what is to be done when the time for the whole migration is over; runs beside it, for as long as that.

        Raises: ConvergenceError `timed_out_total`: it is to be called off.
        """
        begun = trio.current_time()
        while True:
            left_s = begun + self.options.timeout_s - trio.current_time()
            with trio.move_on_after(max(left_s, 0)):
                await self._changed.wait()
                continue
            if self.options.on_timeout == "cancel":
                raise ConvergenceError(
                    f"the migration did not finish within {self.options.timeout_s:g} s", code="timed_out_total"
                )
            self.force_now()
            return
