"""Weights of clients that increase with their loss."""

from __future__ import annotations

import torch
from torch import Tensor

from idiolect.core.part import Part, part, require
from idiolect.core.scope import nothing
from idiolect.core.tree import Tree, norm, overlay, pick, vectors
from idiolect.core.types import Arrival, Central, Local, Update

LEAST = 1e-10
"""Constant added to each loss, as in the authors' code, since a client's update is divided by its loss."""


@part
def loss_weights(q: float = 1.0) -> Part:
    r"""Weight each client's update by a power of its loss, and divide by an estimate of the curvature.

    .. math::  w^{t+1} = w^t + \frac{\sum_{i \in S_t} p_i F_i^q\, \Delta_i}
                   {\sum_{i \in S_t} p_i F_i^q \big(1 + q \lVert \Delta_i \rVert^2 / (\eta F_i)\big)}, \qquad
               \Delta_i = w_i^{t+} - w^t, \qquad  F_i = F_i(w^t) + 10^{-10}

    a step on :math:`\sum_i p_i F_i^{q+1} / (q + 1)`. :math:`F_i(w^t)` is the loss on all the client's training
    examples with the received weights, normalized with running statistics; :math:`\eta` is the round's learning
    rate. This applies to trainable tensors that are exchanged, with the norm over all of them together; statistics
    take the plain mean. The denominator is an estimate of curvature: it holds for plain gradient descent, and is a
    heuristic with momentum, weight decay or clipping.

    Args:
        q: exponent of the loss, at least 0. 0 is the plain mean; with a large q the client with the largest loss
            dominates, and steps become short.

    Memory:    none.       Sends: one value, :math:`F_i(w^t)`.       Receives: nothing.
    Cost:      one forward pass over the client's examples; on the server a second sum of the shared tensors.
    Raises:    UsageError: if `q` is negative, a client's loss is negative, or the power of a loss is too large.

    Example:
        >>> loss_weights(q=5)
        loss_weights(q=5.0)

    Reference: Li et al., q-FedAvg, ICLR 2020.
    Differs:   :math:`p_i` is the method's weighting. The paper samples clients in proportion to their examples and
        sums without :math:`p_i`; here they are sampled uniformly, so the mean includes it. The authors' code samples
        uniformly and sums without it, which is a uniform weighting. Dropout is on, as in training. Some public code
        takes the loss from training, or the norm after the power; this part does not.
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
