"""The arguments of `fit`: one that is unknown or of the wrong type is refused with what to write instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from functools import wraps
from typing import ParamSpec, TypeVar

from torch import nn

from idiolect.compute.metrics import Metric
from idiolect.core.errors import UsageError, kind_of
from idiolect.core.method import Method
from idiolect.core.part import Part
from idiolect.data import ClientData
from idiolect.rounds.training import Training
from idiolect.running.options import Machine, Output

P = ParamSpec("P")
R = TypeVar("R")

SETTINGS = {"training": Training, "machine": Machine, "output": Output}
"""Arguments that are objects, and their classes."""


def explained(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function: unknown and missing arguments are a `UsageError` of one line instead of a `TypeError`.

    Example:
        >>> @explained
        ... def train(*, rounds, training=None):
        ...     return rounds
        >>> train(rounds=3, lr=0.1)
        Traceback (most recent call last):
        idiolect.UsageError: train has no argument 'lr': write training=Training(lr=0.1)
    """
    signature, called = inspect.signature(function), getattr(function, "__name__", "the function")

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in kwargs.items():
            if name not in signature.parameters:
                raise UsageError(f"{called} has no argument {name!r}{_instead(name, value, signature.parameters)}")
        by_name = [name for name, parameter in signature.parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
        rest = args[len(signature.parameters) - len(by_name) :]
        if by_name and rest:
            some = ", ".join(f"{name}={_shown(value)}" for name, value in zip(by_name, rest, strict=False))
            raise UsageError(f"{called} takes {by_name[0]} and what follows by name: write {some}")
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise UsageError(f"{called}: {error}") from None
        return function(*args, **kwargs)

    return call


def check_types(
    model: object,
    clients: object,
    method: object,
    metrics: object = None,
    settings: Mapping[str, object] | None = None,
) -> None:
    """Refuse arguments of the wrong type.

    Args:
        model: must be a module.
        clients: must map names to `ClientData`.
        method: must be a `Method`.
        metrics: must be None or a sequence of `Metric`.
        settings: values of the arguments in `SETTINGS`.

    Raises:
        UsageError: one line that says what to write.

    Example:
        >>> from idiolect import methods
        >>> check_types(nn.Linear(2, 2), {}, methods.fedbn)
        Traceback (most recent call last):
        idiolect.UsageError: method is the function fedbn: write methods.fedbn() with brackets
    """
    _check_model(model)
    if not isinstance(clients, Mapping):
        raise UsageError(f"clients is {kind_of(clients)}: write {{'a': ClientData(train=(x, y)), ...}}")
    for name, data in clients.items():
        if not isinstance(data, ClientData):
            raise UsageError(f"client {name!r} is {kind_of(data)}: write ClientData(train=(x, y), test=(x, y))")
    _check_method(method)
    single = isinstance(metrics, str) or not isinstance(metrics, Sequence)
    if metrics is not None and (single or not all(isinstance(m, Metric) for m in metrics)):  # type: ignore[attr-defined]
        raise UsageError("metrics is a list of Metric: write metrics=[Metric('name', function)]")
    for name, value in (settings or {}).items():
        made = SETTINGS[name]
        if not isinstance(value, made):
            some = ", ".join(f"{field.name}=..." for field in fields(made)[:2])
            raise UsageError(f"{name} is {kind_of(value)}: write {name}={made.__name__}({some})")


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        call = f": write {getattr(model, '__name__', '')}(...)" if callable(model) else ": give a torch.nn.Module"
        raise UsageError(f"model is {kind_of(model)}{call}")


def _check_method(method: object) -> None:
    if isinstance(method, Method):
        return
    if isinstance(method, Part):
        hint = f"put a method first, such as methods.fedavg() + {_shown(method)}"
    elif isinstance(method, str):
        hint = "write a method such as methods.fedbn()"
    elif callable(method):
        name = getattr(method, "__name__", "it")
        hint = f"write methods.{name}() with brackets" if hasattr(method, "card") else f"call it, {name}(...)"
    else:
        hint = "give a Method such as methods.fedbn()"
    raise UsageError(f"method is {kind_of(method)}: {hint}")


def _instead(name: str, value: object, parameters: Mapping[str, object]) -> str:
    """Return how to write an argument that belongs to one of `SETTINGS`, or one of a similar name."""
    known = {p: p for p in parameters}
    for setting, made in SETTINGS.items():
        if any(field.name == name for field in fields(made)):
            return f": write {setting}={made.__name__}({name}={_shown(value)})"
        known |= {field.name: f"{setting}={made.__name__}({field.name}=...)" for field in fields(made)}
    close = get_close_matches(name, known, n=1)
    return f" (did you mean {known[close[0]]}?)" if close else ""


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text and " at 0x" not in text else "..."
