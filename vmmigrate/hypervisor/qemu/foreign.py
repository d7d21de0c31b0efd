"""A QEMU that something else started: how it calls what `machine` names itself, and where its guest's RAM is.

This stands in a file of its directory, so that the next daemon finds it again; none is there for QEMUs of our own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.base import GuestStamp
from vmmigrate.hypervisor.qemu.files import QemuFiles
from vmmigrate.hypervisor.rammap import CopiedRam, MappedRam
from vmmigrate.memory import RamLayout


@dataclass(frozen=True, slots=True)
class Foreign:
    """What is known of it. All but the first three once it was looked at.

    Attributes:
        owner: Instance and host of those who take it over: whoever gives it back undoes only what is theirs.
        ram_address: Where guest RAM lies in the process.
        ram_fd: The process' descriptor of it; None when RAM is the process' own (an ordinary `-m`).
        nodes: Of each disk, in the order of the plan, the block node behind its device.
        ports: Of each serial port (`com1`), the character device behind it.
        facts: What the same machine calls itself when we build it (`inspecting.guest_facts`).
        before: What is put back when it is given back (`takeover`).
        has_consoles: What was behind its serial ports is, or is about to be, cut off.
    """

    pid: int
    start_ticks: int
    owner: Sequence[str]
    ram_address: int = 0
    ram_fd: int | None = None
    ram_bytes: int = 0
    nodes: Sequence[str] = ()
    ports: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    before: Mapping[str, Any] = field(default_factory=dict)
    has_consoles: bool = False

    @property
    def has_own_ram(self) -> bool:
        return self.ram_fd is None

    def is_owned_by(self, stamp: GuestStamp) -> bool:
        return [stamp.instance_id, stamp.host_id] == list(self.owner)

    def save(self, files: QemuFiles) -> None:
        """Whole or not at all. Blocking."""
        files.keep_foreign(json.dumps(asdict(self)))

    def map_ram(self, layout: RamLayout) -> MappedRam:
        """Where somebody could make the file shorter, which would end this daemon, RAM is copied, too. Blocking.

        Raises: OSError, HypervisorError: the process is gone, or its RAM is not of that size.
        """
        if self.ram_fd is None:
            return CopiedRam(self.pid, self.ram_address, layout)
        ram = map_shared(self.pid, self.ram_fd, layout)
        if ram.cannot_shrink:
            return ram
        ram.close()
        return CopiedRam(self.pid, self.ram_address, layout, shared=ram.file)


def map_shared(pid: int, fd: int, layout: RamLayout) -> MappedRam:
    """RAM that a process has open as *fd*; only read here. Blocking. Raises: OSError, HypervisorError: as `map_ram`."""
    own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        return MappedRam(own, layout, writable=False)
    except BaseException:
        os.close(own)
        raise


def load(files: QemuFiles) -> Foreign | None:
    """None for a QEMU of our own. Blocking. Raises: HypervisorError `guest_files`: there is nonsense in it."""
    try:
        told: dict[str, Any] = json.loads(files.foreign.read_text(encoding="utf-8"))
        return Foreign(**told)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as exc:
        raise HypervisorError(f"{files.foreign}: {exc}", code="guest_files") from exc
