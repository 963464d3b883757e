"""`idiolect join`: a site, ready for the coordinator."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from idiolect.core.errors import UsageError
from idiolect.flower.load import load
from idiolect.flower.server.launch import free_port, last_words, private, running
from idiolect.flower.site.app import Site, place
from idiolect.flower.site.relay import SOCKET
from idiolect.flower.site.state import locked
from idiolect.flower.site.worker import Worker

AGAIN = 15.0
"""Seconds after which a site that was not let in knocks again."""


def join(app: str, name: str, server: str, folder: Path, insecure: bool, restored: bool) -> None:
    """Run a site until it is stopped: a process that has model, data and state at hand, and Flower's SuperNode.

    Args:
        app: the site's file, which calls its app ``app``; or ``file.py:name``.
        name: the client.
        server: ``host:port``.
        folder: `ca.crt`, the server's; `NAME.key`, the site's; `state`, which must not be lost.
        insecure: without encryption and key.
        restored: go on from the newest state at hand where the coordinator counts on a later one.

    Raises:
        UsageError: if a file is missing or is no site's.
    """
    os.umask(0o077)  # what is personal is for its owner
    folder = private(folder)
    authority, key = folder / "ca.crt", folder / f"{name}.key"
    arguments = ["--superlink", server, "--host", "127.0.0.1"]
    if insecure:
        arguments += ["--insecure"]
    else:
        for path, hint in (
            (authority, "the coordinator has it"),
            (key, f"make it with `idiolect keys {folder} --site {name}`"),
        ):
            if not path.is_file():
                raise UsageError(f"{path} is missing: {hint}, or type --insecure")
        arguments += ["--root-certificates", str(authority), "--auth-supernode-private-key", str(key)]
    site, config = load(app, Site, "client_app"), {"client-id": name, "state-dir": str(private(folder / "state"))}
    place(config)
    locked(folder / f"{name}.lock")
    home, log, state = folder / "flower", folder / "flower.log", folder / "state"
    with tempfile.TemporaryDirectory(prefix="idiolect-") as door:
        own = {**config, SOCKET: f"{door}/site", "restored": restored}
        arguments += ["--node-config", " ".join(f"{key}={json.dumps(value)}" for key, value in own.items())]
        Worker(site, own, Path(door) / "site")
        print(f"idiolect: {name} joins {server}; what is personal stays in {state}", flush=True)
        while True:
            if _answers(server):
                begun = log.stat().st_size if log.exists() else 0
                with running("flower-supernode", [*arguments, "--port", str(free_port())], home, log) as process:
                    _watch(process, log, begun)
                why = f"{_cause(last_words(log), name)} (more in {log})"
            else:
                why = f"nobody answers at {server}"
            print(f"idiolect: {why}; trying again every {AGAIN:.0f} s", flush=True)
            time.sleep(AGAIN)


def _watch(process: subprocess.Popen[bytes], log: Path, begun: int) -> None:
    """Wait until Flower's process ends; say so when it has been let in."""
    inside = False
    while process.poll() is None:
        time.sleep(0.5)
        if not inside and b"SuperNode ID" in log.read_bytes()[begun:]:
            inside = True
            print("idiolect: let in; waiting for the coordinator", flush=True)


def _answers(server: str) -> bool:
    host, _, port = server.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            return True
    except ValueError:
        raise UsageError(f"{server!r} is no server: write HOST:PORT") from None
    except OSError:
        return False


def _cause(told: str, name: str) -> str:
    """Return what Flower's last words mean for people."""
    if "CERTIFICATE_VERIFY_FAILED" in told:
        return "ca.crt is not the authority of this server, or the server is known by another name: ask the coordinator"
    if "code: 2004" in told:
        return (
            f"not let in: the coordinator has no {name}.pub, or has turned it out; or {name} was cut off, and the "
            "server has not noticed yet, which takes a minute"
        )
    return f"cut off: {told}"
