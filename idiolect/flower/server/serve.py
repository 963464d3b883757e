"""`idiolect serve`: the server that sites join, and the keys it lets in."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

from idiolect.core.errors import UsageError
from idiolect.flower.server.keys import SERVER, fingerprint
from idiolect.flower.server.launch import LINK, connect, flwr, free_port, last_words, private, reason, running
from idiolect.flower.server.proxy import start_proxy
from idiolect.storage.run_directory import write_whole

SPENT = "this key has been let in and turned out before, and no key is taken twice: the site has to make a new one"

LOOK = 2.0
"""Seconds between two looks at the keys that may join."""


def serve(folder: Path, host: str, port: int, insecure: bool) -> None:
    """Run the server until it is stopped: Flower's SuperLink on this machine alone, and a door for sites.

    Args:
        folder: certificates (see `keys`); `sites`, with the public key of each site that may join, which is read
            again and again; what Flower must find again after a restart; and the runs.
        host: address of the door.
        port: port of the door.
        insecure: without encryption, and whoever reaches the port may join.

    Raises:
        UsageError: if a certificate is missing, or the server ends by itself.
    """
    os.umask(0o077)  # keys and models are for their owner
    folder = private(folder)
    home, log, behind = folder / "flower", folder / "flower.log", free_port()
    arguments = ["--host", "127.0.0.1", "--port", str(behind), "--database", str(folder / "flower.db")]
    certificates = None if insecure else _certificates(folder)
    if certificates is None:
        arguments += ["--insecure"]
    else:
        options = ("--ssl-ca-certfile", "--ssl-certfile", "--ssl-keyfile")
        arguments += [word for pair in zip(options, map(str, certificates), strict=True) for word in pair]
        arguments += ["--enable-supernode-auth"]
    connect(home, f"127.0.0.1:{behind}", certificates[0] if certificates else None)
    with running("flower-superlink", arguments, home, log) as process:
        while process.poll() is None and not _listens(behind):
            time.sleep(0.1)
        start_proxy(host, port, behind, certificates)
        lock = (
            f"with TLS, for the keys in {folder / 'sites'}" if certificates else "without encryption, for whoever comes"
        )
        print(f"idiolect: serving on {host}:{port} {lock}", flush=True)
        doorkeeper = Doorkeeper(folder) if certificates else None
        while process.poll() is None:
            if doorkeeper:
                doorkeeper.look()
            time.sleep(LOOK)
    raise UsageError(f"the server has ended by itself: {last_words(log)} (all of it in {log})")


def _certificates(folder: Path) -> tuple[Path, Path, Path]:
    authority, _, certificate, key = (folder / name for name in SERVER)
    for path in (authority, certificate, key):
        if not path.is_file():
            made = f"idiolect keys {folder} --host NAME"
            raise UsageError(f"{path} is missing: make it with `{made}`, or type --insecure")
    return authority, certificate, key


class Doorkeeper:
    """Keeps the list of sites that may join equal to the public keys in a folder.

    Args:
        folder: of the server.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._home, self._list = folder, folder / "flower", folder / "sites.json"
        private(folder / "sites")
        self._admitted: dict[str, list[str]] = json.loads(self._list.read_text()) if self._list.exists() else {}
        self._odd: dict[str, str] = {}

    def look(self) -> None:
        """Admit who is new in the folder, and turn out who is no longer there."""
        found = {path.stem: path.read_text() for path in sorted((self._folder / "sites").glob("*.pub"))}
        for name, (node, key) in list(self._admitted.items()):
            if found.get(name) != key:
                flwr(["supernode", "unregister", node, LINK], self._home)
                del self._admitted[name]
                self._save(f"{name} may join no longer")
        for name, key in found.items():
            if name not in self._admitted and self._odd.get(name) != key:
                self._admit(name, key)

    def _admit(self, name: str, key: str) -> None:
        path = self._folder / "sites" / f"{name}.pub"
        told, text = flwr(["supernode", "register", str(path), LINK, "--name", name], self._home)
        if "node-id" in told:
            self._admitted[name] = [str(told["node-id"]), key]
            self._save(f"{name} may join: {fingerprint(key)}")
        else:
            self._odd[name] = key
            why = SPENT if "already in use" in text else reason(told, text)
            print(f"idiolect: {name} cannot be let in: {why}", flush=True)

    def _save(self, what: str) -> None:
        write_whole(self._list, json.dumps(self._admitted).encode())
        print(f"idiolect: {what}", flush=True)


def _listens(port: int) -> bool:
    with socket.socket() as line:
        return line.connect_ex(("127.0.0.1", port)) == 0
