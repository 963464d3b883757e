"""Listens in on a connection with TLS, with the server's own certificate: for the demonstration's proof."""

import contextlib
import socket
import ssl
import threading
from pathlib import Path


class Tap:
    """Passes connections on to a port and keeps the bytes of both ways.

    Attributes:
        up: what went to the server.
        down: what came from it.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.up, self.down = bytearray(), bytearray()
        self._port = port
        self._inner = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        outer = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        outer.load_cert_chain(folder / "server.crt", folder / "server.key")
        self._door = outer.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True)
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def address(self) -> str:
        """Where to connect to."""
        return f"127.0.0.1:{self._door.getsockname()[1]}"

    def _serve(self) -> None:
        while True:
            try:
                site, _ = self._door.accept()
                plain = socket.create_connection(("127.0.0.1", self._port))
                server = self._inner.wrap_socket(plain, server_hostname="127.0.0.1")
            except OSError:  # a site that was killed, a server that is down
                continue
            for source, sink, kept in ((site, server, self.up), (server, site, self.down)):
                threading.Thread(target=_copy, args=(source, sink, kept), daemon=True).start()


def _copy(source: ssl.SSLSocket, sink: ssl.SSLSocket, kept: bytearray) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(65536):
            kept += piece
            sink.sendall(piece)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
