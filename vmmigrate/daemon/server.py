"""The daemon as a process: open everything, recover, serve until told to stop."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import structlog
import trio
from fastapi import FastAPI

from vmmigrate.daemon.app import make_app
from vmmigrate.daemon.config import Config
from vmmigrate.daemon.documents import DocumentStore
from vmmigrate.daemon.host import Host
from vmmigrate.daemon.migrations import Migrations
from vmmigrate.daemon.recovery import recover
from vmmigrate.daemon.resolving import Resolving
from vmmigrate.daemon.upkeep import keep_journal_short
from vmmigrate.engine.journal import AsyncJournal, Journal
from vmmigrate.errors import JournalError, UsageError, VmMigrateError
from vmmigrate.hypervisor.base import Hypervisor
from vmmigrate.hypervisor.embedded.adapter import EmbeddedHypervisor
from vmmigrate.hypervisor.kernel import give_large_blocks_back
from vmmigrate.hypervisor.qemu.adapter import QemuHypervisor
from vmmigrate.hypervisor.qemu.settings import QemuSettings
from vmmigrate.net.door import BulkDoor, DoorLimits
from vmmigrate.net.https import HttpsLimits, serve_https
from vmmigrate.net.identity import Call, Role
from vmmigrate.net.threads import open_group
from vmmigrate.net.tls import ServeLimits, ServerCredentials, bound_port, load_identity, open_listeners, serve_tls
from vmmigrate.wire.negotiate import Abilities

log = structlog.get_logger(__name__)

OnReady = Callable[[Mapping[str, Any]], None]


# A revocation list is looked at so often, whether it must be renewed; and then warned of so often.
LIST_CHECK_S: Final = 3600.0


async def run_until_signal(config: Config, on_ready: OnReady) -> None:
    """As `run_daemon`, until SIGTERM or SIGINT; SIGHUP reads certificates and revocation list again."""
    _raise_descriptor_limit()
    give_large_blocks_back()
    gc.collect()
    gc.freeze()  # the modules; what is swept after each migration (`upkeep.sweep`) is not all that again
    with trio.open_signal_receiver(signal.SIGHUP) as hangups:
        async with open_group() as nursery:
            nursery.start_soon(_stop_on_signal, nursery)
            await run_daemon(config, on_ready, reloads=hangups)


def _raise_descriptor_limit() -> None:
    """A migration takes some dozens of descriptors, and what a shell lets a process have is often 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # it is logged what it is in the end
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def run_daemon(
    config: Config,
    on_ready: OnReady,
    hypervisor: Hypervisor | None = None,
    fsync: Callable[[int], None] = os.fsync,
    reloads: AsyncIterator[object] | None = None,
    abilities: Abilities | None = None,
) -> None:
    """Serve until cancelled. Guests outlive the daemon.

    Args:
        on_ready: Told the bound ports and URLs once everything is served.
        abilities: Instead of what this release and the configuration say: for peers of other releases, in tests.
        fsync: For the journal and all documents; a disk that fails is a fault to be tested.
        reloads: Each item is an order to read certificates and revocation list again.

    Raises:
        UsageError, IdentityError, JournalError, HypervisorError: it cannot start; nothing is left open.
        JournalError: while it served: the journal is poisoned.
    """
    files = config.tls_files()
    identity = load_identity(files)
    if identity.role is not Role.HOST:
        raise UsageError(
            f"{files.certificate}: {identity} is no host; a daemon needs a host's certificate", code="wrong_role"
        )
    credentials = ServerCredentials(files, identity)
    journal, documents = await trio.to_thread.run_sync(_open_state, config.directories.state, fsync)
    host: Host | None = None
    try:
        hypervisor = hypervisor or await open_hypervisor(config)
        async with open_group() as nursery:
            host = Host(config, identity, journal, documents, hypervisor, nursery)
            nursery.start_soon(_stop_on_failure, host)
            nursery.start_soon(_warn_of_list, credentials)
            if reloads is not None:
                nursery.start_soon(_reload_each_time, credentials, reloads)
            await _serve(host, credentials, nursery, on_ready, abilities)
            await trio.sleep_forever()
    finally:
        # Only now: migrations that were under way have been undone, and needed their guests for it.
        if host is not None:
            host.detach()
        journal.close()


async def open_hypervisor(config: Config) -> Hypervisor:
    """The adapter that the configuration names. Raises: HypervisorError."""
    directories = config.directories
    options = {"witness_dir": directories.witness, **guest_deadlines(config)}
    if config.hypervisor == "embedded":
        return await EmbeddedHypervisor.open(directories.runtime, **options)
    return await QemuHypervisor.open(directories.runtime, qemu_settings(config), **options)


def qemu_settings(config: Config) -> QemuSettings:
    """What the adapter takes of the configuration."""
    chosen = config.qemu
    return QemuSettings(
        binary=chosen.binary,
        accelerator=chosen.accelerator,
        machine_type=chosen.machine_type or "",
        cpu_model=chosen.cpu_model,
        network=chosen.network,
        regions=chosen.regions,
        kernels=[path.resolve() for path in config.allow.paths],
        monitors=[path.resolve() for path in config.allow.monitors],
        use_tracker=chosen.tracker,
        trust_tcg_stream=chosen.trust_tcg_stream,
    )


def guest_deadlines(config: Config) -> dict[str, Any]:
    """How long guests may keep their daemon waiting, as adapters take it."""
    deadlines = config.limits.deadlines
    return {"request_deadline_s": deadlines.guest_request_s, "start_deadline_s": deadlines.guest_start_s}


def _open_state(state: Path, fsync: Callable[[int], None]) -> tuple[AsyncJournal, DocumentStore]:
    try:
        documents = DocumentStore(state, fsync)
    except OSError as exc:
        raise UsageError(f"{state}: {exc.strerror}", code="bad_state_directory") from None
    journal = Journal(state / "journal.vmmj", fsync)
    try:
        documents.remove_unfinished()
    except OSError as exc:
        journal.close()
        raise UsageError(f"{state}: {exc.strerror}", code="bad_state_directory") from None
    return AsyncJournal(journal), documents


async def _serve(
    host: Host, credentials: ServerCredentials, nursery: trio.Nursery, on_ready: OnReady, abilities: Abilities | None
) -> None:
    """Listen on all three ports; recover before anybody is served."""
    listen = host.config.listen
    migration_port = await open_listeners(*listen.migration)
    bulk_port = await open_listeners(*listen.bulk)
    deadlines = host.config.limits.deadlines
    door = BulkDoor(
        credentials.current,
        DoorLimits(
            hello_deadline_s=deadlines.hello_s,
            open_deadline_s=deadlines.bulk_open_s,
            stall_limit_s=deadlines.stall_s,
        ),
    )
    ports = {"migration": bound_port(migration_port), "bulk": bound_port(bulk_port)}
    migrations = Migrations(host, door, credentials, ports, "", abilities)
    await recover(host, migrations)
    resolving = Resolving(host, migrations)
    api_port = await nursery.start(_serve_api, make_app(host, migrations, resolving), host.config, credentials)
    advertised = listen.advertise or listen.api[0]
    migrations.api_url = f"https://{f'[{advertised}]' if ':' in advertised else advertised}:{api_port}"
    nursery.start_soon(resolving.deliver_forever)
    nursery.start_soon(door.serve, bulk_port)
    nursery.start_soon(_serve_protocol, migration_port, credentials, migrations, nursery)
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    log.info("daemon.ready", host=host.identity.name, api=migrations.api_url, descriptors=descriptors, **ports)
    nursery.start_soon(keep_journal_short, host)
    on_ready({"host": host.identity.name, "api_url": migrations.api_url, "api_port": api_port, **ports})


async def _serve_api(
    app: FastAPI, config: Config, credentials: ServerCredentials, task_status: trio.TaskStatus[int]
) -> None:
    deadlines = config.limits.deadlines
    limits = HttpsLimits(
        body_deadline_s=deadlines.api_body_s,
        handshake_deadline_s=deadlines.handshake_s,
        keep_alive_s=deadlines.api_idle_s,
        send_deadline_s=deadlines.api_send_s,
    )
    await serve_https(app, *config.listen.api, credentials, limits=limits, task_status=task_status)


async def _serve_protocol(
    listeners: list[trio.SocketListener],
    credentials: ServerCredentials,
    migrations: Migrations,
    nursery: trio.Nursery,
) -> None:
    await serve_tls(
        listeners,
        credentials.current,
        migrations.serve_source,
        limits=ServeLimits(handshake_deadline_s=migrations.deadlines.handshake_s),
        call=Call.MIGRATION_PROTOCOL,
        connection_nursery=nursery,
    )


async def _stop_on_signal(nursery: trio.Nursery) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("daemon.stopping", signal=signal.Signals(number).name)
            nursery.cancel_scope.cancel()
            return


async def _reload_each_time(credentials: ServerCredentials, orders: AsyncIterator[object]) -> None:
    """Bad files change nothing: what was in force stays in force, and the log says what is wrong."""
    async for _ in orders:
        try:
            ended = credentials.reload()
        except VmMigrateError as error:
            log.error("tls.not_reloaded", code=error.code, text=error.text)
            continue
        log.info("tls.reloaded", identity=credentials.current().own.uri, connections_ended=len(ended))
        for refusal in ended:
            log.warning("tls.connection_ended", code=refusal.code, text=refusal.text)
        _warn_if_list_ends_soon(credentials)


async def _warn_of_list(credentials: ServerCredentials) -> None:
    while True:
        _warn_if_list_ends_soon(credentials)
        await trio.sleep(LIST_CHECK_S)


def _warn_if_list_ends_soon(credentials: ServerCredentials) -> None:
    """An expired revocation list lets nobody in: somebody has to know before."""
    revocations, now = credentials.current().revocations, datetime.now(UTC)
    if revocations is None or not revocations.ends_soon(now):
        return
    left_s = int(revocations.ends_in(now) / timedelta(seconds=1))
    report = log.warning if left_s > 0 else log.error
    report(
        "tls.revocation_list_ends",
        file=str(revocations.path),
        next_update=revocations.next_update.isoformat(),
        left_s=left_s,
        text="renew it and send SIGHUP; once it has expired nobody is let in",
    )


async def _stop_on_failure(host: Host) -> None:
    await host.fatal.wait()
    assert isinstance(host.failure, JournalError)
    raise host.failure
