"""What the control API answers when something is wrong with a request, or with us: always one JSON error."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog

from tests.migration.fleet import Fleet, ObservedHypervisor, RunningHost, create, open_fleet
from vmmigrate.hypervisor.base import ConsoleHistory, Guest, GuestPlan, GuestStamp
from vmmigrate.net.tls import client_context


class ForgetsItsConsole(ObservedHypervisor):
    """A hypervisor with a defect: asked for the console, it trips over itself."""

    async def build(self, plan: GuestPlan, stamp: GuestStamp, *, for_migration: bool) -> Guest:
        guest = await super().build(plan, stamp, for_migration=for_migration)

        async def console_history(port: str) -> ConsoleHistory:
            raise ZeroDivisionError("of no interest to clients")

        guest.console_history = console_history  # type: ignore[method-assign]
        return guest


@asynccontextmanager
async def served(root: Path, hypervisor: type[ObservedHypervisor]) -> AsyncIterator[tuple[Fleet, RunningHost, Any]]:
    async with open_fleet(root, "alpha") as fleet:
        alpha = await fleet.start("alpha", hypervisor_class=hypervisor)
        context = client_context(fleet.operator)
        async with httpx2.AsyncClient(base_url=alpha.url, verify=context, trust_env=False) as http:
            yield fleet, alpha, http


WRONG: list[tuple[str, str, bytes, int, str]] = [
    ("GET", "/nowhere", b"", 404, "unknown_path"),
    ("PUT", "/v1/instances", b"{}", 405, "method_not_allowed"),
    ("GET", "/v1/instances/x/console", b"", 400, "bad_request"),
    ("GET", "/v1/instances/x", b"", 404, "unknown_instance"),
    ("POST", "/v1/instances", b"", 422, "json_syntax"),
    ("POST", "/v1/instances", b"[]", 400, "bad_request"),
    ("POST", "/v1/instances", b'{"id":"a","id":"a","spec_version":"v3","spec":{}}', 400, "bad_request"),
    ("POST", "/v1/migrations:migrate-in", b"[" * 5000, 422, ""),
    ("POST", "/v1/migrations:migrate-in", b"9" * 9000, 400, ""),
    ("POST", "/v1/migrations:migrate-in", b'{"a\\nb":1}', 400, "bad_request"),
    ("POST", "/v1/instances/x:migrate-out", b'{"destination_host":"b","downtime_ms":true}', 400, "bad_request"),
    ("POST", "/v1/instances/x:migrate-out", b'{"destination_host":"b","streams":1.0}', 400, "bad_request"),
    ("POST", "/v1/migrations/x:cancel", b'{"reason":null}', 400, "bad_request"),
]


async def test_every_wrong_request_is_answered_with_one_error(tmp_path: Path) -> None:
    """A status that says whose fault it is, a code, one line, and nothing else."""
    async with served(tmp_path, ObservedHypervisor) as (_, alpha, http):
        for method, path, body, status, code in WRONG:
            reply = await http.request(method, path, content=body)

            told = (method, path, body[:40], reply.text[:300])
            assert reply.status_code == status, told
            error = reply.json()["error"]
            assert set(error) == {"code", "message", "details"}, told
            assert code in {"", error["code"]}, told
            assert error["message"].isprintable(), told
        assert await alpha.client.get("/v1/instances") == []


async def test_a_defect_is_answered_as_internal_and_its_traceback_is_logged(tmp_path: Path) -> None:
    """The client learns nothing of our insides; the log does; the next request is served."""
    with structlog.testing.capture_logs() as log:
        async with served(tmp_path, ForgetsItsConsole) as (_, alpha, http):
            instance = await create(alpha)

            reply = await http.get(f"/v1/instances/{instance}/console", params={"port": "com1"})

            assert reply.status_code == 500
            assert reply.json()["error"]["code"] == "internal"
            assert "ZeroDivision" not in reply.text
            assert "no interest" not in reply.text
            assert (await alpha.instance(instance))["state"] == "running"
    failures = [entry for entry in log if entry["event"] == "http.request_failed"]
    assert len(failures) == 1
    assert failures[0]["exc_info"]


def test_the_description_of_the_api_names_what_each_request_takes(tmp_path: Path) -> None:
    """From the very models that read them; no reference dangles."""
    from vmmigrate.api import models
    from vmmigrate.daemon.app import _takes

    takes = (models.CreateInstance, models.MigrateIn, models.MigrateOut, models.Cancel, models.ConsoleInput)
    for model in (*takes, models.Resolve, models.Superseded):
        described = json.dumps(_takes(model))
        assert "$ref" not in described
        for name in model.model_fields:
            assert f'"{name}"' in described


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", ""])
async def test_the_type_that_a_client_claims_for_its_body_does_not_matter(tmp_path: Path, kind: str) -> None:
    async with served(tmp_path, ObservedHypervisor) as (_, _alpha, http):
        reply = await http.post("/v1/instances", content=b"{}", headers={"content-type": kind})

        assert reply.json()["error"]["code"] == "bad_request"
