"""Golden frames: one file per message kind and protocol version, as hex.

    python -m tools.frame_fixtures                 write what is missing; refuse to change what is there
    python -m tools.frame_fixtures --rewrite-head  also rewrite the newest version's frames, before it is released

Frames of older versions are never touched: every later build must read them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vmmigrate.wire import messages as m
from vmmigrate.wire.codec import encode
from vmmigrate.wire.framing import encode_frame
from vmmigrate.wire.negotiate import PROTOCOL_VERSIONS
from vmmigrate.wire.phases import Kind

FRAMES = Path(__file__).resolve().parent.parent / "fixtures" / "frames"
HEAD = max(PROTOCOL_VERSIONS)
_BYTES_PER_LINE = 32

_M = "3f6f6e8e-6f0b-4d43-9a6c-0d9d2f7b5c11"
_INSTANCE = "8e1d3c52-7a52-4c57-bb2b-4a7c0f3e9a20"
_RANDOM = bytes(range(32))
_DIGEST = bytes(range(32, 64))
_DETAILS = {"mismatches": [{"topic": "protocol", "source": ["1"], "destination": ["2"]}], "deep": [None, True, -1, 0.5]}

# One message of every kind, with every field filled.
SAMPLES: tuple[m.Message, ...] = (
    m.Offer(
        protocols=(1, 2),
        migration_id=_M,
        instance_id=_INSTANCE,
        ticket="c2VjcmV0",
        spec_versions=("v1", "v2", "v3"),
        payloads={"uart16550": (1, 2), "rtc": (1,)},
        ram={"transports": ("tls", "sealed"), "encodings": ("raw", "zero"), "digests": ("multilinear-64",)},
        max_streams=16,
        facts={"hypervisor": "embedded", "version": "1"},
        api_url="https://[::1]:7444",
        random=_RANDOM,
    ),
    m.Select(
        protocol=1,
        spec_version="v3",
        payloads={"uart16550": 2, "rtc": 1},
        transport="tls",
        encodings=("raw", "zero"),
        digest="multilinear-64",
        streams=2,
        bulk_port=65_535,
        session_number=1,
        verify="full",
        offer_digest=_DIGEST,
        random=_RANDOM,
    ),
    m.Refuse(code="no_common_ground", text="nothing in common: protocol", details=_DETAILS),
    m.Preamble(
        spec_version="v3",
        spec='{"board":{"cpus":1},"name":"zwölf"}'.encode(),
        blobs={"firmware": b"\x00\xff", "empty": b""},
        properties={"name": "web-1", "description": "front end"},
        run_state="paused",
        epoch=(1, 3),
        regions=((0, 3 << 30), (4 << 30, 1 << 20)),
        populated=((0, 256), (4 << 30, 1)),
        devices=(m.DeviceEntry("com1", "uart16550", 2, False), m.DeviceEntry("injector", "failure", 1, True)),
        facts={"hypervisor": "embedded", "device_tree": "6c1f"},
    ),
    m.PreambleOk(select_digest=_DIGEST, blob_digests={"firmware": _DIGEST}, amended=("disk0", "nic0")),
    m.RoundEnd(round_number=3, records=(17, (1 << 64) - 1), pages=4096, dirty_pages=12),
    m.RoundApplied(round_number=3, bytes_received=1 << 33),
    m.Paused(round_number=4),
    m.TimeDataMessage(values={"guest_tsc": (1 << 64) - 1, "wall_offset_ns": -1}),
    m.DeviceState(payloads=(m.PayloadItem("com1", "uart16550", 2, False, b"\x01\x02"),)),
    m.ConsoleHistoryMessage(port="com1", beginning=b"boot\r\n", rolling=b"login: ", total_bytes=70_000),
    m.StateEnd(page_digest=_DIGEST, payloads=1),
    m.Ready(journal_id="00112233445566778899aabbccddeeff", page_digest=_DIGEST, ram_digest=_DIGEST),
    m.Handoff(run_state="running", epoch=(1, 3)),
    m.Running(journal_id="00112233445566778899aabbccddeeff", epoch=(1, 4), import_s=0.25, resume_s=0.0),
    m.Refused(journal_id="00112233445566778899aabbccddeeff", code="settled", text="no handoff came in time"),
    m.Returned(journal_id="00112233445566778899aabbccddeeff", code="disk_busy", text="disk0 could not be opened"),
    m.Progress(counters={"pages": 1 << 40, "round": 2}),
    m.Heartbeat(),
    m.Cancel(reason="asked for by operator/ann"),
    m.Resume(migration_id=_M, session_number=1, random=bytes(range(32)), proof=_DIGEST),
    m.Resumed(session_number=2, bulk_port=7443, random=bytes(range(32)), proof=_DIGEST),
    m.Applied(round_number=2, pages=b"\x78\x01\x03\x00\x00\x00\x00\x01"),
    m.Failed(code="device_payload", text="com1: version 9 is unknown", details=_DETAILS),
)


def frame_path(version: int, kind: Kind) -> Path:
    return FRAMES / f"v{version}" / f"{kind.name.lower()}.hex"


def to_text(encoded: bytes) -> str:
    lines = [encoded[at : at + _BYTES_PER_LINE].hex() for at in range(0, len(encoded), _BYTES_PER_LINE)]
    return "\n".join(lines) + "\n"


def write(rewrite_head: bool) -> list[Path]:
    """Write the frames of the newest version; the paths that differ and were left alone."""
    refused = []
    for sample in SAMPLES:
        path = frame_path(HEAD, sample.kind)
        wanted = to_text(encode_frame(encode(sample)))
        if path.exists() and path.read_text() != wanted and not rewrite_head:
            refused.append(path)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted)
    return refused


def main(arguments: Sequence[str]) -> int:
    if set(arguments) - {"--rewrite-head"}:
        print(__doc__, file=sys.stderr)
        return 2
    refused = write(rewrite_head="--rewrite-head" in arguments)
    for path in refused:
        print(f"{path}: differs from what this build writes; a released frame never changes", file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
