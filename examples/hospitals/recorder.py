"""A proxy that records TLS traffic with the server's own certificate, for the proof in the demonstration."""

import contextlib
import socket
import ssl
import threading
from pathlib import Path


class Recorder:
    """Forward connections to a port and record the bytes of both directions.

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
        self._listener = server_tls.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True)
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def address(self) -> str:
        """Address to connect to."""
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        """Accept no more connections."""
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                site, _ = self._listener.accept()
            except ssl.SSLError:  # the client does not trust this certificate, or has disconnected
                continue
            except OSError:
                return
            threading.Thread(target=self._forward, args=(site,), daemon=True).start()

    def _forward(self, site: ssl.SSLSocket) -> None:
        with site, contextlib.suppress(OSError):  # the server may be down
            plain = socket.create_connection(("127.0.0.1", self._port))
            with self._client_tls.wrap_socket(plain, server_hostname="127.0.0.1") as server:
                up = threading.Thread(target=_copy, args=(site, server, self.up), daemon=True)
                up.start()
                _copy(server, site, self.down)
                up.join()


def _copy(source: ssl.SSLSocket, target: ssl.SSLSocket, record: bytearray) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(65536):
            record += piece
            target.sendall(piece)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
