"""Known answers for the sealed transport: what two builds must agree upon, byte for byte, in `fixtures/sealed`.

    python -m tools.sealed_vectors                 write what is missing; refuse to change what is there
    python -m tools.sealed_vectors --rewrite-head  also rewrite the newest version, before it is released

Made from the description in SECURITY.md with HKDF written out over `hmac` and AES-GCM as a library has it. Nothing of
the transport itself is used here: a mistake in it would otherwise be in both and agree.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

SEALED = Path(__file__).resolve().parent.parent / "fixtures" / "sealed"
HEAD = 1
CONTEXT: dict[str, Any] = {
    "protocol": 1,
    "migration_id": "3dd63c0a-1599-48bd-a84f-2e419b205049",
    "instance_id": "1cee5a1b-936d-4132-9d0a-2b6fbb0a8b6e",
    "source_host": "alpha",
    "destination_host": "beta",
    "session_number": 1,
}
DESTINATION_RANDOM = bytes(range(32))
SOURCE_RANDOM = bytes(range(32, 64))
LABEL = "bulk seal"
DIRECTION = "to destination"
TAG_BYTES = 16

_GPA = 3 * 4096
_PAGE = bytes((7 * at + at // 256) % 251 for at in range(4096))
_ZERO, _PAGES, _BARRIER, _END = 2, 1, 3, 4


def hkdf(salt: bytes, secret: bytes, info: bytes) -> bytes:
    """32 bytes by HKDF-SHA-256: extract, and the one block of expand (RFC 5869)."""
    extracted = hmac.new(salt, secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


def key(stream: int, number: int) -> bytes:
    c = CONTEXT
    fields = [LABEL, c["protocol"], c["migration_id"], c["instance_id"], c["source_host"], c["destination_host"]]
    fields += [c["session_number"], stream, DIRECTION, number]
    info = b"".join(struct.pack("!I", len(str(field).encode())) + str(field).encode() for field in fields)
    salt = DESTINATION_RANDOM + SOURCE_RANDOM
    return hkdf(salt, salt, info)


def sealed(parts: Sequence[bytes], stream: int, ratchet_bytes: int) -> Iterator[dict[str, Any]]:
    """Each part with its key, its nonce, and what crosses the wire."""
    key_number, part_number, used = 0, 0, 0
    for part in parts:
        if used + len(part) + TAG_BYTES > ratchet_bytes:
            key_number, part_number, used = key_number + 1, 0, 0
        used += len(part) + TAG_BYTES
        nonce = struct.pack("!IQ", 0, part_number)
        wire = AESGCM(key(stream, key_number)).encrypt(nonce, part, None)
        yield {"plain": part.hex(), "key_number": key_number, "nonce": nonce.hex(), "sealed": wire.hex()}
        part_number += 1


def _header(kind: int, runs: int, payload_bytes: int, number: int) -> bytes:
    return struct.pack("!BBHIIQ", kind, 0, runs, 1, payload_bytes, number)


RECORDS = (
    _header(_ZERO, 1, 0, 0),
    struct.pack("!QI", 0, 2),
    _header(_PAGES, 1, 4096, 1),
    struct.pack("!QI", _GPA, 1),
    _PAGE,
    _header(_BARRIER, 0, 0, 2),
    _header(_END, 0, 0, 3),
)


def vectors() -> dict[str, Any]:
    common = {
        "context": CONTEXT,
        "destination_random": DESTINATION_RANDOM.hex(),
        "source_random": SOURCE_RANDOM.hex(),
        "label": LABEL,
        "direction": DIRECTION,
    }
    keys = [
        {"stream": stream, "number": number, "key": key(stream, number).hex()}
        for stream in (0, 1, 15)
        for number in (0, 1, 2)
    ]
    small = [bytes([number]) * size for number, size in enumerate((0, 1, 16, 31, 32, 33, 0, 100, 5))]
    return {
        **common,
        "keys": keys,
        "streams": [
            {"stream": 0, "ratchet_bytes": 64 << 30, "parts": list(sealed(RECORDS, 0, 64 << 30))},
            {"stream": 1, "ratchet_bytes": 116, "parts": list(sealed(small, 1, 116))},
        ],
    }


def path_of(version: int) -> Path:
    return SEALED / f"v{version}" / "vectors.json"


def main(arguments: Sequence[str]) -> int:
    if set(arguments) - {"--rewrite-head"}:
        print(__doc__, file=sys.stderr)
        return 2
    path, wanted = path_of(HEAD), json.dumps(vectors(), indent=1) + "\n"
    if path.exists() and path.read_text() != wanted and "--rewrite-head" not in arguments:
        print(f"{path}: differs from what this build writes; a released vector never changes", file=sys.stderr)
        return 1
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
