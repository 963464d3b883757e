"""Import of a user's own ``package.module:name``, looked for in the current directory first."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path

from torch import nn

from idiolect.core.errors import UsageError, did_you_mean, kind_of, raised


def load(module: str, name: str, what: str) -> object:
    """Import a user's module and return the function or value `name` of it.

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
            raise UsageError(f"{what}: {module} cannot be imported: {raised(error, _file(module))}") from error
        raise UsageError(f"{what}: there is no module {error.name!r}; it is looked for in {here} first") from None
    except Exception as error:  # whatever a user's module may raise
        raise UsageError(f"{what}: {module} cannot be imported: {raised(error, _file(module))}") from error
    if not hasattr(found, name):
        raise UsageError(f"{what}: {module} has no function {name!r}{did_you_mean(name, vars(found))}")
    value: object = getattr(found, name)
    return value


def model_from(text: str, shape: tuple[int, ...], classes: int | None) -> nn.Module:
    """Return your own network: ``package.module:function``, looked for in the current directory first.

    The function is called with `shape` and `classes` if it has arguments of these names, else without.

    Raises:
        UsageError: if the module or function is not there, or what it returns is no `torch.nn.Module`.
    """
    module, _, name = text.partition(":")
    make = load(module, name, "model")
    if not callable(make):
        raise UsageError(f"model: {text} is {kind_of(make)}: give a function that returns a torch.nn.Module")
    takes = inspect.signature(make).parameters
    try:
        model = make(**{k: v for k, v in (("shape", shape), ("classes", classes)) if k in takes})
    except UsageError:
        raise
    except Exception as error:  # whatever a user's function may raise
        raise UsageError(f"model: {text} raises {raised(error, make)}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"model: {text} returns {kind_of(model)}, not a torch.nn.Module")
    return model


def _file(module: str) -> str | None:
    """Return the path of a module that could not be imported."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return found.origin if found else None
