"""`vmmigrate plan`, running: a migration that is called off before it moves anything, and what it foretold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import trio

from vmmigrate.api.client import open_client
from vmmigrate.cli.exits import Exit, exit_of_outcome
from vmmigrate.cli.logs import configure_logs
from vmmigrate.cli.migrating import watched
from vmmigrate.cli.moving import Order, Record
from vmmigrate.cli.output import complain, print_json
from vmmigrate.net.tls import TlsFiles

_MIB: Final = 1 << 20
_TOLD_BY: Final = {
    "tracker": "that it writes are told by the kernel (tracker)",
    "stream": "that it writes are told by its QEMU's own migration (stream)",
}
_KEPT: Final = ("migration_id", "instance_id", "peers", "negotiated", "error", "plan")


def run(from_url: str, to_url: str, files: TlsFiles, order: Order, *, as_json: bool) -> Exit:
    """Raises: VmMigrateError: nothing could be planned."""
    configure_logs("error")
    record = trio.run(_plan, from_url, to_url, files, order)
    planned = record["plan"] is not None
    if as_json:
        document = {name: record[name] for name in _KEPT}
        print_json({**document, "error": None if planned else record["error"]})
    elif planned:
        print("\n".join(lines_of(record["plan"], record["negotiated"].get("page_source"))))
    else:
        error = record["error"] or {"message": "no reason was given", "code": "unknown"}
        complain(f"{error['message']} [{error['code']}]; nothing was planned, and nothing moved")
    return Exit.OK if planned else exit_of_outcome(record["outcome"])


async def _plan(from_url: str, to_url: str, files: TlsFiles, order: Order) -> Record:
    async with open_client(from_url, files) as source, open_client(to_url, files) as destination:
        return await watched(source, destination, order, lambda record: None)


def lines_of(plan: Mapping[str, Any], page_source: str | None) -> Iterator[str]:
    """A plan for people. *page_source*: who tells what the guest writes."""
    rounds, size = plan["rounds"], plan["ram_bytes"] / _MIB
    if plan["converges"]:
        yield f"converges: {size:.0f} MiB in {rounds} rounds and {plan['total_s']:.2f} s"
    else:
        spent = f"{rounds} rounds, {size:.0f} MiB and {plan['total_s']:.2f} s"
        yield f"will not converge: after {spent} no pause would be short enough"
    if not plan["in_time"]:
        yield "too slow:  it would take longer than --timeout-s allows"
    parts = ", ".join(f"{name} {seconds * 1000:.1f}" for name, seconds in plan["pause_parts_s"].items())
    allowed = f"allowed are {plan['limit_s'] * 1000:.0f}"
    yield f"pause      {plan['pause_s'] * 1000:.1f} ms ({parts}); {allowed}"
    yield (
        f"guest      writes {plan['dirty_rate_bytes_per_s'] / _MIB:.1f} MiB/s,"
        f" {plan['working_set_bytes'] / _MIB:.1f} MiB of its RAM again and again"
    )
    if page_source is not None:  # a host of an earlier release does not say
        yield f"pages      {_TOLD_BY.get(page_source, f'that it writes are told by {page_source}')}"
    yield f"link       {plan['rate_bytes_per_s'] / _MIB:.0f} MiB/s of RAM"
    confidence = plan["confidence"]
    yield (
        f"confidence {confidence['word']}: what was measured differs by {confidence['dirty_rate_spread'] * 100:.0f} %"
        f" (guest) and {confidence['link_spread'] * 100:.0f} % (link)"
    )
    for remedy in plan["would_help"]:
        named = " ".join(_option(name, value) for name, value in remedy["options"].items())
        yield f"would end  with {named}: {remedy['total_s']:.2f} s, pause {remedy['pause_s'] * 1000:.0f} ms"
    yield "nothing was moved"


def _option(name: str, value: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    return flag if value is True else f"{flag} {value}"
