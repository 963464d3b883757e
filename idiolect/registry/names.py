"""Lookup of the names in settings: methods and parts, splits, shifts, models, optimizers, schedules.

Each table maps a name to a function or class; each function reads an expression over one table.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import Any

from torch import nn

from idiolect import data, methods, models, parts
from idiolect.core import scope
from idiolect.core.errors import UsageError, kind_of
from idiolect.core.method import Method
from idiolect.data import Deal, Shift, Split
from idiolect.registry import plugins
from idiolect.registry.expression import evaluate
from idiolect.rounds import optim, schedule
from idiolect.rounds.optim import Optimizer
from idiolect.rounds.schedule import Schedule


def _of(module: ModuleType, *names: str) -> dict[str, object]:
    return {name: getattr(module, name) for name in names}


METHODS: dict[str, object] = {
    **_of(methods, *methods.__all__),
    **_of(parts, *parts.__all__),
    **{name: found for name, found in vars(scope).items() if isinstance(found, scope.Scope)},
    "named": scope.named,
    "Method": Method,
}
"""Methods and parts, and the scopes and `Method` that occur in their arguments and reprs."""

SPLITS = _of(
    data,
    *("Iid", "Dirichlet", "DirichletEqual", "Pathological", "QuantitySkew", "ByDomain", "ByClient", "Contiguous"),
)
"""Divisions of examples among clients."""

DEALS = _of(data, "Shuffled", "TimeBlocks", "ByGroup")
"""Divisions of a client's examples among training, validation and test."""

SHIFTS = {
    name: found
    for name, found in _of(data, *data.__all__).items()
    if isinstance(found, type) and issubclass(found, Shift) and found is not Shift
}
"""Differences between clients' data, on top of the split."""

MODELS = _of(models, "small_cnn", "mlp", "digit_model", "fedfsa_cnn", "next_character")
"""Networks for classes; `mlp` also predicts a number."""

OPTIMIZERS = _of(optim, "SGD", "Adam", "AdamW", "RMSprop")
"""Local optimizers."""

SCHEDULES = _of(schedule, "Constant", "Exponential", "StepDecay", "Cosine", "Warmup")
"""Learning rates over the rounds."""


def method_of(text: str) -> Method:
    """Return the method that an expression stands for; ``module:name`` in it is a method or part of your own.

    Raises:
        UsageError: one line, if the text cannot be read or is no method.

    Example:
        >>> method_of("fedbn + flexible_sam(0.05, 0.9, top=2)").name
        'FedBN + flexible_sam'
        >>> method_of("sam(0.05)")
        Traceback (most recent call last):
        idiolect.UsageError: 'sam(0.05)' is a Part, not a method; put a method first, as in fedavg + sam(0.05)
    """
    if not text.strip():
        raise UsageError("method: nothing is written; write it like fedavg + sam(0.05)")
    own = {name: plugins.load(module, name, "method") for module, name in _OWN.findall(text)}
    hint = "; put a method first, as in fedavg + sam(0.05)"
    method: Method = _read(_OWN.sub(r"\2", text), METHODS | own, "method", Method, hint)
    return method


def split_of(text: str) -> Split:
    """Return the split that an expression stands for.

    Example:
        >>> split_of("dirichlet(0.3)")
        Dirichlet(alpha=0.3, minimum=10)
    """
    split: Split = _read(text, SPLITS, "split")
    return split


def deal_of(text: str) -> Deal:
    """Return the deal that an expression stands for.

    Example:
        >>> deal_of("time_blocks(gap=10)")
        TimeBlocks(gap=10)
    """
    deal: Deal = _read(text, DEALS, "deal")
    return deal


def shift_of(text: str) -> Shift:
    """Return the shift that an expression stands for.

    Example:
        >>> shift_of("rotation(45) + contrast(0.5)")
        Rotation(degrees=45.0) + Contrast(amount=0.5)
    """
    shift: Shift = _read(text, SHIFTS, "shift", Shift)
    return shift


def optimizer_of(text: str) -> Optimizer:
    """Return the local optimizer that an expression stands for.

    Example:
        >>> optimizer_of("sgd(momentum=0.9)").momentum
        0.9
    """
    optimizer: Optimizer = _read(text, OPTIMIZERS, "optimizer")
    return optimizer


def schedule_of(text: str) -> Schedule:
    """Return the learning rate schedule that an expression stands for.

    Example:
        >>> type(schedule_of("cosine"))
        <class 'idiolect.rounds.schedule.Cosine'>
    """
    found: Schedule = _read(text, SCHEDULES, "schedule")
    return found


def model_of(text: str, shape: tuple[int, ...], classes: int | None) -> nn.Module:
    """Return the network that an expression stands for, or that ``module:function`` of your own makes.

    Args:
        text: the expression; `shape` and `classes` are filled in where the function has such arguments.
        shape: of one example.
        classes: number of classes; None for a regression.

    Raises:
        UsageError: one line, if the text cannot be read or the network does not suit the data.

    Example:
        >>> model_of("mlp(hidden=(9,))", (1, 8, 8), 10).fc1.weight.shape
        torch.Size([9, 64])
    """
    if ":" in text:
        return plugins.model_from(text, shape, classes)
    suited = MODELS if classes is not None else _of(models, "mlp")
    bound = {name: _bound(make, {"shape": shape, "classes": classes}) for name, make in suited.items()}
    model: nn.Module = _read(text, bound, "model", nn.Module)
    return model


_OWN = re.compile(r"\b([A-Za-z_][\w.]*):([A-Za-z_]\w*)")  # package.module:name


def _read(text: str, names: Mapping[str, object], what: str, kind: type | None = None, hint: str = "") -> Any:  # noqa: ANN401
    """Return the value of an expression, which must be of a kind: by default, of one of the named classes."""
    found = evaluate(text, names, what)
    if not isinstance(found, kind or tuple(made for made in names.values() if isinstance(made, type))):
        raise UsageError(f"{text!r} is {kind_of(found)}, not a {what}{hint}")
    return found


def _bound(make: Any, known: Mapping[str, object]) -> object:  # noqa: ANN401
    """Return a function with those of the known arguments bound that it has."""
    has = inspect.signature(make).parameters
    return partial(make, **{name: value for name, value in known.items() if name in has})
