"""One test CA for all of tests/net, and certificates of every kind, also those that `issue` refuses to make."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from vmmigrate.net import pki
from vmmigrate.net.identity import Identity, Role
from vmmigrate.net.tls import TlsFiles

TRUST_DOMAIN = "site.example"
HOUR = timedelta(hours=1)


class Site:
    """A CA, its directory, and whatever it issues."""

    def __init__(self, directory: Path, trust_domain: str = TRUST_DOMAIN) -> None:
        self.directory = directory
        self.files = pki.init_authority(directory, trust_domain)
        self.authority = pki.load_authority(directory)
        self._numbers = itertools.count()

    def party(self, role: Role, name: str) -> TlsFiles:
        """Files of a party with a certificate as it should be."""
        identity = Identity(self.authority.trust_domain, role, name)
        return self.leaf([identity.uri])

    def host(self, name: str) -> TlsFiles:
        return self.party(Role.HOST, name)

    def leaf(
        self,
        uris: Sequence[str],
        *,
        begins_in: timedelta = -HOUR,
        ends_in: timedelta = HOUR,
        dns_names: Sequence[str] = (),
    ) -> TlsFiles:
        """Files with these URIs and this validity, however wrong."""
        now = datetime.now(UTC)
        leaf = pki.make_leaf(self.authority, uris, now + begins_in, now + ends_in, dns_names=dns_names)
        number = next(self._numbers)
        files = TlsFiles(
            self.files.certificate, self.directory / f"leaf{number}.pem", self.directory / f"leaf{number}-key.pem"
        )
        pki.write_leaf(leaf, files.certificate, files.key)
        return files


def host_identity(name: str) -> Identity:
    return Identity(TRUST_DOMAIN, Role.HOST, name)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="session")
def other_site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Another CA of the same name and the same trust domain: only the key tells them apart."""
    return Site(tmp_path_factory.mktemp("other-site"))


@pytest.fixture(scope="session")
def source_files(site: Site) -> TlsFiles:
    return site.host("source")


@pytest.fixture(scope="session")
def destination_files(site: Site) -> TlsFiles:
    return site.host("destination")


@pytest.fixture
def listening_socket() -> Iterator[socket.socket]:
    with closing(socket.create_server(("127.0.0.1", 0))) as sock:
        sock.settimeout(5)
        yield sock
