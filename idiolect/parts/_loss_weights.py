"""Clients that count for more the larger their loss is."""

from __future__ import annotations

import torch
from torch import Tensor

from idiolect.core.part import Part, part, require
from idiolect.core.scope import nothing
from idiolect.core.tree import Tree, norm, overlay, pick, vectors
from idiolect.core.types import Arrival, Central, Local, Update

LEAST = 1e-10
"""What is added to each loss, as in the authors' code: the move of a client is divided by its loss."""


@part
def loss_weights(q: float = 1.0) -> Part:
    r"""Weigh each client's move by a power of its loss, and shorten the moves that are long for their loss.

    .. math::  w^{t+1} = w^t + \frac{\sum_{i \in S_t} p_i F_i^q\, \Delta_i}
                   {\sum_{i \in S_t} p_i F_i^q \big(1 + q \lVert \Delta_i \rVert^2 / (\eta F_i)\big)}, \qquad
               \Delta_i = w_i^{t+} - w^t, \qquad  F_i = F_i(w^t) + 10^{-10}

    a step on :math:`\sum_i p_i F_i^{q+1} / (q + 1)`. :math:`F_i(w^t)` is the loss of all the client's training
    examples under the weights it received, normalized by running statistics; :math:`\eta` is the round's learning
    rate. On trainable tensors that are exchanged, the norm over all of them together; statistics are averaged plainly.
    The denominator is an estimate of curvature: it holds for plain descent, and is a rule of thumb under momentum,
    weight decay or clipping.

    Args:
        q: how much a larger loss counts, at least 0. 0 is the plain mean; with a large q the worst client decides,
            and steps become short.

    Memory:    none.       Sends: one value, :math:`F_i(w^t)`.       Receives: nothing.
    Cost:      one pass forward over the client's examples; on the server a second sum of what is shared.
    Raises:    UsageError: if `q` is negative, a client's loss is negative, or the power of a loss is too large.

    Example:
        >>> loss_weights(q=5)
        loss_weights(q=5)

    Reference: Li et al., q-FedAvg, ICLR 2020.
    Differs:   :math:`p_i` is the method's weighting. The paper draws clients in proportion to their examples and sums
        without :math:`p_i`; here they are drawn uniformly, so the mean carries it. The authors' code draws uniformly
        and sums without it: that is a uniform weighting. Dropout, where there is any, is on as in training. Public
        codes that take the loss from training, or the norm after the power, are not followed.
    """
    require(q >= 0, f"loss_weights: q must be at least 0, got {q}")

    def finish(local: Local) -> tuple[Tree, Tree]:
        received = overlay(local.start, local.shared)
        return local.memory, vectors(loss=local.whole(received, only=nothing).loss[..., None])

    def contribute(central: Central, arrival: Arrival) -> tuple[Tree, Tensor]:
        before = float(arrival.own["loss"])
        require(before >= 0, f"loss_weights: a client's loss is {before:.3g}; take a loss that is never negative")
        loss = arrival.own["loss"].double() + LEAST  # float32 has no room for powers
        old = pick(central.old, central.structure.names("weight"))
        move = pick(arrival.weights, old) - old
        slower = 1 + q * norm(move).double() ** 2 / (central.lr * loss)
        weight = loss**q * slower
        require(bool(torch.isfinite(weight)), f"loss_weights: {before:.3g} to the power of q = {q} is too large")
        return old + move / slower.to(move.flat), weight

    def aggregate(central: Central, mean: Tree) -> Update:
        return Update(shared=overlay(central.new, mean))

    return Part(finish=finish, contribute=contribute, aggregate=aggregate, neutral={"q": 0.0})
