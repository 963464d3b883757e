"""What a user names as ``package.module:name``, looked for in the current directory first."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from idiolect.errors import UsageError, did_you_mean


def load(module: str, name: str, what: str) -> object:
    """Import a user's module and return what it calls `name`.

    Args:
        module: its dotted name.
        name: of the function or value.
        what: what it is for, which begins the line of an error: ``"model"``.

    Raises:
        UsageError: if there is no such module, or no such name in it.

    Example:
        >>> load("math", "tau", "method") > 6
        True
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise UsageError(f"{what}: there is no module {error.name!r}; it is looked for in {here} first") from None
    if not hasattr(found, name):
        raise UsageError(f"{what}: {module} has no function {name!r}{did_you_mean(name, vars(found))}")
    value: object = getattr(found, name)
    return value
