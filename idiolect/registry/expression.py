"""Methods, splits and shifts written as text: a small part of Python's grammar, read without executing Python.

Allowed are names, calls, numbers, text, ``None``, ``True``, ``False``, tuples and the operators
``+ - & | ~``. A name is found whatever its case, hyphens and underscores, and a function or class without
brackets is called without arguments: ``FedAvg-FT`` is ``fedavg_ft()``.
"""

from __future__ import annotations

import ast
import inspect
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from idiolect.core.calls import bound
from idiolect.core.errors import UsageError, did_you_mean, kind_of, raised
from idiolect.core.values import arguments, hints_of

_BINARY: dict[type[ast.operator], tuple[str, Callable[[Any, Any], Any]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.BitAnd: ("&", operator.and_),
    ast.BitOr: ("|", operator.or_),
}
_UNARY: dict[type[ast.unaryop], tuple[str, Callable[[Any], Any]]] = {
    ast.Invert: ("~", operator.invert),
    ast.USub: ("-", operator.neg),
}


def evaluate(text: str, names: Mapping[str, object], what: str) -> object:
    """Return the value of an expression.

    Args:
        text: the expression.
        names: what it may name: functions and classes to call, and values.
        what: what the expression is for, which begins the line of an error: ``"method"``.

    Raises:
        UsageError: one line, if the text is no expression of this grammar, names something unknown, or calls
            something with arguments that it does not take.

    Example:
        >>> from idiolect import data, methods, parts
        >>> evaluate("rotation(45) + contrast(amount=0.5)", vars(data), "shift")
        Rotation(degrees=45.0) + Contrast(amount=0.5)
        >>> evaluate("FedBN + sam(0.05)", {**vars(methods), **vars(parts)}, "method").name
        'FedBN + sam'
        >>> evaluate("fedbm()", vars(methods), "method")
        Traceback (most recent call last):
        idiolect.UsageError: method: unknown name 'fedbm' (did you mean fedbn?)
    """
    known = {_plain(name): name for name in names if not name.startswith("_")}
    text = known.get(_plain(text.strip()), text.strip())
    if not text:
        raise UsageError(f"{what}: nothing is written; write it like {_sample(names)}")
    try:
        tree = ast.parse(text, mode="eval").body
        return _Reader(names, known, what).value(tree)
    except (SyntaxError, RecursionError, MemoryError):
        raise UsageError(f"{what}: cannot read {text[:80]!r}; write it like {_sample(names)}") from None


class _Reader:
    """Turns syntax into values; every kind of syntax that is not listed is refused."""

    def __init__(self, names: Mapping[str, object], known: Mapping[str, str], what: str) -> None:
        self.names, self.known, self.what = names, known, what

    def value(self, node: ast.expr) -> Any:  # noqa: ANN401 - whatever the names stand for
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None as constant):
                return constant
            case ast.Tuple(elts=items):
                return tuple(self.value(item) for item in items)
            case ast.Name(id=name):
                found = self.named(name)
                return self.call(name, found, (), {}) if _makes(found) else found
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                given = {k.arg: self.value(k.value) for k in keywords if k.arg is not None}
                if len(given) == len(keywords):
                    return self.call(name, self.named(name), tuple(map(self.value, args)), given)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                sign, combine = _BINARY[type(op)]
                return self.apply(sign, combine, self.value(left), self.value(right))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                sign, change = _UNARY[type(op)]
                return self.apply(sign, change, self.value(operand))
        raise UsageError(f"{self.what}: {ast.unparse(node)[:80]!r} is not allowed here; {_GRAMMAR}")

    def named(self, name: str) -> object:
        if _plain(name) not in self.known:
            listed = f"; known: {', '.join(self.known.values())}; text goes in quotes"
            hint = did_you_mean(name.lower(), self.known.values()) or listed
            raise UsageError(f"{self.what}: unknown name {name!r}{hint}")
        return self.names[self.known[_plain(name)]]

    def call(self, name: str, make: object, args: tuple[object, ...], given: dict[str, object]) -> object:
        where = f"{self.what}: {name}"
        if not callable(make) or not _makes(make):
            raise UsageError(f"{where} takes no arguments; write it without brackets")
        signature = inspect.signature(make)
        for argument, value in bound(where, signature, args, given).arguments.items():
            many = signature.parameters[argument].kind is inspect.Parameter.VAR_POSITIONAL
            for single in value if many else (value,):
                arguments(where, {argument: single}, hints_of(make))
        try:
            return make(*args, **given)
        except UsageError:
            raise
        except Exception as error:  # a function of the user's may raise anything
            raise UsageError(f"{where} raises {raised(error, make)}") from error

    def apply(self, sign: str, operate: Callable[..., object], *values: object) -> object:
        try:
            return operate(*values)
        except UsageError as error:
            raise UsageError(f"{self.what}: {error}") from None
        except (TypeError, AttributeError):
            shown = " and ".join(map(_kind, values))
            hint = "; parts are added with +" if self.what == "method" else ""
            raise UsageError(f"{self.what}: {sign} does not go with {shown}{hint}") from None


_GRAMMAR = "use names, calls, numbers, text in quotes, tuples and + - & | ~"


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _makes(found: object) -> bool:
    return inspect.isroutine(found) or isinstance(found, type | partial)


def _kind(value: object) -> str:
    """Return a value as it prints if that is short, else what it is."""
    text = repr(value)
    return text if len(text) <= 40 else f"{kind_of(value)} {getattr(value, 'name', '')}".strip()


def _sample(names: Mapping[str, object]) -> str:
    return next((f"{name}(...)" for name, found in names.items() if _makes(found)), "a name")
