"""Values of settings: a number is a number whatever made it, and a value has the type that is written beside it."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

from idiolect.core.calls import called
from idiolect.core.errors import UsageError

C = TypeVar("C", bound=type)


def plain(value: object) -> object:
    """Return a scalar of NumPy, or a tensor without axes, as the Python number that it holds; all else as it is.

    The items of tuples and lists are made plain too. NumPy and PyTorch are not loaded for it.

    Example:
        >>> import numpy as np, torch
        >>> plain(np.int64(3)), plain(torch.tensor(0.5)), plain("3"), plain([np.float64(0.1)])
        (3, 0.5, '3', [0.1])
    """
    if type(value) is tuple:
        return tuple(map(plain, value))
    if type(value) is list:
        return list(map(plain, value))
    for module, kinds in (("numpy", ("generic", "ndarray")), ("torch", ("Tensor",))):
        types = tuple(getattr(sys.modules[module], kind) for kind in kinds) if module in sys.modules else ()
        if isinstance(value, types) and not getattr(value, "shape", ()):
            return value.item()
    return value


def whole(name: str, value: object, least: int | None = None) -> int:
    """Return a whole number; raise a `UsageError` of one line if it is none, or is below the least.

    Example:
        >>> import numpy as np
        >>> whole("rounds", np.int64(3), 1)
        3
        >>> whole("rounds", 2.5, 1)
        Traceback (most recent call last):
        idiolect.UsageError: rounds must be a whole number, at least 1, got 2.5
    """
    number = plain(value)
    if not fits(number, int) or (least is not None and number < least):  # type: ignore[operator]
        bound = "" if least is None else f", at least {least}"
        raise UsageError(f"{name} must be a whole number{bound}, got {number!r}")
    return number  # type: ignore[return-value]


def real(name: str, value: object, within: Callable[[float], bool], what: str) -> float:
    """Return a finite number that lies within a range; raise a `UsageError` of one line if it is none.

    Example:
        >>> real("participation", 1, lambda p: 0 < p <= 1, "in (0, 1]")
        1.0
        >>> real("lr", float("nan"), lambda lr: lr > 0, "above 0")
        Traceback (most recent call last):
        idiolect.UsageError: lr must be a number above 0, got nan
    """
    number = plain(value)
    if not fits(number, float) or not math.isfinite(number) or not within(number):  # type: ignore[arg-type]
        raise UsageError(f"{name} must be a number {what}, got {number!r}")
    return float(number)  # type: ignore[arg-type]


def arguments(
    where: str, given: Mapping[str, object], hints: Mapping[str, Any], finite: bool = False
) -> dict[str, Any]:
    """Return the arguments of a call with plain numbers, each compared with its annotation.

    A whole number becomes a float where a float is annotated, so that equal calls print alike.

    Args:
        where: what is called; it begins the line of an error.
        given: the arguments by name.
        hints: annotated types by name; an argument without one is not compared.
        finite: also refuse infinite numbers; NaN is always refused.

    Raises:
        UsageError: one line that names the argument.

    Example:
        >>> arguments("sam", {"rho": 1}, {"rho": float})
        {'rho': 1.0}
        >>> arguments("sam", {"rho": "wide"}, {"rho": float})
        Traceback (most recent call last):
        idiolect.UsageError: sam: rho='wide' is not a number
    """
    unbounded = () if finite else (math.inf, -math.inf)
    return {
        name: _argument(where, name, plain(value), hints.get(name, object), unbounded) for name, value in given.items()
    }


def _argument(where: str, name: str, value: object, hint: Any, unbounded: tuple[float, ...]) -> object:  # noqa: ANN401
    known = not isinstance(value, float) or math.isfinite(value) or value in unbounded
    if not fits(value, hint) or not known:
        raise UsageError(f"{where}: {name}={value!r} is not {wanted(hint) if known else 'a finite number'}")
    kinds = {hint, *get_args(hint)}
    number = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if number and float in kinds and int not in kinds else value  # type: ignore[arg-type]


def hints_of(make: Callable[..., object]) -> dict[str, Any]:
    """Return the annotated types of a function's arguments by name; none where they cannot be resolved.

    Example:
        >>> hints_of(lambda rho: rho)
        {}
    """
    if isinstance(make, partial):
        make = make.func
    try:
        return get_type_hints(make if isinstance(make, type) else inspect.unwrap(make))
    except (NameError, TypeError, AttributeError):  # types that only a type checker knows
        return {}


@dataclass_transform(frozen_default=True)
def settings(made: C) -> C:
    """Make a class of settings a frozen dataclass that refuses what it does not take, before its `__post_init__`.

    Numbers become plain, and each field is compared with its annotation; see `arguments`.

    Raises:
        UsageError: one line that names the argument, when the class is called.

    Example:
        >>> @settings
        ... class Decay:
        ...     gamma: float
        >>> Decay(1)
        Decay(gamma=1.0)
        >>> Decay("fast")
        Traceback (most recent call last):
        idiolect.UsageError: Decay: gamma='fast' is not a number
        >>> Decay(gama=1)
        Traceback (most recent call last):
        idiolect.UsageError: Decay has no argument 'gama' (did you mean gamma?); it is Decay(gamma)
    """
    check = getattr(made, "__post_init__", None)

    def settled(self: object) -> None:
        _settle(self)
        if check:
            check(self)

    made.__post_init__ = settled  # type: ignore[attr-defined]
    dataclass(frozen=True)(made)
    return called(made)


def _settle(made: object) -> None:
    own = {field.name: getattr(made, field.name) for field in fields(made)}  # type: ignore[arg-type]
    for name, value in arguments(type(made).__name__, own, get_type_hints(type(made)), finite=True).items():
        object.__setattr__(made, name, value)


def fits(value: object, hint: Any) -> bool:  # noqa: ANN401 - any annotation
    """Tell whether a value is of an annotated type; whole numbers are numbers, truth values are not.

    Example:
        >>> fits(1, float | None), fits(1.5, int), fits(True, int), fits("a", Literal["a", "b"])
        (True, False, False, True)
    """
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner)
    if kind in (Union, UnionType):
        return any(fits(value, choice) for choice in inner)
    if kind in (tuple, Sequence):
        return isinstance(value, tuple | list) and all(fits(item, inner[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def wanted(hint: Any) -> str:  # noqa: ANN401
    """Say in words what an annotated type wants.

    Example:
        >>> wanted(int | Literal["all"]), wanted(float | None)
        ("a whole number or 'all'", 'a number or None')
    """
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(map(wanted, inner))
    if kind is Literal:
        return " or ".join(map(repr, inner))
    if kind in (tuple, Sequence):
        return f"a tuple, each {wanted(inner[0])}"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "None"}
    return words.get(hint, f"a {getattr(hint, '__name__', hint)}".lower())
