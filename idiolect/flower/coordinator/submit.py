"""`idiolect submit`: a coordinator's file, sent to the server, which runs it."""

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
from idiolect.flower.load import load, place_of
from idiolect.flower.server.launch import LINK, flwr, reason, watch

_CHATTER = re.compile(r"INFO|^Using SuperLink|^Successfully installed|^\s*$")
"""Flower's own lines, which say nothing about the run."""

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


def submit(app: str, folder: Path) -> int:
    """Send a coordinator's file to the server, and show what it says until the run ends.

    The Python files beside it are sent too, and nothing else; so a folder of their own suits them.

    Args:
        app: the file, which calls its app ``app``; or ``file.py:name``.
        folder: of the server, which must be running.

    Returns:
        0 if the run ended well, 1 if not.

    Raises:
        UsageError: if the file is none, or the server cannot be reached.
    """
    path, name = place_of(app)
    home = folder.resolve() / "flower"
    if not (home / "config.toml").is_file():
        raise UsageError(f"no server has run in {folder}: start `idiolect serve {folder}` first")
    load(app, ServerApp, "server_app")  # what is wrong with the file is said here, and not on the server
    if name not in _assigned(path):
        raise UsageError(f"{path} has no plain `{name} = idiolect.flower.server_app(...)`")
    with tempfile.TemporaryDirectory(prefix="idiolect-") as place:
        project = Path(place) / "app"
        project.mkdir()
        for source in [*path.parent.glob("*.py"), Path(__file__).with_name("relay.py")]:
            shutil.copy(source, project)
        title = re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-") or "federation"
        (project / "pyproject.toml").write_text(PROJECT.format(name=title, module=path.stem, app=name))
        started, text = flwr(["run", str(project), LINK], home)
        if "check your network connection" in text:
            raise UsageError(f"no server is running in {folder}: start `idiolect serve {folder}`")
        if not started.get("run-id"):
            raise UsageError(f"the server in {folder} did not take it: {reason(started, text)}")
        run = str(started["run-id"])
        print("idiolect: submitted; this only watches (Ctrl-C leaves the run alone)", flush=True)
        for line in told(watch(["log", run, LINK, "--stream"], home)):
            print(line, end="", flush=True)
        return _ended(run, home)


def told(lines: Iterable[str]) -> Iterator[str]:
    r"""Yield what a run says, without what Flower says of itself; of our own errors, which are lines, no traceback.

    Example:
        >>> error = ["ServerApp raised an exception\n", "Traceback\n", "idiolect.UsageError: no\n", "Exit\n"]
        >>> list(told(["idiolect: hello\n", *error])), len(list(told([*error[:2], "KeyError: 3\n", error[3]])))
        (['idiolect: hello\n'], 4)
    """
    failed: list[str] = []
    for line in lines:
        if failed or "ServerApp raised an exception" in line:
            failed.append(line)
        elif not _CHATTER.search(line):
            yield line
    if not any(line.startswith("idiolect.") for line in failed):
        yield from failed


def _ended(run: str, home: Path) -> int:
    """Say how a run ended."""
    told, _ = flwr(["list", LINK, "--run-id", run], home)
    status = str((told.get("runs") or [{}])[0].get("status", "out of sight: is the server running?"))
    if status.startswith("finished:completed"):
        return 0
    print(f"idiolect: the run is {status}; once what is said above is put right, submit it again", file=sys.stderr)
    return 1


def _assigned(path: Path) -> set[str]:
    """Return the names that a file assigns plainly, as Flower looks for them."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {t.id for node in body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)}
