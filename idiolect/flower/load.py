"""A user's file, as the commands for real sites are given it: ``FILE.py`` or ``FILE.py:NAME``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TypeVar

from idiolect.core.errors import UsageError

T = TypeVar("T")


def place_of(app: str) -> tuple[Path, str]:
    """Return the file and the name of an app in it, by default ``app``.

    Raises:
        UsageError: if there is no such file.
    """
    file, _, name = app.partition(":")
    path = Path(file).resolve()
    if path.suffix != ".py" or not path.is_file():
        raise UsageError(f"{path} is no Python file: give the one that makes the app")
    return path, name or "app"


def load(app: str, kind: type[T], made: str) -> T:
    """Return the app that a file makes; the file may import modules beside it.

    Args:
        app: where it is.
        kind: what it must be.
        made: the function that makes it, for the line of an error.

    Raises:
        UsageError: if the file cannot be run, or makes no such app.
    """
    path, name = place_of(app)
    spec = importlib.util.spec_from_file_location("__idiolect__", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file is somebody's own, and may raise anything
        raise UsageError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not isinstance(found, kind):
        raise UsageError(f"{path} has no {name} = idiolect.flower.{made}(...)")
    return found
