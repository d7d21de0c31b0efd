"""`vmmigrate demo`."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter, validators

from vmmigrate.cli.options import OutputOption


def demo(
    *,
    hypervisor: Annotated[Literal["embedded", "qemu"], Parameter(help="What runs the guest.")] = "embedded",
    mib: Annotated[
        int,
        Parameter(
            env_var="VMM_DEMO_MIB", validator=validators.Number(gte=8, lte=65_536), help="RAM of the guest, in MiB."
        ),
    ] = 256,
    output: OutputOption = "text",
) -> int:
    """Migrate a running guest between two daemons on this machine.

    Mints a CA, starts a source and a destination daemon on loopback, boots a guest that rewrites its memory all the
    time, moves it while it runs, and proves that it arrived whole. Everything is removed at the end.

    With --hypervisor qemu the guest runs in real QEMU, which has to be installed, as has a C compiler.

    For example: vmmigrate demo --mib 512 -o json
    """
    from vmmigrate.demo.story import tell

    return tell(mib, hypervisor=hypervisor, as_json=output == "json")
