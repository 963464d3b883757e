"""A personal shift of the features, which separates client-specific from shared features."""

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
from idiolect.parts.common.outputs import change_outputs

NAME = "domain_bias"


@dataclass(frozen=True)
class _Shifted:
    """A module that updates the running mean of a layer's features, and shifts the features.

    It adds W z to h(u) instead of z to u, which is equivalent: other parts that read features get u.
    """

    momentum: float

    def __call__(self, layer: Any, x: Tensor, outputs: Tensor) -> Tensor:  # noqa: ANN401
        own = layer.domain_bias
        if layer.training:
            own.mean = _moved(own.mean, x.detach(), self.momentum)
        return outputs + F.linear(own.vector, layer.weight)


def _moved(mean: Tensor, features: Tensor, momentum: float) -> Tensor:
    return (1 - momentum) * mean + momentum * features.mean(dim=0)


@part
def domain_bias(strength: float = 5.0, momentum: float = 0.1, names: Scope = head) -> Part:
    r"""Add a personal vector to each client's features, and regularize their mean toward the global mean.

    .. math::  h_i(x) = h\big(u(x) + z_i\big), \qquad
               F_i + \frac{\kappa}{2d} \lVert m_i - \bar m \rVert^2, \qquad
               m_i \leftarrow (1 - \mu)\, m_i + \mu\, \overline{u(x)}

    The body learns features with similar means on all clients, and :math:`z_i` represents the client-specific
    offset. :math:`m_i` starts every round at 0 and is updated on every batch; only the term of the current batch is
    differentiated. The first round uses neither the vector nor the pull: it computes :math:`\bar m`, the mean of its
    clients' last :math:`m_i`, which is then fixed. :math:`z_i` starts at 0 and is trained with the same optimizer as
    the other weights.

    Args:
        strength: :math:`\kappa`, at least 0; with 0 only the vectors remain. The effective strength in a step is
            :math:`\kappa \mu / d`, so it depends on momentum and on the scale of features.
        momentum: :math:`\mu`, in (0, 1]; 1 uses the mean of each batch alone.
        names: the head, a linear layer.

    Memory:    :math:`z_i` and :math:`m_i`, d values each, for d features.
    Sends:     :math:`m_i`, d values per round; the server uses those of the first round.
    Receives:  :math:`\bar m`, d values.
    Cost:      no extra gradient.
    Raises:    UsageError: if an argument is out of range, or `names` is no linear layer.

    Example:
        >>> domain_bias(strength=10.0)
        domain_bias(strength=10.0, momentum=0.1, names=head)

    Reference: Zhang et al., FedDBE, NeurIPS 2023. The authors choose both numbers for each data set; their example
        has 50 and 1.
    Differs:   the authors' first phase has all clients; here it is the first round, with the clients that take part
        in it, and a client that joins later starts with all terms. Their :math:`z_i` has a separate optimizer,
        without momentum, decay and clipping; here those of the run apply to it.
    """
    require(strength >= 0, f"domain_bias: strength must be at least 0, got {strength}")
    require(0 < momentum <= 1, f"domain_bias: momentum must be in (0, 1], got {momentum}")

    def attach(module: nn.Module) -> None:
        if found := equip(module, names, NAME):
            layer, own = found
            zeros = layer.weight.detach().new_zeros(layer.in_features)
            own.register_parameter("vector", nn.Parameter(zeros.clone()))
            own.register_buffer("mean", zeros, persistent=False)
            change_outputs(layer, _Shifted(momentum))

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
