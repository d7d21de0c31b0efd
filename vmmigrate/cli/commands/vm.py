"""`vmmigrate vm`: instances on one host."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from vmmigrate.cli.options import NO_TLS, ClientTls, OutputOption, Switch, UrlOption
from vmmigrate.errors import UsageError

app = App(name="vm", help="Instances on one host.")

InstanceId = Annotated[str, Parameter(name="INSTANCE", help="The instance's id.")]
Port = Annotated[str, Parameter(help="The serial port's component id in the spec.")]


@app.command
def create(
    spec: Annotated[Path, Parameter(name="SPEC", help="The instance spec, a JSON document.")],
    /,
    *,
    url: UrlOption,
    instance_id: Annotated[str | None, Parameter(name="--id", help="A random one otherwise.")] = None,
    spec_version: Annotated[str, Parameter(help="Which version SPEC is written in.")] = "v3",
    name: Annotated[str, Parameter(help="For people.")] = "",
    program: Annotated[
        str,
        Parameter(help="What the guest runs: idle, echo, stress; in QEMU idle (boots from disk); or a JSON object."),
    ] = "idle",
    ram_mib: Annotated[int | None, Parameter(help="RAM, instead of the spec's.")] = None,
    ram_bytes: Annotated[int | None, Parameter(help="The same, to the byte: a multiple of 4096.")] = None,
    start: Annotated[bool, Switch, Parameter(help="Run it at once; if that fails nothing is left.")] = False,
    output: OutputOption = "text",
    tls: ClientTls = NO_TLS,
) -> int:
    """Create an instance from a spec.

    For example:

    vmmigrate vm create spec.json --url https://host-a:7441 --id web-1 --start

    vmmigrate vm create spec.json --url https://host-a:7441 --ram-mib 256 --program stress --start
    """
    from vmmigrate.cli.connect import ask_host
    from vmmigrate.cli.requests import create_request, program_of

    if ram_mib is not None and ram_bytes is not None:
        raise UsageError("--ram-mib and --ram-bytes say the same thing twice")
    size = ram_bytes if ram_mib is None else ram_mib << 20
    text = create_request(
        spec, spec_version, instance_id=instance_id, name=name, program=program_of(program), ram_bytes=size, start=start
    )
    _show(ask_host(url, tls, lambda client: client.post("/v1/instances", text=text)), output)
    return 0


@app.command
def adopt(
    *,
    url: UrlOption,
    qmp: Annotated[Path, Parameter(name="--qmp", help="The socket of its QEMU's monitor (QMP), a path on that host.")],
    spec: Annotated[Path, Parameter(help="The instance spec, a JSON document: what the machine has to be.")],
    instance_id: Annotated[str, Parameter(name="--id", help="QEMU's UUID; a random word, if it has none.")] = "",
    spec_version: Annotated[str, Parameter(help="Which version the spec is written in.")] = "v3",
    name: Annotated[str, Parameter(help="For people.")] = "",
    program: Annotated[
        str, Parameter(help="What the guest was booted from: idle (its disks), or a JSON object.")
    ] = "idle",
    ram_bytes: Annotated[int | None, Parameter(help="RAM, instead of the spec's: a multiple of 4096.")] = None,
    pid: Annotated[int | None, Parameter(help="QEMU's process, if another one made that socket.")] = None,
    output: OutputOption = "text",
    tls: ClientTls = NO_TLS,
) -> int:
    """Take over a guest in a QEMU that something else started. It runs on; whatever differs from the spec is refused.

    For example:

    vmmigrate vm adopt --qmp /run/machines/web-1.qmp --spec spec.json --url https://host-a:7441
    """
    from vmmigrate.cli.connect import ask_host
    from vmmigrate.cli.requests import create_request, program_of

    more = {"monitor": str(qmp), **({} if pid is None else {"pid": pid})}
    text = create_request(
        spec, spec_version, instance_id=instance_id, name=name, program=program_of(program), ram_bytes=ram_bytes, **more
    )
    wait_s = 120.0  # another QEMU is started meanwhile, for comparison
    _show(ask_host(url, tls, lambda client: client.post("/v1/instances:adopt", text=text, deadline_s=wait_s)), output)
    return 0


@app.command(name="list")
def list_all(*, url: UrlOption, output: OutputOption = "text", tls: ClientTls = NO_TLS) -> int:
    """All instances that this host knows, also those that were given away.

    For example: vmmigrate vm list --url https://host-a:7441
    """
    from vmmigrate.cli.output import print_json, print_table

    instances = _get("/v1/instances", url, tls)
    if output == "json":
        print_json(instances)
    else:
        print_table(instances, ("id", "name", "state", "holding", "ram_bytes", "migration_id"))
    return 0


@app.command
def show(instance_id: InstanceId, /, *, url: UrlOption, output: OutputOption = "text", tls: ClientTls = NO_TLS) -> int:
    """One instance: state, owner's epoch, guest process.

    For example: vmmigrate vm show web-1 --url https://host-a:7441 -o json
    """
    _show(_get(_path(instance_id), url, tls), output)
    return 0


@app.command
def start(instance_id: InstanceId, /, *, url: UrlOption, output: OutputOption = "text", tls: ClientTls = NO_TLS) -> int:
    """Boot the guest, or let a paused one run on.

    For example: vmmigrate vm start web-1 --url https://host-a:7441
    """
    return _act(f"{_path(instance_id)}:start", url, tls, output)


@app.command
def stop(instance_id: InstanceId, /, *, url: UrlOption, output: OutputOption = "text", tls: ClientTls = NO_TLS) -> int:
    """End the guest. What was in its RAM is gone.

    For example: vmmigrate vm stop web-1 --url https://host-a:7441
    """
    return _act(f"{_path(instance_id)}:stop", url, tls, output)


@app.command
def reboot(
    instance_id: InstanceId, /, *, url: UrlOption, output: OutputOption = "text", tls: ClientTls = NO_TLS
) -> int:
    """Press the guest's reset button. What was in its RAM is gone; it keeps its process, and what it wrote on consoles.

    For example: vmmigrate vm reboot web-1 --url https://host-a:7441
    """
    return _act(f"{_path(instance_id)}:reboot", url, tls, output)


@app.command
def pause(instance_id: InstanceId, /, *, url: UrlOption, output: OutputOption = "text", tls: ClientTls = NO_TLS) -> int:
    """Hold the guest where it is; vm start lets it run on. A paused guest arrives paused.

    For example: vmmigrate vm pause web-1 --url https://host-a:7441
    """
    return _act(f"{_path(instance_id)}:pause", url, tls, output)


@app.command
def delete(
    instance_id: InstanceId, /, *, url: UrlOption, output: OutputOption = "text", tls: ClientTls = NO_TLS
) -> int:
    """End the guest and forget the instance. Its disks stay.

    For example: vmmigrate vm delete web-1 --url https://host-a:7441
    """
    from vmmigrate.cli.connect import ask_host

    _show(ask_host(url, tls, lambda client: client.delete(_path(instance_id))), output)
    return 0


@app.command
def spec(
    instance_id: InstanceId,
    /,
    *,
    url: UrlOption,
    spec_version: Annotated[str, Parameter(help="Which version to write it in; exact, or refused.")] = "v3",
    tls: ClientTls = NO_TLS,
) -> int:
    """The instance's spec, as a JSON document that vm create takes.

    For example: vmmigrate vm spec web-1 --url https://host-a:7441 > spec.json
    """
    from vmmigrate.cli.connect import ask_host
    from vmmigrate.cli.output import print_json

    path = f"{_path(instance_id)}/spec"
    print_json(ask_host(url, tls, lambda client: client.get(path, version=spec_version))["spec"])
    return 0


@app.command
def console(
    instance_id: InstanceId,
    /,
    *,
    url: UrlOption,
    port: Port = "com1",
    output: OutputOption = "text",
    tls: ClientTls = NO_TLS,
) -> int:
    """What the guest wrote on a serial port: the first MiB and the most recent one, also from before it moved.

    For example: vmmigrate vm console web-1 --url https://host-a:7441 --port com1
    """
    from vmmigrate.cli.connect import ask_host
    from vmmigrate.cli.output import print_json

    path = f"{_path(instance_id)}/console"
    history = ask_host(url, tls, lambda client: client.get(path, port=port))
    if output == "json":
        print_json(history)
    else:
        _print_history(history)
    return 0


@app.command(name="type")
def type_keys(
    instance_id: InstanceId,
    text: Annotated[str, Parameter(name="TEXT", help="What to type.")],
    /,
    *,
    url: UrlOption,
    port: Port = "com1",
    enter: Annotated[bool, Switch, Parameter(help="Press Enter afterwards.")] = False,
    tls: ClientTls = NO_TLS,
) -> int:
    """Type on a serial port.

    For example: vmmigrate vm type web-1 "uname -a" --enter --url https://host-a:7441
    """
    from vmmigrate.cli.connect import ask_host

    keys = {"port": port, "text": text + ("\r" if enter else "")}
    ask_host(url, tls, lambda client: client.post(f"{_path(instance_id)}/console", keys))
    return 0


@app.command
def check(instance_id: InstanceId, /, *, url: UrlOption, output: OutputOption = "text", tls: ClientTls = NO_TLS) -> int:
    """Let the embedded guest check its own memory and disk, and say when its heart stood still. Exit 4: it is damaged.

    For example: vmmigrate vm check web-1 --url https://host-b:7441
    """
    from vmmigrate.cli.connect import ask_host

    deadline_s = 3600.0  # a large guest takes as long as it takes, and its host gives up before
    verdict = ask_host(url, tls, lambda client: client.post(f"{_path(instance_id)}:check", deadline_s=deadline_s))
    _show(verdict, output)
    return 0 if verdict["consistent"] else 4


def _path(instance_id: str) -> str:
    from urllib.parse import quote

    return f"/v1/instances/{quote(instance_id, safe='')}"


def _get(path: str, url: str, tls: ClientTls) -> Any:
    from vmmigrate.cli.connect import ask_host

    return ask_host(url, tls, lambda client: client.get(path))


def _act(path: str, url: str, tls: ClientTls, output: str) -> int:
    from vmmigrate.cli.connect import ask_host

    _show(ask_host(url, tls, lambda client: client.post(path)), output)
    return 0


def _show(document: dict[str, Any], output: str) -> None:
    from vmmigrate.cli.output import print_fields, print_json

    (print_json if output == "json" else print_fields)(document)


def _print_history(history: dict[str, Any]) -> None:
    """The guest's own bytes, as they were."""
    import sys

    beginning, rolling = (history[part].encode("latin-1") for part in ("beginning", "rolling"))
    missing = int(history["total_bytes"]) - len(beginning) - len(rolling)
    between = f"\n[... {missing} bytes are not kept ...]\n".encode() if missing > 0 else b""
    sys.stdout.buffer.write(beginning + between + rolling)
    sys.stdout.buffer.flush()
