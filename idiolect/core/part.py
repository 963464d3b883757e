"""One idea of a method: a `Part` is a few pure functions, all of them optional."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from typing import Any, ParamSpec

from torch import nn

from idiolect.core.errors import UsageError, did_you_mean
from idiolect.core.tree import Tree
from idiolect.core.types import Arrival, Central, GradFn, Local, Objective, Setup, Update, Weight

P = ParamSpec("P")


@dataclass(frozen=True)
class Part:
    """One idea of a method, as pure functions of trees. Make one with a function marked `@part`.

    In a round the functions are called in this order. On the server: `broadcast` and `message`. On each client:
    `begin`; `objective`, `gradient` and `direction` at every step; `finish`. On the server: `contribute` for each
    upload, then `aggregate`. To predict for a client: `begin`, then `deploy`. Of several parts, the first listed
    `gradient` and `objective` are the outermost; the other functions run in the order of the list.

    A part sees its own memory, state, rows and messages only; what it keeps and what it sends are what its functions
    return. The weights that `gradient` and `direction` are given change with the next step: a part keeps no reference
    to them, and differentiates through `Local.grad` alone, since steps may run in inference mode. Reductions run along
    the last axis (see `Tree`), so that an engine may stack clients.

    Attributes:
        attach: adds to a copy of the user's module what this part needs there: layers, `Private` tensors, hooks.
        memory: setup -> what each client keeps at first; names and shapes never change.
        server: setup -> the server's state of this part.
        rows: setup -> the server's row for each client at first. The server keeps one row per client of the
            population, hands in those of the clients that arrive, and writes them back.
        broadcast: central -> the shared tensors that clients train from. Who only predicts has `central.old`.
        message: central -> what one client is sent alone, from `central.state` and `central.rows`, its row. By
            default the row, from the client's first participation on; before, the client has the row of `rows`.
        begin: (local, weights so far) -> (weights to start from, memory).
        objective: local -> a loss of its own for local training.
        gradient: wraps the gradient: (grad, local) -> grad.
        direction: (direction, weights, local) -> what the optimizer descends along. Tensors that are left out of the
            result do not move.
        finish: local -> (memory, upload).
        contribute: on the server, what of one upload enters the mean: (central, arrival) -> tree, or (tree, weight).
            The weight is one number, or a tree of one number per value; it multiplies the method's weighting, and the
            mean divides by the sum of weights. A value that nobody counted stays as it is in the part's state, or in
            the shared tensors. By default this part's upload.
        aggregate: (central, mean) -> `Update`. A part that is `individual` gets the uploads themselves, ``(n, ...)``
            in the order of `central.clients`, in place of their mean.
        deploy: (local, weights after `begin`) -> weights that predict for this client.
        uniform: average clients equally whatever the method's weighting.
        individual: `aggregate` takes all uploads of the round, which are then held in memory at once.
        server_only: neither state nor rows are sent to clients, unless `message` says so.
        transductive: `deploy` reads the unlabelled inputs to predict, `local.inputs`; it runs after all others.
        gradients: extra gradients per step, for the cost table.
        idea: the first line of the docstring of the function that makes it.
        neutral: arguments that make it do nothing, where there are such; the checks use them.
        make: the function that makes it.
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

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.arguments)})"


def part(make: Callable[P, Part]) -> Callable[P, Part]:
    """Mark a function that makes a part: the part gets the function's name, its arguments and its idea.

    So a part prints as the call that made it, two parts made alike are equal, and a wrong argument is one
    clear line. Arguments must be plain values or scopes.

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
        bound, name = bind(make, *args, **kwargs), make.__name__
        idea = (inspect.getdoc(make) or "").partition("\n")[0]
        made = _made(name, lambda: make(*bound.args, **bound.kwargs))
        return replace(made, name=name, arguments=tuple(bound.arguments.items()), idea=idea, make=build)

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
"""The functions of a part, and what each is called with."""

_NEEDS = {
    "contribute": "aggregate",
    "individual": "aggregate",
    "message": "rows",
    "transductive": "deploy",
}
"""What is without effect unless the part has something else."""


def _made(name: str, make: Callable[[], Part]) -> Part:
    """Return a part, or say in one line which hook cannot be used."""
    try:
        made = make()
    except TypeError as error:
        told = re.search(r"Part\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if not told:
            raise
        known = [f.name for f in fields(Part)]
        raise UsageError(f"{name}: a Part has no {told[1]!r}{did_you_mean(told[1], known)}") from None
    require(isinstance(made, Part), f"{name}: a function marked @part must return a Part, not {made!r:.40}")
    for hook, takes in HOOKS.items():
        found = getattr(made, hook)
        if found is None:
            continue
        require(callable(found), f"{name}: {hook} must be a function ({takes}), not {found!r:.40}")
        try:
            signature = inspect.signature(found)
            signature.bind(*takes.split(", "))
        except TypeError:
            raise UsageError(f"{name}: {hook} is called with ({takes}), but takes {signature}") from None
        except ValueError:  # a function of C has no signature
            continue
    for lone, needed in _NEEDS.items():
        require(
            not getattr(made, lone) or bool(getattr(made, needed)),
            f"{name}: {lone} is without effect: the part has no {needed}",
        )
    return made


def bind(make: Callable[..., Any], *args: Any, **kwargs: Any) -> inspect.BoundArguments:  # noqa: ANN401
    """Return all arguments of a call, defaults included, or say in one line what is wrong with them."""
    signature, name = inspect.signature(make), make.__name__
    unknown = next((k for k in kwargs if k not in signature.parameters), None)
    if unknown is not None:
        raise UsageError(f"{name} has no argument {unknown!r}{did_you_mean(unknown, signature.parameters)}")
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(f"{name}: {error}; it takes {name}{signature}") from None
    bound.apply_defaults()
    return bound


def require(condition: bool, message: str) -> None:
    """Raise a `UsageError` unless the condition holds."""
    if not condition:
        raise UsageError(message)
