"""The demo's summary for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vmmigrate.cli.progress import describe_round

_MIB = 1 << 20


def summary(record: Mapping[str, Any], *, with_rounds: bool) -> str:
    """A few lines about a migration record with its `guest`."""
    return "\n".join(f"{name:<11} {text}" for name, text in _lines(record, with_rounds))


def _lines(record: Mapping[str, Any], with_rounds: bool) -> Iterator[tuple[str, str]]:
    yield "outcome", f"{record['outcome']} in {record['total_s']:.2f} s (migration {record['migration_id']})"
    parts = [f"{name} {seconds * 1000:.1f}" for name, seconds in record["downtime_parts_s"].items()]
    yield "pause", f"{record['downtime_s'] * 1000:.1f} ms = {' + '.join(parts) or '0'}"
    checking_s = record["downtime_parts_s"].get("verify_source", 0.0)
    if checking_s:
        yield "", f"{checking_s * 1000:.1f} ms of it the source hashes all of RAM: the demo verifies in full"
    ram = record["ram"]
    yield (
        "bytes",
        f"{ram['total_bytes'] / _MIB:.0f} MiB of RAM: {ram['sent_bytes'] / _MIB:.1f} MiB sent,"
        f" {ram['zero_bytes'] / _MIB:.1f} MiB zero, {ram['hole_bytes'] / _MIB:.1f} MiB never touched",
    )
    for number, finished in enumerate(ram["rounds"] if with_rounds else (), start=1):
        yield ("rounds" if number == 1 else ""), describe_round(number, finished)
    yield from _negotiated(record)
    if record["guest"] is not None:
        yield from _guest(record["guest"])


def _negotiated(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    chosen = record["negotiated"]
    if chosen:
        yield (
            "negotiated",
            f"protocol {chosen['protocol']}, spec {chosen['spec_version']}, transport {chosen['transport']},"
            f" {chosen['streams']} streams, page source {chosen['page_source']}, verify {chosen['verify']}",
        )
        payloads = ", ".join(f"{kind} v{version}" for kind, version in sorted(chosen["payloads"].items()))
        yield "", f"device payloads {payloads or 'none'}"
    digest = record["digest"]
    if {"source", "destination"} <= set(digest):
        sign = "equal" if digest["source"] == digest["destination"] else "DIFFERENT"
        yield "digests", f"source      {digest['source']}"
        yield "", f"destination {digest['destination']}: {sign}"


def _guest(guest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    state = "consistent" if guest["consistent"] else f"NOT CONSISTENT: {guest['reason']}"
    yield "guest", f"{state}, {guest['pages_checked']} pages checked, {guest['heartbeats']} heartbeats"
    yield (
        "",
        f"its heart stood still for {guest['heartbeat_gap_ms']:.1f} ms (in steady state 99 % of beats are at most"
        f" {guest['heartbeat_steady_p99_ms']:.1f} ms apart)",
    )
    owners = "one at a time" if guest["single_owner"] else "; ".join(guest["witness_problems"]) or "NOT one at a time"
    yield "ran on", f"{', then '.join(guest['ran_on'])}: {owners}"
