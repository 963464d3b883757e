"""The `Part`: one idea of a method as a few pure functions, all of them optional."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from typing import Any, NoReturn, ParamSpec

from torch import nn

from idiolect.core.calls import bound, takes
from idiolect.core.errors import UsageError, did_you_mean, kind_of, raised
from idiolect.core.tree import Tree
from idiolect.core.types import Arrival, Central, GradFn, Local, Objective, Setup, Update, Weight
from idiolect.core.values import arguments, hints_of

P = ParamSpec("P")


@dataclass(frozen=True)
class Part:
    """One idea of a method, as pure functions of trees. Make one with a function marked `@part`.

    In a round the functions are called in this order. On the server: `broadcast` and `message`. On each client:
    `begin`; `objective` and `gradient` before the first step; `direction` at every step; `finish`. On the server:
    `contribute` for each upload, then `aggregate`. To predict for a client: `begin`, then `deploy`. The functions of
    several parts run in the order of the list, but the first listed `gradient` and `objective` are the outermost.

    A part sees only its own memory, state, rows and messages. What it keeps and sends is what its functions return.
    The weights that `gradient` and `direction` get change in place with the next step, so a part keeps no reference to
    them. Steps may run in inference mode, so a part differentiates with `Local.grad` only. Reductions run along the
    last axis (see `Tree`), so that an engine may stack clients.

    Attributes:
        attach: adds layers, `Private` modules or forward hooks to a copy of the user's module.
        memory: setup -> the memory of a client before its first round; names and shapes never change.
        server: setup -> the part's state on the server before the first round.
        rows: setup -> the server's row for a client before its first round. The server keeps one row per client of
            the population, passes the rows of the clients that arrived to `aggregate`, and stores what it returns.
        broadcast: central -> the shared tensors that clients train from. Clients that only predict get `central.old`.
        message: central -> what one client alone is sent, made from `central.state` and its row `central.rows`. By
            default the row; before its first round the client makes this itself, with `rows`.
        begin: (local, weights so far) -> (weights to start from, memory).
        objective: local -> a loss for local training.
        gradient: (grad, local) -> a function that takes the place of grad.
        direction: (direction, weights, local) -> what the optimizer descends along. Tensors that the result leaves
            out do not move.
        finish: local -> (memory, upload).
        contribute: (central, arrival) -> what one upload contributes to the mean: a tree, or (tree, weight). By
            default this part's upload. The weight is one number, or a tree of one number per value. It multiplies the
            method's weighting, and the mean divides by the sum of the weights. A value whose weights are all zero
            stays as it is in the part's state, or else in the shared tensors.
        aggregate: (central, mean) -> `Update`. A part that is `individual` gets all contributions instead of their
            mean, ``(n, ...)`` in the order of `central.clients`.
        deploy: (local, weights after `begin`) -> the weights that predict for this client.
        uniform: average clients equally, whatever the method's weighting.
        individual: `aggregate` gets all contributions of the round, which are then in memory at once.
        server_only: state and rows are not sent to clients; `message` still is.
        transductive: `deploy` reads the unlabeled inputs to predict, `local.inputs`. It runs after all others.
        gradients: extra gradients per step, for the cost table.
        idea: first line of the docstring of the function that makes the part.
        neutral: arguments with which the part does nothing, if there are any; the checks use them.
        make: the function that makes the part.
    """

    name: str = ""
    arguments: tuple[tuple[str, Any], ...] = ()
    attach: Callable[[nn.Module], None] | None = field(default=None, compare=False)
    memory: Callable[[Setup], Tree] | None = field(default=None, compare=False)
    server: Callable[[Setup], Tree] | None = field(default=None, compare=False)
    rows: Callable[[Setup], Tree] | None = field(default=None, compare=False)
    broadcast: Callable[[Central], Tree] | None = field(default=None, compare=False)
    message: Callable[[Central], Tree] | None = field(default=None, compare=False)
    begin: Callable[[Local, Tree], tuple[Tree, Tree]] | None = field(default=None, compare=False)
    objective: Callable[[Local], Objective] | None = field(default=None, compare=False)
    gradient: Callable[[GradFn, Local], GradFn] | None = field(default=None, compare=False)
    direction: Callable[[Tree, Tree, Local], Tree] | None = field(default=None, compare=False)
    finish: Callable[[Local], tuple[Tree, Tree]] | None = field(default=None, compare=False)
    contribute: Callable[[Central, Arrival], Tree | tuple[Tree, Weight]] | None = field(default=None, compare=False)
    aggregate: Callable[[Central, Tree], Update] | None = field(default=None, compare=False)
    deploy: Callable[[Local, Tree], Tree] | None = field(default=None, compare=False)
    uniform: bool = field(default=False, compare=False)
    individual: bool = field(default=False, compare=False)
    server_only: bool = field(default=False, compare=False)
    transductive: bool = field(default=False, compare=False)
    gradients: int = field(default=0, compare=False)
    idea: str = field(default="", compare=False)
    neutral: Mapping[str, Any] | None = field(default=None, compare=False)
    make: Callable[..., Part] | None = field(default=None, compare=False)

    def __add__(self, other: object) -> NoReturn:
        raise UsageError(f"{self.name} + ...: put a method first, as in fedavg() + {self.name}(...)")

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.arguments)})"


def part(make: Callable[P, Part]) -> Callable[P, Part]:
    """Mark a function that makes a part: the part gets the function's name, arguments and idea.

    A part then prints as the call that made it, two parts made with equal arguments are equal, and a wrong argument
    raises a `UsageError` of one line. Arguments must be plain values or scopes.

    Example:
        >>> from idiolect.core.tree import Tree
        >>> @part
        ... def slower(factor: float = 0.5) -> Part:
        ...     '''Shorten every step.'''
        ...     def direction(direction, weights, local):
        ...         return factor * direction
        ...     return Part(direction=direction)
        >>> slower(0.1), slower(0.1) == slower(factor=0.1), slower().idea
        (slower(factor=0.1), True, 'Shorten every step.')
    """

    @wraps(make)
    def build(*args: P.args, **kwargs: P.kwargs) -> Part:
        call, name = bind(make, *args, **kwargs), make.__name__
        idea = (inspect.getdoc(make) or "").partition("\n")[0]
        made = _made(name, lambda: make(*call.args, **call.kwargs))
        unknown = next((k for k in made.neutral or () if k not in call.arguments), None)
        require(unknown is None, f"{name}: neutral names {unknown!r}, which is no argument of {name}")
        return replace(made, name=name, arguments=tuple(call.arguments.items()), idea=idea, make=build)

    return build


HOOKS = {
    "attach": "module",
    "memory": "setup",
    "server": "setup",
    "rows": "setup",
    "broadcast": "central",
    "message": "central",
    "begin": "local, weights",
    "objective": "local",
    "gradient": "grad, local",
    "direction": "direction, weights, local",
    "finish": "local",
    "contribute": "central, arrival",
    "aggregate": "central, mean",
    "deploy": "local, weights",
}
"""The functions of a part, and the arguments that each is called with."""

_FLAGS: dict[str, Any] = {
    "uniform": bool,
    "individual": bool,
    "server_only": bool,
    "transductive": bool,
    "gradients": int,
    "neutral": Mapping | None,
}
"""The other attributes that an author sets, and their types."""

_NEEDS = {
    "contribute": "aggregate",
    "individual": "aggregate",
    "message": "rows",
    "transductive": "deploy",
}
"""Attributes of a part that have no effect without another one."""


def _made(name: str, make: Callable[[], Part]) -> Part:
    """Return the part that `make` returns; raise a `UsageError` of one line for a hook that cannot be used."""
    try:
        made = make()
    except TypeError as error:
        told = re.search(r"Part\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if not told:
            raise
        known = [f.name for f in fields(Part)]
        raise UsageError(f"{name}: a Part has no {told[1]!r}{did_you_mean(told[1], known)}") from None
    require(isinstance(made, Part), f"{name}: a function marked @part must return a Part, not {kind_of(made)}")
    for hook, given in HOOKS.items():
        if (found := getattr(made, hook)) is not None:
            takes(f"{name}: {hook}", found, given)
    arguments(name, {flag: getattr(made, flag) for flag in _FLAGS}, _FLAGS)
    for lone, needed in _NEEDS.items():
        require(
            not getattr(made, lone) or bool(getattr(made, needed)),
            f"{name}: {lone} is without effect: the part has no {needed}",
        )
    return made


def bind(make: Callable[..., Any], *args: Any, **kwargs: Any) -> inspect.BoundArguments:  # noqa: ANN401
    """Return all arguments of a call, defaults included, numbers plain; raise a `UsageError` if they are wrong."""
    call = bound(make.__name__, inspect.signature(make), args, kwargs)
    call.apply_defaults()
    call.arguments.update(arguments(make.__name__, call.arguments, hints_of(make)))
    return call


def run_hook(part: Part, name: str, *given: object) -> Any:  # noqa: ANN401 - whatever the hook returns
    """Return what a hook of a part returns; an exception in it becomes a `UsageError` that names part and hook.

    Example:
        >>> run_hook(Part("mine", memory=lambda setup: {}["n"]), "memory", None)
        Traceback (most recent call last):
        idiolect.UsageError: mine: memory raises KeyError: 'n' (<doctest ...>, line 1)
    """
    hook = getattr(part, name)
    return guarded(f"{part.name}: {name}", hook, hook)(*given)


def guarded(what: str, function: Callable[..., Any], source: object) -> Callable[..., Any]:
    """Return a function whose exceptions become a `UsageError`: what raised it, and where in the file of `source`."""

    def call(*given: object) -> Any:  # noqa: ANN401
        try:
            return function(*given)
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(f"{what} raises {raised(error, source)}") from error

    return call


def require(condition: bool, message: str) -> None:
    """Raise a `UsageError` unless the condition holds."""
    if not condition:
        raise UsageError(message)
