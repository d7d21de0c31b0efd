"""Options of `migrate`, which `plan` takes as well: what is foretold is the migration with exactly these."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from vmmigrate.cli.options import Repeated, Switch

if TYPE_CHECKING:
    from vmmigrate.cli.moving import Order

FromOption = Annotated[str, Parameter(name="--from", env_var="VMM_URL", help="The source's daemon: https://HOST:PORT.")]
ToOption = Annotated[str, Parameter(name="--to", help="The destination's daemon.")]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Backends:
    """What the guest shall use at the destination."""

    replace: Annotated[
        Path | None, Parameter(help="The destination's own backends: a JSON object by component id (docs/cli.md).")
    ] = None
    keep: Annotated[
        list[str] | None, Repeated, Parameter(help="A backend to take over as it is; * for all that are not replaced.")
    ] = None
    allow_same_generation: Annotated[bool, Switch, Parameter(help="Of Crucible volumes; both may write.")] = False
    allow_volume_change: Annotated[bool, Switch, Parameter(help="Do not compare Crucible volumes at all.")] = False

    @property
    def named(self) -> bool:
        return self.replace is not None or bool(self.keep)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Pausing:
    """When the guest may be paused, and what becomes of a migration that does not get there."""

    downtime_ms: Annotated[int, Parameter(help="Pause the guest only when that is forecast to be enough.")] = 300
    timeout_s: Annotated[float, Parameter(help="For everything before the guest is given away.")] = 3600.0
    on_timeout: Annotated[
        Literal["cancel", "force"], Parameter(help="When the time is over: give up, or pause anyway.")
    ] = "cancel"
    max_rounds: Annotated[int, Parameter(help="Give up after so many rounds that did not get short enough.")] = 30
    force: Annotated[bool, Switch, Parameter(help="Then pause anyway, however long it takes.")] = False
    auto_converge: Annotated[
        bool, Switch, Parameter(help="Throttle the guest step by step when it writes faster than RAM is sent.")
    ] = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Sending:
    """How RAM travels."""

    streams: Annotated[int, Parameter(help="TCP streams for RAM; the destination may allow fewer.")] = 2
    verify: Annotated[
        Literal["digest", "full"], Parameter(help="full: both sides also hash all of RAM during the pause.")
    ] = "digest"
    compression: Annotated[
        Literal["auto", "off"], Parameter(help="auto: compress where that pays, which is judged all the time.")
    ] = "auto"
    delta_cache_mib: Annotated[
        int, Parameter(help="Memory for pages that were sent, so that only changes are sent again; 0: off.")
    ] = 32
    bandwidth_mib_s: Annotated[int, Parameter(help="Send no faster than this, in MiB per second; 0: no limit.")] = 0


NO_BACKENDS = Backends()
USUAL_PAUSING = Pausing()
USUAL_SENDING = Sending()


def order_of(instance_id: str, backends: Backends, pausing: Pausing, sending: Sending, **more: Any) -> Order:
    """What was asked for. Raises: UsageError: the file of replacements cannot be read."""
    from vmmigrate.cli.moving import Order
    from vmmigrate.cli.requests import read_text

    return Order(
        instance_id=instance_id,
        replacements="{}" if backends.replace is None else read_text(backends.replace),
        keep=backends.keep or (),
        allow_same_generation=backends.allow_same_generation,
        allow_volume_change=backends.allow_volume_change,
        options={**asdict(pausing), **asdict(sending), **more},
    )
