"""The witness: who ran a guest when, told by the guest processes themselves, for proofs that exactly one ran.

Every guest process maps a small file of its own, outside guest RAM. At each heartbeat it updates the record of the
present interval: epoch, first and last counter, first and last CLOCK_MONOTONIC, how often the counter jumped. The page
cache keeps that after SIGKILL. The counter travels with the guest, so over the files of all hosts its values must be
without a hole and without a repeat, and no two intervals may overlap. (On one machine, where all clocks are one.)

Layout, native little endian: a header page of text fields, then records of eight 64-bit words. Within a beat the clock
is written before the counter, and a new record is marked as used last: a kill between two stores leaves a record that
claims one beat too few, never one too many.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import msgpack
import numpy as np

from vmmigrate.errors import HypervisorError
from vmmigrate.hypervisor.intervals import Interval

_MAGIC = b"VMMWIT01"
_HEADER_BYTES = 4096
_RECORD_WORDS = 8
CAPACITY = 2047  # intervals; one per `run`
_FILE_BYTES = _HEADER_BYTES + (CAPACITY + 1) * _RECORD_WORDS * 8
_TERM, _N, _FIRST_NS, _LAST_NS, _FIRST_COUNTER, _LAST_COUNTER, _JUMPS, _USED = range(_RECORD_WORDS)


class Witness:
    """The writing side, in the guest process."""

    def __init__(self, path: Path, host_id: str, instance_id: str) -> None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, _FILE_BYTES)  # a full disk shows now, not as SIGBUS while the guest runs
                self._mapping = mmap.mmap(fd, _FILE_BYTES)
            finally:
                os.close(fd)
        except OSError as exc:
            raise HypervisorError(f"witness {path}: {exc.strerror}", code="witness_invalid") from exc
        names = msgpack.packb([host_id, instance_id])
        self._mapping[: 10 + len(names)] = _MAGIC + len(names).to_bytes(2, "little") + names
        self._records = memoryview(self._mapping)[_HEADER_BYTES:].cast("Q")
        self._base = -_RECORD_WORDS

    def begin(self, epoch: tuple[int, int]) -> None:
        """Start a new interval; it stays unused until its first beat. When full, the last record tells so."""
        if self._base < 0 or self._records[self._base + _USED]:
            self._base = min(self._base + _RECORD_WORDS, CAPACITY * _RECORD_WORDS)
        self._records[self._base + _TERM], self._records[self._base + _N] = epoch

    def beat(self, counter: int, now_ns: int) -> None:
        records, base = self._records, self._base
        if records[base + _USED]:
            if counter != records[base + _LAST_COUNTER] + 1:
                records[base + _JUMPS] += 1
            records[base + _LAST_NS] = now_ns
            records[base + _LAST_COUNTER] = counter
            return
        records[base + _FIRST_NS] = records[base + _LAST_NS] = now_ns
        records[base + _FIRST_COUNTER] = records[base + _LAST_COUNTER] = counter
        records[base + _USED] = 1


def read_witness(path: Path) -> tuple[Interval, ...]:
    """The intervals of one guest process, dead or alive, oldest first.

    Raises:
        HypervisorError: `witness_invalid`: not a witness file, or one that ran out of records.
    """
    try:
        raw = path.read_bytes()
    except OSError as exc:
        raise HypervisorError(f"witness {path}: {exc.strerror}", code="witness_invalid") from exc
    if len(raw) != _FILE_BYTES or raw[:8] != _MAGIC:
        raise HypervisorError(f"witness {path}: not a witness file", code="witness_invalid")
    host_id, instance_id = msgpack.unpackb(raw[10 : 10 + int.from_bytes(raw[8:10], "little")])
    records = np.frombuffer(raw, dtype=np.uint64, offset=_HEADER_BYTES).reshape(-1, _RECORD_WORDS)
    if records[CAPACITY, _USED]:
        raise HypervisorError(f"witness {path}: more than {CAPACITY} runs, the rest is lost", code="witness_invalid")
    return tuple(
        Interval(
            host_id=host_id,
            instance_id=instance_id,
            epoch=(record[_TERM], record[_N]),
            first_counter=record[_FIRST_COUNTER],
            first_ns=record[_FIRST_NS],
            last_counter=record[_LAST_COUNTER],
            last_ns=record[_LAST_NS],
            jumps=record[_JUMPS],
        )
        for record in records[records[:, _USED] == 1].tolist()
    )


def read_witnesses(directory: Path, instance_id: str) -> tuple[Interval, ...]:
    """All intervals of one instance over all witness files of a directory."""
    found = [interval for path in sorted(directory.glob("*.witness")) for interval in read_witness(path)]
    return tuple(interval for interval in found if interval.instance_id == instance_id)
