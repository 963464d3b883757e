"""Forward passes with access to the inputs of layers, for losses and queries of parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor, nn
from torch.func import functional_call

from idiolect.compute.losses import own_loss
from idiolect.core.errors import UsageError, did_you_mean
from idiolect.core.nest import Nest, arguments, logits, tensors, with_logits
from idiolect.core.tree import Tree
from idiolect.core.types import Objective, Pass, Query, Seen, Term

T = TypeVar("T")
Asked = TypeVar("Asked", Objective, Query)
Features = Mapping[str, Tensor]
"""Captured inputs, by layer."""


class _Inside(nn.Module):
    """A module followed by a function that may use its layers and tensors."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Nest, layers: Sequence[str], then: Callable[[Nest, Features], T]) -> T:
        features: dict[str, Tensor] = {}
        known = dict(self.net.named_modules())
        if unknown := [n for n in layers if n not in known]:
            hint = did_you_mean(unknown[0], known) or f"; there are {', '.join(list(known)[1:7])}"
            raise UsageError(f"a part asks for layer {unknown[0]!r}, which the model does not have{hint}")

        def keep(layer: str) -> Callable[..., None]:
            return lambda module, given, named: features.update({layer: tensors((given, named))[0]})

        hooks = [
            self.net.get_submodule(n).register_forward_pre_hook(keep(n), prepend=True, with_kwargs=True) for n in layers
        ]
        try:
            outputs = call(self.net, x)
        finally:
            for hook in hooks:
                hook.remove()
        return then(outputs, features)


def call(module: nn.Module, x: Nest) -> Nest:
    """Return the outputs of a module; see `arguments` for how it is called."""
    if isinstance(x, Tensor):
        return module(x)
    alone, named = arguments(x)
    return module(*alone, **named)


def inside(
    module: nn.Module,
    state: Mapping[str, Tensor],
    x: Nest,
    layers: Sequence[str],
    then: Callable[[Nest, Features], T],
) -> tuple[T, dict[str, Tensor]]:
    """Run a module with these tensors, then a function of outputs and features while the tensors are in place.

    Returns:
        The result of the function, and the tensors after the pass, which may replace buffers.
    """
    within = {f"net.{name}": tensor for name, tensor in state.items()}
    found = functional_call(_Inside(module), within, (x, layers, then))
    return found, {name: within[f"net.{name}"] for name in state}


def loss_with(
    objectives: Sequence[Objective],
    plain: Callable[[Nest, Nest], Tensor],
    about: Callable[[str], Pass],
    outputs: Nest,
    y: Nest,
) -> Tensor:
    """Return the loss of a pass with these objectives around the plain loss, the first outermost.

    Args:
        objectives: the losses of parts.
        plain: the loss of the run.
        about: the pass as a part sees it, by layer.
        outputs: of the model, as the loss of the run takes them.
        y: targets.

    Raises:
        UsageError: if a part changes the predictions of a model that returns its own loss.
    """

    def wrapped(objective: Objective, inner: Term) -> Term:
        def term(seen: Pass, y: Nest) -> Tensor:
            mine = about(objective.layer)._replace(outputs=seen.outputs)
            return objective.loss(inner, mine, y, objective.facts)

        return term

    whole = logits(outputs)

    def term(seen: Pass, y: Nest) -> Tensor:
        if seen.outputs is whole:
            return plain(outputs, y)
        if plain is own_loss:
            raise UsageError(
                "a part of the method changes the predictions after the model has computed its own loss from them: "
                "give fit(loss=...), a function of outputs and targets"
            )
        return plain(with_logits(outputs, seen.outputs), y)

    chain: Term = term
    for objective in reversed(objectives):
        chain = wrapped(objective, chain)
    return chain(about(objectives[0].layer), y)


def rows_of(asked: Asked, rows: slice) -> Asked:
    """Return an objective or a query for some clients of a stack; facts without an axis of clients are kept."""
    facts = asked.facts
    return asked if facts.flat.dim() == 1 else asked._replace(facts=Tree(facts.layout, facts.flat[rows]))


def axis_of(facts: Tensor) -> int | None:
    """Return the axis of clients in facts, or None if they are the same for all clients."""
    return 0 if facts.dim() == 2 else None


def about(
    module: nn.Module,
    state: Mapping[str, Tensor],
    outputs: Tensor,
    features: Features,
    under: Callable[[str, Mapping[str, Tensor]], Seen],
) -> Callable[[str], Pass]:
    """Return a function from the name of a layer to the pass as a part sees it."""

    def seen(layer: str) -> Pass:
        if layer not in features:
            raise UsageError(
                f"layer {layer!r} is not called in a pass: name the layer that makes the output, names=..."
            )
        return Pass(outputs, features[layer], state, module.get_submodule(layer), lambda other: under(layer, other))

    return seen
