"""A fuzzer without coverage: for interpreters that atheris has no wheel for, and for a quick look.

It mutates seeds, corpus, and what it made before: flips, cuts, repeats, splices, and lengths where lengths may stand.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from tools.fuzz.targets import Target, corpus_of

INTERESTING = (
    b"\x00",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xff\xff\xff\xff",
    b"\xdd\xff\xff\xff\xff",
    b'"',
    b"[" * 40,
    b"{}",
    b"\n",
)
_KEPT = 512


def fuzz(target: Target, seconds: float, seed: int) -> tuple[int, bytes | None]:
    """How many inputs were tried, and the one that found a defect; deterministic but for the time."""
    chance = random.Random(seed)
    pool = [*target.seeds, *(path.read_bytes() for path in corpus_of(target))]
    ends, tried = time.monotonic() + seconds, 0
    while time.monotonic() < ends:
        raw = mutated(chance, pool)[: target.max_bytes]
        tried += 1
        try:
            target.read(raw)
        except Exception:
            return tried, raw
        if len(pool) < _KEPT and chance.random() < 0.01:
            pool.append(raw)
    return tried, None


def mutated(chance: random.Random, pool: list[bytes]) -> bytes:
    raw = bytearray(chance.choice(pool))
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        chance.choice(_MUTATIONS)(chance, raw, pool)
    return bytes(raw)


def _flip(chance: random.Random, raw: bytearray, _: list[bytes]) -> None:
    if raw:
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)


def _set(chance: random.Random, raw: bytearray, _: list[bytes]) -> None:
    if raw:
        raw[chance.randrange(len(raw))] = chance.randrange(256)


def _cut(chance: random.Random, raw: bytearray, _: list[bytes]) -> None:
    if raw:
        start = chance.randrange(len(raw))
        del raw[start : start + chance.choice((1, 2, 4, len(raw)))]


def _insert(chance: random.Random, raw: bytearray, _: list[bytes]) -> None:
    position = chance.randrange(len(raw) + 1)
    raw[position:position] = chance.choice(INTERESTING)


def _repeat(chance: random.Random, raw: bytearray, _: list[bytes]) -> None:
    if raw:
        start = chance.randrange(len(raw))
        raw[start:start] = raw[start : start + chance.choice((1, 4, 16))] * chance.choice((1, 2, 50))


def _splice(chance: random.Random, raw: bytearray, pool: list[bytes]) -> None:
    other = chance.choice(pool)
    raw[chance.randrange(len(raw) + 1) :] = other[chance.randrange(len(other) + 1) :]


_MUTATIONS: tuple[Callable[[random.Random, bytearray, list[bytes]], None], ...] = (
    _flip,
    _set,
    _cut,
    _insert,
    _repeat,
    _splice,
)
