"""Run Flower's commands as processes, with safe settings by default."""

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

from idiolect.flower.system.files import private_folder

SAFE_SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
}
"""Environment variables of Flower's commands.

No telemetry, no update checks, no packages installed at run time, and a short poll interval for new work.
"""

_FLWR = (sys.executable, "-c", "from flwr.cli.app import app; app()")

STARTED_BY_SERVE = "IDIOLECT_SERVED"
"""Environment variable that is set for processes under `idiolect serve`."""

CONNECTION = "idiolect"
"""Name of the connection to our server in Flower's settings."""


def flower_environment(home: Path) -> dict[str, str]:
    """Return the environment of Flower's commands: `SAFE_SETTINGS`, and `home` as Flower's own folder."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    own = {STARTED_BY_SERVE: "1", "FLWR_HOME": str(private_folder(home)), "PATH": path}
    return {**os.environ, **SAFE_SETTINGS, **own}


@contextmanager
def flower_process(command: str, arguments: Sequence[str], home: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run one of Flower's long-lived commands; it ends with this block, or with this process, however that ends.

    Args:
        command: its name.
        arguments: its arguments.
        home: Flower's folder; the command runs in the folder above.
        log: file to which its output is appended.
    """
    guard = Path(__file__).with_name("guard.py")
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
        process = subprocess.Popen(
            [sys.executable, str(guard), command, *arguments],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=flower_environment(home),
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


def run_flwr(arguments: Sequence[str], home: Path) -> tuple[dict[str, Any], str]:
    """Run Flower's command line once.

    Returns:
        The JSON object in its output, empty if there is none; and the whole output.
    """
    done = subprocess.run(
        [*_FLWR, *arguments, "--format", "json"],
        env=flower_environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    output = done.stdout.decode(errors="replace")
    for begin in re.finditer(r"^\{", output, re.MULTILINE):
        with suppress(ValueError):
            found: dict[str, Any] = json.JSONDecoder().raw_decode(output, begin.start())[0]
            return found, output
    return {}, output


def failure_reason(result: dict[str, Any], output: str) -> str:
    """Return in one line why `run_flwr` failed, from what it returned."""
    return str(result.get("error-message") or " ".join(output.split())[-300:])


def stream_flwr(arguments: Sequence[str], home: Path) -> Iterator[str]:
    """Run Flower's command line and yield its output line by line, as it is printed."""
    command = [*_FLWR, *arguments]
    with subprocess.Popen(
        command,
        env=flower_environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout
        yield from process.stdout


def write_connection(home: Path, server: str, authority: Path | None) -> None:
    """Write the settings of Flower's command line: the address of the server and the authority that it trusts."""
    private_folder(home)
    trust = "insecure = true" if authority is None else f"root-certificates = {json.dumps(str(authority.resolve()))}"
    text = (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = {json.dumps(server)}\n{trust}\n'
    )
    (home / "config.toml").write_text(text)


def exit_with_parent() -> None:
    """End this process, a coordinator's, when its parent ends: Flower would leave it running."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if STARTED_BY_SERVE in os.environ:
        threading.Thread(target=watch, daemon=True).start()


def free_port() -> int:
    """Return a free port on the loopback interface."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def last_error(log: Path) -> str:
    """Return in one line why the command that wrote a log has ended."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if "Exit Code" in line or "Error" in line]
    last = lines[errors[-1] + 1 : errors[-1] + 3] or lines[errors[-1] :] if errors else lines[-3:]
    return re.sub("\x1b\\[[0-9]+m", "", " ".join(last))
