"""The daemon's configuration: one TOML file, checked whole before anything is opened."""

from __future__ import annotations

import tomllib
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from vmmigrate.devices import opaque, registry
from vmmigrate.engine.limits import ROWS, Deadlines, read_deadlines
from vmmigrate.errors import UsageError
from vmmigrate.hypervisor.qemu.machine import nbd_node
from vmmigrate.net.tls import TlsFiles
from vmmigrate.spec import chain


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def address(value: Any) -> tuple[str, int]:
    """`HOST:PORT`; IPv6 hosts in brackets; port 0 lets the kernel choose."""
    if isinstance(value, str):
        host, colon, port = value.rpartition(":")
        if colon and _is_host(host) and port.isascii() and port.isdecimal() and int(port) <= 65_535:
            return host.removeprefix("[").removesuffix("]"), int(port)
    raise ValueError(f"{value!r} is no address, needed is 'HOST:PORT'")


def _is_host(text: str) -> bool:
    """Whether a resolver can be asked for *text* at all."""
    try:
        return bool(text) and bool(text.encode("idna"))
    except UnicodeError:
        return False


def _path(value: Any) -> Path:
    if isinstance(value, str) and value:
        return Path(value)
    raise ValueError(f"{value!r} is no path")


Address = Annotated[tuple[str, int], BeforeValidator(address)]
FilePath = Annotated[Path, BeforeValidator(_path)]


class Listen(_Section):
    """Where the daemon listens, and under which name others reach it."""

    api: Address = ("127.0.0.1", 7441)
    migration: Address = ("127.0.0.1", 7442)
    bulk: Address = ("127.0.0.1", 7443)
    advertise: str = ""


class Tls(_Section):
    """PEM files; read again on SIGHUP.

    Attributes:
        crl: The CA's revocation list. Without one a stolen key is good until its certificate expires.
    """

    ca: FilePath
    certificate: FilePath
    key: FilePath
    crl: FilePath | None = None


class Directories(_Section):
    """`state` must survive a restart of the host; `runtime` must not.

    Attributes:
        witness: Where guest processes write who ran when, and where that outlives them; default: in `runtime`, for as
            long as the guest is there.
    """

    state: FilePath
    runtime: FilePath
    witness: FilePath | None = None


def _known_host(text: str) -> str:
    """Refuses a network with bits behind its mask: it would be taken for a name, which nothing has."""
    if "/" in text:
        ip_network(text)
    elif not _is_host(text):
        raise ValueError(f"{text!r} is no host name, no address, and no network such as 'fd00:1122:3344::/48'")
    return text


class Allow(_Section):
    """What guests of this host may open. Specs of peers are not trusted: everything is refused that is not here.

    Attributes:
        paths: Directories under which file backends and the files of volume requests may lie, after resolving links.
        hosts: Crucible downstairs and the hosts of URLs: addresses, networks (`fd00:1122:3344::/48`), or names as the
            specs spell them.
        interfaces: Names or patterns (`vnic*`) of network interfaces.
        features: Build features of specs: `failure-injection`.
        monitors: Directories under which the monitors of QEMUs that may be adopted lie, after resolving links.
        volumes: Where Crucible volumes lie on this host, by volume id (the embedded machine's model of Crucible).
    """

    paths: list[FilePath] = Field(default_factory=list)
    hosts: list[Annotated[str, AfterValidator(_known_host)]] = Field(default_factory=list)
    interfaces: list[str] = Field(default_factory=list)
    features: list[str] = Field(default_factory=list)
    monitors: list[FilePath] = Field(default_factory=list)
    volumes: dict[str, FilePath] = Field(default_factory=dict)


class Limits(_Section):
    """Caps, and every deadline of `engine.limits` under its own name."""

    max_ram_bytes: Annotated[int, Field(gt=0)] = 1 << 42
    deadlines: Deadlines = Deadlines()

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, tree: Any) -> Any:
        """In the file the deadlines stand beside the caps. Raises: ValueError."""
        if not isinstance(tree, dict):
            return tree
        if "deadlines" in tree:
            raise ValueError("deadlines: no such setting")
        rest = {name: value for name, value in tree.items() if name not in ROWS}
        return {**rest, "deadlines": read_deadlines({name: tree[name] for name in tree if name in ROWS})}


class JournalLimits(_Section):
    """When the ownership journal is compacted.

    Attributes:
        compact_bytes: Beyond that size, at the start of the daemon and while it serves.
        remember_s: What ended that recently is kept whatever it is.
    """

    compact_bytes: Annotated[int, Field(ge=4096)] = 1 << 20
    remember_s: Annotated[float, Field(ge=0)] = 600.0


def _known_spec_version(name: str) -> str:
    if name not in chain.CHAIN.names:
        raise ValueError(f"{name!r} is no spec version, allowed are {', '.join(chain.CHAIN.names)}")
    return name


def _known_payloads(payloads: dict[str, list[int]]) -> dict[str, list[int]]:
    """Opaque kinds belong to the hypervisor, which is not open yet; they are taken as they stand."""
    for kind, versions in payloads.items():
        if opaque.owner_of(kind) is not None:
            continue
        if kind not in registry.KINDS:
            raise ValueError(f"{kind!r} is no payload kind")
        readable = registry.KINDS[kind].readable
        if not set(versions) <= set(readable):
            raise ValueError(f"{kind} has the versions {', '.join(map(str, sorted(readable)))}")
    return payloads


Transport = Literal["sealed", "tls"]


def _each_once(words: list[str]) -> list[str]:
    if len(set(words)) < len(words):
        raise ValueError("one of them is named twice")
    return words


class Bulk(_Section):
    """How guest RAM travels.

    Attributes:
        transports: Most wanted first; what is not named is neither offered nor chosen.
    """

    transports: Annotated[list[Transport], Field(min_length=1), AfterValidator(_each_once)] = Field(
        default_factory=lambda: list[Transport](["sealed", "tls"])
    )


def _nbd(value: str) -> str:
    nbd_node(value)  # raises ValueError
    return value


class Qemu(_Section):
    """How this host runs QEMU; used when `hypervisor = "qemu"`.

    Attributes:
        binary: A name or a path.
        accelerator: "kvm" needs a /dev/kvm that works.
        machine_type: Of guests that begin here, so that hosts with an older QEMU can take them; the newest by default.
        cpu_model: Of guests whose spec says nothing about CPUID.
        network: "tap": NICs are tap interfaces of the host, by the name in the spec; "user": QEMU's own, behind an
            address translation, for tests and demonstrations.
        tracker: Whether guests get the library that tells which pages they write; without it QEMU has to.
        trust_tcg_stream: Move guests without the tracker also where QEMU is known to lose writes: before 9.0, with
            accelerator "tcg" and RAM that is a multiple of 256 KiB.
        regions: NBD addresses by the id of the Crucible volume that is served there.
    """

    binary: Annotated[str, Field(min_length=1)] = "qemu-system-x86_64"
    accelerator: Literal["tcg", "kvm"] = "tcg"
    machine_type: Annotated[str, Field(pattern=r"^pc-i440fx-[0-9]+\.[0-9]+$")] | None = None
    cpu_model: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "qemu64"
    network: Literal["tap", "user"] = "tap"
    tracker: bool = True
    trust_tcg_stream: bool = False
    regions: dict[str, Annotated[str, AfterValidator(_nbd)]] = Field(default_factory=dict)


SpecVersion = Annotated[str, AfterValidator(_known_spec_version)]


class Compat(_Section):
    """For a fleet of several releases: what this host offers and sends is narrowed to what the others know.

    Attributes:
        spec_versions: Instead of all; none at all is a mistake.
        payloads: By kind, instead of all its versions; kinds that are not named keep theirs.
    """

    spec_versions: Annotated[list[Annotated[str, AfterValidator(_known_spec_version)]], Field(min_length=1)] | None = (
        None
    )
    payloads: Annotated[dict[str, list[int]], AfterValidator(_known_payloads)] = Field(default_factory=dict)


class Config(_Section):
    """Everything a daemon needs to start. Relative paths are relative to the file.

    Attributes:
        hypervisor: What runs the guests of this host; it stays what it is for as long as there are any.
    """

    listen: Listen = Listen()
    tls: Tls
    directories: Directories
    allow: Allow = Allow()
    limits: Limits = Limits()
    journal: JournalLimits = JournalLimits()
    bulk: Bulk = Bulk()
    compat: Compat = Compat()
    hypervisor: Literal["embedded", "qemu"] = "embedded"
    qemu: Qemu = Qemu()

    def tls_files(self) -> TlsFiles:
        return TlsFiles(self.tls.ca, self.tls.certificate, self.tls.key, self.tls.crl)


def read_config(path: Path) -> Config:
    """The configuration in *path*.

    Raises:
        UsageError: `bad_config`, one line that says what, where and what is allowed.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise UsageError(f"{path}: {exc.strerror}", code="bad_config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path}: not TOML: {exc}", code="bad_config") from None
    try:
        config = Config.model_validate(tree)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        more = f" (and {exc.error_count() - 1} more)" if exc.error_count() > 1 else ""
        # Deadlines stand in `[limits]` itself; what is wrong with them names the row.
        dot = "." if where == "limits" else ": "
        raise UsageError(f"{path}: {where}{dot}{_plainly(first)}{more}", code="bad_config") from None
    return _absolute(config, path.parent)


def _plainly(error: Any) -> str:
    allowed = {"extra_forbidden": "no such setting", "missing": "this setting is needed"}
    return allowed.get(error["type"], str(error["msg"]).removeprefix("Value error, "))


def _absolute(config: Config, base: Path) -> Config:
    base = base.resolve()
    tls = Tls.model_construct(**{name: value and base / value for name, value in config.tls})
    directories = Directories.model_construct(**{name: value and base / value for name, value in config.directories})
    volumes = {name: base / path for name, path in config.allow.volumes.items()}
    placed = {name: [base / path for path in getattr(config.allow, name)] for name in ("paths", "monitors")}
    allow = config.allow.model_copy(update={**placed, "volumes": volumes})
    return config.model_copy(update={"tls": tls, "directories": directories, "allow": allow})
