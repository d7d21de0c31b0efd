"""What lies in the directory of a QEMU: consoles whose history is exact, device state that is whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hypervisor.test_qemu_stream import Device, composed, recorded
from vmmigrate.errors import PayloadError
from vmmigrate.hypervisor import kernel
from vmmigrate.hypervisor.base import ConsoleHistory
from vmmigrate.hypervisor.embedded import uart
from vmmigrate.hypervisor.qemu import files
from vmmigrate.hypervisor.qemu.files import HISTORY_BYTES, QemuFiles, read_history, trim_output, write_history
from vmmigrate.hypervisor.qemu.stream import parse_stream
from vmmigrate.memory import MIB

PAGE = 4096
SMALL_BYTES = 2 * PAGE
PUNCHED_FROM_BYTES = 8 * PAGE


def expected(output: bytes, keeps: int = HISTORY_BYTES) -> ConsoleHistory:
    """The history of a console that wrote *output*: the model."""
    beginning, rest = output[:keeps], output[keeps:]
    return ConsoleHistory("console", beginning, rest[-keeps:], len(output))


def noise(size: int) -> bytes:
    """Bytes of which no two stretches are alike, so that whatever is taken from elsewhere shows."""
    words = b"".join(n.to_bytes(4, "little") for n in range(0xABCD0000, 0xABCD0000 + size // 4 + 1))
    return words[:size]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    path = tmp_path / "com1.log"
    path.touch()
    return path


def append(output: Path, piece: bytes) -> None:
    """As QEMU does it."""
    with open(output, "ab") as file:
        file.write(piece)


def used_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


def can_punch(directory: Path) -> bool:
    probe = directory / "probe"
    probe.write_bytes(b"x" * MIB)
    try:
        with open(probe, "rb+") as file:
            kernel.punch_holes(file.fileno(), [(0, MIB // PAGE)])
    except OSError:
        return False
    return used_bytes(probe) == 0


@contextmanager
def small_histories() -> Iterator[None]:
    """Two pages at each end, and what lies between is given back from eight pages on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "HISTORY_BYTES", SMALL_BYTES)
        patch.setattr(files, "_PUNCHED_FROM_BYTES", PUNCHED_FROM_BYTES)
        patch.setattr(uart, "HISTORY_BYTES", SMALL_BYTES)
        yield


# ---- what the guest wrote

sizes = st.one_of(
    st.integers(0, 3 * SMALL_BYTES),
    st.sampled_from([SMALL_BYTES, PUNCHED_FROM_BYTES, 3 * PUNCHED_FROM_BYTES]).flatmap(
        lambda size: st.integers(size - 2, size + 2)
    ),
)
steps = st.lists(st.one_of(sizes, st.sampled_from(["trim", "read"])), max_size=12)


@given(steps=steps)
def test_a_history_is_the_beginning_the_latest_and_the_number_of_what_was_written(
    steps: Sequence[int | str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In whatever pieces it was written, and whatever was given back between; and as the embedded machine tells it."""
    output = tmp_path_factory.mktemp("console") / "com1.log"
    output.touch()
    written, embedded = b"", uart.History()

    with small_histories():
        for step in [*steps, "read"]:
            if isinstance(step, int):
                piece = noise(len(written) + step)[len(written) :]
                append(output, piece)
                embedded.append(piece)
                written += piece
            elif step == "trim":
                trim_output(output)
            else:
                history = read_history(output, "console")
                assert history == expected(written, SMALL_BYTES)
                told = {"beginning": history.beginning, "rolling": history.rolling, "total_bytes": history.total_bytes}
                assert told == embedded.export()


@given(total=sizes, later=sizes, trims=st.booleans())
def test_a_history_that_was_written_is_read_back_and_goes_on(
    total: int, later: int, trims: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What came in between is not there, and never shows: it could only be taken for what the guest wrote."""
    output = tmp_path_factory.mktemp("console") / "com1.log"
    output.touch()
    everything = noise(total + later)

    with small_histories():
        write_history(output, expected(everything[:total], SMALL_BYTES))
        if trims:
            trim_output(output)
        assert read_history(output, "console") == expected(everything[:total], SMALL_BYTES)
        append(output, everything[total:])
        history = read_history(output, "console")

    latest = everything[max(total - SMALL_BYTES, SMALL_BYTES) :] if total > SMALL_BYTES else everything[SMALL_BYTES:]
    assert history.beginning == everything[:SMALL_BYTES]
    assert history.rolling == latest[-SMALL_BYTES:] if latest else history.rolling == b""
    assert history.total_bytes == len(everything)


def test_a_console_that_said_nothing_has_an_empty_history(output: Path) -> None:
    assert read_history(output, "console") == ConsoleHistory("console", b"", b"", 0)


@pytest.mark.parametrize("size", [1, MIB - 1, MIB, MIB + 1, 2 * MIB, 2 * MIB + 1, 9 * MIB + 5])
def test_the_ends_of_a_history_are_a_mebibyte_each(output: Path, size: int) -> None:
    append(output, noise(size))

    assert read_history(output, "console") == expected(noise(size))


@pytest.mark.parametrize("total", [0, 1, MIB, MIB + 1, 2 * MIB, 2 * MIB + 1, 100 * MIB + 5, 1 << 40])
def test_a_history_comes_back_however_long_it_was(output: Path, total: int) -> None:
    """The TiB between its ends are a hole."""
    rolling = max(min(total - MIB, MIB), 0)
    history = ConsoleHistory("console", noise(min(total, MIB)), noise(2 * MIB)[-rolling:] if rolling else b"", total)

    write_history(output, history)

    assert read_history(output, "console") == history
    assert used_bytes(output) <= 2 * MIB + 16 * PAGE


def test_what_the_guest_writes_later_follows_the_history_of_another_host(output: Path) -> None:
    """QEMU opened the file before the history came, to append to it."""
    before, later = noise(3 * MIB + 7), b"and goes on"
    with open(output, "ab", buffering=0) as opened_before:
        write_history(output, expected(before))
        opened_before.write(later)

    assert read_history(output, "console") == expected(before + later)


def test_a_history_replaces_whatever_was_there(output: Path) -> None:
    append(output, b"firmware of a guest that never ran" * 100_000)

    write_history(output, expected(b"short"))

    assert read_history(output, "console") == expected(b"short")


CONTRADICTIONS = {
    "too little at the beginning": ConsoleHistory("console", b"123", b"", 4),
    "too much at the beginning": ConsoleHistory("console", b"12345", b"", 4),
    "something latest of what is all beginning": ConsoleHistory("console", b"1234", b"4", 4),
    "nothing at the beginning of much": ConsoleHistory("console", b"", b"", 2 * MIB),
    "nothing latest of much": ConsoleHistory("console", bytes(MIB), b"", MIB + 1),
    "too much latest": ConsoleHistory("console", bytes(MIB), b"12", MIB + 1),
    "too little latest": ConsoleHistory("console", bytes(MIB), bytes(MIB - 1), 3 * MIB),
    "more than a mebibyte": ConsoleHistory("console", bytes(MIB + 1), bytes(MIB), 3 * MIB),
    "fewer than none": ConsoleHistory("console", b"", b"", -1),
    "so many fewer that it would fit": ConsoleHistory("console", b"", bytes(MIB), -(1 << 40)),
}


@pytest.mark.parametrize("fault", CONTRADICTIONS)
def test_a_history_that_contradicts_itself_is_refused_and_nothing_changed(output: Path, fault: str) -> None:
    append(output, b"as it was")

    with pytest.raises(PayloadError, match="console") as caught:
        write_history(output, CONTRADICTIONS[fault])

    assert caught.value.code == "console_history"
    assert output.read_bytes() == b"as it was"


@pytest.mark.parametrize("total", [1 << 50, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 70], ids=hex)
def test_a_history_longer_than_any_file_is_refused_and_nothing_changed(output: Path, total: int) -> None:
    """The wire carries any number of 64 bits."""
    append(output, b"as it was")

    with pytest.raises(PayloadError) as caught:
        write_history(output, ConsoleHistory("console", bytes(MIB), bytes(MIB), total))

    assert caught.value.code == "console_history"
    assert output.read_bytes() == b"as it was"


# ---- what nobody reads any more


def test_trimming_gives_back_what_lies_between_the_ends(output: Path, tmp_path: Path) -> None:
    if not can_punch(tmp_path):
        pytest.skip("this file system keeps everything")
    written = noise(20 * MIB + 1234)
    append(output, written)
    assert used_bytes(output) >= 20 * MIB

    trim_output(output)

    assert used_bytes(output) <= 2 * MIB + 16 * PAGE
    assert output.stat().st_size == len(written)
    assert read_history(output, "console") == expected(written)


def test_reading_a_history_gives_back_too(output: Path, tmp_path: Path) -> None:
    if not can_punch(tmp_path):
        pytest.skip("this file system keeps everything")
    append(output, noise(10 * MIB))

    read_history(output, "console")

    assert used_bytes(output) <= 2 * MIB + 16 * PAGE


def test_a_console_that_goes_on_and_on_never_fills_the_disk(output: Path, tmp_path: Path) -> None:
    if not can_punch(tmp_path):
        pytest.skip("this file system keeps everything")
    piece, most = noise(3 * MIB), 0

    for _ in range(12):
        append(output, piece)
        trim_output(output)
        most = max(most, used_bytes(output))

    assert most <= 8 * MIB + 3 * MIB
    assert output.stat().st_size == 36 * MIB


def test_a_short_output_is_left_alone(output: Path) -> None:
    append(output, noise(8 * MIB - 1))
    before = used_bytes(output)

    trim_output(output)

    assert used_bytes(output) == before
    assert output.read_bytes() == noise(8 * MIB - 1)


def test_where_nothing_can_be_given_back_everything_is_kept(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, runs: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(kernel, "punch_holes", refuse)
    append(output, noise(9 * MIB))

    trim_output(output)

    assert read_history(output, "console") == expected(noise(9 * MIB))


def test_trimming_what_is_gone_is_no_error(tmp_path: Path) -> None:
    trim_output(tmp_path / "gone")


# ---- device state at rest


@pytest.fixture
def own(tmp_path: Path) -> QemuFiles:
    return QemuFiles(tmp_path)


def test_state_that_is_kept_is_there_and_gives_way_to_the_next(own: QemuFiles) -> None:
    own.keep_state(recorded("7.2/devices"))
    own.keep_state(recorded("7.2/bare"))

    assert own.state.read_bytes() == recorded("7.2/bare")


def test_the_devices_of_a_guest_are_known_by_their_labels(own: QemuFiles) -> None:
    stream = parse_stream(recorded("7.2/devices"))

    own.keep_devices(stream, len(stream.joined()))

    labels = [device.label for device in stream.devices]
    assert json.loads(own.devices.read_text()) == {"labels": labels, "bytes": len(recorded("7.2/devices"))}


@pytest.mark.parametrize("before", [None, b"the state of the last pause"], ids=["the first", "another"])
def test_a_crash_while_state_is_kept_leaves_what_was_there(
    own: QemuFiles, before: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a state would be loaded elsewhere."""
    if before is not None:
        own.keep_state(before)
    write = Path.write_bytes

    def torn(path: Path, contents: bytes) -> int:
        write(path, contents[: len(contents) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(KeyboardInterrupt):
        own.keep_state(recorded("7.2/bare"))

    assert own.state.exists() is (before is not None)
    assert before is None or own.state.read_bytes() == before


def test_state_and_devices_do_not_get_into_each_others_way(own: QemuFiles) -> None:
    own.keep_state(b"state")
    own.keep_devices(parse_stream(composed([Device("apic")])), 7)

    assert own.state.read_bytes() == b"state"
    assert json.loads(own.devices.read_text()) == {"labels": ["apic"], "bytes": 7}
    assert {path.name for path in own.directory.iterdir()} == {"state", "devices"}


def test_consoles_that_are_witnesses_lie_elsewhere_and_outlive_the_guest(tmp_path: Path) -> None:
    elsewhere = tmp_path / "witness"
    elsewhere.mkdir()
    guests = [QemuFiles(tmp_path / name, elsewhere) for name in ("0a", "0b")]
    outputs = [guest.output(port) for guest in guests for port in ("com1", "com2")]
    for guest, output in zip([guests[0], guests[0], guests[1], guests[1]], outputs, strict=True):
        guest.directory.mkdir(exist_ok=True)
        output.write_bytes(b"letters")

    for guest in guests:
        guest.remove()

    assert len(set(outputs)) == 4
    assert sorted(elsewhere.iterdir()) == sorted(outputs)


def test_every_file_has_a_name_of_its_own_within_the_directory(own: QemuFiles) -> None:
    names = ("monitor", "log", "pid", "outgoing", "incoming", "exports", "state", "devices")
    paths = [getattr(own, name) for name in names]
    paths += [own.output("com1"), own.keys("com1"), own.output("com2"), own.blob(0), own.blob(1)]

    assert len(set(paths)) == len(paths)
    assert {path.parent for path in paths} == {own.directory}


def test_sockets_have_the_shortest_names(own: QemuFiles) -> None:
    """A path of a socket has 107 bytes; the adapter checks only the longest that it knows of."""
    sockets = [own.monitor, own.outgoing, own.incoming, own.exports]

    assert max(len(os.fsencode(path.name)) for path in sockets) == len(own.monitor.name)


def test_a_directory_that_is_removed_is_gone_and_may_be_removed_again(tmp_path: Path) -> None:
    own = QemuFiles(tmp_path / "guest")
    own.directory.mkdir()
    os.mkfifo(own.keys("com1"))
    own.keep_state(recorded("7.2/bare"))

    own.remove()
    own.remove()

    assert not own.directory.exists()
