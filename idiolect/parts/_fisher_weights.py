"""Weights of clients from the trace of their Fisher information."""

from __future__ import annotations

import torch
from torch import Tensor

from idiolect.core.part import Part, part
from idiolect.core.tree import Tree, layout, norm
from idiolect.core.types import Arrival, Central, Local, Update

LEAST = 1e-12
"""The smallest weight: clients that have all fitted their data get equal weights."""


@part
def fisher_weights() -> Part:
    r"""Weight clients by the trace of their Fisher information instead of their numbers of examples.

    .. math::  w^{t+1} = \frac{\sum_{i \in S_t} I_i\, w_i^{t+}}{\sum_{i \in S_t} I_i}, \qquad
               I_i = \sum_{B} \lVert \nabla F_i(w_i^{t+}; B) \rVert^2

    over the batches B of a pass, in all trainable weights, normalized with running statistics. A client whose model
    has not yet fitted its data has a larger weight. These weights apply to all shared tensors, and replace the
    method's weighting.

    Memory:    none.       Sends: one value.       Receives: nothing.
    Cost:      one pass of gradients at the end of a round; on the server a second sum of the shared tensors.

    Example:
        >>> fisher_weights()
        fisher_weights()

    Reference: Yang et al., FedAS, CVPR 2024.
    Differs:   as in the authors' code, the gradient is that of a batch, not of each example, so the trace
        depends on the batch size; it is a sum, so it grows with the number of batches. Their code computes it
        for all clients in every round; here it is computed for those that take part.
    """

    def finish(local: Local) -> tuple[Tree, Tree]:
        trace = torch.zeros_like(norm(local.end))
        for step in local.stream.epochs(1):
            trace = trace + norm(local.grad(local.end, step._replace(frozen=True)).gradient) ** 2
        return local.memory, Tree(layout(("trace",), (torch.Size((1,)),)), trace)

    def contribute(central: Central, arrival: Arrival) -> tuple[Tree, Tensor]:
        return arrival.weights, arrival.own["trace"].clamp(min=LEAST)

    def aggregate(central: Central, mean: Tree) -> Update:
        return Update(shared=mean)

    return Part(finish=finish, contribute=contribute, aggregate=aggregate, uniform=True)
