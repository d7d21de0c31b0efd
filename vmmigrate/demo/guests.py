"""What a demonstration needs of its guest. What runs it, and how it is watched, is each implementation's business."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from vmmigrate.demo.site import Setting, Site


class Watch(Protocol):
    """Who ran the guest when, told by something that neither daemon can bend."""

    def verdict(self, check: Mapping[str, Any]) -> dict[str, Any]:
        """The members of a record's `guest` that tell of heartbeat and owners (docs/contracts/migration-record.json).

        Args:
            check: What the daemon answered to `:check`.
        """


class DemoGuest(Protocol):
    """One guest, its machine and its program.

    Attributes:
        setting: What the daemons' configuration says for its sake.
        working_set_mib: How much it rewrites all the time.
    """

    setting: Setting
    working_set_mib: int

    def check_tools(self) -> None:
        """Raises: HypervisorError: what it needs is missing on this machine, and how to get it."""

    def prepare(self, site: Site) -> None:
        """Make what it needs in *site*. Blocking. Raises: HypervisorError."""

    def request(self, site: Site) -> dict[str, Any]:
        """The body of `POST /v1/instances`."""

    def replacements(self) -> str:
        """What the destination puts in the place of the source's backends."""

    def is_at_work(self, seen: Mapping[str, Any]) -> bool:
        """Whether a guest of which its daemon tells *seen* has filled its memory and does all that it shall do."""

    def has_lived_on(self, first: Mapping[str, Any], seen: Mapping[str, Any]) -> bool:
        """Whether it has done its work for a while since its daemon told *first* of it."""

    def watched(self, site: Site) -> AbstractAsyncContextManager[Watch]:
        """Watch it, from before it is there until the demonstration is over."""
