"""Sharpness-aware minimization on the server: clients start from perturbed shared weights."""

from __future__ import annotations

from idiolect.core.part import Part, part, require
from idiolect.core.tree import Tree, axpy, norm, pick, zeros_like
from idiolect.core.types import Arrival, Central, Setup, Update
from idiolect.parts.common.ascent import EPSILON


@part
def server_sam(rho: float) -> Part:
    r"""Send weights perturbed along the last pseudo-gradient; subtract the perturbation from the returned mean.

    .. math::  \tilde w^t = w^t + \varepsilon^t, \qquad
               \varepsilon^t = \rho\, \frac{\Delta^{t-1}}{\lVert \Delta^{t-1} \rVert + 10^{-7}}, \qquad
               \Delta^t = \sum_{i \in S_t} p_i\, (\tilde w^t - w_i^{t+}), \qquad  w^{t+1} = w^t - \Delta^t

    on trainable tensors that are exchanged. In the first round there is no pseudo-gradient yet, and no perturbation.
    Clients that only predict receive :math:`w^t`.

    Args:
        rho: radius, at least 0; 0 is no perturbation.

    Memory:    none; the server keeps the next perturbation.
    Sends:     nothing.      Receives: nothing: the weights are perturbed before they are sent.
    Cost:      no extra gradient.
    Raises:    UsageError: if `rho` is negative.

    Example:
        >>> server_sam(0.1)
        server_sam(rho=0.1)

    Reference: Caldarola et al., FedGloSS, CVPR 2025.
    Differs:   the radius is the same in all rounds; the authors increase it over the first rounds.
    """
    require(rho >= 0, f"server_sam: rho must be at least 0, got {rho}")

    def server(setup: Setup) -> Tree:
        return zeros_like(pick(setup.shared, setup.structure.names("weight")))

    def broadcast(central: Central) -> Tree:
        return axpy(1.0, central.state, central.old)

    def contribute(central: Central, arrival: Arrival) -> Tree:
        return pick(central.old - arrival.weights, central.structure.names("weight"))

    def aggregate(central: Central, mean: Tree) -> Update:
        ahead = mean * (rho / (norm(mean) + EPSILON))
        return Update(ahead, shared=axpy(-1.0, central.state, central.new))

    return Part(
        server=server,
        broadcast=broadcast,
        contribute=contribute,
        aggregate=aggregate,
        server_only=True,
        neutral={"rho": 0.0},
    )
