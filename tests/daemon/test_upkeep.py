"""The journal of a daemon stays short: verdicts are acknowledged by what the source says, and then forgotten."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.migration.fleet import (
    RunningHost,
    create,
    files_of,
    migrate,
    open_fleet,
    stress,
    wait_heartbeats,
    witnesses,
)
from vmmigrate.api.client import open_client
from vmmigrate.daemon import server
from vmmigrate.daemon.host import Host
from vmmigrate.daemon.upkeep import ask_sources, compact_if_due
from vmmigrate.engine.journal_format import Contents, read_contents
from vmmigrate.errors import VmMigrateError
from vmmigrate.ownership import records as r
from vmmigrate.ownership import rules
from vmmigrate.ownership.compaction import is_unacknowledged
from vmmigrate.ownership.state import Incoming

SHORT = "[journal]\ncompact_bytes = 4096\nremember_s = 0"


@pytest.fixture
def daemons(monkeypatch: pytest.MonkeyPatch) -> dict[str, Host]:
    """The insides of every daemon that starts; the upkeep is left to the test."""
    found: dict[str, Host] = {}

    async def note(host: Host) -> None:
        found[host.identity.name] = host

    monkeypatch.setattr(server, "keep_journal_short", note)
    return found


def an_hour_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what the journal remembers of the last minutes."""
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + 3600)
    monkeypatch.setattr("vmmigrate.engine.journal.time", later)


def contents(host: RunningHost) -> Contents:
    return read_contents((host.config.directories.state / "journal.vmmj").read_bytes(), host.name)


def waiting(host: Host) -> list[str]:
    return [migration for migration, incoming in host.journal.state.incoming.items() if is_unacknowledged(incoming)]


@pytest.mark.slow
async def test_after_many_migrations_both_journals_are_short_again_and_all_goes_on(
    tmp_path: Path, daemons: dict[str, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, beta = await fleet.start("alpha", limits=SHORT), await fleet.start("beta", limits=SHORT)
        instance = await create(alpha, program=stress(2, 500))
        for source, destination in ((alpha, beta), (beta, alpha)) * 3:
            assert (await migrate(source, destination, instance))["outcome"] == "moved"
        newest = {name: host.journal.newest_record for name, host in daemons.items()}
        for host in daemons.values():
            assert len(waiting(host)) == 3
            await ask_sources(host, set())
            assert waiting(host) == []
            await compact_if_due(host)
            assert len(host.journal.state.incoming) == 3, "what has just ended is still looked at"
            newest[host.identity.name] += 3
        an_hour_passes(monkeypatch)

        for host in daemons.values():
            await host.journal.compact(0)

        for running in (alpha, beta):
            kept = contents(running)
            assert len(kept.records) <= 6
            assert kept.newest_record == newest[running.name]
            await running.stop()
            await fleet.start(running.name, limits=SHORT, api_port=running.facts["api_port"])
        alpha, beta = fleet.hosts["alpha"], fleet.hosts["beta"]
        await wait_heartbeats(alpha, instance)
        assert (await migrate(alpha, beta, instance))["outcome"] == "moved"
        assert (await migrate(beta, alpha, instance))["outcome"] == "moved"
        assert witnesses(fleet, instance).single


async def test_the_word_of_an_operator_is_taken_from_the_host_that_gave_the_guest_by_a_forgotten_migration(
    tmp_path: Path, daemons: dict[str, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 8: the chain goes by journals, and what one of them has forgotten must not break it."""
    async with open_fleet(tmp_path, "alpha", "beta", "gamma") as fleet:
        alpha, beta = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha)
        moves = [await migrate(*hosts, instance) for hosts in ((alpha, beta), (beta, alpha)) * 2]
        first = moves[0]["migration_id"]
        await ask_sources(daemons["beta"], set())
        an_hour_passes(monkeypatch)
        await daemons["beta"].journal.compact(0, daemons["beta"].journal.state.leftovers)
        assert set(daemons["beta"].journal.state.incoming) == {moves[2]["migration_id"]}
        body = {"instance_id": instance, "epoch": [2, 0], "since": [1, 1]}

        async with open_client(beta.url, files_of(tmp_path, "gamma")) as client:
            with pytest.raises(VmMigrateError) as refusal:
                await client.post(f"/v1/migrations/{first}/side:supersede", body)
        async with open_client(beta.url, files_of(tmp_path, "alpha")) as client:
            await client.post(f"/v1/migrations/{first}/side:supersede", body)

        assert refusal.value.code == "forbidden"
        assert daemons["beta"].journal.state.superseded == {instance: (2, 0)}


async def test_a_journal_beyond_its_size_is_compacted_once_nobody_looks_any_more(
    tmp_path: Path, daemons: dict[str, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_fleet(tmp_path, "alpha") as fleet:
        alpha = await fleet.start("alpha", limits=SHORT)
        instance = await create(alpha)
        host = daemons["alpha"]
        assert not await compact_if_due(host)
        for _ in range(60):
            await alpha.client.post(f"/v1/instances/{instance}:migrate-out", {"destination_host": "beta"})
        an_hour_passes(monkeypatch)

        assert await compact_if_due(host)

        assert len(contents(alpha).records) < 10
        assert not await compact_if_due(host)
        await wait_heartbeats(alpha, instance)


async def test_a_verdict_stays_while_its_source_is_in_doubt_gone_or_does_not_know_it(
    tmp_path: Path, daemons: dict[str, Host]
) -> None:
    """What is no clear word of the source is no acknowledgement; who cannot be reached is asked again."""
    async with open_fleet(tmp_path, "alpha", "beta") as fleet:
        alpha, _ = await fleet.start("alpha"), await fleet.start("beta")
        instance = await create(alpha)
        host, silent = daemons["beta"], set[str]()
        ticket = await alpha.client.post(f"/v1/instances/{instance}:migrate-out", {"destination_host": "beta"})
        still_open = ticket["migration_id"]
        await host.journal.commit(rules.Reserve(r.Reserved("unknown", "vm1", "alpha", alpha.url)))
        await host.journal.commit(rules.Reserve(r.Reserved(still_open, instance, "alpha", alpha.url)))
        await host.journal.commit(rules.Reserve(r.Reserved("gone", "vm2", "alpha", "https://127.0.0.1:1")))
        for migration in ("unknown", still_open, "gone"):
            await host.journal.commit(rules.Prepare(migration, r.FIRST_EPOCH, "running"))
            await host.journal.commit(rules.Refuse(migration, "x"))

        await ask_sources(host, silent)

        assert waiting(host) == ["unknown", still_open, "gone"]
        assert silent == {"unknown"}
        await alpha.client.post(f"/v1/migrations/{still_open}:cancel")
        await ask_sources(host, silent)
        assert waiting(host) == ["unknown", "gone"]
        assert host.journal.state.incoming[still_open].stage is Incoming.REFUSED
