"""`idiolect serve`: run the server that sites join."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

from idiolect.core.errors import UsageError
from idiolect.flower.server.keys import SERVER_FILES, fingerprint
from idiolect.flower.server.proxy import start_proxy
from idiolect.flower.system.files import private_folder
from idiolect.flower.system.launch import (
    CONNECTION,
    failure_reason,
    flower_process,
    free_port,
    last_error,
    run_flwr,
    write_connection,
)
from idiolect.storage.run_directory import write_whole

KEY_WAS_REMOVED = "this key was removed before, and Flower accepts no key twice: the site must create a new one"

KEY_POLL = 2.0
"""Seconds between two checks of the folder with the sites' public keys."""


def serve(folder: Path, host: str, port: int, insecure: bool) -> None:
    """Run the server until it is stopped: Flower's SuperLink on the loopback interface, and a proxy for sites.

    Args:
        folder: folder of the certificates (see `keys`); of the public keys of the sites that may join, in `sites`;
            of Flower's database and log; and of the runs.
        host: address of the proxy.
        port: port of the proxy.
        insecure: no encryption and no authentication: anyone who reaches the port may join.

    Raises:
        UsageError: if a certificate is missing, the port cannot be used, or Flower ends by itself.
    """
    os.umask(0o077)  # keys and models are for their owner only
    folder = private_folder(folder)
    home, log, flower_port = folder / "flower", folder / "flower.log", free_port()
    arguments = ["--host", "127.0.0.1", "--port", str(flower_port), "--database", str(folder / "flower.db")]
    certificates = None if insecure else _certificates(folder)
    if certificates is None:
        arguments += ["--insecure"]
    else:
        options = ("--ssl-ca-certfile", "--ssl-certfile", "--ssl-keyfile")
        arguments += [word for pair in zip(options, map(str, certificates), strict=True) for word in pair]
        arguments += ["--enable-supernode-auth"]
    write_connection(home, f"127.0.0.1:{flower_port}", certificates[0] if certificates else None)
    with flower_process("flower-superlink", arguments, home, log) as process:
        while process.poll() is None and not _listens(flower_port):
            time.sleep(0.1)
        start_proxy(host, port, flower_port, certificates)
        security = f"with TLS, for the keys in {folder / 'sites'}" if certificates else "without TLS and keys"
        print(f"idiolect: serving on {host}:{port} {security}", flush=True)
        registry = SiteRegistry(folder) if certificates else None
        while process.poll() is None:
            if registry:
                registry.update()
            time.sleep(KEY_POLL)
    raise UsageError(f"Flower's server has ended: {last_error(log)} (details in {log})")


def _certificates(folder: Path) -> tuple[Path, Path, Path]:
    authority, _, certificate, key = (folder / name for name in SERVER_FILES)
    for path in (authority, certificate, key):
        if not path.is_file():
            command = f"idiolect keys {folder} --host NAME"
            raise UsageError(f"{path} is missing: create it with `{command}`, or use --insecure")
    return authority, certificate, key


class SiteRegistry:
    """Register the public keys in the folder `sites` with Flower, and unregister those that are removed.

    Args:
        folder: folder of the server.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._home, self._file = folder, folder / "flower", folder / "sites.json"
        private_folder(folder / "sites")
        self._registered: dict[str, list[str]] = json.loads(self._file.read_text()) if self._file.exists() else {}
        self._rejected: dict[str, str] = {}

    def update(self) -> None:
        """Register new keys, and unregister those that are no longer in the folder."""
        keys = {path.stem: path.read_text() for path in sorted((self._folder / "sites").glob("*.pub"))}
        for name, (node, key) in list(self._registered.items()):
            if keys.get(name) != key:
                run_flwr(["supernode", "unregister", node, CONNECTION], self._home)
                del self._registered[name]
                self._save(f"site {name} removed")
        for name, key in keys.items():
            if name not in self._registered and self._rejected.get(name) != key:
                self._register(name, key)

    def _register(self, name: str, key: str) -> None:
        path = self._folder / "sites" / f"{name}.pub"
        result, output = run_flwr(["supernode", "register", str(path), CONNECTION, "--name", name], self._home)
        if "node-id" in result:
            self._registered[name] = [str(result["node-id"]), key]
            self._save(f"site {name} may join: {fingerprint(key)}")
        else:
            self._rejected[name] = key
            reason = KEY_WAS_REMOVED if "already in use" in output else failure_reason(result, output)
            print(f"idiolect: key of site {name} rejected: {reason}", flush=True)

    def _save(self, event: str) -> None:
        write_whole(self._file, json.dumps(self._registered).encode())
        print(f"idiolect: {event}", flush=True)


def _listens(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0
