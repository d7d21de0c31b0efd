"""`vmmigrate migration`: what one host knows of migrations."""

from __future__ import annotations

from typing import Annotated, Any

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
def side(
    migration_id: MigrationId, /, *, url: UrlOption, output: OutputOption = "text", tls: ClientTls = NO_TLS
) -> int:
    """What this host's journal says of a migration. Reading it decides nothing.

    For example: vmmigrate migration side 7f9c24e5-1b2c-4d3e-8f90-a1b2c3d4e5f6 --url https://host-b:7441
    """
    _show(_get(f"/v1/migrations/{_quoted(migration_id)}/side", url, tls), output)
    return 0


def _get(path: str, url: str, tls: ClientTls) -> Any:
    from vmmigrate.cli.connect import ask_host

    return ask_host(url, tls, lambda client: client.get(path))


def _show(document: dict[str, Any], output: str) -> None:
    from vmmigrate.cli.output import print_fields, print_json

    (print_json if output == "json" else print_fields)(document)


def _quoted(text: str) -> str:
    from urllib.parse import quote

    return quote(text, safe="")
