"""The demo's guest, as the embedded machine has it: its spec, the destination's own backends, and its program."""

from __future__ import annotations

import json
from typing import Any, Final

from vmmigrate.memory import MIB, PAGE_SIZE

INSTANCE: Final = "demo-guest"
VOLUME_ID: Final = "6f5e0c1a-9b7d-4e2f-8a3c-000100000001"
VNICS: Final = "demo-vnic-*"  # what both hosts allow
SERIAL_PORT: Final = "com1"
INTERFACE_ID: Final = "6f5e0c1a-9b7d-4e2f-8a3c-000200000001"
SMBIOS: Final = {"manufacturer": "vmmigrate", "product_name": "demo", "serial_number": "0001", "version": 1}
_BLOCK_BYTES, _BLOCKS_PER_EXTENT, _EXTENTS = 4096, 256, 8
VOLUME_BYTES: Final = _BLOCK_BYTES * _BLOCKS_PER_EXTENT * _EXTENTS

# The guest writes about a fifth of what loopback carries, so that every round is shorter than the one before.
_RATE_PAGES_PER_S: Final = 15_000
# The demo verifies in full, and hashing all of RAM is part of the pause: that is allowed for. The guest is paused at a
# minimum of what is left to send all the same.
DOWNTIME_MS: Final = 5000
# On a busy machine rounds may stay long; the demo is to end then, too.
MAX_ROUNDS: Final = 12


def spec(mib: int) -> dict[str, Any]:
    """A v3 spec as a control plane would send it."""
    return {
        "board": {"cpus": 2, "memory_mb": mib, "chipset": {"type": "i440_fx", "value": {"enable_pcie": False}}},
        "components": {
            "boot-disk": component("nvme_disk", backend_id="boot-volume", pci_path=pci(16), serial_number=[0] * 20),
            "boot-volume": component("crucible_storage_backend", request_json=_volume(1), readonly=False),
            "net0": component(
                "virtio_nic",
                backend_id="net0-vnic",
                interface_id=INTERFACE_ID,
                pci_path=pci(8),
            ),
            "net0-vnic": component("virtio_network_backend", vnic_name="demo-vnic-a"),
            SERIAL_PORT: component("serial_port", num="com1"),
        },
        "smbios": SMBIOS,
    }


def replacements(generation: int = 2) -> str:
    """The destination's own backends: the same volume under a newer *generation*, and a NIC of its own."""
    return json.dumps(
        {
            "boot-volume": {
                "component": "CrucibleStorageBackend",
                "spec": {"request_json": _volume(generation), "readonly": False},
            },
            "net0-vnic": {"component": "VirtioNetworkBackend", "spec": {"vnic_name": "demo-vnic-b"}},
        }
    )


def program(mib: int) -> dict[str, Any]:
    """Fills three quarters of RAM, then rewrites it for ever; also writes blocks to the disk that tell a lost write."""
    return {
        "name": "stress",
        "working_set_pages": working_set_pages(mib),
        "rate_pages_per_s": _RATE_PAGES_PER_S,
        "disk_io": True,
    }


def working_set_pages(mib: int) -> int:
    return mib * MIB // PAGE_SIZE * 3 // 4


def request(mib: int) -> dict[str, Any]:
    """The body of `POST /v1/instances`."""
    return {
        "id": INSTANCE,
        "name": "demo",
        "spec_version": "v3",
        "spec": spec(mib),
        "program": program(mib),
        "start": True,
    }


def component(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, "component": fields}


def pci(device: int) -> dict[str, int]:
    return {"bus": 0, "device": device, "function": 0}


def _volume(generation: int) -> str:
    region = {
        "type": "region",
        "block_size": _BLOCK_BYTES,
        "blocks_per_extent": _BLOCKS_PER_EXTENT,
        "extent_count": _EXTENTS,
        "opts": {
            "id": VOLUME_ID,
            "target": ["127.0.0.1:3810", "127.0.0.1:3820", "127.0.0.1:3830"],
            "lossy": False,
            "read_only": False,
        },
        "gen": generation,
    }
    return json.dumps(
        {
            "type": "volume",
            "id": VOLUME_ID,
            "block_size": _BLOCK_BYTES,
            "sub_volumes": [region],
            "read_only_parent": None,
        }
    )
