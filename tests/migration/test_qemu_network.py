"""NICs of QEMU guests on tap interfaces of the host, and how the network hears that a guest has moved. Needs root."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.hypervisor.qemu_hosts import requires_qemu
from tests.migration.fleet import migrate, open_fleet, wait_heartbeats
from tests.migration.qemu_fleet import VNIC, create_ready, machine, start
from vmmigrate.errors import VmMigrateError

_TUNSETIFF, _TUNSETPERSIST = 0x400454CA, 0x400454CB
_IFF_TAP_NO_PI = 0x1002
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 0x1
_RARP = 0x8035


def make_tap(name: str, *, keep: bool) -> None:
    """Make an interface that stays, and that is up; or remove it. Raises: OSError: this user may not."""
    tun = os.open("/dev/net/tun", os.O_RDWR)
    try:
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP_NO_PI))
        fcntl.ioctl(tun, _TUNSETPERSIST, int(keep))
    finally:
        os.close(tun)
    if keep:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), _IFF_UP))


@pytest.fixture
def taps() -> Iterator[tuple[str, str]]:
    names = ("vnic0", "vnic1")
    made = []
    try:
        try:
            for name in names:
                make_tap(name, keep=True)
                made.append(name)
        except OSError as exc:
            pytest.skip(f"no tap interfaces here: {exc}")
        yield names
    finally:
        for name in made:
            with contextlib.suppress(OSError):
                make_tap(name, keep=False)


pytestmark = [*requires_qemu[1:], pytest.mark.slow]  # not `required`: tap interfaces are for root


def carrier(name: str) -> bool:
    """Whether a process is attached to the interface."""
    return Path(f"/sys/class/net/{name}/carrier").read_text().strip() == "1"


async def test_a_nic_is_the_tap_interface_of_its_host_and_the_network_is_told(
    tmp_path: Path, taps: tuple[str, str]
) -> None:
    """The replacement names the destination's interface; once it runs there, its address is announced on that."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await start(fleet, "alpha", qemu=""), await start(fleet, "beta", qemu="")
        instance = await create_ready(alpha, machine(tmp_path))
        assert [carrier(name) for name in taps] == [True, False]
        with trio.socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_RARP)) as listening:
            await listening.bind((taps[1], 0))

            assert (await migrate(alpha, beta, instance, replacements=VNIC))["outcome"] == "moved"

            with trio.fail_after(10):
                frame = await listening.recv(2048)
        await wait_heartbeats(beta, instance)
        assert [carrier(name) for name in taps] == [False, True]
        assert frame[6] & 0x03 == 0x02, "a locally administered address of one machine"
        assert frame[12:14] == _RARP.to_bytes(2, "big")


async def test_a_nic_whose_interface_is_not_there_is_told_by_qemus_own_words(tmp_path: Path) -> None:
    async with open_fleet(tmp_path, "alpha") as fleet:
        alpha = await start(fleet, "alpha", qemu='network = "tap"')
        spec = machine(tmp_path)
        spec["components"]["vnic0"]["component"]["vnic_name"] = "vnic-that-is-far-too-long"

        with pytest.raises(VmMigrateError, match="no interface name"):
            await create_ready(alpha, spec)
