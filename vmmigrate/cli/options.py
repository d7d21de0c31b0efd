"""Options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

OutputOption = Annotated[
    Literal["text", "json"], Parameter(name=["-o", "--output"], help="json: one JSON document on stdout.")
]
UrlOption = Annotated[str, Parameter(env_var="VMM_URL", help="The host daemon: https://HOST:PORT.")]
Switch = Parameter(negative="")
# Flags that may be repeated, and have no --empty-... twin.
Repeated = Parameter(negative="")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ClientTls:
    """Who we are to the daemons. `cli.connect.tls_files` makes files of it."""

    tls_dir: Annotated[
        Path | None,
        Parameter(
            env_var="VMM_TLS_DIR",
            help="A directory with ca.pem and one certificate, NAME.pem and NAME-key.pem, as pki issue --out makes"
            " it; where there are several, client.pem is taken.",
        ),
    ] = None
    ca: Annotated[Path | None, Parameter(help="Instead of ca.pem in --tls-dir.")] = None
    cert: Annotated[Path | None, Parameter(help="Our certificate, instead of the one in --tls-dir.")] = None
    key: Annotated[Path | None, Parameter(help="Its private key.")] = None


NO_TLS = ClientTls()
