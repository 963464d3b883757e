"""Momentum from the last round's aggregated update, applied in local steps."""

from __future__ import annotations

from idiolect.core.part import Part, part, require
from idiolect.core.tree import Tree, mix, pick, zeros_like
from idiolect.core.types import Arrival, Central, Local, Setup, Update


@part
def server_momentum(alpha: float) -> Part:
    r"""Mix the local gradient with the direction of the last round's aggregated update.

    .. math::  d = \alpha\, g + (1-\alpha)\, \bar\nabla^{t}, \qquad
               \bar\nabla^{t+1} = \sum_{i \in S_t} p_i \frac{w^t - w_i^{t+}}{\eta_t K_i}, \qquad \bar\nabla^{0} = 0

    on trainable tensors that are exchanged; personal tensors follow only the gradient, since the server does not
    know their updates. In the first round there is no direction yet, and a step is :math:`\alpha \eta g`.

    Args:
        alpha: weight of the local gradient, in (0, 1]; 1 is no momentum.

    Memory:    none.       Sends: nothing.
    Receives:  the direction, one tensor per exchanged weight.
    Cost:      bytes down double; no extra gradient.
    Raises:    UsageError: if `alpha` is outside (0, 1]. The authors' default 0 never uses the data.

    Example:
        >>> server_momentum(0.1)
        server_momentum(alpha=0.1)

    Reference: Xu et al. 2021 (FedCM); Qu et al., ICML 2022 (MoFedSAM); alpha 0.1 in Xing et al., AAAI 2025.
    Differs:   the authors divide by the first client's number of steps and the initial learning rate, and
        multiply by the decay; here each client's own steps and the round's learning rate are used, which is the same
        if clients have equal sizes and the rate is constant.
    """
    require(0 < alpha <= 1, f"server_momentum: alpha must be in (0, 1], got {alpha}; 0 would never use the data")

    def server(setup: Setup) -> Tree:
        return zeros_like(pick(setup.shared, setup.structure.names("weight")))

    def direction(direction: Tree, weights: Tree, local: Local) -> Tree:
        return mix(alpha, direction, pick(local.received, direction))

    def contribute(central: Central, arrival: Arrival) -> Tree:
        moved = central.old - arrival.weights
        return pick(moved, central.structure.names("weight")) / (central.lr * arrival.steps)

    def aggregate(central: Central, mean: Tree) -> Update:
        return Update(mean)

    return Part(server=server, direction=direction, contribute=contribute, aggregate=aggregate, neutral={"alpha": 1.0})
