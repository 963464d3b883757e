"""Sharpness-aware minimization of the server: clients start where the loss of all is worse nearby."""

from __future__ import annotations

import torch

from idiolect.core.part import Part, part, require
from idiolect.core.tree import EMPTY, Tree, axpy, layout, norm, pick
from idiolect.core.types import Arrival, Central, Start
from idiolect.parts._sharpness import EPSILON


@part
def server_sam(rho: float) -> Part:
    r"""Send the weights moved uphill along the last pseudo-gradient; take the move off the mean that comes back.

    .. math::  \tilde w^t = w^t + \varepsilon^t, \qquad
               \varepsilon^t = \rho\, \frac{\Delta^{t-1}}{\lVert \Delta^{t-1} \rVert + 10^{-7}}, \qquad
               \Delta^t = \sum_{i \in S_t} p_i\, (\tilde w^t - w_i^{t+}), \qquad  w^{t+1} = w^t - \Delta^t

    on trainable tensors that are exchanged. In the first round, where there is no pseudo-gradient yet, nothing is
    moved. Who only predicts gets :math:`w^t`.

    Args:
        rho: radius, at least 0; 0 moves nothing.

    Memory:    none; the server keeps the move that it sent and the next one.
    Sends:     nothing.      Receives: nothing: the weights that are sent are moved.
    Cost:      no extra gradient.
    Raises:    UsageError: if `rho` is negative.

    Example:
        >>> server_sam(0.1)
        server_sam(rho=0.1)

    Reference: Caldarola et al., FedGloSS, CVPR 2025.
    Differs:   the radius is the same in all rounds; the authors let it grow over the first of them.
    """
    require(rho >= 0, f"server_sam: rho must be at least 0, got {rho}")

    def server(start: Start) -> Tree:
        weights = pick(start.shared, start.structure.names("weight"))
        return Tree.of({f"{which}/{n}": torch.zeros_like(t) for which in ("sent", "next") for n, t in weights.items()})

    def broadcast(shared: Tree, slot: Tree) -> tuple[Tree, Tree]:
        return axpy(1.0, _move("next", slot), shared), EMPTY

    def arrive(central: Central, arrival: Arrival) -> Tree:
        return pick(central.old - arrival.uploads["share"], central.structure.names("weight"))

    def aggregate(central: Central, slot: Tree, mean: Tree) -> Tree:
        ahead = mean * (rho / (norm(mean) + EPSILON))
        return Tree(slot.layout, torch.cat([_move("next", slot).flat, ahead.flat]))

    def advance(central: Central, slot: Tree) -> Tree:
        return axpy(-1.0, _move("sent", slot), central.new)

    return Part(
        server=server,
        broadcast=broadcast,
        arrive=arrive,
        aggregate=aggregate,
        advance=advance,
        neutral={"rho": 0.0},
    )


def _move(which: str, slot: Tree) -> Tree:
    """Return one of the two moves in a slot, by the names of the weights."""
    own = pick(slot, {n for n in slot if n.startswith(f"{which}/")})
    return Tree(layout(tuple(n.removeprefix(f"{which}/") for n in own), own.layout.shapes), own.flat)
