"""What a host daemon knows and does with its own instances. Migrations are `migrations.py`, the API is `app.py`."""

from __future__ import annotations

import base64
import binascii
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import trio

import vmmigrate
from vmmigrate.api.models import CreateInstance, NewInstance
from vmmigrate.daemon.admission import check_admissible, check_realisable
from vmmigrate.daemon.config import Config
from vmmigrate.daemon.documents import DocumentStore, InstanceDocument, arriving_document
from vmmigrate.daemon.watching import how_it_ends, untiringly
from vmmigrate.engine.incoming import Arrival
from vmmigrate.engine.journal import AsyncJournal
from vmmigrate.errors import (
    HypervisorError,
    JournalError,
    RequestError,
    SpecBuildError,
    StorageError,
    UsageError,
    VmMigrateError,
)
from vmmigrate.hypervisor.base import Guest, GuestPlan, GuestProcess, GuestStamp, Hypervisor
from vmmigrate.hypervisor.plan import guest_plan, layout_of
from vmmigrate.net.identity import Identity
from vmmigrate.ownership import records as r
from vmmigrate.ownership import rules
from vmmigrate.ownership.records import Epoch
from vmmigrate.ownership.requests import Request
from vmmigrate.ownership.state import OPEN_INCOMING, Holding, Incoming
from vmmigrate.spec import build, chain
from vmmigrate.spec.creatable import check_creatable

log = structlog.get_logger(__name__)


@dataclass
class Instance:
    """One instance on this host: what it is, and its guest while there is one."""

    document: InstanceDocument
    guest: Guest | None = None
    lock: trio.Lock = field(default_factory=trio.Lock)


class Host:
    """The instances of one host.

    Attributes:
        identity: Who this host is: from its certificate.
        instances: By id; also those that live elsewhere by now.
        arrivals: By migration id: guests under construction, which are not ours yet.
        indeterminate: By instance id, why nothing may be decided about it: an operator has to look.
        strays: By instance id: processes that the journal does not explain, and named ones that were not adopted.
        nursery: Owns the watch over every guest, and every migration.
        on_guest_end: Told of an outgoing migration that ended because its guest did, once that is durable, and why.
        fatal: Set when the journal is poisoned: the daemon must exit, its restart reads the journal anew.
    """

    def __init__(
        self,
        config: Config,
        identity: Identity,
        journal: AsyncJournal,
        documents: DocumentStore,
        hypervisor: Hypervisor,
        nursery: trio.Nursery,
    ) -> None:
        self.config = config
        self.identity = identity
        self.journal = journal
        self.documents = documents
        self.hypervisor = hypervisor
        self.nursery = nursery
        self.instances: dict[str, Instance] = {}
        self.arrivals: dict[str, Instance] = {}
        self.indeterminate: dict[str, str] = {}
        self.strays: dict[str, list[GuestProcess]] = {}
        self.on_guest_end: Callable[[str, VmMigrateError], None] = lambda migration_id, error: None
        self._creating = trio.Lock()
        self.failure: JournalError | None = None
        self.fatal = trio.Event()

    def detach(self) -> None:
        """Let go of every guest; they go on without us."""
        for instance in [*self.instances.values(), *self.arrivals.values()]:
            if instance.guest is not None:
                instance.guest.detach()

    # -- what is known ---------------------------------------------------------------------------------------------

    def instance(self, instance_id: str) -> Instance:
        """Raises: RequestError `unknown_instance`, `arriving`; `indeterminate`: only a process of it is known."""
        self._check_arrived(instance_id)
        known = self.journal.state.instances.get(instance_id)
        instance = self.instances.get(instance_id)
        if known is None or known.holding is Holding.REMOVED or instance is None:
            self.check_determinate(instance_id)
            listed = ", ".join(sorted(self.instances)) or "none"
            raise RequestError(f"no instance {instance_id} on this host (there are: {listed})", code="unknown_instance")
        return instance

    async def describe(self, instance_id: str) -> dict[str, Any]:
        """The instance as the API shows it."""
        if instance_id in self.indeterminate and instance_id not in self.instances:
            return self._describe_unknown(instance_id)
        instance = self.instance(instance_id)
        known = self.journal.state.instances[instance_id]
        shown: dict[str, Any] = {
            "id": instance_id,
            "name": instance.document.name,
            "description": instance.document.description,
            "host": self.identity.name,
            "holding": known.holding.value,
            "epoch": list(known.epoch),
            "migration_id": self.journal.state.open_outgoing(instance_id) or known.last_migration,
            "ram_bytes": self.plan(instance.document).layout.size_bytes,
            "guest": None,
        }
        shown["state"] = await self._state(instance, known.holding, shown)
        return shown

    def _describe_unknown(self, instance_id: str) -> dict[str, Any]:
        """An instance that the journal does not know, and of which there is a process."""
        return {
            "id": instance_id,
            "host": self.identity.name,
            "holding": None,
            "migration_id": None,
            "guest": None,
            "state": "indeterminate",
            "reason": self.indeterminate[instance_id],
        }

    async def _state(self, instance: Instance, holding: Holding, shown: dict[str, Any]) -> str:
        guest = instance.guest
        reason = self.indeterminate.get(instance.document.instance_id)
        if reason is not None:
            shown["reason"] = reason
            return "indeterminate"
        if holding is Holding.ELSEWHERE:
            return holding.value  # what is left of its guest here is being taken down, and answers nobody
        if guest is not None:
            try:
                status = await guest.status()
            except HypervisorError as exc:
                shown["guest"] = {"error": exc.as_dict()}
                return "lost" if exc.code == "guest_lost" else "unresponsive"
            shown["guest"] = {
                "run_state": status.run_state.value,
                "pid": guest.process.pid,
                "heartbeats": status.heartbeats,
                "backends_open": status.backends_open,
                "program": dict(status.program),
            }
        if holding is Holding.RELEASED:
            return "in_doubt"
        if holding is not Holding.HELD:
            return holding.value
        if guest is None:
            return "stopped"
        migrating = self.journal.state.open_outgoing(instance.document.instance_id) is not None
        return "migrating" if migrating else str(shown["guest"]["run_state"])

    async def list(self) -> list[dict[str, Any]]:
        """All instances; one that is deleted meanwhile is left out."""
        shown = []
        for instance_id in sorted(self.instances.keys() | self.indeterminate.keys()):
            with contextlib.suppress(RequestError):
                shown.append(await self.describe(instance_id))
        return shown

    def guest(self, instance_id: str) -> Guest:
        """Raises: RequestError `unknown_instance`, `indeterminate`, `not_running`."""
        self.check_determinate(instance_id)
        guest = self.instance(instance_id).guest
        if guest is None:
            raise RequestError(f"instance {instance_id} has no guest on this host; start it", code="not_running")
        return guest

    def lock_of(self, instance_id: str) -> contextlib.AbstractAsyncContextManager[object]:
        """Keeps starting, stopping and giving away apart; nothing to keep apart for an instance that is not here."""
        instance = self.instances.get(instance_id)
        return contextlib.nullcontext() if instance is None else instance.lock

    def check_determinate(self, instance_id: str) -> None:
        """Raises: RequestError `indeterminate`: whatever is asked, an operator has to look first."""
        reason = self.indeterminate.get(instance_id)
        if reason is not None:
            raise RequestError(f"instance {instance_id}: {reason}", code="indeterminate")

    def _check_deleted(self, instance_id: str) -> None:
        """Raises: RequestError `instance_exists`: it is being deleted, and its guest or its document is still there."""
        known = self.journal.state.instances.get(instance_id)
        if known is not None and known.holding is Holding.REMOVED and instance_id in self.instances:
            raise RequestError(f"instance {instance_id} is being deleted: ask again", code="instance_exists")

    def _check_arrived(self, instance_id: str) -> None:
        """Raises: RequestError `arriving`: it was started here this very moment, and is not among ours yet."""
        incoming = self.journal.state.incoming
        arriving = [incoming[m] for m, a in self.arrivals.items() if a.document.instance_id == instance_id]
        if any(migration.stage is Incoming.STARTED for migration in arriving):
            raise RequestError(f"instance {instance_id} is arriving: ask again when it is here", code="arriving")

    # -- what it takes to build a guest ----------------------------------------------------------------------------

    def plan(self, document: InstanceDocument, like: Mapping[str, str] | None = None) -> GuestPlan:
        """The plan of a guest; *like*: facts of that at its source. Raises: SpecBuildError, SpecCreatableError."""
        machine = build.build(document.spec, frozenset(self.config.allow.features))
        return guest_plan(
            document.instance_id,
            machine,
            document.layout(layout_of(machine)),
            cpus=document.overrides.get("cpus"),
            program=document.program,
            volumes=self.config.allow.volumes,
            like=like,
        )

    def check(self, document: InstanceDocument, needed_bytes: int, like: Mapping[str, str] | None = None) -> GuestPlan:
        """The plan of a guest that this host can and may build.

        Raises: SpecError: every problem at once.
        """
        check_creatable(build.build(document.spec, frozenset(self.config.allow.features)))
        plan = self.plan(document, like)
        check_realisable(self.hypervisor.problems(plan))
        check_admissible(document.spec, self.config.allow, needed_bytes)
        if plan.layout.size_bytes > self.config.limits.max_ram_bytes:
            raise SpecBuildError(
                f"{plan.layout.size_bytes} bytes of RAM, this host takes {self.config.limits.max_ram_bytes}",
                code="host_refuses",
            )
        return plan

    async def _spawn(self, document: InstanceDocument, plan: GuestPlan, epoch: Epoch, migration: str | None) -> Guest:
        """Build a guest and note its process in the journal; nothing is left when that fails.

        Raises: HypervisorError: also `guest_unresponsive`: a former process of it hangs, and may hold its disks.
        """
        for former in self.journal.state.leftovers:
            if former.instance == document.instance_id and await trio.Path(former.socket).exists():
                await self.hypervisor.end_leftover(process_of(former))
        stamp = GuestStamp(document.instance_id, self.identity.name, epoch, migration)
        guest = await self.hypervisor.build(plan, stamp, for_migration=migration is not None)
        try:
            await self.note_process(document.instance_id, migration, guest)
        except BaseException:
            with trio.CancelScope(shield=True):
                await guest.destroy()
            raise
        return guest

    async def note_process(self, instance_id: str, migration: str | None, guest: Guest) -> None:
        """In the journal, and then in the guest that the journal knows of it."""
        process = guest.process
        spawned = r.Spawned(instance_id, migration, process.pid, process.start_ticks, str(process.socket_path))
        await self.journal.commit(rules.Spawn(spawned))
        await guest.note_record(*self.journal.position)

    def watch(self, instance: Instance, guest: Guest) -> None:
        """Notice when the process of *guest* ends although nobody ended it."""
        instance.guest = guest
        self.nursery.start_soon(self._watch, instance, guest)

    async def _watch(self, instance: Instance, guest: Guest) -> None:
        instance_id = instance.document.instance_id
        known = self.journal.state.instances.get(instance_id)
        spawned = known.guest if known else None
        error = await how_it_ends(guest)
        if spawned is not None:
            await untiringly(partial(self._note_end, instance, guest, spawned, error), guest)

    async def _note_end(self, instance: Instance, guest: Guest, spawned: r.Spawned, error: HypervisorError) -> None:
        if instance.guest is not guest:
            return  # ended on purpose, or given away
        instance_id = instance.document.instance_id
        ended: rules.Event = rules.Lose(instance_id, error.text, spawned)
        if error.code == "guest_powered_off":
            ended = rules.PowerOff(instance_id, spawned)
        with self.journal_failures():
            async with instance.lock:
                migration = self.journal.state.open_outgoing(instance_id)
                decision = await self.journal.commit(ended)
                if not decision.records:
                    return
                log.warning("guest.ended", instance=instance_id, pid=guest.process.pid, code=error.code)
                instance.guest = None
                if migration is not None and self.journal.state.open_outgoing(instance_id) is None:
                    self.on_guest_end(migration, error)
                await guest.destroy()

    def journal_failures(self) -> JournalFailures:
        """A block whose journal errors end the daemon, and go no further."""
        return JournalFailures(self)

    # -- create, start, stop, delete -------------------------------------------------------------------------------

    async def create(self, request: CreateInstance, spec: chain.AnySpec) -> dict[str, Any]:
        """Make an instance; started if asked for.

        Raises: SpecError, UsageError, RequestError; then nothing was made.
        """
        await self.register(request, spec, _decode_blobs(request.blobs))
        if request.start:
            try:
                await self.start(request.id)
            except VmMigrateError:
                await self.delete(request.id)
                raise
        return await self.describe(request.id)

    async def register(
        self, request: NewInstance, spec: chain.AnySpec, blobs: Mapping[str, bytes], *, is_adopting: bool = False
    ) -> None:
        """Make an instance that has no guest. Raises: SpecError, UsageError, RequestError; then nothing was made."""
        document = InstanceDocument(
            instance_id=request.id,
            spec=chain.up(spec),
            name=request.name,
            description=request.description,
            overrides=request.overrides.model_dump(exclude_none=True),
            program=request.program,
            blobs=blobs,
            is_adopting=is_adopting,
        )
        self.check(document, 0)
        self.check_determinate(request.id)
        async with self._creating:
            # Decided before it is written, so that a refusal leaves the document of the existing instance alone.
            rules.decide(self.journal.state, rules.Create(request.id))
            self._check_deleted(request.id)
            await trio.to_thread.run_sync(self.documents.save_instance, document)
            await self.journal.commit(rules.Create(request.id))
            self.instances[request.id] = Instance(document)
        log.info("instance.created", instance=request.id)

    async def start(self, instance_id: str) -> None:
        """Build the guest and run it. Idempotent for a running one.

        Raises: RequestError, OwnershipRefusal, HypervisorError; then it is stopped.
        """
        async with self.asked(instance_id, Request.START) as instance:
            known = self.journal.state.instances[instance_id]
            if instance.guest is not None:
                await instance.guest.run(known.epoch)
                return
            if instance.document.is_adopting:
                text = f"instance {instance_id}: its guest runs in a QEMU that has not been adopted"
                raise RequestError(text, code="adoption_unfinished")
            plan = self.check(instance.document, 0)
            guest = await self._spawn(instance.document, plan, known.epoch, None)
            try:
                await guest.open_backends(known.epoch)
                await guest.run(known.epoch)
            except BaseException:
                with trio.CancelScope(shield=True):
                    try:
                        await self.journal.commit(rules.Stop(instance_id))
                    finally:
                        await guest.destroy()
                raise
            self.watch(instance, guest)
            log.info("instance.started", instance=instance_id, pid=guest.process.pid)

    async def stop(self, instance_id: str) -> None:
        """End the guest. Idempotent. Raises: RequestError, OwnershipRefusal."""
        async with self.asked(instance_id, Request.STOP) as instance:
            await self.journal.commit(rules.Stop(instance_id))
            await self._end_guest(instance)
            log.info("instance.stopped", instance=instance_id)

    async def pause(self, instance_id: str) -> None:
        """Pause the guest as an operator. Raises: RequestError, OwnershipRefusal."""
        async with self.asked(instance_id, Request.PAUSE):
            await self.guest(instance_id).pause()

    async def reboot(self, instance_id: str) -> None:
        """Press the guest's reset button. Raises: RequestError, OwnershipRefusal."""
        async with self.asked(instance_id, Request.REBOOT):
            await self.guest(instance_id).reboot()
            log.info("instance.rebooted", instance=instance_id)

    async def type_keys(self, instance_id: str, port: str, keys: bytes) -> None:
        """Type on the guest's console. Raises: RequestError, OwnershipRefusal."""
        self.permit(instance_id, Request.TYPE)
        guest = self.guest(instance_id)
        names = [serial.name for serial in guest.plan.serial_ports]
        check_port(names, port)
        await guest.console_input(port, keys)

    async def delete(self, instance_id: str) -> None:
        """Stop and forget the instance. Raises: RequestError, OwnershipRefusal."""
        async with self.asked(instance_id, Request.DELETE) as instance:
            await self.journal.commit(rules.Remove(instance_id))
            await self._end_guest(instance)
            await trio.to_thread.run_sync(self.documents.remove_instance, instance_id)
            if self.instances.get(instance_id) is instance:
                del self.instances[instance_id]
            log.info("instance.deleted", instance=instance_id)

    async def _end_guest(self, instance: Instance) -> None:
        guest, instance.guest = instance.guest, None
        if guest is not None:
            await guest.destroy()

    def permit(self, instance_id: str, request: Request) -> None:
        """Nothing when *request* may be done to the instance now. Raises: RequestError, OwnershipRefusal."""
        self.check_determinate(instance_id)
        rules.permit(self.journal.state, instance_id, request)
        self._check_arrived(instance_id)

    @contextlib.asynccontextmanager
    async def asked(self, instance_id: str, request: Request) -> AsyncIterator[Instance]:
        """The instance, with its lock; refused before and after the wait for that. Raises: as `permit`."""
        self.permit(instance_id, request)
        instance = self.instance(instance_id)
        async with instance.lock:
            self.permit(instance_id, request)
            yield instance

    # -- given to another host by an operator ----------------------------------------------------------------------

    async def silence(self, instance_id: str, epoch: Epoch) -> None:
        """Pause every guest process of the instance on this host, close its disks, and have it refuse epochs below
        *epoch*; also those under construction, and those that nothing explains.

        Raises: HypervisorError: one of them lives and did not obey.
        """
        record = self.journal.newest_record
        instance = self.instances.get(instance_id)
        arriving = [a.guest for a in self.arrivals.values() if a.document.instance_id == instance_id]
        for guest in [instance.guest if instance else None, *arriving]:
            if guest is not None:
                await _silence(guest, epoch, record)
        for process in self.strays.get(instance_id, ()):
            await self.hypervisor.silence(process, epoch, record)

    async def give_way(self, instance_id: str) -> None:
        """Let a superseded guest go. Whoever superseded it ran it before it told anybody. Nothing when it was not."""
        limit = self.journal.state.superseded.get(instance_id)
        if limit is None or instance_id in self.indeterminate:
            return
        decision = await self.journal.commit(rules.Yield(instance_id, limit))
        instance = self.instances.get(instance_id)
        if decision.records and instance is not None:
            log.warning("instance.yielded", instance=instance_id, to_epoch=list(limit))
            await self._end_guest(instance)

    # -- arrivals --------------------------------------------------------------------------------------------------

    async def build_arrival(self, migration_id: str, instance_id: str, arrival: Arrival) -> Guest:
        """Build the guest of an incoming migration, stopped, its document durable.

        Raises: SpecError, HypervisorError, OwnershipRefusal; nothing is left.
        """
        document = arriving_document(instance_id, arrival.spec, arrival.properties, arrival.blobs)
        plan = self.check(document, arrival.needed_bytes, arrival.facts)
        if plan.layout != arrival.layout:
            raise SpecBuildError(
                f"the source's RAM regions are not those of its spec: {arrival.layout.size_bytes} bytes in"
                f" {len(arrival.layout.regions)} regions, expected {plan.layout.size_bytes}",
                code="bad_regions",
            )
        guest = await self._spawn(document, plan, arrival.epoch, migration_id)
        try:
            await trio.to_thread.run_sync(self.documents.save_arrival, migration_id, document)
        except BaseException:
            with trio.CancelScope(shield=True):
                await guest.destroy()
            raise
        self.arrivals[migration_id] = Instance(document, guest)
        return guest

    async def finish_arrival(self, migration_id: str, instance_id: str) -> None:
        """The migration ended: its guest is one of ours now, or nothing is left of it.

        An arrival whose fate is not durable is left alone: the next start of the daemon finds out.
        """
        arrival = self.arrivals.get(migration_id)
        incoming = self.journal.state.incoming.get(migration_id)
        if arrival is None or incoming is None or incoming.stage in OPEN_INCOMING:
            return
        if incoming.stage in {Incoming.ABANDONED, Incoming.REFUSED, Incoming.RETURNED}:
            del self.arrivals[migration_id]
            await trio.to_thread.run_sync(self.documents.remove_arrival, migration_id)
        elif incoming.stage is Incoming.STARTED:
            await self.welcome(migration_id, instance_id)

    async def welcome(self, migration_id: str, instance_id: str) -> None:
        """The guest, of which `started` is durable, is one of ours at once; idempotent. Its document becomes the
        instance's beside: whoever wants to change anything waits for that.
        """
        if migration_id in self.arrivals:
            await self.nursery.start(self._take_up, migration_id, instance_id)

    async def _take_up(self, migration_id: str, instance_id: str, task_status: trio.TaskStatus[None]) -> None:
        arrival = self.arrivals[migration_id]
        async with arrival.lock:
            self.instances[instance_id] = arrival
            del self.arrivals[migration_id]
            guest, arrival.guest = arrival.guest, None
            is_ours = self.journal.state.instances[instance_id].holding is Holding.HELD
            if guest is not None and is_ours:
                self.watch(arrival, guest)
            task_status.started()
            with trio.CancelScope(shield=True):
                await self._promote(migration_id, instance_id)
                if guest is not None and not is_ours:
                    await guest.destroy()  # an operator gave it to another host meanwhile, or it is lost

    async def _promote(self, migration_id: str, instance_id: str) -> None:
        try:
            await trio.to_thread.run_sync(self.documents.promote_arrival, migration_id, instance_id)
        except StorageError as exc:
            # The guest is ours and runs; the next start of the daemon finds its document where it is.
            log.error("document.not_promoted", instance=instance_id, code=exc.code, text=exc.text)

    def host_facts(self) -> dict[str, Any]:
        """Who this host is and what it can do."""
        capabilities = self.hypervisor.capabilities
        return {
            "host": self.identity.name,
            "identity": self.identity.uri,
            "version": vmmigrate.__version__,
            "hypervisor": capabilities.hypervisor,
            "hypervisor_version": capabilities.version,
            "dirty_tracking": capabilities.dirty_tracking,
            "dirty_tracking_reason": capabilities.dirty_tracking_reason,
            "huge_pages": capabilities.huge_pages.available,
            "huge_pages_reason": capabilities.huge_pages.reason,
            "spec_versions": list(chain.CHAIN.names),
            "features": list(self.config.allow.features),
            "journal_id": self.journal.id,
        }


def process_of(spawned: r.Spawned) -> GuestProcess:
    """How the journal's record of a guest process finds it again."""
    return GuestProcess(spawned.pid, spawned.start_ticks, Path(spawned.socket))


async def _silence(guest: Guest, epoch: Epoch, record: int) -> None:
    try:
        await guest.silence(epoch, record)
    except HypervisorError as exc:
        if exc.code != "guest_lost":
            raise


class JournalFailures:
    """Ends the daemon on a poisoned journal; other errors of ours pass."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> bool:
        if not isinstance(exc, JournalError):
            return False
        self._host.failure = exc
        self._host.fatal.set()
        return True


def check_port(ports: list[str], wanted: str) -> None:
    """Raises: RequestError `unknown_port`."""
    if wanted not in ports:
        raise RequestError(f"no serial port {wanted!r} (there are: {', '.join(ports) or 'none'})", code="unknown_port")


def _decode_blobs(blobs: Mapping[str, str]) -> dict[str, bytes]:
    try:
        return {name: base64.b64decode(text, validate=True) for name, text in blobs.items()}
    except binascii.Error:
        raise UsageError("blobs: values must be base64", code="bad_request") from None
