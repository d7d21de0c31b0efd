"""Socket addresses as Rust writes them: a numeric host and a port, in one canonical spelling."""

from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Annotated, Final

from vmmigrate.jsontext import Json
from vmmigrate.spec.decode import Codec, DecodeError, mismatch

_SOCKET_ADDRESS = re.compile(r"(?:\[(?P<v6>[^\]%]+)(?:%(?P<scope>[0-9]+))?\]|(?P<v4>[0-9.]+)):(?P<port>[0-9]+)")


class _SocketAddress(Codec):
    """A numeric host and a port; kept in canonical spelling."""

    def read(self, node: Json) -> str:
        if type(node) is not str:
            raise mismatch(node, "a socket address (a string)")
        canonical = canonical_socket_address(node)
        if canonical is None:
            raise DecodeError("invalid_value", "not a socket address; allowed: 'a.b.c.d:port', '[v6]:port'")
        return canonical


def canonical_socket_address(text: str) -> str | None:
    """The address in the one spelling in which it is written, or None when it is none.

    Ports may have leading zeros, octets may not, and a scope is a number.
    """
    found = _SOCKET_ADDRESS.fullmatch(text)
    if found is None:
        return None
    port, scope = _number(found["port"], 2**16), _number(found["scope"] or "0", 2**32)
    if port is None or scope is None:
        return None
    try:
        if found["v4"]:
            return f"{IPv4Address(found['v4'])}:{port}"
        address = IPv6Address(found["v6"])
    except AddressValueError:
        return None
    # Interpreters differ in how they write a mapped address.
    host = f"::ffff:{address.ipv4_mapped}" if address.ipv4_mapped else str(address)
    return f"[{host}%{scope}]:{port}" if scope else f"[{host}]:{port}"


def _number(digits: str, limit: int) -> int | None:
    """The number, unless it reaches the limit; digits of any length are cheap."""
    digits = digits.lstrip("0") or "0"
    return int(digits) if len(digits) <= 10 and int(digits) < limit else None


SOCKET_ADDRESS: Final = _SocketAddress()
SocketAddress = Annotated[str, SOCKET_ADDRESS]
