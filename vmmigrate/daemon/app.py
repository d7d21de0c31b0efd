"""The control API over HTTPS. Every route names the call it is; the table in `net.identity` says who may use it.

Errors are one JSON object, {"error": {code, message, details}}, with a status that says whose fault it is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Annotated, Any, TypeVar

import structlog
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

import vmmigrate
from vmmigrate import jsontext
from vmmigrate.api.models import (
    Adjust,
    AdoptInstance,
    Cancel,
    ConsoleInput,
    CreateInstance,
    MigrateIn,
    MigrateOut,
    Resolve,
    Superseded,
)
from vmmigrate.daemon import foreign
from vmmigrate.daemon.host import Host, check_port
from vmmigrate.daemon.migrations import Migrations
from vmmigrate.daemon.resolving import Resolving
from vmmigrate.errors import (
    HypervisorError,
    IdentityError,
    JournalError,
    RequestError,
    SpecError,
    TransportError,
    UsageError,
    VmMigrateError,
)
from vmmigrate.hypervisor.base import Guest
from vmmigrate.net.https import identity_of_scope
from vmmigrate.net.identity import Call, Identity, Role, check_allowed
from vmmigrate.ownership.rules import OwnershipRefusal
from vmmigrate.spec import chain, document

log = structlog.get_logger(__name__)

M = TypeVar("M", bound=BaseModel)

_STATUS: Mapping[type[VmMigrateError], int] = {
    UsageError: 400,
    IdentityError: 403,
    RequestError: 409,
    OwnershipRefusal: 409,
    SpecError: 422,
    HypervisorError: 502,
    TransportError: 502,
}
_STATUS_BY_CODE: Mapping[str, int] = {
    "unknown_instance": 404,
    "unknown_migration": 404,
    "guest_paused_for_handoff": 409,
    "guest_powered_off": 409,
}


def allowed(call: Call) -> Any:
    """A dependency: the identity behind the request, if its role may use *call*."""

    def check(request: Request) -> Identity:
        identity = identity_of_scope(request.scope)
        check_allowed(identity, call)
        return identity

    return Depends(check)


def make_app(host: Host, migrations: Migrations, resolving: Resolving) -> FastAPI:
    """The application of one daemon."""
    app = FastAPI(title="vmmigrate host daemon", version=vmmigrate.__version__, docs_url=None, redoc_url=None)
    app.add_exception_handler(VmMigrateError, _reply_with_error(host))
    app.add_exception_handler(HTTPException, _reply_to_wrong_route)
    app.add_exception_handler(RequestValidationError, _reply_to_wrong_parameter)
    app.add_exception_handler(Exception, _reply_to_defect)
    _add_instances(app, host)
    _add_consoles(app, host)
    _add_migrations(app, host, migrations)
    _add_resolving(app, resolving)
    return app


def _reply_with_error(host: Host) -> Callable[[Request, Any], Awaitable[JSONResponse]]:
    # Async on purpose: a plain function would run in a thread, and `fatal` belongs to the loop.
    async def reply(request: Request, exc: VmMigrateError) -> JSONResponse:
        if isinstance(exc, JournalError):
            host.failure = exc
            host.fatal.set()
        status = _STATUS_BY_CODE.get(exc.code) or next(
            (status for kind, status in _STATUS.items() if isinstance(exc, kind)), 500
        )
        log.info("api.refused", path=request.url.path, status=status, code=exc.code, text=exc.text)
        return JSONResponse({"error": exc.as_dict()}, status)

    return reply


async def _reply_to_wrong_route(request: Request, exc: Any) -> JSONResponse:
    code = {404: "unknown_path", 405: "method_not_allowed"}.get(exc.status_code, "http")
    error = VmMigrateError(f"{request.method} {request.url.path}: {exc.detail}", code=code)
    return JSONResponse({"error": error.as_dict()}, exc.status_code, headers=exc.headers)


async def _reply_to_wrong_parameter(_: Request, exc: Any) -> JSONResponse:
    first = exc.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    error = UsageError(f"request: {where}: {first['msg']}", code="bad_request")
    return JSONResponse({"error": error.as_dict()}, 400)


async def _reply_to_defect(request: Request, exc: Exception) -> JSONResponse:
    """The client learns that it was not its fault; the traceback is for our log alone (`net.https` writes it)."""
    error = VmMigrateError(f"{request.method} {request.url.path}: a defect of this daemon; its log says more")
    return JSONResponse({"error": error.as_dict()}, 500)


def _takes(model: type[BaseModel], **more: Any) -> dict[str, Any]:
    """What the API's description says of a body that `checked` reads."""
    schema = model.model_json_schema()
    shared = schema.pop("$defs", {})
    for name, own in schema["properties"].items():
        for choice in [own, *own.get("anyOf", ()), *own.get("allOf", ())]:
            if "$ref" in choice:
                choice.update(shared[choice.pop("$ref").rpartition("/")[2]])
        schema["properties"][name] = own
    schema["properties"].update(more)
    schema["required"] = [*schema.get("required", ()), *more]
    return {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}


_SPEC_PARTS: Mapping[str, Any] = {
    "spec_version": {"type": "string", "enum": list(chain.CHAIN.names)},
    "spec": {"type": "object"},
}


def _add_making(app: FastAPI, path: str, model: type[M], make: Callable[[M, chain.AnySpec], Awaitable[Any]]) -> None:
    """A request that makes an instance of a body like *model* and the spec beside it."""

    @app.post(
        path,
        status_code=201,
        dependencies=[allowed(Call.INSTANCE_WRITE)],
        openapi_extra=_takes(model, **_SPEC_PARTS),
    )
    async def make_instance(request: Request) -> dict[str, Any]:
        body, spec = read_spec_request(await request.body())
        return dict(await make(checked(model, body), spec))


def _add_instances(app: FastAPI, host: Host) -> None:
    @app.get("/v1/host", dependencies=[allowed(Call.INSTANCE_READ)])
    async def show_host() -> dict[str, Any]:
        return host.host_facts()

    _add_making(app, "/v1/instances", CreateInstance, host.create)
    _add_making(app, "/v1/instances:adopt", AdoptInstance, partial(foreign.adopt, host))

    @app.get("/v1/instances", dependencies=[allowed(Call.INSTANCE_READ)])
    async def list_instances() -> list[dict[str, Any]]:
        return await host.list()

    @app.get("/v1/instances/{instance_id}", dependencies=[allowed(Call.INSTANCE_READ)])
    async def show_instance(instance_id: str) -> dict[str, Any]:
        return await host.describe(instance_id)

    @app.delete("/v1/instances/{instance_id}", dependencies=[allowed(Call.INSTANCE_WRITE)])
    async def delete_instance(instance_id: str) -> dict[str, Any]:
        await host.delete(instance_id)
        return {"id": instance_id, "deleted": True}

    @app.post("/v1/instances/{instance_id}:start", dependencies=[allowed(Call.INSTANCE_WRITE)])
    async def start_instance(instance_id: str) -> dict[str, Any]:
        await host.start(instance_id)
        return await host.describe(instance_id)

    @app.post("/v1/instances/{instance_id}:stop", dependencies=[allowed(Call.INSTANCE_WRITE)])
    async def stop_instance(instance_id: str) -> dict[str, Any]:
        await host.stop(instance_id)
        return await host.describe(instance_id)

    @app.post("/v1/instances/{instance_id}:reboot", dependencies=[allowed(Call.INSTANCE_WRITE)])
    async def reboot_instance(instance_id: str) -> dict[str, Any]:
        await host.reboot(instance_id)
        return await host.describe(instance_id)

    @app.post("/v1/instances/{instance_id}:pause", dependencies=[allowed(Call.INSTANCE_WRITE)])
    async def pause_instance(instance_id: str) -> dict[str, Any]:
        await host.pause(instance_id)
        return await host.describe(instance_id)

    @app.get("/v1/instances/{instance_id}/spec", dependencies=[allowed(Call.INSTANCE_READ)])
    async def show_spec(instance_id: str, version: str = chain.LATEST) -> dict[str, Any]:
        spec = chain.convert(host.instance(instance_id).document.spec, version)
        return {"spec_version": version, "spec": document.to_json(spec)}


def _add_consoles(app: FastAPI, host: Host) -> None:
    @app.get("/v1/instances/{instance_id}/console", dependencies=[allowed(Call.INSTANCE_READ)])
    async def show_console(instance_id: str, port: str) -> dict[str, Any]:
        guest = host.guest(instance_id)
        check_port([serial.name for serial in guest.plan.serial_ports], port)
        history = await guest.console_history(port)
        return {
            "port": port,
            "total_bytes": history.total_bytes,
            "beginning": history.beginning.decode("latin-1"),
            "rolling": history.rolling.decode("latin-1"),
        }

    @app.post(
        "/v1/instances/{instance_id}/console",
        dependencies=[allowed(Call.INSTANCE_WRITE)],
        openapi_extra=_takes(ConsoleInput),
    )
    async def type_on_console(instance_id: str, request: Request) -> dict[str, Any]:
        keys = checked(ConsoleInput, read_json(await request.body()))
        await host.type_keys(instance_id, keys.port, keys.text.encode())
        return {"port": keys.port}

    @app.post("/v1/instances/{instance_id}:check", dependencies=[allowed(Call.INSTANCE_READ)])
    async def check_guest(instance_id: str) -> dict[str, Any]:
        guest = host.guest(instance_id)
        check = await guest.self_check()
        return {
            "consistent": check.consistent,
            "pages_checked": check.pages_checked,
            "first_bad_page": check.first_bad_page,
            "reason": check.reason,
            "heartbeat": await _gaps(guest),
        }


async def _gaps(guest: Guest) -> dict[str, Any] | None:
    """None for a guest that keeps no count of them. Raises: HypervisorError."""
    try:
        return dict(await guest.heartbeat_gaps())
    except HypervisorError as error:
        if error.code != "not_supported":
            raise
        return None


def _add_migrations(app: FastAPI, host: Host, migrations: Migrations) -> None:
    @app.post(
        "/v1/instances/{instance_id}:migrate-out",
        dependencies=[allowed(Call.MIGRATE)],
        openapi_extra=_takes(MigrateOut),
    )
    async def migrate_out(instance_id: str, request: Request) -> dict[str, Any]:
        return await migrations.migrate_out(instance_id, checked(MigrateOut, read_json(await request.body())))

    @app.post(
        "/v1/migrations:migrate-in",
        status_code=202,
        dependencies=[allowed(Call.MIGRATE)],
        openapi_extra=_takes(MigrateIn),
    )
    async def migrate_in(request: Request) -> dict[str, Any]:
        return await migrations.migrate_in(checked(MigrateIn, read_json(await request.body())))

    @app.get("/v1/migrations", dependencies=[allowed(Call.MIGRATION_READ)])
    async def list_migrations() -> list[dict[str, Any]]:
        return migrations.reports.list()

    @app.get("/v1/migrations/{migration_id}", dependencies=[allowed(Call.MIGRATION_READ)])
    async def show_migration(migration_id: str) -> dict[str, Any]:
        return migrations.reports.describe(migration_id)

    @app.post(
        "/v1/migrations/{migration_id}:cancel",
        dependencies=[allowed(Call.MIGRATION_CANCEL)],
        openapi_extra=_takes(Cancel),
    )
    async def cancel_migration(migration_id: str, request: Request) -> dict[str, Any]:
        wanted = checked(Cancel, read_json(await request.body() or b"{}"))
        return await migrations.cancel(migration_id, wanted.reason)

    @app.post(
        "/v1/migrations/{migration_id}:adjust",
        dependencies=[allowed(Call.MIGRATION_ADJUST)],
        openapi_extra=_takes(Adjust),
    )
    async def adjust_migration(migration_id: str, request: Request) -> dict[str, Any]:
        wanted = checked(Adjust, read_json(await request.body()))
        return migrations.adjust(migration_id, wanted.model_dump(exclude_none=True))

    @app.get("/v1/migrations/{migration_id}/side")
    async def show_side(migration_id: str, asking: Annotated[Identity, allowed(Call.SIDE)]) -> dict[str, Any]:
        _check_peer(host, migration_id, asking)
        return migrations.side(migration_id)

    @app.post("/v1/migrations/{migration_id}/side:settle")
    async def settle_side(migration_id: str, asking: Annotated[Identity, allowed(Call.SIDE_SETTLE)]) -> dict[str, Any]:
        return await migrations.settle_side(migration_id, asking)


def _add_resolving(app: FastAPI, resolving: Resolving) -> None:
    @app.post("/v1/migrations/{migration_id}:resolve", openapi_extra=_takes(Resolve))
    async def resolve_migration(
        migration_id: str, request: Request, asking: Annotated[Identity, allowed(Call.RESOLVE)]
    ) -> dict[str, Any]:
        return await resolving.resolve(migration_id, checked(Resolve, read_json(await request.body())), asking)

    @app.post("/v1/migrations/{migration_id}/side:supersede", openapi_extra=_takes(Superseded))
    async def supersede_instance(
        migration_id: str, request: Request, asking: Annotated[Identity, allowed(Call.SUPERSEDE)]
    ) -> dict[str, Any]:
        return await resolving.supersede(migration_id, checked(Superseded, read_json(await request.body())), asking)


def _check_peer(host: Host, migration_id: str, asking: Identity) -> None:
    """A host sees the sides of its own migrations only."""
    if asking.role is not Role.HOST:
        return
    state = host.journal.state
    outgoing, incoming = state.outgoing.get(migration_id), state.incoming.get(migration_id)
    peers = {
        outgoing.ticket.destination_host if outgoing else None,
        incoming.reserved.source_host if incoming else None,
    }
    if asking.name not in peers:
        raise IdentityError(f"{asking} is not the peer of migration {migration_id}", code="forbidden")


def read_json(body: bytes) -> Any:
    """The body as plain values, read strictly: no duplicate keys, no NaN."""
    return _plain(jsontext.parse(body))


def read_spec_request(body: bytes) -> tuple[Any, chain.AnySpec]:
    """The request without its spec, and the spec, which its own strict decoder reads from the same text.

    Raises: SpecParseError, UsageError.
    """
    tree = jsontext.parse(body)
    # The spec's own duplicates and spellings are its decoder's business, with its own messages.
    beside = tuple((key, value) for key, value in tree if key != "spec") if isinstance(tree, tuple) else ()
    plain = _plain(beside)
    one_spec = isinstance(tree, tuple) and len(tree) == len(beside) + 1
    if not one_spec or not isinstance(plain.get("spec_version"), str):
        raise UsageError("the request needs 'spec_version' (v1, v2 or v3) and one 'spec'", code="bad_request")
    spec = document.from_tree(plain.pop("spec_version"), _member(tree, "spec"))
    return plain, spec


def checked(model: type[M], body: Any) -> M:
    """Raises: UsageError `bad_request`: one line with the first field that is wrong."""
    try:
        return model.model_validate(body)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise UsageError(f"request: {where}: {first['msg']}", code="bad_request") from None


def _plain(tree: jsontext.Json) -> Any:
    """A strict tree as plain Python values.

    Raises: UsageError: duplicate keys, or text and numbers that have no value.
    """
    if isinstance(tree, tuple):
        plain = {key: _plain(value) for key, value in tree}
        if len(plain) != len(tree):
            raise UsageError("request: an object has a key twice", code="bad_request")
        return plain
    if isinstance(tree, list):
        return [_plain(value) for value in tree]
    if isinstance(tree, jsontext.Float):
        return float(tree.spelling)
    if isinstance(tree, jsontext.Flaw):
        raise UsageError(f"request: {tree.text}", code="bad_request")
    return tree


def _member(tree: jsontext.Json, name: str) -> jsontext.Json:
    assert isinstance(tree, tuple)
    return next(value for key, value in tree if key == name)
