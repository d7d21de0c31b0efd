"""An HTTPS client for host daemons: mutual TLS, the daemon's identity checked, errors mapped once, here."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import httpx2
import trio

from vmmigrate.api.connecting import ClosingTransport
from vmmigrate.errors import (
    HypervisorError,
    IdentityError,
    PeerError,
    RequestError,
    SpecError,
    TransportError,
    UsageError,
    VmMigrateError,
)
from vmmigrate.net.identity import Identity
from vmmigrate.net.tls import TlsFiles, client_context
from vmmigrate.net.tls_errors import map_tls_errors

REQUEST_DEADLINE_S = 30.0

_ERROR_BY_STATUS: Mapping[int, type[VmMigrateError]] = {
    400: UsageError,
    403: IdentityError,
    404: RequestError,
    409: RequestError,
    413: UsageError,
    422: SpecError,
    502: HypervisorError,
}


class HostClient:
    """One daemon's control API.

    Every call raises TransportError or IdentityError when the daemon cannot be reached or is not who it should be, and
    otherwise the daemon's own error with its code.
    """

    def __init__(self, url: str, client: httpx2.AsyncClient) -> None:
        self.url = url
        self._client = client

    async def get(self, path: str, **params: str) -> Any:
        return await self._request("GET", path, params=params)

    async def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        text: str | None = None,
        deadline_s: float = REQUEST_DEADLINE_S,
    ) -> Any:
        """Post a JSON body; *text* is JSON text to send as it is. *deadline_s*: of what may take longer."""
        if text is not None:
            headers = {"content-type": "application/json"}
            return await self._request("POST", path, content=text.encode(), headers=headers, timeout=deadline_s)
        return await self._request("POST", path, json=dict(body or {}), timeout=deadline_s)

    async def delete(self, path: str) -> Any:
        return await self._request("DELETE", path)

    async def _request(self, method: str, path: str, **arguments: Any) -> Any:
        doing = f"{method} {self.url}{path}"
        with _foreign_errors(doing):
            reply = await self._client.request(method, path, **arguments)
        if reply.status_code < 400:
            return reply.json() if reply.content else None
        raise _error_of(reply, doing)


@contextlib.asynccontextmanager
async def open_client(url: str, files: TlsFiles, expected: Identity | None = None) -> AsyncIterator[HostClient]:
    """A client for the daemon at *url*.

    Args:
        expected: The only identity that may answer; None accepts any host of our trust domain.

    Raises: UsageError, IdentityError: about our own certificate files, or *url* is not https.
    """
    if not url.startswith("https://"):
        raise UsageError(f"{url}: not the address of a daemon, needed is https://HOST:PORT", code="bad_url")
    context = client_context(files, expected)
    transport = ClosingTransport(context, most=8)
    async with httpx2.AsyncClient(
        base_url=url, transport=transport, timeout=REQUEST_DEADLINE_S, trust_env=False
    ) as client:
        yield HostClient(url, client)


@contextlib.contextmanager
def _foreign_errors(doing: str) -> Iterator[None]:
    try:
        with map_tls_errors(doing, first_answer=True):
            yield
    except httpx2.InvalidURL as exc:
        raise UsageError(f"{doing}: not an address ({exc})", code="bad_url") from exc
    except httpx2.TimeoutException as exc:
        raise TransportError(f"{doing}: no answer within {REQUEST_DEADLINE_S:g} s", code="timed_out") from exc
    except httpx2.HTTPError as exc:
        raise _mapped_cause(exc, doing) from exc


def _mapped_cause(exc: BaseException, doing: str) -> VmMigrateError:
    """The first error of ours, or of the network, behind what the HTTP library made of it."""
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, VmMigrateError):
            return cause
        if isinstance(cause, OSError | trio.BrokenResourceError):
            try:
                with map_tls_errors(doing, first_answer=True):
                    raise cause
            except VmMigrateError as mapped:
                return mapped
        cause = cause.__cause__ or cause.__context__
    if isinstance(exc, httpx2.RemoteProtocolError | httpx2.ReadError):
        return TransportError(
            f"{doing}: the daemon closed the connection without an answer; it may have refused our certificate or"
            " role, which its log would say",
            code="closed_after_handshake",
        )
    return TransportError(f"{doing}: {exc or type(exc).__name__}", code="unreachable")


def _error_of(reply: httpx2.Response, doing: str) -> VmMigrateError:
    try:
        error = reply.json()["error"]
        code, text, details = str(error["code"]), str(error["message"]), dict(error.get("details") or {})
    except (ValueError, KeyError, TypeError):
        return PeerError(f"{doing}: HTTP {reply.status_code} without a reason", code="bad_reply")
    return _ERROR_BY_STATUS.get(reply.status_code, PeerError)(text, code=code, details=details)
