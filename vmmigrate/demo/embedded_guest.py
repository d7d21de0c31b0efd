"""The demo's guest in the embedded machine. It counts its own beats, and its processes keep witnesses."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from vmmigrate.demo import guest
from vmmigrate.demo.site import DESTINATION, EMBEDDED, SOURCE, Setting, Site
from vmmigrate.hypervisor.embedded.witness import read_witnesses
from vmmigrate.hypervisor.intervals import check_single_owner

_WITNESSES: Final = "witnesses"
_BEATS_AFTER_MOVE: Final = 200  # so that the check sees a guest that runs, not one that only arrived


class EmbeddedGuest:
    """Implements `guests.DemoGuest`."""

    # A guest's files go with the guest, and the source's goes as soon as it has moved; the witnesses shall stay.
    setting: Setting = replace(EMBEDDED, directories=f'witness = "{_WITNESSES}"')

    def __init__(self, mib: int) -> None:
        self._mib = mib
        self.working_set_mib = guest.working_set_pages(mib) // 256

    def check_tools(self) -> None:
        """Nothing is needed."""

    def prepare(self, site: Site) -> None:
        """Its volume is part of every site."""

    def request(self, site: Site) -> dict[str, Any]:
        return guest.request(self._mib)

    def replacements(self) -> str:
        return guest.replacements()

    def is_at_work(self, seen: Mapping[str, Any]) -> bool:
        return bool(seen["program"]["filled_pages"] >= guest.working_set_pages(self._mib))

    def has_lived_on(self, first: Mapping[str, Any], seen: Mapping[str, Any]) -> bool:
        return bool(seen["heartbeats"] >= first["heartbeats"] + _BEATS_AFTER_MOVE)

    @contextlib.asynccontextmanager
    async def watched(self, site: Site) -> AsyncIterator[_Witnesses]:
        yield _Witnesses(site.root / _WITNESSES)


@dataclass(frozen=True)
class _Witnesses:
    directory: Path

    def verdict(self, check: Mapping[str, Any]) -> dict[str, Any]:
        heartbeat = check["heartbeat"]
        owners = check_single_owner(read_witnesses(self.directory, guest.INSTANCE))
        return {
            "heartbeat_gap_ms": max(heartbeat["move_gaps_ms"], default=0.0),
            "heartbeat_largest_gap_ms": heartbeat["largest_gap_ms"],
            "heartbeat_steady_p99_ms": heartbeat["steady_p99_ms"],
            "heartbeats": heartbeat["heartbeats"],
            "single_owner": owners.single and owners.hosts == (SOURCE, DESTINATION),
            "ran_on": list(owners.hosts),
            "witness_problems": list(owners.problems),
        }
