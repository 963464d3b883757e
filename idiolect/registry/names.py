"""What a name in a setting stands for: methods and parts, splits, shifts, optimizers, schedules, models."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from idiolect import data, methods, parts
from idiolect.core import scope
from idiolect.core.errors import UsageError
from idiolect.core.method import Method
from idiolect.data import Shift
from idiolect.registry import plugins
from idiolect.registry.expression import evaluate
from idiolect.rounds import optim

_OWN = re.compile(r"\b([A-Za-z_][\w.]*):([A-Za-z_]\w*)")  # package.module:name


def method_of(text: str) -> Method:
    """Return the method an expression stands for; ``module:name`` in it is a method or part of your own.

    Example:
        >>> method_of("fedbn + flexible_sam(0.05, 0.9, top=2)").name
        'FedBN + flexible_sam'
        >>> method_of("sam(0.05)")
        Traceback (most recent call last):
        idiolect.UsageError: 'sam(0.05)' is a Part, not a method; put a method first, as in fedavg + sam(0.05)
    """
    names = dict(METHODS)
    for module, name in _OWN.findall(text):
        names[name] = plugins.load(module, name, "method")
    method: Method = read(_OWN.sub(r"\2", text), names, "method", Method)
    return method


def read(text: str, names: Mapping[str, object], what: str, kind: type | None = None) -> Any:  # noqa: ANN401
    """Return the value of an expression, which must be of a kind: by default, of one of the named classes."""
    found = evaluate(text, names, what)
    if not isinstance(found, kind or tuple(made for made in names.values() if isinstance(made, type))):
        raise UsageError(f"{text!r} is a {type(found).__name__}, not a {what}{_FIRST.get(what, '')}")
    return found


_FIRST = {"method": "; put a method first, as in fedavg + sam(0.05)"}


def given(make: Any, known: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Return a function with those of the known arguments bound that it takes."""
    takes = inspect.signature(make).parameters
    return partial(make, **{name: value for name, value in known.items() if name in takes})


def _of(module: Any, *names: str) -> dict[str, object]:  # noqa: ANN401
    return {name: getattr(module, name) for name in names}


METHODS: dict[str, object] = {
    **_of(methods, *methods.__all__),
    **_of(parts, *parts.__all__),
    **{name: found for name, found in vars(scope).items() if isinstance(found, scope.Scope)},
    "named": scope.named,
    "Method": Method,
}
SPLITS = _of(data, "Iid", "Dirichlet", "DirichletEqual", "Pathological", "QuantitySkew", "ByDomain", "ByClient")
SHIFTS = {
    name: found
    for name, found in _of(data, *data.__all__).items()
    if isinstance(found, type) and issubclass(found, Shift) and found is not Shift
}
OPTIMIZERS = _of(optim, "SGD", "Adam")
SCHEDULES = _of(optim, "Constant", "Exponential", "StepDecay", "Cosine")
MODELS = ("small_cnn", "mlp", "digit_model", "fedfsa_cnn", "next_character")
