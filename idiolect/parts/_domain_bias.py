"""Where a client's features lie, taken apart into what is its own and what is everybody's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idiolect.core.part import Part, part, require
from idiolect.core.scope import Scope, head
from idiolect.core.tree import EMPTY, Tree, layout, overlay, pick
from idiolect.core.types import Central, Local, Objective, Pass, Setup, Term, Update
from idiolect.parts.common.classes import classifier, equip

NAME = "domain_bias"


@dataclass(frozen=True)
class _Shifted:
    """Moves the running mean of a layer's features, and shifts them.

    Adds W z to h(u) instead of z to u, which is the same: whoever looks at features sees u.
    """

    momentum: float

    def __call__(self, layer: nn.Module, given: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
        here: Any = layer
        own = here.domain_bias
        if layer.training:
            own.mean = _moved(own.mean, given[0].detach(), self.momentum)
        return outputs + F.linear(own.vector, here.weight)


def _moved(mean: Tensor, features: Tensor, momentum: float) -> Tensor:
    return (1 - momentum) * mean + momentum * features.mean(dim=0)


@part
def domain_bias(strength: float = 5.0, momentum: float = 0.1, names: Scope = head) -> Part:
    r"""Give each client a vector of its own on top of its features, and hold their mean at everybody's.

    .. math::  h_i(x) = h\big(u(x) + z_i\big), \qquad
               F_i + \frac{\kappa}{2d} \lVert m_i - \bar m \rVert^2, \qquad
               m_i \leftarrow (1 - \mu)\, m_i + \mu\, \overline{u(x)}

    So the body learns features that lie alike at all clients, and :math:`z_i` takes up where a client's own
    lie. :math:`m_i` begins every round at 0 and moves with every batch; only that of the present batch is
    differentiated. The first round is without all this: it gives :math:`\bar m`, the mean of its clients'
    last :math:`m_i`, once and for all. :math:`z_i` begins at 0 and trains with the rest, by the same optimizer.

    Args:
        strength: :math:`\kappa`, at least 0; with 0 there are the vectors and nothing else. What a step sees of the
            pull is :math:`\kappa \mu / d`, so it goes with momentum and the scale of features.
        momentum: :math:`\mu`, in (0, 1]; 1 takes the mean of each batch by itself.
        names: the head, a linear layer.

    Memory:    :math:`z_i` and :math:`m_i`, d values each, for d features.
    Sends:     :math:`m_i`, d values a round, of which the server uses those of the first.
    Receives:  :math:`\bar m`, d values.
    Cost:      no extra gradient.
    Raises:    UsageError: if an argument is out of range, or `names` is no linear layer.

    Example:
        >>> domain_bias(strength=10.0)
        domain_bias(strength=10.0, momentum=0.1, names=head)

    Reference: Zhang et al., FedDBE, NeurIPS 2023. The authors choose both numbers for each data set; their example
        has 50 and 1.
    Differs:   the authors' first phase has all clients; here it is the first round, whoever takes part in it,
        and a client that comes later begins with all terms. Their :math:`z_i` has an optimizer of its own,
        without momentum, decay and clipping; here those of the run act on it.
    """
    require(strength >= 0, f"domain_bias: strength must be at least 0, got {strength}")
    require(0 < momentum <= 1, f"domain_bias: momentum must be in (0, 1], got {momentum}")

    def attach(module: nn.Module) -> None:
        if found := equip(module, names, NAME):
            layer, own = found
            zeros = layer.weight.detach().new_zeros(layer.in_features)
            own.register_parameter("vector", nn.Parameter(zeros.clone()))
            own.register_buffer("mean", zeros, persistent=False)
            layer.register_forward_hook(_Shifted(momentum))

    def server(setup: Setup) -> Tree:
        return Tree.of({"mean": setup.weights.flat.new_zeros(classifier(names, setup.structure).features)})

    def own(local: Local, name: str) -> str:
        return classifier(names, local.structure).tensor(f"{NAME}.{name}")

    def begin(local: Local, weights: Tree) -> tuple[Tree, Tree]:
        mean = own(local, "mean")
        zeros = Tree.of({mean: weights.flat.new_zeros(local.structure.layout.shape_of[mean])})
        return overlay(weights, zeros), local.memory

    def objective(local: Local) -> Objective:
        mean = own(local, "mean")

        def loss(inner: Term, seen: Pass, y: Tensor, facts: Tree) -> Tensor:
            gap = _moved(seen.weights[mean], seen.features, momentum) - facts["mean"]
            return inner(seen, y) + strength / 2 * gap.square().mean()

        def plain(inner: Term, seen: Pass, y: Tensor, facts: Tree) -> Tensor:
            return inner(seen, y)

        layer = classifier(names, local.structure).layer
        return Objective(layer, loss, local.received) if local.round else Objective(layer, plain, EMPTY)

    def direction(direction: Tree, weights: Tree, local: Local) -> Tree:
        return direction if local.round else pick(direction, frozenset(direction) - {own(local, "vector")})

    def finish(local: Local) -> tuple[Tree, Tree]:
        found = local.end.stretch(own(local, "mean"))
        return local.memory, Tree(layout(("mean",), (torch.Size(found.shape[-1:]),)), found)

    def aggregate(central: Central, mean: Tree) -> Update:
        return Update() if central.round else Update(mean)

    return Part(
        attach=attach,
        server=server,
        begin=begin,
        objective=objective,
        direction=direction,
        finish=finish,
        aggregate=aggregate,
    )
