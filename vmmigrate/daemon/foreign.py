"""Guests that something else started, made instances of this host."""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
import trio

from vmmigrate.api.models import AdoptInstance
from vmmigrate.daemon.host import Host, Instance
from vmmigrate.hypervisor.base import GuestStamp
from vmmigrate.ownership import rules
from vmmigrate.ownership.requests import Request
from vmmigrate.spec import chain

log = structlog.get_logger(__name__)


async def adopt(host: Host, request: AdoptInstance, spec: chain.AnySpec) -> dict[str, Any]:
    """Make an instance of a guest that runs already; it goes on as it is.

    Raises: SpecError: also `not_that_machine`, with all that differs; UsageError, RequestError, HypervisorError; then
        nothing was made, and the guest runs on.
    """
    monitor = Path(request.monitor)
    if not request.id:
        known = await host.hypervisor.identity_of(monitor)
        chosen = {**request.model_dump(), "id": known or f"adopted-{secrets.token_hex(6)}"}
        request = AdoptInstance.model_validate(chosen)
    await host.register(request, spec, {}, is_adopting=True)
    try:
        await _take_over(host, request.id, monitor, request.pid)
    except BaseException:
        with trio.CancelScope(shield=True):
            await host.delete(request.id)
        raise
    log.info("instance.adopted", instance=request.id, pid=host.guest(request.id).process.pid)
    return await host.describe(request.id)


async def _take_over(host: Host, instance_id: str, monitor: Path, pid: int | None) -> None:
    """Until the journal knows of it, a daemon that dies leaves a guest that was never adopted."""
    async with host.asked(instance_id, Request.START) as instance:
        plan = host.check(instance.document, 0)
        stamp = GuestStamp(instance_id, host.identity.name, host.journal.state.instances[instance_id].epoch, None)
        guest = await host.hypervisor.adopt_foreign(plan, stamp, monitor, pid)
        try:
            await host.note_process(instance_id, None, guest)
            await _is_adopted(host, instance)
        except BaseException:
            with trio.CancelScope(shield=True):
                try:
                    # First: what the journal calls a leftover is ended by the next daemon.
                    await host.hypervisor.give_back(guest)
                finally:
                    await host.journal.commit(rules.Stop(instance_id))
            raise
        host.watch(instance, guest)


async def _is_adopted(host: Host, instance: Instance) -> None:
    document = replace(instance.document, is_adopting=False)
    await trio.to_thread.run_sync(host.documents.save_instance, document)
    instance.document = document


async def finish_adoptions(host: Host) -> None:
    """After a restart: an adoption that the last daemon did not finish never was, and its guest was given back. An
    instance that is indeterminate is left to an operator, and to the next restart.

    Raises: JournalError, StorageError.
    """
    for instance_id, instance in list(host.instances.items()):
        known = host.journal.state.instances.get(instance_id)
        if not instance.document.is_adopting or known is None:
            continue
        if known.guest is not None:
            await _is_adopted(host, instance)
        elif instance_id not in host.indeterminate:
            log.warning("instance.not_adopted", instance=instance_id)
            with contextlib.suppress(rules.OwnershipRefusal):  # another host has it: it cannot be started here
                await host.delete(instance_id)
