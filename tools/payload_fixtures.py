"""Golden device payloads, and the hash of every shape: `fixtures/payloads`.

    python -m tools.payload_fixtures                 write what is missing; refuse to change what is there
    python -m tools.payload_fixtures --check         change nothing; fail when a shape or a payload is not as noted
    python -m tools.payload_fixtures --rewrite-head  also rewrite the newest version of each kind, before it is released

Per kind and version there is one body with every field filled, as hex (what crosses the wire) and as JSON (for readers;
bytes as `{"hex": "..."}`). Older versions are never touched: every later build must read them.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import msgpack

from vmmigrate.devices import fields, kinds
from vmmigrate.devices.fields import FieldType, Struct, fields_of
from vmmigrate.devices.registry import KINDS, shape_changes

T = TypeVar("T")

PAYLOADS = Path(__file__).resolve().parent.parent / "fixtures" / "payloads"
_BYTES_PER_LINE = 32
_HEADING = (
    "# SHA-256 of every shape, by kind and version. `python -m tools.payload_fixtures` adds lines, and changes none.\n"
)


def filled(shape: type[T]) -> T:
    """A state with every field set to something of its own, the same at every run."""
    state: T = _filled(Struct(shape), iter(range(1, 1 << 16)))
    return state


def _filled(kind: FieldType, numbers: Iterator[int]) -> Any:
    if isinstance(kind, fields.Struct):
        return kind.shape(**{name: _filled(item, numbers) for name, item in fields_of(kind.shape).items()})
    if isinstance(kind, fields.ListOf):
        return tuple(_filled(kind.item, numbers) for _ in range(max(kind.shortest, min(2, kind.longest))))
    if isinstance(kind, fields.Maybe):
        return _filled(kind.item, numbers)
    if isinstance(kind, fields.Bits):
        return kind.allowed
    if isinstance(kind, fields.Boolean):
        return True
    if isinstance(kind, fields.Octets):
        return bytes(range(max(kind.shortest, min(12, kind.longest))))
    if isinstance(kind, fields.Text):
        return kind.allowed[-1] if kind.allowed else "idle"
    if isinstance(kind, fields.Scalars):
        return {"pages": 64, "name": "zwölf", "steady": True}
    assert isinstance(kind, fields.Integer)
    return min(kind.low + next(numbers), kind.high) if kind.low >= 0 else -next(numbers)


# --------------------------------------------------------------------------- samples that have to be consistent


def _pci() -> kinds.PciDeviceV1:
    empty = kinds.PciBar("Empty", 0, 0)
    bars = (
        kinds.PciBar("Pio", 0x200, 0xC000),
        kinds.PciBar("Mmio", 0x4000, 0xC000_0000),
        kinds.PciBar("Mmio64", 1 << 33, 1 << 40),
        empty,
        empty,
        empty,
    )
    entries = tuple(kinds.MsixEntry(0xFEE0_0000 + n, 0x4041 + n, n == 1, n == 0) for n in range(2))
    return kinds.PciDeviceV1(0x0407, 11, bars, kinds.Msix(2, True, False, entries))


def _clock() -> bytes:
    registers = bytearray(range(128))
    for register, value in {0: 0x59, 2: 0x30, 4: 0x23, 6: 0x03, 7: 0x29, 8: 0x02, 9: 0x28, 0x32: 0x20}.items():
        registers[register] = value
    registers[0x0B] = 0x02
    return bytes(registers)


def _registers() -> kinds.VirtioDeviceRegisters:
    return replace(filled(kinds.VirtioDeviceRegisters), msix_queue_vec=(1, 2, 0xFFFF))


def _queues_v1() -> tuple[kinds.VirtioQueueV1, ...]:
    return tuple(replace(filled(kinds.VirtioQueueV1), id=n, size=256, live=n < 2) for n in range(3))


def _queues() -> kinds.VirtioQueues:
    queues = (replace(filled(kinds.VirtioQueue), id=n, size=64, is_control=n == 2, notify_data=n + 8) for n in range(3))
    return kinds.VirtioQueues(3, 5, tuple(queues))


def _nvme() -> kinds.NvmeCtrlV1:
    completion = (kinds.NvmeCompletionQueue(0, 64, 3, 5, 60, True, 0x1000, 0),)
    submission = (kinds.NvmeSubmissionQueue(0, 32, 1, 2, 0x2000, 0),)
    return replace(filled(kinds.NvmeCtrlV1), cc=0x46_0001, cqs=completion, sqs=submission)


def _fw_cfg() -> kinds.QemuFwCfgV2:
    entries = (
        kinds.FwCfgEntry(0x19, "file-directory", "FileDir", None),
        kinds.FwCfgEntry(0x20, "etc/ramfb", "RamFb", None),
        kinds.FwCfgEntry(0x21, "bootorder", "Bytes", b"/pci@i0cf8/disk@4\0"),
    )
    return kinds.QemuFwCfgV2(0x7FFF_0000, kinds.FwCfgSelected(0x21, 3, b"cached"), entries)


_CONSISTENT: Mapping[tuple[str, int], Any] = {
    ("pci-device", 1): _pci(),
    ("uart-16550", 2): replace(
        filled(kinds.Uart16550V2), line_status=0x61, rx_fifo=bytes(range(16)), pending_input=b"reboot\n"
    ),
    ("uart-16550", 1): replace(filled(kinds.Uart16550V1), line_status=0x61),
    ("bhyve-rtc", 1): replace(filled(kinds.BhyveRtcV1), cmos=_clock(), time_sec=1_700_000_000, time_nsec=250_000_000),
    ("bhyve-rtc", 2): replace(filled(kinds.BhyveRtcV2), cmos=_clock()),
    ("pci-virtio", 1): kinds.PciVirtioV1(_registers(), _queues_v1()),
    ("pci-virtio", 2): kinds.PciVirtioV2(_registers(), _queues()),
    ("pci-virtio-viona", 1): kinds.PciVirtioVionaV1("Multi", 3, (b"\x02\x08\x20\0\0\1",), (b"\1\0\x5e\0\0\1",)),
    ("nvme-ctrl", 1): _nvme(),
    ("qemu-fwcfg", 2): _fw_cfg(),
    ("bhyve-x86-cpu-msregs", 1): kinds.VcpuMsrsV1((kinds.MsrEntry(0x10, 1 << 63), kinds.MsrEntry(0xC000_0080, 0xD01))),
}


def samples() -> Iterator[tuple[str, int, Any]]:
    """(kind, version, state in that version) of everything that this build can read."""
    for name, kind in KINDS.items():
        for version, shape in sorted(kind.shapes.items()):
            yield name, version, _CONSISTENT[name, version] if (name, version) in _CONSISTENT else filled(shape)


# --------------------------------------------------------------------------- files


def payload_path(kind: str, version: int) -> Path:
    return PAYLOADS / kind / f"v{version}" / "full.hex"


def tree_of(kind: str, version: int, state: Any) -> Any:
    return Struct(KINDS[kind].shapes[version]).encode(state)


def to_hex(body: bytes) -> str:
    lines = [body[at : at + _BYTES_PER_LINE].hex() for at in range(0, len(body), _BYTES_PER_LINE)]
    return "\n".join(lines) + "\n"


def to_json(tree: Any) -> str:
    return json.dumps(_plain(tree), indent=2, ensure_ascii=False) + "\n"


def _plain(tree: Any) -> Any:
    if isinstance(tree, bytes):
        return {"hex": tree.hex()}
    if isinstance(tree, dict):
        return {name: _plain(value) for name, value in tree.items()}
    return [_plain(item) for item in tree] if isinstance(tree, list) else tree


def read_recorded() -> dict[str, dict[str, str]]:
    path = PAYLOADS / "schemas.toml"
    return tomllib.loads(path.read_text()) if path.exists() else {}


def _schemas(recorded: Mapping[str, Mapping[str, str]], *, rewrite_head: bool) -> str:
    """The recorded hashes with those of new versions, and, if asked for, of the newest ones."""
    lines = [_HEADING]
    for name, kind in sorted(KINDS.items()):
        lines.append(f"\n[{name}]\n")
        for version in sorted(kind.shapes):
            known = recorded.get(name, {}).get(str(version))
            is_open = known is None or (rewrite_head and version == kind.newest)
            lines.append(f'{version} = "{kind.schema_hash(version) if is_open else known}"\n')
    return "".join(lines)


def wanted(*, rewrite_head: bool) -> Iterator[tuple[Path, str, bool]]:
    """(file, contents, whether it may be rewritten) of all golden files."""
    for name, version, state in samples():
        tree = tree_of(name, version, state)
        path = payload_path(name, version)
        is_open = rewrite_head and version == KINDS[name].newest
        yield path, to_hex(msgpack.packb(tree, use_bin_type=True)), is_open
        yield path.with_suffix(".json"), to_json(tree), is_open
    yield PAYLOADS / "schemas.toml", _schemas(read_recorded(), rewrite_head=rewrite_head), True


def write(*, rewrite_head: bool) -> list[str]:
    """Write what is missing; the problems with what is there."""
    problems = []
    for path, text, is_open in list(wanted(rewrite_head=rewrite_head)):
        if path.exists() and path.read_text() != text and not is_open:
            problems.append(f"{path}: differs from what this build writes; a released payload never changes")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return problems + shape_changes(read_recorded())


def check() -> list[str]:
    stale = [path for path, text, _ in wanted(rewrite_head=False) if not path.exists() or path.read_text() != text]
    return [*shape_changes(read_recorded()), *(f"{path}: missing, or not what this build writes" for path in stale)]


def main(arguments: Sequence[str]) -> int:
    if set(arguments) - {"--rewrite-head", "--check"}:
        print(__doc__, file=sys.stderr)
        return 2
    problems = check() if "--check" in arguments else write(rewrite_head="--rewrite-head" in arguments)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
