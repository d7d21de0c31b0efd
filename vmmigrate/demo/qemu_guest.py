"""The demo's guest in QEMU: the stress guest, with a disk that is a file of both hosts and a NIC in QEMU's own network.

It says a letter each millisecond; who ran it when is seen on its console, which QEMU itself writes to.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vmmigrate.demo import guest
from vmmigrate.demo.heartbeat import joined, letters, rhythm
from vmmigrate.demo.site import DESTINATION, SOURCE, Setting, Site
from vmmigrate.demo.watching import ConsoleWatch, watch_consoles
from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.qemu import tracker
from vmmigrate.hypervisor.qemu.settings import QemuSettings
from vmmigrate.hypervisor.qemu.stress import VITALS_GPA, State, build_stress_guest, stress_append
from vmmigrate.memory import MIB

QEMU: Final = Setting("qemu", allow='paths = ["guest"]', sections='[qemu]\nnetwork = "user"')

_DISK: Final = "disk.img"
_DISK_BYTES: Final = 16 * MIB
_LEFT_MIB: Final = 4  # below where the guest begins to fill; as much is left above for the firmware
_MOST_MIB: Final = 3064  # a guest of 32 bits has no use for what lies above 4 GiB
_WORKING_SET_MIB: Final = 16
_RATE_PAGES_PER_MS: Final = 10
_BEATS: Final = 500  # before and after the move


class QemuGuest:
    """Implements `guests.DemoGuest`."""

    setting: Setting = QEMU

    def __init__(self, mib: int) -> None:
        self._mib = mib
        self._filled_to_mib = min(max(mib - _LEFT_MIB, _LEFT_MIB + 1), _MOST_MIB)
        self.working_set_mib = min(_WORKING_SET_MIB, self._filled_to_mib - _LEFT_MIB)

    def check_tools(self) -> None:
        check_qemu()

    def prepare(self, site: Site) -> None:
        build_stress_guest(site.guest)
        with open(site.guest / _DISK, "wb") as disk:
            disk.truncate(_DISK_BYTES)

    def request(self, site: Site) -> dict[str, Any]:
        filled, rate = self._filled_to_mib, _RATE_PAGES_PER_MS
        program = {
            "name": "kernel",
            "kernel": str(site.guest / "stress.elf"),
            "append": stress_append(mem_mib=filled, ws_mib=self.working_set_mib, rate=rate, disk=True),
            "vitals_gpa": VITALS_GPA,
        }
        return {
            "id": guest.INSTANCE,
            "name": "demo",
            "spec_version": "v3",
            "spec": machine(self._mib, str(site.guest / _DISK)),
            "program": program,
            "start": True,
        }

    def replacements(self) -> str:
        return nic_of(DESTINATION)

    def is_at_work(self, seen: Mapping[str, Any]) -> bool:
        program = seen["program"]
        return bool(
            program.get("state") == State.READY and program["heartbeats"] >= _BEATS and program["disk_read_backs"]
        )

    def has_lived_on(self, first: Mapping[str, Any], seen: Mapping[str, Any]) -> bool:
        """A disk that does not answer fails in nothing: its counters just stand still."""
        before, now = first["program"], seen["program"]
        return bool(
            now["heartbeats"] >= before["heartbeats"] + _BEATS and now["disk_read_backs"] > before["disk_read_backs"]
        )

    @contextlib.asynccontextmanager
    async def watched(self, site: Site) -> AsyncIterator[_Letters]:
        async with watch_consoles({host: site.runtime(host) for host in (SOURCE, DESTINATION)}, "com1") as console:
            yield _Letters(console)


@dataclass(frozen=True)
class _Letters:
    console: ConsoleWatch

    def verdict(self, check: Mapping[str, Any]) -> dict[str, Any]:
        told = joined(self.console.outputs())
        beats, holes = letters(told.text)
        seen = rhythm(told, beats)
        problems = [*told.problems, *holes]
        return {
            "heartbeat_gap_ms": max(seen.move_gaps_ms, default=0.0),
            "heartbeat_largest_gap_ms": seen.largest_gap_ms,
            "heartbeat_steady_p99_ms": seen.steady_p99_ms,
            "heartbeats": seen.heartbeats,
            "single_owner": not problems and seen.hosts == (SOURCE, DESTINATION),
            "ran_on": list(seen.hosts),
            "witness_problems": problems,
        }


def check_qemu() -> None:
    """Raises: HypervisorError `qemu_missing`, `no_tracker`."""
    binary = QemuSettings().binary
    if shutil.which(binary) is None:
        raise HypervisorError(f"{binary} is not there; on Debian: apt-get install qemu-system-x86", code="qemu_missing")
    if tracker.library() is None:
        raise HypervisorError(
            "the tracker library, without which QEMU guests cannot be moved, was not built: there was no C compiler"
            " when vmmigrate was installed; on Debian: apt-get install gcc, then install vmmigrate again",
            code="no_tracker",
        )


def machine(mib: int, disk: str) -> dict[str, Any]:
    """A v3 spec: a disk that is the file *disk*, a NIC and a serial port."""
    return {
        "board": {"cpus": 2, "memory_mb": mib, "chipset": {"type": "i440_fx", "value": {"enable_pcie": False}}},
        "components": {
            "disk0": guest.component("virtio_disk", backend_id="disk0-file", pci_path=guest.pci(4)),
            "disk0-file": guest.component(
                "file_storage_backend", path=disk, readonly=False, block_size=512, workers=None
            ),
            "net0": guest.component(
                "virtio_nic", backend_id="net0-vnic", interface_id=guest.INTERFACE_ID, pci_path=guest.pci(8)
            ),
            "net0-vnic": guest.component("virtio_network_backend", vnic_name=_vnic(SOURCE)),
            guest.SERIAL_PORT: guest.component("serial_port", num="com1"),
        },
        "smbios": guest.SMBIOS,
    }


def nic_of(host: str) -> str:
    """Replacements for a destination: the NIC's backend on *host*."""
    return json.dumps({"net0-vnic": {"component": "VirtioNetworkBackend", "spec": {"vnic_name": _vnic(host)}}})


def _vnic(host: str) -> str:
    return f"demo-vnic-{host}"
