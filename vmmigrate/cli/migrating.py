"""`vmmigrate migrate`, running: signals, progress, and what is printed at the end."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from typing import Any, Final

import trio

from vmmigrate.api.client import HostClient, open_client
from vmmigrate.cli.exits import Exit, exit_of_outcome
from vmmigrate.cli.logs import configure_logs
from vmmigrate.cli.moving import Move, OnProgress, Order, Record, start_move
from vmmigrate.cli.output import complain, print_json
from vmmigrate.cli.progress import terminal_progress
from vmmigrate.errors import HandoffInDoubt
from vmmigrate.net.threads import open_group
from vmmigrate.net.tls import TlsFiles

_CLOSING: Final[Mapping[str, str]] = {
    "refused": "refused; nothing was touched, the guest is at the source",
    "failed": "failed; the guest is at the source as before",
    "cancelled": "cancelled; the guest is at the source as before",
    "timed_out": "timed out; the guest is at the source as before",
    "unknown": "outcome unknown; the guest is paused at the source until the destination can be asked",
    "guest_lost": "the guest is lost",
}


def run(from_url: str, to_url: str, files: TlsFiles, order: Order, *, watch: bool, as_json: bool) -> Exit:
    """Raises: VmMigrateError: nothing is under way."""
    configure_logs("error")
    record = trio.run(_migrate, from_url, to_url, files, order, watch)
    if not watch:
        (print_json if as_json else _print_started)(record)
        return Exit.OK
    if as_json:
        print_json(record)
    else:
        _print_outcome(record)
    return exit_of_outcome(record["outcome"])


async def _migrate(from_url: str, to_url: str, files: TlsFiles, order: Order, watch: bool) -> Record:
    async with open_client(from_url, files) as source, open_client(to_url, files) as destination:
        if not watch:
            move = await start_move(source, destination, order)
            return {"migration_id": move.migration_id, "instance_id": order.instance_id}
        with terminal_progress(sys.stderr) as on_progress:
            return await watched(source, destination, order, on_progress)


async def watched(source: HostClient, destination: HostClient, order: Order, on_progress: OnProgress) -> Record:
    """Start the migration and wait; the first signal cancels it, the second one stops waiting.

    Raises: VmMigrateError: it could not be started. HandoffInDoubt: nobody could say, or a second signal came.
    """
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        move = await start_move(source, destination, order)
        record: Record = {}
        async with open_group() as nursery:
            nursery.start_soon(_cancel_on_signal, signals, move)
            record = await move.wait_outcome(on_progress)
            nursery.cancel_scope.cancel()
        if move.note and record["outcome"] != "cancelled":
            record["notes"].append(move.note)
        return record


async def _cancel_on_signal(signals: Any, move: Move) -> None:
    async for number in signals:
        await move.cancel(f"cancelled by {signal.Signals(number).name} at the command line")
        break
    async for number in signals:
        raise HandoffInDoubt(
            f"stopped watching migration {move.migration_id} on {signal.Signals(number).name}; it may still go on:"
            " `vmmigrate migration show` at the source tells",
            code="stopped_watching",
            details={"migration_id": move.migration_id},
        )


def _print_started(record: Mapping[str, Any]) -> None:
    print(f"migration {record['migration_id']} is under way")


def _print_outcome(record: Mapping[str, Any]) -> None:
    for note in record["notes"]:
        complain(note)
    if record["outcome"] == "moved":
        print(describe_move(record))
        return
    error = record["error"] or {"message": "no reason was given", "code": "unknown"}
    complain(f"{error['message']} [{error['code']}]; migration {record['migration_id']} {_CLOSING[record['outcome']]}")


def describe_move(record: Mapping[str, Any]) -> str:
    """Two lines about a migration that succeeded."""
    parts = ", ".join(f"{name} {seconds * 1000:.1f}" for name, seconds in record["downtime_parts_s"].items())
    sent = record["ram"]["sent_bytes"] / (1 << 20)
    return (
        f"moved {record['instance_id']} to {record['peers']['destination']} in {record['total_s']:.2f} s:"
        f" {sent:.1f} MiB in {len(record['ram']['rounds'])} rounds\n"
        f"paused {record['downtime_s'] * 1000:.1f} ms ({parts})"
    )
