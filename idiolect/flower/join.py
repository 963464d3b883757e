"""`idiolect join`: a site, ready for the coordinator."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from idiolect.errors import UsageError
from idiolect.flower.launch import free_port, last_words, private, running
from idiolect.flower.relay import SOCKET
from idiolect.flower.site import Site, place
from idiolect.flower.worker import Worker

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
    site = load_site(app)
    home, log, state = folder / "flower", folder / "flower.log", private(folder / "state")
    with tempfile.TemporaryDirectory(prefix="idiolect-") as door:
        config = {"client-id": name, "state-dir": str(state), SOCKET: f"{door}/site", "restored": restored}
        place(config)
        arguments += ["--node-config", " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())]
        Worker(site, config, Path(door) / "site")
        print(f"idiolect: {name} joins {server}; what is personal stays in {state}", flush=True)
        while True:
            with running("flower-supernode", [*arguments, "--port", str(free_port())], home, log) as process:
                process.wait()
            print(
                f"idiolect: not let in, or cut off: {last_words(log)} (more in {log}) If the coordinator does not "
                f"have {name}.pub yet, send it. Knocking again in {AGAIN:.0f} s",
                flush=True,
            )
            time.sleep(AGAIN)


def load_site(app: str) -> Site:
    """Return the site that a file makes; modules beside the file can be imported by it.

    Raises:
        UsageError: if there is no such file, or no site in it.
    """
    file, _, name = app.partition(":")
    path = Path(file).resolve()
    if not path.is_file():
        raise UsageError(f"{path} does not exist: give the file that makes the site's app")
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("__site__", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules["__site__"] = module
    spec.loader.exec_module(module)
    found = getattr(module, name or "app", None)
    if not isinstance(found, Site):
        raise UsageError(f"{path} has no {name or 'app'} = idiolect.flower.client_app(...)")
    return found
