"""Flower's commands as processes, with what is safe as the default."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from idiolect.errors import UsageError

SAFE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
}
"""Nothing calls home, nothing is installed at run time, and work that has come is begun at once."""

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
    return {**os.environ, **SAFE, "FLWR_HOME": str(private(home)), "PATH": path}


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
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def flwr(
    arguments: Sequence[str], home: Path, output: int | IO[bytes] | None = subprocess.PIPE
) -> subprocess.CompletedProcess[bytes]:
    """Run Flower's command line once."""
    command = [sys.executable, "-c", "from flwr.cli.app import app; app()", *arguments]
    return subprocess.run(command, env=environment(home), stdout=output, stderr=subprocess.STDOUT, check=False)


def connect(home: Path, server: str, authority: Path | None) -> None:
    """Write Flower's settings for its command line: where the server is, and whom it trusts."""
    private(home)
    trust = "insecure = true" if authority is None else f"root-certificates = {json.dumps(str(authority.resolve()))}"
    text = f'[superlink]\ndefault = "{LINK}"\n\n[superlink.{LINK}]\naddress = {json.dumps(server)}\n{trust}\n'
    (home / "config.toml").write_text(text)


def free_port() -> int:
    """Return a port of this machine's loopback that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def last_lines(log: Path, count: int = 3) -> str:
    """Return the end of a log in one line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-count:])
