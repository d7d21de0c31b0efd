"""`vmmigrate migration`: what one host knows of migrations."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from vmmigrate.cli.options import NO_TLS, ClientTls, OutputOption, UrlOption

app = App(name="migration", help="Migrations as one host knows them, also ended ones.")

MigrationId = Annotated[str, Parameter(name="M", help="The migration's id.")]


@app.command(name="list")
def list_all(*, url: UrlOption, output: OutputOption = "text", tls: ClientTls = NO_TLS) -> int:
    """All migrations this host took part in, oldest first.

    For example: vmmigrate migration list --url https://host-a:7441
    """
    from vmmigrate.cli.output import print_json, print_table

    records = _get("/v1/migrations", url, tls)
    if output == "json":
        print_json(records)
    else:
        print_table(records, ("migration_id", "instance_id", "role", "state", "outcome"))
    return 0


@app.command
def show(
    migration_id: MigrationId, /, *, url: UrlOption, output: OutputOption = "text", tls: ClientTls = NO_TLS
) -> int:
    """The record of a migration: phase, rounds, pause and its parts, error.

    For example: vmmigrate migration show 7f9c24e5-1b2c-4d3e-8f90-a1b2c3d4e5f6 --url https://host-a:7441 -o json
    """
    _show(_get(f"/v1/migrations/{_quoted(migration_id)}", url, tls), output)
    return 0


@app.command
def cancel(
    migration_id: MigrationId,
    /,
    *,
    url: UrlOption,
    reason: Annotated[str, Parameter(help="Goes into the records of both sides.")] = "cancelled by an operator",
    output: OutputOption = "text",
    tls: ClientTls = NO_TLS,
) -> int:
    """Ask one side to stop a migration; refused (3) once the guest was given away.

    For example: vmmigrate migration cancel 7f9c24e5-1b2c-4d3e-8f90-a1b2c3d4e5f6 --url https://host-a:7441
    """
    from vmmigrate.cli.connect import ask_host

    path = f"/v1/migrations/{_quoted(migration_id)}:cancel"
    _show(ask_host(url, tls, lambda client: client.post(path, {"reason": reason})), output)
    return 0


@app.command
def adjust(
    migration_id: MigrationId,
    /,
    *,
    url: UrlOption,
    downtime_ms: Annotated[int | None, Parameter(help="Pause only when the forecast is at most this.")] = None,
    timeout_s: Annotated[float | None, Parameter(help="Counted from the beginning of the migration.")] = None,
    on_timeout: Annotated[Literal["cancel", "force"] | None, Parameter(help="What then.")] = None,
    max_rounds: Annotated[int | None, Parameter(help="Rounds without a prospect; those that were count.")] = None,
    force: Annotated[bool | None, Parameter(help="Then pause anyway.")] = None,
    auto_converge: Annotated[bool | None, Parameter(help="Throttle the guest when it does not converge.")] = None,
    bandwidth_mib_s: Annotated[int | None, Parameter(help="MiB per second over all streams; 0: no limit.")] = None,
    output: OutputOption = "text",
    tls: ClientTls = NO_TLS,
) -> int:
    """Change the limits of a migration while it runs; at its source. What is not named stays as it is.

    For example:

    vmmigrate migration adjust 7f9c24e5-1b2c-4d3e-8f90-a1b2c3d4e5f6 --url https://host-a:7441 --downtime-ms 800

    vmmigrate migration adjust 7f9c24e5-1b2c-4d3e-8f90-a1b2c3d4e5f6 --url https://host-a:7441 --bandwidth-mib-s 0
    --auto-converge
    """
    from vmmigrate.cli.connect import ask_host
    from vmmigrate.errors import UsageError

    wanted = {
        "downtime_ms": downtime_ms,
        "timeout_s": timeout_s,
        "on_timeout": on_timeout,
        "max_rounds": max_rounds,
        "force": force,
        "auto_converge": auto_converge,
        "bandwidth_mib_s": bandwidth_mib_s,
    }
    changes = {name: value for name, value in wanted.items() if value is not None}
    if not changes:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in wanted)
        raise UsageError(f"nothing to adjust was named; there are {options}", code="bad_option")
    path = f"/v1/migrations/{_quoted(migration_id)}:adjust"
    _show(ask_host(url, tls, lambda client: client.post(path, changes)), output)
    return 0


@app.command
def side(
    migration_id: MigrationId, /, *, url: UrlOption, output: OutputOption = "text", tls: ClientTls = NO_TLS
) -> int:
    """What this host's journal says of a migration. Reading it decides nothing.

    For example: vmmigrate migration side 7f9c24e5-1b2c-4d3e-8f90-a1b2c3d4e5f6 --url https://host-b:7441
    """
    _show(_get(f"/v1/migrations/{_quoted(migration_id)}/side", url, tls), output)
    return 0


@app.command
def resolve(
    migration_id: MigrationId,
    /,
    *,
    url: UrlOption,
    winner: Annotated[
        Literal["source", "destination"], Parameter(help="The host that shall own the guest; --url is its daemon.")
    ],
    fencing_proof: Annotated[
        str, Parameter(help="How you know that no other host runs the guest, or will. Kept in the journal.")
    ] = "",
    from_url: Annotated[
        str, Parameter(name="--from", help="For the destination: the source's daemon, which says what it released.")
    ] = "",
    released: Annotated[
        str, Parameter(help="For the destination, if the source is gone: TERM.N of `released` in its journal.")
    ] = "",
    output: OutputOption = "text",
    tls: ClientTls = NO_TLS,
) -> int:
    """Decide a migration in doubt that nobody answers for any more. Read docs/runbook.md first.

    To the source: only while it is in doubt and holds the paused guest. Fence the destination before (power it off, cut
    its storage): the source runs the guest at once, and tells the destination until it has acknowledged.
    To the destination: it takes over as if the handoff had come, unless it has given its verdict already.

    For example:

    vmmigrate migration resolve 7f9c24e5-1b2c-4d3e-8f90-a1b2c3d4e5f6 --winner source --url https://host-a:7441
    --fencing-proof "host-b is powered off, ticket 4711"

    vmmigrate migration resolve 7f9c24e5-1b2c-4d3e-8f90-a1b2c3d4e5f6 --winner destination --url https://host-b:7441
    --from https://host-a:7441
    """
    from vmmigrate.cli.connect import ask_host
    from vmmigrate.errors import UsageError

    body: dict[str, Any] = {"winner": winner, "fencing_proof": fencing_proof}
    if winner == "source" and not fencing_proof.strip():
        raise UsageError("--fencing-proof: say how you know that no other host runs the guest", code="no_fencing_proof")
    if winner == "destination":
        if bool(from_url) == bool(released):
            raise UsageError("--winner destination needs either --from or --released", code="bad_option")
        body["released"] = _epoch(released) if released else _released_by(migration_id, from_url, tls)
    path = f"/v1/migrations/{_quoted(migration_id)}:resolve"
    _show(ask_host(url, tls, lambda client: client.post(path, body)), output)
    return 0


def _released_by(migration_id: str, url: str, tls: ClientTls) -> list[int]:
    """The epoch that the source gave away. Raises: RequestError `not_in_doubt`."""
    from vmmigrate.errors import RequestError

    side = _get(f"/v1/migrations/{_quoted(migration_id)}/side", url, tls)
    if side["outgoing"] != "released":
        text = f"the source is not in doubt about {migration_id}: {side['outgoing'] or 'it never left'}"
        raise RequestError(text, code="not_in_doubt")
    return [int(number) for number in side["released_epoch"]]


def _epoch(text: str) -> list[int]:
    from vmmigrate.errors import UsageError

    term, dot, n = text.partition(".")
    if not (dot and term.isdecimal() and n.isdecimal()):
        raise UsageError(f"--released {text!r}: needed is TERM.N, such as 1.1", code="bad_option")
    return [int(term), int(n)]


def _get(path: str, url: str, tls: ClientTls) -> Any:
    from vmmigrate.cli.connect import ask_host

    return ask_host(url, tls, lambda client: client.get(path))


def _show(document: dict[str, Any], output: str) -> None:
    from vmmigrate.cli.output import print_fields, print_json

    (print_json if output == "json" else print_fields)(document)


def _quoted(text: str) -> str:
    from urllib.parse import quote

    return quote(text, safe="")
