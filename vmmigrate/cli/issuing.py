"""Issue a certificate into a directory of its own, together with the CA's certificate: all a party needs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vmmigrate.errors import UsageError, VmMigrateError
from vmmigrate.net import pki
from vmmigrate.net.identity import Identity, Role


def issue_into(
    directory: Path,
    role: Role,
    name: str,
    dns_names: Sequence[str],
    ip_addresses: Sequence[str],
    lifetime_days: int,
    out: Path | None,
) -> dict[str, Any]:
    """The new files' paths and the identity. After a failure nothing is left, a new directory neither.

    Raises: UsageError, IdentityError: as `pki.issue`; `exists`: *out* holds the certificate of another CA.
    """
    identity = Identity(pki.load_authority(directory).trust_domain, role, name)
    made = out is not None and _make(out)
    try:
        ca = directory / "ca.pem" if out is None else _copy_authority(directory / "ca.pem", out / "ca.pem")
        files = pki.issue(directory, identity, dns_names, ip_addresses, lifetime_days, out)
    except VmMigrateError:
        if out is not None and made:
            (out / "ca.pem").unlink(missing_ok=True)
            with suppress(OSError):
                out.rmdir()
        raise
    return {
        "identity": identity.uri,
        "ca": str(ca),
        "certificate": str(files.certificate),
        "key": str(files.key),
    }


def _make(directory: Path) -> bool:
    """Whether it had to be made."""
    existed = directory.is_dir()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise UsageError(f"{directory}: cannot make this directory: {exc.strerror}", code="cannot_write") from exc
    return not existed


def _copy_authority(authority: Path, copy: Path) -> Path:
    try:
        wanted = authority.read_bytes()
        if not copy.exists():
            copy.write_bytes(wanted)
        elif copy.read_bytes() != wanted:
            raise UsageError(f"{copy} is another CA's certificate and is not overwritten", code="exists")
    except OSError as exc:
        raise UsageError(f"{copy}: cannot write: {exc.strerror}", code="cannot_write") from exc
    return copy
