"""A site for two hosts, in a directory: CA, certificates, configurations, a volume that both can reach."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmmigrate.demo import guest
from vmmigrate.net import pki
from vmmigrate.net.identity import Identity, Role
from vmmigrate.net.tls import TlsFiles

TRUST_DOMAIN: Final = "demo.vmmigrate"
SOURCE, DESTINATION = "source", "destination"
_LIFETIME_DAYS: Final = 1

_CONFIG: Final = """\
hypervisor = "{setting.hypervisor}"

[listen]
api = "127.0.0.1:0"
migration = "127.0.0.1:0"
bulk = "127.0.0.1:0"

[tls]
ca = "pki/ca.pem"
certificate = "pki/{host}.pem"
key = "pki/{host}-key.pem"

[directories]
state = "{host}/state"
runtime = "{host}/run"
{setting.directories}

[allow]
hosts = ["127.0.0.1"]
interfaces = ["{vnics}"]
{setting.allow}

{setting.sections}
"""


@dataclass(frozen=True)
class Setting:
    """What differs between demonstrations in the daemons' configuration: lines of TOML.

    Attributes:
        directories, allow: More lines in the sections of these names.
        sections: More sections.
    """

    hypervisor: str
    directories: str = ""
    allow: str = ""
    sections: str = ""


EMBEDDED: Final = Setting("embedded", sections=f'[allow.volumes]\n{guest.VOLUME_ID} = "volume"')


@dataclass(frozen=True)
class Site:
    """Paths; the operator's certificate is what the demo speaks with."""

    root: Path

    @property
    def operator(self) -> TlsFiles:
        pki_directory = self.root / "pki"
        return TlsFiles(pki_directory / "ca.pem", pki_directory / "operator.pem", pki_directory / "operator-key.pem")

    def config(self, host: str) -> Path:
        return self.root / f"{host}.toml"

    def runtime(self, host: str) -> Path:
        return self.root / host / "run"

    def log(self, host: str) -> Path:
        return self.root / f"{host}.log"

    @property
    def guest(self) -> Path:
        """For what belongs to the guest and to neither host: both reach it."""
        return self.root / "guest"


def make_site(root: Path, setting: Setting = EMBEDDED) -> Site:
    """Everything that two daemons need to start, under *root*."""
    site = Site(root)
    pki.init_authority(root / "pki", TRUST_DOMAIN, _LIFETIME_DAYS + 1)
    for role, name in ((Role.HOST, SOURCE), (Role.HOST, DESTINATION), (Role.OPERATOR, "operator")):
        pki.issue(root / "pki", Identity(TRUST_DOMAIN, role, name), lifetime_days=_LIFETIME_DAYS)
    for host in (SOURCE, DESTINATION):
        text = _CONFIG.format(host=host, setting=setting, vnics=guest.VNICS)
        site.config(host).write_text(text, encoding="utf-8")
    with open(root / "volume", "wb") as volume:
        volume.truncate(guest.VOLUME_BYTES)
    site.guest.mkdir()
    return site
