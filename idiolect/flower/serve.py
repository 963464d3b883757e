"""`idiolect serve`: the server that sites join, and the keys it lets in."""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack
from pathlib import Path

from idiolect.errors import UsageError
from idiolect.flower.keys import SERVER
from idiolect.flower.launch import LINK, connect, flwr, last_lines, private, running

LOOK = 2.0
"""Seconds between two looks at the keys that may join."""


def serve(folder: Path, host: str, port: int, insecure: bool) -> None:
    """Run Flower's SuperLink until it is stopped.

    Args:
        folder: certificates (see `keys`); `sites`, with the public key of each site that may join, which is read
            again and again; what Flower must find again after a restart; and the runs.
        host: address to listen on.
        port: port to listen on.
        insecure: without encryption, and whoever reaches the port may join.

    Raises:
        UsageError: if a certificate is missing, or the server ends by itself.
    """
    folder = private(folder)
    home, log = folder / "flower", folder / "flower.log"
    arguments = ["--host", host, "--port", str(port), "--database", str(folder / "flower.db")]
    if insecure:
        arguments += ["--insecure"]
    else:
        authority, _, certificate, key = (folder / name for name in SERVER)
        missing = [path for path in (authority, certificate, key) if not path.is_file()]
        if missing:
            raise UsageError(
                f"{missing[0]} is missing: make it with `idiolect keys {folder} --host NAME`, or type --insecure"
            )
        arguments += [
            "--ssl-ca-certfile",
            str(authority),
            "--ssl-certfile",
            str(certificate),
            "--ssl-keyfile",
            str(key),
        ]
        arguments += ["--enable-supernode-auth"]
    connect(home, f"{_reachable(host)}:{port}", None if insecure else folder / SERVER[0])
    with ExitStack() as stack:
        process = stack.enter_context(running("flower-superlink", arguments, home, log))
        while process.poll() is None and not _listens(host, port):
            time.sleep(0.1)
        if process.poll() is None:
            lock = (
                "without encryption or keys"
                if insecure
                else "with TLS; it lets in the keys in " + str(folder / "sites")
            )
            print(f"idiolect: serving on {host}:{port} {lock}", flush=True)
        doorkeeper = None if insecure else Doorkeeper(folder)
        while process.poll() is None:
            if doorkeeper:
                doorkeeper.look()
            time.sleep(LOOK)
        raise UsageError(f"the server has ended by itself: {last_lines(log)} (all of it in {log})")


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
                self._say(f"{name} may join no longer", self._command("unregister", node))
                del self._admitted[name]
                self._save()
        for name, key in found.items():
            if name not in self._admitted and self._odd.get(name) != key:
                self._admit(name, key)

    def _admit(self, name: str, key: str) -> None:
        path = str(self._folder / "sites" / f"{name}.pub")
        told = self._command("register", path, "--name", name)
        node = next((str(t["node-id"]) for t in _json_in(told) if "node-id" in t), None)
        if node is None:
            self._odd[name] = key
            self._say(f"{name} cannot be let in", told)
            return
        self._admitted[name] = [node, key]
        self._save()
        self._say(f"{name} may join", "")

    def _command(self, verb: str, *arguments: str) -> str:
        done = flwr(["supernode", verb, arguments[0], LINK, *arguments[1:], "--format", "json"], self._home)
        return done.stdout.decode(errors="replace")

    def _save(self) -> None:
        self._list.write_text(json.dumps(self._admitted))

    def _say(self, what: str, told: str) -> None:
        failed = [t["error-message"] for t in _json_in(told) if t.get("error-message")]
        print(f"idiolect: {what}{': ' + failed[0] if failed else ''}", flush=True)


def _json_in(text: str) -> list[dict[str, str]]:
    """Return the JSON object in what a command printed, if there is one."""
    start = text.find("{")
    try:
        return [json.loads(text[start:])] if start >= 0 else []
    except ValueError:
        return []


def _listens(host: str, port: int) -> bool:
    with socket.socket() as line:
        line.settimeout(1.0)
        return line.connect_ex((_reachable(host), port)) == 0


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "") else host
