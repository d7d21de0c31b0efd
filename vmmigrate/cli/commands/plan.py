"""`vmmigrate plan`."""

from __future__ import annotations

from dataclasses import replace
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


def plan(
    instance_id: Annotated[str, Parameter(name="INSTANCE", help="The instance's id.")],
    /,
    *,
    from_url: FromOption,
    to_url: ToOption,
    backends: Backends = NO_BACKENDS,
    pausing: Pausing = USUAL_PAUSING,
    sending: Sending = USUAL_SENDING,
    output: OutputOption = "text",
    tls: ClientTls = NO_TLS,
) -> int:
    """Foretell a migration: does it converge, how long does it take, how long is the pause? Nothing moves.

    Takes the options of `migrate`. Both hosts do for about two seconds what they would do, up to sending a part of
    RAM; then it is called off. The guest runs all the time. Whatever a migration would be refused for, this is refused
    for, too (exit code 3). Without --replace and --keep, backends are not looked at.

    For example:

    vmmigrate plan web-1 --from https://host-a:7441 --to https://host-b:7441

    vmmigrate plan db-1 --from https://host-a:7441 --to https://host-b:7441 --downtime-ms 50 -o json
    """
    from vmmigrate.cli import planning
    from vmmigrate.cli.connect import tls_files

    if not backends.named:
        backends = replace(backends, keep=["*"], allow_same_generation=True)
    order = order_of(instance_id, backends, pausing, sending, plan=True)
    return planning.run(from_url, to_url, tls_files(tls), order, as_json=output == "json")
