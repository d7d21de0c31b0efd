"""What a request for a migration says, in the engine's terms, and back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vmmigrate.api.models import MigrateOut
from vmmigrate.daemon.config import address as parse_address
from vmmigrate.engine.limits import MigrationOptions
from vmmigrate.engine.steering import Steering
from vmmigrate.errors import UsageError


def options_of(request: MigrateOut) -> MigrationOptions:
    return MigrationOptions(
        downtime_ms=request.downtime_ms,
        timeout_s=request.timeout_s,
        streams=request.streams,
        verify=request.verify,
        max_rounds=request.max_rounds,
        force=request.force,
        on_timeout=request.on_timeout,
        auto_converge=request.auto_converge,
        compression=request.compression,
        delta_cache_mib=request.delta_cache_mib,
        bandwidth_mib_s=request.bandwidth_mib_s,
        plan_only=request.plan,
    )


def options_shown(steering: Steering) -> dict[str, Any]:
    """The options in force, under the names that requests use."""
    shown = asdict(steering.options)
    shown["plan"] = shown.pop("plan_only")
    return shown


def source_address_of(text: str) -> tuple[str, int]:
    try:
        return parse_address(text)
    except ValueError as exc:
        raise UsageError(f"source_address: {exc}", code="bad_request") from None
