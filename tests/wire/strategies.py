"""Messages of every kind, with values over the whole of what their fields allow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from vmmigrate.wire import messages as m
from vmmigrate.wire.codec import U64_MAX
from vmmigrate.wire.phases import Kind

U32_MAX = (1 << 32) - 1

U64 = st.integers(0, U64_MAX)
COUNT = st.integers(0, U32_MAX)
VERSION = st.integers(1, U32_MAX)
DIGEST = st.binary(max_size=64)
RANDOM = st.binary(max_size=32)
EPOCH = st.tuples(U64, U64)
RUN_STATE = st.sampled_from(["running", "paused"])
SECONDS = st.floats(0, 1e9)


def text(max_chars: int = 64) -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=min(max_chars, 20))


def tuples(item: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(item, max_size=4).map(tuple)


def maps(value: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(text(), value, max_size=3)


WORDS = tuples(text())
_LEAVES = (
    st.none() | st.booleans() | st.integers(-(1 << 63), U64_MAX) | st.floats(allow_nan=False, allow_infinity=False)
)
JSON = st.recursive(_LEAVES | text(), lambda inner: st.lists(inner, max_size=2) | maps(inner), max_leaves=4)
DETAILS = maps(JSON)
ERROR = {"code": text(), "text": text(), "details": DETAILS}
VERDICT = {"journal_id": text(), "code": text(), "text": text()}
DEVICE = st.builds(m.DeviceEntry, text(), text(), VERSION, st.booleans())
PAYLOAD = st.builds(m.PayloadItem, text(), text(), VERSION, st.booleans(), st.binary(max_size=32))

FIELDS: Mapping[type[m.Message], Mapping[str, st.SearchStrategy[Any]]] = {
    m.Offer: {
        "protocols": tuples(COUNT),
        "migration_id": text(),
        "instance_id": text(),
        "ticket": text(),
        "spec_versions": WORDS,
        "payloads": maps(tuples(COUNT)),
        "ram": maps(WORDS),
        "max_streams": st.integers(1, 1024),
        "facts": maps(text()),
        "api_url": text(),
        "random": RANDOM,
    },
    m.Select: {
        "protocol": VERSION,
        "spec_version": text(),
        "payloads": maps(VERSION),
        "transport": text(),
        "encodings": WORDS,
        "digest": text(),
        "streams": st.integers(1, 1024),
        "bulk_port": st.integers(1, 65_535),
        "session_number": COUNT,
        "verify": st.sampled_from(["digest", "full"]),
        "offer_digest": DIGEST,
        "random": RANDOM,
    },
    m.Refuse: ERROR,
    m.Preamble: {
        "spec_version": text(),
        "spec": st.binary(max_size=64),
        "blobs": maps(st.binary(max_size=16)),
        "properties": maps(text()),
        "run_state": RUN_STATE,
        "epoch": EPOCH,
        "regions": tuples(st.tuples(U64, st.integers(1, U64_MAX))),
        "populated": tuples(st.tuples(U64, st.integers(1, U64_MAX))),
        "devices": tuples(DEVICE),
        "facts": maps(text()),
    },
    m.PreambleOk: {"select_digest": DIGEST, "blob_digests": maps(DIGEST), "amended": WORDS},
    m.RoundEnd: {"round_number": COUNT, "records": tuples(U64), "pages": U64, "dirty_pages": U64},
    m.RoundApplied: {"round_number": COUNT, "bytes_received": U64},
    m.Paused: {"round_number": COUNT},
    m.TimeDataMessage: {"values": maps(st.integers(-(1 << 63), U64_MAX))},
    m.DeviceState: {"payloads": tuples(PAYLOAD)},
    m.ConsoleHistoryMessage: {
        "port": text(),
        "beginning": st.binary(max_size=16),
        "rolling": st.binary(max_size=16),
        "total_bytes": U64,
    },
    m.StateEnd: {"page_digest": DIGEST, "payloads": st.integers(0, 4096)},
    m.Ready: {"journal_id": text(), "page_digest": DIGEST, "ram_digest": DIGEST},
    m.Handoff: {"run_state": RUN_STATE, "epoch": EPOCH},
    m.Running: {"journal_id": text(), "epoch": EPOCH, "import_s": SECONDS, "resume_s": SECONDS},
    m.Refused: VERDICT,
    m.Returned: VERDICT,
    m.Progress: {"counters": maps(U64)},
    m.Heartbeat: {},
    m.Cancel: {"reason": text()},
    m.Resume: {"migration_id": text(), "session_number": COUNT, "random": RANDOM, "proof": DIGEST},
    m.Resumed: {"session_number": COUNT, "bulk_port": st.integers(1, 65_535), "random": RANDOM, "proof": DIGEST},
    m.Applied: {"round_number": COUNT, "pages": st.binary(max_size=64)},
    m.Failed: ERROR,
}

MESSAGES: Mapping[Kind, st.SearchStrategy[m.Message]] = {
    cls.kind: st.builds(cls, **fields) for cls, fields in FIELDS.items()
}
