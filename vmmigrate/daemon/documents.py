"""What a host keeps of its instances and ended migrations beside the journal: JSON files, replaced atomically.

The journal says who owns a guest; these files say what the guest is. They are written before the journal record that
makes them matter.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from vmmigrate.api.models import CreateInstance
from vmmigrate.engine.journal import sync_directory
from vmmigrate.errors import SpecBuildError, StorageError
from vmmigrate.memory import RamLayout
from vmmigrate.spec import chain, document
from vmmigrate.spec.latest import InstanceSpec

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class InstanceDocument:
    """What an instance is. `overrides` and `program` are those of the request that created it.

    Attributes:
        is_adopting: Its guest runs in a QEMU that something else started, and the journal does not know it yet: it must
            not be started, or there would be two.
    """

    instance_id: str
    spec: InstanceSpec
    name: str = ""
    description: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    program: Mapping[str, Any] = field(default_factory=lambda: {"name": "idle"})
    blobs: Mapping[str, bytes] = field(default_factory=dict)
    is_adopting: bool = False

    def properties(self) -> dict[str, str]:
        """What of it travels in the preamble beside the spec."""
        return {
            "name": self.name,
            "description": self.description,
            "overrides": json.dumps(dict(self.overrides)),
            "program": json.dumps(dict(self.program)),
        }

    def layout(self, of_spec: RamLayout) -> RamLayout:
        ram_bytes = self.overrides.get("ram_bytes")
        return of_spec if ram_bytes is None else RamLayout.for_size(ram_bytes)


def arriving_document(
    instance_id: str, spec: InstanceSpec, properties: Mapping[str, str], blobs: Mapping[str, bytes]
) -> InstanceDocument:
    """The document of an instance from what its source says of it; checked like a request of its own.

    Raises: SpecBuildError `bad_properties`.
    """
    try:
        request = CreateInstance.model_validate(
            {
                "id": instance_id,
                "name": properties.get("name", ""),
                "description": properties.get("description", ""),
                "overrides": json.loads(properties.get("overrides", "{}")),
                "program": json.loads(properties.get("program", "{}")),
            }
        )
    except (ValueError, RecursionError) as exc:
        raise SpecBuildError("the source's properties are malformed", code="bad_properties") from exc
    return InstanceDocument(
        instance_id=instance_id,
        spec=spec,
        name=request.name,
        description=request.description,
        overrides=request.overrides.model_dump(exclude_none=True),
        program=request.program,
        blobs=blobs,
    )


class DocumentStore:
    """Instance documents and migration records under a state directory."""

    def __init__(self, state: Path, fsync: Callable[[int], None] = os.fsync) -> None:
        self._fsync = fsync
        self._instances = state / "instances"
        self._arrivals = state / "arrivals"
        self._migrations = state / "migrations"
        for directory in (state, self._instances, self._arrivals, self._migrations):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def save_instance(self, kept: InstanceDocument) -> None:
        """Durable when this returns. Blocking.

        Raises: StorageError `document_io`.
        """
        self._write(self._instances / f"{kept.instance_id}.json", _plain_document(kept))

    def save_arrival(self, migration_id: str, kept: InstanceDocument) -> None:
        """As `save_instance`, for a guest that is not ours yet: a document of an earlier stay is not touched."""
        self._write(self._arrivals / f"{migration_id}.json", _plain_document(kept))

    def load_arrival(self, migration_id: str) -> InstanceDocument | None:
        path = self._arrivals / f"{migration_id}.json"
        return _document(_read(path)) if path.exists() else None

    def promote_arrival(self, migration_id: str, instance_id: str) -> None:
        """The guest is ours: its document becomes the instance's. Idempotent."""
        arrival = self._arrivals / f"{migration_id}.json"
        if arrival.exists():
            try:
                os.replace(arrival, self._instances / f"{instance_id}.json")
                sync_directory(self._instances, self._fsync)
            except OSError as exc:
                raise StorageError(f"{arrival}: {exc.strerror}", code="document_io") from exc

    def remove_arrival(self, migration_id: str) -> None:
        """Never raises: what cannot be removed is found again by the next start, which tries again."""
        _remove(self._arrivals / f"{migration_id}.json")

    def load_instances(self) -> Iterator[InstanceDocument]:
        """All instance documents. Raises: StorageError `document_damaged`, SpecError."""
        for path in sorted(self._instances.glob("*.json")):
            yield _document(_read(path))

    def remove_instance(self, instance_id: str) -> None:
        """As `remove_arrival`: the journal says that there is no such instance any more, and that counts."""
        _remove(self._instances / f"{instance_id}.json")

    def save_record(self, migration_id: str, record: Mapping[str, Any]) -> None:
        """A migration's record as it ended."""
        self._write(self._migrations / f"{migration_id}.{record['role']}.json", record)

    def load_records(self) -> list[dict[str, Any]]:
        """All of them, the oldest first."""
        records = [_read(path) for path in self._migrations.glob("*.json")]
        return sorted(records, key=lambda record: float(record["created_at_s"]))

    def remove_record(self, migration_id: str, role: str) -> None:
        (self._migrations / f"{migration_id}.{role}.json").unlink(missing_ok=True)

    def remove_unfinished(self) -> None:
        """Remove what a daemon left that died while it wrote. Only for who holds the journal's lock."""
        for directory in (self._instances, self._arrivals, self._migrations):
            for path in directory.glob("*.new"):
                path.unlink(missing_ok=True)

    def _write(self, path: Path, plain: Mapping[str, Any]) -> None:
        fresh = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
        try:
            with open(fresh, "w", encoding="utf-8", opener=_private) as file:
                json.dump(plain, file)
                file.flush()
                self._fsync(file.fileno())
            os.replace(fresh, path)
            sync_directory(path.parent, self._fsync)
        except OSError as exc:
            _remove(fresh)
            raise StorageError(f"{path}: {exc.strerror}", code="document_io") from exc


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        log.warning("document.not_removed", file=str(path), why=exc.strerror)


def _plain_document(kept: InstanceDocument) -> dict[str, Any]:
    return {
        "format": 1,
        "id": kept.instance_id,
        "name": kept.name,
        "description": kept.description,
        "spec_version": chain.LATEST,
        "spec": document.serialise(kept.spec),
        "overrides": dict(kept.overrides),
        "program": dict(kept.program),
        "blobs": {name: blob.hex() for name, blob in kept.blobs.items()},
        **({"is_adopting": True} if kept.is_adopting else {}),
    }


def _document(plain: Mapping[str, Any]) -> InstanceDocument:
    return InstanceDocument(
        instance_id=plain["id"],
        spec=chain.up(document.parse(plain["spec_version"], plain["spec"])),
        name=plain["name"],
        description=plain["description"],
        overrides=plain["overrides"],
        program=plain["program"],
        blobs={name: bytes.fromhex(blob) for name, blob in plain["blobs"].items()},
        is_adopting=bool(plain.get("is_adopting")),
    )


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _read(path: Path) -> dict[str, Any]:
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise StorageError(f"{path}: {exc}", code="document_damaged") from exc
    if not isinstance(plain, dict):
        raise StorageError(f"{path}: not an object", code="document_damaged")
    return plain
