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
        self._server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._server_tls.load_cert_chain(folder / "server.crt", folder / "server.key")
        self._listener = socket.create_server(("127.0.0.1", 0))
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
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._forward, args=(connection,), daemon=True).start()

    def _forward(self, connection: socket.socket) -> None:
        # the handshake is done here: a site that is killed in the middle of it must not stop the others
        with (
            connection,
            contextlib.suppress(OSError),
            self._server_tls.wrap_socket(connection, server_side=True) as site,
        ):
            plain = socket.create_connection(("127.0.0.1", self._port))  # fails if the server is down
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
