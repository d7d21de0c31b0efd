"""How the HTTP client connects: as its library does, but a TLS handshake that is cancelled closes its socket.

The library closes it after errors only (httpcore2 2.16, `TrioStream.start_tls`): after a cancel the socket was left to
the garbage collector.
"""

from __future__ import annotations

from typing import Any

import httpcore2
import httpx2
import trio

from vmmigrate.net.tls import TlsContext


class ClosingTransport(httpx2.AsyncHTTPTransport):
    """Connections over TLS with *context*, at most *most* at once."""

    def __init__(self, context: TlsContext, most: int) -> None:
        super().__init__(verify=context)
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=context, max_connections=most, network_backend=_ClosingBackend()
        )


class _ClosingBackend(httpcore2.TrioBackend):
    async def connect_tcp(self, *args: Any, **options: Any) -> httpcore2.AsyncNetworkStream:
        return _ClosingStream(await super().connect_tcp(*args, **options))


class _ClosingStream(httpcore2.AsyncNetworkStream):
    """A TCP stream that does nothing of its own but to close when its handshake is cancelled."""

    def __init__(self, stream: httpcore2.AsyncNetworkStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return await self._stream.read(max_bytes, timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(self, *args: Any, **options: Any) -> httpcore2.AsyncNetworkStream:
        try:
            return await self._stream.start_tls(*args, **options)
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await self._stream.aclose()
            raise

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
