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

    def close(self) -> None:
        """Take no more connections."""
        self._door.close()

    def _serve(self) -> None:
        while True:
            try:
                site, _ = self._door.accept()
            except ssl.SSLError:  # whoever it was, he does not trust this certificate, or has gone
                continue
            except OSError:
                return
            threading.Thread(target=self._pass_on, args=(site,), daemon=True).start()

    def _pass_on(self, site: ssl.SSLSocket) -> None:
        with site, contextlib.suppress(OSError):  # the server may be down
            plain = socket.create_connection(("127.0.0.1", self._port))
            with self._inner.wrap_socket(plain, server_hostname="127.0.0.1") as server:
                up = threading.Thread(target=_copy, args=(site, server, self.up), daemon=True)
                up.start()
                _copy(server, site, self.down)
                up.join()


def _copy(source: ssl.SSLSocket, sink: ssl.SSLSocket, kept: bytearray) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(65536):
            kept += piece
            sink.sendall(piece)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
