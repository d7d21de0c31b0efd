"""From TLS options to a client of one or more daemons. Imports the whole client: for commands that run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import trio

from vmmigrate.api.client import HostClient, open_client
from vmmigrate.cli.logs import configure_logs
from vmmigrate.cli.options import ClientTls
from vmmigrate.errors import UsageError
from vmmigrate.net.tls import TlsFiles

T = TypeVar("T")

_PREFERRED = "client"


def ask_host(url: str, tls: ClientTls, ask: Callable[[HostClient], Awaitable[T]]) -> T:
    """Run *ask* with a client of the daemon at *url*. Raises: what the daemon answers, UsageError."""

    async def run() -> T:
        async with open_client(url, tls_files(tls)) as client:
            return await ask(client)

    configure_logs("error")
    return trio.run(run)


def tls_files(tls: ClientTls) -> TlsFiles:
    """The three files. Raises: UsageError `tls_options`, `tls_dir`."""
    if tls.tls_dir is None:
        if tls.ca is None or tls.cert is None or tls.key is None:
            raise UsageError(
                "who are we? needed is --tls-dir DIR (or VMM_TLS_DIR), or all of --ca, --cert and --key",
                code="tls_options",
            )
        return TlsFiles(tls.ca, tls.cert, tls.key)
    ca = tls.ca or tls.tls_dir / "ca.pem"
    if (tls.cert is None) != (tls.key is None):
        raise UsageError("--cert and --key go together", code="tls_options")
    if tls.cert is not None and tls.key is not None:
        return TlsFiles(ca, tls.cert, tls.key)
    name = _only_name(tls.tls_dir)
    return TlsFiles(ca, tls.tls_dir / f"{name}.pem", tls.tls_dir / f"{name}-key.pem")


def _only_name(directory: Path) -> str:
    """Whose certificate is meant; the CA's own is nobody's."""
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such directory: needed is one with ca.pem and a certificate", code="tls_dir")
    names = sorted(path.name.removesuffix("-key.pem") for path in directory.glob("*-key.pem"))
    names = [name for name in names if name != "ca"]
    if _PREFERRED in names:
        return _PREFERRED
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise UsageError(
            f"{directory}: needed is one certificate, NAME.pem with NAME-key.pem (there are: {found});"
            " or choose with --cert and --key",
            code="tls_dir",
        )
    return names[0]
