"""Flower's commands as processes, with what is safe as the default."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from idiolect.core.errors import UsageError

SAFE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
}
"""Nothing calls home, nothing is installed at run time, and work that has come is begun at once."""

_FLWR = (sys.executable, "-c", "from flwr.cli.app import app; app()")

SERVED = "IDIOLECT_SERVED"
"""Set for what runs under `idiolect serve`."""

LINK = "idiolect"
"""Our name for the connection in Flower's settings."""


def private(folder: Path) -> Path:
    """Return a folder that only its owner can enter, made if it is not there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise UsageError(f"cannot use {folder} as a folder of one's own: {error.strerror}") from None
    return folder.resolve()


def environment(home: Path) -> dict[str, str]:
    """Return the environment of Flower's commands: `SAFE`, and a folder of their own."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, **SAFE, SERVED: "1", "FLWR_HOME": str(private(home)), "PATH": path}


@contextmanager
def running(command: str, arguments: Sequence[str], home: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run one of Flower's long-lived commands; it ends with this block, or with this process, however that ends.

    Args:
        command: its name.
        arguments: for it.
        home: Flower's folder, in which it also works.
        log: what it prints is added there.
    """
    guard = Path(__file__).with_name("guard.py")
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
        process = subprocess.Popen(
            [sys.executable, str(guard), command, *arguments],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(home),
            cwd=home.parent,
            umask=0o077,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def flwr(arguments: Sequence[str], home: Path) -> tuple[dict[str, Any], str]:
    """Run Flower's command line once; return the JSON in what it prints, empty if there is none, and all of it."""
    done = subprocess.run(
        [*_FLWR, *arguments, "--format", "json"],
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    told = done.stdout.decode(errors="replace")
    for begin in re.finditer(r"^\{", told, re.MULTILINE):
        with suppress(ValueError):
            found: dict[str, Any] = json.JSONDecoder().raw_decode(told, begin.start())[0]
            return found, told
    return {}, told


def reason(told: dict[str, Any], text: str) -> str:
    """Return why a command of Flower's failed, in one line."""
    return str(told.get("error-message") or " ".join(text.split())[-300:])


def watch(arguments: Sequence[str], home: Path) -> Iterator[str]:
    """Run Flower's command line and yield its lines as they come."""
    command = [*_FLWR, *arguments]
    with subprocess.Popen(
        command, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout
        yield from process.stdout


def connect(home: Path, server: str, authority: Path | None) -> None:
    """Write Flower's settings for its command line: where the server is, and whom it trusts."""
    private(home)
    trust = "insecure = true" if authority is None else f"root-certificates = {json.dumps(str(authority.resolve()))}"
    text = f'[superlink]\ndefault = "{LINK}"\n\n[superlink.{LINK}]\naddress = {json.dumps(server)}\n{trust}\n'
    (home / "config.toml").write_text(text)


def end_with_the_server() -> None:
    """End this process, a coordinator's, when the one that started it has gone: Flower would leave it at work."""
    starter = os.getppid()

    def watch_it() -> None:
        while os.getppid() == starter:
            time.sleep(0.5)
        os._exit(1)

    if SERVED in os.environ:
        threading.Thread(target=watch_it, daemon=True).start()


def free_port() -> int:
    """Return a port of this machine's loopback that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def last_words(log: Path) -> str:
    """Return why the command that wrote a log has ended, in one line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    ends = [i for i, line in enumerate(lines) if "Exit Code" in line or "Error" in line]
    told = lines[ends[-1] + 1 : ends[-1] + 3] or lines[ends[-1] :] if ends else lines[-3:]
    return re.sub("\x1b\\[[0-9]+m", "", " ".join(told))
