"""One idea of a method: a `Part` is a handful of pure functions whose defaults do nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, ParamSpec

from torch import nn

from idiolect.core.errors import UsageError, did_you_mean
from idiolect.core.tree import EMPTY, Tree
from idiolect.core.types import Arrival, Central, GradFn, Local, Objective, Slot, Start

P = ParamSpec("P")


def _empty(start: Start) -> Tree:
    return EMPTY


def _send_the_slot(shared: Tree, slot: Tree) -> tuple[Tree, Tree]:
    return shared, slot


def keep_the_slot(shared: Tree, slot: Tree) -> tuple[Tree, Tree]:
    """Send the shared tensors alone: a `broadcast` for what the server keeps to itself."""
    return shared, EMPTY


def _same_weights(local: Local, weights: Tree, slot: Slot) -> tuple[Tree, Tree]:
    return weights, slot.memory


def _same_gradient(grad: GradFn, local: Local, slot: Slot) -> GradFn:
    return grad


def _same_direction(direction: Tree, weights: Tree, local: Local, slot: Slot) -> Tree:
    return direction


def _send_nothing(local: Local, slot: Slot) -> tuple[Tree, Tree]:
    return slot.memory, EMPTY


def _same_slot(central: Central, slot: Tree, mean: Tree) -> Tree:
    return slot


def _same_shared(central: Central, slot: Tree) -> Tree:
    return central.new


def _same_model(local: Local, weights: Tree, slot: Slot) -> Tree:
    return weights


def _nothing_to_show(memory: Tree) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Part:
    """One idea of a method, as pure functions of trees. Make one with a function marked `@part`.

    In list order: `attach`, `broadcast`, `begin`, `direction`, `finish`, `aggregate` with `advance`, and `deploy`.
    The first listed `gradient` is the outermost, and so is the first `objective`. A part reads its own slot only;
    what it keeps and what it sends are what its functions return. The weights that `gradient` and `direction` are
    given move with the next step: a part keeps no hold of them, and differentiates through `Local.grad` alone, since
    steps may run in inference mode. Reductions run along the last axis (see `Tree`), so that an engine may stack
    clients.

    Attributes:
        attach: adds to a copy of the user's module what this part needs there: layers, `Private` tensors, hooks.
        memory: start -> what each client keeps at first; names and shapes never change.
        server: start -> the server's slot.
        mail: start -> what a client has been told personally before it first takes part; for parts that `confer`.
        broadcast: what clients that train are sent: (shared tensors, slot) -> (shared tensors, message). By default
            both as they are. Who only predicts has the shared tensors unchanged, and the message.
        begin: message in: (local, weights so far, slot) -> (weights to start from, memory).
        objective: (local, slot) -> a loss of its own for local training.
        gradient: wraps the gradient: (grad, local, slot) -> grad.
        direction: (direction, weights, local, slot) -> what the optimizer descends along. Tensors that are
            left out of the result do not move.
        finish: message out: (local, slot) -> (memory, upload).
        arrive: on the server, what of one upload enters the mean, or is conferred about: (central, arrival) -> tree.
            By default this part's upload.
        aggregate: (central, slot, mean over the cohort) -> slot.
        advance: (central, slot after `aggregate`) -> shared tensors: the server's own step.
        confer: (central, what arrived, one row a client) -> mail, one row a client: what the server tells each
            client of the cohort alone, in the layout of `mail`; an empty tree where it tells them nothing this
            round. The client keeps it with its memory. What is conferred about enters no mean.
        deploy: (local, weights after `begin`, slot) -> weights that predict for this client.
        show: memory -> what a person may want to see of it.
        uniform: average clients equally whatever the method's weighting.
        gradients: extra gradients per step, for the cost table.
        idea: the first line of the docstring of the function that makes it.
        neutral: arguments that make it do nothing, where there are such; the checks use them.
        make: the function that makes it.
    """

    name: str = ""
    arguments: tuple[tuple[str, Any], ...] = ()
    attach: Callable[[nn.Module], None] | None = field(default=None, compare=False)
    memory: Callable[[Start], Tree] = field(default=_empty, compare=False)
    server: Callable[[Start], Tree] = field(default=_empty, compare=False)
    mail: Callable[[Start], Tree] = field(default=_empty, compare=False)
    broadcast: Callable[[Tree, Tree], tuple[Tree, Tree]] = field(default=_send_the_slot, compare=False)
    begin: Callable[[Local, Tree, Slot], tuple[Tree, Tree]] = field(default=_same_weights, compare=False)
    objective: Callable[[Local, Slot], Objective] | None = field(default=None, compare=False)
    gradient: Callable[[GradFn, Local, Slot], GradFn] = field(default=_same_gradient, compare=False)
    direction: Callable[[Tree, Tree, Local, Slot], Tree] = field(default=_same_direction, compare=False)
    finish: Callable[[Local, Slot], tuple[Tree, Tree]] = field(default=_send_nothing, compare=False)
    arrive: Callable[[Central, Arrival], Tree] | None = field(default=None, compare=False)
    aggregate: Callable[[Central, Tree, Tree], Tree] = field(default=_same_slot, compare=False)
    advance: Callable[[Central, Tree], Tree] = field(default=_same_shared, compare=False)
    confer: Callable[[Central, Tree], Tree] | None = field(default=None, compare=False)
    deploy: Callable[[Local, Tree, Slot], Tree] = field(default=_same_model, compare=False)
    show: Callable[[Tree], Mapping[str, Any]] = field(default=_nothing_to_show, compare=False)
    uniform: bool = field(default=False, compare=False)
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
        ...     def direction(direction, weights, local, slot):
        ...         return factor * direction
        ...     return Part(direction=direction)
        >>> slower(0.1), slower(0.1) == slower(factor=0.1), slower().idea
        (slower(factor=0.1), True, 'Shorten every step.')
    """

    @wraps(make)
    def build(*args: P.args, **kwargs: P.kwargs) -> Part:
        bound = bind(make, *args, **kwargs)
        idea = (inspect.getdoc(make) or "").partition("\n")[0]
        made = make(*bound.args, **bound.kwargs)
        return replace(made, name=make.__name__, arguments=tuple(bound.arguments.items()), idea=idea, make=build)

    return build


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
