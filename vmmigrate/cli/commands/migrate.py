"""`vmmigrate migrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from vmmigrate.cli.options import NO_TLS, ClientTls, OutputOption, Repeated, Switch


def migrate(
    instance_id: Annotated[str, Parameter(name="INSTANCE", help="The instance's id.")],
    /,
    *,
    from_url: Annotated[str, Parameter(name="--from", help="The source's daemon: https://HOST:PORT.")],
    to_url: Annotated[str, Parameter(name="--to", help="The destination's daemon.")],
    replace: Annotated[
        Path | None, Parameter(help="The destination's own backends: a JSON object by component id (docs/cli.md).")
    ] = None,
    keep: Annotated[
        list[str] | None, Repeated, Parameter(help="A backend to take over as it is; * for all that are not replaced.")
    ] = None,
    allow_same_generation: Annotated[bool, Switch, Parameter(help="Of Crucible volumes; both may write.")] = False,
    allow_volume_change: Annotated[bool, Switch, Parameter(help="Do not compare Crucible volumes at all.")] = False,
    downtime_ms: Annotated[int, Parameter(help="Pause the guest only when that is forecast to be enough.")] = 300,
    timeout_s: Annotated[float, Parameter(help="For everything before the guest is given away.")] = 3600.0,
    streams: Annotated[int, Parameter(help="TCP streams for RAM; the destination may allow fewer.")] = 2,
    verify: Annotated[
        Literal["digest", "full"], Parameter(help="full: both sides also hash all of RAM during the pause.")
    ] = "digest",
    max_rounds: Annotated[int, Parameter(help="Give up after so many rounds that did not get short enough.")] = 30,
    force: Annotated[bool, Switch, Parameter(help="Then pause anyway, however long it takes.")] = False,
    watch: Annotated[bool, Parameter(help="Wait for the outcome; otherwise print the id and leave.")] = True,
    output: OutputOption = "text",
    tls: ClientTls = NO_TLS,
) -> int:
    """Move a running guest from one host to another while it runs.

    Asks the source for a ticket, sends the destination to fetch the guest, and watches the source until it knows.
    Ctrl-C cancels the migration and waits for it to be undone; a second one only stops watching.

    For example:

    vmmigrate migrate web-1 --from https://host-a:7441 --to https://host-b:7441 --replace host-b.json

    vmmigrate migrate web-1 --from https://host-a:7441 --to https://host-b:7441 --downtime-ms 50 --verify full -o json
    """
    from vmmigrate.cli import migrating
    from vmmigrate.cli.connect import tls_files
    from vmmigrate.cli.moving import Order
    from vmmigrate.cli.requests import read_text

    order = Order(
        instance_id=instance_id,
        replacements="{}" if replace is None else read_text(replace),
        keep=keep or (),
        allow_same_generation=allow_same_generation,
        allow_volume_change=allow_volume_change,
        options={
            "downtime_ms": downtime_ms,
            "timeout_s": timeout_s,
            "streams": streams,
            "verify": verify,
            "max_rounds": max_rounds,
            "force": force,
        },
    )
    return migrating.run(from_url, to_url, tls_files(tls), order, watch=watch, as_json=output == "json")
