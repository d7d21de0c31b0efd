"""A document at a glance: what a person wants to see of it, and nothing that is secret."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from vmmigrate.errors import LossyDowngradeError, SpecParseError
from vmmigrate.jsontext import compact
from vmmigrate.spec import chain
from vmmigrate.spec.chain import AnySpec
from vmmigrate.spec.document import to_json
from vmmigrate.spec.volume import parse_volume, regions, volume_id

SECRET_FIELDS: Final = frozenset({"request_json", "base64"})


def overview(spec: AnySpec) -> dict[str, Any]:
    """Board, components in key order, SMBIOS texts, and which versions can say all of it. JSON values only."""
    newest = chain.up(spec)
    written = to_json(newest)
    return {
        "spec_version": chain.version_of(spec),
        "board": written["board"],
        "smbios": written.get("smbios"),
        "components": [
            {"key": key, "type": part["type"], "pci_path": _pci_path(part["component"]), "details": _details(part)}
            for key, part in written["components"].items()
        ],
        "versions": {name: _lost(spec, name) for name in chain.CHAIN.names},
    }


def _pci_path(fields: Mapping[str, Any]) -> str | None:
    path = fields.get("pci_path")
    return None if path is None else f"{path['bus']}.{path['device']}.{path['function']}"


def _details(part: Mapping[str, Any]) -> str:
    """The other fields in one line."""
    fields = part["component"]
    return ", ".join(_detail(name, value) for name, value in fields.items() if name != "pci_path")


def _detail(name: str, value: Any) -> str:
    if name == "request_json":
        return _volume(value)
    if name in SECRET_FIELDS:
        return f"{name} {len(value)} characters"
    if name == "serial_number" and isinstance(value, list):
        return f"{name} {bytes(value).rstrip(bytes(1)).decode('latin-1')}"
    if name == "order":
        return f"{name} {' '.join(entry['id'] for entry in value)}"
    return f"{name} {value if isinstance(value, str) else compact(value)}"


def _volume(request_json: str) -> str:
    try:
        volume = parse_volume(request_json)
    except SpecParseError:
        return f"request_json {len(request_json)} characters, no volume request"
    generations = sorted({region.gen for region in regions(volume)})
    told = f", generation {' '.join(map(str, generations))}" if generations else ""
    return f"{volume.tag} {volume_id(volume)}{told}"


def _lost(spec: AnySpec, version: str) -> list[dict[str, Any]]:
    """What the version cannot say; empty when it is exact."""
    try:
        chain.convert(spec, version)
    except LossyDowngradeError as error:
        lost: list[dict[str, Any]] = error.details["lost"]
        return lost
    return []
