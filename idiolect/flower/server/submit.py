"""`idiolect submit`: send a coordinator's file to the server, which runs it."""

from __future__ import annotations

import ast
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from flwr.serverapp import ServerApp

from idiolect.core.errors import UsageError
from idiolect.flower.app_file import load_app, locate_app
from idiolect.flower.site import relay
from idiolect.flower.system.launch import CONNECTION, failure_reason, run_flwr, stream_flwr

_FLOWER_LINES = re.compile(r"INFO|^Using SuperLink|^Successfully installed|^\s*$")
"""Log lines of Flower that say nothing about the run."""

PROJECT = """[project]
name = "{name}"
version = "1.0.0"
description = "A federation of idiolect"
license = "Apache-2.0"
dependencies = ["flwr"]

[tool.flwr.app]
publisher = "idiolect"

[tool.flwr.app.components]
serverapp = "{module}:{app}"
clientapp = "relay:app"

[tool.flwr.app.config]
"""
"""Template of the pyproject.toml that Flower needs."""


def submit(app: str, folder: Path) -> int:
    """Send a coordinator's file to the server and print the log of the run until it ends.

    All Python files in the same folder are sent too, and nothing else.

    Args:
        app: the file, which creates ``app``; or ``FILE.py:NAME``.
        folder: folder of the server, which must be running.

    Returns:
        0 if the run has completed, 1 if not.

    Raises:
        UsageError: if the file is invalid, or the server cannot be reached.
    """
    path, name = locate_app(app)
    home = folder.resolve() / "flower"
    if not (home / "config.toml").is_file():
        raise UsageError(f"there is no server in {folder}: start `idiolect serve {folder}` first")
    load_app(app, ServerApp, "server_app")  # errors in the file are reported here and not on the server
    if name not in _assigned_names(path):
        raise UsageError(f"{path} has no plain `{name} = idiolect.flower.server_app(...)`")
    run = _start_run(path, name, home, folder)
    print("idiolect: submitted; following the log (Ctrl-C does not stop the run)", flush=True)
    for line in own_lines(stream_flwr(["log", run, CONNECTION, "--stream"], home)):
        print(line, end="", flush=True)
    return _exit_status(run, home)


def own_lines(lines: Iterable[str]) -> Iterator[str]:
    r"""Yield the lines of a log without those of Flower, and without the traceback of one of our own errors.

    Example:
        >>> error = ["ServerApp raised an exception\n", "Traceback\n", "idiolect.UsageError: no\n", "Exit\n"]
        >>> list(own_lines(["idiolect: hello\n", *error]))
        ['idiolect: hello\n']
        >>> len(list(own_lines([*error[:2], "KeyError: 3\n", error[3]])))
        4
    """
    failure: list[str] = []
    for line in lines:
        if failure or "ServerApp raised an exception" in line:
            failure.append(line)
        elif not _FLOWER_LINES.search(line):
            yield line
    if not any(line.startswith("idiolect.") for line in failure):
        yield from failure


def _start_run(path: Path, name: str, home: Path, folder: Path) -> str:
    """Send the app to the server and return Flower's id of the run."""
    with tempfile.TemporaryDirectory(prefix="idiolect-") as temporary:
        project = Path(temporary) / "app"
        project.mkdir()
        for source in [*path.parent.glob("*.py"), Path(relay.__file__)]:
            shutil.copy(source, project)
        title = re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-") or "federation"
        (project / "pyproject.toml").write_text(PROJECT.format(name=title, module=path.stem, app=name))
        result, output = run_flwr(["run", str(project), CONNECTION], home)
    if "check your network connection" in output:
        raise UsageError(f"the server in {folder} is not running: start `idiolect serve {folder}`")
    if not result.get("run-id"):
        raise UsageError(f"the server in {folder} rejected the run: {failure_reason(result, output)}")
    return str(result["run-id"])


def _exit_status(run: str, home: Path) -> int:
    """Return the exit status of a run that has ended; if it failed, print how."""
    result, _ = run_flwr(["list", CONNECTION, "--run-id", run], home)
    status = str((result.get("runs") or [{}])[0].get("status", "unknown (is the server running?)"))
    if status.startswith("finished:completed"):
        return 0
    print(f"idiolect: the run is {status}; fix the error above and submit again to resume it", file=sys.stderr)
    return 1


def _assigned_names(path: Path) -> set[str]:
    """Return the names that a file assigns plainly, as Flower looks for them."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {t.id for node in body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)}
