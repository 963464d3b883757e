"""A proxy that records TLS traffic with the server's own certificate, for the proof in the demonstration."""

import asyncio
import contextlib
import ssl
import threading
from asyncio import StreamReader, StreamWriter
from pathlib import Path


class Recorder:
    """Forward connections to a port and record the bytes of both directions.

    One event loop does all reading and writing, since an SSL socket must not be used by two threads.

    Attributes:
        up: bytes sent to the server.
        down: bytes received from the server.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.up, self.down = bytearray(), bytearray()
        self._port = port
        self._client_tls = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server_tls.load_cert_chain(folder / "server.crt", folder / "server.key")
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        listening = asyncio.start_server(self._forward, "127.0.0.1", 0, ssl=server_tls)
        self._server = asyncio.run_coroutine_threadsafe(listening, self._loop).result()
        self._address = "127.0.0.1:{1}".format(*self._server.sockets[0].getsockname())

    @property
    def address(self) -> str:
        """Address to connect to."""
        return self._address

    def close(self) -> None:
        """Accept no more connections."""
        self._loop.call_soon_threadsafe(self._server.close)

    async def _forward(self, site: StreamReader, to_site: StreamWriter) -> None:
        with contextlib.suppress(OSError):  # the server is down
            server, to_server = await asyncio.open_connection(
                "127.0.0.1", self._port, ssl=self._client_tls, server_hostname="127.0.0.1"
            )
            await asyncio.gather(_copy(site, to_server, self.up), _copy(server, to_site, self.down))
        to_site.close()


async def _copy(source: StreamReader, target: StreamWriter, record: bytearray) -> None:
    with contextlib.suppress(OSError):
        while piece := await source.read(65536):
            record += piece
            target.write(piece)
            await target.drain()
    target.close()
