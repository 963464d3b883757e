"""Load an app from a user's file, given as ``FILE.py`` or ``FILE.py:NAME``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TypeVar

from idiolect.core.errors import UsageError

T = TypeVar("T")


def locate_app(app: str) -> tuple[Path, str]:
    """Return the file of an app and its name there, by default ``app``.

    Raises:
        UsageError: if there is no such file.
    """
    file, _, name = app.partition(":")
    path = Path(file).resolve()
    if path.suffix != ".py" or not path.is_file():
        raise UsageError(f"{path} is not a Python file: give the file that creates the app")
    return path, name or "app"


def load_app(app: str, kind: type[T], factory: str) -> T:
    """Run a file and return the app that it creates; the file may import modules from its own folder.

    Args:
        app: ``FILE.py`` or ``FILE.py:NAME``.
        kind: the required type.
        factory: the function of `idiolect.flower` that creates such an app, for error messages.

    Raises:
        UsageError: if the file cannot be run, or creates no such app.
    """
    path, name = locate_app(app)
    spec = importlib.util.spec_from_file_location("__idiolect__", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # user code may raise anything
        raise UsageError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not isinstance(found, kind):
        raise UsageError(f"{path} has no {name} = idiolect.flower.{factory}(...)")
    return found
