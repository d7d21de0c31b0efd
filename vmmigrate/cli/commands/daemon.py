"""`vmmigrate daemon`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from vmmigrate.cli.options import OutputOption


def daemon(
    *,
    config: Annotated[Path, Parameter(help="The configuration, a TOML file: docs/configuration.md.")],
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Parameter(help="What goes to stderr.")] = "info",
    output: OutputOption = "text",
) -> int:
    """Run the daemon of a host until SIGTERM or SIGINT; its guests outlive it.

    Prints one line on stdout once it serves: host, API URL and ports. The log goes to stderr: JSON lines, or columns
    on a terminal.

    For example: vmmigrate daemon --config /etc/vmmigrate/host-a.toml
    """
    import trio

    from vmmigrate.cli.logs import configure_logs
    from vmmigrate.daemon.config import read_config
    from vmmigrate.daemon.server import run_until_signal

    settings = read_config(config)
    configure_logs(log_level)
    trio.run(run_until_signal, settings, _say_ready_as_json if output == "json" else _say_ready)
    return 0


def _say_ready_as_json(facts: Mapping[str, Any]) -> None:
    from vmmigrate.cli.output import print_json

    print_json({"ready": True, **facts})


def _say_ready(facts: Mapping[str, Any]) -> None:
    print(
        f"ready: host {facts['host']}, API {facts['api_url']},"
        f" migration port {facts['migration']}, bulk port {facts['bulk']}",
        flush=True,
    )
