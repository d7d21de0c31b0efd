"""What a QEMU remembers of whose guest it runs, in an object of its own: it lives and dies with the process.

QEMU knows no epochs and no journals. It does have objects whose texts can be set and read over QMP (`authz-simple`,
which authorises nobody here); one of them holds what is below. A daemon that adopts the guest reads it there, and not
from a file that could be older than the process, or younger.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, TypeVar

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.base import GuestStamp

Epoch = tuple[int, int]
T = TypeVar("T")

MAX_TEXT_CHARS: Final = 1 << 14  # ours have some hundred


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


def from_text(text: Any) -> Remembered:
    """What QEMU answered, if it is such a text.

    Raises: HypervisorError `qemu_protocol`: it is not one of our QEMUs, or its guest has taken it over.
    """
    try:
        if len(text) > MAX_TEXT_CHARS:
            raise ValueError(f"{len(text)} characters")
        tree = json.loads(text)
        tree["stamp"] = GuestStamp(**_checked(tree["stamp"], _IN_STAMP))
        return Remembered(**_checked(tree, _IN_MEMORY))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as exc:
        raise HypervisorError("this QEMU remembers nothing that we wrote", code="qemu_protocol") from exc


def _checked(tree: Any, checks: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """Every field of *tree*. Raises: KeyError: there is none of that name; TypeError, ValueError: of another kind."""
    return {name: checks[name](value) for name, value in _a(dict)(tree).items()}


def _a(kind: type[T]) -> Callable[[Any], T]:
    def check(value: Any) -> T:
        if type(value) is not kind:
            raise TypeError(f"{kind.__name__} expected")
        return value

    return check


def _text(value: Any) -> str:
    _a(str)(value).encode()  # half a character could not be written down anywhere
    return str(value)


def _text_or_none(value: Any) -> str | None:
    return None if value is None else _text(value)


def _int64(value: Any) -> int:
    if not -(1 << 63) <= _a(int)(value) < 1 << 63:
        raise ValueError("no such number")
    return int(value)


def _epoch(value: Any) -> Epoch:
    term, n = _a(list)(value)
    return _int64(term), _int64(n)


_IN_STAMP: Final = {"instance_id": _text, "host_id": _text, "epoch": _epoch, "migration_id": _text_or_none}
_IN_MEMORY: Final = {
    "stamp": _a(GuestStamp),
    **dict.fromkeys(("seen", "ran"), _epoch),
    "handoff": _text_or_none,
    **dict.fromkeys(("is_open", "is_arriving", "has_loaded", "is_deaf", "announces"), _a(bool)),
    "last_record": _int64,
    "last_journal": _text,
    "booted_ns": _int64,
}
