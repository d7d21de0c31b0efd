"""What a QEMU remembers of whose guest it runs, in an object of its own: it lives and dies with the process.

QEMU knows no epochs and no journals. It does have objects whose texts can be set and read over QMP (`authz-simple`,
which authorises nobody here); one of them holds what is below. A daemon that adopts the guest reads it there, and not
from a file that could be older than the process, or younger.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.base import GuestStamp

Epoch = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Remembered:
    """Contents of the object.

    Attributes:
        seen: The highest epoch that anybody named; who names a lower one is refused.
        handoff: The migration for which the guest was paused, or was about to be; it counts while the guest stands.
        is_open: Its images are active. What is said to be closed may still be open when a daemon died just then, never
            the other way round.
        is_arriving: Built for a migration, and its device state has not been loaded.
        has_loaded: Device state was loaded, and it has not run since: the file `state` is still its state.
        is_deaf: QEMU does not read what is typed, so that it is not lost between saving and going on.
        announces: It came from another host, and the network has not been told yet.
        booted_ns: Monotonic clock of this host when the guest booted, as `devices.time` has it.
    """

    stamp: GuestStamp
    seen: Epoch
    ran: Epoch = (0, 0)
    handoff: str | None = None
    is_open: bool = False
    is_arriving: bool = False
    has_loaded: bool = False
    is_deaf: bool = False
    announces: bool = False
    last_record: int = 0
    last_journal: str = ""
    booted_ns: int = 0

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    def stands(self, run_state: str) -> bool:
        """Whether the guest has not run since its state was saved, or loaded."""
        return run_state == "postmigrate" or self.has_loaded

    def claimed(self, epoch: Epoch) -> Remembered:
        """With *epoch* seen. Raises: HypervisorError `stale_epoch`."""
        if epoch < self.seen:
            text = f"guest {self.stamp.instance_id} has seen epoch {list(self.seen)}, {list(epoch)} is older"
            raise HypervisorError(text, code="stale_epoch", details={"seen": list(self.seen)})
        return replace(self, seen=epoch)


def from_text(text: str) -> Remembered:
    """Raises: HypervisorError `qemu_protocol`: it is not one of our QEMUs."""
    try:
        tree = json.loads(text)
        stamp = tree["stamp"]
        tree["stamp"] = GuestStamp(stamp["instance_id"], stamp["host_id"], _pair(stamp["epoch"]), stamp["migration_id"])
        tree |= {"seen": _pair(tree["seen"]), "ran": _pair(tree["ran"])}
        return Remembered(**tree)
    except (ValueError, KeyError, TypeError) as exc:
        raise HypervisorError("this QEMU remembers nothing that we wrote", code="qemu_protocol") from exc


def _pair(numbers: Any) -> Epoch:
    term, n = numbers
    return int(term), int(n)
