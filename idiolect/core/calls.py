"""Calls with arguments that cannot be: one line, for functions, classes and functions that are passed in alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar

from idiolect.core.errors import UsageError, did_you_mean, kind_of

F = TypeVar("F", bound=Callable[..., Any])

LONG = 100
"""A call that is longer than this is shown without the defaults."""


def bound(
    name: str, signature: inspect.Signature, args: Sequence[object], given: Mapping[str, object]
) -> inspect.BoundArguments:
    """Return the arguments of a call.

    Args:
        name: what is called; it begins the line of an error.
        signature: its signature.
        args: the arguments by position.
        given: the arguments by name.

    Raises:
        UsageError: one line, if an argument is unknown, missing or too many.

    Example:
        >>> bound("pow", inspect.signature(pow), (2,), {"expo": 3})
        Traceback (most recent call last):
        idiolect.UsageError: pow has no argument 'expo' (did you mean exp?); it is pow(base, exp, mod=None)
    """
    known = signature.parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    unknown = next((k for k in given if k not in known and not open_ended), None)
    if unknown is not None:
        raise UsageError(
            f"{name} has no argument {unknown!r}{did_you_mean(unknown, known)}; it is {written(name, signature)}"
        )
    try:
        return signature.bind(*args, **given)
    except TypeError as error:
        raise UsageError(f"{name}: {error}; it is {written(name, signature)}") from None


def called(made: F) -> F:
    """Decorate a class or function: a call with arguments that it does not have is a `UsageError`, not a `TypeError`.

    Example:
        >>> from dataclasses import dataclass
        >>> @called
        ... @dataclass
        ... class Decay:
        ...     gamma: float = 0.5
        >>> Decay(gama=0.1)
        Traceback (most recent call last):
        idiolect.UsageError: Decay has no argument 'gama' (did you mean gamma?); it is Decay(gamma=0.5)
    """
    signature, own = inspect.signature(made), isinstance(made, type)
    run: Any = made.__init__ if own else made

    @wraps(run)
    def checked(*args: Any, **given: Any) -> Any:  # noqa: ANN401
        bound(made.__name__, signature, args[own:], given)
        return run(*args, **given)

    if not own:
        return checked  # type: ignore[return-value]
    made.__init__ = checked  # type: ignore[method-assign]
    return made


def takes(what: str, function: object, arguments: str) -> None:
    """Raise a `UsageError` unless something is a function that can be called with these arguments.

    Args:
        what: what it is; it begins the line of an error.
        function: whatever was given.
        arguments: names of the arguments by position, ``"run, record"``.

    Example:
        >>> takes("on_round", lambda run: None, "run, record")
        Traceback (most recent call last):
        idiolect.UsageError: on_round is called with (run, record), but takes (run)
    """
    if isinstance(function, type) or not callable(function):
        hint = f": write {function.__name__}(...)" if isinstance(function, type) else ""
        raise UsageError(f"{what} must be a function ({arguments}), not {kind_of(function)}{hint}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function of C has no signature
        return
    try:
        signature.bind(*arguments.split(", "))
    except TypeError:
        raise UsageError(f"{what} is called with ({arguments}), but takes {signature}") from None


def written(name: str, signature: inspect.Signature) -> str:
    """Return a call as one would write it: names and defaults, no types; only names where it would be long.

    Example:
        >>> written("pow", inspect.signature(pow))
        'pow(base, exp, mod=None)'
    """
    name = name.rpartition(": ")[2]
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    shown = f"{name}{signature.replace(parameters=plain, return_annotation=inspect.Signature.empty)}"
    return shown if len(shown) <= LONG else f"{name}({', '.join(signature.parameters)})"
