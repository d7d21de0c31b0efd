"""`vmmigrate migrate`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from vmmigrate.cli.moveoptions import (
    NO_BACKENDS,
    USUAL_PAUSING,
    USUAL_SENDING,
    Backends,
    FromOption,
    Pausing,
    Sending,
    ToOption,
    order_of,
)
from vmmigrate.cli.options import NO_TLS, ClientTls, OutputOption


def migrate(
    instance_id: Annotated[str, Parameter(name="INSTANCE", help="The instance's id.")],
    /,
    *,
    from_url: FromOption,
    to_url: ToOption,
    backends: Backends = NO_BACKENDS,
    pausing: Pausing = USUAL_PAUSING,
    sending: Sending = USUAL_SENDING,
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

    vmmigrate migrate db-1 --from https://host-a:7441 --to https://host-b:7441 --auto-converge --bandwidth-mib-s 400
    """
    from vmmigrate.cli import migrating
    from vmmigrate.cli.connect import tls_files

    order = order_of(instance_id, backends, pausing, sending)
    return migrating.run(from_url, to_url, tls_files(tls), order, watch=watch, as_json=output == "json")
