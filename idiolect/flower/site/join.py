"""`idiolect join`: run a site."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from idiolect.core.errors import UsageError
from idiolect.flower.app_file import load_app
from idiolect.flower.site.app import Site, site_settings
from idiolect.flower.site.relay import SOCKET
from idiolect.flower.site.relay_server import RelayServer
from idiolect.flower.system.files import lock_file, private_folder
from idiolect.flower.system.launch import flower_process, free_port, last_error

RETRY = 15.0
"""Seconds between two attempts to connect to the server."""


def join(app: str, name: str, server: str, folder: Path, insecure: bool, restored: bool) -> None:
    """Run a site until it is stopped: a worker that keeps model, data and state in memory, and Flower's SuperNode.

    Args:
        app: the site's file, which creates ``app``; or ``FILE.py:NAME``.
        name: name of the client.
        server: ``HOST:PORT``.
        folder: folder of the server's `ca.crt`, the site's key `NAME.key`, and the personal state in `state`.
        insecure: no encryption and no key.
        restored: if the state that the coordinator asks for is missing, continue from the newest one before it.

    Raises:
        UsageError: if a file is missing or invalid, or another process uses the folder.
    """
    os.umask(0o077)  # all files are for their owner only
    folder = private_folder(folder)
    arguments = ["--superlink", server, "--host", "127.0.0.1", *_credentials(folder, name, insecure)]
    site, state = load_app(app, Site, "client_app"), private_folder(folder / "state")
    config: dict[str, object] = {"client-id": name, "state-dir": str(state)}
    site_settings(config)
    lock_file(folder / f"{name}.lock")
    with tempfile.TemporaryDirectory(prefix="idiolect-") as socket_folder:
        socket_path = Path(socket_folder) / "site"
        config |= {SOCKET: str(socket_path), "restored": restored}
        arguments += ["--node-config", " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())]
        RelayServer(site, config, socket_path)
        print(f"idiolect: client {name} joins {server}; personal state is kept in {state}", flush=True)
        while True:
            reason = _run_node(arguments, folder, name) if _is_reachable(server) else f"no server answers at {server}"
            print(f"idiolect: {reason}; retrying every {RETRY:.0f} s", flush=True)
            time.sleep(RETRY)


def _credentials(folder: Path, name: str, insecure: bool) -> list[str]:
    """Return the arguments of Flower's SuperNode for encryption and authentication."""
    if insecure:
        return ["--insecure"]
    authority, key = folder / "ca.crt", folder / f"{name}.key"
    for path, hint in (
        (authority, "ask the coordinator for it"),
        (key, f"create it with `idiolect keys {folder} --site {name}`"),
    ):
        if not path.is_file():
            raise UsageError(f"{path} is missing: {hint}, or use --insecure")
    return ["--root-certificates", str(authority), "--auth-supernode-private-key", str(key)]


def _run_node(arguments: list[str], folder: Path, name: str) -> str:
    """Run Flower's SuperNode until it ends; return the reason."""
    log = folder / "flower.log"
    start = log.stat().st_size if log.exists() else 0
    with flower_process("flower-supernode", [*arguments, "--port", str(free_port())], folder / "flower", log) as node:
        _watch(node, log, start)
    return f"{_explain(last_error(log), name)} (details in {log})"


def _watch(process: subprocess.Popen[bytes], log: Path, start: int) -> None:
    """Wait until Flower's process ends; print a line when it has connected."""
    connected = False
    while process.poll() is None:
        time.sleep(0.5)
        if not connected and b"SuperNode ID" in log.read_bytes()[start:]:
            connected = True
            print("idiolect: connected; waiting for the coordinator", flush=True)


def _is_reachable(server: str) -> bool:
    host, _, port = server.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            return True
    except ValueError:
        raise UsageError(f"invalid server {server!r}: use HOST:PORT") from None
    except OSError:
        return False


def _explain(error: str, name: str) -> str:
    """Return an explanation of Flower's last error."""
    if "CERTIFICATE_VERIFY_FAILED" in error:
        return (
            "ca.crt is not the authority of this server, or the certificate has another host name: ask the coordinator"
        )
    if "code: 2004" in error:
        return (
            f"rejected: the coordinator has no {name}.pub, or has removed it; or {name} was disconnected and the "
            "server has not noticed yet, which takes a minute"
        )
    return f"disconnected: {error}"
