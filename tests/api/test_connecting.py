"""The HTTP client leaves nothing behind, also when it is cancelled while it connects."""

from __future__ import annotations

from pathlib import Path

import trio

from vmmigrate.api.client import open_client
from vmmigrate.net import pki
from vmmigrate.net.identity import Identity, Role
from vmmigrate.net.tls import TlsFiles


async def test_a_handshake_that_is_cancelled_closes_its_socket(tmp_path: Path) -> None:
    pki.init_authority(tmp_path, "test.example")
    files = pki.issue(tmp_path, Identity("test.example", Role.OPERATOR, "tester"))
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    url = f"https://127.0.0.1:{listener.socket.getsockname()[1]}"
    async with listener, open_client(url, TlsFiles(files.ca, files.certificate, files.key)) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.get, "/v1/host")
            mute = await listener.accept()
            await mute.receive_some(1)  # the handshake has begun
            nursery.cancel_scope.cancel()

        with trio.fail_after(5):
            while await mute.receive_some(65_536):
                pass
        await mute.aclose()
