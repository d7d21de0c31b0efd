"""Record what this release's source and destination say to each other, as golden transcripts in `tests/compat`.

    python -m tools.record_transcript            record what is missing; a recorded transcript never changes
    python -m tools.record_transcript --rewrite  record anew, before the release

Each transcript is one migration between two real daemons in this process: one line per frame, `source` or
`destination`, the kind, and the frame as hex, in the order in which the source sent and received them. Heartbeats and
progress are left out: they come when they come. `tests/compat` replays them against the code of later builds.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import trio

import vmmigrate
from tests.migration import fleet
from vmmigrate.daemon import migrations
from vmmigrate.net.channel import Channel, ChannelLimits, open_channel
from vmmigrate.wire.framing import Frame, FrameDecoder, encode_frame
from vmmigrate.wire.negotiate import Abilities
from vmmigrate.wire.phases import Kind, Role

TRANSCRIPTS = Path(__file__).resolve().parent.parent / "tests" / "compat"
LEFT_OUT = frozenset({Kind.HEARTBEAT, Kind.PROGRESS})
SPEC = fleet.spec_v3(
    disk={
        "type": "virtio_disk",
        "component": {"backend_id": "memory", "pci_path": {"bus": 0, "device": 4, "function": 0}},
    },
    memory={"type": "blob_storage_backend", "component": {"base64": "Y29udGVudHM=", "readonly": False}},
    net={
        "type": "virtio_nic",
        "component": {
            "backend_id": "wire",
            "interface_id": "6f5e0c1a-9b7d-4e2f-8a3c-000100000001",
            "pci_path": {"bus": 0, "device": 5, "function": 0},
        },
    },
    wire={"type": "virtio_network_backend", "component": {"vnic_name": "vnic0"}},
)


@dataclass
class Transcript:
    """The frames of one conversation, as the source saw them pass."""

    frames: list[tuple[Role, Frame]] = field(default_factory=list)

    def text(self) -> str:
        return "".join(f"{role} {frame.kind.name} {encode_frame(frame).hex()}\n" for role, frame in self.frames)


def read(path: Path) -> Transcript:
    """A transcript from its file."""
    transcript = Transcript()
    for line in path.read_text().splitlines():
        role, _, encoded = line.split(" ")
        decoder = FrameDecoder()
        decoder.receive_data(bytes.fromhex(encoded))
        frame = decoder.next_frame()
        assert frame is not None, line[:80]
        transcript.frames.append((Role(role), frame))
    return transcript


class Tap:
    """A stream that notes the frames which pass, in both directions."""

    def __init__(self, stream: Any, transcript: Transcript) -> None:
        self._stream, self._transcript = stream, transcript
        self._decoders = {role: FrameDecoder() for role in Role}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def send_all(self, encoded: bytes) -> None:
        self._note(Role.SOURCE, encoded)
        await self._stream.send_all(encoded)

    async def receive_some(self, most: int) -> bytes:
        chunk: bytes = await self._stream.receive_some(most)
        self._note(Role.DESTINATION, chunk)
        return chunk

    def _note(self, speaker: Role, chunk: bytes) -> None:
        self._decoders[speaker].receive_data(chunk)
        while (frame := self._decoders[speaker].next_frame()) is not None:
            if frame.kind not in LEFT_OUT:
                self._transcript.frames.append((speaker, frame))


@contextlib.contextmanager
def tapped(transcript: Transcript) -> Any:
    """While it lasts, sources in this process speak through a tap."""

    @contextlib.asynccontextmanager
    async def open_tapped(stream: Any, role: Role, limits: ChannelLimits | None = None) -> AsyncIterator[Channel]:
        tap: Any = Tap(stream, transcript) if role is Role.SOURCE else stream
        async with open_channel(tap, role, limits) as channel:
            yield channel

    migrations.open_channel = open_tapped  # type: ignore[attr-defined]
    try:
        yield
    finally:
        migrations.open_channel = open_channel  # type: ignore[attr-defined]


async def record(
    root: Path, outcome: str, abilities: Callable[[Abilities], Abilities] | None = None, spec: Any = SPEC
) -> Transcript:
    """One migration that ends as *outcome*."""
    transcript = Transcript()
    async with fleet.open_fleet(root, "alpha", "beta") as hosts:
        alpha, beta = await hosts.start("alpha"), await hosts.start("beta", abilities=abilities)
        instance = await fleet.create(alpha, spec, name="recorded", blobs={"firmware": "AAEC"})
        await fleet.wait_heartbeats(alpha, instance)
        with tapped(transcript):
            ended = await fleet.migrate(alpha, beta, instance, keep=["*"], verify="full")
        assert ended["outcome"] == outcome, ended
    return transcript


def _without_rtc(able: Abilities) -> Abilities:

    return replace(able, payloads={k: v for k, v in able.payloads.items() if k != "bhyve-rtc"})


def _injected() -> Any:
    injector = {"type": "migration_failure_injector", "component": {"fail_exports": 0, "fail_imports": 1}}
    return {**SPEC, "components": {**SPEC["components"], "injector": injector}}


RECORDINGS: dict[str, Callable[[Path], Any]] = {
    "moved": partial(record, outcome="moved"),
    "refused": partial(record, outcome="refused", abilities=_without_rtc),
    "failed": partial(record, outcome="failed", spec=_injected()),
}


def path_of(name: str) -> Path:
    return TRANSCRIPTS / vmmigrate.__version__ / f"{name}.txt"


def main(arguments: Sequence[str]) -> int:
    if set(arguments) - {"--rewrite"}:
        print(__doc__, file=sys.stderr)
        return 2
    for name, recording in RECORDINGS.items():
        path = path_of(name)
        if path.exists() and "--rewrite" not in arguments:
            continue
        with tempfile.TemporaryDirectory(prefix="vmm-") as directory:
            transcript: Transcript = trio.run(recording, Path(directory))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(transcript.text())
        print(f"{path.relative_to(TRANSCRIPTS.parent.parent)}: {len(transcript.frames)} frames", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
