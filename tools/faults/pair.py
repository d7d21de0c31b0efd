"""The two hosts of a trial, and what they had open when they were new."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tools.faults.leaks import descriptors
from tools.faults.site import HostProcess, Site, port_of

NAMES = ("source", "destination")


@dataclass
class Pair:
    """Two hosts, restarted as needed, so that most trials need no new processes.

    Attributes:
        hosts: By their part in the present migration.
        at_rest: What each daemon had open when it was new.
        restarts: How often a daemon was started again.
    """

    site: Site
    hosts: dict[str, HostProcess] = field(default_factory=dict)
    at_rest: dict[str, Counter[str]] = field(default_factory=dict)
    restarts: int = 0

    async def start(self) -> None:
        for name in NAMES:
            self.hosts[name] = await self.site.start(name)
        for name in NAMES:
            self.at_rest[name] = self.descriptors(name)

    def descriptors(self, name: str) -> Counter[str]:
        """What the daemon has open now, but for its connections with clients of the control API."""
        ports = frozenset(port_of(host.config, "api") for host in self.hosts.values())
        return descriptors(self.hosts[name].process.pid, ports)

    async def restart_dead(self) -> None:
        for name, host in self.hosts.items():
            if host.process.returncode is not None:
                await host.aclose()
                self.hosts[name] = await self.site.start(host.name)
                self.restarts += 1

    def swap(self) -> None:
        """From now on guests go the other way."""
        first, second = NAMES
        self.hosts = {first: self.hosts[second], second: self.hosts[first]}
        self.at_rest = {first: self.at_rest[second], second: self.at_rest[first]}
